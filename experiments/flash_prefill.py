"""FlashPrefill: does one map of block scores find what attention needs? (arXiv 2603.06199; V2: arXiv 2608.19758)

A block of queries meets the mean key of every block; blocks with at least alpha times the best score are read, the rest
is not. Three parts: `planted`, heads whose pattern is known; `recall`, a small network trained on dense attention that
reads long sequences with sparse attention; `rl`, what sparse prefill on the sampler's side alone does to the policy
ratio. Rules of selection are compared at equal density, the share of visible blocks that is read.

    python experiments/flash_prefill.py                                    # all parts, all claims
    python experiments/flash_prefill.py --part recall --needles 1 4 16 --block 8
    python experiments/flash_prefill.py --part rl --alpha 0.1 0.5 --task arithmetic

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

from rollax import envs, objectives
from rollax.agents import (
    LanguageModel,
    TransformerConfig,
    rollout,
    score,
    transformer,
)
from rollax.agents.generation import padded_positions
from rollax.agents.language_model import features, logits_of, token_log_probs
from rollax.envs import Environment, Step, Tokens
from rollax.envs.tokens import decode
from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train, final, gap, late
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.study import Build, Study, main
from rollax.kernels.flash_prefill import (
    FlashPrefillConfig,
    PackedPrefillConfig,
    block_energy,
    block_sparse_attention,
    compact_index,
    dense_attention,
    density,
    flash_prefill,
    flash_prefill_packed,
    keep_forced,
    keep_top_k,
    keep_top_p,
    mean_pool,
    packed_energy,
    select_blocks,
    select_packed,
)

PARTS = ("planted", "recall", "rl")
PAPER_ALPHA = 0.1  # V2's for all models; v1 has 0.08 to 0.22


@dataclass(frozen=True)
class Config(Options):
    """The study. `PRESETS` replaces some of these defaults for each part."""

    part: str = "all"
    """planted, recall, rl, or all."""
    seeds: int = 6
    """Seeds, the unit of every interval, in one vmap."""
    seed: int = 0
    """The first seed."""
    updates: int = 1
    """Draws of heads or of sequences; in part rl rollouts, each followed by `passes` times `mini_batches` steps."""
    chunk: int = 1
    """Updates between evaluations: one call of the compiled program."""
    alpha: tuple[float, ...] = (0.0, 0.02, 0.1, 0.2, 0.5, 0.8, 1.0)
    """Thresholds of the max rules: 0 keeps all, 1 the best block."""
    top_k: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.35, 0.6)
    """Shares of the visible blocks that top-k keeps."""
    top_p: tuple[float, ...] = (0.2, 0.5, 0.8, 0.9, 0.95, 0.99)
    """Shares of the summed score that top-p keeps."""
    window: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Blocks of the windows."""
    block: int = 32
    """Tokens of a block, a power of two."""
    sink: int = 1
    """First blocks, which every rule keeps; all but the windows also keep the diagonal block and the one before it."""
    length: int = 2048
    """Tokens of a planted head, of a test sequence of recall."""
    width: int = 32
    """D of a planted head, of the networks."""
    needles: tuple[int, ...] = (1, 3, 4, 6, 12, 16)
    """recall: how many tokens in a row hold a key and its value."""
    crossed: tuple[int, ...] = (4, 16)
    """recall: the needles that also meet other numbers of questions and noise."""
    questions: tuple[int, ...] = (64, 16, 128)
    """recall: questions in the second half of a sequence; the first number goes with all needles."""
    noise: float = 0.3
    """recall: share of a noisy needle's tokens that hold something else."""
    sequences: int = 2
    """recall: test sequences of a draw."""
    steps: int = 400
    """Supervised steps: the training of the recall network, the start of the policy."""
    teach_lr: float = 2e-3
    """Adam's learning rate in them."""
    task: str = "sorting"
    """rl: sorting, arithmetic or countdown."""
    shots: int = 7
    """rl: solved examples before a question, at most; each prompt has half of them or more."""
    prompts: int = 16
    """rl: prompts of a rollout."""
    samples: int = 16
    """rl: rollouts of each prompt, the group of the advantage."""
    mini_batches: int = 2
    """rl: gradient steps of a pass; a prompt's group stays together."""
    passes: int = 1
    """rl: passes over each rollout."""
    lr: float = 3e-4
    """rl: Adam's learning rate."""
    clip: float = 0.2
    """rl: clip range of the ratio."""
    eval_prompts: int = 128
    """rl: prompts of an evaluation."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        if self.part not in PARTS:
            raise ValueError(f"part: expected {', '.join(PARTS)} or all, got {self.part!r}")
        at_least_one = ("seeds updates chunk block length width sequences shots prompts samples mini_batches passes "
                        "eval_prompts")  # fmt: skip
        for least, names in ((1, at_least_one), (0, "seed sink steps teach_lr lr clip")):
            for name in names.split():
                if not getattr(self, name) >= least:
                    raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("alpha", "top_k", "top_p", "window", "needles", "questions"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one value, got none")
        for name in ("alpha", "top_k", "top_p"):
            for value in getattr(self, name):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name}: expected values in [0, 1], got {value:g}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise: expected a share in [0, 1], got {self.noise}")
        for name in ("window", "needles", "crossed", "questions"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name}: expected values of at least 1, got {value}")
        if self.block < 2 or self.block & (self.block - 1):
            raise ValueError(f"block: expected a power of two, at least 2, got {self.block}")
        if self.part != "rl" and (self.length % self.block or self.length < 16 * self.block):
            raise ValueError(f"length: expected a multiple of block={self.block}, 16 times or more, got {self.length}")
        if self.part == "recall" and max(*self.needles, *self.questions) > self.length // 2:
            raise ValueError(f"needles, questions: expected at most half of length={self.length}")
        if self.width % 4:
            raise ValueError(f"width: expected a multiple of 4, got {self.width}")
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        if self.prompts % self.mini_batches:
            raise ValueError(f"mini_batches: expected a divisor of prompts={self.prompts}, got {self.mini_batches}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


PRESETS: dict[str, dict[str, Any]] = {
    "planted": dict(seeds=8),
    "recall": dict(
        seeds=5, block=16, length=1024, width=64, alpha=(0.03, 0.1, 0.2, 0.5, 0.8, 1.0), top_k=(0.05, 0.1, 0.2, 0.5),
        top_p=(0.3, 0.6, 0.9, 0.97), window=(2, 8, 24, 40), steps=200,
    ),
    "rl": dict(seeds=5, block=8, width=64, alpha=(0.1, 0.5, 1.0), updates=45, chunk=15, steps=120),
}  # fmt: skip


# --- Rules: which blocks a tile of queries reads --------------------------------------------------------------------


class Rule(NamedTuple):
    """A rule of selection with one number.

    Attributes:
      settings: the field of `Config` that holds the numbers.
      keep: `keep(number)`, another rule on the scores than the threshold; None where the number is alpha.
      packed: V2's scores, one list for all query heads of a key head.
      row_normalised: every row's scores are a softmax of its own, so that no row hides another.
      corrected: blocks left out count by their mean keys and values (V2).
    """

    settings: str = "alpha"
    keep: Callable | None = None
    packed: bool = False
    row_normalised: bool = False
    corrected: bool = False


RULES: dict[str, Rule] = {
    "max": Rule(),
    "max by row": Rule(row_normalised=True),
    "v2": Rule(packed=True),
    "v2 corrected": Rule(packed=True, corrected=True),
    "top-k": Rule("top_k", lambda share: functools.partial(keep_top_k, share=share)),
    "top-p": Rule("top_p", lambda mass: functools.partial(keep_top_p, mass=mass)),
    "window": Rule("window", lambda blocks: keep_forced),
}
# Rules by the size of their blocks, in units of `Config.block`: the paper's rule has three.
BLOCK_SIZES = {1: RULES, 0.5: {"max, half blocks": Rule()}, 2: {"max, double blocks": Rule()}}


def kept_blocks(rule: Rule, q, k, number, *, block: int, sink: int = 1):
    """bool `[HQ, n, n]`: the blocks of keys that each block of queries reads; `number` may be traced.

    A tile of V2 has as many packed rows as make up a block of positions, so its lists are those of `[n, n]` too.
    """
    group, kbar = q.shape[1] // k.shape[1], mean_pool(k, block)
    choice = dict(
        alpha=number if rule.keep is None else 0.0,
        block_size=block,
        sink_blocks=sink,
        window_blocks=number if rule.settings == "window" else 2,
        row_normalised=rule.row_normalised,
    )
    keep = rule.keep and rule.keep(number)
    if rule.packed:
        cfg = PackedPrefillConfig(tile_rows=group * block, last_full_tiles=0, **choice)
        mask = select_packed(packed_energy(q, kbar, cfg), cfg, group=group, length=q.shape[0], keep=keep)
        return jnp.repeat(mask, group, axis=0)
    cfg = FlashPrefillConfig(last_full_blocks=0, **choice)  # whole last blocks would hide errors at the end
    return select_blocks(block_energy(q, kbar, cfg), cfg, keep=keep)


def attend(q, k, v, mask, *, block: int, corrected: bool = False):
    """Attention `[S, HQ, D]` over the blocks of `mask`, and over the means of the others where it is corrected."""
    means = dict(kbar=mean_pool(k, block), vbar=mean_pool(v, block)) if corrected else {}
    return block_sparse_attention(q, k, v, compact_index(mask, mask.shape[-1]), block_size=block, **means)[0]


def sparse_attention(rules: Sequence[Rule], rule, number, q, k, v, *, block: int, sink: int):
    """Attention under the rule of index `rule`, traced: (out `[S, HQ, D]`, mask `[HQ, n, n]`)."""
    select = [functools.partial(kept_blocks, r, block=block, sink=sink) for r in rules]
    mask = jax.lax.switch(rule, select, q, k, number)
    corrected = jnp.array([r.corrected for r in rules])[rule]
    with_means, without = (functools.partial(attend, block=block, corrected=c) for c in (True, False))
    return jax.lax.cond(corrected, with_means, without, q, k, v, mask), mask


def under_every_rule(measure: Callable, rules: dict[str, Rule], config: Config) -> dict[str, jax.Array]:
    """`measure(index of the rule, number) -> metrics` at all settings, `{"metric/rule": [settings]}`.

    They go one after the other: the index then is no axis of a `vmap`, so that a setting costs its own rule alone.
    """
    numbers = [jnp.asarray(getattr(config, rule.settings), jnp.float32) for rule in rules.values()]
    index = jnp.concatenate([jnp.full(x.size, i) for i, x in enumerate(numbers)])
    found = jax.lax.map(lambda setting: measure(*setting), (index, jnp.concatenate(numbers)))
    ends = np.cumsum([x.size for x in numbers])[:-1]
    metrics = {f"setting/{rule}": x for rule, x in zip(rules, numbers, strict=True)}
    for name, values in found.items():
        metrics |= {f"{name}/{rule}": x for rule, x in zip(rules, jnp.split(values, ends), strict=True)}
    return metrics


# --- Planted heads: the pattern is known ----------------------------------------------------------------------------


class Planted(NamedTuple):
    """What differs between the rows of part planted."""

    kind: jax.Array  # index into HEADS


HEADS = ("vertical", "slash", "blocks", "noisy blocks", "diffuse")
KEY_NOISE = (1.0, 1.0, 0.5, 1.5, 1.0)  # of a key, in lengths of its block's direction
STRENGTH = 6.0  # nats by which a sought block's keys stand out
GROUP = 2  # query heads of the key head
STRUCTURED = HEADS[:4]


def planted_targets(key, n: int):
    """bool `[heads, n, n]`, what blocks seek: two early anchors; offsets 0, 3, 9; 1 to 8 neighbours, twice; nothing."""
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    start, wide, place = jax.random.uniform(key, (3, n, 1))
    early = max(n // 32, 1)
    vertical = (j == jnp.floor(place[0] * early)) | (j == early + jnp.floor(place[1] * early))
    slash = (i - j == 0) | (i - j == 3) | (i - j == 9)
    start = jnp.floor(start * (i + 1))
    neighbours = (j >= start) & (j <= start + jnp.floor(wide * 8))
    nothing = jnp.zeros((n, n), bool)
    heads = (vertical, slash, neighbours, neighbours, nothing)
    return jnp.stack([jnp.broadcast_to(targets, (n, n)) & (j <= i) for targets in heads])


def planted_head(key, kind, *, length: int, block: int, width: int):
    """A key head and its query heads with a planted pattern: q `[S, GROUP, D]`, k and v `[S, 1, D]`.

    Keys of a block share a direction, and values a mean; queries point along the directions of the blocks they seek.

    Args:
      kind: index into HEADS, may be traced.
    """
    target_key, block_key, token_key = jax.random.split(key, 3)
    n, own = length // block, jnp.arange(length) // block
    direction, mean = jax.random.normal(block_key, (2, n, width))
    direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True)
    of_key, of_value, *of_queries = jax.random.normal(token_key, (2 + GROUP, length, width))
    sought = planted_targets(target_key, n)[kind].astype(jnp.float32) @ direction
    q = STRENGTH * sought[own][:, None] + 0.5 * jnp.stack(of_queries, axis=1)
    k = width**0.5 * direction[own] + jnp.asarray(KEY_NOISE)[kind] * of_key
    return q, k[:, None], (mean[own] + of_value)[:, None]


def attention_mass(q, k, *, block: int, every: int):
    """True attention of every `every`-th row to each block, `[HQ, R, n]`, of one key head; and those rows `[R]`."""
    rows = jnp.arange(every // 2, q.shape[0], every)
    x = jnp.einsum("rhd,sd->hrs", q[rows], k[:, 0]) * q.shape[-1] ** -0.5
    p = jax.nn.softmax(jnp.where(jnp.arange(k.shape[0]) <= rows[:, None], x, -jnp.inf), axis=-1)
    return p.reshape(*p.shape[:2], -1, block).sum(-1), rows


def relative_error(out, exact):
    return jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)


def measure_planted(key, kind, config: Config) -> dict[str, jax.Array]:
    """Recalled attention mass, relative error of the output and density: `[settings]` for each rule, of a new head."""
    block = config.block
    whole = planted_head(key, kind, length=2 * config.length, block=block, width=config.width)
    q, k, v = (x[: config.length] for x in whole)
    mass, rows = attention_mass(q, k, block=block, every=max(1, block // 4))
    exact = dense_attention(q, k, v, block_size=block)[0]
    rules = tuple(RULES.values())

    def at(rule, number):
        out, mask = sparse_attention(rules, rule, number, q, k, v, block=block, sink=config.sink)
        recall = jnp.sum(mask[:, rows // block] * mass, axis=-1).mean()
        return {"recall": recall, "error": relative_error(out, exact), "density": density(mask)}

    metrics = {"recall/dense": jnp.ones(1), "error/dense": jnp.zeros(1), "density/dense": jnp.ones(1)}
    metrics |= under_every_rule(at, RULES, config)

    # Claim 1: nothing left out is dense attention, against an implementation that is not ours.
    some = slice(0, min(config.length, 512))
    cfg = FlashPrefillConfig(alpha=0.0, block_size=block)
    ours, _ = flash_prefill(q[some], k[some], v[some], cfg)
    theirs = jax.nn.dot_product_attention(*(x[None, some] for x in (q, k, v)), is_causal=True)[0]
    metrics["alpha 0 to dense"] = jnp.abs(ours - theirs).max()
    # Claim 4: the same head, read up to an eighth of the longest length and on.
    select = functools.partial(kept_blocks, RULES["max"], number=PAPER_ALPHA, block=block, sink=config.sink)
    upto = [tuple(x[: config.length * 2 // share] for x in whole[:2]) for share in (8, 4, 2, 1)]
    metrics["density by length"] = jnp.stack([density(select(q, k)) for q, k in upto])
    return metrics


def selection_cost(rule: Rule, block: int = 128, width: int = 128, length: int = 16384) -> tuple[int, float]:
    """Of selecting for one head at a real size, traced and lowered but not run: sorts, and arithmetic in units of
    1 / (2 block) of dense causal attention's 2 length^2 width."""
    shape = jax.ShapeDtypeStruct((length, 1, width), jnp.float32)
    number = getattr(Config(), rule.settings)[0]
    select = lambda q, k: kept_blocks(rule, q, k, float(number), block=block)  # noqa: E731
    sorts = str(jax.make_jaxpr(select)(shape, shape)).count(" sort[")

    def definition(q, k):  # without loops, whose trips the count below does not know
        cfg = FlashPrefillConfig(alpha=PAPER_ALPHA, block_size=block)
        energy = block_energy(q, mean_pool(k, block), cfg, implementation="reference")
        return select_blocks(energy, cfg)

    operations = jax.jit(definition).lower(shape, shape).cost_analysis()["flops"]
    return sorts, operations / (2 * length**2 * width) * 2 * block


def make_planted(config: Config) -> Train:
    """`advance` draws heads of the kind `numbers.kind` and measures every rule on them; nothing is trained."""
    costs = {name: selection_cost(RULES[name]) for name in ("max", "top-k", "top-p")}

    def draw(key, numbers):
        metrics = measure_planted(key, numbers.kind, config)
        metrics |= {f"sorts/{name}": jnp.float32(sorts) for name, (sorts, _) in costs.items()}
        return metrics | {"cost of selection": jnp.float32(costs["max"][1])}

    return measuring(lambda key: (), lambda key, start, numbers: draw(key, numbers), config)


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
    """What differs between the rows of part recall: tokens of a needle, questions of a sequence, noise in needles."""

    needle: jax.Array
    questions: jax.Array
    noise: jax.Array


KEYS, VALUES, FILLERS = 32, 16, 64
# Ids: answers, then questions (one a key), fillers, and memories (one a pair of key and value).
QUESTION, FILLER = VALUES, VALUES + KEYS
MEMORY = FILLER + FILLERS
VOCABULARY = MEMORY + KEYS * VALUES


def recall_sequence(key, needle, questions, noise, *, length: int):
    """Memories in the first half, at random places, each `needle` times in a row; questions in the second.

    Args:
      needle, questions, noise: see `Needle`; may be traced. Where fewer than KEYS needles fit, fewer keys are stored.
    Returns:
      tokens int32 `[length]`, answers int32 `[length]`, asked bool `[length]`.
    """
    half = length // 2
    slots = half // needle
    place, *fill, hold, ask, want, says = jax.random.uniform(key, (7, half))
    stored = jnp.minimum(slots, KEYS)
    order = jnp.argsort(jnp.where(jnp.arange(half) < slots, place, jnp.inf))[:KEYS]  # the slot of each key
    which = jnp.arange(order.size)
    value = jnp.floor(says[: order.size] * VALUES).astype(jnp.int32)
    owner = jnp.full(half, -1).at[jnp.where(which < stored, order, half)].set(which, mode="drop")
    owner = owner[jnp.arange(half) // needle]
    fillers = FILLER + jnp.floor(jnp.stack(fill) * FILLERS).astype(jnp.int32)
    memory = jnp.where((owner >= 0) & (hold >= noise), MEMORY + owner * VALUES + value[owner], fillers[0])
    asked = jnp.argsort(jnp.argsort(ask)) < questions
    wanted = jnp.floor(want * stored).astype(jnp.int32)
    second = jnp.where(asked, QUESTION + wanted, fillers[1])
    blank = jnp.zeros(half, jnp.int32)
    return (
        jnp.concatenate([memory, second]).astype(jnp.int32),
        jnp.concatenate([blank, value[wanted]]),
        jnp.concatenate([blank > 0, asked]),
    )


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
    model, optimizer = recall_model(config), optax.adam(config.teach_lr)
    draw = functools.partial(recall_sequence, length=256)

    def loss(params, key):
        which, key = jax.random.split(key)
        kind = jax.random.randint(which, (12,), 0, 8)
        needle, noise = 2 ** (kind % 4), config.noise * (kind // 4)
        tokens, answers, asked = jax.vmap(draw, (0, 0, None, 0))(jax.random.split(key, 12), needle, 64, noise)
        log_probs = jax.nn.log_softmax(answer_logits(model, params, tokens))
        right = jnp.take_along_axis(log_probs, answers[..., None], axis=-1)[..., 0]
        return -objectives.masked_mean(right, asked)

    def first(key):
        params = model.init(key)
        table = params["embed"]["embedding"]
        pairs = table[QUESTION:FILLER, None] + table[None, :VALUES]
        return params | {"embed": {"embedding": table.at[MEMORY:].set(pairs.reshape(-1, config.width))}}

    def step(carry, index):
        params, opt_state = carry
        grads = jax.grad(loss)(params, jax.random.fold_in(key, index))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = first(key)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1, config.steps + 1))
    return params


def measure_recall(key, params, numbers: Needle, config: Config) -> dict[str, jax.Array]:
    """Share of right answers and density over both layers: `[settings]` for each rule that is swapped in."""
    model = recall_model(config)
    draw = functools.partial(recall_sequence, length=config.length)
    keys = jax.random.split(key, config.sequences)
    tokens, answers, asked = jax.vmap(draw, (0, None, None, None))(keys, *numbers)

    def accuracy(prefill):
        right = jnp.argmax(answer_logits(model, params, tokens, prefill), axis=-1) == answers
        return objectives.masked_mean(right.astype(jnp.float32), asked)

    metrics = {"accuracy/dense": accuracy(None)[None], "density/dense": jnp.ones(1)}
    for scale, rules in BLOCK_SIZES.items():
        of_block = functools.partial(
            sparse_attention, tuple(rules.values()), block=int(config.block * scale), sink=config.sink
        )

        def at(rule, number, of_block=of_block):
            densities = []  # of the layers, which are unrolled: all of this is one trace

            def prefill(q, k, v, length):
                out, mask = jax.vmap(functools.partial(of_block, rule, number))(q, k, v)
                densities.append(jax.vmap(density)(mask).mean())
                return out

            return {"accuracy": accuracy(prefill), "density": jnp.stack(densities).mean()}

        metrics |= under_every_rule(at, rules, config)
    return metrics


def make_recall(config: Config) -> Train:
    """`init` trains the network; `advance` draws test sequences and reads them under every rule."""
    return measuring(
        functools.partial(train_recall, config=config),
        lambda key, params, numbers: measure_recall(key, params, numbers, config),
        config,
    )


def needle_rows(config: Config) -> dict[str, Needle]:
    """All needles with the first number of questions; the crossed ones with the others and with noise."""
    first, *others = config.questions
    rows = {f"needle {needle}": Needle(needle, first, 0.0) for needle in config.needles}
    for needle in config.crossed:
        rows |= {f"needle {needle}, {count} questions": Needle(needle, count, 0.0) for count in others}
        rows[f"needle {needle}, noisy"] = Needle(needle, first, config.noise)
    return rows


# --- RL: the sampler prefills sparsely, the learner does not --------------------------------------------------------


class Sampler(NamedTuple):
    """What differs between the rows of part rl, all traced."""

    prefill: jax.Array  # index into PREFILLS
    alpha: jax.Array
    lr: jax.Array
    clip: jax.Array


PREFILLS = ("v1", "v2", "v2 corrected", "v2 causal")


def prefill_of(numbers: Sampler, config: Config, densities: list) -> Callable:
    """The sampler's attention over prompts, a `LanguageModel.prefill`; appends the density of each layer to a list.

    "v2 causal" selects row by row: a later token of the same block cannot change what an earlier one reads.
    """
    choice = dict(alpha=numbers.alpha, block_size=config.block, sink_blocks=config.sink, window_blocks=1)
    v1 = FlashPrefillConfig(last_full_blocks=0, **choice)
    packed = lambda rows: PackedPrefillConfig(tile_rows=rows, last_full_tiles=0, **choice)  # noqa: E731
    # Prompts are too short for loops over blocks to pay.
    one = functools.partial(flash_prefill, implementation="reference")
    two = functools.partial(flash_prefill_packed, implementation="reference")
    branches = {
        "v1": lambda q, k, v, n: one(q, k, v, v1, length=n),
        "v2": lambda q, k, v, n: two(q, k, v, packed(config.block), length=n, correction=False),
        "v2 corrected": lambda q, k, v, n: two(q, k, v, packed(config.block), length=n),
        "v2 causal": lambda q, k, v, n: two(q, k, v, packed(1), length=n, correction=False),
    }

    def prefill(q, k, v, length):
        every = [jax.vmap(branches[name]) for name in PREFILLS]
        out, stats = jax.lax.switch(numbers.prefill, every, q, k, v, length)
        densities.append(stats.density.mean())
        return out

    return prefill


# All instances, none held out: this part is about the sampler, not about generalisation.
TASKS: dict[str, Callable[[], Environment]] = {
    "sorting": lambda: envs.sorting(4, split="all"),
    "arithmetic": lambda: envs.arithmetic("+", 1, split="all"),
    "countdown": lambda: envs.countdown(3, 20, 99, split="all"),
}


def few_shot(env: Environment, shots: int) -> Environment:
    """Questions of `env` after solved ones, half of `shots` or more: prompts of several blocks, of various lengths."""
    one = env.spec.max_observation + env.spec.max_action
    width = shots * one + env.spec.max_observation

    def solved(key):
        state, question = env.reset(key)
        answer = env.expert(key, state)
        stop = jnp.argmax(jnp.isin(answer, jnp.asarray(env.spec.stop_ids)))
        real = (jnp.arange(question.ids.size) < question.length, jnp.arange(answer.size) <= stop)
        return state, jnp.concatenate([question.ids, answer]), jnp.concatenate(real)

    def reset(key):
        count_key, key = jax.random.split(key)
        count = jax.random.randint(count_key, (), -(-shots // 2), shots + 1)
        states, ids, real = jax.vmap(solved)(jax.random.split(key, shots + 1))
        # The last one is the question: without its answer, at the end of the row.
        real &= (jnp.arange(shots + 1) < count).at[shots].set(True)[:, None]
        ids, real = ids.ravel()[:width], real.ravel()[:width]
        place = jnp.where(real, jnp.cumsum(real) - 1, width)
        prompt = jnp.full(width, env.spec.pad_id, jnp.int32).at[place].set(ids, mode="drop")
        return jax.tree.map(lambda x: x[shots], states), Tokens(prompt, real.sum())

    def step(key, state, action):
        state, step = env.step(key, state, action)
        silence = Tokens(jnp.full(width, env.spec.pad_id, jnp.int32), jnp.int32(0))
        return state, Step(silence, *step[1:])

    return env._replace(reset=reset, step=step, spec=env.spec._replace(max_observation=width))


def policy_model(config: Config, env: Environment) -> LanguageModel:
    return transformer(TransformerConfig(len(env.spec.vocab), config.width, num_layers=2, num_heads=2))


def warm_start(key, *, model: LanguageModel, env: Environment, config: Config):
    """Supervised steps on 32 prompts each, every token of theirs, and so on the solved examples: the start of RL."""
    optimizer = optax.adam(config.teach_lr)

    def loss(params, key):
        _, prompt = jax.vmap(env.reset)(jax.random.split(key, 32))
        positions = padded_positions(prompt.length, env.spec.max_observation)
        fed = (prompt.ids[:, :-1], positions[:, :-1])
        log_prob, _ = token_log_probs(model, params, *fed, prompt.ids[:, 1:])
        return -objectives.masked_mean(log_prob, positions[:, 1:] >= 0)

    def step(carry, index):
        params, opt_state = carry
        grads = jax.grad(loss)(params, jax.random.fold_in(key, index))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    params = model.init(key)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(1, config.steps + 1))
    return params


class State(NamedTuple):
    """All that training carries."""

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array


def make_rl(config: Config) -> Train:
    """GRPO with a clipped ratio. The sampler reads prompts by `numbers.prefill`; decoding and learning are dense."""
    env = few_shot(TASKS[config.task](), config.shots)
    model = policy_model(config, env)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
    group = np.arange(config.prompts * config.samples) // config.samples

    def init(key):
        params = warm_start(key, model=model, env=env, config=config)
        return State(params, optimizer.init(params), key, jnp.int32(0))

    def loss(params, batch, numbers):
        trajectory, advantage = batch
        log_prob, entropy = score(model, params, trajectory, env, group_size=config.samples)
        old, mask = trajectory.full_log_prob, trajectory.mask
        bounds = objectives.clip_bounds(numbers.clip)
        token_loss = objectives.clipped_surrogate(log_prob - old, advantage, *bounds)
        seen = objectives.clip_metrics(log_prob - old, old, *bounds, advantage, mask)
        metrics = {
            "log ratio": objectives.masked_mean(jnp.abs(log_prob - old), mask),
            "outside": seen["outside_fraction"],
            "clipped": seen["clip_fraction"],
            "entropy": objectives.masked_mean(entropy, mask),
        }
        return objectives.aggregate(token_loss, mask, "token_mean"), metrics

    def update(state, numbers):
        play_key, order_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        densities = []
        trajectory = rollout(
            play_key,
            model._replace(prefill=prefill_of(numbers, config, densities)),
            state.params,
            env,
            num_prompts=config.prompts,
            group_size=config.samples,
            early_exit=False,
        )
        reward = trajectory.reward.sum(axis=1)
        advantage = objectives.grpo_advantages(reward, group, num_groups=config.prompts)
        everything = (trajectory._replace(info={}), advantage)
        blocks = jnp.arange(group.size).reshape(config.prompts, config.samples)
        orders = [jax.random.permutation(key, blocks) for key in jax.random.split(order_key, config.passes)]

        def step(carry, rows):
            params, opt_state = carry
            batch = jax.tree.map(lambda x: x[rows], everything)
            grads, metrics = jax.grad(loss, has_aux=True)(params, batch, numbers)
            steps, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, jax.tree.map(lambda s: -numbers.lr * s, steps)), opt_state), metrics

        picked = jnp.stack(orders).reshape(config.passes * config.mini_batches, -1)
        (params, opt_state), metrics = jax.lax.scan(step, (state.params, state.opt_state), picked)
        # In the first step the learner still is the sampler: what its ratio shows is the prefill's doing alone.
        at_once = {f"{name} at once": metrics[name][0] for name in ("log ratio", "outside", "clipped")}
        metrics = jax.tree.map(jnp.mean, metrics) | at_once | {
            "reward": reward.mean(),
            "density": jnp.stack(densities).mean(),
            "tokens": trajectory.mask.sum(),
        }  # fmt: skip
        return State(params, opt_state, state.key, state.step + 1), metrics

    def advance(state, numbers):
        return jax.lax.scan(lambda s, _: update(s, numbers), state, length=min(config.chunk, config.updates))

    def evaluate(state, numbers):
        """What the policy earns on new prompts when nothing is sparse."""
        key = jax.random.fold_in(state.key, 2**20)  # the same episodes and draws at every evaluation
        seen = rollout(key, model, state.params, env, num_prompts=config.eval_prompts, early_exit=False)
        return {"reward": seen.reward.sum(axis=1).mean()}

    return Train(init, advance, evaluate)


def sampler_rows(config: Config) -> dict[str, Sampler]:
    """Dense, which is alpha 0, then every sparse prefill at every alpha."""
    rows = {"dense": Sampler(0, 0.0, config.lr, config.clip)}
    for name in PREFILLS:
        for alpha in config.alpha:
            rows[f"{name} {alpha:g}"] = Sampler(PREFILLS.index(name), float(alpha), config.lr, config.clip)
    return rows


def sample_episodes(config: Config, state_of: Callable) -> list[Episode]:
    """Two episodes of the dense arm after training."""
    env, state = few_shot(TASKS[config.task](), config.shots), state_of("dense")
    model, vocab, width = policy_model(config, env), env.spec.vocab, env.spec.max_observation
    played = jax.jit(lambda params: rollout(jax.random.key(config.seed), model, params, env, num_prompts=2))
    seen, episodes = jax.device_get(played(state.params)), []
    for row, reward in enumerate(seen.reward.sum(axis=1)):
        real = seen.positions[row] >= 0
        sides = (seen.tokens[row, side][real[side]] for side in (slice(None, width), slice(width, None)))
        question, answer = (decode(ids, ids.size, vocab) for ids in sides)
        episodes.append(Episode(f"dense, prompt {row + 1}", [f"{question}\n=> {answer}"], float(reward)))
    return episodes


# --- The study ------------------------------------------------------------------------------------------------------


def build(config: Config) -> Build:
    """All rows and seeds of a part in one program."""
    if config.part == "planted":
        return Build(make_planted(config), {name: Planted(kind) for kind, name in enumerate(HEADS)})
    if config.part == "recall":
        return Build(make_recall(config), needle_rows(config))
    return Build(make_rl(config), sampler_rows(config), functools.partial(sample_episodes, config))


def settings(results: Results, row: str, rule: str) -> np.ndarray:
    return results.train[row][f"setting/{rule}"][0, 0]


def metric_of(results: Results, row: str) -> str:
    """What says how good a rule is in this part."""
    return "recall" if "recall/dense" in results.train[row] else "accuracy"


def curve(results: Results, rows: Sequence[str], rule: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(density, metric) `[seeds, settings + 1]` of a rule, by rising density: means over rows and draws, then dense."""

    def mean(name):
        return np.mean([results.train[row][name].mean(axis=1) for row in rows], axis=0)

    x, y = (np.concatenate([mean(f"{name}/{end}") for end in (rule, "dense")], axis=1) for name in ("density", metric))
    order = np.argsort(x, axis=1, kind="stable")
    return np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)


def at_density(results: Results, rows: Sequence[str], rule: str, share: Any, metric: str = "") -> np.ndarray:
    """The metric on a rule's curve at a density, `[seeds]`, NaN below the lowest; `share` is a number or `[seeds]`."""
    x, y = curve(results, rows, rule, metric or metric_of(results, rows[0]))
    shares = np.broadcast_to(share, x.shape[0])
    return np.array([np.interp(s, *xy, left=np.nan) for s, *xy in zip(shares, x, y, strict=True)])


def at_alpha(results: Results, row: str, metric: str, rule: str = "max", alpha: float = PAPER_ALPHA) -> np.ndarray:
    """The metric of a rule at an alpha that was measured, `[seeds]`; NaN where it was not."""
    index = np.flatnonzero(np.isclose(settings(results, row, rule), alpha))
    values = results.train[row][f"{metric}/{rule}"].mean(axis=1)
    return values[:, index[0]] if index.size else np.full(values.shape[0], np.nan)


# --- Claims ---------------------------------------------------------------------------------------------------------

EQUAL = 1 / 3  # the density at which rules are compared
FULL = ("needle 16", "needle 16, 16 questions", "needle 12")
INEXACT = ("needle 6", "needle 12", "needle 16, noisy")  # a block's mean is not its tokens: see claim 5c


def equal(better: str, worse: str, rows: Sequence[str], share: float = EQUAL) -> Callable[[Results], np.ndarray]:
    """The difference of two rules at equal density."""
    return lambda r: at_density(r, rows, better, share) - at_density(r, rows, worse, share)


def largest_rise(results: Results) -> np.ndarray:
    """Of the density from one alpha to the next, over all heads, `[seeds]`."""
    order = np.argsort(settings(results, HEADS[0], "max"))
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
    """Density at the smallest length over that at the largest, structured heads, `[seeds]`."""
    by_length = over_heads("density by length", STRUCTURED, np.mean)(results)
    return by_length[:, 0] / by_length[:, -1]


def at_once(row: str, metric: str = "log ratio at once") -> Callable[[Results], np.ndarray]:
    return lambda r: r.train[row][metric].mean(axis=1)


CLAIMS = [
    Claim("1a", "At alpha 0 the operator is dense attention",
          over_heads("alpha 0 to dense"), "below", 1e-5, "largest difference", needs=HEADS),
    Claim("1b", "Density falls with alpha (its largest rise from one alpha to the next)",
          largest_rise, "below", 1e-6, "density", needs=HEADS),
    Claim("2a", "At alpha 0.1 one score map finds vertical, slash and block patterns alike: the least recall of them",
          lambda r: np.min([at_alpha(r, head, "recall") for head in HEADS[:3]], axis=0),
          "above", 0.8, "attention mass", needs=HEADS),
    Claim("2b", "At equal density it recalls far more attention mass than sinks and a window",
          equal("max", "window", HEADS), "above", 0.2, "attention mass", needs=HEADS),
    Claim("2c", "At equal density it recalls more than a fixed top-k, since its budget adapts to row and head",
          equal("max", "top-k", HEADS), unit="attention mass", needs=HEADS),
    Claim("2d", "... and so it does at a density of a fifth",
          equal("max", "top-k", HEADS, 0.2), unit="attention mass", needs=HEADS),
    Claim("3a", "Selecting sorts nothing (top-k and top-p do)",
          over_heads("sorts/max"), "within", 0.5, "sorts", needs=HEADS),
    Claim("3b", "Scores and threshold cost 1 / (2 block) of dense attention's arithmetic (block 128, 16K tokens)",
          over_heads("cost of selection"), "below", 1.1, "1 / (2 block) of dense", needs=HEADS),
    Claim("4", "At alpha 0.1 density falls with length where supports are bounded (over 8 times the length)",
          fall_with_length, "above", 1.0, "times", needs=HEADS),
    Claim("5a", "On one mask, mean correction lowers the error of the output, at alpha 0.1",
          lambda r: correction_gain(r, PAPER_ALPHA), unit="relative error", needs=HEADS),
    Claim("5b", "... and the more, the sparser: by more at alpha 0.5 than at 0.02",
          lambda r: correction_gain(r, 0.5) - correction_gain(r, 0.02), unit="relative error", needs=HEADS),
    Claim("5c", "A network with needles that do not divide a block, or noisy ones, answers better with the correction",
          equal("v2 corrected", "v2", INEXACT), unit="accuracy", needs=INEXACT),
    Claim("6a", "At equal density, threshold and top-p recall the same attention mass",
          equal("max", "top-p", HEADS), "within", 0.05, "attention mass", needs=HEADS),
    Claim("6b", "... and a network answers as well with either, where needles about fill a block",
          equal("max", "top-p", FULL), "within", 0.05, "accuracy", needs=FULL),
    Claim("6c", "The paper says more: the threshold prunes the long tail better than top-p",
          equal("max", "top-p", HEADS), unit="attention mass", needs=HEADS),
    Claim("7a", "Ours: with several targets in a block of queries, scores normalised row by row answer better",
          equal("max by row", "max", ("needle 16, 128 questions", "needle 16")), unit="accuracy",
          needs=("needle 16, 128 questions", "needle 16")),
    Claim("7b", "Ours: with at most one, the paper's one reference for the tile is better",
          equal("max", "max by row", ("needle 16, 16 questions",)), unit="accuracy",
          needs=("needle 16, 16 questions",)),
    Claim("8a", "Ours: needles of one token drown in the mean key, so alpha 0.1 saves next to nothing: density",
          lambda r: at_alpha(r, "needle 1", "density"), "above", 0.9, "density", needs=("needle 1",)),
    Claim("8b", "Near-equal accuracy where needles fill a block: alpha 0.1 loses less than .05",
          lambda r: r.train["needle 16"]["accuracy/dense"].mean(axis=(1, 2)) - at_alpha(r, "needle 16", "accuracy"),
          "below", 0.05, "accuracy", needs=("needle 16",)),
    Claim("9a", "Ours: prefill at alpha 0.1 on the sampler's side alone moves the ratio by more than .01 nats a token",
          at_once("v1 0.1"), "above", 0.01, "nats", needs=("v1 0.1",)),
    Claim("9b", "Ours: by more at alpha 0.5",
          lambda r: at_once("v1 0.5")(r) - at_once("v1 0.1")(r), unit="nats", needs=("v1 0.1", "v1 0.5")),
    Claim("9c", "Ours: mean correction lowers it (V2 at alpha 0.5)",
          lambda r: at_once("v2 0.5")(r) - at_once("v2 corrected 0.5")(r), unit="nats",
          needs=("v2 0.5", "v2 corrected 0.5")),
    Claim("9d", "Ours: at alpha 0.1 the policy learns as with dense prefill",
          gap("v1 0.1", "dense", final), "within", 0.05, "reward, dense prefill", needs=("dense", "v1 0.1")),
    Claim("9e", "Ours: at alpha 1 it learns less",
          gap("dense", "v1 1", final), unit="reward, dense prefill", needs=("dense", "v1 1")),
]  # fmt: skip


# --- Results --------------------------------------------------------------------------------------------------------


def of_rules(measure: Callable[[Results, str], np.ndarray]) -> Callable[[Results, str], np.ndarray]:
    """A column of the parts that compare rules; a dash in part rl."""

    def column(results, row):
        seen = results.train[row]
        return measure(results, row) if "density/max" in seen else np.full(seen["reward"].shape[0], np.nan)

    return column


def of_rl(measure: Callable[[Results, str], np.ndarray]) -> Callable[[Results, str], np.ndarray]:
    """A column of part rl; a dash in the others."""

    def column(results, row):
        seen = results.train[row]
        return measure(results, row) if "reward" in seen else np.full(seen["density/max"].shape[0], np.nan)

    return column


def as_sparse(rule: str) -> Callable[[Results, str], np.ndarray]:
    """A rule at the density of the paper's at alpha 0.1."""
    return of_rules(lambda r, row: at_density(r, [row], rule, at_alpha(r, row, "density")))


COLUMNS: dict[str, Callable[[Results, str], np.ndarray]] = {
    "mass, accuracy (alpha 0.1), reward": lambda r, row: (
        late(r, row) if "reward" in r.train[row] else at_alpha(r, row, metric_of(r, row))
    ),
    "density": lambda r, row: (
        r.train[row]["density"].mean(axis=1) if "reward" in r.train[row] else at_alpha(r, row, "density")
    ),
    "at this density: by row": as_sparse("max by row"),
    **{rule: as_sparse(rule) for rule in ("v2", "v2 corrected", "top-k", "top-p", "window")},
    "reward, dense": of_rl(final),
    "log ratio at once": of_rl(lambda r, row: at_once(row)(r)),
    "outside at once": of_rl(lambda r, row: at_once(row, "outside at once")(r)),
}

SHARES = np.linspace(0.05, 1.0, 39)


def against_density(results: Results, title: str, rows: Sequence[str], rules: Sequence[str], metric: str) -> Panel:
    curves = {
        rule: np.stack([at_density(results, rows, rule, share, metric) for share in SHARES], axis=1) for rule in rules
    }
    return Panel(title, SHARES, curves, "density")


def panels(results: Results) -> list[Panel]:
    """What is kept against density, by rule; in part rl the ratio against alpha, and learning."""
    rows = list(results.train)
    if "reward" in results.train[rows[0]]:
        return rl_panels(results)
    if rows[0] in HEADS:
        by_length = {head: results.train[head]["density by length"].mean(axis=1) for head in rows}
        size = by_length[rows[0]].shape[1]
        return [
            against_density(results, "recalled attention mass", rows, tuple(RULES), "recall"),
            against_density(results, "relative error of the output", rows, tuple(RULES), "error"),
            *(against_density(results, f"recalled mass, {head}", [head], tuple(RULES), "recall") for head in rows[:3]),
            Panel("density at alpha 0.1", 2.0 ** np.arange(size) / 4, by_length, "length, relative"),
        ]
    shown = [row for row in rows if "needle" in row]
    blocks = ("max", "max, half blocks", "max, double blocks")
    return [
        *(against_density(results, f"accuracy, {row}", [row], tuple(RULES), "accuracy") for row in shown),
        against_density(results, "accuracy, all needles", shown, blocks, "accuracy"),
    ]


def rl_panels(results: Results) -> list[Panel]:
    rows, updates = list(results.train), np.arange(1, results.evaluated_at[-1] + 1)
    alphas = sorted({float(row.split()[-1]) for row in rows if row != "dense"})
    by_alpha = {
        title: Panel(
            title,
            np.array(alphas),
            {
                name: np.stack([at_once(f"{name} {alpha:g}", metric)(results) for alpha in alphas], axis=1)
                for name in PREFILLS
            },
            "alpha",
        )
        for title, metric in (
            ("|log ratio| before any step (nats)", "log ratio at once"),
            ("share outside the clip range, same", "outside at once"),
            ("density of the prompts", "density"),
        )
    }
    ends = ["dense", *(f"{name} {alphas[-1]:g}" for name in PREFILLS)]
    return [
        *by_alpha.values(),
        Panel("reward", updates, {row: results.train[row]["reward"] for row in ends}),
        Panel(
            "reward with dense prefill", results.evaluated_at, {row: results.held_out[row]["reward"] for row in ends}
        ),
        Panel("share clipped", updates, {row: results.train[row]["clipped"] for row in ends}),
    ]


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line, read once for each part over the defaults of its preset; by the part's name."""
    part = parse(Config(), __doc__, argv, check=False).part
    parts = PARTS if part == "all" else (part,)
    parsed = {}
    with one_line_errors():
        for name in parts:
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
    traced=("lr", "clip"),
    order=tuple(RULES),
    smoke=("--part", "planted", "--seeds", "2", "--updates", "1", "--chunk", "1", "--steps", "2",
           "--length", "256", "--block", "8", "--width", "16", "--sequences", "1",
           "--shots", "3", "--prompts", "2", "--samples", "2", "--passes", "1",
           "--eval-prompts", "2", "--needles", "1", "16", "--crossed", "16", "--questions", "16"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
