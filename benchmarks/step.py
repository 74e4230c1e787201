"""Time and memory of a training step of the benchmarks with the paper's networks.

    python benchmarks/step.py --device cuda --out step.jsonl

One line of JSON a row: milliseconds of a step for each seed, recorded in a CUDA graph or not,
one seed or ten side by side; GFLOP of the step's convolutions and matrix products, and the
most memory that was held. `--steps 2 --batch 4` tries it on a CPU.
"""
import argparse
import itertools
import json
import sys
import time

import torch
from speed import count, device
from torch.utils.flop_counter import FlopCounterMode

from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import Training, network_precision
from newton_losses_nb.lab.records import environment
from newton_losses_nb.lab.tasks import (
    PathTask, SortingTask, path_config, sorting_config)
from newton_losses_nb.paths.terrain import load_maps

STEPS = [("sorting", o) for o in (dict(method="none"), dict(method="fisher"), dict(relaxation="cauchy", method="fisher"),
                                  dict(relaxation="cauchy", method="hessian"), dict(relaxation="cauchy", method="fisher", n=10))]
STEPS += [("paths", o) for o in (dict(method="none"), dict(method="fisher"), dict(loss="relaxed_bf", method="fisher"))]

def tasks_of(kind, K, data, a, **config):
    "Tasks of one kind that differ in the seed"
    same = dict(device=a.device, eval_every=10**6, **config)
    if kind == "sorting":
        return [SortingTask(sorting_config(seed=s, network="cnn", batch=a.batch, steps=10**6, **same), data[kind]) for s in range(K)]
    sizes = {k: len(v) for k, v in data[kind].items()}
    return [PathTask(path_config(seed=s, network="resnet18", batch=min(a.batch, 70), epochs=10**4, **sizes, **same), data[kind]) for s in range(K)]

def measured(tasks, a, capture):
    "Milliseconds of a step for each seed, GFLOP of a step of one seed, MiB"
    device, K = tasks[0].device, len(tasks)
    cuda = device.type == "cuda"
    with network_precision(tasks[0].config["precision"], device) as forward:
        training = Training(tasks, capture=capture, forward=forward)
        with FlopCounterMode(display=False) as counter: training.step(training.draw())
        if cuda: torch.cuda.reset_peak_memory_stats(device)
        training.train(a.steps)                                         # also records
        start = time.perf_counter()
        training.train(a.steps)
        seconds = time.perf_counter() - start
    memory = torch.cuda.max_memory_allocated(device)/2**20 if cuda else None
    return dict(ms=1e3*seconds/a.steps/K, gflop=counter.get_total_flops()/K/1e9, mib=memory)

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    p.add_argument("--data-dir", help="folder with MNIST's four files; else the sample")
    p.add_argument("--steps", type=count, default=100, help="that are timed")
    p.add_argument("--batch", type=count, default=100, help="samples of a step")
    p.add_argument("--out", default="/dev/stdout", help="file to add a line to for each row")
    a = p.parse_args()
    cuda = torch.device(a.device).type == "cuda"
    if cuda and not torch.cuda.is_available(): sys.exit("step.py: PyTorch finds no GPU")
    data = dict(sorting=load_digits(data_dir=a.data_dir), paths=load_maps(train=140, valid=10, test=10))
    modes = itertools.product(("tf32", "bf16") if cuda else ("float32",), (1, 10) if cuda else (1, 2), (True, False) if cuda else (False,))
    with open(a.out, "a") as f:
        for (precision, K, capture), (kind, config) in itertools.product(modes, STEPS):
            row = dict(benchmark=kind, **config, precision=precision, seeds=K, captured=capture)
            try: row |= measured(tasks_of(kind, K, data, a, precision=precision, **config), a, capture)
            except Exception as e: row |= dict(error=f"{type(e).__name__}: {e}"[:300])
            print(json.dumps(row | dict(device=environment(a.device)["device_name"])), file=f, flush=True)
