"""The harness: verdicts, run folders, command line, tables."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from rollax.experiments.harness.claims import Claim, judge, mean_interval
from rollax.experiments.harness.figures import Panel, interval, save_panels
from rollax.experiments.harness.language_task import parse_mesh, shared_length
from rollax.experiments.harness.loop import Results, early, final, gap, late, merge
from rollax.experiments.harness.report import cell, markdown, verdict_lines
from rollax.experiments.harness.run import RunFolder, first_message, parse, plain

VALUES = np.array([0.1, 0.3, 0.2, 0.25, 0.15])  # mean 0.2, t interval [0.102, 0.298]


def test_interval_is_students():
    mean, low, high = mean_interval(VALUES)
    expected = stats.ttest_1samp(VALUES, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose([mean, low, high], [VALUES.mean(), expected.low, expected.high])
    assert mean_interval(np.array([1.0])) == (1.0, -np.inf, np.inf)
    assert mean_interval(np.ones(4)) == (1.0, 1.0, 1.0)
    center, half = interval(np.stack([VALUES, VALUES + 1], axis=1))
    np.testing.assert_allclose(center - half, [low, low + 1])


@pytest.mark.parametrize(
    ("says", "bound", "verdict"),
    [
        ("above", 0.0, "holds"),
        ("above", 0.2, "inconclusive"),
        ("above", 0.5, "fails"),
        ("below", 0.5, "holds"),
        ("below", 0.2, "inconclusive"),
        ("below", 0.0, "fails"),
        ("within", 0.5, "holds"),
        ("within", 0.2, "inconclusive"),
        ("within", 0.05, "fails"),
    ],
)
def test_verdicts(says, bound, verdict):
    assert judge(Claim("C", "a claim", lambda r: VALUES, says, bound), None).verdict == verdict


def test_a_claim_outside_its_regime_is_inconclusive():
    claim = Claim("C", "a claim", lambda r: VALUES, applies=lambda r: False)
    judged = judge(claim, None)
    assert (judged.verdict, judged.seeds) == ("inconclusive", 5)
    assert "regime" in judged.note
    assert judge(Claim("C", "a claim", lambda r: np.array([1.0, np.nan])), None).verdict == "inconclusive"
    assert judge(Claim("C", "a claim", lambda r: np.array([1.0])), None).verdict == "inconclusive"  # one seed
    with pytest.raises(ValueError, match=r"claim.says.*above.*sideways"):
        judge(Claim("C", "a claim", lambda r: VALUES, "sideways"), None)


def test_run_folder(tmp_path):
    folder = RunFolder(str(tmp_path), "study", "one", {"lr": 0.1})
    folder.log(update=1, reward=np.float32(0.5), broken=float("nan"))
    folder.log(update=2, reward=np.float32(0.75))
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"update": 1, "reward": 0.5, "broken": None}, {"update": 2, "reward": 0.75}]
    assert json.loads((folder.path / "config.json").read_text()) == {"lr": 0.1}
    assert json.loads((folder.path / "versions.json").read_text())["jax"]
    with pytest.raises(ValueError, match=r"name.*new run.*study/one"):
        RunFolder(str(tmp_path), "study", "one", {"lr": 0.2})
    assert json.loads((folder.path / "config.json").read_text()) == {"lr": 0.1}  # nothing lost
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"runs.*cannot write"):
        RunFolder(str(tmp_path / "file"), "study", "one", {})


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = RunFolder(str(tmp_path), "study", "one", {})
    assert json.loads((folder.path / "versions.json").read_text())["commit"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path), "study", "one", {})
    folder.write_text("report.md", "old")

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        folder.write_text("report.md", "new")
    assert (folder.path / "report.md").read_text() == "old"


@dataclass(frozen=True)
class Options:
    """Options of a pretended study."""

    lr: float = 0.1
    """Learning rate."""
    arms: tuple[str, ...] = ()
    """Arms."""
    loud: bool = False
    """A flag."""

    def check(self):
        if self.lr < 0:
            raise ValueError(f"lr: expected at least 0, got {self.lr}")


def test_command_line():
    parsed = parse(Options(lr=0.3), "doc", ["--arms", "a", "b", "--loud"])
    assert parsed == Options(lr=0.3, arms=("a", "b"), loud=True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "x"], ["--lr", "'x'"]),
        (["--lrr", "1"], ["--lrr"]),
        (["--lr", "-1"], ["lr: expected at least 0, got -1.0"]),
        (["--lr"], ["--lr"]),
    ],
)
def test_a_bad_value_gets_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options(), "doc", argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(word in said for word in words), said


def test_help_exits_with_success(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options(), "What it does.", ["--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "What it does." in said
    assert "Learning rate." in said


def test_first_message():
    assert first_message("╭─ Value error ─╮\n│ Bad --lr │\n│ ──────── │\n│ more │\n╰──╯") == "Bad --lr"


def test_plain():
    value = {"a": np.arange(2), "b": (np.float32(1.5), float("inf")), "c": Options()}
    assert plain(value) == {"a": [0, 1], "b": [1.5, None], "c": dataclasses.asdict(Options()) | {"arms": []}}


def test_tables():
    judged = judge(Claim("C1", "a claim", lambda r: VALUES, "within", 0.5, "nats"), None)
    (line,) = verdict_lines([judged])
    assert line[0] == "C1"
    assert line[2] == "holds"
    assert line[3].startswith("+0.200 [+0.102, +0.298] nats")
    assert line[4] == "within ±0.5"
    assert cell(VALUES) == "0.200 ± 0.098"
    assert cell(VALUES[:1]) == "0.100"
    assert cell(np.array([1.0, np.nan])) == "-"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_measures_of_results():
    train = {"x": {"reward": np.arange(24.0).reshape(2, 12)}, "y": {"reward": np.zeros((2, 12))}}
    held_out = {row: {"reward": np.array([[0.0, 1.0], [0.0, 2.0]])} for row in train}
    results = Results(train, held_out, np.array([0, 12]), {"compile": 1.0})
    np.testing.assert_array_equal(early(results, "x"), [0.5, 12.5])
    np.testing.assert_array_equal(late(results, "x"), [10.5, 22.5])
    np.testing.assert_array_equal(final(results, "x"), [1.0, 2.0])
    np.testing.assert_array_equal(gap("x", "y")(results), [10.5, 22.5])
    parts = [Results({r: train[r]}, {r: held_out[r]}, results.evaluated_at, {"compile": 1.0}) for r in train]
    both = merge(parts)
    assert list(both.train) == ["x", "y"]
    assert both.seconds == {"compile": 2.0}


def test_figures(tmp_path):
    curves = np.random.default_rng(0).random((3, 5))
    panels = [Panel(name, np.arange(5), {"a": curves, "b": curves + 1}) for name in "xyz"]
    save_panels(tmp_path / "curves.png", panels)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_language_task_helpers():
    assert shared_length([np.array([1, 2, 3, 4]), np.array([1, 2, 5])]) == 2
    assert shared_length([np.array([1, 2]), np.array([1, 2, 5])]) == 1  # every row keeps one of its own
    assert dict(parse_mesh("data=2,tensor=4").shape) == {"data": 2, "tensor": 4}
    assert dict(parse_mesh("").shape) == {"fsdp": 8}
    with pytest.raises(ValueError, match=r'mesh.*"data=2,fsdp=4".*data:2'):
        parse_mesh("data:2")
