"""Objectives: losses, advantages, rewards and estimators as pure functions of arrays.

Alphabet: `B` batch, `T` tokens or time, `N` environments, `P` prompts, `G` group. Losses come out per token and
`aggregate` reduces them. What stands on padding must be a number, not NaN: a mask cannot undo NaN in a gradient.
"""

from rollax.objectives.advantages import (
    ADVANTAGES,
    discounted_returns,
    dr_grpo_advantages,
    gae,
    gae_time_major,
    group_is_constant,
    grpo_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    reinforce_rewards,
    rloo_advantages,
    vapo_gae,
    vapo_lambda,
    whiten,
)
from rollax.objectives.band import band_bounds, binary_divergence, register_divergence, relax_bounds
from rollax.objectives.kl import kl_estimate, ratio_weighted_kl
from rollax.objectives.mismatch import (
    icepop_weights,
    masked_weights,
    opsm_mask,
    rejection_mask,
    sequence_mask,
    truncated_weights,
)
from rollax.objectives.preference import dpo_loss, ipo_loss, kto_loss, kto_reference_point
from rollax.objectives.reduction import MODES, aggregate, denominator, masked_mean
from rollax.objectives.rewards import dynamic_sampling_mask, overlong_penalty, pass_at_k
from rollax.objectives.surrogates import (
    cispo_surrogate,
    clip_bounds,
    clip_metrics,
    clipped_surrogate,
    dcpo_bounds,
    dppo_mask,
    gmpo_surrogate,
    gspo_surrogate,
    masked_surrogate,
    policy_gradient,
    sapo_surrogate,
    sequence_log_ratio,
    vespo_surrogate,
)

__all__ = [
    "ADVANTAGES",
    "MODES",
    "aggregate",
    "band_bounds",
    "binary_divergence",
    "cispo_surrogate",
    "clip_bounds",
    "clip_metrics",
    "clipped_surrogate",
    "dcpo_bounds",
    "denominator",
    "discounted_returns",
    "dpo_loss",
    "dppo_mask",
    "dr_grpo_advantages",
    "dynamic_sampling_mask",
    "gae",
    "gae_time_major",
    "gmpo_surrogate",
    "group_is_constant",
    "grpo_advantages",
    "gspo_surrogate",
    "icepop_weights",
    "ipo_loss",
    "kl_estimate",
    "kto_loss",
    "kto_reference_point",
    "masked_mean",
    "masked_surrogate",
    "masked_weights",
    "opsm_mask",
    "overlong_penalty",
    "pass_at_k",
    "policy_gradient",
    "ratio_weighted_kl",
    "register_divergence",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "reinforce_rewards",
    "rejection_mask",
    "relax_bounds",
    "rloo_advantages",
    "sapo_surrogate",
    "sequence_log_ratio",
    "sequence_mask",
    "truncated_weights",
    "vapo_gae",
    "vapo_lambda",
    "vespo_surrogate",
    "whiten",
]
