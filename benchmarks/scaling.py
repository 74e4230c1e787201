"""Time and peak memory of our operations over their sizes: what grows how fast.

    python benchmarks/scaling.py --out nbs/results/scaling_cpu.jsonl

On a CPU torch's profiler writes down each allocation, and a line or two to stderr.
"""
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from speed import both, flat_solver, measured, noisy_paths, options, random, scores
from torch.autograd.profiler import profile
from torch.utils import benchmark

from newton_losses_nb import (
    NewtonLoss, SortingLoss, neural_sort, relaxed_bellman_ford, shortest_path, soft_sort,
    sorting_network)
from newton_losses_nb.core.derivatives import derivatives


class Curve(NamedTuple):
    "An operation over one of its sizes"
    name:str       # Operation
    variable:str   # What grows
    sizes:tuple    # Its values
    make:Callable  # Size and device to a function without arguments
    work:Callable  # Size to the amount of work, in any unit

def peak_memory(f, device="cpu"):
    "Most bytes that a function holds at a time, beyond what was held before; call it once before"
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        f()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as p: f()
    events = [e for e in p.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([0, *(e.nbytes() for e in events)]).max())

def measure_point(point, seconds):
    curve, size, device = point
    f = curve.make(size, device)
    timer = benchmark.Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
    time = timer.blocked_autorange(min_run_time=seconds).median
    return {"time": time, "bytes": peak_memory(f, device), "work": curve.work(size)}


def sort_point(f): return lambda n, device: both(f, random(4, n, device=device))

def hessian_point(relaxation):
    def make(n, device):
        (s, T), loss = scores(4, n, device), SortingLoss(relaxation, "bce")
        return lambda: derivatives(loss, s, T, second="full", check=False)
    return make

def newton_point(curvature):
    def make(N, device):
        s, T = scores(N, 5, device)
        loss = NewtonLoss(SortingLoss("neural_sort", "bce"), curvature, check=False)
        return both(lambda s: loss(s, T), s)
    return make

def squares_point(m, device):
    loss = NewtonLoss(lambda y: (y.square() + y.sin()).sum(1), check=False)
    return both(loss, random(100, m, device=device))

def maps(n, side, device):
    cost = torch.rand(n, side, side, generator=torch.Generator().manual_seed(0)) + 0.2
    return cost.to(device)

def fenchel_young_point(n, side, samples, device):
    y, loss = maps(n, side, device).flatten(1), noisy_paths(samples)
    w = flat_solver(y.flip(0))
    return both(lambda y: loss(y, w), y)

def layers(n): return math.ceil(math.log2(n))*(math.ceil(math.log2(n)) + 1)/2

def curves():
    "All operations; everything forward and backward, but exact paths and Hessians"
    net = lambda plan: sort_point(lambda s: sorting_network(s, plan, "cauchy", 10.))
    noisy = fenchel_young_point
    many, few, sides = (5, 16, 64, 256, 1024), (5, 16, 64, 256), (6, 12, 24, 48, 96)
    samples = (10, 100, 1000, 10_000)
    return [Curve(*o) for o in (
        ("neural_sort", "n", many, sort_point(neural_sort), lambda n: n**2),
        ("soft_sort", "n", many, sort_point(soft_sort), lambda n: n**2),
        ("odd-even network", "n", few, net("odd_even"), lambda n: n**3),
        ("bitonic network", "n", few, net("bitonic"), lambda n: n**2*layers(n)),
        ("Hessians, neural_sort", "n", few, hessian_point("neural_sort"), lambda n: n**3),
        ("Hessians, cauchy", "n", (5, 10, 20, 40), hessian_point("cauchy"), lambda n: n**4),
        ("Fisher", "m", (4, 16, 64, 256, 1024), squares_point, lambda m: 100*m*min(m, 100)),
        ("Fisher, n = 5", "N", samples, newton_point("fisher"), lambda N: N),
        ("Hessian, n = 5", "N", samples, newton_point("hessian"), lambda N: N),
        ("Fenchel-Young, 12 x 12", "S", (3, 10, 30, 100, 300),
         functools.partial(noisy, 10, 12), lambda S: S),
        ("shortest_path", "side", sides,
         lambda a, d: functools.partial(shortest_path, maps(10, a, d)), lambda a: a**3),
        ("relaxed_bellman_ford", "side", sides,
         lambda a, d: both(lambda c: relaxed_bellman_ford(c, 10.), maps(2, a, d)), lambda a: a**3),
        ("Fenchel-Young, 3 samples", "side", sides,
         lambda a, d: noisy(4, a, 3, d), lambda a: a**3))]

def run(some, device="cpu", out=None, seconds=0.3):
    "Records of the points of curves, new and found"
    points = (({"method": c.name, "variable": c.variable, "size": size}, (c, size, device))
              for c in some for size in c.sizes)
    return measured("scaling", points, lambda o: measure_point(o, seconds), device, out)

def main():
    a = options(__doc__, 0.3).parse_args()
    torch.set_num_threads(a.threads)
    for r in run(curves(), a.device, a.out, a.seconds):
        c, v = r["config"], r["result"]
        found = f"{v['time']*1e3:.3g} ms, {v['bytes']/2**20:.3g} MiB" if v else r["error"]
        print(f"{c['method']}, {c['variable']} = {c['size']}: {found}", flush=True)

if __name__ == "__main__": main()
