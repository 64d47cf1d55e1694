"""The readable definitions: every inner gradient by autodiff, every token's fast weights in memory.

Slow on purpose; `xla.py` and the kernels must equal this. TTT-Linear and TTT-MLP: arXiv 2407.04620, section 2;
LaCT: arXiv 2505.23884, section 3.
"""

from functools import partial

import jax
import jax.numpy as jnp

exact = partial(jax.default_matmul_precision, "highest")  # products of float32 are that on every platform


def layer_norm(z, weight, bias, eps=1e-6):
    """Over the last axis, population variance, eps inside the root."""
    centred = z - z.mean(-1, keepdims=True)
    return weight * centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + eps) + bias


def fast_model(params, x):
    """The inner model of one head: x W1 + b1, or gelu(x W1 + b1) W2 + b2; x `[K, f]`."""
    if len(params) == 2:
        W1, b1 = params
        return x @ W1 + b1
    W1, b1, W2, b2 = params
    return jax.nn.gelu(x @ W1 + b1, approximate=True) @ W2 + b2


def mini_batch_step(params, tokens, eta_pos, ln_weight, ln_bias):
    """One mini-batch of one head in primal form: token i is read with the weights that tokens 0..i have written.

    Args:
      params: fast weights at the mini-batch's start.
      tokens: (q, k, v `[K, f]`, gate `[K]`).
    Returns:
      (params after the last token, out `[K, f]`).
    """
    q, k, v, gate = tokens

    def inner_loss(params, key, value):
        reconstruction = layer_norm(fast_model(params, key[None])[0], ln_weight, ln_bias)
        return 0.5 * jnp.sum((reconstruction - (value - key)) ** 2)

    gradients = jax.vmap(jax.grad(inner_loss), in_axes=(None, 0, 0))(params, k, v)
    eta = jnp.tril(eta_pos[:, None] * gate[None, :])
    written = jax.tree.map(lambda w, g: w - jnp.tensordot(eta, g, 1), params, gradients)  # [K, ...]: one for each token
    read = jax.vmap(lambda w, x: fast_model(w, x[None])[0])(written, q)
    return jax.tree.map(lambda w: w[-1], written), q + layer_norm(read, ln_weight, ln_bias)


def ttt_scan(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, *, mini_batch):
    """See `rollax.kernels.ttt.ttt_linear_scan`, batch and heads folded into N; L a multiple of mini_batch.

    Args:
      q, k, v: `[N, L, f]`.
      eta_pos: `[K]`.
      gate: `[N, L]`.
      params: `(W1 [N, f, f], b1 [N, 1, f])` or `(W1 [N, f, 4f], b1 [N, 1, 4f], W2 [N, 4f, f], b2 [N, 1, f])`.
      ln_weight, ln_bias: `[N, f]`.
    Returns:
      (out `[N, L, f]`, params).
    """

    def head(q, k, v, gate, params, ln_weight, ln_bias):
        split = lambda x: x.reshape(-1, mini_batch, *x.shape[1:])  # noqa: E731
        step = lambda w, x: mini_batch_step(w, x, eta_pos, ln_weight, ln_bias)  # noqa: E731
        params, out = jax.lax.scan(step, params, jax.tree.map(split, (q, k, v, gate)))
        return out.reshape(q.shape), params

    with exact():
        return jax.vmap(head)(q, k, v, gate, params, ln_weight, ln_bias)


def swiglu(w0, w1, w2, x):
    """F_W(x) = w1 (silu(w0 x) * (w2 x)) for tokens in rows: w0, w2 `[h, d]`, w1 `[d, h]`, x `[C, d]`."""
    return (jax.nn.silu(x @ w0.T) * (x @ w2.T)) @ w1.T


def lact_apply(w0, w1, w2, q):
    """w0, w2 `[N, h, d]`, w1 `[N, d, h]`, q `[N, C, d]` to `[N, C, d]` in q's dtype."""
    with exact():
        return jax.vmap(swiglu)(w0, w1, w2, q).astype(q.dtype)


def lact_grads(w0, w1, w2, k, v, lr):
    """Gradients of sum_t lr_i[t] <F_W(k_t), v_t> in w_i for i = 0, 1, 2; k, v `[N, C, d]`, lr `[N, C, 3]`."""

    def head(w0, w1, w2, k, v, lr):
        score = lambda w, rate: jnp.sum(rate * jnp.sum(swiglu(*w, k) * v, axis=-1))  # noqa: E731
        return tuple(jax.grad(score)((w0, w1, w2), lr[:, i])[i] for i in range(3))

    with exact():
        return jax.vmap(head)(w0, w1, w2, k, v, lr)
