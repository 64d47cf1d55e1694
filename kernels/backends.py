"""Which implementation of a kernel runs: the names that every operator shares, and the choice when none is named.

`reference` is the readable definition, `xla` the best form in plain jnp (what CPUs use), `pallas` the kernel of the
platform at hand, `interpret` the TPU kernel run by Pallas' interpreter on any platform. `pallas_tpu` and `pallas_mgpu`
name a kernel wherever the program is traced, as lowering or compiling ahead of time for another platform needs.
"""

from collections.abc import Mapping

import jax

IMPLEMENTATIONS = (None, "reference", "xla", "pallas", "pallas_tpu", "pallas_mgpu", "interpret")
KERNEL_OF = {"tpu": "pallas_tpu", "gpu": "pallas_mgpu", "cuda": "pallas_mgpu"}


def alike(*arrays):
    """The arrays, varying over the same mesh axes: inside `shard_map` a loop's carry and a kernel's operands must.

    Gradients of an array are summed over the axes that it did not vary over.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset().union(*varying) - mine) for mine in varying]
    return tuple(jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True))


def resolve(operator: str, implementation: str | None, refusals: Mapping[str, str | None], *, explain=False) -> str:
    """One of "reference", "xla", "pallas_tpu", "pallas_mgpu", "interpret".

    Args:
      operator: its public name, for messages.
      implementation: one of `IMPLEMENTATIONS`; None takes the platform's kernel where it accepts the call, else "xla".
      refusals: for "pallas_tpu" and "pallas_mgpu", why the kernel cannot take these dtypes and shapes, None if it can;
        one that is absent has no kernel. "interpret" runs the TPU kernel, which then must accept them.
      explain: print the choice and its reason, once a trace.
    Raises:
      ValueError: an unknown name; a named implementation that cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    platform = jax.default_backend()
    here = KERNEL_OF.get(platform)
    refused = lambda name: refusals.get(name, f"{operator} has no such kernel")  # noqa: E731
    if implementation is None:
        reason = f"no kernel for {platform}" if here is None else refused(here)
        chosen = "xla" if reason else here
    else:
        chosen, reason = (here, "the platform's kernel") if implementation == "pallas" else (implementation, "as asked")
        if chosen is None:
            raise ValueError(f"implementation 'pallas' of {operator} needs a TPU or a GPU, this is {platform}")
        kernel = "pallas_tpu" if chosen == "interpret" else chosen
        if kernel.startswith("pallas") and refused(kernel):
            raise ValueError(f"implementation {implementation!r} of {operator} cannot take this: {refused(kernel)}")
    if explain:
        print(f"{operator}: {chosen} ({reason or f'the kernel for {platform}'})")
    return chosen
