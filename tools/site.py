"""The docs site, from the notebooks.

    python tools/site.py process         # notebooks -> _proc, as nbdev does, and what Quarto needs besides
    quarto render _proc 2>&1 | tee quarto.log
    python tools/site.py log quarto.log  # ends with 1 if Quarto warned of something that readers would see
    python tools/site.py index SITE      # SITE (_proc/_docs): the search box finds every name of the package
    python tools/site.py offline [OUT]   # the same pages without Quarto, by smalldocs -> OUT (_docs)

Quarto makes the published site. Where it cannot be installed, smalldocs reads the same `_quarto.yml`; what it lacks is added here: page names,
numbered figures and equations with references to them, MathML and the bibliography (both by pandoc, which Quarto uses too)."""
import ast
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

root = Path(__file__).resolve().parent.parent
kinds = {'fig': 'Figure', 'eq': 'Equation', 'tbl': 'Table'}
problems = []


def report(page, message): problems.append(f'{page}: {message}')


def process():
    "Notebooks with signatures, links and page names filled in, ready for a renderer"
    from nbdev.serve import proc_nbs
    os.chdir(root)
    proc, types = proc_nbs(force=True), classes()
    for p in proc.rglob('*.ipynb'):
        nb = json.loads(p.read_text(encoding='utf-8'))
        shown = set()
        for cell in nb['cells']: polish(cell, types, shown)
        p.write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    return proc


def lines(s):
    "Quarto joins the lines of a source that is one string, so each line is an entry, with its newline"
    return re.findall(r'[^\n]*\n|[^\n]+$', s)


def classes():
    "Names of the classes of the package: show_doc writes `def` for them too"
    trees = (ast.parse(p.read_text(encoding='utf-8')) for p in (root/'newton_losses_nb').rglob('*.py'))
    return {n.name for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}


def polish(cell, types=frozenset(), shown=None):
    "What nbdev wrote, as a renderer needs it; `shown` collects the names that have a signature"
    shown = set() if shown is None else shown
    s = text(cell)
    if cell['cell_type'] == 'markdown': s = prose(s)
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'text/markdown' in data and 'show_doc(' in s:
            data['text/markdown'] = lines(documented(''.join(data['text/markdown']), types))
            shown |= set(re.findall(r'show_doc\((\w+)', s))
        if 'text/html' in data: data['text/markdown'] = lines(raw(''.join(data.pop('text/html'))))
    if 'code-summary: "Exported source"' in s: s = folded(s, shown)
    cell['source'] = lines(s)


def prose(s):
    "Without links to private names, which no page has, and without links inside links"
    s = re.sub(r'\[(`_\w+(?:\.\w+)*(?:\(\))?`)\]\(https?://[^)]*#_[^)]*\)', r'\1', s)
    return re.sub(r'\[([^][\n]*)\[([^][\n]*)\]\([^()\n]*\)([^][\n]*)\](?=\()', r'[\1\2\3]', s)


def documented(md, types):
    "What show_doc wrote, without links inside its code, and with `class` where it is one"
    def fence(m):
        code = re.sub(r'\[`([^`\n]+)`\]\([^()\n]*\)', r'\1', m[0]).replace('collections.abc.', '').replace('__main__.', '')
        name = re.search(r'^def (\w+)\(', code, re.M)
        if not name or name[1] not in types: return code
        return re.sub(r'\(\s*\*args:Any, \*\*kwargs:Any\s*\)(->None)?:?', '()', code.replace('def ', 'class ', 1))
    return re.sub(r'^```.*?^```', fence, md, flags=re.M | re.S)


def folded(s, shown):
    "A source whose signature stands above it is folded"
    try: names = [n.name for n in ast.parse(s).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    except SyntaxError: return s
    if not shown & set(names): return s
    s = s.replace('code-fold: show', 'code-fold: true')
    return s.replace('"Exported source"', f'"Source of {", ".join(names)}"')


def raw(page):
    "A table as raw HTML in Markdown: for other HTML outputs Quarto loads scripts from elsewhere"
    page = re.sub(r'<style.*?</style>', '', page, flags=re.S)
    return '```{=html}\n' + re.sub(r'\n\s*\n', '\n', page.strip()) + '\n```\n'


def complaints(log):
    "Warnings of Quarto for what a reader would meet, from its log"
    plain = re.sub(r'\x1b\[[0-9;]*m', '', Path(log).read_text(encoding='utf-8'))
    return [l.strip() for l in plain.splitlines() if re.search('Unable to resolve|Could not convert', l)]


def index(site):
    "An entry of its own in the search box for every public name, beside those of pages and sections"
    from newton_losses_nb._modidx import d
    file = Path(site)/'search.json'
    entries = json.loads(file.read_text(encoding='utf-8'))
    titles = {e['href']: e['title'] for e in entries if '#' not in e['href']}
    known = {e['href'] for e in entries}
    for module, names in d['syms'].items():
        for name, (href, _) in names.items():
            name = name.removeprefix(f'{module}.')
            page, _, anchor = href.partition('#')
            if re.search(r'(^|\.)_', name) or href in known or page not in titles: continue
            if f'id="{anchor}"' not in (Path(site)/page).read_text(encoding='utf-8'): continue
            entries.append(dict(objectID=href, href=href, title=titles[page], section=name,
                                text=f'{name} of {module}', crumbs=[]))
    file.write_text(json.dumps(entries, ensure_ascii=False), encoding='utf-8')


def text(cell):
    src = cell['source']
    return src if isinstance(src, str) else ''.join(src)


def code_fences(md):
    "`md` as (is code, text) pieces, so that examples of Markdown stay as they are"
    for i, piece in enumerate(re.split(r'(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)', md, flags=re.M | re.S)):
        yield bool(i % 2), piece


def outside_code(f, md): return ''.join(p if code else f(p) for code, p in code_fences(md))


def page_name(nb, path):
    m = re.search(r'^output-file: (\S+)\.html$', text(nb['cells'][0]), re.M)
    return m[1] if m else path.stem


def options(cell):
    "The `#| key: value` lines of a code cell"
    if cell['cell_type'] != 'code': return {}
    lines = re.findall(r'^#\|\s*(\S+:.*)$', text(cell), re.M)
    try: return yaml.safe_load('\n'.join(lines)) or {}
    except yaml.YAMLError: return {}


def pictures(cell):
    return [o for o in cell.get('outputs', []) if any(k.startswith('image/') for k in o.get('data', {}))]


def number(nb, page):
    "A number for each label of a page, in order"
    count, refs = dict.fromkeys(kinds, 0), {}
    for cell in nb['cells']:
        if cell['cell_type'] == 'code': labels = [str(options(cell).get('label', ''))]
        else: labels = re.findall(r'\{#((?:fig|eq|tbl)-[\w-]+)', ''.join(p for c, p in code_fences(text(cell)) if not c))
        for label in labels:
            kind = label.split('-')[0]
            if kind not in kinds: continue
            if label in refs: report(page, f'label {label} is used twice')
            count[kind] += 1
            refs[label] = f'{kinds[kind]} {count[kind]}'
    return refs


def captions(nb, page, refs):
    "Numbered captions; what Quarto would show otherwise than smalldocs is reported"
    for cell in nb['cells']:
        opts, pics = options(cell), pictures(cell)
        for o in pics:
            if not {'image/png', 'image/jpeg', 'image/svg+xml'} & set(o['data']):
                report(page, f'Quarto does not show {", ".join(o["data"])}: display it as HTML, <img src="data:..." alt="...">')
        label, cap = str(opts.get('label', '')), opts.get('fig-cap')
        if pics and not (label.startswith('fig-') and cap and opts.get('fig-alt')):
            first = next((l for l in text(cell).splitlines() if not l.startswith('#|')), '')
            report(page, f'a picture without all of #| label: fig-..., #| fig-cap:, #| fig-alt: (cell `{first[:70]}`)')
        if label.startswith('fig-') and len(pics) > 1: report(page, f'{label}: {len(pics)} pictures in one cell, so its caption belongs to none')
        if label in refs and isinstance(cap, str):
            new = json.dumps(f'{refs[label]}: {cap}', ensure_ascii=False)
            cell['source'] = re.sub(r'^#\|\s*fig-cap:.*$', lambda m: f'#| fig-cap: {new}', text(cell), count=1, flags=re.M)


def equations(md, refs):
    "`$$..$$ {#eq-x}` with its number, as a target"
    def one(m):
        n = refs[m[2]].split()[-1]
        return f'\n::: {{#{m[2]} .equation}}\n$$\n{m[1].strip()}\\qquad({n})\n$$\n:::\n'
    return re.sub(r'\$\$((?:(?!\$\$).)+)\$\$\s*\{#(eq-[\w-]+)\}', one, md, flags=re.S)


def references(md, refs, page):
    "`@fig-x` as a link with a number"
    def one(m):
        if m[1] in refs: return f'[{refs[m[1]]}](#{m[1]})'
        report(page, f'@{m[1]} is not a label of this page')
        return m[0]
    return re.sub(r'(?<![\w`/.])@((?:fig|eq|tbl)-[\w-]*\w)', one, md)


def links(s, names, folder=''):
    "Links to notebooks, seen from a folder, follow their page names"
    def one(m):
        name = posixpath.normpath(posixpath.join(folder, m[1]))
        return f'{posixpath.relpath(names[name], folder or ".") if name in names else m[1]}.ipynb'
    return re.sub(r'(?<![\w/.:-])([\w./-]+)\.ipynb(?=[)#"\'\s])', one, s)


def signature(md, page):
    "What show_doc wrote: names with underscores stay whole; a docstring that breaks its own italics is reported"
    for doc in re.findall(r'^\*([^*\n].*)\*$', md, re.M):
        if '*' in re.sub(r'`[^`]*`', '', doc): report(page, f'an asterisk ends the italics of a docstring: {doc}')
    return re.sub(r'^(#+ .*)$', lambda m: m[1].replace('__', r'\_\_'), md, flags=re.M)


def adapt(nb, page, names):
    "One processed notebook as smalldocs reads it"
    refs = number(nb, page)
    captions(nb, page, refs)
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown':
            cell['source'] = outside_code(lambda s: links(references(equations(s, refs), refs, page), names, posixpath.dirname(page)), text(cell))
        for o in cell.get('outputs', []):
            if o['output_type'] == 'error': report(page, f'a cell that ended in {o.get("ename")}')
            if 'text/markdown' in o.get('data', {}): o['data']['text/markdown'] = signature(''.join(o['data']['text/markdown']), page)
    return nb


def pandoc(*args, stdin=''):
    import pypandoc
    res = subprocess.run([pypandoc.get_pandoc_path(), *args], input=stdin, capture_output=True, text=True, encoding='utf-8', check=True)
    return res.stdout, res.stderr


def mathml(formulas):
    "MathML of each (display, TeX), by one run of pandoc; None where it cannot be converted"
    api = json.loads(pandoc('-t', 'json')[0])['pandoc-api-version']
    para = lambda display, tex: {'t': 'Para', 'c': [{'t': 'Math', 'c': [{'t': 'DisplayMath' if display else 'InlineMath'}, tex]}]}
    doc = {'pandoc-api-version': api, 'meta': {}, 'blocks': [para(*f) for f in formulas]}
    out, _ = pandoc('-f', 'json', '-t', 'html', '--mathml', '--wrap=none', stdin=json.dumps(doc))
    out = re.findall(r'<p>(.*?)</p>', out, re.S)
    assert len(out) == len(formulas), f'pandoc gave {len(out)} formulas for {len(formulas)}'
    return [o if '<math' in o else None for o in out]


def bibliography(folder):
    "The list of references, in a page with a `::: {#refs}` div"
    for qmd in folder.glob('*.qmd'):
        s = qmd.read_text(encoding='utf-8')
        if '{#refs}' not in s: continue
        body, warnings = pandoc('-f', 'markdown', '-t', 'commonmark_x', '--citeproc', '--wrap=none', '--bibliography', str(folder/'references.bib'), stdin=s)
        if warnings.strip(): report(qmd.name, warnings.strip())
        front = re.match(r'---\n.*?\n---\n', s, re.S)[0]
        meta = {k: v for k, v in yaml.safe_load(front.strip('-\n')).items() if k in ('title', 'description')}
        qmd.write_text(f'---\n{yaml.safe_dump(meta)}---\n\n{body}', encoding='utf-8')


math_span = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
katex = re.compile(r'<(?:link|script)\b[^>]*katex[^>]*>(?:</script>)?\n?')


def finish(site, names):
    "Formulas as MathML, formulas and code in captions, links to sources by the notebooks' own names, no script from elsewhere"
    from smalldocs.markdown import make_parser
    md = make_parser()
    caption = lambda m: f'<figcaption>{md.renderInline(html.unescape(m[1]))}</figcaption>'
    nbs = {f'/nbs/{page}.ipynb"': f'/nbs/{stem}.ipynb"' for stem, page in names.items()}
    pages = {p: re.sub(r'<figcaption>(.*?)</figcaption>', caption, p.read_text(encoding='utf-8'), flags=re.S) for p in sorted(site.rglob('*.html'))}
    found = {(m[1] == 'display', html.unescape(m[2])): p for p, s in pages.items() for m in math_span.finditer(s)}
    done = dict(zip(found, mathml(list(found))))
    for f, p in found.items():
        if done[f] is None: report(p.name, f'pandoc cannot convert the formula {f[1]}')
    for p, s in pages.items():
        s = math_span.sub(lambda m: f'<span class="math {m[1]}">{done[m[1] == "display", html.unescape(m[2])] or m[2]}</span>', s)
        s = re.sub(r'/nbs/[\w/-]+\.ipynb"', lambda m: nbs.get(m[0], m[0]), s)
        p.write_text(katex.sub('', s), encoding='utf-8')


def present(x, folder):
    "A part of _quarto.yml without the pages that are not there (tools/check_site.py names them)"
    there = lambda v: not (isinstance(v, str) and v.endswith(('.ipynb', '.qmd')) and not v.startswith('/')) or (folder/v).exists()
    if isinstance(x, dict): return {k: present(v, folder) for k, v in x.items()}
    if isinstance(x, list): return [present(v, folder) for v in x if there(v) and there(v.get('href') if isinstance(v, dict) else None)]
    return x


def offline(out='_docs'):
    from smalldocs.site import build
    out, proc, work = root/out, process(), root/'_offline'
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(proc, work)
    nbs = {p.relative_to(work).with_suffix('').as_posix(): json.loads(p.read_text(encoding='utf-8')) for p in sorted(work.rglob('*.ipynb'))}
    names = {name: posixpath.join(posixpath.dirname(name), page_name(nb, Path(name))) for name, nb in nbs.items()}
    for name, nb in nbs.items():
        (work/f'{name}.ipynb').unlink()
        (work/f'{names[name]}.ipynb').write_text(json.dumps(adapt(nb, f'{name}.ipynb', names)), encoding='utf-8')
    config = work/'_quarto.yml'
    config.write_text(yaml.safe_dump(present(yaml.safe_load(links(config.read_text(encoding='utf-8'), names)), work), sort_keys=False), encoding='utf-8')
    bibliography(work)
    site = build(work, quiet=True)
    finish(site.out, names)
    index(site.out)
    for w in site.warnings:
        if not known_to_quarto.match(w): report('smalldocs', w)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(site.out, out)
    print(f'{len(site.pages)} pages in {out}')


# what smalldocs does not read and Quarto does
known_to_quarto = re.compile(r'.*(html-math-method|respect-user-color-scheme|execute\.enabled|output-file|html\.grid|no Sass)\b')


if __name__ == '__main__':
    args = sys.argv[1:]
    if args == ['process']: print(process())
    elif args[:1] == ['log'] and len(args) == 2: problems += complaints(args[1])
    elif args[:1] == ['index'] and len(args) == 2: index(args[1])
    elif args[:1] == ['offline'] and len(args) <= 2: offline(*args[1:])
    else: sys.exit(__doc__)
    if problems: sys.exit(f'{len(problems)} problems:\n' + '\n'.join(problems))
