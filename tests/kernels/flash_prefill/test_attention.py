"""Version 1 of FlashPrefill: values and gradients computed with the authors' kernels, limits, transformations."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jax.test_util import check_grads

from rollax.kernels.flash_prefill import (
    FlashPrefillConfig,
    PackedPrefillConfig,
    block_energy,
    block_sparse_attention,
    compact_index,
    dense_attention,
    dense_mask,
    flash_prefill,
    flash_prefill_packed,
    flash_prefill_varlen,
    mean_pool,
    pallas_tpu,
    pallas_tpu_walk,
    select_blocks,
    window_attention,
    window_mask,
)
from rollax.tests.support import GOLDEN, compiled

SLOW = pytest.param("interpret", marks=pytest.mark.slow)  # test_pallas_tpu.py has the kernels in seconds
SLOW_REFERENCE = pytest.param("reference", marks=pytest.mark.slow)
IMPLEMENTATIONS = ["reference", "xla", SLOW]
ARRAYS = dict(np.load(GOLDEN / "flashprefill.npz"))
V1 = [f"v1{letter} strict" for letter in "abcdefg"] + [f"v1{letter} upstream" for letter in "bcfg"]
SMALL = FlashPrefillConfig(alpha=0.6, block_size=8, sink_blocks=1, window_blocks=1, last_full_blocks=0)


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


def random_qkv(seed=0, S=40, HQ=4, HK=2, D=8, dtype=jnp.float32):
    draw = np.random.default_rng(seed)  # NumPy has no program to compile for every shape
    return tuple(draw.normal(size=(S, heads, D)).astype(dtype) for heads in (HQ, HK, HK))


def plain_attention(q, k, v, mask):
    """Masked softmax attention in NumPy, float64; mask `[HQ, S, S]`. Returns (out, lse)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = np.where(mask, np.einsum("shd,thd->hst", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    lse = np.log(np.exp(logits).sum(-1))
    return np.einsum("hst,thd->shd", np.exp(logits - lse[..., None]), v), lse.T


def token_mask(mask, block, S):
    full = np.repeat(np.repeat(np.asarray(mask), block, -1), block, -2)[..., :S, :S]
    return full & np.tril(np.ones((S, S), bool))


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Several steps a row of the interpreted kernels, and several tiles: bodies that are quick to compile."""
    monkeypatch.setattr(pallas_tpu_walk, "STEP_LENGTH", 32)
    monkeypatch.setattr(pallas_tpu, "ENERGY_TILES", 2)


attend = jax.jit(block_sparse_attention, static_argnames=("block_size", "implementation"))
dense = jax.jit(dense_attention, static_argnames=("block_size", "implementation"))
indexed = jax.jit(compact_index, static_argnums=1)
pooled = jax.jit(mean_pool, static_argnums=1)
run = jax.jit(flash_prefill, static_argnames=("cfg", "slots", "correction", "dense_on_overflow", "implementation"))


@partial(jax.jit, static_argnames="cfg")
def mask_of(q, k, cfg):
    return select_blocks(block_energy(q, mean_pool(k, cfg.block_size), cfg), cfg)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        # Upstream is strict wherever padded rows change nothing, which they do in g.
        *(pytest.param(name, "xla", marks=[pytest.mark.slow] * (name in V1[7:10])) for name in V1),
        *(pytest.param(name, "reference", marks=[pytest.mark.slow] * (name not in V1[::5])) for name in V1),
        *(pytest.param(name, "interpret", marks=[pytest.mark.slow] * (name != V1[0])) for name in V1),
    ],
)
def test_golden_outputs(name, implementation):
    arrays, cfg = case_of(name)
    q, k, v = (arrays[x] for x in "qkv")
    out, stats = run(q, k, v, cfg, implementation=implementation)
    np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=5e-6)
    n = arrays["mask"].shape[-1]
    np.testing.assert_allclose(stats.density, arrays["mask"].sum() / (len(arrays["mask"]) * n * (n + 1) / 2), rtol=1e-6)
    assert not stats.overflow
    if "lse" in arrays:
        index = indexed(arrays["mask"], n)
        out, lse = attend(q, k, v, index, block_size=cfg.block_size, implementation=implementation)
        np.testing.assert_allclose(out, arrays["out"], rtol=0, atol=5e-6)
        np.testing.assert_allclose(lse, arrays["lse"], rtol=1e-6, atol=5e-6)
        assert lse.dtype == jnp.float32
        every = indexed(np.broadcast_to(np.tri(n, dtype=bool), arrays["mask"].shape), n)
        out, _ = attend(q, k, v, every, block_size=cfg.block_size, implementation=implementation)
        np.testing.assert_allclose(out, arrays["dense_out"], rtol=0, atol=5e-6)


# test_golden_outputs has the dense outputs too, where the golden data has lse.
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name", [*(pytest.param(f"v1{letter} strict", marks=pytest.mark.slow) for letter in "ab"), "v1f strict"]
)
def test_golden_dense_outputs(name, implementation):
    arrays, cfg = case_of(name)
    qkv = tuple(arrays[x] for x in "qkv")
    out, _ = dense(*qkv, block_size=cfg.block_size, implementation=implementation)
    np.testing.assert_allclose(out, arrays["dense_out"], rtol=0, atol=5e-6)
    everything = FlashPrefillConfig(alpha=0.0, block_size=cfg.block_size, sink_blocks=0, window_blocks=1)
    out, stats = run(*qkv, everything, implementation=implementation)
    np.testing.assert_allclose(out, arrays["dense_out"], rtol=0, atol=5e-6)
    assert stats.density == 1


# Kernels have the gradient of a dense model in test_pallas_tpu.py.
@pytest.mark.parametrize("implementation", ["reference", "xla", SLOW])
def test_golden_gradients(implementation):
    arrays, cfg = case_of("v1a strict")

    def loss(q, k, v):
        return jnp.sum(flash_prefill(q, k, v, cfg, implementation=implementation)[0] * arrays["do"])

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(arrays["q"], arrays["k"], arrays["v"])
    for gradient, name in zip(gradients, ("dq", "dk", "dv"), strict=True):
        expected = arrays[name]
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("variant", "implementation"),
    [
        ("strict", "xla"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("upstream", "xla"), ("strict", "reference"), ("strict", "interpret"))
        ),
    ],
)
def test_golden_variable_lengths(variant, implementation):
    arrays, cfg = case_of(f"v1h {variant}")
    ends = arrays["cu_seqlens"]
    lengths = np.diff(ends)
    room = -(-lengths.max() // cfg.block_size) * cfg.block_size
    pad = lambda x: np.pad(x, ((0, room - len(x)), (0, 0), (0, 0)), constant_values=np.nan)  # noqa: E731
    padded = [np.stack([pad(x) for x in np.split(arrays[name], ends[1:-1])]) for name in "qkv"]
    prefill = lambda q, k, v, length: flash_prefill(q, k, v, cfg, length=length, implementation=implementation)[0]  # noqa: E731
    out = jax.jit(jax.vmap(prefill))(*padded, lengths)
    np.testing.assert_allclose(
        np.concatenate([x[:length] for x, length in zip(out, lengths, strict=True)]), arrays["out"], rtol=0, atol=5e-6
    )
    assert all((x[length:] == 0).all() for x, length in zip(out, lengths, strict=True))
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(jax.vmap(prefill)(*x, lengths) ** 2), (0, 1, 2)))(*padded)
    assert all(np.isfinite(x).all() for x in gradients)


def test_sequences_side_by_side_are_each_alone():
    """Golden values between tokens of no sequence, which are NaN and reach nothing; the gradient is that of each."""
    arrays, cfg = case_of("v1h strict")
    around = ((3, 2), (0, 0), (0, 0))
    qkv = tuple(np.pad(arrays[x], around, constant_values=np.nan) for x in "qkv")
    ends = arrays["cu_seqlens"] + 3
    prefill = partial(flash_prefill_varlen, cfg=cfg, max_seqlen=129)

    def square(q, k, v, ends):
        out, stats = prefill(q, k, v, ends)
        return (out**2).sum(), (out, stats)

    gradients, (out, stats) = jax.jit(jax.grad(square, (0, 1, 2), has_aux=True))(*qkv, ends)
    np.testing.assert_allclose(out, np.pad(arrays["out"], around), rtol=0, atol=5e-6)
    assert stats.density.shape == (4,) and stats.overflow.tolist() == [False] * 4
    first, last = ends[1:3]  # 16 tokens
    alone = jax.jit(jax.grad(lambda *x: (flash_prefill(*x, cfg)[0] ** 2).sum(), (0, 1, 2)))
    for a, b in zip(gradients, alone(*(x[first:last] for x in qkv)), strict=True):
        np.testing.assert_allclose(a[first:last], b, rtol=1e-6, atol=1e-5)
        assert (a[:3] == 0).all() and (a[-2:] == 0).all()


def test_sequences_that_are_too_long_are_an_overflow():
    qkv = random_qkv(S=16)
    prefill = lambda ends: flash_prefill_varlen(*qkv, ends, SMALL, max_seqlen=8)  # noqa: E731
    out, stats = jax.jit(prefill)(jnp.array([0, 10, 16]))
    assert stats.overflow.tolist() == [True, False]
    assert (out[8:10] == 0).all() and (out[10:] != 0).all()
    with pytest.raises(ValueError, match=r"longest sequence of cu_seqlens must be in \[0, 8\], got 10"):
        prefill(jnp.array([0, 10, 16]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_windows_are_a_mask(implementation):
    q, k, v = random_qkv(S=60)
    window = partial(window_attention, sink_blocks=1, window_blocks=2, block_size=8, implementation=implementation)
    out, lse = jax.jit(window)(q, k, v)
    mask = np.broadcast_to(token_mask(window_mask(8, 1, 2), 8, 60), (4, 60, 60))
    expected, expected_lse = plain_attention(q, k, v, mask)
    np.testing.assert_allclose(out, expected, rtol=0, atol=5e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_keys(implementation):
    q, k, v = random_qkv()
    mask = np.zeros((4, 5, 5), bool)
    mask[1, 2, 1] = True
    index = indexed(mask, 5)

    def f(q, k, v):
        return attend(q, k, v, index, block_size=8, implementation=implementation)

    out, lse = f(q, k, v)
    some = np.zeros((40, 4), bool)
    some[16:24, 1] = True
    assert (np.asarray(lse) > -np.inf).tolist() == some.tolist()
    assert (np.asarray(out)[~some] == 0).all()
    np.testing.assert_allclose(lse[some], jax.nn.logsumexp(q[16:24, 1] @ k[8:16, 0].T / 8**0.5, -1), rtol=1e-5)
    loss = lambda *x: sum(jnp.where(some, y, 0).sum() for y in (f(*x)[0].sum(-1), f(*x)[1]))  # noqa: E731
    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(jnp.isfinite(x).all() for x in gradients)
    assert (np.asarray(gradients[0])[~some] == 0).all() and (gradients[0][16:24, 1] != 0).any()


# The correction is a second pass over what is corrected. Without it there are golden gradients.
@pytest.mark.parametrize("corrected", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, "xla"])
def test_gradients_are_finite_differences(implementation, corrected):
    with jax.enable_x64(True):
        q, k, v = random_qkv(seed=5, S=21, D=4, dtype=jnp.float64)
        cfg = FlashPrefillConfig(alpha=0.9, block_size=4, sink_blocks=1, window_blocks=1, last_full_blocks=0)
        mask = mask_of(q, k, cfg)
        index = indexed(mask, 6)
        assert 0.3 < mask.sum() / 84 < 0.9

        @jax.jit
        def f(q, k, v):
            means = dict(kbar=mean_pool(k, 4), vbar=mean_pool(v, 4)) if corrected else {}
            out, lse = attend(q, k, v, index, block_size=4, implementation=implementation, **means)
            return out, jnp.sin(lse)

        assert f(q, k, v)[0].dtype == jnp.float64
        check_grads(f, (q, k, v), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-5)


@functools.cache
def gradients(implementation, correction):
    q, k, v = random_qkv(seed=6, S=60)
    weights = np.random.default_rng(7).normal(size=q.shape).astype("float32")

    def loss(q, k, v):
        out, _ = flash_prefill(q, k, v, SMALL, correction=correction, implementation=implementation)
        return jnp.sum(weights * out)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)


# test_gradients_are_finite_differences has the correction's gradients in xla, test_pallas_tpu.py those of the kernels,
# also by masks, as the correction has them.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "correction"),
    [(implementation, correction) for implementation in ("xla", "interpret") for correction in (False, True)],
)
def test_implementations_have_one_gradient(implementation, correction):
    for a, b in zip(gradients(implementation, correction), gradients("reference", correction), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, "xla"])
def test_no_gradient_through_the_selection(implementation):
    """The gradient is that of attention under the selected mask, as if it were given."""
    q, k, v = random_qkv(seed=8)
    index = indexed(mask_of(q, k, SMALL), 5)
    how = dict(implementation=implementation)
    selected = jax.jit(jax.grad(lambda *x: (run(*x, SMALL, **how)[0] ** 2).sum(), (0, 1, 2)))(q, k, v)
    given = jax.jit(jax.grad(lambda *x: (attend(*x, index, block_size=8, **how)[0] ** 2).sum(), (0, 1, 2)))
    for a, b in zip(selected, given(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("correction", [False, True])
def test_later_blocks_never_matter(correction):
    """Changes from token 24 on, a block boundary, leave all outputs before it as they are, bit for bit."""
    first, second = random_qkv(seed=9), random_qkv(seed=10)
    mixed = tuple(np.concatenate([a[:24], b[24:]]) for a, b in zip(first, second, strict=True))
    a, b = (run(*x, SMALL, correction=correction)[0] for x in (first, mixed))
    np.testing.assert_array_equal(a[:24], b[:24])
    assert (a[24:] != b[24:]).all(axis=(1, 2)).all()


@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, "xla", SLOW])
def test_correction_is_exact_for_constant_blocks(implementation):
    q, k, v = random_qkv(seed=11, S=64)
    k, v = (np.repeat(x[::8], 8, axis=0) for x in (k, v))
    cfg = FlashPrefillConfig(alpha=1.0, block_size=8, sink_blocks=0, window_blocks=1, last_full_blocks=0)
    exact, exact_lse = plain_attention(q, k, v, np.tri(64, dtype=bool))
    sparse, stats = run(q, k, v, cfg, implementation=implementation)
    corrected, _ = run(q, k, v, cfg, correction=True, implementation=implementation)
    assert stats.density < 0.5
    assert np.abs(sparse - exact).max() > 0.1
    np.testing.assert_allclose(corrected, exact, rtol=0, atol=5e-6)
    index = indexed(np.broadcast_to(np.eye(8, dtype=bool), (4, 8, 8)), 1)
    means = dict(kbar=pooled(k, 8), vbar=pooled(v, 8))
    out, lse = attend(q, k, v, index, block_size=8, implementation=implementation, **means)
    np.testing.assert_allclose(out, exact, rtol=0, atol=5e-6)
    np.testing.assert_allclose(lse, exact_lse, rtol=0, atol=5e-6)


def test_overflow_is_reported_and_may_fall_back():
    q, k, v = random_qkv(seed=12)
    cfg = FlashPrefillConfig(alpha=0.8, block_size=8, sink_blocks=0, window_blocks=1, last_full_blocks=0)
    some, every = (9 * q, k, v), (0.01 * q, k, v)  # small queries score all blocks alike
    full, stats = run(*every, cfg)
    assert not stats.overflow and stats.density == 1
    cut, stats = run(*every, cfg, slots=3)
    assert stats.overflow and stats.density == 1
    np.testing.assert_allclose(cut[:24], full[:24], rtol=0, atol=1e-6)  # three blocks and fewer fit
    assert np.abs(np.subtract(cut, full))[24:].max() > 0.01
    saved, stats = run(*every, cfg, slots=3, dense_on_overflow=True)
    assert stats.overflow
    np.testing.assert_allclose(saved, full, rtol=0, atol=1e-6)
    few, stats = run(*some, cfg, slots=3, dense_on_overflow=True)
    assert not stats.overflow and stats.density < 1
    np.testing.assert_allclose(few, run(*some, cfg)[0], rtol=0, atol=1e-6)


def prefills(implementation):
    packed = PackedPrefillConfig(
        alpha=0.6, block_size=8, tile_rows=8, sink_blocks=1, window_blocks=1, last_full_tiles=0
    )
    return {
        "v1": lambda q, k, v: flash_prefill(q, k, v, SMALL, correction=True, implementation=implementation)[0],
        "v2": lambda q, k, v: flash_prefill_packed(q, k, v, packed, implementation=implementation)[0],
        "dense": lambda q, k, v: dense_attention(q, k, v, block_size=8, implementation=implementation)[0],
    }


def batch_of(B=2):
    each = [random_qkv(seed=20 + b, HQ=8, HK=4) for b in range(B)]
    return tuple(np.stack(x) for x in zip(*each, strict=True))


def gradients_and_out(prefill, q, k, v):
    def loss(q, k, v):
        out = prefill(q, k, v)
        return jnp.sum(out**2), out

    return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)


@functools.cache
def alone(implementation, version):
    """The program of a single prompt."""
    return compiled(partial(gradients_and_out, prefills(implementation)[version]))


# Other tests run v2 under jit and vmap, and over devices that share keys.
@pytest.mark.parametrize("version", ["v1", *(pytest.param(x, marks=pytest.mark.slow) for x in ("v2", "dense"))])
@pytest.mark.parametrize("implementation", ["xla", SLOW])
def test_jit_and_vmap_change_nothing(implementation, version):
    """Twice over, each key with each query: the gradients of what is shared add up."""
    prefill, (q, k, v) = prefills(implementation)[version], batch_of()
    one = alone(implementation, version)
    nested = jax.vmap(jax.vmap(prefill, in_axes=(0, None, None)), in_axes=(None, 0, 0))
    (dq, dk, dv), out = compiled(partial(gradients_and_out, nested))(q, k, v)
    each = [[one(q[b], k[a], v[a]) for b in range(2)] for a in range(2)]
    for a in range(2):
        by_key, by_query = each[a], [row[a] for row in each]
        for b in range(2):
            np.testing.assert_allclose(out[a, b], by_key[b][1], rtol=0, atol=2e-6)
        for i, x in ((1, dk), (2, dv)):
            np.testing.assert_allclose(x[a], sum(gradients[i] for gradients, _ in by_key), rtol=0, atol=1e-5)
        np.testing.assert_allclose(dq[a], sum(gradients[0] for gradients, _ in by_query), rtol=0, atol=1e-5)


# Below, v2 is on devices that share keys.
@pytest.mark.parametrize("version", ["v1", *(pytest.param(x, marks=pytest.mark.slow) for x in ("v2", "dense"))])
@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, "xla", SLOW])
def test_devices_change_nothing(implementation, version):
    """`shard_map` over batch and heads on 2 x 4 devices: of each prompt what it is alone."""
    qkv = batch_of()
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("batch", "heads"))
    spec = PartitionSpec("batch", None, "heads")
    # Pallas' interpreter does not say what varies over the mesh.
    sharded = partial(jax.shard_map, mesh=mesh, in_specs=(spec,) * 3, check_vma=implementation != "interpret")
    both = partial(gradients_and_out, jax.vmap(prefills(implementation)[version]))
    gradients, out = jax.jit(sharded(both, out_specs=((spec,) * 3, spec)))(*qkv)
    each = [alone(implementation, version)(*prompt) for prompt in zip(*qkv, strict=True)]
    expected, expected_out = (np.stack(x) for x in zip(*[g for g, _ in each], strict=True)), [out for _, out in each]
    np.testing.assert_allclose(out, expected_out, rtol=0, atol=2e-6)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def shared_keys(implementation, B=2, fall_back=True):
    """(prefills of batches by name, shapes of q, k, v): one key head; two of them may fall back to dense attention."""
    packed = PackedPrefillConfig(alpha=0.6, block_size=64, tile_rows=64, sink_blocks=1, window_blocks=1)
    small = FlashPrefillConfig(alpha=0.6, block_size=64, sink_blocks=1, window_blocks=1)
    how = dict(correction=True, slots=2, dense_on_overflow=fall_back, implementation=implementation)
    prefills = {
        "v1": lambda *qkv: flash_prefill(*qkv, small, **how)[0],
        "v2": lambda *qkv: flash_prefill_packed(*qkv, packed, **how)[0],
        "window": lambda *qkv: window_attention(*qkv, block_size=64, implementation=implementation)[0],
    }
    shapes = (B, 192, 4, 64), (B, 192, 1, 64), (B, 192, 1, 64)
    return {name: jax.vmap(f) for name, f in prefills.items()}, shapes


def gradients_over_heads(prefill, mesh):
    """Gradients by q, k, v of query heads that are spread over a mesh, keys and values that are not."""
    heads, everywhere = PartitionSpec(None, None, "heads"), PartitionSpec()
    gradient = lambda *x: jax.grad(lambda *x: jnp.sum(prefill(*x).astype("float32") ** 2), (0, 1, 2))(*x)  # noqa: E731
    specs = (heads, everywhere, everywhere)
    return gradient, jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs))


@pytest.mark.parametrize("fall_back", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_devices_may_share_keys(fall_back):
    """As few key heads as multi-query attention has lie on all devices, and their gradients add up."""
    prefills, shapes = shared_keys("xla", fall_back=fall_back)
    qkv = [np.random.default_rng(i).normal(size=shape).astype("float32") for i, shape in enumerate(shapes)]
    alone, sharded = gradients_over_heads(prefills["v2"], Mesh(np.array(jax.devices()[:2]), ("heads",)))
    for a, b in zip(sharded(*qkv), jax.jit(alone)(*qkv), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("version", "implementation"),
    [
        ("v2", "xla"),
        ("window", "xla"),
        # Every kernel is lowered inside shard_map in the file of its tests.
        pytest.param("v2", "pallas_tpu", marks=pytest.mark.slow),
        pytest.param("v1", "pallas_mgpu", marks=pytest.mark.slow),
    ],
)
def test_what_varies_over_devices_is_typed(version, implementation):
    """As above, only traced: types name the axes of the mesh that values vary over, kernels' results too."""
    prefills, shapes = shared_keys(implementation)
    qkv = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes]
    mesh = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    gradients = jax.eval_shape(gradients_over_heads(prefills[version], mesh)[1], *qkv)
    assert [x.shape for x in gradients] == list(shapes)


def test_the_correction_is_a_kernel():
    """A second pass of the same kernels, over the mean keys: one more forward, two more backward."""
    q, k = (jax.ShapeDtypeStruct((1024, heads, 128), "bfloat16") for heads in (4, 2))

    def kernels(correction):
        cfg = PackedPrefillConfig(alpha=0.1)
        how = dict(correction=correction, implementation="pallas_tpu")
        f = lambda *qkv: flash_prefill_packed(*qkv, cfg, **how)[0].astype("float32").sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, k, k)).count("= pallas_call")

    assert kernels(True) == kernels(False) + 3


@partial(jax.jit, static_argnums=3)
@partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
def gradients_of_dense(q, k, v, implementation):
    out, lse = dense_attention(q, k, v, block_size=16, implementation=implementation)
    return jnp.sum(out.astype(jnp.float32) ** 2), (out, lse)


@pytest.mark.parametrize("implementation", [SLOW_REFERENCE, "xla", SLOW])
def test_bfloat16_accumulates_in_float32(implementation):
    narrow = random_qkv(seed=30, S=128, D=16, dtype=jnp.bfloat16)
    cfg = FlashPrefillConfig(alpha=0.9, block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=0)
    wide = q, k, v = tuple(x.astype(jnp.float32) for x in narrow)
    gradients, (out, lse) = gradients_of_dense(*narrow, implementation)
    expected_gradients, (expected, expected_lse) = gradients_of_dense(*wide, "reference")
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-4)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=0.02)
    out, _ = run(*narrow, cfg, correction=True, implementation=implementation)
    # The definition in float32, on what the bfloat16 scores have selected.
    mask = mask_of(narrow[0], k, cfg)
    means = dict(kbar=pooled(k, 16), vbar=pooled(v, 16))
    expected, _ = attend(q, k, v, indexed(mask, 8), block_size=16, implementation="reference", **means)
    assert out.dtype == jnp.bfloat16 and (mask != dense_mask(8)).any()
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0, atol=0.02)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=0.02 * float(jnp.abs(b).max()))


def test_memory_follows_the_lists_not_the_square():
    S, cfg = 4096, FlashPrefillConfig(alpha=0.1, block_size=64)
    shape = jax.ShapeDtypeStruct((S, 2, 16), "float32")

    def temporary(implementation):
        f = lambda q, k, v: jnp.sum(flash_prefill(q, k, v, cfg, correction=True, implementation=implementation)[0])  # noqa: E731
        program = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        return program.memory_analysis().temp_size_in_bytes

    square = 4 * 2 * S * S
    assert temporary("xla") < square / 4 < square < temporary("reference")


def test_traced_length_is_a_shorter_prompt():
    q, k, v = random_qkv(seed=40)
    for length in (29, 3, 0):
        out, stats = run(q, k, v, SMALL, length=length, correction=True)
        assert (out[length:] == 0).all()
        if length:
            prompt = tuple(x[:length] for x in (q, k, v))
            if length > 8:
                short, expected = run(*prompt, SMALL, correction=True)
                density = expected.density
            else:  # one block
                (short, _), density = plain_attention(*prompt, np.tri(length, dtype=bool)), 1
            np.testing.assert_allclose(out[:length], short, rtol=0, atol=2e-6)
            np.testing.assert_allclose(stats.density, density, rtol=1e-6)


def test_explain_names_the_implementation(capsys):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in random_qkv()]
    jax.eval_shape(partial(flash_prefill, cfg=SMALL, implementation="xla", explain=True), *shapes)
    jax.eval_shape(partial(dense_attention, block_size=8, explain=True), *shapes)
    assert capsys.readouterr().out.splitlines()[0].startswith("flash_prefill: xla")
    by_row = dataclasses.replace(SMALL, row_normalised=True)
    call = partial(flash_prefill, cfg=by_row, correction=True, implementation="pallas_tpu", explain=True)
    jax.eval_shape(call, *shapes)
    assert capsys.readouterr().out == ("flash_prefill: pallas_tpu (as asked), xla for row-normalised energies\n")
    energy = partial(block_energy, cfg=by_row, implementation="interpret", explain=True)
    jax.eval_shape(energy, shapes[0], jax.ShapeDtypeStruct((5, 2, 8), "float32"))
    assert capsys.readouterr().out == "block_energy: xla (row-normalised energies have no kernel)\n"


Q, K = jnp.zeros((32, 4, 8)), jnp.zeros((32, 2, 8))
INDEX = compact_index(jnp.broadcast_to(dense_mask(4), (4, 4, 4)), 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: flash_prefill(Q, jnp.zeros((32, 3, 8)), jnp.zeros((32, 3, 8)), SMALL),
            "multiple of key heads, got 4 and 3",
        ),
        (lambda: flash_prefill(Q, jnp.zeros((32, 2, 4)), jnp.zeros((32, 2, 4)), SMALL), "one width, got 8 and 4"),
        (lambda: flash_prefill(Q, K, K[:, :1], SMALL), "k and v must have one shape"),
        (lambda: flash_prefill(Q, K[:16], K[:16], SMALL), "as many tokens, got 32 and 16"),
        (lambda: flash_prefill(Q[None], K[None], K[None], SMALL), r"q must be \[tokens, heads, width\]"),
        (lambda: flash_prefill(Q.astype(int), K, K, SMALL), "q must be floating point, got int"),
        (lambda: flash_prefill(Q, K, K, SMALL, slots=5), r"slots must be in \[1, 4\].* got 5"),
        (lambda: flash_prefill(Q, K, K, SMALL, length=33), r"length must be in \[0, 32\], got 33"),
        (lambda: flash_prefill(Q, K, K, SMALL, length=20.0), "length must be an integer, got 20.0"),
        (lambda: flash_prefill(Q, K, K, SMALL, length=jnp.array([8, 9])), r"length must be one number.* shape \(2,\)"),
        (
            lambda: jax.jit(lambda scale: flash_prefill(Q, K, K, SMALL, scale=scale))(0.5),
            r"scale must be static, got a traced float32\[\]",
        ),
        (lambda: flash_prefill(Q, K, K, SMALL, scale=np.ones(2)), r"scale must be positive, got \[1. 1.\]"),
        (
            lambda: flash_prefill_varlen(Q, K, K, jnp.zeros(3), SMALL, max_seqlen=8),
            r"cu_seqlens must be integers \[B \+ 1\], got float32\[3\]",
        ),
        (
            lambda: flash_prefill_varlen(Q, K, K, jnp.array([0, 33]), SMALL, max_seqlen=8),
            r"cu_seqlens\[-1\] must be in \[0, 32\], got 33",
        ),
        (lambda: flash_prefill(Q, K, K, SMALL, implementation="fast"), "implementation must be one of .* got 'fast'"),
        (lambda: flash_prefill(Q, K, K, SMALL, scale=-1.0), "scale must be positive, got -1.0"),
        (lambda: block_sparse_attention(Q, K, K, INDEX, block_size=16), r"index must be \[4, 2, slots\]"),
        (lambda: block_sparse_attention(Q, K, K, INDEX, block_size=12), "block_size must be a power of two, got 12"),
        (
            lambda: block_sparse_attention(Q, K, K, INDEX, block_size=8, kbar=K[:4]),
            "kbar and vbar must be given together",
        ),
        (
            lambda: block_sparse_attention(Q, K, K, INDEX, block_size=8, kbar=K[:3], vbar=K[:3]),
            r"kbar must be \(4, 2, 8\), got \(3, 2, 8\)",
        ),
        (lambda: dense_attention(Q, K, K, block_size=0), "block_size must be a power of two, got 0"),
        (lambda: window_attention(Q, K, K, window_blocks=0), "window_blocks must be at least 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
