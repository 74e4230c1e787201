"""Classification: paired runs, the same side by side, λ → ∞, resume, report, and that older records keep their keys."""
import json, math
import pytest, torch
from torch import nn
from reference import NeverLooks
from torch.testing import assert_close

from newton_losses_nb.lab.tasks import (CLASSIFIERS, Classification, ClassificationTask, classification_config, digit_loss,
                                        _first_step, _glorot, _lenet5, _like_tanh, _mlp)
from newton_losses_nb.core.derivatives import derivatives
from newton_losses_nb.core.newton import OutputLoss
from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import METHODS, Training, directions, fit, run_all, seeds_together
from newton_losses_nb.lab.report import plot_curves
from newton_losses_nb.lab.models import make_network
from newton_losses_nb.lab.records import read_runs
from newton_losses_nb.lab.report import caption, group_runs, summary

DIGITS = load_digits()
FEW = {k: type(d)(d.images[:n], d.labels[:n], d.source) for (k, d), n in zip(DIGITS.items(), (60, 30, 30))}
TINY = dict(batch=20, train=60, precision="float64")
def task(*args, cls=ClassificationTask, **kw): return cls(classification_config(*args, **(TINY | kw)), FEW)
def curves(t, without=()):
    found = fit([t])[0].curves
    left_out = ("seconds", "negative_eigenvalues", *without)
    return {k: torch.tensor([math.nan if o is None else o for o in v], dtype=torch.float64) for k, v in found.items() if k not in left_out}
def same(a, b, **tol):
    assert a.keys() == b.keys()
    for k in a: assert_close(a[k], b[k], equal_nan=True, msg=lambda s: f"{k}: {s}", **({"rtol": 1e-9, "atol": 1e-11} | tol))

@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", ["fisher", "hessian", "hessian_abs", "scalar"])
def test_a_huge_damping_is_the_plain_run(optimizer, method):
    lam, no = 1e4, ["grad_norm"]                                           # it is that of what is sent back, about 1/λ of the plain one
    plain = curves(task("mlp_tanh", optimizer, epochs=3), no)
    newton = curves(task("mlp_tanh", optimizer, method, epochs=3, lam=lam), no)
    same(plain, newton, **(dict(rtol=1e-3, atol=1e-4) if optimizer == "sgd" else dict(rtol=5e-2, atol=5e-2)))  # Adam's eps is felt at 1/λ
    other = curves(task("mlp_tanh", optimizer, method, epochs=3, lam=1e-2), no)
    assert (plain["true_loss"] - other["true_loss"]).abs().max() > 1e-4

def test_a_clip_that_never_clips_is_the_plain_run():
    same(curves(task("lenet_relu", "sgd", epochs=2)), curves(task("lenet_relu", "sgd", "clip", epochs=2, max_norm=2.)))

@pytest.mark.parametrize("method", list(METHODS))
def test_sgd_starts_with_steps_of_one_length(method):
    lam, max_norm = 0.07, 0.2
    t = task("mlp_relu", "sgd", method, lam=lam, max_norm=max_norm, lr=0.5)
    y, labels = torch.zeros(10, 10, dtype=torch.float64, requires_grad=True), torch.arange(10)
    def step(name, lr):
        loss = OutputLoss(digit_loss, directions(lam, max_norm)[name])
        return lr*torch.autograd.grad(loss(y, labels), y)[0].norm()
    assert_close(step(method, t.lr), step("none", 0.5))
    a = task("mlp_relu", "sgd", method, lam=lam, max_norm=max_norm, lr=0.5, gain=3.).lr
    assert math.isclose(a, t.lr*(1 if method == "none" else 3), rel_tol=1e-12)

@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("network,method", [("mlp_relu", "none"), ("lenet_relu", "hessian"), ("lenet_sigmoid_mended", "fisher"), ("mlp_tanh", "clip_grad"), ("mlp_tanh", "clip"), ("mlp_tanh", "rms")])
def test_side_by_side_is_one_by_one(optimizer, network, method, tmp_path):
    tasks = [task(network, optimizer, method, seed=s, epochs=3, eval_every=2) for s in range(3)]
    a, b = (list(run_all(tasks, tmp_path/name, "classification", show=False, **kw)) for name, kw in (("one", {}), ("many", dict(engine=seeds_together))))
    for r, o in zip(a, b):
        assert r["key"] == o["key"] and r["status"] == o["status"] == "ok" and o["together"] == 3
        assert r["curves"]["step"] == [0, 2, 4, 6, 8, 9] == o["curves"]["step"]
        for k in ("exact_match", "true_loss", "train_loss", "grad_norm"):
            u, v = (torch.tensor([math.nan if q is None else q for q in x["curves"][k]]) for x in (r, o))
            assert_close(u, v, equal_nan=True, rtol=1e-6, atol=1e-9)
        assert r["result"]["best_step"] == o["result"]["best_step"]

@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_of_many_seeds_never_looks(optimizer):
    for method in METHODS:
        training = Training([task("lenet_relu", optimizer, method, seed=s, epochs=2) for s in (0, 1)])
        first, second = training.draw(), training.draw()
        training.step(first)
        with NeverLooks(): training.step(second)

def test_an_epoch_sees_every_digit_once():
    t = task("mlp_relu", seed=3)
    some = [labels for (_, (labels,)), _ in zip(t.batches(), range(6))]   # two epochs
    first, second = torch.cat(some[:3]), torch.cat(some[3:])
    assert torch.equal(first.sort().values, FEW["train"].labels.sort().values) and torch.equal(second.sort().values, first.sort().values)
    assert not torch.equal(first, second)

def test_a_seed_that_explodes_fails_alone(tmp_path):
    class Wild(ClassificationTask):
        def make_network(self):
            net = super().make_network()
            if self.config["seed"] == 1: net[1].weight.data.fill_(1e300)
            return net
    tasks = [task("mlp_relu", "sgd", "fisher", seed=s, cls=Wild) for s in range(3)]
    assert [r["status"] for r in run_all(tasks, tmp_path, "x", show=False)] == ["ok", "failed", "ok"]

@pytest.mark.parametrize("build", [_mlp, _lenet5])
@pytest.mark.parametrize("side", [14, 28])
def test_sigmoids_compute_what_tanh_computes(build, side):
    x = torch.randn(7, 1, side, side, dtype=torch.float64)
    for init in (_glorot, lambda net: net):
        torch.manual_seed(0); a = init(build(nn.Tanh, side).double())
        torch.manual_seed(0); b = _like_tanh(init(build(nn.Sigmoid, side).double()))
        assert_close(a(x), b(x), rtol=1e-9, atol=1e-11)
        torch.manual_seed(0); assert not torch.allclose(a(x), init(build(nn.Sigmoid, side).double())(x), atol=1e-2)

@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_networks_depend_on_the_seed_alone(name):
    before = torch.get_rng_state()
    a, b, c = (make_network(name, s, CLASSIFIERS, side=14).state_dict() for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    for k in a:
        assert torch.equal(a[k], b[k])
        if k.endswith("weight"): assert not torch.equal(a[k], c[k])

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hessian_of_the_cross_entropy(dtype):
    y = 3*torch.randn(30, 10, dtype=dtype)
    p, t = y.softmax(1), torch.randint(10, (30,))
    H = derivatives(digit_loss, y, t, second="full")[2].mean(0)
    assert_close(H, torch.diag(p.mean(0)) - p.T @ p/30, rtol=1e-4, atol=1e-6)
    assert torch.linalg.eigvalsh(H.double()).min() > -1e-6 and H.sum(1).abs().max() < 1e-5

def test_resume_and_report(tmp_path):
    grid = Classification.grid(dict(network="mlp_tanh", **TINY), seed=range(3), epochs=(1, 2), optimizer=["sgd", "adam"], method=["none", "fisher"]) + \
        [classification_config("mlp_tanh", "sgd", "rms", s, gain=0.3, **TINY) for s in range(3)]
    tasks = [ClassificationTask(c, FEW) for c in grid]
    list(run_all(tasks[:7], tmp_path, "classification", show=False))
    before = (tmp_path/"classification.jsonl").read_bytes()
    runs = list(run_all(tasks, tmp_path, "classification", show=False))
    assert (tmp_path/"classification.jsonl").read_bytes().startswith(before) and len(read_runs(tmp_path)) == len(grid)
    assert len({t.key for t in tasks}) == len(grid)
    table = summary(runs)
    assert list(dict.fromkeys(table.setting)) == [f"mlp_tanh, {o}, {e}" for o in ("adam", "sgd") for e in ("1 epoch", "2 epochs")]
    assert (table[table.method != "none"].pairs == 3).all()                # another gain is no other setting
    assert len(plot_curves(runs, x="epoch").axes) == 4
    text = caption(runs)
    assert "gain=0.3" in text and "setting=" not in text
    assert all(r["curves"]["epoch"][-1] == r["config"]["epochs"] for r in runs)

def test_names_of_settings_and_gains():
    made = lambda **kw: dict(key="k", status="ok", error=None, config=classification_config(**kw), data_source="x", result={"exact_match": .5})
    rows = group_runs([made(), made(method="rms", gain=.3), made(method="rms", gain=3.), made(method="fisher", gain=2.)])
    assert list(rows.method) == ["none", "fisher", "rms, gain=0.3", "rms, gain=3.0"] and rows.setting.nunique() == 1

def test_digits_of_a_folder(tmp_path):
    import gzip, struct
    d = {k: (DIGITS[k].images[:n], DIGITS[k].labels[:n]) for k, n in (("train", 30), ("test", 10))}
    for k, name in (("train", "train"), ("test", "t10k")):
        x, y = d[k]
        for kind, head, body in (("images-idx3", (2051, *x.shape), x), ("labels-idx1", (2049, len(y)), y)):
            (tmp_path/f"{name}-{kind}-ubyte").write_bytes(struct.pack(f">{len(head)}i", *head) + bytes(body.to(torch.uint8).numpy().tobytes()))
    mine = load_digits(data_dir=tmp_path)
    t = ClassificationTask(classification_config(train=len(mine["train"]), batch=9), mine)
    assert len(curves(t)["step"]) == 2
    assert t.key != ClassificationTask(t.config, {**mine, "train": type(mine["train"])(mine["train"].images, mine["train"].labels, "others")}).key
