"""Generated tokens a second against Hugging Face transformers: the same SmolLM2 weights, greedy, float32, both cores.

    python experiments/benchmarks/generation.py
    python experiments/benchmarks/generation.py --python python3.11 --index https://download.pytorch.org/whl/cpu

Prompts and continuations have fixed lengths and nothing stops early; the two continuations are compared token by token.
An interpreter that has torch and transformers is taken as it is (--python, or else this one); otherwise the first run
puts them into `.cache/benchmarks/transformers`. The weights are written once as a Hugging Face directory beside it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rollax.agents import Pretrained, Sampling, generate, load_pretrained, save_pretrained
from rollax.experiments.benchmarks.peer import CACHE, Peer, interpreter, serving
from rollax.experiments.benchmarks.timing import Row, compile_timed, duel, publish, seconds_of
from rollax.experiments.harness.command_line import one_line_end, parse

TRANSFORMERS = Peer(
    "transformers",
    ("torch", "transformers"),
    ("torch==2.13.0", "transformers==5.24.0"),
    shared=False,
    dependencies=True,
)


@dataclass(frozen=True)
class Config:
    """The benchmark."""

    model: str = "smollm2"
    """What to load: "smollm2", or a Hugging Face directory or GGUF file."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Rows generated at once, one case each."""
    prompt: int = 64
    """Tokens of each prompt."""
    new: int = 64
    """Tokens generated for each row."""
    temperature: float = 0.0
    """Greedy at 0. Above, both sides sample, and the continuations are not compared."""
    repeats: int = 7
    """Interleaved repeats."""
    block_decode: bool = False
    """Read the cache block by block up to the last slot in use (`TransformerConfig.block_decode`)."""
    peer: bool = True
    """Measure transformers too."""
    python: str = os.environ.get("ROLLAX_PEER_PYTHON", "")
    """Interpreter for transformers (default: $ROLLAX_PEER_PYTHON); empty for this one."""
    index: str = ""
    """A further index for pip, such as that of torch's builds for CPUs."""
    out: str = ""
    """The JSON file; empty for runs/benchmarks/generation.json."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches: expected numbers of at least 1, got {self.batches}")
        for field in ("prompt", "new", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected at least 0, got {self.temperature}")


def prompts(batch: int, length: int, pretrained: Pretrained) -> np.ndarray:
    """int32 `[B, P]`: rows of counting text, each from another number on; any ids where there is no tokenizer."""
    if pretrained.tokenizer is None:
        return np.random.default_rng(0).integers(0, pretrained.config.vocab_size, (batch, length), np.int32)
    texts = (" ".join(str(row + i) for i in range(length)) for row in range(batch))
    return np.array([pretrained.tokenizer.encode(text)[:length] for text in texts], np.int32)


def directory_of(config: Config, pretrained: Pretrained) -> Path:
    """The weights as a Hugging Face directory in float32, written when there is none yet."""
    if Path(config.model).is_dir():
        return Path(config.model).resolve()
    path = CACHE / "models" / Path(config.model).stem
    return path if path.is_dir() else save_pretrained(path, pretrained)


def agreement(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of rows, `[B, A]` each, that are equal to the last token."""
    return float((ours == theirs).all(axis=1).mean())


def measure(batch: int, config: Config, pretrained: Pretrained, ask) -> Row:
    """One case; `ask` is None without the peer."""
    tokens = prompts(batch, config.prompt, pretrained)
    args = (pretrained.params, jax.random.split(jax.random.key(0), batch), jnp.asarray(tokens))

    def run(params, keys, tokens):
        lengths = jnp.full(batch, config.prompt)
        sampling = Sampling(temperature=config.temperature)
        return generate(
            pretrained.model, params, keys, tokens, lengths, max_new_tokens=config.new, sampling=sampling
        ).tokens

    compiled, compile_ours = compile_timed(run, *args)
    ours, notes = np.asarray(compiled(*args)), {}
    if ask:
        theirs = ask("prepare", tokens=tokens.tolist(), new=config.new, temperature=config.temperature)
        if config.temperature == 0:
            notes["equal_rows"] = agreement(ours, np.asarray(theirs["tokens"]))
    return duel(
        f"batch {batch}",
        "tokens/s",
        batch * config.new,
        config.repeats,
        lambda: seconds_of(compiled, *args),
        ask and (lambda: ask("run")),
        warm_up=False,  # both sides have generated once to be compared
        compile_ours=compile_ours,
        notes=notes,
    )


@one_line_end()
def main(argv: list[str] | None = None) -> None:
    config = parse(Config(), __doc__, argv)
    pretrained = load_pretrained(config.model, block_decode=config.block_decode)
    python = interpreter(TRANSFORMERS, config.python, config.index) if config.peer else ""
    if not config.peer:
        rows = [measure(batch, config, pretrained, None) for batch in config.batches]
        publish("generation", rows, config, {}, config.out)
        return
    with serving(python, Path(__file__).with_name("generation_peer.py"), HF_HUB_OFFLINE="1") as ask:
        ask("load", directory=str(directory_of(config, pretrained)), threads=os.cpu_count())
        rows = [measure(batch, config, pretrained, ask) for batch in config.batches]
        for row in rows:
            if (equal := row.notes.get("equal_rows", 1.0)) < 1:
                print(f"{row.case}: {equal:.0%} of the continuations are equal; ties between tokens fall either way")
        publish("generation", rows, config, ask("versions"), config.out)


if __name__ == "__main__":
    main()
