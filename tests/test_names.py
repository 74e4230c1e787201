"""Every public name is documented, stands in the index of names, and is used in a cell beside the one that defines it."""
import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
FILES = [f.relative_to(ROOT).with_suffix("") for f in sorted((ROOT/"newton_losses_nb").glob("*/*.py")) if f.stem != "__init__"]
MODULES = [".".join(f.parts) for f in FILES]
INDEX = json.loads((ROOT/"nbs"/"names.ipynb").read_text(encoding="utf-8"))

def cells():
    "The code of every cell, without what it imports"
    for p in (ROOT/"nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in p.parts: continue
        for c in json.loads(p.read_text(encoding="utf-8"))["cells"]:
            source = "".join(c["source"])
            if c["cell_type"] == "code" and not source.startswith("#| eval: false"):
                yield re.sub(r"^ *from [\w.]+ import (\([^)]*\)|.*)$", "", source, flags=re.M)

CELLS = list(cells())


def names(module):
    m = importlib.import_module(module)
    return [(n, getattr(m, n)) for n in m.__all__]

def undocumented(obj):
    "Parameters without a word, neither as docments nor in the docstring"
    init = obj.__init__ if inspect.isclass(obj) else obj
    if not inspect.isfunction(init) or (inspect.isclass(obj) and "__init__" not in vars(obj)): return []
    try: docs = docments(obj if hasattr(obj, "__dataclass_fields__") else init)
    except (OSError, TypeError, SyntaxError): return []
    helped = [k for k, f in getattr(obj, "__dataclass_fields__", {}).items() if f.metadata.get("help")]   # a line of settings
    names = [k for k, p in inspect.signature(init).parameters.items() if k not in ("self", "cls", *helped) and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [k for k in names if not docs.get(k) and not re.search(rf"\b{k}\b", f"{obj.__doc__} {init.__doc__}")]

@pytest.mark.parametrize("module", MODULES)
def test_documented(module):
    for n, obj in names(module):
        if not inspect.isfunction(obj) and not inspect.isclass(obj): continue
        own = vars(obj).get("__doc__") if inspect.isclass(obj) else obj.__doc__
        assert own and not own.startswith(f"{n}("), f"{n} has no docstring"
        assert not undocumented(obj), f"{n}: {undocumented(obj)}"

@pytest.mark.parametrize("module", MODULES)
def test_in_the_index(module):
    "As stored; tools/prepare.py makes it anew"
    page = "".join(o for c in INDEX["cells"] for out in c.get("outputs", []) for o in out.get("data", {}).get("text/markdown", []))
    for n, _ in names(module): assert f"`{n}`" in page, f"{n} is missing; run tools/prepare.py"

@pytest.mark.parametrize("module", MODULES)
def test_used(module):
    for n, _ in names(module):
        word, made = re.compile(rf"(?<![\w.]){n}\b"), re.compile(rf"^(class |def ){n}\b|^{n}(:\w+)? *=|^(\w+, )*{n}(, \w+)* =", re.M)
        assert any(word.search(c) and not made.search(c) for c in CELLS), f"{n} is used nowhere"

def test_no_link_within_a_link():
    "A public name in a link of the landing page would become a link of its own"
    assert "[[" not in (ROOT/"README.md").read_text(encoding="utf-8")
