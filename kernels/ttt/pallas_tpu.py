"""The Pallas TPU kernels of test-time training: dual form and LaCT, and what they cannot take."""

from rollax.kernels.ttt import pallas_tpu_dual, pallas_tpu_lact
from rollax.kernels.ttt.pallas_tpu_dual import ttt_backward, ttt_forward
from rollax.kernels.ttt.pallas_tpu_lact import (
    lact_apply,
    lact_apply_backward,
    lact_grads,
    lact_grads_backward,
    newton_schulz,
    newton_schulz_backward,
    newton_schulz_refusal,
)

__all__ = [
    "lact_apply",
    "lact_apply_backward",
    "lact_grads",
    "lact_grads_backward",
    "newton_schulz",
    "newton_schulz_backward",
    "newton_schulz_refusal",
    "refusal",
    "ttt_backward",
    "ttt_forward",
]


def refusal(operator, tokens, weights, mini_batch=None, group=None):
    """Why the kernels cannot take a call of an operator, None if they can.

    Args:
      operator: "ttt_..." or "lact_...".
      tokens: array or shape `[..., L, f]`.
      weights: its fast weights, with any leading axes.
      mini_batch, group: as in `ttt_forward`, for "ttt_...".
    """
    if operator.startswith("ttt"):
        return pallas_tpu_dual.refusal(tokens, weights, mini_batch, group)
    return pallas_tpu_lact.refusal(tokens, weights)
