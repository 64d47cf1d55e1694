"""OpenClaw-RL: can an agent be trained by talking to it? (arXiv 2603.10165)

What a user says after a reply is a reward (a judge votes) and sometimes a hint (what should have been done). "Binary"
RL learns from the one, on-policy distillation (OPD) from the other, and the paper, which has two versions of its
method, says that both together are better than either. Parts: `chat`, three users whose wishes show only in how they
take a reply, all methods in one program; `talk`, a user who changes their mind; `asynchronous`, serving, judging and
training side by side; `agents`, `minesweeper`, `sokoban`, long episodes with and without a reward for each step.

    python experiments/openclaw_rl.py                                  # all parts, all claims
    python experiments/openclaw_rl.py --part chat --arms binary "hybrid v2" --seeds 4

Results come to runs/openclaw_rl/NAME/: report.html, results.json, figures, metrics as JSON lines and Parquet.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from rollax.envs.persona_chat import PERSONAS
from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, glance, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, final, gap
from rollax.experiments.harness.study import Build, Study, main
from rollax.experiments.openclaw_agents import AGENTS, BOARDS, agents_train, watch_tasks
from rollax.experiments.openclaw_base import base_model, calibrate
from rollax.experiments.openclaw_chat import (
    KS,
    Numbers,
    align,
    align_again,
    asynchronous_train,
    chat_train,
    exact_share,
    watch_sessions,
)
from rollax.experiments.retroagent_base import BENCHES, SUBTASKS
from rollax.objectives.opd import SELECTIONS

AGENT_PARTS = ("agents", "minesweeper", "sokoban")
PARTS = ("chat", "talk", "asynchronous", *AGENT_PARTS)


@dataclass(frozen=True)
class Config(Options):
    """The study. `PRESETS` replaces some of these defaults for each part."""

    part: str = "all"
    """chat, talk, asynchronous, agents, minesweeper, sokoban, or all of these."""
    arms: tuple[str, ...] = ()
    """Rows of the part; all when empty."""
    seeds: int = 10
    """Seeds, the unit of every interval, in one vmap."""
    seed: int = 0
    """The first seed."""
    updates: int = 32
    """Batches of turns, each followed by a gradient step; in part asynchronous ticks."""
    chunk: int = 4
    """Updates between evaluations: one call of the compiled program."""
    sessions: int = 8
    """Sessions of a batch."""
    turns: int = 2
    """Replies of a session; it ends earlier with a satisfied user."""
    passes: int = 1
    """agents: gradient steps on each batch. The other parts have one; then the ratio is 1 and nothing clips."""
    lr: float = 1e-3
    """Adam's learning rate."""
    max_grad_norm: float = 1.0
    """Largest global norm of a gradient."""
    temperature: float = 1.0
    """Of sampling and of all log-probs, the teacher's too."""
    ambiguous: float = 0.1
    """Share of turns that the judge cannot tell."""
    slots: int = 4
    """asynchronous: users at a time."""
    longest_delay: int = 12
    """asynchronous: the largest delay of the judge that there is room for, in ticks."""
    eval_prompts: int = 64
    """Held-out users of each persona; episodes of an evaluation in part agents."""
    layers: int = 2
    """Of the transformer."""
    width: int = 48
    """Of the transformer."""
    heads: int = 4
    """Of the transformer."""
    base_steps: int = 1500
    """Supervised steps that make the base model; kept on disk."""
    base_batch: int = 128
    """Examples of a supervised step."""
    base_lr: float = 3e-3
    """Peak learning rate of the base model."""
    base_seed: int = 0
    """Of the base model, which all seeds share."""
    bench: str = "household"
    """agents: household, shop, or a board: minesweeper, sokoban."""
    horizon: int = 8
    """agents: turns of an episode."""
    pool: int = 32
    """agents: tasks of a seed's world, to train on and to evaluate; at most 256."""
    tasks: int = 8
    """agents: tasks of a batch."""
    group: int = 8
    """agents: episodes of a task."""
    num_first: int = 16
    """agents: values of the first hidden fact, places or words."""
    num_second: int = 8
    """agents: values of the second hidden fact, appliances or filters."""
    kl: float = 0.01
    """agents: weight of the k3 estimate of the divergence from the base."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        fields = (
            "seeds updates chunk sessions turns passes slots eval_prompts layers width heads base_steps base_batch "
            "tasks group"
        )
        for field in fields.split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("lr", "max_grad_norm", "temperature", "base_lr"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: expected above 0, got {getattr(self, field)}")
        for field in ("longest_delay", "kl", "base_seed"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        if not 0 <= self.ambiguous <= 1:
            raise ValueError(f"ambiguous: expected a share, 0 to 1, got {self.ambiguous}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width: expected a multiple of 2 * heads={2 * self.heads}, got {self.width}")
        if self.part not in PARTS:
            raise ValueError(f"part: expected {', '.join(PARTS)} or all, got {self.part!r}")
        known = ARMS[self.part]
        for arm in self.arms:
            if arm not in known:
                raise ValueError(f"arms: expected some of {', '.join(known)} in part {self.part}, got {arm!r}")
        if self.bench not in (*BENCHES, *BOARDS):
            raise ValueError(f"bench: expected one of {', '.join((*BENCHES, *BOARDS))}, got {self.bench!r}")
        if self.horizon < SUBTASKS:
            raise ValueError(f"horizon: expected at least {SUBTASKS}, got {self.horizon}")
        if not self.tasks <= self.pool <= 256:
            raise ValueError(f"pool: expected tasks={self.tasks} to 256, got {self.pool}")
        if self.part == "talk" and self.updates % 2:
            raise ValueError(f"updates: expected an even number in part talk, got {self.updates}")
        if self.part == "asynchronous":
            longest = max(known[arm].judge_delay for arm in self.arms or known)
            if self.longest_delay < longest:
                raise ValueError(f"longest_delay: expected at least {longest} for these arms, got {self.longest_delay}")
        if self.part == "asynchronous" and self.chunk != self.updates:
            raise ValueError(f"chunk: expected all updates={self.updates} in part asynchronous, got {self.chunk}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


BOARD = dict(updates=100, chunk=20, tasks=4, eval_prompts=128, base_batch=32, base_steps=500, width=32)
PRESETS: dict[str, dict[str, Any]] = {
    "chat": {},
    "talk": dict(updates=64),
    "asynchronous": dict(updates=96, chunk=96),
    "agents": dict(updates=100, chunk=20, eval_prompts=256, base_batch=64, base_steps=500),
    **{board: BOARD | dict(bench=board) for board in ("minesweeper", "sokoban")},
}

# --- Arms -----------------------------------------------------------------------------------------------------------


def choose(name: str) -> int:
    return SELECTIONS.index(name)


BINARY = Numbers(w_b=1.0)
OPD_1 = Numbers(w_o=1.0, select=choose("longest"))
COMBINED = OPD_1._replace(w_b=1.0)
OPD_2 = Numbers(w_opd=1.0, diff_clip=1.0)
HYBRID = OPD_2._replace(w_b=1.0)
SHORTEST = dict(select=choose("shortest"))  # the exact hint

CHAT = {
    "binary": BINARY,
    "opd v1": OPD_1,
    "opd v1, exact": OPD_1._replace(**SHORTEST),
    "combined v1": COMBINED,
    "combined v1, exact": COMBINED._replace(**SHORTEST),
    "opd v2": OPD_2,
    "opd v2, C=0.5": OPD_2._replace(diff_clip=0.5),
    "opd v2, C=2": OPD_2._replace(diff_clip=2.0),
    "opd v2, no clip": OPD_2._replace(diff_clip=np.inf),
    "hybrid v2": HYBRID,
    "hybrid v2, C=0.5": HYBRID._replace(diff_clip=0.5),
    "hybrid v2, C=2": HYBRID._replace(diff_clip=2.0),
    "hybrid v2, no clip": HYBRID._replace(diff_clip=np.inf),
    "hybrid v2, k=2": HYBRID._replace(k=KS.index(2)),
    "hybrid v2, k=8": HYBRID._replace(k=KS.index(8)),
    "hybrid v2, by token": HYBRID._replace(select=choose("token")),
    "hybrid v2, random": HYBRID._replace(select=choose("random")),
    "hybrid v2, longest": HYBRID._replace(select=choose("longest")),
    "opd v2, self": OPD_2._replace(self_teacher=1),
    "hybrid v2, self": HYBRID._replace(self_teacher=1),
}
# Judges that err, users who say less.
STRESSED = ("binary", "combined v1, exact", "hybrid v2")
CHAT |= {f"{row}, q=.25": CHAT[row]._replace(flip=0.25) for row in STRESSED}
CHAT |= {f"{row}, p_dir=.1": CHAT[row]._replace(p_dir=0.1) for row in (*STRESSED, "opd v1, exact", "opd v2")}
CHAT |= {f"{row}, p_dir=0": CHAT[row]._replace(p_dir=0.0) for row in ("binary", "hybrid v2")}

TALK = {f"{row}, talk": CHAT[row] for row in ("binary", "combined v1, exact", "opd v2", "hybrid v2", "hybrid v2, self")}

PUSHES = {"next": "after_next_batch", "now": "immediate"}
NEXT, NOW = "push next, judge {}, trainer {}".format, "push now, judge {}, trainer {}".format
GRID = [(judge, trainer) for judge in (0, 2, 8) for trainer in (1, 4)]
ASYNCHRONOUS = {  # with two rows that make turns 4 versions and none stale
    name(judge, trainer): HYBRID._replace(judge_delay=judge, train_delay=trainer)
    for name, delays in ((NEXT, [*GRID, (12, 1)]), (NOW, [(0, 0), *GRID]))
    for judge, trainer in delays
}


def push_of(arm: str) -> str:
    return arm.split(",")[0].removeprefix("push ")


ARMS: dict[str, dict[str, Any]] = {"chat": CHAT, "talk": TALK, "asynchronous": ASYNCHRONOUS, "agents": AGENTS}
ARMS |= {board: {row: n for row, n in AGENTS.items() if n.flip < 0.25} for board in BOARDS}


# --- The study ------------------------------------------------------------------------------------------------------


def build(config: Config) -> Build:
    arms = config.arms or tuple(ARMS[config.part])
    shared = dict(lr=config.lr) | (dict(kl=config.kl) if config.part in AGENT_PARTS else {})
    rows = {arm: ARMS[config.part][arm]._replace(**shared) for arm in arms}
    shown = [arm for arm in SHOWN if arm in arms] or [arms[0]]
    if config.part in AGENT_PARTS:

        def watch(state_of):
            return [e for arm in shown for e in watch_tasks(config, state_of(arm), arm)]

        return Build(agents_train(config), rows, watch)

    base = base_model(config)
    told = jax.jit(functools.partial(calibrate, config=config, params=base))(jax.random.key(config.base_seed))
    said = ", ".join(f"{name} {np.round(value, 3)}" for name, value in told._asdict().items())
    print(f"base model, shares of first replies by persona: {said}", flush=True)

    def watch(state_of):
        key = jax.random.key(config.seed)
        return [e for arm in shown for e in watch_sessions(config, state_of(arm).learner.params, key, arm)]

    if config.part != "asynchronous":
        return Build(chat_train(config, base), rows, watch)
    trains = {name: asynchronous_train(config, push, base) for name, push in PUSHES.items()}
    return Build({arm: trains[push_of(arm)] for arm in arms}, rows, watch)


# --- Measures and claims --------------------------------------------------------------------------------------------


def nan(results: Results, row: str) -> np.ndarray:
    return np.full(next(iter(results.train[row].values())).shape[0], np.nan)


def ended(*metrics: str) -> Callable[[Results, str], np.ndarray]:
    """At the last evaluation, the first of the metrics that the part has, `[seeds]`; NaN where it has none."""

    def measure(results, row):
        known = [metric for metric in metrics if metric in results.held_out[row]]
        return final(results, row, known[0]) if known else nan(results, row)

    return measure


def at(update: int, *metrics: str) -> Callable[[Results, str], np.ndarray]:
    """At the evaluation after so many updates; NaN where there was none."""

    def measure(results, row):
        known = [metric for metric in metrics if metric in results.held_out[row]]
        place = np.flatnonzero(results.evaluated_at == update)
        return results.held_out[row][known[0]][:, place[0]] if known and place.size else nan(results, row)

    return measure


def over_updates(metric: str, how: Callable = np.mean) -> Callable[[Results, str], np.ndarray]:
    """The mean (or sum) of a metric of training, `[seeds]`; NaN where a part has no such metric."""

    def measure(results, row):
        values = results.train[row].get(metric)
        return nan(results, row) if values is None else how(values, axis=1)

    return measure


def where(metric: str, measure: Callable[[Results, str], np.ndarray]) -> Callable[[Results, str], np.ndarray]:
    """A measure of the parts that have a metric of training; NaN elsewhere."""
    return lambda results, row: measure(results, row) if metric in results.train[row] else nan(results, row)


def align_of_part(results: Results, row: str) -> np.ndarray:
    """Sessions until three in a row please; where a user changes their mind, those after it."""
    return align_again(results, row) if "new wish" in results.held_out[row] else align(results, row)


def staleness(results: Results, row: str) -> np.ndarray:
    """Mean staleness of the turns trained on after the first batch, updates, `[seeds]`."""
    return np.array([stale.mean() if stale.size else np.nan for stale in stale_turns(results, row)])


def one_version_stale(results: Results, row: str) -> np.ndarray:
    """Share of the turns trained on after the first batch whose staleness is 1, `[seeds]`."""
    return np.array([np.mean(stale == 1) if stale.size else np.nan for stale in stale_turns(results, row)])


def stale_turns(results: Results, row: str) -> list[np.ndarray]:
    """By seed; the first batch, which nothing came before, is left out."""
    batches = [seed[seed[:, 0] >= 0] for seed in results.train[row]["staleness"]]
    return [batch[1:].ravel() for batch in batches]


def spread(values: np.ndarray) -> np.ndarray:
    """Distance of each seed from the median, whose mean is a robust standard deviation."""
    return np.abs(values - np.median(values))


def fewer_sessions(row: str, than: str) -> Callable[[Results], np.ndarray]:
    """Sessions to align that the row saves, `[seeds]`."""
    return lambda results: align(results, than) - align(results, row)


def loss_by_noise(row: str) -> Callable[[Results], np.ndarray]:
    """What a judge that errs in a quarter of the votes costs at the end, `[seeds]`."""
    return lambda r: final(r, row, "satisfied") - final(r, f"{row}, q=.25", "satisfied")


def sessions_claim(name: str, statement: str, row: str, than: str) -> Claim:
    return Claim(name, statement, fewer_sessions(row, than), unit="sessions", needs=(row, than))


SERVED = over_updates("served")

CLAIMS = [
    Claim("D0a", "The base obeys a hint: at least 95 % of hinted first replies satisfy",
          lambda r: final(r, "binary", "base, hinted"), "above", 0.95, "share", needs=("binary",)),
    Claim("D0b", "... and without one at most 12 % do", lambda r: final(r, "binary", "base, alone"), "below", 0.12,
          "share", needs=("binary",)),
    Claim("D0c", "... and its answers are right", lambda r: final(r, "binary", "base, content"), "above", 0.97,
          "share", needs=("binary",)),
    sessions_claim("D1a", "Hybrid v2 needs fewer sessions than binary", "hybrid v2", "binary"),
    sessions_claim("D1b", "... and than OPD v2", "hybrid v2", "opd v2"),
    sessions_claim("D1c", "Combined v1 needs fewer sessions than binary", "combined v1", "binary"),
    sessions_claim("D1d", "... and than OPD v1", "combined v1", "opd v1"),
    Claim("D1e", "Combined v1 ends more satisfied than OPD v1", gap("combined v1", "opd v1", final, "satisfied"),
          unit="share", needs=("combined v1", "opd v1")),
    Claim("D1f", "Seeds of hybrid v2 end closer together than those of binary",
          lambda r: spread(final(r, "binary", "satisfied")) - spread(final(r, "hybrid v2", "satisfied")),
          unit="share", needs=("binary", "hybrid v2")),
    sessions_claim("D1g", "Also where 10 % of the complaints say what is wrong: hybrid v2 needs fewer than binary",
                   "hybrid v2, p_dir=.1", "binary, p_dir=.1"),
    sessions_claim("D1h", "... and than OPD v2", "hybrid v2, p_dir=.1", "opd v2, p_dir=.1"),
    Claim("D1i", "A rival: version 1 with the exact hint needs fewer sessions than hybrid v2",
          fewer_sessions("combined v1, exact", "hybrid v2"), unit="sessions",
          needs=("combined v1, exact", "hybrid v2"), rival=True),
    Claim("D2a", "OPD has fewer than half of the samples of binary RL",
          lambda r: over_updates("hinted turns", np.sum)(r, "hybrid v2")
          / over_updates("scored turns", np.sum)(r, "hybrid v2"), "below", 0.5, "ratio", needs=("hybrid v2",)),
    sessions_claim("D2b", "The paper's version 1: OPD needs fewer sessions than binary", "opd v1", "binary"),
    sessions_claim("D2c", "The paper's version 2: binary needs fewer sessions than OPD", "binary", "opd v2"),
    Claim("D3a", "Overlap picks the exact hint in more than 85 %", lambda r: exact_share(r, "hybrid v2"), "above",
          0.85, "share", needs=("hybrid v2",)),
    sessions_claim("D3b", "It needs fewer sessions than a random hint", "hybrid v2", "hybrid v2, random"),
    sessions_claim("D3c", "... and than the longest", "hybrid v2", "hybrid v2, longest"),
    sessions_claim("D3d", "In version 1 the exact hint needs fewer sessions than the longest", "combined v1, exact",
                   "combined v1"),
    Claim("D4a", "Without the clip OPD v2 loses right answers", gap("opd v2", "opd v2, no clip", final, "content"),
          "above", 0.02, "share", needs=("opd v2", "opd v2, no clip")),
    Claim("D4b", "... and its replies grow", gap("opd v2, no clip", "opd v2", final, "length"), "above", 0.5, "tokens",
          needs=("opd v2", "opd v2, no clip")),
    Claim("D4c", "With the clip it keeps right answers", lambda r: final(r, "opd v2", "content"), "above", 0.95,
          "share", needs=("opd v2",)),
    sessions_claim("D4d", "... but is slow: without the clip it needs fewer sessions", "opd v2, no clip", "opd v2"),
    Claim("D4e", "In the hybrid too right answers are lost without the clip",
          gap("hybrid v2", "hybrid v2, no clip", final, "content"), "above", 0.02, "share",
          needs=("hybrid v2", "hybrid v2, no clip")),
    Claim("D4f", "A rival: hybrid v2 without the clip needs fewer sessions than with it",
          fewer_sessions("hybrid v2, no clip", "hybrid v2"), unit="sessions",
          needs=("hybrid v2, no clip", "hybrid v2"), rival=True),
    sessions_claim("D5a", "k = 4 needs fewer sessions than k = 2", "hybrid v2", "hybrid v2, k=2"),
    Claim("D5b", "... and k = 8 as many", fewer_sessions("hybrid v2, k=8", "hybrid v2"), "within", 3.0, "sessions",
          needs=("hybrid v2", "hybrid v2, k=8")),
    *(
        Claim(f"D7{letter}", f"A judge wrong in 25 % of its votes costs binary more than {row}",
              lambda r, row=row: loss_by_noise("binary")(r) - loss_by_noise(row)(r), unit="share",
              needs=("binary", "binary, q=.25", row, f"{row}, q=.25"))
        for letter, row in (("a", "hybrid v2"), ("b", "combined v1, exact"))
    ),
    Claim("D9", "Users who never say what is wrong: hybrid v2 is binary",
          gap("hybrid v2, p_dir=0", "binary, p_dir=0", final, "satisfied"), "within", 0.01, "share",
          needs=("hybrid v2, p_dir=0", "binary, p_dir=0")),
    Claim("T1a", "After a change of mind hybrid v2 needs fewer sessions than binary",
          lambda r: align_again(r, "binary, talk") - align_again(r, "hybrid v2, talk"), unit="sessions",
          needs=("binary, talk", "hybrid v2, talk")),
    Claim("T1b", "... and so does combined v1",
          lambda r: align_again(r, "binary, talk") - align_again(r, "combined v1, exact, talk"), unit="sessions",
          needs=("binary, talk", "combined v1, exact, talk")),
    Claim("T2", "Hybrid v2 ends with the new wish satisfied more often than binary",
          gap("hybrid v2, talk", "binary, talk", final, "new wish"), unit="share",
          needs=("hybrid v2, talk", "binary, talk")),
    Claim("D8a", "Users are served as often with a judge 8 ticks late",
          lambda r: SERVED(r, NEXT(8, 1)) - SERVED(r, NEXT(0, 1)), "within", 0.02, "turns a tick",
          needs=(NEXT(8, 1), NEXT(0, 1))),
    Claim("D8b", "... and with a trainer that takes 4 ticks instead of 1",
          lambda r: SERVED(r, NEXT(0, 4)) - SERVED(r, NEXT(0, 1)), "within", 0.02, "turns a tick",
          needs=(NEXT(0, 4), NEXT(0, 1))),
    Claim("D8c", "Every batch after the first is one version stale",
          lambda r: np.minimum(*(one_version_stale(r, NEXT(0, trainer)) for trainer in (1, 4))), "above", 0.99,
          "share", needs=(NEXT(0, 1), NEXT(0, 4))),
    Claim("D8d", "... also with a judge 8 ticks late", lambda r: one_version_stale(r, NEXT(8, 1)), "above", 0.99,
          "share", needs=(NEXT(8, 1),)),
    Claim("D8e", "Turns staler by a late judge teach as well",
          gap(NEXT(8, 1), NEXT(0, 1), final, "satisfied"), "above", -0.1, "share", needs=(NEXT(8, 1), NEXT(0, 1))),
    Claim("D8f", "... also where they are 4 versions stale", gap(NEXT(12, 1), NEXT(0, 1), final, "satisfied"), "above",
          -0.1, "share", needs=(NEXT(12, 1), NEXT(0, 1))),
    Claim("D8g", "One version of staleness costs nothing against none",
          gap(NEXT(0, 1), NOW(0, 0), final, "satisfied"), "above", -0.1, "share", needs=(NEXT(0, 1), NOW(0, 0))),
    Claim("D6a", "Outcome and steps end with more success than the outcome alone",
          gap("outcome + step", "outcome", final, "success"), unit="share", needs=("outcome + step", "outcome")),
    Claim("D6b", "... also with a judge wrong in 25 % of its votes",
          gap("outcome + step, q=.25", "outcome", final, "success"), unit="share",
          needs=("outcome + step, q=.25", "outcome")),
    Claim("D6c", "... and than the steps alone", gap("outcome + step", "step", final, "success"), unit="share",
          needs=("outcome + step", "step")),
    Claim("D6d", "Comparing steps of one index is better than all steps of a task",
          gap("outcome + step", "outcome + step, by task", final, "success"), unit="share",
          needs=("outcome + step", "outcome + step, by task")),
    Claim("D6e", "Steps leave fewer buckets without a signal",
          gap("outcome", "outcome + step", lambda r, row, m: r.train[row][m].mean(axis=1), "dropped buckets"),
          unit="share", needs=("outcome + step", "outcome")),
]  # fmt: skip

COLUMNS: dict[str, Callable[[Results, str], np.ndarray]] = {
    "end": ended("new wish", "satisfied", "success"),
    "at 8": at(8, "new wish", "satisfied", "success"),
    "at 16": at(16, "new wish", "satisfied", "success"),
    "right": ended("content"),
    "length": ended("length"),
    "sessions": where("persona", align_of_part),
    **{name: where("persona", functools.partial(align, whose=i)) for i, name in enumerate(PERSONAS)},
    "hinted turns": over_updates("hinted turns", np.sum),
    "exact hint": where("chosen hints", exact_share),
    "served a tick": SERVED,
    "staleness": where("staleness", staleness),
    "subtasks": ended("subtasks"),
    "advantage variance": over_updates("advantage variance"),
    "dropped buckets": over_updates("dropped buckets"),
}
SHOWN = ("binary", "hybrid v2", "hybrid v2, talk", NEXT(0, 1), "outcome", "outcome + step")
FIGURE = ("binary", "opd v1", "combined v1", "combined v1, exact", "opd v2", "opd v2, no clip", "hybrid v2")


def panels(results: Results) -> list[Panel]:
    rows = [row for row in results.train if row in FIGURE] or list(results.train)
    updates = np.arange(1, results.evaluated_at[-1] + 1)
    told, held_out = results.train[rows[0]], results.held_out[rows[0]]

    def evaluations(title, metric):
        return Panel(title, results.evaluated_at, {row: results.held_out[row][metric] for row in rows})

    def training(title, measure, x_label="update"):
        return Panel(title, updates, {row: measure(results.train[row]) for row in rows}, x_label)

    if "success" in held_out:
        titles = {"success": "success", "advantage variance": "variance of the advantages",
                  "dropped buckets": "buckets without a signal", "entropy": "entropy (nats)"}  # fmt: skip
        shown = [training(title, lambda told, metric=metric: told[metric]) for metric, title in titles.items()]
        return [evaluations("held-out success", "success"), *shown]
    if "served" in told:
        return [
            training("first replies that please", pleased_share, "tick"),
            training("turns served", lambda told: told["served"], "tick"),
            training("version of the serving weights", lambda told: told["version"], "tick"),
        ]
    if any(row.endswith(", talk") for row in rows):
        shown = [evaluations("new wish", "new wish"), evaluations("old wish", "old wish")]
    else:
        shown = [evaluations("satisfied", "satisfied")]
    shown += [evaluations("right answers", "content"), evaluations("length (tokens)", "length")]
    shown.append(training("hinted turns", lambda told: told["hinted turns"]))
    return [*shown, training("entropy (nats)", lambda told: told["entropy"])]


def pleased_share(told: dict[str, np.ndarray], window: int = 8) -> np.ndarray:
    """Share of pleasing first replies over the last ticks, `[seeds, ticks]`; 0 before there was any."""
    first = told["persona"] >= 0
    count = np.cumsum(first.sum(axis=2), axis=1)
    pleased = np.cumsum((first & (told["first reply pleased"] > 0)).sum(axis=2), axis=1)
    latest = lambda total: total - np.pad(total, ((0, 0), (window, 0)))[:, :-window]  # noqa: E731
    return latest(pleased) / np.maximum(latest(count), 1)


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line, read once for each part over the defaults of its preset; by the part's name."""
    part = glance(Config(), argv).part
    parts = PARTS if part == "all" else (part,)
    configs = {}
    for part in parts:
        default = Config(**{"part": part} | PRESETS.get(part, {}))
        own = dict(bench=part) if part in BOARDS else {}
        configs[part] = dataclasses.replace(parse(default, __doc__, argv, check=False), part=part, **own)
    with one_line_errors():
        for config in configs.values():
            config.check()
    return configs


STUDY = Study(
    name="openclaw_rl",
    title="OpenClaw-RL (arXiv 2603.10165)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns=COLUMNS,
    panels=panels,
    traced=("lr", "kl"),
    order=FIGURE,
    smoke=("--part", "chat", "--seeds", "2", "--updates", "2", "--chunk", "1", "--width", "16", "--layers", "1",
           "--heads", "2", "--base-steps", "4", "--base-batch", "8", "--eval-prompts", "4",
           "--arms", "binary", "opd v2", "hybrid v2"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
