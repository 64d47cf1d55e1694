"""Recall by test-time training: the task is what it says, networks see what they may, the mechanism remembers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.experiments import ttt_recall
from rollax.experiments.harness import study
from rollax.kernels.ttt import UpdateRule

SMALL = ttt_recall.Config(study="recall", length=48, facts=12, questions=4, width=16, window=8, layers=2)


def test_streams_hold_each_answer_once():
    streams = jax.device_get(ttt_recall.sample_streams(jax.random.key(0), SMALL, 8, SMALL.length))
    assert streams.key.shape == (8, 52)
    for b in range(8):
        facts = {int(k): int(v) for k, v in zip(streams.key[b], streams.value[b], strict=True) if v < SMALL.values}
        assert len(facts) == SMALL.facts
        for q in range(SMALL.questions):
            asked = streams.key[b, SMALL.length + q]
            assert streams.value[b, SMALL.length + q] == SMALL.values + 1
            assert facts[int(asked)] == streams.answer[b, q]
            assert streams.key[b, SMALL.length + q - streams.age[b, q]] == asked
        noise = streams.key[b, : SMALL.length][streams.value[b, : SMALL.length] == SMALL.values]
        assert noise.size == SMALL.length - SMALL.facts and (noise >= SMALL.keys).all()


def changed_by(arm, place):
    """Which logits of the questions change with the token at `place`, bool `[Q]`."""
    streams = ttt_recall.sample_streams(jax.random.key(1), SMALL, 1, SMALL.length)
    params = ttt_recall.init_params(jax.random.key(2), SMALL, arm)
    other = streams._replace(value=streams.value.at[0, place].set((streams.value[0, place] + 1) % SMALL.values))
    run = jax.jit(lambda streams: ttt_recall.logits_of(params, streams, SMALL, arm))
    return np.asarray(jnp.any(run(streams) != run(other), axis=-1)[0])


def test_windows_reach_as_far_as_they_say():
    reach = ttt_recall.reach(SMALL)
    assert reach == 14
    for name, sees in (("window", False), ("full", True), ("lact, chunk 16", True), ("linear", True)):
        arm = ttt_recall.ARMS[name]
        assert changed_by(arm, SMALL.length - reach - 1).any() == sees, name
        assert changed_by(arm, SMALL.length - reach + 0)[0]
    # The question is token `length`: what is `reach` tokens before it is seen by the first question alone.
    np.testing.assert_array_equal(changed_by(ttt_recall.ARMS["window"], SMALL.length - reach), [True] + 3 * [False])


def test_a_reset_memory_knows_nothing_of_the_past():
    config, arm = dataclasses.replace(SMALL, layers=1), ttt_recall.ARMS["lact, chunk 16"]
    streams = ttt_recall.sample_streams(jax.random.key(1), config, 1, config.length)
    params = ttt_recall.init_params(jax.random.key(2), config, arm)
    other = streams._replace(value=streams.value.at[0, 0].set((streams.value[0, 0] + 1) % config.values))
    for reset_at, same in ((None, False), (config.length, True)):
        run = jax.jit(lambda s, at=reset_at: ttt_recall.logits_of(params, s, config, arm, reset_at=at))
        assert bool((run(streams) == run(other)).all()) == same


def test_linear_attention_is_its_definition():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 3, 21, 4))
    weights = jnp.tril(jnp.einsum("bhid,bhjd->bhij", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1))
    expected = weights @ v / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(ttt_recall.linear_attention(q, k, v, 8), expected, rtol=1e-4, atol=1e-5)


def test_pre_norm_remembers_and_post_norm_forgets():
    recall = {}
    for norm in ("pre", "post"):
        rule = UpdateRule(momentum=False, norm=norm)
        keys = jax.random.split(jax.random.key(0), 8)
        recall[norm] = jax.jit(jax.vmap(lambda key, rule=rule: ttt_recall.recall_by_age(key, rule, 1e-3)))(keys).mean(0)
    assert recall["pre"][8] > 0.9 and recall["post"][8] < 0.7
    assert recall["post"][1] > 0.9


def test_what_a_stream_must_keep():
    bytes_of = lambda name, length: ttt_recall.state_bytes(SMALL, ttt_recall.ARMS[name], length)  # noqa: E731
    assert bytes_of("full", 100) == 4 * 2 * 2 * 16 * 100
    assert bytes_of("window", 100) == bytes_of("window", 1000) == 4 * 2 * 2 * 16 * 7
    assert bytes_of("lact", 100) == bytes_of("lact", 1000) < bytes_of("lact + anchor", 1000)
    table = ttt_recall.cost_table(SMALL, ["window"], lengths=(64,))
    assert "window" in table and "64 tokens" in table


def test_a_network_learns_and_the_report_shows_it(tmp_path):
    argv = [
        "--study",
        "recall",
        "--arms",
        "full",
        "--seeds",
        "2",
        "--updates",
        "160",
        "--chunk",
        "80",
        "--length",
        "32",
    ]
    argv += ["--facts", "8", "--questions", "4", "--keys", "16", "--values", "4", "--lr", "1e-2", "--width", "32"]
    study.main(ttt_recall.STUDY, [*argv, "--runs", str(tmp_path), "--name", "run"])
    folder = tmp_path / "ttt_recall" / "run"
    assert json.loads((folder / "results.json").read_text())["recall"]["rows"]["full"]["far"][0] > 0.6  # chance .25
    assert "cost by length" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--study", "vision"], "study: expected one of mechanism, recall, both, got 'vision'"),
        (["--arms", "rnn"], "arms: expected some of full, window"),
        (["--facts", "33"], "facts: expected 16 (questions) to 32, got 33"),
        (["--width", "30"], "width: expected a multiple of twice the 2 heads, got 30"),
        (["--chunk", "7"], "chunk: expected a divisor of updates=200, got 7"),
    ],
)
def test_a_bad_value_gets_one_line(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        study.main(ttt_recall.STUDY, ["--study", "recall", "--runs", str(tmp_path), *argv])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
