"""The docs site, from the notebooks.

    python tools/site.py process         # notebooks -> _proc, as nbdev does, and what Quarto needs besides
    quarto render _proc 2>&1 | tee quarto.log
    python tools/site.py log quarto.log  # ends with 1 if Quarto warned of something that readers would see
    python tools/site.py index SITE      # SITE (_proc/_docs): the search box finds every name of the package
    python tools/site.py offline [OUT]   # the same pages without Quarto, by smalldocs -> OUT (_docs)

Quarto makes the published site. Where it cannot be installed, smalldocs reads the same `_quarto.yml`; what it lacks
is added here: page names, numbered figures, MathML and the bibliography (both by pandoc, as in Quarto)."""
import ast, functools, html, json, os, posixpath, re, shutil, sys
from pathlib import Path

import yaml

root = Path(__file__).resolve().parent.parent
problems = []

def report(page, message): problems.append(f'{page}: {message}')

def process():
    "Notebooks with signatures, links and page names filled in, ready for a renderer"
    from nbdev.serve import proc_nbs
    os.chdir(root)
    proc = proc_nbs(force=True)
    trees = (ast.parse(p.read_text(encoding='utf-8')) for p in (root/'newton_losses_nb').rglob('*.py'))
    types = {n.name for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}  # show_doc writes `def` for them too
    for p in proc.rglob('*.ipynb'):
        nb = json.loads(p.read_text(encoding='utf-8'))
        shown = set()
        for cell in nb['cells']: polish(cell, types, shown)
        p.write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')
    return proc

def lines(s):
    "Quarto joins the lines of a source that is one string, so each line is an entry, with its newline"
    return re.findall(r'[^\n]*\n|[^\n]+$', s)

def polish(cell, types, shown):
    "What nbdev wrote, as a renderer needs it; `shown` collects the names that have a signature"
    s = text(cell)
    if cell['cell_type'] == 'markdown': s = prose(s)
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'text/markdown' in data:
            md = ''.join(data['text/markdown'])
            if 'show_doc(' in s: md = documented(md, types)
            data['text/markdown'] = lines(prose(md))
        if 'show_doc(' in s: shown |= set(re.findall(r'show_doc\((\w+)', s))
        if 'text/html' in data: data['text/markdown'] = lines(raw(''.join(data.pop('text/html'))))
    if 'code-summary: "Exported source"' in s: s = folded(s, shown)
    cell['source'] = lines(s)

@functools.cache
def public():
    "Names that have a signature on a page"
    sources = ''.join(p.read_text(encoding='utf-8') for p in (root/'newton_losses_nb').rglob('*.py'))
    return {name for names in re.findall(r"^__all__ = (\['.*?\])", sources, re.M | re.S) for name in ast.literal_eval(names)}

def prose(s):
    "Without links to names that have no signature, which no page has, and without links inside links"
    def known(m): return m[0] if m[2] in public() else m[1]
    s = re.sub(r'\[(`(\w+)(?:\.\w+)*(?:\(\))?`)\]\(https?://[^)]*#[^)]*\)', known, s)
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
    names = [n.name for n in ast.parse(s).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
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
    problems.extend(re.findall(r'.*(?:Unable to resolve|Could not convert).*', plain))

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

def text(cell): return ''.join(cell['source'])

def outside_code(f, md):
    "`f` of `md`, whose examples of Markdown stay as they are"
    pieces = re.split(r'(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)', md, flags=re.M | re.S)
    return ''.join(piece if i % 2 else f(piece) for i, piece in enumerate(pieces))

def figures(nb, page):
    "Number the captions of a page's figures; returns the number of each label"
    refs = {}
    for cell in nb['cells']:
        if not any(k.startswith('image/') for o in cell.get('outputs', []) for k in o.get('data', {})): continue
        said = yaml.safe_load('\n'.join(re.findall(r'^#\|\s*(\S+:.*)$', text(cell), re.M))) or {}
        label, cap = said.get('label', ''), said.get('fig-cap')
        if not (label.startswith('fig-') and cap and said.get('fig-alt')):
            report(page, f'a picture without all of label: fig-..., fig-cap, fig-alt (cell `{text(cell)[:70]}`)')
            continue
        if label in refs: report(page, f'label {label} is used twice')
        refs[label] = f'Figure {len(refs) + 1}'
        new = f'#| fig-cap: {json.dumps(f"{refs[label]}: {cap}", ensure_ascii=False)}'
        cell['source'] = re.sub(r'^#\|\s*fig-cap:.*$', lambda m: new, text(cell), count=1, flags=re.M)
    return refs

def links(s, names, folder=''):
    "Links to notebooks, seen from a folder, follow their page names"
    def one(m):
        name = posixpath.normpath(posixpath.join(folder, m[1]))
        return f'{posixpath.relpath(names[name], folder or ".") if name in names else m[1]}.ipynb'
    return re.sub(r'(?<![\w/.:-])([\w./-]+)\.ipynb(?=[)#"\'\s])', one, s)

def adapt(nb, page, names):
    "One processed notebook as smalldocs reads it"
    refs = figures(nb, page)
    def reference(m):
        if m[1] not in refs: report(page, f'@{m[1]} is not a label of this page')
        return f'[{refs.get(m[1])}](#{m[1]})'
    def prose(s):
        return links(re.sub(r'(?<![\w`/.])@(fig-[\w-]*\w)', reference, s), names, posixpath.dirname(page))
    for cell in nb['cells']:
        if cell['cell_type'] == 'markdown': cell['source'] = outside_code(prose, text(cell))
        for o in cell.get('outputs', []):
            md = ''.join(o.get('data', {}).get('text/markdown', ''))
            if not md: continue
            md = re.sub(r'^#+ .*$', lambda m: m[0].replace('__', r'\_\_'), md, flags=re.M)
            o['data']['text/markdown'] = links(md, names, posixpath.dirname(page))
    return nb

def mathml(formulas):
    "MathML of each (display, TeX), by one run of pandoc; None where it cannot be converted"
    from pypandoc import convert_text
    def block(display, tex):
        return {'t': 'Para', 'c': [{'t': 'Math', 'c': [{'t': 'DisplayMath' if display else 'InlineMath'}, tex]}]}
    doc = json.loads(convert_text('', 'json', 'markdown')) | dict(blocks=[block(*f) for f in formulas])
    out = convert_text(json.dumps(doc), 'html', 'json', extra_args=['--mathml', '--wrap=none'])
    return [o if '<math' in o else None for o in re.findall(r'<p>(.*?)</p>', out, re.S)]

def bibliography(folder):
    "The list of references, in the page with a `::: {#refs}` div"
    from pypandoc import convert_file
    page = folder/'references.qmd'
    front = yaml.safe_load(page.read_text(encoding='utf-8').split('---')[1])
    args = '--citeproc', '--wrap=none', f'--bibliography={folder/"references.bib"}'
    md = convert_file(page, 'commonmark_x', 'markdown', extra_args=args)
    head = yaml.safe_dump({k: front[k] for k in ('title', 'description')})
    page.write_text(f'---\n{head}---\n\n{md}', encoding='utf-8')

def finish(site, names):
    "Formulas as MathML, also in captions; links to sources by the notebooks' own names; no script from elsewhere"
    from smalldocs.markdown import make_parser
    parser, pages = make_parser(), {}
    span = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
    nbs = {f'/nbs/{page}.ipynb"': f'/nbs/{stem}.ipynb"' for stem, page in names.items()}
    for p in sorted(site.rglob('*.html')):
        def caption(m): return f'<figcaption>{parser.renderInline(html.unescape(m[1]))}</figcaption>'
        s = re.sub(r'<figcaption>(.*?)</figcaption>', caption, p.read_text(encoding='utf-8'), flags=re.S)
        s = re.sub(r'<(?:link|script)\b[^>]*katex[^>]*>(?:</script>)?\n?', '', s)
        pages[p] = re.sub(r'/nbs/[\w/-]+\.ipynb"', lambda m: nbs.get(m[0], m[0]), s)
    def key(m): return m[1] == 'display', html.unescape(m[2])
    found = {key(m): p for p, s in pages.items() for m in span.finditer(s)}
    done = dict(zip(found, mathml(list(found))))
    for f, p in found.items():
        if done[f] is None: report(p.name, f'pandoc cannot convert the formula {f[1]}')
    for p, s in pages.items():
        s = span.sub(lambda m: f'<span class="math {m[1]}">{done[key(m)] or m[2]}</span>', s)
        p.write_text(s, encoding='utf-8')

def offline(out='_docs'):
    from smalldocs.site import build
    out, proc, work, names = root/out, process(), root/'_offline', {}
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(proc, work)
    nbs = {p.relative_to(work).with_suffix(''): json.loads(p.read_text(encoding='utf-8')) for p in work.rglob('*.ipynb')}
    for name, nb in nbs.items():
        m = re.search(r'^output-file: (\S+)\.html$', text(nb['cells'][0]), re.M)
        names[name.as_posix()] = name.with_name(m[1] if m else name.name).as_posix()
    for (name, page), nb in zip(names.items(), nbs.values()):
        (work/f'{name}.ipynb').unlink()
        (work/f'{page}.ipynb').write_text(json.dumps(adapt(nb, f'{name}.ipynb', names)), encoding='utf-8')
    config = work/'_quarto.yml'
    config.write_text(links(config.read_text(encoding='utf-8'), names), encoding='utf-8')
    bibliography(work)
    site = build(work, quiet=True)
    finish(site.out, names)
    index(site.out)
    known = 'html-math-method|respect-user-color-scheme|execute\\.enabled|output-file|html\\.grid|no Sass'  # to Quarto
    for w in site.warnings:
        if not re.search(rf'({known})\b', w): report('smalldocs', w)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(site.out, out)
    print(f'{len(site.pages)} pages in {out}')

if __name__ == '__main__':
    command, *args = sys.argv[1:] or ['help']
    commands = dict(process=process, log=complaints, index=index, offline=offline)
    if command not in commands: sys.exit(__doc__)
    commands[command](*args)
    if problems: sys.exit(f'{len(problems)} problems:\n' + '\n'.join(problems))
