"""Newton losses as training loops meet them, against a slow reference with explicit loops and torch.func, over random inputs and all options."""
import copy
import io
import itertools
import math
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from newton_losses_nb.core.curvature import NonFiniteError
from newton_losses_nb.core.large import conjugate_gradient
from newton_losses_nb.core.newton import (
    ClippedLoss, NewtonLoss, NormalizedLoss, OutputLoss, ScalarStepLoss, SingularError, damped_solve, fisher_solve, inject_fisher, newton_direction)

D, F32 = torch.double, torch.float
many = lambda n, *draws: lambda test: settings(max_examples=n, deadline=None, derandomize=True)(given(*draws)(test))
seeds, sizes, dtypes = st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([D, F32, torch.bfloat16])
power = lambda lo, hi: st.floats(lo, hi).map(lambda e: 10**e)
norm = lambda A: float(torch.linalg.matrix_norm(A.to(D), 2))

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings(): warnings.simplefilter("error"); yield

# ---------------------------------------------------------------- losses, variants

def bumpy(y, u): return F.softplus(y*u).sum(1) + (y[:, 0]*y[:, -1]).sin() + (y**4).mean(1)
def quartic(y, u): return (y - u).square().sum(1)**2/8 + (y - u).square().sum(1)/2
def share(y, u): return -(u.softmax(1)*y.log_softmax(1)).sum(1)
def wave(y, u): return (3*y*u).sin().sum(1) + y.prod(1)
def linear(y, u): return (y*u).sum(1)
LOSSES = [bumpy, quartic, share, wave, linear]

NEWTON = {"fisher": dict(lam=.1), "auto": dict(), "hessian": dict(curvature="hessian", lam=40.), "abs": dict(curvature="hessian", eigenvalues="abs"),
    "clip chunks": dict(curvature="hessian", eigenvalues="clip", lam=.5, chunk_size=2), "sample": dict(average="sample", lam=.7), "sample hessian": dict(curvature="hessian", average="sample", eigenvalues="abs"),
    "cg": dict(curvature="hessian", lam=40., solver="cg", tol=1e-12), "cg auto": dict(curvature="hessian", solver="cg", tol=1e-12), "cg fisher": dict(solver="cg", lam=.5, tol=1e-12),
    "cg sample": dict(curvature="hessian", average="sample", lam=90., solver="cg", tol=1e-12), "diagonal": dict(curvature="hessian", solver="diagonal", eigenvalues="abs"),
    "diagonal fisher": dict(solver="diagonal", lam=.2), "diagonal sample": dict(curvature="hessian", solver="diagonal", average="sample", lam=40.), "window": dict(window=2, lam=.3), "ema": dict(ema=.6, lam=.3),
    "window auto": dict(window=2), "ema auto": dict(ema=.6), "window hessian": dict(curvature="hessian", window=2, lam=40.), "ema hessian": dict(curvature="hessian", ema=.6, lam=40.),
    "ema diagonal": dict(solver="diagonal", ema=.6), "window diagonal": dict(curvature="hessian", solver="diagonal", window=2, lam=40.),
    "rule": dict(lam=lambda G, e: G.square().mean()/9 + 1e-3), "rule hessian": dict(curvature="hessian", lam=lambda G, e: 1 - 2*e.amin().clamp_max(0)), "newton value": dict(lam=.1, value="newton")}
MAKE = {"plain": OutputLoss, "clip": lambda f, **k: ClippedLoss(f, .5, **k), "rms": NormalizedLoss, "scalar": ScalarStepLoss, "scalar fixed": lambda f, **k: ScalarStepLoss(f, .3, **k),
        **{name: (lambda kw: lambda f, **k: NewtonLoss(f, **{**kw, **k}))(kw) for name, kw in NEWTON.items()}}
PADDED = [k for k in MAKE if k not in ("cg", "cg auto", "cg sample")]

def gradient(loss, y, *args, factor=1., **kw):
    y = y.detach().clone().requires_grad_()
    value = loss(y, *args, **kw)
    return value.detach(), torch.autograd.grad(factor*value, y)[0]

def close(a, b, tol=1e-9): return float((a.to(D) - b.to(D)).abs().max()) <= tol*max(float(b.abs().max()), 1e-300) if a.numel() else True
def same(a, b, tol=1e-9): return all(close(x, y, tol) for x, y in zip(a, b))

def batch(seed, N, m, dtype=D, spread=1.):
    g = torch.Generator().manual_seed(seed)
    return (spread*torch.randn(N, m, generator=g, dtype=D)).to(dtype), torch.randn(N, m, generator=g, dtype=D).to(dtype)

# ---------------------------------------------------------------- the reference

def evidence(fn, y, u, mask, curvature, diagonal):
    "Per sample: loss, gradient, curvature, in m outputs, zero at padding"
    N, m = y.shape
    rows = []
    for i in range(N):
        real = [a for a in range(m) if mask is None or mask[i, a]]
        L, G, C = torch.zeros((), dtype=D), torch.zeros(m, dtype=D), torch.zeros(m, m, dtype=D)
        if real:
            v = u[i][real].to(D)
            one = lambda r: fn(r[None], v[None])[0]
            r = y[i][real].to(D)
            g = torch.func.grad(one)(r)
            h = torch.func.jacrev(torch.func.grad(one))(r) if curvature == "hessian" else torch.outer(g, g)
            L = one(r)
            for a, p in enumerate(real):
                G[p] = g[a]
                for b, q in enumerate(real):
                    if p == q or not diagonal: C[p, q] = h[a, b]
        rows.append((L, G, C, real))
    return rows

def reference(fn, batches, curvature="fisher", lam=1., average="batch", eigenvalues="raw", solver="direct", ema=None, window=None):
    "Losses, directions, and the worst condition number for the last of the batches (y, u, mask)"
    seen = [evidence(fn, *b, curvature, solver == "diagonal") for b in batches]
    m, now = batches[-1][0].shape[1], seen[-1]
    keep = seen[-window:] if window else seen if ema is not None else seen[-1:]
    weights = [ema**(len(keep) - 1 - k) if ema is not None else 1. for k in range(len(keep))]
    def scaled(batch):  # the sum over a batch, each output as if all samples had it
        taken = [s for s in batch if s[3]]
        count = [sum(a in s[3] for s in taken) for a in range(m)]
        total = torch.zeros(m, m, dtype=D)
        for a, b in itertools.product(range(m), range(m)):
            if count[a] and count[b]: total[a, b] = sum(s[2][a, b] for s in taken)*len(taken)/math.sqrt(count[a]*count[b])
        return total, len(taken)
    sums = [scaled(b) for b in keep]
    shared = sum(w*s for w, (s, n) in zip(weights, sums))/max(sum(w*n for w, (s, n) in zip(weights, sums)), 1e-300)
    squares = torch.tensor([float(s[1].square().sum()) for b in (keep if window else [now]) for s in b], dtype=D)  # of the gradients at hand
    def spectrum(C):
        e, V = torch.linalg.eigh(C)
        return {"raw": e, "abs": e.abs(), "clip": e.clamp_min(0)}[eigenvalues], V
    def damping(C, square):
        if lam != "auto": return lam
        if curvature == "fisher": return max(.1*float(C.diagonal().mean()), 1/400)
        e = spectrum(C)[0]
        return max(0., -float(e.min())) + max(.1*float(e.abs().mean()), math.sqrt(square)/10, 1e-300)
    directions, worst = [], 1.
    for L, G, C, real in now:
        C = C if average == "sample" else shared
        l = damping(C, float(G.square().mean()) if average == "sample" else float(squares.sum()/m/len(squares)))
        d = torch.zeros(m, dtype=D)
        if real:
            e, V = spectrum(C[real][:, real])
            e = e + l
            d[real] = V @ ((V.T @ G[real])/e)
            worst = max(worst, float((e.abs().max() + l)/e.abs().min().clamp_min(1e-300)))
        directions.append(d)
    return torch.stack([s[0] for s in now]), torch.stack(directions), worst

# ---------------------------------------------------------------- a thousand random inputs

@pytest.mark.parametrize("part", range(10))
def test_a_thousand_random_inputs(part):
    for k in range(100):
        rng = random.Random(1000*part + k)
        pick = lambda *a: rng.choice(a)
        N, m, dtype = rng.randint(1, 4), rng.randint(1, 5), pick(D, D, F32, torch.bfloat16)
        curvature, average, solver = pick("fisher", "hessian"), pick("batch", "batch", "sample"), pick("direct", "direct", "diagonal", "cg")
        if solver == "cg" and curvature == "hessian" and average == "sample": average = "batch"
        past = {} if average == "sample" or solver == "cg" else pick({}, {}, dict(window=2), dict(ema=.7))
        masked = rng.random() < .4 and not (solver == "cg" and curvature == "hessian")
        eigenvalues = pick("raw", "abs", "clip") if curvature == "hessian" and solver != "cg" else "raw"
        auto = rng.random() < .3 and not masked and not (solver == "cg" and curvature == "hessian")
        lam = "auto" if auto else 10**rng.uniform(-2 if curvature == "fisher" else 0, 3)
        kw = dict(curvature=curvature, average=average, solver=solver, eigenvalues=eigenvalues, lam=lam, **past)
        loss = NewtonLoss(fn := rng.choice(LOSSES), **kw, **(dict(tol=1e-10, max_iter=300) if solver == "cg" else {}), chunk_size=pick(None, 1, 3), value=pick("loss", "newton"), on_nonfinite=pick("raise", "skip"))
        if fn is linear and curvature == "hessian" and eigenvalues != "raw": loss.eigenvalues = kw["eigenvalues"] = "raw"
        batches = []
        for step in range(3 if past else 1):
            y, u = batch(rng.randrange(10**6), N, m, dtype, spread=pick(.1, 1., 2.))
            if rng.random() < .2: y = y.round()                           # ties, zeros
            if rng.random() < .2 and N > 1: y[1], u[1] = y[0], u[0]       # equal samples
            mask = (torch.arange(m) < torch.tensor([rng.randint(0 if i else 1, m) for i in range(N)])[:, None])[:, torch.randperm(m)] if masked else None
            batches.append((y, u, mask))
            if masked: y = torch.where(mask, y, pick(torch.nan, torch.inf, 1e30))
            factor = pick(1., 1e-4, -3e3)
            try: value, g = gradient(loss, y, u, factor=factor, **(dict(mask=mask) if masked else {}))
            except SingularError:
                assert reference(fn, batches, **kw)[2] > 1e9 or solver == "diagonal", (part, k)
                break
            losses, d, cond = reference(fn, batches, **kw)
            n = N if mask is None else int(mask.any(1).sum())
            expected = losses.sum()/n if loss.value == "loss" else d.square().sum()/2/n
            base = 1e-8 if dtype == D else 1e-5
            if solver == "cg" and cond > 1e4 or cond > .1/base: continue
            if solver == "cg" and curvature == "hessian" and loss.cg.negative.any():
                G = torch.stack([s[1] for s in evidence(fn, y, u, None, curvature, False)])
                assert (factor*g.to(D)*G).sum() >= 0 and g.isfinite().all(); continue
            assert close(g, factor*d/n, base*cond + (1e-2 if dtype == torch.bfloat16 else 0)) and g.dtype == dtype, (part, k, str(kw), fn.__name__, factor, float(cond), dtype, g, factor*d/n)
            if loss.value == "loss" or solver != "cg": assert close(value, expected, base*cond*2), (part, k, kw)

# ---------------------------------------------------------------- bound, limits, ways to solve

@many(80, sizes, sizes, seeds, dtypes, power(-30, 30), power(-12, 12), st.sampled_from([{}, dict(solver="cg", max_iter=500), dict(window=1), dict(average="sample")]))
def test_bound(N, m, seed, dtype, scale, lam, kw):
    y, u = batch(seed, N, m, dtype)
    _, G = newton_direction(linear, y, u*scale, lam=lam, **kw)
    assert norm(G) <= math.sqrt(N/lam)/2*(1 + 1e-5)

EXPLODING = {"ema": ({}, dict(ema=.5)), "mask": (dict(mask=torch.ones(3, 6, dtype=torch.bool)), {})}

@pytest.mark.parametrize("how", EXPLODING)
@pytest.mark.parametrize("scale", [1e10, 1e15])
def test_an_exploding_gradient_with_a_formed_fisher(how, scale):
    (y, u), (call, kw) = batch(0, 3, 6), EXPLODING[how]
    g = gradient(NewtonLoss(linear, lam=.01, **kw), y, u*scale, **call)[1]
    assert norm(3*g) <= math.sqrt(3/.01)/2

@pytest.mark.parametrize("scale", [1e2, 1e3, 1e20])
def test_a_full_mask_changes_nothing_in_float32(scale):
    y, u = batch(0, 3, 6, F32)
    exact = gradient(NewtonLoss(linear, lam=.01), y, u*scale)[1]
    assert close(gradient(NewtonLoss(linear, lam=.01), y, u*scale, mask=torch.ones(3, 6, dtype=torch.bool))[1], exact, 1e-3)

@many(60, sizes, sizes, seeds, st.sampled_from(["fisher", "hessian"]))
def test_limits(N, m, seed, curvature):
    y, u = batch(seed, N + m, m)
    _, G = newton_direction(quartic, y, u, curvature=curvature, lam=1e12)
    plain = gradient(OutputLoss(quartic), y, u)[1]*(N + m)
    assert close(1e12*G, plain, 1e-6)
    C = plain.T @ plain/(N + m) if curvature == "fisher" else torch.stack([torch.func.jacrev(torch.func.grad(lambda r: quartic(r[None], v[None])[0]))(r) for r, v in zip(y, u)]).mean(0)
    e = torch.linalg.eigvalsh(C)
    if e.min() > 1e-4*e.max(): assert close(newton_direction(quartic, y, u, curvature=curvature, lam=1e-14*float(e.max()))[1], plain @ torch.linalg.inv(C), 1e-6)

@many(80, sizes, sizes, seeds, power(-3, 3), power(-3, 3))
def test_three_ways_to_a_fisher_step(N, m, seed, scale, lam):
    G = batch(seed, N, m)[0]*scale
    lam *= scale**2
    definition = G @ torch.linalg.inv(G.T @ G/N + lam*torch.eye(m, dtype=D))
    rows = torch.cat([G, 0*G])                                    # the same Fisher from twice as many rows
    for D_ in (torch.linalg.solve(G @ G.T/N + lam*torch.eye(N, dtype=D), G), (G - G @ G.T @ torch.linalg.solve(G @ G.T + N*lam*torch.eye(N, dtype=D), G))/lam, fisher_solve(G, lam),
               fisher_solve(G, lam, rows=G), fisher_solve(G, lam/2, rows=rows)/2, damped_solve(G.T @ G/N, G, lam), conjugate_gradient(lambda V: V @ G.T @ G/N, G, lam, 1e-13, 1000).x):
        assert close(D_, definition, 1e-6)

@many(100, sizes, sizes, seeds, power(-6, 6), power(-12, 12), st.integers(1, 12), st.booleans())
def test_conjugate_gradients_never_go_uphill(K, m, seed, spread, lam, max_iter, definite):
    g = torch.Generator().manual_seed(seed)
    A, b = torch.randn(m, m, dtype=D, generator=g)*spread, torch.randn(K, m, dtype=D, generator=g)
    A = A @ A.T if definite else A + A.T
    found = conjugate_gradient(lambda V: V @ A, b, lam, 1e-12, max_iter)
    assert found.x.isfinite().all() and ((found.x*b).sum(1) > 0).all()
    e = torch.linalg.eigvalsh(A) + lam
    if e.min() > 0 and e.max() < 100*e.min():
        assert not found.negative.any()
        assert close(conjugate_gradient(lambda V: V @ A, b, lam, 1e-13, 200).x, torch.linalg.solve(A + lam*torch.eye(m, dtype=D), b.T).T, 1e-8)

# ---------------------------------------------------------------- invariances, for every variant

@pytest.mark.parametrize("name", MAKE)
def test_permutations(name):
    for seed, (N, m) in enumerate([(1, 1), (5, 3), (3, 6)]):
        y, u = batch(seed, N, m)
        i, a = torch.randperm(N), torch.randperm(m)
        symmetric = quartic if name == "cg auto" and m > 1 else share if seed == 1 else quartic
        value, g = gradient(MAKE[name](symmetric), y, u)
        assert same(gradient(MAKE[name](symmetric), y[i], u[i]), (value, g[i]), 1e-7)
        if name != "cg auto": assert same(gradient(MAKE[name](symmetric), y[:, a], u[:, a]), (value, g[:, a]), 1e-7)  # its λ is a random estimate

@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [D, torch.bfloat16])
def test_value_and_incoming_factor(name, dtype):
    masks = [{}] + ([dict(mask=torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1]]).bool())] if name in PADDED else [])
    for kw in masks:
        (y, u), (y2, u2) = batch(1, 4, 3, dtype), batch(2, 4, 3, dtype)
        losses = [MAKE[name](bumpy) for _ in range(6)]
        for l in losses: l(y2.clone().requires_grad_(), u2, **kw)           # a past, for those that remember
        value, g = gradient(losses[0], y, u, **kw)
        up = [t.to(torch.promote_types(dtype, F32)) for t in (y, u)]
        plain = bumpy(*up).mean() if not kw else sum(bumpy(a[k][None], b[k][None])[0] for a, b, k in zip(*up, kw["mask"]) if k.any())/3
        if name != "newton value": assert close(value, plain, 1e-9 if dtype == D else 1e-5)
        for l, factor in zip(losses[1:], (1e-8, -1e-4, 3., 2.**16, 1e8)):
            v, h = gradient(l, y, u, factor=factor, **kw)
            assert torch.equal(v, value) and close(h.to(D)/factor, g, {D: 1e-12, F32: 1e-6}.get(dtype, 1e-2))

@many(40, sizes, sizes, seeds, dtypes, power(-6, 6), st.sampled_from([1e-8, 1e-3, -7., 1e4, 1e8]), st.sampled_from(["mean", "sum"]))
def test_injection(N, m, seed, dtype, lam, scale, reduction):
    y, u = batch(seed, N, m, dtype)
    leaf = y.clone().requires_grad_()
    z = inject_fisher(leaf, lam, reduction, scale=lambda: scale)
    assert torch.equal(z, y)
    up = torch.promote_types(dtype, F32)
    (scale*getattr(bumpy(z.to(up), u.to(up)), reduction)()).backward()
    _, expected = newton_direction(bumpy, y, u, lam=lam)
    size = {D: 1e-7, F32: 1e-3}.get(dtype, .1)
    rounding = norm(gradient(OutputLoss(bumpy), y, u)[1])*N*size/lam       # what arrives was rounded to dtype: |ΔD| ≤ |ΔG|(1/λ)
    assert norm(leaf.grad.to(D)/scale*(N if reduction == "mean" else 1) - expected.to(D)) <= size*norm(expected) + rounding

@many(30, st.integers(2, 9), st.integers(1, 5), seeds, st.sampled_from([k for k in NEWTON if "sample" not in k and k not in ("cg", "cg auto", "newton value")]))
def test_uneven_micro_batches_are_the_whole_batch(N, m, seed, name):
    rng = random.Random(seed)
    whole, pieces = MAKE[name](bumpy), MAKE[name](bumpy)
    for step in range(3):
        y, u = batch(seed + step, N, m)
        cuts = sorted(rng.sample(range(1, N), rng.randint(0, N - 1)))
        parts = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, N])]
        _, g = gradient(whole, y, u)
        with pieces.accumulated((y[p], u[p]) for p in parts): got = [gradient(pieces, y[p], u[p], factor=(p.stop - p.start)/N)[1] for p in parts]
        assert close(torch.cat(got), g, 1e-7), step

def test_grad_scaler_and_autocast_give_the_step_of_the_same_outputs():
    net, (x, u) = torch.nn.Linear(3, 4), batch(0, 16, 3, F32)
    u = torch.randn(16, 4)
    for name, make in MAKE.items():
        if name == "newton value": continue
        for dtype, factor in ((torch.float16, 2.**8), (torch.bfloat16, 2.**16)):
            scaler, opt = torch.amp.GradScaler("cpu", init_scale=factor), torch.optim.SGD(net.parameters(), lr=0.)
            opt.zero_grad()
            with torch.autocast("cpu", dtype): y = net(x); value = make(bumpy)(y, u)
            assert y.dtype == dtype and value.dtype == F32
            scaler.scale(value).backward(); scaler.unscale_(opt)
            _, g = gradient(make(bumpy), y.detach().float(), u)
            assert close(net.weight.grad, g.T @ x, 2e-2), (name, dtype)

# ---------------------------------------------------------------- padding

@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("dtype", [D, F32])
def test_padding(name, dtype):
    tol = 1e-8 if dtype == D else 1e-4
    (y, u), (y2, u2), make = batch(3, 6, 3, dtype), batch(4, 6, 3, dtype), MAKE[name]
    def run(widen, full=True, rows=slice(None)):
        loss = make(bumpy)
        for a, b in ((y2, u2), (y, u)):
            A, B, mask = widen(a, b)
            out = gradient(loss, A[rows], B[rows], mask=mask[rows])
        return out
    def at(columns, width, fill, empty=0):
        def widen(a, b):
            A, B, mask = torch.full((6 + empty, width), fill, dtype=dtype), torch.full((6 + empty, width), -fill, dtype=dtype), torch.zeros(6 + empty, width, dtype=torch.bool)
            A[:6, columns], B[:6, columns], mask[:6, columns] = a, b, True
            return A, B, mask
        return widen
    loss = make(bumpy)
    for a, b in ((y2, u2), (y, u)): value, g = gradient(loss, a, b)        # without padding
    for columns, width, fill, empty in (([0, 1, 2], 3, 0., 0), ([0, 1, 2], 5, torch.nan, 0), ([1, 4, 6], 8, torch.inf, 3), ([0, 2, 3], 4, 1e30, 1)):
        v, h = run(at(columns, width, fill, empty))
        assert same((v, h[:6, columns]), (value, g), tol) and h.count_nonzero() <= g.numel()
    sizes = torch.tensor([3, 2, 0, 1, 3, 2])
    ragged = lambda width, fill: lambda a, b: (torch.where(k := torch.arange(width) < sizes[:, None], F.pad(a, (0, width - 3)), fill), torch.where(k, F.pad(b, (0, width - 3)), fill), k)
    v, h = run(ragged(3, 0.))
    for width, fill in ((3, torch.nan), (5, -torch.inf)):
        v2, h2 = run(ragged(width, fill))
        assert same((v2, h2[:, :3]), (v, h), tol) and not h2[:, 3:].any()
    keep = sizes > 0                                                      # a set without members
    assert same(run(ragged(3, 7.), rows=keep), (v, h[keep]), tol) and not h[~keep].any()
    if name in ("plain", "clip") or "sample" in name:                      # no sample knows of another: group by group
        for k in (1, 2, 3):
            i = (sizes == k).nonzero()[:, 0]
            assert close(h[i][:, :k]*5/len(i), gradient(make(bumpy), y[i][:, :k], u[i][:, :k])[1], tol)

def test_own_hessians_by_cg_refuse_a_mask():
    y, u = batch(0, 3, 2)
    with pytest.raises(ValueError, match="mask"): gradient(NewtonLoss(bumpy, "hessian", average="sample", solver="cg"), y, u, mask=torch.ones(3, 2, dtype=torch.bool))

# ---------------------------------------------------------------- guards

def pointed(p): return lambda y, u: quartic(y, u) + y[:, 0].abs().pow(p)   # p = ½: no gradient at 0; p = 3/2: no Hessian
def spoil(kind, y, u, i):
    y, u = y.clone(), u.clone()
    if kind in ("nan output", "inf output"): y[i, -1] = float(kind.split()[0])*-1
    elif kind in ("nan loss", "inf loss"): u[i, 0] = float(kind.split()[0])
    else: y[i, 0] = 0.
    return y, u
KINDS = {"nan output": quartic, "inf output": quartic, "nan loss": quartic, "inf loss": quartic, "gradient": pointed(.5), "hessian": pointed(1.5)}
uses_hessian = lambda name: "hessian" == NEWTON.get(name, {}).get("curvature")
cases = [(name, kind, masked) for name in MAKE for kind in KINDS for masked in (False, True) if name in PADDED or not masked]
@pytest.mark.parametrize("name,kind,masked", cases)
def test_skip_is_the_batch_without_bad_samples(name, kind, masked):
    (y, u), past, fn = batch(5, 5, 3), batch(6, 4, 3), KINDS[kind]
    if kind == "hessian" and not uses_hessian(name): return
    bad, v = spoil(kind, y, u, 2)
    keep, kw = torch.arange(5) != 2, [dict(mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]]).bool())] if masked else [{}]
    careful, plain = MAKE[name](fn, on_nonfinite="skip"), MAKE[name](fn)
    for l in (careful, plain): gradient(l, *past, **{k: a[:4] for k, a in kw[0].items()})
    value, g = gradient(careful, bad, v, **kw[0])
    value4, g4 = gradient(plain, y[keep], u[keep], **{k: a[keep] for k, a in kw[0].items()})
    assert same((value, g[keep]), (value4, g4), 1e-8) and not g[2].any() and careful.skipped == 1
    assert same(gradient(careful, y, u, **kw[0]), gradient(plain, y, u, **kw[0]), 1e-8)         # what is remembered is the same
    with pytest.raises(NonFiniteError): gradient(MAKE[name](fn), bad, v, **kw[0])

@pytest.mark.parametrize("name", [k for k in NEWTON if uses_hessian(k)])
def test_gradient_where_a_hessian_is_missing(name):
    (y, u), fn = batch(5, 5, 3), pointed(1.5)
    bad, v = spoil("hessian", y, u, 2)
    loss = MAKE[name](fn, on_nonfinite="gradient")
    assert same(gradient(loss, bad, v), gradient(OutputLoss(fn), bad, v))
    assert same(gradient(loss, y, u), gradient(MAKE[name](fn), y, u))

@pytest.mark.parametrize("kw", [dict(solver="diagonal"), dict(solver="diagonal", ema=.5)])
def test_gradient_with_micro_batches(kw):
    (y, u), fn = batch(5, 6, 3), pointed(1.5)
    bad, v = spoil("hessian", y, u, 1)
    loss = NewtonLoss(fn, "hessian", lam=40., on_nonfinite="gradient", **kw)
    with loss.accumulated([(bad[:3], v[:3]), (bad[3:], v[3:])]): a, b = gradient(loss, bad[:3], v[:3])[1], gradient(loss, bad[3:], v[3:])[1]
    assert a.isfinite().all() and b.isfinite().all()
    assert gradient(loss, y, u)[1].isfinite().all()

def test_gradient_for_all_micro_batches():
    (y, u), fn = batch(5, 6, 3), pointed(1.5)
    bad, v = spoil("hessian", y, u, 1)
    loss = NewtonLoss(fn, "hessian", lam=40., on_nonfinite="gradient")
    with loss.accumulated([(bad[:3], v[:3]), (bad[3:], v[3:])]): g = gradient(loss, bad[3:], v[3:])[1]
    assert close(g, gradient(OutputLoss(fn), bad[3:], v[3:])[1])

def test_injection_skips_like_a_batch_without_the_sample():
    (y, u), keep = batch(5, 5, 3), torch.arange(5) != 2
    def injected(y, u, how="raise"): y = y.clone().requires_grad_(); return torch.autograd.grad((inject_fisher(y, .1, on_nonfinite=how)*u).sum(1).mean(), y)[0]
    v = u.clone(); v[2] = torch.nan
    assert close(injected(y, v, "skip")[keep], injected(y[keep], u[keep]))

def test_nothing_left_and_singular():
    y, u = batch(0, 4, 3)
    for name, make in MAKE.items():
        loss = make(quartic, on_nonfinite="skip")
        value, g = gradient(loss, y*torch.nan, u)
        assert value == 0 and not g.any() and loss.skipped == 4
        assert same(gradient(loss, y, u), gradient(make(quartic), y, u)), name
    for kw in (dict(), dict(solver="diagonal"), dict(average="sample"), dict(ema=.5)):
        fn = lambda y, u: (y[:, :1]**2*u[:, :1]**2).sum(1)                 # flat in the second output
        with pytest.raises(SingularError): gradient(NewtonLoss(fn, "hessian", lam=0., **kw), y, u)
        assert not gradient(NewtonLoss(fn, "hessian", lam=0., on_nonfinite="skip", **kw), y, u)[1].any()
        assert same(gradient(NewtonLoss(fn, "hessian", lam=0., on_nonfinite="gradient", **kw), y, u), gradient(OutputLoss(fn), y, u))

@pytest.mark.parametrize("name", ["scalar", "scalar fixed"])
def test_scalar_step_of_an_exploding_gradient(name):
    y, u = batch(0, 3, 4, F32)
    g = gradient(MAKE[name](linear, on_nonfinite="skip"), y, 1e20*u)[1]
    assert g.isfinite().all() and g.any()

def test_a_kink_hides_no_second_derivative():
    y = torch.tensor([[-5e-4, 1.], [2., 3.]], dtype=D)
    assert close(newton_direction(lambda y: y.clamp_min(0).sum(1), y, curvature="hessian", lam=1.)[1], (y > 0).to(D))

def test_importing_warns_of_nothing():
    code = "import pathlib, newton_losses_nb as p; [compile(f.read_text(), str(f), 'exec') for f in pathlib.Path(p.__file__).parent.rglob('*.py')]"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert not found.returncode, found.stderr[-300:]

# ---------------------------------------------------------------- state

def test_recomputed_loss():
    from torch.utils.checkpoint import checkpoint
    y, u = batch(0, 4, 3)
    recomputed = lambda loss: gradient(lambda y: checkpoint(lambda y: loss(y, u), y, use_reentrant=False), y)
    assert same(recomputed(NewtonLoss(bumpy, lam=.3)), gradient(NewtonLoss(bumpy, lam=.3), y, u))
    for kw in (dict(ema=.5), dict(window=2)):  # would be remembered twice
        with pytest.raises(RuntimeError, match="checkpoint the network only"): recomputed(NewtonLoss(bumpy, lam=.3, **kw))

REMEMBER = [k for k, kw in NEWTON.items() if "ema" in kw or "window" in kw]

@pytest.mark.parametrize("name", REMEMBER)
@pytest.mark.parametrize("dtype", [D, torch.bfloat16])
def test_interrupted_at_any_step(name, dtype):
    data = [batch(k, 1 + k % 4, 3, dtype) for k in range(6)]
    whole = MAKE[name](bumpy)
    steps = [gradient(whole, *b) for b in data]
    for stop in range(6):
        first, second = MAKE[name](bumpy), MAKE[name](bumpy)
        for b in data[:stop]: gradient(first, *b)
        file = io.BytesIO()
        torch.save(first.state_dict(), file); file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for other in (second, copy.deepcopy(first), pickle.loads(pickle.dumps(first)) if "rule" not in name else second):
            for b, (v, g) in zip(data[stop:], steps[stop:]):
                got = gradient(other, *b)
                assert torch.equal(got[0], v) and torch.equal(got[1], g)

@pytest.mark.parametrize("name", MAKE)
def test_copies_and_evaluation(name):
    (y, u), loss = batch(0, 4, 3), MAKE[name](bumpy)
    gradient(loss, *batch(1, 4, 3))
    copies = [copy.deepcopy(loss)] + ([] if "rule" in name else [pickle.loads(pickle.dumps(loss))] if name in ("plain", "rms", "scalar", *NEWTON) else [])
    loss.eval()
    seen = [gradient(loss, y, u) for _ in range(2)]
    with torch.no_grad(): value = loss(y, u)
    assert same(seen[0], seen[1], 0) and (name == "newton value" or close(value, seen[0][0]))
    loss.train()
    for l in (loss, *copies): assert same(gradient(l, y, u), seen[0], 0)

def test_schedule_of_lambda():
    y, u = batch(0, 5, 3)
    for name in ("fisher", "hessian", "cg", "cg fisher", "diagonal", "ema", "window", "sample"):
        loss = MAKE[name](bumpy)
        for lam in (50., "auto", torch.tensor(1e3), lambda G, e: 70., 1e6):
            loss.lam = lam
            if loss.history is not None: loss.history.reset()
            assert same(gradient(loss, y, u), gradient(NewtonLoss(bumpy, **{**NEWTON[name], "lam": lam}), y, u), 1e-12)
        loss.lam = -1.
        with pytest.raises(ValueError, match="lam"): gradient(loss, y, u)
