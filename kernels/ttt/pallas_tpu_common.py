"""What the Pallas TPU kernels of test-time training share: matrix products with a rule for `jax.vjp`, sizes in VMEM."""

import math
from functools import partial

import jax
import jax.numpy as jnp

LANES = 128
BUDGET = 14 * 2**20  # bytes of VMEM that a kernel may plan with: v4 has 16 MiB in all, v5 grants a kernel as much
NN, NT, TN = (1, 0), (1, 1), (0, 0)  # which of the last two axes of (left, right) are summed over


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(a, b, axes, dtype):
    """Product of matrices `[..., m, n]` (batched if they have three axes) over `axes`, operands in dtype, float32 sum.

    The backward products round their operands in the same way, hence the custom rule.
    """
    batch = a.ndim - 2
    numbers = (((axes[0] + batch,), (axes[1] + batch,)), (tuple(range(batch)),) * 2)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), numbers, precision=precision, preferred_element_type=jnp.float32
    )


def dot_forward(a, b, axes, dtype):
    return dot(a, b, axes, dtype), (a, b)


def dot_backward(axes, dtype, saved, d_out):
    a, b = saved
    left, right = axes
    d_a = dot(d_out, b, (1, 1 - right), dtype) if left == 1 else dot(b, d_out, (1 - right, 1), dtype)
    d_b = dot(a, d_out, (1 - left, 0), dtype) if right == 0 else dot(d_out, a, (0, 1 - left), dtype)
    return d_a, d_b


dot.defvjp(dot_forward, dot_backward)


def shape_like(shape, dtype, array):
    """The type of an output that varies over the mesh axes that the array varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def padded(n, multiple):
    return -(-n // multiple) * multiple


def matrix_bytes(*shape):
    """Bytes of a float32 array in VMEM: the last two axes come in tiles of 8 x 128."""
    return 4 * math.prod(shape[:-2]) * padded(shape[-2], 8) * padded(shape[-1], LANES)
