"""The settings of noise, what is said of a first mistake, `torch.func.vmap`, and annotations under jaxtyping's import hook."""
import dataclasses
import subprocess
import sys

import numpy
import pytest
import torch
from torch.testing import assert_close

from newton_losses_nb.paths.exact import shortest_path
from newton_losses_nb.paths.fenchel_young import FenchelYoungLoss, Noise, draw_noise
from newton_losses_nb.paths.smoothing import BlackboxLoss, SmoothedAlgorithmLoss, SmoothedLoss, blackbox, smoothed_algorithm

def solver(c): return shortest_path(c.clamp(min=1e-3).unflatten(-1, (3, 3))).flatten(-2)
def different(c, w): return (solver(c) - w).abs().sum(-1)
def square(a, w): return (a - w).square().sum(-1)

LOSSES = {
    "smoothed_algorithm": lambda noise: lambda y, w: square(smoothed_algorithm(solver, y, noise), w),
    "SmoothedLoss": lambda noise: SmoothedLoss(different, noise),
    "SmoothedAlgorithmLoss": lambda noise: SmoothedAlgorithmLoss(solver, square, noise),
    "FenchelYoungLoss": lambda noise: FenchelYoungLoss(solver, noise, floor=1e-3),
}

@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    y, w = torch.rand(4, 5, 9, generator=g) + 0.5, solver(torch.rand(4, 5, 9, generator=g))
    return y, w, torch.randn(6, 9, generator=g)

@pytest.mark.parametrize("more", [{}, {"antithetic": True}, {"baseline": "value"}, {"baseline": "none"}, {"distribution": "gumbel"}], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_vmap(name, more, data):
    "Value and gradient of a stack of batches are those of each batch"
    y, w, e = data
    f = LOSSES[name](Noise(0.5, fixed=torch.cat([e, -e]) if "antithetic" in more else e, **more))
    assert_close(torch.func.vmap(f)(y, w), torch.stack([f(*o) for o in zip(y, w)]))
    grad = torch.func.grad(lambda y, w: f(y, w).sum())
    slow = []
    for a, b in zip(y, w):
        a = a.clone().requires_grad_()
        slow += torch.autograd.grad(f(a, b).sum(), a)
    assert_close(torch.func.vmap(grad)(y, w), torch.stack(slow))

@pytest.mark.parametrize("name", LOSSES)
def test_vmap_randomness(name, data):
    "Noise that is drawn within vmap needs its `randomness`, and takes a generator"
    y, w, _ = data
    f = LOSSES[name](Noise(0.5, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(RuntimeError, match="randomness"): torch.func.vmap(f)(y, w)
    same = torch.func.vmap(f, randomness="same")(y[:1].expand(2, 5, 9), w[:1].expand(2, 5, 9))
    assert torch.equal(same[0], same[1])
    assert torch.func.vmap(f, randomness="different")(y, w).isfinite().all()

def test_vmap_of_what_leaves_torch(data):
    y, w, e = data
    leaves = lambda c: torch.from_numpy(c.numpy())
    with pytest.raises(RuntimeError, match="algorithm: expected operations that a transform of torch.func can follow; call the loss on all rows at once"):
        torch.func.vmap(lambda y: smoothed_algorithm(leaves, y, Noise(fixed=e)))(y)

@pytest.mark.parametrize("sigma", [0.25, numpy.float32(0.25), numpy.float64(0.25), torch.tensor(0.25), numpy.int64(2), 2])
def test_numbers(sigma, data):
    y, _, _ = data
    assert type(Noise(sigma).sigma) is float and Noise(sigma).sigma == float(sigma)
    assert BlackboxLoss(solver, square, sigma).lam == float(sigma)
    assert torch.equal(blackbox(solver, y, sigma), solver(y))
    assert Noise(samples=numpy.int64(4)).samples == 4

@pytest.mark.parametrize("bad", [True, False, numpy.bool_(True), torch.tensor(True), 0., -1, float("nan"), float("inf"), "1", None, torch.ones(1)], ids=repr)
def test_no_numbers(bad, data):
    with pytest.raises(ValueError, match="sigma: expected a positive number, got"): Noise(bad)
    with pytest.raises(ValueError, match="lam: expected a positive number, got"): blackbox(solver, data[0], bad)
    with pytest.raises(ValueError, match="lam: expected a positive number, got"): BlackboxLoss(solver, square, bad)
    with pytest.raises(ValueError, match="samples: expected a whole number"): Noise(samples=True)

def test_noise():
    noise = Noise(numpy.float32(0.5), 4, generator=torch.Generator().manual_seed(7), antithetic=True)
    assert repr(noise) == "Noise(sigma=0.5, samples=4, antithetic=True, generator=torch.Generator('cpu').manual_seed(7))"
    again = eval(repr(noise))
    assert torch.equal(draw_noise(torch.zeros(3, 2), noise), draw_noise(torch.zeros(3, 2), again))
    fixed = dataclasses.replace(noise, fixed=draw_noise(torch.zeros(3, 2), noise))
    assert fixed.samples == 4 and torch.equal(draw_noise(torch.zeros(3, 2), fixed), fixed.fixed)
    with pytest.raises(dataclasses.FrozenInstanceError): noise.sigma = 1.
    with pytest.raises(ValueError, match="samples: expected 3, as many as fixed has"): Noise(samples=4, fixed=torch.zeros(3, 2))
    with pytest.raises(TypeError, match="noise: expected Noise"): FenchelYoungLoss(solver, 10)
    with pytest.raises(TypeError, match="noise: expected Noise"): smoothed_algorithm(different, torch.zeros(1, 9), 10)
    assert repr(SmoothedLoss(different, Noise(0.5))) == "SmoothedLoss(loss_of_algorithm=different, noise=Noise(sigma=0.5))"

@pytest.mark.parametrize("name", LOSSES)
def test_nan_gives_nan(name):
    "What an algorithm returns is not judged: NaN for one row is NaN for that row's loss"
    bad = lambda c, *w: torch.where(c[:, :1] > 5, torch.nan, c) if not w else torch.where(c[:, 0] > 5, torch.nan, c.sum(1))
    y, w = torch.zeros(3, 4), torch.zeros(3, 4)
    y[1] = 100
    noise = Noise(0.1, 4)
    f = {"smoothed_algorithm": lambda: lambda y, w: square(smoothed_algorithm(bad, y, noise), w),
         "SmoothedLoss": lambda: SmoothedLoss(bad, noise), "FenchelYoungLoss": lambda: FenchelYoungLoss(bad, noise),
         "SmoothedAlgorithmLoss": lambda: SmoothedAlgorithmLoss(bad, square, noise)}[name]()
    assert f(y, w).isnan().tolist() == [False, True, False]
    for k in (0, 1, 2) if hasattr(f, "derivatives") else ():
        assert f.derivatives(y, w)[k].flatten(1).isnan().any(1).tolist() == [False, True, False] if k else True

def test_first_mistakes(data):
    y, w = data[0][0], data[1][0]
    with pytest.raises(TypeError, match=r"got numpy.ndarray: return torch.as_tensor\(...\)"): smoothed_algorithm(lambda c: c.numpy(), y)
    with pytest.raises(TypeError, match="solver: expected a torch tensor, got numpy.ndarray"): FenchelYoungLoss(lambda c: c.numpy())(y, w)
    with pytest.raises(TypeError, match="solver: expected a torch tensor, got numpy.ndarray"): blackbox(lambda c: c.numpy(), y)
    with pytest.raises(ValueError, match=r"called once, with all N·S = 50 rows, shape \(50, 9\)"): smoothed_algorithm(lambda c: c.sum(), y)
    with pytest.raises(ValueError, match="solver: expected solutions in the shape of the costs"): FenchelYoungLoss(lambda c: c.sum(1))(y, w)
    with pytest.raises(IndexError) as e: smoothed_algorithm(lambda c: c[0, 0, 0], y)
    if sys.version_info >= (3, 11): assert "called once, with all N·S = 50 rows" in e.value.__notes__[0]
    with pytest.raises(ValueError, match="raise them first: floor=1e-3"):
        FenchelYoungLoss(lambda c: shortest_path(c.unflatten(-1, (3, 3))).flatten(-2), Noise(5.))(y, w)
    with pytest.raises(ValueError, match="blackbox differentiation has no second derivative"): BlackboxLoss(solver, square).derivatives(y, w)
    with torch.no_grad(): loss, G, _ = BlackboxLoss(solver, square).derivatives(y, w, hessian=False)
    assert loss.shape == y.shape[:1] and G.shape == y.shape
    with pytest.raises(ValueError, match="expected values that depend on y"): BlackboxLoss(solver, lambda a, w: w.sum(1)).derivatives(y, w, hessian=False)

HOOKED = '''
import jaxtyping
names = ["newton_losses_nb.paths." + n for n in ("exact", "relaxed", "fenchel_young", "smoothing", "terrain")]
with jaxtyping.install_import_hook(names, "beartype.beartype"):
    from newton_losses_nb.paths import relaxed as r, exact as s, fenchel_young as b, smoothing as m, terrain as t
import pytest, torch
from torch import func
cost = torch.rand(6, 5, 4) + 0.1
cost[:2] = cost[:2].round() + 1e-3*(cost[:2] > 9)
for dtype in (torch.float16, torch.float32, torch.float64):
    for c in (cost, cost[0], cost.reshape(2, 3, 5, 4), cost[:0]):
        c = c.to(dtype)
        for n in (None, 30):
            p = s.shortest_path(c, n).nan_to_num()
        p = s.shortest_path(c)
        for q in (p, p.bool(), p.long()):
            s.path_cost(c, q), s.exact_path_match(q, p), s.is_valid_path(q), s.regret(c, q), s.cost_optimality(c, q)
        for loop in ("for", "while"):
            out = r.relaxed_bellman_ford(c.clone().requires_grad_(), 3., loop=loop)
            out.sum().backward()
        if c.ndim > 2: [r.path_loss(out, q) for q in (p, p.bool())]
s.shortest_path(torch.zeros(2, 4, 4)), s.shortest_path(torch.tensor([[1., torch.inf], [1., 1.]]))
func.vmap(s.shortest_path)(cost), func.vmap(func.grad(lambda c: r.relaxed_bellman_ford(c, 3.).sum()))(cost)
flat = lambda c: s.shortest_path(c.clamp(min=1e-3).unflatten(-1, (5, 4))).flatten(-2)
hard, soft = lambda c, w: (flat(c) - w).abs().sum(1), lambda a, w: (a - w).square().sum(1)
y, w = cost.flatten(1).clone().requires_grad_(), flat(cost.flip(0).flatten(1))
for noise in (b.Noise(), b.Noise(0.5, 4, antithetic=True), b.Noise(0.5, 3, "gumbel", "value"),
              b.Noise(fixed=torch.randn(3, 20)), b.Noise(fixed=torch.randn(6, 3, 20))):
    b.draw_noise(y, noise)
    for f in (m.SmoothedLoss(hard, noise), m.SmoothedAlgorithmLoss(flat, soft, noise), b.FenchelYoungLoss(flat, noise, floor=1e-3)):
        for hessian in (True, False): f.derivatives(y, w, hessian=hessian)
        torch.autograd.grad(torch.autograd.grad(f(y, w).sum(), y, create_graph=True)[0].sum(), y)
    m.smoothed_algorithm(flat, y, noise), b.FenchelYoungLoss(flat, noise)(y, w.bool())
m.blackbox(flat, y, 2.).sum().backward()
f = m.BlackboxLoss(flat, soft, 2., None)
f(y, w), f.derivatives(y, w, hessian=False)
maps = t.terrain_maps(3, 4)
maps[:2], maps.to("cpu"), t.load_maps(train=2, valid=2, test=2, size=4)
with pytest.raises(Exception, match="ype"): s.shortest_path("no")
'''

def test_annotations_hold():
    pytest.importorskip("beartype")
    run = subprocess.run([sys.executable, "-c", HOOKED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]

@pytest.mark.parametrize("noise", [dict(), dict(baseline="value")])
@pytest.mark.parametrize("floor", [None, -9.])
def test_a_solver_may_work_in_place(noise, floor):
    "Its argument is a copy: the loss, its derivatives and the outputs are those of a solver that does not"
    one_hot = lambda i: torch.nn.functional.one_hot(i, 3).float()
    y, w = torch.tensor([[.3, .2, .9]]), torch.tensor([[0., 1., 0.]])
    def found(solver): return FenchelYoungLoss(solver, Noise(.5, 40, generator=torch.Generator().manual_seed(0), **noise), floor=floor).derivatives(y, w)
    for a, b in zip(found(lambda c: one_hot((-c).argmax(-1))), found(lambda c: one_hot(c.neg_().argmax(-1)))): assert_close(a, b)
    x = y.clone().requires_grad_()
    BlackboxLoss(lambda c: one_hot(c.neg_().argmax(-1)), lambda w, t: (w - t).abs().sum(-1), floor=floor)(x, w).sum().backward()
    for seen in (y, x.detach()): assert_close(seen, torch.tensor([[.3, .2, .9]]))

@pytest.mark.parametrize("given, error", [(dict(generator=3), "generator: expected a Generator, got 3"), (dict(antithetic="no"), "antithetic: expected a bool, got 'no'")])
def test_noise_of_a_wrong_kind(given, error):
    with pytest.raises(TypeError, match=error): Noise(**given)

@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_blackbox_of_a_solver_with_whole_numbers(dtype):
    "Has the gradient of the same solver with floating-point numbers"
    pick = lambda c: (c == c.amin(-1, keepdim=True))
    found = []
    for kind in dtype, torch.float:
        y = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = BlackboxLoss(lambda c: pick(c).to(kind), square, lam=2.)
        value = loss(y, torch.eye(4)[:3])
        value.sum().backward()
        found.append((value.detach(), y.grad))
        assert_close(loss.derivatives(y.detach(), torch.eye(4)[:3], hessian=False)[1], y.grad)
    assert_close(*found)
    assert found[0][1].any()


HALF = torch.float32, torch.bfloat16, torch.float16

def nearest(c): return torch.nn.functional.one_hot(c.argmin(-1), 2).to(c)
def above(u): return (u[:, 0] > 4.005).to(u)

@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("distribution", ["gaussian", "gumbel"])
def test_half_precision_keeps_the_noise(dtype, distribution):
    "Noise far below the spacing of bfloat16 at these costs: as in float64, with the same noise"
    e = draw_noise(torch.zeros(500, 2, dtype=torch.float64), Noise(1., 60, distribution, generator=torch.Generator().manual_seed(1)))
    e = (256*e).round()/256                          # sums that float32 holds exactly
    def noise(dtype): return Noise(2**-8, distribution=distribution, fixed=e.to(dtype))
    wide, y, t = torch.float64, torch.full((500, 2), 4.), torch.tensor([[0., 1.]]).expand(500, 2)
    losses = {"fenchel_young": lambda d: (FenchelYoungLoss(nearest, noise(d)), y, t),
              "smoothed": lambda d: (SmoothedLoss(above, noise(d)), y),
              "algorithm": lambda d: (SmoothedAlgorithmLoss(nearest, lambda w, t: (w - t).square().sum(1), noise(d)), y, t)}
    for make in losses.values():
        f, y_, *args = make(wide)
        want = f.derivatives(y_.to(wide), *args), f(y_.to(wide), *args)
        f, y_, *args = make(torch.float32)
        got = f.derivatives(y_.to(dtype), *args)
        assert {o.dtype for o in got} == {torch.float32}
        for a, b in zip((*got, f(y_.to(dtype), *args)), (*want[0], want[1])): assert_close(a.double(), b, rtol=1e-4, atol=1e-4*b.abs().max().item())
        x = y_.to(dtype).requires_grad_()
        g, = torch.autograd.grad(f(x, *args).sum(), x)
        assert g.dtype == dtype
        assert_close(g.double(), want[0][1], rtol=1e-2, atol=1e-2*float(want[0][1].abs().max()))

def test_a_fenchel_young_loss_under_autocast():
    y, t, e = torch.rand(20, 9) + 1, torch.rand(20, 9).round(), torch.randn(20, 10, 9)
    f = FenchelYoungLoss(lambda c: (c < 1.5).to(c), Noise(.3, fixed=e))
    with torch.autocast("cpu", torch.bfloat16): found = f(y, t)
    assert torch.equal(found, f(y, t))

def test_a_solver_that_interpolates_in_half_precision():
    "The solver sees the moved costs, and not what bfloat16 makes of them"
    seen = []
    def solver(c): seen.append(c); return nearest(c)
    y = torch.tensor([[4., 4.0156]]).bfloat16().requires_grad_()
    blackbox(solver, y, .01).backward(torch.tensor([[1., 0.]]))
    assert seen[1].dtype == torch.float32 and seen[1][0, 0].item() == pytest.approx(4.01)

@pytest.mark.parametrize("make", [lambda: FenchelYoungLoss(3), lambda: FenchelYoungLoss(None, Noise())])
def test_a_solver_that_is_no_function(make):
    with pytest.raises(TypeError, match="solver: expected a function of costs, got"): make()
