"""Ablations: their plans are whole and fair, targets that stay are those of a slow twin, and choices are the records' own."""
import functools
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from newton_losses_nb.lab import ablations
from newton_losses_nb.lab.ablations import (ABLATIONS, HELD, AblationTask, Arm, HeldTarget, ablation_config, _choose, compare_arms,
                                        _reorder, forget, run_ablation, _wrong_orders)
from newton_losses_nb.lab.data import load_digits
from newton_losses_nb.lab.experiment import fit, run_all
from newton_losses_nb.core.directions import Fisher
from newton_losses_nb.core.newton import OutputLoss
from newton_losses_nb.lab.report import paired_test
from newton_losses_nb.lab.tasks import sorting_config
from newton_losses_nb.sorting.losses import SortingLoss, true_permutation

SIZE = dict(n=5, steps=200, lr=1e-2)

@pytest.fixture(scope="module")
def digits(): return load_digits()

@pytest.mark.parametrize("name", ABLATIONS)
def test_every_configuration_is_valid_and_occurs_once(name):
    arms = ABLATIONS[name](**SIZE)
    final = [c for arm in arms for k in arm.candidates for c in arm.configs(k, [0], steps=200, batch=50, n=5)]
    assert len({json.dumps(c, sort_keys=True) for c in final}) == len(final)
    for c in final: assert c["method"] in ablations.ABLATION_METHODS and "tuned_as" not in c

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

@given(n=st.integers(2, 8), share=st.sampled_from((0., .3, 1.)), kind=st.sampled_from(ablations.ORDER_NOISE), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_wrong_orders_are_orders(n, share, kind, seed):
    told = _wrong_orders(50, n, share, kind, torch.Generator().manual_seed(seed))
    right = torch.arange(n)
    assert torch.equal(told.sort(1).values, right.expand(50, n))
    moved = (told != right).sum(1)
    if share == 0: assert not moved.any()
    if kind == "swap":
        assert set(moved.tolist()) <= {0, 2} and (told - right).abs().max() <= 1
        if share == 1: assert (moved == 2).all()

def test_reorder_tells_the_order_that_is_told():
    labels = torch.rand(3, 4, 5)
    told = _wrong_orders(12, 5, 1., "shuffle", torch.Generator().manual_seed(0)).view(3, 4, 5)
    T, U = true_permutation(labels), _reorder(true_permutation(labels), told)
    right = (T @ labels.unsqueeze(-1)).squeeze(-1)
    assert_close((U @ labels.unsqueeze(-1)).squeeze(-1), right.gather(-1, told))

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
    pick = lambda: _choose([arm, Arm(dict(method="none"))], dict(steps=10), {}, (0, 1), lambda cs: [record(c, matches[c["lam"], c["seed"]]) for c in cs])
    assert pick() == [{"lam": 1e-2}, {}]                  # .9 and a failure: .45
    matches[1e-2, 0] = .5
    assert pick() == [{"lam": 1e-3}, {}]

def test_compare_is_the_paired_test_of_the_report():
    a, b = [.31, .42, .55, None], [.30, .43, .50, .4]
    runs = [record(dict(method=m, seed=s, n=5), v) for m, vs in (("fisher", a), ("none", b)) for s, v in enumerate(vs)]
    is_method = lambda m: lambda c: c["method"] == m
    row = compare_arms(runs, {"it": (is_method("fisher"), is_method("none"))}, lambda r: 100*r["result"]["exact_match"]).loc["it"]
    expected = paired_test({s: 100*v for s, v in enumerate(a[:3])}, {s: 100*v for s, v in enumerate(b[:3])})
    for k, v in expected.items(): assert abs(row[k] - v) < 1e-9
    assert row.pairs == 3 and row.p_holm == row.p

def test_forget_leaves_the_records_alone():
    runs = [record(dict(method="none", seed=0, lr=.1, tau=1.), .5)]
    assert forget(runs)[0]["config"]["lr"] is None and forget(runs)[0]["config"]["tau"] == 1.
    assert forget(runs, "tau")[0]["config"] == dict(method="none", seed=0, lr=.1, tau=None)
    assert runs[0]["config"]["lr"] == .1

@pytest.mark.parametrize("name", ["targets", "transfer"])
def test_an_ablation_runs_and_resumes(name, tmp_path):
    tiny = dict(out=tmp_path/"out", tuning_out=tmp_path/"tuning", seeds=(0,), steps=5, tuning_steps=1, tuning_seeds=(7,), batch=4, eval_sets=10,
                run=functools.partial(run_all, show=False))
    runs = run_ablation(name, **tiny)
    assert len(runs) == len(ABLATIONS[name](**SIZE)) and all(r["status"] == "ok" for r in runs)
    assert {r["config"]["seed"] for r in runs} == {0}
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.jsonl")}
    assert [r["key"] for r in run_ablation(name, **tiny)] == [r["key"] for r in runs]
    assert {f: f.read_bytes() for f in tmp_path.rglob("*.jsonl")} == before
    if name == "transfer": assert all({"n5_match", "n10_match"} <= r["result"].keys() for r in runs)

@pytest.mark.parametrize("method", ["hessian", "hessian_abs_sample"])
def test_exploding_gradients_are_no_mistake_of_the_loss(method, digits):
    c = ablation_config(method=method, loss="bce_clamped", lam=1e2, steps=2, batch=20, eval_every=2, eval_sets=20, **ablations._STEEP)
    assert fit([AblationTask(c, digits)])[0].error is None
