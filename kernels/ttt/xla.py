"""Fast forms in plain jnp: the dual form of TTT-Linear and TTT-MLP, and LaCT's gradients with their own backward pass.

Dual form (arXiv 2407.04620, section 2.5): all inner gradients of a mini-batch are taken at its initial weights, so that
what its tokens write and read becomes a masked product of `[K, K]`, and the weights of single tokens never exist. Only
what depends on the carried weights stays in the sequential loop.
"""

import jax
import jax.numpy as jnp

from rollax.kernels.backends import alike

EPS = 1e-6  # of the inner LayerNorm
GROUP = 4  # mini-batches between two saved states, as the authors' code rematerialises


def standardise(z):
    """((z - mean) / std, 1 / std), population variance, eps inside the root."""
    centred = z - z.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + EPS)
    return centred * scale, scale


def reconstruction_gradient(z, target, weight, bias):
    """d 0.5 |LN(z) - target|^2 / dz, with `target = v - k`."""
    x, scale = standardise(z)
    e = (weight * x + bias - target) * weight
    return (e - e.mean(-1, keepdims=True) - x * jnp.mean(e * x, -1, keepdims=True)) * scale


def gelu_and_slope(x):
    """tanh-GELU and its derivative."""
    c = 0.7978845608028654  # sqrt(2 / pi)
    t = jnp.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def write_mask(rows, columns, eta_pos, gate):
    """eta * tril(rows columns^T + 1), `[..., K, K]`: what token j wrote, as token i reads it; the 1 is the bias."""
    return eta_pos[:, None] * jnp.tril(rows @ columns.mT + 1) * gate[..., None, :]


def linear_step(params, q, k, v, gate, eta_pos, weight, bias):
    """One mini-batch of TTT-Linear: q, k, v `[N, K, f]`, gate `[N, K]`, weight, bias `[N, 1, f]` -> (params, out)."""
    W1, b1 = params
    K = q.shape[1]
    last = (eta_pos[-1] * gate)[..., None]
    z = jnp.concatenate([k, q], 1) @ W1 + b1
    G = reconstruction_gradient(z[:, :K], v - k, weight, bias)
    # What G is to the tokens and to the weights, as one product: on a CPU a small one costs most to begin.
    read, learnt = jnp.split(jnp.concatenate([write_mask(q, k, eta_pos, gate), (last * k).mT], 1) @ G, [K], 1)
    params = W1 - learnt, b1 - jnp.sum(last * G, 1, keepdims=True)
    return params, q + weight * standardise(z[:, K:] - read)[0] + bias


def mlp_step(params, q, k, v, gate, eta_pos, weight, bias):
    """The same for TTT-MLP."""
    W1, b1, W2, b2 = params
    K = q.shape[1]
    last = (eta_pos[-1] * gate)[..., None]
    z1 = jnp.concatenate([k, q], 1) @ W1 + b1
    X2, slope = gelu_and_slope(z1[:, :K])
    G2 = reconstruction_gradient(X2 @ W2 + b2, v - k, weight, bias)
    G1 = (G2 @ W2.mT) * slope
    X2q, _ = gelu_and_slope(z1[:, K:] - write_mask(q, k, eta_pos, gate) @ G1)
    z2 = X2q @ W2 + b2 - write_mask(X2q, X2, eta_pos, gate) @ G2
    W1, b1 = W1 - (last * k).mT @ G1, b1 - jnp.sum(last * G1, 1, keepdims=True)
    W2, b2 = W2 - (last * X2).mT @ G2, b2 - jnp.sum(last * G2, 1, keepdims=True)
    return (W1, b1, W2, b2), q + weight * standardise(z2)[0] + bias


def over_group(params, q, k, v, gate, eta_pos, ln_weight, ln_bias):
    """Some mini-batches: q, k, v `[N, g K, f]`, gate `[N, g K]` -> (params, out `[N, g K, f]`)."""
    step = linear_step if len(params) == 2 else mlp_step
    K, shared = eta_pos.shape[0], (eta_pos, ln_weight[:, None], ln_bias[:, None])
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, K, *x.shape[2:]), 1, 0)  # noqa: E731
    # Unrolled, because a step is small beside what a loop copies: on a CPU that saves a fifth of the time of all but
    # TTT-MLP's forward pass, and compiles for up to twice as long.
    body, xs = lambda w, x: step(w, *x, *shared), [split(x) for x in (q, k, v, gate)]
    params, out = jax.lax.scan(body, params, xs, unroll=GROUP)
    return params, jnp.moveaxis(out, 0, 1).reshape(q.shape)


def pieces_of(length, size):
    """((start, tokens of a group, groups), ...): the whole groups, then a shorter one."""
    whole = length - length % size
    pieces = (0, size, whole // size), (whole, length - whole, 1)
    return [piece for piece in pieces if piece[1] * piece[2]]


def take(x, start, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size, 1)


def put(x, part, start):
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), start, 1)


def ttt_forward(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, *, mini_batch, group=None, save=True):
    """Both memories, batch and heads folded: arguments and shapes as in `reference.ttt_scan`.

    Args:
      group: mini-batches between two borders; None for `GROUP`.
      save: keep the borders, which the backward pass needs.
    Returns:
      (out `[N, L, f]`, final params, borders: params at the start of every group).
    """
    (_, out), borders = alike(q, jnp.zeros(q.shape, jnp.result_type(q, params[0]))), []
    # Groups are cut from the arrays as they are: laying all tokens out by mini-batches first costs a fifth of the time.
    for first, size, count in pieces_of(q.shape[1], mini_batch * (group or GROUP)):

        def body(carry, i, first=first, size=size):
            params, out = carry
            start = first + i * size
            tokens = [take(x, start, size) for x in (q, k, v, gate)]
            after, part = over_group(params, *tokens, eta_pos, ln_weight, ln_bias)
            return (after, put(out, part, start)), (params if save else None)

        (params, out), border = jax.lax.scan(body, (params, out), jnp.arange(count))
        borders.append(border)
    return out, params, borders


def ttt_backward(
    q, k, v, eta_pos, gate, params, ln_weight, ln_bias, borders, d_out, d_final, *, mini_batch, group=None
):
    """Cotangents of the arguments before `borders`, in their order; every group is computed again from its border."""
    shared = eta_pos, ln_weight, ln_bias
    _, *zeros = alike(q, *(jnp.zeros_like(x) for x in (*shared, q, k, v, gate)))
    carry = d_final, tuple(zeros[:3]), tuple(zeros[3:])
    pieces = zip(pieces_of(q.shape[1], mini_batch * (group or GROUP)), borders, strict=True)
    for (first, size, count), border in reversed(list(pieces)):

        def body(carry, x, first=first, size=size):
            d_params, d_shared, d_tokens = carry
            i, params = x
            start = first + i * size
            tokens = [take(x, start, size) for x in (q, k, v, gate)]
            (_, out), pull = jax.vjp(over_group, params, *tokens, *shared)
            d_params, dq, dk, dv, d_gate, *d = pull((d_params, take(d_out, start, size).astype(out.dtype)))
            d_tokens = tuple(put(x, part, start) for x, part in zip(d_tokens, (dq, dk, dv, d_gate), strict=True))
            return (d_params, jax.tree.map(jnp.add, d_shared, tuple(d)), d_tokens), None

        carry, _ = jax.lax.scan(body, carry, (jnp.arange(count), border), reverse=True)
    d_params, (d_eta_pos, d_weight, d_bias), (dq, dk, dv, d_gate) = carry
    return dq, dk, dv, d_eta_pos, d_gate, d_params, d_weight, d_bias


def tokens_times(x, w):
    """x `[N, C, a]` times the transpose of w `[N, b, a]`, accumulated in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("nca,nba->ncb", x, w.astype(x.dtype), preferred_element_type=wide)


def over_tokens(x, y):
    """x^T y, `[N, a, b]`: the sum over tokens of x `[N, C, a]`, y `[N, C, b]`."""
    wide = jnp.promote_types(y.dtype, jnp.float32)
    return jnp.einsum("nca,ncb->nab", x.astype(y.dtype), y, preferred_element_type=wide)


def lact_apply(w0, w1, w2, q):
    """w1 (silu(w0 q) * (w2 q)) for tokens in rows; w0, w2 `[N, h, d]`, w1 `[N, d, h]`, q `[N, C, d]`."""
    hidden = jax.nn.silu(tokens_times(q, w0)) * tokens_times(q, w2)
    return tokens_times(hidden.astype(q.dtype), w1).astype(q.dtype)


def silu_and_slopes(x):
    """silu, its first and its second derivative."""
    s = jax.nn.sigmoid(x)
    return x * s, s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


def lact_apply_backward(w0, w1, w2, q, d_out):
    """Cotangents of (w0, w1, w2, q)."""
    y0, y2 = tokens_times(q, w0), tokens_times(q, w2)
    silu, slope, _ = silu_and_slopes(y0)
    d_hidden = tokens_times(d_out, w1.mT)
    d_y0, d_y2 = d_hidden * y2 * slope, d_hidden * silu
    d_q = tokens_times(d_y0.astype(q.dtype), w0.mT) + tokens_times(d_y2.astype(q.dtype), w2.mT)
    d_w1 = over_tokens(d_out, (silu * y2).astype(q.dtype))
    return over_tokens(d_y0, q), d_w1, over_tokens(d_y2, q), d_q.astype(q.dtype)


def lact_grads(w0, w1, w2, k, v, lr):
    """Directions (g0, g1, g2) that raise sum_t lr_i[t] <F_W(k_t), v_t>; k, v `[N, C, d]`, lr `[N, C, 3]`."""
    lr0, lr1, lr2 = jnp.split(lr, 3, axis=-1)
    y0, y2, d_hidden = tokens_times(k, w0), tokens_times(k, w2), tokens_times(v, w1.mT)
    silu, slope, _ = silu_and_slopes(y0)
    g0 = over_tokens(d_hidden * y2 * slope * lr0, k)
    g1 = over_tokens(v, (silu * y2 * lr1).astype(v.dtype))
    return g0, g1, over_tokens(d_hidden * silu * lr2, k)


def lact_grads_backward(w0, w1, w2, k, v, lr, a0, a1, a2):
    """Cotangents of (w0, w1, w2, k, v, lr) from those of g0, g1, g2."""
    lr0, lr1, lr2 = jnp.split(lr, 3, axis=-1)
    y0, y2, h = tokens_times(k, w0), tokens_times(k, w2), tokens_times(v, w1.mT)
    silu, slope, curve = silu_and_slopes(y0)
    ka0, va1, ka2 = tokens_times(k, a0), tokens_times(v, a1.mT), tokens_times(k, a2)
    e0, e1, e2 = ka0 * lr0, va1 * lr1, ka2 * lr2
    d_h = e0 * y2 * slope + e2 * silu
    d_y2 = e0 * h * slope + e1 * silu
    d_y0 = e0 * h * y2 * curve + (e2 * h + e1 * y2) * slope
    back = lambda x, w: tokens_times(x.astype(k.dtype), w.mT)  # noqa: E731
    d_k = back(h * y2 * slope * lr0, a0) + back(h * silu * lr2, a2) + back(d_y0, w0) + back(d_y2, w2)
    d_v = tokens_times((silu * y2 * lr1).astype(k.dtype), a1) + tokens_times(d_h.astype(k.dtype), w1)
    d_lr = [jnp.sum(x, -1) for x in (ka0 * h * y2 * slope, va1 * silu * y2, ka2 * h * silu)]
    d_w = over_tokens(d_y0, k), over_tokens(v, d_h.astype(v.dtype)), over_tokens(d_y2, k)
    return *d_w, d_k.astype(k.dtype), d_v.astype(v.dtype), jnp.stack(d_lr, -1).astype(lr.dtype)
