"""Version 2 of FlashPrefill (packed tiles, prefix, mean correction): golden values, limits, chunks of one prompt."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rollax.kernels.flash_prefill import (
    FlashPrefillConfig,
    PackedPrefillConfig,
    api,
    flash_prefill,
    flash_prefill_packed,
    mean_pool,
    packed_energy,
    pallas_tpu,
    pallas_tpu_walk,
    score,
    select_packed,
    selection,
)
from rollax.tests.support import GOLDEN, compiled

IMPLEMENTATIONS = ["reference", "xla", pytest.param("interpret", marks=pytest.mark.slow)]
SLOW_REFERENCE = pytest.param("reference", marks=pytest.mark.slow)
SLOW_XLA = pytest.param("xla", marks=pytest.mark.slow)
ARRAYS = dict(np.load(GOLDEN / "flashprefill.npz"))
V2 = ["v2a", "v2b", "v2c"]
DENSE = PackedPrefillConfig(alpha=0.0, block_size=8, tile_rows=8, sink_blocks=0, window_blocks=1, last_full_tiles=0)
SPARSE = PackedPrefillConfig(alpha=1.0, block_size=8, tile_rows=8, sink_blocks=0, window_blocks=1, last_full_tiles=0)
run = jax.jit(
    flash_prefill_packed, static_argnames=("cfg", "slots", "correction", "dense_on_overflow", "implementation")
)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Several steps a row of the interpreted kernels, and several tiles: bodies that are quick to compile."""
    monkeypatch.setattr(pallas_tpu_walk, "STEP_LENGTH", 128)
    monkeypatch.setattr(pallas_tpu, "ENERGY_TILES", 2)


pooled = compiled(mean_pool, static_argnums=1)
selected = compiled(select_packed, static_argnames=("cfg", "group", "length"))


@partial(compiled, static_argnums=(2, 4))
def energies(q, k, cfg, prefix, implementation):
    kbar = mean_pool(k, cfg.block_size)
    return kbar, packed_energy(q, kbar, cfg, prefix=prefix, implementation=implementation)


def case_of(name):
    """(arrays of a case, its selection, prefix)."""
    arrays = {key.removeprefix(f"{name}_"): x for key, x in ARRAYS.items() if key.startswith(f"{name}_")}
    numbers = ("block_size", "tile_rows", "sink_blocks", "window_blocks", "last_full_tiles")
    cfg = PackedPrefillConfig(alpha=float(arrays["alpha"]), **{key: int(arrays[key]) for key in numbers})
    return arrays, cfg, len(arrays["k"]) - len(arrays["q"])


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *itertools.product(V2, ["xla"]),
        *(pytest.param(name, "reference", marks=[pytest.mark.slow] * (name != V2[-1])) for name in V2),
        *(pytest.param(name, "interpret", marks=pytest.mark.slow) for name in V2),
    ],
)
def test_golden_selection(name, implementation):
    arrays, cfg, prefix = case_of(name)
    kbar, energy = energies(arrays["q"], arrays["k"], cfg, prefix, implementation)
    np.testing.assert_allclose(kbar, arrays["key_mean"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(pooled(arrays["v"], cfg.block_size), arrays["value_mean"], rtol=0, atol=1e-6)
    sparse = (arrays["energy"] > 0).any(-1)  # the others are dense by decree and not scored there
    expected = arrays["energy"][sparse]
    np.testing.assert_allclose(score(energy)[sparse], expected, rtol=1e-6)
    np.testing.assert_allclose(energy.max.max(-1)[sparse], arrays["tile_max_log2"][sparse], rtol=1e-6, atol=2e-6)
    group = arrays["q"].shape[1] // arrays["k"].shape[1]
    mask = selected(energy, cfg, group=group, length=len(arrays["q"]), prefix=prefix)
    np.testing.assert_array_equal(mask, arrays["mask"])
    first, _ = selection.packed_spans(mask.shape[1], cfg.tile_rows, group, prefix, len(arrays["q"]))
    np.testing.assert_array_equal(api.corrected_blocks(mask, first, cfg.block_size), arrays["corrected"])
    # The published lists count keys in units of 64; of the last block only those that hold keys.
    per_block, units = cfg.block_size // 64, -(-len(arrays["k"]) // 64)
    fine = np.repeat(mask, per_block, axis=-1)[..., :units].reshape(-1, units)
    np.testing.assert_array_equal(np.concatenate([np.flatnonzero(x) for x in fine]), arrays["csr_idx64"])
    np.testing.assert_array_equal(np.cumsum([0, *fine.sum(-1)]), arrays["csr_ptr64"])


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *itertools.product(V2, ["xla"]),
        *(pytest.param(name, "reference", marks=[pytest.mark.slow] * (name != V2[-1])) for name in V2),
    ],
)
def test_golden_energies_in_double_precision(name, implementation):
    arrays, cfg, prefix = case_of(name)
    with jax.enable_x64(True):
        q, k = (arrays[x].astype("float64") for x in "qk")
        _, energy = energies(q, k, cfg, prefix, implementation)
        sparse = (arrays["energy"] > 0).any(-1)
        np.testing.assert_allclose(score(energy)[sparse], arrays["energy"][sparse], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *itertools.product(V2, ["xla"]),
        *(pytest.param(name, "interpret", marks=[pytest.mark.slow] * (name != V2[0])) for name in V2),
        *(pytest.param(name, "reference", marks=pytest.mark.slow) for name in V2),
    ],
)
def test_golden_outputs(name, implementation):
    """With the correction, which is a second pass over what the first one gives."""
    arrays, cfg, prefix = case_of(name)
    out, stats = run(*(arrays[x] for x in "qkv"), cfg, prefix=prefix, correction=True, implementation=implementation)
    np.testing.assert_allclose(out, arrays["out_corrected"], rtol=0, atol=5e-6)
    assert not stats.overflow


# The pass that all the cases above begin with: one case shows it alone.
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *(pytest.param(name, "xla", marks=[pytest.mark.slow] * (name != V2[0])) for name in V2),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in itertools.product(V2, ["reference", "interpret"])),
    ],
)
def test_golden_outputs_without_correction(name, implementation):
    arrays, cfg, prefix = case_of(name)
    qkv, how = tuple(arrays[x] for x in "qkv"), dict(prefix=prefix, implementation=implementation)
    out, stats = run(*qkv, cfg, correction=False, **how)
    np.testing.assert_allclose(out, arrays["out_sparse"], rtol=0, atol=5e-6)
    assert not stats.overflow
    # No queries more than this: nothing is left out, nothing is corrected.
    whole = PackedPrefillConfig(
        alpha=1.0, block_size=cfg.block_size, tile_rows=cfg.tile_rows, min_sparse_queries=len(qkv[0])
    )
    out, stats = run(*qkv, whole, **how)
    np.testing.assert_allclose(out, arrays["out_dense"], rtol=0, atol=5e-6)
    assert stats.density == 1


def test_correction_halves_the_golden_errors():
    """Mean errors against dense attention as their authors report them with the golden data, to its three digits."""
    published = {"v2a": (0.0138, 0.0060), "v2b": (0.0374, 0.0172), "v2c": (0.0409, 0.0246)}
    for name, expected in published.items():
        arrays, cfg, prefix = case_of(name)
        prefill = partial(run, *(arrays[x] for x in "qkv"), cfg, prefix=prefix, implementation="xla")
        errors = [np.abs(prefill(correction=c)[0] - arrays["out_dense"]).mean() for c in (False, True)]
        np.testing.assert_allclose(errors, expected, rtol=0, atol=6e-5)


def random_qkv(seed=0, S=24, SK=48, HQ=6, HK=2, D=8, dtype=jnp.float32):
    draw = np.random.default_rng(seed)  # NumPy has no program to compile for every shape
    return tuple(draw.normal(size=shape).astype(dtype) for shape in ((S, HQ, D), (SK, HK, D), (SK, HK, D)))


def plain_attention(q, k, v, prefix=0, slope=None):
    """Dense attention in NumPy, float64: query s sees the keys up to prefix + s.

    Returns:
      out, or with `slope`, the derivative of a loss by an element of out: (out, dq, dk, dv).
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    heads, scale = k.shape[1], q.shape[-1] ** -0.5
    fold = lambda x: x.reshape(len(x), heads, -1, x.shape[-1]).sum(2)  # noqa: E731
    k, v = (np.repeat(x, q.shape[1] // heads, axis=1) for x in (k, v))
    seen = np.arange(len(k)) <= prefix + np.arange(len(q))[:, None]
    logits = np.where(seen, np.einsum("shd,thd->hst", q, k) * scale, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hst,thd->shd", weights, v)
    if slope is None:
        return out
    d_out = slope(out)
    d_weights = np.einsum("shd,thd->hst", d_out, v)
    d_logits = scale * weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    dq, dk = np.einsum("hst,thd->shd", d_logits, k), np.einsum("hst,shd->thd", d_logits, q)
    return out, dq, fold(dk), fold(np.einsum("hst,shd->thd", weights, d_out))


# test_golden_outputs_without_correction has a dense selection in xla.
@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, SLOW_XLA, *IMPLEMENTATIONS[2:]])
def test_a_dense_selection_is_dense_attention(implementation):
    q, k, v = random_qkv(S=48)
    whole, stats = run(q, k, v, DENSE, implementation=implementation)
    assert stats.density == 1
    np.testing.assert_allclose(whole, plain_attention(q, k, v), rtol=0, atol=5e-6)


@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, *IMPLEMENTATIONS[1:]])
def test_chunks_of_a_prompt_are_the_prompt(implementation):
    """Dense selection: a prompt read in chunks of traced prefix and length over one cache equals it read at once."""
    q, k, v = random_qkv(S=48)
    expected = plain_attention(q, k, v)
    size = 20
    for start in (0, 20, 40):
        length = min(size, 48 - start)
        # Rows beyond the length and keys beyond the prompt hold anything.
        chunk = np.pad(q[start : start + length], ((0, size - length), (0, 0), (0, 0)), constant_values=9)
        keys, values = (
            np.pad(x[: start + length], ((0, 60 - start - length), (0, 0), (0, 0)), constant_values=9) for x in (k, v)
        )
        out, _ = run(chunk, keys, values, DENSE, prefix=start, length=length, implementation=implementation)
        np.testing.assert_allclose(out[:length], expected[start : start + length], rtol=0, atol=5e-6)
        assert (out[length:] == 0).all()


def test_the_last_chunk_may_be_padded():
    """Keys for the valid queries are enough, also where prefix and length are not traced."""
    q, k, v = random_qkv(seed=6, S=16, SK=40)
    call = partial(flash_prefill_packed, cfg=DENSE, prefix=32, correction=False, implementation="reference")
    out, _ = jax.jit(partial(call, length=8))(q, k, v)
    np.testing.assert_allclose(out[:8], plain_attention(q[:8], k, v, 32), rtol=0, atol=1e-6)
    assert (out[8:] == 0).all()


@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, *IMPLEMENTATIONS[1:]])
def test_correction_is_exact_for_constant_blocks(implementation):
    q, k, v = random_qkv(seed=1)
    k, v = (np.repeat(x[::8], 8, axis=0) for x in (k, v))
    dense = plain_attention(q, k, v, 24)
    sparse, stats = run(q, k, v, SPARSE, prefix=24, correction=False, implementation=implementation)
    corrected, _ = run(q, k, v, SPARSE, prefix=24, implementation=implementation)
    assert stats.density < 0.7 and np.abs(np.subtract(sparse, dense)).max() > 0.1
    np.testing.assert_allclose(corrected, dense, rtol=0, atol=5e-6)


@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, *IMPLEMENTATIONS[1:]])
def test_correction_over_several_blocks_of_means(implementation):
    """134 blocks are more mean keys than the correction takes at once; exact, with its gradients, as above."""
    q, k, v = random_qkv(seed=5, S=16, SK=1072)
    k, v = (np.repeat(x[::8], 8, axis=0) for x in (k, v))

    def loss(q, k, v):
        out, stats = flash_prefill_packed(q, k, v, SPARSE, prefix=1056, implementation=implementation)
        return jnp.sum(jnp.sin(out)), (out, stats.density)

    gradients, (out, density) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert density < 0.2
    for a, b in zip((out, *gradients), plain_attention(q, k, v, 1056, slope=np.cos), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-6)


def test_later_tiles_never_matter():
    """4 positions a tile (2 heads of a key head): changes from position 16 on leave the outputs before bit for bit."""
    first, second = (random_qkv(seed=seed, S=32, SK=32, HQ=4) for seed in (2, 3))
    mixed = tuple(np.concatenate([a[:16], b[16:]]) for a, b in zip(first, second, strict=True))
    a, b = (run(*x, SPARSE)[0] for x in (first, mixed))
    np.testing.assert_array_equal(a[:16], b[:16])
    assert (a[16:] != b[16:]).all(axis=(1, 2)).all()


# The gradients of test_correction_over_several_blocks_of_means go through all three parts too.
@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, SLOW_XLA])
def test_gradients_are_finite_differences(implementation):
    """Through the sparse part, the mean keys and the mean values; the steps are too small to change the selection."""
    with jax.enable_x64(True):
        q, k, v = random_qkv(seed=4, S=13, SK=30, D=4, dtype=jnp.float64)
        f = lambda q, k, v: run(q, k, v, SPARSE, prefix=17, implementation=implementation)[0]  # noqa: E731
        assert f(q, k, v).dtype == jnp.float64
        check_grads(f, (q, k, v), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6)


def test_overflow_and_density():
    q, k, v = random_qkv(seed=5)
    fall_back = partial(run, q, k, v, DENSE, prefix=24, implementation="xla")
    _, stats = fall_back(slots=3)
    assert stats.overflow and stats.density == 1
    saved, stats = fall_back(slots=3, dense_on_overflow=True)
    assert stats.overflow
    np.testing.assert_allclose(saved, plain_attention(q, k, v, 24), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": 25}, r"prefix must be in \[0, 24\], got 25"),
        ({"prefix": -1}, r"prefix must be in \[0, 24\], got -1"),
        ({"prefix": 41, "length": 8}, r"prefix must be in \[0, 40\], got 41"),
        ({"prefix": 1.0}, "prefix must be an integer, got 1.0"),
        ({"length": 25}, r"length must be in \[0, 24\], got 25"),
        ({"slots": 7}, r"slots must be in \[1, 6\].* got 7"),
        (
            {"k": jnp.zeros((16, 2, 8)), "v": jnp.zeros((16, 2, 8))},
            "k must hold the prefix and the 24 tokens of q, got 16",
        ),
        ({"k": jnp.zeros((48, 4, 8)), "v": jnp.zeros((48, 4, 8))}, "multiple of key heads, got 6 and 4"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"implementation": "triton"}, "implementation must be one of .* got 'triton'"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(zip("qkv", random_qkv(), strict=True)) | {"cfg": DENSE} | change
    with pytest.raises(ValueError, match=message):
        flash_prefill_packed(**arguments)


@pytest.mark.parametrize("shape", [(6, 4, 8), (6, 2, 4), (2, 8)])
def test_mean_keys_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"q must be \[S, HQ, D\] and kbar \[n, HK, D\], HQ a multiple of HK, got"):
        packed_energy(np.zeros((24, 6, 8)), np.zeros(shape), DENSE)


def test_the_configuration_of_the_other_version():
    other = FlashPrefillConfig(alpha=0.1)
    with pytest.raises(TypeError, match="cfg must be a PackedPrefillConfig, got a FlashPrefillConfig"):
        flash_prefill_packed(*random_qkv(), other)
    with pytest.raises(TypeError, match="cfg must be a FlashPrefillConfig, got a PackedPrefillConfig"):
        flash_prefill(*random_qkv(), DENSE)
