"""Newton-Schulz orthogonalisation for Hopper GPUs (Mosaic GPU; the step of Muon in LaCT, arXiv 2505.23884).

Small matrices: `pallas_mgpu_newton_schulz_small`, all steps in one kernel. At LaCT's width of 512 a matrix and its Gram
matrix are 1 MiB, more than an SM holds. There a step X <- a X + (b A + c A A) X with A = X X^T is three kernels, its
gradient five: sums of products, scaled, plus a scaled matrix (`combine`), operands in 16 bits, sums in float32. A
program owns a tile `[128, 128]` of the result; the matrices in between stay in the L2 cache. Of a symmetric result, as
all Gram matrices and their cotangents are, only the lower tiles are computed; each is written twice, the second time
transposed. At 512 that is 10 tiles instead of 16, 120 for 12 matrices, which an H100's 132 SMs take in one wave.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rollax.kernels.backends import alike, hopper_refusal
from rollax.kernels.mosaic_gpu import matrix, transposed
from rollax.kernels.ttt import pallas_mgpu_newton_schulz_small as small
from rollax.kernels.ttt.newton_schulz import iterates, normalise, pull_back, through_norm

ROWS = 64  # of a warpgroup: the height of a wgmma
WARPGROUPS = 2
TILE = ROWS * WARPGROUPS
STEP = 64  # through the contracted axis: 16-bit numbers in a swizzle of 128 bytes
SLOTS = 4  # pairs of operands in shared memory or on their way


def combine(terms, scales, start=None, *, turned, symmetric=False):
    """scales[0] start + scales[1] (sum of a b over terms), products and sum in float32.

    Args:
      terms: pairs (a, b) of 16-bit matrices, a `[M, r, K]`, b `[M, K, c]`; r a multiple of 128, c and K of 64.
      scales: float32 `[2]`, may be traced.
      start: `[M, r, c]` of their dtype; None for none.
      turned: b is given transposed, `[M, c, K]`.
      symmetric: the result is its own transpose.
    Returns:
      `[M, r, c]` in the dtype of the terms.
    """
    (M, rows, K), dtype = terms[0][0].shape, terms[0][0].dtype
    columns = terms[0][1].shape[1 if turned else 2]
    width, steps = TILE if columns % TILE == 0 else ROWS, K // STEP
    slots = min(SLOTS // len(terms), steps)
    places = [(i, j) for i in range(rows // TILE) for j in range(columns // width) if j <= i or not symmetric]

    def kernel(*refs):
        refs = iter(refs)
        take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
        (place, scale), a_gmem, b_gmem = take(2), take(len(terms)), take(len(terms))
        start_gmem, (out_gmem,) = take(start is not None), take(1)
        a_smem, b_smem, out_smem, loaded, used, once = take(6)
        mirror_smem = take(symmetric)
        n, at, warpgroup = (lax.axis_index(x) for x in ("matrix", "tile", "warpgroup"))
        i, j, own = place[at, 0], place[at, 1], pl.ds(warpgroup * ROWS, ROWS)
        across, down = pl.ds(i * TILE, TILE), pl.ds(j * width, width)

        def load(step):
            slot, inner = lax.rem(step, slots), pl.ds(step * STEP, STEP)
            for m, (a, b) in enumerate(zip(a_gmem, b_gmem, strict=True)):
                plgpu.copy_gmem_to_smem(a.at[n, across, inner], a_smem.at[slot, m], loaded.at[slot])
                b = b.at[n, down, inner] if turned else b.at[n, inner, down]
                plgpu.copy_gmem_to_smem(b, b_smem.at[slot, m], loaded.at[slot])

        @pl.when(warpgroup == 0)
        def _():
            for step in range(slots):
                load(jnp.int32(step))
            for ref in start_gmem:
                plgpu.copy_gmem_to_smem(ref.at[n, across, down], out_smem, once)

        def products(accumulator):
            def body(step, _):
                slot = lax.rem(step, slots)
                plgpu.barrier_wait(loaded.at[slot])
                for m in range(len(terms)):
                    b = b_smem.at[slot, m]
                    plgpu.wgmma(accumulator, a_smem.at[slot, m, own], transposed(b) if turned else b)
                plgpu.wgmma_wait(len(terms))

                @pl.when((step > 0) & (step <= steps - slots))
                def _():  # refill the slot of the step before, while this one's products run
                    before = lax.rem(step - 1, slots)
                    plgpu.barrier_arrive(used.at[before])

                    @pl.when(warpgroup == 0)
                    def _():
                        plgpu.barrier_wait(used.at[before])
                        load(step - 1 + slots)

            lax.fori_loop(0, steps, body, None)
            return accumulator[...]

        out = scale[1] * pl.run_scoped(products, plgpu.ACC((ROWS, width), jnp.float32))
        if start_gmem:
            plgpu.barrier_wait(once)
            out = out + scale[0] * plgpu.layout_cast(out_smem[own], plgpu.Layout.WGMMA).astype(jnp.float32)
        out = out.astype(dtype)
        out_smem[own] = out
        for mirror in mirror_smem:
            transposed(mirror.at[warpgroup])[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        mine = pl.ds(i * TILE + warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(out_smem.at[own], out_gmem.at[n, mine, down])
        for mirror in mirror_smem:

            @pl.when(i != j)
            def _(mirror=mirror):
                plgpu.copy_smem_to_gmem(mirror.at[warpgroup], out_gmem.at[n, down, mine])

        plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        kernel_name="newton_schulz_products",
        out_type=jax.ShapeDtypeStruct((M, rows, columns), dtype),
        scratch_types=[
            matrix(dtype, slots, len(terms), TILE, STEP),
            matrix(dtype, slots, len(terms), *((width, STEP) if turned else (STEP, width))),
            matrix(dtype, TILE, width),
            plgpu.Barrier(num_arrivals=2 * len(terms), num_barriers=slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
            plgpu.Barrier(num_arrivals=1),
            *([matrix(dtype, WARPGROUPS, width, ROWS)] if symmetric else []),
        ],
        grid=(M, len(places)),
        grid_names=("matrix", "tile"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
    )
    a, b = zip(*terms, strict=True)
    out = call(jnp.asarray(np.array(places, np.int32)), scales, *a, *b, *([] if start is None else [start]))
    return alike(terms[0][0], out)[1]


def polynomial(x, b, c):
    """A = x x^T and b A + c A A."""
    A = combine([(x, x)], jnp.ones(2), turned=True, symmetric=True)
    return A, combine([(A, A)], jnp.stack([b, c]), A, turned=True, symmetric=True)


def step(x, triple):
    """a x + (b A + c A A) x."""
    a, b, c = triple
    _, B = polynomial(x, b, c)
    return combine([(B, x)], jnp.stack([a, jnp.ones_like(a)]), x, turned=False)


def step_back(d, x, triple):
    """Cotangent of x from d, that of the step's result.

    With dB = d x^T, dA = b dB + c (dB A + A dB) and A symmetric, dA + dA^T follows from S = dB + dB^T.
    """
    a, b, c = triple
    A, B = polynomial(x, b, c)
    S = combine([(d, x), (x, d)], jnp.ones(2), turned=True, symmetric=True)
    S = combine([(S, A), (A, S)], jnp.stack([b, c]), S, turned=True, symmetric=True)
    return combine([(B, d), (S, x)], jnp.stack([a, jnp.ones_like(a)]), d, turned=False)


def newton_schulz_refusal(g, coeffs, dtype=None):
    """Why the kernels cannot take g `[..., m, n]` with an iteration in `dtype` (None: g's), None if they can."""
    if reason := hopper_refusal():
        return reason
    if (dtype := jnp.dtype(dtype or g.dtype)) not in (jnp.float16, jnp.bfloat16):
        return f"the iteration must be in float16 or bfloat16, got {dtype}"
    if g.size == 0:
        return "there are no numbers"
    return None


def on_chip(g, holds):
    """Whether `small` takes matrices `[M, m, n]`."""
    m, n = (x - x % -STEP for x in sorted(g.shape[1:]))
    return small.fits(m, n, holds)


def laid_out(x, rows):
    """`[M, m, n]` in float32, the shorter side first, with zeros up to the tiles: they stay zeros in every step."""
    x = (x.mT if x.shape[1] > x.shape[2] else x).astype(jnp.float32)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % rows), (0, -x.shape[2] % STEP)))


def as_given(x, like):
    """The inverse of `laid_out`."""
    m, n = sorted(like.shape[1:])
    x = x[:, :m, :n].astype(like.dtype)
    return x.mT if like.shape[1] > like.shape[2] else x


def newton_schulz(g, *, coeffs, eps=1e-7, dtype=None):
    """X_0 = g / (|g|_F + eps), X <- a X + (b A + c A A) X with A = X X^T for each triple: g `[M, m, n]`, the same out.

    dtype: of the iterates, float16 or bfloat16; None for g's.
    """
    few = on_chip(g, small.FORWARD)
    x, _ = normalise(laid_out(g, ROWS if few else TILE), eps, dtype or g.dtype)
    return as_given(small.forward(x, coeffs)[0] if few else iterates(x, coeffs, step)[0], g)


def newton_schulz_backward(g, d_out, *, coeffs, eps=1e-7, dtype=None):
    """Cotangent of g."""
    few = on_chip(g, small.BACKWARD)
    wide, d = (laid_out(x, ROWS if few else TILE) for x in (g, d_out))
    x, norm = normalise(wide, eps, dtype or g.dtype)
    d = small.backward(x, d, coeffs) if few else pull_back(x, d, coeffs, step, step_back)
    return as_given(through_norm(wide, d, norm, eps), g)
