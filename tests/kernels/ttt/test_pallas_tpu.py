"""The TPU kernels of test-time training, interpreted against golden arrays and the reference, and lowered."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from rollax.kernels import ttt
from rollax.kernels.ttt import pallas_tpu, reference
from rollax.kernels.ttt.pallas_tpu_dual import plan
from rollax.kernels.ttt.pallas_tpu_lact import APPLY, tile_of

KINDS = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x")
GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "spatial_ttt.npz")
RELATIVE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}  # of the largest entry; a bfloat16 operand is rounded by 2^-9


def golden(name):
    """Its float64 arrays in float32."""
    keys = [key for key in GOLDEN.files if key.startswith(f"{name}/")]
    arrays = {key.removeprefix(f"{name}/"): GOLDEN[key] for key in keys}
    return {key: x.astype(np.float32) if x.dtype == np.float64 else x for key, x in arrays.items()}


def normal(key, *shape, dtype=jnp.float32, scale=1.0):
    return (scale * jax.random.normal(jax.random.key(key), shape)).astype(dtype)


@partial(jax.jit, static_argnums=0)
def out_and_pull(function, args, cotangents):
    """A function's outputs, and its gradients where these are the cotangents."""
    out, pull = jax.vjp(function, *args)
    return out, pull(cotangents)


def assert_close(got, want, dtype=jnp.float32):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert x.shape == y.shape
        atol = RELATIVE[dtype] * np.abs(y).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=f"array {i}")


@pytest.fixture
def tpu():
    """The interpreter that has the TPU's memory spaces: finds races, fills new memory with NaN, shuffles programs."""
    yield pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", random_seed=3)
    pltpu.reset_tpu_interpret_mode_state()


def ttt_inputs(mlp, N, L, f, K, dtype):
    """Arguments of `ttt_forward` and cotangents of its output and final fast weights."""
    h = 4 * f if mlp else f
    shapes = ((N, f, h), (N, 1, h), (N, h, f), (N, 1, f))[: 4 if mlp else 2]
    params = tuple(normal(4 + i, *shape, scale=0.3) for i, shape in enumerate(shapes))
    tokens = [normal(i, N, L, f, dtype=dtype) for i in range(3)]
    eta_pos, gate = 4 / (1 + jnp.arange(K)) / f, jax.nn.sigmoid(normal(3, N, L))
    norm = 1 + normal(8, N, f, scale=0.2), normal(9, N, f, scale=0.2)
    d_params = tuple(normal(10 + i, *shape, scale=0.3) for i, shape in enumerate(shapes))
    return (*tokens, eta_pos, gate, params, *norm), (normal(20, N, L, f, dtype=dtype), d_params)


@pytest.mark.parametrize("mlp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dual_form(mlp, tpu):
    """Nine heads need two programs of eight; three mini-batches in groups of two end with an empty one."""
    N, L, f, K, group = 9, 48, 8, 16, 2
    args, cotangents = ttt_inputs(mlp, N, L, f, K, jnp.float32)
    want, pull = jax.jit(lambda a: jax.vjp(partial(reference.ttt_scan, mini_batch=K), *a))(args)
    static = dict(mini_batch=K, group=group, interpret=tpu)
    out, final, borders = jax.jit(partial(pallas_tpu.ttt_forward, **static))(*args)
    assert_close((out, final), want)
    assert borders[0].shape == (-(-L // (K * group)), 16, f, 4 * f if mlp else f)
    assert_close(borders[0][0, :N], args[5][0])
    backward = jax.jit(partial(pallas_tpu.ttt_backward, **static))
    assert_close(backward(*args, borders, *cotangents), pull(cotangents))


@pytest.mark.parametrize("mlp", [False, pytest.param(True, marks=pytest.mark.slow)])  # one kernel, more weights
def test_dual_form_in_bfloat16(mlp):
    args, cotangents = ttt_inputs(mlp, 2, 32, 16, 16, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (args, cotangents))
    want, pull = jax.jit(lambda a: jax.vjp(partial(reference.ttt_scan, mini_batch=16), *a))(wide[0])
    static = dict(mini_batch=16, interpret=True)
    out, final, borders = jax.jit(partial(pallas_tpu.ttt_forward, **static))(*args)
    got = jax.jit(partial(pallas_tpu.ttt_backward, **static))(*args, borders, *cotangents)
    assert out.dtype == got[0].dtype == jnp.bfloat16 and final[0].dtype == got[4].dtype == jnp.float32
    assert_close((out, final), want, jnp.bfloat16)
    unsaved = jax.jit(partial(pallas_tpu.ttt_forward, **static, save=False))(*args)
    assert unsaved[2] is None
    assert_close(unsaved[:2], (out, final))
    assert_close(got, pull(wide[1]), jnp.bfloat16)


@pytest.mark.parametrize("name", ["ttt_linear_a", "ttt_mlp_a"])
def test_golden_dual_form(name):
    """The authors' layer, with mini-batches of four tokens and a group that is not full."""
    g = golden(name)
    scan, weights = (
        (ttt.ttt_linear_scan, ("W1", "b1")) if "linear" in name else (ttt.ttt_mlp_scan, ("W1", "b1", "W2", "b2"))
    )
    K, (B, H, L, f) = int(g["mini_batch"]), g["q"].shape
    eta_pos = np.maximum(1 / np.arange(1, K + 1, dtype=np.float32) + g["learnable_token_idx"], 0) * g["base_lr"] / f
    gate = 1 / (1 + np.exp(-(np.einsum("bld,hod->bhl", g["x"], g["lr_weight"]) + g["lr_bias"])))

    def run(q, k, v, eta_pos, gate, params, ln):
        static = dict(mini_batch=K, checkpoint_every=2, implementation="interpret")
        out, final = scan(q, k, v, eta_pos, gate, params, ln, **static)
        return jnp.swapaxes(out, 1, 2).reshape(B, L, H * f), final

    args = g["q"], g["k"], g["v"], eta_pos, gate, [g[n] for n in weights], (g["ln_weight"], g["ln_bias"])
    (out, final), pull = jax.jit(lambda *a: jax.vjp(run, *a))(*args)
    cotangents = g["cotangent_out"], jax.tree.map(jnp.zeros_like, final)
    dq, dk, dv, d_eta_pos, d_gate, d_params, d_ln = jax.jit(lambda d: pull(d))(cotangents)
    d_eta, gates = g["grad_eta"], gate.reshape(B, H, L // K, K)
    assert_close(out, g["out"])
    assert_close(tuple(final), [g[f"final_{n}"] for n in weights])
    assert_close((dq, dk, dv), [g[f"grad_{n}"] for n in "qkv"])
    assert_close(d_eta_pos, np.einsum("bhnij,bhnj->i", d_eta, gates))
    assert_close(d_gate, np.einsum("bhnij,i->bhnj", d_eta, eta_pos).reshape(B, H, L))
    assert_close((d_params, d_ln), ([g[f"grad_{n}"] for n in weights], [g["grad_ln_weight"], g["grad_ln_bias"]]))


def lact_inputs(N, C, d, h, dtype=jnp.float32):
    """w, (q or k, v), lr, cotangents of the output and of the gradients."""
    shapes = (N, h, d), (N, d, h), (N, h, d)
    w = [normal(i, *shape, scale=shape[2] ** -0.5) for i, shape in enumerate(shapes)]
    tokens = [normal(3 + i, N, C, d, dtype=dtype) for i in range(3)]
    return (
        w,
        tokens[:2],
        jax.nn.softplus(normal(6, N, C, 3)),
        tokens[2],
        [normal(7 + i, *x) for i, x in enumerate(shapes)],
    )


def check_lact(static, dtype=jnp.float32, **shapes):
    w, (k, v), lr, d_out, d_grads = lact_inputs(dtype=dtype, **shapes)
    wide_k, wide_v, wide_d = (x.astype(jnp.float32) for x in (k, v, d_out))
    read = out_and_pull(reference.lact_apply, (*w, wide_k), wide_d)
    grads, pulled = out_and_pull(reference.lact_grads, (*w, wide_k, wide_v, lr), tuple(d_grads))
    got = pallas_tpu.lact_apply(*w, k, **static), pallas_tpu.lact_apply_backward(*w, k, d_out, **static)
    assert_close(got, read, dtype)
    assert got[0].dtype == dtype and got[1][0].dtype == jnp.float32
    got = pallas_tpu.lact_grads(*w, k, v, lr, **static)
    assert_close(got, grads, dtype)
    got = pallas_tpu.lact_grads_backward(*w, k, v, lr, *d_grads, **static)
    assert_close(got, pulled, dtype)


def test_lact(tpu):
    """Two heads, two blocks of hidden units, three tiles of which the last is not full."""
    check_lact(dict(tile=16, interpret=tpu), N=2, C=40, d=8, h=256)


@pytest.mark.slow  # lowered by default, and the dual form's kernel runs in it
def test_lact_in_bfloat16():
    check_lact(dict(interpret=True), jnp.bfloat16, N=2, C=40, d=24, h=16)


def test_newton_schulz(tpu):
    """Two blocks of rows; a zero matrix has a finite gradient."""
    g, d_out = normal(0, 2, 144, 152).at[1].set(0), normal(1, 2, 144, 152)
    out, (want,) = out_and_pull(ttt.newton_schulz, (g,), d_out)
    static = dict(coeffs=ttt.MUON5, interpret=tpu)
    assert_close(pallas_tpu.newton_schulz(g, **static), out)
    got = pallas_tpu.newton_schulz_backward(g, d_out, **static)
    for i in range(2):  # the zero matrix's gradient is 10^7 times the other's
        assert_close(got[i], want[i])


@pytest.mark.parametrize("name", ["newton_schulz_square", "newton_schulz_tall", "newton_schulz_wide"])
def test_golden_newton_schulz(name):
    g = golden(name)
    assert_close(pallas_tpu.newton_schulz(g["in"], coeffs=ttt.MUON5, interpret=True), g["out_schedule5"])
    assert_close(pallas_tpu.newton_schulz(g["in"], coeffs=ttt.FIXED5, interpret=True), g["out_fixed5"])
    got = pallas_tpu.newton_schulz_backward(g["in"], g["cotangent"], coeffs=ttt.MUON5, interpret=True)
    assert_close(got, g["grad_in"])


def test_golden_lact():
    g = golden("lact_muon0_mom1_pre1")
    w = ttt.FastWeights(g["w0"], g["w1"], g["w2"])
    lr = np.concatenate([g["lr0"], g["lr1"], g["lr2"]], -1)
    args = w, *(g[n][None] for n in "qkv"), lr[None], g["momentum"][None, ..., 0]
    rule = ttt.UpdateRule(muon=False, momentum=True, norm="pre")
    run = lambda *a: ttt.lact_scan(*a, chunk=int(g["chunk"]), rule=rule, implementation="interpret")[0]  # noqa: E731
    out, (dw, dq, dk, dv, d_lr, d_mom) = jax.jit(lambda a, d: (run(*a), jax.vjp(run, *a)[1](d)))(
        args, g["cotangent_out"][None]
    )
    assert_close(out[0], g["out"])
    assert_close(tuple(dw), [g[f"grad_{n}"] for n in ("w0", "w1", "w2")])
    assert_close((dq[0], dk[0], dv[0]), [g[f"grad_{n}"] for n in "qkv"])
    assert_close(jnp.split(d_lr[0], 3, -1), [g[f"grad_lr{i}"] for i in range(3)])
    assert_close(d_mom[0, ..., None], g["grad_momentum"])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(pytest.param(kind, jnp.bfloat16, marks=[pytest.mark.slow] * (kind in KINDS[1:4])) for kind in KINDS),
        pytest.param("TPU v4", jnp.float32, marks=pytest.mark.slow),  # as `test_lowers_inside_shard_map`
    ],
)
def test_lowers(kind, dtype):
    """For every TPU generation, at real shapes; those between the oldest and the newest are slow."""
    shape = jax.ShapeDtypeStruct
    mesh = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device_kind=kind, num_cores=1, platform="tpu"))

    def lower(function, *args):
        with use_abstract_mesh(mesh):
            text = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in text

    for mlp in (False, True):
        args, cotangents = jax.eval_shape(partial(ttt_inputs, mlp, 32, 4096, 64, 16, dtype))
        forward = partial(pallas_tpu.ttt_forward, mini_batch=16)
        borders = jax.eval_shape(forward, *args)[2]
        lower(forward, *args)
        lower(partial(pallas_tpu.ttt_backward, mini_batch=16), *args, borders, *cotangents)
    w, (k, v), lr, d_out, d_grads = jax.eval_shape(partial(lact_inputs, 4, 2648, 512, 512, dtype))
    lower(pallas_tpu.lact_apply, *w, k)
    lower(pallas_tpu.lact_apply_backward, *w, k, d_out)
    lower(pallas_tpu.lact_grads, *w, k, v, lr)
    lower(pallas_tpu.lact_grads_backward, *w, k, v, lr, *d_grads)
    g = shape((12, 512, 512), jnp.float32)
    lower(partial(pallas_tpu.newton_schulz, coeffs=ttt.MUON5, dtype=dtype), g)
    lower(partial(pallas_tpu.newton_schulz_backward, coeffs=ttt.MUON5, dtype=dtype), g, g)


def test_lowers_inside_shard_map():
    """Gradients of the public functions over batch and heads, weights and rates shared by the batch."""
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    shape = lambda *x: jax.ShapeDtypeStruct(x, jnp.float32)  # noqa: E731
    B, H, L, f, K = 2, 2, 32, 64, 16
    tokens, heads = P("batch", "heads"), P("heads")
    q, gate, norm, square = shape(B, H, L, f), shape(B, H, L), (shape(H, f),) * 2, shape(H, f, f)

    def dual(q, *args):
        return ttt.ttt_linear_scan(q, q, q, *args, mini_batch=K, implementation="pallas_tpu")[0]

    def lact(w, q, lr, mom, ids):
        return ttt.lact_scan(w, q, q, q, lr, mom, chunk=K, segment_ids=ids, implementation="pallas_tpu")[0]

    ids = jax.ShapeDtypeStruct((B, L), jnp.int32)
    dual_specs, dual_args = (tokens, P(), tokens, heads, heads), (q, shape(K), gate, (square, shape(H, 1, f)), norm)
    lact_specs, lact_args = (heads, *(tokens,) * 3, P("batch")), ((square,) * 3, q, shape(B, H, L, 3), gate, ids)
    for function, specs, args, names in (
        (dual, dual_specs, dual_args, ("ttt_forward", "ttt_backward")),
        (lact, lact_specs, lact_args, ("lact_apply", "lact_grads", "newton_schulz")),
    ):
        gradient = jax.grad(lambda *x: jnp.sum(function(*x)), argnums=(0, 1))  # noqa: B023
        with use_abstract_mesh(mesh):
            sharded = jax.shard_map(gradient, in_specs=specs, out_specs=specs[:2])
            text = jax.jit(sharded).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
        assert all(f'kernel_name = "{name}' in text for name in names)


def test_refusals():
    shape = jax.ShapeDtypeStruct
    tokens = lambda dtype, L=64, f=64: shape((2, 4, L, f), dtype)  # noqa: E731
    params = lambda f, dtype=jnp.float32: (shape((4, f, f), dtype), shape((4, 1, f), dtype))  # noqa: E731
    for dtype in (jnp.float32, jnp.bfloat16):
        assert pallas_tpu.refusal("ttt_linear_scan", tokens(dtype), params(64), 16) is None
        assert pallas_tpu.refusal("lact_scan", tokens(dtype, f=512), [shape((8, 512, 512), jnp.float32)] * 3) is None
    for dtype in (jnp.float16, jnp.float64):
        assert "float32 or bfloat16" in pallas_tpu.refusal("ttt_linear_scan", tokens(dtype), params(64), 16)
        assert "float32 or bfloat16" in pallas_tpu.refusal("lact_apply", tokens(dtype), params(64) + params(64)[:1])
    assert "fast weights" in pallas_tpu.refusal("ttt_linear_scan", tokens(jnp.float32), params(64, jnp.float16), 16)
    assert "no tokens" in pallas_tpu.refusal("ttt_linear_scan", tokens(jnp.float32, L=0), params(64), 16)
    assert "no tokens" in pallas_tpu.refusal("lact_apply", tokens(jnp.float32, L=0), params(64) * 2)
    assert "do not fit 14 MiB" in pallas_tpu.refusal("ttt_linear_scan", tokens(jnp.float32, f=2048), params(2048), 16)
    assert "do not fit 14 MiB" in pallas_tpu.refusal("lact_apply", tokens(jnp.float32, f=1024), params(1024) * 2)
    assert "do not fit 14 MiB" in pallas_tpu.newton_schulz_refusal(shape((1, 1024, 1024), jnp.float32), ttt.MUON5)
    narrow = pallas_tpu.newton_schulz_refusal(shape((1, 8, 8), jnp.float32), ttt.MUON5, "float16")
    assert narrow == "matrices must be float32 or bfloat16, got float16"
    with pytest.raises(ValueError, match="do not fit 14 MiB"):
        pallas_tpu.newton_schulz(jnp.zeros((1, 1024, 1024)), coeffs=ttt.MUON5, interpret=True)


def test_plans():
    """The papers' sizes fill the matrix unit, and a longer group takes fewer heads."""
    assert plan(64, 64, 16, mlp=False, size=4) == (8, 8)
    assert plan(64, 64, 16, mlp=False, size=2) == (8, 16)
    assert plan(3, 64, 16, mlp=False, size=4)[0] == 2
    assert plan(64, 64, 16, mlp=True, size=2) == plan(64, 64, 16, mlp=True, size=4) == (4, 8)
    assert plan(64, 64, 16, mlp=True, size=2, group=32)[0] < 4
    assert tile_of(2648, 512, 512, jnp.bfloat16, **APPLY) == 448  # six tiles, 40 rows of padding
    assert tile_of(7, 64, 64, jnp.bfloat16, **APPLY) == 16
