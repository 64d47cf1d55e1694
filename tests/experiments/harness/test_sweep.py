"""Sweeps: grids, programs, parts that fit the memory; a swept point equals its own run."""

import dataclasses
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rollax.experiments.bandpo import STUDY as BANDPO
from rollax.experiments.bandpo import configs_of
from rollax.experiments.harness import sweep
from rollax.experiments.harness.loop import run, stack, vectorize
from rollax.experiments.harness.run_folder import RunFolder

spec = importlib.util.spec_from_file_location("toy_study", Path(__file__).parent / "toy_study.py")
toy = importlib.util.module_from_spec(spec)
sys.modules["toy_study"] = toy
spec.loader.exec_module(toy)

CONFIG = toy.Config()


@dataclasses.dataclass(frozen=True)
class Kinds(toy.Config):
    flag: bool = False
    arms: tuple[str, ...] = ()
    limit: float | None = None


@pytest.mark.parametrize(
    ("field", "word", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("width", "7", 7),
        ("flag", "true", True),
        ("flag", "False", False),
        ("arms", "clip+band_kl", ("clip", "band_kl")),
        ("limit", "2.5", 2.5),
    ],
)
def test_values_have_the_type_of_their_field(field, word, value):
    values, config = sweep.with_values(Kinds(), {field: word})
    assert values == {field: value}
    assert getattr(config, field) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr"], r"grid: expected a form like delta=0.01,0.02, got 'lr'"),
        (["lr=0.1,"], r"grid: expected a form like .*got 'lr=0.1,'"),
        (["rl=0.1"], r"grid: expected one of the fields seeds, .*lr.*, got 'rl'"),
        (["runs=a,b"], r"grid: expected one of the fields"),
        (["seeds=1,2"], r"grid: seeds are no axis"),
        (["lr=0.1", "lr=0.2"], r"grid: expected each field once, got lr twice"),
    ],
)
def test_a_bad_grid(words, message):
    with pytest.raises(ValueError, match=message):
        sweep.parse_grid(words, CONFIG)


def test_a_bad_value_in_a_grid():
    for words, message in (
        ({"width": "x"}, "grid: width expects int, got 'x'"),
        ({"lr": "-1"}, "lr: expected at least"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep.with_values(CONFIG, words)
    with pytest.raises(ValueError, match="grid: flag expects true or false, got '1'"):
        sweep.with_values(Kinds(), {"flag": "1"})


def test_traced_fields_share_a_program_and_zeros_do_not():
    grid = sweep.parse_grid(["lr=0.1,0.2", "noise=0,0.1,0.3", "width=2,3"], CONFIG)
    points = sweep.points_of({"toy": CONFIG}, grid)
    assert [point.values for point in points[:2]] == [
        {"lr": 0.1, "noise": 0.0, "width": 2},
        {"lr": 0.1, "noise": 0.0, "width": 3},
    ]
    programs = sweep.programs_of(toy.STUDY, points)
    assert sorted(map(len, programs)) == [2, 2, 4, 4]  # widths and whether there is noise
    assert len({point.name for program in programs for point in program}) == 12


def test_what_a_study_calls_traced_leaves_its_program_alone():
    """The contract of `Study.traced`, of BandPO: rows differ, the compiled program does not."""
    base = ["--model", "tabular", "--updates", "2", "--chunk", "1", "--arms", "clip", "band_kl", "dppo_tv"]
    (config,) = configs_of(base).values()

    def text(config):
        build = BANDPO.build(config)
        numbers, state = stack(build.rows), jax.eval_shape(build.train.init, jax.random.key(0))
        one = jax.tree.map(lambda x: x[0], numbers)
        return jax.jit(build.train.advance).lower(state, one).as_text(), numbers

    before, numbers = text(config)
    changed = {field: 1.5 * getattr(config, field) for field in BANDPO.traced if getattr(config, field)}
    after, others = text(dataclasses.replace(config, **changed))
    assert before == after
    assert len(changed) >= 8
    for field in changed:
        assert (getattr(numbers, field) != getattr(others, field)).all(), field


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three points in one program, and in parts of two, the last of which is filled up."""
    root = tmp_path_factory.mktemp("swept")
    config = toy.Config(runs=str(root), width=1000, mesh="data=1")
    points = sweep.points_of({"toy": config}, sweep.parse_grid(["lr=0.1,0.2,0.3", "noise=0.05"], config))
    for name, memory in (("whole", 0.0), ("parts", needed(points[:2]) * 1.1 / 2**30)):
        RunFolder("toy_study", dataclasses.replace(config, name=name), {}).close()
        sweep.train_points(toy.STUDY, points, root / "toy_study" / name, memory)
    return root / "toy_study", points


def needed(points):
    program = sweep.program_of(points, {point.name: toy.build(point.config) for point in points}, points[0].config)
    return max(map(sweep.bytes_of, sweep.compiled(program, points[0].config)))


def test_a_point_equals_its_own_run(swept, tmp_path):
    folder, points = swept
    config = dataclasses.replace(points[2].config, runs=str(tmp_path), name="alone")
    build = toy.build(config)
    alone = RunFolder("toy_study", config, {})
    results, _ = run(vectorize(build.train, build.rows, range(4)), "toy", config.updates, alone, config)
    found = sweep.outcome(folder / "whole", points[2])
    for row, columns in sweep.summary(toy.STUDY, results)["rows"].items():
        np.testing.assert_allclose(found["rows"][row]["reward"], columns["reward"], rtol=1e-5)
    assert {claim["name"] for claim in found["claims"]} == {"T1"}


def test_parts_that_fit_the_memory_give_the_same(swept):
    folder, points = swept
    assert len(list((folder / "whole").glob("programs/*/history/*"))) == 1
    assert len(list((folder / "parts").glob("programs/*/history/*"))) == 2
    for point in points:
        whole, part = (sweep.outcome(folder / name, point) for name in ("whole", "parts"))
        np.testing.assert_allclose(whole["held_out"]["lazy"]["reward"], part["held_out"]["lazy"]["reward"], rtol=1e-5)
        assert set(part["rows"]) == {"plain", "lazy"}


def test_a_point_that_fits_nowhere(swept, tmp_path):
    _, points = swept
    (tmp_path / "toy_study" / "none").mkdir(parents=True)
    config = dataclasses.replace(points[0].config, runs=str(tmp_path))
    point = points[0]._replace(config=config)
    sweep.train_points(toy.STUDY, [point], tmp_path / "toy_study" / "none", 1e-9)
    found = sweep.outcome(tmp_path / "toy_study" / "none", point)
    assert found["error"].startswith("ValueError: memory: expected a point to need at most (in GiB) 1e-09, got")
    assert "Traceback" in found["traceback"]


def test_finished_points_do_not_run_again_and_failed_ones_do(tmp_path):
    config = toy.Config(runs=str(tmp_path))
    points = sweep.points_of({"toy": config}, sweep.parse_grid(["lr=0.1,0.2,0.3"], config))
    folder = tmp_path / "toy_study" / "s"
    folder.mkdir(parents=True)

    def build(config):
        if config.lr == 0.2:
            raise ValueError("a file is missing")
        return toy.build(config)

    sweep.train_points(toy.STUDY._replace(build=build), points, folder)
    assert [sweep.finished(folder, point) for point in points] == [True, False, True]
    assert "a file is missing" in sweep.outcome(folder, points[1])["error"]
    stamps = {point.name: sweep.point_path(folder, point).stat().st_mtime_ns for point in points}
    sweep.train_points(toy.STUDY, points, folder)  # the file is there again
    again = {point.name: sweep.point_path(folder, point).stat().st_mtime_ns for point in points}
    assert [again[p.name] != stamps[p.name] for p in points] == [False, True, False]
    assert all(sweep.finished(folder, point) for point in points)


def test_an_interrupted_part_goes_on(tmp_path, monkeypatch):
    """The first part is done, the second one stopped halfway: it goes on from its checkpoint, not from the start."""
    config = toy.Config(runs=str(tmp_path), width=1000, mesh="data=1", save_every=0.0)
    points = sweep.points_of({"toy": config}, sweep.parse_grid(["lr=0.1,0.2,0.3,0.4"], config))
    folder = tmp_path / "toy_study" / "s"
    RunFolder("toy_study", dataclasses.replace(config, name="s"), {}).close()
    memory = needed(points[:2]) * 1.1 / 2**30
    real, calls = sweep.run, []

    def stopped(program, label, *arguments, **options):
        calls.append(label)
        if len(calls) == 2:
            options["watch"] = lambda update, train, held_out: (
                os.kill(os.getpid(), signal.SIGTERM) if update == 6 else 0
            )
        return real(program, label, *arguments, **options)

    monkeypatch.setattr(sweep, "run", stopped)
    with pytest.raises(SystemExit):
        sweep.train_points(toy.STUDY, points, folder, memory)
    assert [sweep.finished(folder, point) for point in points] == [True, True, False, False]
    (early,) = folder.glob(f"programs/*/history/{calls[1]}/00000004.npz")
    before = early.stat().st_mtime_ns
    sweep.train_points(toy.STUDY, points, folder, memory)
    assert all(sweep.finished(folder, point) for point in points)
    assert early.stat().st_mtime_ns == before
    assert calls == [calls[0], calls[1], calls[1]]


def test_an_error_befalls_its_own_point(tmp_path):
    def column(results, row):
        values = results.held_out[row]["reward"][:, -1]
        if not np.isfinite(values).all():
            raise ValueError("no number")
        return values

    study = toy.STUDY._replace(columns={"reward": column})
    config = toy.Config(runs=str(tmp_path), updates=100, chunk=50)
    points = sweep.points_of({"toy": config}, sweep.parse_grid(["lr=0.1,50,0.2"], config))
    folder = tmp_path / "toy_study" / "s"
    folder.mkdir(parents=True)
    sweep.train_points(study, points, folder)
    assert [sweep.finished(folder, point) for point in points] == [True, False, True]
    assert "no number" in sweep.outcome(folder, points[1])["error"]


def test_a_damaged_point_runs_again(swept, tmp_path):
    _, points = swept
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "0000.json").write_text('{"values"')
    assert not sweep.finished(tmp_path, points[0])
    assert "it is damaged" in sweep.outcome(tmp_path, points[0])["error"]


def test_outcomes_are_whole_json(swept):
    folder, _ = swept
    for path in (folder / "whole" / "points").iterdir():
        found = json.loads(path.read_text())
        assert found["values"].keys() == {"lr", "noise"}
        assert found["evaluated_at"] == list(range(0, 13, 2))
