"""Token log-probabilities in tiles of tokens and vocabulary: neither pass ever holds more than one tile of logits.

The forward pass keeps two numbers a token (log-normaliser and entropy), summed over the vocabulary as it goes; the
backward pass forms each tile's logits again. The idea of Cut Your Losses (arXiv 2411.09009) in plain jnp.

The vocabulary is the outer loop. With V of 150,000 the head is what is large, and so each pass reads it once, and the
backward pass writes its gradient once, from a float32 sum as wide as a tile and not as the head. A head of one block of
columns (`columns` = V) is never sliced: the form for a vocabulary that is sharded over devices.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rollax.kernels.backends import alike, product


def split(x, chunks):
    """`[N, ...]` to `[chunks, ceil(N / chunks), ...]`, padded with zeros; chunk c takes the tokens i * chunks + c.

    Strided, so that where N is sharded over devices every chunk is sharded alike and nothing moves between them.
    """
    size = -(-x.shape[0] // chunks)
    padded = jnp.pad(x, [(0, size * chunks - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return jnp.moveaxis(padded.reshape(size, chunks, *x.shape[1:]), 1, 0)


def merge(x, count):
    """The inverse of `split`: `[chunks, size, ...]` to `[N, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(-1, *x.shape[2:])[:count]


def block_of(head, i, columns):
    """(columns i * columns ... of the head `[D, columns]`, id of the first, which of them are new, bool `[columns]`).

    The last block of an uneven vocabulary starts early and repeats columns of the one before.
    """
    V = head.shape[1]
    if columns == V:
        return head, 0, jnp.ones(V, bool)
    start = jnp.minimum(i * columns, V - columns)
    block = jax.lax.dynamic_slice_in_dim(head, start, columns, axis=1)
    return block, start, start + jnp.arange(columns) >= i * columns


def tempered(hidden, head, temperature):
    """Logits over temperature, `[chunk, columns]`, in float32 at least."""
    return product("nd,dv->nv", hidden, head) / temperature


def forward(hidden, head, targets, temperature, chunks, columns):
    """(log_prob, entropy, log-normaliser), each `[N]`."""
    N, V = hidden.shape[0], head.shape[1]
    wide = temperature.dtype

    def of_block(state, i):
        block, first, new = block_of(head, i, columns)

        def of_chunk(_, chunk):
            h, t, top, total, spread, chosen = chunk
            z = tempered(h, block, temperature)
            z = z if columns == V else jnp.where(new, z, -jnp.inf)
            # total = sum exp(z - top), spread = sum (z - top) exp(z - top), both moved along when the maximum rises.
            highest = jnp.maximum(top, z.max(axis=-1))
            fall = jnp.where(total > 0, top - highest, 0)
            below = z - highest[:, None]
            p = jnp.exp(below)
            spread = jnp.exp(fall) * (spread + fall * total) + jnp.sum(jnp.where(p > 0, below * p, 0), axis=-1)
            total = jnp.exp(fall) * total + jnp.sum(p, axis=-1)
            here = (t >= first) & (t < first + columns)
            found = jnp.take_along_axis(z, jnp.clip(t - first, 0, columns - 1)[:, None], axis=-1)[:, 0]
            # A column that is not new was found in the block before, and is -inf here.
            return None, (highest, total, spread, jnp.where(here, jnp.maximum(chosen, found), chosen))

        return jax.lax.scan(of_chunk, None, (tokens, labels, *state))[1], None

    tokens, labels = split(hidden, chunks), split(targets, chunks)
    start = [jnp.full(labels.shape, value, wide) for value in (-jnp.inf, 0, 0, -jnp.inf)]
    _, *start = alike(hidden, *start)
    (top, total, spread, chosen), _ = jax.lax.scan(of_block, tuple(start), jnp.arange(-(-V // columns)))
    outputs = chosen - top - jnp.log(total), jnp.log(total) - spread / total, top + jnp.log(total)
    return tuple(merge(x, N) for x in outputs)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def tiled(hidden, head, targets, temperature, chunks, columns):
    """(log_prob `[N]`, entropy `[N]`) of hidden `[N, D]`, head `[D, V]`, targets `[N]`."""
    return forward(hidden, head, targets, temperature, chunks, columns)[:2]


def tiled_forward(hidden, head, targets, temperature, chunks, columns):
    log_prob, entropy, normaliser = forward(hidden, head, targets, temperature, chunks, columns)
    return (log_prob, entropy), (hidden, head, targets, temperature, normaliser, entropy)


def tiled_backward(chunks, columns, saved, cotangents):
    hidden, head, targets, temperature, normaliser, entropy = saved
    wide, V = normaliser.dtype, head.shape[1]
    chunked = tuple(split(x, chunks) for x in (hidden, targets, normaliser, entropy, *cotangents))

    def of_block(carry, i):
        d_hidden, d_head, d_temperature = carry
        block, first, new = block_of(head, i, columns)

        def of_chunk(carry, chunk):
            d_block, d_temperature = carry
            (h, t, norm, ent, d_log_prob, d_entropy), d_h = chunk
            z = tempered(h, block, temperature)
            log_probs = z - norm[:, None]
            p = jnp.exp(log_probs)
            # d log p_t / d z = 1[t] - p and d entropy / d z = -p (log p + entropy).
            chosen = first + jnp.arange(columns) == t[:, None]
            d_z = d_log_prob[:, None] * (chosen - p) - d_entropy[:, None] * p * (log_probs + ent[:, None])
            counted = d_z if columns == V else jnp.where(new, d_z, 0)
            d_temperature -= jnp.sum(counted * z) / temperature
            d_logits = (d_z / temperature).astype(h.dtype)
            once = d_logits if columns == V else jnp.where(new, d_logits, 0)
            d_h += product("nv,dv->nd", once, block)
            d_block += product("nd,nv->dv", h, d_logits)
            return (d_block, d_temperature), d_h

        start = alike(jnp.zeros(block.shape, wide), d_temperature)
        (d_block, d_temperature), d_hidden = jax.lax.scan(of_chunk, start, (chunked, d_hidden))
        d_block = d_block.astype(head.dtype)
        # Columns that are not new are written a second time, with the same numbers.
        d_head = d_block if columns == V else jax.lax.dynamic_update_slice_in_dim(d_head, d_block, first, axis=1)
        return (d_hidden, d_head, d_temperature), None

    start = (jnp.zeros(chunked[0].shape, wide), jnp.zeros_like(head), jnp.zeros((), wide))
    _, *start = alike(hidden, *start)
    (d_hidden, d_head, d_temperature), _ = jax.lax.scan(of_block, tuple(start), jnp.arange(-(-V // columns)))
    return merge(d_hidden, hidden.shape[0]).astype(hidden.dtype), d_head, None, d_temperature


tiled.defvjp(tiled_forward, tiled_backward)
