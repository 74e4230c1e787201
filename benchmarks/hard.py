"""Where the paper's gains come from: sorting ten numbers, or five, with `nn.BCELoss`.

    python benchmarks/hard.py list --data-dir mnist    what is finished, and what is to do
    python benchmarks/hard.py run --data-dir mnist     goes on with what is to do, in this order
    python benchmarks/hard.py map --data-dir mnist     where the plain loss fails: untuned, two seeds
    python benchmarks/hard.py cnn --data-dir mnist     the paper's network, as far as a CPU goes
    python benchmarks/hard.py paths                    losses of paths: smoothed, and relaxed
    python benchmarks/hard.py list-paths               what of that is finished, and what is to do

Every method has five trials on two seeds that are used for nothing else, and takes the one with
the best mean validation match; then the reported seeds. A group of seeds is recorded when it
ends: stop it at any time, and the same command goes on there. The folder's name is part of what
names a run. `--shrink 1000 --out FOLDER` is a dry run.
"""
import argparse
from itertools import islice, product
from pathlib import Path

import torch

from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import run_all, seeds_together
from newton_losses_nb.lab.records import read_runs
from newton_losses_nb.lab.tasks import PathTask, SortingTask, path_config, sorting_config
from newton_losses_nb.paths.terrain import load_maps

RESULTS = Path(__file__).resolve().parent.parent/"nbs"/"results"
RELAXATIONS = "soft_sort", "neural_sort"
TUNING, REPORTED, MORE, MOST = (1000, 1001), range(5), range(5, 10), range(10, 20)  # Seeds
MAP = 2000, 2001
TRIAL, SHORT, LONG, LONGER, LONGEST = 3000, 6000, 20000, 50000, 100000  # Steps
RATES = [dict(lr=o) for o in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)]
def lams(*values): return [dict(lr=1e-3, lam=o) for o in values]
def norms(*values): return [dict(lr=1e-3, max_norm=o) for o in values]

FIRST = { # Trials: five rates, or three values at one rate and the best of these at two larger ones
    "soft_sort": dict(none=RATES, rms=RATES, whiten=[o | dict(lam=1e-6) for o in RATES],
                      default=[o | dict(lam="typical") for o in RATES],  # a Fisher
                      fisher=lams(1e-3, 1e-2, .1), scalar=lams(1e-3, 1e-2, .1),
                      hessian=lams(.1, 1., 10.), clip=norms(.1, .3, 1.),
                      clip_grad=norms(.1, 1., 10.))}
FIRST["neural_sort"] = FIRST["soft_sort"] | dict(
    fisher=lams(1e-2, .1, 1.), scalar=lams(1e-2, .1, 1.), hessian=lams(1., 10., 100.),
    clip=norms(.3, 1., 3.))
FIRST["logistic"] = FIRST["cauchy"] = {m: FIRST["neural_sort"][m] for m in (
    "none", "fisher", "default", "whiten", "scalar", "rms", "clip", "clip_grad", "hessian")}

BY_NAME = {"default": "fisher", "default_hessian": "hessian"}  # With the default λ
EXTRA = dict(default_hessian=[o | dict(lam="typical") for o in RATES])  # Not in every row

def at(name, *values): return [dict(lr=3e-3, **{name: o}) for o in values]
PATH_RATES = RATES[1:4] + [RATES[0], RATES[4]]
PATHS = dict(none=PATH_RATES, rms=PATH_RATES,
             default=[o | dict(lam="typical") for o in PATH_RATES],
             whiten=[o | dict(lam="typical") for o in PATH_RATES],
             fisher=at("lam", 1e-2, 1., 100.), scalar=at("lam", 1e-2, 1., 100.),
             clip=at("max_norm", 1., 10., 100.))
HESSIANS = dict.fromkeys(("hessian", "hessian_abs"), at("lam", 1., 100., 1e4))
SAMPLES, RELAXED = (3, 30, 10), "relaxed"
FIRST |= dict.fromkeys(SAMPLES, PATHS | HESSIANS) | {RELAXED: PATHS}

def path_queue():
    "The same of the paths: samples of the smoothed loss or relaxed Bellman-Ford, method, seeds"
    for seeds, samples, m in product((REPORTED, MORE), SAMPLES, PATHS): yield samples, m, seeds
    for m in PATHS: yield RELAXED, m, MOST
    for samples, m in product(SAMPLES, HESSIANS): yield samples, m, range(10)

def queue():
    "What is run, in order: relaxation, method, steps, seeds, and what differs from the setting"
    bce = dict(loss="bce")
    for r in RELAXATIONS:
        yield r, "none", SHORT, REPORTED, {}
        yield r, "none", SHORT, REPORTED, bce
        for m in ("fisher", "rms", "clip", "default", "whiten", "hessian", "scalar", "clip_grad"):
            yield r, m, SHORT, REPORTED, {}
        for o in (dict(lr=1e-3), dict(precision="float64")): yield r, "none", SHORT, REPORTED, o
    for r in RELAXATIONS:
        for m in ("none", "fisher", "rms"): yield r, m, LONG, REPORTED, {}
        yield r, "none", LONG, REPORTED, bce
    for r, lr in zip(RELAXATIONS, (3e-3, 1e-3)):  # Rates below the chosen ones
        yield r, "none", LONG, REPORTED, bce | dict(lr=lr)
    for r in RELAXATIONS: yield r, "none", SHORT, REPORTED, dict(tau=1.)
    for r in RELAXATIONS:
        for m in ("clip", "default", "whiten", "hessian", "scalar", "clip_grad"):
            yield r, m, LONG, REPORTED, {}
        yield r, "none", LONG, REPORTED, dict(tau=1.)
        yield r, "fisher", LONG, REPORTED, bce
    for r in RELAXATIONS:
        for m in FIRST[r]: yield r, m, LONG, MORE, {}
        yield r, "none", LONG, MORE, bce
    for m in ("fisher", "clip"): yield "neural_sort", m, LONGEST, REPORTED, {}
    yield "neural_sort", "scalar", LONGER, range(4), {}
    yield "neural_sort", "none", LONGER, range(4), bce
    for m in ("rms", "whiten"): yield "neural_sort", m, LONGER, range(4), {}
    yield "neural_sort", "scalar", LONGEST, REPORTED, {}
    yield "neural_sort", "none", LONGEST, REPORTED, bce
    for m, more in ("fisher", {}), ("none", bce), ("scalar", {}): # Does what was seen there hold?
        yield "neural_sort", m, LONGER, MORE, more
    for m in ("default", "scalar", "clip", "rms", "clip_grad"): # The default beside controls
        for r in RELAXATIONS: yield r, m, SHORT, MORE, {}
    for r in RELAXATIONS: yield r, "none", SHORT, MORE, bce
    for r, best in zip(RELAXATIONS, ("scalar", "clip")): # The controls best on seeds 0-4
        for m in ("default", best): yield r, m, SHORT, MOST, {}
    for m, more in ("fisher", {}), ("none", bce), ("scalar", {}): # Once more, other seeds
        yield "neural_sort", m, LONGER, MOST[:5], more
    for r, seeds in product(("logistic", "cauchy"), (REPORTED, MORE)):
        for m in FIRST[r]: yield r, m, SHORT, seeds, {}
        yield r, "none", SHORT, seeds, bce
    for seeds in (REPORTED, MORE): # Longer: the best control there, Newton, the default
        for m, more in ("none", bce), ("fisher", {}), ("default", {}):
            yield "logistic", m, LONG, seeds, more
    for seeds in (REPORTED, MORE): yield "logistic", "none", LONG, seeds, {}
    yield "neural_sort", "default_hessian", LONG, REPORTED, {}
    yield "logistic", "hessian", LONG, REPORTED, {} # The paper's largest gain, as long
    for m, seeds in product(("none", "default"), (REPORTED, MORE)): # Does plain stay ahead?
        yield "cauchy", m, LONG, seeds, {}
    five = dict(n=5)
    for r, seeds in product(RELAXATIONS, (REPORTED, MORE)): # Sets of five, trials of their own
        for m in FIRST[r]: yield r, m, SHORT, seeds, five
        yield r, "none", SHORT, seeds, five | bce

def cells():
    "The map, arm by arm: relaxation, method, and what differs; nothing is chosen by trials"
    arms = ("none", {}), ("none", dict(loss="bce")), ("default", dict(lam="typical")), (
        "clip", dict(max_norm=.3))
    sharp = dict.fromkeys(RELAXATIONS, ("tau", (.01, .1, 1.)))
    sharp |= dict.fromkeys(("logistic", "cauchy"), ("steepness", (10., 100., 1000.)))
    for (method, more), n, (relaxation, (name, values)) in product(arms, (10, 5), sharp.items()):
        for v in values: yield relaxation, method, TRIAL, more | dict(n=n, lr=1e-3) | {name: v}

def small_batches():
    "A look at the paper's network, in batches of ten sets; nothing is chosen by trials"
    same = dict(network="cnn", batch=10, eval_every=100, eval_sets=200, lr=1e-3)
    arms = ("none", {}), ("none", dict(loss="bce")), ("default", dict(lam="typical")), (
        "clip", dict(max_norm=.3))
    for method, more in arms: yield "soft_sort", method, 4000, same | more

def finished(folder):
    "The records of a folder by key; none if there is nothing, or half a line only"
    try: return {r["key"]: r for r in read_runs(folder)}
    except FileNotFoundError: return {}

class Missing(Exception):
    "A trial is not finished, so its method has chosen nothing yet"

class Study:
    "The trials and runs, found or made"
    name, later = "hard_", (3e-3, 1e-2)
    def __init__(self, a):
        self.a = a
        self.data = self.load()
        self.same = dict(network=a.network, device=a.device)
        name = self.name + f"{a.network}_"*(a.network != "small") + a.device
        kinds = "_tuning", "", "_map", "_cnn"
        self.folders = folders = {k: Path(a.out)/f"{name}{k}" for k in kinds}
        self.found = {k: finished(f) for k, f in folders.items()}

    def load(self):
        return load_digits(data_dir=self.a.data_dir) if self.a.data_dir else load_digits()

    def tasks(self, relaxation, method, seeds, steps, tau=.1, loss="bce_clamped", **setting):
        steps, every = max(1, steps//self.a.shrink), max(1, 200//self.a.shrink)
        sets = max(10, 1000//self.a.shrink)
        method = BY_NAME.get(method, method)
        same = self.same | dict(n=10, batch=100, eval_every=every, eval_sets=sets)
        sharp = dict(steepness=100.) if relaxation == "cauchy" else dict(tau=tau)
        given = same | sharp | dict(loss=loss, lam=1., max_norm=.1) | setting
        return [SortingTask(sorting_config(relaxation, method, seed=s, steps=steps, **given),
                            self.data) for s in seeds]

    def records(self, kind, tasks):
        "The records of tasks that differ in the seed; `list` makes none"
        found, left = self.found[kind], [t for t in tasks if t.key not in self.found[kind]]
        other = {r["data_source"] for r in found.values()} - {tasks[0].source}
        if other: raise ValueError(f"data-dir: expected the data of what is in "
                                   f"{self.folders[kind]}, {other}, got {tasks[0].source}")
        if left and not self.a.verb.startswith("list"):
            c = left[0].config
            name = c.get("relaxation") or c["loss"]
            made = run_all(left, self.folders[kind], name, engine=seeds_together)
            found |= {r["key"]: r for r in made}
        return [found[t.key] for t in tasks if t.key in found]

    def score(self, relaxation, method, setting):
        "Mean best validation match of a trial; a failed run counts as zero"
        tasks = self.tasks(relaxation, method, TUNING, TRIAL, **setting)
        records = self.records("_tuning", tasks)
        if len(records) < len(tasks): raise Missing
        match = [r["result"]["valid_exact_match"] if r["result"] else 0. for r in records]
        return sum(match)/len(match)

    def chosen(self, relaxation, method, same):
        "The best trial, with `same` in all; the first of equals"
        def score(o): return o, self.score(relaxation, method, same | o)
        scored = [score(o) for o in (FIRST[relaxation] | EXTRA)[method]]
        first = max(scored, key=lambda o: o[1])[0]
        more = [first | dict(lr=o) for o in self.later] if len(scored) == 3 else []
        scored += map(score, more)
        return max(scored, key=lambda o: o[1])[0]

    def go_through(self):
        "Make or list the rows of the queue"
        for relaxation, method, steps, seeds, more in islice(queue(), self.a.rows):
            what = f"{relaxation} {method} {more or ''} {steps} steps"
            name = f"{what}, seeds {seeds[0]}-{seeds[-1]}:"
            same = {k: more[k] for k in ("loss", "n") if k in more}
            try: setting = self.chosen(relaxation, method, same)
            except Missing:
                print(name, "trials to do"); continue
            tasks = self.tasks(relaxation, method, seeds, steps, **(setting | more))
            self.show(f"{name} {setting}", tasks, self.records("", tasks))

    def go_over(self, cells, kind, seeds):
        "Make what is not chosen by trials"
        for relaxation, method, steps, setting in islice(cells, self.a.rows):
            tasks = self.tasks(relaxation, method, seeds, steps, **setting)
            self.show(f"{relaxation} {method} {setting}", tasks, self.records(kind, tasks))

    @staticmethod
    def show(name, tasks, records):
        match = " ".join(f"{100*r['result']['exact_match']:.1f}" if r["result"] else "failed"
                         for r in records)
        print(name, f"{len(records)} of {len(tasks)} runs", match, flush=True)

class Paths(Study):
    "The same for losses of paths: trials of 3 epochs, runs of 8"
    name, later = "hard_paths_", (1e-3, 1e-2)
    def load(self): return load_maps("terrain", None, 2000, 300, 1000)

    def tasks(self, samples, method, seeds, steps, loss=None, **setting):
        method = BY_NAME.get(method, method)
        train = dict(train=2000, valid=300, test=1000, epochs=3 if steps == TRIAL else 8)
        loss = dict(loss="smoothed_loss", samples=samples)
        if samples == RELAXED: loss = dict(loss="relaxed_bf")
        return [PathTask(path_config(**loss, method=method, seed=s, **self.same, **train,
                                     **setting), self.data) for s in seeds]

    def go_through(self):
        for samples, method, seeds in islice(path_queue(), self.a.rows):
            name = f"{samples} {'samples '*(samples != RELAXED)}{method}"
            try: setting = self.chosen(samples, method, {})
            except Missing:
                print(f"{name}: trials to do"); continue
            tasks = self.tasks(samples, method, seeds, SHORT, **setting)
            self.show(f"{name} {setting}", tasks, self.records("", tasks))

def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("verb", choices=("list", "run", "map", "cnn", "paths", "list-paths"))
    p.add_argument("--data-dir", help="folder with MNIST's four files; else the sample")
    p.add_argument("--out", default=RESULTS, help="where the folders of results are")
    p.add_argument("--network", default="small", help="small or cnn (the paper's)")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--shrink", type=int, default=1, help="divides all numbers of steps")
    p.add_argument("--rows", type=int, help="only the first rows of the queue")
    a = p.parse_args()
    if a.shrink > 1 and Path(a.out).resolve() == RESULTS:
        p.error("--shrink: needs --out, another folder")
    if (a.rows or 0) < 0: p.error("--rows: expected at least 0")
    try: torch.empty(0, device=a.device)
    except (AssertionError, RuntimeError) as e: p.error(f"--device: {e}")
    paths = a.verb.endswith("paths")
    if a.shrink > 1 and paths: p.error("--shrink: not for paths")
    if a.shrink < 1: p.error("--shrink: expected at least 1")
    try:
        study = Paths(a) if paths else Study(a)
        if a.verb == "map": study.go_over(cells(), "_map", MAP)
        elif a.verb == "cnn":
            for seed in MAP: study.go_over(small_batches(), "_cnn", [seed])
        else: study.go_through()
    except (OSError, ValueError) as e: p.error(str(e))

if __name__ == "__main__": main()
