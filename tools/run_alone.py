"""Every notebook alone, as on Colab: a new environment, the package from a built wheel, an empty folder, no repository.

    python tools/run_alone.py [NOTEBOOK ...] [--env DIR] [--skip NOTEBOOK ...]

What a notebook needs beside `newton_losses_nb[bench]` is read from its installing cell. Cells marked `slow` or `cuda`
are left out."""
import argparse, json, os, re, subprocess, sys, tempfile, time, venv
from pathlib import Path

root = Path(__file__).resolve().parent.parent
PLAIN = ("bench",), ()

RUN = """
import sys, nbformat
from nbclient import NotebookClient
file, folder = sys.argv[1:]
nb = nbformat.read(file, as_version=4)
left_out = {"#| eval: false", "#| slow", "#| cuda"}
nb.cells = [c for c in nb.cells if c.cell_type == "code" and not left_out & set(map(str.strip, c.source.splitlines()))]
NotebookClient(nb, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
"""

def needs(notebook):
    "Extras and further packages in the installing cell of a notebook"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = re.search(r"pip install \S+ 'newton_losses_nb\[([\w,]+)\] @ \S+'((?: [\w.-]+)*)",
                      "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))
    if not found: raise SystemExit(f"{notebook.name}: there is no cell that installs the package on Colab")
    return tuple(found[1].split(",")), tuple(found[2].split())

def main(args, tmp):
    env = (args.env or tmp/"env").absolute()
    if not env.exists(): venv.create(env, with_pip=True)
    python = env/("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = lambda *a: subprocess.run([python, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, a)], check=True)
    pip("wheel", "--no-deps", "-w", tmp, root)
    wheel, = tmp.glob("*.whl")
    pip("install", "--force-reinstall", "--no-deps", wheel)
    pip("install", f"{wheel}[bench]", "nbclient", "ipykernel")
    every = (f.relative_to(root/"nbs") for f in sorted((root/"nbs").rglob("*.ipynb")))
    names = args.notebooks or [f.with_suffix("").as_posix() for f in every if ".ipynb_checkpoints" not in f.parts]
    needed = {n: needs(root/"nbs"/f"{n}.ipynb") for n in names if n not in args.skip}
    script, failed = tmp/"run.py", []
    script.write_text(RUN, encoding="utf-8")
    for name in sorted(needed, key=lambda n: (needed[n] != PLAIN, len(needed[n][1]), n)):   # more is installed later
        extras, packages = needed[name]
        if needed[name] != PLAIN: pip("install", f"{wheel}[{','.join(extras)}]", *packages)
        folder, start = tmp/name, time.time()
        folder.mkdir(parents=True)
        alone = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": "", "PYTHONUTF8": "1"}
        done = subprocess.run([python, script, root/"nbs"/f"{name}.ipynb", folder], cwd=folder, env=alone,
                              capture_output=True, text=True, encoding="utf-8", errors="replace")
        print(f"{'FAILED' if done.returncode else 'ok    '} {time.time() - start:5.0f} s  {name}", flush=True)
        if not done.returncode: continue
        failed.append(name)
        print("\n".join(done.stderr.splitlines()[-25:]), flush=True)
    if failed: sys.exit(f"failed: {', '.join(failed)}")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", help="names, such as core/00_splitting; default: all")
    p.add_argument("--env", type=Path, help="environment to use, made if it is not there; default: a temporary one")
    p.add_argument("--skip", nargs="*", default=[], help="names to leave out")
    with tempfile.TemporaryDirectory() as tmp: main(p.parse_args(), Path(tmp))
