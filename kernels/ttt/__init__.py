"""Test-time training: memories of fast weights that learn from a sequence while they read it, and their companions."""

from rollax.kernels.ttt.api import (
    FastWeights,
    LinearWeights,
    MLPWeights,
    lact_apply,
    lact_grads,
    ttt_linear_scan,
    ttt_mlp_scan,
)
from rollax.kernels.ttt.conv import depthwise_conv3d
from rollax.kernels.ttt.lact import (
    LactState,
    UpdateRule,
    lact_commit,
    lact_init,
    lact_reset,
    lact_scan,
    lact_segments,
    lact_step,
)
from rollax.kernels.ttt.newton_schulz import FIXED5, MUON5, newton_schulz
from rollax.kernels.ttt.sliding_window import sliding_window_attention

__all__ = [
    "FIXED5",
    "MUON5",
    "FastWeights",
    "LactState",
    "LinearWeights",
    "MLPWeights",
    "UpdateRule",
    "depthwise_conv3d",
    "lact_apply",
    "lact_commit",
    "lact_grads",
    "lact_init",
    "lact_reset",
    "lact_scan",
    "lact_segments",
    "lact_step",
    "newton_schulz",
    "sliding_window_attention",
    "ttt_linear_scan",
    "ttt_mlp_scan",
]
