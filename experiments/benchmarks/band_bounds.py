"""What Band's bounds cost: their time as a share of an update of the default study, beside the fixed clip's bounds.

    python experiments/benchmarks/band_bounds.py

The bounds of all sampled tokens of an update are computed once (BandPO, arXiv 2603.04918, reports 1.75 % of a step).
Medians of interleaved repeats; compilation apart.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rollax import objectives
from rollax.experiments import bandpo
from rollax.experiments.benchmarks.timing import interleave, seconds_of
from rollax.experiments.harness.command_line import one_line_end
from rollax.experiments.harness.devices import use_compilation_cache
from rollax.experiments.harness.report import show

REPEATS = 7


def measure(config: bandpo.Config) -> list[list[str]]:
    """Seconds of an update of one arm (all seeds in one vmap) and of the bounds of its tokens."""
    config = dataclasses.replace(config, arms=("band_kl",), chunk=1, updates=1, warm_start=0)
    task, policy = bandpo.prepare(config)
    numbers, arms = bandpo.numbers_of(config, [bandpo.Row("band_kl", "band_kl", config.lr)])
    (numbers,) = numbers.values()
    train = bandpo.make_train(config, task, policy, arms)
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    state = jax.jit(jax.vmap(train.init))(keys)
    update = jax.jit(jax.vmap(train.advance, in_axes=(0, None)))
    spec = task.env.spec
    shape = (config.seeds, config.prompts * config.samples, spec.max_observation + spec.max_action)
    old = -jax.random.exponential(jax.random.key(0), shape)
    kinds = {
        "band_kl, 12 Newton steps": lambda x: objectives.band_bounds(x, config.delta, "kl", upper_max=config.upper_max),
    } | {
        arm: lambda x, arm=arm: bandpo.ARMS[arm].bounds(x, numbers)
        for arm in ("band_kl", "band_tv", "band_chi2", "clip")
    }
    compiled = {name: jax.jit(bounds) for name, bounds in kinds.items()}
    contestants = {"update": lambda: seconds_of(update, state, numbers)}
    contestants |= {name: lambda f=f: seconds_of(f, old) for name, f in compiled.items()}
    seconds = {name: float(np.median(times)) for name, times in interleave(contestants, REPEATS).items()}
    whole = seconds.pop("update")
    return [
        [f"{config.model}, {name}", f"{1e3 * s:.3f}", f"{1e3 * whole:.1f}", f"{100 * s / whole:.2f} %"]
        for name, s in seconds.items()
    ]


@one_line_end()
def main() -> None:
    use_compilation_cache()
    lines = [line for config in bandpo.configs_of([]).values() for line in measure(config)]
    band, whole = (sum(float(line[column]) for line in lines if line[0].endswith("band_kl")) for column in (1, 2))
    lines.append(["default study, band_kl", f"{band:.3f}", f"{whole:.1f}", f"{100 * band / whole:.2f} %"])
    show(
        f"bounds of an update, {jax.devices()[0].device_kind}, jax {jax.__version__}",
        ["", "bounds, ms", "update, ms", "share"],
        lines,
    )


if __name__ == "__main__":
    main()
