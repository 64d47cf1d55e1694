"""The command `python -m rollax.experiments.sweep`: grids, searches, launchers, resume, one line for what is wrong."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollax.experiments import sweep

TOY = str(Path(__file__).parent / "harness" / "toy_study.py")


def points(folder):
    return {path.stem: json.loads(path.read_text()) for path in (folder / "points").glob("[0-9]*.json")}


def test_a_grid(tmp_path, capsys):
    argv = [TOY, "--grid", "lr=0.1,0.3", "noise=0.1,0.2", "--runs", str(tmp_path), "--name", "s"]
    sweep.main(argv)
    folder = tmp_path / "toy_study" / "s"
    assert len(points(folder)) == 4
    assert {tuple(found["values"].values()) for found in points(folder).values()} == {
        (lr, noise) for lr in (0.1, 0.3) for noise in (0.1, 0.2)
    }
    said = capsys.readouterr().out
    assert "4 points in 1 programs" in said
    assert "confirm it with other seeds" in said
    assert (folder / "report.html").exists()
    assert (folder / "map_toy_0.png").exists()
    before = (folder / "points" / "0000.json").stat().st_mtime_ns
    sweep.main([*argv, "--resume"])
    assert "0 to run" in capsys.readouterr().out
    assert (folder / "points" / "0000.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        sweep.main([*argv[:2], "lr=0.1,0.4", *argv[3:], "--resume"])
    assert "has another configuration: grid was" in capsys.readouterr().err


def test_failed_points_are_listed(tmp_path, capsys):
    argv = [TOY, "--grid", "lr=0.1,0.3", "--fail-at", "0.3", "--runs", str(tmp_path), "--name", "s"]
    with pytest.raises(SystemExit) as stop:
        sweep.main(argv)
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "point 0001 (lr=0.3): ValueError: fail_at: told to fail" in said.err
    assert "1 of 2 points are not finished" in said.out
    assert json.loads((tmp_path / "toy_study" / "s" / "results.json").read_text())["0001"]["error"]


@pytest.mark.parametrize(
    ("launcher", "chunks"),
    [
        (["--workers", "2"], (2, 4)),
        pytest.param(
            ["--launcher", "slurm", "--slurm", "cluster=local", "timeout_min=5"], (2,), marks=pytest.mark.slow
        ),
        pytest.param(["--launcher", "ray"], (2, 4), marks=pytest.mark.slow),
    ],
    ids=("workers", "slurm", "ray"),
)
def test_launchers_run_a_process_for_each_program(tmp_path, launcher, chunks):
    """A static field makes the programs two, which evaluate at different times; the report shows both."""
    pytest.importorskip({"slurm": "submitit", "ray": "ray"}.get(launcher[1], "jax"))
    grid = ["lr=0.1,0.3", "chunk=" + ",".join(map(str, chunks))]
    sweep.main([TOY, "--grid", *grid, "--runs", str(tmp_path), "--name", "s", *launcher])
    folder = tmp_path / "toy_study" / "s"
    assert len(points(folder)) == 2 * len(chunks)
    assert not any("error" in found for found in points(folder).values())
    assert sorted(path.name for path in (folder / "jobs").iterdir()) == ["000.txt", "001.txt"][: len(chunks)]
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_a_search_with_two_workers_and_pruning(tmp_path, capsys):
    optuna = pytest.importorskip("optuna")
    argv = [TOY, "--grid", "lr=1e-3..1:log", "noise=0.05,0.1", "--search", "tpe", "--trials", "12", "--updates", "20"]
    argv += ["--runs", str(tmp_path), "--name", "s", "--workers", "2"]
    sweep.main(argv)
    folder = tmp_path / "toy_study" / "s"
    trials = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'optuna.db'}").trials
    kinds = [trial.state.name for trial in trials]
    assert 12 <= kinds.count("COMPLETE") + kinds.count("PRUNED") <= 13
    assert kinds.count("PRUNED") > 0
    for trial in trials:
        found = points(folder)[f"{trial.number:04d}"]
        assert found["values"]["lr"] == pytest.approx(trial.params["lr"])
        assert found["pruned"] == (trial.state.name == "PRUNED")
        assert len(trial.intermediate_values) == len(found["evaluated_at"]) - 1
    best = max((t for t in trials if t.state.name == "COMPLETE"), key=lambda t: t.value)
    assert points(folder)[f"{best.number:04d}"]["value"] == best.value
    assert best.params["lr"] > 0.05  # small steps do not arrive
    assert "updates" in capsys.readouterr().out
    sweep.main([*argv, "--resume"])  # all done: nothing more runs
    assert len(optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / 'optuna.db'}").trials) == len(trials)


@pytest.mark.slow  # harness/test_sweep.py interrupts one in process, harness/test_loop.py kills a run
def test_a_killed_sweep_resumes(tmp_path):
    argv = [TOY, "--grid", "lr=0.1,0.3", "--updates", "4000", "--save-every", "0", "--runs", str(tmp_path)]
    command = [sys.executable, "-m", "rollax.experiments.sweep", *argv, "--name", "s"]
    folder = tmp_path / "toy_study" / "s"
    for kill in (True, False):
        process = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        begun = time.monotonic()
        while len(list(folder.glob("programs/*/history/*/[0-9]*.npz"))) < (10 if kill else 30):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() - begun < 60
            time.sleep(0.01)
        if kill:
            (early,) = folder.glob("programs/*/history/*/00000004.npz")
            before = early.stat().st_mtime_ns
        process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "goes on" in said
    steps = [int(path.name) for path in folder.glob("programs/*/checkpoints/*/[0-9]*")]
    assert max(steps) >= 50
    assert early.stat().st_mtime_ns == before  # the second process went on from the first one's checkpoint


def test_diverged_points_come_last(tmp_path, capsys):
    argv = [TOY, "--grid", "lr=0.1,50,0.3", "--updates", "100", "--chunk", "50", "--runs", str(tmp_path), "--name", "s"]
    sweep.main(argv)
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " plain " in f"{line} "]
    assert lines == ["0.3", "0.1", "50"]


def test_a_range_of_a_float_field_gives_floats(tmp_path):
    pytest.importorskip("optuna")
    argv = [TOY, "--grid", "lr=0..1", "--search", "random", "--trials", "3", "--runs", str(tmp_path), "--name", "s"]
    sweep.main(argv)
    values = [found["values"]["lr"] for found in points(tmp_path / "toy_study" / "s").values()]
    assert len(values) >= 3 and all(0 < value < 1 for value in values)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["chess", "--grid", "lr=0.1"], "study: expected one of bandpo"),
        ([TOY], "grid: expected FIELD=VALUE,VALUE ..., got nothing to sweep"),
        ([TOY, "--grid", "rl=1"], "grid: expected one of the fields seeds"),
        ([TOY, "--grid", "lr=x"], "grid: lr expects float, got 'x'"),
        ([TOY, "--grid", "lr=0.1", "--lr", "x"], "--lr"),
        ([TOY, "--grid", "lr=0.1", "--foo", "1"], "--foo"),
        ([TOY, "--grid", "lr=0.1", "--launcher", "cloud"], "launcher: expected one of local, ray, slurm, got 'cloud'"),
        ([TOY, "--grid", "lr=0.1", "--workers", "0"], "workers: expected at least 1, got 0"),
        ([TOY, "--grid", "lr=0.1..0.01", "--search", "tpe"], "grid: lr expects a range like 1e-4..1e-2:log"),
        ([TOY, "--grid", "lr=0.01..0.1", "--search", "magic"], "search: expected one of tpe, random, qmc, got 'magic'"),
        (
            [TOY, "--grid", "lr=0.1..0.2", "--search", "tpe", "--metric", "joy"],
            "metric: expected one of reward, got 'joy'",
        ),
        ([TOY, "--grid", "lr=0.1..0.2", "--search", "tpe", "--row", "king"], "row: expected one of plain, lazy"),
        ([TOY, "--grid", "width=0.5..3", "--search", "tpe"], "grid: width expects a range like"),
        ([TOY, "--grid", "lr=0.1,0.2", "--metric", "glory"], "metric: expected one of reward, got 'glory'"),
        ([TOY, "--grid", "lr=0.1,0.2", "--row", "king"], "row: expected one of plain, lazy, got 'king'"),
        ([TOY, "--grid", "lr=0.1,0.2", "--mesh", "data=3"], "mesh: expected a number of devices that divides 4 seeds"),
        ([TOY, "--grid", "lr=0.1,0.2", "--runs", "/dev/null/x"], "runs: cannot write /dev/null/x"),
        (
            ["bandpo", "--grid", "lr=0.1..0.2", "--search", "tpe"],
            "search: expected one configuration, got tabular, tra",
        ),
    ],
)
def test_what_is_wrong_gets_one_line(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        sweep.main([*argv[:1], "--runs", str(tmp_path), *argv[1:]])
    assert stop.value.code in (1, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert words in said[-1] or words in said[0], said
    assert len(said) <= 2


def test_a_missing_engine_gets_one_line(tmp_path, capsys, monkeypatch):
    for module, launcher in (("ray", "ray"), ("submitit", "slurm")):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setitem(sys.modules, module, None)
            argv = [TOY, "--grid", "lr=0.1,0.2", "--launcher", launcher, "--runs", str(tmp_path), "--name", module]
            sweep.main(argv)
        assert stop.value.code == 2
        assert f"launcher: {module} is not installed: pip install" in capsys.readouterr().err
