"""The automatic λ by explicit sums over samples, and what must not change it: units, order, how a batch is cut."""
import pytest
import torch
from torch.testing import assert_close

from newton_losses_nb import (
    Direction, DiagonalFisher, DiagonalHessian, Fisher, Hessian, Krylov, MovingAverage, NewtonLoss, Normalize,
    OutputLoss, PerSample, Remembering, Scalar, Whiten, Window)

UNITS = torch.tensor([1., 3, 10, .3], dtype=torch.float64)


def bumpy(y, u):
    "Outputs in different units, coupled, with an indefinite Hessian"
    z = (y - u)/UNITS.to(y)
    return z.square().sum(-1)/2 + (3*z).cos().sum(-1)/4 + (z.sum(-1)).tanh().square()


def data(N=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    y, u = (torch.randn(N, 4, generator=g, dtype=torch.float64)*UNITS for _ in range(2))
    return y, u


def derivatives(y, u):
    G = torch.func.vmap(torch.func.grad(bumpy))(y, u)
    return G, torch.func.vmap(torch.func.hessian(bumpy))(y, u)


def bound(G):
    "Factor on the length: less than 1 if a few samples are much longer than the others"
    lengths = G.norm(dim=1)
    even = lengths.pow(1/4).mean()**4/lengths.square().mean().sqrt()
    return even**(lengths.pow(4).sum()/lengths.square().sum()**2)

def typical(e, lam, order=0):
    "By definition: the power mean of the eigenvalues' sizes, each with λ₀"
    x = torch.stack([abs(x) + lam for x in e])
    return (x**order).mean()**(1/order) if order else x.prod()**(1/len(x))

def by_sums(kind, G, H):
    "The direction with the automatic λ, one sample after another"
    N, m = G.shape
    fisher = "fisher" in kind
    each = [torch.outer(g, g) for g in G] if fisher else list(H)
    if "diagonal" in kind: each = [c.diagonal().diag() for c in each]
    C = sum(each)/N
    e, V = torch.linalg.eigh(C)
    mu = e.abs().mean()
    noise = sum((c - C).square().sum() for c in each)/N/(N - 1)
    rho = (noise/sum((abs(x) - mu)**2 for x in e)).clamp(1e-6, 1 - 1e-6)
    lam = mu*rho/(1 - rho)
    if kind == "fisher": lam = lam.maximum(m*mu*(N**-.5 - 1/m))
    else: lam = lam + 2*(-e.min()).clamp_min(0)
    lam = typical(e, lam, int(fisher))
    D = torch.stack([torch.linalg.solve(C + lam*torch.eye(m).to(C), g) for g in G])
    return bound(G)*(mu + lam)*D


DIRECTIONS = {"fisher": Fisher(), "hessian": Hessian(), "diagonal": DiagonalHessian(),
              "diagonal fisher": DiagonalFisher()}


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("N", [3, 10, 40])
def test_explicit_sums(kind, N):
    y, u = data(N)
    _, D = OutputLoss(bumpy, DIRECTIONS[kind]).directions(y, u)
    assert_close(D, by_sums(kind, *derivatives(y, u)))


def test_no_more_directions_than_the_root_of_the_samples():
    "With 9 samples in 50 dimensions at most 3 directions are believed"
    g = torch.Generator().manual_seed(0)
    G = torch.randn(9, 50, generator=g, dtype=torch.float64)*torch.logspace(1, -1, 50)
    _, D = OutputLoss(lambda y, G: (y*G).sum(-1), Fisher()).directions(torch.zeros_like(G), G)
    mu = G.square().mean()
    lam = 50*mu*(1/3 - 1/50)
    F = G.mT @ G/9
    e = torch.linalg.eigvalsh(F)
    more = typical(e, lam, 1)
    assert_close(D, bound(G)*(mu + more)*torch.linalg.solve(F + more*torch.eye(50).to(F), G.mT).mT)
    assert (e/(e + lam)).sum() < 3


@pytest.mark.parametrize("power", [.2, .5, .8, 1., 1.3])
@pytest.mark.parametrize("N, m", [(40, 4), (9, 20)])
def test_power_of_a_fisher(power, N, m):
    "(F + λI)^(-p), λ the power mean of order 2p − 1 of all m eigenvalues, also where N < m; whitening: order 0"
    g = torch.Generator().manual_seed(1)
    G = torch.randn(N, m, generator=g, dtype=torch.float64)*torch.logspace(1, -1, m)
    loss = lambda y, G: (y*G).sum(-1)
    find = lambda direction: OutputLoss(loss, direction).directions(torch.zeros_like(G), G)[1]
    F, mu = G.mT @ G/N, G.square().mean()
    e, V = torch.linalg.eigh(F)
    each = [torch.outer(x, x) for x in G]
    rho = sum((c - F).square().sum() for c in each)/N/(N - 1)/(e - mu).square().sum()
    lam = (mu*rho/(1 - rho)).maximum(m*mu*(N**-.5 - 1/m))
    assert 0 < rho < 1
    lam = typical(e.clamp_min(0), lam, 2*power - 1)
    slow = bound(G)*(mu + lam)**power*(G @ V/(e + lam)**power) @ V.mT
    assert_close(find(Fisher(power=power)), slow)
    if power == .5: assert_close(find(Whiten()), slow)


@pytest.mark.parametrize("power", [.3, .5, .8, 1.])
def test_halfway_on_a_logarithmic_scale(power):
    "Eigenvalues known exactly, 10⁸ apart: factors at most 10⁴ apart, for Newton's step as for whitening"
    e = torch.logspace(-4, 4, 9, dtype=torch.float64)
    y = torch.cat([torch.eye(9), -torch.eye(9)]).double()
    _, D = OutputLoss(lambda y: (e*y.square()).sum(-1)/2, Hessian(power=power)).directions(y)
    factor = (D/(e*y).where(y != 0, 1)).amax(0)
    lam = 1e-6*e.mean()                                         # nothing but its least value
    lam = typical(e, lam, power - 1)
    assert_close(factor/factor[0], ((e[0] + lam)/(e + lam))**power)
    assert factor.amax()/factor.amin() < 1.1e4


ALL = [Fisher(), Hessian(), Hessian(eigenvalues="abs"), Hessian(eigenvalues="clip", power=.5), Whiten(), DiagonalFisher(),
       DiagonalHessian(), DiagonalHessian(probes=3), Krylov(tol=1e-12), Scalar(), Normalize(),
       Remembering(Fisher(), Window(2)), Remembering(Hessian(), MovingAverage(.5))]


@pytest.mark.parametrize("direction", ALL, ids=repr)
@pytest.mark.parametrize("factor", [1e-12, 1e-4, 1e4, 1e12])
def test_no_unit(direction, factor):
    "The loss times a factor, and the outputs in another unit: the same directions"
    y, u = data()
    find = lambda f, *a: OutputLoss(f, direction).directions(*a)[1]
    D = find(bumpy, y, u)
    own = type(direction) is Normalize                          # this has a length without unit
    length = 1 if own else factor
    assert_close(find(lambda y, u: factor*bumpy(y, u), y, u)/length, D, rtol=1e-6, atol=1e-8)
    unit = factor**.5
    assert_close(find(lambda y, u: bumpy(y/unit, u), unit*y, u)*(1 if own else unit), D, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("direction", ALL, ids=repr)
def test_bounded_and_safe_at_zero(direction):
    "About as long as the gradient, even if a sample explodes; zero for a gradient of zero"
    y, u = data()
    G, _ = derivatives(y, u)
    size = lambda x: x.square().mean().sqrt()
    _, D = OutputLoss(bumpy, direction).directions(y, u)
    if type(direction) is not Normalize: assert .1 < size(D)/size(G) < 20
    w = torch.ones(len(y)).to(y); w[3] = 1e6
    _, D = OutputLoss(lambda y, u, w: w*bumpy(y, u), direction).directions(y, u, w)
    assert size(D) < 2e3*size(G) < size(w[:, None]*G)/10
    _, D = OutputLoss(lambda y: (y - y.detach()).square().sum(-1), direction, check=False).directions(y)
    assert_close(D, torch.zeros_like(y))


@pytest.mark.parametrize("direction", ALL, ids=repr)
def test_order_and_pieces(direction):
    y, u = data()
    loss = OutputLoss(bumpy, direction)
    D = loss.directions(y, u)[1]
    assert_close(loss.directions(y.flip(0), u.flip(0))[1].flip(0), D)
    assert_close(OutputLoss(bumpy, direction, chunk_size=7).directions(y, u)[1], D)
    assert_close(loss.directions(y, u, mask=torch.ones_like(y, dtype=torch.bool))[1], D)
    both = loss.directions(torch.stack([y, y.flip(0)]), torch.stack([u, u.flip(0)]))[1]
    assert_close(both, torch.stack([D, D.flip(0)]))
    skip = OutputLoss(bumpy, direction, on_nonfinite="skip")
    more = [torch.cat([x, torch.full((2, 4), torch.nan).to(x)]) for x in (y, u)]
    assert_close(skip.directions(*more)[1][:-2], D)


def test_one_sample_alone():
    "A sample's own Hessian: half known, and as long as its gradient"
    y, u = data(6)
    G, H = derivatives(y, u)
    _, D = OutputLoss(bumpy, PerSample(Hessian(eigenvalues="abs"))).directions(y, u)
    for d, g, h in zip(D, G, H):
        e, V = torch.linalg.eigh(h)
        mu = e.abs().mean()
        lam = typical(e, mu)
        assert_close(d, (mu + lam)*V @ ((V.mT @ g)/(e.abs() + lam)))


def test_remembered_samples_are_samples():
    "Two halves in a window are one batch"
    y, u = data()
    loss = OutputLoss(bumpy, Remembering(Fisher(), Window(2))).train()
    for i in (slice(0, 20), slice(20, 40)): loss(y[i].clone().requires_grad_(), u[i])
    assert_close(loss.directions(y[20:], u[20:])[1].shape, y[20:].shape)
    loss.direction.reset()
    loss(y[:20].clone().requires_grad_(), u[:20])
    D = loss.directions(y[20:], u[20:])[1]
    G = derivatives(y, u)[0]
    whole = by_sums("fisher", G, None)
    assert_close(D, whole[20:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    y, u = data()
    _, D = NewtonLoss(bumpy).directions(y, u)
    _, low = NewtonLoss(bumpy).directions(y.to(dtype), u.to(dtype))
    assert torch.cosine_similarity(low.double().flatten(), D.flatten(), 0) > (.9999 if dtype == torch.float32 else .98)


def test_cosine():
    y, u = data()
    plain, newton = OutputLoss(bumpy, Direction()), NewtonLoss(bumpy)
    plain.directions(y, u)
    _, D = newton.directions(y, u)
    G = derivatives(y, u)[0]
    assert plain.cosine == pytest.approx(1)
    assert newton.cosine == pytest.approx(float((D*G).sum()/D.norm()/G.norm()))


@pytest.mark.parametrize("direction", ALL + [Hessian(.1), PerSample(Hessian()), PerSample(Fisher())], ids=repr)
def test_few_samples(direction):
    "None, or one: a value and a gradient, the first call included"
    for n in (0, 1):
        y, u = (x[:n] for x in data())
        y = y.clone().requires_grad_()
        OutputLoss(bumpy, direction)(y, u).backward()
        assert y.grad.shape == (n, 4) and y.grad.isfinite().all()


@pytest.mark.parametrize("direction", ALL, ids=repr)
def test_no_curvature_no_turn(direction):
    "A linear loss has no Hessian: what is sent back is the gradient"
    if not direction.second: pytest.skip("a Fisher")
    if direction.memory: direction.reset()                      # of the test above
    G = data()[0]
    linear = lambda y, G: (y*G).sum(-1) + 0*y.square().sum(-1)
    for unit in (False,) if direction.memory else (False, True):
        loss = OutputLoss(linear, PerSample(direction) if unit else direction, check=False)
        _, D = loss.directions(torch.zeros_like(G), G)
        assert_close(D, G if unit else bound(G)*G)

@pytest.mark.parametrize("fixed", (True, False))
def test_negative_curvature_makes_no_long_step(fixed):
    "A raw eigenvalue -a counts as a: no eigenvalue just above zero, and no step to a maximum"
    torch.manual_seed(0)
    saddle = lambda y: y[:, 0].square() - y[:, 1].square()/2 + (0 if fixed else y.pow(4).sum(1)/40)
    y = torch.randn(64, 2, dtype=torch.float64)
    G, D = (OutputLoss(saddle, d).directions(y)[1] for d in (Direction(), Hessian()))
    assert D.norm() < 2*G.norm() and ((D*G).sum(1) > 0).all()
    y = torch.full((16, 1), .2, dtype=torch.float64)
    loss = NewtonLoss(lambda y: (y.square() - 1).square().sum(1)/4, "hessian")
    for _ in range(200): y = y - .3*loss.directions(y)[1]
    torch.testing.assert_close(y, torch.ones_like(y))

@pytest.mark.parametrize("kind", ("fisher", "hessian"))
def test_explicit_sums_with_a_mask(kind):
    "What a sample lacks is zero in the sums that tell noise from curvature, and not counted in the mean"
    y, u = data(30)
    mask = torch.rand(30, 4, generator=torch.Generator().manual_seed(1)) < .7
    mask[:, 0] = True
    loss = lambda y, u: ((y - u)/UNITS[:y.shape[1]].to(y)).pow(4).sum(-1) + y.sum(-1).tanh()  # of sets of any size
    direction = {"fisher": Fisher(), "hessian": Hessian(eigenvalues="abs")}[kind]
    G, H = torch.zeros_like(y), torch.zeros(30, 4, 4).to(y)
    for i, real in enumerate(mask):
        a, b = y[i, real][None], u[i, real][None]
        at = real.nonzero()[:, 0]
        G[i, at] = torch.func.grad(lambda x: loss(x, b).sum())(a)[0]
        H[i][at[:, None], at] = torch.func.hessian(lambda x: loss(x, b).sum())(a)[0, :, 0]
    fisher = "fisher" in kind
    each = [torch.outer(g, g) for g in G] if fisher else list(H)
    N, m, n = 30, 4, mask.sum(0).to(y)
    C = sum(each)/(n[:, None]*n).sqrt()
    e = torch.linalg.eigvalsh(C).abs()
    noise = (sum(c.square().sum() for c in each)/N/(sum(each)/N).square().sum() - 1)/(N - 1)
    rho = noise/(1 - m*e.mean()**2/e.square().sum())
    lam = e.mean()*rho/(1 - rho)
    lam = typical(e, lam, int(fisher))
    assert 0 < rho < 1
    assert_close(OutputLoss(loss, direction).directions(y, u, mask=mask)[1][mask],
                 auto_by_number(loss, direction, lam, e.mean(), G)(y, u, mask)[mask])

def auto_by_number(loss, direction, lam, mu, G):
    "The same direction with λ as a number, and the length of an automatic one"
    fixed = type(direction)(lam.item(), **({"eigenvalues": "abs"} if isinstance(direction, Hessian) else {}))
    return lambda y, u, mask: bound(G)*(mu + lam)*OutputLoss(loss, fixed).directions(y, u, mask=mask)[1]


@pytest.mark.parametrize("direction, given", [(Fisher, False), (Whiten, False), (DiagonalFisher, True), (Hessian, True)])
def test_what_a_function_is_given(direction, given):
    "Eigenvalues of a matrix that is formed; of a Fisher's rows none, whatever its power"
    y, u = data()
    seen = []
    OutputLoss(bumpy, direction(lambda square, e: seen.append(e) or square)).directions(y, u)
    assert all((e is not None) == given for e in seen) and seen
