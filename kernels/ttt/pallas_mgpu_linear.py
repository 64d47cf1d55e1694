"""TTT-Linear in dual form for Hopper GPUs (Mosaic GPU; arXiv 2407.04620, sections 2.4 and 2.5), forward and backward.

One warpgroup owns one head and walks its sequence; the fast weights stay in its registers from the first token to the
last. A mini-batch of K <= 64 tokens is a tile of 64 rows whose rows beyond K are zero: wgmma knows no lower tile, and
at f = 64 a step is bound by the latency of its chain of small products, not by the tensor cores, so that the zeros cost
little. Only the K real rows are read and written. Operands of products have the dtype of the tokens; sums, norms and
the fast weights are float32.

The forward kernel writes the fast weights once a group of mini-batches. The backward kernel walks the groups from the
last to the first, computes the weights of a group's mini-batches again into shared memory, and pulls the cotangents
back through them by the formulas in `backward_kernel`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rollax.kernels.mosaic_gpu import matrix, transposed

WIDTH = 64  # of a head, and the rows of a tile
TILE = (WIDTH, WIDTH)
EPS = 1e-6  # of the inner LayerNorm
STATES = 4  # mini-batches whose weights fit into shared memory in the backward kernel
SLOTS = 2  # mini-batches in shared memory: the one at hand and the next
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def across(x):
    """`[64]`, one value a row, to a tile."""
    return lax.broadcast_in_dim(x, TILE, (0,))


def down(x):
    """`[64]`, one value a column, to a tile."""
    return lax.broadcast_in_dim(x, TILE, (1,))


def row_sum(x):
    return jnp.sum(x, axis=1)


def column_sum(x):
    return jnp.sum(x, axis=0)


def mean(x):
    """Of every row, as a tile."""
    return across(row_sum(x) * (1 / WIDTH))


def centre(u, x):
    """u without its components along 1 and x in every row (x standardised): the Jacobian of a LayerNorm, times std."""
    return u - mean(u) - x * mean(u * x)


def standardise(z):
    """((z - mean) / std, 1 / std) of every row, population variance, eps inside the root."""
    centred = z - mean(z)
    scale = lax.rsqrt(mean(centred * centred) + EPS)
    return centred * scale, scale


def tile_product(*pairs, columns=WIDTH):
    """Sum of a b over pairs of 16-bit tiles in shared memory, float32 `[64, columns]`."""

    def body(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    # The barrier keeps the compiler from moving a use of the sum in between the products, which would serialise them.
    return lax.optimization_barrier(pl.run_scoped(body, plgpu.ACC((WIDTH, columns), jnp.float32)))


def tiles(dtype, *shape):
    return matrix(dtype, *shape, *TILE)


def vectors(count):
    return plgpu.SMEM((count, WIDTH), jnp.float32)


def by_row(ref):
    return plgpu.layout_cast(ref[...], BY_ROW)


def by_column(ref):
    return plgpu.layout_cast(ref[...], BY_COLUMN)


def read(ref):
    """A tile from shared memory in the layout of an accumulator, float32."""
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32)


def write(*pairs):
    """Values into shared memory (ref, value), where wgmma and TMA see them."""
    for ref, value in pairs:
        ref[...] = value.astype(ref.dtype)
    plgpu.commit_smem()


def clear(*refs):
    """Zero tiles and vectors."""
    for ref in refs:
        layout = plgpu.Layout.WGMMA if len(ref.shape) == 2 else BY_ROW
        ref[...] = plgpu.layout_cast(jnp.zeros(ref.shape, ref.dtype), layout)
    plgpu.commit_smem()


def causal(x):
    """x where the column's token is not later than the row's, else 0."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, TILE, i, layout=plgpu.Layout.WGMMA) for i in (0, 1))
    return jnp.where(row >= column, x, 0.0)


def gradient(z, k, v, weight, bias):
    """Inner gradient of 0.5 |LN(z) - (v - k)|^2 in z, standardise(z), and the residual LN(z) - (v - k)."""
    x, scale = standardise(z)
    residual = weight * x + bias - (read(v) - read(k))
    return centre(residual * weight, x) * scale, x, scale, residual


def through_gradient(r, along_x, x, s, residual, weight):
    """Cotangents of z, of the target v - k and of the norm's weight from that of G, U: r = U s, along_x = mean(U G).

    G = s centre(e, x), e = residual weight, residual = weight x + bias - (v - k), and (x, s) = standardise(z); that of
    the norm's bias is that of the target, negated. `weight()` reads the weight.
    """
    e, d_e = residual * weight(), centre(r, x)
    d_target = -d_e * weight()
    d_weight = column_sum(d_e * (residual + x * weight()))
    d_x = -d_target * weight() - r * mean(e * x) - e * mean(r * x)
    return s * (centre(d_x, x) - x * along_x), d_target, d_weight


def advance(k, v, W, b, w, g, last, gate, weight, bias):
    """The fast weights after a mini-batch; leaves W in `w` and the gradient, times its rate, in `g`, both 16-bit.

    Returns (W `[f, f]`, b `[f]` by column, gradient without rate).
    """
    write((w, W))
    G = gradient(tile_product((k, w)) + down(b), k, v, weight, bias)[0]
    rated = across(last * by_row(gate)) * G
    write((g, rated))
    return W - tile_product((transposed(k), g)), b - column_sum(rated), G


def forward_kernel(n, K, group, *refs):
    """All of a head; n mini-batches of K tokens, the state saved once a group (0: never). Grid: heads."""
    q, k, v, gate, shared, norm, W1, b1, out, *ends = refs[: 11 + 2 * (group > 0)]
    tokens, gates, work, out_smem, state, row, constants, loaded, once = refs[11 + 2 * (group > 0) :]
    head = lax.axis_index("head")

    def load(m):
        slot = lax.rem(m, SLOTS)
        for i, ref in enumerate((q, k, v)):
            plgpu.copy_gmem_to_smem(ref.at[head, pl.ds(m * K, K)], tokens.at[slot, i, pl.ds(0, K)], loaded.at[slot])
        plgpu.copy_gmem_to_smem(gate.at[head, m], gates.at[slot], loaded.at[slot])

    if K < WIDTH:
        clear(*(tokens.at[s, i] for s in range(SLOTS) for i in range(3)))
    load(0)
    plgpu.copy_gmem_to_smem(shared, constants.at[pl.ds(0, 2)], once)
    plgpu.copy_gmem_to_smem(norm.at[head], constants.at[pl.ds(2, 2)], once)
    plgpu.copy_gmem_to_smem(W1.at[head], state, once)
    plgpu.copy_gmem_to_smem(b1.at[head], row, once)
    plgpu.barrier_wait(once)
    weight, bias = (down(by_column(constants.at[i])) for i in (2, 3))

    def save(W, b, W_gmem, b_gmem):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        write((state, W), (row.at[0], b))
        plgpu.copy_smem_to_gmem(state, W_gmem)
        plgpu.copy_smem_to_gmem(row, b_gmem)

    def step(m, carry):
        W, b = carry
        slot = lax.rem(m, SLOTS)
        q, k, v = (tokens.at[slot, i] for i in range(3))
        w, rated, g, p = (work.at[i] for i in range(4))
        plgpu.barrier_wait(loaded.at[slot])
        pl.when(m + 1 < n)(lambda: load(m + 1))

        if group:

            @pl.when(lax.rem(m, group) == 0)
            def _():
                save(W, b, *(ref.at[lax.div(m, group), head] for ref in ends[2:]))

        W_next, b_next, G = advance(k, v, W, b, w, rated, by_row(constants.at[1]), gates.at[slot], weight, bias)
        scores = tile_product((q, transposed(k))) + 1
        eta = across(by_row(constants.at[0])) * down(by_column(gates.at[slot]))
        write((g, G), (p, causal(-eta * scores)))
        x, _ = standardise(tile_product((q, w), (p, g)) + down(b))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        write((out_smem, read(q) + weight * x + bias))
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, K)], out.at[head, pl.ds(m * K, K)])
        return W_next, b_next

    W, b = lax.fori_loop(0, n, step, (read(state), by_column(row.at[0])))
    save(W, b, *(ref.at[head] for ref in ends[:2]))
    plgpu.wait_smem_to_gmem(0)


def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def group_of(group):
    """Mini-batches between two saved states."""
    return min(group or STATES, STATES)


def padded_gates(gate, K):
    """`[N, L]` to float32 `[N, L / K, 64]`: the zeros beyond K keep those rows from teaching anything."""
    return jnp.pad(gate.astype(jnp.float32).reshape(gate.shape[0], -1, K), ((0, 0), (0, 0), (0, WIDTH - K)))


def inputs(q, k, v, eta_pos, gate, params, ln_weight, ln_bias):
    """What the kernels read, in their order.

    q, k, v; gates; (position scales, and the last one at every place) `[2, 64]`; (weight, bias) of the norm
    `[N, 2, 64]`; fast weights in float32.
    """
    K = eta_pos.shape[0]
    scales = jnp.pad(eta_pos.astype(jnp.float32), (0, WIDTH - K))
    shared = jnp.stack([scales, jnp.full(WIDTH, scales[K - 1])])
    norm = jnp.stack([ln_weight, ln_bias], 1).astype(jnp.float32)
    tokens = (x.astype(q.dtype) for x in (q, k, v))
    return *tokens, padded_gates(gate, K), shared, norm, *(x.astype(jnp.float32) for x in params)


def linear_forward(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, *, mini_batch, group=None, save=True):
    """TTT-Linear, N heads of L tokens, L a multiple of mini_batch.

    Args:
      q, k, v: `[N, L, 64]`, float16 or bfloat16.
      eta_pos: `[K]`; gate: `[N, L]`: token j teaches token i of its mini-batch at the rate eta_pos[i] * gate[j].
      params: (W1 `[N, 64, 64]`, b1 `[N, 1, 64]`).
      ln_weight, ln_bias: `[N, 64]`.
      mini_batch: K, a multiple of 8 up to 64.
      group: mini-batches between two saved states, at most 4; None for 4.
      save: keep these states, which the backward pass needs.
    Returns:
      (out `[N, L, 64]` in q's dtype, final params, params at every group's start `[groups, N, ...]` or None).
    """
    n, group = q.shape[1] // mini_batch, group_of(group) if save else 0
    borders = [float32(-(-n // group), *x.shape) for x in params] if save else []
    call = plgpu.kernel(
        partial(forward_kernel, n, mini_batch, group),
        kernel_name="ttt_linear_forward",
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), *(float32(*x.shape) for x in params), *borders],
        scratch_types=[
            tiles(q.dtype, SLOTS, 3),
            vectors(SLOTS),
            tiles(q.dtype, 4),
            tiles(q.dtype),
            tiles(jnp.float32),
            vectors(1),
            vectors(4),
            plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=4),
        ],
        grid=(q.shape[0],),
        grid_names=("head",),
    )
    out, W, b, *borders = call(*inputs(q, k, v, eta_pos, gate, params, ln_weight, ln_bias))
    return out, tuple(x.astype(p.dtype) for x, p in zip((W, b), params, strict=True)), tuple(borders) or None


def backward_kernel(n, K, group, *refs):
    """All of a head, last mini-batch first. Grid: heads.

    Symbols of a step: x, s from standardise(z) and x_q, s_q from standardise(z_q); P = tril(eta) * S with
    S = q k^T + 1; c = eta of the last row; D, d: cotangents of the fast weights after, then before the mini-batch.
    What runs through all steps is kept in shared memory (`D`, `totals`), since a step needs the registers itself.
    """
    q, k, v, d_out, gate, shared, norm, W_border, b_border, D_end, d_end, *refs = refs
    dq, dk, dv, d_gate, d_rate, d_scales, d_norm, D_start, d_start, *scratch = refs
    tokens, gates, states, offsets, work, out_smem, state, D, row, constants, totals, sums, loaded, once = scratch
    head, groups = lax.axis_index("head"), -(-n // group)
    rest = n - (groups - 1) * group  # mini-batches of the last group, which comes first
    full, short = 2 * group - 1, 2 * rest - 1  # steps of a group: all but its last mini-batch forward, then all back
    g, p, dz, ds, d_state = (work.at[i] for i in range(5))
    d_scale, d_weight, d_bias, d = (totals.at[i] for i in range(4))
    weight, bias = (lambda i=i: down(by_column(constants.at[i])) for i in (2, 3))

    def mini_batch(t):
        """That of step t, counted over the whole kernel."""
        after = t - short
        i, size = jnp.where(after < 0, t, lax.rem(after, full)), jnp.where(after < 0, rest, group)
        j = jnp.where(after < 0, groups - 1, groups - 2 - lax.div(after, full))
        return j * group + jnp.where(i < size, i, 2 * (size - 1) - i)

    def load(t):
        slot, m = lax.rem(t, SLOTS), mini_batch(t)
        for i, ref in enumerate((q, k, v, d_out)):
            plgpu.copy_gmem_to_smem(ref.at[head, pl.ds(m * K, K)], tokens.at[slot, i, pl.ds(0, K)], loaded.at[slot])
        plgpu.copy_gmem_to_smem(gate.at[head, m], gates.at[slot], loaded.at[slot])

    def next_tokens(t):
        slot = lax.rem(t, SLOTS)
        plgpu.barrier_wait(loaded.at[slot])
        pl.when(t + 1 < short + (groups - 1) * full)(lambda: load(t + 1))
        return [tokens.at[slot, i] for i in range(4)], gates.at[slot]

    def replay(t, carry):
        """Weights at the start of a mini-batch into `states`, then those of the next."""
        i = lax.rem(mini_batch(t), group)
        (_, k, v, _), gates = next_tokens(t)
        write((offsets.at[i], carry[1]))
        return advance(k, v, *carry, states.at[i], g, by_row(constants.at[1]), gates, weight(), bias())[:2]

    def pull_back(t, _):
        i = lax.rem(mini_batch(t), group)
        (q, k, v, d_out), gates = next_tokens(t)
        w, b = states.at[i], by_column(offsets.at[i])
        scales, gates_down = (lambda: across(by_row(constants.at[0]))), (lambda: down(by_column(gates)))

        # Forward again: P and G, z_q.
        scores = tile_product((q, transposed(k))) + 1
        write((p, causal(-scales() * gates_down() * scores)), (d_state, read(D)))
        write((g, gradient(tile_product((k, w)) + down(b), k, v, weight(), bias())[0]))
        x_q, s_q = standardise(tile_product((q, w), (p, g)) + down(b))
        # The output q + LN(z_q).
        d_y = read(d_out)
        d_weight[...] = by_column(d_weight) + column_sum(d_y * x_q)
        d_bias[...] = by_column(d_bias) + column_sum(d_y)
        d_zq = centre(d_y * weight(), x_q) * s_q
        write((dz, d_zq))

        # P G: d_P = -d_zq G^T, the cotangents of both factors of eta, and d_S = d_P tril(eta).
        d_P = -tile_product((dz, transposed(g)))
        write((ds, causal(d_P * scales() * gates_down())))
        d_eta = causal(d_P * (tile_product((q, transposed(k))) + 1))
        d_scale[...] = by_row(d_scale) + row_sum(d_eta * gates_down())
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        sums[0] = column_sum(d_eta * scales())
        # Update: W - k^T (c G) and b - sum c G. U: cotangent of G. (G again: registers are short.)
        G, x, s, residual = gradient(tile_product((k, w)) + down(b), k, v, weight(), bias())
        R = tile_product((k, d_state)) + down(by_column(d))
        sums[1] = -row_sum(R * G)
        c = across(by_row(constants.at[1]) * by_row(gates))
        U = tile_product((transposed(p), dz)) - c * R
        r, along_x = U * s, mean(U * G)
        write((p, -c * G))
        D[...] = read(D) + tile_product((transposed(q), dz))
        d[...] = by_column(d) + column_sum(d_zq)
        write((out_smem.at[0], read(d_out) + tile_product((dz, transposed(w)), (ds, k))))

        # Through G.
        d_z, d_target, d_scaled = through_gradient(r, along_x, x, s, residual, weight)
        d_weight[...] = by_column(d_weight) + d_scaled
        d_bias[...] = by_column(d_bias) - column_sum(d_target)
        write((dz, d_z), (out_smem.at[2], d_target))
        D[...] = read(D) + tile_product((transposed(k), dz))
        d[...] = by_column(d) + column_sum(d_z)
        d_k = tile_product((dz, transposed(w)), (p, transposed(d_state)), (transposed(ds), q))
        write((out_smem.at[1], d_k - d_target))

        m = mini_batch(t)
        for j, ref in enumerate((dq, dk, dv)):
            plgpu.copy_smem_to_gmem(out_smem.at[j, pl.ds(0, K)], ref.at[head, pl.ds(m * K, K)])
        for j, ref in enumerate((d_gate, d_rate)):
            plgpu.copy_smem_to_gmem(sums.at[j], ref.at[head, m])

    def pull_back_group(j, first):
        """Group `groups - 1 - j`, whose steps begin at first; returns those of the next."""
        size = jnp.where(j == 0, rest, group)
        plgpu.copy_gmem_to_smem(W_border.at[groups - 1 - j, head], state, once)
        plgpu.copy_gmem_to_smem(b_border.at[groups - 1 - j, head], row, once)
        plgpu.barrier_wait(once)
        W, b = lax.fori_loop(first, first + size - 1, replay, (read(state), by_column(row.at[0])))
        write((states.at[size - 1], W), (offsets.at[size - 1], b))
        lax.fori_loop(first + size - 1, first + 2 * size - 1, pull_back, None)
        return first + 2 * size - 1

    if K < WIDTH:
        clear(*(tokens.at[s, i] for s in range(SLOTS) for i in range(4)))
    clear(d_scale, d_weight, d_bias)
    load(0)
    for source, target in ((shared, pl.ds(0, 2)), (norm.at[head], pl.ds(2, 2))):
        plgpu.copy_gmem_to_smem(source, constants.at[target], once)
    plgpu.barrier_wait(once)
    for source, target in ((D_end.at[head], D), (d_end.at[head], totals.at[pl.ds(3, 1)])):
        plgpu.copy_gmem_to_smem(source, target, once)
    plgpu.barrier_wait(once)
    lax.fori_loop(0, groups, pull_back_group, jnp.int32(0))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(D, D_start.at[head])
    plgpu.copy_smem_to_gmem(totals.at[pl.ds(3, 1)], d_start.at[head])
    plgpu.copy_smem_to_gmem(d_scale, d_scales.at[head])
    plgpu.copy_smem_to_gmem(totals.at[pl.ds(1, 2)], d_norm.at[head])
    plgpu.wait_smem_to_gmem(0)


def cotangents(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, gates, out):
    """Those of the first eight arguments, in their dtypes, from padded gates and the outputs of a backward kernel."""
    K = eta_pos.shape[0]
    dq, dk, dv, d_gate, d_rate, d_scales, d_norm, *d_params = out
    # eta of a mini-batch's last row is also the rate of the update: d_rate is its cotangent.
    d_gate = (d_gate + eta_pos[-1] * d_rate)[..., :K].reshape(gate.shape)
    d_eta_pos = d_scales.sum(0)[:K].at[-1].add(jnp.sum(d_rate * gates))
    return (
        *(x.astype(y.dtype) for x, y in zip((dq, dk, dv), (q, k, v), strict=True)),
        d_eta_pos.astype(eta_pos.dtype),
        d_gate.astype(gate.dtype),
        tuple(x.astype(p.dtype) for x, p in zip(d_params, params, strict=True)),
        d_norm[:, 0].astype(ln_weight.dtype),
        d_norm[:, 1].astype(ln_bias.dtype),
    )


def linear_backward(
    q, k, v, eta_pos, gate, params, ln_weight, ln_bias, borders, d_out, d_final, *, mini_batch, group=None
):
    """Cotangents of q, k, v, eta_pos, gate, params, ln_weight, ln_bias, from borders and group of `linear_forward`."""
    N, n, f, group = q.shape[0], q.shape[1] // mini_batch, WIDTH, group_of(group)
    call = plgpu.kernel(
        partial(backward_kernel, n, mini_batch, group),
        kernel_name="ttt_linear_backward",
        out_type=[
            *[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 3,
            *[float32(N, n, f)] * 2,
            float32(N, f),
            float32(N, 2, f),
            *(float32(*x.shape) for x in params),
        ],
        scratch_types=[
            tiles(q.dtype, SLOTS, 4),
            vectors(SLOTS),
            tiles(q.dtype, group),
            vectors(group),
            tiles(q.dtype, 5),
            tiles(q.dtype, 3),
            tiles(jnp.float32),
            tiles(jnp.float32),
            vectors(1),
            vectors(4),
            vectors(4),
            vectors(2),
            plgpu.Barrier(num_arrivals=5, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid=(N,),
        grid_names=("head",),
    )
    *tokens, gates, shared, norm = inputs(q, k, v, eta_pos, gate, (), ln_weight, ln_bias)
    d_state = [x.astype(jnp.float32) for x in d_final]
    out = call(*tokens, d_out.astype(q.dtype), gates, shared, norm, *borders, *d_state)
    return cotangents(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, gates, out)
