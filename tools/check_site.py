"""Is the site whole and readable? Links and anchors, then every page in a browser, wide and narrow, light and dark.

    python tools/check_site.py [SITE]     # a folder that `tools/site.py offline` or Quarto wrote; default _docs

Prints everything that is wrong and ends with 1 if something is. Needs playwright and a Chromium on the machine."""
import functools
import http.server
import json
import os
import re
import shutil
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

root = Path(__file__).resolve().parent.parent
problems = []


def report(page, message):
    if f'{page}: {message}' not in problems: problems.append(f'{page}: {message}')


# ---- what should be there

def notebooks():
    "Title of each page, by page name, from the processed notebooks"
    pages = {}
    for p in sorted((root/'_proc').rglob('*.ipynb')):
        front = yaml.safe_load(''.join(json.loads(p.read_text(encoding='utf-8'))['cells'][0]['source']).strip('-\n'))
        pages[p.relative_to(root/'_proc').with_name(front.get('output-file', f'{p.stem}.html')).as_posix()] = front['title']
    for p in sorted((root/'_proc').glob('*.qmd')):
        if p.stem == '404': continue
        pages[f'{p.stem}.html'] = yaml.safe_load(p.read_text(encoding='utf-8').split('---')[1])['title']
    return pages


def entries(x):
    "Every file named in a part of _quarto.yml"
    if isinstance(x, str): return [x] if x.endswith(('.ipynb', '.qmd')) else []
    if isinstance(x, dict): return [f for k, v in x.items() if k not in ('section', 'text') for f in entries(v)]
    return [f for v in x for f in entries(v)] if isinstance(x, list) else []


def check_sidebar():
    site = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))['website']
    side, top = entries(site['sidebar']['contents']), entries(site['navbar'])
    for f in dict.fromkeys(side + top):
        if not (root/'nbs'/f).exists(): report('_quarto.yml', f'{f} is missing')
    for p in sorted([*(root/'nbs').rglob('*.ipynb'), *(root/'nbs').glob('*.qmd')]):
        name = p.relative_to(root/'nbs').as_posix()
        if name not in side and name != '404.qmd' and '/.' not in f'/{name}': report('_quarto.yml', f'{name} is not in the sidebar')
    for f in {f for f in side if side.count(f) > 1}: report('_quarto.yml', f'{f} is in the sidebar twice')
    return site


# ---- files

class Page(HTMLParser):
    "Ids, links, pictures and the text outside of code of one page"
    void = {'area', 'base', 'br', 'col', 'embed', 'hr', 'img', 'input', 'link', 'meta', 'source', 'track', 'wbr'}

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.sources, self.pictures, self.foreign = set(), [], [], [], []
        self.text, self.outputs, self.stack = [], [], []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {v for k, v in attrs if k in ('id', 'name') and v}
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'img': self.pictures.append((a.get('src', ''), a.get('alt')))
        src = a.get('src') if tag in ('img', 'script', 'source', 'video', 'iframe') else a.get('href') if tag == 'link' and a.get('rel') in ('stylesheet', 'icon') else None
        if src: self.sources.append(src)
        if src and tag in ('script', 'link', 'iframe') and re.match(r'(https?:)?//', src): self.foreign.append(src)
        if tag not in self.void: self.stack.append((tag, a.get('class') or ''))

    def handle_endtag(self, tag):
        while self.stack and any(t == tag for t, _ in self.stack):
            if self.stack.pop()[0] == tag: break

    def handle_data(self, data):
        tags = {t for t, _ in self.stack}
        if any('cell-output' in c for _, c in self.stack): self.outputs.append(data)
        if not tags & {'pre', 'code', 'script', 'style', 'math', 'svg', 'head'}: self.text.append(data)


def local(link, page, site, base):
    "(file, anchor) that a link of a page means, None for another place"
    if link.startswith(base): link = '/' + link[len(base):].lstrip('/')
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None
    path = unquote(parts.path).removeprefix(urlsplit(base).path.rstrip('/'))   # as 404.html, which serves every folder
    target = site/path.lstrip('/') if path.startswith('/') else page.parent/path if path else page
    if target.is_dir(): target = target/'index.html'
    return Path(os.path.normpath(target)), unquote(parts.fragment)


def check_files(site, web):
    paths = sorted(site.rglob('*.html'))
    pages = {p: Page(p) for p in paths}
    base, repo = web['site-url'], f"{web['repo-url']}/blob/{web['repo-branch']}/"
    raw = re.compile(r'@(?:fig|eq|tbl)-\w+|\{#(?:fig|eq|tbl)-|\$\$|\\begin\b|\\\(|\?@\w+')
    for p, page in pages.items():
        name = p.relative_to(site).as_posix()
        for link in dict.fromkeys(page.links + page.sources):
            if link.startswith(repo):
                file = unquote(urlsplit(link).path.split(f"/blob/{web['repo-branch']}/")[1])
                if not (root/file).exists(): report(name, f'link to {file}, which is not in the repository')
            place = local(link, p, site, base)
            if place is None: continue
            file, anchor = place
            if not file.exists(): report(name, f'link {link} leads nowhere')
            elif anchor and file in pages and anchor not in pages[file].ids: report(name, f'link {link}: no such place on that page')
        for src, alt in page.pictures:
            if not (alt or '').strip(): report(name, f'a picture without alt text ({src[:60]})')
        for src in page.foreign: report(name, f'{src} comes from another server')
        for m in raw.finditer(' '.join(page.text)): report(name, f'{m[0]} left in the text')
        if 'Traceback (most recent call last)' in ''.join(page.outputs): report(name, 'a cell shows a traceback')


def check_search(site, pages):
    index = site/'search.json'
    if not index.exists(): return report('search.json', 'no search index')
    found = json.loads(index.read_text(encoding='utf-8'))
    for name in pages:
        if not any(e['href'].split('#')[0] == name for e in found): report('search.json', f'{name} cannot be found')
    if not any('NeuralSort' in e['text'] for e in found): report('search.json', 'holds no "NeuralSort"')
    if not any(e['section'] == 'NewtonLoss' for e in found): report('search.json', 'NewtonLoss has no entry of its own; first: python tools/site.py index SITE')


# ---- in the browser

look = '''() => {
  const main = document.querySelector('main'), wide = innerWidth, out = [], small = []
  const far = e => { const r = e.getBoundingClientRect(); return r.width && r.height && r.right > wide + 1 }
  const clips = e => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)
  for (const e of main.querySelectorAll('*')) {
    if (!far(e) || e.parentElement !== main && far(e.parentElement)) continue   // the outermost one
    let up = e.parentElement, inside = false
    while (up && up !== main) { if (clips(up)) inside = true; up = up.parentElement }
    if (!inside) out.push(`<${e.tagName.toLowerCase()} class="${e.className}"> ${(e.textContent || '').trim().slice(0, 40)}`)
  }
  const words = document.createTreeWalker(main, NodeFilter.SHOW_TEXT)
  while (words.nextNode()) {
    const e = words.currentNode.parentElement, s = words.currentNode.textContent.trim()
    if (s && e.offsetParent && !e.closest('math, svg, sub, sup, script, style') && parseFloat(getComputedStyle(e).fontSize) < 12) small.push(s.slice(0, 40))
  }
  const h1 = document.querySelector('h1')
  return {title: h1 && h1.innerText.trim(), out, small, scroll: document.scrollingElement.scrollWidth - wide,
          broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 80))}
}'''
background = '() => getComputedStyle(document.body).backgroundColor'


def brightness(rgb): return sum(float(v) for v in re.findall(r'[\d.]+', rgb)[:3])/3


def chromium():
    names = [os.environ.get('CHROMIUM', ''), 'chromium', 'chromium-browser', 'google-chrome']
    found = next((shutil.which(n) for n in names if n and shutil.which(n)), None)
    return found or sys.exit(f'check_site: found none of {", ".join(filter(None, names))}; name one with CHROMIUM=...')


def serve(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}'


def check_page(tab, url, name, title, width):
    noise = []
    tab.on('console', lambda m: noise.append(f'console: {m.text}') if m.type == 'error' else None)
    tab.on('pageerror', lambda e: noise.append(f'script: {e}'))
    tab.on('response', lambda r: noise.append(f'{r.status} for {r.url}') if r.status >= 400 else None)
    tab.emulate_media(color_scheme='light')
    tab.goto(f'{url}/{name}')
    light, seen = tab.evaluate(background), tab.evaluate(look)
    tab.emulate_media(color_scheme='dark')
    for _ in range(40):                         # a script of the page changes the theme
        dark = tab.evaluate(background)
        if brightness(dark) < 60: break
        tab.wait_for_timeout(50)
    if seen['title'] != title: report(name, f'its title is {seen["title"]!r}, the notebook says {title!r}')
    if not brightness(light) > 200 or not brightness(dark) < 60: report(name, f'background {light} in the light theme, {dark} in the dark one')
    for what in seen['out']: report(name, f'{width} px: sticks out: {what}')
    if seen['scroll'] > 1: report(name, f'{width} px: the page is {seen["scroll"]} px too wide')
    for s in dict.fromkeys(seen['small']): report(name, f'{width} px: text below 12 px: {s}')
    for src in seen['broken']: report(name, f'picture does not load: {src}')
    for n in noise: report(name, n)


def check_browser(site, pages):
    from playwright.sync_api import sync_playwright
    url = serve(site)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=['--no-sandbox', '--disable-gpu'])
        for width, height in ((1280, 900), (390, 844)):
            context = browser.new_context(viewport=dict(width=width, height=height))
            context.route(re.compile(r'^https?://(?!127\.0\.0\.1)'), lambda r: r.fulfill(status=200, content_type='image/svg+xml', body='<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20"/>'))
            start = time.perf_counter()
            for i, (name, title) in enumerate(pages.items(), 1):
                tab = context.new_page()
                check_page(tab, url, name, title, width)
                tab.close()
                if i % 10 == 0 or i == len(pages): print(f'{width} px: {i} of {len(pages)} pages, {time.perf_counter() - start:.0f} s', flush=True)
            context.close()
        browser.close()


def main(site='_docs'):
    site = (root/site).resolve()
    if not (site/'index.html').exists(): sys.exit(f'check_site: no index.html in {site}; first: python tools/site.py offline')
    web, pages = check_sidebar(), notebooks()
    if not (site/'404.html').exists(): report('404.html', 'no such page')
    for name in list(pages):
        if not (site/name).exists(): report(name, 'no such page'); del pages[name]
    check_files(site, web)
    check_search(site, pages)
    check_browser(site, pages)
    if problems: sys.exit(f'{len(problems)} problems:\n' + '\n'.join(problems))
    print(f'{len(pages)} pages: all well')


if __name__ == '__main__': main(*sys.argv[1:])
