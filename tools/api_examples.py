"Examples for the API reference, of names that no cell of a notebook shows by itself; tests/test_api.py runs them."

EXTRA = dict(
reorder='''
import torch
from newton_losses_nb.ablations import reorder
from newton_losses_nb.sorting import true_permutation

T = true_permutation(torch.tensor([[3, 1, 2]]))
told = reorder(T, torch.tensor([[1, 0, 2]]))                   # the two smallest are told the wrong way round
assert told[0, 0].equal(T[0, 1]) and told[0, 2].equal(T[0, 2])
''',
damping_arms='''
from newton_losses_nb.ablations import damping_arms

arm = damping_arms(5, 200, 50, 0.01)[0]
print(arm.config, arm.candidates)
''',
curvature_arms='''
from newton_losses_nb.ablations import curvature_arms

print(len(curvature_arms(5, 200, 50, 0.01)), "arms")
''',
targets_arms='''
from newton_losses_nb.ablations import targets_arms

print({arm.config["method"] for arm in targets_arms(5, 200, 50, 0.01)})
''',
transfer_arms='''
from newton_losses_nb.ablations import transfer_arms

print({arm.config.get("n") for arm in transfer_arms(5, 200, 50, 0.01)})
''',
noise_arms='''
from newton_losses_nb.ablations import noise_arms

print({arm.config["noise"] for arm in noise_arms(5, 200, 50, 0.01)})
''',
run_ablation='''
from newton_losses_nb.ablations import forget, run_ablation
from newton_losses_nb.report import summary

runs = run_ablation("transfer", "runs/transfer", seeds=(0,), steps=2, batch=4, eval_sets=10, tuning_seeds=(1000,), show=False)
print(summary(forget(runs))[["setting", "method", "runs"]])
''',
compare_arms='''
from newton_losses_nb.ablations import compare_arms

def run(method, seed, match): return dict(status="ok", config=dict(method=method, seed=seed), result=dict(exact_match=match))
runs = [run("none", 0, .40), run("none", 1, .44), run("rms", 0, .43), run("rms", 1, .45)]
def of(method): return lambda config: config["method"] == method
table = compare_arms(runs, {"rms - none": (of("rms"), of("none"))}, lambda r: 100*r["result"]["exact_match"])
assert abs(table["diff"].iloc[0] - 2) < 1e-9
''',
forget='''
from newton_losses_nb.ablations import forget

runs = [dict(config=dict(method="none", lr=0.01)), dict(config=dict(method="rms", lr=0.03))]
assert [r["config"]["lr"] for r in forget(runs)] == [None, None]
''',
one_by_one='''
from newton_losses_nb.data import load_digits
from newton_losses_nb.experiment import SortingTask, one_by_one, run_all, sorting_config

task = SortingTask(sorting_config(steps=2, batch=4, eval_sets=10, eval_every=1), load_digits())
record, = run_all([task], "runs/one", "sorting", engine=one_by_one, show=False)
assert record["status"] == "ok"
''',
weight_layers='''
from newton_losses_nb.classification import lenet5, weight_layers

print(weight_layers(lenet5()))
''',
like_tanh='''
import torch
from torch import nn
from newton_losses_nb.classification import like_tanh

torch.manual_seed(0)
x, layers = torch.randn(5, 3), (nn.Linear(3, 4), nn.Linear(4, 2))
tanh = nn.Sequential(layers[0], nn.Tanh(), layers[1])(x).detach()
sigmoid = like_tanh(nn.Sequential(layers[0], nn.Sigmoid(), layers[1]))(x)
torch.testing.assert_close(sigmoid, tanh)
''',
NewtonLoss='''
import torch
from torch import nn
from newton_losses_nb.newton import NewtonLoss

x, target = torch.randn(100, 3), torch.randn(100, 4)
net = nn.Linear(3, 4)
opt = torch.optim.Adam(net.parameters())

def my_loss(y, target): return (y - target).abs().sum(1)      # one value per sample
loss_fn = NewtonLoss(my_loss, curvature="fisher")             # the only changed line

loss, plain = loss_fn(net(x), target), my_loss(net(x), target).mean()
torch.testing.assert_close(loss, plain)                       # the value is that of the plain loss
loss.backward()
opt.step()
''',
inject_fisher='''
import torch
from torch import nn
from newton_losses_nb.newton import inject_fisher

x, labels = torch.randn(100, 3), torch.randint(4, (100,))
net = nn.Linear(3, 4)
loss = nn.functional.cross_entropy(inject_fisher(net(x)), labels)       # any loss that is a mean over samples
loss.backward()
assert net.weight.grad.isfinite().all()
''',
backward_rows='''
import torch
from newton_losses_nb.curvature import backward_rows

y = torch.randn(6, 4, requires_grad=True)
G = torch.autograd.grad(y.pow(3).sum()/3, y, create_graph=True)[0]     # gradients y²
rows = torch.ones(2, 6, 4)
torch.testing.assert_close(backward_rows(G, y, rows), (2*y*rows).detach())
''',
full_precision='''
import torch
from newton_losses_nb.curvature import full_precision

y = torch.randn(6, 4)
with torch.autocast("cpu", torch.bfloat16):
    assert (y @ y.T).dtype == torch.bfloat16
    with full_precision(y): assert (y @ y.T).dtype == torch.float32
''',
random_signs='''
import torch
from newton_losses_nb.large import random_signs

signs = random_signs((3, 4), torch.zeros(1))
assert signs.abs().eq(1).all() and random_signs((3, 4), torch.zeros(1)).equal(signs)
''',
natural_step='''
import torch
from newton_losses_nb.probe import natural_step

y = torch.randn(1000, 5)
assert natural_step(y/100) < natural_step(y) < natural_step(100*y) < 11
assert natural_step(torch.zeros(2, 5)) == 1
''',
Probe='''
import torch
from newton_losses_nb.probe import Probe

y, t = torch.randn(8, 5), torch.randn(8, 5)
probe = Probe(lambda y, t: (y - t).square().sum(1)/2, y, (t,))
torch.testing.assert_close(probe.values(y), (y - t).square().sum(1)/2)
''',
draw_noise='''
import torch
from newton_losses_nb.smoothing import draw_noise

noise = draw_noise(torch.zeros(2, 5), n_samples=1000, antithetic=True)
assert noise.shape == (2, 1000, 5)
assert noise.mean(1).abs().max() < 1e-5                # pairs cancel
''',
smoothed_algorithm='''
import torch
from newton_losses_nb.smoothing import smoothed_algorithm

rank = lambda y: y.argsort(1).argsort(1).float()       # steps, without a gradient
y = torch.randn(4, 6, requires_grad=True)
soft = smoothed_algorithm(rank, y, n_samples=1000, sigma=0.5)
soft[:, 0].sum().backward()
assert (y.grad[:, 0] > 0).all()                        # a larger score has a higher rank
''',
smoothed_loss='''
import torch
from newton_losses_nb.smoothing import smoothed_loss

steps = lambda y, t: (y.round() - t).abs().sum(1)      # a loss of steps, without a gradient
y, t = torch.full((4, 3), 2., requires_grad=True), torch.zeros(4, 3)
smoothed_loss(steps, y, args=(t,), n_samples=1000, sigma=0.5).mean().backward()
assert (y.grad > 0).all()                              # down, towards t
''',
fenchel_young_loss='''
import torch
from newton_losses_nb.shortest_path import shortest_path
from newton_losses_nb.smoothing import fenchel_young_loss

cost, true_cost = torch.rand(2, 5, 5) + 0.5, torch.rand(2, 5, 5) + 0.5
cost.requires_grad_()
loss = fenchel_young_loss(shortest_path, cost, shortest_path(true_cost), n_samples=100, sigma=0.1)
loss.mean().backward()
assert loss.shape == (2,) and cost.grad.shape == cost.shape
''',
SmoothedLoss='''
import torch
from newton_losses_nb.newton import NewtonLoss
from newton_losses_nb.smoothing import SmoothedLoss

steps = lambda y, t: (y.round() - t).abs().sum(1)      # a loss of steps, without a gradient
loss_fn = NewtonLoss(SmoothedLoss(steps, n_samples=100, sigma=0.5), curvature="fisher")
y, t = torch.full((8, 3), 2., requires_grad=True), torch.zeros(8, 3)
loss_fn(y, t).backward()
assert (y.grad.sum(0) > 0).all()                       # down, towards t
''',
SmoothedAlgorithmLoss='''
import torch
from newton_losses_nb.newton import NewtonLoss
from newton_losses_nb.smoothing import SmoothedAlgorithmLoss

rank = lambda y: y.argsort(1).argsort(1).float()
distance = lambda r, t: (r - t).square().sum(1)
y, t = torch.randn(8, 5, requires_grad=True), torch.arange(5.).expand(8, 5)
NewtonLoss(SmoothedAlgorithmLoss(rank, distance, n_samples=100))(y, t).backward()
assert y.grad.isfinite().all() and y.grad.any()
''',
FenchelYoungLoss='''
import torch
from newton_losses_nb.newton import NewtonLoss
from newton_losses_nb.path_experiment import flat_shortest_path
from newton_losses_nb.smoothing import FenchelYoungLoss

solver = lambda cost: flat_shortest_path(cost, grid=(5, 5))
paths = solver(torch.rand(4, 25) + 0.5)                # what was observed
cost = (torch.rand(4, 25) + 0.5).requires_grad_()      # what a network says
NewtonLoss(FenchelYoungLoss(solver, n_samples=50, sigma=0.1, floor=1e-3), "hessian")(cost, paths).backward()
assert cost.grad.isfinite().all() and cost.grad.any()
''',
blackbox='''
import torch
from newton_losses_nb.shortest_path import shortest_path
from newton_losses_nb.smoothing import blackbox

cost, path = (torch.rand(2, 5, 5) + 0.5).requires_grad_(), shortest_path(torch.rand(2, 5, 5) + 0.5)
found = blackbox(shortest_path, cost, lam=20.)
assert found.equal(shortest_path(cost.detach()))       # the value is that of the solver
(found - path).abs().sum().backward()
assert cost.grad.shape == cost.shape
''',
absolute='''
import torch
from newton_losses_nb.solve import absolute

C = torch.tensor([[1., 2.], [2., -1.]])
e, V = torch.linalg.eigh(C)
torch.testing.assert_close(absolute(C), V*e.abs() @ V.T)
''',
network_derivatives='''
import torch
from newton_losses_nb.relaxations import true_permutation
from newton_losses_nb.sorting_networks import network_derivatives

s, P_true = torch.randn(3, 5), true_permutation(torch.rand(3, 5))
loss, G, H = network_derivatives(s, P_true, relaxation="cauchy")
assert loss.shape == (3,) and G.shape == (3, 5) and H.shape == (3, 5, 5)
torch.testing.assert_close(H, H.mT)
''',
path_cost='''
import torch
from newton_losses_nb.shortest_path import path_cost, shortest_path

cost = torch.rand(3, 5, 5) + 0.5
assert (path_cost(cost, shortest_path(cost)) <= path_cost(cost, torch.ones(3, 5, 5))).all()
''',
cached_maps='''
from newton_losses_nb.terrain import cached_maps, terrain_maps

maps = cached_maps(4, size=6, seed=1, cache_dir="cache", least=0)
assert maps.costs.equal(terrain_maps(4, size=6, seed=1).costs)
again = cached_maps(4, size=6, seed=1, cache_dir="cache", least=0)       # read from the file
assert again.images.equal(maps.images)
''',
permutation_loss='''
import torch
from newton_losses_nb.adapters import permutation_loss
from newton_losses_nb.newton import NewtonLoss
from newton_losses_nb.relaxations import soft_sort

loss_fn = NewtonLoss(permutation_loss(soft_sort))       # or the sort of another library
scores, labels = torch.randn(8, 5, requires_grad=True), torch.rand(8, 5)
loss_fn(scores, labels).backward()
assert scores.grad.any()
''',
fast_settings='''
import torch
from newton_losses_nb.fast_training import fast_settings

with fast_settings("float32", torch.device("cpu")): y = torch.randn(2, 3) @ torch.randn(3, 2)
assert y.dtype == torch.float32
''',
seed_groups='''
from newton_losses_nb.data import load_digits
from newton_losses_nb.experiment import SortingTask, sorting_config
from newton_losses_nb.fast_training import seed_groups

digits = load_digits()
tasks = [SortingTask(sorting_config(relaxation, seed=seed), digits) for seed in (0, 1) for relaxation in ("cauchy", "logistic")]
assert seed_groups(tasks) == [[tasks[0], tasks[2]], [tasks[1], tasks[3]]]
''',
fit_together='''
from newton_losses_nb.data import load_digits
from newton_losses_nb.experiment import SortingTask, sorting_config
from newton_losses_nb.fast_training import fit_together

digits = load_digits()
tasks = [SortingTask(sorting_config("cauchy", steps=6, eval_every=3, eval_sets=20, seed=seed), digits) for seed in (0, 1)]
runs = fit_together(tasks)
print([run.result["exact_match"] for run in runs])
''',
read_idx='''
import struct
from pathlib import Path
from newton_losses_nb.data import read_idx

Path("three.idx").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 3) + bytes([7, 2, 1]))
assert read_idx("three.idx").tolist() == [7, 2, 1]
''',
pool_digits='''
import torch
from newton_losses_nb.data import pool_digits

images = torch.full((2, 28, 28), 255, dtype=torch.uint8)
assert pool_digits(images, 4).shape == (2, 7, 7) and pool_digits(images, 4).eq(1).all()
''',
BasicBlock='''
import torch
from newton_losses_nb.models import BasicBlock

assert BasicBlock(8)(torch.randn(2, 8, 6, 6)).shape == (2, 8, 6, 6)
''',
MapCosts='''
import torch
from torch import nn
from newton_losses_nb.models import MapCosts

body = nn.Conv2d(3, 1, 8, stride=8)
net = MapCosts(body, nn.functional.softplus, unit=True)
cost = net(torch.randn(2, 3, 96, 96))
assert cost.shape == (2, 144) and (cost > 0).all()
''',
small_path_net='''
import torch
from newton_losses_nb.models import small_path_net

cost = small_path_net()(torch.randn(2, 3, 96, 96))
assert cost.shape == (2, 144) and (cost > 0).all()
''',
append_run='''
from newton_losses_nb.data import load_digits
from newton_losses_nb.experiment import SortingTask, run_record, sorting_config
from newton_losses_nb.records import append_run, environment, read_runs

task = SortingTask(sorting_config("cauchy", steps=4, eval_every=2, eval_sets=20), load_digits())
append_run("sorting.jsonl", run_record(task, environment()))
assert read_runs("sorting.jsonl")[0]["key"] == task.key
''',
open_results='''
from newton_losses_nb.data import load_digits
from newton_losses_nb.experiment import SortingTask, run_record, sorting_config
from newton_losses_nb.records import append_run, environment, open_results

task = SortingTask(sorting_config("cauchy", steps=4, eval_every=2, eval_sets=20), load_digits())
file, done = open_results("runs", "sorting")
if task.key not in done: append_run(file, run_record(task, environment()))
assert task.key in open_results("runs", "sorting")[1]
''',
read_runs='''
from newton_losses_nb.records import read_runs, stored_results

runs = read_runs(stored_results("sorting_cpu"))
print(len(runs), sorted(runs[0]))
''',
sorting_loss='''
from newton_losses_nb.experiment import sorting_config, sorting_loss

print(sorting_loss(sorting_config("cauchy", steepness=20.)))
''',
run_all='''
from newton_losses_nb.data import load_digits
from newton_losses_nb.experiment import SortingTask, run_all, sorting_config

digits = load_digits()
tasks = [SortingTask(sorting_config("cauchy", steps=6, eval_every=3, eval_sets=20, seed=seed), digits) for seed in (0, 1)]
records = list(run_all(tasks, "runs", "sorting", show=False))
assert list(run_all(tasks, "runs", "sorting", show=False)) == records    # nothing left to do
''',
in_percent='''
from newton_losses_nb.report import in_percent

assert in_percent("exact_match") and not in_percent("true_loss")
''',
format_table='''
from newton_losses_nb.records import read_runs, stored_results
from newton_losses_nb.report import format_table, summary

table = summary(read_runs(stored_results("sorting_cpu"))[:20])
print(format_table(table))
''',
write_report='''
from newton_losses_nb.plots import write_report
from newton_losses_nb.records import read_runs, stored_results

files = write_report(read_runs(stored_results("sorting_cpu"))[:20], "report")
print([f.name for f in files])
''',
plot_curves='''
from newton_losses_nb.plots import plot_curves
from newton_losses_nb.records import read_runs, stored_results

fig = plot_curves(read_runs(stored_results("sorting_cpu"))[:20], "exact_match", x="step")
fig.savefig("curves.svg")
''',
path_loss_fn='''
import torch
from newton_losses_nb.path_experiment import flat_shortest_path, path_config, path_loss_fn

loss_fn = path_loss_fn(path_config("relaxed_bf"), grid=(5, 5))
cost = torch.rand(3, 25) + 0.5
assert loss_fn(cost, flat_shortest_path(cost, (5, 5))).shape == (3,)
''',
path_grid='''
from newton_losses_nb.path_experiment import path_grid

configs = path_grid(("fenchel_young", "relaxed_bf"), ("none", "fisher", "hessian"), seeds=(0, 1))
print(sorted({(c["loss"], c["method"]) for c in configs}))     # no Hessian of relaxed Bellman-Ford
''',
bench_sorting='''
from newton_losses_nb.cli import bench_sorting     # or: nl_bench sorting --relaxations cauchy --methods none,fisher ...

bench_sorting("cauchy", "none,fisher", seeds="1", steps=4, eval_every=2, eval_sets=20, out="runs/sorting")
''',
bench_paths='''
from newton_losses_nb.cli import nl_bench

nl_bench(["paths", "--help"])                      # lists the options, which are the parameters of bench_paths
''',
bench_speed='''
from newton_losses_nb.cli import nl_bench

nl_bench(["speed", "--help"])                      # lists the options, which are the parameters of bench_speed
''',
bench_scaling='''
from newton_losses_nb.cli import nl_bench

nl_bench(["scaling", "--help"])                    # lists the options, which are the parameters of bench_scaling
''',
report='''
from newton_losses_nb.cli import report            # or: nl_report FOLDER --out report
from newton_losses_nb.records import append_run, read_runs, stored_results

for run in read_runs(stored_results("sorting_cpu"))[:20]: append_run("few.jsonl", run)
report("few.jsonl", out="report")
''',
join_processes='''
from newton_losses_nb.processes import join_processes, leave_processes    # in a script that torchrun starts

team = join_processes()                            # alone, where there is no torchrun
print(f"process {team.rank} of {team.size}")
leave_processes()
''',
leave_processes='''
from newton_losses_nb.processes import join_processes, leave_processes

team = join_processes()
leave_processes()
''',
join_batch_norm='''
from torch import nn
from newton_losses_nb.processes import JoinedBatchNorm, join_batch_norm

net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
join_batch_norm(net)                               # the same parameters, under the same names
assert isinstance(net[1], JoinedBatchNorm)
''',
difference='''
import torch
from newton_losses_nb.speed import Setup, difference

setup = Setup(lambda x: x.square(), lambda x: x*x, (torch.randn(5),))
assert difference(setup, "values") == 0
''',
peer_version='''
from newton_losses_nb.speed import peer_version

print(peer_version(["torch"]), "|", peer_version(["no-such-thing"]))
''',
fenchel_young_cases='''
from newton_losses_nb.speed import fenchel_young_cases

for case in fenchel_young_cases(): print(case.name, case.size, case.needs)
''',
import_cases='''
from newton_losses_nb.speed import import_cases

print([case.name for case in import_cases()])
''',
Curve='''
import torch
from newton_losses_nb.scaling import Curve, run_curves

def sort(n, device): x = torch.rand(n, device=device); return lambda: x.sort()
table = run_curves([Curve("sort", "n", (10, 100), sort, lambda n: n)], "sort.jsonl", seconds=0.01, show=False)
assert len(table) == 2
''',
)

# What has no example of its own, and why
WITHOUT = dict(
    bench_classification="The command `nl_bench classification`.",
    bench_ablation="The command `nl_bench ablation`.",
    choose="Called by `run_ablation`.",
    ClassificationFeed="Used by `SideBySide`.",
    InjectFisher="Used through `inject_fisher`.",
    Finding="The entries of a `LossReport`: `report[\"repeatable\"].verdict`.",
    Noise="The kind of the entries of `NOISE`; a distribution of one's own is a further entry.",
    Team="Made by `join_processes`.",
    JoinedBatchNorm="Made by `join_batch_norm`, from the batch normalisation that a network has.",
    SeedRun="Made and used by `fit_together`.",
    ray_cluster="Needs Ray, the extra `ray`; used by `ray_engine`, or by `nl_bench sorting --engine ray`.",
    ray_engine="Needs Ray, the extra `ray`; given to `run_all` as its engine, or by `nl_bench sorting --engine ray`.",
    run_scaling="Takes minutes: `nl_bench scaling` is the command.",
    run_speed="Takes minutes: `nl_bench speed` is the command.",
    download_warcraft="Downloads 1 GB; `load_maps` reads what is there.",
    download_mnist="Downloads 11 MB; `load_digits` calls it where the files are wanted.",
    SideBySide="Used by `fit_together`.",
    one_optimizer="Used by `SideBySide`.",
    seeds_together="An engine for `run_all`, on a GPU.",
    Job="Made by `run_all` for the engines in other processes.",
)
