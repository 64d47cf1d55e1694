"""The banded form against the definition, windows exact to the token, segments, padding, grouped heads, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.kernels.ttt import sliding_window_attention

B, H, HK, L, D = 2, 4, 2, 11, 4
IDS = jnp.asarray([[0] * 4 + [5] * 7, [-1] * 2 + [1] * 6 + [-1] * 3])


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, H, L, D), (B, HK, L, D), (B, HK, L, D))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("segment_ids", [None, IDS])
def test_definition(inputs, implementation, segment_ids):
    q, k, v = (np.asarray(x, np.float64) for x in inputs)
    ids = np.zeros((B, L), int) if segment_ids is None else np.asarray(segment_ids)
    inputs = [np.where((ids < 0)[:, None, :, None], np.nan, x) for x in inputs]  # padding is not read
    out = sliding_window_attention(*inputs, window=3, segment_ids=segment_ids, implementation=implementation)
    for b, h, t in np.ndindex(B, H, L):
        seen = [s for s in range(max(0, t - 2), t + 1) if ids[b, s] == ids[b, t] >= 0]
        p = np.exp([q[b, h, t] @ k[b, h // 2, s] / D**0.5 for s in seen])
        expected = sum(x * v[b, h // 2, s] for x, s in zip(p / p.sum(), seen, strict=True)) if seen else np.zeros(D)
        np.testing.assert_allclose(out[b, h, t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 4, 11, 50])
def test_banded_is_dense(inputs, window):
    def run(implementation):
        f = lambda *x: sliding_window_attention(  # noqa: E731
            *x, window=window, segment_ids=IDS, implementation=implementation
        )
        out, pull = jax.vjp(f, *inputs)
        return out, pull(jnp.cos(out))

    for a, b in zip(*map(jax.tree.leaves, map(jax.jit(run, static_argnums=0), ("xla", "reference"))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_reach_is_exact(inputs):
    q, k, v = inputs
    read = lambda v: sliding_window_attention(q, k, v, window=4)[0, 0].sum(-1)  # noqa: E731
    moved = jax.jit(jax.jacobian(read))(v)[:, 0, 0].sum(-1)
    age = jnp.arange(L)[:, None] - jnp.arange(L)
    np.testing.assert_array_equal(moved != 0, (age >= 0) & (age < 4))


def test_memory_is_linear():
    def scratch(length):
        q = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)
        f = jax.jit(lambda q, k, v: sliding_window_attention(q, k, v, window=64))
        return f.lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert scratch(4096) < 4.5 * scratch(1024) < 4 * 4096 * 4096


def test_vmap_and_bfloat16(inputs):
    f = jax.jit(lambda q, k, v: sliding_window_attention(q, k, v, window=3))
    together = jax.jit(jax.vmap(f))(*(jnp.stack([x, 2 * x]) for x in inputs))
    np.testing.assert_allclose(together[1], f(*(2 * x for x in inputs)), rtol=1e-5, atol=1e-6)
    narrow = f(*(x.astype(jnp.bfloat16) for x in inputs))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), f(*inputs), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_no_tokens_no_output(inputs, implementation):
    none = [x[:, :, :0] for x in inputs]
    assert sliding_window_attention(*none, window=3, implementation=implementation).shape == (B, H, 0, D)


def test_precision_is_that_of_the_tokens(inputs):
    """All bits of float32 in both passes, one product of bfloat16: where a platform would round, the program says."""

    def program(dtype):
        loss = lambda *x: jnp.sum(sliding_window_attention(*x, window=3).astype(jnp.float32))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*(x.astype(dtype) for x in inputs)))

    wide = program(jnp.float32)
    assert wide.count("dot_general") == wide.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0
    assert "HIGHEST" not in program(jnp.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"q": jnp.zeros((B, L, D))}, r"q must be \[B, H, L, d\]"),
        ({"k": jnp.zeros((B, 3, L, D)), "v": jnp.zeros((B, 3, L, D))}, r"k and v must be \[2, a divisor of 4, 11, 4\]"),
        ({"segment_ids": jnp.zeros((B, 3), int)}, r"segment_ids must be \[2, 11\]"),
        ({"implementation": "pallas_tpu"}, "has no such kernel"),
    ],
)
def test_bad_arguments(inputs, change, message):
    arguments = dict(zip(("q", "k", "v"), inputs, strict=True)) | {"window": 3}
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(**arguments | change)
