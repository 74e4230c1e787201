"""Runs are the runs of version 0.1: stored records are found by their keys, and short runs have the weights, batches and curves stored in data/curves.json."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"benchmarks"))

from ablations import AblationTask, ablation_config
from other_losses import stored

from newton_losses_nb.lab.data import DigitSets, load_digits
from newton_losses_nb.lab.experiment import fit, run_all
from newton_losses_nb.lab.records import environment, open_results, read_runs, run_key, stored_results
from newton_losses_nb.lab.report import conclusion, summary
from newton_losses_nb.lab.tasks import ClassificationTask, PathTask, SortingTask, classification_config, path_config, sorting_config
from newton_losses_nb.paths.terrain import load_maps

MAKE = dict(sorting=(SortingTask, sorting_config), paths=(PathTask, path_config), classification=(ClassificationTask, classification_config),
            ablation=(AblationTask, ablation_config))
STORED = {"sorting": "sorting_cpu sorting_cpu_tuning choosing_cpu hard_cpu hard_cpu_tuning hard_cpu_map hard_cpu_cnn", "paths": "paths_cpu paths_cpu_tuning",
          "classification": "classification_cpu classification_cpu_tuning",
          "ablation": " ".join(f"ablation_{k}_cpu" for k in ("curvature", "damping", "noise", "targets", "transfer", "tuning"))}
DERIVED = {"paths": ("task", "steps"), "classification": ("task", "steps", "setting", "loss")}

@pytest.mark.parametrize("kind, folder", [(k, f) for k, names in STORED.items() for f in names.split()])
def test_stored_runs_are_found_again(kind, folder):
    "The same settings give the same configuration and the same key"
    for r in read_runs(stored_results(folder)):
        given = {k: v for k, v in r["config"].items() if v is not None and k not in DERIVED.get(kind, ("task",))}
        c = MAKE[kind][1](**given)
        assert c == r["config"] and run_key(c, r["data_source"]) == r["key"], (c, r["config"])

@pytest.fixture(scope="module")
def data():
    digits = load_digits()
    few = {k: type(d)(d.images[:n], d.labels[:n], d.source) for (k, d), n in zip(digits.items(), (60, 30, 30))}
    return dict(sorting=digits, ablation=digits, classification=few, paths=load_maps(train=60, valid=15, test=15))

RUNS = [json.loads(o.rstrip(",")) for o in (Path(__file__).parent/"data"/"curves.json").read_text().splitlines()[1:-1]]

def numbers(v): return torch.tensor([float("nan") if o is None else float(o) for o in v], dtype=torch.float64)

def weighted(x): return (x.double()*torch.linspace(0, 1, x.numel()).view(x.shape)).sum().item()

def name(run): return "-".join(str(run["given"].get(k)) for k in ("loss", "relaxation", "network", "optimizer", "method", "noise", "seed"))

@pytest.mark.parametrize("run", RUNS, ids=name)
def test_curves_are_those_of_before(run, data):
    cls, make = MAKE[run["kind"]]
    task = cls(make(**run["given"]), data[run["kind"]])
    assert task.key == run["key"]
    batches = task.batches()
    x, targets = [next(batches) for _ in range(3)][2]
    start = [sum(p.double().abs().sum().item() for p in task.make_network().parameters()), x.double().sum().item(), weighted(x), sum(map(weighted, targets))]
    torch.testing.assert_close(start, run["start"], rtol=1e-9, atol=1e-9)
    found, = fit([task])
    curves, result = found.curves, found.result
    exact = run["given"]["precision"] == "float64"                       # in float32, rounding grows from step to step
    tol = dict(rtol=1e-6, atol=1e-9) if exact else dict(rtol=1e-2, atol=1e-2)
    assert curves.keys() - {"seconds", "cosine"} == run["curves"].keys() and result.keys() == run["result"].keys()
    for k in run["curves"] if exact else ("step", "train_loss", "true_loss"):
        torch.testing.assert_close(numbers(curves[k]), numbers(run["curves"][k]), equal_nan=True, msg=lambda s: f"{k}: {s}", **tol)
    for k in run["result"] if exact else ("true_loss",): torch.testing.assert_close(float(result[k]), float(run["result"][k]), msg=lambda s: f"{k}: {s}", **tol)

def test_benchmarks_keep_what_is_there(tmp_path, capsys):
    "Half a line is cut off; a study with other data than its records is refused; one without trials says so"
    import hard
    from other_losses import stored
    file = tmp_path/"runs.jsonl"
    file.write_text('{"a": 1}\n{"a": ')
    assert stored(file) == [{"a": 1}] and file.read_text() == '{"a": 1}\n'

    given = dict(verb="list", data_dir=None, network="small", device="cpu", shrink=1, rows=1)
    with pytest.raises(ValueError, match="data-dir: expected the data of what is in"):
        hard.Study(SimpleNamespace(out=hard.RESULTS, **given)).go_through()
    (tmp_path/"hard_cpu").mkdir()
    (tmp_path/"hard_cpu"/"soft_sort.jsonl").write_text('{"format": 1, "key')
    for kind in (hard.Study, hard.Paths): kind(SimpleNamespace(out=tmp_path, **given)).go_through()
    assert capsys.readouterr().out.count("trials to do") == 2

@pytest.mark.parametrize("given, says", [(["--shrink", "1000", "--out", "nbs/../nbs/results"], "--shrink: needs --out"), (["--device", "there"], "--device: "), (["--rows", "-1"], "--rows: expected at least 0")])
def test_mistakes_with_the_hard_study_are_a_sentence(given, says, capsys, monkeypatch):
    "A dry run is not let into the stored results, however their folder is written"
    import hard
    monkeypatch.chdir(hard.RESULTS.parent.parent)
    monkeypatch.setattr(sys, "argv", ["hard.py", "list", *given])
    with pytest.raises(SystemExit) as e: hard.main()
    assert e.value.code == 2 and says in capsys.readouterr().err

def test_no_folder_of_a_machine_in_a_record(monkeypatch):
    "Of absolute paths in the command only the last part"
    monkeypatch.setattr("sys.argv", ["/home/me/bin/nl_bench", "sorting", "--out", "/home/me/runs", "--data-dir=/data/me/mnist", "--n", "5"])
    assert environment()["command"] == "nl_bench sorting --out runs --data-dir=mnist --n 5"

def test_a_number_is_one_setting_whatever_its_type():
    "1 and 1.0 are one run; what JSON cannot hold is refused or becomes a number"
    key = lambda **kw: run_key(sorting_config(**kw), "s")
    for name, v in dict(tau=1, lr=1, max_norm=1).items(): assert key(**{name: v}) == key(**{name: float(v)})
    assert key(method="fisher", lam=1) == key(method="fisher", lam=1.) == key(method="fisher", lam=torch.tensor(1.))
    assert key(relaxation="cauchy", steepness=10) == key(relaxation="cauchy") and key(lr=np.float32(.5)) == key(lr=.5)
    for v in (None, lambda *a: 1., True, "often", [1.]):
        with pytest.raises(ValueError, match="lam: expected a (finite )?number"): sorting_config(method="fisher", lam=v)

def test_conclusion_leaves_nothing_out():
    "A difference that is the same on all seeds, and one pair beside failed runs, have no p-value"
    def runs(method, scores): return [dict(format=1, key=f"{method}{s}", status="ok" if v else "failed", error=None if v else "nan", config=dict(task="sorting", relaxation="cauchy", n=5, method=method, seed=s), data_source="digits",
                                           result=dict(exact_match=v) if v else None, curves={}, versions={}, seconds=1.) for s, v in enumerate(scores)]
    table = summary(runs("none", [.50, .51, .52, .53]) + runs("fisher", [.60, .61, .62, .63]) + runs("hessian", [.10, None, None, None]) + runs("rms", [.51, .515, .53, .537]))
    said = conclusion(table)
    assert said.startswith("1 comparison with the plain loss") and "2 without a test" in said and "3 runs of the methods failed" in said
    assert "largest gain: " in said and "fisher (+10.00 points" in said and "hessian (-40.00 points)" in said

def test_data_whatever_the_default_device():
    "And a seed that is a number of numpy's"
    def sets(seed): return DigitSets(load_digits()["train"], 3).draw(2, seed)
    images, numbers = sets(0)
    with torch.device("meta"): again = sets(np.int64(0))
    assert torch.equal(images, again[0]) and torch.equal(numbers, again[1])
    with pytest.raises(ValueError, match="generator: expected a whole number, at least 0"): sets("one")

def test_only_seeds_train_side_by_side(data):
    "Another method, or no task at all, is refused"
    tasks = [SortingTask(sorting_config(method=m, seed=s, steps=1), data["sorting"]) for s, m in enumerate(("none", "fisher"))]
    for some in (tasks, []):
        with pytest.raises(ValueError, match="tasks: expected one configuration"): fit(some)

def test_rows_without_a_plain_loss_are_named():
    def runs(method, lr, scores): return [dict(format=1, key=f"{method}{s}", status="ok", error=None, config=dict(task="sorting", relaxation="cauchy", n=5, method=method, lr=lr, seed=s), data_source="digits",
                                               result=dict(exact_match=v), curves={}, versions={}, seconds=1.) for s, v in enumerate(scores)]
    said = conclusion(summary(runs("none", .1, [.5, .51, .54]) + runs("fisher", .1, [.6, .63, .62]) + runs("rms", .2, [.6, .63, .62])))
    assert "; 1 row without a plain loss of the same settings;" in said and "largest gain: " in said

def test_one_command_at_a_time_writes_a_file(data, tmp_path):
    tasks = [SortingTask(sorting_config(seed=s, steps=1, eval_sets=10), data["sorting"]) for s in range(2)]
    first = run_all(tasks, tmp_path, "runs", show=False)
    next(first)
    with pytest.raises(OSError, match="out: expected no other command to write to"): next(run_all(tasks, tmp_path, "runs", show=False))
    assert len(list(first)) == 1 and len(list(run_all(tasks, tmp_path, "runs", show=False))) == 2
    assert len((tmp_path/"runs.jsonl").read_text().splitlines()) == 2

def test_another_file_stays_as_it_is(tmp_path):
    "Half a line at the end is cut off only where all before it are records"
    notes = tmp_path/"notes.jsonl"
    notes.write_text("line one\nmy last line")
    with pytest.raises(ValueError, match="notes.jsonl:1: cannot be read"): open_results(tmp_path, "notes")
    with pytest.raises(ValueError): stored(notes)
    assert notes.read_text() == "line one\nmy last line"
    assert open_results(tmp_path, "runs", others=False)[1] == {}
