"""The few layers that small networks here are made of, as functions of plain trees.

The shapes of the parameters say everything static: how many heads there are is an axis of the kernels. Decoders have
their own modules (`agents.transformer`); what both share is `attend`.
"""

import jax
import jax.numpy as jnp

from rollax.agents.transformer import attend, island


def dense_init(key: jax.Array, inputs: int, outputs: int, *, std: float | None = None) -> dict:
    """`{"kernel": [inputs, outputs], "bias": [outputs]}`; None for a standard deviation of 1/sqrt(inputs), bias 0."""
    std = inputs**-0.5 if std is None else std
    return {"kernel": std * jax.random.normal(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}


def dense(params: dict, x: jax.Array) -> jax.Array:
    """`x @ kernel + bias`, `[..., inputs] -> [..., outputs]`."""
    return x @ params["kernel"] + params["bias"]


def layer_norm_init(size: int) -> dict:
    """`{"scale": ones, "bias": zeros}`."""
    return {"scale": jnp.ones(size), "bias": jnp.zeros(size)}


def layer_norm(params: dict, x: jax.Array, *, eps: float = 1e-5) -> jax.Array:
    """Zero mean and unit variance over the last axis, `eps` inside the root, in float32; then scale and bias."""
    wide = x.astype(island(x.dtype))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * params["scale"] + params["bias"]


def attention_init(key: jax.Array, width: int, heads: int) -> dict:
    """Projections "q", "k", "v" with kernels `[D, H, d]` and biases `[H, d]`, and "o" `[H, d, D]`; d = D / H.

    Raises:
      ValueError: a width that the heads do not divide.
    """
    if heads < 1 or width % heads:
        raise ValueError(f"width: expected a multiple of the {heads} heads, got {width}")
    d = width // heads
    keys = jax.random.split(key, 4)
    params = {}
    for name, k in zip("qkv", keys, strict=False):
        params[name] = {
            "kernel": width**-0.5 * jax.random.normal(k, (width, heads, d)),
            "bias": jnp.zeros((heads, d)),
        }
    params["o"] = {"kernel": width**-0.5 * jax.random.normal(keys[3], (heads, d, width)), "bias": jnp.zeros(width)}
    return params


def attention(params: dict, queries: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """Multi-head attention with biases.

    Args:
      queries: `[B, T, D]`; keys, values: `[B, S, D]`.
      visible: bool, broadcastable to `[B, T, S]`. A row that sees nothing gets the mean over all keys: finite, and for
        the caller to leave out.
    Returns:
      `[B, T, D]`.
    """
    q, k, v = (
        jnp.einsum("btd,dhe->bthe", x, params[name]["kernel"]) + params[name]["bias"]
        for name, x in (("q", queries), ("k", keys), ("v", values))
    )
    visible = jnp.broadcast_to(visible, (*q.shape[:2], k.shape[1]))
    return jnp.einsum("bthe,hed->btd", attend(q, k, v, visible), params["o"]["kernel"]) + params["o"]["bias"]
