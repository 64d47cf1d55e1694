"""The critic: aligned with the log-probs, causal, and pre-trained to a fixed policy's returns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents.critic import ValueBatch, critic, pretrain_critic, value_head_init, values_before, values_of
from rollax.agents.tabular import tabular
from rollax.agents.transformer import TransformerConfig, transformer
from rollax.objectives import discounted_returns

CONFIG = TransformerConfig(vocab_size=8, width=16, num_layers=1, num_heads=2)
B, T = 16, 6


@pytest.fixture(scope="module")
def model():
    return transformer(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    """A critic whose head is not zero."""
    params = jax.jit(critic(model).init)(jax.random.key(0))
    return params | {"value": {"kernel": jax.random.normal(jax.random.key(1), (16,)), "bias": jnp.float32(0.5)}}


def test_it_starts_at_zero_from_the_policy(model, params):
    policy = params["trunk"]
    params = critic(model).init(jax.random.key(0), policy)
    assert all(map(np.array_equal, jax.tree.leaves(params["trunk"]), jax.tree.leaves(policy)))
    tokens, positions = jnp.zeros((1, T), jnp.int32), jnp.arange(T)[None]
    assert not jax.jit(critic(model).apply)(params, tokens, positions).any()


def test_values_are_causal_and_ignore_padding(model, params):
    apply = jax.jit(critic(model).apply)
    tokens = jnp.array([[3, 1, 0, 2, 2, 1]])
    positions = jnp.arange(T)[None]
    values = apply(params, tokens, positions)
    assert values.shape == (1, T) and values.dtype == jnp.float32
    later = apply(params, tokens.at[0, 3].add(1) % 4, positions)
    np.testing.assert_array_equal(later[:, :3], values[:, :3])
    assert (later[:, 3:] != values[:, 3:]).all()
    pad = lambda x, value: jnp.pad(x, ((0, 0), (2, 0)), constant_values=value)  # noqa: E731
    padded = apply(params, pad(tokens, 3), pad(positions, -1))
    np.testing.assert_allclose(padded[:, 2:], values, atol=1e-5)
    cache = model.init_cache(1, T)
    _, cache = jax.jit(model.hidden)(params["trunk"], tokens[:, :2], positions[:, :2], cache)
    np.testing.assert_allclose(apply(params, tokens[:, 2:], positions[:, 2:], cache), values[:, 2:], atol=1e-5)


def test_a_shared_trunk_can_be_detached(model, params):
    tokens, positions = jnp.ones((1, T), jnp.int32), jnp.arange(T)[None]

    @partial(jax.jit, static_argnames="detach")
    def gradient(params, detach):
        hidden = lambda p: model.hidden(p["trunk"], tokens, positions)[0]  # noqa: E731
        return jax.grad(lambda p: values_of(p["value"], hidden(p), detach=detach).sum())(params)

    assert not any(x.any() for x in jax.tree.leaves(gradient(params, True)["trunk"]))
    assert gradient(params, True)["value"]["kernel"].any()
    assert gradient(params, False)["trunk"]["norm"]["scale"].any()
    half = values_of(value_head_init(16), jnp.ones((1, 1, 16), jnp.bfloat16))
    assert half.dtype == jnp.float32


def batch_of(key):
    """A prompt token 4 + p, then actions that mean nothing; paid at the end with probability p / 3: V is p / 3."""
    prompt_key, action_key, reward_key = jax.random.split(key, 3)
    p = jax.random.randint(prompt_key, (B,), 0, 4)
    tokens = jax.random.randint(action_key, (B, T), 0, 4).at[:, 0].set(4 + p)
    paid = jax.random.bernoulli(reward_key, p / 3)
    mask = jnp.tile(jnp.arange(T) < T - 1, (B, 1))  # no action follows the last token
    reward = jnp.zeros((B, T)).at[:, -2].set(paid).at[:, -1].set(jnp.nan)
    return ValueBatch(tokens, jnp.tile(jnp.arange(T), (B, 1)), discounted_returns(reward, mask), mask)


def test_pretraining_finds_the_policys_value(model):
    evaluate = critic(model)
    keys = jax.random.split(jax.random.key(0))
    train = partial(pretrain_critic, apply=evaluate.apply, sample=batch_of, updates=150, lr=1e-2)
    params, losses = jax.jit(jax.vmap(lambda key: train(key, params=evaluate.init(key))))(keys)
    batch = batch_of(jax.random.key(5))
    truth = (batch.tokens[:, :1] - 4) / 3
    assert losses.shape == (2, 150)
    values = jax.jit(jax.vmap(evaluate.apply, in_axes=(0, None, None)))(params, batch.tokens, batch.positions)
    assert np.abs(values - truth)[..., :-1].mean() < 0.1 < np.abs(truth).mean()
    # What is left is the noise of the returns, p / 3 (1 - p / 3).
    np.testing.assert_allclose(losses[:, -75:].mean(), 1 / 9, atol=0.02)
    assert losses[:, :5].mean() > 0.2


def test_a_table_has_no_trunk():
    with pytest.raises(ValueError, match="model: expected one with hidden states, got a table"):
        critic(tabular(jnp.zeros((2, 3, 4))))


def test_values_before_a_token_skip_padding():
    values = jnp.array([[1.0, 2, 3, 4, 5]])
    np.testing.assert_array_equal(values_before(values, jnp.array([[0, 1, -1, 2, 3]])), [[0, 1, 2, 2, 4]])
    np.testing.assert_array_equal(values_before(values, jnp.array([[-1, -1, 0, 1, 2]])), [[0, 0, 0, 3, 4]])
