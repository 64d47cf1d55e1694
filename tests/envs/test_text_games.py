"""The adapter on a small game with Gymnasium's interface, and on the real packages where they are installed."""

import sys

import jax
import numpy as np
import pytest

from rollax.envs import TokenSpec, gymnasium_text, make_textworld_games, textworld_games, with_commands
from rollax.envs.text_games import clean_feedback, first_line

PAD, STOP = 256, 257
SPEC = TokenSpec((*map(chr, range(256)), "<pad>", "<stop>"), 24, 8, 3, (STOP,), PAD)


def encode(text):
    return list(text.encode("latin-1"))


def decode(ids):
    return bytes(ids).decode("latin-1")


class Doors:
    """Three doors; the seed says which is open. One try at each, or "wait"."""

    made = 0

    def __init__(self):
        Doors.made += 1

    def reset(self, *, seed=None, options=None):
        self.open, self.left = seed % 3, {"left", "middle", "right"}
        return "Three doors.", self.info()

    def step(self, action):
        if action == "sing":
            return "La, la.", 0.0, False, True, self.info()  # the game's own time limit
        won = action in self.left and ("left", "middle", "right").index(action) == self.open
        self.left.discard(action)
        return f"You {action}.", 2.5 if won else -0.5, won, False, self.info()

    def info(self):
        plan = ("left", "middle", "right")[self.open]
        return {"admissible_commands": sorted(self.left), "policy_commands": [plan], "doors": len(self.left)}


def say(*texts):
    action = np.full((len(texts), SPEC.max_action), PAD, np.int32)
    for row, text in zip(action, texts, strict=True):
        ids = [*encode(text), STOP][: SPEC.max_action]
        row[: len(ids)] = ids
    return action


def heard(observation):
    return [decode(ids[:length].tolist()) for ids, length in zip(*observation, strict=True)]


def keys_that_open(*doors):
    """Keys whose games have these doors open: a game's seed is 31 bits of the key's."""
    found = {int(jax.random.bits(jax.random.key(i)) >> 1) % 3: jax.random.key(i) for i in range(20)}
    return jax.numpy.stack([found[door] for door in doors])


def test_an_episode():
    env = gymnasium_text(Doors, encode, decode, SPEC, numbers=("doors", "score"))
    keys, everyone = keys_that_open(0, 1, 2, 0), np.ones(4, bool)
    state, observation = env.reset(keys)
    assert heard(observation) == ["Three doors."] * 4
    assert observation.ids.dtype == observation.length.dtype == np.int32
    assert (observation.ids[:, 12:] == PAD).all() and observation.ids.shape == (4, SPEC.max_observation)
    assert state.info[0]["admissible_commands"] == ["left", "middle", "right"]

    state, step = env.step(keys, state, say("left", "left", "sing", "jump"), everyone)
    np.testing.assert_array_equal(step.reward, np.float32([2.5, -0.5, 0, -0.5]))
    np.testing.assert_array_equal(step.terminated, [True, False, False, False])
    np.testing.assert_array_equal(step.truncated, [False, False, True, False])
    assert heard(step.observation) == ["", "You left.", "", "You jump."]  # nothing is said after the end
    np.testing.assert_array_equal(step.info["admissible"], [1, 1, 0, 0])
    np.testing.assert_array_equal(step.info["num_commands"], [2, 2, 3, 3])
    np.testing.assert_array_equal(step.info["doors"], [2, 2, 3, 3])
    np.testing.assert_array_equal(step.info["score"], np.zeros(4))  # this game has none
    assert step.info["admissible_commands"][1] == ("middle", "right")

    alive = ~(step.terminated | step.truncated)
    state, step = env.step(keys, state, say("left", "right", "left", "left"), alive)
    np.testing.assert_array_equal(step.reward, np.float32([0, -0.5, 0, 2.5]))  # the others are over
    np.testing.assert_array_equal(step.info["admissible"], [0, 1, 0, 1])
    assert step.info["admissible_commands"][0] == ()
    state, step = env.step(keys, state, say("left", "sigh", "left", "left"), np.array([False, True, False, False]))
    np.testing.assert_array_equal(step.truncated, [False, True, False, False])  # after max_turns = 3 commands
    np.testing.assert_array_equal(state.turn, [1, 3, 1, 2])


def test_equal_keys_begin_alike_and_games_are_used_again():
    Doors.made = 0
    env = gymnasium_text(Doors, encode, decode, SPEC)
    first, _ = env.reset(keys_that_open(2, 2, 1))
    assert [game.open for game in first.games] == [2, 2, 1]
    second, _ = env.reset(keys_that_open(0, 0))  # while the first is still being played
    assert not set(map(id, first.games)) & set(map(id, second.games)) and Doors.made == 5
    env.release(first)
    third, _ = env.reset(keys_that_open(0, 1, 0, 1))
    assert Doors.made == 6 and [game.open for game in third.games] == [0, 1, 0, 1]
    assert [game.open for game in second.games] == [0, 0]


def test_the_expert_follows_the_plan():
    env = gymnasium_text(Doors, encode, decode, SPEC)
    keys = keys_that_open(0, 1, 2)
    state, _ = env.reset(keys)
    action = env.expert(keys, state)
    np.testing.assert_array_equal(action, say("left", "middle", "right"))
    _, step = env.step(keys, state, action, np.ones(3, bool))
    assert step.terminated.all()
    narrow = gymnasium_text(Doors, encode, decode, SPEC._replace(max_action=6))
    with pytest.raises(ValueError, match=r"spec.max_action must be at least 7 for 'middle', got 6"):
        narrow.expert(keys, state)


def test_observations_are_framed_and_cut():
    """The frame stays whole, the text loses its end, and `with_commands` names what is possible."""
    opening, closing = encode("<"), encode(">!")
    spec = SPEC._replace(max_observation=12)
    env = gymnasium_text(Doors, encode, decode, spec, opening=opening, closing=closing)
    keys = keys_that_open(0, 1)
    state, observation = env.reset(keys)
    assert heard(observation) == ["<Three doo>!"] * 2
    _, step = env.step(keys, state, say("jump", "jumping"), np.ones(2, bool))
    assert heard(step.observation) == ["<You jump.>!", "<You jumpi>!"]
    np.testing.assert_array_equal(step.info["observation_cut"], [0, 1])
    wide = SPEC._replace(max_observation=60)
    _, observation = gymnasium_text(Doors, encode, decode, wide, describe=with_commands).reset(keys)
    assert heard(observation)[0] == "Three doors.\nYou can: left, middle, right"
    assert with_commands("Dark.", {}) == "Dark."


def test_commands_are_cut_at_the_stop_and_parsed():
    said = []

    class Echo(Doors):
        def step(self, action):
            said.append(action)
            return super().step(action)

    keys = keys_that_open(0, 0, 0)
    env = gymnasium_text(Echo, encode, decode, SPEC)
    action = say("\n go \nx", "no stop at all", "")
    env.step(keys, env.reset(keys)[0], action, np.ones(3, bool))
    assert said == ["go", "no stop", ""]
    env = gymnasium_text(Echo, encode, decode, SPEC, parse=str.upper)
    env.step(keys, env.reset(keys)[0], action, np.array([True, False, False]))
    assert said[3:] == ["\n GO \nX"]
    assert first_line("  \n") == ""


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match=r"spec.max_observation must be above 24.*got 24"):
        gymnasium_text(Doors, encode, decode, SPEC, opening=range(20), closing=range(4))
    env, keys = gymnasium_text(Doors, encode, decode, SPEC), keys_that_open(0, 1)
    with pytest.raises(ValueError, match=r"action must have the shape \(2, 8\), got \(2, 9\)"):
        env.step(keys, env.reset(keys)[0], np.zeros((2, 9), np.int32), np.ones(2, bool))

    class Pixels(Doors):
        def reset(self, *, seed=None, options=None):
            return np.zeros(2), {}

    with pytest.raises(ValueError, match=r"observation: expected a text .* got array"):
        gymnasium_text(Pixels, encode, decode, SPEC).reset(keys)
    for package in ("gymnasium", "textworld"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"gymnasium is missing: pip install 'rollax\[games\]'"):
        gymnasium_text("Doors-v0", encode, decode, SPEC)
    for make in (lambda: make_textworld_games("x", 1), lambda: textworld_games(["x"], encode, decode, SPEC)):
        with pytest.raises(ImportError, match=r"textworld is missing: pip install 'rollax\[games\]'"):
            make()


def test_textworlds_feedback_is_cleaned():
    feedback = (
        "\n\n   ________\n  |  \\$$ |\n\nWelcome!  Go   east.\n\n-= Scullery =-\nA room.\n\n\n> \t   -= Scullery =-0/1"
    )
    assert clean_feedback(feedback) == "Welcome! Go east.\n-= Scullery =-\nA room."
    assert clean_feedback("\nYou can't.\n\n>    -= Attic =-0/3") == "You can't."


def test_real_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")

    class Registered(gymnasium.Env, Doors):
        observation_space = gymnasium.spaces.Text(100, charset=frozenset(map(chr, range(32, 127))))
        action_space = gymnasium.spaces.Text(20, min_length=0, charset=observation_space.character_set)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return Doors.reset(self, seed=seed)

        def step(self, action):
            return Doors.step(self, action)

    gymnasium.register("rollax/Doors-v0", Registered)
    env = gymnasium_text("rollax/Doors-v0", encode, decode, SPEC)
    keys = keys_that_open(0, 1, 2)
    state, observation = env.reset(keys)
    assert heard(observation) == ["Three doors."] * 3
    state, step = env.step(keys, state, env.expert(keys, state), np.ones(3, bool))
    np.testing.assert_array_equal(step.reward, np.full(3, 2.5, np.float32))


def test_real_textworld(tmp_path):
    """A generated game is won by its own plan in as many commands as were asked for, and gives all its points."""
    pytest.importorskip("textworld")
    files = make_textworld_games(tmp_path, 1, seed=7, rooms=2, objects=3, quest_length=2)
    assert make_textworld_games(tmp_path, 1, seed=7, rooms=2, objects=3, quest_length=2) == files
    spec = SPEC._replace(max_observation=2000, max_action=80, max_turns=4)
    env = textworld_games(files, encode, decode, spec, describe=with_commands)
    keys, alive = jax.random.split(jax.random.key(0), 2), np.ones(2, bool)
    state, observation = env.reset(keys)
    first = heard(observation)
    assert first[0] == first[1] and "TextWorld!" in first[0] and "You can: " in first[0]
    assert "$" not in first[0] and "\n\n" not in first[0]
    total = np.zeros(2)
    for turn in range(2):
        action = env.expert(keys, state)
        action[1] = env.spec.pad_id
        action[1, :6] = [*encode("dance"), STOP]
        state, step = env.step(keys, state, action, alive)
        total += step.reward
        np.testing.assert_array_equal(step.info["admissible"], [1, 0])
        np.testing.assert_array_equal(step.info["progress"], [1, 0])
        np.testing.assert_array_equal(step.info["won"], [turn == 1, False])
    np.testing.assert_array_equal(total, [1, 0])
    np.testing.assert_array_equal(step.terminated, [True, False])
    again, observation = env.reset(keys)
    assert heard(observation) == first
    env.release(again)
    with pytest.raises(ValueError, match=r"files: expected files of games, got \('x.z8',\)"):
        textworld_games(["x.z8"], encode, decode, spec)
    with pytest.raises(ValueError, match=r"rooms must be at least 1, got 0"):
        make_textworld_games(tmp_path, 1, rooms=0)
