"""Everything that is made from the notebooks: the package, clean notebooks, README.md. Run it before each commit.

    python tools/prepare.py"""
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent


def readme():
    "README.md from nbs/index.ipynb, as nbdev would make it with Quarto"
    proc = proc_nbs(force=True)
    md = subprocess.run([sys.executable, '-m', 'jupyter', 'nbconvert', '--log-level', 'ERROR', '--to', 'markdown', '--stdout', str(proc/'index.ipynb')],
                        check=True, capture_output=True, text=True).stdout
    front, body = re.match(r'\s*---\n(.*?)\n---\n(.*)', md, re.S).groups()
    front, body = yaml.safe_load(front), re.sub(r'<!-- WARNING.*?-->', '', body)
    body = re.sub(r'^```(\w*)\n(.*?)^```$', lambda m: f'```{m[1] or "python"}\n{m[2]}```', body, flags=re.M | re.S)
    body = re.sub(r'\]\((?!https?:|#)(?=images/)', '](nbs/', body)            # pictures
    body = re.sub(r'\]\((?!https?:|nbs/)([\w/]+\.ipynb)\)', r'](nbs/\1)', body)       # notebooks
    body = re.sub(r'\n{3,}', '\n\n', body).strip()
    note = '<!-- Made from nbs/index.ipynb by tools/prepare.py: edit there -->'
    (root/'README.md').write_text(f'# {front["title"]}\n\n> {front["description"].strip()}\n\n{note}\n\n{body}\n', encoding='utf-8')


if __name__ == '__main__':
    os.chdir(root)
    nbdev_export()
    nbdev_clean()
    readme()
