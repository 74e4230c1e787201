"""Every notebook alone, as on Colab: a new environment, the package from a built wheel, an empty folder, no repository.

    python tools/run_alone.py [NOTEBOOK ...] [--env DIR] [--skip NOTEBOOK ...]

What a notebook needs beside `newton_losses_nb[bench]` is read from its installing cell. Cells marked `slow` or `cuda` are left out."""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

root = Path(__file__).resolve().parent.parent
PLAIN = ("bench",)

RUN = """
import sys, nbformat
from nbclient import NotebookClient
file, folder = sys.argv[1:]
nb = nbformat.read(file, as_version=4)
left_out = ("#| eval: false", "#| slow", "#| cuda")
nb.cells = [c for c in nb.cells if c.cell_type == "code" and not any(l.strip() in left_out for l in c.source.splitlines())]
NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
"""


def needs(notebook):
    "Extras and further packages in the installing cell of a notebook"
    cells = (''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
    for source in cells:
        if m := re.search(r"pip install \S+ 'newton_losses_nb\[([\w,]+)\] @ \S+'((?: [\w.-]+)*)", source): return tuple(m[1].split(',')), tuple(m[2].split())
    raise SystemExit(f"{notebook.name}: there is no cell that installs the package on Colab")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='*', help='names, such as core/00_splitting; default: all')
    p.add_argument('--env', type=Path, help='environment to use, made if it is not there; default: a temporary one')
    p.add_argument('--skip', nargs='*', default=[], help='names to leave out')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        env = (args.env or tmp/'env').absolute()
        if not env.exists(): venv.create(env, with_pip=True)
        python = env/('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
        pip = lambda *a: subprocess.run([python, '-m', 'pip', '-q', '--disable-pip-version-check', *map(str, a)], check=True)
        pip('wheel', '--no-deps', '-w', tmp, root)
        wheel, = tmp.glob('*.whl')
        pip('install', '--force-reinstall', '--no-deps', wheel)
        pip('install', f'{wheel}[{",".join(PLAIN)}]', 'nbclient', 'ipykernel')

        names = [n.removesuffix('.ipynb') for n in args.notebooks] or sorted(f.relative_to(root/'nbs').with_suffix('').as_posix() for f in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in f.parts)
        todo = sorted(((needs(root/'nbs'/f'{n}.ipynb'), n) for n in names if n not in args.skip), key=lambda o: (o[0] != (PLAIN, ()), len(o[0][1]), o[1]))
        script, failed = tmp/'run.py', []
        script.write_text(RUN, encoding='utf-8')
        for (extras, packages), name in todo:
            if (extras, packages) != (PLAIN, ()): pip('install', f'{wheel}[{",".join(extras)}]', *packages)
            folder, start = tmp/name, time.time()
            folder.mkdir(parents=True)
            done = subprocess.run([python, script, root/'nbs'/f'{name}.ipynb', folder], cwd=folder, capture_output=True, text=True, encoding='utf-8', errors='replace',
                                  env=os.environ | {'MPLBACKEND': 'agg', 'PYTHONPATH': '', 'PYTHONUTF8': '1'})
            print(f"{'ok    ' if done.returncode == 0 else 'FAILED'} {time.time() - start:5.0f} s  {name}", flush=True)
            if done.returncode:
                failed.append(name)
                print('\n'.join(done.stderr.splitlines()[-25:]), flush=True)
    if failed: sys.exit(f"failed: {', '.join(failed)}")


if __name__ == '__main__': main()
