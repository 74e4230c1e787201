"""Everything that is made from the notebooks: the package, the index of names, clean notebooks, README.md. Run it before each commit.

    python tools/prepare.py"""
import os, re
from pathlib import Path

import yaml
from execnb.shell import CaptureShell
from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent

def readme():
    "README.md from nbs/index.ipynb, as nbdev would make it with Quarto"
    md, _ = MarkdownExporter().from_filename(proc_nbs(force=True)/'index.ipynb')
    front, body = re.match(r'\s*---\n(.*?)\n---\n(.*)', md, re.S).groups()
    front, body = yaml.safe_load(front), re.sub(r'<!-- WARNING.*?-->', '', body)
    fence = r'^```(\w*)\n(.*?)^```$'
    body = re.sub(fence, lambda m: f'```{m[1] or "python"}\n{m[2]}```', body, flags=re.M | re.S)
    body = re.sub(r'\]\((?=images/|[\w/]+\.ipynb[)#])', '](nbs/', body)                 # pictures, notebooks
    body = re.sub(r'\n{3,}', '\n\n', body).strip()
    note = '<!-- Made from nbs/index.ipynb by tools/prepare.py: edit there -->'
    head = f'# {front["title"]}\n\n> {front["description"].strip()}'
    (root/'README.md').write_text(f'{head}\n\n{note}\n\n{body}\n', encoding='utf-8')

if __name__ == '__main__':
    os.chdir(root)
    nbdev_export()
    CaptureShell().execute('nbs/names.ipynb', dest='nbs/names.ipynb')      # the list of all names
    nbdev_clean()
    readme()
