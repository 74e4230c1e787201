"""Several processes give the numbers of one, or end together; a Ray cluster does each run once."""
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import SortingTask, run_record
from newton_losses_nb.lab.processes import Team, _start, join_processes, my_part, ray_cluster
from newton_losses_nb.lab.records import read_runs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, and kills by signals, which Windows has not")

ENV = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
CLI = ["-m", "newton_losses_nb.lab.cli", "sorting", "--relaxations", "neural_sort", "--methods", "none", "--steps", 20, "--eval-every", 10, "--eval-sets", 50]

METHODS = ["none", "clip_grad", "fisher", "hessian", "hessian_abs", "rms", "scalar", "clip"]
BATCH = 58   # four processes cannot share it evenly

def arguments(processes, *argv):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    return [sys.executable, *map(str, [*torchrun, *argv])]

def interruptible():
    "A shell's background jobs, and what they start, ignore Ctrl-C; these do not"
    signal.signal(signal.SIGINT, signal.default_int_handler)

def launch(processes, *argv, **kw):
    return subprocess.Popen(arguments(processes, *argv), env=ENV, preexec_fn=interruptible, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def finish(process, seconds=240):
    try: out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"a hang: {process.communicate()}")
    return process.returncode, out, err

def finished(file): return file.read_bytes().count(b"\n") if file.exists() else 0

def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate() if process.poll() is not None else "too slow"
        time.sleep(.01)

def children(pid):
    out = [int(o) for p in Path(f"/proc/{pid}/task").iterdir() for o in (p/"children").read_text().split()]
    return [o for o in out if b"resource_tracker" not in Path(f"/proc/{o}/cmdline").read_bytes()]


def test_parts():
    for n, size in ((10, 4), (3, 3), (1000, 7)):
        parts = [range(n)[my_part(n, r, size)] for r in range(size)]
        assert [i for p in parts for i in p] == list(range(n)) and max(map(len, parts)) - min(map(len, parts)) <= 1

SCRIPT = '''
import json, math, sys, torch
from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import DAMPED, SortingTask, fit, one_by_one, run_all, sorting_config
from newton_losses_nb.lab.paths import PathTask, path_config
from newton_losses_nb.lab.processes import join_processes, leave_processes
from newton_losses_nb.paths.terrain import load_maps
from newton_losses_nb.core.curvature import NonFiniteError

folder, batch, methods = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
team, out = join_processes(), {}
digits, sizes = load_digits(), dict(train=60, valid=20, test=20)
few, maps = dict(train=20, valid=4, test=4), load_maps(**sizes)
few_maps = {k: maps[k][:n] for k, n in few.items()}

def keep(name, task):
    nets, curves, make = [], {}, task.make_network
    task.make_network = lambda: nets.append(make()) or nets[0]
    result = fit(task, curves, team=team)
    out[name] = dict(state={k: v.clone() for k, v in nets[0].state_dict().items()}, loss=curves["train_loss"][1:], norm=curves["grad_norm"][1:],
                     grad=torch.cat([p.grad.flatten() for p in nets[0].parameters()]), scores=curves["exact_match"], result=result)

for precision, steps in (("float64", 12), ("float32", 1)):
    for m in methods:
        c = sorting_config("cauchy", m, batch=batch, lr=1e-3, steps=steps, eval_every=4, eval_sets=50, precision=precision, lam=1. if m in DAMPED else "auto", max_norm=.05)
        keep((precision, m), SortingTask(c, digits))
for network in ("small", "resnet18"):
    small = network == "small"
    for loss in ("relaxed_bf", "fenchel_young", "smoothed_loss") if small else ("blackbox",):
        c = path_config(loss, "fisher" if loss == "fenchel_young" else "none", epochs=3 if small else 1, batch=20 if small else 10, precision="float64", network=network, **(sizes if small else few))
        keep((network, loss), PathTask(c, maps if small else few_maps))

class Explodes(SortingTask):
    "The loss of the last process turns infinite in the third step, before any other gets that far"
    def part(self, x, targets, mine):
        self.calls = getattr(self, "calls", 0) + 1
        y = x.new_full(x.shape, math.nan) if self.calls == 3 and mine.stop == len(x) else x
        return y[mine], tuple(t[mine] for t in targets)

class EvaluationFails(SortingTask):
    def scores(self, y, labels): raise NonFiniteError("scores: expected finite numbers")

tiny = dict(steps=10, eval_every=2, eval_sets=20, batch=20)
tasks = [SortingTask(sorting_config(**tiny), digits), Explodes(sorting_config(seed=1, **tiny), digits), EvaluationFails(sorting_config(seed=2, **tiny), digits),
         SortingTask(sorting_config(seed=3, **tiny), digits)]
if team.size > 1:
    if team.rank: team.follow(tasks)
    else: list(run_all(tasks, folder, "sorting", show=False, engine=team.lead))
    everything = [None]*team.size
    torch.distributed.all_gather_object(everything, out)
    for other in everything[1:]:
        for k in out: torch.testing.assert_close(other[k], out[k], rtol=0, atol=0, equal_nan=True)
if team.rank == 0: torch.save(out, f"{folder}/out.pt")
leave_processes()
'''

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "The same training by one, two and four processes"
    folder, out = tmp_path_factory.mktemp("trained"), {}
    (folder/"train.py").write_text(SCRIPT)
    for size in (1, 2, 4):
        (folder/str(size)).mkdir()
        code, _, err = finish(launch(size, folder/"train.py", folder/str(size), BATCH, *METHODS))
        assert code == 0, err
        out[size] = torch.load(folder/f"{size}/out.pt")
    return folder, out

@pytest.mark.parametrize("size", [2, 4])
def test_same_training_as_one_process(trained, size):
    _, out = trained
    one, some = out[1], out[size]
    for m in METHODS:
        a, b = some["float64", m], one["float64", m]
        torch.testing.assert_close(a["state"], b["state"], rtol=1e-7, atol=1e-8, msg=lambda s: f"{m}: {s}")
        torch.testing.assert_close(torch.tensor([a["loss"], a["norm"]]), torch.tensor([b["loss"], b["norm"]]), rtol=1e-7, atol=1e-9)
        assert a["result"] == pytest.approx(b["result"]) and a["scores"] == b["scores"]
        a, b = some["float32", m], one["float32", m]
        assert (a["grad"] - b["grad"]).norm() < 1e-4*b["grad"].norm() and b["grad"].norm() > 0, m
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)

@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [("small", "relaxed_bf"), ("small", "fenchel_young"), ("small", "smoothed_loss"), ("resnet18", "blackbox")], ids=lambda o: "-".join(o))
def test_same_paths_as_one_process(trained, size, name):
    "With batch normalisation over all processes, and each map's own noise"
    a, b = trained[1][size][name], trained[1][1][name]
    assert any("running_var" in k for k in b["state"])
    torch.testing.assert_close(a["state"], b["state"], rtol=1e-6, atol=1e-8)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-7) and a["result"] == pytest.approx(b["result"])

@pytest.mark.parametrize("size", [2, 4])
def test_failure_of_one_is_the_failure_of_all(trained, size):
    runs = [json.loads(o) for o in (trained[0]/str(size)/"sorting.jsonl").read_text().splitlines()]
    assert [r["status"] for r in runs] == ["ok", "failed", "failed", "ok"]
    assert "after step 2: y: expected finite numbers" in runs[1]["error"] and runs[1]["curves"]["step"] == [0, 2]
    assert "scores: expected finite numbers" in runs[2]["error"]
    assert all(r["processes"] == size for r in runs)


@pytest.mark.parametrize("size", [2, 4])
def test_killed_and_resumed(tmp_path, size):
    process = launch(size, *CLI, "--seeds", 40, "--out", tmp_path)
    wait_for(lambda: finished(tmp_path/"sorting.jsonl") >= 2, process)
    time.sleep(random.random())
    victim = random.choice(children(process.pid))
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    code, out, err = finish(process, 60)
    kept = (tmp_path/"sorting.jsonl").read_bytes()
    n = kept.count(b"\n")
    assert code not in (0, None) and time.monotonic() - start < 40, err
    assert 2 <= n < 40
    code, out, err = finish(launch(1, *CLI, "--seeds", n + 1, "--out", tmp_path))
    assert code == 0, err
    lines = (tmp_path/"sorting.jsonl").read_bytes()
    assert lines.startswith(kept[:kept.rfind(b"\n") + 1])
    runs = [json.loads(o) for o in lines.splitlines()]
    assert len({r["key"] for r in runs}) == len(runs) == n + 1
    assert {r["config"]["seed"] for r in runs} == set(range(n + 1)) and [r["processes"] for r in runs] == [size]*n + [1]

@pytest.mark.parametrize("how,rank", [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 1)])
def test_without_torchrun(tmp_path, how, rank):
    "Started by hand, nobody ends the others from outside; one that stops without dying is given up after the timeout"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = [ENV | {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} for r in (0, 1)]
    pair = [subprocess.Popen(arguments(1, *CLI, "--seeds", 40, "--out", tmp_path, "--timeout", 0.15), env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for e in env]
    try:
        wait_for(lambda: finished(tmp_path/"sorting.jsonl") >= 1, pair[0])
        os.kill(pair[rank].pid, how)
        code, out, err = finish(pair[1 - rank], 60)
        assert code == 2 and "another process ended, or did not answer in time" in err and "Traceback" not in err, err
    finally:
        for p in pair: p.kill(); p.communicate()
    assert len(read_runs(tmp_path)) >= 1

def test_mistakes_of_several(tmp_path):
    "Said once, by the first process; more processes than samples; no wait for a process that never comes"
    code, out, err = finish(launch(2, *CLI, "--lam", "big"))
    assert code and err.count("lam: expected a number or auto") == 1
    code, out, err = finish(launch(2, *CLI, "--batch", 1, "--out", tmp_path))
    assert code and "batch: expected at least one sample for each of the 2 processes, got 1" in err and not finished(tmp_path/"sorting.jsonl")

def test_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="no MASTER_ADDR"): join_processes()
    for k, v in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")): monkeypatch.setenv(k, v)
    with pytest.raises(ValueError, match="minutes: expected a positive number"): join_processes(minutes=0)
    with pytest.raises(ConnectionError, match="another process ended, or did not answer"): join_processes(minutes=0.02)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one GPU for each process of a machine, got process 0 and 0 GPUs"): join_processes("cuda")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not isinstance(join_processes(), Team)

def test_module_as_command():
    for argv in (["sorting", "--help"], []):
        done = subprocess.run([sys.executable, "-m", "newton_losses_nb.lab.cli", *argv], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

def bench(*argv, env=ENV):
    done = subprocess.run(arguments(1, *CLI, *argv), env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr

def test_engine_mistakes(tmp_path):
    assert bench("--engine", "spark")[0::2] == (2, "nl_bench sorting: engine: expected local, together or ray, got 'spark'\n")
    assert "expected ray with an address" in bench("--jobs", 2)[2]
    assert "engine: expected local under torchrun" in bench("--engine", "ray", env=ENV | {"WORLD_SIZE": "2"})[2]
    (tmp_path/"sitecustomize.py").write_text("import importlib.util as u; old = u.find_spec; u.find_spec = lambda m, *a: None if m == 'ray' else old(m, *a)")
    code, _, err = bench("--engine", "ray", "--out", tmp_path, env=ENV | {"PYTHONPATH": f"{tmp_path}:{ENV.get('PYTHONPATH', '')}"})
    assert code == 2 and "engine: ray needs the extra 'ray'" in err

@needs_ray
def test_ray_without_cluster(tmp_path):
    code, _, err = bench("--engine", "ray", "--address", "nonsense", "--out", tmp_path)
    assert code == 2 and "address: cannot join a Ray cluster at 'nonsense': ValueError: Invalid address" in err
    with pytest.raises(ConnectionError, match="no Ray cluster answered at '127.0.0.1:1' within 6 s"), ray_cluster("127.0.0.1:1", seconds=6): pass
    for jobs in (2, 0, -1):
        with pytest.raises(ValueError, match="jobs: expected"), ray_cluster("auto" if jobs > 0 else None, jobs=jobs): pass

def test_ray_starts_again():
    "Ray gives up after 15 s on a busy machine; that is worth another try, other errors are not"
    class Busy:
        def __init__(self, errors): self.errors, self.ended = errors, 0
        def init(self, **kw):
            if self.errors: raise self.errors.pop(0)
            return "started"
        def shutdown(self): self.ended += 1
    slow = Exception("The current node timed out during startup. This could happen")
    busy = Busy([slow, slow])
    assert _start(busy, {}) == "started" and busy.ended == 2
    with pytest.raises(ConnectionError, match="engine: Ray did not start: The current node timed out"): _start(Busy([slow]*3), {})
    with pytest.raises(ConnectionError, match="engine: Ray did not start: no disk"): _start(Busy([OSError("no disk")]), {})

RAY = '''
import functools, os, sys, time
from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import SortingTask, run_all, sorting_config
from newton_losses_nb.lab.processes import Job, ray_cluster, ray_engine

folder = sys.argv[1]
class Slow(SortingTask):
    "Says who does it; waits at the first try until somebody ends it"
    def make_network(self):
        name = f"{folder}/pid-{self.config['seed']}"
        first = not os.path.exists(name)
        with open(name, "a") as f: f.write(f"{os.getpid()}\\n")
        if self.config["seed"] == 1 and first or self.config["seed"] == 5: time.sleep(300)
        return super().make_network()

digits = load_digits()
seeds = list(map(int, sys.argv[2:]))
jobs = [Job(Slow if s else SortingTask, sorting_config(seed=s, steps=10, eval_every=5, eval_sets=20), digits) for s in seeds]
engine = functools.partial(ray_engine, cluster=functools.partial(ray_cluster, jobs=2))
print([r["config"]["seed"] for r in run_all(jobs, folder, "sorting", show=False, engine=engine)])
'''

@needs_ray
def test_ray(tmp_path):
    "A worker is killed in the middle of a run; of five runs one never ends, and the driver is interrupted; what is finished is found"
    (tmp_path/"grid.py").write_text(RAY)
    grid, file, pid = (tmp_path/"grid.py", tmp_path), tmp_path/"sorting.jsonl", lambda s: tmp_path/f"pid-{s}"
    process = launch(1, *grid, 1, 0, 2, 3, 5, start_new_session=True)
    wait_for(lambda: pid(1).exists() and pid(1).read_text().endswith("\n"), process)
    os.kill(int(pid(1).read_text()), signal.SIGKILL)
    wait_for(lambda: finished(file) == 4 and pid(5).exists() and pid(5).read_text(), process)
    assert len(pid(1).read_text().split()) == 2
    os.kill(process.pid, signal.SIGINT)
    code, out, err = finish(process, 60)
    assert code and "KeyboardInterrupt" in err
    worker, deadline = Path(f"/proc/{pid(5).read_text().strip()}"), time.monotonic() + 30
    while worker.exists() and time.monotonic() < deadline: time.sleep(.1)
    assert not worker.exists(), "the worker goes on after its driver has ended"

    code, out, err = finish(launch(1, *grid, 0, 1, 2, 3))
    assert code == 0 and out == "[0, 1, 2, 3]\n", err
    runs = {r["config"]["seed"]: r for r in map(json.loads, file.read_text().splitlines())}
    assert set(runs) == {0, 1, 2, 3} and finished(file) == 4
    assert all(r["command"].startswith("grid.py") and r["device_name"].endswith(" 1 threads") and r["status"] == "ok" for r in runs.values())
    torch.set_num_threads(1)
    for s in (0, 1): assert run_record(SortingTask(runs[s]["config"], load_digits()), {})["result"] == runs[s]["result"]
