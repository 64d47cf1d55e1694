"""Reductions: formulas, parts of a batch that add up, empty masks, NaN behind the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.objectives import aggregate, denominator, masked_mean

MODES = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
LOSS = jnp.array([[1.0, 2.0, 3.0, 4.0], [5.0, jnp.nan, jnp.nan, 6.0], [jnp.nan] * 4, [7.0, jnp.inf, 0.0, 0.0]])
MASK = jnp.array([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token_mean", 28 / 7),
        ("seq_mean_token_mean", (2.5 + 5.5 + 7) / 3),
        ("seq_mean_token_sum", 28 / 3),
        ("seq_mean_token_sum_norm", 28 / 12),
    ],
)
def test_formulas(mode, expected):
    for mask in (MASK, MASK.astype(bool), MASK.astype(jnp.float32)):
        for name in (mode, mode.replace("_", "-")):
            np.testing.assert_allclose(aggregate(LOSS, mask, name), expected, rtol=1e-6)
    np.testing.assert_allclose(aggregate(LOSS, MASK, mode, norm=denominator(MASK, mode)), expected, rtol=1e-6)
    gradient = jax.grad(lambda x: aggregate(x, MASK, mode))(LOSS)
    assert np.all(np.isfinite(gradient)) and np.all((np.asarray(gradient) != 0) == (np.asarray(MASK) != 0))


def test_constant_length():
    assert denominator(MASK, "seq_mean_token_sum_norm", max_length=32) == 96
    np.testing.assert_allclose(aggregate(LOSS, MASK, "seq_mean_token_sum_norm", norm=96), 28 / 96, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_parts_add_up(mode):
    rng = np.random.default_rng(0)
    loss, mask = rng.normal(size=(12, 7)), rng.random((12, 7)) < 0.5
    mask[3:5] = False  # the second part below is empty
    with jax.enable_x64(True):
        norm = denominator(mask, mode)
        for cuts in ((6,), (3, 5), (1, 2, 9)):
            parts = zip(np.split(loss, cuts), np.split(mask, cuts), strict=True)
            total = sum(aggregate(part, kept, mode, norm=norm) for part, kept in parts)
            np.testing.assert_allclose(total, aggregate(loss, mask, mode), rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_padding_does_not_matter(mode):
    pad = ((0, 3), (0, 2))
    norm = 9.0 if mode == "seq_mean_token_sum_norm" else None  # its default denominator is the padded width, by design
    padded = aggregate(jnp.pad(LOSS, pad, constant_values=jnp.nan), jnp.pad(MASK, pad), mode, norm=norm)
    np.testing.assert_allclose(padded, aggregate(LOSS, MASK, mode, norm=norm), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_empty_mask(mode):
    value, gradient = jax.value_and_grad(lambda x: aggregate(x, jnp.zeros_like(MASK), mode))(LOSS)
    assert value == 0 and np.all(np.asarray(gradient) == 0)


def test_traced_norm_and_half_precision():
    np.testing.assert_allclose(jax.jit(lambda n: aggregate(LOSS, MASK, "token_mean", norm=n))(14.0), 2.0, rtol=1e-6)
    ones = jnp.ones((4, 1000), jnp.bfloat16)  # a bfloat16 sum stops at 256
    total = aggregate(ones, ones, "seq_mean_token_sum")
    assert total == 1000 and total.dtype == jnp.float32


def test_masked_mean():
    np.testing.assert_allclose(masked_mean(LOSS, MASK, axis=1), [2.5, 5.5, 0, 7], rtol=1e-6)
    assert masked_mean(LOSS, jnp.zeros_like(MASK)) == 0
    np.testing.assert_allclose(masked_mean(jnp.arange(6.0).reshape(2, 3), jnp.array([[0], [1]])), 4.0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"mode must be one of .*token_mean.*, got 'mean'"):
        aggregate(LOSS, MASK, "mean")
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(4, 3\)"):
        aggregate(LOSS, MASK[:, :3], "token_mean")
    with pytest.raises(ValueError, match=r"mask must be \[B, T\]"):
        denominator(MASK[0], "token_mean")
    for norm in (-1.0, np.nan):
        with pytest.raises(ValueError, match=f"norm must not be negative, got {norm}"):
            aggregate(LOSS, MASK, "token_mean", norm=norm)


def test_the_denominator_of_an_empty_batch_gives_zero():
    loss, mask = jnp.ones((2, 3)), jnp.zeros((2, 3))
    for mode in MODES:
        assert aggregate(loss, mask, mode, norm=denominator(mask, mode)) == 0
