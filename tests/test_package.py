"""The package as it is installed: light to import, clear without its extra, in step with its commands."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

HEAVY = ("pandas", "matplotlib", "scipy", "pooch", "mlxtend", "nbdev", "IPython", "diffsort", "difftopk", "algovision", "pyepo", "numba", "rustworkx")

def python(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

@pytest.mark.parametrize("module", ["splitting", "curvature", "newton", "relaxations", "sorting_networks", "sorting", "shortest_path", "relaxed_paths",
                                    "smoothing", "more_sorting", "cli"])
def test_light_import(module):
    out = python(f"import newton_losses_nb.{module}, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]"

def test_command_without_extra():
    block = f"import sys; [sys.modules.__setitem__(m, None) for m in ('pandas', 'matplotlib', 'mlxtend')]\n"
    find = "import importlib.util as u; old = u.find_spec; u.find_spec = lambda m, *a: None if sys.modules.get(m, 1) is None else old(m, *a)\n"
    out = python(block + find + "from newton_losses_nb.cli import nl_bench; sys.exit(nl_bench(['sorting']))")
    assert out.returncode == 2
    assert "needs the extra 'bench' (pandas, matplotlib, mlxtend not found)" in out.stderr and "Traceback" not in out.stderr

def test_console_scripts():
    for argv in (["nl_bench", "--help"], ["nl_bench", "sorting", "--help"], ["nl_report", "--help"]):
        out = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert out.returncode == 0 and "usage:" in out.stdout, out.stderr

def test_sidebar_lists_all_notebooks():
    listed = re.findall(r"^ +- (?:href: )?(\w+\.ipynb)$", (ROOT/"_quarto.yml").read_text(encoding="utf-8").split("\n  sidebar:")[1], re.M)
    assert sorted(listed) == sorted(p.name for p in (ROOT/"nbs").glob("*.ipynb"))

def test_links_between_notebooks():
    for p in [ROOT/"README.md", *(ROOT/"nbs").glob("*.ipynb")]:
        for link in re.findall(r"\]\(((?:nbs/)?\w+\.ipynb|(?:nbs/)?images/[\w.]+)\)", p.read_text()):
            assert (p.parent/link).exists(), f"{p.name}: {link}"
