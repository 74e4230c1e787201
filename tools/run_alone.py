"""Every notebook alone, as on Colab: a new environment, the package from a built wheel, an empty folder, no repository.

    python tools/run_alone.py [NOTEBOOK ...] [--env DIR]

What a notebook needs beside `newton_losses_nb[bench]` is read from its installing cell. Cells marked `slow` or `cuda`
are left out."""
import argparse, json, os, re, subprocess, sys, tempfile, time, venv
from pathlib import Path

root = Path(__file__).resolve().parent.parent
PLAIN = ("bench",), ()
EXECUTE = "-c", "from nbclient.cli import main; main()", "--timeout=600", "--kernel_name=python3", "alone.ipynb"
LEFT_OUT = {"#| eval: false", "#| slow", "#| cuda"}

def needs(name):
    "Extras and further packages in the installing cell of a notebook"
    found = re.search(r"pip install \S+ 'newton_losses_nb\[([\w,]+)\] @ \S+'((?: [\w.-]+)*)",
                      (root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))
    if not found: sys.exit(f"{name}: there is no cell that installs the package on Colab")
    return tuple(found[1].split(",")), tuple(found[2].split())

def copy_of(name, folder):
    "The cells that run, in a notebook of its own"
    nb = json.loads((root/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))
    nb["cells"] = [c for c in nb["cells"] if c["cell_type"] == "code" and not LEFT_OUT & {l.strip() for l in c["source"]}]
    folder.mkdir(parents=True)
    (folder/"alone.ipynb").write_text(json.dumps(nb), encoding="utf-8")

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
    needed, failed = {n: needs(n) for n in names}, []
    for name in sorted(needed, key=lambda n: (needed[n] != PLAIN, len(needed[n][1]), n)):   # more is installed later
        extras, packages = needed[name]
        if needed[name] != PLAIN: pip("install", f"{wheel}[{','.join(extras)}]", *packages)
        start, alone = time.time(), os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": "", "PYTHONUTF8": "1"}
        copy_of(name, tmp/name)
        done = subprocess.run([python, *EXECUTE], cwd=tmp/name, env=alone, capture_output=True, encoding="utf-8", errors="replace")
        print(f"{'FAILED' if done.returncode else 'ok    '} {time.time() - start:5.0f} s  {name}", flush=True)
        if not done.returncode: continue
        failed.append(name)
        print("\n".join(done.stderr.splitlines()[-25:]), flush=True)
    if failed: sys.exit(f"failed: {', '.join(failed)}")

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebooks", nargs="*", help="names, such as core/00_splitting; default: all")
    p.add_argument("--env", type=Path, help="environment to use, made if it is not there; default: a temporary one")
    with tempfile.TemporaryDirectory() as tmp: main(p.parse_args(), Path(tmp))
