"""TTT-MLP in dual form for Hopper GPUs (Mosaic GPU; arXiv 2407.04620, sections 2.4 and 2.5): the forward kernel.

As TTT-Linear's (`pallas_mgpu_linear`): one warpgroup owns one head, a mini-batch of K <= 64 tokens is a tile of 64
rows. The fast weights, 128 KiB in float32, fill most of an SM's shared memory, so a step goes through the 256 hidden
units in four slices of 64, twice: once for the reconstruction's gradient, once to teach and read each slice. What the
second pass needs of the first is computed again.

The backward pass would hold their cotangents as well, 256 KiB, more than there is: it is `xla.ttt_backward`, which
takes what this kernel saves.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rollax.kernels.mosaic_gpu import sigmoid, transposed
from rollax.kernels.ttt import xla
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
    down,
    float32,
    inputs,
    read,
    standardise,
    tile_product,
    tiles,
    vectors,
    write,
)

SLICES = 4  # of the hidden units


def gelu(x):
    """tanh-GELU and its derivative, by tanh(u) = 2 sigmoid(2 u) - 1."""
    a, c = 2 * 0.7978845608028654, 0.044715
    sig = sigmoid(a * (x + c * x * x * x))
    return x * sig, sig + x * sig * (1 - sig) * a * (1 + 3 * c * x * x)


def forward_kernel(n, K, group, *refs):
    """All of a head; n mini-batches of K tokens, the state saved once a group (0: never). Grid: heads."""
    q, k, v, gate, shared, norm, W1, b1, W2, b2, out, *refs = refs
    ends, refs = refs[:4], refs[4:]
    borders, scratch = (refs[:4], refs[4:]) if group else ([], refs)
    tokens, gates, W1_smem, b1_smem, W2_smem, b2_smem, work, constants, loaded, once = scratch
    head = lax.axis_index("head")
    q_smem, k_smem, v_smem = (tokens.at[i] for i in range(3))
    w1, w2, x2, g1, p, g2, rated = (work.at[i] for i in range(7))

    def load(m):
        for i, ref in enumerate((q, k, v)):
            plgpu.copy_gmem_to_smem(ref.at[head, pl.ds(m * K, K)], tokens.at[i, pl.ds(0, K)], loaded)
        plgpu.copy_gmem_to_smem(gate.at[head, m], gates.at[0], loaded)

    def state(W1, b1, W2, b2):
        """Pairs of (fast weights in device memory, their place in shared memory)."""
        for s in range(SLICES):
            units = pl.ds(s * WIDTH, WIDTH)
            yield W1.at[:, units], W1_smem.at[s]
            yield b1.at[0, units], b1_smem.at[s]
            yield W2.at[units], W2_smem.at[s]
        yield b2.at[0], b2_smem.at[0]

    def save(refs):
        plgpu.commit_smem()
        for ref, smem in state(*refs):
            plgpu.copy_smem_to_gmem(smem, ref)

    def hidden(s):
        """Activations of slice s for the keys into `x2`, its weights into `w1` and `w2`; the activation's slope."""
        write((w1, read(W1_smem.at[s])), (w2, read(W2_smem.at[s])))
        activation, slope = gelu(tile_product((k_smem, w1)) + down(by_column(b1_smem.at[s])))
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
        activation, _ = gelu(tile_product((q_smem, w1), (p, g1)) + b)
        write((g1, rate * G1))
        W1_smem[s] = read(W1_smem.at[s]) - tile_product((transposed(k_smem), g1))
        W2_smem[s] = read(W2_smem.at[s]) - tile_product((transposed(x2), rated))
        b1_smem[s] = by_column(b1_smem.at[s]) - column_sum(rate * G1)
        write((g1, activation))
        return scores + tile_product((g1, transposed(x2))), z + tile_product((g1, w2))

    def step(m, _):
        weight, bias = (lambda i=i: down(by_column(constants.at[i])) for i in (2, 3))
        eta = lambda: across(by_row(constants.at[0])) * down(by_column(gates.at[0]))  # noqa: E731
        zero = lambda: plgpu.layout_cast(jnp.zeros(TILE, jnp.float32), plgpu.Layout.WGMMA)  # noqa: E731
        plgpu.barrier_wait(loaded)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if group:

            @pl.when(lax.rem(m, group) == 0)
            def _():
                save([ref.at[lax.div(m, group), head] for ref in borders])

        b = by_column(b2_smem.at[0])
        x, scale = standardise(lax.fori_loop(0, SLICES, reconstruct, zero()) + down(b))
        G2 = centre((weight() * x + bias() - (read(v_smem) - read(k_smem))) * weight(), x) * scale
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
    for source, smem in (
        (shared, constants.at[pl.ds(0, 2)]),
        (norm.at[head], constants.at[pl.ds(2, 2)]),
        *state(*(ref.at[head] for ref in (W1, b1, W2, b2))),
    ):
        plgpu.copy_gmem_to_smem(source, smem, once)
    plgpu.barrier_wait(once)
    lax.fori_loop(0, n, step, None)
    save([ref.at[head] for ref in ends])
    plgpu.wait_smem_to_gmem(0)


def mlp_forward(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, *, mini_batch, group=None, save=True):
    """TTT-MLP: as `linear_forward` for params of (W1 `[N, 64, 256]`, b1, W2 `[N, 256, 64]`, b2).

    `group` may be any number, None for `xla.GROUP`; the states are returned as `xla.ttt_backward` takes them.
    """
    n, group = q.shape[1] // mini_batch, (group or xla.GROUP) if save else 0
    borders = [float32(-(-n // group), *x.shape) for x in params] if save else []
    call = plgpu.kernel(
        partial(forward_kernel, n, mini_batch, group),
        kernel_name="ttt_mlp_forward",
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype), *(float32(*x.shape) for x in params), *borders],
        scratch_types=[
            tiles(q.dtype, 3),
            vectors(1),
            tiles(jnp.float32, SLICES),
            vectors(SLICES),
            tiles(jnp.float32, SLICES),
            vectors(1),
            tiles(q.dtype, 7),
            vectors(4),
            plgpu.Barrier(num_arrivals=4),
            plgpu.Barrier(num_arrivals=3 + 3 * SLICES),
        ],
        grid=(q.shape[0],),
        grid_names=("head",),
    )
    out, *rest = call(*inputs(q, k, v, eta_pos, gate, params, ln_weight, ln_bias))
    final = tuple(x.astype(p.dtype) for x, p in zip(rest[:4], params, strict=True))
    if not save:
        return out, final, None
    cuts = (slice(0, n // group), slice(n // group, None))  # whole groups, then a shorter one
    pieces = [tuple(x[cut].astype(p.dtype) for x, p in zip(rest[4:], params, strict=True)) for cut in cuts]
    return out, final, [piece for piece in pieces if piece[0].size]


def mlp_backward(
    q, k, v, eta_pos, gate, params, ln_weight, ln_bias, borders, d_out, d_final, *, mini_batch, group=None
):
    """Cotangents of the eight inputs by `xla.ttt_backward`, in float32."""
    tokens, d_out = [x.astype(jnp.float32) for x in (q, k, v)], d_out.astype(jnp.float32)
    args = (*tokens, eta_pos, gate, params, ln_weight, ln_bias, borders, d_out, d_final)
    *d_tokens, d_eta_pos, d_gate, d_params, d_weight, d_bias = xla.ttt_backward(
        *args, mini_batch=mini_batch, group=group or xla.GROUP
    )
    d_tokens = (x.astype(y.dtype) for x, y in zip(d_tokens, (q, k, v), strict=True))
    return *d_tokens, d_eta_pos, d_gate, d_params, d_weight, d_bias
