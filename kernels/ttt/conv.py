"""Depthwise 3x3x3 convolution over time, height and width of video tokens (Spatial-TTT, arXiv 2603.12255)."""

import jax.numpy as jnp


def depthwise_conv3d(x, kernel, *, pad="edge", temporal="centered", halo=None):
    """Each channel filtered by its own 3x3x3 kernel, stride 1, no bias; the shape stays.

    There is one form and no `implementation`: the sum over taps is the definition, and runs everywhere.

    Args:
      x: `[B, T, h, w, C]`.
      kernel: `[3, 3, 3, C]`, taps over time, height, width (cross-correlation, as in every library). The identity has
        a 1 at `[1, 1, 1]` if centered, at `[2, 1, 1]` if causal.
      pad: "edge" repeats the border, "zero" does not.
      temporal: "centered" reads frames t-1, t, t+1; "causal" reads t-2, t-1, t.
      halo: (frames before, frames after) in place of padding in time, as a stream cut into pieces needs: `[B, 1, ...]`
        each if centered, `([B, 2, ...], None)` if causal. None for either pads there.
    Returns:
      `[B, T, h, w, C]` in the wider type of x and kernel, summed in float32 at least; T may be 0.
    Raises:
      ValueError: shapes that do not fit, an unknown option.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if x.ndim != 5:
        raise ValueError(f"x must be [B, T, h, w, C], got {x.shape}")
    if kernel.shape != (3, 3, 3, x.shape[-1]):
        raise ValueError(f"kernel must be [3, 3, 3, {x.shape[-1]}], got {kernel.shape}")
    if pad not in ("edge", "zero"):
        raise ValueError(f'pad must be "edge" or "zero", got {pad!r}')
    if temporal not in ("centered", "causal"):
        raise ValueError(f'temporal must be "centered" or "causal", got {temporal!r}')
    B, T, h, w, C = x.shape
    dtype = jnp.result_type(x, kernel)
    mode = "edge" if pad == "edge" else "constant"
    frames = (1, 1) if temporal == "centered" else (2, 0)
    halo = (None, None) if halo is None else tuple(halo)
    for name, piece, count in zip(("before", "after"), halo, frames, strict=True):
        if piece is not None and jnp.shape(piece) != (B, count, h, w, C):
            raise ValueError(f"halo {name} must be [{B}, {count}, {h}, {w}, {C}], got {jnp.shape(piece)}")
    if x.size == 0:
        return x.astype(dtype)
    missing = [count if piece is None else 0 for piece, count in zip(halo, frames, strict=True)]
    x = jnp.concatenate([p if p is not None else x[:, :0] for p in (halo[0], x, halo[1])], 1)
    x = jnp.pad(x, ((0, 0), tuple(missing), (1, 1), (1, 1), (0, 0)), mode)
    # Twenty-seven shifted products: one fused loop on every backend, where grouped convolutions are slow on CPUs.
    x, kernel = (a.astype(jnp.promote_types(dtype, jnp.float32)) for a in (x, kernel))
    taps = [(t, i, j) for t in range(3) for i in range(3) for j in range(3)]
    return sum(x[:, t : t + T, i : i + h, j : j + w] * kernel[t, i, j] for t, i, j in taps).astype(dtype)
