"""The API reference: in step with the code, complete, and its examples run."""
import ast
import contextlib
import importlib
import inspect
import io
import json
import random
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import api
from api_examples import EXTRA, WITHOUT

CLASSES = {o: (m, m.defs[o]) for o, m in api.homes().items() if isinstance(m.defs[o], ast.ClassDef)}
FUNCTIONS = {o: (m, m.defs[o]) for o, m in api.homes().items() if isinstance(m.defs[o], ast.FunctionDef)}


def obj(name): return getattr(importlib.import_module(f"{api.package}.{api.homes()[name].name}"), name)

def cells(section): return ["".join(c["source"]) for c in json.loads((ROOT/"nbs"/f"{section}.ipynb").read_text(encoding="utf-8"))["cells"]]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    api.write(folder)
    return folder

@pytest.mark.parametrize("section", api.SECTIONS)
def test_in_step(fresh, section):
    new, old = ((p/f"{section}.ipynb").read_text(encoding="utf-8") for p in (fresh, ROOT/"nbs"))
    assert new == old, f"nbs/{section}.ipynb is not what the code says: run python tools/prepare.py"

def test_ids():
    for section in api.SECTIONS:
        ids = [c["id"] for c in json.loads((ROOT/"nbs"/f"{section}.ipynb").read_text(encoding="utf-8"))["cells"]]
        assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[0-9a-f]{8}", i) for i in ids)

def test_every_name_once():
    shown = [c.split("\n")[0].removeprefix("### ") for s in api.SECTIONS for c in cells(s) if c.startswith("### ")]
    public = [o for p in (ROOT/api.package).glob("[!_]*.py") for o in importlib.import_module(f"{api.package}.{p.stem}").__all__]
    assert len(shown) == len(set(shown)) and set(shown) == set(public)

@pytest.mark.parametrize("section", api.SECTIONS)
def test_links(section):
    "A link to a name leads to where it is; nbdev's own index knows the anchors of the notebooks"
    from newton_losses_nb._modidx import d
    known = {f"{api.modules()[k.split('.')[1]].notebook}.ipynb{v[0][v[0].index('#'):]}" for k2 in d["syms"].values() for k, v in k2.items()
             if k.split(".")[1] in api.modules()}
    known |= {f"{s}.ipynb#{api.anchor(o)}" for s in api.SECTIONS for o, m in api.homes().items() if api.section_of(m.name) == s}
    known |= {f"{p.stem}.ipynb" for p in (ROOT/"nbs").glob("*.ipynb")}
    for text in cells(section):
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
            target = f"{section}.ipynb{link}" if link.startswith("#") else link
            assert target in known, f"{section}: {link}"

@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_parameters(name):
    "The parameters that are shown are those that Python sees, with their defaults"
    if name in FUNCTIONS: shown = api.parameters(*FUNCTIONS[name])
    else:
        if issubclass(obj(name), Exception) or any(api.modules()[api.homes()[name].name].text(b).endswith("Function") for b in CLASSES[name][1].bases): return
        shown = api.constructor(*CLASSES[name])[0]
    seen = inspect.signature(obj(name)).parameters
    if name in CLASSES and not shown: return
    assert [p.bare for p in shown if p.name != "*"] == list(seen)
    for p in shown:
        if p.name != "*": assert bool(p.default) == (seen[p.bare].default is not inspect.Parameter.empty), p.bare

# Classes that the package itself makes and calls: their methods need a docstring, no docment for each parameter
PLUMBING = {"Team", "Alone", "JoinedBatchNorm", "Job", "CapturedStep", "SortingFeed", "PathFeed", "SideBySide", "SeedRun", "Task", "SortingTask", "PathTask",
            "BasicBlock", "CutDigits", "Probe", "InjectFisher"}

def gaps():
    "Docstrings, docments and results that are missing"
    for name, (m, fn) in FUNCTIONS.items(): yield from lacks(f"{m.name}.{name}", m, fn, api.parameters(m, fn))
    for name, (m, cls) in CLASSES.items():
        if not api.doc_of(cls): yield f"{m.name}.{name}: no docstring"
        if any(m.text(b).endswith("autograd.Function") for b in cls.bases): continue
        for p in api.constructor(m, cls)[0]:
            if not p.doc: yield f"{m.name}.{name}({p.name}): no docment"
        for k, (at, fn) in api.public_methods(m, cls).items():
            static = any(getattr(d, "id", "") == "staticmethod" for d in fn.decorator_list)
            ps = [] if api.is_property(fn) or name in PLUMBING else api.method_parameters(at, fn, not static, (m, cls))
            yield from lacks(f"{m.name}.{name}.{k}", at, fn, ps, method=True)
    for name, m in api.homes().items():
        if isinstance(m.defs[name], ast.Assign) and not api.first_line(name, m): yield f"{m.name}.{name}: no comment beside its definition"

def lacks(where, m, fn, ps, method=False):
    if not api.doc_of(fn): yield f"{where}: no docstring"
    for p in ps:
        if p.name != "*" and not p.doc: yield f"{where}({p.name}): no docment"
    kind, meaning = api.returned(m, fn)
    gives = any(isinstance(n, ast.Return) and n.value is not None for n in own_nodes(fn))
    if not method and gives and not kind: yield f"{where}: no type of the result"
    if not method and kind not in ("", "None") and not meaning: yield f"{where}: result without a docment"

def own_nodes(fn):
    for n in ast.iter_child_nodes(fn):
        if isinstance(n, (ast.FunctionDef, ast.Lambda, ast.ClassDef)): continue
        yield n
        yield from own_nodes(n)

def test_nothing_undocumented():
    found = list(gaps())
    assert not found, "\n".join([f"{len(found)} gaps", *found])

def test_every_name_has_an_example():
    lost = [o for o, m in api.homes().items() if not isinstance(m.defs[o], ast.Assign) and o not in EXTRA and o not in WITHOUT and not api.example(o)
            and not api.makers(o) and not api.users(o)]
    assert not lost, f"tools/api_examples.py: expected an example of {', '.join(lost)}"
    assert not set(EXTRA) & set(WITHOUT) and set(EXTRA) | set(WITHOUT) <= set(api.homes())

# Examples made of cells that measure time: their notebooks run them already
TIMED = ("22_speed", "22b_scaling")

def examples():
    "Those that are shown as complete, once each"
    found = {code: name for name, code in EXTRA.items()}
    for o, k in [*((o, None) for o in api.homes()), *((o, k) for o, c in CLASSES.items() for k in api.public_methods(*c))]:
        if not k and (o in EXTRA or o in WITHOUT or isinstance(api.homes()[o].defs[o], ast.Assign)): continue
        e = api.example(o, k)
        if e and e[1] and e[0].stem not in TIMED: found.setdefault("\n".join([*e[1], e[0].source]), f"{o}.{k}" if k else o)
    return {name: code for code, name in found.items()}

EXAMPLES = examples()

@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path, monkeypatch):
    import torch
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    random.seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()): exec(compile(EXAMPLES[name], f"example of {name}", "exec"), {"__name__": "example"})
    except SystemExit as e: assert not e.code
