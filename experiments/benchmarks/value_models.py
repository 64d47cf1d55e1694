"""What V_0's prior and V_0.5's baseline cost, as a share of an update of a language-model study.

    python experiments/benchmarks/value_models.py
    python experiments/benchmarks/value_models.py --encoder minilm --update pretrained

The update is one of `experiments/bandpo.py`'s small transformer (all seeds in one vmap). The value model reads the
prompts of that update beside a context of 64 records whose features were kept (arXiv 2602.03584, 2603.10848). With
MiniLM it also encodes the prompts, and the update to compare with is that of SmolLM2 (`--update pretrained`, minutes).
Medians of interleaved repeats; compilation apart.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rollax import objectives
from rollax.agents import (
    V0Config,
    adapter,
    context_for,
    empty_records,
    encoder_states,
    load_sentence_encoder,
    record,
    v0_from_features,
    v0_init,
)
from rollax.experiments import bandpo
from rollax.experiments.benchmarks.timing import interleave, seconds_of
from rollax.experiments.harness.command_line import one_line_end
from rollax.experiments.harness.devices import use_compilation_cache
from rollax.experiments.harness.report import show

RECORDS, TOKENS, WIDTH = 64, 32, 64


def update_of(model: str):
    """(function, its arguments, prompts, seeds) of an update of the study, compiled when it is first called."""
    (config,) = bandpo.configs_of(["--model", model]).values()
    config = dataclasses.replace(config, arms=("band_kl",), chunk=1, updates=1, warm_start=0)
    task, policy = bandpo.prepare(config)
    numbers, arms = bandpo.numbers_of(config, [bandpo.Row("band_kl", "band_kl", config.lr)])
    (numbers,) = numbers.values()
    train = bandpo.make_train(config, task, policy, arms)
    if model in bandpo.SMALL:
        state = jax.jit(jax.vmap(train.init))(jax.vmap(jax.random.key)(jnp.arange(config.seeds)))
        return jax.jit(jax.vmap(train.advance, in_axes=(0, None))), (state, numbers), config.prompts, config.seeds
    return jax.jit(train.advance), (train.init(jax.random.key(0)), numbers), config.prompts, 1


def value_model(encoder: str, prompts: int, seeds: int):
    """Functions of one update's prompts, by what they do, and their arguments."""
    ids, mask = jnp.ones((seeds, prompts, TOKENS), jnp.int32), jnp.ones((seeds, prompts, TOKENS), bool)
    sentences = load_sentence_encoder("minilm") if encoder == "minilm" else None
    width = sentences.params["words"].shape[1] if sentences else WIDTH
    config = V0Config(width, num_queries=168 if sentences else 12, bottleneck=128 if sentences else 32)
    params = jax.jit(v0_init, static_argnums=1)(jax.random.key(0), config)
    features = jax.ShapeDtypeStruct((config.num_queries * config.query_width,), jnp.float32)
    which = jnp.arange(RECORDS)
    known = jax.random.normal(jax.random.key(1), (RECORDS, *features.shape))
    records = record(empty_records(RECORDS, features), which, known, which / RECORDS, jnp.int32(1))
    states = jax.random.normal(jax.random.key(2), (seeds, prompts, TOKENS, width))
    rewards = jnp.where(jax.random.uniform(jax.random.key(3), (seeds, prompts, 16)) < 0.5, 1.0, -1.0)

    def encode(ids, mask):
        return encoder_states(sentences.params, ids, mask)

    def prior(states, mask):
        asked = adapter(params["adapter"], states, mask)
        visible = context_for(records, RECORDS + jnp.arange(prompts)).all(axis=0)
        return 2 * jax.nn.sigmoid(v0_from_features(params["head"], records.features, records.rate, asked, visible)) - 1

    def fuse(states, mask, rewards):
        """All of it: the prior, how many rollouts, the baseline, the advantages."""
        v = prior(states, mask)
        count = objectives.osla_count(rewards, v)
        drawn = jnp.arange(16) < count[:, None]
        baseline = objectives.shrinkage_fuse(jnp.where(drawn, rewards, 0).sum(1), count, v).baseline
        return objectives.fused_advantage(rewards, drawn, baseline)

    kinds = {"adapter and head": (prior, (states, mask)), "and the baseline": (fuse, (states, mask, rewards))}
    if sentences:
        kinds = {"encoder": (encode, (ids, mask))} | kinds
    return {name: (jax.jit(jax.vmap(f)), arguments) for name, (f, arguments) in kinds.items()}


@one_line_end()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=("none", "minilm"), default="none")
    parser.add_argument("--update", choices=("small", "pretrained"), default="small")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    use_compilation_cache()
    update, arguments, prompts, seeds = update_of("transformer" if options.update == "small" else "smollm2")
    kinds = value_model(options.encoder, prompts, seeds)
    contestants = {"update": lambda: seconds_of(update, *arguments)}
    contestants |= {name: lambda f=f, a=a: seconds_of(f, *a) for name, (f, a) in kinds.items()}
    seconds = {name: float(np.median(times)) for name, times in interleave(contestants, options.repeats).items()}
    whole = seconds.pop("update")
    show(
        f"value model, {jax.devices()[0].device_kind}, jax {jax.__version__}",
        [f"{seeds} x {prompts} prompts", "ms", "update, ms", "share"],
        [[name, f"{1e3 * s:.2f}", f"{1e3 * whole:.1f}", f"{100 * s / whole:.2f} %"] for name, s in seconds.items()],
    )


if __name__ == "__main__":
    main()
