"""The benchmarks: their arithmetic with a clock turned by hand, peers equal to ours, their file."""
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("numpy")
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/"benchmarks"))

import scaling
import speed
from speed import GROUPS, Case, Setup, difference, interleave, measure_case

from newton_losses_nb import shortest_path


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

class Clock:
    "A clock that moves only when told"
    def __init__(self): self.now, self.calls = 0., []
    def __call__(self): return self.now
    def takes(self, seconds):
        def f():
            self.now += seconds
            self.calls.append(seconds)
        return f

def example(**kwargs):
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    by_hand = lambda x: x.exp()/x.exp().sum(-1, keepdim=True)
    make = lambda: Setup(by_hand, lambda x: x.softmax(-1), (x,))
    named = dict(group="g", name="softmax", size="20 x 5", measure="both", make=make)
    return Case(**{**named, "needs": ("torch",), **kwargs})

@pytest.mark.parametrize("a,b,base,ratio", [(1., 3., 0., 3.), (3., 1., 0., 1/3), (1., 3., 1., 2.)])
def test_ratio(a, b, base, ratio):
    clock = Clock()
    t = interleave(clock.takes(a), clock.takes(b), 4, 100, base, clock)
    assert_close([t["ours"], t["theirs"], t["low"], t["ratio"], t["high"]],
                 [a + base, b + base, ratio, ratio, ratio])

def test_blocks():
    "Each side is first in half of the rounds; slow calls get three"
    clock = Clock()
    interleave(clock.takes(1.), clock.takes(2.), rounds=4, seconds=4, clock=clock)
    assert clock.calls[6::3] == [1, 2, 2, 1, 1, 2, 2, 1] # blocks of two calls to warm up and one
    assert interleave(clock.takes(2.), clock.takes(1.), 9, 1., clock=clock)["rounds"] == 3

def test_quartiles():
    clock, k = Clock(), [0]
    def theirs(): # 1 second at first, then blocks of two calls to warm up and one that counts
        k[0] += 1
        clock.now += float((k[0] - 1)//3) or 1.
    t = interleave(clock.takes(1.), theirs, rounds=5, seconds=5, clock=clock)
    assert (t["low"], t["ratio"], t["high"]) == pytest.approx((2, 3, 4))

def test_difference_sees_values_and_gradients():
    x, f = (torch.linspace(-1, 1, 12).view(4, 3),), torch.exp
    assert difference(Setup(f, f, x), "both") == 0
    assert difference(Setup(f, lambda x: x.exp() + 1, x), "forward") > 0.1
    hidden = Setup(f, lambda x: x.exp().detach() + 0*x, x)
    lost = Setup(f, lambda x: (x*0).sqrt()*0 + x.exp(), x)   # its gradient is NaN
    assert difference(hidden, "forward") == 0 and difference(hidden, "both") > 0.1
    assert difference(lost, "forward") == 0 and not difference(lost, "both") <= 1
    assert difference(Setup(f, lambda x: x, x, check=()), "forward") is None
    assert difference(Setup(f, lambda x: x, x, check=(f, f)), "forward") == 0

def test_at_most_turns_the_ratio_round():
    once, often = lambda: None, lambda: [None for _ in range(9999)]
    case = example(measure="call", make=lambda: Setup(once, often, check=()))
    ratios = [measure_case(case._replace(at_most=o), 3, 0.01)["ratio"] for o in (False, True)]
    assert ratios[0] > 1 > ratios[1]

def test_file(tmp_path):
    "What is stored is found again, what failed is a sentence and tried again"
    out, made = tmp_path/"a.jsonl", []
    def counted(name, fails=False):
        def make():
            made.append(name)
            if fails: raise RuntimeError("no kernel")
            return example().make()
        return example(name=name, make=make)
    wrong = example(name="wrong", make=lambda: Setup(torch.exp, torch.sin, (torch.ones(2),)))
    missing = example(name="missing", needs=("no-such-library",))
    run = lambda *cases: list(speed.run(cases, out=out, rounds=3, seconds=0.01))
    first = run(counted("one"), counted("bad", True), wrong, missing)
    assert [r["status"] for r in first] == ["ok", "failed", "failed", "failed"]
    for r, words in zip(first[1:], ("no kernel", "results differ by", "no-such-library")):
        assert words in r["error"] and r["result"] is None
    again = run(counted("one"), counted("bad"))
    assert made == ["one", "bad", "bad"] and again[0]["result"] == first[0]["result"]
    assert len(out.read_text().splitlines()) == 2

@pytest.mark.parametrize("name", ["speed", "scaling"])
def test_stored_results_are_found(name, monkeypatch):
    "Configurations, and so keys, are those of the stored results; no two are the same"
    def named(task, items, *_):
        fixed = {"task": task, "seed": 0, "device": "cpu", "threads": 1}
        return [json.dumps(fixed | c, sort_keys=True) for c, _ in items]
    monkeypatch.setattr(sys.modules[name], "measured", named)
    cases = [c for make in GROUPS.values() for c in make("cpu")]
    now = speed.run(cases) if name == "speed" else scaling.run(scaling.curves())
    lines = (root/"nbs"/"results"/f"{name}_cpu.jsonl").read_text().splitlines()
    stored = {json.dumps(json.loads(o)["config"], sort_keys=True) for o in lines}
    assert len(set(now)) == len(now) and len(stored & set(now)) >= len(now) - 2

@pytest.mark.parametrize("group", ["networks", "relaxations", "paths", "hessians", "losses"])
def test_peers_agree(group):
    "The first case of each kind, compared and not timed (test_fuse has the fused ones)"
    seen = set()
    for case in GROUPS[group]("cpu"):
        if (case.name, case.measure) in seen or "fuse" in case.name: continue
        seen.add((case.name, case.measure))
        for o in case.needs: pytest.importorskip(o)
        assert difference(case.make(), case.measure) <= 1e-3, case

@pytest.mark.parametrize("size", [(3, 3), (7, 4), (2, 9)])
def test_single_map_solvers(size):
    cost = torch.rand(20, *size, generator=torch.Generator().manual_seed(0)) + 0.01
    for name in ("scipy", "rustworkx", "numba"): pytest.importorskip(name)
    best = shortest_path(cost)
    for path in speed.scipy_path(*size), speed.rustworkx_path(*size):
        found = torch.zeros_like(cost).flatten(1)
        for c, marks in zip(cost.flatten(1).numpy(), found): marks[path(c)] = 1
        assert torch.equal(found.view_as(cost), best)
    for c, wanted in zip(cost.numpy(), best.numpy()):
        speed.compiled_path()(c, found := wanted*0)
        assert (found == wanted).all()

def test_peak_memory():
    x = torch.randn(250_000)
    def released(): return [x + i for i in range(3)][:1]
    def in_turn():
        for i in range(3): x + i
    for f, matrices in ((released, 3), (in_turn, 1), (lambda: None, 0)):
        f()
        assert scaling.peak_memory(f) == pytest.approx(matrices*1e6, abs=2e4)

def test_each_curve_runs():
    for curve in scaling.curves(): curve.make(curve.sizes[0], "cpu")()
