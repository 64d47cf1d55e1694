"""Log-probabilities of tokens from hidden states against the plain log-softmax, and tokamax where it is installed.

    python experiments/benchmarks/log_probs.py
    python experiments/benchmarks/log_probs.py --tokens 4096 --width 2048 --vocabularies 151936 --dtype bfloat16  # GPU

One case a vocabulary and pass: the loss that is the mean of the log-probabilities, and its gradient with respect to
hidden states and head. tokamax has the loss (`linear_softmax_cross_entropy_loss`) and no entropy, so neither side
computes more than the loss asks for. The JSON file also has the temporary bytes of each compiled program, and the error
against the peer: of the loss, of its gradients too where they are the case.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from rollax.experiments.benchmarks.timing import Row, compile_timed, duel, publish, seconds_of
from rollax.experiments.harness.command_line import one_line_end, parse
from rollax.kernels.linear_log_prob import linear_log_prob


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    tokens: int = 512
    """T, of one step."""
    width: int = 576
    """D, of the hidden states."""
    vocabularies: tuple[int, ...] = (49_152, 151_936)
    """V, one case a pass each."""
    dtype: str = "float32"
    """Of hidden states and head."""
    repeats: int = 5
    """Interleaved repeats."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/log_probs.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        for field in ("tokens", "width", "vocabularies", "repeats"):
            value = getattr(self, field)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{field}: expected at least 1, got {value}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {self.dtype!r}")


def ours(hidden, head, targets):
    return -linear_log_prob(hidden, head, targets)[0].mean()


def plain(hidden, head, targets):
    """All logits in memory, in float32."""
    logits = jnp.einsum("td,dv->tv", hidden, head, preferred_element_type=jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1).mean()


def tokamax_loss(hidden, head, targets):
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, head, reduction="mean")


def peers() -> dict[str, Callable]:
    found = {"log_softmax": plain}
    return found | ({"tokamax": tokamax_loss} if importlib.util.find_spec("tokamax") else {})


def relative_error(a, b) -> float:
    """The norm of the difference over that of b."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def measure(config: Config, vocabulary: int, step: str, name: str, peer: Callable) -> Row:
    """One case against one peer; one that cannot take the call is left out and the reason noted."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (config.tokens, config.width), config.dtype)
    head = config.width**-0.5 * jax.random.normal(keys[1], (config.width, vocabulary), config.dtype)
    args = (hidden, head, jax.random.randint(keys[2], (config.tokens,), 0, vocabulary))
    program = lambda f: f if step == "loss" else jax.value_and_grad(f, (0, 1))  # noqa: E731
    compiled, seconds = compile_timed(program(ours), *args)
    notes = {"peer": name, "temporary_bytes": {"ours": compiled.memory_analysis().temp_size_in_bytes}}
    theirs, compile_peer = None, None
    try:
        theirs, compile_peer = compile_timed(program(peer), *args)
        notes["temporary_bytes"][name] = theirs.memory_analysis().temp_size_in_bytes
        mine, other = (jax.tree.leaves(f(*args)) for f in (compiled, theirs))
        notes["losses"] = [float(mine[0]), float(other[0])]
        notes["peer_error"] = max(map(relative_error, mine, other))
    except Exception as error:
        notes["left_out"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return duel(
        f"V {vocabulary}, {step}, {name}",
        "tokens/s",
        config.tokens,
        config.repeats,
        lambda: seconds_of(compiled, *args),
        theirs and (lambda: seconds_of(theirs, *args)),
        compile_ours=seconds,
        compile_peer=compile_peer,
        notes=notes,
    )


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    rows = [
        measure(config, vocabulary, step, name, peer)
        for vocabulary in config.vocabularies
        for step in ("loss", "gradient")
        for name, peer in peers().items()
    ]
    for row in rows:
        sizes = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in row.notes["temporary_bytes"].items())
        print(f"{row.case}: temporary {sizes}{'; left out: ' + row.notes['left_out'] if not row.peer else ''}")
    versions = {name: importlib.metadata.version(name) for name in peers() if name == "tokamax"}
    publish("log_probs", rows, config, {"log_softmax": "of jax"} | versions, config.out)


if __name__ == "__main__":
    main()
