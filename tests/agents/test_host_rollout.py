"""Episodes on the host are those of `rollout`: in copies of compiled environments, and in a game written in Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents import (
    Sampling,
    TransformerConfig,
    host_rollout,
    host_sampler,
    restrict_vocabulary,
    rollout,
    score,
    transformer,
)
from rollax.envs import HostEnvironment, Step, Tokens, arithmetic, on_host, persona_chat
from rollax.envs.environment import TokenSpec

PROMPTS, GROUP = 3, 2


@functools.cache
def lm(vocab_size):
    model = transformer(TransformerConfig(vocab_size, width=32, num_layers=2, num_heads=4, num_kv_heads=2))
    return model, jax.tree.map(lambda x: 2 * x, model.init(jax.random.key(0)))


def same(got, wanted):
    """The trajectories are equal to the last bit wherever they mean something."""
    got, wanted = jax.device_get((got, wanted))
    real, played = wanted.positions >= 0, wanted.mask.reshape(*wanted.reward.shape, -1).any(axis=2)
    assert got._fields == wanted._fields
    for name, x, y in zip(got._fields, got, wanted, strict=True):
        if name in ("tokens", "info"):
            continue
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    np.testing.assert_array_equal(got.tokens[real], wanted.tokens[real])
    assert got.info.keys() == wanted.info.keys()
    for name, y in wanted.info.items():
        np.testing.assert_array_equal(got.info[name][played], y[played], err_msg=name)
        assert not got.info[name][~played].any(), name


@pytest.mark.parametrize("name", ["several turns", "one turn", "with a prefix"])
def test_a_copy_on_the_host_plays_the_same_episodes(name):
    env = arithmetic("+", 1) if name == "one turn" else persona_chat(0.5, max_turns=3)
    model, params = lm(len(env.spec.vocab))
    options = dict(num_prompts=PROMPTS, group_size=GROUP, sampling=Sampling(temperature=0.8, top_k=9))
    if name == "with a prefix":
        options["prefix"] = jnp.array([4, 7, 1], jnp.int32)
    sample = host_sampler(model, on_host(env), **options)
    wanted = jax.jit(lambda key, params: rollout(key, model, params, env, **options))
    for seed in (3, 4):
        same(sample(jax.random.key(seed), params), wanted(jax.random.key(seed), params))
