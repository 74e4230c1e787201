"""Newton losses in several gloo processes as training loops meet them: micro-batches, resumed runs, mistakes and deaths of one process. This file is also the program of those processes."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from newton_losses_nb import (
    DiagonalHessian, Fisher, Hessian, Krylov, MovingAverage, NewtonLoss, OutputLoss, Remembering, Scalar, Window, inject_fisher)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, and kills by signals, which Windows has not")

N, D = 12, torch.double

def bumpy(y, t): return F.softplus(y*t).sum(1) + (y[:, 0]*y[:, -1]).sin() + (y**4).mean(1)
def kinked(y, t): return y.sub(t).abs().pow(1.5).sum(1)                        # an infinite Hessian where y = t

DIRECTIONS = {"fisher": lambda: Fisher(.1), "hessian": lambda: Hessian(30.), "auto": lambda: Hessian(eigenvalues="abs"), "diagonal": lambda: DiagonalHessian(30.),
              "krylov": lambda: Krylov(30., tol=1e-9), "scalar": lambda: Scalar(.1), "window": lambda: Remembering(Fisher(), Window(2)),
              "average": lambda: Remembering(Fisher(.5), MovingAverage(.7)), "average hessian": lambda: Remembering(Hessian(30.), MovingAverage(.7)),
              "window diagonal": lambda: Remembering(DiagonalHessian(30.), Window(2))}
make = lambda name, f, **k: OutputLoss(f, DIRECTIONS[name](), **k)

# ---------------------------------------------------------------- what runs in each process

def data(m=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, m)).to(D), torch.randn(N, 3, dtype=D), torch.randn(N, m, dtype=D)

def gradient(net, f):
    net.zero_grad(); f()
    full = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
    return torch.cat([full(p.grad).flatten() for p in net.parameters()]).clone()

far = lambda a, b: float((a - b).norm()/b.norm())

def difference(f):
    "Relative difference of what `f` returns, two gradients; an error's text"
    try: return far(*f())
    except Exception as e: return f"{type(e).__name__}: {e}"

PART = {2: [(5, 7)], 4: [(1, 5, 2, 4)]}

def part_of(rank, size):
    counts, = PART[size]
    return slice(sum(counts[:rank]), sum(counts[:rank + 1]))

def guards(rank, size):
    "One sample without a Hessian, in one process: the plain gradient in all"
    net, x, t = data()
    ddp, found, kink, part = nn.parallel.DistributedDataParallel(net), {}, t.clone(), part_of(rank, size)
    kink[2] = net(x).detach()[2]
    a = gradient(net, lambda: OutputLoss(kinked, group=None)(net(x), kink).backward())
    for name in ("hessian", "auto", "diagonal", "average hessian", "window diagonal"):
        found[f"gradient {name}"] = difference(lambda: (gradient(net, lambda: make(name, kinked, on_nonfinite="gradient")(ddp(x[part]), kink[part]).backward()), a))
    return found

def accumulated(rank, size):
    "Micro-batches under `no_sync`, uneven and empty ones among them"
    net, x, t = data()
    ddp, found = nn.parallel.DistributedDataParallel(net), {}
    for name in DIRECTIONS:
        if name == "krylov": continue
        alone, joined = (make(name, bumpy, group=g) for g in (None, "auto"))
        for step in range(2):
            part = part_of(rank, size) if step == 0 else slice(rank*N//size, (rank + 1)*N//size)
            rows = torch.arange(N)[part]
            pieces = rows.tensor_split(2) if len(rows) > 1 else (rows, rows[:0])
            def call(i):  # the share of this pair of micro-batches in the joined batch
                n = torch.tensor(len(i)); dist.all_reduce(n)
                return joined(ddp(x[i]), t[i])*(n/N)
            def backward():
                with joined.accumulated([(net(x[i]).detach(), t[i]) for i in pieces]):
                    with ddp.no_sync(): call(pieces[0]).backward()
                    call(pieces[1]).backward()
            a = gradient(net, lambda: alone(net(x), t).backward())
            found[f"{name} {step}"] = difference(lambda: (gradient(net, backward), a))
    return found

def resumed(rank, size):
    "The state that one process saves serves all"
    net, x, t = data()
    part, found = part_of(rank, size), {}
    for name in ("window", "average", "average hessian", "window diagonal"):
        whole, first, second = (make(name, bumpy) for _ in range(3))
        step = lambda l: torch.autograd.grad(l(y := (net(x[part]).detach() + .1).requires_grad_(), t[part]), y)[0]
        for _ in range(3): step(whole); step(first)
        state = [first.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(state)
        second.load_state_dict(state[0])
        found[name] = float(not torch.equal(step(whole), step(second)))
    return found

def half_and_empty(rank, size):
    "bfloat16 outputs, and one process without samples"
    y, found = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16(), {}
    t = torch.ones(6, 3)
    part = slice(0, 6) if rank == 0 else slice(6, 6)
    for name in ("fisher", "hessian", "krylov"):
        a, b = y.clone().requires_grad_(), y[part].clone().requires_grad_()
        a.grad, = torch.autograd.grad(make(name, bumpy, group=None)(a, t), a)
        b.grad, = torch.autograd.grad(make(name, bumpy)(b, t[part]), b)
        found[name] = far(b.grad.float()/2, a.grad[part].float()) if rank == 0 else 0.
    return found

def learned(rank, size):
    "A parameter of the loss: one process has no sample, or meets its first later than the other"
    found, y = {}, torch.randn(6, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    class Tempered(nn.Module):
        def __init__(self): super().__init__(); self.T = nn.Parameter(torch.tensor(2., dtype=D))
        def forward(self, y): return (self.T*y).square().sum(1)
    for name in ("module", "closure"):
        f = Tempered()
        loss = NewtonLoss(f if name == "module" else lambda y: f(y), lam=.1)
        for own in (slice(0, 6*(1 - rank)), slice(6*rank, 6), slice(5*rank, 5 + rank)):   # 6 + 0, 6 + 0, 5 + 1
            f.T.grad = None
            loss(y[own].clone().requires_grad_()).backward()
            total = torch.zeros((), dtype=D) if f.T.grad is None else f.T.grad.clone()
            dist.all_reduce(total)
            found[f"{name} {own}"] = far(total/size, 4*y.square().sum(1).mean())
    return found

def two(rank, size): return {f"{f.__name__} {k}": v for f in (accumulated, resumed, learned) for k, v in f(rank, size).items()}
def four(rank, size): return {f"{f.__name__} {k}": v for f in (guards, accumulated) for k, v in f(rank, size).items()}

def caught(f):
    start = time.time()
    try: f(); text = "no error"
    except Exception as e: text = f"{type(e).__name__}: {e}"
    return text, time.time() - start

def errors(rank, size):
    "Micro-batches that fail in the last process only: all must hear of it and go on"
    last, found, loss = rank == size - 1, {}, NewtonLoss(bumpy)
    y, t = torch.randn(3, 4, dtype=D, generator=torch.Generator().manual_seed(rank)).requires_grad_(), torch.ones(3, 4, dtype=D)
    found["no micro-batches"] = caught(lambda: loss.accumulated([] if last else [(y.detach(), t)]).__enter__())
    found["iterator"] = caught(lambda: loss.accumulated((y.detach()/(0 if last and i else 1), t*[1, "a"][last and i]) for i in range(2)).__enter__())
    found["afterwards"] = caught(lambda: loss(y, t).backward())
    return found

def one_wrong_call(rank, size):
    "What the last process only does wrong, notices, and lives on"
    last, found = rank == size - 1, {}
    y, t = torch.randn(3, 4, dtype=D), torch.ones(3, 4, dtype=D)
    leaf = lambda y: y.clone().requires_grad_()
    calls = {"args": lambda g: NewtonLoss(bumpy, group=g)(leaf(y), t.clone().requires_grad_(last)),
             "inject_empty": lambda g: inject_fisher(leaf(y[:0 if last else 3]), group=g).sum().backward(),
             "inject_scale": lambda g: inject_fisher(leaf(y), scale=lambda: 0. if last else 1., group=g).sum().backward()}
    for what, call in calls.items():
        group = dist.new_group(timeout=timedelta(seconds=2))
        found[what] = caught(lambda: call(group))
    return found

def killed(rank, size, when):
    y, t, loss = torch.randn(3, 4).requires_grad_(), torch.ones(3, 4), NewtonLoss(bumpy, Krylov(9.) if when == "within" else Hessian(9.))
    def dying(y, t):
        if rank == size - 1 and when == "within": os.kill(os.getpid(), signal.SIGKILL)
        return bumpy(y, t)
    loss(y, t)
    if rank == size - 1 and when == "between": os.kill(os.getpid(), signal.SIGKILL)
    loss.loss_fn = dying
    loss(y, t)
    return {}

def main(rank, size, folder, case, *options):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    found = globals()[case](rank, size, *options)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()

# ---------------------------------------------------------------- one program that starts them, by fork: torch is imported once

def child(rank, *job):
    os.dup2(os.open(Path(job[1], f"{rank}.err"), os.O_WRONLY | os.O_CREAT), 2)
    try: main(rank, *job)
    except BaseException: traceback.print_exc(); sys.stderr.flush(); os._exit(1)
    os._exit(0)

def fork(size, folder, case, *options, timeout=50):
    "Exit codes of the processes, and when they ended"
    start, ended, pids = time.time(), {}, {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0: child(rank, size, folder, case, *options)
        pids[pid] = rank
    while len(ended) < size:
        if time.time() > start + timeout:
            for p in pids: p in ended or os.kill(p, signal.SIGKILL)
        for p in pids:
            if p not in ended and (got := os.waitpid(p, os.WNOHANG))[0]: ended[p] = (os.waitstatus_to_exitcode(got[1]), time.time() - start)
        time.sleep(.02)
    return [ended[p] for p in pids]

def read(path): return path.read_text() if path.exists() else "null"

def start_all(folder):
    import torch._dynamo  # noqa: F401, what DDP would import in each process
    torch.set_num_threads(1)
    for job in JOBS:
        here = Path(folder, "-".join(map(str, job)))
        here.mkdir()
        ends = fork(job[0], str(here), *job[1:])
        found = [json.loads(read(here/f"{r}.json")) for r in range(job[0])]
        (here/"all.json").write_text(json.dumps([found, *zip(*ends), [read(here/f"{r}.err")[-2000:] for r in range(job[0])]]))

# ---------------------------------------------------------------- tests

JOBS = [(2, "two"), (4, "four"), (2, "half_and_empty"), (2, "errors"), (2, "one_wrong_call"), (2, "killed", "between"), (4, "killed", "within")]

@pytest.fixture(scope="module")
def once():
    "Results, exit codes, times of exit and last words of the processes of a job"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, __file__, folder], env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
        assert not done.returncode, done.stderr
        kept = {job: json.loads(Path(folder, "-".join(map(str, job)), "all.json").read_text()) for job in JOBS}
    return lambda *job: kept[job]

def wrong(found, tolerance=1e-7): return {k: v for f in found for k, v in f.items() if not (isinstance(v, float) and v < tolerance)}

@pytest.mark.parametrize("size,case", [(2, "two"), (4, "four")])
def test_same_as_one_process(once, size, case):
    found, codes, _, err = once(size, case)
    assert not any(codes) and not wrong(found), err

def test_half_precision_and_an_empty_part(once):
    found, codes, _, err = once(2, "half_and_empty")
    assert not any(codes) and not wrong(found, 1e-2), err

def test_errors_reach_all_and_the_next_call_works(once):
    found, codes, _, err = once(2, "errors")
    assert not any(codes), err
    for name in found[0]:
        (a, seconds), (b, _) = (f[name] for f in found)
        if name == "afterwards": assert a == b == "no error"
        else: assert "no error" not in (a, b) and "another process" in a and seconds < 5, (name, a, b)

@pytest.mark.parametrize("what", ("args", "inject_empty", "inject_scale"))
def test_one_wrong_call_is_an_error_in_all(once, what):
    found, codes, *_ = once(2, "one_wrong_call")
    assert found[1][what][0] != "no error" or what == "inject_empty"
    assert "Timed out" not in found[0][what][0] and (found[0][what][0] != "no error" or what == "inject_empty")

@pytest.mark.parametrize("when,size", [("between", 2), ("within", 4)])
def test_a_killed_process_ends_the_others(once, when, size):
    _, codes, ends, err = once(size, "killed", when)
    assert codes[-1] == -signal.SIGKILL and -signal.SIGKILL not in codes[:-1] and all(codes) and max(ends) - ends[-1] < 10, err

if __name__ == "__main__": start_all(sys.argv[1])
