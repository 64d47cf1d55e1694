"""Log-probabilities of given tokens straight from hidden states and the output head, without logits `[..., V]`.

The step of a language model's loss that holds the most memory: at V = 150,000 the logits of a batch outweigh the rest
of the forward pass. Public function and choice of implementation; `reference.py` is the definition.

There is no Pallas kernel, and so far no need of one: all but a few per cent of the time are three products of large
matrices (four in all, one repeated), which XLA runs at the speed of the matrix unit, and a tile of logits is written
and read while 2 D operations are done for each of its numbers. kernels/README.md has the figures.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rollax.kernels import backends
from rollax.kernels.linear_log_prob.reference import reference
from rollax.kernels.linear_log_prob.xla import tiled

LOGITS_AT_ONCE = 2**25  # 128 MiB of float32: large enough for full matrix units, small beside any model worth tiling
TOKENS_AT_ONCE = 4096  # of a tile, where the vocabulary is cut too: about as many as columns, which moves the least


def tile_of(tokens: int, vocabulary: int, chunk: int | None, columns: int | None) -> tuple[int, int]:
    """(number of chunks of tokens, columns of a block of the head), see `linear_log_prob`."""
    if columns is None:
        # On several devices the vocabulary may be sharded, and a slice of it would move the head between them.
        uncut = chunk is not None or jax.device_count() > 1
        at_once = min(tokens, TOKENS_AT_ONCE) if chunk is None else chunk
        columns = vocabulary if uncut else LOGITS_AT_ONCE // max(1, at_once)
    columns = max(1, min(columns, vocabulary))
    size = max(1, LOGITS_AT_ONCE // columns) if chunk is None else chunk
    return max(1, -(-tokens // size)), columns


def linear_log_prob(
    hidden,
    head,
    targets,
    *,
    temperature=1.0,
    chunk=None,
    columns=None,
    implementation=None,
    explain=False,
):
    """log softmax(hidden @ head / temperature)[target] and the entropy of that distribution.

    Logits are formed, divided and normalised in float32 (or wider, as the inputs are); the gradient is exact in
    hidden, head and temperature.

    Args:
      hidden: `[..., D]`.
      head: `[D, V]`.
      targets: integers `[...]`; one outside `[0, V)` counts as the nearest id, so mask padding afterwards.
      temperature: positive number, may be traced.
      chunk: tokens whose logits exist at one time ("xla"); None for as many as make 2^25 logits.
      columns: words of the vocabulary whose logits exist at one time ("xla"); None for V where `chunk` is given or
        there are several devices, which may share the vocabulary, else for as many as make 2^25 logits.
      implementation: see `rollax.kernels.backends.resolve`. "reference" holds all logits and has derivatives of every
        kind; "xla" holds a tile of them and has a gradient only (no forward mode). There is no kernel.
      explain: print which implementation runs, and why.
    Returns:
      (log_prob `[...]`, entropy `[...]`), both in nats and float32 at least.
    Raises:
      ValueError: shapes that do not fit, targets that are no integers, a temperature that is not positive (unless
        traced), chunk or columns below 1, an implementation that there is not.
    """
    chosen = backends.resolve("linear_log_prob", implementation, {}, explain=explain)
    hidden, head, targets = jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(targets)
    if head.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != head.shape[0]:
        raise ValueError(f"hidden must be [..., D] and head [D, V], got {hidden.shape} and {head.shape}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have shape {hidden.shape[:-1]}, got {targets.shape}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers, got {targets.dtype}")
    if jnp.ndim(temperature) != 0:
        raise ValueError(f"temperature must be a scalar, got shape {jnp.shape(temperature)}")
    if not isinstance(temperature, jax.core.Tracer) and not np.asarray(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    for name, value in (("chunk", chunk), ("columns", columns)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    V = head.shape[1]
    targets = jnp.clip(targets, 0, V - 1)
    if chosen == "reference":
        return reference(hidden, head, targets, temperature)
    tokens = hidden.reshape(-1, hidden.shape[-1])
    chunks, columns = tile_of(tokens.shape[0], V, chunk, columns)
    wide = jnp.promote_types(jnp.result_type(hidden, head), jnp.float32)
    temperature = jnp.asarray(temperature, wide)
    arrays = backends.alike(tokens, head, targets.reshape(-1), temperature)
    outputs = tiled(*arrays, chunks, columns)
    return tuple(x.reshape(targets.shape) for x in outputs)
