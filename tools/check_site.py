"""Is the site readable? What a link checker cannot tell: every page in a browser, wide and narrow, light and dark.

    python tools/check_site.py [SITE]     # a folder that `tools/site.py offline` or Quarto wrote; default _docs

Links and anchors are Quarto's (`tools/site.py log`) and those between notebooks are tested (tests/test_package.py).
Prints everything that is wrong and ends with 1 if something is. Needs playwright and a Chromium on the machine."""
import functools, http.server, json, os, re, shutil, sys, threading
from pathlib import Path

import yaml
from bs4 import BeautifulSoup

root = Path(__file__).resolve().parent.parent
problems = []

def report(page, message):
    if f'{page}: {message}' not in problems: problems.append(f'{page}: {message}')

def titles():
    "Title of each page, by page name, from the processed notebooks"
    pages = {}
    for p in sorted((root/'_proc').rglob('*.ipynb')):
        first = json.loads(p.read_text(encoding='utf-8'))['cells'][0]['source']
        front = yaml.safe_load(''.join(first).strip('-\n'))
        page = p.relative_to(root/'_proc').with_name(front.get('output-file', f'{p.stem}.html'))
        pages[page.as_posix()] = front['title']
    return pages

def check_files(site):
    raw = re.compile(r'@(?:fig|eq|tbl)-\w+|\{#(?:fig|eq|tbl)-|\$\$|\\begin\b|\\\(|\?@\w+')
    for p in sorted(site.rglob('*.html')):
        page, name = BeautifulSoup(p.read_bytes(), 'html.parser'), p.relative_to(site).as_posix()
        for img in page.select('img:not([alt]), img[alt=""]'): report(name, f'a picture without alt text ({img["src"][:60]})')
        for tag in page.select('script[src], iframe[src], link[rel=stylesheet], link[rel=icon]'):
            src = tag.get('src') or tag.get('href', '')
            if re.match(r'(https?:)?//', src): report(name, f'{src} comes from another server')
        if any('Traceback (most recent call last)' in o.text for o in page.select('[class*=cell-output]')):
            report(name, 'a cell shows a traceback')
        for code in page(['pre', 'code', 'script', 'style', 'math', 'svg', 'head']): code.extract()
        for m in raw.finditer(page.get_text(' ')): report(name, f'{m[0]} left in the text')
    found = json.loads((site/'search.json').read_text(encoding='utf-8')) if (site/'search.json').exists() else []
    if not any(e['section'] == 'NewtonLoss' for e in found):
        report('search.json', 'NewtonLoss has no entry of its own; first: python tools/site.py index SITE')

look = '''() => {
  const main = document.querySelector('main'), wide = innerWidth, out = [], small = []
  const far = e => { const r = e.getBoundingClientRect(); return r.width && r.height && r.right > wide + 1 }
  const clips = e => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX)
  for (const e of main.querySelectorAll('*')) {
    if (!far(e) || e.parentElement !== main && far(e.parentElement)) continue   // the outermost one
    let up = e.parentElement
    while (up !== main && !clips(up)) up = up.parentElement
    if (up === main) out.push(`<${e.tagName.toLowerCase()} class="${e.className}"> ${(e.textContent || '').slice(0, 40)}`)
  }
  const words = document.createTreeWalker(main, NodeFilter.SHOW_TEXT)
  while (words.nextNode()) {
    const e = words.currentNode.parentElement, s = words.currentNode.textContent.trim()
    const shown = s && e.offsetParent && !e.closest('math, svg, sub, sup, script, style')
    if (shown && parseFloat(getComputedStyle(e).fontSize) < 12) small.push(s.slice(0, 40))
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
    return found or sys.exit('check_site: no Chromium found; name one with CHROMIUM=...')

def serve(site):
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *args: None))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}'

def check_page(tab, url, name, title):
    tab.on('console', lambda m: report(name, f'console: {m.text}') if m.type == 'error' else None)
    tab.on('pageerror', lambda e: report(name, f'script: {e}'))
    tab.on('response', lambda r: report(name, f'{r.status} for {r.url}') if r.status >= 400 else None)
    tab.emulate_media(color_scheme='light')
    tab.goto(f'{url}/{name}')
    light, seen = tab.evaluate(background), {}
    for width, height in ((390, 844), (1280, 900)):
        tab.set_viewport_size(dict(width=width, height=height))
        seen[width] = tab.evaluate(look)
    tab.emulate_media(color_scheme='dark')
    for _ in range(40):                         # a script of the page changes the theme
        if brightness(dark := tab.evaluate(background)) < 60: break
        tab.wait_for_timeout(50)
    if seen[1280]['title'] != title: report(name, f'its title is {seen[1280]["title"]!r}, the notebook says {title!r}')
    if not brightness(light) > 200 or not brightness(dark) < 60:
        report(name, f'background {light} in the light theme, {dark} in the dark one')
    for width, found in seen.items():
        if found['scroll'] > 1: report(name, f'{width} px: the page is {found["scroll"]} px too wide')
        for key, what in (('out', 'sticks out'), ('small', 'text below 12 px'), ('broken', 'picture does not load')):
            for s in found[key]: report(name, f'{width} px: {what}: {s}')

def check_browser(site, pages):
    from playwright.sync_api import sync_playwright
    url, badge = serve(site), '<svg xmlns="http://www.w3.org/2000/svg" width="117" height="20"/>'
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=['--no-sandbox', '--disable-gpu'])
        context = browser.new_context()
        context.route(re.compile(r'^https?://(?!127\.0\.0\.1)'),
                      lambda r: r.fulfill(status=200, content_type='image/svg+xml', body=badge))
        for name, title in pages.items():
            tab = context.new_page()
            check_page(tab, url, name, title)
            tab.close()
        browser.close()

def main(site='_docs'):
    site, pages = (root/site).resolve(), titles()
    for name in [*pages, 'index.html', '404.html']:
        if not (site/name).exists(): report(name, 'no such page'); pages.pop(name, None)
    check_files(site)
    check_browser(site, pages)
    if problems: sys.exit(f'{len(problems)} problems:\n' + '\n'.join(problems))
    print(f'{len(pages)} pages: all well')

if __name__ == '__main__': main(*sys.argv[1:])
