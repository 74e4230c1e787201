"""Commands: those of the notebooks are understood, a setting is one line, a dry run only tells, a report is about all that lies there."""
import argparse
import json
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import pytest

from newton_losses_nb.lab import cli
from newton_losses_nb.lab.experiment import setting
from newton_losses_nb.lab.records import run_key
from newton_losses_nb.lab.report import conclusion
from newton_losses_nb.lab.tasks import Sorting, sorting_config

ROOT = Path(__file__).resolve().parent.parent

def commands():
    "Every `nl_bench ...` line in a block of shell commands, of notebooks and README"
    texts = [(ROOT/"README.md").read_text(encoding="utf-8")]
    for p in sorted((ROOT/"nbs").rglob("*.ipynb")):
        texts += ["".join(c["source"]) for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"]
    blocks = [b for t in texts for b in re.findall(r"```sh\n(.*?)```", t, re.S)]
    lines = [line for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    found = [line[line.index("nl_bench"):].split("#")[0] for line in lines if "nl_bench " in line]
    return sorted({" ".join(o.split()) for o in found})

@pytest.mark.parametrize("line", commands())
def test_commands_of_the_notebooks(line):
    "Parsed by the parser of the command, and its settings checked"
    args = vars(cli._parser().parse_args(shlex.split(line)[1:]))
    name = args.pop("name")
    bench = cli.benches()[name]
    assert bench.options(**cli._pick(bench.options, args)[0])
    same, lists = cli._pick(bench.settings, args)
    assert bench.settings.grid(same | ({"train": 55_000} if name == "classification" else {}), **lists)

def test_there_are_commands(): assert len(commands()) > 8

@dataclass
class Smoothed(Sorting):
    "With one setting more"
    smooth:float = setting(0., "Share of the label that goes to all")

def test_a_new_setting_is_one_line():
    "An option with help, an entry of the configuration; runs without it keep their keys"
    assert Smoothed.config() == sorting_config() and run_key(Smoothed.config(), "x") == run_key(sorting_config(), "x")
    assert Smoothed.config(smooth=.1) == sorting_config() | {"smooth": .1}
    p = argparse.ArgumentParser()
    for kind in (Smoothed, cli.Options): cli._add(p, kind)
    assert "Share of the label that goes to all (default: 0.0)" in " ".join(p.format_help().split())
    assert p.parse_args(["--smooth", "1"]).smooth == "1" and Smoothed.config(smooth="0.50") == Smoothed.config(smooth=.5)
    with pytest.raises(ValueError, match="smooth: expected a finite number"): Smoothed.config(smooth="much")

@pytest.mark.parametrize("name", ["sorting", "paths", "classification"])
def test_every_setting_has_a_document_and_a_default(name):
    bench = cli.benches()[name]
    p = argparse.ArgumentParser()
    for kind in (bench.settings, bench.options): cli._add(p, kind)
    help_text = p.format_help()
    for f in [*fields(bench.settings), *fields(bench.options)]:
        assert len(f.metadata["help"]) > 5
        if f.metadata["option"] != "": assert "--" + (f.metadata["option"] or f.name).replace("_", "-") in help_text

TINY = ["sorting", "--relaxations", "neural_sort", "--methods", "none,whiten", "--seeds", "2", "--steps", "2", "--batch", "4", "--eval-sets", "10"]

def test_dry_run_and_report_of_all(tmp_path, capsys):
    "A dry run says what is left and writes nothing; a report of part of the runs is about the whole folder"
    out = tmp_path/"runs"
    assert cli.nl_bench([*TINY, "--out", str(out), "--dry-run"]) == 0 and not out.exists()
    assert "4 runs on" in (said := capsys.readouterr().out) and "0 finished" in said and "2  neural_sort, whiten" in said
    assert cli.nl_bench([*TINY, "--out", str(out)]) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert cli.nl_bench([*TINY, "--out", str(out), "--dry-run"]) == 0
    assert "4 finished" in capsys.readouterr().out and {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert cli.nl_bench([*TINY, "--methods", "whiten", "--out", str(out)]) == 0
    table = (out/"report"/"table.md").read_text()
    assert "| none" in table and "| whiten" in table and "comparison with the plain loss" in table

def test_conclusion():
    rows = [dict(setting="a", method="none"), dict(setting="a", method="clip", pairs=3, diff=-1., lo=-2., hi=0., p=.2, p_holm=.2),
            dict(setting="a", method="rms", pairs=3, diff=-3., lo=-4., hi=-2., p=.001, p_holm=.002)]
    said = conclusion(pd.DataFrame([r | dict(failed=0) for r in rows]))
    assert said.startswith("2 comparisons with the plain loss, 1 significant") and "no gain; largest loss" in said
    assert "largest loss: a, rms (-3.00 points, interval -4.00 to -2.00)" in said and "few seeds decide nothing" in said

@pytest.mark.parametrize("line, says", [
    ("sorting --seeds 3-1", "seeds: expected ranges upwards, got 3-1"), ("sorting --relaxations ,", "relaxations: expected at least one"),
    ("paths --samples ,", "samples: expected at least one"), ("sorting --comparators foo", "comparators: expected one of odd_even, bitonic"),
    ("sorting --loss mse", "loss: expected one of bce, cross_entropy, bce_clamped"), ("sorting --steps ²", "steps: expected a whole number, at least 1, got '²'"),
    ("sorting --seeds 99999999999999999999,", "seed: expected a whole number, at least 0 and below 9.0072e+15, got 99999999999999999999"), ("paths --size 1 --dry-run", "size: expected a whole number, at least 2"),
    ("sorting --out=", "out: expected a value, got ''"), ("sorting --data-dir=", "data_dir: expected a value, got ''")])
def test_the_option_that_is_wrong_is_named(line, says, capsys):
    assert cli.nl_bench(line.split()) == 2
    assert f"nl_bench: {says}" in capsys.readouterr().err

def test_files_that_hold_no_runs(tmp_path, capsys):
    "No advice to delete what is whole; of runs without percentages it is said what is missing"
    file = tmp_path/"other.jsonl"
    for text, says in (('{"a": 1}\n', "is this a file of runs?"), ("{broken\n", "delete that line: its run will be repeated")):
        file.write_text(text)
        assert cli.nl_report([str(tmp_path)]) == 2 and says in capsys.readouterr().err
    assert cli.nl_report([str(ROOT/"nbs"/"results"/"check_cpu")]) == 2 and "got runs without any" in capsys.readouterr().err

def test_a_dry_run_counts_failed_runs(tmp_path, capsys):
    out = tmp_path/"runs"
    assert cli.nl_bench([*TINY, "--out", str(out)]) == 0
    file = next(out.glob("*.jsonl"))
    first, *others = map(json.loads, file.read_text().splitlines())
    file.write_text("".join(json.dumps(r) + "\n" for r in (first | dict(status="failed", error="killed", result=None), *others)))
    capsys.readouterr()
    assert cli.nl_bench([*TINY, "--out", str(out), "--dry-run"]) == 0
    assert f"{1 + len(others)} finished (1 of them failed) in {out}, 0 to run" in capsys.readouterr().out

def test_a_dry_run_after_a_kill(tmp_path, capsys):
    "A file that is still empty has no runs; a rule of stored records is refused before anything runs"
    (tmp_path/"sorting.jsonl").touch()
    few = ["sorting", "--relaxations", "cauchy", "--methods", "none,fisher", "--seeds", "2", "--out", str(tmp_path), "--dry-run"]
    assert cli.nl_bench(few) == 0
    assert "0 finished" in (out := capsys.readouterr().out) and "4 to run" in out
    (tmp_path/"sorting.jsonl").write_text('{"format": 1, "key')
    assert cli.nl_bench(few) == 0 and "0 finished" in capsys.readouterr().out
    assert cli.nl_bench([*few, "--lam", "geometric"]) == 2
    assert "expected a rule that is still there, typical or auto, got geometric" in capsys.readouterr().err
    for lam in ("auto", "typical"):
        assert cli.nl_bench([*few, "--lam", lam]) == 0
        assert ("auto is the rule of version 0.1" in capsys.readouterr().out) == (lam == "auto")

@pytest.mark.parametrize("given, said", [("--seeds 5-3,1", "seeds: expected ranges upwards, got 5-3"), ("--n 99999999999999999999", "below 9.0072e+15"),
                                         ("--batch 1000000000000000 --seeds 1 --methods none --relaxations neural_sort --engine local", "not enough memory for a batch")])
def test_what_cannot_be_is_a_sentence(given, said, tmp_path, capsys):
    assert cli.nl_bench(["sorting", *given.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("nl_bench: ") and said in error and "Traceback" not in error
