"""TTT-Linear and TTT-MLP: dual form = primal form, tails, gradients, no future leak, sharding, and memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from rollax.kernels import ttt

B, H, F, K = 2, 2, 4, 4
SCANS = {"linear": ttt.ttt_linear_scan, "mlp": ttt.ttt_mlp_scan}
STATIC = ("mini_batch", "checkpoint_every", "form", "implementation")
PROGRAMS = {kind: jax.jit(scan, static_argnames=STATIC) for kind, scan in SCANS.items()}
IMPLEMENTATIONS = ("xla",)
kinds = pytest.mark.parametrize("kind", SCANS)


def inputs(kind, length, rows=B, width=F, mini_batch=K, dtype=jnp.float32):
    """(q, k, v, eta_pos, gate, params, ln) with weights and rates large enough to matter."""
    normal = lambda i, *shape: np.random.default_rng(i).normal(size=shape).astype(dtype)  # noqa: E731
    q, k, v = (normal(i, rows, H, length, width) for i in range(3))
    eta_pos = (1 / np.arange(1, mini_batch + 1) + 0.1).astype(dtype) / width
    gate = 1 / (1 + np.exp(normal(3, rows, H, length)))
    shapes = ((width, width), (1, width)) if kind == "linear" else ((width, 4 * width), (1, 4 * width))
    shapes += () if kind == "linear" else ((4 * width, width), (1, width))
    params = tuple(0.3 * normal(4 + i, H, *shape) for i, shape in enumerate(shapes))
    return q, k, v, eta_pos, gate, params, (1 + 0.1 * normal(8, H, width), 0.1 * normal(9, H, width))


def loss(run, arguments):
    """A scalar of outputs and final weights, and both."""
    out, params = run(*arguments)
    weigh = lambda x: jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape))  # noqa: E731
    return weigh(out) + sum(map(weigh, params)), (out, params)


def value_and_grad(run, arguments):
    return jax.jit(jax.value_and_grad(partial(loss, run), has_aux=True))(arguments)


def close(actual, expected, tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = 1 + np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


# Shorter than a mini-batch, where both kinds are one tail; two groups of two or one of four, one mini-batch and a tail.
# TTT-MLP has golden gradients, and finite differences with a tail.
@pytest.mark.parametrize(
    ("kind", "length", "group"),
    [
        ("linear", 3, None),
        ("linear", 22, 2),
        *(pytest.param(*x, None, marks=pytest.mark.slow) for x in (("mlp", 3), ("linear", 22), ("mlp", 22))),
    ],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dual_is_primal(kind, implementation, length, group):
    arguments, scan = inputs(kind, length), SCANS[kind]
    dual = value_and_grad(partial(scan, mini_batch=K, checkpoint_every=group, implementation=implementation), arguments)
    close(dual, value_and_grad(partial(scan, mini_batch=K, form="primal"), arguments), 2e-5)


@kinds
def test_primal_is_its_recurrence(kind):
    """Token by token in NumPy float64, with gradients by central differences."""
    q, k, v, eta_pos, gate, params, ln = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs(kind, 6, rows=1))
    norm = lambda z, h: ln[0][h] * (z - z.mean()) / np.sqrt(z.var() + 1e-6) + ln[1][h]  # noqa: E731
    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731

    def model(w, x):
        z = x @ w[0] + w[1][0]
        return z if kind == "linear" else gelu(z) @ w[2] + w[3][0]

    def gradient(w, i, h):
        inner = lambda w: 0.5 * np.sum((norm(model(w, k[0, h, i]), h) - (v - k)[0, h, i]) ** 2)  # noqa: E731
        grads = [np.zeros_like(x) for x in w]
        for n, x in enumerate(w):
            for j in np.ndindex(x.shape):
                e = np.zeros_like(x)
                e[j] = 1e-5
                bumped = lambda s, n=n, e=e: [y + s * e if m == n else y for m, y in enumerate(w)]  # noqa: E731
                grads[n][j] = (inner(bumped(1)) - inner(bumped(-1))) / 2e-5
        return grads

    expected = np.zeros_like(q)
    for h in range(H):
        w = [x[h] for x in params]
        for start in (0, K):
            grads = [gradient(w, i, h) for i in range(start, min(start + K, 6))]
            for i in range(len(grads)):
                rates = [eta_pos[i] * gate[0, h, start + j] for j in range(i + 1)]
                now = [x - sum(r * g[n] for r, g in zip(rates, grads, strict=False)) for n, x in enumerate(w)]
                expected[0, h, start + i] = q[0, h, start + i] + norm(model(now, q[0, h, start + i]), h)
            w = now
    out, _ = PROGRAMS[kind](*inputs(kind, 6, rows=1), mini_batch=K, form="primal")
    np.testing.assert_allclose(out, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", [pytest.param("linear", marks=pytest.mark.slow), "mlp"])  # see `test_dual_is_primal`
def test_gradients_are_finite_differences(kind):
    with jax.enable_x64(True):
        arguments = inputs(kind, 2 * K + 1, rows=1, dtype=jnp.float64)
        run = jax.jit(partial(SCANS[kind], mini_batch=K, checkpoint_every=1))
        check_grads(run, arguments, 1, ["rev"], 1e-6, 1e-6, eps=1e-5)


@kinds
def test_no_token_sees_a_later_one(kind):
    q, k, v, eta_pos, gate, params, ln = inputs(kind, 11)
    run = jax.jit(partial(SCANS[kind], mini_batch=K))
    out, _ = run(q, k, v, eta_pos, gate, params, ln)
    for t in range(11):
        later = np.arange(11) >= t
        changed = [x + later[:, None].astype(x.dtype) for x in (q, k, v)]
        other, _ = run(*changed, eta_pos, np.where(later, 0.5 * gate, gate), params, ln)
        np.testing.assert_array_equal(other[:, :, :t], out[:, :, :t])
        assert not np.allclose(other[:, :, t], out[:, :, t])


# The two models share their loops over mini-batches.
@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_a_stream_goes_on_at_mini_batches(kind):
    q, k, v, eta_pos, gate, params, ln = inputs(kind, 14)
    run = partial(PROGRAMS[kind], mini_batch=K)
    expected = run(q, k, v, eta_pos, gate, params, ln)
    cut = lambda s: (*(x[:, :, s] for x in (q, k, v)), eta_pos, gate[:, :, s])  # noqa: E731
    first, between = run(*cut(slice(0, 2 * K)), params, ln)
    second, final = run(*cut(slice(2 * K, None)), between, ln)
    close((np.concatenate([first, second], 2), final), expected, 1e-6)


def pulled(kind, every, arguments):
    """A function's outputs, and the function from cotangents to gradients with what it keeps."""
    return jax.vjp(lambda a: SCANS[kind](*a, mini_batch=K, checkpoint_every=every), arguments)


@kinds
def test_checkpoints_keep_less(kind):
    arguments = inputs(kind, 8 * K)

    def kept(every):
        _, pull = jax.eval_shape(partial(pulled, kind, every), arguments)
        return sum(x.size for x in jax.tree.leaves(pull) if hasattr(x, "size"))

    state = B * sum(x.size for x in arguments[5])
    assert kept(1) - kept(3) == 5 * state  # eight states or three


@pytest.mark.slow  # `test_dual_is_primal` has two groups, and finite differences groups of one
@kinds
def test_checkpoints_change_no_gradient(kind):
    """In float64: the gradient of `eta_pos` is a sum that cancels, and the two programs add in different orders."""

    def gradient(every, arguments):
        out, pull = pulled(kind, every, arguments)
        return pull(out)

    with jax.enable_x64(True):
        arguments = inputs(kind, 8 * K, dtype=jnp.float64)
        often, rarely = (jax.jit(partial(gradient, every))(arguments) for every in (1, 3))
        close(often, rarely, 1e-12)


@kinds
def test_rate_zero_reads_only(kind):
    q, k, v, eta_pos, gate, params, ln = inputs(kind, 6)
    out, final = PROGRAMS[kind](q, k, v, eta_pos, 0 * gate, params, ln, mini_batch=K)
    for a, b in zip(final, params, strict=True):
        np.testing.assert_array_equal(a, np.broadcast_to(b, a.shape))
    again, _ = PROGRAMS[kind](q, 2 * k, v - 1, eta_pos, 0 * gate, params, ln, mini_batch=K)
    np.testing.assert_array_equal(out, again)


def test_precision_is_that_of_the_tokens():
    """All bits of float32 in both passes; with bfloat16 tokens, whose weights are float32, as the platform likes."""
    arguments = inputs("linear", K + 1)

    def program(dtype):
        narrow = *(x.astype(dtype) for x in arguments[:3]), *arguments[3:]
        gradient = jax.grad(lambda a: jnp.sum(ttt.ttt_linear_scan(*a, mini_batch=K)[0].astype(jnp.float32)))
        return str(jax.make_jaxpr(gradient)(narrow))

    wide = program(jnp.float32)
    assert wide.count("dot_general") == wide.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0
    assert "HIGHEST" not in program(jnp.bfloat16)


def sizes_in(jaxpr):
    """The number of elements of every value in a jaxpr and all jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from sizes_in(inner)


@kinds
def test_dual_never_forms_the_weights_of_a_token(kind):
    width, length = 32, 64
    arguments = inputs(kind, length, width=width, mini_batch=16)
    one_a_token = 16 * B * H * width * width * (1 if kind == "linear" else 4)

    def largest(form):
        gradient = jax.grad(lambda a: loss(partial(SCANS[kind], mini_batch=16, form=form), a)[0])
        return max(sizes_in(jax.make_jaxpr(gradient)(arguments).jaxpr))

    assert largest("dual") < one_a_token <= largest("primal")


@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [2 * K, pytest.param(2 * K + 1, marks=pytest.mark.slow)])
def test_vmap_and_shard_map(kind, length):
    arguments = inputs(kind, length, rows=4)
    run = partial(SCANS[kind], mini_batch=K, checkpoint_every=1)
    gradient = jax.grad(lambda *a: loss(run, a), argnums=range(7), has_aux=True)
    alone = jax.jit(lambda *a: gradient(*a)[::-1])
    expected = alone(*arguments)
    # A sweep over initial weights and rates by position.
    several = list(arguments)
    several[3], several[5] = np.stack([arguments[3], 2 * arguments[3]]), tuple(np.stack([x, -x]) for x in arguments[5])
    several, axes = tuple(several), (None, None, None, 0, None, 0, None)
    other = alone(
        *(a if axis is None else jax.tree.map(lambda x: x[1], a) for a, axis in zip(several, axes, strict=True))
    )
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("batch", "heads"))
    tokens, heads = P("batch", "heads"), P("heads")
    weigh = lambda a: jnp.sum(a * jnp.cos(jnp.arange(a.size)).reshape(a.shape))  # noqa: E731
    weights = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), expected[0])
    assert float(weigh(expected[0][0])) == pytest.approx(float(jnp.sum(expected[0][0] * weights[0])), rel=1e-4)

    def local(arguments, weights):
        def weighed(a):
            out = run(*a)
            return sum(jnp.sum(x * w) for x, w in zip(*map(jax.tree.leaves, (out, weights)), strict=True)), out

        d, out = jax.grad(weighed, has_aux=True)(arguments)
        return out, d  # summed over the devices that share an argument

    specs = (tokens, tokens, tokens, P(), tokens, (heads,) * len(arguments[5]), (heads, heads))
    after = lambda spec: P(None, *spec)  # noqa: E731
    in_specs = [after(x) if axis == 0 else x for x, axis in zip(specs[:5], axes, strict=False)]
    in_specs = (*in_specs, tuple(map(after, specs[5])), specs[6])
    outputs = jax.tree.map(lambda _: tokens, expected[0])
    out_specs = jax.tree.map(after, (outputs, specs), is_leaf=lambda x: isinstance(x, P))
    sweep = jax.vmap(local, in_axes=(axes, None))
    sharded = jax.shard_map(sweep, mesh=mesh, in_specs=(in_specs, outputs), out_specs=out_specs)
    together = jax.jit(sharded)(several, weights)
    close(jax.tree.map(lambda x: x[0], together), expected, 1e-5)
    close(jax.tree.map(lambda x: x[1], together), other, 1e-5)


@pytest.mark.parametrize("kind", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_narrow_tokens_keep_wide_weights(kind):
    arguments = inputs(kind, 3 * K)
    narrow = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), arguments)
    out, final = PROGRAMS[kind](*narrow, mini_batch=K)
    assert out.dtype == jnp.bfloat16 and all(x.dtype == jnp.float32 for x in final)
    expected, _ = PROGRAMS[kind](*arguments, mini_batch=K)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.15, rtol=0.15)


def test_choice_is_explained(capsys):
    arguments = inputs("linear", 3)
    ttt.ttt_linear_scan(*arguments, mini_batch=K, impl="xla", explain=True)
    assert capsys.readouterr().out == "ttt_linear_scan: xla (as asked)\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mini_batch": 0}, "mini_batch must be at least 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"form": "both"}, 'form must be "dual" or "primal", got \'both\''),
        ({"form": "primal", "implementation": "xla"}, 'form "primal" is implementation "reference", got \'xla\''),
        ({"implementation": "fast"}, "implementation must be one of .* got 'fast'"),
        ({"q": jnp.zeros((H, 7, F))}, r"q, k and v must be \[B, H, L, f\]"),
        ({"v": jnp.zeros((B, H, 6, F))}, r"q, k and v must be \[B, H, L, f\]"),
        ({"eta_pos": jnp.zeros(3)}, r"eta_pos must be \[4\], got \(3,\)"),
        ({"gate": jnp.zeros((B, H))}, r"gate must be \[2, 2, 7\]"),
        ({"params": inputs("mlp", 1)[5]}, "params must be"),
        ({"ln": (jnp.ones(F), jnp.ones(F))}, r"ln must be \(weight, bias\) of \[2, 4\]"),
    ],
)
def test_bad_arguments(change, message):
    names = ("q", "k", "v", "eta_pos", "gate", "params", "ln")
    arguments = dict(zip(names, inputs("linear", 7), strict=True)) | {"mini_batch": K}
    with pytest.raises(ValueError, match=message):
        ttt.ttt_linear_scan(**arguments | change)
