"""The API reference: nbs/api_*.ipynb from the exported modules and the notebooks, without running either.

    python tools/api.py [folder]"""
import ast
import builtins
import hashlib
import io
import json
import re
import sys
import tokenize
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from api_examples import EXTRA, WITHOUT

root = Path(__file__).resolve().parent.parent
package = "newton_losses_nb"

SECTIONS = {
    "api_method": ("Reference: the method", "Every public name of the method itself: derivatives, damped solves, Newton losses, the controls, and the check of a loss before training.",
        ("newton", "probe", "output_loss", "curvature", "solve", "splitting", "large", "pooling", "ragged")),
    "api_sorting": ("Reference: sorting", "Every public name for differentiable sorting and ranking: relaxations, sorting networks and the losses made of them.",
        ("relaxations", "sorting_networks", "sorting", "more_sorting")),
    "api_paths": ("Reference: shortest paths", "Every public name for learning through a shortest-path solver: the solver, its relaxations, smoothed algorithms and maps.",
        ("shortest_path", "relaxed_paths", "smoothing", "terrain")),
    "api_training": ("Reference: training", "Every public name for losses of other libraries, several processes, and several seeds side by side.",
        ("adapters", "processes", "fast_training")),
    "api_experiments": ("Reference: experiments", "Every public name of the experiments: data, networks, records, grids of runs, reports, pictures, commands and timing.",
        ("data", "models", "records", "experiment", "report", "plots", "path_experiment", "cli", "speed", "scaling", "colab", "ablations", "classification")),
}

START = """Where to begin:

- Your training loop has a loss with one value per sample: wrap it with {NewtonLoss}.
- The loss cannot be changed, and is a mean or a sum over samples: put {inject_fisher} before it.
- Will it work for this loss, and with which settings? Ask {check_loss}.
- The loss comes from another library: {per_sample} or {permutation_loss} make it fit.
- Learn scores from orderings: {SortingLoss}, with {true_permutation} for the labels.
- Learn costs from shortest paths: {FenchelYoungLoss} with {shortest_path}, or {relaxed_bellman_ford}.
- Any other algorithm, as a black box: {SmoothedLoss}, {SmoothedAlgorithmLoss} or {BlackboxLoss}.
- The controls that a Newton loss must beat: {ClippedLoss}, {NormalizedLoss}, {ScalarStepLoss}.
- Only the mathematics: {mean_hessian}, {empirical_fisher}, {damped_solve}, {fisher_solve}, {newton_target}.
- Run the benchmarks: {nl_bench}, and {nl_report} for tables of what is there."""

SHORT = "`N` is the number of samples, `m` the number of outputs of each; a shape such as `Float[Tensor, \"N m\"]` is a tensor of floats with these sizes."




# --- modules ---------------------------------------------------------------------------------------------------------

class Module:
    "What can be read from an exported module"
    def __init__(self, name):
        self.name = name
        self.source = (root/package/f"{name}.py").read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self.lines = self.source.splitlines()
        self.comments, self.alone = {}, set()
        for t in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if t.type != tokenize.COMMENT: continue
            self.comments[t.start[0]] = t.string.lstrip("# ").strip()
            if not t.line[:t.start[1]].strip(): self.alone.add(t.start[0])
        self.notebook = re.search(r"File to edit: \.\./nbs/(\w+)\.ipynb", self.source)[1]
        self.names = next(ast.literal_eval(n.value) for n in self.tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", None) == "__all__")
        self.defs, self.patched, self.imported = {}, {}, {}
        for n in self.tree.body:
            if isinstance(n, ast.FunctionDef):
                cls = _patched(n)
                if cls: self.patched.setdefault(cls, {})[n.name] = n
                else: self.defs[n.name] = n
            elif isinstance(n, ast.ClassDef): self.defs[n.name] = n
            elif isinstance(n, ast.Assign):
                for t in n.targets:
                    for o in t.elts if isinstance(t, ast.Tuple) else [t]:
                        if isinstance(o, ast.Name): self.defs.setdefault(o.id, n)
        for n in ast.walk(self.tree):
            if isinstance(n, ast.ImportFrom) and (n.level == 1 or (n.module or "").startswith(package)):
                home = (n.module or "").replace(package, "").lstrip(".")
                for a in n.names: self.imported.setdefault(a.asname or a.name, (home, a.name))
        self.home = [o for o in self.names if o in self.defs]

    def segment(self, n):
        "Source of a node, as `ast.get_source_segment`, which splits the whole module at each call"
        lines = [o.encode() for o in self.lines[n.lineno-1:n.end_lineno]]
        lines[-1] = lines[-1][:n.end_col_offset]
        lines[0] = lines[0][n.col_offset:]
        return b"\n".join(lines).decode()

    def text(self, node): return re.sub(r"\s*\n\s*", " ", self.segment(node))


def _patched(n):
    "The class that a function is patched into"
    if not any(getattr(d, "id", None) == "patch" for d in n.decorator_list): return None
    return n.args.args[0].annotation.id


@cache
def modules():
    "All modules, by name"
    names = sorted(p.stem for p in (root/package).glob("*.py") if not p.stem.startswith("_"))
    listed = [m for _, _, ms in SECTIONS.values() for m in ms]
    lost = [m for m in names if m not in listed]
    if lost: raise SystemExit(f"tools/api.py: SECTIONS: expected every module in a section, got none for {', '.join(lost)}")
    return {m: Module(m) for m in listed if m in names}


@cache
def homes():
    "Where each public name is defined"
    found = {}
    for m in modules().values():
        for o in m.home:
            if o in found: raise SystemExit(f"tools/api.py: {o} is public in {found[o].name} and in {m.name}")
            found[o] = m
    return found


def find(module, name):
    "The module and definition of a name that a module uses"
    if name in module.defs: return module, module.defs[name]
    if name not in module.imported: return None
    home, real = module.imported[name]
    if home not in modules() or modules()[home] is module: return None
    return find(modules()[home], real)


def methods_of(module, cls):
    "Methods of a class, patched ones included"
    found = {n.name: (module, n) for n in cls.body if isinstance(n, ast.FunctionDef)}
    for m in modules().values():
        at = find(m, cls.name)
        if at and at[1] is cls: found.update({k: (m, n) for k, n in m.patched.get(cls.name, {}).items()})
    return found


def bases_of(module, cls):
    "Base classes within the package, nearest first"
    out = []
    for b in cls.bases:
        at = find(module, b.id) if isinstance(b, ast.Name) else None
        if at and isinstance(at[1], ast.ClassDef): out += [at, *bases_of(*at)]
    return out


# --- signatures and docments -----------------------------------------------------------------------------------------

class Parameter:
    def __init__(self, name, type="", default="", doc="", bare=""): self.name, self.type, self.default, self.doc, self.bare = name, type, default, doc, bare or name

    def __str__(self):
        if self.type: return f"{self.name}: {self.type}" + (f" = {self.default}" if self.default else "")
        return self.name + (f"={self.default}" if self.default else "")


def parameters(m, fn, skip_first=False):
    "Parameters of a function, as written"
    a = fn.args
    plain = [*a.posonlyargs, *a.args]
    pairs = list(zip(plain, [None]*(len(plain) - len(a.defaults)) + list(a.defaults)))
    pairs = [("", *p) for p in (pairs[1:] if skip_first else pairs)]
    if a.vararg: pairs.append(("*", a.vararg, None))
    elif a.kwonlyargs: pairs.append(("*", None, None))
    pairs += [("", *p) for p in zip(a.kwonlyargs, a.kw_defaults)]
    if a.kwarg: pairs.append(("**", a.kwarg, None))
    end = _header_end(fn)
    out = []
    for i, (stars, arg, default) in enumerate(pairs):
        if arg is None: out.append(Parameter("*")); continue
        last = (default or arg).end_lineno
        shared = i + 1 < len(pairs) and pairs[i+1][1] is not None and pairs[i+1][1].lineno == last
        doc = "" if shared or last == end and fn.lineno == end else _comment(m, last, last == end)
        out.append(Parameter(stars + arg.arg, m.text(arg.annotation) if arg.annotation else "", m.text(default) if default else "", doc, arg.arg))
    return out


def _header_end(fn):
    first = fn.body[0].lineno
    if isinstance(fn.body[0], (ast.FunctionDef, ast.ClassDef)) and fn.body[0].decorator_list: first = fn.body[0].decorator_list[0].lineno
    return max(fn.lineno, first - 1) if first > fn.lineno else fn.lineno


def _comment(m, line, last=False):
    "The docment of a line, and of the lines of comment below it"
    out = [m.comments[line]] if line in m.comments and line not in m.alone else []
    while out and line + 1 in m.alone: line += 1; out.append(m.comments[line])
    return " ".join(out)


def returned(m, fn):
    "Type and meaning of what a function returns"
    end = _header_end(fn)
    one_line = fn.body[0].lineno == end
    return m.text(fn.returns) if fn.returns else "", "" if one_line else m.comments.get(end, "")


def fields(m, cls):
    "Fields of a dataclass or named tuple, as parameters"
    return [Parameter(n.target.id, m.text(n.annotation), m.text(n.value) if n.value else "", _comment(m, n.end_lineno))
            for n in cls.body if isinstance(n, ast.AnnAssign)]


def is_record(m, cls):
    return any(getattr(b, "id", None) == "NamedTuple" for b in cls.bases) or any("dataclass" in m.text(d) for d in cls.decorator_list)


def is_property(fn): return any(getattr(d, "id", getattr(d, "attr", "")) in ("property", "cached_property") for d in fn.decorator_list)


def signature(name, ps, returns=""):
    tail = f") -> {returns}" if returns else ")"
    flat = f"{name}({', '.join(map(str, ps))}{tail}"
    if len(flat) <= 60 and "\n" not in flat: return flat
    return f"{name}(\n" + "".join(f"    {p},\n" for p in ps) + tail


def doc_of(node): return re.sub(r"\s+", " ", ast.get_docstring(node) or "")


# --- errors ----------------------------------------------------------------------------------------------------------

SAFE = {k: getattr(builtins, k) for k in ("repr", "str", "map", "sorted", "len", "tuple", "list", "int", "float")}
ERRORS = re.compile(r"(Error|Exception|Exit|Interrupt)$")


def _literal(node):
    if any(isinstance(n, ast.Set) for n in ast.walk(node)): return ()          # in no order
    try: return (ast.literal_eval(node),)
    except (ValueError, TypeError, SyntaxError): return ()


def _message(node, env):
    "The text of an error, with what is not known before it happens as …"
    if isinstance(node, ast.Constant) and isinstance(node.value, str): return node.value
    if isinstance(node, ast.JoinedStr): return "".join(_message(v, env) for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add): return _message(node.left, env) + _message(node.right, env)
    try:
        whole = ast.Expression(ast.JoinedStr([node]) if isinstance(node, ast.FormattedValue) else node)
        return str(eval(compile(ast.fix_missing_locations(whole), "", "eval"), {"__builtins__": SAFE}, dict(env)))
    except Exception: return "…"


class Errors:
    "Errors that a function raises by itself, and in the helpers that it calls"
    def __init__(self): self.found, self.seen = [], set()

    def of(self, m, fn, env=None, cls=None, depth=0):
        later = []
        self._walk(m, fn.body, dict(env or {}), cls, depth, later)
        return later

    def _walk(self, m, nodes, env, cls, depth, later):
        for n in nodes:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)): continue
            if isinstance(n, ast.For) and isinstance(n.iter, (ast.Tuple, ast.List)) and n.iter.elts:
                for item in n.iter.elts: self._walk(m, n.body, {**env, **_bind(n.target, item)}, cls, depth, later)
                continue
            if isinstance(n, ast.Raise) and n.exc is not None: self._raised(m, n.exc, env, depth)
            if isinstance(n, ast.Assign) and len(n.targets) == 1: env = {**{k: v for k, v in env.items() if k not in _names(n.targets[0])}}
            if isinstance(n, ast.Call): later.append((m, n, env, cls))
            self._walk(m, ast.iter_child_nodes(n), env, cls, depth, later)

    def _raised(self, m, exc, env, depth):
        if not isinstance(exc, ast.Call): return
        kind = getattr(exc.func, "id", getattr(exc.func, "attr", ""))
        if ERRORS.search(kind): return self._add(kind, _message(exc.args[0], env) if exc.args else "")
        at = find(m, kind)
        if at and isinstance(at[1], ast.FunctionDef):
            for r in ast.walk(at[1]):
                if isinstance(r, ast.Return) and isinstance(r.value, ast.Call): self._raised(at[0], r.value, _bound(at[1], exc, env, m), depth)

    def _add(self, kind, text):
        text = re.sub(r"…(\W{0,2}…)+", "…", re.sub(r"\s+", " ", text)).strip()
        if (kind, text) not in self.found and len(re.findall(r"[A-Za-z]{2,}", text)) > 2: self.found.append((kind, text))

    def all(self, m, fn, cls=None, most=3):
        calls = self.of(m, fn, cls=cls)
        for _ in range(most):
            more = []
            for where, call, env, c in calls:
                for at, target, owner, offset in _targets(where, call, c):
                    bound = _bound(target, call, env, where, offset)
                    key = (target.name, at.name, tuple(sorted((k, repr(v)) for k, v in bound.items())))
                    if key in self.seen: continue
                    self.seen.add(key)
                    more += self.of(at, target, bound, owner)
            calls = more
        return sorted(self.found, key=lambda o: o[1].startswith("…"))


def _names(t): return [n.id for n in ast.walk(t) if isinstance(n, ast.Name)]


def _bind(target, item):
    "Names of a loop bound to the parts of a literal"
    if isinstance(target, ast.Name):
        value = _literal(item)
        return {target.id: value[0]} if value else {}
    if isinstance(target, ast.Tuple) and isinstance(item, (ast.Tuple, ast.List)) and len(target.elts) == len(item.elts):
        return {k: v for t, i in zip(target.elts, item.elts) for k, v in _bind(t, i).items()}
    return {}


def _bound(fn, call, env, m, offset=0):
    "Parameters of a function that a call gives as literals"
    names, out = [a.arg for a in (*fn.args.posonlyargs, *fn.args.args)][offset:], {}
    for name, value in [*zip(names, call.args), *((k.arg, k.value) for k in call.keywords)]:
        if isinstance(value, ast.Starred): break
        known = _literal(value) or ((env[value.id],) if isinstance(value, ast.Name) and value.id in env else ())
        if known: out[name] = known[0]
    return out


def _targets(m, call, cls):
    "Functions of the package that a call reaches"
    f = call.func
    if isinstance(f, ast.Name):
        at = find(m, f.id)
        if not at: return []
        if isinstance(at[1], ast.FunctionDef): return [(*at, None, 0)]
        if isinstance(at[1], ast.ClassDef):
            own = methods_of(*at)
            return [(*own[k], at, 1) for k in ("__init__", "__post_init__") if k in own]
    if isinstance(f, ast.Attribute) and cls:
        line = [cls, *bases_of(*cls)]
        above = isinstance(f.value, ast.Call) and getattr(f.value.func, "id", "") == "super"
        if above or isinstance(f.value, ast.Name) and f.value.id == "self":
            for c in line[1:] if above else line:
                own = methods_of(*c)
                if f.attr in own: return [(*own[f.attr], cls, 1)]
    return []


# --- examples --------------------------------------------------------------------------------------------------------

class Code:
    "A code cell"
    def __init__(self, at, kind, source, output):
        self.at, self.kind, self.source, self.output, self.tree = at, kind, source, output, ast.parse(source)
        nodes = list(ast.walk(self.tree))
        self.names = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        self.imports = any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)
        self.fails = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "test_fail"]
        self.methods = [(n.attr, n.value) for n in nodes if isinstance(n, ast.Attribute)]


class Notebook:
    def __init__(self, path):
        self.stem = path.stem
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        head = "".join(self.cells[0]["source"])
        self.title = re.match(r"# (.*)", head)[1] if re.match(r"# (.*)", head) else self.stem
        self.code = []
        for i, c in enumerate(self.cells):
            if c["cell_type"] != "code": continue
            source = "".join(c["source"])
            flags = set(re.findall(r"^#\|\s*(\w+)", source, re.M))
            off = flags & {"slow", "cuda"} or re.search(r"^#\|\s*eval:\s*false", source, re.M)
            plain = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
            if off or not plain: continue
            kind = "export" if flags & {"export", "exports", "exporti"} else "hide" if "hide" in flags else "show"
            try: self.code.append(Code(i, kind, plain, _output(c)))
            except SyntaxError: continue


def _output(cell):
    "What a cell prints, as text"
    out = []
    for o in cell.get("outputs", []):
        if o.get("output_type") == "stream" and o.get("name") == "stdout": out.append("".join(o["text"]))
        elif "data" in o and "image/png" not in o["data"] and "text/plain" in o["data"] and not {"text/html", "text/markdown"} & set(o["data"]):
            out.append("".join(o["data"]["text/plain"]))
    text = "\n".join(s.rstrip("\n") for s in out)
    return "" if re.search(r"0x[0-9a-f]{6,}|/tmp/|/work/|/home/|\x1b", text) else text


@cache
def notebooks():
    "All notebooks that are written by hand, in the order in which they are read"
    stems = sorted(p.stem for p in (root/"nbs").glob("*.ipynb") if not p.stem.startswith("api_"))
    return {s: Notebook(root/"nbs"/f"{s}.ipynb") for s in stems}


def _stores(nodes):
    "Names that are assigned among nodes, not within functions of theirs"
    for n in nodes:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): yield n.name
        elif isinstance(n, (ast.Import, ast.ImportFrom)): yield from (a.asname or a.name.split(".")[0] for a in n.names)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del)): yield n.id
        elif isinstance(n, ast.ExceptHandler) and n.name: yield n.name
        if isinstance(n, ast.FunctionDef): yield from _stores(n.decorator_list)
        elif not isinstance(n, (ast.Lambda, ast.ClassDef, *COMPREHENSIONS)): yield from _stores(ast.iter_child_nodes(n))


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _reads(n, bound):
    "Names that a node reads from outside of it"
    if isinstance(n, ast.Name):
        if isinstance(n.ctx, ast.Load) and n.id not in bound: yield n.id
        return
    inner, outer = bound, []
    if isinstance(n, (ast.FunctionDef, ast.Lambda)):
        a = n.args
        args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(o for o in (a.vararg, a.kwarg) if o)]
        body = n.body if isinstance(n.body, list) else [n.body]
        inner = bound | {o.arg for o in args} | set(_stores(body))
        outer = [*a.defaults, *(o for o in a.kw_defaults if o), *(o.annotation for o in args if o.annotation), *getattr(n, "decorator_list", [])]
        if getattr(n, "returns", None): outer.append(n.returns)
    elif isinstance(n, ast.ClassDef): body, outer, inner = n.body, [*n.bases, *n.decorator_list], bound | set(_stores(n.body))
    elif isinstance(n, COMPREHENSIONS):
        inner = bound | {o for g in n.generators for o in _names(g.target)}
        body, outer = list(ast.iter_child_nodes(n)), [n.generators[0].iter]
    else: body = ast.iter_child_nodes(n)
    for o in outer: yield from _reads(o, bound)
    for o in body: yield from _reads(o, inner)


def reads_and_writes(code):
    "Global names that a statement or a piece of code needs, and those that it makes"
    nodes = ast.parse(code).body if isinstance(code, str) else [code]
    return {o for n in nodes for o in _reads(n, frozenset())}, set(_stores(nodes))


@cache
def _statements(stem):
    "Statements of a notebook: (cell, kind, source, reads, writes, names that it changes)"
    out = []
    for c in notebooks()[stem].code:
        i, kind, source = c.at, c.kind, c.source
        for n in c.tree.body:
            if isinstance(n, (ast.Import, ast.ImportFrom)):
                for a in n.names:
                    as_ = f" as {a.asname}" if a.asname else ""
                    mod = ("."*n.level + (n.module or "")) if isinstance(n, ast.ImportFrom) else ""
                    line = f"from {mod} import {a.name}{as_}" if mod else f"import {a.name}{as_}"
                    out.append((i, "import", line, set(), {a.asname or a.name.split(".")[0]}, set()))
                continue
            first = min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))])
            text = "\n".join(source.splitlines()[first-1:n.end_lineno])
            if ";" in text:
                try: text = ast.get_source_segment(source, n)
                except (ValueError, IndexError): pass
            out.append((i, kind, text, *reads_and_writes(text), _changes(n)))
    return out


def _changes(n):
    "Names whose objects a statement changes"
    out = set()
    for o in [n] if not isinstance(n, (ast.For, ast.While, ast.With, ast.If)) else ast.walk(n):
        if isinstance(o, (ast.Assign, ast.AugAssign)):
            targets = [p for t in getattr(o, "targets", [getattr(o, "target", None)]) for p in (t.elts if isinstance(t, ast.Tuple) else [t])]
            out |= {r for t in targets if isinstance(t, (ast.Subscript, ast.Attribute)) for r in _names(t)[:1]}
        if isinstance(o, ast.Expr) and isinstance(o.value, ast.Call) and isinstance(o.value.func, ast.Attribute): out |= set(_names(o.value.func)[:1])
    return out - MODULES


MODULES = {"torch", "np", "nn", "F", "plt", "warnings", "random", "math"}


class Example:
    "A cell, or the part of it that has to do with one name, and what it needs from before it"
    def __init__(self, stem, cell, source, output="", trimmed=False): self.stem, self.cell, self.source, self.output, self.trimmed = stem, cell, source, output, trimmed

    def about(self, name):
        "The statements that use a name, what they need and what follows from them"
        parts = _parts(self.source)
        marked, kept = {name}, []
        for k, (n, text, reads, writes) in enumerate(parts):
            if not (reads | _attributes(n)) & marked: continue
            kept.append(k)
            marked |= writes | (_changes(n) if not _acts(n) else reads - MODULES - set(dir(builtins)) - set(homes()) - set(_imports(self.stem)))
        if not kept: return self
        need = set().union(*(parts[k][2] for k in kept))
        for k in reversed(range(len(parts))):
            n, _, reads, writes = parts[k]
            if k not in kept and need & (writes | _changes(n) | (reads if _acts(n) else set())): kept.append(k); need |= reads
        if len(kept) == len(parts): return self
        lost = "\n".join(parts[k][1] for k in range(len(parts)) if k not in kept)
        output = "" if "print(" in lost or len(parts) - 1 not in kept else self.output
        return Example(self.stem, self.cell, "\n".join(parts[k][1] for k in sorted(kept)), output, True)

    def complete(self): return _complete(self.stem, self.cell, self.source)


def _acts(n):
    "Is a statement there for what it does to the objects in it?"
    if isinstance(n, (ast.For, ast.While, ast.With, ast.If, ast.Try)): return True
    if not isinstance(n, ast.Expr) or not isinstance(n.value, ast.Call): return False
    return not re.match(r"print$|test_|assert_|display$", getattr(n.value.func, "id", ""))


def _attributes(n): return {f".{o.attr}" for o in ast.walk(n) if isinstance(o, ast.Attribute)}


@cache
def _parts(source):
    "Statements of a cell: (tree, text with the comments beside it, reads, writes)"
    out, lines, n_before = [], source.splitlines(), 0
    for n in ast.parse(source).body:
        first = min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))])
        if out and first <= n_before:                    # two statements on one line stay together
            was = out.pop()
            text = "\n".join([was[1], *lines[n_before:n.end_lineno]])
            reads, writes = reads_and_writes(text)
            out.append((ast.parse(text), text, _first_reads(text), writes))
        else:
            text = "\n".join(lines[first-1:n.end_lineno])
            out.append((n, text, *reads_and_writes(text)))
        n_before = n.end_lineno
    return out


@cache
def _complete(stem, cell, source):
    "Imports, and all else that code of a cell needs before it; None if that cannot be told"
    need = _first_reads(source) - set(dir(builtins)) - {"display"}
    before, code = [], []
    for i, kind, text, reads, writes, changes in reversed(_statements(stem)):
        if i >= cell or not need & (writes | changes): continue
        if kind == "import":
            need -= writes
            before.append(text)
        elif kind == "export" and any(w in homes() for w in writes): continue
        elif kind == "export": return None
        else:
            need = (need - (writes - changes)) | (reads - set(dir(builtins)))
            code.insert(0, text)
    lines = [f"from {package}.{homes()[o].name} import {o}" for o in need if o in homes()]
    if any(o not in homes() for o in need) or any(re.search(r"import _|IPython", s) for s in before): return None
    seed = _seed(stem, [*code, source])
    if any("torch." in s for s in seed): lines.append("import torch")
    return _joined_imports([*lines, *(_at_home(s) for s in before)]), "\n".join([*seed, *code])


def _seed(stem, code):
    "The notebook's seed and number format, where they matter"
    hidden, text, out = [s for _, kind, s, *_ in _statements(stem) if kind == "hide"], "\n".join(code), []
    if "torch." not in text: return out
    if any("set_default_dtype(torch.float64)" in s for s in hidden): out.append("torch.set_default_dtype(torch.float64)")
    if "rand" in text and "manual_seed(" not in text and "Generator(" not in text: out.append("torch.manual_seed(0)")
    return out


def _first_reads(source):
    "Names that code needs from before it"
    need, made = set(), set()
    for n in ast.parse(source).body:
        reads, writes = reads_and_writes(n)
        need |= reads - made - (writes if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.For, ast.With)) else set())
        made |= writes
    return need


def _at_home(line):
    "An import of a public name from the module that defines it"
    m = re.match(rf"from {package}\.\w+ import (\w+)$", line)
    return f"from {package}.{homes()[m[1]].name} import {m[1]}" if m and m[1] in homes() else line


def _joined_imports(lines):
    "Imports in the usual order, one line for each module"
    plain = sorted({s for s in lines if s.startswith("import ")})
    by = {}
    for s in lines:
        if s.startswith("from "):
            mod, name = re.match(r"from (\S+) import (.*)", s).groups()
            by.setdefault(mod, set()).add(name)
    return "\n".join([*plain, *(f"from {k} import {', '.join(sorted(by[k]))}" for k in sorted(by, key=lambda k: (k.startswith(package), k)))])


def uses(tree, name, attribute=False):
    for n in ast.walk(tree):
        if attribute and isinstance(n, ast.Attribute) and n.attr == name: return True
        if not attribute and isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load): return True
    return False


def instances(stem, name):
    "Names of a notebook that stand for instances of a class"
    makes = {name, *(o for o, m in homes().items() if isinstance(m.defs[o], ast.FunctionDef) and m.defs[o].returns is not None
                     and getattr(m.defs[o].returns, "id", "") == name)}
    out = set()
    for c in notebooks()[stem].code:
        for n in ast.walk(c.tree):
            if not isinstance(n, ast.Assign): continue
            pairs = [(t, n.value) for t in n.targets]
            pairs += [p for t, v in pairs if isinstance(t, ast.Tuple) and isinstance(v, ast.Tuple) for p in zip(t.elts, v.elts)]
            out |= {t.id for t, v in pairs if isinstance(t, ast.Name) and isinstance(v, ast.Call) and getattr(v.func, "id", "") in makes}
    return makes, out


@cache
def _imports(stem): return {w: text for _, kind, text, _, writes, _ in _statements(stem) if kind == "import" for w in writes}


def means_ours(name, stem):
    "Does a name, in a notebook of other modules, mean that of the package?"
    return package in _imports(stem).get(name, "") and not any(name in w for _, kind, _, _, w, _ in _statements(stem) if kind != "import")


def candidates(name, m, method=None):
    "Cells that show a name, or a method of it, at work, those of its own notebook first"
    start = next((c.at for c in notebooks()[m.notebook].code if c.kind == "export" and name in _names_defined(c.tree)), -1)
    order = [m.notebook, *(s for s in notebooks() if s > m.notebook and s != "index"), *(s for s in notebooks() if s < m.notebook)]
    makes, ours = instances(m.notebook, name) if method else ((), ())
    for stem in order[:1] if method else order:
        if stem != m.notebook and not means_ours(name, stem): continue
        for c in notebooks()[stem].code:
            if c.kind == "export" or stem == m.notebook and c.at < start: continue
            if c.imports or len(c.fails) == len(c.tree.body): continue
            if method: found = any(k == method and (getattr(v, "id", "") in ours or isinstance(v, ast.Call) and getattr(v.func, "id", "") in makes) for k, v in c.methods)
            else: found = name in c.names
            if not found: continue
            e = Example(stem, c.at, c.source, c.output).about(f".{method}" if method else name)
            e.hidden = c.kind == "hide"
            yield e


def _names_defined(tree):
    out = set()
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): out.add(n.name)
        elif isinstance(n, ast.Assign): out |= {o for t in n.targets for o in _names(t)}
    return out


@cache
def example(name, attribute=None, most=12, whole=18):
    "The example that reads best: short, with a check or an output, complete in itself where that takes few lines"
    best, m = None, homes()[name]
    for k, e in enumerate(candidates(name, m, attribute)):
        if k > 40 or best and not any(best[0][:-1]): break
        lines = len(e.source.splitlines())
        shows = bool(re.search(r"assert|test_(?!fail)", e.source) or e.output)
        draws = "plt." in e.source or "ax." in e.source
        only_fails = uses_only_in_failures(e.source, attribute or name)
        full = e.complete() if lines <= whole else None
        fits = full is not None and lines + len(full[1].splitlines()) <= whole and max(map(len, full[1].splitlines() or [""])) <= 140
        score = (draws, e.hidden, e.stem != m.notebook, only_fails, not (fits and lines <= most), not shows, lines > most, k)
        if best is None or score < best[0]: best = (score, e, full if fits else None)
    return best and best[1:]


def uses_only_in_failures(source, name):
    tree = ast.parse(source)
    tree.body = [n for n in tree.body if not (isinstance(n, ast.Expr) and getattr(getattr(n.value, "func", None), "id", "") == "test_fail")]
    return not uses(tree, name) and not uses(tree, name, True)


@cache
def failures(name, most=3):
    "Tested failures: calls that the notebooks show to fail, and with which words"
    out = []
    for c in notebooks()[homes()[name].notebook].code:
        for n in c.fails:
            if not (n.args and isinstance(n.args[0], ast.Lambda)): continue
            words = next((k.value.value for k in n.keywords if k.arg == "contains" and isinstance(k.value, ast.Constant)), None)
            body = n.args[0].body
            if words and isinstance(body, ast.Call) and getattr(body.func, "id", "") == name:
                out.append((re.sub(r"\s*\n\s*", " ", ast.get_source_segment(c.source, body)), words))
    return [o for o in dict.fromkeys(out) if len(o[0]) <= 90][:most]


# --- pages -----------------------------------------------------------------------------------------------------------

PROTOCOL = {"__init__", "__post_init__", "__repr__", "__str__", "__torch_dispatch__", "extra_repr", "get_extra_state", "set_extra_state"}
MOST_ERRORS = 6


def code(text): return f"`` {text} ``" if "`" in text else f"`{text}`"
def fence(text, lang="python"): return f"```{lang}\n{text}\n```"
def cell_text(text): return text.replace("|", "\\|")
def anchor(name): return name.lower()


def section_of(name):
    "The page on which a module is described"
    return next(s for s, (_, _, ms) in SECTIONS.items() if name in ms)


def link(name):
    "A link to a name's place in the reference"
    return f"[{name}]({section_of(homes()[name].name)}.ipynb#{anchor(name)})"


@cache
def public_methods(m, cls):
    "Methods and properties of a class that are for users"
    if any(m.text(b).endswith("autograd.Function") for b in cls.bases): return {}
    found = methods_of(m, cls)
    keep = {k: v for k, v in found.items() if k == "__call__" or not k.startswith("_")}
    return {k: v for k, v in keep.items() if k not in PROTOCOL}


def constructor(m, cls):
    "Parameters of a class's constructor, and where they are written"
    if is_record(m, cls): return fields(m, cls), m, None
    for at, c in [(m, cls), *bases_of(m, cls)]:
        own = methods_of(at, c)
        if "__init__" in own: return parameters(*own["__init__"], skip_first=True), *own["__init__"]
    return [], m, None


def meaning(ps, returns=("", "")):
    "Parameters and result as a list that reads well on any screen"
    out = []
    for p in ps:
        if p.name == "*": continue
        head = f"**{p.name}**".replace("***", "\\*\\*\\***", 1) if p.name.startswith("**") else f"**{p.name}**"
        if p.name.startswith("*"): head = "**" + p.name.replace("*", "\\*") + "**"
        if p.type: head += f" {code(p.type)}"
        if p.default: head += f", default {code(p.default)}"
        out.append(f"- {head}" + (f"  \n  {p.doc}" if p.doc else ""))
    if any(returns):
        head = "**returns**" + (f" {code(returns[0])}" if returns[0] else "")
        out.append(f"- {head}" + (f"  \n  {returns[1]}" if returns[1] else ""))
    return "\n".join(out)


def errors(m, fn, cls=None):
    found = Errors().all(m, fn, cls)[:MOST_ERRORS] if fn else []
    return "**Raises**\n\n" + "\n".join(f"- `{kind}`: {code(text)}" for kind, text in found) if found else ""


def show_example(name, attribute=None):
    if not attribute and name in EXTRA: return f"**Example**\n\n{fence(EXTRA[name].strip())}"
    if not attribute and name in WITHOUT: return WITHOUT[name]
    found = example(name, attribute)
    if not found: return ""
    e, full = found
    if attribute and (full is None or f".{attribute}(" in getattr((example(name) or [e])[0], "source", "")): return ""
    title = notebooks()[e.stem].title
    parts = [p for p in (*(full or ()), e.source) if p]
    lead = f"**Example**, from [{title}]({e.stem}.ipynb)" + ("" if full else ", where the rest of it is")
    text = f"{lead}\n\n{fence((chr(10)*2).join(parts))}"
    printed = e.output.strip("\n")
    if printed and len(printed.splitlines()) <= 14 and max(map(len, printed.splitlines())) <= 100:
        text += f"\n\nThere it prints\n\n{fence(printed, 'text')}"
    return text


def show_failures(name):
    found = failures(name, 2)
    if not found: return ""
    return "**Fails**, as tested\n\n" + fence("\n".join(f"{call}  # {words}" for call, words in found))


def function_cell(name, m, fn):
    ps, result = parameters(m, fn), returned(m, fn)
    context = any("contextmanager" in m.text(d) for d in fn.decorator_list)
    doc = doc_of(fn) + (" (a context manager)" if context and doc_of(fn) else "")
    return [doc, fence(signature(name, ps, result[0])), meaning(ps, result), show_example(name), errors(m, fn), show_failures(name)]


def class_cell(name, m, cls):
    ps, at, init = constructor(m, cls)
    bases = [m.text(b) for b in cls.bases if m.text(b) != "NamedTuple"]
    kind = "named tuple" if any(m.text(b) == "NamedTuple" for b in cls.bases) else "dataclass" if is_record(m, cls) else ""
    about = [s for s in (kind and f"A {kind}.", bases and "A subclass of " + ", ".join(f"`{b}`" for b in bases) + ".") if s]
    own = public_methods(m, cls)
    extra = methods_of(m, cls)
    check = init or (extra["__post_init__"][1] if "__post_init__" in extra else None)
    parts = [doc_of(cls), " ".join(about)]
    function = any(b.endswith("autograd.Function") for b in bases)
    if not function and (ps or not any(b.endswith("Error") for b in bases)): parts += [fence(signature(name, ps)), meaning(ps)]
    parts += [makers(name), users(name), show_example(name), errors(at, check, (m, cls)) if check else "", show_failures(name)]
    for k, (where, fn) in own.items(): parts += method_parts(name, k, where, fn, (m, cls))
    above = {}
    for b_m, b in bases_of(m, cls):
        more = [k for k in public_methods(b_m, b) if k not in own and not any(k in v for v in above.values())]
        if more: above[b.name] = more
    for b, more in above.items():
        owner = f"from {link(b)}" if b in homes() else "inherited"
        parts.append(f"Also has, {owner}: " + ", ".join(f"`.{k}`" for k in more))
    return parts


def makers(name):
    "Functions that return a class of results"
    found = [o for o, m in homes().items() if isinstance(m.defs[o], ast.FunctionDef) and m.defs[o].returns and name in _names(m.defs[o].returns)]
    return "Returned by " + ", ".join(link(o) for o in found) + "." if found else ""


def users(name):
    "Classes made on the base of another"
    found = [o for o, m in homes().items() if isinstance(m.defs[o], ast.ClassDef) and any(getattr(b, "id", "") == name for b in m.defs[o].bases)]
    return "Base of " + ", ".join(link(o) for o in found) + "." if found else ""


def method_parameters(m, fn, skip_first, cls):
    "Parameters of a method, with the docments of the method that it replaces, or of the other methods of its class, where it has none"
    ps = parameters(m, fn, skip_first)
    for b in bases_of(*cls):
        above = methods_of(*b).get(fn.name)
        docs = {p.name: p.doc for p in parameters(*above, skip_first)} if above and above[1] is not fn else {}
        for p in ps: p.doc = p.doc or docs.get(p.name, "")
    for at, other in methods_of(*cls).values():
        docs = {p.name: p.doc for p in parameters(at, other)} if other is not fn and not other.name.startswith("_") or other.name in ("__init__", "__call__") else {}
        for p in ps: p.doc = p.doc or docs.get(p.name, "")
    return ps


def method_parts(cls_name, k, m, fn, cls):
    static = any(getattr(d, "id", "") == "staticmethod" for d in fn.decorator_list)
    if is_property(fn): return [f"#### {cls_name}.{k}", f"{doc_of(fn) or 'A value'} (a property).", meaning([], returned(m, fn))]
    ps, result = method_parameters(m, fn, not static, cls), returned(m, fn)
    called = k in ("forward", "__call__")
    shown = signature(f"{cls_name}(...)" if called else f".{k}", ps, result[0])
    title = f"#### Calling {'an' if cls_name[0] in 'AEIO' else 'a'} {cls_name}" if called else f"#### {cls_name}.{k}"
    doc = doc_of(fn) + " (a context manager)"*(bool(doc_of(fn)) and any("contextmanager" in m.text(d) for d in fn.decorator_list))
    return [title, doc and _sentence(doc), fence(shown), meaning(ps, result) if any(p.doc for p in ps) or result[1] else "", errors(m, fn, cls),
            show_example(cls_name, k) if not called and not k.startswith("_") else ""]


def constant_note(m, node): return _comment(m, node.end_lineno) or _comment(m, node.lineno)


def constant_cell(name, m, node):
    text = m.segment(node)
    lines = text.splitlines()
    if len(lines) > 16: text = "\n".join([*lines[:15], "..."])
    return [constant_note(m, node), fence(text)]


def name_cell(name, m):
    node = m.defs[name]
    parts = (function_cell if isinstance(node, ast.FunctionDef) else class_cell if isinstance(node, ast.ClassDef) else constant_cell)(name, m, node)
    where = f"{m.notebook}.ipynb" + ("" if isinstance(node, ast.Assign) else f"#{anchor(name)}")
    place = f"`from {package}.{m.name} import {name}` · explained in [{notebooks()[m.notebook].title}]({where})"
    return "\n\n".join(p for p in (f"### {name}", parts[0] and _sentence(parts[0]), place, *parts[1:]) if p)


def _sentence(text): return text if text[-1] in ".?!" else text + "."


def first_line(name, m):
    node = m.defs[name]
    if isinstance(node, ast.Assign): return constant_note(m, node)
    return doc_of(node)


def module_cell(m):
    title = notebooks()[m.notebook].title
    about = ast.get_docstring(m.tree).strip()
    rows = "\n".join(f"| [{o}](#{anchor(o)}) | {cell_text(first_line(o, m))} |" for o in m.home)
    other = [o for o in m.names if o not in m.home]
    parts = [f"## Module {m.name}", f"{about} The notebook: [{title}]({m.notebook}.ipynb).", f"| name | what |\n|:---|:---|\n{rows}"]
    if other: parts.append("Also offered by this module: " + ", ".join(link(o) for o in other) + ".")
    return "\n\n".join(parts)


def cells_of(section):
    "Cells of one page, each with what its id is made of"
    title, about, names = SECTIONS[section]
    yield "title", f"# {title}\n\n> {about}"
    if section == "api_method": yield "start", START.format(**{o: link(o) for o in re.findall(r"{(\w+)}", START)})
    yield "note", f"{SHORT} Pages: " + ", ".join(f"[{t.split(': ')[1]}]({s}.ipynb)" for s, (t, _, _) in SECTIONS.items() if s != section) + "."
    for o in names:
        if o not in modules(): continue
        m = modules()[o]
        yield f"module {o}", module_cell(m)
        for name in m.home: yield f"{o}.{name}", name_cell(name, m)


def page(section):
    "A page as a notebook, as text"
    cells = [dict(cell_type="markdown", id=hashlib.sha256(f"{section} {key}".encode()).hexdigest()[:8], metadata={}, source=text.splitlines(keepends=True))
             for key, text in cells_of(section)]
    nb = dict(cells=cells, metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")), nbformat=4, nbformat_minor=5)
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def write(folder=root/"nbs"):
    "Write all pages"
    for f in (modules, homes, notebooks, _statements, _imports, _parts, _complete, example, failures, public_methods): f.cache_clear()
    for section in SECTIONS: (Path(folder)/f"{section}.ipynb").write_text(page(section), encoding="utf-8", newline="\n")


if __name__ == "__main__": write(*sys.argv[1:])
