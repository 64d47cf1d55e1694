"""V_0 and V_0.5: does a value model's prior save rollouts? (arXiv 2602.03584, 2603.10848)

GRPO's baseline is the mean of a prompt's own rollouts: noisy for few, silent where all are right or all wrong. V_0.5
takes a prior for it, moves towards the mean where the rollouts contradict it, and then draws more. Three parts:
`estimators`, the baselines on prompts whose success rate is known; `values`, V_0 in context against ordinary value
models on policies that it never saw; `policy`, a network that learns modular arithmetic under each baseline, compared
at equal steps and at equal rollouts.

    python experiments/v05.py                                  # all parts, all claims
    python experiments/v05.py --part policy --arms grpo_4 grpo_16 "osla, v0" --updates 300

Results come to runs/v05/NAME/: report.html, results.json, figures, metrics as JSON lines and Parquet.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, glance, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, final, gap, late
from rollax.experiments.harness.study import Build, Study, main
from rollax.experiments.v05_baselines import (
    BIASES,
    DRAWS,
    ERRORS,
    ESTIMATES,
    at_rollouts,
    estimators_train,
    gap_at_equal_rollouts,
)
from rollax.experiments.v05_policy import ARMS, WIDE, fitted_values, policy_train
from rollax.experiments.v05_values import SIZES, VALUE_ARMS, fitted_head, rival_train, v0_train

PARTS = ("estimators", "values", "policy")


@dataclass(frozen=True)
class Config(Options):
    """The study. `PRESETS` replaces some of these defaults for each part."""

    part: str = "all"
    """estimators, values, policy, or all."""
    arms: tuple[str, ...] = ()
    """Rows of the part; all when empty."""
    seeds: int = 10
    """Seeds, the unit of every interval, in one vmap."""
    seed: int = 0
    """The first seed."""
    updates: int = 20
    """Batches of prompts (estimators), steps of the value model (values), rollouts with a step each (policy)."""
    chunk: int = 5
    """Updates between evaluations: one call of the compiled program."""
    prompts: int = 24
    """Prompts of a batch."""
    cost: float = 1 / 256
    """Of a rollout, in squared error of the baseline: the price at which drawing ends."""
    strength: float = 4.0
    """Rollouts that the prior of the Beta rival is worth."""
    floor: float = 0.1
    """Least variance of a reward where it is estimated."""
    contexts: int = 64
    """values, policy: (prompt, success) pairs that V_0 reads."""
    queries: int = 48
    """values: queries of a training task; the paper has 8, and more steps than a laptop takes in minutes."""
    tasks: int = 4
    """values: tasks of a step, each a policy with its context."""
    head_updates: int = 1500
    """Steps on random tables that fit V_0's head; it is frozen then."""
    value_updates: int = 400
    """policy: steps of the value model before RL, on policies of other families."""
    lr: float = 3e-3
    """policy: Adam's learning rate. V_0 has its paper's optimiser with `value_lr`."""
    value_lr: float = 2e-3
    """Peak learning rate of V_0's adapter and of its rivals."""
    warm_start: int = 150
    """policy: supervised steps that give the network its start."""
    width: int = 48
    """policy: of the network."""
    modulus: int = 5
    """policy: of the arithmetic; an answer at random is right once in as many."""
    length: int = 3
    """policy: the most operations of a prompt."""
    train_prompts: int = 512
    """policy: prompts to train on; others are held out."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        fields = (
            "seeds updates chunk prompts contexts queries tasks head_updates value_updates width length train_prompts"
        )
        for field in fields.split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("cost", "lr", "value_lr", "floor"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: expected above 0, got {getattr(self, field)}")
        for field in ("strength", "warm_start"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        if self.modulus < 2:
            raise ValueError(f"modulus: expected at least 2, got {self.modulus}")
        if self.part not in PARTS:
            raise ValueError(f"part: expected {', '.join(PARTS)} or all, got {self.part!r}")
        known = {"estimators": ESTIMATES, "values": VALUE_ARMS, "policy": ARMS}[self.part]
        for arm in self.arms:
            if arm not in known:
                raise ValueError(f"arms: expected some of {', '.join(known)} in part {self.part}, got {arm!r}")
        if self.part == "policy" and WIDE * self.prompts > min(self.train_prompts, 4096):
            raise ValueError(f"prompts: expected at most {self.train_prompts // WIDE}, got {self.prompts}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


PRESETS: dict[str, dict[str, Any]] = {
    "estimators": dict(prompts=512, updates=20, chunk=10),
    "values": dict(updates=800, chunk=100),
    "policy": dict(updates=200, chunk=20),
}


# --- The study ------------------------------------------------------------------------------------------------------


def build(config: Config) -> Build:
    if config.part == "estimators":
        arms = config.arms or tuple(ESTIMATES)
        shared = dict(cost=config.cost, strength=config.strength, floor=config.floor)
        return Build(estimators_train(config), {arm: ESTIMATES[arm]._replace(**shared) for arm in arms})
    if config.part == "values":
        arms = config.arms or tuple(VALUE_ARMS)
        v0 = v0_train(config, fitted_head(config.head_updates, config.seed))
        trains = {arm: v0 if arm.startswith("v0") else rival_train(config, arm) for arm in arms}
        return Build(trains, {arm: VALUE_ARMS[arm] for arm in arms})
    arms = config.arms or tuple(ARMS)
    values = fitted_values(config, False), fitted_values(config, True)
    shared = dict(cost=config.cost, strength=config.strength, floor=config.floor, lr=config.lr)
    rows = {arm: ARMS[arm]._replace(**shared) for arm in arms}
    return Build(policy_train(config, values), rows)


def mean(metric: str) -> Callable[[Results, str], np.ndarray]:
    """Over all batches, `[seeds]`; NaN where a part has no such metric."""

    def measure(results, row):
        values = results.train[row].get(metric)
        seeds = next(iter(results.train[row].values())).shape[0]
        return np.full(seeds, np.nan) if values is None else values.mean(axis=1)

    return measure


def ended(metric: str) -> Callable[[Results, str], np.ndarray]:
    """At the last evaluation, `[seeds]`; NaN where a part has no such metric."""

    def measure(results, row):
        seeds = next(iter(results.train[row].values())).shape[0]
        return final(results, row, metric) if metric in results.held_out[row] else np.full(seeds, np.nan)

    return measure


ERROR, DEAD = mean("squared error"), mean("dead groups")


def below_plain(row: str) -> Callable[[Results], np.ndarray]:
    """By how much the row's squared error is below that of a plain mean of as many rollouts."""
    return lambda results: mean("plain mean's")(results, row) - ERROR(results, row)


CLAIMS = [
    Claim("R1a", "A prior wrong by .2 or .5: OSLA's baseline is better than a plain mean of as many rollouts",
          lambda r: np.minimum(below_plain("osla, sd 0.2")(r), below_plain("osla, sd 0.5")(r)), unit="squared error",
          needs=("osla, sd 0.2", "osla, sd 0.5")),
    Claim("R1b", "A prior wrong by 1: OSLA is no worse than a plain mean of 4",
          lambda r: ERROR(r, "mean 4") - ERROR(r, "osla, sd 1.0"), unit="squared error",
          needs=("mean 4", "osla, sd 1.0")),
    Claim("R1c", "A prior wrong by 1: OSLA is no worse than a plain mean of as many rollouts",
          below_plain("osla, sd 1.0"), unit="squared error", needs=("osla, sd 1.0",)),
    Claim("R1d", "A bias of .8 at p = 1/2: OSLA is no worse than a plain mean of as many rollouts",
          below_plain("osla, bias 0.8"), unit="squared error", needs=("osla, bias 0.8",)),
    *(
        Claim(f"R1{letter}", f"... with {what} it is", below_plain(f"{row}, bias 0.8"), unit="squared error",
              needs=(f"{row}, bias 0.8",))
        for letter, row, what in (
            ("e", "osla, of others", "the weight of the other rollouts"),
            ("f", "osla, confirmed", "a prior confirmed twice"),
            ("g", "osla, plug-in", "the variance estimated"),
            ("h", "beta, osla's draws", "a Beta posterior"),
        )
    ),
    Claim("R1i", "A rival: at OSLA's rollouts a Beta posterior is better than shrinkage, the prior wrong by .5",
          lambda r: ERROR(r, "osla, sd 0.5") - ERROR(r, "beta, osla's draws, sd 0.5"), unit="squared error",
          needs=("osla, sd 0.5", "beta, osla's draws, sd 0.5"), rival=True),
    Claim("R2", "A prior wrong by .5 leaves less than a third of the dead groups of GRPO at 4 rollouts",
          lambda r: DEAD(r, "static 4, sd 0.5") - DEAD(r, "mean 4") / 3, "below", 0.0, "share",
          needs=("static 4, sd 0.5", "mean 4")),
    Claim("R5a", "OSLA draws more where the prior is wrong, its error .5",
          lambda r: mean("rank correlation")(r, "osla, sd 0.5"), "above", 0.2, "rank correlation",
          needs=("osla, sd 0.5",)),
    Claim("R7a", "On new policies V_0 ranks prompts better than a difficulty model of all policies",
          gap("v0", "policy-blind", final, "auc"), unit="AUC", needs=("v0", "policy-blind")),
    Claim("R7b", "... and than a critic of the policy's first checkpoint",
          gap("v0", "stale critic", final, "auc"), unit="AUC", needs=("v0", "stale critic")),
    Claim("R7c", "... and than the nearest prompts in the same context",
          gap("v0", "nearest in context", final, "auc"), unit="AUC", needs=("v0", "nearest in context")),
    Claim("R7d", "The ranking term helps: AUC above cross-entropy alone",
          gap("v0", "v0, cross-entropy", final, "auc"), unit="AUC", needs=("v0", "v0, cross-entropy")),
    Claim("R7e", "AUC grows with the context, from 8 to 64 prompts",
          lambda r: final(r, "v0", "auc, 64 in context") - final(r, "v0", "auc, 8 in context"), unit="AUC",
          needs=("v0",)),
    Claim("R7f", "The released trainer's hard targets give a worse prior",
          lambda r: final(r, "v0, hard targets", "prior's error") - final(r, "v0", "prior's error"),
          unit="reward", needs=("v0, hard targets", "v0")),
    Claim("R7g", "As a prior V_0 is closer than the stale critic", gap("stale critic", "v0", final, "prior's error"),
          unit="reward", needs=("stale critic", "v0")),
    Claim("R7h", "... and than the difficulty model", gap("policy-blind", "v0", final, "prior's error"), unit="reward",
          needs=("policy-blind", "v0")),
    Claim("R3a", "At 4 rollouts V_0.5 ends better than GRPO", gap("static_4, v0", "grpo_4", final), unit="reward",
          needs=("static_4, v0", "grpo_4")),
    Claim("R3b", "... and at equal steps than GRPO with 16", gap("static_4, v0", "grpo_16", final), unit="reward",
          needs=("static_4, v0", "grpo_16")),
    Claim("R3c", "... and at equal rollouts than GRPO with 16", gap_at_equal_rollouts("static_4, v0", "grpo_16"),
          unit="reward", needs=("static_4, v0", "grpo_16")),
    Claim("R3d", "OSLA ends better than GRPO with 16 at equal steps", gap("osla, v0", "grpo_16", final),
          unit="reward", needs=("osla, v0", "grpo_16")),
    Claim("R3e", "OSLA is better than DAPO with 16 at equal rollouts", gap_at_equal_rollouts("osla, v0", "dapo_16"),
          unit="reward", needs=("osla, v0", "dapo_16")),
    Claim("R3f", "A rival: four times the prompts with GRPO's 4 rollouts is better than OSLA at equal rollouts",
          gap_at_equal_rollouts("grpo_4, wide", "osla, v0"), unit="reward", rival=True,
          needs=("grpo_4, wide", "osla, v0")),
    Claim("R3i", "A rival: GRPO with 4 rollouts is better than OSLA at equal rollouts",
          gap_at_equal_rollouts("grpo_4", "osla, v0"), unit="reward", rival=True, needs=("grpo_4", "osla, v0")),
    Claim("R3j", "A rival: V_0.5 with 4 rollouts is better than with its own budget, at equal rollouts",
          gap_at_equal_rollouts("static_4, v0", "osla, v0"), unit="reward", rival=True,
          needs=("static_4, v0", "osla, v0")),
    Claim("R3g", "What helps is the prior: at 4 rollouts V_0.5 ends better than a mean that is not divided by std",
          gap("static_4, v0", "dr_grpo_4", final), unit="reward", needs=("static_4, v0", "dr_grpo_4")),
    Claim("R3h", "A rival: a moving average of each prompt ends better than V_0.5, both with 4 rollouts",
          gap("moving_average_4", "static_4, v0", final), unit="reward", rival=True,
          needs=("static_4, v0", "moving_average_4")),
    Claim("R4a", "2 rollouts end worse than 4", gap("static_4, v0", "static_2, v0", final), unit="reward",
          needs=("static_4, v0", "static_2, v0")),
    Claim("R4b", "1 rollout ends worse than 4", gap("static_4, v0", "static_1, v0", final), unit="reward",
          needs=("static_4, v0", "static_1, v0")),
    *(
        Claim(f"R8{letter}", f"OSLA ends no worse with {what} than with V_0", gap(row, "osla, v0", final), "above",
              -0.01, "reward", needs=(row, "osla, v0"))
        for letter, row, what in (
            ("a", "osla, v0 stale", "a context that is never refreshed"),
            ("b", "osla, v0 other world", "a V_0 of other policies"),
            ("c", "osla, flipped", "a prior of the wrong sign"),
        )
    ),
    Claim("R8d", "A prior of the wrong sign costs rollouts: OSLA draws more than with V_0",
          lambda r: mean("rollouts")(r, "osla, flipped") - mean("rollouts")(r, "osla, v0"), unit="rollouts a prompt",
          needs=("osla, flipped", "osla, v0")),
    *(
        Claim(f"R9{letter}", f"Under RL {what} is better than OSLA at equal rollouts",
              gap_at_equal_rollouts(row, "osla, v0"), unit="reward", needs=(row, "osla, v0"), rival=True)
        for letter, row, what in (
            ("a", "osla, of others, v0", "the weight of the other rollouts"),
            ("b", "osla, confirmed, v0", "a prior confirmed twice"),
            ("c", "osla, plug-in, v0", "the variance estimated"),
            ("d", "beta, osla's draws, v0", "a Beta posterior"),
        )
    ),
    Claim("R5b", "Under RL too OSLA draws more where V_0 is wrong",
          lambda r: mean("rank correlation")(r, "osla, v0"), "above", 0.2, "rank correlation", needs=("osla, v0",)),
    Claim("R6a", "V_0.5's gradients are smaller than those of a mean of 4",
          gap("dr_grpo_4", "static_4, v0", lambda r, row, m: r.train[row][m].mean(axis=1), "gradient norm"),
          unit="gradient norm", needs=("dr_grpo_4", "static_4, v0")),
    Claim("R6b", "Late, V_0.5 keeps more entropy than GRPO at 4 rollouts",
          gap("static_4, v0", "grpo_4", late, "entropy"), unit="nats", needs=("static_4, v0", "grpo_4")),
]  # fmt: skip

COLUMNS: dict[str, Callable[[Results, str], np.ndarray]] = {
    "held out, end": ended("reward"),
    "AUC": ended("auc"),
    "squared error": ERROR,
    "plain mean's": mean("plain mean's"),
    "rollouts a prompt": mean("rollouts"),
    "dead groups": DEAD,
    "prior's error": lambda r, row: (ended if "auc" in r.held_out[row] else mean)("prior's error")(r, row),
    "rank correlation": mean("rank correlation"),
    "gradient norm": mean("gradient norm"),
    "entropy": mean("entropy"),
}  # fmt: skip


def panels(results: Results) -> list[Panel]:
    rows = list(results.train)
    if "squared error" in results.train[rows[0]]:
        return estimator_panels(results)
    if "auc" in results.held_out[rows[0]]:
        curve = lambda row: np.stack([final(results, row, f"auc, {n} in context") for n in SIZES], axis=1)  # noqa: E731
        return [
            Panel("AUC on new policies", np.array(SIZES), {row: curve(row) for row in rows}, "prompts in the context"),
            Panel("AUC", results.evaluated_at, {row: results.held_out[row]["auc"] for row in rows}),
        ]
    shown_rows = [row for row in rows if row in FIGURE] or rows
    least = min(results.held_out[row]["spent"][:, -1].min() for row in shown_rows)
    grid = np.linspace(0, least, 30)
    by_rollouts = {
        row: np.stack(
            [at_rollouts(results, row, np.full(len(results.held_out[row]["spent"]), x)) for x in grid], axis=1
        )
        for row in shown_rows
    }
    updates = np.arange(1, results.evaluated_at[-1] + 1)
    curves = lambda metric: {row: results.train[row][metric] for row in shown_rows}  # noqa: E731
    return [
        Panel("held-out reward", results.evaluated_at, {row: results.held_out[row]["reward"] for row in shown_rows}),
        Panel("held-out reward", grid, by_rollouts, "rollouts"),
        Panel("rollouts a prompt", updates, curves("rollouts")),
        Panel("share of dead groups", updates, curves("dead groups")),
        Panel("gradient norm", updates, curves("gradient norm")),
        Panel("entropy (nats)", updates, curves("entropy")),
    ]


def estimator_panels(results: Results) -> list[Panel]:
    """By the prior's error: squared error less that of a plain mean of as many rollouts, and rollouts."""
    shown_panels = []
    for what, points, label in (("sd", ERRORS, "prior's error (sd)"), ("bias", BIASES, "prior's bias at p = 1/2")):
        known = [name for name in DRAWS if all(f"{name}, {what} {x}" in results.train for x in points)]
        for title, measure in (("error below a plain mean's", lambda r, row: below_plain(row)(r)),
                               ("rollouts a prompt", mean("rollouts"))):  # fmt: skip
            curves = {
                name: np.stack([measure(results, f"{name}, {what} {x}") for x in points], axis=1) for name in known
            }
            if curves:
                shown_panels.append(Panel(title, np.array(points), curves, label))
    return shown_panels


FIGURE = ("grpo_4", "grpo_16", "grpo_4, wide", "dapo_16", "static_4, v0", "osla, v0", "osla, truth")


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line, read once for each part over the defaults of its preset; by the part's name."""
    part = glance(Config(), argv).part
    parts = PARTS if part == "all" else (part,)
    configs = {}
    for part in parts:
        default = Config(**{"part": part} | PRESETS.get(part, {}))
        configs[part] = dataclasses.replace(parse(default, __doc__, argv, check=False), part=part)
    with one_line_errors():
        for config in configs.values():
            config.check()
    return configs


STUDY = Study(
    name="v05",
    title="V_0 and V_0.5 (arXiv 2602.03584, 2603.10848)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns=COLUMNS,
    panels=panels,
    traced=("cost", "strength", "floor"),
    order=FIGURE,
    smoke=("--part", "estimators", "--seeds", "2", "--updates", "2", "--chunk", "1", "--prompts", "16"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
