"""The study on a game in Python, with a small transformer and with a chat model; on TextWorld where it is installed."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rollax.agents import host_demonstrate
from rollax.agents.tokenizer import load_tokenizer
from rollax.envs import with_commands
from rollax.experiments.harness.command_line import parse
from rollax.experiments.text_game import SYSTEM, Config, explore, main, pretrained_player, run, words

CHAT_MODEL = Path(__file__).parents[1] / "golden" / "hf_tiny" / "llama"  # random weights, a tokenizer, a template
TINY = (
    "--turns",
    "2",
    "--prompts",
    "2",
    "--group",
    "4",
    "--max-observation",
    "24",
    "--max-action",
    "6",
    "--width",
    "16",
)


class Lamp:
    """ "light lamp" wins; the seed says in which room that happens."""

    def reset(self, *, seed=None, options=None):
        self.room = ("kitchen", "cellar")[seed % 2]
        return f"A dark {self.room}.", self.info()

    def step(self, action):
        won = action == "light lamp"
        return f"You {action}.", float(won), won, False, self.info()

    def info(self):
        return {"admissible_commands": ["light lamp", "wait"], "policy_commands": ["light lamp"]}


def config(*options):
    """As the command line reads it."""
    return parse(Config(), "", [*TINY, *options])


def test_the_whole_loop():
    """A start by imitation, a rollout with a gradient step, and a rollout after it."""
    curve, episode = run(config("--updates", "1", "--warm-start", "40", "--noise", "0.3"), Lamp)
    assert [row["update"] for row in curve] == [0, 1]
    for row in curve:
        assert row["score"] == row["finished"] and 1 <= row["commands"] <= 2
        assert np.isfinite(list(row.values())).all()
    assert curve[0]["possible"] > 0.5  # it has learnt to speak
    assert "A dark " in episode and ">>> " in episode and "You can : light lamp , wait >" in episode


def test_without_a_start_it_does_not_speak():
    """The control of the test above."""
    curve, _ = run(config("--updates", "0", "--warm-start", "0"), Lamp)
    assert len(curve) == 1 and curve[0]["possible"] < 0.5


class Slow(Lamp):
    """The lamp lights at the second try."""

    def reset(self, *, seed=None, options=None):
        self.tries = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.tries += 1
        text, reward, _, truncated, info = super().step(action)
        return text, reward, self.tries == 2, truncated, info


def chat_config(model, *options):
    sizes = ("--max-observation", "90", "--max-action", "20", "--group", "2")
    return config("--model", str(model), *sizes, *options)


def test_a_chat_model_reads_its_own_template():
    """The tokens of an episode are those of the conversation, up to the assistant's last stop token."""
    player = pretrained_player(chat_config(CHAT_MODEL), Slow, ())
    played = host_demonstrate(jax.random.key(0), player.env, player.env.expert, 2)
    tokenizer = load_tokenizer(CHAT_MODEL)
    for row in range(2):
        real = np.asarray(played.tokens[row])[np.asarray(played.positions[row]) >= 0]
        first = with_commands(f"A dark {'kitchen' if 'kitchen' in player.read(real) else 'cellar'}.", Lamp.info(None))
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": first},
            {"role": "assistant", "content": "light lamp"},
            {"role": "user", "content": with_commands("You light lamp.", Lamp.info(None))},
        ]
        wanted = tokenizer.encode_chat(messages) + tokenizer.encode("light lamp") + [player.env.spec.stop_ids[0]]
        assert [*player.prefix.tolist(), *real.tolist()] == wanted
        assert played.terminated[row] and played.reward[row].sum() == 2


@pytest.mark.slow
def test_a_chat_model_learns_too():
    """A rollout with a prefix, a gradient step and another rollout."""
    curve, episode = run(chat_config(CHAT_MODEL, "--updates", "1"), Slow)
    assert len(curve) == 2 and "A dark" in episode
    assert all(row["commands"] == 2 and row["possible"] == 0 for row in curve)  # random weights say nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda template: "{{ messages[0]['content'] }}", "a chat template that shows each message once"),
        (lambda template: template.replace("'<|im_end|>' + ", ""), "a stop token after the assistant's words"),
        (
            lambda template: template.replace("'<|im_start|>' + m", "'!' * (loop.index == 2) + '<|im_start|>' + m"),
            "user messages all begin alike",
        ),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(CHAT_MODEL, folder)
    (folder / "chat_template.jinja").write_text(change(load_tokenizer(CHAT_MODEL).chat_template))
    with pytest.raises(ValueError, match=message):
        pretrained_player(chat_config(folder), Slow, ())


def test_the_vocabulary_is_that_of_the_walks():
    assert words("You can't; no-go (east).") == ["You", "can't", ";", "no-go", "(", "east", ")", "."]
    seen = explore(Lamp, starts=2, turns=3, seed=0)
    assert {"kitchen", "cellar", "light", "lamp", "wait", "You", "."} <= seen

    class Mute(Lamp):
        def info(self):
            return {}

    assert explore(Mute, starts=1, turns=3, seed=0) == {"A", "dark", "kitchen", "."}


def test_bad_input(capsys, monkeypatch):
    for options, message in {
        ("--group", "0"): "group: expected at least 1, got 0",
        ("--noise", "2"): "noise: expected 0 to 1, got 2.0",
        ("--temperature", "0"): "temperature: expected above 0, got 0.0",
        ("--lr", "-1"): "lr: expected at least 0, got -1.0",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main([*options])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    for package, options in (("textworld", ()), ("gymnasium", ("--game", "Doors-v0"))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SystemExit) as stop:
            main([*options])
        assert stop.value.code == 2 and f"{package} is missing: pip install 'rollax[games]'" in capsys.readouterr().err


def test_textworld(tmp_path, capsys):
    """The same loop in a generated game; results and the game are on disk."""
    pytest.importorskip("textworld")
    options = "--games 1 --turns 2 --prompts 2 --group 2 --updates 1 --warm-start 2 --demonstrations 4 --batch 2"
    main([*options.split(), "--width", "16", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["curve"]) == 2 and results["config"]["turns"] == 2
    assert "TextWorld" in results["episode"] and results["episode"] in capsys.readouterr().out
    assert (tmp_path / "games" / "rooms2-objects3-quest2-seed0.z8").is_file()
