"""Derivatives of every relaxed sort, through autograd, against numbers with 90 digits.

The reference is each sort written out with mpmath, one comparison or row at a time, and differentiated by
finite differences. It is evaluated at the scores as float32 has them, so what is compared is arithmetic alone."""
import functools
import itertools
import math

import mpmath as mp
import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from newton_losses_nb import NewtonLoss
from newton_losses_nb.core.derivatives import NonFiniteError
from newton_losses_nb.sorting.more import sinkhorn_sort, soft_rank
from newton_losses_nb.sorting.relaxations import ranking_gradient
from newton_losses_nb.sorting.relaxations import (
    log_complement, neural_sort, ranking_loss, soft_sort, true_permutation)
from newton_losses_nb.sorting.fast_networks import sorting_network
from newton_losses_nb.sorting.losses import SortingLoss, element_match, exact_match

DIGITS = 90
BETA, N_ITER = 10., 3
SPREADS = (1e-3, 0.1, 1., 10., 1e3, 1e5, 1e7)
PATTERNS = {"right": (-0.31, 0.13, 0.74), "reversed": (0.74, 0.13, -0.31), "mixed": (0.13, 0.74, -0.31)}
NETWORKS = ("logistic", "logistic_art", "gaussian", "cauchy", "reciprocal", "optimal")
SORTS = ("neural_sort", "soft_sort", "sinkhorn", *NETWORKS)
DTYPES = (torch.float32, torch.float64)
SLACK = {torch.float32: 1e-4, torch.float64: 1e-11}


# The reference
def mp_alpha(v, name):
    if name.startswith("logistic"): return 1/(1 + mp.exp(-v))
    if name == "gaussian": return mp.erfc(-v/mp.sqrt(2))/2
    if name == "cauchy": return mp.atan2(1, -v)/mp.pi
    if name == "reciprocal": return 1/(2 - v) if v < 0 else 1 - 1/(2 + v)
    tail = 1/(16*max(abs(v), mp.mpf("0.25")))
    return v + mp.mpf("0.5") if abs(v) <= 0.25 else 1 - tail if v > 0 else tail

def mp_steep(c, name): return BETA*(c/(abs(c) + mp.mpf("1e-10"))**mp.mpf("0.25") if name == "logistic_art" else c)

def mp_compare(x, P, i, name):
    "One comparison of wires i and i + 1"
    v = mp_steep(x[i+1] - x[i], name)
    a, b = mp_alpha(v, name), mp_alpha(-v, name)
    mix = lambda u, w: ([a*p + b*q for p, q in zip(u, w)], [b*p + a*q for p, q in zip(u, w)])
    P[i], P[i+1] = mix(P[i], P[i+1])
    (x[i],), (x[i+1],) = mix(x[i:i+1], x[i+1:i+2])

def mp_network(s, name):
    x, n = list(s), len(s)
    P = [[mp.mpf(i == j) for j in range(n)] for i in range(n)]
    for k in range(n):
        for i in range(k % 2, n - 1, 2): mp_compare(x, P, i, name)
    return P

def mp_softmax(L):
    top = max(L)
    e = [mp.exp(o - top) for o in L]
    return [o/sum(e) for o in e]

def mp_rows(s, name):
    n = len(s)
    if name == "soft_sort": return [mp_softmax([-abs(o - p) for p in s]) for o in sorted(s)]
    bend = (lambda d: mp.log(mp.exp(d) + mp.exp(-d))) if name == "sinkhorn" else abs
    L = [[(2*i - n + 1)*o - sum(bend(o - p) for p in s) for o in s] for i in range(n)]
    P = [mp_softmax(row) for row in L]
    for _ in range(N_ITER if name == "sinkhorn" else 0):
        columns = [[o/sum(c) for o in c] for c in zip(*P)]
        P = [[o/sum(row) for o in row] for row in zip(*columns)]
    return P

def mp_sort(s, name):
    return mp_network(s, name) if name in NETWORKS else mp_rows(s, name)

WEIGHTS = ((0.3, 0.1, 0.6), (0.2, 0.7, 0.1), (0.5, 0.2, 0.3))

def mp_losses(s, name):
    "All losses of one sort, so that it is done once"
    P, n = mp_sort(s, name), len(s)
    row = range(n)
    others = lambda i, j: sum(P[i][k] for k in row if k != j)
    log_P = [[mp.log(o) for o in r] for r in P]
    rest = [[mp.log(others(i, j)) for j in row] for i in row]
    pairs = list(itertools.product(row, row))
    return {"own": -sum(WEIGHTS[i][j]*log_P[i][j] for i, j in pairs),
            "cross_entropy": -sum(log_P[i][i] for i in row)/n,
            "bce": -sum(log_P[i][j] if i == j else rest[i][j] for i, j in pairs)/n**2,
            "complement": -sum(WEIGHTS[i][j]*rest[i][j] for i, j in pairs),
            "plain": sum(WEIGHTS[i][j]*P[i][j]**2 for i, j in pairs)}

@functools.cache
def reference(name, pattern, spread):
    "Gradient and Hessian of every loss"
    with mp.workdps(DIGITS): return differences(name, pattern, spread)

def differences(name, pattern, spread):
    s = [mp.mpf(o) for o in scores(pattern, spread).tolist()]
    n, h = len(s), mp.mpf(spread)*mp.mpf("1e-20")
    def at(*moves): return mp_losses([o + h*sum((m > 0) - (m < 0) for m in moves if abs(m) == i + 1) for i, o in enumerate(s)], name)
    base, one = at(), {m: at(m) for m in (*range(1, n + 1), *range(-n, 0))}
    two = {(i, j): at(i, j) for i in range(1, n + 1) for j in range(1, i)}
    back = {(i, j): at(-i, -j) for i, j in two}
    def of(kind):
        f, g = base[kind], {m: o[kind] for m, o in one.items()}
        G = [(g[i] - g[-i])/(2*h) for i in range(1, n + 1)]
        H = [[(g[i] - 2*f + g[-i])/h**2 for i in range(1, n + 1)] for _ in range(n)]
        for i, j in two:
            mixed = (two[i, j][kind] + back[i, j][kind] - g[i] - g[-i] - g[j] - g[-j] + 2*f)/(2*h**2)
            H[i-1][j-1] = H[j-1][i-1] = mixed
        for i in range(1, n + 1): H[i-1][i-1] = (g[i] - 2*f + g[-i])/h**2
        return tuple(torch.tensor(o, dtype=torch.float64) for o in ([float(o) for o in G], [[float(o) for o in r] for r in H]))
    return {kind: of(kind) for kind in base}

def scores(pattern, spread): return (torch.tensor(PATTERNS[pattern])*spread).float()


# What is tested
def soften(s, name, log):
    if name == "neural_sort": return neural_sort(s, 1., log)
    if name == "soft_sort": return soft_sort(s, 1., log)
    if name == "sinkhorn": return sinkhorn_sort(s, 1., N_ITER, log)
    return sorting_network(s, "odd_even", name, BETA, log)

def loss(s, name, kind):
    T, W = torch.eye(3, dtype=s.dtype).expand(*s.shape, 3), torch.tensor(WEIGHTS, dtype=s.dtype)
    if kind == "plain": return (W*soften(s, name, False).square()).sum((-2, -1))
    log_P = soften(s, name, True)
    if kind == "own": return -(W*log_P).sum((-2, -1))
    if kind == "complement": return -(W*log_complement(log_P)).sum((-2, -1))
    return ranking_loss(log_P, T, kind, log=True)

def by_autograd(name, kind, x):
    x = x.clone().requires_grad_()
    G, = torch.autograd.grad(loss(x, name, kind).sum(), x, create_graph=True)
    H = [torch.autograd.grad((G*r).sum(), x, retain_graph=True)[0] for r in torch.eye(3, dtype=x.dtype)]
    return G.detach(), torch.stack(H, -2)

def by_batch(name, kind, x):
    x = x.clone().requires_grad_()
    G, = torch.autograd.grad(loss(x, name, kind).sum(), x, create_graph=True)
    rows = torch.eye(3, dtype=x.dtype).unsqueeze(-2).expand(3, *x.shape)
    return G.detach(), torch.autograd.grad(G, x, rows, is_grads_batched=True)[0].movedim(0, -2)

def by_func(name, kind, x):
    f = lambda s: loss(s, name, kind)
    return torch.func.vmap(torch.func.grad(f))(x), torch.func.vmap(torch.func.hessian(f))(x)

def by_class(name, kind, x):
    return SortingLoss(name, kind, steepness=BETA).derivatives(x, torch.eye(3, dtype=x.dtype).expand(len(x), 3, 3), True)[1:]

WAYS = {"autograd": by_autograd, "batched": by_batch, "func": by_func}
CASES = [*itertools.product(PATTERNS, SPREADS)]

def natural(name, spread):
    "Largest first and second derivative that log P can have at such scores"
    if name in ("neural_sort", "soft_sort", "sinkhorn"): return 4., 4.
    if name == "gaussian": return BETA*(1 + BETA*spread), BETA**2
    slope = BETA/spread**0.25 if name == "logistic_art" else BETA
    return slope, slope**2

def errors(name, kind, dtype, way):
    "Errors of gradient and Hessian in units of what is allowed: a part of the largest entry, and rounding of the slopes of log P"
    x = torch.stack([scores(*case) for case in CASES]).to(dtype)
    for case, *ours in zip(CASES, *way(name, kind, x)):
        for a, b, size in zip(ours, reference(name, *case)[kind], natural(name, case[1])):
            allowed = SLACK[dtype]*b.abs().max() + 4*torch.finfo(dtype).eps*size
            yield float((a.double() - b).abs().max()/allowed) if a.isfinite().all() else float("inf"), case

KINDS = ("own", "cross_entropy", "bce", "complement", "plain")

@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SORTS)
def test_derivatives(name, way):
    for kind, dtype in itertools.product(KINDS, DTYPES):
        error, case = max(errors(name, kind, dtype, WAYS[way]))
        assert error < 1, f"{kind}, {dtype}, {case}: {error:.1e} times what is allowed"

@pytest.mark.parametrize("name", ("neural_sort", "soft_sort", *NETWORKS))
def test_own_derivatives(name):
    for kind, dtype in itertools.product(("cross_entropy", "bce"), DTYPES):
        error, case = max(errors(name, kind, dtype, by_class))
        assert error < 1, f"{kind}, {dtype}, {case}: {error:.1e} times what is allowed"

@pytest.mark.parametrize("dtype", DTYPES)
def test_where_two_formulas_meet(dtype):
    "The log of a Gaussian's tail has two formulas; torch's clamp has another slope at their border in torch 2.14 than before"
    edge = {torch.float32: -10., torch.float64: -30.}[dtype]
    slope = float(BETA*mp.npdf(edge)/mp.ncdf(edge))
    first = lambda s: sorting_network(s, relaxation="gaussian", steepness=BETA, log=True)[0, 0, 0]
    s = torch.tensor([[0., edge/BETA]], dtype=dtype)
    y = s.clone().requires_grad_()
    want = torch.tensor([[-slope, slope]], dtype=dtype)
    for found in (torch.func.grad(first)(s), *torch.autograd.grad(first(y), y)): torch.testing.assert_close(found, want)

@pytest.mark.parametrize("dtype, apart", [(torch.float32, 10.), (torch.float32, 1e3), (torch.float64, 1e4)])
def test_a_pair(dtype, apart):
    "One pair in the wrong order: ℓ = −log Φ(−v) with v = 10 times the distance; its derivatives are known"
    x = torch.tensor([[apart, 0.]], dtype=dtype)
    f = lambda s: ranking_loss(sorting_network(s, relaxation="gaussian", log=True), torch.eye(2, dtype=dtype).expand(*s.shape, 2), log=True).sum()
    with mp.workdps(50):
        v = mp.mpf(10*apart)
        h = mp.npdf(v)/mp.ncdf(-v)
        first, second = float(10*h), float(100*h*(h - v))
    y = x.clone().requires_grad_()
    G, = torch.autograd.grad(f(y), y, create_graph=True)
    H, = torch.autograd.grad(G[0, 0], y)
    for g, row in ((G, H), (torch.func.grad(f)(x), torch.func.hessian(f)(x)[0, 0])):
        torch.testing.assert_close(g.detach(), torch.tensor([[first, -first]], dtype=dtype), rtol=1e-5, atol=0)
        torch.testing.assert_close(row.view(1, 2), torch.tensor([[second, -second]], dtype=dtype), rtol=1e-5, atol=0)


# Sums of logarithms
@pytest.mark.parametrize("offset", (-20., -1e3, -1e6))
def test_log_complement(offset):
    "The largest weight is one; the others are far down, and share what is left"
    L = torch.tensor([[0., math.log(.5) + offset, offset]])
    slopes = torch.tensor([0., 300., 500.])
    def f(t): return log_complement(L + slopes*t)[0, 0]
    t = torch.zeros((), requires_grad=True)
    first, = torch.autograd.grad(f(t), t, create_graph=True)
    second, = torch.autograd.grad(first, t)
    p = (L.double()[0, 1:] - L.double()[0, 2]).softmax(0)
    mean = (p*slopes[1:]).sum()
    torch.testing.assert_close(first.detach().double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(second.double(), (p*(slopes[1:] - mean)**2).sum(), rtol=1e-5, atol=0)

@pytest.mark.parametrize("offset", (-20., -1e3, -1e6))
def test_ranking_gradient(offset):
    "A sure row with the wrong element on top: the true one and the third share what is left"
    log_P = torch.tensor([[0., math.log(.5) + offset, offset]]*3)
    T = torch.eye(3)[[1, 1, 2]]
    G = ranking_gradient(log_P, T, "bce")[1]
    p = (log_P.double()[:, 1:] - log_P.double()[:, 2:]).softmax(-1)
    exact = -T.double()
    exact[:, 1:] -= p
    torch.testing.assert_close(G.double(), exact/9, rtol=1e-6, atol=1e-9)


# Nothing looks at a number
class Unseen(TorchDispatchMode):
    "An operation that hands numbers to Python is an error"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket._qualified_op_name not in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"), func
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize("name", SORTS)
def test_no_number_decides(name):
    x, labels = torch.randn(4, 3).requires_grad_(), torch.tensor([[2, 0, 1]]*4)
    with Unseen():
        T = true_permutation(labels)
        torch.autograd.grad(ranking_loss(soften(x, name, True), T, "bce", log=True).sum(), x)
        if name in ("neural_sort", "soft_sort", *NETWORKS): SortingLoss(name).derivatives(x.detach(), T, True)

@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("name", SORTS)
def test_bad_scores_make_bad_losses(name, bad):
    for n, place, log in itertools.product((2, 3, 4), (0, 1), (False, True)):
        x = torch.randn(3, n)
        x[1, place] = bad
        T = torch.eye(n).expand(3, n, n)
        value = ranking_loss(soften(x, name, log), T, log=log)
        assert value.isfinite().tolist() == [True, False, True]
        if log and name in ("neural_sort", "soft_sort", *NETWORKS):
            value, G, H = SortingLoss(name).derivatives(x, T, True)
            assert value.isfinite().tolist() == G.isfinite().all(-1).tolist() == H.isfinite().all(-1).all(-1).tolist() == [True, False, True]

def test_labels_that_are_no_numbers():
    bad = torch.tensor([1., float("nan")])
    with pytest.raises(ValueError, match="labels: expected numbers, got 1 NaN"): true_permutation(bad)
    assert torch.func.vmap(true_permutation)(bad.expand(2, 2)).shape == (2, 2, 2)
    with pytest.raises(AssertionError), Unseen(): true_permutation(torch.tensor([1., 2.]))


# Ties and first mistakes
def test_equal_scores_are_no_order():
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 2, 4], [1, 2, 3, 3]])
    s = torch.tensor([[0., 0, 0, 0], [.1, .2, .2, .4], [.1, .2, .2, .4], [.1, .2, .2, .4]])
    assert exact_match(s, labels).tolist() == [False, False, True, False]
    assert element_match(s, labels).tolist() == [0., .5, 1., .5]
    s, labels = torch.randn(500, 5), torch.randint(4, (500, 5))                 # ties among labels only
    same = s.argsort(dim=-1, stable=True) == labels.argsort(dim=-1, stable=True)
    assert torch.equal(exact_match(s, labels), same.all(-1)) and torch.equal(element_match(s, labels), same.float().mean(-1))

@pytest.mark.parametrize("name", ("neural_sort", "gaussian"))
def test_hints(name):
    loss, s, T = SortingLoss(name), torch.randn(4, 3), true_permutation(torch.rand(4, 3))
    for call in (loss, loss.derivatives):
        with pytest.raises(ValueError, match=r"give true_permutation\(labels\)"): call(s, s)
        with pytest.raises(ValueError, match=r"give s.squeeze\(-1\)"): call(s.unsqueeze(-1), T)
    assert loss.derivatives(s, T)[2].shape == (4, 3, 3) and loss.derivatives(s, T, hessian=False)[2] is None


@pytest.mark.parametrize("relaxation", ["cauchy", "reciprocal", "logistic", "gaussian", "optimal"])
@pytest.mark.parametrize("far", [1e5, 1e6, 1e7])
def test_near_ties_beside_a_large_score(relaxation, far):
    "A weight that rounds to one still moves a score: by hand and by autograd, float32 as float64"
    s, P = torch.tensor([[0, .03, far]]), torch.eye(3)[None]
    loss = SortingLoss(relaxation)
    def gradients(s, P):
        by_hand = loss.derivatives(s, P, hessian=False)[1]
        return by_hand, torch.func.grad(lambda s: loss(s, P).sum())(s)
    found, truth = gradients(s, P), gradients(s.double(), P.double())
    torch.testing.assert_close(truth[0], truth[1], rtol=1e-6, atol=1e-9)
    for one, exact in zip(found, truth): torch.testing.assert_close(one.double(), exact, rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("sort", [soft_sort, sorting_network, lambda s: sorting_network(s, relaxation="cauchy"), soft_rank])
def test_a_score_far_away_costs_the_others_no_digits(sort, place):
    "Wherever it stands"
    s = torch.tensor([1., 1.5])
    s = torch.cat([s[:place], torch.tensor([1e6]), s[place:]])
    assert_close(sort(s[None]).double(), sort(s[None].double()), rtol=1e-6, atol=1e-6)

@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
@pytest.mark.parametrize("name, setting, scale", [("neural_sort", dict(tau=1e-3), 10.), ("soft_sort", dict(tau=1e-4), 10.), ("logistic", dict(steepness=1e3), 50.),
                                                  ("gaussian", {}, 40.), ("neural_sort", {}, 3000.)])
def test_half_precision_is_computed_in_single(name, setting, scale, kind):
    "Also where log P is beyond the largest number of float16"
    s = (scale*torch.tensor([[.3, 1., -.5, .8, 0.]])).half()
    for T in true_permutation(s), true_permutation(s.flip(1)):
        f = SortingLoss(name, kind, **setting)
        assert f(s, T).isfinite().all()
        assert_close(f(s, T), f(s.float(), T), rtol=0, atol=0)

def test_clamped_loss_of_nan():
    "NaN for the sample that has it, as with the other kinds"
    s, f = torch.randn(4, 3), SortingLoss("neural_sort", "bce_clamped")
    T = true_permutation(torch.randn(4, 3))
    bad = s.clone(); bad[3, 0] = torch.nan
    assert f(bad, T).isnan().tolist() == [False]*3 + [True]
    assert_close(f(bad, T)[:3], f(s, T)[:3])
    assert_close(NewtonLoss(f, on_nonfinite="skip")(bad.requires_grad_(), T), f(s, T)[:3].mean())
    with pytest.raises(NonFiniteError, match="y: expected finite"): NewtonLoss(f)(bad, T)


@pytest.mark.parametrize("kind", ["cross_entropy", "bce"])
@pytest.mark.parametrize("relaxation", ["neural_sort", "soft_sort", "logistic", "gaussian"])
def test_own_derivatives_have_any_leading_dimensions(relaxation, kind):
    "And one dtype, float32 at least"
    y, P = torch.randn(2, 3, 5), torch.eye(5)[torch.rand(2, 3, 5).argsort(-1)]
    f = SortingLoss(relaxation, kind)
    flat = f.derivatives(y.view(6, 5), P.view(6, 5, 5))
    for x, T, shape in ((y, P, (2, 3)), (y[0, 0], P[0, 0], ()), (y[:0], P[:0], (0, 3))):
        found = f.derivatives(x, T)
        assert [o.shape for o in found] == [shape, (*shape, 5), (*shape, 5, 5)]
        for a, b in zip(found, flat): assert_close(a.reshape(-1, *b.shape[1:]), b[:a[..., None].numel()//max(1, b[0].numel())])
    assert [o.dtype for o in f.derivatives(y.bfloat16(), P)] == [torch.float32]*3
    with pytest.raises(ValueError, match="P_true: expected"): f.derivatives(y, P[0])


def test_a_network_is_compiled_whole_for_any_number_of_wires():
    f = torch.compile(lambda s: sorting_network(s, relaxation="cauchy"), backend="eager", fullgraph=True)
    for n in (3, 4, 5):
        s = torch.randn(2, n)
        assert_close(f(s), sorting_network(s, relaxation="cauchy"))
