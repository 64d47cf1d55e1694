"""PPO on CartPole: learns in seconds, refuses bad values in a line."""

import json

import pytest

from rollax.experiments import ppo_cartpole
from rollax.experiments.harness import study

FULL_COMPILATION = True  # what is compiled here runs for seconds


@pytest.mark.slow  # test_reproduce.py runs the study from end to end, though not until it has learnt
def test_it_learns(tmp_path):
    argv = ["--runs", str(tmp_path), "--name", "run", "--seeds", "2", "--updates", "36", "--chunk", "12"]
    study.main(ppo_cartpole.STUDY, argv)
    folder = tmp_path / "ppo_cartpole" / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out/reward"] > 300  # an untrained policy falls after some 10 steps
    assert json.loads((folder / "results.json").read_text())["ppo"]["claims"][0]["seeds"] == 2
    assert "curves_ppo.png" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num-envs", "0"], "num_envs: expected at least 1, got 0"),
        (["--clip", "-0.1"], "clip: expected at least 0, got -0.1"),
        (["--mini-batches", "3"], "mini_batches: expected a divisor of 2048 samples, got 3"),
        (["--chunk", "7"], "chunk: expected a divisor of updates=240, got 7"),
    ],
)
def test_a_bad_value_gets_one_line(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        study.main(ppo_cartpole.STUDY, ["--runs", str(tmp_path), *argv])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
