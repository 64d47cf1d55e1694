"""TTT-Linear and TTT-MLP in dual form (arXiv 2407.04620, sections 2.4 and 2.5) as Pallas TPU kernels.

A program owns P heads and walks their sequence group by group (the second grid axis is sequential), so that the fast
weights stay in VMEM from the first token to the last. The heads of a program do the [K, K] work of the dual form as
one [P K, P K] matrix that is zero between heads: with P K = 128 it fills the matrix unit, which K = 16 alone does not.
The forward kernel writes the fast weights once a group of mini-batches; the backward kernel walks the groups from the
last to the first, recomputes the weights of every mini-batch of a group in VMEM and pulls the cotangents back through
`jax.vjp` of the very step that the forward kernel ran.

Operands of a product have the dtype of the tokens (float32 ones at the highest precision); sums, norms and the fast
weights are float32. Here the second weight of the MLP is kept transposed, [f, 4f], to fill the lanes of a register.
"""

import itertools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rollax.kernels.ttt.pallas_tpu_common import BUDGET, LANES, NN, NT, TN, dot, matrix_bytes, padded, shape_like
from rollax.kernels.ttt.xla import gelu_and_slope, reconstruction_gradient, standardise


def step(params, q, k, v, gate, last, rows, weight, bias, *, dtype):
    """One mini-batch of P heads in dual form.

    Args:
      params: (W1 `[P, f, f]`, b1 `[P, 1, f]`) or (W1 `[P, f, h]`, b1 `[P, 1, h]`, W2 transposed `[P, f, h]`, b2).
      q, k, v: `[P, K, f]` float32.
      gate: `[1, P K]`; last: `[1, 1]`, the position scale of the last token.
      rows: `[P K, P K]`, the position scale of the row's token where the column's token is of the same head and not
        later, else 0, so that rows * gate is tril(eta) of every head.
      weight, bias: `[P, 1, f]` of the layer norm.
    Returns:
      (out `[P, K, f]`, params after the mini-batch).
    """
    product = partial(dot, dtype=dtype)
    P, K, _ = q.shape
    flat = lambda x: x.reshape(P * K, x.shape[-1])  # noqa: E731
    eta = rows * gate

    def attend(queries, keys, gradients):
        """(eta * tril(queries keys^T) + tril(eta)) gradients: what the earlier tokens taught, weight and bias."""
        scores = product(flat(queries), flat(keys), NT) + 1
        return product(eta * scores, flat(gradients), NN).reshape(P, K, gradients.shape[-1])

    diagonal = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) == jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    rate = (last * jnp.sum(jnp.where(diagonal, gate, 0.0), axis=1, keepdims=True)).reshape(P, K, 1)
    total = lambda x: jnp.sum(x, axis=1, keepdims=True)  # noqa: E731

    if len(params) == 2:
        w, b = params
        z = product(jnp.concatenate([k, q], axis=1), w, NN) + b
        g = reconstruction_gradient(z[:, :K], v - k, weight, bias)
        z = z[:, K:] - attend(q, k, g)
        g = rate * g
        return q + standardise(z)[0] * weight + bias, (w - product(k, g, TN), b - total(g))

    w1, b1, w2, b2 = params
    z1 = product(jnp.concatenate([k, q], axis=1), w1, NN) + b1
    x2, slope = gelu_and_slope(z1[:, :K])
    g2 = reconstruction_gradient(product(x2, w2, NT) + b2, v - k, weight, bias)
    g1 = product(g2, w2, NN) * slope
    x2q, _ = gelu_and_slope(z1[:, K:] - attend(q, k, g1))
    z2q = product(x2q, w2, NT) + b2 - attend(x2q, x2, g2)
    g1, g2 = rate * g1, rate * g2
    new = (w1 - product(k, g1, TN), b1 - total(g1), w2 - product(g2, x2, TN), b2 - total(g2))
    return q + standardise(z2q)[0] * weight + bias, new


def load(blocks, m, mini_batch, heads):
    """Mini-batch m of every head, `[P, K, f]` float32, from blocks `[1, T, P f]`, and the index of its tokens."""
    span = pl.ds(pl.multiple_of(m * mini_batch, mini_batch), mini_batch)
    rows = [x[0, span, :].astype(jnp.float32) for x in blocks]
    return [jnp.stack(jnp.split(x, heads, axis=1)) for x in rows], span


def store(block, span, value):
    """The inverse of `load` for one block."""
    block[0, span, :] = jnp.concatenate([*value], axis=1).astype(block.dtype)


def forward_kernel(q, k, v, gate, last, rows, weight, bias, *refs, count, mini_batch, group, dtype):
    """refs: params | out, params, params at the group's start; the output block of params is the running state."""
    first, out, params, borders = refs[:count], refs[count], refs[count + 1 : 2 * count + 1], refs[2 * count + 1 :]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for target, source in zip(params, first, strict=True):
            target[...] = source[...]

    for target, source in zip(borders, params, strict=bool(borders)):  # none where they are not kept
        target[0] = source[...]

    def body(m, _):
        tokens, span = load((q, k, v), m, mini_batch, weight.shape[0])
        shared = last[...], rows[...], weight[...], bias[...]
        state = tuple(x[...] for x in params)
        y, state = step(state, *tokens, gate[0, 0, pl.ds(m, 1), :], *shared, dtype=dtype)
        store(out, span, y)
        for target, value in zip(params, state, strict=True):
            target[...] = value

    jax.lax.fori_loop(0, group, body, None)


def backward_kernel(q, k, v, gate, last, rows, weight, bias, d_out, *refs, count, mini_batch, group, dtype):
    """refs: borders, d_final | dq, dk, dv, d_gate, d_last, d_rows, d_weight, d_bias, d_params | states of a group.

    Grid step j has group `groups - 1 - j`; the output block of d_params is the running cotangent of the fast weights.
    """
    borders, d_final, refs = refs[:count], refs[count : 2 * count], refs[2 * count :]
    d_tokens, d_gate, d_shared, d_params, states = refs[:3], refs[3], refs[4:8], refs[8 : 8 + count], refs[8 + count :]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for target, source in zip(d_params, d_final, strict=True):
            target[...] = source[...]
        for target in d_shared:
            target[...] = jnp.zeros_like(target)

    def arguments(m):
        tokens, _ = load((q, k, v), m, mini_batch, weight.shape[0])
        shared = last[...], rows[...], weight[...], bias[...]
        return (tuple(x[m] for x in states), *tokens, gate[0, 0, pl.ds(m, 1), :], *shared)

    def replay(m, _):
        _, after = step(*arguments(m), dtype=dtype)
        for target, value in zip(states, after, strict=True):
            target[m + 1] = value

    def pull_back(i, _):
        m = group - 1 - i
        _, pull = jax.vjp(partial(step, dtype=dtype), *arguments(m))
        (cotangent,), span = load((d_out,), m, mini_batch, weight.shape[0])
        d_state, *d_qkv, d_g, d_last, d_rows, d_weight, d_bias = pull((cotangent, tuple(x[...] for x in d_params)))
        for target, value in zip(d_params, d_state, strict=True):
            target[...] = value
        for target, value in zip(d_tokens, d_qkv, strict=True):
            store(target, span, value)
        d_gate[0, 0, pl.ds(m, 1), :] = d_g
        for target, value in zip(d_shared, (d_last[None], d_rows[None], d_weight, d_bias), strict=True):
            target[...] += value

    for target, source in zip(states, borders, strict=True):
        target[0] = source[0]
    jax.lax.fori_loop(0, group - 1, replay, None)
    jax.lax.fori_loop(0, group, pull_back, None)


def backward_bytes(f, K, mlp, heads, group, size):
    """VMEM of the backward kernel, the larger of the two, for tokens of `size` bytes; blocks have two buffers."""
    h = 4 * f if mlp else f
    state = heads * ((1 + mlp) * matrix_bytes(f, h) + matrix_bytes(1, h) + mlp * matrix_bytes(1, f))
    tokens = matrix_bytes(group * K, heads * f) * size // 4
    shared = 2 * matrix_bytes(heads * K, heads * K)
    # q, k, v, d_out, dq, dk, dv; borders, d_final, d_params; the states of a group; values of one step.
    return 2 * 7 * tokens + 2 * 3 * state + group * state + 2 * shared + 2 * state + 12 * heads * matrix_bytes(K, h)


def plan(N, f, K, mlp, size, group=None):
    """(heads of a program, mini-batches of a group) that fit `BUDGET` with tokens of `size` bytes; None if none do.

    As many heads as make P K = 128, then as long a group as fits: fewer borders in memory; at least 8 if it may be.
    """
    most = max(1, min(N, LANES // K))
    counts = [P for P in (8, 4, 2, 1) if most >= P]
    groups = (32, 16, 8, 4, 2, 1) if group is None else (group,)
    for shortest in (8, 1):
        for P, length in itertools.product(counts, groups):
            if (length >= shortest or length == group) and backward_bytes(f, K, mlp, P, length, size) <= BUDGET:
                return P, length
    return None


def refusal(q, params, mini_batch, group=None):
    """Why the kernels cannot take this call, None if they can: q `[..., L, f]` and fast weights, arrays or shapes."""
    *heads, L, f = q.shape
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"tokens must be float32 or bfloat16, got {q.dtype}"
    if params[0].dtype not in (jnp.float32, jnp.bfloat16):
        return f"fast weights must be float32 or bfloat16, got {params[0].dtype}"
    if L == 0:
        return "there are no tokens"
    if plan(math.prod(heads), f, padded(mini_batch, 16), len(params) == 4, q.dtype.itemsize, group) is None:
        return f"width {f} and mini-batch {mini_batch} do not fit {BUDGET // 2**20} MiB of VMEM"
    return None


class Sizes(NamedTuple):
    """n heads of L tokens as given; as the kernels see them, N heads in programs of P, mini-batches of K in groups."""

    n: int
    L: int
    N: int
    P: int
    mini_batch: int
    K: int
    groups: int
    group: int


def sizes_of(q, params, mini_batch, group):
    """`Sizes` of a call; a ValueError where `refusal` has a reason."""
    reason = refusal(q, params, mini_batch, group)
    if reason:
        raise ValueError(reason)
    n, L, f = q.shape
    K = padded(mini_batch, 16)  # rows of a bfloat16 register
    P, group = plan(n, f, K, len(params) == 4, q.dtype.itemsize, group)
    return Sizes(n, L, padded(n, P), P, mini_batch, K, -(-L // (mini_batch * group)), group)


def pad_heads(x, s):
    return jnp.pad(x, [(0, s.N - s.n)] + [(0, 0)] * (x.ndim - 1))


def pad_tokens(x, s):
    """`[n, L, f]` to `[N / P, groups * group * K, P f]`: the heads of a program side by side, as lanes are 128 wide.

    Zeros behind every mini-batch, the sequence and the heads. The gates there are zero as well, so that such tokens
    teach nothing and leave the fast weights alone.
    """
    x = x.reshape(s.n, -1, s.mini_batch, x.shape[-1])
    x = jnp.pad(x, [(0, s.N - s.n), (0, s.groups * s.group - x.shape[1]), (0, s.K - s.mini_batch), (0, 0)])
    x = x.reshape(s.N // s.P, s.P, -1, x.shape[-1])
    return x.transpose(0, 2, 1, 3).reshape(s.N // s.P, x.shape[2], -1)


def cut_tokens(x, s):
    """The inverse of `pad_tokens`."""
    x = x.reshape(s.N // s.P, x.shape[1], s.P, -1).transpose(0, 2, 1, 3)
    x = x.reshape(s.N, -1, s.K, x.shape[-1])[: s.n, : s.L // s.mini_batch, : s.mini_batch]
    return x.reshape(s.n, s.L, -1)


def pad_gates(x, s):
    """`[n, L]` to `[N / P, groups, group, P K]` float32, a row for each mini-batch."""
    x = pad_tokens(x.astype(jnp.float32)[..., None], s)
    x = x.reshape(s.N // s.P, s.groups, s.group, s.K, s.P)
    return x.mT.reshape(s.N // s.P, s.groups, s.group, -1)


def cut_gates(x, s):
    """The inverse of `pad_gates`."""
    x = x.reshape(s.N // s.P, s.groups, s.group, s.P, s.K).mT
    return cut_tokens(x.reshape(s.N // s.P, -1, s.P), s)[..., 0]


def pad_params(params, s):
    """Fast weights, or their cotangents, as the kernels hold them: float32, padded heads, W2 transposed."""
    swapped = [x.mT if i == 2 else x for i, x in enumerate(params)]
    return [pad_heads(x.astype(jnp.float32), s) for x in swapped]


def cut_params(params, s, dtypes):
    """The inverse of `pad_params`."""
    swapped = [x.mT if i == 2 else x for i, x in enumerate(params)]
    return tuple(x[: s.n].astype(dtype) for x, dtype in zip(swapped, dtypes, strict=True))


def earlier(s):
    """bool `[P K, P K]`: the column's token is of the row's head and not later."""
    i = jnp.arange(s.P * s.K)
    return (i[:, None] // s.K == i // s.K) & (i[:, None] >= i)


def common(q, k, v, eta_pos, gate, ln_weight, ln_bias, s):
    """What both kernels read first: q, k, v, gate, last, rows, weight, bias."""
    scales = jnp.tile(jnp.pad(eta_pos.astype(jnp.float32), (0, s.K - s.mini_batch)), s.P)
    rows = jnp.where(earlier(s), scales[:, None], 0.0)
    norm = [pad_heads(x.astype(jnp.float32), s)[:, None] for x in (ln_weight, ln_bias)]
    return [
        *(pad_tokens(x, s) for x in (q, k, v)),
        pad_gates(gate, s),
        scales[s.mini_batch - 1].reshape(1, 1),
        rows,
        *norm,
    ]


def call(kernel, s, inputs, outputs, scratch, name, reverse, interpret):
    """Runs a kernel on the grid (programs, groups); inputs, outputs: lists of (array or shape, how it is cut).

    Cuts: "tokens", "gate", "borders" move with the group; "heads" and "program" are of one program; "all" is whole.
    """
    at = (lambda j: s.groups - 1 - j) if reverse else (lambda j: j)

    def spec(x, cut):
        rest = x.shape[1:]
        return {
            "tokens": lambda: pl.BlockSpec((1, s.group * s.K, *rest[1:]), lambda i, j: (i, at(j), 0)),
            "gate": lambda: pl.BlockSpec((1, 1, *rest[1:]), lambda i, j: (i, at(j), 0, 0)),
            "borders": lambda: pl.BlockSpec((1, s.P, *rest[1:]), lambda i, j: (at(j), i, 0, 0)),
            "heads": lambda: pl.BlockSpec((s.P, *rest), lambda i, j: (i, 0, 0)),
            "program": lambda: pl.BlockSpec((1, *rest), lambda i, j: (i, 0, 0)),
            "all": lambda: pl.BlockSpec(x.shape, lambda i, j: (0, 0)),
        }[cut]()

    return pl.pallas_call(
        kernel,
        grid=(s.N // s.P, s.groups),
        in_specs=[spec(*x) for x in inputs],
        out_specs=[spec(*x) for x in outputs],
        out_shape=[shape_like(x.shape, x.dtype, inputs[0][0]) for x, _ in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(*(x for x, _ in inputs))


COMMON = ("tokens", "tokens", "tokens", "gate", "all", "all", "heads", "heads")
shape = jax.ShapeDtypeStruct


def ttt_forward(
    q, k, v, eta_pos, gate, params, ln_weight, ln_bias, *, mini_batch, group=None, save=True, interpret=False
):
    """TTT-Linear (params of two arrays) or TTT-MLP (of four), N heads of L tokens, L a multiple of mini_batch.

    Args:
      q, k, v: `[N, L, f]` float32 or bfloat16.
      eta_pos: `[K]`; gate: `[N, L]`: token j teaches token i of its mini-batch at the rate eta_pos[i] * gate[j].
      params: (W1 `[N, f, f]`, b1 `[N, 1, f]`) or (W1 `[N, f, 4f]`, b1, W2 `[N, 4f, f]`, b2).
      ln_weight, ln_bias: `[N, f]`.
      mini_batch: K.
      group: mini-batches between two borders; None for as many as fit.
      save: keep the borders, which the backward pass needs.
      interpret: as in `pl.pallas_call`.
    Returns:
      (out `[N, L, f]`, final params, borders: params at every group's start as `ttt_backward` takes them, or None).
    Raises:
      ValueError: what `refusal` says.
    """
    s = sizes_of(q, params, mini_batch, group)
    state = pad_params(params, s)
    kernel = partial(forward_kernel, count=len(state), mini_batch=s.K, group=s.group, dtype=q.dtype)
    inputs = [*zip(common(q, k, v, eta_pos, gate, ln_weight, ln_bias, s), COMMON, strict=True)]
    outputs = [(shape(inputs[0][0].shape, q.dtype), "tokens"), *((shape(x.shape, x.dtype), "heads") for x in state)]
    borders = [(shape((s.groups, *x.shape), x.dtype), "borders") for x in state] if save else []
    inputs += [(x, "heads") for x in state]
    out, *rest = call(kernel, s, inputs, outputs + borders, [], "ttt_forward", False, interpret)
    final = cut_params(rest[: len(state)], s, [x.dtype for x in params])
    return cut_tokens(out, s), final, tuple(rest[len(state) :]) if save else None


def ttt_backward(
    q,
    k,
    v,
    eta_pos,
    gate,
    params,
    ln_weight,
    ln_bias,
    borders,
    d_out,
    d_final,
    *,
    mini_batch,
    group=None,
    interpret=False,
):
    """Cotangents of q, k, v, eta_pos, gate, params, ln_weight, ln_bias, from borders and group of `ttt_forward`."""
    s = sizes_of(q, params, mini_batch, group)
    count, programs = len(params), s.N // s.P
    kernel = partial(backward_kernel, count=count, mini_batch=s.K, group=s.group, dtype=q.dtype)
    inputs = [*zip(common(q, k, v, eta_pos, gate, ln_weight, ln_bias, s), COMMON, strict=True)]
    tokens, (gates, _), (rows, _), (weight, _) = [x for x, _ in inputs[:3]], inputs[3], inputs[5], inputs[6]
    inputs += [(pad_tokens(d_out, s), "tokens"), *((x, "borders") for x in borders)]
    d_state = pad_params(d_final, s)
    inputs += [(x, "heads") for x in d_state]
    outputs = [
        *((shape(x.shape, x.dtype), "tokens") for x in tokens),
        (shape(gates.shape, gates.dtype), "gate"),
        (shape((programs, 1, 1), jnp.float32), "program"),
        (shape((programs, *rows.shape), jnp.float32), "program"),
        *((shape(weight.shape, jnp.float32), "heads"),) * 2,
        *((shape(x.shape, x.dtype), "heads") for x in d_state),
    ]
    scratch = [pltpu.VMEM((s.group, s.P, *x.shape[1:]), jnp.float32) for x in d_state]
    results = call(kernel, s, inputs, outputs, scratch, "ttt_backward", True, interpret)
    d_gates, d_last, d_rows, d_weight, d_bias = results[3:8]
    d_scales = jnp.where(earlier(s), d_rows.sum(0), 0.0).sum(1).reshape(s.P, s.K).sum(0)
    d_eta_pos = d_scales[:mini_batch].at[-1].add(d_last.sum())
    return (
        *(cut_tokens(x, s) for x in results[:3]),
        d_eta_pos.astype(eta_pos.dtype),
        cut_gates(d_gates, s).astype(gate.dtype),
        cut_params(results[8:], s, [x.dtype for x in params]),
        d_weight[: s.n, 0].astype(ln_weight.dtype),
        d_bias[: s.n, 0].astype(ln_bias.dtype),
    )
