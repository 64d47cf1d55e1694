"""What the Mosaic GPU kernels of several operators share; only they import it, since it imports Pallas."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def matrix(dtype, *shape):
    """Shared memory for matrices (the last two axes), laid out as TMA and wgmma agree on."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = min(128, shape[-1] * itemsize)
    transforms = plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref):
    """A view of a matrix in shared memory; older versions of JAX have a function for it."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def sigmoid(x):
    """1 / (1 + exp(-x)) without the division, which takes a GPU many more instructions than `rsqrt`."""
    root = lax.rsqrt(1 + jnp.exp(-x))
    return root * root
