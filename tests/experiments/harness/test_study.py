"""A study from its command line to its report."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from rollax.experiments.harness import study
from rollax.experiments.harness.loop import Results, final

spec = importlib.util.spec_from_file_location("toy_study", Path(__file__).parent / "toy_study.py")
toy = importlib.util.module_from_spec(spec)
sys.modules["toy_study"] = toy
spec.loader.exec_module(toy)


def test_from_command_line_to_report(tmp_path, capsys):
    argv = ["--runs", str(tmp_path), "--name", "one", "--lr", "0.3", "--track", "tensorboard"]
    study.main(toy.STUDY, argv)
    folder = tmp_path / "toy_study" / "one"
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "versions.json", "metrics.jsonl", "metrics.parquet", "results.json", "report.html", "report.md",
        "curves_toy.png", "curves_toy.pdf", "history", "checkpoints", "tensorboard",
    }  # fmt: skip
    results = json.loads((folder / "results.json").read_text())["toy"]
    assert len(results["rows"]["plain"]["reward"]) == 4
    assert results["claims"][0]["name"] == "T1"
    assert set(results["rates"]) == {"updates of single runs/s", "sampled tokens/s"}
    table = pyarrow.parquet.read_table(folder / "metrics.parquet")
    assert table.num_rows == 2 * 4 * 13  # rows, seeds, updates and the start
    assert "where it ended" in (folder / "report.html").read_text()
    assert "toy: places &amp; rows" in (folder / "report.html").read_text()
    said = capsys.readouterr().out
    assert all(word in said for word in ("T1", "12/12", "updates/s", "compiled in", str(folder)))
    report = (folder / "report.html").read_bytes()
    study.main(toy.STUDY, [*argv, "--resume"])  # finished: read again
    assert json.loads((folder / "results.json").read_text())["toy"]["rows"] == results["rows"]
    with pytest.raises(SystemExit):
        study.main(toy.STUDY, argv)
    assert "already holds one" in capsys.readouterr().err
    assert len((folder / "report.html").read_bytes()) == pytest.approx(len(report), rel=0.1)


def test_a_column_that_no_row_has_is_left_out():
    reward = {row: {"reward": np.ones((3, 2))} for row in ("plain", "lazy")}
    columns = {
        "reward": final,
        "nowhere": lambda results, row: np.full(3, np.nan),
        "somewhere": lambda results, row: np.full(3, np.nan if row == "lazy" else 2.0),
    }
    one = toy.STUDY._replace(columns=columns)
    table = study.section_of(
        one, "toy", Results(reward, reward, np.array([0, 1]), {"train and evaluate": 1.0}), []
    ).table
    assert table.head == ["arm", "reward", "somewhere"]
    assert table.lines == [["plain", "1.000 ± 0.000", "2.000 ± 0.000"], ["lazy", "1.000 ± 0.000", "-"]]


def test_wrong_sinks_cost_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(toy.STUDY, ["--runs", str(tmp_path), "--track", "paper"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: track: expected some of tensorboard, wandb, trackio, got 'paper'\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--mesh", "foo"], "mesh: expected a form like"),
        (["--mesh", "data=3"], "mesh: expected a number of devices that divides 4 seeds or 2 rows, got 3"),
        (["--seed", "3000000000"], "seed: expected 0 to 2147483648 less the number of seeds, got 3000000000"),
        (["--looks", "0"], "looks: expected at least 1, got 0"),
    ],
)
def test_what_cannot_run_costs_nothing(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        study.main(toy.STUDY, ["--runs", str(tmp_path), *argv])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_looks_widen_the_verdict(tmp_path):
    effects = {}
    for looks in ("1", "2"):
        study.main(toy.STUDY, ["--runs", str(tmp_path), "--name", looks, "--seeds", "8", "--looks", looks])
        (effects[looks],) = json.loads((tmp_path / "toy_study" / looks / "results.json").read_text())["toy"]["claims"]
    assert effects["2"]["low"] < effects["1"]["low"] and effects["2"]["looks"] == 2


def test_one_seed_has_no_verdicts(tmp_path):
    study.main(toy.STUDY, ["--runs", str(tmp_path), "--name", "one", "--seeds", "1"])
    results = json.loads((tmp_path / "toy_study" / "one" / "results.json").read_text())["toy"]
    assert results["claims"] == []
    assert np.isfinite(results["rows"]["plain"]["reward"]).all()


def test_studies_by_name_and_path(tmp_path):
    assert study.load_study("bandpo").name == "bandpo"
    assert study.load_study(str(Path(__file__).parent / "toy_study.py")).name == "toy_study"
    with pytest.raises(ValueError, match=r"study: expected one of bandpo,.* ppo_cartpole,.* got 'sweep'"):
        study.load_study("sweep")
    with pytest.raises(ValueError, match=r"study: expected a file"):
        study.load_study(str(tmp_path / "x.py"))
    (tmp_path / "x.py").write_text("STUDY = 3\n")
    with pytest.raises(ValueError, match=r"study: expected a STUDY"):
        study.load_study(str(tmp_path / "x.py"))
