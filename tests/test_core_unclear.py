"What was unclear in version 0.1: sentences, and annotations that hold under jaxtyping's import hook"
import subprocess
import sys

import pytest
import torch
from reference import ce, close, data, run

from newton_losses_nb import (
    Clip, DiagonalFisher, DiagonalHessian, Fisher, Hessian, Krylov, MovingAverage, NewtonLoss, OutputLoss,
    PerSample, Remembering, SortingLoss, Whiten, Window, check_loss, inject_fisher, newton_direction, newton_target,
    shortest_path)
from newton_losses_nb.core.evidence import Batch
from newton_losses_nb.paths.fenchel_young import Noise
from newton_losses_nb.paths.smoothing import BlackboxLoss

Y, T = data(6, 4, 90)[0], torch.arange(6) % 4
DIRECTIONS = {"fisher": Fisher, "fisher .1": lambda: Fisher(.1), "hessian": Hessian,
              "krylov": lambda: Krylov(.1), "probes": lambda: DiagonalHessian(.1, probes=2),
              "own": lambda: PerSample(Hessian(.5)), "whiten": Whiten, "clip": Clip,
              "average": lambda: Remembering(Fisher(.1), MovingAverage(.5))}
direction = pytest.mark.parametrize("make", DIRECTIONS.values(), ids=DIRECTIONS)

# ---------------------------------------------------------------- torch.func and devices

@pytest.mark.parametrize("make", [Fisher, Hessian, Clip])
def test_vmap_without_a_gradient(make):
    loss = OutputLoss(ce, make())
    found = torch.func.vmap(loss)(torch.stack([Y, 2*Y]), torch.stack([T, T]))
    close(found, torch.stack([loss(Y, T), loss(2*Y, T)]))

@direction
def test_another_default_device(make):
    "What a loss makes is on the device of y, wherever tensors are made by default"
    want = run(OutputLoss(ce, make()), Y, T)[1]
    masks = [None] if make is DIRECTIONS["krylov"] else [None, torch.ones_like(Y) > 0]
    with torch.device("meta"):
        for mask in masks:
            for kw in ({}, {"chunk_size": 4}):
                close(run(OutputLoss(ce, make(), **kw), Y, T, mask=mask)[1], want, 1e-8)

def test_others_on_another_default_device():
    want = check_loss(ce, Y, T)
    P = torch.eye(4).expand(6, 4, 4).clone()
    x = Y.clone().requires_grad_()
    with torch.device("meta"):
        ce(inject_fisher(x), T).mean().backward()
        run(NewtonLoss(SortingLoss(), "hessian"), Y, P)
        assert repr(check_loss(ce, Y, T)) == repr(want)
    close(x.grad, run(NewtonLoss(ce), Y, T)[1])

def test_the_first_call_may_be_under_a_transform():
    for curvature in ("fisher", "hessian"):
        first = torch.func.vmap(torch.func.grad(NewtonLoss(ce, curvature)))
        close(first(Y[None], T[None])[0], run(NewtonLoss(ce, curvature), Y, T)[1])

@pytest.mark.parametrize("find", [lambda y: NewtonLoss(ce).directions(y, T), lambda y: newton_direction(ce, y, T),
                                  lambda y: newton_target(ce, y, T)])
def test_directions_are_not_for_torch_func(find):
    with pytest.raises(RuntimeError, match="expected to run outside torch.func, whose vmap leading"):
        torch.func.vmap(find)(torch.stack([Y, 2*Y]))

@pytest.mark.parametrize("on_nonfinite", ["skip", "gradient"])
def test_losses_of_left_out_samples_are_zero(on_nonfinite):
    "Outputs, an argument and a mask may leave a sample out"
    square = lambda y, t: (y - t).square().sum(1)
    y, t = torch.ones(4, 2), torch.full((4, 2), 5.)
    for spoil in (y[1], t[1]):
        kept = spoil.clone()
        spoil[0] = torch.nan
        close(newton_direction(square, y, t, on_nonfinite=on_nonfinite)[0], torch.tensor([32., 0., 32., 32.]))
        spoil.copy_(kept)
    mask = torch.ones_like(y) > 0
    mask[2] = False
    close(newton_direction(square, y, t, mask=mask)[0], torch.tensor([32., 32., 0., 32.]))

# ---------------------------------------------------------------- sentences

SENTENCES = {
    "sum over the other axes": lambda: NewtonLoss(lambda y: y.square())(Y),
    "; sum over the other axes": lambda: NewtonLoss(lambda y: y.sum(1, keepdim=True))(Y),
    "reduction='none'": lambda: NewtonLoss(torch.nn.functional.cross_entropy)(Y, T),
    r"use y\[:, None\] for one output": lambda: NewtonLoss(ce)(Y[:, 0], T),
    r"y.squeeze\(-1\) has 4 outputs a sample": lambda: NewtonLoss(ce)(Y[..., None], T),
    "target: expected .*functools.partial": lambda: NewtonLoss(ce)(Y, target=T),
    "got that of a Window": lambda: loaded(Remembering(Fisher(), MovingAverage(.5))),
    "expected evidence like that remembered": lambda: loaded(Remembering(DiagonalFisher(), Window(2))),
    "expected sums of second derivatives full, got None": lambda: loaded(Remembering(Hessian(), Window(2))),
    "sigma: expected": lambda: Noise(sigma=True), "samples: expected": lambda: Noise(samples=True),
    "lam: expected": lambda: BlackboxLoss(lambda y: y, ce, True),
    "path around the walls": lambda: shortest_path(wall(4)),
    r"then sums and their dimensions, \(\(4,\), \{'rows': 2\}\), got": lambda: changed(Fisher(.1))}

@pytest.mark.parametrize("sentence", SENTENCES)
def test_sentences(sentence):
    with pytest.raises((ValueError, TypeError), match=sentence): SENTENCES[sentence]()

def loaded(direction):
    first, second = OutputLoss(ce, Remembering(Fisher(), Window(2))), OutputLoss(ce, direction)
    run(first, Y, T)
    second.load_state_dict(first.state_dict())
    run(second, Y, T)

def changed(direction):
    loss = OutputLoss(ce, Remembering(direction, Window(2)))
    run(loss, Y, T)
    direction.lam = "auto"
    run(loss, Y, T)

def wall(length):
    cost = torch.ones(1, 4, 4)
    cost[0, 1, :length] = torch.inf
    return cost

def test_a_path_around_a_wall():
    path = shortest_path(wall(3))
    assert not path[wall(3).isinf()].any() and path[0, 1, 3]

def test_derivatives_of_a_sorting_loss_without_a_word_about_hessians():
    P = torch.eye(4).expand(6, 4, 4)
    for a, b in zip(SortingLoss().derivatives(Y, P), SortingLoss().derivatives(Y, P, hessian=True)):
        assert torch.equal(a, b)

class Sevens(Fisher):
    "A direction of one's own that is also a Fisher"
    def forward(self, e, G, mask=None): return G*0 + 7

@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Remembering(d, Window(2)), PerSample])
def test_a_direction_of_ones_own_is_not_passed_over(wrap):
    for on_nonfinite in ("raise", "skip"):
        loss = OutputLoss(ce, wrap(Sevens(.1)), on_nonfinite=on_nonfinite)
        assert (loss.directions(Y, T)[1] == 7).all()

def test_a_quick_solve_is_asked_again_with_care():
    "With and without looking, the same step, for a λ that is a small, a tiny and no part of F"
    for lam in (1e-14, 1e-9, 1e-5, .1, 10.):
        got, want = (OutputLoss(ce, Fisher(lam), on_nonfinite=k).directions(Y, T)[1]
                     for k in ("raise", "skip"))
        close(got, want, 1e-8)

# ---------------------------------------------------------------- annotations

HOOK = """
from jaxtyping import install_import_hook
with install_import_hook("newton_losses_nb.core", "beartype.beartype"):
    from newton_losses_nb.core import derivatives, evidence, solves, directions, newton, more, check
import itertools
import numpy as np
import torch
from newton_losses_nb import *

try: directions.Fisher(power=[])
except Exception as e: assert type(e).__name__ == "TypeCheckError", e
else: raise SystemExit("the hook does nothing")

def ce(y, t): return torch.nn.functional.cross_entropy(y, t, reduction="none")
class Own:
    def __call__(self, y, t): return y.square().sum(-1)
    def derivatives(self, y, t, hessian=True):
        H = 2*torch.eye(y.shape[-1]).expand(len(y), -1, -1)
        return self(y, t), 2*y, H if hessian else None

random = torch.Generator().manual_seed(0)
y, mask = torch.randn(6, 4, generator=random), torch.rand(6, 4, generator=random) > .2
t, lead = torch.arange(6) % 4, (torch.stack([y, y]), torch.stack([t := torch.arange(6) % 4, t]))
lams = [.1, 1, "auto", np.float32(.1), torch.tensor(.3), lambda s, e: 2*s + 1, lambda s, e: 1.]
makes = [Fisher, lambda lam: Hessian(lam, "abs"), DiagonalFisher, DiagonalHessian, Scalar, Whiten,
         Krylov, lambda lam: DiagonalHessian(lam, "abs", 2), lambda lam: Hessian(lam, "abs", .5),
         lambda lam: PerSample(Hessian(lam, "abs")), lambda lam: PerSample(Fisher(lam)),
         lambda lam: PerSample(Krylov(lam)), lambda lam: Remembering(Fisher(lam), Window(2)),
         lambda lam: Remembering(Hessian(lam, "abs"), MovingAverage(.5)),
         lambda lam: Clip(1), lambda lam: Normalize(), lambda lam: Direction()]
kinds = [dict(), dict(on_nonfinite="skip"), dict(chunk_size=4, on_nonfinite="gradient")]
x = lambda: y.clone().requires_grad_()
for make, lam in itertools.product(makes, lams):
    for N in (6, 3): OutputLoss(ce, make(lam))(x()[:N], t[:N]).backward()
for (make, kw), fn in itertools.product(zip(makes, kinds*6), (ce, Own())):
    d = make("auto")
    loss = OutputLoss(fn, d, **kw)
    for _ in range(2): loss(x(), t).backward()
    loss(y, t), loss.directions(y, t), repr(loss)
    if not isinstance(d, Krylov): loss(x(), t, mask=mask).backward()
    if d.shares:
        with loss.accumulated([(y, t)]*2): loss(x(), t).backward()
    if d.memory: d.reset()
    loss(lead[0].clone().requires_grad_(), lead[1]).sum().backward()
for scale, reduction in itertools.product((1., 2, torch.tensor(2.), lambda: 3.), ("mean", "sum")):
    ce(inject_fisher(y.clone().requires_grad_(), "auto", reduction, scale), t).mean().backward()
newton_target(ce, y, t, curvature="hessian", mask=mask)
torch.func.grad(NewtonLoss(ce))(y, t)
torch.func.vmap(torch.func.grad(NewtonLoss(ce, "hessian")))(*lead)
ClippedLoss(ce, 1), NormalizedLoss(ce), ScalarStepLoss(ce, 1)
NewtonLoss(ce, "hessian", 1, "abs", 5, False, "skip", None)
NewtonLoss(ce)(y.bfloat16().requires_grad_(), t).backward()
more.conjugate_gradient(lambda V: V, torch.randn(3, 4), torch.ones(3))
check_loss(ce, y, t)
print("all held")
"""

def test_annotations_hold():
    pytest.importorskip("beartype")
    out = subprocess.run([sys.executable, "-c", HOOK], capture_output=True, text=True, timeout=300)
    assert out.stdout.strip().endswith("all held"), out.stderr[-3000:]

# ---------------------------------------------------------------- inject_fisher, and sums in single precision

def test_inject_fisher_refuses():
    with pytest.raises(ValueError, match="scale: expected a number other than zero"): inject_fisher(Y, scale=0)
    with pytest.raises(RuntimeError, match="cannot run under torch.func.vmap"):
        torch.func.vmap(torch.func.grad(lambda y: inject_fisher(y).square().sum()))(torch.stack([Y, 2*Y]))

@pytest.mark.parametrize("lam", ["auto", .1])
def test_outputs_of_no_sample_in_float32(lam):
    real = torch.ones_like(Y, dtype=torch.bool)
    real[:, 2] = False
    found = []
    for dtype in (torch.float32, torch.float64):
        G = (Y*real).to(dtype)
        b = Batch(G.sum(1), G, None, real.to(dtype))
        found.append(Fisher(lam)(Fisher(lam).observe(b), G, real))
    assert found[0].isfinite().all() and (found[0][:, 2] == 0).all()
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-4, atol=1e-6)
