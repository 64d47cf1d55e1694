"""Decode attention against its definition: lengths, masks, windows, gradients, parts, and lowering for every device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh
from jax.test_util import check_grads

from rollax.kernels.decode_attention import api, decode_attention, xla
from rollax.tests.support import compiled

B, K, G, D, S = 4, 2, 3, 16, 96
SLOW = pytest.param("interpret", marks=pytest.mark.slow)
LENGTHS = jnp.array([37, 0, 96, 1])
TPUS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")


def arrays(slots=S, dtype="float32", batch=B, width=D):
    draw = np.random.default_rng(0)  # NumPy has no program to compile for every shape
    shapes = ((batch, K * G, width), (batch, K, slots, width), (batch, K, slots, width))
    return tuple(jnp.asarray(draw.normal(size=shape).astype(dtype)) for shape in shapes)


def definition(q, k, v, visible):
    """float64, one row and head at a time."""
    q, k, v, visible = (
        np.asarray(x).astype(t) for x, t in zip((q, k, v, visible), (*["float64"] * 3, bool), strict=True)
    )
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for b, h in np.ndindex(q.shape[:2]):
        keys, values = k[b, h // G][visible[b]], v[b, h // G][visible[b]]
        if len(keys):
            scores = keys @ q[b, h] / np.sqrt(q.shape[-1])
            lse[b, h] = np.log(np.exp(scores).sum())
            out[b, h] = np.exp(scores - lse[b, h]) @ values
    return out, lse


def loss(q, k, v, length, **how):
    out, lse = decode_attention(q, k, v, length, return_lse=True, **how)
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return jnp.sum(weights * out) + jnp.sum(jnp.where(lse > -jnp.inf, jnp.sin(lse), 0)), (out, lse)


def value_and_grad(**how):
    return jax.jit(jax.value_and_grad(lambda *args: loss(*args, **how), argnums=(0, 1, 2), has_aux=True))


def assert_same(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert not np.isnan(a).any()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# The kernel is compared with the definition under race detection, and with the reference in all its gradients.
@pytest.mark.parametrize("implementation", ["reference", "xla", SLOW])
def test_every_implementation_is_the_definition(implementation):
    q, k, v = arrays()
    run = jax.jit(partial(decode_attention, return_lse=True, implementation=implementation))
    out = run(q, k, v, LENGTHS)
    assert_same(out, definition(q, k, v, jnp.arange(S) < LENGTHS[:, None]), 2e-6)
    assert out[0].dtype == out[1].dtype == jnp.float32


@pytest.mark.parametrize(("implementation", "slots"), [("xla", 77), ("interpret", 96)])
def test_gradients_equal_those_of_the_reference(implementation, slots):
    args = (*arrays(slots), jnp.minimum(LENGTHS, slots))
    actual, expected = (value_and_grad(implementation=name)(*args) for name in (implementation, "reference"))
    assert_same(actual, expected, 5e-6)


def test_gradients_are_finite_differences():
    with jax.enable_x64(True):
        args = [jnp.asarray(np.asarray(x), "float64") for x in arrays(12, batch=3, width=4)]
        for implementation in ("reference", "xla"):
            f = jax.jit(lambda *args: loss(*args, jnp.array([12, 0, 5]), implementation=implementation)[0])  # noqa: B023
            assert f(*args).dtype == jnp.float64
            check_grads(f, args, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("slots", "masked"), [(1, True), (700, True), pytest.param(255, False, marks=pytest.mark.slow)]
)
def test_blocks_equal_the_whole(slots, masked):
    q, k, v = arrays(slots)
    length = jnp.array([slots, 0, (slots + 1) // 2, 1])
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (B, slots)) if masked else None
    run = jax.jit(lambda form, *args: form(*args, mask, 0.3), static_argnums=0)
    assert_same(run(xla.by_blocks, q, k, v, length), run(xla.whole, q, k, v, length), 2e-6)


def test_small_caches_are_taken_whole_once_they_are_half_full(monkeypatch):
    args = arrays()
    chosen = lambda length: jax.jit(xla.on_cpu, static_argnums=5)(*args, length, None, 1.0)  # noqa: E731
    monkeypatch.setattr(xla, "whole", lambda q, *_, scale: (q, jnp.ones(q.shape[:2])))
    monkeypatch.setattr(xla, "by_blocks", lambda q, *_, scale: (q, jnp.zeros(q.shape[:2])))
    assert chosen(jnp.full(B, S // 2))[1].max() == 0
    assert chosen(jnp.full(B, S // 2 + 1))[1].min() == 1


def test_nothing_beyond_the_length_counts():
    q, k, v = arrays()
    beyond = (jnp.arange(S) >= LENGTHS[:, None])[:, None, :, None]
    other = [jnp.where(beyond, 1e4, x) for x in (k, v)]
    for implementation in ("reference", "xla", "interpret"):
        run = value_and_grad(implementation=implementation)
        assert_same(run(q, *other, LENGTHS)[0], run(q, k, v, LENGTHS)[0], 1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", SLOW])  # whose masks are in the parts of a long cache
def test_masks_hide_keys(implementation):
    slots = 256 if implementation == "interpret" else S  # whose blocks are at least 128 long
    q, k, v = arrays(slots)
    lengths = LENGTHS * slots // S
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (B, slots)).at[0].set(False)
    (_, out), gradients = value_and_grad(mask=mask, implementation=implementation)(q, k, v, lengths)
    assert_same(out, definition(q, k, v, mask & (jnp.arange(slots) < lengths[:, None])), 2e-6)
    _, expected = value_and_grad(mask=mask, implementation="reference")(q, k, v, lengths)
    assert_same(gradients, expected, 5e-6)


@pytest.mark.parametrize(
    ("implementation", "window"), [("reference", 32), ("xla", 32), ("xla", 200), ("interpret", 32)]
)
def test_windows_see_the_last_keys(implementation, window):
    q, k, v = arrays()
    visible = (jnp.arange(S) < LENGTHS[:, None]) & (jnp.arange(S) >= LENGTHS[:, None] - window)
    run = value_and_grad(window=window, implementation=implementation)
    (_, actual), gradients = run(q, k, v, LENGTHS)
    assert_same(actual, definition(q, k, v, visible), 2e-6)
    masked = jax.jit(jax.grad(lambda *x: loss(*x, LENGTHS, mask=visible, implementation="reference")[0], (0, 1, 2)))
    assert_same(gradients, masked(q, k, v), 5e-6)


def test_windows_and_masks_together():
    q, k, v = arrays()
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (B, S))
    visible = mask & (jnp.arange(S) < LENGTHS[:, None]) & (jnp.arange(S) >= LENGTHS[:, None] - 20)
    out = jax.jit(partial(decode_attention, window=20, return_lse=True))(q, k, v, LENGTHS, mask=mask)
    assert_same(out, definition(q, k, v, visible), 2e-6)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_parts_of_a_long_cache_are_merged(masked, monkeypatch):
    slots = 512 if masked else 128
    args = (*arrays(slots), jnp.array([37, 0, 128, 64]) * slots // 128)
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (B, slots)) if masked else None
    expected = value_and_grad(mask=mask, implementation="reference")(*args)
    monkeypatch.setattr(api, "PART", slots // 4)
    monkeypatch.setitem(api.PROGRAMS, "interpret", 4 * B * K)
    assert api.parts_of(slots, B * K, 4 * B * K) == 4
    assert_same(value_and_grad(mask=mask, implementation="interpret")(*args), expected, 5e-6)


def test_results_over_parts_merge_by_their_normalisers():
    q, k, v = arrays()
    run = compiled(partial(decode_attention, return_lse=True))
    whole, total = run(q, k, v, LENGTHS)
    parts = [run(q, *(np.asarray(x)[:, :, i : i + 48] for x in (k, v)), np.asarray(LENGTHS) - i) for i in (0, 48)]
    weights = [np.exp(lse - np.where(total > -np.inf, total, 0))[..., None] for _, lse in parts]
    assert_same(sum(w * out for w, (out, _) in zip(weights, parts, strict=True)), whole, 2e-6)


@pytest.mark.parametrize("implementation", ["xla", SLOW])
def test_vmap_is_a_loop(implementation):
    q, k, v = (jnp.stack([x, -0.5 * x]) for x in arrays())
    lengths = jnp.stack([LENGTHS, LENGTHS[::-1]])
    run = value_and_grad(implementation=implementation)
    together = jax.jit(jax.vmap(run))(q, k, v, lengths)
    shared = jax.jit(jax.vmap(run, in_axes=(0, None, None, None)))(q, k[0], v[0], LENGTHS)
    for i in range(2):
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), run(q[i], k[i], v[i], lengths[i]), 1e-6)
        assert_same(jax.tree.map(lambda x, i=i: x[i], shared), run(q[i], k[0], v[0], LENGTHS), 1e-6)


@pytest.mark.parametrize("implementation", ["xla", SLOW])
def test_shard_map_over_batch_and_heads(implementation):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    args = (*arrays(), LENGTHS)
    specs = (*[PartitionSpec("data", "model")] * 3, PartitionSpec("data"))
    run = lambda *args: decode_attention(*args, implementation=implementation)  # noqa: E731
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=implementation != "interpret")
    gradient = lambda f: jax.jit(jax.grad(lambda *args: jnp.sum(jnp.sin(3 * f(*args))), (0, 1, 2)))  # noqa: E731
    assert_same(jax.jit(sharded)(*args), run(*args), 1e-6)
    assert_same(gradient(sharded)(*args), gradient(run)(*args), 1e-6)


@pytest.mark.parametrize("implementation", ["xla", SLOW])
def test_bfloat16_accumulates_in_float32(implementation):
    q, k, v = arrays(dtype="bfloat16")
    (_, (out, lse)), gradients = value_and_grad(implementation=implementation)(q, k, v, LENGTHS)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    exact_out, exact_lse = definition(q, k, v, jnp.arange(S) < LENGTHS[:, None])
    assert_same(lse, exact_lse, 1e-5)  # products of bfloat16 numbers are exact in float32
    assert_same(out, exact_out, 1e-2)
    (_, _), expected = value_and_grad(implementation="reference")(*(x.astype("float32") for x in (q, k, v)), LENGTHS)
    assert all(x.dtype == jnp.bfloat16 for x in gradients)
    assert_same(gradients, expected, 2e-2)


def test_the_tpu_interpreter_finds_no_race():
    from jax.experimental.pallas import tpu as pltpu

    q, k, v = arrays(32, batch=2)
    params = pltpu.InterpretParams(detect_races=True, random_seed=3, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        actual = jax.jit(lambda *args: decode_attention(*args, implementation="pallas_tpu"))(q, k, v, LENGTHS[:2])
    assert_same(actual, definition(q, k, v, jnp.arange(32) < LENGTHS[:2, None])[0], 2e-6)


# Of TPUs all but the oldest are slow. What is lowered backward has the forward pass in it.
@pytest.mark.parametrize("step", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
@pytest.mark.parametrize(
    "kind",
    [*(pytest.param(x, marks=[pytest.mark.slow] * (x != TPUS[0])) for x in TPUS), "NVIDIA H100 80GB HBM3"],
)
def test_lowers_for_every_accelerator(kind, step):
    gpu = kind.startswith("NVIDIA")
    platform, implementation = ("gpu", "pallas_mgpu") if gpu else ("tpu", "pallas_tpu")
    shapes = [jax.ShapeDtypeStruct(s, "bfloat16") for s in ((2, 8, 128), (2, 2, 4096, 128), (2, 2, 4096, 128))]
    length, mask = jax.ShapeDtypeStruct((2,), "int32"), jax.ShapeDtypeStruct((2, 4096), "bool")

    def run(*args):
        *args, mask = args
        how = dict(implementation=implementation)
        both = decode_attention(*args, **how) + decode_attention(*args, mask=mask, **how)
        return both.astype("float32").sum()

    device = AbstractDevice(device_kind=kind, num_cores=132 if gpu else 1, platform=platform)
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(run if step == "forward" else jax.grad(run, (0, 1, 2))).trace(*shapes, length, mask)
        text = traced.lower(lowering_platforms=("cuda" if gpu else "tpu",)).as_text()
    assert text.count("@mosaic_gpu" if gpu else "@tpu_custom_call") >= (2 if step == "forward" else 6)


@pytest.mark.parametrize(("batch", "slots"), [(0, S), (B, 0)])
def test_empty_arrays_see_no_key(batch, slots):
    out, lse = decode_attention(*arrays(slots, "bfloat16", batch), 1, return_lse=True)
    assert (out.shape, out.dtype, lse.dtype) == ((batch, K * G, D), jnp.bfloat16, jnp.float32)
    assert (out == 0).all() and (lse == -jnp.inf).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_keep_their_bits_on_devices(dtype):
    program = str(jax.make_jaxpr(lambda *args: xla.whole(*args, LENGTHS, None, 0.3))(*arrays(dtype=dtype)))
    assert ("HIGHEST" in program) == (dtype == "float32") and "DEFAULT" not in program


def test_explain_says_what_runs(capsys):
    decode_attention(*arrays(), LENGTHS, explain=True)
    assert capsys.readouterr().out.startswith("decode_attention: xla")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((B, D))}, r"q must be \[B, H, d\], got \(4, 16\)"),
        ({"v": jnp.zeros((B, K, S + 1, D))}, r"k and v must be one \[4, K, S, 16\]"),
        ({"q": jnp.zeros((B, 5, D))}, "q's heads must be a multiple of k's, got 5 and 2"),
        ({"q": jnp.zeros((B, K * G, D), int)}, "q, k and v must be floating point, got int32"),
        ({"length": jnp.zeros((B, 1), int)}, r"length must be an integer or integers \[4\], got int32\[4, 1\]"),
        ({"length": jnp.zeros(B)}, r"length must be an integer or integers \[4\], got float32\[4\]"),
        ({"mask": jnp.ones((B, S))}, r"mask must be bool \[4, 96\], got float32\[4, 96\]"),
        ({"scale": -1.0}, "scale must be positive, got -1.0"),
        ({"k": jnp.zeros((B, 0, S, D)), "v": jnp.zeros((B, 0, S, D))}, "multiple of k's, got 6 and 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"implementation": "fast"}, "implementation must be one of .* got 'fast'"),
        (
            {"implementation": "interpret", "mask": jnp.ones((B, S), bool)},
            "a multiple of 128 slots under a mask, got 96",
        ),
        ({"implementation": "interpret", "window": 33}, "a multiple of 16 slots, got 33"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(zip("qkv", arrays(), strict=True)) | {"length": LENGTHS} | change
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)
