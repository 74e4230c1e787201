"Every direction and loss against its float64 reference; scale, empty sets, settings, text"
import copy
import io
import math
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import Case, NeverLooks, bumpy, ce, close, data, each, holes, run, step
from torch import nn

from newton_losses_nb import (
    Clip, ClippedLoss, DiagonalFisher, DiagonalHessian, Direction, Fisher, Hessian, Krylov,
    MovingAverage, NewtonLoss, Normalize, NormalizedLoss, OutputLoss, PerSample, Remembering,
    Scalar, ScalarStepLoss,
    Whiten, Window, inject_fisher, newton_direction, newton_target)
from newton_losses_nb.core.derivatives import NonFiniteError
from newton_losses_nb.core.evidence import SingularError

HESSIANS = [Case("hessian", 4.), Case("hessian", 4., power=.5), Case("hessian", .3, 1., "abs"),
            Case("hessian", .3, .5, "abs"), Case("hessian", .3, 1., "clip"),
            Case("hessian", .3, .25, "clip")]
DIAGONALS = [Case("dfisher", .1), Case("dhessian", 4.), Case("dhessian", .3, 1., "abs"),
             Case("dhessian", .3, 1., "clip")]
CURVED = [Case("fisher", .05), Case("fisher", .2, power=.25), Case("whiten", .1), *HESSIANS,
          *DIAGONALS]
ALONE = [Case("plain"), Case("clip", .3), Case("normalize"), Case("scalar", .2), Case("krylov", 4.)]
OWN = [Case(c.kind, c.lam, c.power, c.eigenvalues, own=True) for c in (*CURVED, *ALONE[2:])]
MASKED = [Case("plain"), Case("clip", .3), *CURVED,
          *[c for c in OWN if c.kind not in ("scalar", "krylov")]]
SUMMED = [*[c for c in CURVED if c.kind != "hessian" or c.power == 1], *ALONE[2:4]]
REMEMBERED = [Case("fisher", .1), Case("hessian", .3, 1., "abs"), Case("dfisher", .1),
              Case("dhessian", 4.)]
MAKES = pytest.mark.parametrize("make", [Fisher, Hessian, DiagonalFisher, DiagonalHessian, Scalar,
                                         Whiten, Krylov])
MEMORIES = [("window", 2), ("window", 10), ("average", .6)]
cases = lambda found: pytest.mark.parametrize("case", found, ids=str)

def spoil(y, u, w, rows=(1, 4)):
    "An infinite output, and a loss that is no number"
    y, w = y.clone(), w.clone()
    y[..., rows[0], -1], w[..., rows[1]] = torch.inf, torch.nan
    return y, u, w

# ---------------------------------------------------------------- one batch

@pytest.mark.parametrize("N, m", [(7, 4), (3, 6), (1, 3), (5, 1)])
@cases([*CURVED, *ALONE, *OWN])
def test_one_batch(case, N, m):
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        y, *args = data(N, m, 1, dtype=dtype)
        value, D, grad = step(case, bumpy, (y, args, None))
        got = run(OutputLoss(bumpy, case.direction()), y, *args)
        assert got[0].dtype == got[1].dtype == dtype
        close(got[0], value, tol)
        close(got[1], grad, tol)
        loss, found = OutputLoss(bumpy, case.direction()).directions(y, *args)
        close(loss, bumpy(y, *args), tol)
        close(found, D, tol)

@cases([*CURVED[:4], *ALONE[:4], *OWN[:4]])
def test_bfloat16(case):
    y, u, w = data(6, 4, 2)
    y = y.bfloat16()
    value, _, grad = step(case, bumpy, (y, (u, w), None))
    got = run(OutputLoss(bumpy, case.direction()), y, u.float(), w.float())
    assert got[1].dtype == torch.bfloat16
    close(got[0], value, 2e-2)
    close(got[1], grad, 2e-2)

@pytest.mark.parametrize("chunk, bad", [(2, False), (None, True), (3, True)])
@cases([*CURVED, *ALONE, *OWN])
def test_chunks_and_bad_samples(case, chunk, bad):
    y, u, w = data(7, 4, 3)
    if bad: y, u, w = spoil(y, u, w)
    value, _, grad = step(case, bumpy, (y, (u, w), None))
    loss = OutputLoss(bumpy, case.direction(), chunk_size=chunk, on_nonfinite="skip")
    got = run(loss, y, u, w)
    close(got[0], value)
    close(got[1], grad)
    if bad:
        assert not got[1][[1, 4]].any()
        with pytest.raises(NonFiniteError):
            run(OutputLoss(bumpy, case.direction(), chunk_size=chunk), y, u, w)
        got = run(OutputLoss(bumpy, case.direction(), chunk, on_nonfinite="gradient"), y, u, w)
        close(got[1], grad)

@pytest.mark.parametrize("chunk, bad", [(None, False), (3, True)])
@cases(MASKED)
def test_masks(case, chunk, bad):
    y, u, w = data(9, 4, 4)
    mask = holes(9, 4, 4)
    assert len(mask.unique(dim=0)) > 5
    if bad:
        mask[[3, 4]] = torch.tensor([False, True, True, True])
        y, u, w = spoil(y, u, w, (3, 4))
    y = torch.where(mask, y, torch.nan)                        # what padding holds must not matter
    value, D, grad = step(case, bumpy, (y, (u, w), mask))
    loss = OutputLoss(bumpy, case.direction(), chunk_size=chunk,
                      on_nonfinite="skip" if bad else "raise")
    got = run(loss, y, u, w, mask=mask)
    close(got[0], value)
    close(got[1], grad)
    assert not got[1][~mask].any()
    close(loss.directions(y, u, w, mask=mask)[1], D)

def test_masked_root_mean_square():
    y, u, w = data(4, 4, 5)
    mask = ~torch.eye(4, dtype=torch.bool)                     # each output is there equally often
    want = step(Case("normalize"), bumpy, (y, (u, w), mask))[2]
    close(run(NormalizedLoss(bumpy), y, u, w, mask=mask)[1], want)

def test_full_mask_is_no_mask():
    y, *args = data(6, 4, 6)
    for case in (*CURVED, *ALONE[:4], *OWN):
        if case.kind == "krylov": continue
        plain, full = (run(OutputLoss(bumpy, case.direction()), y, *args, mask=k)
                       for k in (None, torch.ones(6, 4, dtype=torch.bool)))
        close(full[0], plain[0])
        close(full[1], plain[1])

# ---------------------------------------------------------------- memory

def batches(masked, bad, sizes=(5, 3, 6, 1, 4), m=4):
    "Some batches of different sizes; with masks, the first ones lack an output"
    out = []
    for k, N in enumerate(sizes):
        y, u, w = data(N, m, 10 + k)
        mask = torch.ones(N, m, dtype=torch.bool)
        if masked and k < len(sizes) - 1: mask[:, -1], mask[0] = False, torch.arange(m) != k
        if bad and N > 2: y, u, w = spoil(y, u, w, (1, 2))
        out.append((y, (u, w), mask if masked else None))
    return out

@pytest.mark.parametrize("masked, bad, chunk", [(False, False, None), (False, True, 3),
                                                (True, True, 2)])
@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@cases(SUMMED)
def test_memory(case, memory, masked, bad, chunk):
    if masked and case.kind in ("normalize", "scalar"): pytest.skip("not laid down")
    case = Case(case.kind, case.lam, case.power, case.eigenvalues, memory=memory)
    loss = OutputLoss(bumpy, case.direction(), chunk, on_nonfinite="skip" if bad else "raise")
    past = batches(masked, bad)
    for k, (y, args, mask) in enumerate(past):
        got = run(loss, y, *args, mask=mask)
        if k not in (1, len(past) - 1): continue
        value, _, grad = step(case, bumpy, *past[:k+1])
        close(got[0], value)
        close(got[1], grad)

@pytest.mark.parametrize("memory", MEMORIES[1:], ids=str)
@cases(REMEMBERED)
def test_memory_is_kept_only_when_training(case, memory):
    case = Case(case.kind, case.lam, case.power, case.eigenvalues, memory=memory)
    loss, past = OutputLoss(bumpy, case.direction()), batches(False, False)
    (y0, a0, _), (y1, a1, _), (y2, a2, _), *_ = past
    run(loss, y0, *a0)
    loss.eval()
    close(run(loss, y1, *a1)[1], step(case, bumpy, *past[:2])[2])      # seen, not kept
    loss.train()
    with torch.no_grad(): loss(y1.requires_grad_(), *a1)
    loss(y1.detach(), *a1)
    loss.directions(y1.detach(), *a1)
    saved = io.BytesIO()
    torch.save(loss.state_dict(), saved)
    want = step(case, bumpy, past[0], past[2])[2]
    close(run(loss, y2, *a2)[1], want)

    again = OutputLoss(bumpy, case.direction())
    again.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
    close(run(again, y2, *a2)[1], want)
    loss.direction.reset()
    close(run(loss, y2, *a2)[1], step(case, bumpy, past[2])[2])

@pytest.mark.parametrize("other", [lambda: Remembering(Hessian(4.), Window(3)),
                                   lambda: Remembering(Fisher(.1), MovingAverage(.5))])
def test_a_foreign_memory_is_refused(other):
    y, *args = data(5, 4, 7)
    first = OutputLoss(bumpy, Remembering(Fisher(.1), Window(3)))
    second = OutputLoss(bumpy, other())
    run(first, y, *args)
    with pytest.raises((ValueError, RuntimeError, TypeError)) as e:
        second.load_state_dict(first.state_dict())
        run(second, y, *args)
    assert "expected" in str(e.value) and "4 of them, got 4" not in str(e.value)

# ---------------------------------------------------------------- micro-batches

@pytest.mark.parametrize("bad", [False, True])
@cases(SUMMED)
def test_accumulated(case, bad):
    y, u, w = data(9, 4, 8)
    if bad: y, u, w = spoil(y, u, w)
    D = step(case, bumpy, (y, (u, w), None))[1]
    loss = OutputLoss(bumpy, case.direction(), on_nonfinite="skip" if bad else "raise")
    micro = [[x[i] for x in (y, u, w)] for i in (slice(0, 5), slice(5, 6), slice(6, 9))]
    good = [sum(bool(torch.isfinite(bumpy(*b)[i])) for i in range(len(b[0]))) for b in micro]
    with loss.accumulated(tuple(b) for b in micro): got = [run(loss, *b)[1] for b in micro]
    close(torch.cat([g*n for g, n in zip(got, good)]), D)
    # over, and nothing is left
    close(run(loss, y, u, w)[1], step(case, bumpy, (y, (u, w), None))[2])

# ---------------------------------------------------------------- leading dimensions

@pytest.mark.parametrize("lead, chunk, bad", [((2,), None, False), ((2, 2), 2, True)])
@cases([*CURVED, *ALONE, *OWN])
def test_leading_dimensions(case, lead, chunk, bad):
    y, u, w = data(5, 3, 9, lead)
    if bad: y, u, w = spoil(y, u, w)
    value, grad = each(case, bumpy, (y, (u, w), None))
    got = run(OutputLoss(bumpy, case.direction(), chunk, on_nonfinite="skip"), y, u, w)
    close(got[0], value)
    close(got[1], grad)

@cases([Case("plain"), Case("fisher", .1), Case("hessian", 4.), Case("dfisher", .1),
        Case("fisher", .1, own=True)])
def test_leading_dimensions_with_masks(case):
    y, u, w = data(5, 3, 9, (2,))
    mask = torch.stack([holes(5, 3, k) for k in range(2)])
    value, grad = each(case, bumpy, (y, (u, w), mask))
    got = run(OutputLoss(bumpy, case.direction()), y, u, w, mask=mask)
    close(got[0], value)
    close(got[1], grad)

@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@cases(REMEMBERED)
def test_leading_dimensions_with_memory(case, memory):
    case = Case(case.kind, case.lam, case.power, case.eigenvalues, memory=memory)
    loss = OutputLoss(bumpy, case.direction(), on_nonfinite="skip")
    past = []
    for k in range(3):
        y, u, w = spoil(*data(5, 3, 20 + k, (2,)))
        past.append((y, (u, w), None))
        got = run(loss, y, u, w)
    value, grad = each(case, bumpy, *past)
    close(got[0], value)
    close(got[1], grad)

# ---------------------------------------------------------------- by name

def test_names():
    y, u, w = data(6, 4, 11)
    same = {"fisher": (NewtonLoss(bumpy, lam=.1), Case("fisher", .1)),
            "hessian": (NewtonLoss(bumpy, "hessian", .3, "abs"), Case("hessian", .3, 1., "abs")),
            "direction": (NewtonLoss(bumpy, Whiten(.1)), Case("whiten", .1)),
            "clip": (ClippedLoss(bumpy, .3), Case("clip", .3)),
            "rms": (NormalizedLoss(bumpy), Case("normalize")),
            "scalar": (ScalarStepLoss(bumpy, .2), Case("scalar", .2)),
            "plain": (OutputLoss(bumpy), Case("plain"))}
    for loss, case in same.values():
        close(run(loss, y, u, w)[1], step(case, bumpy, (y, (u, w), None))[2])
    for kw, case in ((dict(lam=.1), Case("fisher", .1)),
                     (dict(curvature="hessian", lam=4.), Case("hessian", 4.))):
        for mask in (None, holes(6, 4)):
            D = step(case, bumpy, (y, (u, w), mask))[1]
            loss, found = newton_direction(bumpy, y, u, w, mask=mask, **kw)
            close(found, D)
            close(newton_target(bumpy, y, u, w, mask=mask, **kw), y - D)
            assert loss.shape == (6,) and not found.requires_grad

@MAKES
@pytest.mark.parametrize("own", [False, True])
def test_lam_as_a_function(make, own):
    y, *args = data(6, 4, 12)
    wrap = PerSample if own else lambda d: d
    a = run(OutputLoss(bumpy, wrap(make(4.))), y, *args)[1]
    for rule in (lambda square, e: 4, lambda square, e: torch.tensor(4.),
                 lambda square, e: 4 + 0*square):
        close(run(OutputLoss(bumpy, wrap(make(rule))), y, *args)[1], a,
              1e-7 if make is not Krylov else 1e-3)

@MAKES
def test_lam_auto(make):
    kw = dict(eigenvalues="abs") if make in (Hessian, DiagonalHessian) else {}
    if make is Krylov: kw = dict(tol=1e-12, max_iter=200)
    y, u, w = data(6, 4, 13, (2,))
    y[1] *= 3
    loss = lambda **more: OutputLoss(bumpy, make("auto", **kw), **more)
    got = run(loss(on_nonfinite="skip"), y, u, w)[1]
    for k in range(2):
        alone = run(loss(), y[k], u[k], w[k])[1]
        close(got[k], alone, 1e-8)
        close(run(loss(chunk_size=4), y[k], u[k], w[k])[1], alone, 1e-8)
        close(run(loss(), y[k].flip(0), u[k].flip(0), w[k].flip(0))[1].flip(0), alone, 1e-8)
        if make is Krylov: continue                # its mean Hessian may be indefinite
        G = run(OutputLoss(bumpy), y[k], u[k], w[k])[1]
        assert ((alone*G).sum(1) > 0).all()

# ---------------------------------------------------------------- inject_fisher

@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1., 1e4, torch.tensor(1e-3), lambda: 7.])
def test_inject(reduction, scale):
    s = float(scale() if callable(scale) else scale)
    y, u, w = data(6, 4, 14)
    want = step(Case("fisher", .1), bumpy, (y, (u, w), None))[1]*s
    y.requires_grad_()
    z = inject_fisher(y, .1, reduction=reduction, scale=scale)
    assert torch.equal(z, y)
    (getattr(bumpy(z, u, w), reduction)()*s).backward()
    close(y.grad, want/6 if reduction == "mean" else want)

def test_inject_bad_samples():
    y, u, w = data(6, 4, 15)
    w[2] = torch.inf
    def grad(on_nonfinite):
        x = y.clone().requires_grad_()
        bumpy(inject_fisher(x, .1, "sum", on_nonfinite=on_nonfinite), u, w).sum().backward()
        return x.grad
    with pytest.raises(NonFiniteError): grad("raise")
    close(grad("skip"), step(Case("fisher", .1), bumpy, (y, (u, w), None))[1])

# ---------------------------------------------------------------- autograd and torch.func

@cases([Case("plain"), Case("fisher", .1), Case("hessian", 4.), Case("dfisher", .1),
        Case("dhessian", 4.), Case("whiten", .1), Case("normalize"), Case("clip", .3),
        Case("krylov", 4.), Case("fisher", .1, own=True)])
def test_transforms(case):
    y, u, w = data(6, 4, 16, (3,))
    loss = OutputLoss(bumpy, case.direction(), check=False)
    want = torch.stack([run(loss, *x)[1] for x in zip(y, u, w)])
    grad, value = torch.func.grad_and_value(loss)(y[0], u[0], w[0])
    close(grad, want[0])
    close(value, bumpy(y[0], u[0], w[0]).mean())
    close(torch.func.vmap(torch.func.grad(loss))(y, u, w), want)
    close(torch.func.vmap(torch.func.grad(loss), (0, None, None))(y[:1], u[0], w[0])[0], want[0])
    net = nn.Linear(3, 4).double()
    def whole(p, x): return loss(torch.func.functional_call(net, p, x), u[0], w[0])
    p = {k: torch.stack([v.detach()]*2) for k, v in net.named_parameters()}
    found = torch.func.vmap(torch.func.grad(whole), (0, None))(p, data(6, 3, 17)[0])
    close(found["weight"][0], found["weight"][1])

@cases([Case("plain"), Case("fisher", .1), Case("hessian", 4.)])
def test_once_only(case):
    y, u, w = data(6, 4, 18)
    loss = OutputLoss(bumpy, case.direction())
    x = y.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="once"):
        g, = torch.autograd.grad(loss(x, u, w), x, create_graph=True)
        torch.autograd.grad(g.sum(), x)
    with pytest.raises(RuntimeError, match="once|forward"): torch.func.hessian(loss)(y, u, w)
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        torch.func.jvp(lambda y: loss(y, u, w), (y,), (y,))
    z = y.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="once"):
        g, = torch.autograd.grad(bumpy(inject_fisher(z, .1), u, w).mean(), z, create_graph=True)
        torch.autograd.grad(g.sum(), z)

def test_without_a_gradient():
    y, u, w = data(6, 4, 19)
    mask = holes(6, 4)
    loss = NewtonLoss(bumpy, Remembering(Hessian(4.), Window(3)))
    for masked in (None, mask):
        want = step(Case("plain"), bumpy, (y, (u, w), masked))[0]
        close(loss(y, u, w, mask=masked), want)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(): close(loss(y.clone(), u, w, mask=masked), want)
    bad = OutputLoss(bumpy, on_nonfinite="skip")
    y, u, w = spoil(y, u, w)
    close(bad(y, u, w), step(Case("plain"), bumpy, (y, (u, w), None))[0])
    with pytest.raises(NonFiniteError): loss(y, u, w)

@pytest.mark.parametrize("factor", [1e8, 1e-8, -2.])
def test_a_factor_behind_the_loss(factor):
    y, u, w = data(6, 4, 20, dtype=torch.float32)
    x = y.clone().requires_grad_()
    (factor*NewtonLoss(bumpy, lam=.1)(x, u, w)).backward()
    close(x.grad/factor, step(Case("fisher", .1), bumpy, (y, (u, w), None))[2], 1e-5)

def test_through_a_network():
    "A network under autocast: outputs in half precision, the step of their own numbers"
    torch.manual_seed(0)
    net, x, t = nn.Linear(5, 4), torch.randn(8, 5), torch.arange(8) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        y.retain_grad()
        NewtonLoss(ce, lam=.1)(y, t).backward()
    close(y.grad, step(Case("fisher", .1), ce, (y.detach(), (t,), None))[2], 2e-2)
    from torch.utils.checkpoint import checkpoint
    grads = []
    for again in (False, True):
        net.zero_grad()
        y = checkpoint(net, x.requires_grad_(), use_reentrant=False) if again else net(x)
        NewtonLoss(ce, "hessian", .1)(y, t).backward()
        grads.append(net.weight.grad)
    close(*grads, 1e-6)

# ---------------------------------------------------------------- scale and symmetry

@pytest.mark.parametrize("c", [1e-6, 1e-2, 1e3, 1e6])
def test_units_of_the_loss(c):
    "F grows with c², H with c; with λ alike, steps are 1/c of what they were, or the same"
    y, *args = data(7, 4, 21)
    scaled = lambda *a: c*bumpy(*a)
    D = lambda fn, d: OutputLoss(fn, d).directions(y, *args)[1]
    for make, lam, power in ((Fisher, .1*c*c, -1), (DiagonalFisher, .1*c*c, -1),
                             (Whiten, .1*c*c, 0),
                             (Hessian, 4*c, 0), (DiagonalHessian, 4*c, 0), (Scalar, .1*c*c, -1)):
        base = .1 if power or make is Whiten else 4.
        close(D(scaled, make(lam))/c**power, D(bumpy, make(base)), 1e-8)
    close(D(scaled, Normalize()), D(bumpy, Normalize()))

@pytest.mark.parametrize("make", [Fisher, Hessian, DiagonalFisher, DiagonalHessian, Scalar, Krylov])
def test_large_lam_is_the_gradient(make):
    y, *args = data(7, 4, 22)
    G = OutputLoss(bumpy).directions(y, *args)[1]
    close(OutputLoss(bumpy, make(1e9)).directions(y, *args)[1]*1e9, G, 1e-7)

@pytest.mark.parametrize("size", [1e-8, 1., 1e8, 1e16])
def test_the_step_of_a_fisher_is_bounded(size):
    y, u, w = data(7, 4, 23)
    w[3] = size
    D = OutputLoss(bumpy, Fisher(.1)).directions(y, u, w)[1]
    assert torch.linalg.matrix_norm(D, 2) <= math.sqrt(7/(4*.1))*(1 + 1e-9)

def test_lengths_beyond_squares():
    "Gradients whose squares overflow or vanish in float32, and nearly in float64"
    for size in (1e-30, 1e-12, 1e12, 1e30):
        y, u, w = data(5, 3, 24, dtype=torch.float32)
        G = OutputLoss(bumpy).directions(y, u, w)[1]
        far = (y, u, size*w)
        close(OutputLoss(bumpy, Clip(size*.1)).directions(*far)[1]/size,
              OutputLoss(bumpy, Clip(.1)).directions(y, u, w)[1], 1e-5)
        close(OutputLoss(bumpy, Normalize()).directions(*far)[1],
              G/G.double().square().mean().sqrt(), 1e-5)

@cases([*CURVED[:3], *HESSIANS[:1], Case("fisher", .1, own=True), Case("normalize"),
        Case("krylov", 4.)])
def test_symmetries(case):
    y, u, w = data(7, 4, 25)
    D = lambda *b: OutputLoss(bumpy, case.direction(), on_nonfinite="skip").directions(*b)[1]
    want, order = D(y, u, w), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    close(D(y[order], u[order], w[order]), want[order])
    close(D(*(torch.cat([x, x]) for x in (y, u, w))), torch.cat([want, want]))
    if case.kind == "krylov": return
    Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1),
                                    dtype=y.dtype))[0]
    turned = OutputLoss(lambda z, *a: bumpy(z @ Q, *a), case.direction())
    turned = turned.directions(y @ Q.T, u, w)[1]
    close(turned @ Q, want)

@cases([Case("fisher", .1), Case("hessian", .1), Case("hessian", .1, .5, "abs"),
        Case("whiten", .1)])
def test_no_step_along_the_ones(case):
    y, t = data(7, 4, 26)[0], torch.arange(7) % 4
    D = OutputLoss(ce, case.direction()).directions(y, t)[1]
    assert D.sum(1).abs().max() < 1e-12 and D.abs().max() > .1

def test_squared_error_reaches_its_target():
    y, t, _ = data(7, 4, 27)
    half = lambda y, t: (y - t).square().sum(-1)/2
    close(newton_target(half, y, t, curvature="hessian", lam=0.), t)
    close(newton_target(half, y, t, curvature=PerSample(Hessian(0.))), t)

# ---------------------------------------------------------------- nothing to do, nothing to count

EVERY = [*CURVED[:3], *HESSIANS[:3], *DIAGONALS[:2], *ALONE, *OWN[:1], *OWN[3:4]]

@cases(EVERY)
def test_all_bad(case):
    y, u, w = data(4, 3, 28)
    loss = OutputLoss(bumpy, case.direction(), on_nonfinite="skip")
    for broken in ((y*torch.nan, u, w), (y, u, w*torch.nan), (y + torch.inf, u, w)):
        value, grad = run(loss, *broken)
        assert value == 0 and not grad.any() and grad.isfinite().all()
    with pytest.raises(NonFiniteError): run(OutputLoss(bumpy, case.direction()), y*torch.nan, u, w)

@cases([c for c in EVERY if c.kind != "krylov"])
def test_all_padding(case):
    y, u, w = data(4, 3, 29)
    for chunk in (None, 3):
        loss = OutputLoss(bumpy, case.direction(), chunk)
        value, grad = run(loss, y, u, w, mask=torch.zeros(4, 3, dtype=torch.bool))
        assert value == 0 and not grad.any() and grad.isfinite().all()

@pytest.mark.parametrize("memory", MEMORIES, ids=str)
def test_an_empty_batch_between_others(memory):
    "A batch without a usable sample is in the memory, and says nothing"
    case = Case("fisher", .1, memory=memory)
    y, u, w = data(4, 3, 30)
    loss = OutputLoss(bumpy, case.direction(), on_nonfinite="skip")
    past = [(y, (u, w), None), (y, (u, w*torch.nan), None), (y + 1, (u, w), None)]
    for x, args, _ in past: got = run(loss, x, *args)[1]
    close(got, step(case, bumpy, *past)[2])

@cases(EVERY)
def test_no_gradient_at_all(case):
    "A flat loss: no step, no error"
    y, *_ = data(4, 3, 31)
    value, grad = run(OutputLoss(lambda y: (y*0).sum(-1) + 2., case.direction()), y)
    assert value == 2 and not grad.any() and grad.isfinite().all()

def test_no_samples():
    y = torch.zeros(0, 3, requires_grad=True)
    try: value = NewtonLoss(ce, lam=.1)(y, torch.zeros(0, dtype=torch.long))
    except ValueError as e:
        assert "y" in str(e) and "expected" in str(e)
        return
    value.backward()
    assert value == 0 and y.grad.shape == (0, 3)

# ---------------------------------------------------------------- singular

def test_singular():
    "H = -I/2 everywhere, so that λ = 1/2 is the one damping that cannot be"
    cap = lambda y: -y.square().sum(-1)/4
    y, *_ = data(5, 3, 32)
    for d in (Hessian(.5), DiagonalHessian(.5), PerSample(Hessian(.5)), Fisher(0.)):
        fn = (lambda y: y[..., 0]) if isinstance(d, Fisher) else cap
        with pytest.raises(SingularError, match="lam"): run(OutputLoss(fn, d), y)
    for d in (Hessian(.5), DiagonalHessian(.5), PerSample(Hessian(.5))):
        close(run(OutputLoss(cap, d, on_nonfinite="gradient"), y)[1], -y/2/5)
    assert issubclass(SingularError, ValueError) and issubclass(NonFiniteError, ValueError)

def test_roots_of_negative_numbers():
    "A fractional power of a C + λI that is not positive is an error"
    cap = lambda y: -y.square().sum(-1)/4
    y, *_ = data(5, 3, 33)
    with pytest.raises(ValueError): run(OutputLoss(cap, Hessian(.1, "raw", power=.5)), y)

# ---------------------------------------------------------------- probes

def test_probes():
    "Random signs find a diagonal Hessian exactly; of another, the mean over many is near"
    y, u, w = data(6, 4, 34)
    quartic = lambda y, w: w*(y**4).sum(-1)
    exact = run(OutputLoss(quartic, DiagonalHessian(.1)), y, w)[1]
    close(run(OutputLoss(quartic, DiagonalHessian(.1, probes=1)), y, w)[1], exact)
    near = OutputLoss(bumpy, DiagonalHessian(4., probes=400))
    got = run(near, y, u, w)[1]
    close(got, step(Case("dhessian", 4.), bumpy, (y, (u, w), None))[2], .05)
    state = torch.random.get_rng_state()
    assert torch.equal(run(near, y, u, w)[1], got)
    assert torch.equal(torch.random.get_rng_state(), state)

# ---------------------------------------------------------------- large

BIG = """
import resource, sys
import numpy as np, torch
from newton_losses_nb import OutputLoss, Krylov
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
N, m, lam = 4, 10_000, 1.
y = torch.randn(N, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
chain = lambda y: (y[..., 1:] - y[..., :-1]).pow(4).sum(-1)
x = y.clone().requires_grad_()
OutputLoss(chain, Krylov(lam, tol=1e-9, max_iter=500), chunk_size=CHUNK)(x).backward()
D, d = x.grad*N, y.diff(dim=1).numpy()
H = (12*d**2).mean(0)             # of y_i, y_{i+1}: +H on the diagonal, -H beside it
diagonal = lam + np.r_[H, 0] + np.r_[0, H]
G = np.c_[np.zeros(N), 4*d**3] - np.c_[4*d**3, np.zeros(N)]
D = D.numpy()
CD = diagonal*D
CD[:, :-1] -= H*D[:, 1:]
CD[:, 1:] -= H*D[:, :-1]
print(abs(CD - G).max()/abs(G).max(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)
"""

@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource module")
def test_ten_thousand_outputs(chunk):
    r = subprocess.run([sys.executable, "-c", BIG.replace("CHUNK", repr(chunk))],
                       capture_output=True, text=True, timeout=200)
    assert r.returncode == 0, r.stderr[-2000:]
    error, gigabytes = map(float, r.stdout.split())
    assert error < 1e-6 and gigabytes < 2, r.stdout

# ---------------------------------------------------------------- no operation looks at a number

def blind(d):
    "Conjugate gradients look at residuals, unless their tolerance is 0"
    if isinstance(inner := getattr(d, "direction", d), Krylov): inner.tol, inner.max_iter = 0, 8
    return d

@pytest.mark.parametrize("memory", [None, ("window", 2), ("average", .6)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,)])
@cases([*CURVED, *ALONE, *OWN])
def test_never_looks(case, lead, memory):
    if memory and (case.own or case.kind in ("plain", "clip", "krylov")):
        pytest.skip("nothing to remember")
    case = Case(case.kind, case.lam, case.power, case.eigenvalues, case.own, memory)
    loss = OutputLoss(bumpy, blind(case.direction()), on_nonfinite="skip")
    y, u, w = spoil(*data(6, 3, 35, lead))
    run(loss, y, u, w)                               # the checks of a first call may look
    y.requires_grad_()
    with NeverLooks():
        value = loss(y, u, w)
        torch.autograd.grad(value if value.ndim == 0 else value.sum(), y)

@MAKES
@pytest.mark.parametrize("own", [False, True])
def test_never_looks_for_lam(make, own):
    d = blind(PerSample(make("auto")) if own else make("auto"))
    y, u, w = data(6, 3, 36, (2,))
    for fn_check in (True, False):
        loss = OutputLoss(bumpy, d, chunk_size=4, check=fn_check, on_nonfinite="skip")
        if fn_check: run(loss, y, u, w)
        x = y.clone().requires_grad_()
        with NeverLooks(): torch.autograd.grad(loss(x, u, w).sum(), x)

# ---------------------------------------------------------------- text

TEXTS = """Direction()
Fisher()
Fisher(.1)
Fisher(lam=.1, power=.5)
Whiten()
Whiten(.2)
Hessian()
Hessian(4, 'abs', power=.25)
DiagonalFisher()
DiagonalFisher(.1)
DiagonalHessian()
DiagonalHessian(.1, 'clip', probes=3)
Krylov()
Krylov(1., tol=1e-3, max_iter=7)
PerSample(Fisher(.1))
PerSample(DiagonalHessian(.1, probes=2))
Window(3)
MovingAverage(.5)
Remembering(Fisher(.3), Window(5))
Remembering(Hessian(.3, 'abs'), MovingAverage(.9))
Clip()
Clip(.5)
Normalize()
Scalar()
Scalar(.1)
OutputLoss(ce)
OutputLoss(ce, Clip(.1), chunk_size=4, check=False)
OutputLoss(ce, Remembering(Fisher(.3), Window(5)), on_nonfinite='skip')
NewtonLoss(ce)
NewtonLoss(ce, 'hessian', .1, 'abs', 5, False, 'gradient', None)
NewtonLoss(ce, PerSample(Hessian(.1)))
ClippedLoss(ce, .3)
NormalizedLoss(ce, chunk_size=2)
ScalarStepLoss(ce)
ScalarStepLoss(ce, .1)""".splitlines()

@pytest.mark.parametrize("text", TEXTS)
def test_repr(text):
    first = eval(text, dict(globals()))
    line = repr(first)
    assert "\n" not in line
    second = eval(line, dict(globals()))
    assert type(second) is type(first) and repr(second) == line
    if isinstance(first, (Window, MovingAverage)): return
    wrap = (lambda d: d) if "ce" in text else lambda d: OutputLoss(ce, d)
    y, t = data(5, 3, 37)[0], torch.arange(5) % 3
    for _ in range(2): close(run(wrap(second), y, t)[1], run(wrap(first), y, t)[1], 1e-12)

def test_what_repr_must_tell_apart():
    for a, b in (("Fisher(.1)", "Fisher(.2)"), ("Fisher(.1)", "Fisher(.1, power=.5)"),
                 ("Window(2)", "Window(3)"),
                 ("Hessian(1, 'abs')", "Hessian(1, 'clip')"), ("Krylov(1)", "Krylov(1, tol=.1)"),
                 ("DiagonalHessian(1)", "DiagonalHessian(1, probes=2)"), ("Clip(1)", "Clip(2)"),
                 ("OutputLoss(ce)", "OutputLoss(ce, chunk_size=2)"),
                 ("NewtonLoss(ce)", "NewtonLoss(ce, check=False)"),
                 ("OutputLoss(ce)", "OutputLoss(ce, on_nonfinite='skip')"),
                 ("NewtonLoss(ce)", "NewtonLoss(ce, group=None)")):
        assert repr(eval(a, dict(globals()))) != repr(eval(b, dict(globals())))

def test_pickle_and_copy():
    y, t = data(5, 3, 38)[0], torch.arange(5) % 3
    loss = NewtonLoss(ce, Remembering(Fisher(.1), Window(3)))
    run(loss, y, t)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        close(run(other, y + 1, t)[1], run(copy.deepcopy(loss), y + 1, t)[1])

# ---------------------------------------------------------------- settings

NUMBERS = [np.float32(.5), np.float64(.5), torch.tensor(.5), torch.tensor(.5, dtype=torch.float64),
           np.array(.5)]

@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers_of_all_kinds(number):
    y, *args = data(6, 4, 39)
    for make in (Fisher, Hessian, DiagonalFisher, Whiten, Scalar, Clip,
                 lambda x: Fisher(.5, power=x), lambda x: Krylov(.5, tol=x),
                 lambda x: Remembering(Fisher(x), MovingAverage(x)),
                 lambda x: NewtonLoss(bumpy, lam=x).direction):
        if make is Hessian: make = lambda x: Hessian(x, "abs")
        close(run(OutputLoss(bumpy, make(number)), y, *args)[1],
              run(OutputLoss(bumpy, make(.5)), y, *args)[1], 1e-12)
    x = y.clone().requires_grad_()
    bumpy(inject_fisher(x, number), *args).mean().backward()
    close(x.grad, run(NewtonLoss(bumpy, lam=.5), y, *args)[1])

@pytest.mark.parametrize("number", [np.int64(2), np.int32(2), torch.tensor(2)], ids=repr)
def test_whole_numbers_of_all_kinds(number):
    y, *args = data(6, 4, 40)
    for make in (lambda k: Remembering(Fisher(.1), Window(k)),
                 lambda k: DiagonalHessian(4., probes=k), lambda k: Krylov(4., max_iter=k),
                 lambda k: Fisher(k)):
        close(run(OutputLoss(bumpy, make(number)), y, *args)[1],
              run(OutputLoss(bumpy, make(2)), y, *args)[1], 1e-12)
    close(run(OutputLoss(bumpy, chunk_size=number), y, *args)[1],
          run(OutputLoss(bumpy), y, *args)[1])

NOT_NUMBERS = [True, "0.1", -1., math.nan, np.float32("nan"), np.bool_(True), torch.tensor(True),
               torch.tensor([.1, .2]), [.1], 1j]
OF_LOSS = lambda make: lambda x: make(x).direction                # settings that a loss passes on
REFUSED = [
    ("lam", Fisher, None), ("lam", Hessian), ("lam", DiagonalFisher), ("lam", DiagonalHessian),
    ("lam", Krylov), ("lam", Scalar), ("lam", Whiten),
    ("lam", OF_LOSS(lambda x: NewtonLoss(ce, lam=x))),
    ("lam", OF_LOSS(lambda x: NewtonLoss(ce, "hessian", x))),
    ("lam", OF_LOSS(lambda x: ScalarStepLoss(ce, x))),
    ("power", lambda x: Fisher(.1, power=x), None),
    ("power", lambda x: Hessian(.1, "abs", power=x)),
    ("max_norm", Clip, None), ("max_norm", OF_LOSS(lambda x: ClippedLoss(ce, x))),
    ("decay", lambda x: Remembering(Fisher(.1), MovingAverage(x)), 1., 2., None),
    ("tol", lambda x: Krylov(.1, tol=x), 1.),
    ("max_iter", lambda x: Krylov(.1, max_iter=x), 0, 2.5, None),
    ("probes", lambda x: DiagonalHessian(.1, probes=x), 0, 2.5),
    ("chunk_size", OF_LOSS(lambda x: OutputLoss(ce, chunk_size=x)), 0, 2.5),
    ("chunk_size", OF_LOSS(lambda x: NewtonLoss(ce, chunk_size=x)), 0, 2.5),
    ("length|k|window", lambda x: Remembering(Fisher(.1), Window(x)), 0, 2.5, None)]
Y, T = torch.randn(3, 2), torch.zeros(3, dtype=torch.long)
CHOICES = [
    ("curvature", lambda x: NewtonLoss(ce, x)), ("eigenvalues", lambda x: Hessian(.1, x)),
    ("eigenvalues", lambda x: NewtonLoss(ce, "hessian", .1, x)),
    ("eigenvalues", lambda x: DiagonalHessian(.1, x)),
    ("on_nonfinite", lambda x: OutputLoss(ce, on_nonfinite=x)),
    ("on_nonfinite", lambda x: NewtonLoss(ce, on_nonfinite=x)),
    ("group", lambda x: run(OutputLoss(ce, group=x), Y, T)),
    ("direction", lambda x: OutputLoss(ce, x)), ("direction", PerSample),
    ("direction", lambda x: Remembering(x, Window(2))),
    ("memory", lambda x: Remembering(Fisher(.1), x)),
    ("reduction", lambda x: inject_fisher(Y, .1, x)),
    ("on_nonfinite", lambda x: inject_fisher(Y, .1, on_nonfinite=x)),
    ("scale", lambda x: inject_fisher(Y, .1, scale=x))]

def refused(name, call):
    "None if the call is refused with a sentence that names the argument, else what came instead"
    try: call()
    except (ValueError, TypeError) as e:
        return None if re.match(rf"({name}): .*expected", str(e), re.S) else repr(e)
    except Exception as e: return repr(e)
    return "accepted"

def test_refused_numbers():
    found = [(name, value, refused(name, lambda: run(OutputLoss(ce, make(value)), Y, T)))
             for name, make, *more in REFUSED for value in (*NOT_NUMBERS, *more)]
    assert not [f for f in found if f[2]], "\n".join(str(f) for f in found if f[2])

def test_refused_choices():
    found = [(name, value, refused(name, lambda: make(value)))
             for name, make in CHOICES for value in ("ignore", 3.5j, [1, 2])]
    assert not [f for f in found if f[2]], "\n".join(str(f) for f in found if f[2])

@pytest.mark.parametrize("call, name", [
    (lambda f: f(Y[:, 0], T), "y"), (lambda f: f(Y.long(), T), "y"),
    (lambda f: f([[1., 2.]], T), "y"),
    (lambda f: f(Y, T, mask=Y), "mask"), (lambda f: f(Y, T, mask=Y[:, 0] > 0), "mask")])
def test_refused_calls(call, name):
    for loss in (NewtonLoss(ce, lam=.1), OutputLoss(ce)):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"): call(loss)
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            call(loss.directions)

@pytest.mark.parametrize("fn", [lambda y: y.sum(), lambda y: y, lambda y: 3.,
                                lambda y: y.sum(-1, keepdim=True),
                                lambda y: (y - y.mean(0)).square().sum(-1),
                                lambda y: y.sum(-1)/y.square().sum()],
                         ids=["a sum", "a matrix", "a float", "a column", "a batch mean",
                              "a batch sum"])
def test_losses_that_are_none(fn):
    for curvature in ("fisher", "hessian"):
        with pytest.raises((ValueError, TypeError), match="^loss_fn: expected"):
            run(NewtonLoss(fn, curvature, .1), data(4, 3, 41)[0])
