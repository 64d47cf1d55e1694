"""Test-time training as a memory: what fast weights recall beyond a window (arXiv 2407.04620, 2505.23884, 2603.12255).

Three studies. "mechanism" trains nothing: a stream of objects is written into random fast weights, and the rules of
LaCT are asked for objects of every age. "recall" trains small networks from scratch on streams that hold facts (a key
with its value) among noise, and asks for a third of them soon, within the reach of a window, and for the others at the
end, also in streams of four times the length with twice the facts: windows alone, windows with one full layer
("anchor"), full attention, linear attention, TTT-Linear, TTT-MLP, and LaCT by rule, norm and chunk length. "cost"
measures time and memory against length.

    python experiments/ttt_recall.py
    python experiments/ttt_recall.py --study recall --arms window lact full --length 256

Results come to runs/ttt_recall/NAME/: report.html, results.json, figures.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, glance, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train, final, gap
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.study import Build, Study, main
from rollax.experiments.ttt_mechanism import AGES, CHUNKS, MEMORIES, Memory, recall_by_age, unit
from rollax.kernels.flash_prefill import dense_attention
from rollax.kernels.ttt import (
    FastWeights,
    UpdateRule,
    lact_init,
    lact_scan,
    sliding_window_attention,
    ttt_linear_scan,
    ttt_mlp_scan,
)

STUDIES = ("mechanism", "recall", "cost")


@dataclass(frozen=True)
class Config(Options):
    """The study."""

    study: str = "all"
    """mechanism, recall, cost, or all."""
    arms: tuple[str, ...] = ()
    """Networks of "recall" and "cost" (see ARMS); all, and a choice, when empty."""
    seeds: int = 5
    """Seeds, the unit of every interval."""
    seed: int = 0
    """The first seed."""
    updates: int = 200
    """Gradient steps; for "mechanism", streams."""
    chunk: int = 50
    """Updates between evaluations."""
    batch: int = 8
    """Streams of a gradient step."""
    length: int = 110
    """Tokens of a stream before the questions of the end: no multiple of a chunk, nor is four times as many."""
    facts: int = 24
    """Facts of a stream, at random places; the rest is noise."""
    questions: int = 16
    """Facts that are asked for at the end; the others soon after they were told."""
    keys: int = 64
    """Keys to choose from, twice the facts or more, since the longer streams hold twice as many."""
    values: int = 8
    """Values: chance is one in as many."""
    width: int = 64
    """Of the network."""
    heads: int = 2
    """Of attention and of the memory."""
    layers: int = 2
    """Each with a window and, beside it, a memory."""
    window: int = 16
    """Tokens that a window holds, the query's own included."""
    lr: float = 1e-2
    """Adam's learning rate, after a fifth of the updates; then it falls to zero along a cosine."""
    eval_streams: int = 64
    """Streams of an evaluation."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        sizes = ("batch", "questions", "values", "width", "heads", "layers", "window", "eval_streams")
        for field in ("seeds", "updates", "chunk", *sizes):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if unknown := set(self.arms) - set(ARMS):
            raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
        most = min(self.length, self.keys // 2)
        if not self.questions <= self.facts <= most:
            raise ValueError(f"facts: expected {self.questions} (questions) to {most}, got {self.facts}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width: expected a multiple of twice the {self.heads} heads, got {self.width}")
        if not self.lr >= 0:
            raise ValueError(f"lr: expected at least 0, got {self.lr}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


# --- The mechanism ----------------------------------------------------------------------------------------------------


def mechanism_train(config: Config, memory: Memory) -> Train:
    """An "update" is one more stream: nothing is trained."""

    def init(key):
        return key, jnp.int32(0), jnp.zeros(CHUNKS)

    def advance(state, numbers):
        key, count, _ = state
        index = count + jnp.arange(min(config.chunk, config.updates))
        by_age = jax.lax.map(lambda i: recall_by_age(jax.random.fold_in(key, i), memory), index)
        return (key, count + index.size, by_age[-1]), {"recall by age": by_age}

    return Train(init, advance, lambda state, numbers: {"recall by age": state[2]})


# --- The task: facts in a stream ------------------------------------------------------------------------------------

NOISE_KEYS = 16


class Streams(NamedTuple):
    """Alphabet: `B` streams, `T` tokens (the length, and then the questions of the end).

    Attributes:
      key: int `[B, T]`: of facts and questions below `keys`, of noise above.
      value: int `[B, T]`: of facts below `values`; then "none" for noise, and "asked".
      answer: int `[B, T]`; of a question, else -1.
      age: int `[B, T]`: tokens between a question and its fact, else 0.
    """

    key: jax.Array
    value: jax.Array
    answer: jax.Array
    age: jax.Array


@partial(jax.jit, static_argnums=(1, 2, 3))
def sample_streams(key: jax.Array, config: Config, count: int, length: int) -> Streams:
    """Facts, each with a key of its own, at random places; the first `questions` of them are asked for at the end.

    The others are asked for within the next `window` tokens, where that place is free: what a window can learn. No fact
    is asked for twice, so that no question is a reminder.
    """

    def one(key):
        place_key, key_key, value_key, noise_key, lag_key = jax.random.split(key, 5)
        facts, asked, total = config.facts, config.questions, length + config.questions
        at, fact_keys = (shuffled(*x)[:facts] for x in ((place_key, length), (key_key, config.keys)))
        fact_values = jax.random.randint(value_key, (facts,), 0, config.values)
        soon = at[asked:] + jax.random.randint(lag_key, (facts - asked,), 1, max(config.window, 2))
        soon = jnp.where(soon < length, soon, total)  # beyond the stream: dropped
        fact = jnp.full(total, -1).at[length:].set(jnp.arange(asked)).at[soon].max(jnp.arange(asked, facts))
        fact = fact.at[at].set(-1)  # which fact a token asks for; the place of a fact is not free
        keys = config.keys + jax.random.randint(noise_key, (total,), 0, NOISE_KEYS)
        keys = jnp.where(fact >= 0, fact_keys[fact], keys.at[at].set(fact_keys))
        values = jnp.full(total, config.values).at[at].set(fact_values)
        return Streams(
            keys,
            jnp.where(fact >= 0, config.values + 1, values),
            jnp.where(fact >= 0, fact_values[fact], -1),
            jnp.where(fact >= 0, jnp.arange(total) - at[fact], 0),
        )

    return jax.vmap(one)(jax.random.split(key, count))


def shuffled(key: jax.Array, n: int) -> jax.Array:
    """0 .. n - 1 in random order, by one sort; `jax.random.permutation` takes several, and compiles longer."""
    return jnp.argsort(jax.random.bits(key, (n,)))


# --- The networks ---------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A network: what stands beside the window of each layer.

    Attributes:
      memory: "" (nothing), "linear", "ttt_linear", "ttt_mlp" or "lact".
      attention: "window"; "full" in every layer; "anchor": full in the last layer, which then has no memory.
      rule: of LaCT.
      size: tokens of LaCT's chunk or of TTT's mini-batch.
      inner: rates that the memory starts to learn with: a network is trained with each, and the one with the least
        loss on streams for validation, which serve nothing else, is the arm's. Muon ignores the size of its rate.
    """

    memory: str = ""
    attention: str = "window"
    rule: UpdateRule = UpdateRule(muon=True, momentum=True, norm="pre")
    size: int = 32
    inner: tuple[float, ...] = (1e-3,)


LACT = Arm("lact")
ARMS = {
    "full": Arm(attention="full"),
    "window": Arm(),
    "window + anchor": Arm(attention="anchor"),
    "linear": Arm("linear"),
    "ttt_linear": Arm("ttt_linear", size=16, inner=(0.1, 1.0)),
    "ttt_mlp": Arm("ttt_mlp", size=16, inner=(0.1, 1.0)),
    "lact": LACT,
    "lact + anchor": LACT._replace(attention="anchor"),
    "lact, post-norm": LACT._replace(rule=UpdateRule(muon=True, momentum=True, norm="post")),
    "lact, no momentum": LACT._replace(rule=UpdateRule(muon=True, momentum=False, norm="pre")),
    "lact, gradient": LACT._replace(rule=UpdateRule(muon=False, momentum=False, norm="pre"), inner=(0.1, 1.0)),
    "lact, only w1": LACT._replace(rule=UpdateRule(muon=True, momentum=True, norm="pre", only=("w1",))),
    "lact, ascent": LACT._replace(rule=UpdateRule(muon=True, momentum=True, norm="pre", sign=-1)),
    "lact, chunk 16": LACT._replace(size=16),
    "lact, chunk 64": LACT._replace(size=64),
}


def normal(key: jax.Array, *shape: int) -> jax.Array:
    """Weights `[..., in, out]` with variance 1 / in."""
    return jax.random.normal(key, shape) * shape[-2] ** -0.5


def init_layer(key: jax.Array, config: Config, arm: Arm, memory: str, inner: jax.Array) -> dict[str, Any]:
    """One layer's parameters; inner: the inner rate that it starts from."""
    D, H, d = config.width, config.heads, config.width // config.heads
    keys = iter(jax.random.split(key, 16))
    params = {name: normal(next(keys), D, D) for name in ("k", "v", "out")}
    params["q"] = params["k"]  # a question begins by looking for what looks like it: all networks learn faster
    params |= {"up": normal(next(keys), D, 4 * D), "down": normal(next(keys), 4 * D, D)}
    params |= {"attention_norm": jnp.ones(D), "mlp_norm": jnp.ones(D)}
    if memory:
        params |= {"gate": jnp.zeros((D, H)), "gate_bias": jnp.ones(H), "memory_norm": jnp.ones(d)}
    if memory == "lact":
        shape = (H, d, d)
        params["fast"] = FastWeights(*(normal(next(keys), *shape) for _ in range(3)))
        params |= {"rate": 0.1 * normal(next(keys), D, 3 * H), "rate_bias": jnp.full(3 * H, jnp.log(jnp.expm1(inner)))}
        params |= {"momentum": 0.1 * normal(next(keys), D, H)}
    if memory.startswith("ttt"):
        sizes = ((d, d),) if memory == "ttt_linear" else ((d, 4 * d), (4 * d, d))
        weights = [(0.02 * jax.random.normal(next(keys), (H, *s)), jnp.zeros((H, 1, s[1]))) for s in sizes]
        params["fast"] = [x for pair in weights for x in pair]
        params |= {"rate": 0.1 * normal(next(keys), D, H), "position": jnp.zeros(arm.size), "base": inner}
        params["inner_norm"] = (jnp.ones((H, d)), jnp.zeros((H, d)))
    return params


def kinds(config: Config, arm: Arm) -> list[tuple[str, str]]:
    """(attention, memory) of each layer."""
    if arm.attention != "anchor":
        return [(arm.attention, arm.memory)] * config.layers
    return [("window", arm.memory)] * (config.layers - 1) + [("full", "")]


def init_params(key: jax.Array, config: Config, arm: Arm, inner: jax.Array) -> dict[str, Any]:
    D = config.width
    key_key, value_key, head_key, *layer_keys = jax.random.split(key, 3 + config.layers)
    memories = [memory for _, memory in kinds(config, arm)]
    layers = [init_layer(k, config, arm, memory, inner) for k, memory in zip(layer_keys, memories, strict=True)]
    return {
        "key": jax.random.normal(key_key, (config.keys + NOISE_KEYS, D)) * 0.5,
        "value": jax.random.normal(value_key, (config.values + 2, D)) * 0.5,
        "layers": layers,
        "norm": jnp.ones(D),
        "head": normal(head_key, D, config.values),
    }


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-5) * weight


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, T, H d] -> [B, H, T, d]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 1)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions (arXiv 2104.09864), halves rotated; `[B, H, T, d]`."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[2])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin, (a, b) = jnp.cos(angle), jnp.sin(angle), jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, size: int) -> jax.Array:
    """Causal attention with the feature map elu + 1 (arXiv 2006.16236), chunk by chunk: a state of `[d, d]` a head."""
    B, H, T, d = q.shape
    pad = -T % size
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (jax.nn.elu(q) + 1, jax.nn.elu(k) + 1, v))
    real = (jnp.arange(T + pad) < T)[:, None]
    v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # the last channel gathers the normaliser
    chunks = [jnp.moveaxis(x.reshape(B, H, -1, size, x.shape[-1]), 2, 0) for x in (q, k * real, v)]

    def step(state, chunk):
        q, k, v = chunk
        scores = jnp.tril(jnp.einsum("bhid,bhjd->bhij", q, k))
        return state + jnp.einsum("bhjd,bhje->bhde", k, v), q @ state + scores @ v

    _, out = jax.lax.scan(step, jnp.zeros((B, H, d, d + 1)), chunks)
    out = jnp.moveaxis(out, 0, 2).reshape(B, H, T + pad, d + 1)[:, :, :T]
    return out[..., :-1] / (out[..., -1:] + 1e-6)


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal, `[B, L, H, d]`, without positions, so that it knows no longest length; in blocks where they save time."""
    if q.shape[1] <= 512:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return jax.vmap(lambda *qkv: dense_attention(*qkv)[0])(q, k, v)


def remember(params: dict, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, arm: Arm) -> jax.Array:
    """What the memory of a layer answers, `[B, H, T, d]`; x `[B, T, D]` is the layer's normed input.

    LaCT activates q, k and v and puts q and k to length 1; the other memories take them as they are.
    """
    H, d = q.shape[1], q.shape[3]
    if arm.memory == "linear":
        return linear_attention(q, k, v, arm.size)
    if arm.memory == "lact":
        q, k, v = (jax.nn.silu(y) for y in (q, k, v))
        rates = jax.nn.softplus(x @ params["rate"] + params["rate_bias"]).reshape(*x.shape[:2], H, 3)
        momentum = jax.nn.sigmoid(x @ params["momentum"]).transpose(0, 2, 1) if arm.rule.momentum else None
        rates = jnp.moveaxis(rates, 2, 1)
        return lact_scan(params["fast"], unit(q), unit(k), v, rates, momentum, chunk=arm.size, rule=arm.rule)[0]
    by_position = jnp.maximum(1 / jnp.arange(1, arm.size + 1) + params["position"], 0)
    base = jax.lax.stop_gradient(params["base"])
    gate = base / d * jax.nn.sigmoid(x @ params["rate"]).transpose(0, 2, 1)
    scan = ttt_linear_scan if arm.memory == "ttt_linear" else ttt_mlp_scan
    return scan(q, k, v, by_position, gate, params["fast"], params["inner_norm"], mini_batch=arm.size)[0]


def apply_layer(params: dict, x: jax.Array, config: Config, arm: Arm, kind: tuple[str, str], reset_at: int | None):
    """`x + mix(norm(x))`, then the MLP; the mixers share q, k, v, and are summed before the output projection.

    reset_at: the memory forgets everything before this token.
    """
    attention, memory = kind
    normed = rms_norm(x, params["attention_norm"])
    q, k, v = (split_heads(normed @ params[name], config.heads) for name in "qkv")
    if attention == "full":
        mixed = full_attention(*(y.swapaxes(1, 2) for y in (q, k, v))).swapaxes(1, 2)
    else:
        mixed = sliding_window_attention(rotate(q), rotate(k), v, window=config.window)
    if memory:
        answer = remember(params, normed, q, k, v, arm)
        if reset_at is not None:
            parts = (y[:, :, reset_at:] for y in (q, k, v))
            anew = remember(params, normed[:, reset_at:], *parts, arm)
            answer = jnp.concatenate([answer[:, :, :reset_at], anew], axis=2)
        gate = jax.nn.silu(normed @ params["gate"] + params["gate_bias"]).transpose(0, 2, 1)[..., None]
        mixed = mixed + gate * rms_norm(answer, params["memory_norm"])
    x = x + jnp.moveaxis(mixed, 1, 2).reshape(x.shape) @ params["out"]
    hidden = jax.nn.silu(rms_norm(x, params["mlp_norm"]) @ params["up"])
    return x + hidden @ params["down"]


def logits_of(params: dict, streams: Streams, config: Config, arm: Arm, reset_at: int | None = None) -> jax.Array:
    """Of the answers at every token, `[B, T, values]`."""
    x = params["key"][streams.key] + params["value"][streams.value]
    for layer, kind in zip(params["layers"], kinds(config, arm), strict=True):
        x = apply_layer(layer, x, config, arm, kind, reset_at)
    return rms_norm(x, params["norm"]) @ params["head"]


# --- Training -------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that training carries; params and opt_state for each of the arm's inner rates."""

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array


def reach(config: Config) -> int:
    """How far back stacked windows see, in tokens."""
    return config.layers * (config.window - 1)


def answers_loss(params: dict, streams: Streams, config: Config, arm: Arm) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the questions, nats, and the accuracy."""
    logits, asked = logits_of(params, streams, config, arm), streams.answer >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(streams.answer, 0))
    return mean_where(losses, asked), mean_where(logits.argmax(-1) == streams.answer, asked)


def recall_train(config: Config, arm: Arm) -> Train:
    """The functions of one run of one network, or of one with each of its inner rates."""
    # Without warm-up some seeds of windows and of full attention learn nothing.
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.lr, config.updates // 5, config.updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    inner = jnp.array(arm.inner)
    crowded = dataclasses.replace(config, facts=2 * config.facts, questions=2 * config.questions)
    # The same for all networks and seeds: less to compile, and pairs to compare.
    sample = lambda index, config, count, length: sample_streams(  # noqa: E731
        jax.random.key(2**20 + index), config, max(count, 1), length
    )
    held_out = {
        "": sample(0, config, config.eval_streams, config.length),
        ", long": sample(1, crowded, config.eval_streams // 4, 4 * config.length),
    }
    validation = sample(2, config, config.eval_streams // 2, config.length)

    def init(key):
        params = jax.vmap(lambda rate: init_params(jax.random.fold_in(key, 0), config, arm, rate))(inner)
        return State(params, jax.vmap(optimizer.init)(params), jax.random.fold_in(key, 1), jnp.int32(0))

    def update(state, _):
        streams = sample_streams(jax.random.fold_in(state.key, state.step), config, config.batch, config.length)

        def step(params, opt_state):
            grad = jax.value_and_grad(answers_loss, has_aux=True)
            (loss, accuracy), grads = grad(params, streams, config, arm)
            steps, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, steps), opt_state, loss, accuracy

        params, opt_state, loss, accuracy = jax.vmap(step)(state.params, state.opt_state)
        metrics = {"accuracy": accuracy.mean(), "loss": loss.mean(), "tokens": jnp.int32(streams.key.size * inner.size)}
        return State(params, opt_state, state.key, state.step + 1), metrics

    def advance(state, numbers):
        return jax.lax.scan(update, state, length=min(config.chunk, config.updates))

    def evaluate(state, numbers):
        """Accuracy by age of the fact; also of streams that are four times as long and hold twice the facts."""
        best = 0
        if inner.size > 1:
            best = jnp.argmin(jax.lax.map(lambda p: answers_loss(p, validation, config, arm)[0], state.params))
        params = jax.tree.map(lambda x: x[best], state.params)
        metrics = {"inner lr": inner[best]}
        for name, streams in held_out.items():
            right = logits_of(params, streams, config, arm).argmax(-1) == streams.answer
            metrics |= {f"far{name}": mean_where(right, streams.age > reach(config))}
            metrics |= {f"near{name}": mean_where(right, (streams.age > 0) & (streams.age < config.window))}
            bins = jax.nn.one_hot(streams.age * 8 // streams.age.shape[1], 8, axis=0) * (streams.age > 0)
            metrics[f"by age{name}"] = (bins * right).sum((1, 2)) / bins.sum((1, 2))
        again = logits_of(params, held_out[""], config, arm, reset_at=config.length).argmax(-1)
        far = held_out[""].age > reach(config)
        return metrics | {"far, reset": mean_where(again == held_out[""].answer, far)}

    return Train(init, advance, evaluate)


def mean_where(x: jax.Array, where: jax.Array) -> jax.Array:
    """The mean of the chosen elements; NaN where there is none."""
    return jnp.sum(x * where) / jnp.sum(where)


# --- Time and memory against length ---------------------------------------------------------------------------------

COSTS = ("full", "lact", "ttt_mlp", "ttt_linear", "linear", "window")  # what has an anchor lies between
TIMES = (2, 8, 32, 128)  # lengths, in lengths of training


def measure_cost(config: Config, arm: Arm) -> dict[str, list[float]]:
    """Of one stream, by length: time of the forward pass, the memory that it takes, what must be kept to go on."""
    costs = {"ms": [], "MiB held": [], "KiB to go on": []}
    for length in (times * config.length for times in TIMES):
        streams = sample_streams(jax.random.key(0), config, 1, length)
        params = jax.jit(partial(init_params, config=config, arm=arm, inner=arm.inner[0]))(jax.random.key(0))
        forward = jax.jit(lambda params, streams: logits_of(params, streams, config, arm))
        forward = forward.lower(params, streams).compile()
        jax.block_until_ready(forward(params, streams))
        costs["ms"].append(1e3 * min(seconds_of(forward, params, streams) for _ in range(5)))
        costs["MiB held"].append(forward.memory_analysis().temp_size_in_bytes / 2**20)
        costs["KiB to go on"].append(state_bytes(config, arm, length) / 2**10)
    return costs


def seconds_of(function: Callable, *args) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begun


def state_bytes(config: Config, arm: Arm, length: int) -> int:
    """Bytes of `stream_state`, float32."""
    shapes = jax.eval_shape(lambda: [stream_state(config, arm, length, *kind) for kind in kinds(config, arm)])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def stream_state(config: Config, arm: Arm, length: int, attention: str, memory: str) -> Any:
    """The arrays that a layer must keep to go on after `length` tokens of one stream.

    Keys and values that attention can still reach; the memory; and the tokens that wait until LaCT's chunk or TTT's
    mini-batch is full, with their rates. Linear attention writes token by token: nothing waits.
    """
    H, d = config.heads, config.width // config.heads
    cache = lambda tokens: jnp.zeros((2, H, tokens, d))  # noqa: E731
    kept = cache(length if attention == "full" else min(length, config.window - 1))
    fast = init_layer(jax.random.key(0), config, arm, memory, jnp.float32(1)).get("fast")
    if memory == "lact":
        return kept, lact_init(fast, batch=1, chunk=arm.size, rule=arm.rule)
    if memory.startswith("ttt"):
        return kept, fast, cache(arm.size), jnp.zeros((H, arm.size))
    return (kept, jnp.zeros((H, d, d + 1))) if memory == "linear" else kept


def cost_train(config: Config) -> Train:
    """An "update" hands on what `measure_cost` found: nothing is trained."""

    def evaluate(state, numbers):
        return {name: jnp.stack(by_length) for name, by_length in numbers.items()}

    def advance(state, numbers):
        steps = min(config.chunk, config.updates)
        return state, jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape)), evaluate(state, numbers))

    return Train(lambda key: key, advance, evaluate)


# --- The study ------------------------------------------------------------------------------------------------------


def build(config: Config) -> Build:
    if config.study == "mechanism":
        trains = {name: mechanism_train(config, memory) for name, memory in MEMORIES.items()}
        return Build(trains, dict.fromkeys(trains, ()))
    if config.study == "cost":
        return Build(cost_train(config), {name: measure_cost(config, ARMS[name]) for name in config.arms or COSTS})
    arms = config.arms or tuple(ARMS)
    trains = {name: recall_train(config, ARMS[name]) for name in arms}

    def episodes(state_of) -> list[Episode]:
        """One stream with the answers of the first network."""
        streams = sample_streams(jax.random.key(config.seed), config, 1, config.length)
        params = jax.tree.map(lambda x: x[0], state_of(arms[0]).params)
        logits = jax.jit(lambda params: logits_of(params, streams, config, ARMS[arms[0]]))(params)
        key, value, answer, _ = (np.asarray(x[0]) for x in streams)
        said = np.asarray(logits[0].argmax(-1))
        right = float((said == answer)[answer >= 0].mean())
        return [Episode(f"{arms[0]}: a stream", [show_stream(key, value, answer, said, config)], right)]

    return Build(trains, dict.fromkeys(trains, ()), episodes)


def show_stream(key: np.ndarray, value: np.ndarray, answer: np.ndarray, said: np.ndarray, config: Config) -> str:
    """Facts as `key=value`, noise as a dot, questions as `key?said`, with the answer behind a wrong one."""

    def show(k, v, true, said):
        if v < config.values:
            return f"{k}={v}"
        return "." if true < 0 else f"{k}?{said}" + (f" (no: {true})" if said != true else "")

    return " ".join(map(show, key, value, answer, said))


def recalled(row: str, age: int) -> Callable[[Results], np.ndarray]:
    """Mean over all streams of the mechanism."""
    return lambda results: results.train[row]["recall by age"][..., age].mean(axis=1)


def at_end(row: str, metric: str) -> Callable[[Results], np.ndarray]:
    return lambda results: final(results, row, metric)


def far_gap(better: str, worse: str, metric: str = "far") -> Callable[[Results], np.ndarray]:
    return gap(better, worse, final, metric)


# "Long": in the longer, fuller streams, since as in training most memories recall everything.
CLAIMS = [
    Claim("M1", "Muon with pre-norm recalls chunks that are 8 chunks old", recalled("pre-norm", 8), "above", 0.9,
          "recall", needs=("pre-norm",)),
    Claim("M2", "Muon with post-norm has forgotten much of them", recalled("post-norm", 8), "below", 0.7,
          "recall", needs=("post-norm",)),
    Claim("M3", "Plain gradient steps at the rate 1e-3 store almost nothing", recalled("gradient 1e-3", 1), "below",
          0.25, "recall", needs=("gradient 1e-3",)),
    Claim("M4", "Momentum makes post-norm forget faster",
          lambda r: recalled("post-norm", 8)(r) - recalled("post-norm, momentum", 8)(r), unit="recall",
          needs=("post-norm", "post-norm, momentum")),
    Claim("M5", "At half the width too pre-norm keeps what post-norm with momentum forgets",
          lambda r: recalled("pre-norm, width 32", 8)(r) - recalled("post-norm, momentum, width 32", 8)(r),
          unit="recall", needs=("pre-norm, width 32", "post-norm, momentum, width 32")),
    Claim("T1a", "Windows alone know what one window reaches", at_end("window", "near"), "above", 0.9, "accuracy",
          needs=("window",)),
    Claim("T1b", "... and nothing beyond the reach of all: accuracy of chance (1/8) + .05", at_end("window", "far"),
          "below", 1 / 8 + 0.05, "accuracy", applies=lambda r: at_end("window", "near")(r).mean() > 0.5,
          needs=("window",)),
    Claim("T2a", "LaCT keeps what is beyond: at least 15 points over windows alone", far_gap("lact", "window"), "above",
          0.15, "accuracy", needs=("lact", "window")),
    Claim("T2b", "So does TTT-Linear", far_gap("ttt_linear", "window"), "above", 0.15, "accuracy",
          needs=("ttt_linear", "window")),
    Claim("T2c", "So does TTT-MLP", far_gap("ttt_mlp", "window"), "above", 0.15, "accuracy",
          needs=("ttt_mlp", "window")),
    Claim("T3a", "Long: memory with an anchor recalls more than memory without",
          far_gap("lact + anchor", "lact", "far, long"), unit="accuracy", needs=("lact + anchor", "lact")),
    Claim("T3b", "Long: memory with an anchor is as good as full attention",
          far_gap("lact + anchor", "full", "far, long"), "within", 0.05, "accuracy", needs=("lact + anchor", "full")),
    Claim("T3c", "Long: beside an anchor a memory still helps",
          far_gap("lact + anchor", "window + anchor", "far, long"), unit="accuracy",
          needs=("lact + anchor", "window + anchor")),
    Claim("T4a", "TTT-Linear recalls more than linear attention", far_gap("ttt_linear", "linear"), unit="accuracy",
          needs=("ttt_linear", "linear")),
    Claim("T4b", "Long: TTT-MLP recalls more than TTT-Linear", far_gap("ttt_mlp", "ttt_linear", "far, long"),
          unit="accuracy", needs=("ttt_mlp", "ttt_linear")),
    Claim("T5", "The memory is in the fast weights: without them at the end's questions, at least 10 points are lost",
          lambda r: final(r, "lact", "far") - final(r, "lact", "far, reset"), "above", 0.1, "accuracy",
          needs=("lact",)),
    Claim("T6", "Long: pre-norm recalls more than post-norm", far_gap("lact", "lact, post-norm", "far, long"),
          unit="accuracy", needs=("lact", "lact, post-norm")),
    Claim("T7a", "Long: writing w1 alone is as good (arXiv 2602.21204)", far_gap("lact, only w1", "lact", "far, long"),
          "within", 0.05, "accuracy", needs=("lact, only w1", "lact")),
    Claim("T7b", "Long: gradient ascent is as good (arXiv 2602.21204)", far_gap("lact, ascent", "lact", "far, long"),
          "within", 0.05, "accuracy", needs=("lact, ascent", "lact")),
    Claim("T8", "Long: without momentum, Muon recalls more than plain gradient steps",
          far_gap("lact, no momentum", "lact, gradient", "far, long"), unit="accuracy",
          needs=("lact, no momentum", "lact, gradient")),
    Claim("T9a", "Long: chunks of 16 and of 64 tokens recall alike",
          far_gap("lact, chunk 16", "lact, chunk 64", "far, long"), "within", 0.05, "accuracy",
          needs=("lact, chunk 16", "lact, chunk 64")),
    Claim("T9b", "Ours: a chunk beyond the windows' reach leaves a hole: as in training, chunks of 16 recall more",
          far_gap("lact, chunk 16", "lact, chunk 64"), unit="accuracy", needs=("lact, chunk 16", "lact, chunk 64")),
]  # fmt: skip


def column(metric: str) -> Callable[[Results, str], np.ndarray]:
    """At the last evaluation, of costs at the longest length; of the mechanism, over all streams. NaN elsewhere."""

    def measure(results, row):
        if metric.startswith("recall at age") and "recall by age" in results.train[row]:
            return recalled(row, int(metric.split()[-1]))(results)
        if metric in results.held_out[row]:
            values = final(results, row, metric)
            return values if values.ndim == 1 else values[:, -1]
        return np.full(next(iter(results.train[row].values())).shape[0], np.nan)

    return measure


COLUMNS = ("far", "near", "far, reset", "far, long", "near, long", "inner lr", "recall at age 1",
           "recall at age 8", "ms", "MiB held", "KiB to go on")  # fmt: skip
FIGURE = ("full", "window + anchor", "lact + anchor", "lact", "ttt_mlp", "ttt_linear", "linear", "window")


def panels(results: Results) -> list[Panel]:
    rows = [row for row in results.train if row in (*FIGURE, *MEMORIES)] or list(results.train)
    if "recall by age" in results.train[rows[0]]:
        curves = {row: results.train[row]["recall by age"].mean(axis=1) for row in rows}
        return [Panel("objects recalled", np.array(AGES), curves, "age of the chunk (chunks)")]
    measured = lambda metric: {row: results.held_out[row][metric] for row in rows}  # noqa: E731
    last = lambda metric: {row: values[:, -1] for row, values in measured(metric).items()}  # noqa: E731
    if "ms" in results.held_out[rows[0]]:
        titles = {"forward pass, ms": "ms", "MiB held meanwhile": "MiB held", "KiB to go on with": "KiB to go on"}
        label = "length (lengths of training)"
        return [Panel(title, np.array(TIMES), last(name), label) for title, name in titles.items()]
    eighths, label = (np.arange(8) + 0.5) / 8, "age (share of the stream)"
    return [
        Panel("beyond the windows' reach", results.evaluated_at, measured("far")),
        Panel("as in training", eighths, last("by age"), label),
        Panel("4 x the length, 2 x the facts", eighths, last("by age, long"), label),
    ]


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line over the defaults of each study: only networks are trained."""
    study = glance(Config(), argv).study
    presets = {
        "mechanism": Config(study="mechanism", seeds=12, updates=4, chunk=4),
        "recall": Config(study="recall"),
        "cost": Config(study="cost"),
    }
    names = [name for name in STUDIES if study in (name, "all")]
    with one_line_errors():
        if not names:
            raise ValueError(f"study: expected one of {', '.join((*STUDIES, 'all'))}, got {study!r}")
        configs = {n: dataclasses.replace(parse(presets[n], __doc__, argv, check=False), study=n) for n in names}
        if "cost" in configs:  # measured once
            configs["cost"] = dataclasses.replace(configs["cost"], seeds=1, updates=1, chunk=1)
        for config in configs.values():
            config.check()
    return configs


STUDY = Study(
    name="ttt_recall",
    title="Recall by test-time training (arXiv 2407.04620, 2505.23884, 2603.12255)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns={name: column(name) for name in COLUMNS},
    panels=panels,
    order=FIGURE,
    smoke=("--seeds", "2", "--updates", "4", "--chunk", "2", "--batch", "2", "--length", "48", "--facts", "12",
           "--questions", "4", "--width", "16", "--eval-streams", "4", "--arms", "window", "lact"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
