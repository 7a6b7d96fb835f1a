"""The command line: readable in every encoding, one line for what is wrong, and no verdict of a finished run lost."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import samsde
from samsde import cli
from samsde.experiments.experiment import Experiment, Verdict, Verdicts

ROOT = Path(samsde.__file__).parent.parent
QUICK = ["--quick", "--problem", "quadratic", "--algorithm", "SAM", "--rho", "0", "0.2"]


def samsde_(*words, cwd, redirect="", **env):
    """`python -m samsde reproduce` in a shell, in an empty folder"""
    command = f'"{sys.executable}" -m samsde reproduce "$@" {redirect}'
    env = os.environ | dict(PYTHONPATH=str(ROOT)) | env
    return subprocess.run(
        ["bash", "-c", command, "bash", *words], cwd=cwd, env=env, capture_output=True, timeout=120
    )


@pytest.mark.parametrize(
    "encoding, rho",
    [
        ("ascii", "rho"),
        ("cp1252", "rho"),
        ("latin-1", "rho"),
        ("cp437", "rho"),
        ("utf-8", "ρ"),
        ("utf-16", "ρ"),
    ],
)
def test_every_encoding(tmp_path, encoding, rho):
    done = samsde_("--list", cwd=tmp_path, PYTHONIOENCODING=encoding)
    said = done.stdout.decode(encoding)
    assert done.returncode == 0 and not done.stderr and f"as {rho} grows" in said
    assert (
        all(name in said for name in cli.EXPERIMENTS)
        and "?" in said
        and not list(tmp_path.iterdir())
    )


def fake(
    name="fake",
    question="is ρ < ½√η?",
    measure=lambda **how: pd.DataFrame(dict(value=[1.0, 2.0])),
    verdicts=None,
):
    """An experiment that takes no time"""

    def judged(table):
        return Verdicts([Verdict("ρ grows.", "holds", f"{table['value'].sum():g} ± 0.1")])

    return Experiment(
        name, question, measure, lambda table: table.plot().figure, verdicts or judged, "no time"
    )


@pytest.fixture
def experiments(monkeypatch):
    """Two experiments that take no time, in place of the others"""
    found = {name: fake(name) for name in ("error_vs_rho", "second")}
    monkeypatch.setattr(cli, "EXPERIMENTS", found)
    return found


def test_three_files(experiments, tmp_path, capsys):
    assert cli.main(["reproduce", "all", "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        f"{n}.{kind}" for n in experiments for kind in ("csv", "png", "txt")
    ]
    for name in experiments:
        assert (tmp_path / "new" / f"{name}.txt").read_text(encoding="utf-8").strip() in said
    assert "ρ grows.\n  HOLDS: 3 ± 0.1" in said


BREAKS = {"a closed pipe": "| true", "a full disk": "> /dev/full"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("redirect", BREAKS.values(), ids=BREAKS)
def test_verdicts_that_cannot_be_printed_are_in_a_file(tmp_path, redirect):
    done = samsde_(
        *QUICK,
        cwd=tmp_path,
        redirect=f"{redirect}; exit ${{PIPESTATUS[0]}}",
        PYTHONIOENCODING="ascii",
    )
    error = [
        line for line in done.stderr.decode().splitlines() if line.startswith("samsde: ")
    ]  # matplotlib may warn as well
    assert (
        done.returncode == 1
        and len(error) == 1
        and error[0].startswith("samsde: stdout cannot be written to (")
    )
    assert "the verdicts are in results/error_vs_rho.txt" in error[0]
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [
        "error_vs_rho.csv",
        "error_vs_rho.png",
        "error_vs_rho.txt",
    ]
    assert "HOLD" in (tmp_path / "results" / "error_vs_rho.txt").read_text(encoding="utf-8")


def test_the_first_lines_of_a_list(tmp_path):
    done = samsde_("--list", cwd=tmp_path, redirect="| head -1")
    assert (
        done.stdout.decode().startswith("error_vs_rho")
        and b"Traceback" not in done.stderr
        and b"ignored" not in done.stderr
    )


@pytest.mark.parametrize("option", ["--list", "--help"])
def test_a_terminal_of_80_columns(tmp_path, option):
    """No line is wider, and what goes on in the next is set in."""
    lines = samsde_(option, cwd=tmp_path, COLUMNS="80").stdout.decode().splitlines()
    assert max(map(len, lines)) < 80
    if option == "--list":
        assert [line.split()[0] for line in lines if line[0] != " "] == list(cli.EXPERIMENTS)
        assert len(lines) > len(cli.EXPERIMENTS)


def test_results_that_cannot_be_written_are_printed(experiments, tmp_path, monkeypatch, capsys):
    """A disk that is full when the work is done: verdicts and table are on stdout."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(["reproduce", "--out", str(tmp_path / "new")]) == 1
    said = capsys.readouterr()
    assert (
        "HOLDS: 3 ± 0.1" in said.out
        and "value\n1.0\n2.0" in said.out
        and "No space left" in said.err
    )
    assert not list((tmp_path / "new").iterdir())


def test_a_picture_that_fails_leaves_the_table(experiments, tmp_path):
    def spoiled(table):
        raise ValueError("no picture")

    experiments["error_vs_rho"] = dataclasses.replace(fake("error_vs_rho"), plot=spoiled)
    assert cli.main(["reproduce", "--out", str(tmp_path)]) == 1
    assert (
        pd.read_csv(tmp_path / "error_vs_rho.csv")["value"].tolist() == [1, 2]
        and len(list(tmp_path.iterdir())) == 1
    )


def test_checkpoints_are_kept_until_all_is_written(experiments, tmp_path):
    """An experiment that keeps some gets a folder of its own for each setting, which stays when it is interrupted."""
    given = []

    def measure(checkpoints=None, **how):
        given.append(checkpoints)
        checkpoints.mkdir(exist_ok=True)
        if len(given) == 1:
            raise KeyboardInterrupt
        return fake().measure()

    experiments["error_vs_rho"] = fake("error_vs_rho", measure=measure)
    assert cli.main(["reproduce", "--out", str(tmp_path)]) == 130 and given[0].is_dir()
    assert cli.main(["reproduce", "--out", str(tmp_path), "--seed", "1"]) == 0
    assert given[0].is_dir() and not given[1].exists() and given[0] != given[1]
    assert cli.main(["reproduce", "--out", str(tmp_path)]) == 0 and given[2] == given[0]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".png", ".txt"]


def test_results_behind_a_link(experiments, tmp_path):
    """What it leads to is written, also where that is not there yet; the link stays."""
    (tmp_path / "target.csv").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "error_vs_rho.csv").symlink_to(tmp_path / "target.csv")
    (tmp_path / "out" / "error_vs_rho.txt").symlink_to(tmp_path / "target.txt")
    assert cli.main(["reproduce", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "error_vs_rho.csv").is_symlink() and "value" in (
        tmp_path / "target.csv"
    ).read_text()
    assert "HOLDS" in (tmp_path / "target.txt").read_text(encoding="utf-8")


def test_a_folder_behind_a_link(experiments, tmp_path):
    """Also where it is not there yet."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert cli.main(["reproduce", "--out", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and len(list((tmp_path / "target").iterdir())) == 3


BAD = {  # options -> exit status, words
    "--eta 1e-320": (2, "eta must be at least 1e-12, got 1e-320"),
    "--eta 1e-310": (2, "eta must be at least"),
    "--eta 1e400": (2, "eta must be positive and finite"),
    "--eta 1e300": (1, "eta must be at most the time of a run"),
    "--rho 1e400": (2, "rho must be non-negative and finite"),
    "--rho -0.5": (2, "rho must be non-negative"),
    "--runs 1000000000000000000000000000000": (2, "runs must be at most 1000000000"),
    "--runs " + "9" * 5000: (2, "runs must be at most"),
    "--runs ²": (2, "runs must be a whole number"),
    "--runs -5": (2, "runs must be a whole number of at least 3"),
    "--seed 1000000000000000000000000000000": (2, "seed must be at most"),
    "--seed 1e3": (2, "seed must be a whole number"),
    "--dtype float16": (2, "invalid choice: 'float16'"),
    "--device nonsense": (2, "device must be one that torch sees here"),
    "--device cuda:99": (2, "device must be"),
    "--device xla": (2, "device must be"),
    "--device hpu": (2, "device must be"),
    "--device 7": (2, "device must be"),
    "--device EMPTY": (2, "device must be"),
    "--out EMPTY": (2, "out must name a folder"),
    "--out file": (1, "Not a directory"),
    "--out file/results": (1, "Not a directory"),
}


@pytest.mark.parametrize("words", BAD, ids=lambda words: words[:40])
def test_one_line(words, tmp_path, monkeypatch, capsys):
    """What is wrong is said in one line, and nothing is left behind."""
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "error_vs_rho.csv").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    status, message = BAD[words]
    option, value = words.split()
    try:
        found = cli.main(
            [
                "reproduce",
                "--quick",
                "--problem",
                "quadratic",
                "--algorithm",
                "SAM",
                option,
                "" if value == "EMPTY" else value,
            ]
        )
    except SystemExit as stop:
        found = stop.code
    error = capsys.readouterr().err
    assert found == status and message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs this may be root
    assert cli.main(["reproduce", "--out", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == f"samsde: Permission denied: {tmp_path}\n" and not list(
        tmp_path.iterdir()
    )


def test_a_nonsensical_backend(tmp_path):
    done = samsde_(*QUICK, cwd=tmp_path, MPLBACKEND="nonsense")
    error = done.stderr.decode()
    assert (
        done.returncode == 1
        and "'nonsense' is not a valid value for backend" in error
        and error.count("\n") == 1
    )
    assert not list(tmp_path.iterdir())


def test_a_line_for_each_problem_where_there_is_no_terminal(tmp_path):
    done = samsde_(
        "--quick",
        "--problem",
        "quadratic",
        "iris-linear",
        "--algorithm",
        "SAM",
        "--rho",
        "0",
        "0.2",
        cwd=tmp_path,
    )
    lines = [line for line in done.stderr.decode().splitlines() if " is done, " in line]
    assert done.returncode == 0 and [line.partition(",")[0] for line in lines] == [
        "quadratic is done",
        "iris-linear is done",
    ], done.stderr
    assert "1 of 2, about" in lines[0] and "2 of 2, about 0 s left" in lines[1]
