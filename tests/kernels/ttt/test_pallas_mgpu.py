"""The Hopper kernels of test-time training against the reference: interpreted with race detection, and lowered."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh

from rollax.kernels.backends import hopper_refusal
from rollax.kernels.ttt import FIXED5, MUON5, UpdateRule, api, lact_scan, newton_schulz, pallas_mgpu, reference
from rollax.kernels.ttt.pallas_mgpu_lact import hidden_layer, second_gradients, weighted_gradients
from rollax.kernels.ttt.pallas_mgpu_mlp import gelu
from rollax.kernels.ttt.pallas_mgpu_newton_schulz import combine, on_chip
from rollax.kernels.ttt.pallas_mgpu_newton_schulz_small import BACKWARD, FORWARD

DEVICE = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="this version of JAX has no GPU interpreter"
)
OF_LARGEST = 1e-2  # bfloat16 operands (relative rounding 2^-9) and outputs, of the largest entry of an array
FLOAT16 = OF_LARGEST / 4  # 2^-12


def interpreted(function, *args):
    """Runs kernels on the CPU; raises if two threads, or a thread and a copy, race."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return jax.block_until_ready(function(*args))


def normal(seed, *shape, dtype=jnp.float32, scale=1.0):
    """From NumPy, which has no program to compile for every shape."""
    return jnp.asarray((scale * np.random.default_rng(seed).normal(size=shape)).astype(dtype))


def assert_close(got, want, tolerance=OF_LARGEST):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=f"array {i}")


def in_float32(args):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)), args)


@partial(jax.jit, static_argnums=0)
def out_and_pull(function, args, cotangents):
    """A function's outputs, and its gradients where these are the cotangents."""
    out, pull = jax.vjp(function, *args)
    return out, pull(cotangents)


def lact_inputs(N=1, C=100, d=256, h=64, dtype=jnp.bfloat16):
    """(w0, w1, w2), (k, v), lr, (cotangent of the output, cotangents of the gradients)."""
    w = [normal(i, N, *shape, scale=shape[1] ** -0.5) for i, shape in enumerate(((h, d), (d, h), (h, d)))]
    w = in_float32([np.asarray(x).astype(dtype) for x in w])  # weights that both sides hold exactly
    k, v, d_out = (normal(3 + i, N, C, d, dtype=dtype) for i in range(3))
    lr = jax.nn.softplus(normal(6, N, C, 3))
    return w, (k, v), lr, (d_out, [normal(7 + i, *x.shape) for i, x in enumerate(w)])


def check_lact(run, **shapes):
    w, (k, v), lr, (d_out, d_grads) = lact_inputs(**shapes)
    out, pulled = out_and_pull(reference.lact_apply, (*w, in_float32(k)), in_float32(d_out))
    assert_close(run(pallas_mgpu.lact_apply, *w, k), out)
    assert_close(run(pallas_mgpu.lact_apply_backward, *w, k, d_out), pulled)
    grads, pulled = out_and_pull(reference.lact_grads, (*w, *in_float32((k, v)), lr), tuple(d_grads))
    assert_close(run(pallas_mgpu.lact_grads, *w, k, v, lr), grads)
    assert_close(run(pallas_mgpu.lact_grads_backward, *w, k, v, lr, *d_grads), pulled)


def ttt_inputs(K, n, N=1, units=None, dtype=jnp.bfloat16):
    """Arguments of `ttt_forward`, and cotangents of its output and its final fast weights."""
    L, f = K * n, 64
    tokens = [normal(i, N, L, f, dtype=dtype, scale=0.5) for i in range(3)]
    eta_pos = 4 * (1 / (1 + jnp.arange(K)) + 0.02) / f
    shapes = ((f, f), (1, f)) if units is None else ((f, units), (1, units), (units, f), (1, f))
    params = tuple(normal(11 + i, N, *shape, scale=0.1) for i, shape in enumerate(shapes))
    norm = (1 + normal(6, N, f, scale=0.1), normal(7, N, f, scale=0.1))
    args = (*tokens, eta_pos, jax.nn.sigmoid(normal(3, N, L)), params, *norm)
    return args, (normal(8, N, L, f, dtype=dtype), tuple(normal(21 + i, *x.shape) for i, x in enumerate(params)))


def check_ttt(run, K, n, group, N=1, units=None, dtype=jnp.bfloat16):
    args, cotangents = ttt_inputs(K, n, N, units, dtype)
    close = partial(assert_close, tolerance=FLOAT16 if dtype == jnp.float16 else OF_LARGEST)
    want, pulled = out_and_pull(partial(reference.ttt_scan, mini_batch=K), in_float32(args), in_float32(cotangents))
    out, final, borders = run(partial(pallas_mgpu.ttt_forward, mini_batch=K, group=group), *args)
    close((out, final), want)
    learned = lambda params: jax.tree.map(jnp.subtract, tuple(params), args[5])  # noqa: E731
    assert jnp.abs(learned(want[1])[0]).max() > 0.05 * jnp.abs(args[5][0]).max()  # or the next line would say nothing
    close(learned(final), learned(want[1]))
    got = run(partial(pallas_mgpu.ttt_backward, mini_batch=K, group=group), *args, borders, *cotangents)
    close(got, pulled)


def test_epilogues_are_the_gate_and_its_gradients():
    y0, y2, dh, a0, a1, a2, *lr = (normal(i, 5, 7) for i in range(9))
    hidden = lambda y0, y2: hidden_layer(y0, y2)[0][0]  # noqa: E731
    np.testing.assert_allclose(hidden(y0, y2), jax.nn.silu(y0) * y2, rtol=1e-5, atol=1e-6)

    def three(y0, y2, dh, *lr):
        out, pull = jax.vjp(hidden, y0, y2)
        d_y0, d_y2 = pull(dh)
        return d_y0 * lr[0], out * lr[1], d_y2 * lr[2]

    weighted, pull = jax.vjp(three, y0, y2, dh, *lr)
    (*bars, u0, u1, u2), d_lr = second_gradients(y0, y2, dh, a0, a1, a2, *lr)
    for got, want in zip(weighted_gradients(y0, y2, dh, *lr)[0], weighted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for got, want in zip((u0, u1, u2, *bars, *d_lr), (*weighted, *pull((a0, a1, a2))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def check_newton_schulz(run, *shape, coeffs=MUON5):
    """Matrices in float32, iterated in bfloat16; five steps and their gradient round products of rounded products.

    `python -m pytest -n 0 -s -m slow tests/kernels/ttt/test_pallas_mgpu.py -k newton_schulz_shapes` prints by how much.
    """
    g, d_out = normal(0, *shape), normal(1, *shape)
    want, (d_want,) = out_and_pull(partial(newton_schulz, coeffs=coeffs), (g,), d_out)
    static = dict(coeffs=coeffs, dtype="bfloat16")
    out = run(partial(pallas_mgpu.newton_schulz, **static), g)
    d_g = run(partial(pallas_mgpu.newton_schulz_backward, **static), g, d_out)
    in_xla, (d_xla,) = out_and_pull(partial(newton_schulz, implementation="xla", **static), (g,), d_out)
    off = lambda x, y: float(jnp.abs(x - y).max() / jnp.abs(y).max())  # noqa: E731
    print(
        f"\n{shape}, of the largest entry: kernel off by {off(out, want):.2%}, its gradient by {off(d_g, d_want):.2%}"
    )
    print(f"  xla in bfloat16 by {off(in_xla, want):.2%}, its gradient by {off(d_xla, d_want):.2%}")
    assert_close(out, want, 2 * OF_LARGEST)
    assert_close(d_g, d_want, 3 * OF_LARGEST)


def test_gelu_and_its_derivatives():
    x = np.linspace(-5, 5, 101)
    with jax.enable_x64(True):
        one, two = jax.grad(jax.nn.gelu), jax.grad(jax.grad(jax.nn.gelu))
        wanted = [np.asarray(f(x)) for f in (jax.nn.gelu, jax.vmap(one), jax.vmap(two))]
    for got, want in zip(gelu(jnp.asarray(x, jnp.float32)), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "turned", "symmetric"),
    [
        pytest.param(128, 320, 192, False, False, marks=pytest.mark.slow),
        pytest.param(128, 64, 128, True, False, marks=pytest.mark.slow),
        (256, 192, 256, True, True),
    ],
)
def test_combine_interpreted(rows, inner, columns, turned, symmetric):
    """Sums of products: more steps than slots; columns that 128 does not divide; tiles above the diagonal."""
    a, b = (normal(i, 2, rows, inner, dtype=jnp.bfloat16) for i in range(2))
    c, d = (a.mT, b.mT) if symmetric else (normal(i, 2, inner, columns, dtype=jnp.bfloat16) for i in (2, 3))
    terms = [(a, d), (b, c)] if symmetric else [(a, c), (b, d)]
    start = normal(4, 2, rows, columns, dtype=jnp.bfloat16)
    start = start + start.mT if symmetric else start
    want = 0.5 * start.astype(jnp.float32) - 2 * sum(x @ y for x, y in in_float32(terms))
    given = [(x, y.mT) for x, y in terms] if turned else terms
    static = dict(turned=turned, symmetric=symmetric)
    assert_close(interpreted(partial(combine, **static), given, jnp.array([0.5, -2.0]), start), want)
    single = interpreted(partial(combine, **static), [(a, a)] if symmetric else given[:1], jnp.ones(2))
    assert_close(single, in_float32(a) @ in_float32(a).mT if symmetric else in_float32(a) @ in_float32(c))


@needs_interpreter
def test_newton_schulz_interpreted():
    """Through the public function, on chip, two warpgroups, a matrix that no tile fits."""
    g, d_out = normal(0, 100, 70), normal(1, 100, 70)
    run = partial(newton_schulz, coeffs=MUON5[:2], dtype="bfloat16", implementation="pallas_mgpu")
    out, pull = interpreted(partial(jax.vjp, run), g)
    (d_g,) = interpreted(pull, d_out)
    assert out.dtype == d_g.dtype == g.dtype
    want, (d_want,) = out_and_pull(partial(newton_schulz, coeffs=MUON5[:2]), (g,), d_out)
    assert_close((out, d_g), (want, d_want))


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "coeffs"),
    [((2, 64, 48), MUON5), ((2, 200, 64), MUON5), ((1, 130, 128), FIXED5), ((1, 200, 300), MUON5)],
)
def test_newton_schulz_shapes_interpreted(shape, coeffs):
    check_newton_schulz(interpreted, *shape, coeffs=coeffs)


def test_what_stays_on_chip():
    """A matrix, the Gram matrix and its polynomial; its gradient holds the cotangent and one more besides."""
    fits = lambda m, n: tuple(on_chip(struct(3, m, n), holds) for holds in (FORWARD, BACKWARD))  # noqa: E731
    assert fits(64, 48) == fits(128, 256) == fits(256, 100) == fits(768, 64) == (True, True)
    assert fits(128, 512) == fits(600, 120) == (True, False)
    assert fits(129, 129) == fits(512, 512) == fits(128, 1024) == (False, False)


@needs_interpreter
def test_lact_interpreted():
    check_lact(interpreted)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("shapes", [dict(N=2, C=256, d=64, h=128), dict(C=7, d=512, h=192)])
def test_lact_shapes_interpreted(shapes):
    check_lact(interpreted, **shapes)


@needs_interpreter
def test_ttt_linear_interpreted():
    check_ttt(interpreted, K=16, n=3, group=2)


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(("K", "n", "group", "N"), [(64, 3, 1, 1), (8, 6, None, 2), (48, 4, 4, 1), (24, 5, 3, 1)])
def test_ttt_linear_shapes_interpreted(K, n, group, N):
    check_ttt(interpreted, K, n, group, N)


@needs_interpreter
@pytest.mark.slow  # by default its kernels are lowered, and TTT-Linear's are interpreted
def test_ttt_mlp_interpreted():
    check_ttt(interpreted, K=16, n=3, group=2, units=256, dtype=jnp.float16)  # a group is learnt again, one is short


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(
    ("K", "n", "group", "N", "dtype"),
    [
        (16, 5, 2, 1, jnp.bfloat16),
        (64, 2, None, 2, jnp.float16),
        (8, 5, 2, 1, jnp.float16),
        (24, 4, 1, 1, jnp.float16),
    ],
)
def test_ttt_mlp_shapes_interpreted(K, n, group, N, dtype):
    check_ttt(interpreted, K, n, group, N, 256, dtype)


@needs_interpreter
@pytest.mark.slow
def test_nothing_is_saved_where_no_gradient_is_wanted():
    args, _ = ttt_inputs(16, 2)
    forward = partial(pallas_mgpu.ttt_forward, mini_batch=16)
    out, final, borders = interpreted(partial(forward, save=False), *args)
    assert borders is None
    jax.tree.map(np.testing.assert_array_equal, (out, final), interpreted(forward, *args)[:2])


@needs_interpreter
@pytest.mark.slow
def test_public_functions_take_the_kernels():
    """Through `api`: folding of batch and heads, a tail that the kernel leaves to XLA, gradients."""
    (q, k, v, eta_pos, gate, params, *norm), _ = ttt_inputs(16, 3, N=2)
    cut = lambda x: x[:, :40].reshape(2, 1, 40, *x.shape[2:])  # noqa: E731
    args = (*(cut(x) for x in (q, k, v)), eta_pos, cut(gate), [x[:1] for x in params], [x[:1] for x in norm])

    def loss(implementation, *args):
        out, final = api.ttt_linear_scan(*args, mini_batch=16, implementation=implementation)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.sin(final.W1)), (out, final)

    grad = lambda name: jax.grad(partial(loss, name), argnums=tuple(range(7)), has_aux=True)  # noqa: E731
    assert_close(interpreted(grad("pallas_mgpu"), *args), grad("reference")(*in_float32(args)))


@pytest.mark.parametrize(
    ("operator", "shape", "dtype", "params", "mini_batch", "says"),
    [
        ("ttt_linear_scan", (1, 2, 64, 64), "bfloat16", (64, 64), 16, None),
        ("ttt_linear_scan", (1, 2, 64, 64), "float32", (64, 64), 16, "float16 or bfloat16"),
        ("ttt_linear_scan", (1, 2, 64, 32), "bfloat16", (32, 32), 16, "width 64"),
        ("ttt_linear_scan", (1, 2, 60, 64), "bfloat16", (64, 64), 20, "multiple of 8"),
        ("ttt_linear_scan", (1, 2, 128, 64), "bfloat16", (64, 64), 128, "up to 64"),
        ("ttt_mlp_scan", (1, 2, 64, 64), "bfloat16", (64, 256), 16, None),
        ("lact_apply", (1, 2, 50, 512), "float16", (192, 512), None, None),
        ("lact_grads", (1, 2, 50, 96), "bfloat16", (64, 96), None, "d must be"),
        ("lact_scan", (1, 2, 50, 64), "bfloat16", (32, 64), None, "h must be"),
        ("lact_step", (1, 2, 0, 64), "bfloat16", (64, 64), None, "no tokens"),
    ],
)
def test_refusal(operator, shape, dtype, params, mini_batch, says):
    tokens, weights = jax.ShapeDtypeStruct(shape, dtype), [jax.ShapeDtypeStruct((2, *params), "float32")]
    reason = pallas_mgpu.refusal(operator, tokens, weights, mini_batch)
    assert reason is None if says is None else says in reason


@pytest.mark.parametrize(
    ("shape", "dtype", "inner", "says"),
    [
        ((3, 64, 48), "bfloat16", None, None),
        ((3, 64, 48), "float32", "bfloat16", None),
        ((3, 64, 48), "float32", None, "the iteration must be in float16 or bfloat16, got float32"),
        ((3, 64, 48), "bfloat16", "float32", "the iteration must be in float16 or bfloat16, got float32"),
        ((0, 64, 48), "bfloat16", None, "there are no numbers"),
    ],
)
def test_newton_schulz_refusal(shape, dtype, inner, says):
    assert pallas_mgpu.newton_schulz_refusal(jax.ShapeDtypeStruct(shape, dtype), MUON5, inner) == says


def test_newton_schulz_says_why_not(capsys):
    with pytest.raises(ValueError, match="'pallas_mgpu' of newton_schulz cannot take this: the iteration must be"):
        newton_schulz(jnp.ones((4, 4)), implementation="pallas_mgpu")
    newton_schulz(jnp.ones((4, 4)), explain=True)
    assert capsys.readouterr().out == "newton_schulz: xla (no kernel for cpu)\n"


def test_lact_says_where_newton_schulz_runs(capsys):
    """By default it iterates in float32, beside kernels for the tokens."""
    w, (k, v), lr, _ = jax.tree.map(lambda x: x[:, None], lact_inputs(C=8, d=64))

    def said(**rule):
        rule = UpdateRule(momentum=False, **rule)
        run = partial(lact_scan, chunk=4, rule=rule, implementation="pallas_mgpu", explain=True)
        jax.eval_shape(run, [x[0] for x in w], k, k, v, lr)
        return capsys.readouterr().out.splitlines()

    chosen, why = "lact_scan: pallas_mgpu (as asked)", "the iteration must be in float16 or bfloat16, got float32"
    assert said() == [chosen, f"newton_schulz: xla ({why})"]
    assert said(ns_dtype="bfloat16") == [chosen, "newton_schulz: pallas_mgpu (as the other operators)"]
    assert said(muon=False) == [chosen]


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def calls(C, d, h, L, K=16, dtype=jnp.bfloat16):
    """Functions of the module, with arguments: chunks of C, sequences of L tokens. The others are lowered below."""
    N = 4
    w, tokens = (struct(N, h, d), struct(N, d, h), struct(N, h, d)), struct(N, C, d, dtype=dtype)
    yield pallas_mgpu.lact_apply, (*w, tokens)
    yield pallas_mgpu.lact_apply_backward, (*w, tokens, tokens)
    yield pallas_mgpu.lact_grads, (*w, tokens, tokens, struct(N, C, 3))
    yield pallas_mgpu.lact_grads_backward, (*w, tokens, tokens, struct(N, C, 3), *w)
    N, f = 32, 64
    tokens, norm = struct(N, L, f, dtype=dtype), struct(N, f)
    params = (struct(N, f, 4 * f), struct(N, 1, 4 * f), struct(N, 4 * f, f), struct(N, 1, f))
    args = (tokens, tokens, tokens, struct(K), struct(N, L), params, norm, norm)
    yield partial(pallas_mgpu.ttt_forward, mini_batch=K), args
    borders = tuple(struct(L // (16 * K), *x.shape) for x in params)
    yield partial(pallas_mgpu.ttt_backward, mini_batch=K), (*args, borders, tokens, params)
    g = struct(3, 512, 512)
    yield partial(pallas_mgpu.newton_schulz_backward, coeffs=MUON5, dtype=dtype), (g, g)


LOWERED = (
    "lact_apply",
    "lact_apply_backward",
    "lact_grads",
    "lact_grads_backward",
    "ttt_forward",
    "ttt_backward",
    pytest.param("newton_schulz_backward", marks=pytest.mark.slow),  # `combine`, interpreted by default
)


@pytest.mark.parametrize("name", LOWERED)
def test_lowering(name):
    """Every kernel becomes a Mosaic GPU program for Hopper; needs no compiler for GPUs."""
    mesh = AbstractMesh((1,), ("x",), abstract_device=DEVICE)
    named = {getattr(f, "func", f).__name__: (f, args) for f, args in calls(C=2048, d=128, h=128, L=32768)}
    assert len(named) == len(LOWERED)
    function, args = named[name]
    with use_abstract_mesh(mesh):
        text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


# A sweep of Newton-Schulz is lowered below.
@pytest.mark.parametrize("form", ["shard_map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_lowering_inside_shard_map_and_vmap(form):
    """The gradient of the public function, its batch and heads over 2 x 2 devices, or for two sets of weights."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = AbstractMesh((2, 2), ("batch", "heads"), axis_types=auto, abstract_device=DEVICE)
    tokens, heads = PartitionSpec("batch", "heads"), PartitionSpec("heads")
    B, H, L, f, K = 4, 4, 128, 64, 16
    q, params, norm = struct(B, H, L, f, dtype=jnp.bfloat16), (struct(H, f, f), struct(H, 1, f)), (struct(H, f),) * 2
    args = (q, q, q, struct(K), struct(B, H, L), params, norm)

    def out(*args):
        return api.ttt_linear_scan(*args, mini_batch=K, implementation="pallas_mgpu")[0]

    specs = (tokens, tokens, tokens, PartitionSpec(), tokens, (heads,) * 2, (heads,) * 2)
    sharded = jax.shard_map(out, in_specs=specs, out_specs=tokens)
    gradient = lambda function: jax.grad(lambda *x: jnp.sum(function(*x).astype(jnp.float32)), (0, 5))  # noqa: E731
    axes = (None,) * 5 + (0, None)
    stacked = (*args[:5], jax.tree.map(lambda x: struct(2, *x.shape), params), norm)
    forms = {"shard_map": (gradient(sharded), args), "vmap": (jax.vmap(gradient(out), axes), stacked)}
    function, arguments = forms[form]
    with use_abstract_mesh(mesh):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("ttt_linear_") >= 2


def test_newton_schulz_lowers_inside_shard_map_and_vmap():
    mesh = AbstractMesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=DEVICE)
    run = partial(newton_schulz, dtype="bfloat16", implementation="pallas_mgpu")
    sharded = jax.shard_map(run, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    for function in (sharded, jax.vmap(run)):
        gradient = jax.grad(lambda g: jnp.sum(function(g)))  # noqa: B023
        with use_abstract_mesh(mesh):
            text = jax.jit(gradient).trace(struct(4, 3, 100, 64)).lower(lowering_platforms=("cuda",)).as_text()
        assert "newton_schulz_steps" in text


@pytest.mark.gpu
def test_on_the_device():
    if complaint := "no GPU" if jax.default_backend() != "gpu" else hopper_refusal():
        pytest.skip(complaint)
    jitted = lambda function, *args: jax.jit(function)(*args)  # noqa: E731
    with jax.default_matmul_precision("highest"):  # of the reference: by default its float32 products would be TF32
        check_on_the_device(jitted)


def check_on_the_device(run):
    check_lact(run, N=4, C=2648, d=512, h=512)
    check_ttt(run, K=16, n=12, group=4, N=8)
    check_ttt(run, K=64, n=8, group=4, N=8)
    check_ttt(run, K=16, n=12, group=4, N=8, units=256)
    check_ttt(run, K=64, n=20, group=None, N=8, units=256)
    check_newton_schulz(run, 12, 512, 512)
    check_newton_schulz(run, 3, 300, 200)
    check_newton_schulz(run, 48, 128, 256)
    check_newton_schulz(run, 5, 48, 64)
