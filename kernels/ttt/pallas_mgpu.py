"""The Hopper kernels of test-time training (Mosaic GPU), and which calls they take.

TTT-Linear: `pallas_mgpu_linear`. TTT-MLP: `pallas_mgpu_mlp`. LaCT: `pallas_mgpu_lact`, `pallas_mgpu_newton_schulz`.
"""

import jax.numpy as jnp

from rollax.kernels.backends import hopper_refusal
from rollax.kernels.ttt.pallas_mgpu_lact import (
    STEP,
    lact_apply,
    lact_apply_backward,
    lact_grads,
    lact_grads_backward,
)
from rollax.kernels.ttt.pallas_mgpu_linear import WIDTH, linear_backward, linear_forward
from rollax.kernels.ttt.pallas_mgpu_mlp import mlp_backward, mlp_forward
from rollax.kernels.ttt.pallas_mgpu_newton_schulz import (
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

WIDEST = 1024  # the steps through the width are unrolled


def refusal(operator, tokens, params, mini_batch=None, group=None) -> str | None:
    """Why the kernels cannot take a call of this operator here, None if they can.

    Args:
      operator: "ttt_linear_scan", "ttt_mlp_scan", or one of the `lact_` operators.
      tokens: q (or k), array or shape, `[..., L, width]`.
      params: fast weights.
      mini_batch: of the TTT operators.
      group: any; TTT-Linear saves its state every 4 mini-batches at the latest.
    """
    if reason := hopper_refusal():
        return reason
    if tokens.dtype not in (jnp.float16, jnp.bfloat16):
        return f"tokens must be float16 or bfloat16, got {tokens.dtype}"
    if any(x.dtype == jnp.float64 for x in params):
        return "fast weights are kept in float32, got float64"
    L, width = tokens.shape[-2:]
    if L == 0:
        return "there are no tokens"
    if operator in ("ttt_linear_scan", "ttt_mlp_scan"):
        if width != WIDTH:
            return f"heads must have width {WIDTH}, got {width}"
        if mini_batch % 8 or not 8 <= mini_batch <= WIDTH:
            return f"mini_batch must be a multiple of 8 up to {WIDTH}, got {mini_batch}"
        return None
    hidden = params[0].shape[-2]
    if width % STEP or width > WIDEST:
        return f"d must be a multiple of {STEP} up to {WIDEST}, got {width}"
    if hidden % STEP:
        return f"h must be a multiple of {STEP}, got {hidden}"
    return None


def ttt_forward(q, k, v, eta_pos, gate, params, ln_weight, ln_bias, *, mini_batch, group=None, save=True):
    """(out `[N, L, f]`, final params, what `ttt_backward` needs): `linear_forward` or `mlp_forward`, as params say."""
    forward = linear_forward if len(params) == 2 else mlp_forward
    args = (q, k, v, eta_pos, gate, params, ln_weight, ln_bias)
    return forward(*args, mini_batch=mini_batch, group=group, save=save)


def ttt_backward(
    q, k, v, eta_pos, gate, params, ln_weight, ln_bias, borders, d_out, d_final, *, mini_batch, group=None
):
    """Cotangents of q, k, v, eta_pos, gate, params, ln_weight, ln_bias: `linear_backward` or `mlp_backward`."""
    backward = linear_backward if len(params) == 2 else mlp_backward
    args = (q, k, v, eta_pos, gate, params, ln_weight, ln_bias, borders, d_out, d_final)
    return backward(*args, mini_batch=mini_batch, group=group)
