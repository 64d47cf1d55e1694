"""LaCT's chunk operators for Hopper GPUs (Mosaic GPU): one kernel of gated products, and the library's GEMMs.

Every part of the SwiGLU fast network (arXiv 2505.23884, section 3) that has a gate is a set of products `[C, d] x
[d, h]` that share their token tile and meet elementwise. `gated_products` is that kernel; its epilogue is all that
differs between the forward pass, the inner gradients and the backward pass of the inner gradients. What remains has no
gate (reductions over tokens, products back to width d): plain GEMMs, left to XLA and its library. Fusing them too would
need an accumulator `[128, d]` or `[h, d]` in float32 beside the tiles, more than the registers and shared memory of an
SM hold at d = h = 512; the gated arrays in between, `[C, h]` of a chunk in 16 bits, are a few MB and fit the L2 cache.

Rows are tokens: y0 = x w0^T, y2 = x w2^T, and the network is (silu(y0) * y2) w1^T.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rollax.kernels.mosaic_gpu import matrix, sigmoid, transposed

ROWS = 64  # tokens of a warpgroup: the height of a wgmma
WARPGROUPS = 2
TILE = ROWS * WARPGROUPS  # tokens of a program
STEP = 64  # through the contracted axis: 16-bit numbers in a swizzle of 128 bytes
SLOTS = 3  # steps whose operands are in shared memory or on their way
ACCUMULATORS = 256  # columns of all products together: 128 of a thread's 255 registers


def hidden_layer(y0, y2):
    """silu(y0) * y2, as (outputs, what to sum by row)."""
    return (y0 * sigmoid(y0) * y2,), ()


def hidden_gradients(y0, y2, dh):
    """For the cotangent dh of the hidden layer: cotangent of y0, hidden layer, cotangent of y2."""
    sig = sigmoid(y0)
    silu, slope = y0 * sig, sig * (1 + y0 * (1 - sig))
    return (dh * y2 * slope, silu * y2, dh * silu), ()


def weighted_gradients(y0, y2, dh, *lr):
    """`hidden_gradients` times a rate each: what the inner gradients sum over tokens."""
    return tuple(x * rate for x, rate in zip(hidden_gradients(y0, y2, dh)[0], lr, strict=True)), ()


def second_gradients(y0, y2, dh, a0, a1, a2, lr0, lr1, lr2):
    """Backward of `weighted_gradients`; a0 = k A0^T, a1 = v A1, a2 = k A2^T for the cotangents A of the gradients.

    Returns ((cotangents of y0, y2, dh, the three weighted gradients), whose row sums are the cotangents of lr).
    """
    sig = sigmoid(y0)
    silu, slope = y0 * sig, sig * (1 + y0 * (1 - sig))
    curve = sig * (1 - sig) * (2 + y0 * (1 - 2 * sig))
    e0, e1, e2 = a0 * lr0, a1 * lr1, a2 * lr2
    u0, u1, u2 = dh * y2 * slope, silu * y2, dh * silu
    d_y0 = e0 * dh * y2 * curve + (e2 * dh + e1 * y2) * slope
    d_y2 = e0 * dh * slope + e1 * silu
    d_dh = e0 * y2 * slope + e2 * silu
    return (d_y0, d_y2, d_dh, u0 * lr0, u1 * lr1, u2 * lr2), (a0 * u0, a1 * u1, a2 * u2)


def gated_products(epilogue, pairs, a, b, rates=None, *, outputs, sums=0):
    """epilogue(a_i b_j^T for (i, j) in pairs, *rates): products that meet in an elementwise gate.

    A program owns 128 tokens and up to 128 hidden units; its two warpgroups take 64 tokens each and share the operands,
    which warpgroup 0 fetches `SLOTS` steps ahead.

    Args:
      epilogue: float32 matrices of one shape, one for each product and each rate, to (matrices, matrices to be summed
        along their rows).
      pairs: (index into a, index into b) of every product.
      a: matrices `[N, C, d]`, C a multiple of 128 and d of 64, float16 or bfloat16.
      b: matrices `[N, h, d]` of the same dtype, h a multiple of 64.
      rates: float32 `[N, R, C]`: R numbers for each token; None for none.
      outputs, sums: how many matrices the epilogue returns of either kind.
    Returns:
      tuple: the matrices `[N, C, h]` in a's dtype, then the row sums, float32 `[N, C]`.
    """
    (N, C, _), h, dtype, steps = a[0].shape, b[0].shape[1], a[0].dtype, a[0].shape[2] // STEP
    width = next(x for x in (128, 64, 32) if h % x == 0 and x * len(pairs) <= ACCUMULATORS)
    slots, R = min(SLOTS, steps), 0 if rates is None else rates.shape[1]

    def kernel(*refs):
        refs = iter(refs)
        take = lambda count: [next(refs) for _ in range(count)]  # noqa: E731
        a_gmem, b_gmem, rates_gmem, out_gmem, sums_gmem = (take(x) for x in (len(a), len(b), R > 0, outputs, sums > 0))
        a_smem, b_smem, out_smem, loaded, used = take(5)
        rates_smem, rates_loaded = take(2) if R else (None, None)
        sums_smem = take(sums > 0)
        n, i, j, warpgroup = (lax.axis_index(x) for x in ("head", "tokens", "hidden", "warpgroup"))
        tokens, units, own = pl.ds(i * TILE, TILE), pl.ds(j * width, width), pl.ds(warpgroup * ROWS, ROWS)

        def load(step):
            slot, columns = step % slots, pl.ds(step * STEP, STEP)
            for m, ref in enumerate(a_gmem):
                plgpu.copy_gmem_to_smem(ref.at[n, tokens, columns], a_smem.at[slot, m], loaded.at[slot])
            for m, ref in enumerate(b_gmem):
                plgpu.copy_gmem_to_smem(ref.at[n, units, columns], b_smem.at[slot, m], loaded.at[slot])

        @pl.when(warpgroup == 0)
        def _():
            for step in range(slots):
                load(step)
            for m in range(R):
                plgpu.copy_gmem_to_smem(rates_gmem[0].at[n, m, tokens], rates_smem.at[m], rates_loaded)

        def products(*accumulators):
            for step in range(steps):
                slot = step % slots
                plgpu.barrier_wait(loaded.at[slot])
                for (x, y), accumulator in zip(pairs, accumulators, strict=True):
                    plgpu.wgmma(accumulator, a_smem.at[slot, x, own], transposed(b_smem.at[slot, y]))
                if 0 < step <= steps - slots:  # refill the slot of the step before, while this one's products run
                    plgpu.wgmma_wait(len(pairs))
                    plgpu.barrier_arrive(used.at[(step - 1) % slots])

                    @pl.when(warpgroup == 0)
                    def _(step=step):
                        plgpu.barrier_wait(used.at[(step - 1) % slots])
                        load(step - 1 + slots)

            return [x[...] for x in accumulators]

        results = pl.run_scoped(products, *[plgpu.ACC((ROWS, width), jnp.float32) for _ in pairs])
        if R:
            plgpu.barrier_wait(rates_loaded)
        for m in range(R):
            rate = plgpu.layout_cast(rates_smem[m, own], plgpu.Layout.WGMMA.reduce(1))
            results.append(lax.broadcast_in_dim(rate, (ROWS, width), (0,)))
        matrices, summed = epilogue(*results)
        for m, x in enumerate(matrices):
            out_smem[m, own] = x.astype(dtype)
        for m, x in enumerate(summed):
            sums_smem[0][m, own] = jnp.sum(x, axis=1)
        plgpu.commit_smem()
        mine = pl.ds(i * TILE + warpgroup * ROWS, ROWS)
        for m, ref in enumerate(out_gmem):
            plgpu.copy_smem_to_gmem(out_smem.at[m, own], ref.at[n, mine, units])
        for m in range(sums):
            plgpu.copy_smem_to_gmem(sums_smem[0].at[m, own], sums_gmem[0].at[m, n, j, mine])
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        matrix(dtype, slots, len(a), TILE, STEP),
        matrix(dtype, slots, len(b), width, STEP),
        matrix(dtype, outputs, TILE, width),
        plgpu.Barrier(num_arrivals=len(a) + len(b), num_barriers=slots),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
    ]
    out_type = [jax.ShapeDtypeStruct((N, C, h), dtype)] * outputs
    if R:
        scratch += [plgpu.SMEM((R, TILE), jnp.float32), plgpu.Barrier(num_arrivals=R)]
    if sums:
        scratch += [plgpu.SMEM((sums, TILE), jnp.float32)]
        out_type += [jax.ShapeDtypeStruct((sums, N, h // width, C), jnp.float32)]
    call = plgpu.kernel(
        kernel,
        kernel_name=f"lact_{epilogue.__name__}",
        out_type=out_type,
        scratch_types=scratch,
        grid=(N, C // TILE, h // width),
        grid_names=("head", "tokens", "hidden"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    out = call(*a, *b, *([] if rates is None else [rates]))
    return (*out[:outputs], *(out[outputs].sum(2) if sums else ()))


def product(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def padded(x):
    """`[N, C, ...]` with zero tokens up to a multiple of the tile: they pass every formula here as zeros."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE)] + [(0, 0)] * (x.ndim - 2))


def cast(dtype, *arrays):
    return [x.astype(dtype) for x in arrays]


def lact_apply(w0, w1, w2, q):
    """See `reference.lact_apply`; q float16 or bfloat16 `[N, C, d]`, weights of any float dtype."""
    w0, w1, w2 = cast(q.dtype, w0, w1, w2)
    (hidden,) = gated_products(hidden_layer, ((0, 0), (0, 1)), [padded(q)], [w0, w2], outputs=1)
    return product("nch,ndh->ncd", hidden, w1)[:, : q.shape[1]].astype(q.dtype)


def three_products(epilogue, w0, w1, w2, k, v, rates=None):
    """The gate's inputs k w0^T, k w2^T, v w1, and the products that they become."""
    return gated_products(epilogue, ((0, 0), (0, 1), (1, 2)), [k, v], [w0, w2, w1.mT], rates, outputs=3)


def token_sums(u0, u1, u2, k, v):
    """(u0^T k, v^T u1, u2^T k), float32, shaped as w0, w1, w2."""
    return product("nch,ncd->nhd", u0, k), product("ncd,nch->ndh", v, u1), product("nch,ncd->nhd", u2, k)


def lact_apply_backward(w0, w1, w2, q, d_out):
    """Cotangents of (w0, w1, w2, q), those of the weights in float32: the same kernel as the inner gradients."""
    tokens, dtype = q.shape[1], q.dtype
    w0, w1, w2 = cast(dtype, w0, w1, w2)
    q, d_out = padded(q), padded(d_out.astype(dtype))
    d_y0, hidden, d_y2 = three_products(hidden_gradients, w0, w1, w2, q, d_out)
    d_q = product("nch,nhd->ncd", d_y0, w0) + product("nch,nhd->ncd", d_y2, w2)
    return *token_sums(d_y0, hidden, d_y2, q, d_out), d_q[:, :tokens].astype(dtype)


def by_row(lr):
    """Rates `[N, C, 3]` as the kernel reads them: float32 `[N, 3, C]`."""
    return padded(lr.astype(jnp.float32)).mT


def lact_grads(w0, w1, w2, k, v, lr):
    """See `reference.lact_grads`; k, v float16 or bfloat16. Returns float32."""
    w0, w1, w2, v = cast(k.dtype, w0, w1, w2, v)
    k, v = padded(k), padded(v)
    weighted = three_products(weighted_gradients, w0, w1, w2, k, v, by_row(lr))
    return token_sums(*weighted, k, v)


def lact_grads_backward(w0, w1, w2, k, v, lr, a0, a1, a2):
    """Cotangents of (w0, w1, w2, k, v, lr) from those of the three gradients, weights' in float32."""
    tokens, dtypes, rates = k.shape[1], (k.dtype, v.dtype), by_row(lr)
    w0, w1, w2, v, a0, a1, a2 = cast(k.dtype, w0, w1, w2, v, a0, a1, a2)
    k, v = padded(k), padded(v)
    pairs = ((0, 0), (0, 1), (1, 2), (0, 3), (1, 4), (0, 5))
    b = [w0, w2, w1.mT, a0, a1.mT, a2]
    out = gated_products(second_gradients, pairs, [k, v], b, rates, outputs=6, sums=3)
    d_y0, d_y2, d_dh, u0, u1, u2, *d_lr = out
    back = lambda x, w: product("nch,nhd->ncd", x, w)  # noqa: E731
    d_k = back(u0, a0) + back(u2, a2) + back(d_y0, w0) + back(d_y2, w2)
    d_v = back(u1, a1.mT) + back(d_dh, w1.mT)
    d_weights = token_sums(d_y0, d_dh, d_y2, k, v)
    d_tokens = [x[:, :tokens].astype(dtype) for x, dtype in zip((d_k, d_v), dtypes, strict=True)]
    return *d_weights, *d_tokens, jnp.stack(d_lr, -1)[:, :tokens].astype(lr.dtype)
