"""Newton losses in several gloo processes take the step of one process on the joined batch; this file is also the program of those processes."""
import copy
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

from newton_losses_nb.core.newton import ClippedLoss, NewtonLoss, NormalizedLoss, OutputLoss, ScalarStepLoss, inject_fisher

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks, and kills by signals, which Windows has not")

N, D = 12, torch.double
PARTS = {2: [(5, 7), (12, 0)], 4: [(1, 5, 2, 4), (3, 0, 9, 0)]}

def bumpy(y, t): return F.softplus(y*t).sum(1) + (y[:, 0]*y[:, -1]).sin() + (y**4).mean(1)
def at_most(y, t): return torch.where(t[:, 0] > 50, torch.nan, bumpy(y, t.clamp_max(50)))  # a target beyond 50 spoils its sample
def kinked(y, t): return y.sub(t).abs().pow(1.5).sum(1)                        # an infinite Hessian where y = t

VARIANTS = {"plain": lambda f, **k: OutputLoss(f, **k), "fisher": lambda f, **k: NewtonLoss(f, lam=.1, **k), "auto": lambda f, **k: NewtonLoss(f, **k),
    "hessian": lambda f, **k: NewtonLoss(f, "hessian", lam=30., **k), "hessian auto abs": lambda f, **k: NewtonLoss(f, "hessian", eigenvalues="abs", **k),
    "sample": lambda f, **k: NewtonLoss(f, "hessian", average="sample", eigenvalues="clip", **k), "sample fisher": lambda f, **k: NewtonLoss(f, average="sample", lam=2., **k),
    "cg": lambda f, **k: NewtonLoss(f, "hessian", lam=30., solver="cg", tol=1e-9, **k), "cg auto": lambda f, **k: NewtonLoss(f, "hessian", solver="cg", tol=1e-9, **k),
    "cg fisher": lambda f, **k: NewtonLoss(f, lam=.3, solver="cg", tol=1e-9, **k), "diagonal": lambda f, **k: NewtonLoss(f, "hessian", solver="diagonal", eigenvalues="abs", **k),
    "diagonal fisher": lambda f, **k: NewtonLoss(f, solver="diagonal", **k), "window": lambda f, **k: NewtonLoss(f, window=2, **k),
    "ema": lambda f, **k: NewtonLoss(f, ema=.7, lam=.5, **k), "ema hessian": lambda f, **k: NewtonLoss(f, "hessian", ema=.7, lam=30., **k),
    "window diagonal": lambda f, **k: NewtonLoss(f, "hessian", window=2, solver="diagonal", lam=30., **k), "rule": lambda f, **k: NewtonLoss(f, lam=lambda G, e: G.square().mean()/7, **k),
    "newton value": lambda f, **k: NewtonLoss(f, value="newton", **k), "clip": lambda f, **k: ClippedLoss(f, .5, **k), "rms": lambda f, **k: NormalizedLoss(f, **k),
    "scalar": lambda f, **k: ScalarStepLoss(f, **k)}
POOLED = [k for k in VARIANTS if "sample" not in k and k not in ("plain", "cg", "cg auto", "clip", "rms", "scalar")]

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

def parts_of(size):
    for counts in PARTS[size]:
        start = sum(counts[:dist.get_rank()])
        yield slice(start, start + counts[dist.get_rank()])

def same_step(rank, size):
    net, x, t = data()
    ddp, found = nn.parallel.DistributedDataParallel(net), {}
    for name, make in VARIANTS.items():
        if size > 2 and name not in ("fisher", "hessian auto abs", "sample fisher", "cg", "ema hessian", "window", "rms"): continue
        alone, joined = make(bumpy, group=None), make(bumpy)
        for k, part in enumerate((*parts_of(size), *parts_of(size))):  # several steps, for those that remember
            found[f"{name} {k}"] = difference(lambda: [gradient(net, lambda: l(n(x[p] + k/9), t[p]).backward()) for l, n, p in ((joined, ddp, part), (alone, net, slice(None)))])
    for reduction in ("mean", "sum"):
        part = next(parts_of(size))
        reduce = lambda l: getattr(l, reduction)()
        a = gradient(net, lambda: reduce(bumpy(inject_fisher(net(x), .1, reduction, group=None), t)).backward())
        b = gradient(net, lambda: (reduce(bumpy(inject_fisher(ddp(x[part]), .1, reduction), t[part]))*1).backward())
        found[f"inject {reduction}"] = far(b*(size if reduction == "sum" else 1), a)
    return found

def masks(rank, size):
    net, x, t = data()
    ddp, found, mask = nn.parallel.DistributedDataParallel(net), {}, torch.arange(4) < torch.tensor([4, 2, 3, 0, 1, 4, 4, 2, 3, 1, 0, 2])[:, None]
    for name, make in VARIANTS.items():
        if name in ("cg", "cg auto"): continue
        alone, joined = make(bumpy, group=None), make(bumpy)
        for k, part in enumerate((*parts_of(size), *parts_of(size))):
            found[f"{name} {k}"] = difference(lambda: [gradient(net, lambda: l(n(x[p]), t[p], mask=mask[p]).backward()) for l, n, p in ((joined, ddp, part), (alone, net, slice(None)))])
    return found

def guards(rank, size):
    net, x, t = data()
    ddp, found, bad, kink, keep = nn.parallel.DistributedDataParallel(net), {}, t.clone(), t.clone(), torch.arange(N) != 2
    bad[2, 0] = 99.                                           # belongs to a part of one process
    kink[2] = net(x).detach()[2]
    for name, make in VARIANTS.items():
        part = next(parts_of(size))
        a = gradient(net, lambda: make(at_most, group=None)(net(x[keep]), t[keep]).backward())
        found[f"skip {name}"] = difference(lambda: (gradient(net, lambda: make(at_most, on_nonfinite="skip")(ddp(x[part]), bad[part]).backward()), a))
        if not (hasattr(l := make(kinked), "curvature") and l.curvature == "hessian"): continue
        a = gradient(net, lambda: OutputLoss(kinked, group=None)(net(x), kink).backward())
        found[f"gradient {name}"] = difference(lambda: (gradient(net, lambda: make(kinked, on_nonfinite="gradient")(ddp(x[part]), kink[part]).backward()), a))
    return found

def accumulated(rank, size):
    net, x, t = data()
    ddp, found = nn.parallel.DistributedDataParallel(net), {}
    for name in POOLED:
        if name == "newton value": continue
        alone, joined = (VARIANTS[name](bumpy, group=g) for g in (None, "auto"))
        for step in range(2):
            part = next(parts_of(size)) if step == 0 else slice(rank*N//size, (rank + 1)*N//size)
            count, rows = part.stop - part.start, torch.arange(N)[part]
            pieces = rows.tensor_split(2) if count > 1 else (rows, rows[:0])
            if count == 1 and step == 0: pieces = (rows, rows[:0])
            def backward():
                with joined.accumulated([(net(x[i]).detach(), t[i]) for i in pieces]):
                    with ddp.no_sync(): call(pieces[0]).backward()
                    call(pieces[1]).backward()
            def call(i):  # the share of this pair of micro-batches in the joined batch
                n = torch.tensor(len(i)); dist.all_reduce(n)
                return joined(ddp(x[i]), t[i])*(n/N)
            a = gradient(net, lambda: alone(net(x), t).backward())
            found[f"{name} {step}"] = difference(lambda: (gradient(net, backward), a))
    return found

def resumed(rank, size):
    net, x, t = data()
    part, found = next(parts_of(size)), {}
    for name in ("window", "ema", "ema hessian", "window diagonal"):
        whole, first, second = (VARIANTS[name](bumpy) for _ in range(3))
        step = lambda l: torch.autograd.grad(l(y := (net(x[part]).detach() + .1).requires_grad_(), t[part]), y)[0]
        for _ in range(3): step(whole); step(first)
        state = [first.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(state)               # the state that the first process would save
        second.load_state_dict(state[0])
        found[name] = float(not torch.equal(step(whole), step(second)))
    return found

def fsdp(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    net, x, t = data()
    sharded, part, found = copy.deepcopy(net), next(parts_of(size)), {}
    mesh = init_device_mesh("cpu", (size,))
    fully_shard(sharded[0], mesh=mesh); fully_shard(sharded, mesh=mesh)
    for name, make in VARIANTS.items():
        a = gradient(net, lambda: make(bumpy, group=None)(net(x), t).backward())
        found[name] = difference(lambda: (gradient(sharded, lambda: make(bumpy)(sharded(x[part]), t[part]).backward()), a))
    return found

def subgroups(rank, size):
    "Two pairs, each with a batch of its own"
    net, x, t = data()
    pairs, found = [dist.new_group([0, 1]), dist.new_group([2, 3])], {}
    mine, mate = pairs[rank//2], rank % 2
    rows, part = torch.arange(N)[rank//2::2], slice(0, 2) if mate == 0 else slice(2, None)
    for name, make in VARIANTS.items():
        y, u = net(x[rows]).detach().requires_grad_(), t[rows]
        a, = torch.autograd.grad(make(bumpy, group=None)(y, u), y)
        z = y.detach()[part].requires_grad_()
        b, = torch.autograd.grad(make(bumpy, group=mine)(z, u[part]), z)
        found[name] = far(b/2, a[part])                 # data parallelism halves
    return found

def half_and_empty(rank, size):
    "bfloat16 outputs, and one process without samples"
    y, found = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).bfloat16(), {}
    t = torch.ones(6, 3)
    part = slice(0, 6) if rank == 0 else slice(6, 6)
    for name in ("plain", "fisher", "hessian"):
        a, b = y.clone().requires_grad_(), y[part].clone().requires_grad_()
        a.grad, = torch.autograd.grad(VARIANTS[name](bumpy, group=None)(a, t), a)
        b.grad, = torch.autograd.grad(VARIANTS[name](bumpy)(b, t[part]), b)
        found[name] = far(b.grad.float()/2, a.grad[part].float()) if rank == 0 else 0.
    return found

def two(rank, size): return {f"{f.__name__} {k}": v for f in (same_step, masks, accumulated, resumed, fsdp) for k, v in f(rank, size).items()}
def four(rank, size): return {f"{f.__name__} {k}": v for f in (same_step, guards, subgroups) for k, v in f(rank, size).items()}

def caught(f):
    start = time.time()
    try: f(); text = "no error"
    except Exception as e: text = f"{type(e).__name__}: {e}"
    return text, time.time() - start

def errors(rank, size):
    "What goes wrong in the last process only, again and again with the same group: all must hear of it and go on"
    last, found = rank == size - 1, {}
    y, t = torch.randn(3, 4, dtype=D, generator=torch.Generator().manual_seed(rank)).requires_grad_(), torch.ones(3, 4, dtype=D)
    def broken(y, t):
        if last: raise KeyError("a bug in the loss")
        return bumpy(y, t)
    bad = torch.where(torch.tensor(last), torch.nan, t)
    for name in ("plain", "fisher", "hessian", "cg", "diagonal", "sample", "ema", "clip"):
        found[f"bug {name}"] = caught(lambda: VARIANTS[name](broken)(y, t))
        found[f"nan {name}"] = caught(lambda: VARIANTS[name](bumpy)(y, bad))
    linear = lambda y, t: ((y*t)[:, :1].exp() if last else y**2).sum(1)
    found["singular"] = caught(lambda: NewtonLoss(linear, "hessian", average="sample", lam=0.)(y, t))
    loss = NewtonLoss(bumpy)
    found["no micro-batches"] = caught(lambda: loss.accumulated([] if last else [(y.detach(), t)]).__enter__())
    found["iterator"] = caught(lambda: loss.accumulated((y.detach()/(0 if last and i else 1), t*[1, "a"][last and i]) for i in range(2)).__enter__())
    found["inject"] = caught(lambda: (inject_fisher(y)*(torch.nan if last else 1.)).sum().backward())
    y.grad = None
    found["afterwards"] = caught(lambda: VARIANTS["fisher"](bumpy)(y, t).backward())
    return found

def one_wrong_call(rank, size):
    "What the last process only does wrong, notices, and lives on"
    last, found, whole = rank == size - 1, {}, torch.ones(3, 4, dtype=torch.bool)
    y, t = torch.randn(3, 4, dtype=D), torch.ones(3, 4, dtype=D)
    leaf = lambda y: y.clone().requires_grad_()
    calls = {"mask": lambda g: NewtonLoss(bumpy, group=g)(leaf(y), t, mask=whole[:, :3 if last else 4]),
             "args": lambda g: NewtonLoss(bumpy, group=g)(leaf(y), t.clone().requires_grad_(last)),
             "inject_nan": lambda g: inject_fisher(leaf(y*(torch.nan if last else 1.)), group=g).sum().backward(),
             "inject_empty": lambda g: inject_fisher(leaf(y[:0 if last else 3]), group=g).sum().backward(),
             "inject_scale": lambda g: inject_fisher(leaf(y), scale=lambda: 0. if last else 1., group=g).sum().backward()}
    for what, call in calls.items():
        group = dist.new_group(timeout=timedelta(seconds=2))
        found[what] = caught(lambda: call(group))
    return found

def killed(rank, size, when):
    y, t, loss = torch.randn(3, 4).requires_grad_(), torch.ones(3, 4), NewtonLoss(bumpy, "hessian", lam=9., solver="cg" if when == "within" else "direct")
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
    import torch._dynamo, torch.distributed.fsdp  # noqa: F401, what DDP and FSDP would import in each process
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

AN_EMPTY_PART, NO_HESSIAN = {f"same_step sample {k}" for k in (1, 3)}, {"guards gradient cg auto"}

def wrong(found, tolerance=1e-7): return {k: v for f in found for k, v in f.items() if not (isinstance(v, float) and v < tolerance)}

@pytest.mark.parametrize("size,case", [(2, "two"), (4, "four")])
def test_same_as_one_process(once, size, case):
    found, codes, _, err = once(size, case)
    assert not any(codes), err
    assert not {k: v for k, v in wrong(found).items() if k not in AN_EMPTY_PART | NO_HESSIAN}

def test_own_hessians_and_an_empty_part(once):
    found, *_ = once(2, "two")
    assert AN_EMPTY_PART <= set(found[0]) and not {k: v for k, v in wrong(found).items() if k in AN_EMPTY_PART}

def test_a_missing_hessian_and_the_automatic_damping_of_cg(once):
    found, *_ = once(4, "four")
    assert NO_HESSIAN <= set(found[0]) and not {k: v for k, v in wrong(found).items() if k in NO_HESSIAN}

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

@pytest.mark.parametrize("what", ("mask", "args", "inject_nan", "inject_empty", "inject_scale"))
def test_one_wrong_call_is_an_error_in_all(once, what):
    found, codes, *_ = once(2, "one_wrong_call")
    assert found[1][what][0] != "no error" or what == "inject_empty"
    assert "Timed out" not in found[0][what][0] and (found[0][what][0] != "no error" or what == "inject_empty")

@pytest.mark.parametrize("when,size", [("between", 2), ("within", 4)])
def test_a_killed_process_ends_the_others(once, when, size):
    _, codes, ends, err = once(size, "killed", when)
    assert codes[-1] == -signal.SIGKILL and -signal.SIGKILL not in codes[:-1] and all(codes) and max(ends) - ends[-1] < 10, err

if __name__ == "__main__": start_all(sys.argv[1])
