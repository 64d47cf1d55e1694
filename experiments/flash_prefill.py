"""FlashPrefill: does one map of block scores find what attention needs? (arXiv 2603.06199; V2: arXiv 2608.19758)

A block of queries meets the mean key of every block; blocks with at least alpha times the best score are read, the rest
is not. Two parts: `planted`, heads whose pattern is known; `recall`, a small network trained on dense attention over
256 tokens that reads longer sequences with sparse attention. Rules of selection are compared at equal density, the
share of visible blocks that is read. What sparse prefill does to reinforcement learning is `flash_prefill_rl.py`.

    python experiments/flash_prefill.py                                    # both parts, all claims
    python experiments/flash_prefill.py --part recall --needles 1 4 16 --block 8

Results come to runs/flash_prefill/NAME/: report.html, results.json, figures, metrics as JSON lines and Parquet.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax import objectives
from rollax.agents import LanguageModel, TransformerConfig, transformer
from rollax.agents.language_model import features, logits_of
from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, glance, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train
from rollax.experiments.harness.report import Table, cell
from rollax.experiments.harness.study import Build, Study, main
from rollax.experiments.harness.supervised import fit
from rollax.experiments.sparse_rules import (
    NETWORK_RULES,
    PAPER_ALPHA,
    RULES,
    Rule,
    at_share,
    attend,
    attend_row_by_row,
    chosen_share,
    kept_blocks,
    selection_cost,
    sorts_of_selection,
)
from rollax.experiments.sparse_tasks import (
    FILLER,
    HEADS,
    MEMORY,
    QUESTION,
    VALUES,
    VOCABULARY,
    attention_mass,
    check_bounds,
    planted_head,
    recall_sequence,
)
from rollax.kernels.flash_prefill import (
    FlashPrefillConfig,
    block_energy,
    dense_attention,
    dense_mask,
    density,
    flash_prefill,
    mean_pool,
    score,
)

PARTS = ("planted", "recall")
INF = float("inf")


@dataclass(frozen=True)
class Config(Options):
    """The study. `PRESETS` replaces some of these defaults for each part."""

    part: str = "all"
    """planted, recall, or all."""
    seeds: int = 6
    """Seeds, the unit of every interval, in one vmap."""
    seed: int = 0
    """The first seed."""
    updates: int = 1
    """Draws of heads or of sequences."""
    chunk: int = 1
    """Draws in one call of the compiled program."""
    alpha: tuple[float, ...] = (0.0, 0.002, 0.005, 0.02, 0.05, 0.1, 0.15, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Thresholds of the max rules: 0 keeps all, 1 the best block."""
    top_k: tuple[float, ...] = (0.01, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.35, 0.6, 0.8)
    """Shares of the visible blocks that top-k keeps."""
    top_p: tuple[float, ...] = (0.01, 0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
    """Shares of the summed score that top-p keeps."""
    window: tuple[int, ...] = (2, 4, 8, 16, 32, 48)
    """Blocks of the windows."""
    block: int = 32
    """Tokens of a block, a power of two."""
    sink: int = 1
    """First blocks, which every rule keeps; all but the windows also keep the diagonal block and the one before it."""
    length: int = 2048
    """Tokens of a planted head, of a test sequence of recall."""
    width: int = 32
    """D of a planted head, of the network."""
    needles: tuple[int, ...] = (1, 4, 6, 12, 16)
    """recall: how many tokens in a row hold a key and its value."""
    crossed: tuple[int, ...] = (4, 16)
    """recall: the needles that also meet other numbers of questions and noise."""
    questions: int = 64
    """recall: questions in the second half of a sequence."""
    crowd: int = 128
    """recall: questions where there are many."""
    apart: int = 16
    """recall: questions where no two stand in one block."""
    noise: float = 0.3
    """recall: share of a noisy needle's tokens that hold something else."""
    sequences: int = 2
    """recall: test sequences of a draw."""
    steps: int = 200
    """recall: gradient steps that train the network."""
    lr: float = 2e-3
    """recall: Adam's learning rate."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        if self.part not in PARTS:
            raise ValueError(f"part: expected {', '.join(PARTS)} or all, got {self.part!r}")
        check_bounds(self, BOUNDS)
        if self.block & (self.block - 1):
            raise ValueError(f"block: expected a power of two, at least 2, got {self.block}")
        if self.length % (2 * self.block) or self.length < 16 * self.block:
            least = f"an even multiple of block={self.block}, 16 times or more"
            raise ValueError(f"length: expected {least}, got {self.length}")
        if self.width % 4:
            raise ValueError(f"width: expected a multiple of 4, got {self.width}")
        half = self.length // 2
        most = {"needles": half, "crossed": half, "questions": half, "crowd": half, "apart": half // self.block}
        if self.part == "recall":
            check_bounds(self, {name: (1, highest) for name, highest in most.items()})
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


BOUNDS = {
    **dict.fromkeys(("seeds", "updates", "chunk", "length", "width", "sequences"), (1, INF)),
    **dict.fromkeys(("window", "needles", "crossed", "questions", "crowd", "apart"), (1, INF)),
    **dict.fromkeys(("seed", "sink", "steps", "lr"), (0, INF)),
    **dict.fromkeys(("alpha", "top_k", "top_p", "noise"), (0, 1)),
    "block": (2, INF),
}

PRESETS: dict[str, dict[str, Any]] = {
    "planted": dict(seeds=8),
    "recall": dict(
        block=16, length=1024, width=64, alpha=(0.03, 0.1, 0.15, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0),
        top_k=(0.01, 0.05, 0.1, 0.2, 0.35, 0.6), top_p=(0.01, 0.3, 0.6, 0.7, 0.8, 0.9, 0.97), window=(2, 8, 16, 24, 40),
    ),
}  # fmt: skip


# --- Planted heads: the pattern is known ----------------------------------------------------------------------------


def numbers_of(rule: Rule, config: Config) -> jax.Array:
    """The settings of a rule, float32 `[settings]`."""
    return jnp.asarray(getattr(config, rule.settings), jnp.float32)


class Planted(NamedTuple):
    """What differs between the rows of part planted: index into HEADS; 1 for query heads with targets of their own."""

    kind: jax.Array
    apart: jax.Array


STRUCTURED, DIFFUSE = HEADS[:4], HEADS[4:]
# The heads of a group share their targets, as V2's one list presumes; in the last two rows each has its own.
PLANTED_ROWS = {head: Planted(kind, 0) for kind, head in enumerate(HEADS)} | {
    f"{head}, apart": Planted(HEADS.index(head), 1) for head in ("vertical", "blocks")
}
TOGETHER, APART = ("vertical", "blocks"), ("vertical, apart", "blocks, apart")


def relative_error(out, exact):
    return jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)


def correlation(scores, mass, visible):
    """Pearson's, over the visible blocks of each tile of queries, mean over heads and tiles.

    Args:
      scores, mass: `[HQ, n, n]`; visible: bool `[n, n]`. Tiles where one of them is the same everywhere do not count.
    """
    centred = lambda x: jnp.where(visible, x - jnp.mean(x, -1, where=visible, keepdims=True), 0)  # noqa: E731
    x, y = centred(scores), centred(mass)
    size = jnp.sqrt(jnp.sum(x * x, -1) * jnp.sum(y * y, -1))
    return jnp.mean(jnp.sum(x * y, -1) / size, where=size > 0)


def measure_planted(key, numbers: Planted, config: Config) -> dict[str, jax.Array]:
    """Recalled attention mass, relative error of the output and density: `[settings]` for each rule, of a new head."""
    block = config.block
    whole = planted_head(key, *numbers, length=2 * config.length, block=block, width=config.width)
    q, k, v = (x[: config.length] for x in whole)
    mass, rows = attention_mass(q, k, block=block, every=max(1, block // 4))
    exact = dense_attention(q, k, v, block_size=block)[0]

    def masks(rule):
        return jax.lax.map(
            lambda x: kept_blocks(rule, q, k, x, block=block, sink=config.sink), numbers_of(rule, config)
        )

    def read(mask, corrected=False):
        out = attend(q, k, v, mask, block=block, corrected=corrected)
        recall = jnp.sum(mask[:, rows // block] * mass, axis=-1).mean()
        return {"recall": recall, "error": relative_error(out, exact), "density": density(mask)}

    of_tile = mass.reshape(mass.shape[0], config.length // block, -1, mass.shape[-1]).mean(axis=2)
    energy = block_energy(q, mean_pool(k, block), FlashPrefillConfig(alpha=0.0, block_size=block))
    metrics = {"correlation": correlation(score(energy), of_tile, dense_mask(of_tile.shape[-1]))}
    metrics |= {"recall/dense": jnp.ones(1), "error/dense": jnp.zeros(1), "density/dense": jnp.ones(1)}
    # All masks at once, so that attention is compiled twice and not once a rule.
    kept = {corrected: {name: masks(rule) for name, rule in RULES.items() if rule.corrected == corrected}
            for corrected in (False, True)}  # fmt: skip
    for corrected, of_rule in kept.items():
        found = jax.lax.map(functools.partial(read, corrected=corrected), jnp.concatenate([*of_rule.values()]))
        ends = np.cumsum([x.shape[0] for x in of_rule.values()])[:-1]
        for metric, values in found.items():
            parts = zip(of_rule, jnp.split(values, ends), strict=True)
            metrics |= {f"{metric}/{name}": part for name, part in parts}
    metrics |= {f"setting/{name}": numbers_of(rule, config) for name, rule in RULES.items()}

    # Claim 1: nothing left out is dense attention, against an implementation that is not ours.
    some = slice(0, min(config.length, 512))
    cfg = FlashPrefillConfig(alpha=0.0, block_size=block)
    ours, _ = flash_prefill(q[some], k[some], v[some], cfg)
    theirs = jax.nn.dot_product_attention(*(x[None, some] for x in (q, k, v)), is_causal=True)[0]
    metrics["alpha 0 to dense"] = jnp.abs(ours - theirs).max()
    # Claim 4: the same head, read up to an eighth of the longest length and on.
    select = functools.partial(kept_blocks, RULES["max"], number=PAPER_ALPHA, block=block, sink=config.sink)
    upto = [tuple(x[: config.length * 2 // share] for x in whole[:2]) for share in (8, 4, 2, 1)]
    metrics["chosen by length"] = jnp.stack([chosen_share(select(q, k), config.sink) for q, k in upto])
    return metrics


def make_planted(config: Config) -> Train:
    """`advance` draws heads of the kind of a row and measures every rule on them; nothing is trained."""
    (causal, formed), sorts = selection_cost(), sorts_of_selection(RULES["max"])
    fixed = {"cost of selection": causal, "cost of the whole map": formed, "sorts": sorts}

    def draw(key, start, numbers):
        return measure_planted(key, numbers, config) | {name: jnp.float32(x) for name, x in fixed.items()}

    return measuring(lambda key: (), draw, config)


class Measured(NamedTuple):
    """The state of a part that measures: what `start` made of the seed, and where the draws stand."""

    start: Any
    key: jax.Array
    step: jax.Array


def measuring(start: Callable, measure: Callable, config: Config) -> Train:
    """A `Train` that trains in `init` alone, once a seed for all rows, and then measures: an update is a draw.

    Args:
      start: `start(key) -> anything`.
      measure: `measure(key, start, numbers) -> metrics`.
    """

    def init(key):
        return Measured(start(key), key, jnp.int32(0))

    def advance(state, numbers):
        def draw(state, _):
            metrics = measure(jax.random.fold_in(state.key, state.step + 1), state.start, numbers)
            return state._replace(step=state.step + 1), metrics

        return jax.lax.scan(draw, state, length=min(config.chunk, config.updates))

    return Train(init, advance, lambda state, numbers: {})


# --- Recall: a trained network reads with sparse attention ----------------------------------------------------------


class Needle(NamedTuple):
    """What differs between the rows of part recall, see `recall_sequence`."""

    needle: jax.Array
    questions: jax.Array
    noise: jax.Array
    apart: jax.Array


def recall_model(config: Config) -> LanguageModel:
    """Two layers, two query heads on one key head."""
    return transformer(TransformerConfig(VOCABULARY, config.width, num_layers=2, num_heads=2, num_kv_heads=1))


def answer_logits(model: LanguageModel, params, tokens, prefill=None):
    """`[B, T, VALUES]`. All positions are 0, which makes rotary positions the identity: the network has none."""
    hidden, _ = features(model, params, tokens, jnp.zeros_like(tokens), None, prefill)
    return logits_of(model, params, hidden)[..., :VALUES]


def train_recall(key, config: Config):
    """Parameters after `steps` steps of 12 sequences of 256 tokens with dense attention.

    Needles are of 1, 2, 4 or 8 tokens, half of the sequences noisy: one network serves every row. A memory's embedding
    starts as the sum of those of its question and its answer, which saves most of the steps.
    """
    model = recall_model(config)
    draw = functools.partial(recall_sequence, length=256)

    def loss(params, key):
        which, key = jax.random.split(key)
        kind = jax.random.randint(which, (12,), 0, 8)
        needle, noise = 2 ** (kind % 4), config.noise * (kind // 4)
        tokens, answers, asked = jax.vmap(draw, (0, 0, None, 0))(jax.random.split(key, 12), needle, 64, noise)
        log_probs = jax.nn.log_softmax(answer_logits(model, params, tokens))
        right = jnp.take_along_axis(log_probs, answers[..., None], axis=-1)[..., 0]
        return -objectives.masked_mean(right, asked)

    params = model.init(key)
    table = params["embed"]["embedding"]
    pairs = table[QUESTION:FILLER, None] + table[None, :VALUES]
    params |= {"embed": {"embedding": table.at[MEMORY:].set(pairs.reshape(-1, config.width))}}
    return fit(key, params, loss, steps=config.steps, optimizer=optax.adam(config.lr))


def measure_recall(key, params, numbers: Needle, config: Config) -> dict[str, jax.Array]:
    """Share of right answers and density over both layers: `[settings]` for each rule that is swapped in."""
    model = recall_model(config)
    draw = functools.partial(recall_sequence, length=config.length, block=config.block)
    keys = jax.random.split(key, config.sequences)
    tokens, answers, asked = jax.vmap(draw, (0, None, None, None, None))(keys, *numbers)

    def accuracy(prefill):
        right = jnp.argmax(answer_logits(model, params, tokens, prefill), axis=-1) == answers
        return objectives.masked_mean(right.astype(jnp.float32), asked)

    def at(rule, number):
        block, seen = int(config.block * rule.scale), []  # densities of the layers, which are unrolled: one trace

        def read(q, k, v):
            if rule.causal:
                out, share = attend_row_by_row(q, k, v, number, block=block, sink=config.sink)
                return out, {"density": share}
            mask = kept_blocks(rule, q, k, number, block=block, sink=config.sink)
            shares = {"density": density(mask), "chosen": chosen_share(mask, config.sink)}
            return attend(q, k, v, mask, block=block, corrected=rule.corrected), shares

        def prefill(q, k, v, length):
            out, shares = jax.vmap(read)(q, k, v)
            seen.append(shares)
            return out

        answered = accuracy(prefill)
        return {"accuracy": answered} | jax.tree.map(lambda *x: jnp.stack(x).mean(), *seen)

    metrics = {"accuracy/dense": accuracy(None)[None], "density/dense": jnp.ones(1)}
    for name, rule in NETWORK_RULES.items():
        numbers = numbers_of(rule, config)
        found = jax.lax.map(functools.partial(at, rule), numbers)
        metrics |= {f"setting/{name}": numbers} | {f"{metric}/{name}": x for metric, x in found.items()}
    return metrics


def make_recall(config: Config) -> Train:
    """`init` trains the network; `advance` draws test sequences and reads them under every rule."""
    return measuring(
        functools.partial(train_recall, config=config),
        lambda key, params, numbers: measure_recall(key, params, numbers, config),
        config,
    )


def needle_rows(config: Config) -> dict[str, Needle]:
    """All needles with the usual number of questions; the crossed ones also with few, with many, and with noise."""
    rows = {f"needle {needle}": Needle(needle, config.questions, 0.0, 0) for needle in config.needles}
    for needle in config.crossed:
        rows |= {
            f"needle {needle}, one a block": Needle(needle, config.apart, 0.0, 1),
            f"needle {needle}, crowd": Needle(needle, config.crowd, 0.0, 0),
            f"needle {needle}, noisy": Needle(needle, config.questions, config.noise, 0),
        }
    return rows


# --- The study ------------------------------------------------------------------------------------------------------


def build(config: Config) -> Build:
    """All rows and seeds of a part in one program."""
    if config.part == "planted":
        return Build(make_planted(config), PLANTED_ROWS)
    return Build(make_recall(config), needle_rows(config))


def metric_of(results: Results, row: str) -> str:
    """What says how good a rule is in this part."""
    return "recall" if "recall/dense" in results.train[row] else "accuracy"


def curve(results: Results, rows: Sequence[str], rule: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(density, metric) `[seeds, settings + 1]` of a rule: means over rows and draws, dense attention at the end."""

    def mean(name):
        return np.mean([results.train[row][name].mean(axis=1) for row in rows], axis=0)

    x, y = (np.concatenate([mean(f"{name}/{end}") for end in (rule, "dense")], axis=1) for name in ("density", metric))
    return x, y


def at_density(results: Results, rows: Sequence[str], rule: str, share: Any, metric: str = "") -> np.ndarray:
    """The metric on a rule's curve at a density, `[seeds]`, a number or `[seeds]`; see `at_share`."""
    return at_share(*curve(results, rows, rule, metric or metric_of(results, rows[0])), share)


def at_alpha(results: Results, row: str, metric: str, rule: str = "max", alpha: float = PAPER_ALPHA) -> np.ndarray:
    """The metric of a rule at an alpha that was measured, `[seeds]`; NaN where it was not."""
    index = np.flatnonzero(np.isclose(results.train[row][f"setting/{rule}"][0, 0], alpha))
    values = results.train[row][f"{metric}/{rule}"].mean(axis=1)
    return values[:, index[0]] if index.size else np.full(values.shape[0], np.nan)


# --- Claims ---------------------------------------------------------------------------------------------------------

TIGHT, FIFTH, THIRD = 0.15, 0.2, 1 / 3  # densities at which rules are compared; .11 is what no rule falls below
FULL = ("needle 12", "needle 16", "needle 16, one a block")
INEXACT = ("needle 6", "needle 12", "needle 16, noisy")  # a block's mean is not its tokens: see claim 5c
NARROW = ("needle 4", "needle 6")
CROWDED = ("needle 16", "needle 16, crowd")
CROWDED_NARROW = ("needle 4", "needle 4, crowd")


def equal(better: str, worse: str, rows: Sequence[str], share: float) -> Callable[[Results], np.ndarray]:
    """The difference of two rules at equal density."""
    return lambda r: at_density(r, rows, better, share) - at_density(r, rows, worse, share)


def learnt(*rows: str) -> Callable[[Results], bool]:
    """That the network answers with dense attention: rules of one that does not are equal for no good reason."""
    return lambda r: all(r.train[row]["accuracy/dense"].mean() > 0.9 for row in rows)


def versus(
    name: str, statement: str, better: str, worse: str, rows: tuple[str, ...], share: float, *test: Any
) -> Claim:
    """A claim on two rules at equal density; `test`: `says` and `bound`, above 0 when left out."""
    unit, applies = ("attention mass", None) if rows[0] in PLANTED_ROWS else ("accuracy", learnt(*rows))
    return Claim(name, statement, equal(better, worse, rows, share), *(test or ("above", 0.0)), unit, applies, rows)


def largest_rise(results: Results) -> np.ndarray:
    """Of the density from one alpha to the next, over all heads, `[seeds]`."""
    order = np.argsort(results.train[HEADS[0]]["setting/max"][0, 0])
    densities = np.stack([results.train[head]["density/max"].mean(axis=1)[:, order] for head in HEADS])
    return np.diff(densities, axis=-1).max(axis=(0, 2))


def correction_gain(results: Results, alpha: float) -> np.ndarray:
    """Error without less error with the mean correction at an alpha, on one mask, over the structured heads."""
    gains = [at_alpha(results, head, "error", "v2", alpha) - at_alpha(results, head, "error", "v2 corrected", alpha)
             for head in STRUCTURED]  # fmt: skip
    return np.mean(gains, axis=0)


def over_heads(metric: str, heads: Sequence[str] = HEADS, reduce=np.max) -> Callable[[Results], np.ndarray]:
    return lambda r: reduce([r.train[head][metric].mean(axis=1) for head in heads], axis=0)


def fall_with_length(results: Results) -> np.ndarray:
    """What is chosen at the smallest length over that at the largest, structured heads, `[seeds]`."""
    by_length = over_heads("chosen by length", STRUCTURED, np.mean)(results)
    return by_length[:, 0] / by_length[:, -1]


def lost_at_alpha(row: str) -> Callable[[Results], np.ndarray]:
    return lambda r: r.train[row]["accuracy/dense"].mean(axis=(1, 2)) - at_alpha(r, row, "accuracy")


CLAIMS = [
    Claim("1a", "At alpha 0 the operator is dense attention",
          over_heads("alpha 0 to dense"), "below", 1e-5, "largest difference", needs=HEADS),
    Claim("1b", "Density falls with alpha (its largest rise from one alpha to the next)",
          largest_rise, "below", 1e-6, "density", needs=HEADS),
    Claim("2a", "At alpha .1 one score map finds vertical, slash and block patterns alike: the least recall of them",
          lambda r: np.min([at_alpha(r, head, "recall") for head in HEADS[:3]], axis=0),
          "above", 0.8, "attention mass", needs=HEADS),
    Claim("2b", "... while it reads less than a fifth of the blocks: the largest density of them",
          lambda r: np.max([at_alpha(r, head, "density") for head in HEADS[:3]], axis=0),
          "below", 0.2, "density", needs=HEADS),
    versus("2c", "Heads with structure: at a density of .15 far more attention mass than sinks and a window",
           "max", "window", STRUCTURED, TIGHT, "above", 0.2),
    versus("2d", "... more than a fixed top-k, since the budget adapts to the row", "max", "top-k", STRUCTURED, TIGHT),
    versus("2e", "... and so at a density of .2", "max", "top-k", STRUCTURED, FIFTH),
    versus("2f", "The head without structure: at a density of .15 threshold and top-k recall the same",
           "max", "top-k", DIFFUSE, TIGHT, "within", 0.05),
    versus("2g", "One setting for all heads, as the paper has it: more than top-k at a mean density of a third",
           "max", "top-k", HEADS, THIRD),
    versus("2h", "... and at .15", "max", "top-k", HEADS, TIGHT),
    versus("2i", "A network answers better than with top-k where needles about fill a block, at a density of a third",
           "max", "top-k", FULL, THIRD),
    Claim("3a", "Selecting sorts nothing (top-k and top-p do)",
          over_heads("sorts"), "within", 0.5, "sorts", needs=HEADS),
    Claim("3b", "Means, scores, threshold and compaction cost 1 / (2 block) of dense attention's arithmetic "
          "(block 128, 16K tokens, bfloat16, future blocks not counted)",
          over_heads("cost of selection"), "below", 1.1, "1 / (2 block) of dense", needs=HEADS),
    Claim("3c", "... also with the blocks in the future, as the definition forms them",
          over_heads("cost of the whole map"), "below", 1.1, "1 / (2 block) of dense", needs=HEADS),
    Claim("4", "At alpha .1 the share of free blocks (neither sink nor window) that is read falls to less than half "
          "over 8 times the length, where supports are bounded",
          fall_with_length, "above", 2.0, "times", needs=HEADS),
    Claim("5a", "On one mask, mean correction lowers the error of the output, at alpha .1",
          lambda r: correction_gain(r, PAPER_ALPHA), unit="relative error", needs=HEADS),
    Claim("5b", "... and the more, the sparser: by more at alpha .5 than at .02",
          lambda r: correction_gain(r, 0.5) - correction_gain(r, 0.02), unit="relative error", needs=HEADS),
    versus("5c", "A network with needles that do not divide a block, or noisy ones, answers better with the correction",
           "v2 corrected", "v2", INEXACT, THIRD),
    versus("6a", "Heads with structure: threshold and top-p recall the same attention mass at a density of .15",
           "max", "top-p", STRUCTURED, TIGHT, "within", 0.05),
    versus("6b", "... and a network answers as well with either at a third, where needles about fill a block",
           "max", "top-p", FULL, THIRD, "within", 0.05),
    versus("6c", "The paper says more: the threshold prunes the long tail better than top-p",
           "max", "top-p", STRUCTURED, TIGHT),
    versus("7a", "Ours: with several questions in a block, scores normalised row by row answer better at a third",
           "max by row", "max", CROWDED, THIRD),
    versus("7b", "Ours: with one question a block at most, the paper's one reference for the tile is better, at .15",
           "max", "max by row", ("needle 16, one a block",), TIGHT),
    versus("7c", "Ours: ... with several questions in a block also where needles of 4 do not fill a block, at a third",
           "max by row", "max", CROWDED_NARROW, THIRD),
    Claim("8a", "Ours: needles of one token drown in the mean key, so alpha .1 saves next to nothing: share of the "
          "free blocks that is read",
          lambda r: at_alpha(r, "needle 1", "chosen"), "above", 0.9, "share", learnt("needle 1"), ("needle 1",)),
    Claim("8b", "Near-equal accuracy where needles fill a block: alpha .1 loses less than .05",
          lost_at_alpha("needle 16"), "below", 0.05, "accuracy", learnt("needle 16"), ("needle 16",)),
    versus("8c", "Ours: at .15 blocks of half the size answer better where needles of 4 and 6 do not fill a block",
           "max, half blocks", "max", NARROW, TIGHT),
    versus("9a", "Ours: where heads of a group seek the same, V2's one list recalls as much as a list a head, at .2",
           "v2", "max", TOGETHER, FIFTH, "within", 0.05),
    versus("9b", "Ours: where they seek different blocks, a list a head recalls more", "max", "v2", APART, FIFTH),
    versus("9c", "Ours: in the network a list a head answers as well as one list, at a third", "max", "v2", FULL, THIRD,
           "within", 0.05),
    versus("9d", "Ours: a list a position, which cannot leak, answers better than a list a tile with several questions",
           "v2 causal", "v2", CROWDED, THIRD),
]  # fmt: skip


# --- Results --------------------------------------------------------------------------------------------------------


def measured_mean(results: Results, row: str, metric: str) -> np.ndarray:
    """Over all draws, `[seeds]`; NaN where the row does not measure it."""
    values = results.train[row].get(metric)
    return np.full(next(iter(results.train[row].values())).shape[0], np.nan) if values is None else values.mean(axis=1)


def as_sparse(rule: str) -> Callable[[Results, str], np.ndarray]:
    """A rule at the density of the paper's at alpha 0.1."""
    return lambda r, row: at_density(r, [row], rule, at_alpha(r, row, "density"))


COLUMNS: dict[str, Callable[[Results, str], np.ndarray]] = {
    "mass or accuracy (alpha 0.1)": lambda r, row: at_alpha(r, row, metric_of(r, row)),
    "density": lambda r, row: at_alpha(r, row, "density"),
    "correlation of score and mass": lambda r, row: measured_mean(r, row, "correlation"),
    "at this density: by row": as_sparse("max by row"),
    **{rule: as_sparse(rule) for rule in ("v2", "v2 corrected", "top-k", "top-p", "window")},
}

SHARES = np.linspace(0.05, 1.0, 39)


def against_density(results: Results, title: str, rows: Sequence[str], rules: Sequence[str], metric: str) -> Panel:
    curves = {
        rule: np.stack([at_density(results, rows, rule, share, metric) for share in SHARES], axis=1) for rule in rules
    }
    return Panel(title, SHARES, curves, "density")


def panels(results: Results) -> list[Panel]:
    """What is kept against density, by rule, and by the size of blocks."""
    rows = list(results.train)
    if rows[0] in HEADS:
        by_length = {head: results.train[head]["chosen by length"].mean(axis=1) for head in HEADS}
        shown = (("heads with structure", STRUCTURED), ("no structure", DIFFUSE), ("all, one setting", HEADS))
        masses = [(f"mass, {name}", heads) for name, heads in shown]
        masses += [(f"mass, {row}", (row,)) for row in (*HEADS[:3], "blocks, apart")]
        return [
            *(against_density(results, title, heads, tuple(RULES), "recall") for title, heads in masses),
            against_density(results, "relative error, structure", STRUCTURED, tuple(RULES), "error"),
            Panel("free blocks read at alpha 0.1", 2.0 ** np.arange(4) / 4, by_length, "length, relative"),
        ]
    blocks = ("max", "max, half blocks", "max, double blocks")
    main_rules = tuple(rule for rule in NETWORK_RULES if rule not in blocks[1:])
    plain = [row for row in rows if "," not in row]
    return [
        *(against_density(results, f"accuracy, {row}", [row], main_rules, "accuracy") for row in rows),
        *(against_density(results, f"size of blocks, {row}", [row], blocks, "accuracy") for row in plain),
    ]


def by_setting(results: Results, metric: str) -> Table:
    """A line for each rule and setting, a column for each row: the metric and the density at which it stands."""
    lines, rows = [], list(results.train.values())
    for rule in ("dense", *NETWORK_RULES):
        if f"{metric}/{rule}" in rows[0]:
            numbers = rows[0][f"setting/{rule}"][0, 0] if rule in NETWORK_RULES else [None]
            means = [[row[f"{name}/{rule}"].mean(axis=1) for row in rows] for name in (metric, "density")]
            for i, number in enumerate(numbers):
                said = "" if number is None else f"{NETWORK_RULES[rule].settings} {number:.3g}"
                cells = [f"{cell(x[:, i])} @ {y[:, i].mean():.2f}" for x, y in zip(*means, strict=True)]
                lines.append([rule, said, *cells])
    return Table(["rule", "setting", *results.train], lines)


def tables(results: Results) -> dict[str, Table]:
    """Every rule at every setting."""
    named = {"recall": "attention mass", "error": "relative L2 error of the output", "accuracy": "accuracy"}
    first = next(iter(results.train.values()))
    return {f"{said} @ density": by_setting(results, name) for name, said in named.items() if f"{name}/dense" in first}


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line, read once for each part over the defaults of its preset; by the part's name."""
    part = glance(Config(), argv).part
    parsed = {}
    with one_line_errors():
        for name in PARTS if part == "all" else (part,):
            default = Config(**{"part": name} | PRESETS.get(name, {}))
            parsed[name] = dataclasses.replace(parse(default, __doc__, argv, check=False), part=name)
            parsed[name].check()
    return parsed


STUDY = Study(
    name="flash_prefill",
    title="FlashPrefill (arXiv 2603.06199, 2608.19758)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns=COLUMNS,
    panels=panels,
    order=tuple(NETWORK_RULES),
    tables=tables,
    smoke=("--part", "planted", "--seeds", "2", "--length", "256", "--block", "8", "--width", "16",
           "--alpha", "0.1", "1"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
