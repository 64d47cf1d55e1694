"""From the name of an implementation to the module that has it; modules of kernels are imported when they are asked."""

from importlib import import_module
from importlib.util import find_spec

import jax

from rollax.kernels import backends

KERNELS = ("pallas_tpu", "pallas_mgpu")


def backend(chosen):
    """(module, further arguments of its functions) of an implementation that `choose` returned."""
    name = "pallas_tpu" if chosen == "interpret" else chosen
    return import_module(f"{__package__}.{name}"), {"interpret": True} if chosen == "interpret" else {}


def choose(operator, implementation, explain, ask):
    """`backends.resolve`; `ask(module)` says why a module of kernels cannot take the call, None if it can."""
    refusals = {}
    if implementation not in (None, "reference", "xla") or jax.default_backend() != "cpu":
        modules = [name for name in KERNELS if find_spec(f"{__package__}.{name}")]
        refusals = {name: ask(import_module(f"{__package__}.{name}")) for name in modules}
    return backends.resolve(operator, implementation, refusals, explain=explain)
