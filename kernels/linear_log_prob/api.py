"""Log-probabilities of given tokens straight from hidden states and the output head, without logits `[..., V]`.

The step of a language model's loss that holds the most memory: at V = 150,000 the logits of a batch outweigh the rest
of the forward pass. Public function and choice of implementation; `reference.py` is the definition.
"""

import jax.numpy as jnp

from rollax.kernels.linear_log_prob.reference import reference
from rollax.kernels.linear_log_prob.xla import chunked

LOGITS_AT_ONCE = 2**25  # 128 MiB of float32: large enough for full matrix units, small beside any model worth chunking
IMPLEMENTATIONS = (None, "reference", "xla")


def linear_log_prob(hidden, head, targets, *, temperature=1.0, chunk=None, implementation=None):
    """log softmax(hidden @ head / temperature)[target] and the entropy of that distribution.

    Logits are formed, divided and normalised in float32 (or wider, as the inputs are); the gradient is exact in
    hidden, head and temperature.

    Args:
      hidden: `[..., D]`.
      head: `[D, V]`.
      targets: integers `[...]`; one outside `[0, V)` counts as the nearest id, so mask padding afterwards.
      temperature: positive number, may be traced.
      chunk: tokens whose logits exist at one time ("xla"); None for about 2^25 logits.
      implementation: "reference" holds all logits and has derivatives of every kind; "xla" holds a chunk of them and
        has a gradient only (no forward mode); None for "xla".
    Returns:
      (log_prob `[...]`, entropy `[...]`), both in nats and float32 at least.
    Raises:
      ValueError: shapes that do not fit, targets that are no integers, a chunk below 1, an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    hidden, head, targets = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)
    if head.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"hidden must be [..., D] and head [D, V], got {hidden.shape} and {head.shape}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {hidden.shape[:-1]}, got {targets.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if jnp.ndim(temperature) != 0:
        raise ValueError(f"temperature must be a scalar, got shape {jnp.shape(temperature)}")
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    V = head.shape[1]
    targets = jnp.clip(targets, 0, V - 1)
    if implementation == "reference":
        return reference(hidden, head, targets, temperature)
    tokens = hidden.reshape(-1, hidden.shape[-1])
    size = max(1, LOGITS_AT_ONCE // V) if chunk is None else chunk
    chunks = max(1, -(-tokens.shape[0] // size))
    wide = jnp.promote_types(jnp.result_type(hidden, head), jnp.float32)
    temperature = jnp.asarray(temperature, wide)
    outputs = chunked(tokens, head, targets.reshape(-1), temperature, chunks)
    return tuple(x.reshape(targets.shape) for x in outputs)
