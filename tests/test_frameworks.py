"""Two processes under DDP and FSDP: the network's gradient is the one of a single process on the joined batch, however it is wrapped and split."""
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from newton_losses_nb import (
    Clip, DiagonalFisher, Fisher, Hessian, Krylov, MovingAverage, Normalize, OutputLoss, PerSample, Remembering, Scalar, SortingLoss, Whiten, Window,
    inject_fisher, true_permutation)

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch.distributed with gloo is not there")
sort_loss = SortingLoss("neural_sort", "bce", tau=0.3)
DIRECTIONS = dict(fisher=Fisher(), whiten=Whiten(), hessian=Hessian(), krylov=Krylov(1.), diagonal=DiagonalFisher(), sample=PerSample(Fisher()),
                  average=Remembering(Fisher(), MovingAverage(0.5)), window=Remembering(Fisher(), Window(2)), clip=Clip(0.1), rms=Normalize(), scalar=Scalar())
LOSSES = {name: OutputLoss(sort_loss, d) for name, d in DIRECTIONS.items()} | dict(inject=lambda y, P: sort_loss(inject_fisher(y), P).mean())
EVEN, UNEVEN = (8, 8), (11, 5)

def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten())
    x = torch.randn(16, 5, 6)
    return net, x, true_permutation(torch.rand(16, 5))

def forget(loss):
    if memory := getattr(getattr(loss, "direction", None), "memory", None): memory.reset()

def full(net):
    "Gradients of all parameters, put together again where they are sharded"
    whole = lambda g: g.full_tensor() if hasattr(g, 'full_tensor') else g
    return [whole(p.grad).clone() for p in net.parameters()]

def two_steps(wrap, loss, x, P):
    "Gradients of two backward passes, so that losses with a memory use it"
    net = wrap(make()[0])
    out = []
    for _ in range(2):
        net.zero_grad()
        loss(net(x.flip(0)), P.flip(0)).backward() if out else loss(net(x), P).backward()
        out.append(full(net))
    return out

def fsdp(net):
    from torch.distributed.fsdp import fully_shard
    for layer in (net[0], net[2], net): fully_shard(layer, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return net

WRAPS = dict(ddp=nn.parallel.DistributedDataParallel, fsdp=fsdp)

def worker(rank, port, wrap, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    _, x, P = make()
    out = {}
    for split in ((EVEN, UNEVEN) if wrap == "ddp" else (EVEN,)):
        part = slice(0, split[0]) if rank == 0 else slice(split[0], None)
        for name, loss in LOSSES.items():
            forget(loss)
            out[name, split] = two_steps(WRAPS[wrap], loss, x[part], P[part])
    if rank == 0: torch.save(out, f"{folder}/out.pt")
    dist.destroy_process_group()

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

@pytest.fixture(scope="module", params=list(WRAPS))
def found(request, tmp_path_factory):
    if request.param == "fsdp": pytest.importorskip("torch.distributed.fsdp", reason="FSDP is not there")
    if request.param == "fsdp" and not hasattr(torch.cpu.Stream(), "record_event"): pytest.skip("this torch has no FSDP on a CPU")
    folder = tmp_path_factory.mktemp(request.param)
    mp.start_processes(worker, (free_port(), request.param, str(folder)), nprocs=2, start_method="spawn")
    return torch.load(folder/"out.pt")

@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_are_one(found, name):
    _, x, P = make()
    for split in [s for n, s in found if n == name]:
        loss = LOSSES[name]
        forget(loss)
        net = make()[0]
        swap = torch.cat([torch.arange(split[0]).flip(0), split[0] + torch.arange(split[1]).flip(0)])
        for x_, P_, got in zip((x, x[swap]), (P, P[swap]), found[name, split]):
            net.zero_grad()
            loss(net(x_), P_).backward()
            expected = full(net)
            size = max(e.abs().max() for e in expected)
            for g, e in zip(got, expected): assert_close(g/size, e/size, rtol=0, atol=1e-5, msg=lambda m: f"{name}, {split}: {m}")
