"""`python -m rollax.experiments.reproduce`: every study runs, and one table comes of the JSON files."""

import dataclasses
import json

import numpy as np
import pytest

from rollax.experiments import reproduce
from rollax.experiments.harness.claims import Claim, judge
from rollax.experiments.harness.study import study_names

QUICK = ("ppo_cartpole",)  # the others have tests of their own


@pytest.mark.timeout(1800)  # compiles every study
@pytest.mark.parametrize("studies", [QUICK, pytest.param(study_names(), marks=pytest.mark.slow)], ids=("quick", "all"))
def test_a_smoke_run_of_every_study(tmp_path, capfd, monkeypatch, studies):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # each program runs for a moment: half the time
    argv = ["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "RESULTS.md")]
    argv += ["--studies", *studies]
    reproduce.main(argv)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "says nothing of the claims" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    claims = 0
    for name in studies:
        (results,) = (tmp_path / "runs" / name).glob("smoke-*/results.json")
        for label, part in json.loads(results.read_text()).items():
            claims += len(part["claims"])
            for claim in part["claims"]:
                (line,) = [x for x in lines if x[1] == claim["name"] and x[0].endswith(f", {label}")]
                assert line[2][:20] == claim["statement"][:20]
                assert line[3] == claim["verdict"]
                assert line[6] == "2"
    assert len(lines) == claims >= len(studies)
    capfd.readouterr()
    reproduce.main([*argv, "--table"])  # the same from the files alone
    assert (tmp_path / "RESULTS.md").read_text() == text
    assert "==>" not in capfd.readouterr().out


def test_what_is_wrong_gets_one_line(tmp_path, capsys):
    for argv, words in (
        (["--studies", "chess"], "studies: expected some of bandpo, flash_prefill"),
        (["--table", "--runs", str(tmp_path)], "runs: expected a finished run with claims in"),
    ):
        with pytest.raises(SystemExit) as stop:
            reproduce.main(argv)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_of_each_part_the_latest_run_counts(tmp_path):
    claim, effects = Claim("R", "says", lambda effects: effects, unit="reward"), np.array([1.0, 1.5])
    verdict = dataclasses.asdict(judge(claim, effects))
    for age, (name, parts) in enumerate(
        {"reproduce-b": "xy", "reproduce-a": "yz", "smoke-c": "x", "mine": "x"}.items()
    ):
        folder = tmp_path / "bandpo" / name
        folder.mkdir(parents=True)
        claims = {part: {"claims": [verdict | {"name": f"{name} {part}"}]} for part in parts}
        (folder / "results.json").write_text(json.dumps(claims))
        versions = {
            "commit": 40 * name[-1],
            "uncommitted": False,
            "command": ["run", name],
            "started": f"2026-01-0{age + 1}",
        }
        (folder / "versions.json").write_text(json.dumps(versions))
    lines = reproduce.lines_of("bandpo", reproduce.Reproduce(runs=str(tmp_path)))
    assert [(line[0].rsplit(", ", 1)[1], line[1], line[7], line[9]) for line in lines] == [
        ("x", "reproduce-b x", "`run reproduce-b`", 10 * "b"),
        ("y", "reproduce-a y", "`run reproduce-a`", 10 * "a"),
        ("z", "reproduce-a z", "`run reproduce-a`", 10 * "a"),
    ]


def test_lines_of_studies_without_a_run_stay(tmp_path):
    """A line is replaced by its part's new ones, whatever its cells hold; what is gone leaves the table."""
    line = lambda study, claim, says: [f"{study} (arXiv 1), x", claim, says, *"1234567"]  # noqa: E731
    (first, part, *_), (ppo, *_) = (reproduce.parts_of(name) for name in ("bandpo", "ppo_cartpole"))
    kept = [first, "R1", "a | b <i>, a < b", *"1234567"]
    old = [part, "P1", "old", *"1234567"]
    other = [ppo, "P3", "stays", *"1234567"]
    dropped = [f"{part} of old", "P4", "a part that is gone", *"1234567"]
    table = tmp_path / "RESULTS.md"
    table.write_text(reproduce.page([old, dropped, other, kept, line("Gone", "G1", "gone")], False))
    new = [part, "P2", "new", *"1234567"]
    lines = reproduce.with_kept([new], table)
    assert lines == [kept, new, other]
    table.write_text(reproduce.page(lines, False))
    assert reproduce.with_kept([new], table) == [kept, new, other]
    assert reproduce.with_kept([new], tmp_path / "none.md") == [new]
    special = [f"{part} and more", "P5", "by hand", *"1234567"]  # of a part that does not run by default
    assert reproduce.with_kept([special], table)[2] == special
