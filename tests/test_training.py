"""Newton losses as training loops meet them: mixed precision and scalers, compiled and checkpointed networks, losses of any weight, runs that are resumed."""
import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils.checkpoint import checkpoint

from newton_losses_nb import (
    Clip, DiagonalFisher, DiagonalHessian, Direction, Fisher, Hessian, Krylov, MovingAverage, Normalize, NewtonLoss, OutputLoss, PerSample, Remembering,
    Scalar, Whiten, Window, inject_fisher, newton_direction)
from newton_losses_nb.core.more import conjugate_gradient

D, F32 = torch.double, torch.float
many = lambda n, *draws: lambda test: settings(max_examples=n, deadline=None, derandomize=True)(given(*draws)(test))
seeds, sizes, dtypes = st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([D, F32, torch.bfloat16])
power = lambda lo, hi: st.floats(lo, hi).map(lambda e: 10**e)

@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings(): warnings.simplefilter("error"); yield

# ---------------------------------------------------------------- losses, directions

def bumpy(y, u): return F.softplus(y*u).sum(1) + (y[:, 0]*y[:, -1]).sin() + (y**4).mean(1)

MAKE = {"plain": Direction, "clip": lambda: Clip(.5), "rms": Normalize, "scalar": Scalar, "scalar fixed": lambda: Scalar(.3), "fisher": lambda: Fisher(.1),
        "auto": Fisher, "whiten": Whiten, "hessian": lambda: Hessian(40.), "abs": lambda: Hessian(eigenvalues="abs"), "sample": lambda: PerSample(Fisher(.7)),
        "sample hessian": lambda: PerSample(Hessian(eigenvalues="abs")), "krylov": lambda: Krylov(40., tol=1e-12), "krylov auto": lambda: Krylov(tol=1e-12),
        "diagonal": lambda: DiagonalHessian(eigenvalues="abs"), "diagonal fisher": lambda: DiagonalFisher(.2), "probes": lambda: DiagonalHessian(40., probes=2),
        "rule": lambda: Fisher(lambda square, e: square/9 + 1e-3), "rule hessian": lambda: Hessian(lambda square, e: 1 - 2*e.amin(-1).clamp_max(0))}
REMEMBER = {"window": lambda: Remembering(Fisher(.3), Window(2)), "window auto": lambda: Remembering(Fisher(), Window(2)),
            "average": lambda: Remembering(Fisher(.3), MovingAverage(.6)), "average auto": lambda: Remembering(Fisher(), MovingAverage(.6)),
            "window hessian": lambda: Remembering(Hessian(40.), Window(2)), "average hessian": lambda: Remembering(Hessian(40.), MovingAverage(.6)),
            "average diagonal": lambda: Remembering(DiagonalFisher(), MovingAverage(.6)), "window diagonal": lambda: Remembering(DiagonalHessian(40.), Window(2))}
MAKE |= REMEMBER
make = lambda name, fn=bumpy, **kw: OutputLoss(fn, MAKE[name](), **kw)

def gradient(loss, y, *args, factor=1., **kw):
    y = y.detach().clone().requires_grad_()
    value = loss(y, *args, **kw)
    return value.detach(), torch.autograd.grad(factor*value, y)[0]

def close(a, b, tol=1e-9): return float((a.to(D) - b.to(D)).abs().max()) <= tol*max(float(b.abs().max()), 1e-300)
def same(a, b, tol=1e-9): return all(close(x, y, tol) for x, y in zip(a, b))

def batch(seed, N, m, dtype=D):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, m, generator=g, dtype=D).to(dtype) for _ in range(2)]

# ---------------------------------------------------------------- precision

@pytest.mark.parametrize("name", MAKE)
def test_weights_of_any_size(name):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1]]).bool()
    for kw in ({}, dict(mask=mask)):
        for dtype in (D, torch.bfloat16):
            past, (y, u), losses = batch(2, 4, 3, dtype), batch(1, 4, 3, dtype), [make(name) for _ in range(6)]
            for l in losses: gradient(l, *past, **kw)
            value, g = gradient(losses[0], y, u, **kw)
            for l, factor in zip(losses[1:], (1e-8, -1e-4, 3., 2.**16, 1e8)):
                v, h = gradient(l, y, u, factor=factor, **kw)
                assert torch.equal(v, value) and close(h.to(D)/factor, g, 1e-12 if dtype == D else 1e-2)

@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype, factor", [(torch.float16, 2.**8), (torch.bfloat16, 2.**16)])
def test_grad_scaler_and_autocast_give_the_step_of_the_same_outputs(name, dtype, factor):
    torch.manual_seed(0)
    net, x, u = torch.nn.Linear(3, 4), torch.randn(16, 3), torch.randn(16, 4)
    scaler, opt = torch.amp.GradScaler("cpu", init_scale=factor), torch.optim.SGD(net.parameters(), lr=0.)
    with torch.autocast("cpu", dtype):
        y = net(x)
        value = make(name)(y, u)
    assert y.dtype == dtype and value.dtype == F32
    scaler.scale(value).backward()
    scaler.unscale_(opt)
    assert close(net.weight.grad, gradient(make(name), y.detach().float(), u)[1].T @ x, 2e-2)

def test_a_scaler_skips_what_overflows():
    "Times the scale, the step does not fit into float16: the scaler notices, and goes on with a smaller scale"
    net, x, u = torch.nn.Linear(3, 4), torch.randn(16, 3), torch.randn(16, 4)
    scaler, opt = torch.amp.GradScaler("cpu", init_scale=2.**40), torch.optim.SGD(net.parameters(), lr=1.)
    before = net.weight.clone()
    with torch.autocast("cpu", torch.float16): value = NewtonLoss(bumpy)(net(x), u)
    scaler.scale(value).backward()
    scaler.step(opt); scaler.update()
    assert torch.equal(net.weight, before) and scaler.get_scale() < 2.**40

@many(40, sizes, sizes, seeds, dtypes, power(-6, 6), st.sampled_from([1e-8, 1e-3, -7., 1e4, 1e8]), st.sampled_from(["mean", "sum"]))
def test_injection_with_a_scale(N, m, seed, dtype, lam, scale, reduction):
    y, u = batch(seed, N, m, dtype)
    leaf = y.clone().requires_grad_()
    z = inject_fisher(leaf, lam, reduction, scale=lambda: scale)
    assert torch.equal(z, y)
    up = torch.promote_types(dtype, F32)
    (scale*getattr(bumpy(z.to(up), u.to(up)), reduction)()).backward()
    expected, size = newton_direction(bumpy, y, u, lam=lam)[1], {D: 1e-7, F32: 1e-3}.get(dtype, .1)
    norm = lambda A: float(torch.linalg.matrix_norm(A.to(D), 2))
    rounding = norm(gradient(OutputLoss(bumpy), y, u)[1])*N*size/lam       # what arrives was rounded to dtype: |ΔD| ≤ |ΔG|/λ
    assert norm(leaf.grad.to(D)/scale*(N if reduction == "mean" else 1) - expected.to(D)) <= size*norm(expected) + rounding

# ---------------------------------------------------------------- compiled and checkpointed

@pytest.mark.parametrize("name", ["fisher", "abs", "average", "krylov"])
@pytest.mark.parametrize("whole", [False, True], ids=["network", "step"])
def test_compiled(name, whole):
    "A compiled network, or a step compiled with the loss in it, which torch leaves as it is"
    torch.manual_seed(0)
    net, x, u = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)), torch.randn(16, 3), torch.randn(16, 4)
    def grads(net, step):
        net.zero_grad(); step(net, make(name)).backward()
        return [p.grad.clone() for p in net.parameters()]
    step = lambda net, loss: 2*loss(net(x), u)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = (net, torch.compile(step, backend="aot_eager")) if whole else (torch.compile(net, backend="aot_eager"), step)
        assert same(grads(*fast), grads(net, step), 1e-5)

def test_recomputed_loss():
    y, u = batch(0, 4, 3)
    recomputed = lambda loss: gradient(lambda y: checkpoint(lambda y: loss(y, u), y, use_reentrant=False), y)
    for name in ("fisher", "abs", "sample"): assert same(recomputed(make(name)), gradient(make(name), y, u))
    for name in REMEMBER:  # would be remembered twice
        with pytest.raises(RuntimeError, match="checkpoint the network only"): recomputed(make(name))

# ---------------------------------------------------------------- resumed

@pytest.mark.parametrize("name", REMEMBER)
@pytest.mark.parametrize("dtype", [D, torch.bfloat16])
def test_interrupted_at_any_step(name, dtype):
    data = [batch(k, 1 + k % 4, 3, dtype) for k in range(6)]
    whole = make(name)
    steps = [gradient(whole, *b) for b in data]
    for stop in range(6):
        first, second = make(name), make(name)
        for b in data[:stop]: gradient(first, *b)
        file = io.BytesIO()
        torch.save(first.state_dict(), file); file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for other in (second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
            for b, (v, g) in zip(data[stop:], steps[stop:]):
                got = gradient(other, *b)
                assert torch.equal(got[0], v) and torch.equal(got[1], g)

@pytest.mark.parametrize("name", ["fisher", "whiten", "hessian", "krylov", "diagonal fisher", "average"])
def test_schedule_of_lambda(name):
    y, u = batch(0, 5, 3)
    for lam in (50., torch.tensor(1e3), lambda square, e: 70., 1e6):
        loss, fresh = make(name), MAKE[name]()
        gradient(loss, y, u)
        for d in (loss.direction, fresh): getattr(d, "direction", d).lam = lam
        if loss.direction.memory: loss.direction.memory.reset()
        assert same(gradient(loss, y, u), gradient(OutputLoss(bumpy, fresh), y, u), 1e-12)
        assert not close(gradient(loss, y, u)[1], gradient(make(name), y, u)[1], 1e-3)

# ---------------------------------------------------------------- a Hessian that is missing

def kinked(y, u): return bumpy(y, u) + y[:, 0].abs().pow(1.5)                 # no Hessian where an output is 0

@pytest.mark.parametrize("name", ["hessian", "abs", "diagonal", "average hessian", "window diagonal"])
def test_gradient_in_its_place(name):
    (y, u), loss = batch(5, 6, 3), make(name, kinked, on_nonfinite="gradient")
    bad = y.clone(); bad[1, 0] = 0.
    assert same(gradient(loss, bad, u), gradient(OutputLoss(kinked), bad, u))
    loss = make(name, kinked, on_nonfinite="gradient")
    assert same(gradient(loss, y, u), gradient(make(name, kinked), y, u))
    loss = make(name, kinked, on_nonfinite="gradient")
    with loss.accumulated([(bad[:3], u[:3]), (bad[3:], u[3:])]):              # for all micro-batches, also those without such a sample
        assert close(gradient(loss, bad[3:], u[3:])[1], gradient(OutputLoss(kinked), bad[3:], u[3:])[1])

# ---------------------------------------------------------------- conjugate gradients

@many(100, sizes, sizes, seeds, power(-6, 6), power(-12, 12), st.integers(1, 12), st.booleans())
def test_conjugate_gradients_never_go_uphill(K, m, seed, spread, lam, max_iter, definite):
    g = torch.Generator().manual_seed(seed)
    A, b = torch.randn(m, m, dtype=D, generator=g)*spread, torch.randn(K, m, dtype=D, generator=g)
    A, damping = A @ A.T if definite else A + A.T, torch.full((K,), lam, dtype=D)
    found = conjugate_gradient(lambda V: V @ A, b, damping, 1e-12, max_iter)
    assert found.x.isfinite().all() and ((found.x*b).sum(1) > 0).all()
    e = torch.linalg.eigvalsh(A) + lam
    if e.min() > 0 and e.max() < 100*e.min():
        assert not found.negative.any()
        exact = torch.linalg.solve(A + lam*torch.eye(m, dtype=D), b.T).T
        assert close(conjugate_gradient(lambda V: V @ A, b, damping, 1e-13, 200).x, exact, 1e-8)

# ---------------------------------------------------------------- guards

def test_a_kink_hides_no_second_derivative():
    y = torch.tensor([[-5e-4, 1.], [2., 3.]], dtype=D)
    assert close(newton_direction(lambda y: y.clamp_min(0).sum(1), y, curvature="hessian", lam=1.)[1], (y > 0).to(D))

def test_importing_warns_of_nothing():
    code = "import pathlib, newton_losses_nb as p; [compile(f.read_text(), str(f), 'exec') for f in pathlib.Path(p.__file__).parent.rglob('*.py')]"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert not found.returncode, found.stderr[-300:]
