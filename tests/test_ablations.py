"""Ablations: their plans are whole and fair, targets that stay are those of a slow twin, and choices are the records' own."""
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"benchmarks"))

import ablations
from ablations import ABLATIONS, HELD, STEEP, AblationTask, Arm, HeldTarget, ablation_config, candidates, choose, run_ablation, wrong_orders

from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import fit
from newton_losses_nb.core.directions import Fisher
from newton_losses_nb.core.newton import OutputLoss
from newton_losses_nb.lab.tasks import sorting_config
from newton_losses_nb.sorting.relaxations import true_permutation
from newton_losses_nb.sorting.losses import SortingLoss

SIZE = dict(n=5, steps=200, lr=1e-2)

@pytest.fixture(scope="module")
def digits(): return load_digits()

@pytest.mark.parametrize("name", ABLATIONS)
def test_every_configuration_is_valid_and_occurs_once(name):
    arms = ABLATIONS[name](**SIZE)
    final = [c for arm in arms for k in arm.candidates for c in arm.configs(k, [0], steps=200, batch=50, n=5)]
    assert len({json.dumps(c, sort_keys=True) for c in final}) == len(final)
    for c in final: assert c["method"] in ablations.METHODS and "tuned_as" not in c

@pytest.mark.parametrize("name", ABLATIONS)
def test_every_method_has_as_many_trials(name):
    assert len({len(arm.candidates) for arm in ABLATIONS[name](**SIZE)}) == 1

def test_noise_is_tuned_on_right_orders_once():
    arms = ABLATIONS["noise"](**SIZE)
    tuned = Counter(json.dumps(c, sort_keys=True) for a in arms for k in a.candidates for c in a.configs(k, [1000], {}))
    assert set(tuned.values()) == {3} and not any("noise" in json.loads(c) for c in tuned)

def test_transfer_is_tuned_on_its_own_size():
    for arm in ABLATIONS["transfer"](**SIZE):
        c, = arm.configs(arm.candidates[0], [1000], {})
        assert "test_n" not in c and c["n"] == arm.config["n"]

def test_a_run_that_is_the_same_has_the_same_key(digits):
    plain = ablation_config("cauchy", "fisher", lam=.1, noise="swap", share=0., seed=3)
    assert plain == sorting_config("cauchy", "fisher", lam=.1, seed=3)
    assert AblationTask(plain, digits).key != AblationTask(ablation_config("cauchy", "fisher", lam=.1, noise="swap", share=.1, seed=3), digits).key

def test_settings_that_change_nothing_are_not_there():
    assert ablation_config() == ablation_config(noise="swap") == sorting_config()
    assert ablation_config(method="fisher_k5", lam=1.)["lam"] == 1.
    with pytest.raises(ValueError, match="noise: expected one of None, swap, shuffle"): ablation_config(noise="typo")

def test_a_curvature_of_each_sample_and_none_at_all():
    y, T, f = torch.randn(20, 5, dtype=torch.float64), true_permutation(torch.rand(20, 5), dtype=torch.float64), SortingLoss("neural_sort")
    (G, one), (_, over) = (OutputLoss(f, ablations.methods(.1)[m]).directions(y, T) for m in ("fisher_sample", "gradient"))
    G = OutputLoss(f).directions(y, T)[1]
    assert_close(one, G/(G.square().sum(1, keepdim=True) + .1)); assert_close(over, G*10)

@given(n=st.integers(2, 8), share=st.sampled_from((0., .3, 1.)), kind=st.sampled_from(ablations.ORDER_NOISE), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_wrong_orders_are_orders(n, share, kind, seed):
    told = wrong_orders(50, n, share, kind, torch.Generator().manual_seed(seed))
    right = torch.arange(n)
    assert torch.equal(told.sort(1).values, right.expand(50, n))
    moved = (told != right).sum(1)
    if share == 0: assert not moved.any()
    if kind == "swap":
        assert set(moved.tolist()) <= {0, 2} and (told - right).abs().max() <= 1
        if share == 1: assert (moved == 2).all()

def test_the_order_that_is_told(digits):
    task = AblationTask(ablation_config(noise="shuffle", share=1., precision="float64"), digits)
    index = next(task.indices())[None]
    labels, told, (U,) = task.training.assemble(index[..., :4])[1].double(), index[..., 4], task.batch(index)[1]
    right = (true_permutation(labels, dtype=torch.float64) @ labels.unsqueeze(-1)).squeeze(-1)
    assert_close((U @ labels.unsqueeze(-1)).squeeze(-1), right.gather(-1, told))

def test_batches_come_again_and_only_the_order_is_wrong(digits):
    def first(steps, **config): return [o for o, _ in zip(AblationTask(ablation_config(**config), digits).batches(), range(steps))]
    clean, wrong = first(2), first(2, noise="swap", share=.4)
    for (a, (S,)), (b, (U,)) in zip(clean, wrong):
        assert torch.equal(a, b) and 20 < (S != U).any(-1).any(-1).sum() < 60
        for dim in (1, 2): assert U.sum(dim).unique().tolist() == [1.]
    held = first(6, method="fisher_k5", lam=.1)
    assert all(torch.equal(held[0][0], o[0]) for o in held[:5]) and torch.equal(held[5][0], clean[1][0])

def test_larger_sets(digits):
    wide = AblationTask(ablation_config(test_n=[5, 10], eval_sets=100), digits)
    labels = wide.evaluation("test")[2]
    def shares(y): return {k: v.double().mean().item() for k, v in wide.scores(y, labels).items()}
    right, spoiled = labels.double(), labels.double()
    assert labels.shape == (100, 10) and shares(right) == dict(exact_match=1., element_match=1., n5_match=1., n10_match=1.)
    spoiled[:, 9] = -1.                                       # the tenth image comes first
    assert shares(spoiled)["n5_match"] == 1. and shares(spoiled)["n10_match"] < .3

@pytest.mark.parametrize("kind", [dict(method="fisher_k5", lam=.1), dict(method="gradient_k2", lam=.1), dict(noise="swap", share=.5),
                                  dict(method="fisher", noise="shuffle", share=.5), dict(n=3, test_n=[3, 6]), dict(method="hessian_abs_sample", lam=.1),
                                  dict(relaxation="cauchy", method="fisher_sample", lam=.1)])
def test_side_by_side_each_is_the_run_that_it_is_alone(kind, digits):
    def make(): return [AblationTask(ablation_config(seed=s, batch=10, steps=8, eval_every=4, eval_sets=20, precision="float64", **kind), digits) for s in (0, 7)]
    known = lambda curve: torch.tensor([float("nan") if o is None else o for o in curve], dtype=torch.float64)
    for run, task in zip(fit(make()), make()):
        alone, = fit([task])
        assert run.error is None and alone.result.keys() == run.result.keys()
        for k in alone.curves.keys() - {"seconds"}: assert_close(known(run.curves[k]), known(alone.curves[k]), rtol=1e-7, atol=1e-9, equal_nan=True)

@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("steps", [1, 3])
def test_targets_stay(lead, steps):
    fn = SortingLoss("neural_sort")
    held = HeldTarget(OutputLoss(fn, Fisher(.1), on_nonfinite="skip"), steps)
    T, target = true_permutation(torch.rand(*lead, 20, 5)), None
    for i in range(7):
        y = torch.randn(*lead, 20, 5, requires_grad=True)
        if i % steps == 0:
            batches = zip(y.detach().view(-1, 20, 5), T.view(-1, 20, 5, 5))
            target = torch.stack([o - OutputLoss(fn, Fisher(.1)).directions(o, t)[1] for o, t in batches]).view(y.shape)
        value = held(y, T)
        assert value.shape == lead
        grad, = torch.autograd.grad(value.sum(), y)
        assert_close(grad, (y - target).detach()/20, rtol=1e-3, atol=1e-5)
        assert_close(value.detach(), fn(y.detach().view(-1, 5), T.view(-1, 5, 5)).view(*lead, 20).mean(-1))

def test_held_once_is_the_method_itself(digits):
    "One step for each target is the Newton loss; and the plain gradient over λ, to which Adam is blind"
    small = dict(steps=6, batch=10, eval_every=3, eval_sets=30, precision="float64", lr=1e-3, tau=1.)
    def curve(**c): return torch.tensor(fit([AblationTask(ablation_config(**small, **c), digits)])[0].curves["true_loss"])
    assert_close(curve(method="fisher_k1", lam=.1), curve(method="fisher", lam=.1), rtol=1e-9, atol=0)
    assert_close(curve(method="gradient_k1", lam=.1), curve(method="none"), rtol=1e-4, atol=0)

def test_names_say_how_long_targets_stay():
    for name, (method, k) in HELD.items(): assert name == f"{method}_k{k}"
    batches = {k: AblationTask(ablation_config(method=f"fisher_k{k}", lam=1.), load_digits()).repeat for k in (1, 5)}
    assert batches == {1: 1, 5: 5}

def record(c, match): return dict(config=c, key=json.dumps(c), status="ok" if match is not None else "failed",
                                  result=None if match is None else {"valid_exact_match": match, "exact_match": match})

def test_choice_is_the_best_mean_and_failures_count_as_zero():
    matches = {(1e-3, 0): .3, (1e-3, 1): .3, (1e-2, 0): .9, (1e-2, 1): None, (1e-1, 0): .25, (1e-1, 1): .25}
    arm = Arm(dict(method="fisher"), tuple({"lam": o} for o in (1e-3, 1e-2, 1e-1)))
    pick = lambda: choose([arm, Arm(dict(method="none"))], dict(steps=10), {}, (0, 1), lambda cs: [record(c, matches[c["lam"], c["seed"]]) for c in cs])
    assert pick() == [{"lam": 1e-2}, {}]                  # .9 and a failure: .45
    matches[1e-2, 0] = .5
    assert pick() == [{"lam": 1e-3}, {}]

def test_every_method_has_three_candidates():
    assert {len(candidates(m, .01)) for m in ablations.METHODS} == {3}
    assert candidates("clip", .01)[0] == {"max_norm": .03} and candidates("none", .01)[1] == {"lr": .01}

@pytest.mark.parametrize("name", ["targets", "transfer"])
def test_an_ablation_runs_and_resumes(name, tmp_path):
    tiny = dict(out=tmp_path/"out", tuning_out=tmp_path/"tuning", digits=load_digits(), seeds=(0,), steps=5, tuning_steps=1, tuning_seeds=(7,), batch=4,
                eval_sets=10, show=False)
    runs = run_ablation(name, **tiny)
    assert len(runs) == len(ABLATIONS[name](**SIZE)) and all(r["status"] == "ok" for r in runs)
    assert {r["config"]["seed"] for r in runs} == {0}
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.jsonl")}
    assert [r["key"] for r in run_ablation(name, **tiny)] == [r["key"] for r in runs]
    assert {f: f.read_bytes() for f in tmp_path.rglob("*.jsonl")} == before
    if name == "transfer": assert all({"n5_match", "n10_match"} <= r["result"].keys() for r in runs)

@pytest.mark.parametrize("method", ["hessian", "hessian_abs_sample"])
def test_exploding_gradients_are_no_mistake_of_the_loss(method, digits):
    c = ablation_config(method=method, loss="bce_clamped", lam=1e2, steps=2, batch=20, eval_every=2, eval_sets=20, **STEEP)
    assert fit([AblationTask(c, digits)])[0].error is None

@pytest.mark.parametrize("given, text", [("--n 1", "n: expected a whole number"), ("--data-dir nowhere", "expected a data directory"), ("--seeds 0", "--seeds: expected at least 1, got 0"), ("--tuning-steps 0", "--tuning-steps: expected at least 1"), ("--device there", "--device: "), ("--network x", "network: expected one of")])
def test_mistakes_are_a_sentence(given, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablations.py", "noise", *given.split(), "--out", str(tmp_path), "--steps", "2", "--eval-sets", "10"])
    monkeypatch.setattr(ablations, "ABLATIONS", {"noise": lambda n, steps, lr: [Arm({})]})
    with pytest.raises(SystemExit) as e: ablations.main()
    assert e.value.code == 2 and text in capsys.readouterr().err
