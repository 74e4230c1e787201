"""The loss whose outputs have different units (tutorials/04_when): each method at its best rate.

    python benchmarks/units.py --out nbs/results/units_cpu/runs.jsonl

Seven learning rates on two seeds that are used for nothing else; the one with the lowest mean loss
then on ten others; the default again with the loss multiplied by 1e-4 and 1e4. What is in the file
already is not run again.
"""
import argparse
import json
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from newton_losses_nb import Direction, Fisher, Hessian, Normalize, OutputLoss, Whiten
from newton_losses_nb.lab.records import environment
from other_losses import stored, train

STEPS, BATCH, TEST, TUNING, SEEDS = 400, 64, 1000, (100, 101), range(10)
RATES, SCALES = (.001, .0018, .0032, .0056, .01, .018, .032), (1., 1e-4, 1e4)
METHODS = {"plain": Direction(), "normalised": Normalize(), "whiten": Whiten(), "default": Fisher(),
           "default, Hessian": Hessian()}
SIZES = torch.logspace(1, -1, 4)
TURN = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(7)))[0]

def target(x):
    a, b = x.unbind(-1)
    waves = torch.stack([(3*a).sin(), (3*b).cos(), (2*(a + b)).sin(), a*b], -1)
    return (waves*SIZES) @ TURN.T

def units(y, t): return (((y - t) @ TURN.to(y))/SIZES.to(y)).square().sum(-1)/2

def draw(n, seed):
    x = 2*torch.rand(n, 2, generator=torch.Generator().manual_seed(seed)) - 1
    return x, target(x)

def run(method, lr, seed, scale):
    "Mean loss on new points after training with Adam and a falling learning rate"
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                        nn.Linear(64, 4))
    scaled = lambda y, t: scale*units(y, t)
    loss = OutputLoss(scaled, METHODS[method])
    x, t = draw(STEPS*BATCH, seed)
    batches = zip(x.split(BATCH), zip(t.split(BATCH)))
    for _ in train(net, loss, lr, STEPS, batches): pass
    x, t = draw(TEST, 10_000 + seed)
    with torch.no_grad(): return float(units(net(x), t).mean())

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", required=True, type=Path, help="file of results, one run a line")
    a = p.parse_args()
    torch.set_num_threads(1)
    try: done = {tuple(r[k] for k in ("method", "lr", "seed", "scale")): r["value"]
                 for r in stored(a.out)}
    except (OSError, ValueError, KeyError) as e: p.error(f"--out: expected a file of its results, got {a.out} ({e})")
    about = environment("cpu")
    about.pop("command")
    def mean(method, lr, seeds, scale=1.):
        found = []
        for seed in seeds:
            key = method, lr, seed, scale
            if key not in done:
                done[key] = run(*key)
                record = dict(method=method, lr=lr, seed=seed, scale=scale, value=done[key])
                with a.out.open("a") as file: file.write(json.dumps(record | about) + "\n")
            found.append(done[key])
        return sum(found)/len(found)
    for method in tqdm(METHODS):
        best = min(RATES, key=lambda lr: mean(method, lr, TUNING))
        scales = SCALES if method.startswith("default") else SCALES[:1]
        print(method, best, *[f"x{s:g}: {mean(method, best, SEEDS, s):.4f}" for s in scales])

if __name__ == "__main__": main()
