"""The TPU kernels against a dense model in float64 NumPy: interpreted, raced, lowered for every TPU generation.

By default for v4 and, inside `shard_map`, v5e, the others with the slow tests.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, PartitionSpec, use_abstract_mesh

from rollax.kernels.flash_prefill import pallas_tpu, pallas_tpu_walk

KINDS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")


class Case(NamedTuple):
    """Query heads, key heads, queries and keys a head, head width, rows of a tile, keys of a block, rows a position."""

    H: int
    HK: int
    queries: int
    keys: int
    D: int
    tile: int
    block: int
    group: int
    offset: tuple
    length: tuple
    slots: int

    @property
    def rows(self):
        return -(-self.queries * self.group // self.tile) * self.tile

    @property
    def sizes(self):
        return dict(tile=self.tile, block=self.block, group=self.group)


CASES = {
    "heads_share_keys": Case(4, 2, 64, 64, 16, 16, 16, 1, (0, 0, 0, 0), (64, 64, 53, 64), 4),
    "packed_chunk": Case(2, 2, 20, 64, 16, 16, 8, 4, (30, 0), (50, 20), 7),
    "odd_group": Case(2, 1, 11, 40, 64, 16, 8, 3, (20, 29), (31, 0), 5),
    "one_tile": Case(1, 1, 8, 16, 16, 8, 16, 1, (5,), (13,), 1),
}


@pytest.fixture(autouse=True)
def several_steps_a_row(monkeypatch, request):
    if "lowers" not in request.node.name:
        monkeypatch.setattr(pallas_tpu_walk, "STEP_LENGTH", 32)


def pack(mask, slots):
    """Ascending ids and counts of a boolean `[..., n]`; unused slots repeat the last id."""
    rows = mask.reshape(-1, mask.shape[-1])
    ids = [np.flatnonzero(row) for row in rows]
    index = [np.pad(i, (0, slots - i.size), "edge") if i.size else np.zeros(slots, int) for i in ids]
    count = [i.size for i in ids]
    return (
        np.array(index, np.int32).reshape(*mask.shape[:-1], slots),
        np.array(count, np.int32).reshape(mask.shape[:-1]),
    )


def make(case: Case, seed=0, dtype=jnp.float32):
    """(q, k, v, d_out, d_lse, mask `[H, tiles, blocks]`, (index, count, index_t, count_t), offset, length)."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    tiles, blocks = case.rows // case.tile, case.keys // case.block
    q, k = normal(case.H, case.rows, case.D), normal(case.HK, case.keys, case.D)
    v, d_out = normal(case.HK, case.keys, case.D), normal(case.H, case.rows, case.D)
    d_lse = jnp.asarray(rng.normal(size=(case.H, case.rows)), jnp.float32)
    last = positions(case)[:, case.tile - 1 :: case.tile]
    mask = (rng.random((case.H, tiles, blocks)) < 0.7) & (np.arange(blocks) * case.block <= last[..., None])
    mask[:, -1] = True  # blocks of the future too: masks must hide them
    if tiles > 1:
        mask[0, 1] = False  # a list without blocks
    mask &= np.cumsum(mask, -1) <= case.slots
    lists = (*pack(mask, case.slots), *pack(np.swapaxes(mask, 1, 2), tiles))
    return q, k, v, d_out, d_lse, mask, lists, jnp.array(case.offset), jnp.array(case.length)


def positions(case: Case):
    return np.asarray(case.offset)[:, None] + np.arange(case.rows) // case.group


def dense(case: Case, q, k, v, d_out, d_lse, mask, scale, by_tile=None):
    """(out, lse, dq, dk, dv) in float64 from the textbook formulas, all scores at once.

    by_tile: None, or the keys that a tile sees in the place of positions.
    """
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    repeat = case.H // case.HK
    k, v = np.repeat(k, repeat, 0), np.repeat(v, repeat, 0)
    seen = np.repeat(np.repeat(mask, case.tile, 1), case.block, 2)
    t = np.arange(case.keys)
    if by_tile is None:
        seen &= (t <= positions(case)[..., None]) & (t < np.asarray(case.length)[:, None, None])
    else:
        seen &= np.repeat(by_tile, case.tile, 1)
    x = np.einsum("hrd,htd->hrt", q, k) * scale
    top = np.max(np.where(seen, x, -np.inf), -1, keepdims=True, initial=-1e300)
    p = np.where(seen, np.exp(np.where(seen, x - top, 0)), 0)
    total = p.sum(-1, keepdims=True)
    some = total > 0
    p = p / np.where(some, total, 1)
    lse = np.where(some, top + np.log(np.where(some, total, 1)), -np.inf)[..., 0]
    out = p @ v
    ds = p * (d_out @ np.swapaxes(v, 1, 2) - (d_out * out).sum(-1, keepdims=True) + d_lse[..., None])
    fold = lambda x: x.reshape(case.HK, repeat, *x.shape[1:]).sum(1)  # noqa: E731
    dk, dv = fold(np.swapaxes(ds, 1, 2) @ q) * scale, fold(np.swapaxes(p, 1, 2) @ d_out)
    return out, lse, ds @ k * scale, dk, dv


def run(case: Case, inputs, scale, interpret, by_tile=None):
    q, k, v, d_out, d_lse, _, (index, count, index_t, count_t), offset, length = inputs

    @jax.jit
    def both(q, k, v, d_out, d_lse, index, count, index_t, count_t, *ends):
        static = dict(**case.sizes, scale=scale, interpret=interpret)
        out, lse = pallas_tpu.forward(q, k, v, index, count, *ends, **static)
        saved = (q, k, v, out, lse, d_out, d_lse, index, count, index_t, count_t, *ends)
        return out, lse, *pallas_tpu.backward(*saved, **static)

    return both(q, k, v, d_out, d_lse, index, count, index_t, count_t, offset, length, by_tile)


def check(results, expected, tolerance):
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        got = np.asarray(got.astype(jnp.float32))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=name)


def dense_energy(case: Case, q, kbar, scale, rule):
    """(sum, max) of `energy` in float64, row by row."""
    q, kbar = np.asarray(q, np.float64), np.repeat(np.asarray(kbar, np.float64), case.H // case.HK, 0)
    at, length, first = positions(case), np.asarray(case.length), np.arange(kbar.shape[1]) * case.block
    counts = at < length[:, None]
    if rule == "last":
        seen = counts[..., None] & (at[..., None] >= first + case.block - 1)
    else:
        seen = counts[..., None] & (at[..., None] >= first)
        for h, t in np.ndindex(case.H, case.rows // case.tile):
            mine = slice(t * case.tile, (t + 1) * case.tile)
            inside = at[h, mine][counts[h, mine]]
            active = (inside[-1] + 1) // case.block if inside.size else 0
            seen[h, mine, active:] = False
    x = np.einsum("hrd,hjd->hrj", q, kbar) * scale / np.log(2)
    x, seen = (y.reshape(case.H, -1, case.tile, x.shape[-1]) for y in (x, seen))
    top = np.where(seen, x, -np.inf).max(2)
    total = np.where(seen, np.exp2(x - np.where(np.isfinite(top), top, 0)[:, :, None]), 0).sum(2)
    return total, top


# The race detector runs others.
@pytest.mark.parametrize("name", ["odd_group", pytest.param("one_tile", marks=pytest.mark.slow)])
def test_forward_and_backward_equal_dense(name):
    inputs = make(CASES[name])
    check(run(CASES[name], inputs, 0.3, True), dense(CASES[name], *inputs[:6], 0.3), 5e-6)


@pytest.mark.parametrize(("width", "tile", "smem"), [pytest.param(1, 8, 2**19, marks=pytest.mark.slow), (2, 16, 150)])
def test_masks_by_tiles(width, tile, smem, monkeypatch):
    """What the mean correction needs; lists end inside a step of several blocks, and are split over calls."""
    monkeypatch.setattr(pallas_tpu_walk, "STEP_LENGTH", 128 * width)
    monkeypatch.setattr(pallas_tpu_walk, "SMEM_BYTES", smem)
    case = Case(4, 2, 2 * tile, 384, 16, tile, 128, 1, (0,) * 4, (0,) * 4, 3)
    inputs, rng = make(case._replace(offset=(384,) * 4)), np.random.default_rng(1)
    by_tile = rng.random((case.H, 2, case.keys)) < 0.3
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", random_seed=0)
    results = run(case, inputs, 0.3, interpret, jnp.asarray(by_tile))
    check(results, dense(case, *inputs[:6], 0.3, by_tile), 5e-6)


def test_bfloat16(monkeypatch):
    monkeypatch.setattr(pallas_tpu_walk, "STEP_LENGTH", 16)  # two blocks a step: quicker to compile than four
    case = CASES["packed_chunk"]
    inputs = make(case, dtype=jnp.bfloat16)
    results = run(case, inputs, 0.3, True)
    assert [x.dtype.name for x in results] == ["bfloat16", "float32"] + ["bfloat16"] * 3
    expected = dense(case, *inputs[:6], 0.3)
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        got, seen = np.asarray(got, np.float64), np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got), seen)
        error = np.linalg.norm(got[seen] - want[seen]) / np.linalg.norm(want[seen])
        assert error < 1e-2, (name, error)


# By default test_masks_by_tiles detects races, in the same walk.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_no_races_and_no_dependence_on_the_order_of_parallel_steps(seed):
    case = CASES[("packed_chunk", "heads_share_keys")[seed - 1]]
    inputs = make(case, seed)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", random_seed=seed)
    check(run(case, inputs, 0.3, interpret), dense(case, *inputs[:6], 0.3), 5e-6)


@pytest.mark.slow  # test_masks_by_tiles splits lists over calls, against the dense model
def test_lists_split_over_calls_give_identical_results(monkeypatch):
    case = CASES["heads_share_keys"]._replace(H=2, HK=1, offset=(0, 0), length=(64, 53))
    inputs = make(case)
    whole = run(case, inputs, 0.3, True)
    # Three query tiles a call, of eight; one key block a call in the backward pass, of four, with its two heads.
    monkeypatch.setattr(pallas_tpu_walk, "SMEM_BYTES", 3 * pallas_tpu_walk.row_bytes(4, 2, jnp.int16))
    split = run(case, inputs, 0.3, True)
    jax.tree.map(np.testing.assert_array_equal, whole, split)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("packed_chunk", "first"),
        ("odd_group", "first"),
        ("heads_share_keys", "last"),
        *(pytest.param(name, "last", marks=pytest.mark.slow) for name in ("packed_chunk", "odd_group")),
        pytest.param("heads_share_keys", "first", marks=pytest.mark.slow),
    ],
)
def test_energy_equals_dense(name, rule):
    case = CASES[name]
    q, k, *_, offset, length = make(case)
    kbar = k.reshape(case.HK, -1, case.block, case.D).mean(2)
    valid = positions(case) < np.asarray(case.length)[:, None]
    q = jnp.where(valid[..., None], q, jnp.nan)  # what stands in the padding must not matter
    energy = jax.jit(partial(pallas_tpu.energy, **case.sizes, scale=0.3, rule=rule, interpret=True))
    for got, want in zip(energy(q, kbar, offset, length), dense_energy(case, q, kbar, 0.3, rule), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_energy_in_chunks_of_tiles_and_blocks(monkeypatch):
    """More tiles and blocks than a step takes, neither a multiple; zero queries have the analytic energy."""
    monkeypatch.setattr(pallas_tpu, "ENERGY_TILES", 2)
    monkeypatch.setattr(pallas_tpu, "ENERGY_BLOCKS", 2)
    case = Case(1, 1, 40, 40, 16, 8, 8, 1, (0,), (40,), 5)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", random_seed=0)
    q, k, *_, offset, length = make(case)
    kbar = k.reshape(1, 5, 8, 16).mean(2)
    energy = partial(pallas_tpu.energy, **case.sizes, scale=0.3, rule="last", interpret=interpret)
    for got, want in zip(energy(q, kbar, offset, length), dense_energy(case, q, kbar, 0.3, "last"), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    total, top = energy(jnp.zeros_like(q), kbar, offset, length)
    np.testing.assert_array_equal(total[0], 8 * np.tri(5, k=-1) + np.eye(5))
    np.testing.assert_array_equal(top[0], np.where(np.tri(5) > 0, 0, -np.inf))


@pytest.mark.slow  # all kernels are lowered inside shard_map below, and run in it with xla in test_attention.py
def test_inside_shard_map_over_heads():
    case, scale = CASES["heads_share_keys"], 0.3
    inputs = make(case)
    mesh = Mesh(np.array(jax.devices()[:2]), ("heads",))
    heads = PartitionSpec("heads")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=heads, out_specs=heads, check_vma=False)  # the interpreter lacks it
    def forward(q, k, v, index, count, offset, length):
        return pallas_tpu.forward(q, k, v, index, count, offset, length, **case.sizes, scale=scale, interpret=True)

    q, k, v, _, _, _, (index, count, _, _), offset, length = inputs
    expected = dense(case, *inputs[:6], scale)
    for got, want in zip(forward(q, k, v, index, count, offset, length), expected[:2], strict=True):
        np.testing.assert_allclose(got, want, rtol=5e-6, atol=5e-6)


def real_calls():
    """Name, function and argument types of the kernels at a small real shape: two packed heads, 1,024 positions."""
    H, HK, T, D, group, slots = 2, 2, 1024, 128, 4, 8
    R, blocks = T * group, T // 128
    shape = jax.ShapeDtypeStruct
    q, k, lse = shape((H, R, D), jnp.bfloat16), shape((HK, T, D), jnp.bfloat16), shape((H, R), jnp.float32)
    lists = shape((H, R // 128, slots), jnp.int32), shape((H, R // 128), jnp.int32)
    lists_t = shape((H, blocks, 32), jnp.int32), shape((H, blocks), jnp.int32)
    bounds = shape((H,), jnp.int32), shape((H,), jnp.int32)
    static = dict(tile=128, block=128, group=group, scale=D**-0.5)
    saved, by_tile = (q, lse, q, lse, *lists, *lists_t), shape((H, R // 128, T), jnp.bool_)
    energy = partial(pallas_tpu.energy, rule="first", **static)
    return {
        "block_sparse_attention": (partial(pallas_tpu.forward, **static), (q, k, k, *lists, *bounds)),
        "block_sparse_attention_dkv": (
            partial(pallas_tpu.backward, **static),
            (q, k, k, *saved, *bounds),
        ),
        "block_sparse_attention by tile": (partial(pallas_tpu.forward, **static), (q, k, k, *lists, *bounds, by_tile)),
        "block_sparse_attention_dkv by tile": (
            partial(pallas_tpu.backward, **static),
            (q, k, k, *saved, *bounds, by_tile),
        ),
        "block_energy": (energy, (q, shape((HK, blocks, D), jnp.bfloat16), *bounds)),
    }


def lower_for_tpu(kind, name, function, arguments, devices=1):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((devices,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text and name.split()[0] in text


@pytest.mark.parametrize("kind", [pytest.param(x, marks=[pytest.mark.slow] * (x != KINDS[0])) for x in KINDS])
def test_lowers_for_every_tpu_generation(kind):
    for name, call in real_calls().items():
        lower_for_tpu(kind, name, *call)


@pytest.mark.parametrize("name", real_calls())
def test_lowers_inside_shard_map_over_heads(name):
    function, arguments = real_calls()[name]
    heads = PartitionSpec("heads")
    sharded = jax.shard_map(lambda *a: function(*a), in_specs=heads, out_specs=heads)
    lower_for_tpu("TPU v5 lite", name, sharded, arguments, devices=2)


# Where a mask by tiles takes the place of positions there are fewer integers.
@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * ("by tile" in x)) for x in real_calls()])
def test_lowers_where_integers_have_64_bits(name):
    with jax.enable_x64(True):
        lower_for_tpu("TPU v5", name, *real_calls()[name])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ((jnp.float32, jnp.float32, 64, 128, 128), None),
        ((jnp.bfloat16, jnp.bfloat16, 128, 128, 128), None),
        ((jnp.float16, jnp.float16, 128, 128, 128), "float16"),
        ((jnp.bfloat16, jnp.float32, 128, 128, 128), "one dtype"),
        ((jnp.bfloat16, jnp.bfloat16, 128, 24, 128), "tile"),
        ((jnp.float32, jnp.float32, 128, 128, 12), "block"),
        ((jnp.float32, jnp.float32, 128, 1024, 1024), "scores"),
        ((jnp.float32, jnp.float32, 128, 2048, 16), "bytes"),
        ((jnp.float32, jnp.float32, 320, 128, 128), "head width"),
    ],
)
def test_refusal_names_the_reason(call, reason):
    refused = pallas_tpu.refusal(*call)
    assert refused is None if reason is None else reason in refused


def test_lists_too_long_for_scalar_memory_are_refused():
    assert pallas_tpu.refusal(jnp.float32, jnp.float32, 128, 128, 128, slots=1024, repeat=4) is None
    assert "SMEM" in pallas_tpu.refusal(jnp.float32, jnp.float32, 128, 128, 128, slots=2**15, repeat=32)
