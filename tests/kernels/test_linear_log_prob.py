"""The chunked log-probabilities against their definition: values, gradients, and that no [tokens, V] array exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rollax.kernels.linear_log_prob import api, linear_log_prob
from rollax.tests.support import compiled

B, T, D, V = 3, 7, 16, 50


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D))
    head = jax.random.normal(keys[1], (D, V)) * 0.5
    return hidden, head, jax.random.randint(keys[2], (B, T), 0, V)


def loss(hidden, head, targets, temperature, **how):
    log_prob, entropy = linear_log_prob(hidden, head, targets, temperature=temperature, **how)
    weights = jnp.linspace(-1, 1, B * T).reshape(B, T)
    return jnp.sum(weights * log_prob + jnp.cos(3 * weights) * entropy), (log_prob, entropy)


value_and_grad = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1, 3), has_aux=True), static_argnames=("chunk", "columns", "implementation")
)


log_probs = compiled(linear_log_prob, static_argnames=("chunk", "columns", "implementation"))


def test_reference_is_the_definition(inputs):
    hidden, head, targets = (np.asarray(x, np.float64) for x in inputs)
    logits = hidden @ head / 0.7
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_prob, entropy = linear_log_prob(*inputs, temperature=0.7, implementation="reference")
    expected = np.take_along_axis(log_probs, targets.astype(int)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, -(np.exp(log_probs) * log_probs).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("chunk", "columns"),
    [(1, None), (4, None), (21, None), (100, None), (None, None), (4, 17), (None, 25), (21, 50), (5, 1)],
)
def test_tiles_equal_reference(inputs, chunk, columns):
    hidden, head, targets = inputs
    expected = value_and_grad(hidden, head, targets, 0.7, implementation="reference")
    actual = value_and_grad(hidden, head, targets, 0.7, chunk=chunk, columns=columns)
    (_, aux), gradients = actual
    (_, expected_aux), expected_gradients = expected
    for a, b in zip((*aux, *gradients[:2]), (*expected_aux, *expected_gradients[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[2], expected_gradients[2], rtol=1e-5)  # temperature: a sum over everything


def test_gradients_are_finite_differences(inputs):
    hidden, head, targets = inputs
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), "float64") for x in (hidden[:1, :3], head, 0.7)]
        f = jax.jit(lambda h, w, t: linear_log_prob(h, w, targets[:1, :3], temperature=t, chunk=2, columns=24))
        assert f(*wide)[0].dtype == jnp.float64
        check_grads(f, wide, order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_logits_far_from_zero_lose_nothing(inputs):
    """Every logit moved by 1000: sums over blocks of columns must not subtract large numbers from each other."""
    hidden, head, targets = inputs
    moved = jnp.concatenate([hidden, jnp.full((B, T, 1), 1000.0)], axis=-1)
    still = jnp.concatenate([hidden, jnp.zeros((B, T, 1))], axis=-1)
    head = jnp.concatenate([head, jnp.ones((1, V))])
    for columns in (17, 50):
        plain, far = (log_probs(x, head, targets, columns=columns) for x in (still, moved))
        for a, b in zip(far, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # the logits themselves are rounded to 6e-5


def test_bfloat16_accumulates_in_float32(inputs):
    hidden, head, targets = (inputs[0].astype(jnp.bfloat16), inputs[1].astype(jnp.bfloat16), inputs[2])
    wide = log_probs(hidden.astype(jnp.float32), head.astype(jnp.float32), targets)
    for how in ({"implementation": "reference"}, {"chunk": 4}):
        narrow = log_probs(hidden, head, targets, **how)
        assert all(x.dtype == jnp.float32 for x in narrow)
        for a, b in zip(narrow, wide, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    (_, _), gradients = value_and_grad(hidden, head, targets, 1.0, chunk=4)
    (_, _), expected = value_and_grad(hidden.astype(jnp.float32), head.astype(jnp.float32), targets, 1.0)
    assert gradients[0].dtype == gradients[1].dtype == jnp.bfloat16
    for a, b in zip(gradients[:2], expected[:2], strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.03, atol=0.03)


def test_float32_products_are_exact_on_every_platform(inputs):
    """Logits and both gradients; of bfloat16 no operand is widened, which would cost several products."""
    hidden, head, targets = inputs

    def program(dtype):
        loss = lambda *x: linear_log_prob(*x, targets, columns=20)[0].sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden.astype(dtype), head.astype(dtype))
        return [e for e in equations_in(jaxpr.jaxpr) if e.primitive.name == "dot_general"]

    assert len(program(jnp.float32)) == 4
    for dtype in (jnp.float32, jnp.bfloat16):
        for product in program(dtype):
            kept = (jax.lax.Precision.HIGHEST,) * 2 if dtype == jnp.float32 else None
            assert product.params["precision"] == kept
            assert all(operand.aval.dtype == dtype for operand in product.invars)


def equations_in(jaxpr):
    """Those of a jaxpr and of all jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations_in(inner)


def sizes_in(jaxpr):
    """The number of elements of every value in a jaxpr and all jaxprs inside it."""
    for equation in equations_in(jaxpr):
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))


@pytest.mark.parametrize("tile", [{"chunk": 64}, {"columns": 64}, {"chunk": 128, "columns": 128}])
@pytest.mark.parametrize("step", ["forward", "backward"])
def test_no_pass_holds_all_logits(step, tile):
    """Neither in the program as traced nor, by its memory analysis, as compiled."""
    tokens, width, vocab = 1024, 8, 1024
    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((4, 256, width), (width, vocab))]
    targets = jax.ShapeDtypeStruct((4, 256), "int32")

    def program(implementation):
        def f(h, w, t):
            return sum(x.sum() for x in linear_log_prob(h, w, t, implementation=implementation, **tile))

        return f if step == "forward" else jax.grad(f, argnums=(0, 1))

    largest, temporary = {}, {}
    for name in ("reference", "xla"):
        largest[name] = max(sizes_in(jax.make_jaxpr(program(name))(*shapes, targets).jaxpr))
        executable = jax.jit(program(name)).lower(*shapes, targets).compile()
        temporary[name] = executable.memory_analysis().temp_size_in_bytes
    logits = tile.get("chunk", tokens) * tile.get("columns", vocab)
    assert largest["reference"] >= tokens * vocab
    assert largest["xla"] <= logits
    assert temporary["xla"] < 4 * tokens * vocab / 2 < temporary["reference"]


def test_one_device_cuts_the_vocabulary_and_several_do_not(monkeypatch):
    assert api.tile_of(4096, 151_936, None, None) == (19, 151_936)
    assert api.tile_of(4096, 151_936, None, 8192) == (1, 8192)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert api.tile_of(4096, 151_936, None, None) == (1, 8192)
    assert api.tile_of(10_000, 151_936, None, None) == (3, 8192)
    assert api.tile_of(100, 50_000, None, None) == (1, 50_000)
    assert api.tile_of(4096, 151_936, 64, None) == (64, 151_936)


def test_explain_says_what_runs(inputs, capsys):
    linear_log_prob(*inputs, explain=True)
    assert capsys.readouterr().out.startswith("linear_log_prob: xla")


def test_vmap_over_models_and_temperatures(inputs):
    hidden, head, targets = inputs
    heads, temperatures = np.stack([head, 2 * head]), np.array([0.5, 1.5], np.float32)

    def total(w, t):
        log_prob, entropy = linear_log_prob(hidden, w, targets, temperature=t, chunk=4)
        return log_prob.sum() + entropy.sum(), (log_prob, entropy)

    both = jax.grad(total, argnums=(0, 1), has_aux=True)
    one, together = compiled(both), compiled(jax.vmap(both))(heads, temperatures)
    for i in range(2):
        alone = one(heads[i], temperatures[i])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


def test_padding_targets_are_clipped_not_nan(inputs):
    hidden, head, targets = inputs
    for how in ({"implementation": "reference"}, {"chunk": 4}):
        log_prob, _ = linear_log_prob(hidden, head, targets.at[0, 0].set(-7).at[0, 1].set(V + 3), **how)
        expected, _ = linear_log_prob(hidden, head, targets.at[0, 0].set(0).at[0, 1].set(V - 1), **how)
        np.testing.assert_array_equal(log_prob, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fast"}, "implementation must be one of .* got 'fast'"),
        ({"implementation": "interpret"}, "linear_log_prob has no such kernel"),
        ({"columns": 0}, "columns must be at least 1, got 0"),
        ({"hidden": jnp.zeros((B, T, D + 1))}, r"hidden must be \[..., D\] and head \[D, V\]"),
        ({"targets": jnp.zeros((B, T - 1), int)}, r"targets must have shape \(3, 7\)"),
        ({"targets": jnp.zeros((B, T))}, "targets must be integers, got float32"),
        ({"temperature": jnp.ones(3)}, r"temperature must be a scalar, got shape \(3,\)"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_bad_arguments(inputs, change, message):
    arguments = dict(zip(("hidden", "head", "targets"), inputs, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        linear_log_prob(**arguments)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_shard_map_over_tokens(inputs, implementation):
    """The head is shared, and its gradient summed over the devices."""
    hidden, head, targets = inputs[0].reshape(-1, D)[:20], inputs[1], inputs[2].reshape(-1)[:20]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = lambda *args: linear_log_prob(*args, temperature=0.7, implementation=implementation)  # noqa: E731
    total = lambda f: jax.jit(  # noqa: E731
        jax.value_and_grad(lambda h, w: sum(jnp.sum(jnp.sin(x)) for x in f(h, w, targets)), (0, 1))
    )
    tokens = jax.sharding.PartitionSpec("data")
    specs = (tokens, jax.sharding.PartitionSpec(), tokens)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(tokens, tokens))
    together, alone = (jax.tree.leaves(total(f)(hidden, head)) for f in (sharded, run))
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero", [np.float32(0), np.zeros(()), jnp.zeros(())], ids=["scalar", "numpy", "jax"])
def test_a_temperature_of_zero_in_any_form(inputs, zero):
    call = lambda: linear_log_prob(*inputs, temperature=zero)  # noqa: E731
    for one in (call, lambda: jax.eval_shape(call)):  # a constant of a traced program too
        with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
            one()
