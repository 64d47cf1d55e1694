"""What random fast weights recall when LaCT's rules write a stream into them, with nothing trained (arXiv 2505.23884).

A stream shows objects, chunk by chunk, and afterwards the memory is asked for those of every age: which rules keep the
old ones. The part "mechanism" of `ttt_recall.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rollax.kernels.ttt import FastWeights, UpdateRule, lact_apply, lact_scan

CHUNKS, OBJECTS, COPIES = 12, 8, 8  # chunks of a stream, objects of a chunk, tokens of an object
AGES = tuple(range(CHUNKS))


class Memory(NamedTuple):
    """How a memory learns, at which rate, and how wide its keys and values are."""

    rule: UpdateRule
    rate: float = 1e-3
    width: int = 64


PRE, PRE_MOMENTUM, POST, POST_MOMENTUM = (
    UpdateRule(muon=True, momentum=momentum, norm=norm) for norm in ("pre", "post") for momentum in (False, True)
)
GRADIENT = UpdateRule(muon=False, momentum=False, norm="post")
MEMORIES = {
    "pre-norm": Memory(PRE),
    "pre-norm, momentum": Memory(PRE_MOMENTUM),
    "post-norm": Memory(POST),
    "post-norm, momentum": Memory(POST_MOMENTUM),
    "pre-norm, width 32": Memory(PRE, width=32),
    "post-norm, momentum, width 32": Memory(POST_MOMENTUM, width=32),
    "gradient 1e-3": Memory(GRADIENT, 1e-3),
    "gradient 1e-2": Memory(GRADIENT, 1e-2),
    "gradient 1e-1": Memory(GRADIENT, 1e-1),
}


def recall_by_age(key: jax.Array, memory: Memory) -> jax.Array:
    """Share of a chunk's objects that are told apart when the chunk is 0, 1, ... chunks old, `[CHUNKS]`.

    A stream's chunk shows 8 objects, 8 times each, with noise on the key; afterwards the memory is asked with the clean
    key, and the answer counts where it is nearer to the object's value than to the other seven (cosine, centred).
    """
    rule, rate, d = memory
    tokens = OBJECTS * COPIES
    weight_keys, key_key, value_key, noise_key = (*jax.random.split(key, 6)[:3],), *jax.random.split(key, 6)[3:]
    weights = FastWeights(*(jax.random.normal(k, (1, d, d)) * d**-0.5 for k in weight_keys))
    clean = unit(jax.random.normal(key_key, (CHUNKS, OBJECTS, d)))
    values = jax.nn.silu(jax.random.normal(value_key, (CHUNKS, OBJECTS, d)))
    noise = 0.3 * d**-0.5 * jax.random.normal(noise_key, (CHUNKS, COPIES, OBJECTS, d))
    keys = unit(clean[:, None] + noise).reshape(1, 1, CHUNKS * tokens, d)
    seen = jnp.broadcast_to(values[:, None], (CHUNKS, COPIES, OBJECTS, d)).reshape(1, 1, CHUNKS * tokens, d)
    rates = jnp.full((1, 1, CHUNKS * tokens, 3), rate)
    momentum = jnp.full((1, 1, CHUNKS * tokens), 0.5) if rule.momentum else None
    _, state = lact_scan(weights, keys, keys, seen, rates, momentum, chunk=tokens, rule=rule)
    answers = lact_apply(state.w, clean.reshape(1, 1, -1, d)).reshape(CHUNKS, OBJECTS, d)
    centred = unit(values - values.mean(1, keepdims=True))
    nearest = jnp.argmax(jnp.einsum("cod,cpd->cop", unit(answers - answers.mean(1, keepdims=True)), centred), axis=-1)
    return (nearest == jnp.arange(OBJECTS)).mean(axis=1)[::-1]


def unit(x: jax.Array) -> jax.Array:
    """To length 1 along the last axis; zeros stay zero."""
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-5)
