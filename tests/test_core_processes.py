"Two and three gloo processes with uneven and empty parts take the step of one, and fail together"
import copy
import os
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference import Case, bumpy, close, data, holes, run, step

from newton_losses_nb import (
    ClippedLoss, DiagonalHessian, Fisher, Hessian, Krylov, NewtonLoss, OutputLoss, PerSample,
    Remembering, Scalar, Window, inject_fisher)
from newton_losses_nb.core.derivatives import NonFiniteError
from newton_losses_nb.core.evidence import Batch, SingularError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and files as a meeting point")

# a step after the other
PARTS = {2: [(4, 5), (9, 0), (1, 8)], 3: [(2, 3, 4), (5, 0, 4), (0, 9, 0)]}
CASES = [Case("plain"), Case("fisher", .1), Case("fisher", .2, .25), Case("whiten", .1),
         Case("hessian", 4.),
         Case("hessian", .3, .5, "abs"), Case("hessian", .3, 1., "clip"), Case("dfisher", .1),
         Case("dhessian", .3, 1., "abs"), Case("krylov", 4.), Case("clip", .3), Case("normalize"),
         Case("scalar", .2), Case("fisher", .1, own=True), Case("hessian", 4., own=True),
         Case("krylov", 4., own=True), Case("fisher", .1, memory=("window", 2)),
         Case("hessian", 4., memory=("window", 2)), Case("fisher", .1, memory=("average", .6)),
         Case("hessian", .3, 1., "abs", memory=("average", .6)),
         Case("dfisher", .1, memory=("average", .6))]
HOW = ["plain", "mask", "bad"]
FREE = {"fisher": lambda: Fisher(), "hessian": lambda: Hessian(eigenvalues="abs"),
        "scalar": lambda: Scalar(),
        "krylov": lambda: Krylov(tol=1e-12, max_iter=200),
        "own": lambda: PerSample(Hessian(eigenvalues="abs")),
        "probes": lambda: DiagonalHessian(eigenvalues="abs", probes=3),
        "own probes": lambda: PerSample(DiagonalHessian(4., probes=3)),
        "own krylov": lambda: PerSample(Krylov(tol=1e-12, max_iter=200))}

def batch(k, how):
    "The k-th batch of 9 samples: y, (u, w), mask"
    y, u, w = data(9, 4, 50 + k)
    if how == "bad": y[k, 0], w[k+3] = torch.nan, torch.inf
    return y, (u, w), holes(9, 4, k) if how == "mask" else None

def skipped(case, how): return how == "mask" and case.kind in ("krylov", "normalize", "scalar")

def cap(y):
    "H = -I/2"
    return -y.square().sum(-1)/4

def mine(parts, rank, *tensors):
    start = sum(parts[:rank])
    return [None if x is None else x[start:start + parts[rank]] for x in tensors]

# ---------------------------------------------------------------- what runs in each process

def three_steps(rank, size, direction, how, **kw):
    "Gradients of a loss, one for each batch"
    loss = OutputLoss(bumpy, direction, on_nonfinite="skip" if how == "bad" else "raise", **kw)
    out = []
    for k, parts in enumerate(PARTS[size]):
        y, args, mask = batch(k, how)
        y, u, w, mask = mine(parts, rank, y, *args, mask)
        out.append(run(loss, y, u, w, mask=mask))
    return out

def kind(call):
    "What an error is, and what it says"
    try: call()
    except Exception as e:
        return [type(e).__name__, isinstance(e, NonFiniteError), isinstance(e, SingularError),
                str(e)]
    return ["none", False, False, ""]

def errors(rank, size):
    "Calls that fail in the last process"
    y, u, w = data(9, 4, 60)
    y, u, w = mine(PARTS[size][0], rank, y, u, w)
    last = rank == size - 1
    def broken(y, u, w):
        if last: raise KeyError("a fault of my own")
        return bumpy(y, u, w)
    curved = lambda y: cap(y) if last else y.square().sum(-1)
    bad = y*torch.nan if last else y
    calls = {"outputs": lambda: run(NewtonLoss(bumpy, lam=.1), bad, u, w),
             "outputs, own": lambda: run(OutputLoss(bumpy, PerSample(Fisher(.1))), bad, u, w),
             "outputs, krylov": lambda: run(OutputLoss(bumpy, Krylov(4.)), bad, u, w),
             "loss": lambda: run(NewtonLoss(bumpy, "hessian", 4.), y, u,
                                 w*torch.inf if last else w),
             "exception": lambda: run(NewtonLoss(broken, "hessian", 4.), y, u, w),
             "singular": lambda: run(NewtonLoss(cap, "hessian", .5), y),
             "singular, own": lambda: run(OutputLoss(curved, PerSample(Hessian(.5))), y),
             "inject": lambda: inject_fisher(bad.clone().requires_grad_(), .1).sum().backward(),
             "shape": lambda: run(NewtonLoss(bumpy, lam=.1), y[:, :3] if last else y,
                                  u[:, :3] if last else u, w),
             "mask": lambda: run(NewtonLoss(bumpy, lam=.1), y, u, w, mask=y if last else y > 0)}
    def lam(square, e):
        if last: raise KeyError("a fault of my own")
        return .1
    def product(y, *args):
        x = y*1
        if last and y.requires_grad: x.register_hook(lambda g: Fails.apply(g))
        return bumpy(x, *args)
    def memory():
        loss = OutputLoss(bumpy, Remembering(Fisher(.1), Window(3)))
        with torch.no_grad(): past = OutputLoss(bumpy, Fisher(.1), group=None).direction.observe(Batch(None, y, None))
        if last: loss.direction.memory.keep([past])
        return run(loss, y, u, w)
    deep = lambda make: lambda: run(make(), *(x.expand(2 + last, *x.shape) for x in (y, u, w)))
    calls |= {"krylov's lam": lambda: run(OutputLoss(bumpy, Krylov(lam)), y, u, w),
              "krylov's products": lambda: run(OutputLoss(product, Krylov(.1), check=False), y, u, w), "memory": memory,
              "leading": deep(lambda: NewtonLoss(bumpy, lam=.1)), "leading, clip": deep(lambda: ClippedLoss(bumpy)),
              "group": lambda: run(NewtonLoss(bumpy, group=[0, 1]), y, u, w)}
    return calls

class Fails(torch.autograd.Function):
    "The identity; its gradient has none"
    @staticmethod
    def forward(ctx, g): return g*1
    @staticmethod
    def backward(ctx, g): raise KeyError("a fault of my own")

def one_call(rank, size):
    "Single calls: what they send back"
    y, u, w = mine(PARTS[size][0], rank, *data(9, 4, 61))
    def inject(reduction):
        x = y.clone().requires_grad_()
        getattr(bumpy(inject_fisher(x, .1, reduction), u, w), reduction)().backward()
        return x.grad
    def accumulated():
        loss, half = NewtonLoss(bumpy, lam=.1), (len(y) + 1)//2
        micro = [(y[:half], u[:half], w[:half]), (y[half:], u[half:], w[half:])]
        with loss.accumulated(micro): return [run(loss, *b)[1] for b in micro]
    def ddp():
        net = torch.nn.Linear(3, 4).double()
        with torch.no_grad(): [p.fill_(.1) for p in net.parameters()]
        team = torch.nn.parallel.DistributedDataParallel(net)
        NewtonLoss(bumpy, lam=.1)(team(y[:, :3]), u, w).backward()
        return net.weight.grad
    def learned():
        "A loss with a weight of its own; the last process has no samples"
        class Weighted(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.a = torch.nn.Parameter(torch.ones(4).double())
            def forward(self, y, u, w): return bumpy(self.a*y, u, w)
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.loss = torch.nn.Linear(3, 4).double(), NewtonLoss(Weighted(), lam=.1)
            def forward(self, x, u, w): return self.loss(self.net(x), u, w)
        team = torch.nn.parallel.DistributedDataParallel(Model())
        some = slice(0, 0) if rank == size - 1 else slice(None)
        for _ in range(2): team(y[some, :3], u[some], w[some]).backward()
        return team.module.loss.loss_fn.a.grad
    def unused():
        "A loss that is a method of the model, of which it uses a part"
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.net, self.aux = torch.nn.Linear(3, 4).double(), torch.nn.Linear(3, 4).double()
                self.loss = NewtonLoss(self.per, lam=.1)
            def forward(self, x): return self.net(x)
            def per(self, y, u, w): return bumpy(y, u, w)
        team = torch.nn.parallel.DistributedDataParallel(Model(), find_unused_parameters=True)
        for _ in range(2): team.module.loss(team(y[:, :3]), u, w).backward()
        return team.module.net.weight.grad, team.module.aux.weight.grad
    def copied():
        loss = NewtonLoss(bumpy, lam=.1, group=team)
        return run(copy.deepcopy(loss), y, u, w)[1] - run(loss, y, u, w)[1]
    team = dist.new_group(range(size))
    nothing = torch.zeros_like(y, dtype=torch.bool)
    return {"learned": learned, "unused": unused, "copied": copied, "inject mean": lambda: inject("mean"), "inject sum": lambda: inject("sum"),
            "accumulated": accumulated, "ddp": ddp,
            "nobody": lambda: run(NewtonLoss(bumpy, lam=.1), y[:0], u[:0], w[:0]),
            "all padding": lambda: run(NewtonLoss(bumpy, lam=.1), y, u, w, mask=nothing),
            "gradient": lambda: run(NewtonLoss(cap, "hessian", .5, on_nonfinite="gradient"), y)[1]}

def work(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size,
                            timeout=timedelta(seconds=30))
    pair = dist.new_group([0, 1])
    steps = lambda *a, **kw: lambda: three_steps(rank, size, *a, **kw)
    calls = {f"{c} {how}": steps(c.direction(), how) for c in CASES for how in HOW
             if not skipped(c, how)}
    calls["chunks"] = steps(Hessian(4.), "bad", chunk_size=2)
    calls |= {name: steps(make(), "plain") for name, make in FREE.items()}
    calls["alone"] = steps(Fisher(.1), "plain", group=None)
    if rank < 2: calls["pair"] = steps(Fisher(.1), "plain", group=pair)
    calls |= one_call(rank, size)
    found = {}
    for name, call in calls.items():
        try: found[name] = call()
        except Exception as e: found[name] = f"{type(e).__name__}: {e}"
        torch.save(found, f"{folder}/{rank}.pt")
        if isinstance(found[name], str) and "gloo" in found[name]: return    # out of step for good
    found = {name: kind(call) for name, call in errors(rank, size).items()}
    found["afterwards"] = three_steps(rank, size, Fisher(.1), "plain")
    torch.save(found, f"{folder}/errors {rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

@pytest.fixture(scope="module", params=[2, 3])
def world(request, tmp_path_factory):
    "The number of processes, and what each found"
    size, folder = request.param, tmp_path_factory.mktemp("world")
    old, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    context, end = mp.spawn(work, (size, str(folder)), nprocs=size, join=False), time.time() + 240
    if old is not None: os.environ["OMP_NUM_THREADS"] = old
    end_of_it = "the processes wait for each other"
    try:
        while time.time() < end and not context.join(timeout=1): pass
    except Exception as e: end_of_it = str(e)[-2000:]
    for p in context.processes:
        if p.is_alive(): p.kill()
    files = [[folder/f"{rank}.pt", folder/f"errors {rank}.pt"] for rank in range(size)]
    if not all(f[0].exists() for f in files): pytest.fail(end_of_it)
    load = lambda file: torch.load(file) if file.exists() else {}
    return size, [load(a) | load(b) | dict(end=end_of_it) for a, b in files]

# ---------------------------------------------------------------- what they found

def of_all(world, name):
    "What each process found"
    for rank, f in enumerate(world[1]):
        if name == "pair" and rank > 1: break
        if isinstance(f.get(name, f["end"]), str):
            pytest.fail(f"process {rank}: {f.get(name, f['end'])}")
    return [f.get(name) for f in world[1]]

def joined(world, name, k):
    "The gradients of all processes for one batch, as averaging over processes counts them"
    return torch.cat([f[k][1] for f in of_all(world, name)])/world[0]

@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_of_one_process(world, case, how):
    if skipped(case, how): pytest.skip("not laid down")
    past = [batch(k, how) for k in range(3)]
    for k in range(3):
        close(joined(world, f"{case} {how}", k), step(case, bumpy, *past[:k+1])[2])
        for rank, f in enumerate(of_all(world, f"{case} {how}")):
            y, args, mask = past[k]
            y, u, w, mask = mine(PARTS[world[0]][k], rank, y, *args, mask)
            close(f[k][0], step(Case("plain"), bumpy, (y, (u, w), mask))[0])

def test_chunks(world):
    for k in range(3):
        close(joined(world, "chunks", k), step(Case("hessian", 4.), bumpy, batch(k, "bad"))[2])

@pytest.mark.parametrize("name", FREE)
def test_without_a_number(world, name):
    "λ by the rule, and probes: no reference, but one process does the same"
    loss = OutputLoss(bumpy, FREE[name](), group=None)
    for k in range(3):
        y, args, _ = batch(k, "plain")
        close(joined(world, name, k), run(loss, y, *args)[1], 1e-8)

def test_groups(world):
    size, alone, pair = world[0], of_all(world, "alone"), of_all(world, "pair")
    for k, parts in enumerate(PARTS[size]):
        y, args, _ = batch(k, "plain")
        for rank in range(size):
            own = mine(parts, rank, y, *args)
            close(alone[rank][k][1], step(Case("fisher", .1), bumpy, (own[0], own[1:], None))[2])
        n = sum(parts[:2])
        two = step(Case("fisher", .1), bumpy, (y[:n], [a[:n] for a in args], None))[2]
        close(torch.cat([pair[r][k][1] for r in range(2)])/2, two)

@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_inject(world, reduction):
    y, *args = data(9, 4, 61)
    D = step(Case("fisher", .1), bumpy, (y, args, None))[1]
    want = D/9*world[0] if reduction == "mean" else D
    close(torch.cat(of_all(world, f"inject {reduction}")), want)

def test_accumulated(world):
    "Micro-batches share the evidence of all processes; what each call divides by is another matter"
    found, start = of_all(world, "accumulated"), 0
    y, *args = data(9, 4, 61)
    D = step(Case("fisher", .1), bumpy, (y, args, None))[1]
    for rank, n in enumerate(PARTS[world[0]][0]):
        got = torch.cat(found[rank])
        for g, d in zip(got, D[start:start + n]):
            close(g*(d.norm()/g.norm()), d, 1e-8)
        start += n

def test_nobody(world):
    for name in ("nobody", "all padding"):
        for value, grad in of_all(world, name):
            assert value == 0 and not grad.any()

def test_plain_gradient_in_all(world):
    y = data(9, 4, 61)[0]
    close(torch.cat(of_all(world, "gradient"))/world[0], -y/2/9)

def test_ddp(world):
    "The averaged gradient of the parameters is that of one process"
    y, u, w = data(9, 4, 61)
    out = (y[:, :3].sum(1, keepdim=True)*.1 + .1).expand(9, 4)
    want = step(Case("fisher", .1), bumpy, (out, (u, w), None))[2].T @ y[:, :3]
    for grad in of_all(world, "ddp"): close(grad, want)

@pytest.mark.parametrize("name, what", [
    ("outputs", 1), ("outputs, own", 1), ("outputs, krylov", 1), ("loss", 1), ("exception", None),
    ("singular", 2), ("singular, own", 2), ("inject", 1), ("shape", None), ("mask", None),
    ("krylov's lam", None), ("krylov's products", None), ("memory", None), ("leading", None), ("leading, clip", None)])
def test_an_error_in_one_is_raised_in_all(world, name, what):
    for rank, f in enumerate(world[1]):
        assert name in f, f["end"]
        found = f[name]
        assert found[0] != "none" and "imeout" not in found[3], (rank, found)
        if what: assert found[what], (rank, found)
    if name in ("exception", "krylov's lam"): assert "a fault of my own" in world[1][-1][name][3]

def test_a_learned_loss_without_samples(world):
    "No process waits, and all have the same gradient"
    found = of_all(world, "learned")
    for grad in found: assert grad.any() and torch.equal(grad, found[0])

def test_what_a_loss_does_not_use_has_no_gradient(world):
    found = of_all(world, "unused")
    for grad, none in found: assert grad.any() and torch.equal(grad, found[0][0]) and none is None

def test_a_copy_has_the_same_group(world):
    for d in of_all(world, "copied"): assert not d.any()

@pytest.mark.parametrize("name, said", [("leading", "equal leading dimensions"), ("leading, clip", "equal leading dimensions"), ("memory", "remembered batches"),
                                        ("shape", "as many outputs"), ("group", "expected 'auto', None or a process group")])
def test_what_all_must_have_alike(world, name, said):
    for f in world[1]: assert said in f[name][3], f[name]

def test_a_step_after_the_errors(world):
    past = [batch(k, "plain") for k in range(3)]
    for f in world[1]: assert "afterwards" in f, f["end"]
    for k in range(3):
        close(joined(world, "afterwards", k), step(Case("fisher", .1), bumpy, past[k])[2])
