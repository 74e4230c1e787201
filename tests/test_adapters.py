"""What `check_loss` says about losses that are made to mislead it, and adapters against loops over samples."""
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import newton_losses_nb
from newton_losses_nb import (
    FenchelYoungLoss, Hessian, Krylov, NewtonLoss, OutputLoss, Noise, PerSample, SmoothedLoss, SortingLoss, check_loss, neural_sort, soft_sort, sorting_network,
    true_permutation)
from newton_losses_nb.core.adapters import per_sample, permutation_loss
from newton_losses_nb.core.check import QUESTIONS
from newton_losses_nb.core.derivatives import derivatives
from newton_losses_nb.paths.fenchel_young import Noise
from newton_losses_nb.sorting.relaxations import ranking_loss

fast = settings(deadline=None, max_examples=25)

@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield

def batch(n=12, m=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, m, generator=g, dtype=torch.float64).to(dtype), torch.randn(n, m, generator=g, dtype=torch.float64).to(dtype)

def assert_same(f, g, *args, second="full", **kw):
    for a, b in zip(*(derivatives(loss, *args, second=second) for loss in (f, g))):
        if a is not None: assert_close(a, b, **kw)

class Function(torch.autograd.Function):
    "tanh with a choice of mistakes"
    @staticmethod
    def forward(ctx, x, mistake):
        ctx.mistake = mistake
        ctx.save_for_backward(x)
        ctx.slope = 1 - x.tanh()**2
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        if ctx.mistake == "second": return g*ctx.slope, None
        if ctx.mistake == "half second": return g*(ctx.slope + (1 - x.tanh()**2))/2, None
        if ctx.mistake == "first": return g*(1 - x.tanh()**2)*0.9, None
        if ctx.mistake == "one sample": return g*torch.where(torch.arange(len(x))[:, None] == 5, 2., 1.)*(1 - x.tanh()**2), None
        return g*(1 - x.tanh()**2), None

class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sinh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return g*ctx.saved_tensors[0].cosh()

class SoftPlusOnce(torch.autograd.Function):
    "A backward pass whose own backward raises"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x).sum(1)

    @staticmethod
    def backward(ctx, g): return Refuse.apply(g, ctx.saved_tensors[0])

class Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x): return g[:, None]*x.sigmoid()

    @staticmethod
    def backward(ctx, gg): raise RuntimeError("no second derivative here")

class WrongOnce(torch.autograd.Function):
    "A double backward of its own, with a mistake"
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sinh()

    @staticmethod
    def backward(ctx, g): return WrongTwice.apply(g, ctx.saved_tensors[0])

class WrongTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, x):
        ctx.save_for_backward(g, x)
        return g*x.cosh()

    @staticmethod
    def backward(ctx, gg):
        g, x = ctx.saved_tensors
        return gg*x.cosh(), 2*gg*g*x.sinh()

def square(y, t): return (y - t).square().sum(1)

class InPlace(nn.Module):
    def forward(self, y, t): return y.sub_(t).square().sum(1)

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
    def forward(self, y, t): return (self.norm(y) - t).square().sum(1)

class Weighted(nn.Module):
    "A float32 matrix inside, which float64 does not go with"
    def __init__(self):
        super().__init__()
        self.register_buffer("A", torch.diag(torch.tensor([1., 2., 3.])))
    def forward(self, y, t): return ((y - t) @ self.A).square().sum(1)

float_matrix = torch.diag(torch.tensor([1., 2., 3.]))
system = random.SystemRandom()

CASES = {  # loss -> expected values; None: no opinion
    "fine": (square, dict(ok=True, second="right")),
    "batch norm": (Norm(), {"ok": False, "independent samples": "leak"}),
    "mean over batch": (lambda y, t: square(y, t) + y.mean(), {"ok": False, "independent samples": "leak"}),
    "rank over batch": (lambda y, t: square(y, t)*(1 + y[:, 0].argsort().argsort()), {"ok": False, "independent samples": "leak"}),
    "detached statistics": (lambda y, t: square(y, t)/y.detach().std(), {"ok": False, "independent samples": "leak"}),
    "divided by N": (lambda y, t: square(y, t)/len(y), {"ok": True, "independent samples": "ok"}),
    "detach": (lambda y, t: square(y.detach(), t), {"ok": False, "differentiable": "detached", "fatal": True}),
    "half detached": (lambda y, t: ((y - t)*(y - t).detach()).sum(1), {"ok": False, "first": "wrong", "second": "detached"}),
    "detached plus constant": (lambda y, t: square(y.detach(), t) + 0*y.sum(1), {"ok": False, "differentiable": "detached"}),
    "no grad": (torch.no_grad()(square), {"differentiable": "detached"}),
    "numpy": (lambda y, t: torch.from_numpy(np.square(y.numpy() - t.numpy())).sum(1), {"ok": False, "fatal": True}),
    "numpy detached": (lambda y, t: torch.from_numpy(np.square(y.detach().numpy() - t.numpy())).sum(1), {"differentiable": "detached"}),
    "constant": (lambda y, t: t.sum(1), {"ok": False, "differentiable": "constant", "fatal": True}),
    "zero": (lambda y, t: 0*y.sum(1), {"ok": False, "differentiable": "constant", "fatal": True}),
    "by hand": (lambda y, t: square(Function.apply(y, ""), t), {"ok": True, "second": "right"}),
    "wrong second": (lambda y, t: square(Function.apply(y, "second"), t), {"ok": False, "first": "right", "second": "wrong"}),
    "half wrong second": (lambda y, t: square(Function.apply(y, "half second"), t), {"ok": False, "first": "right", "second": "wrong"}),
    "wrong first": (lambda y, t: square(Function.apply(y, "first"), t), {"ok": False, "first": "wrong"}),
    "one sample wrong": (lambda y, t: square(Function.apply(y, "one sample"), t), {"ok": False, "first": "wrong", "word": "most in sample 5"}),
    "once": (lambda y, t: square(Once.apply(y), t), {"ok": True, "second": "detached"}),
    "refused": (lambda y, t: F.adaptive_avg_pool1d(torch.tanh(y)[None], 1)[0, :, 0] + SoftPlusOnce.apply(y), {"ok": True, "second": "refused"}),
    "wrong double backward": (lambda y, t: square(WrongOnce.apply(y), t), {"ok": False, "first": "right", "second": "wrong"}),
    "piecewise linear": (lambda y, t: (y - t).abs().sum(1), {"ok": True, "first": "right", "second": "zero"}),
    "linear": (lambda y, t: (y*t).sum(1), {"ok": True, "second": "zero"}),
    "straight through": (lambda y, t: square(y + (y.round() - y).detach(), t), {"ok": True, "first": "surrogate"}),
    "noise": (lambda y, t: square(y + 0.1*torch.randn_like(y), t), {"ok": True, "repeatable": "noise", "first": "right", "second": "right"}),
    "numpy noise": (lambda y, t: square(y, t)*(1 + np.random.rand()), {"ok": True, "repeatable": "noise", "second": "right"}),
    "python noise": (lambda y, t: square(y, t)*(1 + random.random()), {"ok": True, "repeatable": "noise", "second": "right"}),
    "dropout": (lambda y, t: square(F.dropout(y, 0.5), t), {"ok": True, "repeatable": "noise", "first": "right", "second": "right"}),
    "entropy": (lambda y, t: square(y, t)*(1 + system.random()), {"ok": False, "repeatable": "random", "second": "unknown"}),
    "nan region": (lambda y, t: (y[:, 0] + 0.5).log() + square(y, t), {"ok": False, "finite": "non-finite", "second": "right"}),
    "root at zero": (lambda y, t: (square(y, t)*(torch.arange(len(y)) > 0)).sqrt(), {"ok": False, "finite": "non-finite", "word": "first in sample 0"}),
    "all nan": (lambda y, t: square(y, t)*torch.nan, {"ok": False, "finite": "non-finite", "fatal": True}),
    "in place": (InPlace(), {"ok": False, "leaves y alone": "y in place", "fatal": True}),
    "target in place": (lambda y, t: (y - t.mul_(2)).square().sum(1), {"ok": False, "leaves y alone": "args in place", "word": "args[0]"}),
    "float64 out": (lambda y, t: square(y.double(), t.double()), {"ok": True, "second": "right"}),
    "float32 only": (lambda y, t: square(y @ float_matrix, t), {"ok": True, "float64": "no", "first": "right", "second": "right"}),
    "float32 inside": (lambda y, t: square(y.float(), t.float()), {"ok": True, "float64": "no", "second": "right"}),
    "float32 only, wrong": (lambda y, t: square(Function.apply(y, "second") @ float_matrix, t), {"ok": False, "float64": "no", "second": "wrong"}),
    "float32 module": (Weighted(), {"ok": True, "float64": "ok", "second": "right"}),
    "overflow in float32": (lambda y, t: 1e-30*(1e20*y - 1e20*t).square().sum(1), {"float32": "non-finite value", "ok": False}),
    "cancels in float32": (lambda y, t: (1e6 + 1e-2*(y - t)).square().sum(1) - 3e12 - 2e4*(y - t).sum(1), {"ok": True, "first": "unknown", "word": "gradient within"}),
    "reduced": (lambda y, t: square(y, t).mean(), {"ok": False, "fatal": True, "word": "per_sample(loss_fn, 'mean')"}),
    "summed": (lambda y, t: square(y, t).sum(), {"fatal": True, "word": "per_sample(loss_fn"}),
    "entangled": (lambda y, t: square(y, t).sum().square(), {"fatal": True, "word": "one number for the batch"}),
    "not reduced": (lambda y, t: (y - t).square(), {"fatal": True, "one value per sample": "shape"}),
    "tuple": (lambda y, t: (y, y[:, :, None]*y[:, None]), {"fatal": True, "word": "permutation_loss"}),
    "float": (lambda y, t: 3., {"fatal": True, "one value per sample": "no tensor"}),
    "integer": (lambda y, t: (y > t).sum(1), {"fatal": True, "one value per sample": "integer"}),
    "raises": (lambda y, t: 1/0, {"fatal": True, "word": "ZeroDivisionError: division by zero"}),
    "saddle": (lambda y, t: (y*y*torch.tensor([1., -1., 0.])).sum(1) + t.sum(1), {"ok": True}),
    "exchangeable": (lambda y, t: F.cross_entropy(y, t.argmax(1), reduction="none"), {"ok": True}),
    "heavy tail": (lambda y, t: square(y, t)*torch.tensor([1e3] + [1.]*(len(y) - 1)), {"ok": True, "gradient size": None, "word": "a few samples rule"}),
}
SHORT = {"first": "first derivative", "second": "second derivative"}

@pytest.mark.parametrize("name", CASES)
def test_verdicts(name):
    loss_fn, expected = CASES[name]
    y, t = batch()
    y0, t0, state = y.clone(), t.clone(), torch.get_rng_state()
    numpys, pythons = np.random.get_state()[1].copy(), random.getstate()
    report = check_loss(loss_fn, y, t)
    text = str(report)
    assert torch.equal(y, y0) and torch.equal(t, t0) and torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpys).all() and random.getstate() == pythons
    assert set(report.findings) == set(QUESTIONS) and all(f.verdict in ("ok", "note", "problem", "fatal", "unknown") for f in report.findings.values())
    for key, want in expected.items():
        if key == "ok": assert report.ok == want, text
        elif key == "fatal": assert bool(report.fatal) == want, text
        elif key == "word": assert want in " ".join(text.split()), text
        elif want is not None: assert report[SHORT.get(key, key)].value == want, text
    if report.fatal:
        with pytest.raises(ValueError, match="loss_fn"): report.loss()
    elif name not in ("entropy", "overflow in float32"):
        z = y.clone().requires_grad_()
        report.loss()(z, t.clone()).backward()
        assert z.grad.isfinite().all() and report.why
    if name != "entropy": assert str(check_loss(loss_fn, y, t)) == text

def test_the_line_can_be_pasted():
    y, t = batch()
    report = check_loss(square, y, t)
    assert report.line in str(report)
    assert repr(eval(report.line, vars(newton_losses_nb) | {"square": square})) == repr(report.loss(chunk_size=3)).replace(", chunk_size=3", "")
    for loss_fn in (CASES["saddle"][0], SortingLoss()):                          # those without a name are loss_fn
        report = check_loss(loss_fn, y, true_permutation(t) if isinstance(loss_fn, SortingLoss) else t)
        pasted, made = eval(report.line, dict(vars(newton_losses_nb), loss_fn=loss_fn)), report.loss()
        assert repr(pasted.direction) == repr(made.direction)

class Turning(torch.autograd.Function):
    "A backward pass that is not linear, as that of blackbox differentiation"
    forward = staticmethod(lambda ctx, y: y.round())
    backward = staticmethod(lambda ctx, g: g.sign())

def test_a_backward_pass_that_is_not_linear():
    y, t = batch()
    report = check_loss(lambda y, t: ((Turning.apply(y) - t).square()).sum(1), 3*y, t)
    assert report["independent samples"].value == "nonlinear" and "check=False" in report.line
    assert not report.loss().check

@pytest.mark.parametrize("bad,error,words", [
    (lambda y, t: check_loss(None, y, t), TypeError, "loss_fn: expected a function"),
    (lambda y, t: check_loss(square, y.long(), t), TypeError, "floating-point"),
    (lambda y, t: check_loss(square, y.tolist(), t), TypeError, "floating-point"),
    (lambda y, t: check_loss(square, y[:0], t[:0]), ValueError, "at least|expected shape"),
    (lambda y, t: check_loss(square, y[0], t[0]), ValueError, "expected shape"),
    (lambda y, t: check_loss(square, y*torch.nan, t), ValueError, "finite")])
def test_wrong_use(bad, error, words):
    with pytest.raises(error, match=words): bad(*batch())

def test_one_sample():
    y, t = batch(1)
    for loss in (square, Norm().eval(), lambda y, t: (y - y.mean(0)/2 - t).square().sum(1)):
        assert check_loss(loss, y, t)["independent samples"].value == "unknown"
    assert check_loss(square, y, t).ok
    assert "per_sample" in check_loss(lambda y, t: square(y, t).mean(), y, t).fatal

@pytest.mark.parametrize("n", [1, 2, 9])
def test_one_output(n):
    y, t = batch(n, 1)
    report = check_loss(square, y, t)
    assert report.ok and report["second derivative"].value == "right", report

def test_many_outputs():
    "Three thousand outputs: no Hessian is formed, and the verdicts stand"
    y, t = batch(4, 3000)
    w = torch.linspace(-1, 1, 3000).double()
    def saddle(y, t): return (w.to(y)*(y - t).square()).sum(1)
    report = check_loss(saddle, y, t)
    assert report.ok and report["second derivative"].value == "right", report
    assert check_loss(lambda y, t: (Function.apply(y, "second") - t).square().sum(1), y, t)["second derivative"].value == "wrong"

def test_wrong_own_derivatives():
    class Own:
        def __init__(self, g, h): self.g, self.h = g, h
        def __call__(self, y, t): return square(y, t)
        def derivatives(self, y, t, hessian=True):
            return square(y, t), self.g*(y - t), self.h*torch.eye(y.shape[1]).to(y).expand(len(y), -1, -1) if hessian else None
    assert check_loss(Own(2., 2.), *batch()).ok
    gradient, hessian = check_loss(Own(1., 1.), *batch()), check_loss(Own(2., 1.), *batch())
    assert gradient["first derivative"].value == "wrong" and gradient["second derivative"].value == "right"
    assert hessian["first derivative"].value == "right" and hessian["second derivative"].value == "wrong"

@pytest.mark.parametrize("make", [lambda g: SmoothedLoss(lambda y, t: (y > t).to(y).sum(1), Noise(generator=g)), lambda g: FenchelYoungLoss(lambda c: F.one_hot(c.argmin(1), 3).to(c), Noise(generator=g))])
@pytest.mark.parametrize("own", [None, 3])
def test_noisy_losses(make, own):
    "Whatever generator they draw from, it is held still and put back"
    g = None if own is None else torch.Generator().manual_seed(own)
    y, t = batch()
    before = g.get_state() if g else None
    report = check_loss(make(g), y, F.one_hot(t.argmin(1), 3).to(y))
    assert report.ok and report["repeatable"].value == "noise" and report["second derivative"].value == "estimate", report
    assert g is None or torch.equal(g.get_state(), before)

@given(n=st.integers(1, 9), m=st.integers(1, 7), seed=st.integers(0, 2**20), scale=st.sampled_from([1e-6, 1e-2, 1., 1e3]), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
       kind=st.sampled_from(["quadratic", "logistic", "cross_entropy", "cubic"]))
@fast
def test_honest_losses_pass(n, m, seed, scale, dtype, kind):
    y, t = batch(n, m, seed, dtype)
    loss = {"quadratic": lambda y, t: (y/scale - t).square().sum(1), "logistic": lambda y, t: F.softplus(y/scale*t).sum(1),
            "cross_entropy": lambda y, t: F.cross_entropy(y/scale, t.argmax(1), reduction="none"), "cubic": lambda y, t: ((y/scale)**3 + t*y/scale).sum(1)}[kind]
    report = check_loss(loss, y*scale, t)
    if m == 1 and kind == "cross_entropy": return
    assert not report.fatal and report["first derivative"].value == "right" and report["second derivative"].value == "right", report
    assert report["independent samples"].value == ("unknown" if n == 1 else "ok")

@given(n=st.integers(2, 9), m=st.integers(1, 6), seed=st.integers(0, 2**20), weight=st.floats(1e-3, 1e3))
@fast
def test_leaks_are_found(n, m, seed, weight):
    y, t = batch(n, m, seed)
    report = check_loss(lambda y, t: square(y, t) + weight*(y.roll(1, 0)*t).sum(1), y, t)
    assert report["independent samples"].value == "leak" and not report.ok

@given(n=st.integers(1, 6), m=st.integers(1, 5), seed=st.integers(0, 2**20), reduction=st.sampled_from(["mean", "sum"]), loop=st.booleans())
@fast
def test_per_sample(n, m, seed, reduction, loop):
    y, t = batch(n, m, seed, torch.float64)
    scale = torch.tensor(2., dtype=torch.float64)
    def loss(y, t, scale):
        if loop and float(y.detach().sum()) > 1e9: return y.sum()
        return getattr((y*t*scale).sin().sum(1) + y.square().sum(1)*t[:, 0], reduction)()
    ours = per_sample(loss, reduction)
    slow = lambda y, t, scale: torch.stack([loss(y[i:i+1], t[i:i+1], scale) for i in range(len(y))])
    assert_same(ours, slow, y, t, scale)
    assert ours.loop == loop

def test_per_sample_of_modules():
    y, t = batch(6, 4, dtype=torch.float64)
    k, p = t.argmax(1), t.softmax(1)
    none = dict(reduction="none")
    for reduced, full, target in ((nn.CrossEntropyLoss(), lambda y: F.cross_entropy(y, k, **none), k), (nn.KLDivLoss(reduction="batchmean"), lambda y: F.kl_div(y, p, **none).sum(1), p),
                                  (nn.SmoothL1Loss(), lambda y: F.smooth_l1_loss(y, t, **none).mean(1), t), (nn.MultiMarginLoss(), lambda y: F.multi_margin_loss(y, k, **none), k)):
        ours = per_sample(reduced)
        assert_same(ours, lambda y, _: full(y), y, target, second=None if isinstance(reduced, nn.MultiMarginLoss) else "full")
        assert check_loss(ours, y, target).ok
    with pytest.raises(ValueError, match="ignored class"):
        per_sample(nn.CrossEntropyLoss(weight=torch.tensor([1., 2., 3., 4.], dtype=torch.float64)))(y, k)
    assert_close(per_sample(nn.CrossEntropyLoss(weight=torch.ones(4).double()*3))(y, k), F.cross_entropy(y, k, **none))
    with pytest.raises(ValueError, match="at least one sample"): per_sample(nn.MSELoss())(y[:0], t[:0])

RELAXED = {"neural_sort": lambda s: neural_sort(s, 0.3), "soft_sort": lambda s: soft_sort(s, 0.3),
           "network": lambda s: sorting_network(s, "bitonic", "cauchy", 3.)}

@given(name=st.sampled_from(list(RELAXED)), n=st.integers(1, 8), seed=st.integers(0, 2**20), columns=st.booleans(), descending=st.booleans(), pack=st.booleans())
@fast
def test_conventions(name, n, seed, columns, descending, pack):
    y, labels = batch(5, n, seed, torch.float64)
    def relax(s):
        P = RELAXED[name](s)
        P = P.flip(-2) if descending else P
        P = P.mT if columns else P
        return (s, P) if pack else P
    want = ranking_loss(RELAXED[name](y), true_permutation(labels, torch.float64))
    assert_close(permutation_loss(relax)(y, labels), want)
    assert_close(permutation_loss(relax, positions="columns" if columns else "rows", descending=descending)(y, true_permutation(labels)), want)

def test_packages():
    diffsort = pytest.importorskip("diffsort")
    warnings.simplefilter("ignore")
    y, labels = batch(6, 5)
    P = true_permutation(labels)
    for net in ("odd_even", "bitonic"):
        for name, ours in {"logistic": "logistic", "logistic_phi": "logistic_art", "cauchy": "cauchy", "reciprocal": "reciprocal", "optimal": "optimal"}.items():
            loss = permutation_loss(diffsort.DiffSortNet(net, 5, steepness=2., distribution=name))
            want = SortingLoss(ours, steepness=2., network=net)
            assert_same(loss, lambda y, _: want(y, P), y, labels, second=None, rtol=1e-2, atol=1e-4)
    assert check_loss(loss, y, labels)["second derivative"].value == "right"

def test_torchsort():
    torchsort = pytest.importorskip("torchsort")
    y, t = batch(8, 5)
    ranks = t.argsort(1).argsort(1) + 1.
    report = check_loss(lambda y, r: (torchsort.soft_rank(y, regularization="kl") - r).square().mean(1), y, ranks)
    assert report["second derivative"].value == "wrong" and report["first derivative"].value == "right"

def test_called_without_gradients():
    "Under no_grad, and under autocast, the report is the same"
    y, t = batch()
    text = str(check_loss(square, y, t))
    with torch.no_grad(): assert str(check_loss(square, y, t)) == text
    with torch.autocast("cpu", dtype=torch.bfloat16): assert str(check_loss(square, y.requires_grad_(), t)) == text

@pytest.mark.parametrize("name,loss", [("sort", SortingLoss()), ("soft_sort", SortingLoss("soft_sort")), ("network", SortingLoss("cauchy")),
                                       ("l1", lambda y, T: (y - T.sum(1)).abs().sum(1)), ("cross_entropy", lambda y, T: F.cross_entropy(y, T[:, 0].argmax(1), reduction="none"))])
@pytest.mark.parametrize("place", ["integers", "zeros", "large", "tiny", "equal rows"])
def test_ties_and_scales(name, loss, place):
    "Kinks and saturation are no mistakes"
    y, t = batch(8, 4)
    y = {"integers": y.round(), "zeros": 0*y, "large": 1e3*y, "tiny": 1e-6*y, "equal rows": y[:1].expand(8, 4)}[place]
    report = check_loss(loss, y, true_permutation(t))
    problems = [q for q, f in report.findings.items() if f.verdict == "problem"]
    assert not problems or problems == ["gradient size"] and place == "zeros", report

def test_inference_mode():
    y, t = batch()
    with torch.inference_mode(): inside = str(check_loss(square, y.clone(), t))
    assert inside == str(check_loss(square, y, t))

def test_size():
    "A large batch, and many outputs, in seconds"
    for n, m in ((10_000, 10), (64, 3000)):
        assert check_loss(square, *batch(n, m)).ok

# ---------------------------------------------------------------- what newcomers met

def test_learned_samples_are_no_explosion():
    "A loss that saturates: most gradients are tiny, so the others are long beside them"
    torch.manual_seed(0)
    y, c = 16*torch.randn(64, 5), torch.rand(64, 5)
    report = check_loss(lambda y, c: (y.softmax(1)*c).sum(1) - c.amin(1), y, c)
    assert report.make is OutputLoss and "explodes" not in repr(report)

@pytest.mark.parametrize("unit", [1e-4, 1e2, 1e6])
def test_advice_has_no_unit(unit):
    torch.manual_seed(1)
    turn, sizes = torch.linalg.qr(torch.randn(4, 4))[0], torch.logspace(1, -1, 4)
    t, y = (torch.randn(200, 4)*sizes) @ turn.T, .1*torch.randn(200, 4)
    def units(y, t): return (((y - t) @ turn.to(y))/sizes.to(y)).square().sum(1)/2
    a, b = check_loss(units, y, t), check_loss(lambda y, t: units(y/unit, t), unit*y, t)
    assert a.line[:-1].endswith("direction=Whiten()") and "curvature='hessian'" in repr(a) and repr(a).split("4.")[1].replace("units", "loss_fn") == repr(b).split("4.")[1]
    assert a["Newton direction"].value == pytest.approx(b["Newton direction"].value, rel=1e-4)

def test_kinks_are_told_no_hessian():
    torch.manual_seed(0)
    y, t, q = .1*torch.randn(64, 5), torch.randn(64, 1), torch.tensor([.05, .25, .5, .75, .95])
    report = check_loss(lambda y, t: torch.maximum(q.to(y)*(t - y), (q.to(y) - 1)*(t - y)).sum(1), y, t)
    assert report["Newton direction"].value[0] < .99 and report.line == "OutputLoss(loss_fn, direction=Whiten())" and "hessian" not in repr(report)

def apart(y, t, sizes, f=torch.square): return f((y - t)/sizes[:y.shape[1]].to(y)).sum(1)

@pytest.mark.parametrize("outputs", [4, 40])
def test_whitening_is_told_where_steps_turn(outputs):
    "Outputs in different units; beside it a Hessian, but not of more than 32 outputs"
    torch.manual_seed(0)
    sizes = torch.logspace(1, -1, outputs)
    y, t = sizes*torch.randn(2, 50*outputs, outputs)
    report = check_loss(lambda y, t: apart(y, t, sizes), y, t)
    assert report.line == "OutputLoss(loss_fn, direction=Whiten())" and report["Newton direction"].value[0] < .99
    assert ("And, bolder:            NewtonLoss(loss_fn, curvature='hessian')" in repr(report)) == (outputs == 4)
    y = y.requires_grad_()
    report.loss()(y, t).backward()
    assert y.grad.isfinite().all()

def test_no_newton_by_a_hessian_that_is_wrong():
    "Autograd sees half of the curvature: the same loss is told to whiten at most"
    torch.manual_seed(0)
    sizes = torch.logspace(1, -1, 4)
    y, t = sizes*torch.randn(2, 200, 4)
    half = lambda x: x.square()/2 + x*x.detach() - x.detach()*x.detach()/2
    report = check_loss(lambda y, t: apart(y, t, sizes, half), y, t)
    assert report["second derivative"].value != "right" and "hessian" not in repr(report)

def test_squares_that_underflow():
    "A report, no error, where squares of gradients are zero"
    y, t = batch(20)
    report = check_loss(lambda y, t: 1e-200*square(y, t), y, t)
    assert not report.ok and report.line == "NormalizedLoss(loss_fn)"
    turn = [check_loss(lambda y, t: s*square(y, t), y, t)["Newton direction"].value[:2] for s in (1., 1e-170)]
    assert turn[0] == pytest.approx(turn[1], rel=1e-6)

def test_one_output_is_a_rescaling():
    y, t = torch.randn(2, 40, 1)
    assert "rescaling" in check_loss(lambda y, t: (y - t).square().sum(1), y, t).why

@pytest.mark.parametrize("relaxation", ["neural_sort", "soft_sort"])
@pytest.mark.parametrize("loss, found", [("bce_clamped", "note"), ("bce", "ok")])
def test_a_loss_that_fails_further_out(relaxation, loss, found):
    "The hard setting, at an untrained network's outputs: its float32 gradient is right there, and wrong where they have grown"
    torch.manual_seed(0)
    y, P = .1 + .005*torch.randn(100, 10), true_permutation(torch.randn(100, 10))
    report = check_loss(SortingLoss(relaxation, loss, tau=.1), y, P)
    assert report["float32"].verdict == "ok" and report["float32, further out"].verdict == found
    assert ("times as far apart the gradient is" in repr(report)) == (found == "note") and report.make is OutputLoss

def test_far_outputs_that_overflow_are_no_fault():
    y, t = batch(20)
    assert check_loss(lambda y, t: ((100*y).exp()/100 - t*y).sum(1), y/100, t)["float32, further out"].verdict == "ok"

def test_modules_are_as_before():
    "Buffers that are replaced, or made when first used, and counters"
    class Running(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.register_buffer("scale", torch.ones(3)); self.register_buffer("later", None)
        def forward(self, y, t):
            self.calls, self.scale, self.later = self.calls + 1, .9*self.scale + .1*y.detach().abs().mean(0), y.detach()
            self.new = 1
            return ((y - t)**2/self.scale).sum(1)
    f, (y, t) = Running(), batch(20)
    scale = f.scale
    check_loss(f, y, t)
    assert f.scale is scale and torch.equal(scale, torch.ones(3)) and f.scale.dtype == torch.float32 and f.calls == 0 and f.later is None and not hasattr(f, "new")

def test_noise_that_cannot_be_fixed_is_not_judged():
    ticks = iter(range(10**6))
    y, t = batch(20)
    report = check_loss(lambda y, t: square(y, t)*(1 + next(ticks) % 7), y, t)
    assert report["repeatable"].value == "random" and report["independent samples"].value == report["first derivative"].value == "unknown"
    assert "average outside" not in report.why and "check=False" not in report.line

def test_outside_of_its_domain_a_loss_may_raise():
    y, t = torch.rand(32, 5)*.9 + .05, (torch.rand(32, 5) < .5).float()
    assert check_loss(lambda y, t: F.binary_cross_entropy(y, t, reduction="none").sum(-1), y, t).ok

def test_targets_of_all_samples():
    "Outputs (N, 1) and targets (N,) make a square of all pairs, with one loss per sample that is made of all targets"
    def square(y, t): return (y - t).square().sum(1)
    y, t = torch.randn(64, 1), torch.randn(64)
    report = check_loss(square, y, t)
    assert report["independent samples"].value == "mixed" and report.make is OutputLoss and not report.options and "own arguments" in report.why
    assert check_loss(square, y, t[:, None]).ok
    w = torch.rand(5)                                         # of all samples, and as many as there are samples
    for n in 4, 5, 6: assert check_loss(lambda y, w: (w*y.square()).sum(1), torch.randn(n, 5), w)["independent samples"].value == "ok"

def test_the_cosine_that_is_printed_tells_what_is_advised():
    "No rounding across the bound"
    for e in torch.linspace(.05, .6, 25).tolist():
        G = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)).double()*torch.tensor([1., 1., 1 + e]).double()
        report = check_loss(lambda y, g: (y*g).sum(1), torch.zeros(400, 3).double(), G)
        said = float(report["Newton direction"].words.split()[1])
        assert (said < .99) == (report["Newton direction"].value[0] < .99), (e, report)

def test_a_convention_is_found_under_vmap():
    loss = permutation_loss(neural_sort)
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert_close(torch.func.vmap(loss)(s, t), torch.stack([permutation_loss(neural_sort)(*o) for o in zip(s, t)]))
    assert torch.func.vmap(loss)(s, t).shape == (2, 3)

def test_a_nan_is_no_other_reduction():
    y = torch.randn(2, 3)
    y[0, 0] = torch.nan
    assert per_sample(nn.MSELoss())(y, torch.zeros(2, 3)).isnan().tolist() == [True, False]

def test_small_losses_are_judged_alike():
    "Statistics of the batch, whatever the size of the loss"
    y, t = batch(20)
    for size in (1e-7, 1., 1e7):
        with pytest.raises(ValueError, match="statistics of the batch"): per_sample(lambda y, t: size*(y - y.mean(0) - t).square().sum(1).mean())(y, t)

def test_what_is_not_finite():
    y, t = batch(24)
    words = check_loss(lambda y, t: torch.where((y[:, 0] == y[3, 0]), torch.nan*square(y, t), square(y, t)), y, t)["finite"].words
    assert words.startswith("the value is NaN or infinite in 1 of 24 samples, first in sample 3")

def test_a_scripted_module():
    class Scripted(torch.nn.Module):
        def forward(self, y, t): return (y - t).square().sum(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Scripted())
    assert check_loss(scripted, *batch(20)).ok

@pytest.mark.parametrize("f", [lambda y, t: (y.float() - t.float()).square().sum(1), lambda y, t: F.huber_loss(y.float(), t.float(), reduction="none").sum(1)])
def test_float32_inside_of_float64(f):
    "A right gradient of few digits is not called wrong"
    y, t = (x.double() for x in batch(64))
    report = check_loss(f, y, t)
    assert report.ok and report["float64"].words.endswith("judged coarsely in float32")

def test_a_loss_that_is_finite_nowhere_out():
    "Where float64 is not finite either, float64 is no advice"
    def bce(y, t): q = y.sigmoid(); return -(t*q.log() + (1 - t)*(1 - q).log()).sum(1)
    torch.manual_seed(0)
    y = 30*torch.randn(64, 4)
    report = check_loss(bce, y, (torch.randn(64, 4) > 0).float())
    assert "computed stably" in report.why and "in float64" not in report.why and report.line.endswith("on_nonfinite='skip')")
