"""The benchmark of speed: its arithmetic with a clock that is turned by hand, its comparisons, its file, its cases; never how fast something is."""
import importlib.metadata
import json
import math

import pandas as pd
import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("pandas")

from newton_losses_nb.lab import scaling, speed
from newton_losses_nb.lab.scaling import Curve, curve_table, growth, peak_memory, run_curves, run_scaling, speed_curves
from newton_losses_nb.lab.speed import (GROUPS, Case, Setup, difference, import_seconds, interleave, measure_case, run_cases, run_speed,
                                    show_table)


class Clock:
    "A clock that moves only when told"
    def __init__(self): self.now = 0.
    def __call__(self): return self.now
    def takes(self, seconds):
        def f(): self.now += seconds() if callable(seconds) else seconds
        return f

@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def example(**kwargs):
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    make = lambda: Setup(lambda x: x.exp()/x.exp().sum(-1, keepdim=True), lambda x: x.softmax(-1), (x,))
    return Case(**{**dict(group="g", name="softmax", size="20 x 5", measure="both", make=make, needs=("torch",)), **kwargs})

fast = dict(rounds=3, seconds=0.01, show=False)


@pytest.mark.parametrize("a,b,base,ratio", [(1., 3., 0., 3.), (3., 1., 0., 1/3), (1., 3., 1., 2.), (0.25, 0.25, 10., 1.)])
def test_ratio(a, b, base, ratio):
    clock = Clock()
    t = interleave(clock.takes(a), clock.takes(b), rounds=4, seconds=100, base=base, clock=clock)
    assert t["ours"] == pytest.approx(a + base) and t["theirs"] == pytest.approx(b + base)
    assert t["low"] == pytest.approx(ratio) and t["ratio"] == pytest.approx(ratio) and t["high"] == pytest.approx(ratio)

def test_slow_machine_slows_both():
    "A machine that gets slower round by round does not change the ratios of pairs"
    clock, calls = Clock(), [0]
    def speed(): return 1 + calls[0]//12
    def ours(): calls[0] += 1; clock.now += 1.*speed()
    def theirs(): calls[0] += 1; clock.now += 2.*speed()
    t = interleave(ours, theirs, rounds=6, seconds=6, clock=clock)
    assert t["ratio"] == pytest.approx(2, rel=0.2)

def test_each_side_is_first_in_half_of_the_rounds():
    clock, order = Clock(), []
    def side(name):
        def f(): order.append(name); clock.now += 1
        return f
    interleave(side("a"), side("b"), rounds=4, seconds=4, clock=clock)
    blocks = [o for i, o in enumerate(order[6:]) if i % 3 == 0] # each block: two calls to warm up, one that counts
    assert "".join(blocks) == "abbaabba"

def test_quartiles():
    clock, k = Clock(), [0]
    def theirs(): k[0] += 1; clock.now += float((k[0] - 1)//3) or 1.  # 1 for the calibration, then 1, 2, 3, 4, 5
    t = interleave(clock.takes(1.), theirs, rounds=5, seconds=5, clock=clock)
    assert (t["low"], t["ratio"], t["high"]) == pytest.approx((2, 3, 4))

def test_slow_calls_get_three_rounds():
    clock = Clock()
    assert interleave(clock.takes(2.), clock.takes(1.), rounds=9, seconds=1., clock=clock)["rounds"] == 3
    assert interleave(clock.takes(2.), clock.takes(1.), rounds=9, seconds=3., clock=clock)["rounds"] == 9

def test_difference_sees_values_and_gradients():
    x = (torch.randn(4, 3),)
    f = lambda x: x.exp()
    assert difference(Setup(f, f, x), "both") == 0
    shifted = Setup(f, lambda x: x.exp() + 1, x)
    assert difference(shifted, "forward") > 0.1
    hidden = Setup(f, lambda x: x.exp().detach() + 0*x, x)       # the same value, another gradient
    assert difference(hidden, "forward") == 0 and difference(hidden, "both") > 0.1
    lost = Setup(f, lambda x: (x*0).sqrt()*0 + x.exp(), x)        # the same value, a gradient that is not a number
    assert difference(lost, "forward") == 0 and not difference(lost, "both") <= 1
    assert difference(Setup(f, lambda x: x.exp().mT, x, align=lambda x: x.mT), "both") == 0
    assert difference(Setup(f, lambda x: x, x, check=()), "forward") is None
    assert difference(Setup(f, lambda x: x, x, check=(f, f)), "forward") == 0

def test_failures_are_rows():
    nan = example(make=lambda: Setup(lambda x: x*torch.nan, lambda x: x*torch.nan, (torch.ones(2),)))
    wrong = example(make=lambda: Setup(lambda x: x, lambda x: 2*x, (torch.ones(2),)))
    def broken(): raise RuntimeError("no kernel\nsecond line")
    table = run_cases([example(name="missing", needs=("no-such-library", "torch")), nan, example(name="w", make=wrong.make), example(name="b", make=broken)], **fast)
    assert table["why not"].tolist() == ["no-such-library not installed", "ValueError: results differ by nan", "ValueError: results differ by 5.0e-01",
                                         "RuntimeError: no kernel"]
    assert table.ratio.isna().all() and table.met.isna().all()
    assert (show_table(table).ratio == "").all()

@pytest.mark.parametrize("at_most", [False, True])
def test_target(at_most):
    table = run_cases([example(name=str(t), target=t, at_most=at_most) for t in (1e-9, 1e9)], **fast)
    assert table.met.tolist() == ([False, True] if at_most else [True, False])
    assert (table.low <= table.ratio).all() and (table.ratio <= table.high).all()
    assert table.target.tolist() == [("≤ " if at_most else "≥ ") + t for t in ("1e-09", "1e+09")]

def test_at_most_turns_the_ratio_round():
    clock = Clock()
    def timed(ours, theirs, rounds, seconds, base): return interleave(clock.takes(2.), clock.takes(1.), rounds, seconds, base, clock)
    old, speed.interleave = speed.interleave, timed
    try: ratios = [measure_case(example(at_most=o), 3)[0]["ratio"] for o in (False, True)]
    finally: speed.interleave = old
    assert ratios == pytest.approx([0.5, 2.])

def test_resumed_by_case(tmp_path):
    out, made = tmp_path/"a.jsonl", []
    def counted(name, ok=True):
        def make():
            made.append(name)
            if not ok: raise RuntimeError("no")
            return example().make()
        return example(name=name, make=make)
    run_cases([counted("one")], out, **fast)
    with open(out, "a") as f: f.write('{"cut of')                # killed while writing
    first = run_cases([counted("one"), counted("two"), counted("bad", False)], out, **fast)
    again = run_cases([counted("one"), counted("two"), counted("bad", True)], out, **fast)
    assert made == ["one", "two", "bad", "bad"]                  # what failed is tried again
    assert again.operation.tolist() == ["one", "two", "bad"] and again["why not"].tolist() == ["", "", ""]
    assert first.ratio[:2].tolist() == again.ratio[:2].tolist()
    records = [json.loads(o) for o in out.read_text().splitlines()]
    assert len(records) == 4
    assert {"torch", "python", "newton_losses_nb"} <= records[0]["versions"].keys() and "1 threads" in records[0]["device_name"]
    assert records[0]["config"]["threads"] == 1 and records[0]["result"]["peer"] == f"torch {importlib.metadata.version('torch')}"

def test_names_are_unique():
    "Two cases with the same configuration would be one row"
    cases = [c for make in GROUPS.values() for c in make("cpu")]
    configs = [json.dumps(speed._case_config(c), sort_keys=True) for c in cases]
    assert len(set(configs)) == len(cases) > 150
    assert {c.measure for c in cases} == {"forward", "both", "call"}
    curves = speed_curves()
    assert len({c.name for c in curves}) == len(curves)

PEERS = {"networks": "diffsort", "relaxations": "difftopk", "paths": "scipy", "hessians": "torch"}

@pytest.mark.parametrize("group", PEERS)
def test_peers_agree(group):
    "The smallest case of each kind, compared and not timed; those whose peers are not installed are left out"
    seen = set()
    for case in GROUPS[group]("cpu"):
        kind = case.name, case.needs, case.measure
        if kind in seen or speed.peer_version(case.needs).endswith("not installed"): continue
        seen.add(kind)
        off = difference(case.make(), case.measure)
        assert off is not None and off <= case.tol, case
    if speed.peer_version((PEERS[group],)).endswith("not installed"): pytest.skip(f"{PEERS[group]} is not installed")
    assert seen

@pytest.mark.parametrize("group", ["losses", "cnn"])
def test_steps_have_the_plain_value(group):
    cases = [c for c in GROUPS[group]("cpu") if "CNN" not in c.name and c.size == "100 x 5"]
    for c in cases: assert difference(c.make(), c.measure) <= c.tol
    if group == "cnn":
        targets = {c.name.split(": ")[1].split(",")[0]: c.target for c in GROUPS["cnn"]("cpu") if "parts" in c.name}
        assert targets == {"fisher": 1.01, "hessian": 1.05, "clip": None}
        assert {c.target for c in GROUPS["cnn"]("cuda")} == {1.02, 1.10, None}

def test_a_step_changes_nothing():
    loss, plain, T = speed._method_losses("cauchy", 5, "fisher")
    step = speed._step("small", 5, loss, (T,), "cpu")
    assert float(step()) == float(step())

def test_sweeps_are_shortest_paths():
    import numpy as np
    from newton_losses_nb.paths.exact import shortest_path
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 6), (6, 1), (2, 2), (12, 9)):
        cost, path = rng.random(size) + 0.01, np.zeros(size)
        speed._sweep_path(cost, path)
        assert torch.equal(torch.tensor(path), shortest_path(torch.tensor(cost)))

@pytest.mark.parametrize("solver", ["_heap_paths", "_scipy_paths", "_rustworkx_paths"])
@pytest.mark.parametrize("size", [(3, 3), (7, 4), (2, 9)])
def test_single_map_solvers(solver, size):
    pytest.importorskip({"_heap_paths": "heapq", "_scipy_paths": "scipy", "_rustworkx_paths": "rustworkx"}[solver])
    from newton_losses_nb.paths.exact import shortest_path
    cost = torch.rand(20, *size, generator=torch.Generator().manual_seed(0)) + 0.01
    assert torch.equal(getattr(speed, solver)(*size)(cost), shortest_path(cost))

def test_peak_memory():
    x = torch.randn(250_000)
    def released(): return [x + i for i in range(3)][:1]
    def in_turn():
        for i in range(3): x + i
    def mine():
        a = x.exp()
        del a
    for f, matrices in ((released, 3), (in_turn, 1), (mine, 1), (lambda: None, 0)):
        f()
        assert peak_memory(f) == pytest.approx(matrices*1e6, abs=2e4)

def test_nothing_is_lost_on_stderr(capfd):
    import sys
    peak_memory(lambda: torch.ones(3))
    print("still here", file=sys.stderr)
    assert "still here" in capfd.readouterr().err

def test_curves(tmp_path):
    def make(n, device):
        if n == 8: raise RuntimeError("too much\nmore")
        x = torch.randn(n*1000)
        return lambda: x.exp()
    curve = Curve("exp", "n", (2, 4, 8, 16), make, lambda n: n)
    table = run_curves([curve], tmp_path/"c.jsonl", seconds=0.01, show=False)
    assert table["size"].tolist() == [2, 4, 8, 16] and table.time.isna().tolist() == [False, False, True, False]
    assert table.bytes.dropna().tolist() == [8000, 16000, 64000]
    assert growth(table)["memory ~ size^"][0] == pytest.approx(1)
    again = run_curves([curve], tmp_path/"c.jsonl", seconds=0.01, show=False)
    pd.testing.assert_frame_equal(table, again)

def test_growth():
    sizes = [1, 2, 4, 8]
    table = pd.DataFrame({"curve": "a", "variable": "n", "size": sizes, "time": [1., 4., 16., 192.], "bytes": [s**3 for s in sizes], "work": [s**2 for s in sizes]})
    g = growth(table).iloc[0]
    assert g["memory ~ size^"] == pytest.approx(3) and g["largest jump"] == pytest.approx(3) and g["where"] == "4 to 8"
    assert growth(curve_table([])).empty
    assert growth(table.assign(time=[1., math.nan, math.nan, math.nan])).empty

def test_each_curve_runs():
    for curve in speed_curves(): curve.make(curve.sizes[0], "cpu")()

def test_run_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "GROUPS", {"g": lambda device: [example(), example(name="other", needs=("no-such-library",))]})
    torch.set_num_threads(2)
    table = run_speed(["g"], tmp_path/"new", rounds=3, seconds=0.01, show=False)
    assert torch.get_num_threads() == 2 and len(table) == 2      # threads put back
    assert sorted(o.name for o in (tmp_path/"new").iterdir()) == ["speed.csv", "speed.jsonl", "speed.md"]
    assert "no-such-library not installed" in (tmp_path/"new"/"speed.md").read_text()
    with pytest.raises(ValueError, match="groups: expected some of"): run_speed(["nothing"], tmp_path)

def test_run_scaling(tmp_path, monkeypatch):
    exp = Curve("exp", "n", (2, 4), lambda n, d: torch.ones(n).exp, lambda n: n)
    monkeypatch.setattr(scaling, "speed_curves", lambda device: [exp])
    assert len(run_scaling(tmp_path, seconds=0.01, show=False)) == 2
    assert sorted(o.name for o in tmp_path.iterdir()) == ["scaling.csv", "scaling.jsonl", "scaling.md", "scaling.png"]

def test_first_import_is_light():
    "The library part brings in nothing of the extra `bench`"
    t = import_seconds()
    assert "torch" in t and "newton_losses_nb.core.newton" in t
    assert not {"pandas", "scipy", "matplotlib", "pooch", "mlxtend"} & t.keys()
