"""Selection against values computed with the authors' kernels, and against what is known in closed form."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.kernels.flash_prefill import (
    BlockEnergy,
    FlashPrefillConfig,
    PackedPrefillConfig,
    block_energy,
    compact_index,
    dense_mask,
    density,
    index_mask,
    keep_forced,
    keep_top_k,
    keep_top_p,
    mean_pool,
    packed_energy,
    score,
    select_blocks,
    select_packed,
    transpose_index,
    window_mask,
)
from rollax.tests.support import GOLDEN, compiled

ARRAYS = dict(np.load(GOLDEN / "flashprefill.npz"))


def case_of(name):
    """(arrays of a case, its selection), `name` such as "v1a strict"."""
    prefix, variant = name.split()
    arrays = {key.removeprefix(f"{prefix}_"): x for key, x in ARRAYS.items() if key.startswith(f"{prefix}_")}
    numbers = ("block_size", "sink_blocks", "window_blocks", "last_full_blocks", "min_budget")
    cfg = FlashPrefillConfig(
        alpha=float(arrays["alpha"]),
        mask_padding=variant == "strict",
        **{key: int(arrays[key]) for key in numbers if key in arrays},
    )
    return arrays | {
        key.removeprefix(f"{variant}_"): x for key, x in arrays.items() if key.startswith(f"{variant}_")
    }, cfg


indexed = compiled(compact_index, static_argnums=1)


def normalised(score):
    return score / (score.sum(-1, keepdims=True) + 1e-9)


@partial(compiled, static_argnums=(2, 3))
def selected(q, k, cfg, implementation):
    kbar = mean_pool(k, cfg.block_size)
    energy = block_energy(q, kbar, cfg, implementation=implementation)
    return kbar, energy, normalised(score(energy)), select_blocks(energy, cfg)


V1 = [f"v1{letter} strict" for letter in "abcdefg"] + [f"v1{letter} upstream" for letter in "bcfg"]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *itertools.product(V1, ["xla"]),
        *(
            pytest.param(name, implementation, marks=[pytest.mark.slow] * (name not in V1[::5]))
            for name, implementation in itertools.product(V1, ["reference", "interpret"])
        ),
    ],
)
def test_golden_selection(name, implementation):
    arrays, cfg = case_of(name)
    kbar, energy, scores, mask = selected(arrays["q"], arrays["k"], cfg, implementation)
    assert energy.sum.dtype == energy.max.dtype == jnp.float32
    np.testing.assert_allclose(kbar, arrays["key_mean"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(energy.sum, arrays["raw"], rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(energy.max, arrays["rawmax"], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(scores, arrays["score"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(mask, arrays["mask"])
    if "index" in arrays:
        n = mask.shape[-1]
        index = indexed(mask, n)
        np.testing.assert_array_equal(index.count, arrays["count"])
        used = np.arange(n) < arrays["count"][..., None]
        np.testing.assert_array_equal(np.where(used, index.index, n), arrays["index"])
        last = np.take_along_axis(index.index, arrays["count"][..., None] - 1, -1)
        np.testing.assert_array_equal(np.where(used, last, index.index), np.broadcast_to(last, used.shape))
        assert not index.overflow


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", V1)
def test_golden_energies_in_double_precision(name, implementation):
    arrays, cfg = case_of(name)
    with jax.enable_x64(True):
        q, k = (arrays[x].astype("float64") for x in "qk")
        _, energy, *_ = selected(q, k, cfg, implementation)
        assert energy.sum.dtype == jnp.float64
        np.testing.assert_allclose(energy.sum, arrays["raw"], rtol=1e-6)
        np.testing.assert_allclose(energy.max, arrays["rawmax"], rtol=1e-6)


@pytest.mark.parametrize("variant", ["strict", "upstream"])
def test_golden_variable_lengths(variant):
    arrays, cfg = case_of(f"v1h {variant}")
    ends, B = arrays["cu_seqlens"], cfg.block_size
    lengths = np.diff(ends)
    blocks = -(-lengths // B)
    room = blocks.max() * B
    # What stands in the padding must not matter.
    padded = {
        key: np.stack([np.pad(x, ((0, room - len(x)), (0, 0), (0, 0)), constant_values=7) for x in rows])
        for key in "qk"
        for rows in [np.split(arrays[key], ends[1:-1])]
    }

    def select(q, k, length):
        energy = block_energy(q, mean_pool(k, B, length), cfg, length=length)
        return score(energy), select_blocks(energy, cfg, n_valid=-(-length // B))

    scores, mask = (np.asarray(x) for x in jax.jit(jax.vmap(select))(padded["q"], padded["k"], lengths))
    heads = scores.shape[1]
    lists = [np.flatnonzero(mask[b, h, i]) for h in range(heads) for b, n in enumerate(blocks) for i in range(n)]
    np.testing.assert_array_equal(np.concatenate(lists), arrays["csr_idx"])
    np.testing.assert_array_equal(np.cumsum([0] + [len(x) for x in lists]), arrays["csr_ptr"])
    assert mask.sum() == len(arrays["csr_idx"])  # nothing beyond the lengths
    flat = [normalised(scores[b, :, :n, :n]).reshape(heads, -1) for b, n in enumerate(blocks)]
    np.testing.assert_allclose(np.concatenate(flat, 1), arrays["score_flat"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
def test_zero_queries_count_rows(implementation):
    B, n = 16, 4
    q, k = np.zeros((n * B, 2, 8), "float32"), np.random.default_rng(0).normal(size=(n * B, 1, 8)).astype("float32")
    cfg, kbar = FlashPrefillConfig(alpha=0.5, block_size=B), k.reshape(n, B, 1, 8).mean(1)
    energy = jax.jit(partial(block_energy, cfg=cfg, implementation=implementation))(q, kbar)
    expected = np.tril(np.full((n, n), float(B)), -1) + np.eye(n)
    np.testing.assert_array_equal(energy.sum, np.broadcast_to(expected, (2, n, n)))
    np.testing.assert_array_equal(energy.max, np.where(np.broadcast_to(expected, (2, n, n)) > 0, 0, -np.inf))

    # V2: tiles of 12 positions (2 heads a position), not aligned with the blocks of 16, after a prefix.
    packed = PackedPrefillConfig(alpha=0.5, block_size=B, tile_rows=8)
    prefix, length = 21, 39
    score_tiles = jax.jit(partial(packed_energy, cfg=packed, implementation=implementation))
    energy = score_tiles(q[:40], kbar, prefix=prefix, length=length)
    position = prefix + np.arange(40 * 2) // 2
    valid = position < prefix + length
    seen = valid[:, None] & (position[:, None] >= np.arange(n) * B)
    last = np.where(valid, position, -1).reshape(-1, 8).max(1)
    expected = seen.reshape(-1, 8, n).sum(1) * (np.arange(n) < (last[:, None] + 1) // B)
    np.testing.assert_array_equal(energy.sum[0], expected)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_product_in_parts_is_formed_once(implementation):
    """A last part of width 1 is no product of matrices but a fusion, which all of XLA's passes may form twice."""
    B, n, D = 8, 6, 5
    q, k = (np.random.default_rng(seed).normal(size=(n * B, 2, D)).astype("float32") for seed in (1, 2))
    cfg, kbar = FlashPrefillConfig(alpha=0.5, block_size=B), k.reshape(n, B, 2, D).mean(1)
    x = np.einsum("shd,nhd->hsn", q.astype("float64"), kbar) / np.sqrt(D)
    x = np.where(np.arange(n * B)[:, None] >= np.arange(n) * B + B - 1, x, -np.inf).reshape(2, n, B, n)
    top = x.max(2)
    expected = np.exp(x - np.maximum(top, -1e30)[:, :, None]).sum(2)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        energy = jax.jit(partial(block_energy, cfg=cfg, implementation=implementation))(q, kbar)
    finally:
        jax.config.update("jax_disable_most_optimizations", True)  # as conftest.py has it on a CPU
    np.testing.assert_allclose(energy.sum, expected, rtol=1e-6)
    np.testing.assert_allclose(energy.max, top / np.log(2), rtol=1e-6, atol=1e-6)


def test_row_normalised_energies_are_sums_of_softmaxes():
    S, B, n = 60, 8, 8
    q, k = (3 * np.random.default_rng(seed).normal(size=(S, 2, 16)).astype("float32") for seed in (1, 2))
    cfg = FlashPrefillConfig(alpha=0.5, block_size=B, row_normalised=True)
    kbar = compiled(mean_pool, static_argnums=1)(k, B)
    x = np.einsum("shd,nhd->hsn", q.astype("float64"), kbar) / 4
    x = np.where(np.arange(S)[:, None] >= np.arange(n) * B + B - 1, x, -np.inf)
    p = np.exp(x - np.maximum(x.max(-1, keepdims=True), -1e30))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-30)
    expected = np.pad(p, ((0, 0), (0, n * B - S), (0, 0))).reshape(2, n, B, n).sum(2)
    for implementation in ("reference", "xla"):
        scores = jax.jit(lambda *x, how=implementation: score(block_energy(*x, cfg, implementation=how)))(q, kbar)
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def random_energy(n=12, heads=3):
    values = jax.random.uniform(jax.random.key(2), (heads, n, n))
    seen = dense_mask(n)
    return BlockEnergy(jnp.where(seen, values, 0), jnp.broadcast_to(jnp.where(seen, 0.0, -jnp.inf), values.shape))


def test_density_falls_as_alpha_grows():
    energy = random_energy()

    def of(alpha):
        cfg = FlashPrefillConfig(alpha=alpha, sink_blocks=0, window_blocks=1, last_full_blocks=0)
        return density(select_blocks(energy, cfg))

    densities = jax.jit(jax.vmap(of))(jnp.linspace(0, 1, 11))  # alpha is a traced number
    assert densities[0] == 1
    assert (jnp.diff(densities) < 0).all()
    best = jnp.argmax(score(energy), -1) == jnp.arange(12)  # the best is the diagonal block, which is forced
    np.testing.assert_allclose(densities[-1], (2 * 12 - best.mean(0).sum()) / 78, rtol=1e-6)


def test_forced_blocks_and_other_rules():
    energy, n = random_energy(), 12
    cfg = FlashPrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=2, last_full_blocks=1)
    select = partial(select_blocks, energy, cfg)
    forced = np.array(window_mask(n, 1, 2))
    forced[-1] = True
    np.testing.assert_array_equal(select(keep=keep_forced), np.broadcast_to(forced, (3, n, n)))
    s, visible = np.asarray(score(energy)), np.tril(np.ones((n, n), bool))
    top_k, top_p = (np.asarray(select(keep=x)) for x in (partial(keep_top_k, share=0.4), partial(keep_top_p, mass=0.7)))
    for h in range(3):
        for i in range(n):
            order = np.argsort(-s[h, i, : i + 1])
            best = np.zeros(n, bool)
            best[order[: -(-4 * (i + 1) // 10)]] = True
            np.testing.assert_array_equal(top_k[h, i], (best | forced[i]) & visible[i])
            share = np.cumsum(s[h, i, order]) / s[h, i].sum()
            heavy = np.zeros(n, bool)
            heavy[order[: np.searchsorted(share, 0.7) + 1]] = True
            np.testing.assert_array_equal(top_p[h, i], (heavy | forced[i]) & visible[i])
    short = np.asarray(select(n_valid=5))
    assert not short[:, 5:].any() and short[:, 4, :5].all()


def test_packed_selection_of_everything():
    packed = PackedPrefillConfig(alpha=0.0)
    select = lambda q, kbar: select_packed(packed_energy(q, kbar, packed), packed, group=2, length=24)  # noqa: E731
    assert compiled(select)(np.zeros((24, 4, 8)), np.zeros((6, 2, 8))).any(-1).all()


def test_index_lists_are_the_mask():
    n, slots = 9, 4
    mask = np.random.default_rng(3).random((2, 7, n)) < 0.3
    mask[0, 0], mask[1, 2] = False, True
    index, masked = indexed(mask, n), compiled(index_mask, static_argnums=2)
    np.testing.assert_array_equal(masked(index.index, index.count, n), mask)
    np.testing.assert_array_equal(index.count, mask.sum(-1))
    assert (index.index[0, 0] == 0).all() and not index.overflow
    np.testing.assert_allclose(jax.jit(density)(index, np.ones((7, n), bool)), mask.mean(), rtol=1e-6)
    few = indexed(mask, slots)
    assert few.overflow and few.count.max() == slots
    np.testing.assert_array_equal(few.index[1, 2], np.arange(slots))  # the first ones stay
    back = compiled(partial(transpose_index, blocks=n))(index)
    np.testing.assert_array_equal(masked(back.index, back.count, 7), np.swapaxes(mask, 1, 2))
    mask[0] = False
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda m: compact_index(m, slots).overflow))(mask), [0, 1])
    assert "sort[" not in str(jax.make_jaxpr(lambda m: transpose_index(compact_index(m, n), blocks=n))(mask))


def test_means_ignore_what_is_beyond_the_length():
    x = jax.random.normal(jax.random.key(4), (20, 2, 3))
    means = jax.jit(mean_pool, static_argnums=1)(x, 8, 11)
    np.testing.assert_allclose(means[0], x[:8].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(means[1], x[8:11].mean(0), rtol=1e-5, atol=1e-6)
    assert (means[2] == 0).all()
    half = mean_pool((1000 + x).astype(jnp.bfloat16), 8)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half[0], (1000 + x).astype(jnp.bfloat16)[:8].astype(jnp.float32).mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlashPrefillConfig(alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: FlashPrefillConfig(alpha=-0.1), r"alpha must be in \[0, 1\], got -0.1"),
        (lambda: FlashPrefillConfig(alpha=float("nan")), r"alpha must be in \[0, 1\], got nan"),
        (lambda: FlashPrefillConfig(alpha=0.1, window_blocks=0), "window_blocks must be at least 1, got 0"),
        (lambda: FlashPrefillConfig(alpha=0.1, block_size=96), "block_size must be a power of two, got 96"),
        (lambda: FlashPrefillConfig(alpha=0.1, sink_blocks=-1), "sink_blocks must be at least 0, got -1"),
        (lambda: FlashPrefillConfig(alpha=np.ones(2)), r"alpha must be one number, got an array of shape \(2,\)"),
        (lambda: density(jnp.ones((15, 5), bool)), "visible must be given .* as many, got 15 and 5"),
        (
            lambda: density(compact_index(jnp.ones((5, 15), bool), 15)),
            "visible must be given .* as many, got 5 and 15",
        ),
        (lambda: PackedPrefillConfig(alpha=2), r"alpha must be in \[0, 1\], got 2"),
        (lambda: PackedPrefillConfig(alpha=0.1, tile_rows=100), "tile_rows must be a power of two, got 100"),
        (lambda: compact_index(dense_mask(4), 5), r"slots must be in \[1, 4\].* got 5"),
        (lambda: compact_index(dense_mask(4), 0), r"slots must be in \[1, 4\].* got 0"),
        (lambda: mean_pool(jnp.zeros((8, 1, 2)), 3), "block_size must be a power of two, got 3"),
        (
            lambda: block_energy(
                jnp.zeros((32, 2, 8)), jnp.zeros((3, 1, 8)), FlashPrefillConfig(alpha=0, block_size=16)
            ),
            r"kbar must be \[2, HK, 8\] .* got \(3, 1, 8\)",
        ),
        (
            lambda: block_energy(
                jnp.zeros((32, 2, 8)), jnp.zeros((2, 1, 8)), FlashPrefillConfig(alpha=0, block_size=16), length=33
            ),
            r"length must be in \[0, 32\], got 33",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_alpha_has_no_default():
    with pytest.raises(TypeError, match="alpha"):
        FlashPrefillConfig()


def test_another_number_of_blocks():
    index = compact_index(jnp.ones((5, 15), bool), 15)
    with pytest.raises(ValueError, match="blocks must be at least the 15 slots of a list, got 5"):
        transpose_index(index)
    with pytest.raises(ValueError, match="visible must have at least 15 blocks, got 5"):
        density(index, dense_mask(5))
    with pytest.raises(ValueError, match="visible must have 5 blocks, got 1"):
        density(dense_mask(5), jnp.ones((5, 1), bool))


def test_numbers_of_jax_are_checked_inside_jit():
    alpha = jnp.float32(2)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2.0"):
        jax.eval_shape(lambda: FlashPrefillConfig(alpha=alpha))
