"""The ordinary critic: a linear value head on a language model's trunk, the policy's own or a second one.

With `objectives.gae` it is PPO's, with `objectives.vapo_gae` and the pre-training below VAPO's (arXiv 2504.05118).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rollax.agents.language_model import LanguageModel


def value_head_init(width: int) -> dict:
    """`{"kernel": [D], "bias": []}`, all zero: the first values are 0 and the first gradient moves the head alone."""
    return {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}


def values_of(head: dict, hidden: jax.Array, *, detach: bool = False) -> jax.Array:
    """Values of the states *before* the tokens that follow, `[B, T]`, float32 or wider.

    Args:
      head: of `value_head_init`.
      hidden: `[B, T, D]`, what a `LanguageModel`'s `hidden` gives; entry t has seen tokens 0..t, and its value belongs
        with the log-prob of token t + 1 (`token_log_probs` has it in the same place).
      detach: static; True keeps the value loss out of the trunk.
    """
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    hidden = jax.lax.stop_gradient(hidden) if detach else hidden
    return hidden @ head["kernel"] + head["bias"]


def values_before(values: jax.Array, positions: jax.Array) -> jax.Array:
    """The values of `Critic.apply` of the state before each token, `[B, T]`; 0 before the first.

    A token follows the last real one before it, from which padding may separate it.

    Args:
      values: `[B, T]`, entry t has seen tokens 0..t.
      positions: int `[B, T]`, -1 on padding.
    """
    columns = jnp.where(positions >= 0, jnp.arange(positions.shape[1]), -1)
    last = jnp.pad(jax.lax.cummax(columns, axis=1), ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return jnp.where(last >= 0, jnp.take_along_axis(values, jnp.maximum(last, 0), axis=1), 0.0)


class Critic(NamedTuple):
    """A value function with a trunk of its own.

    Attributes:
      init: `init(key, trunk=None) -> params`; `trunk` is where it starts, such as the policy's parameters (VAPO), None
        for fresh ones.
      apply: `apply(params, tokens[B, T], positions[B, T], cache=None) -> values[B, T]`, aligned as in `values_of`.
    """

    init: Callable[..., Any]
    apply: Callable[..., jax.Array]


def critic(model: LanguageModel) -> Critic:
    """The critic with `model`'s architecture.

    Raises:
      ValueError: a model without hidden states (a table).
    """
    if model.hidden is None:
        raise ValueError("model: expected one with hidden states, got a table")

    def init(key, trunk=None):
        trunk = model.init(key) if trunk is None else trunk
        shapes = jax.eval_shape(model.head, trunk)
        return {"trunk": trunk, "value": value_head_init(shapes.shape[0])}

    def apply(params, tokens, positions, cache=None):
        return values_of(params["value"], model.hidden(params["trunk"], tokens, positions, cache)[0])

    return Critic(init, apply)


class ValueBatch(NamedTuple):
    """Rollouts of a fixed policy and what they returned.

    Attributes:
      tokens, positions: int32 `[B, T]`, as for `Critic.apply`.
      returns: Monte-Carlo returns, `[B, T]` (`objectives.discounted_returns`, undiscounted in VAPO).
      mask: bool `[B, T]`, where a value is wanted: the policy's own tokens.
    """

    tokens: jax.Array
    positions: jax.Array
    returns: jax.Array
    mask: jax.Array


def pretrain_critic(
    key: jax.Array,
    apply: Callable[..., jax.Array],
    params: Any,
    sample: Callable[[jax.Array], ValueBatch],
    updates: int,
    *,
    lr: jax.Array | float = 1e-4,
) -> tuple[Any, jax.Array]:
    """VAPO's value pre-training: regression on Monte-Carlo returns of a fixed policy, before the policy moves.

    Otherwise a fresh critic's first advantages are noise, and with lambda below 1 bias (arXiv 2504.05118, 4.1). One
    scan: jit it, and vmap it over keys and rates.

    Args:
      apply: of `Critic`.
      params: of `Critic.init`.
      sample: `sample(key)`, jittable: fresh rollouts, or rows of a fixed batch.
      updates: static; Adam steps, gradient norm at most 1.
      lr: may be traced.
    Returns:
      (params, mean squared error of every update before it `[updates]`).
    """
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale_by_learning_rate(lr))

    def loss_of(params, batch):
        error = jnp.where(batch.mask, apply(params, batch.tokens, batch.positions) - batch.returns, 0.0)
        return jnp.square(error).sum() / jnp.maximum(batch.mask.sum(), 1)

    def update(carry, step):
        params, opt_state = carry
        loss, gradient = jax.value_and_grad(loss_of)(params, sample(jax.random.fold_in(key, step)))
        change, opt_state = optimiser.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), loss

    (params, _), losses = jax.lax.scan(update, (params, optimiser.init(params)), jnp.arange(updates))
    return params, losses
