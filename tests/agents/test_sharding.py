"""Sharding rules, and that a model on eight devices is the model on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rollax.agents.language_model import token_log_probs
from rollax.agents.sharding import batch_sharding, make_mesh, named_shardings, partition_spec, state_shardings
from rollax.agents.transformer import TransformerConfig, transformer

CONFIG = TransformerConfig(24, width=32, num_layers=2, num_heads=4, num_kv_heads=2, qk_norm=True, tied_head=False)
pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_mesh(mesh):
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert dict(make_mesh({"data": -1, "tensor": 2}).shape) == {"data": 4, "tensor": 2}
    assert dict(make_mesh({"data": 3}).shape) == {"data": 3}
    assert make_mesh({"data": -1}, jax.devices()[2:5]).devices.tolist() == jax.devices()[2:5]
    for shape in ({"data": 16}, {"data": -1, "tensor": 16}):
        with pytest.raises(ValueError, match="does not fit on 8 devices"):
            make_mesh(shape)
    for shape in ({"data": -1, "tensor": -1}, {"data": 0}):
        with pytest.raises(ValueError, match="positive sizes and at most one -1"):
            make_mesh(shape)


def test_rules(mesh):
    assert partition_spec(("embed", "heads", "head_dim"), (32, 4, 8), mesh) == P("fsdp", "tensor", None)
    assert partition_spec(("embed", "kv_heads", "head_dim"), (32, 3, 8), mesh) == P("fsdp", None, None)  # 3 is odd
    assert partition_spec(("vocab", "embed"), (24, 33), mesh) == P("tensor", None)
    assert partition_spec(("batch", None), (8, 5), mesh) == P(("data", "fsdp"), None)
    assert partition_spec(("batch",), (6,), mesh) == P("data")  # by two, not by four
    assert partition_spec(("mlp", "mlp"), (4, 4), mesh) == P("tensor", None)  # a mesh axis is used once
    assert partition_spec(("mlp",), (4,), make_mesh({"data": 8})) == P(None)
    assert partition_spec(("mlp",), (4,), mesh, {"mlp": ("fsdp", "tensor")}) == P(("fsdp", "tensor"))
    assert batch_sharding(mesh, 8) == NamedSharding(mesh, P(("data", "fsdp")))
    with pytest.raises(ValueError, match="no sharding rule for logical axis 'experts'"):
        partition_spec(("experts",), (4,), mesh)
    with pytest.raises(ValueError, match="names must have one entry an axis"):
        partition_spec(("mlp",), (4, 4), mesh)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("changes", [{}, pytest.param({"scan_layers": True, "remat": True}, marks=pytest.mark.slow)])
def test_eight_devices_equal_one(mesh, changes):
    model = transformer(dataclasses.replace(CONFIG, **changes))
    params = jax.jit(model.init)(jax.random.key(0))
    shardings = named_shardings(model.axes, params, mesh)
    q = shardings["layers"] if "scan_layers" in changes else shardings["layers"][0]
    leading = (None,) if "scan_layers" in changes else ()
    assert q["attention"]["q"]["kernel"].spec == P(*leading, "fsdp", "tensor", None)
    assert q["mlp"]["down"]["kernel"].spec == P(*leading, "tensor", "fsdp")

    tokens = jax.random.randint(jax.random.key(1), (8, 11), 0, CONFIG.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(10), (8, 10))

    def loss(params, tokens, positions):
        log_prob, entropy = token_log_probs(model, params, tokens[:, :-1], positions, tokens[:, 1:], chunk=16)
        return jnp.mean(log_prob**2 + entropy), log_prob

    single = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, log_prob), gradient = single(params, tokens, positions)
    rows = batch_sharding(mesh, 8)
    sharded = jax.jit(
        jax.value_and_grad(loss, has_aux=True), in_shardings=(shardings, rows, rows), out_shardings=(None, shardings)
    )
    placed = jax.device_put(params, shardings)
    (value_8, log_prob_8), gradient_8 = sharded(placed, tokens, positions)
    np.testing.assert_allclose(value_8, value, rtol=1e-5)
    np.testing.assert_allclose(log_prob_8, log_prob, atol=1e-5)
    for a, b, place in zip(*map(jax.tree.leaves, (gradient_8, gradient, shardings)), strict=True):
        assert a.sharding.is_equivalent_to(place, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    local = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(placed))
    assert local < 0.35 * sum(leaf.size for leaf in jax.tree.leaves(params))  # a quarter of all but the norms


def test_optimiser_state_follows_its_parameters(mesh):
    model = transformer(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = named_shardings(model.axes, shapes, mesh)
    is_kernel = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", shapes)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.trace(0.9), is_kernel), optax.adam(1e-3), optax.ema(0.9)
    )
    state = jax.eval_shape(optimiser.init, shapes)
    places = state_shardings(state, shapes, shardings, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    _, masked, (adam, _), ema = places
    for tree in (adam.mu, adam.nu, ema.ema):
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, tree, shardings))
    kernel = masked.inner_state.trace["layers"][1]["mlp"]["up"]["kernel"]
    assert kernel == shardings["layers"][1]["mlp"]["up"]["kernel"] and kernel.spec == P("fsdp", "tensor")
    assert adam.count == NamedSharding(mesh, P())
    made = jax.jit(optimiser.init, out_shardings=places)(
        jax.device_put(jax.jit(model.init)(jax.random.key(0)), shardings)
    )
    assert made[2][0].mu["embed"]["embedding"].sharding.spec == P("tensor", "fsdp")
