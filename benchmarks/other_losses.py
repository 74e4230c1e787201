"""Other losses than sorts and paths: the defaults, whitening and a control beside the plain loss.

    python benchmarks/other_losses.py --out nbs/results/other_losses_cpu/runs.jsonl

Each method trains a small network with Adam at the learning rate that suits the plain loss, the
same seeds, data and first weights. Recorded are the mean loss on new data, and what `check_loss`
advises on the first outputs. What is in the file already is not run again.
"""
import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from tqdm import tqdm

from newton_losses_nb import Direction, Fisher, Hessian, Normalize, OutputLoss, Whiten, check_loss
from newton_losses_nb.lab.records import environment

STEPS, BATCH, TEST, SEEDS = 250, 64, 1500, range(10)

METHODS = {"plain": Direction(), "default": Fisher(), "default, Hessian": Hessian(),
           "whiten": Whiten(), "normalised": Normalize()}

# ---------------------------------------------------------------- losses and their data

class Problem(NamedTuple):
    "A loss, the network's layers, its learning rate, and batches of inputs and arguments"
    loss: object
    layers: tuple
    lr: float
    draw: object                      # (n, generator, test?) -> x, arguments

PROBLEMS = {}
def seeded(seed): return torch.Generator().manual_seed(seed)
def turn(m, seed): return torch.linalg.qr(torch.randn(m, m, generator=seeded(seed)))[0]

def features(x):
    a, b, c = x.unbind(-1)
    return torch.stack([(2*a + b).sin(), (2*b).cos()*c, a*c - b, (2*c).tanh() + a*a], -1)

def problem(name, layers, lr, target):
    "Register a loss whose arguments are made from the features of random inputs"
    def draw(n, g, test):
        x = 2*torch.rand(n, 3, generator=g) - 1
        return x, target(features(x), g, test)
    return lambda loss: PROBLEMS.setdefault(name, Problem(loss, layers, lr, draw))

TURN, UNITS = turn(3, 5), torch.tensor([1., 1e3, 1e-4])
@problem("units 1, 1000, 1e-4", (3, 48, 48, 3), .03, lambda f, g, test: (f[:, :3]*UNITS @ TURN.T,))
def units(y, t): return (((y - t) @ TURN.to(y))/UNITS.to(y)).square().sum(1)/2

CHAIN = torch.tensor([[1., 0, 0, 0], [8, 1, 0, 0], [0, -20, 1, 0], [3, 0, 50, 1]])
@problem("chain, Huber", (3, 48, 48, 4), .01, lambda f, g, test: (f,))
def chain(y, t):
    y, t = (x @ CHAIN.to(y).T for x in (y, t))
    return F.huber_loss(y, t, reduction="none").sum(1)

FLAT, WEIGHTS = turn(4, 9), torch.tensor([10., 3., .5, .1])
def noisy(f, g, test):
    noise = torch.tensor([0., 0., 1., 8.])*torch.randn(f.shape, generator=g)
    return (f + (0 if test else noise)) @ FLAT.T,
@problem("flat outputs are noise", (3, 48, 48, 4), .01, noisy)
def mahalanobis(y, t): return (((y - t) @ FLAT.to(y))*WEIGHTS.to(y)).square().sum(1)/2

EXPOSURE = torch.tensor([.2, 10., 500.])
@problem("Poisson", (3, 48, 48, 3), .03,
         lambda f, g, test: (torch.poisson(EXPOSURE*(.7*f[:, :3]).exp(), generator=g),))
def poisson(y, k): return (EXPOSURE.to(y)*y.exp() - k*y).sum(1)

LEVELS = torch.tensor([.05, .25, .5, .75, .95])
@problem("quantiles", (3, 48, 48, 5), .03, lambda f, g, test: (
    (f[:, 0] + f[:, 1].exp()*.5*torch.randn(len(f), generator=g))[:, None],))
def pinball(y, t): return torch.maximum(LEVELS.to(y)*(t - y), (LEVELS.to(y) - 1)*(t - y)).sum(1)

def spread(f, g, test):
    noise = (f[:, 2:] - 1).exp()*torch.randn(len(f), 2, generator=g)
    return f[:, :2]*torch.tensor([1., 30.]) + torch.tensor([1., 3.])*noise,
@problem("mean and variance", (3, 48, 48, 4), .03, spread)
def likelihood(y, t):
    mean, log = y.chunk(2, 1)
    return (.5*log + .5*(t - mean)**2*(-log).exp()).sum(1)

WAYS = torch.cartesian_prod(*[torch.arange(3)]*4)
WAYS = F.one_hot(WAYS[(WAYS.diff(dim=1).abs() < 2).all(1)], 3).flatten(1).float()
COSTS = torch.randn(4, 12, generator=seeded(3))
@problem("soft shortest path", (3, 48, 48, 12), .03, lambda f, g, test: (
    F.softplus(f @ COSTS + .3*torch.randn(len(f), 12, generator=g)),))
def expected_cost(y, c):
    y, c = (x @ WAYS.to(y).T for x in (y, c))
    return ((-y/.3).softmax(1)*c).sum(1) - c.amin(1)

def risk(f, g):
    time = torch.empty(f.shape).exponential_(1, generator=g)/f.exp()
    censored = torch.empty(f.shape).exponential_(.5, generator=g)
    return torch.minimum(time, censored), (time < censored).float()
def draw_sets(n, g, test):
    x = 2*torch.rand(n, 8, 3, generator=g) - 1
    return x, risk(features(x).sum(-1), g)
def cox(y, t, event):
    order = t.argsort(1)
    y, event = y.gather(1, order), event.gather(1, order)
    return ((y.flip(1).logcumsumexp(1).flip(1) - y)*event).sum(1)
PROBLEMS["Cox, sets of 8"] = Problem(cox, (3, 32, 32, 1), .03, draw_sets)

digits = load_digits()
mixed = torch.randperm(len(digits.data), generator=seeded(1))
IMAGES, LABELS = (torch.tensor(digits.data/16).float()[mixed], torch.tensor(digits.target)[mixed])
def draw_digits(n, g, test):
    i = torch.arange(1000, len(LABELS)) if test else torch.randint(0, 1000, (n,), generator=g)
    return IMAGES[i], (LABELS[i],)
PROBLEMS["cross-entropy, digits"] = Problem(partial(F.cross_entropy, reduction="none"),
                                            (64, 64, 10), .03, draw_digits)

people = load_diabetes()
mixed = torch.randperm(len(people.data), generator=seeded(2))
BODY, DISEASE = (torch.tensor(o[mixed.numpy()]).float() for o in (people.data*20, people.target/100))
def draw_people(n, g, test):
    low, high = (300, len(BODY)) if test else (0, 300)
    i = torch.stack([low + torch.randperm(high - low, generator=g)[:6] for _ in range(n)])
    return BODY[i], (DISEASE[i],)
def pairs(y, t):
    worse = (t[:, :, None] > t[:, None]).to(y)
    return (F.softplus(y[:, None] - y[:, :, None])*worse).sum((1, 2))
PROBLEMS["ranking, diabetes"] = Problem(pairs, (10, 32, 1), .01, draw_people)

HOURS = torch.logspace(-2, 2, 20)        # Added later, after a reader found harm there
def decay(y):
    fast = 3*y[:, :1].exp()
    slow = fast*(-2 - F.softplus(y[:, 1:2])).exp()
    return y[:, 2:3]*(-fast*HOURS.to(y)).exp() + y[:, 3:]*(-slow*HOURS.to(y)).exp()
@problem("two exponentials", (3, 48, 48, 4), .03,
         lambda f, g, test: (decay(f.tanh() + torch.tensor([0., 0., 1., 1.])),))
def squares(y, c): return (decay(y) - c).square().sum(1)

TIMES = torch.linspace(0, 1, 20)         # Added later still, for the same reason
POWERS = torch.stack([TIMES**k for k in range(6)])
def curves(f, g, test):
    noise = (0 if test else .1)*torch.randn(len(f), 20, generator=g)
    return torch.cat([f, f[:, :2]*f[:, 2:]], 1)*torch.tensor([1., 2, 4, 4, 4, 4]) @ POWERS + noise,
@problem("polynomial", (3, 48, 48, 6), .03, curves)
def fit_curve(y, c): return (y @ POWERS.to(y) - c).square().sum(1)/2

# Regressions made after the rule for λ was fixed; `spread` is how far apart the outputs' units are
def waves(x, m):
    h = (x @ (1.5*torch.randn(4, 2*m, generator=seeded(3)))).sin()
    return h[:, :m] + .5*h[:, m:]*h[:, :m]

def fresh(name, shape, m, spread, lr, in_units=True, noise=0., mix=None, white=False):
    """`shape` of the residual in units that are mixed; are the targets of those sizes, too? Noise is
    like them, or `white` in the loss's units and in the training data only."""
    if mix is None: mix = turn(m, 11)*torch.logspace(0, math.log10(spread), m)
    def draw(n, g, test):
        x = 2*torch.rand(n, 4, generator=g) - 1
        u, inverse = waves(x, m), torch.linalg.inv(mix)
        v = noise*torch.randn(n, m, generator=g)
        if not white: u, v = u + v, 0.*v
        if in_units: u = u @ inverse
        return x, (u if test else u + v @ inverse,)
    def loss(y, t): return shape((y - t) @ mix.to(y))
    PROBLEMS[f"fresh: {name}"] = Problem(loss, (4, 64, 64, m), lr, draw)

def square(r): return r.square().sum(1)/2
def log_cosh(r): return (r.abs() + F.softplus(-2*r.abs()) - math.log(2)).sum(1)
def huber(r): return F.huber_loss(r, torch.zeros_like(r), reduction="none").sum(1)
def root(r): return (r.square().sum(1) + 1).sqrt()
fresh("4 units", square, 4, 1e2, .003)
fresh("4 units, targets alike", square, 4, 1e2, .03, in_units=False)
fresh("3 units, noise", square, 3, 10., .01, noise=.3)
fresh("6 units, Huber", huber, 6, 10**1.5, .01)
fresh("8 units, log-cosh", log_cosh, 8, 1e3, .003, noise=.1)
fresh("3 units, root, targets alike", root, 3, 1e2, .01, in_units=False, noise=.5)
fresh("16 units", square, 16, 1e2, .003)
fresh("2 units, log-cosh, targets alike", log_cosh, 2, 10., .03, in_units=False)

# Quadratic losses, made when `check_loss` was found to advise the Hessian where it did harm: does
# that depend on the targets' sizes, those of the loss's units or all alike, or on their noise?
MIXES = {"12 units": (turn(12, 21)*torch.logspace(0, 2, 12), .01),
         "sums": (torch.ones(10, 10).triu(), .01),
         "differences": (1.03*torch.eye(12) - torch.eye(12).roll(1, 1), .03)}
for name, (mix, lr) in MIXES.items():
    fresh(name, square, len(mix), None, lr, noise=.3, mix=mix)
    fresh(f"{name}, targets alike", square, len(mix), None, .03, False, .3, mix)
    fresh(f"{name}, much noise", square, len(mix), None, lr, True, 3., mix, True)
    fresh(f"{name}, targets alike, much noise", square, len(mix), None, .03, False, 3., mix, True)

# ---------------------------------------------------------------- training

def network(layers):
    pairs = [(nn.Linear(a, b), nn.Tanh()) for a, b in zip(layers, layers[1:])]
    return nn.Sequential(*[o for pair in pairs for o in pair][:-1])

def outputs(net, x):
    y = net(x)
    return y.squeeze(-1) if x.ndim == 3 else y

def train(net, loss, lr, steps, batches):
    "Adam with a rate that falls to zero; yields after each step"
    adam = torch.optim.Adam(net.parameters(), lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for x, args in batches:
        adam.zero_grad()
        loss(outputs(net, x), *args).backward()
        adam.step(); rate.step()
        yield

def run(problem, method, seed):
    "Mean loss on new data after training, and the mean cosine to the gradient"
    torch.manual_seed(seed)
    net, g, cosine = network(problem.layers), seeded(seed), 0.
    loss = OutputLoss(problem.loss, METHODS[method])
    batches = (problem.draw(BATCH, g, False) for _ in range(STEPS))
    for _ in train(net, loss, problem.lr, STEPS, batches): cosine += loss.cosine/STEPS
    x, args = problem.draw(TEST, seeded(424242), True)
    with torch.no_grad():
        wide = [a.double() if a.is_floating_point() else a for a in args]
        value = float(problem.loss(outputs(net, x).double(), *wide).mean())
    return value if math.isfinite(value) else math.inf, cosine

def advice(problem, seed):
    "The line that `check_loss` recommends on the first batch"
    torch.manual_seed(seed)
    x, args = problem.draw(BATCH, seeded(seed), False)
    return check_loss(problem.loss, outputs(network(problem.layers), x).detach(), *args).line

def stored(file):
    "What is in a file of results; half a line at its end is cut off"
    file.parent.mkdir(parents=True, exist_ok=True)
    *lines, rest = (file.read_text() if file.exists() else "").split("\n")
    found = list(map(json.loads, lines))                # raises if this is another file
    if rest: file.write_text("".join(f"{o}\n" for o in lines))
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", required=True, type=Path, help="file of results, one run a line")
    a = p.parse_args()
    torch.set_num_threads(1)
    try: done = {(r["loss"], r["method"], r["seed"]) for r in stored(a.out)}
    except (OSError, ValueError, KeyError) as e: p.error(f"--out: expected a file of its results, got {a.out} ({e})")
    todo = [(n, m, s) for n in PROBLEMS for m in (*METHODS, "advice") for s in SEEDS
            if (n, m, s) not in done]
    about = environment("cpu")
    about.pop("command")
    with a.out.open("a") as file:
        for name, method, seed in tqdm(todo):
            record = dict(loss=name, method=method, seed=seed)
            if method == "advice": record["line"] = advice(PROBLEMS[name], seed)
            else: record |= zip(("value", "cosine"), run(PROBLEMS[name], method, seed))
            record |= about
            file.write(json.dumps(record) + "\n")
            file.flush()

if __name__ == "__main__": main()
