"""Newton-Schulz orthogonalisation of small matrices on Hopper GPUs (Mosaic GPU): all steps in one kernel.

A program owns a matrix X `[m, n]`, m of 64 or 128, a warpgroup 64 of its rows. X, its Gram matrix A and B = b A + c A A
stay in shared memory in 16 bits from the first step X <- a X + B X to the last; so do, in the gradient, the cotangent D
and the one matrix `[m, m]` more that it needs. Sums are float32. Larger matrices: `pallas_mgpu_newton_schulz`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rollax.kernels.backends import alike
from rollax.kernels.mosaic_gpu import matrix, transposed
from rollax.kernels.ttt.pallas_mgpu_linear import read, tile_product

ROWS = 64  # of a warpgroup, and the columns of a slice
MOST_ROWS = 128
BYTES = 224 * 1024  # of shared memory for the matrices of a program
FORWARD = (1, 2)  # how many of [m, n] and of [m, m] a kernel holds
BACKWARD = (2, 3)


def fits(m, n, holds):
    """Whether a kernel that holds so many takes a matrix `[m, n]`, m and n multiples of 64."""
    return m <= MOST_ROWS and 2 * m * (holds[0] * n + holds[1] * m) <= BYTES


def meeting(m, met):
    """A function that waits for all warpgroups: what they wrote before it is there for products and copies."""

    def meet():
        plgpu.commit_smem()
        if m > ROWS:
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

    return meet


def fetch(source, x, loaded):
    """A matrix from device memory, slice by slice."""

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _():
        for j in range(x.shape[0]):
            plgpu.copy_gmem_to_smem(source.at[:, pl.ds(j * ROWS, ROWS)], x.at[j], loaded)

    plgpu.barrier_wait(loaded)


def send(x, own, target):
    """This warpgroup's rows of a matrix, to device memory."""
    for j in range(x.shape[0]):
        plgpu.copy_smem_to_gmem(x.at[j, own], target.at[own, pl.ds(j * ROWS, ROWS)])


def outer(own, *pairs):
    """This warpgroup's rows of the sum of x y^T over pairs, float32."""
    count, m, _ = pairs[0][0].shape

    def products(accumulator):
        def body(j, _):
            for x, y in pairs:
                plgpu.wgmma(accumulator, x.at[j, own], transposed(y.at[j]))

        lax.fori_loop(0, count, body, None)
        return accumulator[...]

    return pl.run_scoped(products, plgpu.ACC((ROWS, m), jnp.float32))


def polynomial(x, A, B, own, b, c, meet):
    """A = x x^T and B = b A + c A A."""
    m = A.shape[0]
    A[own] = outer(own, (x, x)).astype(A.dtype)
    meet()
    B[own] = (b * read(A.at[own]) + c * tile_product((A.at[own], A), columns=m)).astype(A.dtype)
    meet()


def replace(x, own, meet, new):
    """x[j] = new(j) for every slice, which depends on no other slice of x but on all its rows."""

    def body(j, _):
        value = new(j).astype(x.dtype)
        meet()
        x[j, own] = value

    lax.fori_loop(0, x.shape[0], body, None)
    meet()


def forward_kernel(save, coeffs, start, *refs):
    """A matrix; `save` writes the iterates before every step. Grid: matrices."""
    (*saved, out), (x, A, B, loaded, met) = refs[: 1 + save], refs[1 + save :]
    n, own = lax.axis_index("matrix"), pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)
    meet = meeting(A.shape[0], met)

    def step(i, _):
        a, b, c = (coeffs[i, k] for k in range(3))
        for xs in saved:
            send(x, own, xs.at[n, i])
        polynomial(x, A, B, own, b, c, meet)
        if saved:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        replace(x, own, meet, lambda j: a * read(x.at[j, own]) + tile_product((B.at[own], x.at[j])))

    fetch(start.at[n], x, loaded)
    lax.fori_loop(0, coeffs.shape[0], step, None)
    send(x, own, out.at[n])
    plgpu.wait_smem_to_gmem(0)


def backward_kernel(coeffs, xs, d_out, out, x, d, A, B, S, loaded, met):
    """A cotangent through all steps, the last one first, from the iterates before them. Grid: matrices.

    With dB = d x^T, dA = b dB + c (dB A + A dB) and A symmetric, dA + dA^T follows from S = dB + dB^T.
    """
    n, own = lax.axis_index("matrix"), pl.ds(lax.axis_index("warpgroup") * ROWS, ROWS)
    m, steps = A.shape[0], coeffs.shape[0]
    meet = meeting(m, met)

    def step(t, _):
        i = steps - 1 - t
        a, b, c = (coeffs[i, k] for k in range(3))
        fetch(xs.at[n, i], x, loaded)
        polynomial(x, A, B, own, b, c, meet)
        S[own] = outer(own, (d, x), (x, d)).astype(S.dtype)
        meet()
        value = b * read(S.at[own]) + c * tile_product((S.at[own], A), (A.at[own], S), columns=m)
        meet()
        S[own] = value.astype(S.dtype)
        meet()
        products = lambda j: tile_product((B.at[own], d.at[j]), (S.at[own], x.at[j]))  # noqa: E731
        replace(d, own, meet, lambda j: a * read(d.at[j, own]) + products(j))

    fetch(d_out.at[n], d, loaded)
    meet()  # the barrier is used again at once: no warpgroup may miss its first phase
    lax.fori_loop(0, steps, step, None)
    send(d, own, out.at[n])
    plgpu.wait_smem_to_gmem(0)


def call(kernel, name, coeffs, arrays, outputs, holds):
    """Runs a kernel on 16-bit matrices `[M, ..., m, n]`; holds: how many of `[m, n]` and `[m, m]` it has on chip."""
    (M, *_, m, n), dtype = arrays[0].shape, arrays[0].dtype
    wide, square = holds
    run = plgpu.kernel(
        kernel,
        kernel_name=name,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape in outputs],
        scratch_types=[
            *[matrix(dtype, n // ROWS, m, ROWS)] * wide,
            *[matrix(dtype, m, m)] * square,
            plgpu.Barrier(num_arrivals=n // ROWS),
            plgpu.Barrier(num_arrivals=m // ROWS),
        ],
        grid=(M,),
        grid_names=("matrix",),
        num_threads=m // ROWS,
        thread_name="warpgroup",
    )
    return alike(arrays[0], *run(jnp.array(coeffs, jnp.float32), *arrays))[1:]


def forward(x, coeffs, save=False):
    """[X_n] from X_0 `[M, m, n]`; with `save` after [X_0 ... X_(n-1) `[M, steps, m, n]`]."""
    M, m, n = x.shape
    outputs = [(M, len(coeffs), m, n)] * save + [x.shape]
    return call(partial(forward_kernel, save), "newton_schulz_steps", coeffs, [x], outputs, FORWARD)


def backward(x, d, coeffs):
    """Cotangent of X_0 from d, that of X_n."""
    xs, _ = forward(x, coeffs, save=True)
    name = "newton_schulz_steps_backward"
    return call(backward_kernel, name, coeffs, [xs, d.astype(x.dtype)], [x.shape], BACKWARD)[0]
