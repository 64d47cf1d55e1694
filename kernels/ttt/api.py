"""TTT-Linear, TTT-MLP and LaCT's two operators: checks, choice of implementation, tails, gradients.

A backend module (`xla`, `pallas_tpu`, `pallas_mgpu`) defines, batch and heads folded into N:

    ttt_forward(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, *, mini_batch, group, save) -> (out, final, borders)
    ttt_backward(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, borders, d_out, d_final, *, mini_batch, group)
        -> cotangents of the eight inputs; that of eta_pos is [K]
    lact_apply(w0, w1, w2, q) -> out                      lact_apply_backward(w0, w1, w2, q, d_out)
    lact_grads(w0, w1, w2, k, v, lr) -> (g0, g1, g2)      lact_grads_backward(w0, w1, w2, k, v, lr, a0, a1, a2)

with L a multiple of mini_batch; `borders` is what the forward pass keeps for the backward pass, the fast weights at the
start of every `group` mini-batches (None: as the backend likes), left out without `save`. A module of kernels says with
`refusal(operator, tokens, weights, mini_batch=None, group=None)` what it cannot take; its functions take `interpret`.
"""

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rollax.kernels.backends import alike, asking, backend, choose, named
from rollax.kernels.ttt import reference


class FastWeights(NamedTuple):
    """The SwiGLU memory of LaCT: F(x) = w1 (silu(w0 x) * (w2 x)); w0, w2 `[..., h, d]`, w1 `[..., d, h]`."""

    w0: jax.Array
    w1: jax.Array
    w2: jax.Array


class LinearWeights(NamedTuple):
    """The memory of TTT-Linear: `[..., f, f]` and `[..., 1, f]`."""

    W1: jax.Array
    b1: jax.Array


class MLPWeights(NamedTuple):
    """The memory of TTT-MLP: `[..., f, 4f]`, `[..., 1, 4f]`, `[..., 4f, f]`, `[..., 1, f]`."""

    W1: jax.Array
    b1: jax.Array
    W2: jax.Array
    b2: jax.Array


def fold(x, B, H):
    """`[B, H, ...]`, or `[H, ...]` for every row of the batch, to `[B * H, ...]`."""
    return x.reshape(B * H, *x.shape[2:])


def per_row(x, B, H, ndim, dtype):
    """Weights `[H, ...]` or `[B, H, ...]` (ndim axes after H) as `[B * H, ...]`, wide as float32 and `dtype`."""
    x = x.astype(jnp.result_type(x.dtype, dtype, jnp.float32))
    return fold(jnp.broadcast_to(x, (B, H, *x.shape[-ndim:])), B, H)


def run(chosen, name, *args, **static):
    """A backend's function; inside `shard_map` its results vary as the arguments do, which not all kernels say.

    Products keep all bits of float32 tokens on every platform, unless `jax.default_matmul_precision` says otherwise;
    with narrower tokens they are at the platform's precision.
    """
    module, more = backend(__package__, chosen)
    said = jax.config.jax_default_matmul_precision or any(x.dtype.itemsize < 4 for x in jax.tree.leaves(args))
    with nullcontext() if said else jax.default_matmul_precision("highest"):
        leaves, tree = jax.tree.flatten(getattr(module, name)(*args, **static, **more))
    return tree.unflatten(alike(args[0], *leaves)[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ttt(chosen, mini_batch, group, *args):
    """(out, final params) of whole mini-batches; `args` as a backend's `ttt_forward`."""
    return run(chosen, "ttt_forward", *args, mini_batch=mini_batch, group=group, save=False)[:2]


def ttt_saving(chosen, mini_batch, group, *args):
    out, final, borders = run(chosen, "ttt_forward", *args, mini_batch=mini_batch, group=group, save=True)
    return (out, final), (args, borders)


def ttt_gradient(chosen, mini_batch, group, saved, cotangents):
    args, borders = saved
    return run(chosen, "ttt_backward", *args, borders, *cotangents, mini_batch=mini_batch, group=group)


ttt.defvjp(ttt_saving, ttt_gradient)


def ttt_linear_scan(
    q,
    k,
    v,
    eta_pos,
    gate,
    params,
    ln,
    *,
    mini_batch,
    form="dual",
    checkpoint_every=None,
    implementation=None,
    impl=None,
    explain=False,
):
    """TTT-Linear (arXiv 2407.04620): a linear memory z = x W1 + b1, trained on the stream, mini-batch by mini-batch.

    Inner loss of a token: 0.5 |k + LN(k W1 + b1) - v|^2. Token i of a mini-batch writes with the rates
    eta[i, j] = eta_pos[i] * gate[j] what tokens j <= i ask for at the mini-batch's initial weights, and reads
    q + LN(q W1 + b1) with the result. The last row of eta gives the next mini-batch's weights. The last mini-batch may
    be shorter: it uses the first rows of eta.

    Args:
      q, k, v: `[B, H, L, f]`.
      eta_pos: `[mini_batch]`, rates by position: base_lr * max(1 / (i + 1) + tau_i, 0) / f in the paper.
      gate: `[B, H, L]`, rates by token: sigmoid(x w + c) in the paper.
      params: (W1 `[H, f, f]`, b1 `[H, 1, f]`), or with a batch axis before H, as returned.
      ln: (weight, bias) of the inner LayerNorm, `[H, f]` each; eps 1e-6.
      mini_batch: tokens that share their inner gradients' weights; static.
      form: "dual" never forms the weights of single tokens; "primal" does, and is the definition ("reference").
      checkpoint_every: mini-batches between two states that the forward pass keeps for the backward pass; None
        for what suits the implementation.
      implementation: see `rollax.kernels.backends`; `impl` is the same. The kernels' tail runs in "xla".
      explain: print which and why.
    Returns:
      (out `[B, H, L, f]` in q's dtype, params after the last token `[B, H, ...]` in float32 at least).
    Raises:
      ValueError: shapes that do not fit, mini_batch or checkpoint_every below 1, an unknown form or implementation,
        both `implementation` and `impl`.
    """
    shapes = lambda H, f: ((H, f, f), (H, 1, f))  # noqa: E731
    arguments = (q, k, v, eta_pos, gate, params, ln, mini_batch, form, checkpoint_every)
    final, out = ttt_public("ttt_linear_scan", shapes, *arguments, named(implementation, impl), explain)
    return out, LinearWeights(*final)


def ttt_mlp_scan(
    q,
    k,
    v,
    eta_pos,
    gate,
    params,
    ln,
    *,
    mini_batch,
    form="dual",
    checkpoint_every=None,
    implementation=None,
    impl=None,
    explain=False,
):
    """TTT-MLP: as `ttt_linear_scan` with the memory z = gelu(x W1 + b1) W2 + b2 of four times the width (tanh-GELU).

    params: (W1 `[H, f, 4f]`, b1 `[H, 1, 4f]`, W2 `[H, 4f, f]`, b2 `[H, 1, f]`).
    """
    shapes = lambda H, f: ((H, f, 4 * f), (H, 1, 4 * f), (H, 4 * f, f), (H, 1, f))  # noqa: E731
    arguments = (q, k, v, eta_pos, gate, params, ln, mini_batch, form, checkpoint_every)
    final, out = ttt_public("ttt_mlp_scan", shapes, *arguments, named(implementation, impl), explain)
    return out, MLPWeights(*final)


def ttt_public(
    operator, shapes, q, k, v, eta_pos, gate, params, ln, mini_batch, form, checkpoint_every, implementation, explain
):
    """The body of both scans: (final params, out)."""
    q, k, v, eta_pos, gate = (jnp.asarray(x) for x in (q, k, v, eta_pos, gate))
    params, ln = tuple(jnp.asarray(x) for x in params), tuple(jnp.asarray(x) for x in ln)
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"q, k and v must be [B, H, L, f], got {q.shape}, {k.shape} and {v.shape}")
    B, H, L, f = q.shape
    if not mini_batch >= 1:
        raise ValueError(f"mini_batch must be at least 1, got {mini_batch}")
    if checkpoint_every is not None and not checkpoint_every >= 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    if eta_pos.shape != (mini_batch,):
        raise ValueError(f"eta_pos must be [{mini_batch}], got {eta_pos.shape}")
    if gate.shape != (B, H, L):
        raise ValueError(f"gate must be [{B}, {H}, {L}], got {gate.shape}")
    allowed = shapes(H, f)
    if len(params) != len(allowed) or any(p.shape not in (s, (B, *s)) for p, s in zip(params, allowed, strict=True)):
        raise ValueError(f"params must be {allowed}, or these after a batch axis, got {[p.shape for p in params]}")
    if len(ln) != 2 or any(x.shape != (H, f) for x in ln):
        raise ValueError(f"ln must be (weight, bias) of [{H}, {f}], got {[x.shape for x in ln]}")
    if form not in ("dual", "primal"):
        raise ValueError(f'form must be "dual" or "primal", got {form!r}')
    if form == "primal":
        if implementation not in (None, "reference"):
            raise ValueError(f'form "primal" is implementation "reference", got {implementation!r}')
        implementation = "reference"
    ask = asking(implementation, lambda kernels: kernels.refusal(operator, q, params, mini_batch, checkpoint_every))
    chosen = choose(operator, __package__, implementation, ask, explain=explain)
    q, k, v, gate = (fold(x, B, H) for x in (q, k, v, gate))
    params = tuple(per_row(x, B, H, 2, q.dtype) for x in params)
    ln = [per_row(x, B, H, 1, q.dtype) for x in ln]
    gate, eta_pos = (x.astype(params[0].dtype) for x in (gate, eta_pos))
    q, k, v, gate, eta_pos, *rest = alike(q, k, v, gate, eta_pos, *params, *ln)
    params, ln = tuple(rest[: len(params)]), rest[len(params) :]

    # The last mini-batch may be shorter, with the first rows of eta; kernels leave it to "xla".
    tail = L % mini_batch
    pieces = []
    for part, size, how in ((slice(0, L - tail), mini_batch, chosen), (slice(L - tail, L), tail, "xla")):
        if part.start == part.stop:
            continue
        args = (*(x[:, part] for x in (q, k, v)), eta_pos[:size], gate[:, part], params, *ln)
        if chosen == "reference":
            out, params = reference.ttt_scan(*args, mini_batch=size)
        else:
            out, params = ttt(how, size, checkpoint_every, *args)
        pieces.append(out.astype(q.dtype))
    out = jnp.concatenate(pieces, 1) if pieces else q
    return tuple(x.reshape(B, H, *x.shape[1:]) for x in params), out.reshape(B, H, L, f)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_rows(chosen, *args):
    """`lact_apply` of a backend, arguments folded."""
    return run(chosen, "lact_apply", *args)


def apply_rows_backward(chosen, saved, d_out):
    return run(chosen, "lact_apply_backward", *saved, d_out)


apply_rows.defvjp(lambda chosen, *args: (apply_rows(chosen, *args), args), apply_rows_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def grads_rows(chosen, *args):
    """`lact_grads` of a backend, arguments folded."""
    return run(chosen, "lact_grads", *args)


def grads_rows_backward(chosen, saved, cotangents):
    return run(chosen, "lact_grads_backward", *saved, *cotangents)


grads_rows.defvjp(lambda chosen, *args: (grads_rows(chosen, *args), args), grads_rows_backward)


def check_weights(w, B, H, d, dtype):
    """The weights as `FastWeights` of `[B * H, ...]`; ValueError if tokens `[B, H, L, d]` of `dtype` do not fit."""
    if len(w) != 3:
        raise ValueError(f"w must be (w0, w1, w2), got {len(w)} arrays")
    w = FastWeights(*(jnp.asarray(x) for x in w))
    h = w.w0.shape[-2] if w.w0.ndim >= 3 else 0
    expected = ((H, h, d), (H, d, h), (H, h, d))
    if any(x.shape not in (s, (B, *s)) for x, s in zip(w, expected, strict=True)):
        raise ValueError(
            f"w must be w0, w2 [{H}, h, {d}] and w1 [{H}, {d}, h], or these after a batch axis of {B}, "
            f"got {[x.shape for x in w]}"
        )
    return FastWeights(*(per_row(x, B, H, 2, dtype) for x in w))


def check_tokens(q, k, v, lr):
    """ValueError if k, v `[B, H, L, d]` and lr `[B, H, L, 3]` do not fit q."""
    if q.ndim != 4:
        raise ValueError(f"tokens must be [B, H, L, d], got {q.shape}")
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"k and v must be {q.shape}, got {k.shape} and {v.shape}")
    if lr.shape != (*q.shape[:3], 3):
        raise ValueError(f"lr must be {(*q.shape[:3], 3)}, one rate a matrix, got {lr.shape}")


def lact_apply(w, q, *, implementation=None, impl=None, explain=False):
    """Reads the memory: F_W(q_t) = w1 (silu(w0 q_t) * (w2 q_t)) for every token (LaCT, arXiv 2505.23884).

    Args:
      w: `FastWeights` of w0, w2 `[H, h, d]` and w1 `[H, d, h]`, or with a batch axis before H.
      q: `[B, H, L, d]`.
    Returns:
      `[B, H, L, d]` in q's dtype.
    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
    """
    q = jnp.asarray(q)
    if q.ndim != 4:
        raise ValueError(f"tokens must be [B, H, L, d], got {q.shape}")
    B, H, _, d = q.shape
    rows = check_weights(w, B, H, d, q.dtype)
    chosen = choose_lact("lact_apply", named(implementation, impl), explain, q, rows)
    return apply_of(chosen)(*alike(*rows, fold(q, B, H))).reshape(q.shape)


def lact_grads(w, k, v, lr, *, implementation=None, impl=None, explain=False):
    """Directions that raise sum_t lr_i[t] <F_W(k_t), v_t> in w_i: what a chunk writes into the memory.

    Args:
      w: as for `lact_apply`.
      k, v: `[B, H, C, d]`.
      lr: `[B, H, C, 3]`, the rates of every token for w0, w1, w2.
    Returns:
      `FastWeights` `[B, H, ...]`, float32 at least.
    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
    """
    k, v, lr = jnp.asarray(k), jnp.asarray(v), jnp.asarray(lr)
    check_tokens(k, k, v, lr)
    B, H, _, d = k.shape
    rows = check_weights(w, B, H, d, k.dtype)
    chosen = choose_lact("lact_grads", named(implementation, impl), explain, k, rows)
    grads = grads_of(chosen)(*alike(*rows, *(fold(x, B, H) for x in (k, v, lr.astype(rows.w0.dtype)))))
    return FastWeights(*(x.reshape(B, H, *x.shape[1:]) for x in grads))


def choose_lact(operator, implementation, explain, tokens, w):
    """The implementation of an operator on tokens `[..., L, d]` and weights w."""
    ask = asking(implementation, lambda kernels: kernels.refusal(operator, tokens, w))
    return choose(operator, __package__, implementation, ask, explain=explain)


def apply_of(chosen):
    """The folded operator of an implementation; the reference keeps derivatives of every kind."""
    return reference.lact_apply if chosen == "reference" else partial(apply_rows, chosen)


def grads_of(chosen):
    return reference.lact_grads if chosen == "reference" else partial(grads_rows, chosen)
