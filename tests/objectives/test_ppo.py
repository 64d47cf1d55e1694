"""RetroAgent's decision loss against the released code's (golden/retroagent.npz, float64), and its limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rollax import objectives as ob
from rollax.tests.support import GOLDEN

FILE = dict(np.load(GOLDEN / "retroagent.npz"))
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum")


def case(prefix):
    return {name.removeprefix(prefix): x for name, x in FILE.items() if name.startswith(prefix)}


def golden_loss(golden, logp, **options):
    numbers = dict(clip=(golden["clip_low"], golden["clip_high"]), dual=golden["dual_clip"], kl=golden["kl_coef"])
    numbers |= dict(ref_logp=golden["ref_logp"]) | options
    return ob.dual_clip_loss(logp, golden["old_logp"], golden["adv"], golden["mask"], **numbers)


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("number", range(2))
def test_released_loss(number, agg):
    golden = case(f"ppo{number}_")
    with jax.enable_x64(True):
        f = jax.jit(jax.value_and_grad(functools.partial(golden_loss, golden, agg=agg), has_aux=True))
        (loss, metrics), gradient = f(golden["new_logp"])
        exact = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)  # its token mean has 1e-8 below
        exact(loss, golden[f"total_{agg}"])
        exact(metrics["pg_loss"], golden[f"pg_{agg}"])
        exact(metrics["kl"], ob.aggregate(golden["k3"], golden["mask"], agg))
        exact(metrics["clip_fraction"], golden["clipfrac"])
        exact(metrics["ppo_kl"], golden["ppo_kl"])
        np.testing.assert_allclose(gradient, golden[f"grad_{agg}"], atol=1e-8)


def test_float32_stays_close():
    golden = case("ppo0_")
    low = {name: jnp.asarray(x, jnp.float32) for name, x in golden.items()}
    loss, _ = golden_loss(low, low["new_logp"])
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, golden["total_token_mean"], rtol=1e-5)


def small(seed=0, shape=(3, 4)):
    keys = jax.random.split(jax.random.key(seed), 4)
    logp, old, ref = (-jnp.exp(0.3 * jax.random.normal(key, shape)) for key in keys[:3])
    return logp, old, ref, jax.random.normal(keys[3], shape)


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    old, mask = jnp.full((1, 3), -3.0), jnp.ones((1, 3))
    logp = jnp.array([[-3.0, -2.0, -0.1]])  # ratios 1, 2.7, 18
    adv = jnp.full((1, 3), -2.0)
    loss, metrics = ob.dual_clip_loss(logp, old, adv, mask, agg="seq_mean_token_sum")
    np.testing.assert_allclose(loss, 2 * (1 + np.e + 3), rtol=1e-6)
    np.testing.assert_allclose(metrics["dual_clip_fraction"], 1 / 3)
    loss, metrics = ob.dual_clip_loss(logp, old, adv, mask, dual=None, agg="seq_mean_token_sum")
    np.testing.assert_allclose(loss, 2 * (1 + np.e + np.exp(2.9)), rtol=1e-6)
    assert metrics["dual_clip_fraction"] == 0


def test_k3_ends_at_ten():
    logp, ref = jnp.array([[-9.0, -1.0]]), jnp.array([[-1.0, -1.5]])  # k3 of the first: e^8 - 9
    f = lambda x: ob.dual_clip_loss(x, x, 0.0 * x, jnp.ones((1, 2)), ref_logp=ref, kl=1.0)[0]  # noqa: E731
    k3 = np.exp(-0.5) - 1 + 0.5
    value, gradient = jax.jit(jax.value_and_grad(f))(logp)
    np.testing.assert_allclose(value, (10 + k3) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, (1 - np.exp(-0.5)) / 2]], rtol=1e-6)


def test_only_the_new_policy_learns():
    logp, old, ref, adv = small()
    mask = jnp.ones(logp.shape)

    @jax.jit
    def loss(logp, old, ref, adv):
        return ob.dual_clip_loss(logp, old, adv, mask, ref_logp=ref, kl=0.5)[0]

    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(logp, old, ref, adv)
    assert np.abs(gradients[0]).max() > 0
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient, 0)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (logp, old, ref, adv)]
        check_grads(lambda x: loss(x, *wide[1:]), wide[:1], order=1, modes=("rev",))


def test_what_is_masked_never_matters():
    logp, old, ref, adv = small()
    mask = jnp.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 1]])
    broken = [jnp.where(mask == 1, x, jnp.nan) for x in (logp, old, ref, adv)]

    def loss(logp, old, ref, adv):
        return ob.dual_clip_loss(logp, old, adv, mask, ref_logp=ref)[0]

    f = jax.jit(loss)
    np.testing.assert_allclose(f(*broken), f(logp, old, ref, adv), rtol=1e-6)
    np.testing.assert_allclose(loss(logp, old, ref, adv), f(logp, old, ref, adv), rtol=1e-6)
    empty, _ = ob.dual_clip_loss(logp, old, adv, jnp.zeros(mask.shape))
    assert empty == 0


def test_row_advantages_parts_and_traced_numbers():
    logp, old, ref, adv = small(1)
    mask = jnp.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    per_row = adv[:, 0]
    loss = jax.jit(
        lambda logp, old, adv, mask, ref, **options: ob.dual_clip_loss(logp, old, adv, mask, ref_logp=ref, **options)[0]
    )
    whole = loss(logp, old, per_row, mask, ref)
    spread = loss(logp, old, jnp.broadcast_to(per_row[:, None], logp.shape), mask, ref)
    np.testing.assert_allclose(whole, spread, rtol=1e-6)
    norm = ob.denominator(mask, "token_mean")
    parts = sum(loss(*(x[i : i + 1] for x in (logp, old, per_row, mask, ref)), norm=norm) for i in range(3))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)

    def at(low, dual, kl):
        return loss(logp, old, per_row, mask, ref, clip=(low, 0.3), dual=dual, kl=kl)

    numbers = jnp.array([[0.1, 3.0, 0.0], [0.3, 1.5, 0.2]])
    together = jax.vmap(lambda x: at(*x))(numbers)
    np.testing.assert_allclose(together, [at(*x) for x in numbers], rtol=1e-6)
    assert np.abs(together[0] - together[1]) > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(clip=(-0.1, 0.2)), "epsilon_low must not be negative, got -0.1"),
        (dict(dual=1.0), "dual_clip must be above 1, got 1.0"),
        (dict(kl=-1.0), "kl must not be negative, got -1.0"),
        (dict(agg="mean"), "mode must be one of .*, got 'mean'"),
        (dict(ref_logp=jnp.zeros((3, 5))), r"ref_logp must have one shape, got .*\(3, 5\)"),
    ],
)
def test_bad_input(options, message):
    logp, old, _, adv = small()
    with pytest.raises(ValueError, match=message):
        ob.dual_clip_loss(logp, old, adv, jnp.ones(logp.shape), **options)
    with pytest.raises(ValueError, match="adv must broadcast"):
        ob.dual_clip_loss(logp, old, adv[:2], jnp.ones(logp.shape))
