"""The plain-jnp backend against the definition, on every geometry that the operator takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.kernels.flash_prefill import compact_index, reference, transpose_index, xla

GEOMETRIES = {
    # heads, key heads, rows, keys, tile, block, group, offsets, lengths
    "square": (4, 2, 32, 32, 8, 8, 1, (0, 0, 0, 0), (32, 32, 32, 32)),
    "packed": (2, 2, 40, 48, 8, 16, 3, (21, 5), (37, 21)),
    "decoding": (4, 4, 8, 64, 8, 16, 8, (3, 40, 63, 10), (4, 41, 64, 0)),
}


indexed = jax.jit(compact_index, static_argnums=1)


def case_of(name, dtype=jnp.float32, by_tile=False):
    """(arrays, index, ends, static); with `by_tile` a mask stands at the end of the ends."""
    H, HK, R, S, tile, block, group, offset, length = GEOMETRIES[name]
    rng = np.random.default_rng(0)  # NumPy has no program to compile for every shape
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    q, d_out, d_lse = draw(H, R, 8), draw(H, R, 8), draw(H, R)
    k, v = draw(HK, S, 8), draw(HK, S, 8)
    mask = rng.random((H, R // tile, S // block)) < 0.5
    mask[0, 0] = False
    static = dict(tile=tile, block=block, group=group)
    ends = jnp.asarray(offset, jnp.int32), jnp.asarray(length, jnp.int32)
    if by_tile:
        ends += (jnp.asarray(rng.random((H, R // tile, S)) < 0.4),)
    return (q, k, v, d_out, d_lse), indexed(mask, S // block), ends, static


@pytest.mark.parametrize(
    ("name", "at_once", "by_tile"),
    [
        *((name, 3, False) for name in GEOMETRIES),
        ("packed", 1, False),
        # Golden values and gradients are of squares, one list at a time.
        *(pytest.param(name, 1, False, marks=pytest.mark.slow) for name in ("square", "decoding")),
        ("packed", 64, False),
        ("packed", 1, True),
        ("square", 3, True),
    ],
)
def test_forward_and_backward(name, at_once, by_tile, monkeypatch):
    """Lists one by one as on CPUs, and in groups as on accelerators; positions or a mask by tiles."""
    if at_once > 1:
        monkeypatch.setattr(xla.jax, "default_backend", lambda: "accelerator")
        monkeypatch.setattr(xla, "LISTS_AT_ONCE", at_once)
    (q, k, v, d_out, d_lse), index, ends, static = case_of(name, by_tile=by_tile)

    def run(module, q, k, v, d_out, d_lse):
        back = transpose_index(index, blocks=k.shape[1] // static["block"])
        out, lse = module.forward(q, k, v, index.index, index.count, *ends, **static, scale=0.5)
        seen = jnp.where(lse > -jnp.inf, d_lse, 0)
        lists = (index.index, index.count, back.index, back.count)
        gradients = module.backward(q, k, v, out, lse, d_out, seen, *lists, *ends, **static, scale=0.5)
        return out, lse, *gradients

    results = {module: jax.jit(partial(run, module))(q, k, v, d_out, d_lse) for module in (reference, xla)}
    for a, b in zip(results[xla], results[reference], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)
    assert (results[xla][1] == -jnp.inf).any() and (results[xla][1] > -jnp.inf).any()


@pytest.mark.parametrize(
    ("name", "rule", "function"),
    [
        *((name, rule, "energy") for name in GEOMETRIES for rule in ("last", "first")),
        ("square", "last", "row_energy"),
        ("packed", "first", "row_energy"),
    ],
)
def test_energies(name, rule, function, monkeypatch):
    monkeypatch.setitem(xla.SCORED_AT_ONCE, "cpu", (24, 2))  # several tiles and blocks at a time, and a rest
    (q, k, *_), _, ends, static = case_of(name)
    kbar = k.reshape(k.shape[0], -1, static["block"], 8).mean(2)
    functions = (partial(getattr(module, function), **static, scale=0.5, rule=rule) for module in (xla, reference))
    a, b = (jax.jit(f)(q, kbar, *ends) for f in functions)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-6, atol=1e-6)
    assert (a[0] > 0).any() and (a[1] == -jnp.inf).any()


def test_double_precision():
    with jax.enable_x64(True):
        (q, k, v, *_), index, ends, static = case_of("packed", jnp.float64)
        out, lse = jax.jit(partial(xla.forward, **static, scale=0.5))(q, k, v, index.index, index.count, *ends)
        exact = jax.jit(partial(reference.forward, **static, scale=0.5))
        expected, expected_lse = exact(q, k, v, index.index, index.count, *ends)
        assert out.dtype == lse.dtype == jnp.float64
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)
        np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-13)


def test_blocks_that_no_list_names_are_not_read():
    """NaN in them reaches nothing, forward or backward; the definition, which reads all, would be NaN."""
    (q, k, v, d_out, d_lse), index, ends, static = case_of("square")
    mask = jnp.zeros((4, 4, 4), bool).at[:, :, 0].set(True).at[:, 3, 2].set(True)
    index, poison = compact_index(mask, 4), jnp.full((2, 8, 8), jnp.nan)
    back = transpose_index(index)
    lists = (index.index, index.count, back.index, back.count)

    @jax.jit
    def run(k, v):
        out, lse = xla.forward(q, k, v, *lists[:2], *ends, **static, scale=0.5)
        return out, lse, *xla.backward(q, k, v, out, lse, d_out, d_lse, *lists, *ends, **static, scale=0.5)

    poisoned = (x.at[:, 8:16].set(poison).at[:, 24:].set(poison) for x in (k, v))
    for a, b in zip(run(*poisoned), run(k, v), strict=True):
        np.testing.assert_array_equal(a, b)
