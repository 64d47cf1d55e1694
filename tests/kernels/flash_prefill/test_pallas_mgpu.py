"""The Hopper kernels: in the GPU interpreter with race detection, lowered for CUDA, on a GPU."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from rollax.kernels.backends import hopper_refusal
from rollax.kernels.flash_prefill import pallas_mgpu, reference

interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="this jax has no GPU interpreter (0.12 has)"
)


class Case(NamedTuple):
    """Query and key heads, rows, keys, head width; the rest as in the kernels. offset, length: one a query head."""

    H: int
    HK: int
    R: int
    S: int
    D: int
    tile: int
    block: int
    group: int
    offset: tuple[int, ...]
    length: tuple[int, ...]
    dtype: type = jnp.bfloat16

    @property
    def static(self):
        return dict(tile=self.tile, block=self.block, group=self.group, scale=self.D**-0.5)


# Two warpgroups a tile, one a key block; a prefix; a length that cuts a block.
SMALL = Case(2, 1, 128, 128, 64, 128, 64, 1, (20, 0), (128, 100))
CASES = {
    "two_warpgroups": Case(4, 2, 256, 384, 128, 128, 128, 1, (128, 100, 0, 7), (384, 356, 256, 70)),
    "one_warpgroup": Case(2, 1, 128, 192, 64, 64, 64, 3, (150, 3), (192, 46)),
    "packed": Case(2, 2, 256, 256, 64, 256, 128, 4, (192, 30), (256, 94)),
    "float16": Case(2, 1, 128, 256, 128, 64, 128, 1, (128, 90), (256, 218), jnp.float16),
}


def lists(mask):
    """Ascending ids and counts of a bool `[..., n]`; unused slots repeat the last id."""
    count = mask.sum(-1).astype(np.int32)
    ids = np.argsort(~mask, axis=-1, kind="stable").astype(np.int32)
    last = np.take_along_axis(ids, np.maximum(count - 1, 0)[..., None], axis=-1)
    index = np.where(np.arange(mask.shape[-1]) < count[..., None], ids, np.where(count[..., None] > 0, last, 0))
    return jnp.asarray(index, jnp.int32), jnp.asarray(count)


def make(case: Case, seed=0, by_tile=False):
    """(q, k, v, d_out, d_lse, index, count, index_t, count_t, offset, length); head 0's last tile lists nothing.

    With `by_tile` a mask stands at the end.
    """
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), case.dtype)  # noqa: E731
    mask = rng.random((case.H, case.R // case.tile, case.S // case.block)) < 0.75
    mask[0, -1] = False
    arrays = normal(case.H, case.R, case.D), normal(case.HK, case.S, case.D), normal(case.HK, case.S, case.D)
    d_out, d_lse = normal(case.H, case.R, case.D), jnp.asarray(rng.normal(size=(case.H, case.R)), jnp.float32)
    ends = jnp.array(case.offset, jnp.int32), jnp.array(case.length, jnp.int32)
    if by_tile:
        ends += (jnp.asarray(rng.random((*mask.shape[:2], case.S)) < 0.3),)
    return *arrays, d_out, d_lse, *lists(mask), *lists(mask.swapaxes(1, 2)), *ends


def close(got, expected, tolerance):
    """Elementwise, relative to the largest expected value; infinities must agree."""
    got, expected = (np.asarray(x.astype(jnp.float32)) for x in (got, expected))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(expected))
    finite = np.isfinite(expected)
    bound = tolerance * np.abs(expected[finite]).max()
    np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=bound)


def check_attention(case: Case, by_tile=False, **how):
    q, k, v, d_out, d_lse, index, count, index_t, count_t, *ends = make(case, by_tile=by_tile)
    program = lambda function, **how: jax.jit(partial(function, **case.static, **how))  # noqa: E731
    out, lse = program(pallas_mgpu.forward, **how)(q, k, v, index, count, *ends)
    exact = tuple(x.astype(jnp.float32) for x in (q, k, v))
    expected_out, expected_lse = program(reference.forward)(*exact, index, count, *ends)
    assert jnp.isinf(lse).any() and jnp.isfinite(lse).any()  # rows of both kinds
    assert not out[jnp.isinf(lse)].any()
    assert (out.dtype, lse.dtype) == (case.dtype, jnp.float32)
    # One rounding of the weights and one of the result, 2^-9 (bfloat16) or 2^-12 each, for the largest entry.
    rounding = float(jnp.finfo(case.dtype).eps) / 2
    close(out, expected_out, 2 * rounding)
    close(lse, expected_lse, 1e-6)
    saved = (out, lse, d_out, d_lse, index, count, index_t, count_t, *ends)
    gradients = program(pallas_mgpu.backward, **how)(q, k, v, *saved)
    exact_saved = (expected_out, expected_lse, d_out.astype(jnp.float32), *saved[3:])
    for got, expected in zip(gradients, program(reference.backward)(*exact, *exact_saved), strict=True):
        assert got.dtype == case.dtype
        close(got, expected, 3 * rounding)  # and one more, of delta's out


def check_energy(case: Case, rule):
    q, k, _, _, _, _, _, _, _, offset, length = make(case)
    exact = tuple(x.astype(jnp.float32) for x in (q, k))
    program = lambda function: jax.jit(partial(function, rule=rule, **case.static))  # noqa: E731
    mass, top = program(pallas_mgpu.energy)(q, k, offset, length)
    expected_mass, expected_top = program(reference.energy)(*exact, offset, length)
    assert jnp.isinf(top).any() and jnp.isfinite(top).any()
    close(top, expected_top, 1e-6)
    np.testing.assert_allclose(mass, expected_mass, rtol=2e-6)


@pytest.fixture
def interpreted():
    """Runs GPU kernels on the CPU, with shared memory, barriers and copies simulated; a race raises."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    gpu_callbacks.reset_gpu_interpret_mode_state()


@interpreter
@pytest.mark.parametrize("by_tile", [False, True])
def test_attention_in_the_interpreter(interpreted, by_tile):
    check_attention(SMALL, by_tile, interpretable=True)


@interpreter
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by_tile", [False, True])
def test_more_attention_in_the_interpreter(interpreted, name, by_tile):
    check_attention(CASES[name], by_tile, interpretable=True)


ENERGY = Case(2, 1, 128, 150, 64, 64, 2, 3, (80, 0), (100, 30))  # the keys are the means of 150 blocks of 2
ENERGIES = {
    "two_warpgroups": (Case(2, 2, 256, 200, 128, 128, 2, 1, (0, 90), (250, 200)), "last"),
    "tile_in_parts": (Case(2, 1, 256, 150, 64, 256, 2, 4, (80, 0), (130, 60), jnp.float16), "first"),
}


@interpreter
@pytest.mark.parametrize("rule", ["last", "first"])
def test_energy_in_the_interpreter(interpreted, rule):
    check_energy(ENERGY, rule)


@interpreter
@pytest.mark.slow
@pytest.mark.parametrize("name", ENERGIES)
def test_more_energy_in_the_interpreter(interpreted, name):
    check_energy(*ENERGIES[name])


@interpreter
def test_energy_of_zero_queries(interpreted):
    """All rows that see a block count 1 each: a whole tile below the diagonal, the last row on it."""
    case = Case(1, 1, 192, 3, 64, 64, 64, 1, (0,), (192,))
    q, kbar = jnp.zeros((1, 192, 64), jnp.bfloat16), jnp.ones((1, 3, 64), jnp.bfloat16)
    mass, top = pallas_mgpu.energy(q, kbar, jnp.zeros(1, jnp.int32), jnp.array([192]), rule="last", **case.static)
    np.testing.assert_array_equal(mass[0], [[1, 0, 0], [64, 1, 0], [64, 64, 1]])
    np.testing.assert_array_equal(top[0], np.where(np.tri(3, dtype=bool), 0, -np.inf))


def calls(case: Case, slots: int, struct):
    """(function, argument types) of every kernel at the shapes of `case`."""
    tiles, blocks = case.R // case.tile, case.S // case.block
    q, k, mean = (struct((*s, case.D), case.dtype) for s in ((case.H, case.R), (case.HK, case.S), (case.HK, blocks)))
    per_row, per_head = struct((case.H, case.R), jnp.float32), struct((case.H,), jnp.int32)
    index, count = struct((case.H, tiles, slots), jnp.int32), struct((case.H, tiles), jnp.int32)
    index_t, count_t = struct((case.H, blocks, slots), jnp.int32), struct((case.H, blocks), jnp.int32)
    ends = (per_head, per_head)
    saved = (q, per_row, q, per_row, index, count, index_t, count_t)
    mask = struct((case.H, tiles, case.S), jnp.bool_)
    return {
        "forward": (partial(pallas_mgpu.forward, **case.static), (q, k, k, index, count, *ends)),
        "backward": (partial(pallas_mgpu.backward, **case.static), (q, k, k, *saved, *ends)),
        "forward by tile": (partial(pallas_mgpu.forward, **case.static), (q, k, k, index, count, *ends, mask)),
        "backward by tile": (partial(pallas_mgpu.backward, **case.static), (q, k, k, *saved, *ends, mask)),
        "energy": (partial(pallas_mgpu.energy, rule="first", **case.static), (q, mean, *ends)),
    }


LOWERED = {"forward": 1, "backward": 2, "forward by tile": 1, "backward by tile": 2, "energy": 1}  # kernels in each


@pytest.mark.parametrize("name", LOWERED)
def test_lowers_for_cuda_inside_shard_map_over_heads(name):
    case = Case(8, 2, 512, 512, 128, 128, 128, 4, (), (), jnp.float16)
    function, args = calls(case, 4, jax.ShapeDtypeStruct)[name]
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,), abstract_device=device)
    sharded = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec("heads"), out_specs=PartitionSpec("heads"))
    with use_abstract_mesh(mesh):
        text = jax.jit(sharded).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == LOWERED[name]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (dict(), None),
        (dict(q_dtype=jnp.float16, k_dtype=jnp.float16, head_width=64, tile=64, block=192), None),
        (dict(q_dtype=jnp.float32, k_dtype=jnp.float32), "bfloat16"),
        (dict(k_dtype=jnp.float16), "bfloat16"),
        (dict(head_width=96), "width"),
        (dict(head_width=256), "width"),
        (dict(tile=32), "multiples of 64"),
        (dict(block=100), "multiples of 64"),
        (dict(tile=1024), "at most 512"),
    ],
)
def test_refusal(change, complaint):
    call = dict(q_dtype=jnp.dtype("bfloat16"), k_dtype=jnp.dtype("bfloat16"), head_width=128, tile=128, block=128)
    answer = pallas_mgpu.refusal(**(call | change))
    assert answer is None if complaint is None else complaint in answer


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scale_must_be_positive(scale):
    q, k, v, _, _, index, count, _, _, offset, length = make(SMALL)
    with pytest.raises(ValueError, match="scale must be positive"):
        pallas_mgpu.forward(q, k, v, index, count, offset, length, **(SMALL.static | dict(scale=scale)))


@pytest.fixture
def hopper():
    if complaint := "no GPU" if jax.default_backend() != "gpu" else hopper_refusal():
        pytest.skip(complaint)
    with jax.default_matmul_precision("highest"):  # of the reference: by default its float32 products would be TF32
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by_tile", [False, True])
def test_attention_on_the_gpu(hopper, name, by_tile):
    check_attention(CASES[name], by_tile)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENERGIES)
def test_energy_on_the_gpu(hopper, name):
    check_energy(*ENERGIES[name])
