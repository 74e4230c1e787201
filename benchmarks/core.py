"""The core beside version 0.1: losses alone, forward and backward to the outputs, as new/old.

    git worktree add FOLDER d93aa84
    python benchmarks/core.py --old FOLDER --out nbs/results/core_cpu.jsonl

Both packages are in one process, their results are compared first, and blocks of calls
alternate. On a CPU the time is that of the process, whatever else the machine does.
"""
import functools
import importlib
import statistics
import subprocess
import sys
import time
import types

import torch
from speed import RELAXATIONS, Case, Setup, count, measure_case, measured, options, random, scores
from torch.utils import benchmark

import newton_losses_nb as new

METHODS = {"fisher": lambda package, f: package.NewtonLoss(f),  # each with its own rule for λ
           "hessian": lambda package, f: package.NewtonLoss(f, "hessian"),
           "fisher, λ 1": lambda package, f: package.NewtonLoss(f, lam=1.),
           "hessian, λ 10": lambda package, f: package.NewtonLoss(f, "hessian", lam=10.),
           "clip": lambda package, f: package.ClippedLoss(f, 0.1)}

def old_package(folder):
    "Version 0.1, imported beside the present package"
    def taken():
        names = [k for k in sys.modules if k.partition(".")[0] == new.__name__]
        return {k: sys.modules.pop(k) for k in names}
    present = taken()
    sys.path.insert(0, folder)
    try:
        found = [importlib.import_module(f"{new.__name__}.{k}") for k in ("newton", "sorting")]
    finally:
        taken()
        sys.modules.update(present)
        sys.path.remove(folder)
    return types.SimpleNamespace(**vars(found[0]), SortingLoss=found[1].SortingLoss)

def pair(both, method, loss_fn, inputs):
    "A method of both packages with their own losses; compared: values and, at equal λ, directions"
    y, *args = inputs()
    def backward(loss, y):
        y = y.detach().requires_grad_()
        value = loss(y, *args)
        value.backward()
        return value, len(y)*y.grad
    sides = [functools.partial(backward, METHODS[method](p, loss_fn(p))) for p in both]
    parts = 1 if method in ("fisher", "hessian") else 2
    check = [lambda y, f=f: torch.cat([o.detach().flatten() for o in f(y)[:parts]]) for f in sides]
    return Setup(*sides, (y,), check)

def squares(package): return lambda y, t: (y - t).square().sum(1)

def cases(old, device):
    "All comparisons"
    make = functools.partial(functools.partial, pair, (new, old))
    for n in (5, 10):
        for relaxation in RELAXATIONS:
            loss_fn = lambda p, r=relaxation: p.SortingLoss(r, "bce", tau=0.3, steepness=10.)
            for method in METHODS:
                inputs = functools.partial(scores, 100, n, device)
                yield Case("core", f"{method}, {relaxation}", f"100 x {n}", "call",
                           make(method, loss_fn, inputs), (), 1.05, True)
    inputs = lambda: (random(100, 144, device=device), random(100, 144, device=device, seed=1))
    for method in ("fisher", "fisher, λ 1"):
        yield Case("core", f"{method}, squares", "100 x 144", "call",
                   make(method, squares, inputs), (), 1.05, True)

def main():
    p = options(__doc__, 0.5)
    p.add_argument("--old", required=True, metavar="FOLDER", help="a worktree of version 0.1")
    p.add_argument("--rounds", type=count, default=15, help="pairs of blocks")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    try:
        git = subprocess.run(["git", "-C", a.old, "rev-parse", "HEAD"], check=True,
                             capture_output=True, text=True)
        old = old_package(a.old)
    except (subprocess.CalledProcessError, ModuleNotFoundError) as e:
        p.error(f"--old: expected a worktree of version 0.1, got {a.old}: {e}")
    clock = benchmark.timer if torch.device(a.device).type == "cuda" else time.process_time
    measure = lambda c: measure_case(c, a.rounds, a.seconds, clock)
    items = (({"method": c.name, "size": c.size, "target": c.target, "old": git.stdout.strip()}, c)
             for c in cases(old, a.device))
    ratios = []
    for r in measured("core", items, measure, a.device, a.out):
        c, v = r["config"], r["result"]
        time_of = "{ratio:.3f} ({low:.3f} to {high:.3f}), {0:.0f} beside {1:.0f} us"
        found = time_of.format(v["ours"]*1e6, v["theirs"]*1e6, **v) if v else r["error"]
        print(f"{c['method']:26} {c['size']:10} {found}", flush=True)
        if v: ratios.append(v["ratio"])
    print(f"median {statistics.median(ratios):.3f}, largest {max(ratios):.3f}")

if __name__ == "__main__": main()
