"""Generation: greedy decoding, the sampler's log-probs, truncation, stops, and what must not change a row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents.generation import (
    EXCLUDED,
    Sampling,
    generate,
    padded_positions,
    sample_token,
    truncate_logits,
)
from rollax.agents.language_model import features, logits_of, restrict_vocabulary, token_log_probs
from rollax.agents.transformer import TransformerConfig, transformer

VOCAB = 23
CONFIG = TransformerConfig(vocab_size=VOCAB, width=32, num_layers=2, num_heads=4, num_kv_heads=2)
PROMPTS = jnp.array([[3, 5, 7, 9], [4, 6, 0, 0], [1, 0, 0, 0]])
LENGTHS = jnp.array([4, 2, 1])


@pytest.fixture(scope="module")
def lm():
    model = transformer(CONFIG)
    fresh = jax.jit(lambda key: jax.tree.map(lambda x: 3 * x, model.init(key)))  # sharper than a fresh start
    return model, fresh(jax.random.key(0))


def keys(n, seed=1):
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(n))


@functools.cache
def sampler(**options):
    model = transformer(CONFIG)
    return jax.jit(lambda params, *args: generate(model, params, *args, max_new_tokens=6, **options))


@functools.partial(jax.jit, static_argnums=0)
def forward(apply, params, row, length):
    logits, _ = apply(params, row[None], padded_positions(length[None], row.size))
    return jax.nn.log_softmax(logits[0].astype(jnp.float32))


def training_log_probs(model, params, prompt, tokens):
    """Without a cache, as training computes them; rows are padded to one length, which is one program."""
    whole = np.concatenate([prompt, tokens])
    row = np.pad(whole, (0, PROMPTS.shape[1] + 6 - len(whole)))
    at = np.arange(len(prompt) - 1, len(whole) - 1)
    log_probs = np.asarray(forward(model.apply, params, row, np.int32(len(whole))))[at]
    return log_probs, log_probs[np.arange(len(at)), np.asarray(tokens)]


def test_greedy_equals_argmax_without_cache(lm):
    model, params = lm
    out = sampler(sampling=Sampling(temperature=0.0))(params, keys(3), PROMPTS, LENGTHS)
    for row in range(3):
        prompt = PROMPTS[row, : LENGTHS[row]]
        log_probs, _ = training_log_probs(model, params, prompt, out.tokens[row])
        np.testing.assert_array_equal(out.tokens[row], np.argmax(log_probs, axis=-1))


def test_log_probs_equal_those_of_training(lm):
    model, params = lm
    out = sampler(samples=4)(params, keys(12), PROMPTS, LENGTHS)
    for row in range(12):
        prompt = PROMPTS[row // 4, : LENGTHS[row // 4]]
        _, expected = training_log_probs(model, params, prompt, out.tokens[row])
        np.testing.assert_allclose(out.full_log_prob[row], expected, atol=1e-4)
    np.testing.assert_allclose(out.log_prob, out.full_log_prob, atol=1e-6)
    assert len({tuple(row) for row in np.asarray(out.tokens)}) > 6  # rows are sampled, not copied


@pytest.mark.slow  # in float32 that is the test above, and test_transformer.py has a model in bfloat16
def test_bfloat16_log_probs_stay_near_those_of_training(lm):
    """In bfloat16 the cached and the uncached forward round differently; the gap is that of the number format."""
    model = transformer(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
    params = jax.tree.map(lambda x: x / 3, lm[1])  # as a fresh start has them
    out = jax.jit(lambda p: generate(model, p, keys(3), PROMPTS, LENGTHS, max_new_tokens=6))(params)
    for row in range(3):
        _, expected = training_log_probs(model, params, PROMPTS[row, : LENGTHS[row]], out.tokens[row])
        np.testing.assert_allclose(out.full_log_prob[row], expected, atol=0.05)


def test_padding_and_prefix_do_not_change_a_row(lm):
    model, params = lm
    all_keys = keys(3)
    out = sampler()(params, all_keys, PROMPTS, LENGTHS)
    junk = jnp.where(jnp.arange(4) < LENGTHS[:, None], PROMPTS, 17)
    wide = jnp.pad(junk, ((0, 0), (0, 3)), constant_values=11)
    np.testing.assert_array_equal(sampler()(params, all_keys, wide, LENGTHS).tokens, out.tokens)
    # A prefix computed once is the same text computed in every row.
    prefix = jnp.array([8, 2, 6])
    shared = jax.jit(lambda p: generate(model, p, all_keys, PROMPTS, LENGTHS, max_new_tokens=6, prefix=prefix))(params)
    whole = jnp.concatenate([jnp.tile(prefix, (3, 1)), PROMPTS], axis=1)
    written = sampler()(params, all_keys, whole, LENGTHS + 3)
    np.testing.assert_array_equal(shared.tokens, written.tokens)
    np.testing.assert_allclose(shared.log_prob, written.log_prob, atol=1e-5)


@pytest.fixture
def full_compilation():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")  # as the rest of the file


# Sharded and not, log-probs agree to 1e-4 nats: quick compilation rounds ten times as much.
@pytest.mark.usefixtures("full_compilation")
def test_batch_and_sharding_do_not_change_a_row(lm):
    _, params = lm
    run = sampler.__wrapped__()  # with programs of its own
    prompts, lengths = jnp.tile(PROMPTS[:2], (4, 1)), jnp.tile(LENGTHS[:2], 4)
    expected = run(params, keys(8), prompts, lengths)
    few = run(params, keys(3), PROMPTS, LENGTHS)  # whose first two rows are those
    np.testing.assert_array_equal(expected.tokens[:2], few.tokens[:2])
    np.testing.assert_allclose(expected.log_prob[:2], few.log_prob[:2], atol=1e-5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    sharded = run(
        jax.device_put(params, jax.NamedSharding(mesh, jax.P())),
        *jax.device_put((keys(8), prompts, lengths), rows),
    )
    np.testing.assert_array_equal(sharded.tokens, expected.tokens)
    np.testing.assert_allclose(sharded.log_prob, expected.log_prob, atol=1e-4)


@pytest.mark.parametrize("early_exit", [pytest.param(True, marks=pytest.mark.slow), False])  # that it exits: below
def test_stop_tokens_end_a_row(lm, early_exit):
    _, params = lm
    free = jax.device_get(sampler()(params, keys(3), PROMPTS, LENGTHS))
    stop = int(free.tokens[0, 2])
    run = sampler(stop_ids=(stop,), pad_id=22, early_exit=early_exit)
    out = jax.device_get(run(params, keys(3), PROMPTS, LENGTHS))
    for row in range(3):
        hits = np.flatnonzero(free.tokens[row] == stop)
        length = hits[0] + 1 if hits.size else 6
        np.testing.assert_array_equal(out.tokens[row, :length], free.tokens[row, :length])
        np.testing.assert_array_equal(out.tokens[row, length:], 22)
        np.testing.assert_array_equal(out.mask[row], np.arange(6) < length)
        np.testing.assert_array_equal(out.log_prob[row, length:], 0.0)
        assert bool(out.stopped[row]) == bool(hits.size)


def test_early_exit_leaves_the_loop(lm):
    """With a stop token that always comes first, the program runs one step: counted by a model that counts."""
    model, params = lm
    calls = []

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return model.hidden(*args)

    counting = model._replace(hidden=counted)
    everything = tuple(range(VOCAB))
    run = jax.jit(lambda p: generate(counting, p, keys(3), PROMPTS, LENGTHS, max_new_tokens=6, stop_ids=everything))
    jax.block_until_ready(run(params))
    jax.effects_barrier()
    assert len(calls) == 2  # prefill and one decode step


def test_truncation():
    logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.06, 0.04]]))

    def kept(**options):
        return np.asarray(truncate_logits(logits, Sampling(**options))[0] > EXCLUDED / 2)

    np.testing.assert_array_equal(kept(top_k=1), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(kept(top_k=2), [1, 1, 1, 0, 0])  # ties stay
    np.testing.assert_array_equal(kept(top_p=0.5), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(kept(top_p=0.95), [1, 1, 1, 1, 0])
    np.testing.assert_array_equal(kept(top_p=1e-6), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(kept(top_p=1.0), [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(kept(top_k=4, top_p=0.9), [1, 1, 1, 0, 0])
    many = jax.random.normal(jax.random.key(0), (20, 49_152))  # whose probabilities sum to 1 before the end
    np.testing.assert_array_equal(truncate_logits(many, Sampling(top_p=1.0)), many)
    traced = jax.jit(lambda k, p: truncate_logits(logits, Sampling(top_k=k, top_p=p)))(4, 0.9)
    np.testing.assert_allclose(traced, truncate_logits(logits, Sampling(top_k=4, top_p=0.9)))


def test_sampled_frequencies_and_both_log_probs():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    n = 20_000
    sampling = Sampling(temperature=0.7, top_k=3)
    token, log_prob, full = jax.jit(lambda k: sample_token(k, jnp.tile(logits, (n, 1)), sampling))(keys(n))
    scaled = np.asarray(jax.nn.softmax(logits / 0.7))
    expected = np.where(np.arange(4) < 3, scaled, 0) / scaled[:3].sum()
    observed = np.bincount(np.asarray(token), minlength=4) / n
    np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / n))
    np.testing.assert_allclose(np.exp(log_prob), expected[token], rtol=1e-5)
    np.testing.assert_allclose(np.exp(full), scaled[token], rtol=1e-5)


def test_temperature_is_traced(lm):
    model, params = lm
    run = jax.jit(
        jax.vmap(
            lambda t: generate(
                model, params, keys(3), PROMPTS, LENGTHS, max_new_tokens=6, sampling=Sampling(temperature=t)
            )
        )
    )
    out = run(jnp.array([0.0, 1.0]))
    greedy = sampler(sampling=Sampling(temperature=0.0))(params, keys(3), PROMPTS, LENGTHS)
    np.testing.assert_array_equal(out.tokens[0], greedy.tokens)
    assert (np.asarray(out.tokens[1]) != np.asarray(greedy.tokens)).any()


def test_padded_positions():
    np.testing.assert_array_equal(padded_positions(jnp.array([2, 0]), 3, 5), [[5, 6, -1], [-1, -1, -1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=-1.0)}, "temperature.*>= 0.*-1"),
        ({"sampling": Sampling(temperature=np.float32(-1.0))}, "temperature.*>= 0.*-1"),
        ({"sampling": Sampling(top_k=0)}, "top_k.*>= 1.*0"),
        ({"sampling": Sampling(top_p=1.5)}, "top_p.*1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens.*>= 1.*0"),
        ({"samples": 2}, "keys.*6.*3"),
    ],
)
def test_bad_input(lm, options, message):
    model, params = lm
    options = {"max_new_tokens": 4} | options
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: generate(model, p, keys(3), PROMPTS, LENGTHS, **options), params)


@pytest.mark.slow  # test_prefill.py's scanned model at alpha 0 says it by default
def test_a_scanned_stack_decodes_like_a_tuple_of_layers(lm):
    """One key gives both forms the same numbers; the loop takes the stack apart once."""
    _, params = lm
    scanned = transformer(dataclasses.replace(CONFIG, scan_layers=True))
    stacked = jax.tree.map(lambda x: 3 * x, jax.jit(scanned.init)(jax.random.key(0)))
    run = jax.jit(lambda p: generate(scanned, p, keys(3), PROMPTS, LENGTHS, max_new_tokens=6))
    expected = sampler()(params, keys(3), PROMPTS, LENGTHS)
    np.testing.assert_array_equal(run(stacked).tokens, expected.tokens)
    np.testing.assert_allclose(run(stacked).log_prob, expected.log_prob, atol=1e-5)


def test_a_restricted_vocabulary(lm):
    """Ids behind the end are never sampled, and training normalises over the same ids."""
    model, params = lm
    small = restrict_vocabulary(model, 15)
    assert restrict_vocabulary(model, VOCAB) is model
    out = jax.jit(lambda p: generate(small, p, keys(60), PROMPTS, LENGTHS, max_new_tokens=6, samples=20))(params)
    assert int(out.tokens.max()) < 15
    prompt = PROMPTS[0]
    whole = jnp.concatenate([prompt, out.tokens[0]])[None]
    positions = jnp.arange(whole.shape[1])[None]
    score = jax.jit(functools.partial(token_log_probs, small))
    expected, _ = score(params, whole[:, :-1], positions[:, :-1], whole[:, 1:])
    np.testing.assert_allclose(out.full_log_prob[0], expected[0, len(prompt) - 1 :], atol=1e-4)
    logits, _ = jax.eval_shape(small.apply, params, whole, positions)
    assert logits.shape[-1] == small.vocab_size == 15
    with pytest.raises(ValueError, match=r"size.*1 to 23.*24"):
        restrict_vocabulary(model, 24)


def test_logits_are_float32_in_a_bfloat16_model(lm):
    model, params = transformer(dataclasses.replace(CONFIG, dtype=jnp.bfloat16)), lm[1]
    at = padded_positions(LENGTHS, 4)
    hidden, _ = jax.jit(lambda params: features(model, params, PROMPTS, at))(params)
    assert hidden.dtype == jnp.bfloat16
    logits = jax.jit(functools.partial(logits_of, model))(params, hidden)
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16)).any()  # and not rounded on the way
