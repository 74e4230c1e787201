"""Our operations, each beside the same one of another library, as a ratio.

    python benchmarks/speed.py --groups networks paths
    python benchmarks/speed.py --out nbs/results/speed_cpu.jsonl

Both sides get the same input, their results are compared before the clock starts, and blocks
of calls alternate, so that what slows the machine slows both. With --out each result is one more
line of a file; those of this commit and machine that it has already are not measured again.
"""
import argparse
import functools
import importlib.metadata
import math
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils import benchmark

import newton_losses_nb
from newton_losses_nb import (
    Clip, FenchelYoungLoss, Fisher, Hessian, Noise, OutputLoss, SortingLoss, neural_sort,
    relaxed_bellman_ford, shortest_path, soft_sort, sorting_network, true_permutation)
from newton_losses_nb.core.derivatives import derivatives
from newton_losses_nb.lab.models import NETWORKS, make_network
from newton_losses_nb.lab.records import append_run, environment, open_results, run_key


class Setup(NamedTuple):
    "Both sides of a case"
    ours:Callable           # Function of the inputs
    theirs:Callable         # The peer's
    inputs:tuple=()         # Floating-point tensors
    check:tuple|None=None   # Functions to compare instead; empty: nothing to compare
    base:float=0.           # Seconds that both sides need besides

class Case(NamedTuple):
    "One row of the table; all but `make` is part of the key of its stored results"
    group:str               # Which part of the benchmark
    name:str                # Operation
    size:str                # Of the input, in words
    measure:str             # "forward", "both" (forward and backward) or "call"
    make:Callable           # Builds the `Setup`
    needs:tuple=()          # What the peer consists of, as PyPI calls it; none: ours, plain
    target:float|None=None  # Ratio to reach
    at_most:bool=False      # Is the ratio ours/theirs, and small good?

def random(*shape, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

def both(f, *inputs):
    "Forward, and backward from random numbers, as a function without arguments"
    weight = random(*f(*inputs).shape, device=inputs[0].device, seed=1)
    return lambda: f(*(x.detach().requires_grad_() for x in inputs)).backward(weight)

def difference(setup, measure):
    "Largest difference of values, and of gradients if measured; None: nothing to compare"
    if setup.check == (): return None
    def found(f):
        xs = [x.detach().requires_grad_(measure == "both") for x in setup.inputs]
        out = f(*xs)
        weight = random(*out.shape, device=out.device, seed=1)
        return out.detach(), *(torch.autograd.grad(out, xs, weight) if measure == "both" else ())
    pairs = zip(*map(found, setup.check or (setup.ours, setup.theirs)))
    off = [(a - b).abs().max()/b.abs().max().clamp_min(1) for a, b in pairs]
    return float(torch.stack(off).max())

def interleave(ours, theirs, rounds=9, seconds=0.5, base=0., clock=benchmark.timer):
    "Median seconds of two functions in alternating blocks, and quartiles of theirs/ours"
    threads = torch.get_num_threads()
    timers = [benchmark.Timer("f()", globals={"f": f}, num_threads=threads, timer=clock)
              for f in (ours, theirs)]
    once = [max(t.timeit(1).median, 1e-9) for t in timers]
    if max(once) > seconds: rounds = min(rounds, 3)
    blocks = np.empty((rounds, 2))
    for k in range(rounds):
        for i in (0, 1) if k % 2 == 0 else (1, 0):
            number = max(1, int(seconds/rounds/once[i]))
            blocks[k, i] = timers[i].timeit(number).median + base
    low, ratio, high = np.quantile(blocks[:, 1]/blocks[:, 0], (.25, .5, .75)).tolist()
    a, b = np.median(blocks, 0).tolist()
    return {"ours": a, "theirs": b, "low": low, "ratio": ratio, "high": high, "rounds": rounds}

def measure_case(case, rounds=9, seconds=0.5, clock=benchmark.timer):
    "Compare the results of a case, then its times"
    peer = ", ".join(f"{o} {importlib.metadata.version(o)}" for o in case.needs) or "plain"
    setup = case.make()
    off = difference(setup, case.measure)
    if off is not None and not off <= 1e-3: raise ValueError(f"results differ by {off:.1e}")
    def timed(f):
        if case.measure == "both": return both(f, *setup.inputs)
        call = lambda: f(*setup.inputs)
        return torch.no_grad()(call) if case.measure == "forward" else call
    sides = timed(setup.ours), timed(setup.theirs)
    t = interleave(*sides, rounds, seconds, setup.base, clock)
    if case.at_most: t |= {"low": 1/t["high"], "ratio": 1/t["ratio"], "high": 1/t["low"]}
    return {**t, "difference": off, "peer": peer}

def measured(task, items, measure, device, out):
    "Records: those of this commit and machine in a file, and the others, measured and added to it"
    env = environment(device)
    file, done = open_results(out.parent, out.stem, False) if out else (None, {})
    fixed = {"task": task, "seed": 0, "device": device, "threads": torch.get_num_threads()}
    for config, item in items:
        config, start = fixed | config, time.perf_counter()
        key = run_key(config, env["device_name"])
        record = done.get(key)
        if record is None or record["git_commit"] != env["git_commit"]:
            try: result, error = measure(item), None
            except Exception as e: result, error = None, f"{type(e).__name__}: {e}"
            record = {
                "format": 1, "key": key, "status": "failed" if error else "ok", "error": error,
                "config": config, "data_source": "random numbers", **env, "curves": {},
                "result": result, "seconds": round(time.perf_counter() - start, 3),
                "finished": datetime.now(timezone.utc).isoformat(timespec="seconds")}
            if file and result: append_run(file, record)
        yield record


BATCH = {5: 100, 10: 100, 16: 100, 64: 32, 256: 4, 1024: 1}

def network_cases(device):
    "Sorting networks beside diffsort, which gives the transposed matrix"
    def pair(n, plan, relaxation):
        from diffsort import DiffSortNet
        peer = DiffSortNet(plan, n, device=device, steepness=10., distribution=relaxation)
        ours = lambda s: sorting_network(s, plan, relaxation, 10.)
        return Setup(ours, lambda s: peer(s)[1], (random(BATCH[n], n, device=device),),
                     (ours, lambda s: peer(s)[1].mT))
    for plan, sizes in ("odd_even", (5, 10, 16, 64, 256)), ("bitonic", (16, 64, 256)):
        for n in sizes:
            for relaxation in ("cauchy", "logistic"):
                name = "networks", f"{plan}, {relaxation}", f"{BATCH[n]} x {n}"
                make = functools.partial(pair, n, plan, relaxation)
                yield Case(*name, "forward", make, ("diffsort",))
                yield Case(*name, "both", make, ("diffsort",), 2. if n <= 16 else 3.)

def relaxation_cases(device):
    "NeuralSort and SoftSort beside difftopk, which sorts the other way round"
    def pair(n, name):
        import difftopk
        ours, theirs, turned = {
            "neural_sort": (neural_sort, difftopk.NeuralSort(tau=1.), lambda P: P.mT),
            "soft_sort": (soft_sort, difftopk.SoftSort(tau=1.), lambda P: P.flip(-2))}[name]
        return Setup(ours, theirs, (random(BATCH[n], n, device=device),),
                     (ours, lambda s: turned(theirs(s))))
    targets = {("neural_sort", 5): 1., ("soft_sort", 5): 1., ("neural_sort", 1024): 3.}
    for name in ("neural_sort", "soft_sort"):
        for n in (5, 10, 64, 1024):
            for measure in ("forward", "both"):
                yield Case("relaxations", name, f"{BATCH[n]} x {n}", measure,
                           functools.partial(pair, n, name), ("difftopk",), targets.get((name, n)))


def grid_edges(H, W):
    "Edges between neighbouring cells by their starts: where each start's begin, ends, starts"
    i, j = np.divmod(np.arange(H*W, dtype=np.int32), W)
    far = np.maximum(abs(i[:, None] - i), abs(j[:, None] - j))
    u, v = (far == 1).nonzero()
    return np.searchsorted(u, np.arange(H*W + 1)).astype(np.int32), v.astype(np.int32), u

def scipy_path(H, W):
    "Cells of the cheapest path through one map; the structure of the graph is made once"
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra
    start, v, _ = grid_edges(H, W)
    def solve(c):
        graph = csr_array((c[v], v, start), shape=(H*W, H*W))
        before, path = dijkstra(graph, indices=0, return_predecessors=True)[1], [H*W - 1]
        while path[-1]: path.append(before[path[-1]])
        return path
    return solve

def rustworkx_path(H, W):
    "The same by a graph that looks the weights up in the map"
    import rustworkx
    _, v, u = grid_edges(H, W)
    graph = rustworkx.PyDiGraph()
    graph.add_nodes_from(range(H*W))
    graph.add_edges_from(list(zip(u.tolist(), v.tolist(), v.tolist())))
    def solve(c):
        cost = c.tolist().__getitem__
        paths = rustworkx.dijkstra_shortest_paths(graph, 0, H*W - 1, weight_fn=cost)
        return list(paths[H*W - 1])
    return solve

def exact_path_cases():
    "Exact paths beside solvers that take one map at a time"
    def pair(new):
        cost = torch.rand(300, 12, 12, generator=torch.Generator().manual_seed(0))*9 + 1
        path = new(12, 12)
        def solve(cost):
            out = np.zeros((len(cost), 144), np.float32)
            for c, marks in zip(cost.flatten(1).numpy(), out): marks[path(c)] = 1
            return torch.from_numpy(out).view_as(cost)
        return Setup(shortest_path, solve, (cost,))
    for name, new, target in ("scipy", scipy_path, 10.), ("rustworkx", rustworkx_path, None):
        yield Case("paths", f"shortest_path, {name}", "300 maps, 12 x 12", "forward",
                   functools.partial(pair, new), (name,), target)

def algovision_paths(beta, n_iter, loop):
    "Relaxed Bellman-Ford as a program for AlgoVision"
    from algovision import Algorithm, For, Input, Let, Output, Var, While
    from algovision.conditions import LEq
    far, pad = 1e12, torch.nn.functional.pad
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    def sweep(d, cost):
        H, W = cost.shape[1:]
        u = torch.stack([d[:, 1+i:1+i+H, 1+j:1+j+W] for i, j in around], -1)
        pi = (-beta*u).softmax(-1)
        return pad((pi*u).sum(-1) + cost, (1, 1, 1, 1), value=far), pi
    def flow(at, pi):
        moved = (at[..., None]*pi).unbind(-1)
        parts = [pad(x, (1 + j, 1 - j, 1 + i, 1 - i)) for x, (i, j) in zip(moved, around)]
        return sum(parts)[:, 1:-1, 1:-1]
    zeros = lambda cost: torch.zeros(cost.shape[1:])
    border = lambda cost: torch.full((cost.shape[1] + 2, cost.shape[2] + 2), far)
    walk = Let("tracked", lambda tracked, at: tracked + at - tracked*at), Let("at", flow)
    on = LEq(lambda tracked: tracked[:, 0, 0], 1.)
    return Algorithm(
        Input("cost"), Var("d", border), Var("pi", lambda cost: torch.zeros(*cost.shape[1:], 8)),
        Var("at", zeros), Var("tracked", zeros), Let("d", [1, 1], 0.), Let("at", [-1, -1], 1.),
        For("i", n_iter, Let(["d", "pi"], sweep), Let("d", [1, 1], 0.)),
        For("k", n_iter, *walk) if loop == "for" else While(on, *walk),
        Output("tracked"), beta=beta)

def bellman_ford_cases(device):
    "Relaxed Bellman-Ford beside AlgoVision, a batch as in the paper"
    def pair(loop):
        cost = torch.rand(70, 12, 12, generator=torch.Generator().manual_seed(0)) + 0.2
        return Setup(lambda c: relaxed_bellman_ford(c, 10., 24, loop),
                     algovision_paths(10., 24, loop), (cost.to(device),))
    for loop in ("for", "while"):
        for measure in ("forward", "both"):
            yield Case("paths", f"relaxed_bellman_ford, {loop}", "70 maps, 12 x 12", measure,
                       functools.partial(pair, loop), ("algovision",), 3.)

@functools.cache
def compiled_path():
    "Mark the cheapest path of a map: sweeps to and fro until no distance changes, then back"
    import numba
    @numba.njit
    def nearest(d, i, j):
        best, p, q = d[i+1, j+1], i, j
        for a in range(i, i + 3):
            for b in range(j, j + 3):
                if d[a, b] < best: best, p, q = d[a, b], a - 1, b - 1
        return p, q
    @numba.njit
    def solve(cost, path):
        H, W = cost.shape
        d = np.full((H + 2, W + 2), np.inf, cost.dtype)
        d[1, 1] = cost[0, 0]
        moved, turn = True, 0
        while moved or turn % 2:
            moved = False
            for k in range(1, H*W):
                i, j = divmod(k if turn % 2 == 0 else H*W - k, W)
                above, below = min(d[i, j], d[i, j+1]), min(d[i+2, j], d[i+2, j+1])
                beside = min(min(d[i, j+2], d[i+1, j]), min(d[i+1, j+2], d[i+2, j+2]))
                near = min(min(above, below), beside) + cost[i, j]
                if near < d[i+1, j+1]: d[i+1, j+1], moved = near, True
            turn += 1
        i, j = H - 1, W - 1
        path[:] = 0
        path[i, j] = 1
        while i or j:
            i, j = nearest(d, i, j)
            path[i, j] = 1
    return solve

def compiled_grid(H, W):
    "PyEPO's model of a grid, with the compiled solver"
    from pyepo.model.opt import optModel
    class Grid(optModel):
        num_cost = property(lambda self: H*W)
        def _getModel(self): return None, list(range(H*W))
        def setObj(self, c): self.c = np.maximum(np.asarray(c), 1e-3).reshape(H, W)
        def solve(self):
            path = np.empty_like(self.c)
            compiled_path()(self.c, path)
            return path.ravel(), float((path*self.c).sum())
    return Grid()

def flat_solver(c):
    side = math.isqrt(c.shape[-1])
    return shortest_path(c.clamp(min=1e-3).unflatten(-1, (side, side))).flatten(-2)

def noisy_paths(samples): return FenchelYoungLoss(flat_solver, Noise(samples=samples))

def fenchel_young_cases(device):
    "The Fenchel-Young loss beside PyEPO, whose value lacks the true path under the noise"
    def pair(samples):
        from pyepo.func import perturbedFenchelYoung
        y, true = torch.rand(2, 70, 144, generator=torch.Generator().manual_seed(0)).to(device)
        w, ours = flat_solver(true + 0.1), noisy_paths(samples)
        new = functools.partial(perturbedFenchelYoung, compiled_grid(12, 12), samples, seed=135,
                                reduction="none")
        seed, theirs = torch.Generator(device).manual_seed(135), new()
        noise = torch.randn(70, samples, 144, generator=seed, device=device)
        def with_this_noise(y):
            torch.manual_seed(135)
            return ours(y, w)
        return Setup(lambda y: ours(y, w), lambda y: theirs(y, w), (4*y + 0.5,),
                     (with_this_noise, lambda y: new()(y, w) + (noise.mean(1)*w).sum(1)))
    for samples in (3, 10, 30):
        yield Case("paths", "FenchelYoungLoss", f"70 maps, 12 x 12, {samples} samples", "both",
                   functools.partial(pair, samples), ("pyepo", "numba"), 1.5)

def path_cases(device):
    if torch.device(device).type == "cpu": yield from exact_path_cases()
    yield from bellman_ford_cases(device)
    yield from fenchel_young_cases(device)


def scores(N, n, device):
    "Scores and true permutations"
    T = true_permutation(random(N, n, seed=1), torch.float32)
    return random(N, n, device=device), T.to(device)

def hessian_cases(device):
    "Hessians of every sample beside torch.func; names as in version 0.1, for the stored results"
    def pair(relaxation, n, fuse):
        s, T = scores(100, n, device)
        loss = SortingLoss(relaxation, "bce", fuse=fuse)
        theirs = torch.func.vmap(torch.func.hessian(lambda s, T: loss(s[None], T[None])[0]))
        return Setup(lambda s: derivatives(loss, s, T, second="full", check=False)[2],
                     lambda s: theirs(s, T), (s,))
    closed = [(r, f, 20.) for f in (False, True) for r in ("neural_sort", "soft_sort")]
    for relaxation, fuse, target in *closed, ("logistic", False, 4.), ("cauchy", False, 4.):
        for n in (5, 10):
            name = f"per_sample_hessian, {relaxation}{', fuse=True'*fuse}", f"100 x {n}"
            make = functools.partial(pair, relaxation, n, fuse)
            yield Case("hessians", *name, "call", make, ("torch",), target)


DIRECTIONS = {"fisher": Fisher(), "hessian": Hessian(), "clip": Clip(0.1)}

def losses(relaxation, method):
    "A sorting loss with a direction, and its plain mean"
    loss = SortingLoss(relaxation, "bce", tau=0.3, steepness=10.)
    return OutputLoss(loss, DIRECTIONS[method]), lambda s, T: loss(s, T).mean()

def alone(device, relaxation, n, method):
    "Both losses, forward and backward to the scores"
    s, T = scores(100, n, device)
    def once(loss, s):
        value = loss(s.detach().requires_grad_(), T)
        value.backward()
        return value
    return Setup(*(functools.partial(once, o) for o in losses(relaxation, method)), (s,))

def step(network, n, loss, device):
    "A training step that changes nothing"
    net, pool = make_network(network, 0).to(device), NETWORKS[network][1]
    x = random(100, n, 1, 28//pool, 112//pool, device=device)
    opt = torch.optim.Adam(net.parameters(), lr=0.)
    def once():
        opt.zero_grad()
        value = loss(net(x))
        value.backward()
        opt.step()
        return value
    return once

def whole_step(network, device, relaxation, n, method):
    "Both losses in a training step"
    T = scores(100, n, device)[1]
    new = lambda loss: step(network, n, lambda y: loss(y, T), device)
    return Setup(*map(new, losses(relaxation, method)))

@functools.cache
def cnn_seconds(n, device):
    "Time of a training step without its loss"
    G = random(100, n, device=device)
    once = step("cnn", n, lambda y: (y*G).sum(), device)
    threads = torch.get_num_threads()
    return benchmark.Timer("f()", globals={"f": once}, num_threads=threads).timeit(3).median

def from_parts(device, relaxation, n, method):
    "The losses alone and the rest of a step, whose noise would be larger than they are"
    return alone(device, relaxation, n, method)._replace(base=cnn_seconds(n, device))

RELAXATIONS = ("neural_sort", "soft_sort", "logistic", "cauchy")

def newton_cases(group, name, make, fisher=None, hessian=None, relaxations=RELAXATIONS,
                 sizes=(5, 10)):
    "What a direction adds to a plain loss, as ours/plain"
    targets = {"fisher": fisher, "hessian": hessian, "clip": None}
    for relaxation in relaxations:
        for n in sizes:
            for method, target in targets.items():
                yield Case(group, f"{name}: {method}, {relaxation}", f"100 x {n}", "call",
                           functools.partial(make, relaxation, n, method), (), target, True)

def loss_cases(device):
    "The loss alone, and training steps with the small network"
    small = functools.partial(whole_step, "small", device)
    yield from newton_cases("losses", "loss alone", functools.partial(alone, device))
    yield from newton_cases("steps", "step, small network", small)

def cnn_cases(device):
    "Training steps with the paper's CNN"
    whole = functools.partial(whole_step, "cnn", device)
    parts = functools.partial(from_parts, device)
    if torch.device(device).type == "cuda":
        return newton_cases("cnn", "step, CNN", whole, 1.02, 1.1)
    return [*newton_cases("cnn", "step, CNN, from its parts", parts, 1.01, 1.05),
            *newton_cases("cnn", "step, CNN, whole", whole, None, None, ("cauchy",), (5,))]

def import_cases(device):
    "The import of the package beside that of torch, each in a new process"
    here = Path(newton_losses_nb.__file__).parent.parent # so that the same package is found
    def new(name):
        command = [sys.executable, "-c", f"import {name}"]
        return lambda: subprocess.run(command, check=True, capture_output=True, cwd=here)
    yield Case("import", "import newton_losses_nb", "a new process", "call",
               lambda: Setup(new("newton_losses_nb"), new("torch"), check=()), (), 1.05, True)

GROUPS = {"networks": network_cases, "relaxations": relaxation_cases, "paths": path_cases,
          "hessians": hessian_cases, "losses": loss_cases, "cnn": cnn_cases,
          "import": import_cases}

def run(cases, device="cpu", out=None, rounds=9, seconds=0.5):
    "Records of cases, new and found"
    config = lambda c: {"method": c.name, "group": c.group, "size": c.size, "measure": c.measure,
                        "target": c.target, "at_most": c.at_most, "needs": list(c.needs)}
    measure = lambda c: measure_case(c, rounds, seconds)
    return measured("speed", ((config(c), c) for c in cases), measure, device, out)

def device(text):
    "A device that is there, for argparse"
    try: torch.empty(0, device=text)
    except (AssertionError, RuntimeError) as e:
        raise argparse.ArgumentTypeError(str(e).splitlines()[0]) from e
    return text

def count(text):
    "A whole number, at least 1, for argparse"
    if not text.isdecimal() or not int(text): raise ValueError
    return int(text)

def duration(text):
    "Seconds, above 0, for argparse"
    if not 0 < float(text) < math.inf: raise ValueError
    return float(text)

def results(text):
    "A file of results, for argparse"
    if Path(text).suffix != ".jsonl": raise argparse.ArgumentTypeError("expected a .jsonl file")
    return Path(text)

def options(doc, seconds):
    "The options that all benchmarks have"
    p = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=count, default=1, help="CPU threads")
    p.add_argument("--seconds", type=duration, default=seconds, help="for each measurement, about")
    p.add_argument("--out", type=results, help="file of results, .jsonl, to add to")
    return p

def main():
    p = options(__doc__, 0.5)
    p.add_argument("--groups", nargs="+", default=GROUPS, choices=GROUPS, metavar="GROUP",
                   help=", ".join(GROUPS))
    p.add_argument("--rounds", type=count, default=9, help="pairs of blocks")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    cases = (c for g in a.groups for c in GROUPS[g](a.device))
    for r in run(cases, a.device, a.out, a.rounds, a.seconds):
        c, v = r["config"], r["result"]
        ratio = "{ratio:.3g} ({low:.3g} to {high:.3g}) beside {peer}"
        found = ratio.format(**v) if v else r["error"]
        wanted = f", wanted {'<=' if c['at_most'] else '>='} {c['target']:g}" if c["target"] else ""
        print(f"{c['method']}, {c['size']}, {c['measure']}: {found}{wanted}", flush=True)

if __name__ == "__main__": main()
