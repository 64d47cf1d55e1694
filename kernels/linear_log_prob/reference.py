"""The readable definition: all logits at once, `[..., V]` in float32, then a log-softmax."""

import jax
import jax.numpy as jnp

from rollax.kernels.backends import product


def reference(hidden, head, targets, temperature):
    """See `rollax.kernels.linear_log_prob.linear_log_prob`; checked arguments, any leading axes."""
    log_probs = jax.nn.log_softmax(product("...d,dv->...v", hidden, head) / temperature, axis=-1)
    log_prob = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return log_prob, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
