"""The step of every direction in float64, by loops and explicit sums as the specification has it.

Nothing of the package is used but the names at its front door, to build the direction that a
`Case` describes.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import newton_losses_nb as nl

# ---------------------------------------- losses, for any leading dimensions

def ce(y, t):
    "Cross-entropy of each sample"
    return -y.log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1)

def bumpy(y, u, w):
    "Coupled outputs, an indefinite Hessian; targets like y, one weight a sample"
    far = 3*(y.softmax(-1) - u.softmax(-1)).square().sum(-1) + (y - u).tanh().square().sum(-1)/2
    return w*(far + (y.sin()*y.roll(1, -1)).mean(-1))

def data(N, m, seed=0, lead=(), dtype=torch.float64):
    "Outputs, and targets and weights of `bumpy`"
    r = torch.Generator().manual_seed(seed)
    y, u = (torch.randn(*lead, N, m, generator=r, dtype=torch.float64) for _ in range(2))
    w = torch.rand(*lead, N, generator=r, dtype=torch.float64) + .5
    return tuple(x.to(dtype) for x in (y, u, w))

def holes(N, m, seed=0, lead=()):
    "A mask: an empty set, a full one, single outputs, and some chance"
    mask = torch.rand(*lead, N, m, generator=torch.Generator().manual_seed(seed)) > .4
    mask[..., 0, :], mask[..., 1, :] = True, False
    if N > 2: mask[..., 2, :] = torch.arange(m) == m - 1
    return mask

# ---------------------------------------------------------------- which direction

@dataclass(frozen=True)
class Case:
    "A direction, with each sample's `own` curvature or a `memory`: ('window', k), ('average', β)"
    kind: str
    lam: float = .3
    power: float = 1.
    eigenvalues: str = "raw"
    own: bool = False
    memory: tuple|None = None

    def __str__(self):
        shown = (self.kind, self.eigenvalues*(self.eigenvalues != "raw"),
                 f"p{self.power}"*(self.power != 1),
                 "own"*self.own, "".join(map(str, self.memory or ())))
        return "-".join(s for s in shown if s)

    def direction(self):
        "What the package is asked for"
        lam, e, p = self.lam, self.eigenvalues, self.power
        d = {"plain": lambda: nl.Direction(), "fisher": lambda: nl.Fisher(lam, power=p),
             "whiten": lambda: nl.Whiten(lam), "hessian": lambda: nl.Hessian(lam, e, power=p),
             "dfisher": lambda: nl.DiagonalFisher(lam),
             "dhessian": lambda: nl.DiagonalHessian(lam, e),
             "krylov": lambda: nl.Krylov(lam, tol=1e-13, max_iter=200),
             "clip": lambda: nl.Clip(lam),
             "normalize": lambda: nl.Normalize(), "scalar": lambda: nl.Scalar(lam)}[self.kind]()
        if self.own: d = nl.PerSample(d)
        if self.memory is None: return d
        kind, much = self.memory
        return nl.Remembering(d, nl.Window(much) if kind == "window" else nl.MovingAverage(much))

# ---------------------------------------------------------------- the reference

def samples(fn, y, args, mask=None, second=True, known={}):
    "Loss, gradient, Hessian, real outputs of each sample: none where a number is not finite"
    tensors = [y, *args] if mask is None else [y, *args, mask]
    key = fn, second, *[(x.shape, x.dtype, str(x.tolist())) for x in tensors]
    if key not in known: known[key] = _samples(fn, y, args, mask, second)
    return known[key]

def _samples(fn, y, args, mask, second):
    N, m = y.shape
    real = torch.ones(N, m, dtype=torch.bool) if mask is None else mask.clone()
    loss, G, H = (torch.zeros(N, *[m]*k, dtype=torch.float64) for k in range(3))
    for i in range(N):
        k = real[i].nonzero()[:, 0]
        if not len(k): continue
        own = [a[i, k] if a.shape == y.shape else a[i] for a in args]
        own = [(a.double() if a.is_floating_point() else a).unsqueeze(0) for a in own]
        f, x = lambda x: fn(x.unsqueeze(0), *own).squeeze(0), y[i, k].double()
        found = [f(x), torch.func.grad(f)(x),
                 torch.func.hessian(f)(x) if second else torch.zeros(1)]
        if not all(v.isfinite().all() for v in (x, *found)):
            real[i] = False
            continue
        loss[i], G[i, k] = found[:2]
        if second: H[i, k[:, None], k] = found[2]
    return loss, G, H, real

def mean_curvature(case, evidence):
    "C_ab, the weighted sum over the root of n_a n_b, where n_a counts the samples that have a"
    m = evidence[0][1].shape[-1]
    C, n = torch.zeros(m, m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    for w, G, H, real in evidence:
        for g, h, r in zip(G, H, real):
            C += w*(torch.outer(g, g) if "fisher" in case.kind or case.kind == "whiten" else h)
            n += w*r.double()
    n = torch.where(n > 0, n, 1)
    C = C/torch.outer(n, n).sqrt()
    return C.diagonal().diag() if case.kind[0] == "d" else C

def mean_square(evidence):
    "Squared entries of the gradients, each output's mean over the samples that have it"
    square = sum(w*G.square().sum(0) for w, G, _, _ in evidence)
    n = sum(w*real.double().sum(0) for w, _, _, real in evidence)
    return (square[n > 0]/n[n > 0]).mean()

def one_step(case, evidence, g, r):
    "The direction of one sample with gradient g and real outputs r"
    m = len(g)
    if case.kind == "plain" or not r.any(): return g
    if case.kind == "clip": return g*min(1., case.lam/float(g.norm().clamp_min(1e-300)))
    if case.kind == "normalize": return g/mean_square(evidence).sqrt()
    if case.kind == "scalar": return g/(mean_square(evidence)*m/max(m - 1, 1) + case.lam)
    k = r.nonzero()[:, 0]
    e, V = torch.linalg.eigh(mean_curvature(case, evidence)[k[:, None], k])
    e = {"raw": e, "abs": e.abs(), "clip": e.clamp_min(0)}[case.eigenvalues] + case.lam
    assert e.abs().min() > .01*e.abs().max(), "a case that says little: C + λI nearly singular"
    d = torch.zeros_like(g)
    d[k] = V @ torch.diag(e**-(.5 if case.kind == "whiten" else case.power)) @ V.T @ g[k]
    return d

def step(case, fn, *batches):
    "Mean loss, directions D, D/n for the last of some batches (y, args, mask)"
    second = "hessian" in case.kind or case.kind == "krylov"
    seen = [samples(fn, y, args, mask, second) for y, args, mask in batches]
    loss, G, H, real = seen[-1]
    weight = {None: lambda age: float(age == 0), "window": lambda age: float(age < case.memory[1]),
              "average": lambda age: case.memory[1]**age}[case.memory and case.memory[0]]
    evidence = [(weight(len(seen) - 1 - i), *s[1:]) for i, s in enumerate(seen)]
    own = lambda i: [(1., G[i:i+1], H[i:i+1], real[i:i+1])]
    D = [one_step(case, own(i) if case.own else evidence, G[i], real[i]) for i in range(len(G))]
    D = torch.stack(D) if D else G
    part = real.any(1)
    n = max(int(part.sum()), 1)
    return loss[part].sum()/n, D, D/n

def each(case, fn, *batches):
    "`step` for each leading index: values and gradients"
    lead = batches[0][0].shape[:-2]
    out = []
    for i in range(lead.numel()):
        flat = lambda x: None if x is None else x.reshape(-1, *x.shape[len(lead):])[i]
        own = [(flat(y), [*map(flat, args)], flat(mask)) for y, args, mask in batches]
        out.append(step(case, fn, *own))
    value, _, grad = (torch.stack(x) for x in zip(*out))
    return value.view(lead), grad.view(*lead, *grad.shape[1:])

# ---------------------------------------------------------------- calling and comparing

def run(loss, y, *args, mask=None):
    "Value and gradient of a loss"
    y = y.detach().clone().requires_grad_()
    value = loss(y, *args) if mask is None else loss(y, *args, mask=mask)
    value.sum().backward()
    return value.detach(), y.grad

def relative(got, want):
    "Largest difference, relative to the largest entry"
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.numel(): return 0.
    assert got.isfinite().all(), "not finite"
    got, want = got.double(), want.double()
    return float((got - want).abs().max()/want.abs().max().clamp_min(1e-300))

def close(got, want, tol=1e-10):
    "Assert that tensors agree"
    error = relative(got, want)
    assert error < tol, f"relative difference {error:.2g}:\n{got}\n{want}"

# ---------------------------------------------------------------- no operation looks at a number

LOOKS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "allclose", "nonzero",
         "nonzero_numpy",
         "masked_select", "_unique", "_unique2", "unique_dim", "bincount"}

class NeverLooks(TorchDispatchMode):
    "A context in which an operation that looks at numbers is an error; LAPACK may"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        chosen = lambda: any(isinstance(i, Tensor) and i.dtype == torch.bool
                             for i in tree_leaves(args[1]))
        new = name == "lift_fresh" and args[0].ndim > 0
        if name in LOOKS or new or name.startswith("index") and chosen():
            raise RuntimeError(f"{name} looks at numbers, or fetches some from Python")
        return func(*args, **(kwargs or {}))
