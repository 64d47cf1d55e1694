"""Decode attention in plain jnp: one pass over the keys that are there, in blocks, on CPUs; all keys at once elsewhere.

A product of a few rows with a whole cache reads every slot of it, used or not, and in bfloat16 a CPU first writes all
of it again in float32. Blocks of one row and one key head are contiguous and stay in a core's cache, so they cost what
their bytes cost, and slots beyond a row's length cost nothing. A small cache in float32 that is more than half full is
faster whole: its products use all cores.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rollax.kernels.backends import alike
from rollax.kernels.decode_attention.reference import reference
from rollax.kernels.flash_prefill.api import folded

LOG2E = 1.4426950408889634
BLOCK = 256  # keys: 64 KiB of a head of 64 in float32
SMALL = 2**19  # bytes of keys of a row and head up to which a full cache is taken whole
HIDDEN = -1e30  # finite: -inf - -inf would be NaN


def whole(q, k, v, length, mask, scale):
    """`reference`, whose two products already are the best form for a device that runs thousands of rows at once."""
    visible = jnp.arange(k.shape[2]) < length[:, None]
    return reference(q, k, v, visible if mask is None else visible & mask, scale)


def by_blocks(q, k, v, length, mask, scale):
    """One row and key head after the other, over blocks of keys up to the row's length; no gradient."""
    (B, H, d), (K, S) = q.shape, k.shape[1:3]
    g, block = H // K, min(S, BLOCK)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = q.reshape(B * K, g, d), k.reshape(B * K, S, d), v.reshape(B * K, S, d)
    length = jnp.minimum(length, S)

    def of_pair(n):
        mine = length[n // K]

        def step(i, state):
            top, total, out = state
            start = jnp.minimum(i * block, S - block)  # the last block of an odd cache overlaps the one before
            corner = (n, start, jnp.int32(0))
            keys, values = (jax.lax.dynamic_slice(x, corner, (1, block, d))[0] for x in (k, v))
            scores = jax.lax.dot_general(q[n], keys, (((1,), (1,)), ((), ())), preferred_element_type=wide)
            place = start + jnp.arange(block)
            seen = (place >= i * block) & (place < mine)
            if mask is not None:
                seen &= jax.lax.dynamic_slice(mask, (n // K, start), (1, block))[0]
            scores = jnp.where(seen, scores * (scale * LOG2E), HIDDEN)
            new = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(seen, jnp.exp2(scores - new[:, None]), 0)
            kept = jnp.exp2(top - new)
            weighted = jax.lax.dot_general(
                weights.astype(v.dtype), values, (((1,), (0,)), ((), ())), preferred_element_type=wide
            )
            return new, total * kept + weights.sum(-1), out * kept[:, None] + weighted

        start = jnp.full(g, HIDDEN, wide), jnp.zeros(g, wide), jnp.zeros((g, d), wide)
        start = alike(q, *start)[1:]
        top, total, out = jax.lax.fori_loop(0, -(-mine // block), step, start)
        some = total > 0
        safe = jnp.where(some, total, 1)
        return (out / safe[:, None]).astype(q.dtype), jnp.where(some, top / LOG2E + jnp.log(safe), -jnp.inf)

    out, lse = jax.lax.map(of_pair, jnp.arange(B * K, dtype=jnp.int32))
    return out.reshape(B, H, d), lse.reshape(B, H)


def on_cpu(q, k, v, length, mask, scale):
    B, S = k.shape[0], k.shape[2]
    if k.dtype.itemsize < 4 or S * k.shape[3] * k.dtype.itemsize > SMALL:
        return by_blocks(q, k, v, length, mask, scale)
    full = 2 * jnp.sum(jnp.minimum(length, S)) > B * S
    return jax.lax.cond(full, *(partial(f, scale=scale) for f in (whole, by_blocks)), q, k, v, length, mask)


def forward(q, k, v, length, mask, scale):
    """(out, lse) as in `reference`; length int32 `[B]`, mask bool `[B, S]` or None. A vmapped axis lengthens B."""

    def of_arrays(q, k, v, length, *mask):
        args = (q, k, v, length, mask[0] if mask else None)
        forms = {"cpu": on_cpu, "default": whole}
        return jax.lax.platform_dependent(*args, **{name: partial(f, scale=scale) for name, f in forms.items()})

    return folded(of_arrays)(q, k, v, length, *(() if mask is None else (mask,)))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q, k, v, length, mask, scale):
    """`forward`, differentiable in q, k and v: the backward pass forms all scores again, `[B, H, S]`."""
    return forward(q, k, v, length, mask, scale)


def attend_forward(q, k, v, length, mask, scale):
    return forward(q, k, v, length, mask, scale), (q, k, v, length, mask)


def attend_backward(scale, saved, cotangents):
    q, k, v, length, mask = saved
    _, pull = jax.vjp(lambda q, k, v: whole(q, k, v, length, mask, scale), q, k, v)
    return (*pull(cotangents), None, None)


attend.defvjp(attend_forward, attend_backward)
