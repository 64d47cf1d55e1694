"""Newton-Schulz orthogonalisation, the step of Muon: singular values go to about 1, singular vectors stay."""

from functools import partial

import jax
import jax.numpy as jnp

from rollax.kernels.backends import asking, backend, choose, named

MUON5 = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)  # a schedule: singular values end in about [0.98, 1.11] (LaCT language models, arXiv 2505.23884)
FIXED5 = ((3.4445, -4.7750, 2.0315),) * 5  # the same triple five times: about [0.68, 1.15] (LaCT novel views)


def newton_schulz(g, *, coeffs=MUON5, eps=1e-7, dtype=None, implementation=None, impl=None, explain=False):
    """X_0 = g / (|g|_F + eps); X <- a X + (b A + c A A) X with A = X X^T, once for each (a, b, c) of `coeffs`.

    Maps matrices whose norm is well above `eps` to unit scale, and zero to zero. The gradient is exact and finite at
    zero. The norm is formed in float32 at least, and its powers must be finite: |g|_F up to 1.8e19, for gradients 7e12.

    Args:
      g: `[..., m, n]`, floating point, any leading axes.
      coeffs: triples, static: `MUON5`, `FIXED5`, or others.
      eps: at least 0, static; with 0 a zero matrix becomes NaN.
      dtype: of the iteration, such as "bfloat16" (what the authors run, and what Hopper's kernel takes); None for that
        of g. Products of float32 are in "xla" at `jax.default_matmul_precision`: by default TF32 on a GPU, which is
        finer than bfloat16, and bfloat16 on a TPU.
      implementation: see `rollax.kernels.backends`, "reference" is "xla"; `impl` is the same.
      explain: print which and why.
    Returns:
      `[..., m, n]` in g's dtype.
    Raises:
      ValueError: g is no matrix, coefficients that are no triples, an eps that is traced or negative, a g or dtype
        that is not floating point.
    """
    g = jnp.asarray(g)
    coeffs = tuple(tuple(float(x) for x in triple) for triple in coeffs)
    if g.ndim < 2:
        raise ValueError(f"g must be [..., m, n], got {g.shape}")
    if not coeffs or any(len(triple) != 3 for triple in coeffs):
        raise ValueError(f"coeffs must be triples (a, b, c), got {coeffs}")
    if isinstance(eps, jax.core.Tracer) or not float(eps) >= 0:
        raise ValueError(f"eps must be at least 0 and static, got {eps}")
    for name, kind in (("g", g.dtype), ("dtype", jnp.dtype(dtype or g.dtype))):
        if not jnp.issubdtype(kind, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {kind}")
    dtype = None if dtype is None else jnp.dtype(dtype).name
    implementation = named(implementation, impl)
    ask = asking(implementation, lambda kernels: kernels.newton_schulz_refusal(g, coeffs, dtype))
    chosen = choose("newton_schulz", __package__, implementation, ask, explain=explain)
    return iterate(g.reshape(-1, *g.shape[-2:]), chosen, coeffs, eps, dtype).reshape(g.shape)


def newton_schulz_beside(chosen, g, coeffs, dtype, explain=False):
    """The implementation for g (an array or shape) beside other operators that run in the one chosen.

    It is "xla" where the kernel of that one refuses; `explain` prints which and why.
    """
    reason = "as the other operators"
    if chosen not in ("reference", "xla"):
        kernels, _ = backend(__package__, chosen)
        if refused := kernels.newton_schulz_refusal(g, coeffs, dtype):
            chosen, reason = "xla", refused
    if explain:
        print(f"newton_schulz: {chosen} ({reason})")
    return chosen


def polynomial(x, b, c):
    """A = x x^T and b A + c A A."""
    A = x @ x.mT
    return A, (b * A + c * (A @ A)).astype(x.dtype)


def step(x, triple):
    """a x + (b A + c A A) x."""
    a, b, c = triple
    _, B = polynomial(x, b, c)
    return (a * x + B @ x).astype(x.dtype)


def step_back(d, x, triple):
    """Cotangent of x from d, that of the step's result."""
    a, b, c = triple
    A, B = polynomial(x, b, c)
    dB = d @ x.mT
    dA = b * dB + c * (dB @ A + A @ dB)
    return (a * d + B @ d + (dA + dA.mT).astype(x.dtype) @ x).astype(x.dtype)


def normalise(g, eps, dtype):
    """(g / (|g|_F + eps) in `dtype` (None: g's), the norm `[..., 1, 1]` in float32 at least)."""
    wide = g.astype(jnp.promote_types(g.dtype, jnp.float32))  # squares of float16 end at 255
    norm = jnp.sqrt(jnp.sum(wide * wide, (-2, -1), keepdims=True))
    return (wide / (norm + eps)).astype(dtype or g.dtype), norm


def through_norm(g, d, norm, eps):
    """Cotangent of g from that of g / (norm + eps)."""
    dtype, g, d = g.dtype, g.astype(norm.dtype), d.astype(norm.dtype)
    along = jnp.sum(g * d, (-2, -1), keepdims=True)
    return (d / (norm + eps) - g * along / (jnp.where(norm > 0, norm, 1) * (norm + eps) ** 2)).astype(dtype)


def iterates(x, coeffs, step=step):
    """(X_n, X_0 ... X_(n-1)) from X_0. A loop, because unrolled it compiles longer."""
    return jax.lax.scan(lambda x, triple: (step(x, triple), x), x, wide_coefficients(coeffs, x.dtype))


def wide_coefficients(coeffs, dtype):
    """In float32 at least: rounded to bfloat16 they would be others, and singular values end elsewhere."""
    return jnp.asarray(coeffs, jnp.promote_types(dtype, jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def iterate(g, chosen, coeffs, eps, dtype):
    """`newton_schulz` of checked g `[M, m, n]`."""
    if chosen in ("reference", "xla"):
        transpose = g.shape[-2] > g.shape[-1]  # A is the smaller of the two Gram matrices
        x, _ = normalise(g.mT if transpose else g, eps, dtype)
        out = iterates(x, coeffs)[0].astype(g.dtype)
        return out.mT if transpose else out
    module, more = backend(__package__, chosen)
    return module.newton_schulz(g, coeffs=coeffs, eps=eps, dtype=dtype, **more)


def forward(g, *how):
    return iterate(g, *how), g


def backward(chosen, coeffs, eps, dtype, g, d):
    if chosen in ("reference", "xla"):
        transpose = g.shape[-2] > g.shape[-1]
        g, d = (g.mT, d.mT) if transpose else (g, d)
        x, norm = normalise(g, eps, dtype)
        d_g = through_norm(g, pull_back(x, d, coeffs), norm, eps)
        return (d_g.mT if transpose else d_g,)
    module, more = backend(__package__, chosen)
    return (module.newton_schulz_backward(g, d, coeffs=coeffs, eps=eps, dtype=dtype, **more),)


iterate.defvjp(forward, backward)


def pull_back(x, d, coeffs, step=step, step_back=step_back):
    """Cotangent of X_0 from that of X_n; all iterates are computed again."""
    _, xs = iterates(x, coeffs, step)
    steps = wide_coefficients(coeffs, x.dtype), xs
    return jax.lax.scan(lambda d, at: (step_back(d, at[1], at[0]), None), d.astype(x.dtype), steps, reverse=True)[0]
