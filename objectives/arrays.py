"""What every objective needs of arrays: precision, masks that stop NaN, leading-axis broadcasting, checks."""

import jax
import jax.numpy as jnp
import numpy as np


def accurate(x):
    """At least float32 (a sum over half-precision numbers loses them); integers and bools in the default float."""
    x = jnp.asarray(x)
    return x.astype(
        jnp.promote_types(x.dtype, jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float))
    )


def promoted(*arrays):
    """Arrays in their common type, float32 at least."""
    arrays = [jnp.asarray(x) for x in arrays]
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(x.astype(dtype) for x in arrays)


def masked(x, mask):
    """`x * mask`, zero where the mask is, whatever `x` is there (NaN included)."""
    mask = jnp.asarray(mask)
    x = accurate(x)
    return jnp.where(mask != 0, x, 0.0) * mask.astype(x.dtype)


def ratio_or_zero(total, count):
    """`total / count`, 0 with a zero gradient where nothing was counted."""
    counted = count > 0
    return jnp.where(counted, total / jnp.where(counted, count, 1), 0.0)


def per_token(x, like, name="advantage"):
    """`x` with trailing axes of length one, so that its leading axes meet those of `like`: `[B]` serves `[B, T]`.

    Raises:
      ValueError: the shapes do not broadcast that way.
    """
    x, shape = jnp.asarray(x), jnp.shape(like)
    fits = x.ndim <= len(shape) and all(a in (1, b) for a, b in zip(x.shape, shape, strict=False))
    if not fits:
        raise ValueError(f"{name} must broadcast along the leading axes of {shape}, got {x.shape}")
    return x.reshape(x.shape + (1,) * (len(shape) - x.ndim))


def check_same_shape(**arrays):
    """All of one shape, or a ValueError that names them."""
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"{', '.join(shapes)} must have one shape, got {list(shapes.values())}")


def concrete(x):
    """`x` as a NumPy array where its numbers are known and at hand, else None (traced, or partly on other hosts)."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def check_log_prob(name, log_prob):
    """A log-probability above zero (beyond rounding) is a sign mistake or an unnormalised logit."""
    known = concrete(log_prob)
    if known is not None and known.size and known.max() > 1e-6:
        raise ValueError(f"{name} must be log-probabilities (<= 0), got a maximum of {known.max()}")
