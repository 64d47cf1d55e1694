"""TTT-MLP in dual form for Hopper GPUs (Mosaic GPU; arXiv 2407.04620, sections 2.4 and 2.5), forward and backward.

As TTT-Linear's (`pallas_mgpu_linear`): one warpgroup owns one head, a mini-batch of K <= 64 tokens is a tile of 64
rows. The fast weights, 128 KiB in float32, fill most of an SM's shared memory, so a step goes through the 256 hidden
units in four slices of 64, twice: once for the reconstruction's gradient, once to teach and read each slice. What the
second pass needs of the first is computed again.

In the backward kernel the weights and their cotangents take turns in that memory. A group of mini-batches is learned
again from the state that the forward kernel saved, and the 16-bit weights that every mini-batch began with, operands of
products, go to device memory (64 KiB each: they stay in the L2 cache). Then the cotangents come back, and the slices of
those weights pass by while the group is walked from its last mini-batch to its first.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rollax.kernels.mosaic_gpu import sigmoid, transposed
from rollax.kernels.ttt.pallas_mgpu_linear import (
    TILE,
    WIDTH,
    across,
    by_column,
    by_row,
    causal,
    centre,
    clear,
    column_sum,
    cotangents,
    down,
    float32,
    gradient,
    inputs,
    mean,
    read,
    row_sum,
    standardise,
    through_gradient,
    tile_product,
    tiles,
    vectors,
    write,
)

SLICES = 4  # of the hidden units
COPIES = 3 * SLICES + 1  # that bring a state into shared memory
GROUP = 16  # mini-batches between two saved states, 128 KiB each


def gelu(x):
    """tanh-GELU, its first and its second derivative, by tanh(u) = 2 sigmoid(2 u) - 1."""
    a, c = 2 * 0.7978845608028654, 0.044715
    sig, rise = sigmoid(a * (x + c * x * x * x)), a * (1 + 3 * c * x * x)
    bell = sig * (1 - sig)
    curve = bell * (2 * rise + x * ((1 - 2 * sig) * rise * rise + 6 * a * c * x))
    return x * sig, sig + x * bell * rise, curve


def zero():
    """A tile of zeros in the layout of an accumulator."""
    return plgpu.layout_cast(jnp.zeros(TILE, jnp.float32), plgpu.Layout.WGMMA)


def over_state(copy, state, smem):
    """copy(fast weights of a head in device memory, their place in shared memory), slice by slice."""
    (W1, b1, W2, b2), (W1_smem, b1_smem, W2_smem, b2_smem) = state, smem

    def body(s, _):
        units = pl.ds(s * WIDTH, WIDTH)
        copy(W1.at[:, units], W1_smem.at[s])
        copy(b1.at[0, units], b1_smem.at[s])
        copy(W2.at[units], W2_smem.at[s])

    lax.fori_loop(0, SLICES, body, None)
    copy(b2.at[0], b2_smem.at[0])


def save(state, smem):
    """A state, to device memory."""
    plgpu.commit_smem()
    over_state(lambda ref, at: plgpu.copy_smem_to_gmem(at, ref), state, smem)


def forward_kernel(n, K, group, *refs):
    """All of a head; n mini-batches of K tokens, the state saved once a group (0: never). Grid: heads."""
    q, k, v, gate, shared, norm, W1, b1, W2, b2, out, *refs = refs
    ends, refs = refs[:4], refs[4:]
    borders, scratch = (refs[:4], refs[4:]) if group else ([], refs)
    tokens, gates, *state, work, constants, loaded, once = scratch
    W1_smem, b1_smem, W2_smem, b2_smem = state
    head = lax.axis_index("head")
    q_smem, k_smem, v_smem = (tokens.at[i] for i in range(3))
    w1, w2, x2, g1, p, g2, rated = (work.at[i] for i in range(7))

    def load(m):
        for i, ref in enumerate((q, k, v)):
            plgpu.copy_gmem_to_smem(ref.at[head, pl.ds(m * K, K)], tokens.at[i, pl.ds(0, K)], loaded)
        plgpu.copy_gmem_to_smem(gate.at[head, m], gates.at[0], loaded)

    def hidden(s):
        """Activations of slice s for the keys into `x2`, its weights into `w1` and `w2`; the activation's slope."""
        write((w1, read(W1_smem.at[s])), (w2, read(W2_smem.at[s])))
        activation, slope, _ = gelu(tile_product((k_smem, w1)) + down(by_column(b1_smem.at[s])))
        write((x2, activation))
        return slope

    def reconstruct(s, z):
        hidden(s)
        return z + tile_product((x2, w2))

    def learn_and_read(s, carry):
        """Slice s learns; what it adds to the scores of the second layer and, before that, to the queries' output."""
        scores, z = carry
        b, rate = down(by_column(b1_smem.at[s])), across(by_row(constants.at[1]) * by_row(gates.at[0]))
        G1 = hidden(s) * tile_product((g2, transposed(w2)))
        write((g1, G1))
        activation, *_ = gelu(tile_product((q_smem, w1), (p, g1)) + b)
        write((g1, rate * G1))
        W1_smem[s] = read(W1_smem.at[s]) - tile_product((transposed(k_smem), g1))
        W2_smem[s] = read(W2_smem.at[s]) - tile_product((transposed(x2), rated))
        b1_smem[s] = by_column(b1_smem.at[s]) - column_sum(rate * G1)
        write((g1, activation))
        return scores + tile_product((g1, transposed(x2))), z + tile_product((g1, w2))

    def step(m, _):
        weight, bias = (lambda i=i: down(by_column(constants.at[i])) for i in (2, 3))
        eta = lambda: across(by_row(constants.at[0])) * down(by_column(gates.at[0]))  # noqa: E731
        plgpu.barrier_wait(loaded)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if group:

            @pl.when(lax.rem(m, group) == 0)
            def _():
                save([ref.at[lax.div(m, group), head] for ref in borders], state)

        b = by_column(b2_smem.at[0])
        z = lax.fori_loop(0, SLICES, reconstruct, zero()) + down(b)
        G2 = gradient(z, k_smem, v_smem, weight(), bias())[0]
        rated_G2 = across(by_row(constants.at[1]) * by_row(gates.at[0])) * G2
        scores = tile_product((q_smem, transposed(k_smem))) + 1
        write((g2, G2), (rated, rated_G2), (p, causal(-eta() * scores)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        b2_smem[0] = b - column_sum(rated_G2)
        scores, z = lax.fori_loop(0, SLICES, learn_and_read, (zero(), zero()))
        write((p, causal(-eta() * (scores + 1))))
        x, _ = standardise(z + tile_product((p, g2)) + down(b))
        write((rated, read(q_smem) + weight() * x + bias()))
        plgpu.copy_smem_to_gmem(rated.at[pl.ds(0, K)], out.at[head, pl.ds(m * K, K)])
        pl.when(m + 1 < n)(lambda: load(m + 1))

    if K < WIDTH:
        clear(q_smem, k_smem, v_smem)
    load(0)
    take = lambda source, smem: plgpu.copy_gmem_to_smem(source, smem, once)  # noqa: E731
    take(shared, constants.at[pl.ds(0, 2)])
    take(norm.at[head], constants.at[pl.ds(2, 2)])
    over_state(take, [ref.at[head] for ref in (W1, b1, W2, b2)], state)
    plgpu.barrier_wait(once)
    lax.fori_loop(0, n, step, None)
    save([ref.at[head] for ref in ends], state)
    plgpu.wait_smem_to_gmem(0)


def state_in_shared_memory():
    """Float32 fast weights of a head, or their cotangents: W1, b1, W2, b2 by slices."""
    return [tiles(jnp.float32, SLICES), vectors(SLICES), tiles(jnp.float32, SLICES), vectors(1)]


def group_of(group, n):
    """Mini-batches between two saved states of n."""
    return min(group or GROUP, n)


def mlp_forward(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, *, mini_batch, group=None, save=True):
    """TTT-MLP: as `linear_forward` for params of (W1 `[N, 64, 256]`, b1, W2 `[N, 256, 64]`, b2).

    `group` may be any number, None for 16.
    """
    n = q.shape[1] // mini_batch
    group = group_of(group, n) if save else 0
    borders = [float32(-(-n // group), *x.shape) for x in params] if save else []
    call = plgpu.kernel(
        partial(forward_kernel, n, mini_batch, group),
        kernel_name="ttt_mlp_forward",
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), *(float32(*x.shape) for x in params), *borders],
        scratch_types=[
            tiles(q.dtype, 3),
            vectors(1),
            *state_in_shared_memory(),
            tiles(q.dtype, 7),
            vectors(4),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=2 + COPIES),
        ],
        grid=(q.shape[0],),
        grid_names=("head",),
    )
    out, *rest = call(*inputs(q, k, v, eta_pos, gate, params, ln_weight, ln_bias))
    final = tuple(x.astype(p.dtype) for x, p in zip(rest[:4], params, strict=True))
    return out, final, tuple(rest[4:]) or None


def backward_kernel(n, K, group, *refs):
    """All of a head, last mini-batch first. Grid: heads.

    Symbols of a step: as in TTT-Linear's kernel, G and H = (gradient of the second layer) W2^T; what belongs to the
    queries ends in q. For a layer z = x W + b with gradient G, the update is W - x^T (c G), so that R = x D + d, D and
    d the cotangents of the updated weights, gives -c R to the cotangent of G and -sum(R G) to that of c.
    """
    q, k, v, d_out, gate, shared, norm, *refs = refs
    borders, D_end, refs = refs[:4], refs[4:8], refs[8:]
    dq, dk, dv, d_gate, d_rate, d_scales, d_norm, *refs = refs
    D_start, (kept, kept_b, parked), refs = refs[:4], refs[4:7], refs[7:]
    tokens, gates, *state = refs[:6]
    streamed, work, offsets, constants, totals, sums, loaded, swapped, fetched, once, back = refs[6:]
    head, groups = lax.axis_index("head"), -(-n // group)
    q_smem, k_smem = (tokens.at[i] for i in range(2))
    w1, w2 = (streamed.at[i] for i in range(2))
    x2, g1, g2, p, dz, ds, t = (work.at[i] for i in range(7))
    W1, b1, W2, b2 = state  # or their cotangents
    d_scale, d_weight, d_bias = (totals.at[i] for i in range(3))
    weight, bias = (lambda i=i: down(by_column(constants.at[i])) for i in (2, 3))
    scales, gates_down = (lambda: across(by_row(constants.at[0]))), (lambda: down(by_column(gates.at[0])))
    eta = lambda: scales() * gates_down()  # noqa: E731
    rate = lambda: across(by_row(constants.at[1]) * by_row(gates.at[0]))  # noqa: E731

    def swap(refs):
        """Takes a state from device memory."""
        plgpu.commit_smem()
        over_state(lambda ref, smem: plgpu.copy_gmem_to_smem(ref, smem, swapped), refs, state)
        plgpu.barrier_wait(swapped)

    def load(m):
        """The tokens of a mini-batch: v and the cotangent of the output wait in `dz` and `ds`."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        for ref, smem in ((q, q_smem), (k, k_smem), (v, dz), (d_out, ds)):
            plgpu.copy_gmem_to_smem(ref.at[head, pl.ds(m * K, K)], smem.at[pl.ds(0, K)], loaded)
        plgpu.copy_gmem_to_smem(gate.at[head, m], gates.at[0], loaded)
        plgpu.barrier_wait(loaded)

    def learn_again(m, _):
        """Keeps the weights of a mini-batch, then learns from it; the last of a group in vain."""
        i = lax.rem(m, group)

        def hidden(s):
            activation, slope, _ = gelu(tile_product((k_smem, w1)) + down(by_column(b1.at[s])))
            write((x2, activation))
            return slope

        def reconstruct(s, z):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            write((w1, read(W1.at[s])), (w2, read(W2.at[s])))
            for j, ref in enumerate((w1, w2)):
                plgpu.copy_smem_to_gmem(ref, kept.at[head, i, s, j])
            hidden(s)
            return z + tile_product((x2, w2))

        def learn(s, _):
            write((w1, read(W1.at[s])), (w2, read(W2.at[s])))
            G1 = rate() * hidden(s) * tile_product((g2, transposed(w2)))
            write((g1, G1))
            W1[s] = read(W1.at[s]) - tile_product((transposed(k_smem), g1))
            W2[s] = read(W2.at[s]) - tile_product((transposed(x2), t))
            b1[s] = by_column(b1.at[s]) - column_sum(G1)

        load(m)
        plgpu.copy_smem_to_gmem(b1, kept_b.at[head, i, pl.ds(0, SLICES)])
        plgpu.copy_smem_to_gmem(b2, kept_b.at[head, i, pl.ds(SLICES, 1)])
        b = by_column(b2.at[0])
        G2 = gradient(lax.fori_loop(0, SLICES, reconstruct, zero()) + down(b), k_smem, dz, weight(), bias())[0]
        rated = rate() * G2
        write((g2, G2), (t, rated))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        b2[0] = b - column_sum(rated)
        lax.fori_loop(0, SLICES, learn, None)

    def pull_back(m):
        i, (d1, d2) = lax.rem(m, group), (b1, b2.at[0])
        b1_down, b2_down = (lambda s: down(by_column(offsets.at[s]))), (lambda: down(by_column(offsets.at[SLICES])))

        def fetch(j, s):
            """A slice of W1 (j = 0) or W2 (1), on its way to `w1` or `w2`."""
            plgpu.copy_gmem_to_smem(kept.at[head, i, s, j], streamed.at[j], fetched.at[j])

        def fetch_next(j, s):
            """After the last use of slice s: a loop over slices begins where the one before has ended."""
            plgpu.commit_smem()
            fetch(j, lax.rem(s + 1, SLICES))

        def hidden(s):
            plgpu.barrier_wait(fetched.at[0])
            activation, *slopes = gelu(tile_product((k_smem, w1)) + b1_down(s))
            write((x2, activation))
            plgpu.barrier_wait(fetched.at[1])
            return slopes

        def queries(s):
            return gelu(tile_product((q_smem, w1), (p, g1)) + b1_down(s))

        def reconstruct(s, z):
            hidden(s)
            fetch_next(0, s)
            z = z + tile_product((x2, w2))
            fetch_next(1, s)
            return z

        def read_slice(s, carry):
            """What slice s adds to the scores of the second layer and, before that, to the queries' output."""
            scores, z = carry
            slope, _ = hidden(s)
            write((g1, slope * tile_product((g2, transposed(w2)))))
            activation, *_ = queries(s)
            fetch_next(0, s)
            write((t, activation))
            z = z + tile_product((t, w2))
            fetch_next(1, s)
            return scores + tile_product((t, transposed(x2))), z

        def teach(cotangent, scores):
            """The cotangent of P = -tril(eta) scores, negated, into `ds`, there that of the scores; those of eta."""
            d_eta = causal(cotangent * scores)
            d_scale[...] = by_row(d_scale) + row_sum(d_eta * gates_down())
            write((ds, causal(cotangent * eta())))
            return column_sum(d_eta * scales())

        def pull_back_slice(s, carry):
            """All of a slice but what the second layer's cotangent of the keys' output adds."""
            U, d_k, d_c = carry
            slope, _ = hidden(s)
            write((g1, slope * tile_product((g2, transposed(w2)))), (t, read(W2.at[s])))
            R = tile_product((x2, t))
            U, d_c = U - rate() * R, d_c - row_sum(read(g2) * R)
            d_x = -rate() * tile_product((g2, transposed(t)))
            write((t, read(W1.at[s])))
            R = tile_product((k_smem, t)) + down(by_column(d1.at[s]))
            d_G, d_c = -rate() * R, d_c - row_sum(read(g1) * R)
            d_k = d_k - rate() * tile_product((g1, transposed(t)))
            # The queries' hidden units, and what they read.
            activation, slope_q, _ = queries(s)
            write((t, activation))
            d_x = d_x + tile_product((transposed(ds), t))
            W2[s] = read(W2.at[s]) + tile_product((transposed(t), dz))
            d_z = tile_product((dz, transposed(w2)), (ds, x2)) * slope_q
            write((t, d_z), (x2, d_x))
            plgpu.copy_smem_to_gmem(t, parked.at[head, s])
            d_G = d_G + tile_product((transposed(p), t))
            W1[s] = read(W1.at[s]) + tile_product((transposed(q_smem), t))
            # Through G1 = H slope, H = G2 W2^T, computed again: registers are short.
            _, slope, curve = gelu(tile_product((k_smem, w1)) + b1_down(s))
            d_z1 = d_G * tile_product((g2, transposed(w2))) * curve + read(x2) * slope
            d1[s] = by_column(d1.at[s]) + column_sum(d_z) + column_sum(d_z1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            write((t, d_G * slope), (x2, d_z1))
            U = U + tile_product((t, w2))
            fetch_next(1, s)
            W2[s] = read(W2.at[s]) + tile_product((transposed(t), g2))
            d_k = d_k + tile_product((x2, transposed(w1)))
            fetch_next(0, s)
            W1[s] = read(W1.at[s]) + tile_product((transposed(k_smem), x2))
            return U, d_k, d_c

        def finish_slice(s, carry):
            """That; and what the queries' `d_z` gives to P and q. `dz` has the cotangent of the keys' output."""
            d_P, d_q, d_k = carry
            slope, _ = hidden(s)
            d_z1 = slope * tile_product((dz, transposed(w2)))
            write((t, d_z1), (g1, slope * tile_product((g2, transposed(w2)))))
            pl.when(s + 1 < SLICES)(lambda: fetch(1, s + 1))
            W2[s] = read(W2.at[s]) + tile_product((transposed(x2), dz))
            W1[s] = read(W1.at[s]) + tile_product((transposed(k_smem), t))
            d1[s] = by_column(d1.at[s]) + column_sum(d_z1)
            d_k = d_k + tile_product((t, transposed(w1)))
            plgpu.barrier_wait(back)
            d_P = d_P - tile_product((p, transposed(g1)))
            d_q = d_q + tile_product((p, transposed(w1)))
            plgpu.commit_smem()

            @pl.when(s + 1 < SLICES)
            def _():
                fetch(0, s + 1)
                plgpu.copy_gmem_to_smem(parked.at[head, s + 1], p, back)

            return d_P, d_q, d_k

        load(m)
        fetch(0, 0)
        fetch(1, 0)
        for rows in (pl.ds(0, SLICES), pl.ds(SLICES, 1)):
            plgpu.copy_gmem_to_smem(kept_b.at[head, i, rows], offsets.at[rows], once)
        plgpu.barrier_wait(once)

        # Forward again: P of both layers, G2, z_q.
        z = lax.fori_loop(0, SLICES, reconstruct, zero()) + b2_down()
        scores = tile_product((q_smem, transposed(k_smem))) + 1
        write((g2, gradient(z, k_smem, dz, weight(), bias())[0]), (p, causal(-eta() * scores)))
        scores, z = lax.fori_loop(0, SLICES, read_slice, (zero(), zero()))
        scores = scores + 1
        write((g1, causal(-eta() * scores)))
        x_q, s_q = standardise(z + tile_product((g1, g2)) + b2_down())
        # The output q + LN(z_q); rows beyond K hold what was there before.
        row = plgpu.broadcasted_iota(jnp.int32, TILE, 0, layout=plgpu.Layout.WGMMA)
        d_y = jnp.where(row < K, read(ds), 0.0)
        d_weight[...] = by_column(d_weight) + column_sum(d_y * x_q)
        d_bias[...] = by_column(d_bias) + column_sum(d_y)
        d_zq = centre(d_y * weight(), x_q) * s_q
        write((dz, d_zq))
        # U: cotangent of G2.
        d = down(by_column(d2))
        U, d_c = tile_product((transposed(g1), dz)) - rate() * d, -row_sum(read(g2) * d)
        sums[0] = teach(-tile_product((dz, transposed(g2))), scores)
        d2[...] = by_column(d2) + column_sum(d_zq)
        U, d_k, sums[1] = lax.fori_loop(0, SLICES, pull_back_slice, (U, zero(), d_c))

        plgpu.wait_smem_to_gmem(0)
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(parked.at[head, 0], p, back)
        for ref, smem in ((v, dz), (d_out, ds)):
            plgpu.copy_gmem_to_smem(ref.at[head, pl.ds(m * K, K)], smem.at[pl.ds(0, K)], once)
        z = lax.fori_loop(0, SLICES, reconstruct, zero()) + b2_down()
        plgpu.barrier_wait(once)
        G, x, s, residual = gradient(z, k_smem, dz, weight(), bias())
        d_z, d_target, d_scaled = through_gradient(U * s, mean(U * G), x, s, residual, weight)
        d_weight[...] = by_column(d_weight) + d_scaled
        d_bias[...] = by_column(d_bias) - column_sum(d_target)
        d2[...] = by_column(d2) + column_sum(d_z)
        write((dz, d_z))
        d_P, d_q, d_k = lax.fori_loop(0, SLICES, finish_slice, (zero(), read(ds), d_k - d_target))
        sums[0] = by_column(sums.at[0]) + teach(d_P, tile_product((q_smem, transposed(k_smem))) + 1)
        d_q, d_k = d_q + tile_product((ds, k_smem)), d_k + tile_product((transposed(ds), q_smem))
        write((p, d_q), (g1, d_k), (g2, d_target))

        for ref, smem in ((dq, p), (dk, g1), (dv, g2)):
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(0, K)], ref.at[head, pl.ds(m * K, K)])
        for j, ref in enumerate((d_gate, d_rate)):
            plgpu.copy_smem_to_gmem(sums.at[j], ref.at[head, m])

    def pull_back_group(j, _):
        index = groups - 1 - j
        first = index * group
        end = jnp.minimum(first + group, n)
        swap([ref.at[index, head] for ref in borders])
        lax.fori_loop(first, end, learn_again, None)
        plgpu.wait_smem_to_gmem(0)
        swap([ref.at[head] for ref in D_start])
        lax.fori_loop(first, end, lambda i, _: pull_back(first + end - 1 - i), None)
        save([ref.at[head] for ref in D_start], state)
        plgpu.wait_smem_to_gmem(0)

    clear(q_smem, k_smem, dz, ds, d_scale, d_weight, d_bias)
    for source, target in ((shared, pl.ds(0, 2)), (norm.at[head], pl.ds(2, 2))):
        plgpu.copy_gmem_to_smem(source, constants.at[target], once)
    plgpu.barrier_wait(once)
    swap([ref.at[head] for ref in D_end])
    save([ref.at[head] for ref in D_start], state)
    plgpu.wait_smem_to_gmem(0)
    lax.fori_loop(0, groups, pull_back_group, None)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(d_scale, d_scales.at[head])
    plgpu.copy_smem_to_gmem(totals.at[pl.ds(1, 2)], d_norm.at[head])
    plgpu.wait_smem_to_gmem(0)


def mlp_backward(
    q, k, v, eta_pos, gate, params, ln_weight, ln_bias, borders, d_out, d_final, *, mini_batch, group=None
):
    """Cotangents of the first eight arguments, from borders and group of `mlp_forward`."""
    N, n, f = q.shape[0], q.shape[1] // mini_batch, WIDTH
    group = group_of(group, n)
    call = plgpu.kernel(
        partial(backward_kernel, n, mini_batch, group),
        kernel_name="ttt_mlp_backward",
        out_type=[
            *[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 3,
            *[float32(N, n, f)] * 2,
            float32(N, f),
            float32(N, 2, f),
            *(float32(*x.shape) for x in params),
            # For the kernel itself: the weights of a group's mini-batches, and the queries' `d_z` of a step.
            jax.ShapeDtypeStruct((N, group, SLICES, 2, f, f), q.dtype),
            float32(N, group, SLICES + 1, f),
            jax.ShapeDtypeStruct((N, SLICES, f, f), q.dtype),
        ],
        scratch_types=[
            tiles(q.dtype, 2),
            vectors(1),
            *state_in_shared_memory(),
            tiles(q.dtype, 2),
            tiles(q.dtype, 7),
            vectors(SLICES + 1),
            vectors(4),
            vectors(3),
            vectors(2),
            plgpu.Barrier(num_arrivals=5),
            plgpu.Barrier(num_arrivals=COPIES),
            plgpu.Barrier(num_arrivals=1, num_barriers=2),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=1),
        ],
        grid=(N,),
        grid_names=("head",),
    )
    args = (q, k, v, eta_pos, gate, params, ln_weight, ln_bias)
    *tokens, gates, shared, norm = inputs(*args[:5], (), ln_weight, ln_bias)
    d_state = [x.astype(jnp.float32) for x in d_final]
    out = call(*tokens, d_out.astype(q.dtype), gates, shared, norm, *borders, *d_state)
    return cotangents(*args, gates, out[:-3])
