"""Which implementation of a kernel runs: the names that every operator shares, and the choice when none is named.

`reference` is the readable definition, `xla` the best form in plain jnp (what CPUs use), `pallas` the kernel of the
platform at hand, `interpret` the TPU kernel run by Pallas' interpreter on any platform. `pallas_tpu` and `pallas_mgpu`
name a kernel wherever the program is traced, as lowering or compiling ahead of time for another platform needs.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = (None, "reference", "xla", "pallas", "pallas_tpu", "pallas_mgpu", "interpret")
KERNEL_OF = {"tpu": "pallas_tpu", "gpu": "pallas_mgpu", "cuda": "pallas_mgpu"}


def named(implementation: str | None, impl: str | None) -> str | None:
    """What the caller named, by either of two names of one argument; ValueError if by both."""
    if implementation is not None and impl is not None:
        raise ValueError(f"implementation and impl are one argument, got {implementation!r} and {impl!r}")
    return impl if implementation is None else implementation


def alike(*arrays):
    """The arrays, varying over the same mesh axes: inside `shard_map` a loop's carry and a kernel's operands must.

    Gradients of an array are summed over the axes that it did not vary over.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset().union(*varying) - mine) for mine in varying]
    return tuple(jax.lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(arrays, missing, strict=True))


def product(equation: str, a, b):
    """`einsum` with sums in float32 at least; products of float32 or wider keep all their bits on every platform.

    With a narrower operand they are at the platform's precision: several passes over it would gain nothing.
    """
    kind = jnp.result_type(a, b)
    narrow = min(a.dtype.itemsize, b.dtype.itemsize) < 4
    wide = jnp.promote_types(kind, jnp.float32)
    return jnp.einsum(equation, a, b, preferred_element_type=wide, precision=None if narrow else "highest")


def counts_in_64_bits() -> str | None:
    """Why a kernel whose indices are int32 does not compile here, None if it does."""
    return "needs JAX's integers of 32 bits, got jax_enable_x64" if jax.config.jax_enable_x64 else None


def asking(implementation: str | None, ask: Callable[[ModuleType], str | None]) -> Callable[[ModuleType], str | None]:
    """`ask` of kernels whose indices are int32; the interpreter does not mind wider ones."""
    return lambda kernels: (implementation != "interpret" and counts_in_64_bits()) or ask(kernels)


def resolve(
    operator: str,
    implementation: str | None,
    refusals: Mapping[str, str | None],
    *,
    explain: bool = False,
    besides: Sequence[str] = (),
) -> str:
    """One of "reference", "xla", "pallas_tpu", "pallas_mgpu", "interpret".

    Args:
      operator: its public name, for messages.
      implementation: one of `IMPLEMENTATIONS`; None takes the platform's kernel where it accepts the call, else "xla".
      refusals: for "pallas_tpu" and "pallas_mgpu", why the kernel cannot take these dtypes and shapes, None if it can;
        one that is absent has no kernel. "interpret" runs the TPU kernel, which then must accept them.
      explain: print the choice and its reason, once a trace.
      besides: the parts of this call that no kernel has, and that are "xla" beside any; for what is printed.
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
        rest = f", xla for {' and '.join(besides)}" if besides and chosen not in ("reference", "xla") else ""
        print(f"{operator}: {chosen} ({reason or f'the kernel for {platform}'}){rest}")
    return chosen


def choose(
    operator: str,
    package: str,
    implementation: str | None,
    ask: Callable[[ModuleType], str | None],
    *,
    explain: bool = False,
    besides: Sequence[str] = (),
) -> str:
    """`resolve` where the kernels are the modules `pallas_tpu` and `pallas_mgpu` of a package.

    Imports the one in question and no other; `ask(module)` says why its kernel cannot take the call, None if it can.
    """
    here = KERNEL_OF.get(jax.default_backend())
    name = {None: here, "pallas": here, "interpret": "pallas_tpu"}.get(implementation, implementation)
    refusals = {name: ask(import_module(f"{package}.{name}"))} if name in KERNEL_OF.values() else {}
    return resolve(operator, implementation, refusals, explain=explain, besides=besides)


def backend(package: str, chosen: str) -> tuple[ModuleType, dict[str, bool]]:
    """(module of a package, further arguments of its functions) of an implementation that `choose` returned."""
    name = "pallas_tpu" if chosen == "interpret" else chosen
    return import_module(f"{package}.{name}"), {"interpret": True} if chosen == "interpret" else {}


def hopper_refusal(device=None) -> str | None:
    """Why no Mosaic GPU kernel runs on a device, None if one may.

    device: None for the first one here if that is a GPU; lowering and compiling ahead of time need none.
    """
    if device is None and jax.default_backend() in ("gpu", "cuda"):
        device = jax.devices()[0]
    if device is None:
        return None
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        return f"needs a Hopper GPU (compute capability 9.0), got {device.device_kind} ({capability})"
    if 12080 <= (version := cuda_version()) < 12091:
        return f"CUDA 12.8.0 to 12.9.0 miscompile causal masks, got version {version}"
    return None


def cuda_version() -> int:
    """Of the runtime, as 1000 major + 10 minor; jax's own attention kernel asks in the same way."""
    from jax._src.lib import cuda_versions

    return cuda_versions.cuda_runtime_get_version()
