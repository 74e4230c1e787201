"""Seeds trained side by side are the runs that each would be alone, and their step reads no number."""
import json

import pytest
import torch
from reference import NeverLooks
from tqdm.auto import tqdm

from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import METHODS, Training, fit, network_precision, one_by_one, run_all, seeds_together
from newton_losses_nb.lab.records import read_runs
from newton_losses_nb.lab.tasks import PATH_LOSSES, PathTask, SortingTask, path_config, sorting_config
from newton_losses_nb.paths.terrain import load_maps

SIZES = dict(train=60, valid=15, test=15)

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture(scope="module")
def digits(): return load_digits()

@pytest.fixture(scope="module")
def maps(): return load_maps(**SIZES)

@pytest.fixture
def make(digits, maps):
    def make(kind, seeds=(0, 1), **config):
        config = {"eval_every": 3, "precision": "float64"} | config
        if kind == "sorting": return [SortingTask(sorting_config(seed=s, **{"steps": 6, "batch": 8, "eval_sets": 20, **config}), digits) for s in seeds]
        return [PathTask(path_config(seed=s, **{"batch": 12, "epochs": 1, "samples": 3, **SIZES, **config}), maps) for s in seeds]
    return make

KINDS = [("sorting", dict(relaxation=r, method=m)) for r, methods in (("neural_sort", METHODS), ("logistic", ("none", "fisher", "hessian_abs", "clip_grad"))) for m in methods]
KINDS += [("sorting", dict(relaxation=r, method="fisher", loss=l)) for r, l in (("soft_sort", "cross_entropy"), ("cauchy", "bce"), ("gaussian", "bce_clamped"))]
KINDS += [("paths", dict(loss="fenchel_young", method=m)) for m in METHODS]
KINDS += [("paths", dict(loss=l, method=m)) for l in PATH_LOSSES[1:] for m in ("none", "fisher", "hessian", "hessian_abs", "clip", "clip_grad", "rms", "scalar")
          if not (l in ("relaxed_bf", "blackbox") and m.startswith("hessian"))]
name = lambda kind: f"{kind[0]}-{'-'.join(map(str, kind[1].values()))}" if isinstance(kind, tuple) else None

def numbers(v): return torch.tensor([float("nan") if o is None else float(o) for o in v], dtype=torch.float64)

def same_curves(a, b, rtol=1e-9, atol=1e-11):
    assert a.keys() == b.keys()
    for k in a.keys() - {"seconds"}: torch.testing.assert_close(numbers(a[k]), numbers(b[k]), rtol=rtol, atol=atol, equal_nan=True, msg=lambda s: f"{k}: {s}")

def broken(task, from_step=0):
    "The same task; its network is infinite from the start, or after so many training steps"
    inner, state = task.make_network, {"calls": 0}
    def make_network():
        net = inner()
        def spoil(module, args):
            state["calls"] += module.training
            if state["calls"] > from_step and module.training:
                with torch.no_grad(): next(module.parameters()).fill_(torch.inf)
        net.register_forward_pre_hook(spoil)
        return net
    task.make_network = make_network
    return task

@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_same_for_every_number_of_seeds(make, kind):
    "Two seeds side by side give the curves and the result of each alone"
    kind, config = kind
    for run, task in zip(fit(make(kind, **config)), make(kind, **config)):
        alone, = fit([task])
        assert run.error is None and (run.together, alone.together) == (2, 1)
        tol = 1e-7 if config.get("relaxation") == "logistic" else 1e-9    # saturated comparisons divide by what is almost zero
        same_curves(run.curves, alone.curves, tol)
        same_curves({k: [v] for k, v in run.result.items()}, {k: [v] for k, v in alone.result.items()}, tol)

@pytest.mark.parametrize("kind", KINDS, ids=name)
def test_never_looks(make, kind):
    "The step can be captured"
    kind, config = kind
    tasks = make(kind, **config)
    if kind == "paths": tasks[0].sweeps = 36
    training = Training(tasks)
    training.step(training.draw())
    index = training.draw()
    with NeverLooks(): out = training.step(index)
    assert out.shape == (3, 2) and out.isfinite().all()

def with_sweeps(tasks, sweeps):
    tasks[0].sweeps = sweeps
    return tasks

def test_fixed_sweeps_give_the_same(make):
    a, b = (Training(with_sweeps(make("paths", method="fisher"), o)).train(3) for o in (None, 36))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

def test_a_loss_that_breaks_where_outputs_do_not(make):
    "A sample that is left out is no silent success: that seed has failed, and no other"
    class Bare(SortingTask):
        def make_loss(self):
            f = super().make_loss()
            return lambda y, T: f(y, T)/(T.diagonal(dim1=-2, dim2=-1).sum(-1) < 3)   # the order is right already
    def tasks(): return [Bare(t.config, t.data) for t in make("sorting", range(6), n=3, batch=1, steps=3)]
    together, alone = [run.error for run in fit(tasks())], [fit([t])[0].error for t in tasks()]
    assert together == alone and 0 < alone.count(None) < 6

@pytest.mark.parametrize("method", ["fisher", "whiten"])
def test_a_direction_that_is_not_finite(make, method):
    "Two sets and λ = 0 leave the curvature singular, though losses and gradients are finite"
    runs = fit(make("sorting", method=method, lam=0., batch=2, steps=3))
    assert all(run.error == "after step 0: step 1: expected finite loss and gradient of the parameters, got nan and norm 0" for run in runs), runs[0].error

def test_too_few_sweeps_are_loud(make):
    assert all("expected finite loss" in run.error for run in fit(with_sweeps(make("paths", loss="fenchel_young"), 2)))

@pytest.mark.parametrize("method", ["none", "fisher", "hessian", "hessian_abs", "rms"])
@pytest.mark.parametrize("kind", ["sorting", "paths"])
def test_one_seed_fails(make, kind, method, tmp_path):
    "A seed that breaks in the second interval is recorded as failed, as it is alone, and does not touch the others"
    def tasks(): return [broken(t, 4) if t.config["seed"] == 1 else t for t in make(kind, (0, 1, 2), method=method, **({"steps": 9} if kind == "sorting" else {"epochs": 2}))]
    alone, together = (list(run_all(tasks(), tmp_path/k, kind, show=False, engine=e)) for k, e in dict(alone=one_by_one, together=seeds_together).items())
    assert [r["status"] for r in together] == ["ok", "failed", "ok"] == [r["status"] for r in alone]
    assert together[1]["error"].startswith("after step 3: step 5: expected finite loss") and alone[1]["error"] == together[1]["error"]
    for a, b in zip(alone, together):
        assert a["key"] == b["key"] and b["together"] == 3 and a.keys() | {"together"} == b.keys()
        same_curves(a["curves"], b["curves"])
    json.dumps(together, allow_nan=False)

def test_all_seeds_fail(make):
    runs = fit([broken(t) for t in make("sorting", steps=30)])
    assert all(r.error.startswith("after step 0: step 1:") and r.curves["step"] == [0] and r.result is None for r in runs)

def test_other_tasks_in_groups_of_their_own(make, tmp_path):
    class Other(SortingTask): pass
    others = [Other(t.config, t.data) for t in make("sorting", (5, 6, 7))]
    records = list(run_all(make("sorting") + others, tmp_path, "mixed", show=False, engine=seeds_together))
    assert [r["together"] for r in records] == [2, 2, 3, 3, 3] and all(r["status"] == "ok" for r in records)

def test_common_failure_falls_back(make, monkeypatch):
    "An error of the common step sends each seed into a run of its own; alone it is recorded"
    train = Training.train
    def fails(self, steps):
        if len(self.nets) > 1 or self.task.config["seed"] == 1: raise torch.linalg.LinAlgError("no")
        return train(self, steps)
    monkeypatch.setattr(Training, "train", fails)
    records = list(seeds_together(make("sorting"), tqdm(disable=True)))
    assert [r["error"] for r in records] == [None, "after step 0: no"] and all("together" not in r for r in records)

def test_interrupted(make, tmp_path):
    "Groups that are finished are kept, and the same call goes on"
    def stop(step, *args): raise KeyboardInterrupt
    tasks = make("sorting", method="none") + make("sorting", method="clip")
    tasks[3].make_network = stop
    with pytest.raises((KeyboardInterrupt, TypeError)): list(run_all(tasks, tmp_path, "s", show=False, engine=seeds_together))
    assert len(read_runs(tmp_path)) == 2
    records = list(run_all(make("sorting", method="none") + make("sorting", method="clip"), tmp_path, "s", show=False, engine=seeds_together))
    assert len(read_runs(tmp_path)) == 4 and [r["config"]["method"] for r in records] == ["none"]*2 + ["clip"]*2

def test_learning_rate_drops(make):
    training = Training(make("paths", epochs=2))
    assert training.task.milestones == [6, 8]
    rates = []
    for _ in range(10): training.train(1); rates.append(float(training.lr))
    torch.testing.assert_close(rates, [3e-3]*6 + [3e-4]*2 + [3e-5]*2)

def test_batches_of_a_group_are_those_of_each(make):
    for kind in ("sorting", "paths"):
        tasks = make(kind, (3, 8), precision="float32")
        alone, training = [t.batches() for t in tasks], Training(tasks)
        for _ in range(5):
            x, (t,) = tasks[0].batch(training.draw())
            for k, (a, (b,)) in enumerate(map(next, alone)): assert torch.equal(x[k], a) and torch.equal(t[k], b)

@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_other_precisions(make, precision):
    for run, task in zip(fit(make("sorting", precision=precision, method="fisher")), make("sorting", precision=precision, method="fisher")):
        alone, = fit([task])
        losses = [{k: r.curves[k] for k in ("step", "train_loss", "true_loss")} for r in (run, alone)]
        same_curves(*losses, 1e-2 if precision == "float32" else .2)

def test_flags_of_precision_are_put_back():
    flags = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)
    before = flags()
    with pytest.raises(KeyError), network_precision("tf32", torch.device("cuda")):
        assert flags() == (True, True, True)
        raise KeyError
    assert flags() == before

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS[::3], ids=name)
def test_captured_is_the_same(make, kind):
    kind, config = kind
    logs = [Training(make(kind, device="cuda", **config), capture=o).train(5) for o in (True, False)]
    torch.testing.assert_close(*logs, rtol=1e-8, atol=1e-10)

def test_training_may_go_on(make):
    "Beyond the steps of the configuration, and in any portions"
    a, b = (Training(make("sorting", steps=4)) for _ in range(2))
    torch.testing.assert_close(torch.cat([a.train(3), a.train(1), a.train(5)]), b.train(9), rtol=1e-9, atol=1e-11)
