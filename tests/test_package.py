"""The package as it is installed: light to import, clear without its extra, in step with its commands."""
import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from newton_losses_nb import ClippedLoss, NewtonLoss, OutputLoss

ROOT = Path(__file__).resolve().parent.parent

PACKAGE = ROOT/"newton_losses_nb"

NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(o.startswith(".") for o in p.relative_to(ROOT/"nbs").parts))

HEAVY = ("pandas", "matplotlib", "scipy", "pooch", "mlxtend", "nbdev", "IPython", "diffsort", "difftopk", "algovision", "pyepo", "numba", "rustworkx")

def python(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

def test_light_import():
    "The front door, and with it all that is no experiment"
    modules = [f".{m[:-3].replace('/', '.')}" for m in MODULES if m.startswith(("core/", "sorting/", "paths/")) and m != "paths/terrain.py" and "__init__" not in m]
    imports = ", ".join(f"newton_losses_nb{m}" for m in ("", *modules, ".lab.cli"))
    out = python(f"import {imports}, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert len(modules) > 15 and out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]"

FRONT = """NewtonLoss OutputLoss inject_fisher newton_target newton_direction Direction Fisher Hessian DiagonalFisher DiagonalHessian Krylov PerSample
    Remembering Window MovingAverage Clip Normalize Scalar Whiten ClippedLoss NormalizedLoss ScalarStepLoss SortingLoss true_permutation neural_sort soft_sort
    sorting_network shortest_path relaxed_bellman_ford FenchelYoungLoss SmoothedLoss SmoothedAlgorithmLoss check_loss"""

def test_names_at_the_front_door():
    import newton_losses_nb
    assert set(FRONT.split()) <= set(newton_losses_nb.__all__)
    assert all(hasattr(newton_losses_nb, name) for name in newton_losses_nb.__all__)

MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")

@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("core/") and m not in ("core/check.py", "core/adapters.py")])
def test_lines_of_the_core(module):
    "At most 100 characters, but for what nbdev writes: the docstring of the module and its list of names"
    cells = (PACKAGE/module).read_text(encoding="utf-8").split("\n# %% ")
    assert not [line for cell in cells[2:] for line in cell.splitlines() if len(line) > 100]

def test_names_of_the_core():
    "At most 40, without `check_loss` and the adapters"
    modules = [importlib.import_module(f"newton_losses_nb.core.{m}") for m in ("derivatives", "evidence", "solves", "directions", "newton", "more")]
    assert len([n for m in modules for n in m.__all__]) <= 40

@pytest.mark.parametrize("make", [NewtonLoss, lambda f: NewtonLoss(f, lam=.1), ClippedLoss, OutputLoss])
def test_calls_of_a_step(make):
    "At most 35 functions of the package are called, 8 deep"
    loss, y, depth, calls = make(lambda y: y.square().sum(1)), torch.randn(100, 5).requires_grad_(), 0, []
    def count(frame, event, _):
        nonlocal depth
        if not frame.f_code.co_filename.startswith(str(PACKAGE)): return
        depth += {"call": 1, "return": -1}.get(event, 0)
        if event == "call": calls.append(depth)
    loss(y).backward()
    sys.setprofile(count)
    try: loss(y).backward()
    finally: sys.setprofile(None)
    assert 10 < len(calls) <= 35 and max(calls) <= 8

@pytest.mark.parametrize("module", [m for m in MODULES if m.split("/")[0] in ("lab", "paths", "sorting")])
def test_lines_and_parameters(module):
    "At most 120 characters, but for nbdev's list of names; at most 10 parameters beside `self`"
    text = (PACKAGE/module).read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("__all__")]
    for f in ast.walk(ast.parse(text)):
        if not isinstance(f, ast.FunctionDef): continue
        names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
        assert len([n for n in names if n not in ("self", "cls")]) <= 10, f.name

def of_this_package(node): return isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "newton_losses_nb")

def private(name): return name.startswith("_") and not name.startswith("__")

@pytest.mark.parametrize("module", MODULES)
def test_no_module_uses_a_private_name_of_another(module):
    nodes = list(ast.walk(ast.parse((PACKAGE/module).read_text(encoding="utf-8"))))
    names = {alias.asname or alias.name for n in nodes if of_this_package(n) for alias in n.names}
    imported = [alias.name for n in nodes if of_this_package(n) for alias in n.names if private(alias.name)]
    through = [f"{n.value.id}.{n.attr}" for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
               and n.value.id in names and n.value.id.islower() and private(n.attr)]
    assert not imported + through

def test_command_without_extra():
    block = f"import sys; [sys.modules.__setitem__(m, None) for m in ('pandas', 'matplotlib', 'mlxtend')]\n"
    find = "import importlib.util as u; old = u.find_spec; u.find_spec = lambda m, *a: None if sys.modules.get(m, 1) is None else old(m, *a)\n"
    out = python(block + find + "from newton_losses_nb.lab.cli import nl_bench; sys.exit(nl_bench(['sorting']))")
    assert out.returncode == 2
    assert "needs the extra 'bench' (pandas, matplotlib, mlxtend not found)" in out.stderr and "Traceback" not in out.stderr

def test_console_scripts():
    for argv in (["nl_bench", "--help"], ["nl_bench", "sorting", "--help"], ["nl_report", "--help"]):
        out = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert out.returncode == 0 and "usage:" in out.stdout, out.stderr

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The built wheel, unpacked"
    pytest.importorskip("setuptools", reason="builds the wheel")
    source, out = tmp_path_factory.mktemp("source")/"project", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "_docs", "_proc", "_offline", "build", "dist", "runs", "__pycache__", "*.egg-info"))
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    file, = out.glob("*.whl")
    zipfile.ZipFile(file).extractall(out/"unpacked")
    return out/"unpacked"

def test_wheel_holds_everything(wheel):
    package = wheel/"newton_losses_nb"
    modules = lambda p: {f.relative_to(p).as_posix() for f in p.rglob("*.py")}
    assert modules(package) == modules(ROOT/"newton_losses_nb")
    assert {p.name for p in (package/"results").iterdir()} == {p.name for p in (ROOT/"nbs"/"results").iterdir()}

@pytest.mark.parametrize("entry, argv, says", [("lab.cli:nl_bench", ["sorting", "--lam", "odd"], "lam: expected a number or typical or auto"), ("lab.cli:nl_report", ["nowhere"], "there is no folder or file")])
def test_command_of_the_wheel(wheel, tmp_path, entry, argv, says):
    "By itself (-I), and without what another package may have imported of importlib: a command gets as far as a user's mistake"
    pytest.importorskip("mlxtend", reason="of the extra bench")
    module, name = entry.split(":")
    assert f"{name} = newton_losses_nb.{entry}".replace(" ", "") in next(wheel.glob("*.dist-info")).joinpath("entry_points.txt").read_text().replace(" ", "")
    code = f"""
import importlib, sys
sys.path.insert(0, {str(wheel)!r})
import fastcore.script, newton_losses_nb
assert newton_losses_nb.__file__.startswith({str(wheel)!r})
sys.modules.pop("importlib.util", None)
vars(importlib).pop("util", None)
from newton_losses_nb.{module} import {name}
sys.exit({name}({argv!r}))
"""
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert out.returncode == 2 and says in out.stderr and "Traceback" not in out.stderr, out.stderr

def test_sidebar_lists_all_notebooks():
    listed = re.findall(r"^ +- (?:href: )?([\w/]+\.ipynb)$", (ROOT/"_quarto.yml").read_text(encoding="utf-8").split("\n  sidebar:")[1], re.M)
    assert sorted(listed) == sorted(p.relative_to(ROOT/"nbs").as_posix() for p in NOTEBOOKS)

def test_links_between_notebooks():
    for p in [ROOT/"README.md", *NOTEBOOKS]:
        text = p.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([\w./]+\.ipynb|[\w./]*images/[\w.]+)(?:#[^)]*)?\)", text): assert (p.parent/link).exists(), f"{p.name}: {link}"
        for link in re.findall(r"newton-losses/newton_losses_nb/blob/main/([\w./]+)", text): assert (ROOT/link).exists(), f"{p.name}: {link}"
