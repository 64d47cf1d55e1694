"""What several test files use."""

from collections.abc import Callable
from pathlib import Path

import jax

GOLDEN = Path(__file__).parent / "golden"


def compiled(function: Callable, **options) -> Callable:
    """`function` as one program, its results on the host; `options` are those of `jax.jit`.

    What a test does with an array of JAX outside of a program is a program an operation, and time is spent compiling.
    """
    program = jax.jit(function, **options)
    return lambda *args, **kwargs: jax.device_get(program(*args, **kwargs))
