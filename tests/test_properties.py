"""Properties over random and extreme inputs, against formulas written here from the definitions, torch.func, mpmath and the peers."""
import math

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from newton_losses_nb import (
    Fisher, Hessian, NewtonLoss, PerSample, SortingLoss, inject_fisher, neural_sort, newton_direction, newton_target, soft_sort,
    sorting_network, true_permutation)
from newton_losses_nb.core.derivatives import derivatives
from newton_losses_nb.core.solves import spectral_step, spectrum
from newton_losses_nb.sorting.relaxations import ranking_loss
from newton_losses_nb.sorting.losses import element_match, exact_match

D, NETWORKS = torch.double, ("logistic", "logistic_art", "gaussian", "cauchy", "reciprocal", "optimal")
TOLERANCE = {torch.double: 1e-9, torch.float: 1e-4, torch.half: 1e-2, torch.bfloat16: 5e-2}
many = lambda n, *draws: lambda test: settings(max_examples=n, deadline=None, derandomize=True)(given(*draws)(test))
seeds, sizes, dtypes, spectra = st.integers(0, 10**6), st.integers(1, 6), st.sampled_from(list(TOLERANCE)), st.sampled_from(["raw", "abs", "clip"])
power = lambda lo, hi: st.floats(lo, hi).map(lambda e: 10**e)

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

def close(a, b, tol=1e-9): return float((a.to(D) - b.to(D)).abs().max()) <= tol*max(float(b.abs().max()), 1e-300)
def linear(y, G): return (y*G).sum(1)
def smooth_loss(y, t): return F.softplus(y*t).sum(1) + (y[:, 0]*y[:, -1]).sin() + (y**4).mean(1)

def strided(N, m, dtype, seed):
    torch.manual_seed(seed)
    base = torch.randn(m, 2*N + 1, dtype=D).to(dtype).requires_grad_()
    return base, base[:, 1::2].T  # a leaf, and a slice of it that is not contiguous

@many(30, sizes, sizes, seeds, dtypes, st.sampled_from([1., -2.5]), power(1.5, 4))
def test_outputs_that_are_not_contiguous_and_have_a_second_use(N, m, seed, dtype, incoming, lam):
    base, y = strided(N, m, dtype, seed)
    t, exact = torch.randn(N, m, dtype=D).to(dtype), y.detach().to(D)
    for curvature in ("fisher", "hessian"):
        _, d = newton_direction(smooth_loss, exact, t.to(D), curvature=curvature, lam=lam)
        out = NewtonLoss(smooth_loss, curvature, lam)(y, t)
        assert close(out.detach(), smooth_loss(exact, t.to(D)).mean(), max(TOLERANCE[dtype]/10, 1e-9))
        g, = torch.autograd.grad(incoming*out + (y.to(D)**2).sum(), base)
        assert g.dtype == dtype and not g[:, ::2].any()
        assert close(g[:, 1::2].T, incoming*d/N + 2*exact, TOLERANCE[dtype])

@many(60, sizes, sizes, seeds, dtypes, st.sampled_from(["mean", "sum"]), st.sampled_from([1., -2.5, 1e3]), power(0, 4))
def test_inject_fisher_gradient(N, m, seed, dtype, reduction, factor, lam):
    base, y = strided(N, m, dtype, seed)
    G, count = torch.randn(N, m, dtype=D).to(dtype).to(D)*factor, N if reduction == "mean" else 1
    z = inject_fisher(y, lam, reduction)
    g, = torch.autograd.grad((z.to(D)*G).sum()/count, base)
    assert torch.equal(z, y) and close(g[:, 1::2].T, G @ torch.linalg.inv(G.T @ G/N + lam*torch.eye(m, dtype=D))/count, 4*TOLERANCE[dtype])

@pytest.mark.parametrize("make", [Fisher, Hessian, lambda lam: PerSample(Fisher(lam)), lambda lam: PerSample(Hessian(lam))])
@pytest.mark.parametrize("lam", ["auto", 1e-6])
def test_equal_rows_and_zero_gradients(make, lam):
    y = torch.randn(6, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    y[3], y[4:] = y[0], 0.
    d = y - newton_target(lambda y: (y**2).sum(1)**2, y, curvature=make(lam))
    assert torch.allclose(d[0], d[3]) and not d[4:].any() and (d[:4]*y[:4]).sum() > 0

class Cube(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: (ctx.save_for_backward(x), x**3)[1])
    backward = staticmethod(lambda ctx, g: 3*g*ctx.saved_tensors[0]**2)

def in_place(y): z = y.clone(); z[:, 0] *= 2; z.add_(1).exp_(); return (z**2).sum(1)

LOSSES = {"where": lambda y: torch.where(y > 0, y**3, y.sin()*y).sum(1), "in_place": in_place, "custom": lambda y: Cube.apply(y).prod(1),
          "linear": lambda y: y @ torch.arange(y.shape[1]).to(y), "product": lambda y: y.prod(1), "lse": lambda y: y.logsumexp(1),
          "loop": lambda y: torch.stack([sum(v**(k + 2) for k, v in enumerate(r)) for r in y]), "ignores": lambda y: y[:, 0].exp()}

@pytest.mark.parametrize("name", LOSSES)
def test_hessians_match_torch_func(name):
    twin = (lambda y: (y**3).prod(1)) if name == "custom" else LOSSES[name]
    for N, m in ((1, 1), (5, 3), (3, 4)):
        y, V = (torch.randn(N, m, dtype=D, generator=torch.Generator().manual_seed(k)) for k in (N, N + 9))
        expected = torch.stack([torch.func.hessian(lambda r: twin(r[None])[0])(r) for r in y])
        found = lambda second: derivatives(LOSSES[name], y, second=second)[2]
        assert torch.allclose(found("full"), expected)
        assert torch.allclose(found("diagonal"), expected.diagonal(dim1=1, dim2=2))
        assert torch.allclose(found("products")(V[None])[0], (expected @ V[..., None])[..., 0])

@pytest.mark.parametrize("N", [2, 3, 8, 100])
def test_losses_that_mix_samples_are_refused(N):
    y = torch.randn(N, 4, generator=torch.Generator().manual_seed(N))
    for loss in (lambda y: F.batch_norm(y, None, None, training=True).pow(3).sum(1), lambda y: (y - y.mean(0)).square().sum(1)*y[:, 0].exp(),
                 lambda y: y.softmax(0).square().sum(1), lambda y: torch.sigmoid(y[:, :1] - y[:, 0]).sum(1),
                 lambda y: (y*y.roll(1, 0)).sum(1), lambda y: y.square().mean().expand(len(y)), lambda y: y.flip(0).square().sum(1)):
        for second in (None, "full"):
            with pytest.raises(ValueError, match="independent samples"): derivatives(loss, y, second=second)

@many(60, seeds, st.sampled_from([torch.double, torch.float, torch.bfloat16]), st.sampled_from([1e-2, 1., 1e3]), power(-20, 20))
def test_sound_losses_are_not_refused(seed, dtype, spread, scale):
    torch.manual_seed(seed)
    y = (spread*torch.randn(9, 5)).to(dtype)
    for loss in (lambda y: F.cross_entropy(y, torch.zeros(9).long(), reduction='none'), lambda y: F.softplus(y).mean(1), lambda y: y.norm(dim=1),
                 lambda y: torch.where(torch.arange(9) == 0, y.square().sum(1), 0*y.sum(1)), lambda y: F.layer_norm(y, (5,)).pow(3).sum(1)):
        assert derivatives(lambda y: loss(y)*scale, y)[1].isfinite().all()

@many(80, sizes, sizes, seeds, power(-20, 20), power(-12, 12), spectra)
def test_solvers_match_mpmath(N, m, seed, scale, lam, eigenvalues):
    exact, to = lambda A: mp.matrix(A.tolist()), lambda A: torch.tensor([[float(v) for v in A[i, :]] for i in range(A.rows)], dtype=D)
    torch.manual_seed(seed)
    G, S, norm = torch.randn(N, m, dtype=D)*scale, torch.randn(m, m, dtype=D), lambda A: float(torch.linalg.matrix_norm(A, 2))
    S, step = S + S.T, newton_direction(linear, 0*G, G, lam=lam)[1]
    assert norm(step) <= math.sqrt(N/lam)/2*(1 + 1e-6)
    with mp.workdps(60):
        assert close(step, to(exact(G)*(exact(G).T*exact(G)/N + mp.mpf(lam)*mp.eye(m))**-1), 1e-11)
        e, Q = mp.eigsy(exact(S))
        e = [{"raw": v, "abs": abs(v), "clip": max(v, 0)}[eigenvalues] + mp.mpf(lam) for v in e]
        expected, nearest = to(exact(G)*Q*mp.diag([1/v for v in e])*Q.T), float(min(map(abs, e)))
    found = spectral_step(G, *spectrum(S, eigenvalues), torch.tensor(lam, dtype=D), signed=eigenvalues == "raw")
    if nearest > 1e-10: assert close(found, expected, 1e-12*(1 + 10/nearest))

@many(60, sizes, sizes, seeds, power(-60, 60), power(-60, 60), spectra)
def test_automatic_damping_goes_downhill(N, m, seed, gradient, curvature, eigenvalues):
    torch.manual_seed(seed)
    G, S = torch.randn(N, m, dtype=D)*gradient, torch.randn(m, m, dtype=D)*curvature
    bent = lambda y, G: linear(y, G) + (y @ (S + S.T)*y).sum(1)/2      # at 0: gradient G, Hessian S + Sᵀ
    for loss in (NewtonLoss(linear), NewtonLoss(bent, "hessian", eigenvalues=eigenvalues, check=False)):
        solve = lambda G: loss.directions(torch.zeros_like(G), G)[1]
        step = solve(G)
        assert step.isfinite().all() and ((step/step.abs().max())*(G/gradient)).sum() > 0 and not solve(0*G).any()

@many(60, st.integers(1, 20), seeds, st.sampled_from(["random", "ties", "equal", "large"]), power(-1, 1))
def test_relaxations_match_their_originals(n, seed, kind, beta):
    sort, softsort, neuralsort = (pytest.importorskip(m) for m in ("diffsort", "difftopk.softsort", "difftopk.neuralsort"))
    torch.manual_seed(seed)
    s = {"random": torch.randn(3, n), "ties": torch.randint(3, (3, n)).float(), "equal": torch.ones(3, n), "large": 1e3*torch.randn(3, n)}[kind]
    pairs = [(neural_sort(s, 1/beta), neuralsort.NeuralSort(1/beta)(s).mT)] if kind != "large" else []  # the original is float32 only
    s = s.to(D)
    pairs += [(soft_sort(s, 1/beta), softsort.SoftSort(1/beta)(s).flip(-2))]
    for name in NETWORKS:
        for plan in ("odd_even", "bitonic")[:1 + (n > 1)]:
            peer = sort.DiffSortNet(plan, n, steepness=beta, distribution={"logistic_art": "logistic_phi"}.get(name, name))
            pairs += [(sorting_network(s, plan, name, beta), peer(s)[1].mT)]
            assert torch.allclose(sorting_network(s, plan, name, beta, log=True).exp(), pairs[-1][0], atol=1e-12)
    for ours, theirs in pairs: assert torch.allclose(ours, theirs, atol=1e-8 if ours.dtype == D else 1e-3)
    for f in (neural_sort, soft_sort): assert torch.allclose(f(s, 1/beta, log=True).exp(), f(s, 1/beta), atol=1e-12)

@many(40, sizes, seeds, power(-3, 3), st.sampled_from(["bce", "cross_entropy"]), st.sampled_from(["neural_sort", "soft_sort"]))
def test_ranking_loss_matches_mpmath_where_weights_saturate(n, seed, spread, kind, relaxation):
    torch.manual_seed(seed)
    s, labels, total = (torch.randn(n, dtype=D)*spread).tolist(), torch.randperm(n).tolist(), 0
    with mp.workdps(60):
        for i, low in enumerate(sorted(s)):
            x = [mp.mpf(v) for v in s]
            w = [mp.exp(-abs(low - v) if relaxation == "soft_sort" else (2*i + 1 - n)*v - sum(abs(v - u) for u in x)) for v in x]
            total -= mp.log(w[labels.index(i)]/sum(w))
            if kind == "bce": total -= sum(mp.log(sum(w[:j] + w[j+1:])/sum(w)) for j in range(n) if labels[j] != i)
        expected = float(total/n/(n if kind == "bce" else 1))
    got = SortingLoss(relaxation, kind)(torch.tensor([s], dtype=D), true_permutation(torch.tensor([labels]), D))
    assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-13)

@many(60, st.sampled_from([1, 2, 3, 7, 20]), seeds, st.sampled_from(["neural_sort", "soft_sort"]), st.sampled_from(["bce", "cross_entropy"]),
       st.sampled_from([1e-3, .1, 1., 10., 1e6]), st.booleans(), st.booleans())
def test_closed_form_hessians_match_torch_func(n, seed, relaxation, kind, tau, ties, double):
    torch.manual_seed(seed)
    dtype, tau = D if double else torch.float, tau if double else max(tau, 1.)
    s = torch.randint(4, (2, n)).to(dtype) if ties else torch.randn(2, n, dtype=dtype)
    T, loss = true_permutation(torch.rand(2, n), dtype), SortingLoss(relaxation, kind, tau)
    T = .8*T + .2*T.roll(1, 0)
    expected = torch.stack([torch.func.hessian(lambda r: loss(r, t))(r) for r, t in zip(s, T)])
    assert float((derivatives(loss, s, T, second="full")[2] - expected).abs().max())*tau**2 <= TOLERANCE[dtype]*max(float(expected.abs().max())*tau**2, 1.)

@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.bfloat16])
@pytest.mark.parametrize("relaxation", ["neural_sort", "soft_sort", *NETWORKS])
def test_everything_stays_finite(relaxation, dtype):
    u = torch.tensor([[0., 1, -1, .5, 1], [1, 1, 1, 1, 1], [-1, 1, -1, 1, -1], [1e-9, 0, 1, -1e-9, 1]], dtype=D)
    T, top = true_permutation(torch.tensor([4, 0, 3, 1, 2]).expand(4, 5)), torch.finfo(dtype).max
    for scale in (1e-30, 1., 300., 1e9, top):
        s = (u*scale).to(dtype).clamp(-top, top).requires_grad_()
        for kind in ("bce", "cross_entropy"):
            loss = SortingLoss(relaxation, kind)
            g, = torch.autograd.grad(loss(s, T).sum(), s)
            d, = torch.autograd.grad(NewtonLoss(loss, "hessian", eigenvalues="abs")(s, T), s)  # raises where a Hessian is not finite
            assert g.isfinite().all() and d.isfinite().all() and loss.permutation(s).dtype == dtype

@pytest.mark.parametrize("default", [torch.float, torch.double])
def test_leading_dimensions_no_grad_and_default_dtype(default, request):
    s, labels, y, cubes = torch.randn(2, 3, 5), torch.randint(4, (2, 3, 5)), torch.ones(2, 2), lambda y: (y**3).sum(1)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float))
    torch.set_default_dtype(default)
    with torch.no_grad():
        for f in (neural_sort, soft_sort, sorting_network):
            assert torch.allclose(f(s)[1, 2], f(s[1, 2])) and ranking_loss(f(s), true_permutation(labels)).shape == (2, 3)
        assert torch.equal(derivatives(cubes, y, second="full")[2], 6*torch.eye(2).to(y).expand(2, 2, 2))
        assert f(s).dtype == NewtonLoss(cubes)(y).dtype == torch.float
    same = s.argsort(stable=True).argsort() == labels.argsort(stable=True).argsort()  # as ranks
    assert torch.equal(exact_match(s, labels), same.all(-1)) and torch.allclose(element_match(s, labels), same.to(s).mean(-1))
