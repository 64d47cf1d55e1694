"""Recall by test-time training: the task is what it says, networks see what they may and learn, the mechanism too."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.experiments import ttt_recall
from rollax.experiments.harness import study
from rollax.experiments.ttt_mechanism import MEMORIES, recall_by_age
from rollax.kernels.ttt import lact_init, lact_step
from rollax.tests.support import compiled

SMALL = ttt_recall.Config(study="recall", length=48, facts=12, questions=4, width=16, window=8, layers=2)
TINY = ttt_recall.Config(
    study="recall", length=40, facts=8, questions=6, keys=16, values=4, width=32, window=8, layers=1, lr=1e-2,
    updates=200, chunk=200, batch=16, eval_streams=16,
)  # fmt: skip


def test_streams_hold_each_answer_once():
    streams = jax.device_get(ttt_recall.sample_streams(jax.random.key(0), SMALL, 8, SMALL.length))
    assert streams.key.shape == (8, 52)
    soon = 0
    for b in range(8):
        stream = list(zip(*(x[b].tolist() for x in streams), strict=True))
        facts = {key: (value, at) for at, (key, value, _, _) in enumerate(stream) if value < SMALL.values}
        assert len(facts) == SMALL.facts
        questions = [(at, *token) for at, token in enumerate(stream) if token[1] == SMALL.values + 1]
        for at, key, _, answer, age in questions:
            assert facts[key] == (answer, at - age)
            assert age >= 1 and (at >= SMALL.length or age < SMALL.window)
        assert len({key for _, key, *_ in questions}) == len(questions)  # no question reminds of another's answer
        assert [at for at, *_ in questions if at >= SMALL.length] == list(range(48, 52))
        soon += len(questions) - SMALL.questions
        for key, value, answer, age in stream:
            if value <= SMALL.values:
                assert (answer, age) == (-1, 0)
                assert (key >= SMALL.keys) == (value == SMALL.values)
    assert soon > 8 * (SMALL.facts - SMALL.questions) / 2  # the others found their place taken


def network(arm, config=SMALL):
    """(parameters, streams)."""

    def make():
        params = ttt_recall.init_params(jax.random.key(2), config, arm, jnp.float32(arm.inner[-1]))
        return params, ttt_recall.sample_streams(jax.random.key(1), config, 1, config.length)

    return jax.jit(make)()


def changed_by(arm, place, config=SMALL, reset_at=None):
    """Which tokens' logits change with the token at `place`, bool `[T]`."""
    params, streams = network(arm, config)
    value = np.array(streams.value)
    value[0, place] = (value[0, place] + 1) % config.values
    run = jax.jit(lambda streams: ttt_recall.logits_of(params, streams, config, arm, reset_at))
    return np.any(np.asarray(run(streams)) != np.asarray(run(streams._replace(value=value))), axis=-1)[0]


# One of each mixer, rule and chunk; the others differ in numbers alone.
# Those that are slow differ inside of a kernel, whose own tests have it read nothing that comes later.
@pytest.mark.parametrize(
    "name",
    ["full", "linear", "ttt_mlp", "lact + anchor"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("ttt_linear", "lact, gradient", "lact, post-norm",
                                                                   "lact, chunk 16")],
)  # fmt: skip
def test_no_token_changes_an_earlier_answer(name):
    changed = changed_by(ttt_recall.ARMS[name], 37)
    assert not changed[:37].any() and changed[37]
    assert changed[48:].any()  # what is written at 37 is found at the end


def test_windows_reach_as_far_as_they_say():
    reach = ttt_recall.reach(SMALL)
    assert reach == 14
    changed = changed_by(ttt_recall.ARMS["window"], 20)
    np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(20, 20 + reach + 1))


def test_a_reset_memory_knows_nothing_of_the_past():
    config = dataclasses.replace(SMALL, layers=1)
    for reset_at, knows in ((None, True), (config.length, False)):
        assert changed_by(ttt_recall.ARMS["lact, chunk 16"], 0, config, reset_at)[-4:].any() == knows


def test_linear_attention_is_its_definition():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 3, 21, 4)).astype(np.float32)
    positive = lambda x: np.where(x > 0, x, np.expm1(x)) + 1  # noqa: E731
    weights = np.tril(np.einsum("bhid,bhjd->bhij", positive(q), positive(k)))
    expected = weights @ v / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(ttt_recall.linear_attention, static_argnums=3)(q, k, v, 8), expected, 1e-4, 1e-5)
    # The layer hands it what it projects, activated by nothing else.
    found = jax.jit(lambda *qkv: ttt_recall.remember({}, None, *qkv, ttt_recall.ARMS["linear"]))(q, k, v)
    np.testing.assert_allclose(found, expected, 1e-4, 1e-5)


def recall_of(name):
    """By age of the chunk."""
    keys = jax.random.split(jax.random.key(0), 4)
    return jax.jit(jax.vmap(functools.partial(recall_by_age, memory=MEMORIES[name])))(keys).mean(0)


def test_pre_norm_remembers_and_post_norm_forgets():
    pre, post = recall_of("pre-norm"), recall_of("post-norm")
    assert pre[8] > 0.9 and post[8] < 0.7
    assert post[1] > 0.9


@pytest.mark.slow  # the same at half the width
def test_pre_norm_remembers_and_post_norm_forgets_with_momentum_at_half_the_width():
    assert recall_of("pre-norm, width 32")[8] > 0.6 and recall_of("post-norm, momentum, width 32")[8] < 0.3


def trained(arm):
    """Metrics of the last evaluation."""
    train = ttt_recall.recall_train(TINY, arm)
    state, _ = jax.jit(train.advance)(jax.jit(train.init)(jax.random.key(0)), ())
    return jax.device_get(jax.jit(train.evaluate)(state, ()))


@pytest.mark.slow
def test_windows_learn_what_is_near_and_a_memory_the_rest():
    window = trained(ttt_recall.ARMS["window"])
    assert window["near"] > 0.8 and window["far"] < 0.4  # chance .25
    # Of two inner rates the better one: at 1e-6 next to nothing is written.
    memory = trained(ttt_recall.ARMS["lact, gradient"]._replace(size=8, inner=(1e-6, 1.0)))
    assert memory["far"] > 0.7 and memory["far, reset"] < 0.4
    assert memory["inner lr"] == 1


def test_what_a_stream_must_keep():
    bytes_of = lambda name, length: ttt_recall.state_bytes(SMALL, ttt_recall.ARMS[name], length)  # noqa: E731
    assert bytes_of("full", 100) == 4 * 2 * 2 * 16 * 100
    window = bytes_of("window", 100)
    assert window == bytes_of("window", 1000) == 4 * 2 * 2 * 16 * 7
    assert bytes_of("linear", 100) - window == 4 * 2 * 2 * 8 * 9
    assert bytes_of("lact", 100) == bytes_of("lact", 1000) < bytes_of("lact + anchor", 1000)
    # Of LaCT what `lact_step` hands on, in each of two layers.
    arm, tokens = ttt_recall.LACT, jnp.ones((1, 2, 5, 8))
    state = lact_init(network(arm)[0]["layers"][0]["fast"], batch=1, chunk=arm.size, rule=arm.rule)
    rates = (jnp.ones((1, 2, 5, 3)), jnp.ones((1, 2, 5)))
    _, state = lact_step(state, tokens, tokens, tokens, *rates, chunk=arm.size, rule=arm.rule)
    assert bytes_of("lact", 100) - window == 2 * sum(x.nbytes for x in jax.tree.leaves(state))


def test_costs_are_measured_and_shown(tmp_path, monkeypatch):
    """The cheapest part from its command line to its report, of two lengths."""
    measured, measure = [], ttt_recall.measure_cost
    monkeypatch.setattr(ttt_recall, "TIMES", (2, 8))
    monkeypatch.setattr(ttt_recall, "measure_cost", lambda *run: measured.append(measure(*run)) or measured[-1])
    argv = [*ttt_recall.STUDY.smoke, "--study", "cost", "--arms", "window", "--layers", "1", "--window", "8"]
    study.main(ttt_recall.STUDY, [*argv, "--runs", str(tmp_path), "--name", "run"])
    (costs,) = measured
    assert min(costs["ms"]) > 0 and costs["KiB to go on"] == [4 * 2 * 16 * 7 / 1024] * 2
    assert costs["MiB held"] == sorted(costs["MiB held"])
    found = json.loads((tmp_path / "ttt_recall" / "run" / "results.json").read_text())["cost"]["rows"]["window"]
    for name, by_length in costs.items():
        assert found[name] == [pytest.approx(by_length[-1])]
    assert "forward pass, ms" in (tmp_path / "ttt_recall" / "run" / "report.html").read_text()


def test_full_attention_is_one_whatever_the_length():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 513, 2, 8)).astype(np.float32)
    expected = compiled(functools.partial(jax.nn.dot_product_attention, is_causal=True))(q, k, v)
    for length in (512, 513):
        part = compiled(ttt_recall.full_attention)(*(x[:, :length] for x in (q, k, v)))
        np.testing.assert_allclose(part, expected[:, :length], rtol=0, atol=5e-6)


@pytest.mark.slow  # as the smoke runs of test_reproduce.py
def test_a_run_writes_its_report(tmp_path):
    argv = [*ttt_recall.STUDY.smoke, "--study", "recall", "--arms", "window", "--layers", "1"]
    study.main(ttt_recall.STUDY, [*argv, "--runs", str(tmp_path), "--name", "run"])
    folder = tmp_path / "ttt_recall" / "run"
    found = json.loads((folder / "results.json").read_text())["recall"]
    assert [claim["name"] for claim in found["claims"]] == ["T1a", "T1b"]
    assert "window: a stream" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--study", "vision"], "study: expected one of mechanism, recall, cost, all, got 'vision'"),
        (["--arms", "rnn"], "arms: expected some of full, window"),
        (["--facts", "33"], "facts: expected 16 (questions) to 32, got 33"),
        (["--width", "30"], "width: expected a multiple of twice the 2 heads, got 30"),
        (["--width", "0"], "width: expected at least 1, got 0"),
        (["--heads", "0"], "heads: expected at least 1, got 0"),
        (["--chunk", "7"], "chunk: expected a divisor of updates=200, got 7"),
    ],
)
def test_a_bad_value_gets_one_line(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        study.main(ttt_recall.STUDY, ["--study", "recall", "--runs", str(tmp_path), *argv])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
