"""Token log-probabilities in chunks of tokens: neither pass ever holds more than `[chunk, V]` logits.

The forward pass keeps two numbers a token (log-normaliser and entropy); the backward pass forms each chunk's logits
again and accumulates the gradient of the head in float32. The idea of Cut Your Losses (arXiv 2411.09009) in plain jnp.
"""

from functools import partial

import jax
import jax.numpy as jnp


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


def tempered(hidden, head, temperature):
    """Logits over temperature, `[chunk, V]`, in float32 at least."""
    wide = jnp.promote_types(jnp.result_type(hidden, head), jnp.float32)
    return jnp.einsum("nd,dv->nv", hidden, head, preferred_element_type=wide) / temperature


def forward(hidden, head, targets, temperature, chunks):
    def body(_, chunk):
        h, t = chunk
        z = tempered(h, head, temperature)
        normaliser = jax.nn.logsumexp(z, axis=-1)
        log_prob = jnp.take_along_axis(z, t[:, None], axis=-1)[:, 0] - normaliser
        log_probs = z - normaliser[:, None]
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return None, (log_prob, entropy, normaliser)

    _, outputs = jax.lax.scan(body, None, (split(hidden, chunks), split(targets, chunks)))
    return tuple(merge(x, hidden.shape[0]) for x in outputs)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def chunked(hidden, head, targets, temperature, chunks):
    """(log_prob `[N]`, entropy `[N]`) of hidden `[N, D]`, head `[D, V]`, targets `[N]`."""
    return forward(hidden, head, targets, temperature, chunks)[:2]


def chunked_forward(hidden, head, targets, temperature, chunks):
    log_prob, entropy, normaliser = forward(hidden, head, targets, temperature, chunks)
    return (log_prob, entropy), (hidden, head, targets, temperature, normaliser, entropy)


def chunked_backward(chunks, saved, cotangents):
    hidden, head, targets, temperature, normaliser, entropy = saved
    wide = normaliser.dtype

    def body(carry, chunk):
        d_head, d_temperature = carry
        h, t, norm, ent, d_log_prob, d_entropy = chunk
        z = tempered(h, head, temperature)
        log_probs = z - norm[:, None]
        p = jnp.exp(log_probs)
        # d log p_t / d z = 1[t] - p and d entropy / d z = -p (log p + entropy).
        chosen = jnp.arange(z.shape[-1]) == t[:, None]
        d_z = d_log_prob[:, None] * (chosen - p) - d_entropy[:, None] * p * (log_probs + ent[:, None])
        d_temperature -= jnp.sum(d_z * z) / temperature
        d_logits = (d_z / temperature).astype(h.dtype)
        d_h = jnp.einsum("nv,dv->nd", d_logits, head, preferred_element_type=wide).astype(h.dtype)
        d_head += jnp.einsum("nd,nv->dv", h, d_logits, preferred_element_type=wide)
        return (d_head, d_temperature), d_h

    chunked_inputs = tuple(split(x, chunks) for x in (hidden, targets, normaliser, entropy, *cotangents))
    start = (jnp.zeros(head.shape, wide), jnp.zeros((), wide))
    (d_head, d_temperature), d_hidden = jax.lax.scan(body, start, chunked_inputs)
    return merge(d_hidden, hidden.shape[0]), d_head.astype(head.dtype), None, d_temperature


chunked.defvjp(chunked_forward, chunked_backward)
