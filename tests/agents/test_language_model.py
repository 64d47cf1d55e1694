"""token_log_probs is the log-softmax of apply's logits for every kind of model; repeat_rows repeats rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents.language_model import LanguageModel, repeat_rows, token_log_probs
from rollax.agents.transformer import TransformerConfig, transformer

V = 7


def table():
    """A model without hidden states: the logits of the next token are a row of a table."""

    def apply(params, tokens, positions, cache=None):
        return params[tokens], cache

    return LanguageModel(lambda key: jax.random.normal(key, (V, V)), apply, lambda *_: None, None, None, None, V)


def small_transformer(**changes):
    return transformer(TransformerConfig(V, width=16, num_layers=1, num_heads=2, **changes))


@pytest.mark.parametrize(
    "make", [table, small_transformer, pytest.param(lambda: small_transformer(tied_head=False), marks=pytest.mark.slow)]
)
def test_is_the_log_softmax_of_the_logits(make):
    model = make()
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (3, 6), 0, V)
    targets = jnp.roll(tokens, -1, axis=1)
    positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)

    def direct(params, temperature):
        log_probs = jax.nn.log_softmax(model.apply(params, tokens, positions)[0] / temperature)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0], entropy

    def scored(params, temperature):
        return token_log_probs(model, params, tokens, positions, targets, temperature=temperature, chunk=4)

    @jax.jit
    def both(params, temperature):
        weights = jnp.arange(18.0).reshape(3, 6)
        total = lambda f: lambda p, t: sum(jnp.mean(weights * x) for x in f(p, t))  # noqa: E731
        return [
            (f(params, temperature), jax.grad(total(f), argnums=(0, 1))(params, temperature)) for f in (direct, scored)
        ]

    expected, actual = both(params, 0.6)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_impossible_tokens_of_a_table_do_no_harm():
    model = table()
    params = jnp.zeros((V, V)).at[:, 3].set(-jnp.inf)
    tokens = jnp.zeros((1, 2), jnp.int32)

    def loss(params):
        log_prob, entropy = token_log_probs(model, params, tokens, tokens, tokens + 1)
        return log_prob.sum() + entropy.sum(), entropy

    (_, entropy), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(entropy, np.log(6), rtol=1e-6)
    assert bool(jnp.isfinite(gradient).all())


def test_repeat_rows():
    cache = small_transformer().init_cache(2, 3)
    cache = cache._replace(positions=jnp.asarray([[0, 1, -1], [5, -1, -1]]), index=jnp.int32(2))
    repeated = repeat_rows(cache, 2)
    np.testing.assert_array_equal(repeated.positions, [[0, 1, -1]] * 2 + [[5, -1, -1]] * 2)
    assert int(repeated.index) == 2 and repeated.keys[0].shape[::2] == (4, 3)
