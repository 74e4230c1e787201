"""Shards and a Ray cluster do each run once, and what is killed is done again."""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import fit
from newton_losses_nb.lab.records import read_runs
from newton_losses_nb.lab.tasks import SortingTask

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills by signals, which Windows has not")

ENV = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
CLI = ["-m", "newton_losses_nb.lab.cli", "sorting", "--relaxations", "neural_sort", "--methods", "none", "--engine", "local", "--steps", 20, "--eval-every", 10, "--eval-sets", 50]

def interruptible():
    "A shell's background jobs, and what they start, ignore Ctrl-C; these do not"
    signal.signal(signal.SIGINT, signal.default_int_handler)

def launch(*argv, **kw):
    return subprocess.Popen([sys.executable, *map(str, argv)], env=ENV, preexec_fn=interruptible, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

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
        if process.poll() is not None: pytest.fail(f"ended: {process.communicate()}")
        if time.monotonic() > deadline: process.send_signal(signal.SIGINT); pytest.fail(f"too slow: {process.communicate()}")
        time.sleep(.01)

def test_module_as_command():
    for argv in (["sorting", "--help"], []):
        done = subprocess.run([sys.executable, "-m", "newton_losses_nb.lab.cli", *argv], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr

def test_shards_share_a_folder(tmp_path):
    "Two at a time, one of them killed; what is left is done by a command without shards, and the report is about all"
    one, two = (launch(*CLI, "--seeds", 12, "--shard", f"{i}/2", "--out", tmp_path) for i in (1, 2))
    files = [tmp_path/f"sorting-{i}of2.jsonl" for i in (1, 2)]
    wait_for(lambda: finished(files[1]) >= 1, two)
    two.kill()
    two.communicate()
    code, out, err = finish(one)
    assert code == 0 and "6 runs on" in out and finished(files[0]) == 6, err
    kept = {f: f.read_bytes() for f in files}
    code, out, err = finish(launch(*CLI, "--seeds", 12, "--out", tmp_path))
    assert code == 0, err
    runs = read_runs(tmp_path)
    assert {r["config"]["seed"] for r in runs} == set(range(12)) and sum(map(finished, tmp_path.glob("*.jsonl"))) == 12
    assert all(f.read_bytes() == old for f, old in kept.items())
    assert re.search(r"none +\| +12 ", out)

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

def bench(*argv, env=ENV):
    done = subprocess.run([sys.executable, *map(str, [*CLI, *argv])], env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr

def test_engine_mistakes(tmp_path):
    assert bench("--engine", "spark")[0::2] == (2, "nl_bench: engine: expected one of local, together, ray, got 'spark'\n")
    assert "expected ray with an address" in bench("--address", "auto")[2]
    (tmp_path/"sitecustomize.py").write_text("import importlib.util as u; old = u.find_spec; u.find_spec = lambda m, *a: None if m == 'ray' else old(m, *a)")
    code, _, err = bench("--engine", "ray", "--out", tmp_path, env=ENV | {"PYTHONPATH": f"{tmp_path}:{ENV.get('PYTHONPATH', '')}"})
    assert code == 2 and "needs the extra 'ray'" in err

@needs_ray
@pytest.mark.parametrize("address, says", [("nonsense", "Invalid address format"), ("127.0.0.1:1", "refused")])
def test_ray_without_cluster(address, says, tmp_path):
    code, _, err = bench("--engine", "ray", "--address", address, "--out", tmp_path)
    assert code == 2 and f"nl_bench: address: no Ray cluster at {address!r}: " in err and says in err

RAY = '''
import os, sys, time
from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import run_all
from newton_losses_nb.lab.cli import ray_engine
from newton_losses_nb.lab.tasks import SortingTask, sorting_config

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
tasks = [(Slow if s else SortingTask)(sorting_config(seed=s, steps=10, eval_every=5, eval_sets=20), digits) for s in seeds]
print([r["config"]["seed"] for r in run_all(tasks, folder, "sorting", show=False, engine=ray_engine)])
'''

@needs_ray
def test_ray(tmp_path):
    "A worker is killed in the middle of a run; of five runs one never ends, and the driver is interrupted; what is finished is found"
    (tmp_path/"grid.py").write_text(RAY)
    grid, file, pid = (tmp_path/"grid.py", tmp_path), tmp_path/"sorting.jsonl", lambda s: tmp_path/f"pid-{s}"
    process = launch(*grid, 1, 0, 2, 3, 5, start_new_session=True)
    wait_for(lambda: pid(1).exists() and pid(1).read_text().endswith("\n"), process, 300)   # Ray is slow to start on a busy machine
    os.kill(int(pid(1).read_text()), signal.SIGKILL)
    wait_for(lambda: finished(file) == 4 and pid(5).exists() and pid(5).read_text(), process)
    assert len(pid(1).read_text().split()) == 2
    os.kill(process.pid, signal.SIGINT)
    code, out, err = finish(process, 60)
    assert code and "KeyboardInterrupt" in err
    worker, deadline = Path(f"/proc/{pid(5).read_text().strip()}"), time.monotonic() + 30
    while worker.exists() and time.monotonic() < deadline: time.sleep(.1)
    assert not worker.exists(), "the worker goes on after its driver has ended"

    code, out, err = finish(launch(*grid, 0, 1, 2, 3))
    assert code == 0 and out == "[0, 1, 2, 3]\n", err
    runs = {r["config"]["seed"]: r for r in map(json.loads, file.read_text().splitlines())}
    assert set(runs) == {0, 1, 2, 3} and finished(file) == 4
    assert all(r["command"].startswith("grid.py") and r["device_name"].endswith(" 1 threads") and r["status"] == "ok" for r in runs.values())
    torch.set_num_threads(1)
    for s in (0, 1): assert fit([SortingTask(runs[s]["config"], load_digits())])[0].result == runs[s]["result"]
