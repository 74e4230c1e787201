"""Ablations of the sorting experiment: one thing is changed at a time, and every method has as many trials.

    python benchmarks/ablations.py curvature --seeds 5 --tuning-steps 100 --out runs/curvature

An ablation is a list of arms. An arm is a configuration without a seed, and a few candidates for
what is free in it: λ, a norm, or the learning rate. Each candidate is tried on two seeds that are
used for nothing else, and the one with the best mean validation match is taken; then the reported
seeds. What is finished is recorded, so the same command goes on there. Trials lie in a folder of
their own, which several ablations may share.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from newton_losses_nb.core import solves
from newton_losses_nb.core.directions import Damped, PerSample
from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import directions, entry, one_of, run_all, seeds_together, setting
from newton_losses_nb.lab.report import conclusion, summary, to_markdown
from newton_losses_nb.lab.tasks import Sorting, SortingTask
from newton_losses_nb.sorting.losses import exact_match

class GradientStep(Damped):
    "The gradient over λ: no curvature, only a length"
    def forward(self, e, G, mask=None):
        return G/solves.damping(self.lam, e)[0][..., None, None]

HELD = {f"{m}_k{k}": (m, k) for m in ("gradient", "fisher", "hessian_abs")
        for k in (1, 2, 5, 10)}  # Methods that hold a target: which method, and K

def methods(lam=None, max_norm=None):
    "All that is compared, as `directions`; `_sample`: each sample has a curvature of its own"
    table = directions(lam, max_norm)
    table |= {f"{k}_sample": PerSample(table[k]) for k in ("fisher", "hessian_abs")}
    table["gradient"] = GradientStep(table["fisher"].lam)
    return table | {name: table[m] for name, (m, _) in HELD.items()}

METHODS = methods()

class HeldTarget(nn.Module):
    """Half the squared distance to a target z* that is renewed at every K-th call.

    To be recordable on a GPU it must not choose by an `if`: it computes a direction at each step,
    and throws it away where the old target counts. The value is that of the loss; the gradient is
    (y - z*)/N. What is used is one evaluation of the loss for K steps.
    """
    def __init__(self, loss, steps):
        super().__init__()
        self.loss, self.steps, self.count, self.target = loss, steps, None, None

    def forward(self, y, *args):
        values, D = self.loss.directions(y.detach(), *args)
        self.sent, self.part = self.loss.sent, self.loss.part
        fresh = y.detach() - D
        if self.count is None:
            self.count = torch.zeros((), dtype=torch.int64, device=y.device)
            self.target = fresh.clone()
        self.target.copy_(torch.where(self.count % self.steps == 0, fresh, self.target))
        self.count += 1
        surrogate = (y - self.target).square().sum(-1).mean(-1)/2
        return values.mean(-1) + surrogate - surrogate.detach()

ORDER_NOISE = "swap", "shuffle"  # Two neighbours change places, or all is shuffled

def wrong_orders(sets, n, share, kind, generator):
    "Ranks in the order that is told, `(sets, n)`; a set that is wrong at a small share is at a large one"
    ranks = torch.arange(n).expand(sets, n)
    hit = torch.rand(sets, 1, generator=generator) < share
    if kind == "swap":
        i = torch.randint(n - 1, (sets, 1), generator=generator)
        other = ranks + (ranks == i).long() - (ranks == i + 1).long()
    else: other = torch.rand(sets, n, generator=generator).argsort(1)
    return torch.where(hit, other, ranks)

@dataclass
class SortingAblation(Sorting):
    "The settings of a run, with wrong orders and larger sets, which are there only if they change something"
    method:str = entry("none", "What is sent back", one_of(*METHODS))
    noise:str|None = setting(None, "How orders are wrong", one_of(None, *ORDER_NOISE))
    share:float = setting(0., "How many orders are wrong, from 0 to 1")
    test_n:list|None = setting(None, "Sizes of sets to evaluate; default: n")

    directions = staticmethod(methods)

    def complete(self, c):
        idle = () if self.noise and self.share else ("noise", "share")
        if not self.test_n: idle += ("test_n",)
        return super().complete({k: v for k, v in c.items() if k not in idle})

ablation_config = SortingAblation.config

class AblationTask(SortingTask):
    """Sorting with repeated batches, wrong orders, or larger evaluation sets.

    Evaluation is on right orders. A network scores each image by itself, so it can sort sets of any
    size: `test_n=[5, 10]` draws sets of ten, and takes the first five of each as a set of five.
    `exact_match`, by which the best step is chosen, remains that of the training size.
    """
    directions = staticmethod(methods)
    repeat = property(lambda self: HELD.get(self.config["method"], (None, 1))[1])

    def output_loss(self, loss_fn, direction, **options):
        loss = super().output_loss(loss_fn, direction, **options)
        return HeldTarget(loss, self.repeat) if self.config["method"] in HELD else loss

    def indices(self):
        "Which digits each step takes; the rank that is told comes last"
        c = self.config
        told = torch.Generator().manual_seed(10**6 + c["seed"])
        for index in super().indices():
            if c.get("noise"):
                ranks = wrong_orders(c["batch"], c["n"], c["share"], c["noise"], told)
                index = torch.cat([index, ranks.unsqueeze(-1)], -1)
            for _ in range(self.repeat): yield index

    def batch(self, index):
        digits = self.training.digits_per_image
        x, (T,) = super().batch(index[..., :digits])
        told = index[..., digits:]
        return x, (T.gather(-2, told.expand_as(T)) if told.shape[-1] else T,)

    def samples(self, split):
        sets, sizes = super().samples(split), self.config.get("test_n", ())
        if split != "train": sets.n = max(sizes, default=sets.n)
        return sets

    def scores(self, y, labels):
        def first(n): return y[:, :n], labels[:, :n]
        more = {f"n{k}_match": exact_match(*first(k)) for k in self.config.get("test_n", ())}
        return super().scores(*first(self.config["n"])) | more

@dataclass
class Arm:
    "One configuration of an ablation, for any seed"
    config:dict              # Arguments of `ablation_config`
    candidates:tuple = ({},) # Entries to choose from, by validation on other seeds
    tuned_as:dict|None = None # What is different in a trial; None: nothing

    def configs(self, candidate, seeds, trial=None, **more):
        "A configuration for each seed; `trial` is None or what is different in a trial"
        tuned = {} if trial is None else (self.tuned_as or {}) | trial
        c = more | self.config | tuned | candidate
        return [ablation_config(seed=s, **c) for s in seeds]

LAMS, NORMS = (1e-2, 1e-1, "auto"), (.03, .1, .3)  # To try
STEEP = dict(relaxation="logistic", steepness=3000.)  # 300 times as steep as usual

def candidates(method, lr, lams=LAMS, norms=NORMS):
    "What a method may choose from: three dampings, norms or learning rates"
    d = METHODS[method]
    d = d.direction if isinstance(d, PerSample) else d
    if hasattr(d, "lam"): return tuple({"lam": o} for o in lams)
    if hasattr(d, "max_norm"): return tuple({"max_norm": o} for o in norms)
    return tuple({"lr": lr*f} for f in (1/3, 1., 3.))

def damping(n, steps, lr):
    "Over how many decades of λ does a Newton loss do no harm? Nothing is tuned"
    def arms(relaxation):
        newton = ("fisher", "hessian", *["hessian_abs"]*(relaxation == "logistic"))
        pairs = [("none", "auto"), ("scalar", "auto")]
        pairs += [(m, lam) for m in newton for lam in ("auto", *(10.**k for k in range(-4, 4)))]
        return [Arm(dict(relaxation=relaxation, method=m, lam=lam)) for m, lam in pairs]
    return [a for r in ("neural_sort", "soft_sort", "logistic") for a in arms(r)]

def curvature(n, steps, lr):
    "Do controls do as well, and does each sample need its own curvature? Tame, and exploding"
    names = ("none", "fisher", "hessian", "hessian_abs", "fisher_sample", "hessian_abs_sample",
             "clip", "clip_grad", "rms", "scalar")
    lams = {m: (.1, 1., 10.) if m.endswith("sample") else LAMS for m in names}
    tame = [Arm(dict(relaxation="neural_sort", method=m), candidates(m, lr, lams[m]))
            for m in names if m != "hessian_abs"]
    wild = [Arm(dict(STEEP, loss="bce_clamped", method=m),
                candidates(m, lr, (1e2, 1e4, 1e6), (.1, 1., 10.))) for m in names]
    return [*tame, *wild, Arm(dict(STEEP, method="none"), candidates("none", lr))]

def targets(n, steps, lr):
    "What if the network takes K steps towards each target, at equal steps or equal evaluations?"
    few, lams = max(1, steps//5), tuple({"lam": o} for o in (.01, .1, 1.))
    def arm(method, k):
        length = dict(steps=max(steps, k*few), eval_every=min(steps, k*few))
        return Arm(dict(relaxation="neural_sort", method=f"{method}_k{k}", **length), lams)
    return [arm(m, k) for m in ("gradient", "fisher") for k in (1, 2, 5, 10)]

def with_controls(changes, lr):
    "The plain loss, the Fisher and the controls, changed, and what is tuned instead"
    return [Arm(dict(relaxation="neural_sort", method=m, **c), candidates(m, lr), tuned_as)
            for c, tuned_as in changes for m in ("none", "fisher", "clip", "rms", "scalar")]

def transfer(n, steps, lr):
    "Trained on sets of n, how well are sets of 2n sorted?"
    return with_controls([(dict(n=k, test_n=[n, 2*n]), dict(test_n=None)) for k in (n, 2*n)], lr)

def noise(n, steps, lr):
    "What if some of the orders are wrong? Tuned on right orders"
    levels = [(None, 0.), *((kind, .4) for kind in ORDER_NOISE)]
    return with_controls([(dict(noise=k, share=p), dict(noise=None)) for k, p in levels], lr)

ABLATIONS = {f.__name__: f for f in (damping, curvature, targets, transfer, noise)}

def choose(arms, same, trial, seeds, run):
    "The best candidate of each arm, by mean validation match; a failed run is zero"
    def trials(arm, c): return arm.configs(c, seeds, trial, **same)
    flat = [o for a in arms if len(a.candidates) > 1 for c in a.candidates for o in trials(a, c)]
    match = {str(c): r["result"]["valid_exact_match"] if r["result"] else 0.
             for c, r in zip(flat, run(flat) if flat else [])}
    def score(arm, c): return sum(match.get(str(o), 0.) for o in trials(arm, c))
    return [max(a.candidates, key=lambda c: score(a, c)) for a in arms]

def run_ablation(name, out, tuning_out, digits, seeds=(0, 1), tuning_seeds=(1000, 1001),
                 tuning_steps=None, n=5, steps=200, batch=50, network="small", show=True, **same):
    "Choose the settings of all arms, then run them; the records of the reported seeds"
    same = dict(eval_every=steps) | same | dict(n=n, steps=steps, batch=batch, network=network)
    trial = dict(steps=tuning_steps, eval_every=tuning_steps) if tuning_steps else {}
    arms = ABLATIONS[name](n, steps, ablation_config(network=network)["lr"])
    def do(configs, folder, file):
        tasks = [AblationTask(c, digits) for c in configs]
        return list(run_all(tasks, folder, file, show, engine=seeds_together))
    chosen = choose(arms, same, trial, tuning_seeds, lambda configs: do(configs, tuning_out, "tuning"))
    configs = [arm.configs(c, seeds, **same) for arm, c in zip(arms, chosen)]
    return do([c for per_seed in zip(*configs) for c in per_seed], out, name)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("name", choices=ABLATIONS)
    p.add_argument("--out", help="folder of results; default: runs/ablation_ and the name")
    p.add_argument("--tuning-out", help="folder of the trials; default: tuning in it")
    p.add_argument("--data", default="sample", help="sample or mnist")
    p.add_argument("--data-dir", help="folder with MNIST's four files")
    p.add_argument("--seeds", type=int, default=2, help="how many are reported")
    p.add_argument("--tuning-steps", type=int, help="steps of a trial; default: those of a run")
    for k, default in dict(n=5, steps=200, batch=50, eval_sets=1000).items():
        p.add_argument("--" + k.replace("_", "-"), type=int, default=default)
    for k, default in dict(network="small", device="cpu", precision="float32").items():
        p.add_argument("--" + k, default=default)
    a = vars(p.parse_args())
    few = [k for k in ("seeds", "tuning_steps") if a[k] is not None and a[k] < 1]
    if few: p.error(f"--{few[0].replace('_', '-')}: expected at least 1, got {a[few[0]]}")
    out = Path(a.pop("out") or f"runs/ablation_{a['name']}")
    tuning_out = a.pop("tuning_out") or out/"tuning"
    try: torch.empty(0, device=a["device"])
    except (AssertionError, RuntimeError) as e: p.error(f"--device: {e}")
    try:
        digits = load_digits(a.pop("data"), a.pop("data_dir"))
        runs = run_ablation(a.pop("name"), out, tuning_out, digits, range(a.pop("seeds")), **a)
        table = summary([r | {"config": r["config"] | {"lr": None}} for r in runs])  # the rate was chosen
    except (OSError, ValueError) as e: p.error(str(e))
    print(f"{to_markdown(table)}\n\n{conclusion(table)}")

if __name__ == "__main__": main()
