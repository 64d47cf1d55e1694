"""Every array of golden/bandpo.npz, losses and gradients: reference code of the libraries, evaluated in float64.

`compute` maps the name of an array (without its case) to its value from our functions; a name that it does not know
fails, so nothing in the file stays unchecked.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax import objectives as ob
from rollax.tests.support import GOLDEN as FOLDER
from rollax.tests.support import compiled

GOLDEN = dict(np.load(FOLDER / "bandpo.npz"))
BOUNDS = [name for name in GOLDEN if name.startswith(("exact_", "code_")) and not name.endswith("_grid")]
OUTPUTS = [name for name in GOLDEN if name.startswith("case_") and "_in_" not in name and not name.endswith("lengths")]
INPUTS = [name for name in GOLDEN if name.endswith("_grid") or "_in_" in name or name.endswith("overlong_lengths")]


def test_every_array_is_an_input_or_checked():
    assert sorted(BOUNDS + OUTPUTS + INPUTS) == sorted(GOLDEN)


# --- Bounds ----------------------------------------------------------------------------------------------------------


@functools.cache
def exact_bounds(divergence, dtype):
    with jax.enable_x64(True):
        log_p = jnp.asarray(np.log(GOLDEN["exact_p_grid"]), dtype)
        delta = jnp.asarray(GOLDEN["exact_delta_grid"], dtype)[:, None]
        bounds = jax.jit(lambda x, d: ob.band_bounds(x, d, divergence))(log_p, delta)
    assert all(x.dtype == dtype for x in bounds)
    return dict(zip(("lower", "upper"), map(np.asarray, bounds), strict=True))


@pytest.mark.parametrize("name", [name for name in BOUNDS if name.startswith("exact_")])
def test_bounds_from_fifty_digits(name):
    _, divergence, side = name.split("_")
    # atol is the rounding of one: a lower bound just before saturation is a difference from one.
    actual = exact_bounds(divergence, "float64")[side]
    np.testing.assert_allclose(actual, GOLDEN[name], rtol=1e-9, atol=1e-15)
    actual = exact_bounds(divergence, "float32")[side]
    np.testing.assert_allclose(actual, GOLDEN[name], rtol=5e-6, atol=2e-7)


@pytest.mark.parametrize("name", [name for name in BOUNDS if name.startswith("code_")])
def test_bounds_of_the_released_operator(name):
    parts = name.removeprefix("code_").split("_")
    dtype = {"f64": "float64", "f32": "float32"}[parts[-2]]
    p = GOLDEN["code_p_grid"]
    with jax.enable_x64(True):
        log_p = jnp.asarray(np.log(p), dtype)
        # Above 1 - 1e-6 the released operator gives its limits at p = 1, which for chi2 are 3e-4 from the bounds.
        at_limit = p > 1 - 1e-6
        if parts[0] == "dcpodac":
            lower, upper = ob.dcpo_bounds(log_p)
        else:
            delta = float(parts[1][1:].replace("p", "."))
            log_p = jnp.where(at_limit, 0.0, log_p)
            lower, upper = ob.band_bounds(log_p, delta, parts[0].removeprefix("band"), upper_max=10.0)
            if parts[2] == "relax":
                lower, upper = ob.relax_bounds(lower, upper, 0.2, 0.28)
    actual, expected = np.asarray({"lower": lower, "upper": upper}[parts[-1]]), GOLDEN[name]
    rtol = 0 if dtype == "float64" else 1e-6  # rounding of the released float32 at 10, beside its bisection's 2e-6
    np.testing.assert_allclose(actual[~at_limit], expected[~at_limit], rtol=rtol, atol=2e-6)
    np.testing.assert_allclose(actual[at_limit], expected[at_limit], rtol=0, atol=2e-5)


# --- Losses, advantages and the rest ---------------------------------------------------------------------------------

ARMS = {
    "ppo02": lambda old: ob.clip_bounds(0.2),
    "ppo02_dual3": lambda old: ob.clip_bounds(0.2),
    "cliphigher": lambda old: ob.clip_bounds(0.2, 0.28),
    "bandkl005": lambda old: ob.band_bounds(old, 0.05, "kl", upper_max=10.0),
    "bandtv005": lambda old: ob.band_bounds(old, 0.05, "tv", upper_max=10.0),
    "bandchi2005": lambda old: ob.band_bounds(old, 0.05, "chi2", upper_max=10.0),
    "bandkl010": lambda old: ob.band_bounds(old, 0.1, "kl", upper_max=10.0),
    "bandkl005_relax": lambda old: ob.relax_bounds(*ob.band_bounds(old, 0.05, "kl", upper_max=10.0), 0.2, 0.28),
    "dcpodac": lambda old: ob.dcpo_bounds(old),
}


class Case:
    """The inputs of one golden case as attributes, and `scalar`, which names a loss and its gradient."""

    def __init__(self, inputs):
        self.__dict__.update(inputs)
        self.rows, self.width = self.mask.shape
        self.out, self.losses = {}, {}

    def scalar(self, name, loss):
        """Note a loss: `loss(new_logp)` becomes `name__loss`, its gradient `name__grad`."""
        self.losses[name] = loss

    def differentiate(self):
        """All losses noted and their gradients."""
        for name, loss in self.losses.items():
            value, gradient = jax.value_and_grad(loss)(self.new_logp)
            self.out |= {f"{name}__loss": value, f"{name}__grad": gradient}

    def token_mean(self, name, loss):
        self.scalar(name, lambda new: ob.aggregate(loss(new), self.mask, "token_mean"))

    def seq_mean(self, name, loss):
        self.scalar(name, lambda new: ob.aggregate(loss(new), self.mask, "seq_mean_token_mean"))

    def metrics(self, name, lower, upper, *, log_ratio=None, dual_clip=None, keys=("clipfrac", "clipfrac_lower")):
        log_ratio = self.new_logp - self.old_logp if log_ratio is None else log_ratio
        m = ob.clip_metrics(log_ratio, self.old_logp, lower, upper, self.advantage, self.mask, dual_clip=dual_clip)
        self.out |= {f"{name}__{keys[0]}": m["clip_fraction"], f"{name}__{keys[1]}": m["dual_clip_fraction"]}
        return m


PG = ("pg_clipfrac", "pg_clipfrac_lower")


def bandpo(c):
    norms = {"seq_mean_token_sum_norm": c.width}  # the older verl of that repository
    for arm, bounds in ARMS.items():
        cap = 3.0 if arm.endswith("dual3") else 10.0

        lower, upper = bounds(c.old_logp)

        def loss(new, mode, lower=lower, upper=upper, cap=cap):
            per_token = ob.clipped_surrogate(new - c.old_logp, c.advantage, lower, upper, dual_clip=cap)
            return ob.aggregate(per_token, c.mask, mode, norm=norms.get(mode))

        for mode in ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"):
            c.scalar(f"bandrepo_{arm}__{mode}", functools.partial(loss, mode=mode))
        m = c.metrics(f"bandrepo_{arm}", lower, upper, dual_clip=cap)
        c.out[f"bandrepo_{arm}__ppo_kl"] = m["ppo_kl"]


def clipped(c):
    def surrogate(new, **options):
        return ob.clipped_surrogate(new - c.old_logp, c.advantage, *ob.clip_bounds(0.2, 0.28), **options)

    c.token_mean("verl_vanilla_020_028_c3_tokenmean", lambda new: surrogate(new, dual_clip=3.0))
    c.token_mean("slime_ppo_c3_tokenmean", lambda new: surrogate(new, dual_clip=3.0))
    c.metrics("verl_vanilla_020_028_c3_tokenmean", 0.8, 1.28, dual_clip=3.0, keys=PG)
    c.seq_mean("trl_grpo", surrogate)
    c.token_mean("trl_dapo", surrogate)
    c.token_mean("trl_delta4", lambda new: surrogate(new, ratio_cap=4.0))
    c.scalar(
        "trl_dr_grpo",
        lambda new: ob.aggregate(surrogate(new), c.mask, "seq_mean_token_sum_norm", norm=c.rows * 32),
    )


def sequence_level(c):
    for low, high, name in ((3e-4, 4e-4, "3em4_4em4"), (0.2, 0.28, "020_028")):
        c.seq_mean(
            f"verl_gspo_{name}_seqmean",
            lambda new, low=low, high=high: ob.gspo_surrogate(
                new, c.old_logp, c.advantage, c.mask, epsilon_low=low, epsilon_high=high, form="token"
            ),
        )
        ratio = ob.sequence_log_ratio(c.new_logp - c.old_logp, c.mask)
        c.metrics(
            f"verl_gspo_{name}_seqmean", 1 - low, 1 + high, log_ratio=jnp.broadcast_to(ratio, c.mask.shape), keys=PG
        )
    c.seq_mean("trl_gspo", lambda new: ob.gspo_surrogate(new, c.old_logp, c.advantage, c.mask))
    c.seq_mean("verl_gmpo_040_040", lambda new: ob.gmpo_surrogate(new, c.old_logp, c.advantage, c.mask))
    outside = jnp.abs(c.new_logp - c.old_logp) > 0.4
    c.out["verl_gmpo_040_040__pg_clipfrac"] = ob.masked_mean(outside & (c.advantage > 0)[:, None], c.mask)
    c.out["verl_gmpo_040_040__pg_clipfrac_lower"] = ob.masked_mean(outside & (c.advantage < 0)[:, None], c.mask)

    def summed(new):
        log_ratio = ob.sequence_log_ratio(new - c.old_logp, c.mask, "sum")
        advantage = ob.rloo_advantages(c.reward, c.group_id)
        return jnp.mean(ob.clipped_surrogate(log_ratio, advantage, *ob.clip_bounds(0.2)))

    c.scalar("trl_rloo_seqsum", summed)


def soft_and_masked(c):
    log_ratio = c.new_logp - c.old_logp
    c.seq_mean("verl_sapo_100_105_seqmean", lambda new: ob.sapo_surrogate(new - c.old_logp, c.advantage))
    zero = jnp.zeros(())
    c.out |= {f"verl_sapo_100_105_seqmean__{key}": zero for key in PG}  # a gate clips nothing
    for name, low, high in (("verl_cispo_lo1_hi4", 1.0, 4.0), ("verl_cispo_020_028", 0.2, 0.28)):
        c.token_mean(
            f"{name}_tokenmean",
            lambda new, low=low, high=high: ob.cispo_surrogate(
                new, c.old_logp, c.advantage, epsilon_low=low, epsilon_high=high
            ),
        )
        m = c.metrics(f"{name}_tokenmean", 1 - low, 1 + high, keys=PG)
        c.out[f"{name}_tokenmean__pg_clipfrac"] = m["outside_fraction"]
    c.token_mean(
        "trl_cispo",
        lambda new: ob.cispo_surrogate(new, c.old_logp, c.advantage, epsilon_high=5.0, epsilon_high_is="bound"),
    )
    for divergence in ("kl", "tv"):
        name = f"verl_dppo_{divergence}_005_c20_tokenmean"
        keep = ob.dppo_mask(c.new_logp, c.old_logp, c.advantage, 0.05, divergence)
        c.token_mean(name, lambda new, keep=keep: ob.masked_surrogate(new, c.old_logp, c.advantage, keep))
        c.out[f"{name}__pg_clipfrac"] = ob.masked_mean(~keep, c.mask)
        c.out[f"{name}__pg_clipfrac_lower"] = ob.masked_mean(log_ratio > np.log(20.0), c.mask)  # truncated ratios
    c.token_mean("verl_gpg_tokenmean", lambda new: ob.policy_gradient(new, c.advantage))
    rloo = ob.rloo_advantages(c.reward, c.group_id)
    c.token_mean("reinforce_rloo_tokenmean", lambda new: ob.policy_gradient(new, rloo))
    ppo_kl = ob.masked_mean(-log_ratio, c.mask)
    c.out |= {f"{name}__ppo_kl": ppo_kl for name in c.losses if name.startswith("verl_")}


def advantages(c):
    def tokens(x):
        return x[:, None] * c.mask

    c.out["verl_adv_grpo_std1"] = tokens(ob.grpo_advantages(c.reward, c.group_id))
    c.out["verl_adv_grpo_std0"] = tokens(ob.dr_grpo_advantages(c.reward, c.group_id))
    c.out["adv_rloo_scalar"] = ob.rloo_advantages(c.reward, c.group_id)
    c.out["verl_adv_rloo"] = tokens(c.out["adv_rloo_scalar"])
    c.out["verl_adv_rfpp_baseline"] = ob.reinforce_plus_plus_baseline_advantages(c.reward, c.group_id, c.mask)
    c.out["verl_ret_rfpp_g099"] = ob.discounted_returns(c.token_reward, c.mask, 0.99)
    c.out["verl_adv_rfpp_g099"] = ob.reinforce_plus_plus_advantages(c.token_reward, c.mask, 0.99)
    for lam, name in ((0.95, "0p95"), (1.0, "1p0")):
        advantage, returns = ob.gae(c.token_reward, c.values, c.mask, 1.0, lam)
        c.out[f"verl_gae_lam{name}_adv_whitened"] = ob.whiten(advantage, c.mask)
        c.out[f"verl_gae_lam{name}_ret"] = returns
    c.out["gae_raw_lam0p95"] = ob.gae(c.token_reward, c.values, c.mask, 1.0, 0.95)[0] * c.mask
    for alpha, name in ((0.05, "0p05"), (0.5, "0p5")):
        advantage, target = ob.vapo_gae(c.token_reward, c.values, c.mask, 1.0, alpha=alpha)
        c.out[f"vapo_adv_raw_alpha{name}"] = advantage * c.mask
        c.out[f"vapo_lambda_alpha{name}"] = ob.vapo_lambda(c.mask.sum(axis=1), alpha)
    c.out["vapo_value_target_lam1"] = target * c.mask


def kl_and_mismatch(c):
    verl = {"log_ratio_clip": 20.0, "value_clip": 10.0}
    for kind in ("k1", "abs", "k2", "k3", "k1+", "k3+"):
        name = f"verl_kl_{kind.replace('+', 'plus')}"
        estimate = functools.partial(ob.kl_estimate, ref_log_prob=c.ref_logp, kind=kind, **verl)
        c.out[name], pullback = jax.vjp(estimate, c.new_logp)
        (c.out[f"{name}_grad"],) = pullback(c.mask)
    c.token_mean("k3_times_ratio_tokenmean", lambda new: ob.ratio_weighted_kl(new, c.old_logp, c.ref_logp))
    logs = (c.old_logp, c.rollout_logp, c.mask)
    c.out["verl_rc_tis_token_2"] = ob.truncated_weights(*logs, cap=2.0)
    c.out["verl_rc_tis_token_2_bn"] = ob.truncated_weights(*logs, cap=2.0, normalize=True)
    c.out["verl_rc_tis_seq_2"] = ob.truncated_weights(*logs, cap=2.0, level="sequence")
    c.out["verl_rc_icepop_token_05_5"] = ob.icepop_weights(*logs, low=0.5, high=5.0)
    c.out["verl_rs_seq_mean_k3_002_mask"] = ob.rejection_mask(*logs, statistic="k3", level="sequence_mean", high=0.02)
    c.out["verl_rs_token_k1_05_2_mask"] = ob.rejection_mask(*logs, low=np.log(0.5), high=np.log(2.0))


def preferences(c):
    even, odd = slice(0, c.rows // 2 * 2, 2), slice(1, c.rows // 2 * 2, 2)
    length = c.mask.sum(axis=1)

    def score(new):
        return ob.sequence_log_ratio(new - c.ref_logp, c.mask, "sum")[:, 0]

    c.scalar("dpo_b01", lambda new: ob.dpo_loss(score(new)[even], score(new)[odd]).mean())
    c.scalar("cdpo_b01_ls01", lambda new: ob.dpo_loss(score(new)[even], score(new)[odd], label_smoothing=0.1).mean())
    c.scalar("ipo_sum_b01", lambda new: ob.ipo_loss(score(new)[even], score(new)[odd]).mean())
    lengths = (length[even], length[odd])
    c.scalar("ipo_lennorm_b01", lambda new: ob.ipo_loss(score(new)[even], score(new)[odd], lengths=lengths).mean())
    z0 = ob.kto_reference_point(score(c.new_logp))  # the golden data have no mismatched pairs and take the batch
    c.out["kto_kl_used"] = z0
    c.scalar("kto_b01", lambda new: ob.kto_loss(score(new), c.reward > 0.5, z0).mean())


@compiled
def everything(inputs, overlong):
    c = Case(inputs)
    for part in (bandpo, clipped, sequence_level, soft_and_masked, advantages, kl_and_mismatch, preferences):
        part(c)
    c.differentiate()
    return c.out | {"overlong_reward_Lmax32_cache8": ob.overlong_penalty(overlong, 32, 8)}


@functools.cache
def compute(case):
    prefix = f"case_{case}_in_"
    inputs = {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}
    with jax.enable_x64(True):
        return everything(inputs, GOLDEN[f"case_{case}_overlong_lengths"])


# Two batches through the same functions.
@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x[5] == "b")) for x in OUTPUTS])
def test_reference_code(name):
    actual, expected = compute(name[5])[name[7:]], GOLDEN[name]
    assert actual.shape == expected.shape
    # The authors' lower bounds carry their bisection's 5e-7, and verl adds 1e-8 to its token counts.
    atol = 1e-7 if "bandrepo_band" in name and name.endswith("loss") else 1e-8
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=atol)
