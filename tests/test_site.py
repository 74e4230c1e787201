"""The tools that render and check the docs find what they are there to find."""
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(request):
    "A fresh copy of a tool: each test has its own list of problems"
    def load(name):
        spec = importlib.util.spec_from_file_location(f'nl_tools_{name}', root/'tools'/f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


picture = dict(output_type='display_data', data={'image/png': 'iVBO', 'text/plain': 'a picture'})


def notebook(*cells): return dict(cells=[dict(cell_type='markdown' if isinstance(c, str) else 'code', **(dict(source=[c]) if isinstance(c, str) else c)) for c in cells])


def test_labels_become_numbers_and_links(tool):
    site = tool('site')
    nb = notebook(dict(source='#| label: fig-x\n#| fig-cap: "What it shows"\n#| fig-alt: "A line"\nplot()', outputs=[picture]),
                  'By @fig-x, as in [another](../studies/02_other.ipynb#there) and [its neighbour](03_near.ipynb). Code: `@fig-y`.')
    site.adapt(nb, 'core/01_page.ipynb', {'studies/02_other': 'studies/other', 'core/03_near': 'core/near'})
    fig, prose = (c['source'] for c in nb['cells'])
    assert '#| fig-cap: "Figure 1: What it shows"' in fig
    assert prose == 'By [Figure 1](#fig-x), as in [another](../studies/other.ipynb#there) and [its neighbour](near.ipynb). Code: `@fig-y`.'
    assert not site.problems


def test_what_quarto_would_not_show_is_reported(tool):
    site = tool('site')
    doc = dict(source='show_doc(f)', outputs=[dict(output_type='execute_result', data={'text/markdown': '### f.__call__\n\n*Call it*'})])
    site.adapt(notebook('See @fig-none.', dict(source='plot()', outputs=[picture]), doc), 'page', {})
    found = '\n'.join(site.problems)
    for what in ('@fig-none is not a label', '(cell `plot()`)'): assert what in found, what
    assert doc['outputs'][0]['data']['text/markdown'].startswith(r'### f.\_\_call\_\_')


def test_sources_are_lists_of_lines(tool):
    "Quarto joins the lines of a source that is one string: a whole cell becomes its heading"
    site = tool('site')
    cell = dict(cell_type='markdown', source='# Title\n\n$$a=b$$ {#eq-one}\n\nSee [[`f`](https://a.example/f.html#f)](f.ipynb), [`derivatives`](https://a.example/f.html#derivatives), [`_g`](https://a.example/f.html#_g), [`unseen`](https://a.example/f.html#unseen).')
    site.polish(cell, set(), set())
    assert cell['source'] == ['# Title\n', '\n', '$$a=b$$ {#eq-one}\n', '\n', 'See [`f`](f.ipynb), [`derivatives`](https://a.example/f.html#derivatives), `_g`, `unseen`.']
    index = dict(cell_type='code', source='Markdown(names)', outputs=[dict(data={'text/markdown': '- [[`f`](https://a.example/f.html#f)](f.ipynb): first'})])
    site.polish(index, set(), set())
    assert index['outputs'][0]['data']['text/markdown'] == ['- [`f`](f.ipynb): first']
    assert site.lines('a\n\nb\u2028c\n') == ['a\n', '\n', 'b\u2028c\n'] and site.lines('') == []


def test_what_nbdev_wrote(tool):
    site, shown = tool('site'), set()
    doc = '### Loss\n\n```python\ndef Loss(\n    fn:collections.abc.Callable, # See [`check`](https://a.example/c.html#check)\n):\n```\n\n*A loss*\n'
    cell = dict(cell_type='code', source='#| echo: false\nshow_doc(Loss)', outputs=[dict(data={'text/markdown': doc})])
    site.polish(cell, {'Loss'}, shown)
    out = ''.join(cell['outputs'][0]['data']['text/markdown'])
    assert 'class Loss(\n    fn:Callable, # See check\n' in out and shown == {'Loss'}
    assert 'class Base()\n' in site.documented('```python\ndef Base(\n    *args:Any, **kwargs:Any\n)->None:\n```', {'Base'})
    source = '#| code-fold: show\n#| code-summary: "Exported source"\nclass {}:\n    pass'
    again, other = (dict(cell_type='code', source=source.format(n)) for n in ('Loss', 'Other'))
    for c in (again, other): site.polish(c, {'Loss'}, shown)
    assert again['source'][:2] == ['#| code-fold: true\n', '#| code-summary: "Source of Loss"\n']
    assert other['source'][0] == '#| code-fold: show\n'
    table = dict(cell_type='code', source='t', outputs=[dict(data={'text/html': '<style scoped>\n a\n\n b</style>\n<table></table>', 'text/plain': 't'})])
    site.polish(table, set(), set())
    assert ''.join(table['outputs'][0]['data']['text/markdown']) == '```{=html}\n<table></table>\n```\n' and 'text/html' not in table['outputs'][0]['data']


def test_log_of_quarto(tool, tmp_path):
    log = tmp_path/'quarto.log'
    log.write_text('[1/2] a.ipynb\n\x1b[33mWARNING: Unable to resolve link target: x.ipynb\x1b[39m\n[WARNING] Could not convert TeX math \\x\nOutput created\n')
    site = tool('site')
    site.complaints(log)
    assert len(site.problems) == 2


def test_names_are_in_the_search_box(tool, tmp_path):
    (tmp_path/'core').mkdir()
    (tmp_path/'core/newton.html').write_text('<h3 id="newtonloss">NewtonLoss</h3>')
    page = dict(objectID='core/newton.html', href='core/newton.html', title='Newton losses', section='', text='All')
    (tmp_path/'search.json').write_text(json.dumps([page]))
    site = tool('site')
    site.index(tmp_path)
    found = json.loads((tmp_path/'search.json').read_text())
    assert [(e['href'], e['title'], e['section']) for e in found[1:]] == [('core/newton.html#newtonloss', 'Newton losses', 'NewtonLoss')]


def test_formulas(tool):
    pytest.importorskip('pypandoc')
    good, bad = tool('site').mathml([(False, r'\tfrac12\lVert y-z^\star\rVert^2'), (True, r'\nosuchcommand{x}')])
    assert good.startswith('<math') and bad is None


page = ('<!DOCTYPE html><html lang="en"><head><title>t</title><link rel="icon" href="data:,">{head}'
        '<style>body {{background: #fff; margin: 0}} @media (prefers-color-scheme: dark) {{body {{background: #222; color: #eee}}}}</style></head><body><main><h1>{title}</h1>{body}</main></body></html>')

def write(folder, name, body, head='', title='Title'): (folder/name).write_text(page.format(body=body, head=head, title=title), encoding='utf-8')


def test_files(tool, tmp_path):
    check = tool('check_site')
    write(tmp_path, 'good.html', '<img src="data:x" alt="a line"><p>5 $ and <code>@fig-x $$</code></p>')
    write(tmp_path, 'bad.html', '<img src="gone.png"><p>See @fig-x and $$a$$</p><div class="cell-output"><pre>Traceback (most recent call last)</pre></div>',
          '<script src="https://cdn.example/x.js"></script>')
    check.check_files(tmp_path)
    found = '\n'.join(check.problems)
    assert 'good.html: ' not in found
    for what in ('without alt text (gone.png)', '@fig-x left', '$$ left', 'traceback', 'cdn.example/x.js comes from another server', 'NewtonLoss has no entry'): assert what in found, what


def test_browser(tool, tmp_path):
    api = pytest.importorskip('playwright.sync_api')
    check = tool('check_site')
    if not any(shutil.which(n) for n in ('chromium', 'chromium-browser', 'google-chrome')): pytest.skip('no Chromium here')
    write(tmp_path, 'good.html', '<p>All well</p><div style="overflow-x: auto"><div style="width: 900px">wide, and scrolls</div></div>')
    write(tmp_path, 'bad.html', '<div style="width: 900px">too wide</div><p style="font-size: 9px">tiny</p><img src="gone.png" alt="gone"><script>console.error("oh"); throw Error("no")</script>', title='Another')
    write(tmp_path, 'white.html', '<style>body {background: #fff !important}</style>')
    url = check.serve(tmp_path)
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=check.chromium(), args=['--no-sandbox', '--disable-gpu'])
        context = browser.new_context()
        for name in ('good.html', 'bad.html', 'white.html'): check.check_page(context.new_page(), url, name, 'Title')
        browser.close()
    found = '\n'.join(check.problems)
    assert 'good.html: ' not in found
    for what in ("its title is 'Another'", 'sticks out: <div', '390 px: the page is 510 px too wide', 'below 12 px: tiny', 'does not load', 'console: oh', 'script: no', '404 for', 'white.html: background'): assert what in found, what

def test_first_cells():
    "nbdev makes title and description of the first cell, and drops what else stands there"
    for f in sorted((root/'nbs').rglob('*.ipynb')):
        cell = ''.join(json.loads(f.read_text(encoding='utf-8'))['cells'][0]['source'])
        if f.name != 'index.ipynb': assert re.fullmatch(r'# [^\n]+\n+> [^\n]+', cell), f.name
