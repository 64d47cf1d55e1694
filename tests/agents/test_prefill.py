"""Sparse prefill by `LanguageModel.prefill`: alpha 0 is dense, padding and vmap change nothing, decoding is dense."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import envs
from rollax.agents import rollout, score, sparse_prefill, tabular
from rollax.agents.generation import Sampling, generate
from rollax.agents.transformer import TransformerConfig, transformer
from rollax.kernels.flash_prefill import FlashPrefillConfig, PackedPrefillConfig

CONFIG = TransformerConfig(vocab_size=23, width=32, num_layers=2, num_heads=4, num_kv_heads=2)
WIDTH, NEW = 45, 4
LENGTHS = jnp.array([45, 30, 7])
PREFIX = jnp.arange(1, 20)
PROMPTS = jax.random.randint(jax.random.key(5), (3, WIDTH), 1, 23)
KEYS = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(1), jnp.arange(3))
CHOICE = dict(block_size=8, sink_blocks=1, window_blocks=1)


def v1(alpha, implementation="reference"):
    cfg = FlashPrefillConfig(alpha=alpha, last_full_blocks=0, **CHOICE)
    return sparse_prefill(cfg, implementation=implementation)


def packed(alpha, correction=True):
    cfg = PackedPrefillConfig(alpha=alpha, tile_rows=16, last_full_tiles=0, **CHOICE)
    return sparse_prefill(cfg, correction=correction, implementation="xla")


OPERATORS = {
    "v1": partial(v1, implementation="xla"),
    "packed": packed,
    "packed, not corrected": partial(packed, correction=False),
    "scanned": v1,
}


@cache
def sharp_params(config):
    """Sharper than a fresh start, so that attention has something to leave out."""
    init = transformer(config).init
    return jax.jit(lambda key: jax.tree.map(lambda x: 1.5 * x, init(key)))(jax.random.key(0))


def generator(prefill, config=CONFIG, **options):
    model = transformer(config)._replace(prefill=prefill)
    options = {"sampling": Sampling(temperature=0.0), "max_new_tokens": NEW} | options
    return lambda params: generate(model, params, KEYS, PROMPTS, LENGTHS, **options)


def generated(prefill, config=CONFIG, **options):
    return jax.jit(generator(prefill, config, **options))(sharp_params(config))


@cache
def dense():
    return generated(None)


@cache
def program(name):
    """Of traced alpha."""
    config = dataclasses.replace(CONFIG, scan_layers=True, remat=True) if name == "scanned" else CONFIG
    run = jax.jit(lambda params, alpha: generator(OPERATORS[name](alpha), config)(params))
    return lambda alpha: jax.device_get(run(sharp_params(config), alpha))


@pytest.mark.parametrize("name", ["v1", "packed", "scanned"])
def test_alpha_0_is_dense(name):
    sparse, exact = program(name)(0.0), dense()
    np.testing.assert_array_equal(sparse.tokens, exact.tokens)
    np.testing.assert_allclose(sparse.full_log_prob, exact.full_log_prob, atol=2e-5)


def gap(name):
    """Of the first token, between alpha 1 and dense attention."""
    return np.abs(program(name)(1.0).full_log_prob - jax.device_get(dense().full_log_prob))[:, 0]


@pytest.mark.parametrize("name", ["v1", "packed", pytest.param("packed, not corrected", marks=pytest.mark.slow)])
def test_large_alpha_is_not(name):
    assert (gap(name)[:2] > 1e-3).all()
    assert gap(name)[2] < 1e-5  # a prompt of one block has nothing to leave out


@pytest.mark.slow  # the kernel's own tests see it too
def test_correction_tells():
    assert (np.abs(gap("packed") - gap("packed, not corrected"))[:2] > 1e-3).all()


def test_decoding_and_what_follows_a_prefix_are_dense():
    calls = []

    def counting(q, k, v, length):
        calls.append(q.shape)
        return v1(0.0)(q, k, v, length)

    jax.eval_shape(generator(counting), sharp_params(CONFIG))
    assert calls == [(3, WIDTH, 4, 8)] * 2  # once a layer, and never for a step of one token
    calls.clear()
    sparse = generated(counting, prefix=PREFIX)
    assert calls == [(1, 19, 4, 8)] * 2  # the prefix alone: what follows it is dense
    np.testing.assert_allclose(sparse.full_log_prob, generated(None, prefix=PREFIX).full_log_prob, atol=2e-5)


@pytest.mark.slow  # the rows above are padded, and the kernels have tests of it
def test_padding_does_not_matter():
    model = transformer(CONFIG)._replace(prefill=v1(0.5))
    params = sharp_params(CONFIG)
    once = jax.jit(lambda tokens, lengths: generate(model, params, KEYS[:1], tokens, lengths, max_new_tokens=NEW))
    padded = once(PROMPTS[1:2], LENGTHS[1:2])
    other_pad = once(PROMPTS[1:2].at[:, 30:].set(3), LENGTHS[1:2])
    cut = once(PROMPTS[1:2, :30], LENGTHS[1:2])
    np.testing.assert_array_equal(padded.full_log_prob, other_pad.full_log_prob)
    np.testing.assert_allclose(padded.full_log_prob, cut.full_log_prob, atol=1e-5)


def test_seeds_and_alphas_in_one_program():
    """A vmap over seeds (parameters) of a vmap over traced alphas gives what single runs give."""
    model = transformer(dataclasses.replace(CONFIG, num_layers=1))
    starts = jax.jit(jax.vmap(lambda key: jax.tree.map(lambda x: 1.5 * x, model.init(key))))(
        jax.random.split(jax.random.key(3), 2)
    )
    alphas = jnp.array([0.0, 0.5, 1.0])

    def log_prob(params, alpha):
        sparse = model._replace(prefill=v1(alpha))
        return generate(sparse, params, KEYS, PROMPTS, LENGTHS, max_new_tokens=NEW, early_exit=False).full_log_prob

    many = jax.jit(jax.vmap(jax.vmap(log_prob, (None, 0)), (0, None)))(starts, alphas)
    single = jax.jit(log_prob)
    for seed, i in ((0, 1), (1, 2)):
        one = jax.tree.map(lambda x, seed=seed: x[seed], starts)
        np.testing.assert_allclose(many[seed, i], single(one, alphas[i]), atol=1e-4)


@pytest.mark.slow  # sampling at alpha 0 and 1 and dense scores have tests of their own
def test_a_rollout_with_sparse_prefill_scores_as_itself_at_alpha_0():
    env = envs.sorting(20)
    model = transformer(TransformerConfig(len(env.spec.vocab), 32, 2, 2))
    params = jax.tree.map(lambda x: 2 * x, jax.jit(model.init)(jax.random.key(0)))

    @jax.jit
    def gap(alpha):
        sampler = model._replace(prefill=v1(alpha))
        seen = rollout(jax.random.key(1), sampler, params, env, num_prompts=2, group_size=2)
        return jnp.abs(jnp.where(seen.mask, score(model, params, seen, env)[0] - seen.full_log_prob, 0)).max()

    assert gap(0.0) < 5e-5
    assert gap(1.0) > 1e-4


def test_what_is_trained_is_dense_also_after_a_prefix():
    env = envs.sorting(5)
    model = transformer(TransformerConfig(len(env.spec.vocab), 32, 1, 2))
    params = jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, model.init(key)))(jax.random.key(0))
    prefix = jnp.arange(40) % len(env.spec.vocab)
    play = partial(rollout, model=model, env=env, num_prompts=2, group_size=2, prefix=prefix)
    seen = jax.jit(lambda params: play(jax.random.key(1), params=params))(params)
    scores = [
        jax.jit(lambda params, m=m: score(m, params, seen, env, prefix=prefix)[0])(params)
        for m in (model, model._replace(prefill=v1(1.0)))
    ]
    np.testing.assert_array_equal(*scores)


def test_a_table_has_no_prompt_to_attend_to():
    model = tabular(jnp.zeros((2, 3, 5)))._replace(prefill=v1(0.1))
    with pytest.raises(ValueError, match="prefill: expected None for a model without attention"):
        generate(model, model.init(jax.random.key(0)), KEYS[:2], PROMPTS[:2, :1], jnp.ones(2, int), max_new_tokens=1)
