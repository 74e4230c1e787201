"""Shortest paths against networkx, and the promises that a user of the path losses relies on, on many random inputs."""
import networkx
import numpy
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from newton_losses_nb import NewtonLoss, OutputLoss, SortingLoss
from newton_losses_nb.paths.relaxed import path_loss, relaxed_bellman_ford
from newton_losses_nb.paths.exact import cost_optimality, exact_path_match, is_valid_path, path_cost, regret, shortest_path
from newton_losses_nb.paths.fenchel_young import FenchelYoungLoss, Noise
from newton_losses_nb.paths.smoothing import BlackboxLoss, SmoothedAlgorithmLoss, SmoothedLoss, blackbox, smoothed_algorithm
from newton_losses_nb.sorting.losses import exact_match

fast = settings(deadline=None, max_examples=30)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
COSTS = {
    "continuous": lambda shape, g: torch.rand(shape, generator=g, dtype=torch.float64) + 1e-3,
    "tied": lambda shape, g: torch.tensor([0.8, 1.2, 5.3, 7.7, 9.2]).half().double()[torch.randint(5, shape, generator=g)],
    "free": lambda shape, g: torch.randint(0, 3, shape, generator=g).double(),
    "extreme": lambda shape, g: 10**(torch.rand(shape, generator=g, dtype=torch.float64)*40 - 20),
}

def networkx_cost(cost):
    H, W = cost.shape
    graph = networkx.DiGraph()
    graph.add_node((0, 0))
    for i in range(H):
        for j in range(W):
            for a in range(max(i - 1, 0), min(i + 2, H)):
                for b in range(max(j - 1, 0), min(j + 2, W)):
                    if (a, b) != (i, j): graph.add_edge((i, j), (a, b), weight=float(cost[a, b]))
    reached = networkx.single_source_dijkstra_path_length(graph, (0, 0))
    return float(cost[0, 0]) + reached[H - 1, W - 1]

@pytest.mark.parametrize("kind", COSTS)
@given(size=sizes, seed=st.integers(0, 2**20))
@fast
def test_cheapest(kind, size, seed):
    cost = COSTS[kind]((3, *size), torch.Generator().manual_seed(seed))
    path = shortest_path(cost)
    assert is_valid_path(path).all() and cost_optimality(cost, path).all()
    assert_close(path_cost(cost, path), torch.tensor([networkx_cost(c) for c in cost], dtype=torch.float64), rtol=1e-12, atol=0)

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(size=sizes, seed=st.integers(0, 2**20), share=st.sampled_from([0.1, 0.3, 0.5]))
@fast
def test_walls(dtype, size, seed, share):
    "Infinite cells are entered by no path; a map without a path is named"
    g = torch.Generator().manual_seed(seed)
    cost = COSTS["tied"]((6, *size), g).to(dtype)
    cost = cost.masked_fill(torch.rand(cost.shape, generator=g) < share, torch.inf)
    best = torch.tensor([networkx_cost(c) for c in cost], dtype=torch.float64)
    good = best.isfinite()
    path = shortest_path(cost[good])
    assert path.dtype == dtype and is_valid_path(path).all() and not path[cost[good].isinf()].any()
    rtol = max(1e-6, torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
    assert_close(path_cost(cost[good], path).double(), best[good], rtol=rtol, atol=0)
    assert cost_optimality(cost[good], path).all() and (regret(cost[good], path) == 0).all()
    fixed = shortest_path(cost, 2*size[0]*size[1])
    assert torch.equal(fixed[good], path) and fixed[~good].isnan().all()
    if not good.all():
        with pytest.raises(ValueError, match=rf"map {int((~good).nonzero()[0])}\b"): shortest_path(cost)

@given(seed=st.integers(0, 2**20))
@fast
def test_walls_scipy(seed):
    "The same with the graph of the free cells alone"
    g = torch.Generator().manual_seed(seed)
    cost = COSTS["continuous"]((7, 8), g).masked_fill(torch.rand(7, 8, generator=g) < 0.3, torch.inf)
    cost[0, 0] = cost[-1, -1] = 1
    cells, n = cost.numpy(), cost.numel()
    edges = [(i*8 + j, a*8 + b) for i in range(7) for j in range(8) for a in range(max(i - 1, 0), min(i + 2, 7))
             for b in range(max(j - 1, 0), min(j + 2, 8)) if (a, b) != (i, j) and numpy.isfinite(cells[i, j] + cells[a, b])]
    u, v = numpy.array(edges, dtype=int).reshape(-1, 2).T
    graph = scipy.sparse.csr_array((cells.ravel()[v], (u, v)), shape=(n, n))
    best = cells[0, 0] + scipy.sparse.csgraph.dijkstra(graph, indices=0)[-1]
    if numpy.isfinite(best): assert abs(float(path_cost(cost, shortest_path(cost))) - best) < 1e-9
    else:
        with pytest.raises(ValueError, match="around the walls"): shortest_path(cost)

def test_no_path_is_named():
    cost = torch.ones(2, 3, 4, 4)
    cost[1, 0, 2] = torch.inf
    with pytest.raises(ValueError, match=r"around the walls \(infinite costs\), map \(1, 0\) has none"): shortest_path(cost)
    cost[0, 2, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"top left corner of map \(0, 2\)"): shortest_path(cost)
    with pytest.raises(ValueError, match="bottom right corner of the map"): shortest_path(torch.tensor([[1., torch.inf]]))
    with pytest.raises(ValueError, match="can hold, got one beyond 3.4e.38 on map 1"):
        shortest_path(torch.stack([torch.ones(3, 3), torch.full((3, 3), 3e38)]))
    with pytest.raises(ValueError, match="floor=1e-3"): shortest_path(torch.tensor([[1., -1.]]))

@given(seed=st.integers(0, 2**20))
@fast
def test_official_rule(seed):
    "Where several neighbours are equally near, the first in row-major order comes before"
    cost = COSTS["tied"]((9, 9), torch.Generator().manual_seed(seed))
    d = torch.full((11, 11), torch.inf, dtype=torch.float64)
    d[1, 1] = cost[0, 0]
    for _ in range(81):
        for i in range(9):
            for j in range(9): d[i+1, j+1] = min(d[i+1, j+1], cost[i, j] + d[i:i+3, j:j+3].min())
    at, path = (8, 8), torch.zeros(9, 9, dtype=torch.float64)
    while True:
        path[at] = 1
        if at == (0, 0): break
        around = [(at[0] + a, at[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
        at = min(around, key=lambda o: d[o[0] + 1, o[1] + 1].item())
    assert_close(shortest_path(cost), path)

@given(seed=st.integers(0, 2**20))
@fast
def test_scores_agree(seed):
    g = torch.Generator().manual_seed(seed)
    cost, guess = COSTS["tied"]((20, 8, 8), g), COSTS["continuous"]((20, 8, 8), g)
    label, path = shortest_path(cost), shortest_path(guess)
    assert (regret(cost, path) >= -1e-9).all()
    assert (~exact_path_match(path, label) | cost_optimality(cost, path)).all()

@pytest.mark.parametrize("scale,beta", [(1e-3, 1e3), (1., 0.1), (1., 10.), (1., 200.), (1e3, 1e-2), (1e3, 10.)])
@pytest.mark.parametrize("loop", ["for", "while"])
def test_relaxed_is_finite(scale, beta, loop):
    "Values, gradients and some rows of the Hessian in float32"
    cost = (scale*(torch.rand(8, 12, 12, generator=torch.Generator().manual_seed(0)) + 0.1)).requires_grad_()
    out = relaxed_bellman_ford(cost, beta, loop=loop)
    g, = torch.autograd.grad(path_loss(out, shortest_path(cost), "l2").sum(), cost, create_graph=True)
    h, = torch.autograd.grad(g[:, 5, 5].sum(), cost)
    assert out.isfinite().all() and g.isfinite().all() and h.isfinite().all()
    assert (out >= -1e-5).all() and (out <= 1 + 1e-5).all()

def flat(c): return shortest_path(c.clamp(min=1e-3).unflatten(-1, (6, 6))).flatten(-2)

LOSSES = {
    "fenchel_young": lambda noise: FenchelYoungLoss(flat, noise, floor=1e-3),
    "smoothed_loss": lambda noise: SmoothedLoss(lambda y, w: path_loss(flat(y), w), noise),
    "smoothed_algorithm": lambda noise: SmoothedAlgorithmLoss(flat, lambda a, w: path_loss(a, w, "l2"), noise),
}

@pytest.mark.parametrize("curvature,eigenvalues", [("fisher", "raw"), ("hessian", "raw"), ("hessian", "abs"), ("hessian", "clip")])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_newton(name, curvature, eigenvalues, dtype):
    g = torch.Generator().manual_seed(0)
    y, w = torch.rand(7, 36, generator=g).to(dtype) + 0.2, flat(torch.rand(7, 36, generator=g)).to(dtype)
    y.requires_grad_()
    loss = NewtonLoss(LOSSES[name](Noise(samples=6, generator=torch.Generator().manual_seed(1))), curvature, eigenvalues=eigenvalues)
    loss(y, w).backward()
    assert y.grad.isfinite().all() and y.grad.dtype == dtype

@given(seed=st.integers(0, 2**20), floor=st.sampled_from([None, 1e-3, 0.5]))
@fast
def test_fenchel_young_gradient(seed, floor):
    "With the noise held fixed, the gradient is the derivative of the value, and the value is not negative"
    g = torch.Generator().manual_seed(seed)
    solver = lambda c: shortest_path(c.clamp(min=1e-3).unflatten(-1, (3, 3))).flatten(-2)
    y, noise = torch.rand(1, 9, generator=g, dtype=torch.float64) + 1, torch.randn(1, 5, 9, generator=g, dtype=torch.float64)
    w = solver(torch.rand(1, 9, generator=g, dtype=torch.float64) + 0.1)
    value = lambda y: FenchelYoungLoss(solver, Noise(0.3, fixed=noise), floor=floor)(y, w)
    G, = torch.autograd.grad(value(y.requires_grad_()).sum(), y)
    num = torch.stack([(value(y.detach() + 1e-7*o) - value(y.detach() - 1e-7*o))/2e-7 for o in torch.eye(9, dtype=torch.float64)], 1)
    assert_close(G, num, rtol=1e-5, atol=1e-5)
    assert floor is None or (value(y) >= 0).all()

def test_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    g = torch.Generator().manual_seed(0)
    smoothed_algorithm(flat, torch.rand(2, 36, generator=g), Noise(generator=g))
    assert torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize("start", [0, 1e5, 1e7])
def test_an_expensive_start_hides_no_difference(start):
    "All paths pay the first cell, so the cheapest is that of a free one, in float32 too"
    for seed in range(20):
        cost = torch.rand(12, 12, generator=torch.Generator().manual_seed(seed))
        free, dear = cost.clone(), cost.clone()
        free[0, 0], dear[0, 0] = 0, start
        assert torch.equal(shortest_path(dear), shortest_path(free))

def test_path_loss_of_integers():
    "Whole numbers do not wrap, soft targets are not cut off, half precision does not overflow"
    from newton_losses_nb.paths.relaxed import path_loss
    a, b = torch.tensor([[0, 1, 1]], dtype=torch.uint8), torch.tensor([[1, 1, 0]], dtype=torch.uint8)
    assert path_loss(a, b, "l1", "sum").tolist() == [2.] and path_loss(a.bool(), b.bool(), "l2").tolist() == [pytest.approx(2/3)]
    assert path_loss(a.long(), torch.tensor([[.5, .5, .5]]), "l1", "sum").tolist() == [1.5]
    assert path_loss(torch.ones(1, 10**5).half(), torch.zeros(1, 10**5), "l1", "sum").tolist() == [1e5]

@pytest.mark.parametrize("place", [(0, 0), (1, 1), (0, 1)])
@pytest.mark.parametrize("value", [-1., torch.nan])
def test_a_fixed_number_of_sweeps_finds_no_path_through_a_bad_cell(place, value):
    "The whole path is NaN, of this map only"
    cost = torch.rand(2, 3, 3) + .1
    cost[(0, *place)] = value
    path = shortest_path(cost, 9)
    assert path[0].isnan().all() and torch.equal(path[1], shortest_path(cost[1]))

def test_loss_of_paths_that_are_one_cell():
    p, t = torch.rand(3), torch.ones(3)
    assert_close(path_loss(p, t, "l2"), (p - t).square())

@pytest.mark.parametrize("loop", ["for", "while"])
def test_one_sweep_is_a_constant_with_a_gradient(loop):
    cost = torch.rand(2, 4, 4, requires_grad=True)
    relaxed_bellman_ford(cost, 1., n_iter=1, loop=loop).sum().backward()
    assert not cost.grad.any()

def test_results_of_another_shape_or_kind():
    y = torch.rand(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"solver: expected the shape of the costs, \(2, 3\), got \(2, 1\)"): blackbox(lambda c: c[:, :1], y)
    with pytest.raises(TypeError, match="y_true: expected a tensor, got list"): FenchelYoungLoss(lambda c: c)(y, [[1.]*3]*2)
    with pytest.raises(TypeError, match="P_true: expected a tensor, got list"): SortingLoss()(y, [[0, 1, 2]]*2)
    with pytest.raises(TypeError, match="labels: expected a tensor, got list"): exact_match(y, [[0, 1, 2]]*2)


FLAT = {"each map": lambda y: shortest_path(y.clamp(min=1e-3).unflatten(-1, (5, 5))).flatten(1), "all as one": lambda y: shortest_path(y.clamp(min=1e-3))}
AROUND = {"Fenchel-Young": lambda s, noise: FenchelYoungLoss(s, noise),
          "smoothed loss": lambda s, noise: SmoothedLoss(lambda y, t: (s(y) - t).abs().sum(1), noise),
          "smoothed algorithm": lambda s, noise: SmoothedAlgorithmLoss(s, lambda a, t: (a - t).square().sum(1), noise),
          "blackbox": lambda s, noise: BlackboxLoss(s, lambda w, t: (w - t).square().sum(1))}

@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("shape", ((6, 25), (6, 5, 5)), ids=str)
def test_a_solver_that_takes_the_batch_for_one_map(name, shape):
    "Flat costs for a solver of maps, or maps that are taken for batches: refused, and right once each row is a map of its own"
    c, t = torch.rand(shape) + 1, shortest_path(torch.rand(6, 5, 5)).reshape(shape)
    state = torch.get_rng_state()
    for call in (NewtonLoss(AROUND[name](FLAT["all as one"], Noise(.3, 4))), NewtonLoss(AROUND[name](FLAT["all as one"], Noise(.3, 4)), chunk_size=1)):
        with pytest.raises(ValueError, match="expected (a result for each row alone|one row per sample)"): call(c.clone().requires_grad_(), t)
    assert torch.equal(state, torch.get_rng_state())
    if shape[1:] != (25,): return
    noise = Noise(.3, fixed=torch.randn(4, 25))
    loss = AROUND[name](FLAT["each map"], noise)
    torch.testing.assert_close(OutputLoss(loss)(c.clone().requires_grad_(), t), loss.derivatives(c, t, hessian=False)[0].mean())

@pytest.mark.parametrize("algorithm", (lambda y: y + torch.rand_like(y), lambda y: y[:, :0], lambda y: y.cumsum(1).double(), lambda y: 1/(y - y)))
def test_algorithms_that_are_no_mistake(algorithm):
    "Random, empty, of another type, not finite: not refused by the check of rows"
    y, noise = torch.rand(6, 3), Noise(.3, 4)
    SmoothedAlgorithmLoss(algorithm, lambda a: a.sum(1), noise).check_rows(y)


@pytest.mark.parametrize("n_iter", [20, 40])
def test_a_fixed_number_of_sweeps_takes_no_negative_cost(n_iter):
    "However small it is, and where no path comes near it"
    cost = torch.rand(4, 12, 12) + .5
    cost[0, 0, 11], cost[1, 0, 11], cost[3, 11, 11] = -1e-7, -5., -torch.inf
    cost[1, 0, 8:11] = cost[1, 1, 8:] = torch.inf
    path = shortest_path(cost, n_iter)
    assert path.flatten(1).isnan().all(1).tolist() == [True, True, False, True]
    assert torch.equal(path[2], shortest_path(cost[2]))

def test_an_expensive_start_hides_no_regret():
    cost, detour = torch.ones(3, 4), torch.tensor([[1., 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 1]])
    cost[0, 0] = 1e8
    assert regret(cost, detour) == 1 and not cost_optimality(cost, detour, rel=0.)
    assert cost_optimality(cost, detour, rel=1e-7) and cost_optimality(cost, shortest_path(cost), rel=0.)
    cost[1, 0] = torch.inf
    assert regret(cost, detour) == torch.inf and not cost_optimality(cost, detour)

def test_what_is_no_grid():
    flat, cost = torch.ones(9), torch.rand(3, 3)
    for f in (regret, path_cost, exact_path_match):
        with pytest.raises(ValueError, match=r"expected shape \(..., H, W\), got \(9,\)"): f(flat, flat)
    with pytest.raises(ValueError, match=r"path: expected shape \(N, ...\), got \(\)"): path_loss(*[torch.tensor(1.)]*2)
    with pytest.raises(ValueError, match=r"path: expected the shape of cost, \(3, 3\), got \(2, 2\)"): regret(cost, torch.ones(2, 2))
