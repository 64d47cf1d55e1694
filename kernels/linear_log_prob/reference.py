"""The readable definition: all logits at once, `[..., V]` in float32, then a log-softmax."""

import jax
import jax.numpy as jnp


def reference(hidden, head, targets, temperature):
    """See `rollax.kernels.linear_log_prob.linear_log_prob`; checked arguments, any leading axes."""
    wide = jnp.promote_types(jnp.result_type(hidden, head), jnp.float32)
    logits = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=wide, precision="highest")
    log_probs = jax.nn.log_softmax(logits / temperature, axis=-1)
    log_prob = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return log_prob, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
