"""Test-time training as a memory: what fast weights recall beyond a window (arXiv 2407.04620, 2505.23884, 2603.12255).

Two studies. "mechanism" trains nothing: a stream of objects is written into random fast weights, and the rules of LaCT
are asked for objects of every age. "recall" trains small networks from scratch on streams that hold facts (a key with
its value) among noise, and asks for them at the end, also in streams of four times the length with twice the facts:
windows alone, windows with one full layer ("anchor"), full attention, linear attention, TTT-Linear, TTT-MLP, and LaCT
by rule, norm and chunk length.

    python experiments/ttt_recall.py
    python experiments/ttt_recall.py --study recall --arms window lact full --length 256

Results come to runs/ttt_recall/NAME/: report.html with time and memory against length, results.json, figures.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollax.experiments.harness.claims import Claim
from rollax.experiments.harness.command_line import Options, one_line_errors, parse
from rollax.experiments.harness.figures import Panel
from rollax.experiments.harness.loop import Results, Train, final, gap
from rollax.experiments.harness.report import Episode
from rollax.experiments.harness.study import Build, Study, main
from rollax.kernels.ttt import (
    FastWeights,
    UpdateRule,
    lact_apply,
    lact_scan,
    sliding_window_attention,
    ttt_linear_scan,
    ttt_mlp_scan,
)

STUDIES = ("mechanism", "recall")


@dataclass(frozen=True)
class Config(Options):
    """The study."""

    study: str = "both"
    """mechanism, recall, or both."""
    arms: tuple[str, ...] = ()
    """Networks of "recall" (see ARMS); all when empty."""
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
    length: int = 128
    """Tokens of a stream before the questions."""
    facts: int = 16
    """Facts of a stream, at random places; the rest is noise."""
    questions: int = 16
    """Facts that are asked for at the end."""
    keys: int = 32
    """Keys to choose from."""
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
    lr: float = 3e-3
    """Adam's learning rate, falling to zero along a cosine."""
    eval_streams: int = 64
    """Streams of an evaluation."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        super().check()
        for field in ("seeds", "updates", "chunk", "batch", "questions", "values", "layers", "window", "eval_streams"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        if unknown := set(self.arms) - set(ARMS):
            raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {', '.join(sorted(unknown))}")
        if not self.questions <= self.facts <= min(self.length, self.keys):
            most = min(self.length, self.keys)
            raise ValueError(f"facts: expected {self.questions} (questions) to {most}, got {self.facts}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width: expected a multiple of twice the {self.heads} heads, got {self.width}")
        if not self.lr >= 0:
            raise ValueError(f"lr: expected at least 0, got {self.lr}")
        if self.updates % min(self.chunk, self.updates):
            raise ValueError(f"chunk: expected a divisor of updates={self.updates}, got {self.chunk}")


# --- The mechanism: recall from random fast weights -----------------------------------------------------------------

CHUNKS, OBJECTS, COPIES, DEPTH = 12, 8, 8, 64  # chunks of a stream, objects of a chunk, tokens of an object, width
AGES = tuple(range(CHUNKS))
RULES = {
    "pre-norm": (UpdateRule(muon=True, momentum=False, norm="pre"), 1e-3),
    "pre-norm, momentum": (UpdateRule(muon=True, momentum=True, norm="pre"), 1e-3),
    "post-norm": (UpdateRule(muon=True, momentum=False, norm="post"), 1e-3),
    "post-norm, momentum": (UpdateRule(muon=True, momentum=True, norm="post"), 1e-3),
    "gradient 1e-3": (UpdateRule(muon=False, momentum=False, norm="post"), 1e-3),
    "gradient 1e-1": (UpdateRule(muon=False, momentum=False, norm="post"), 1e-1),
}


def recall_by_age(key: jax.Array, rule: UpdateRule, rate: float) -> jax.Array:
    """Share of a chunk's objects that are told apart when the chunk is 0, 1, ... chunks old, `[CHUNKS]`.

    A stream's chunk shows 8 objects, 8 times each, with noise on the key; afterwards the memory is asked with the clean
    key, and the answer counts where it is nearer to the object's value than to the other seven (cosine, centred).
    """
    d, tokens = DEPTH, OBJECTS * COPIES
    weight_keys, key_key, value_key, noise_key = (*jax.random.split(key, 6)[:3],), *jax.random.split(key, 6)[3:]
    weights = FastWeights(*(jax.random.normal(k, (1, d, d)) * d**-0.5 for k in weight_keys))
    clean = unit(jax.random.normal(key_key, (CHUNKS, OBJECTS, d)))
    values = jax.nn.silu(jax.random.normal(value_key, (CHUNKS, OBJECTS, d)))
    noise = 0.3 * d**-0.5 * jax.random.normal(noise_key, (CHUNKS, COPIES, OBJECTS, d))
    keys = unit(clean[:, None] + noise).reshape(1, 1, CHUNKS * tokens, d)
    seen = jnp.broadcast_to(values[:, None], (CHUNKS, COPIES, OBJECTS, d)).reshape(1, 1, CHUNKS * tokens, d)
    rates = jnp.full((1, 1, CHUNKS * tokens, 3), rate)
    momentum = jnp.full((1, 1, CHUNKS * tokens), 0.5) if rule.momentum else None
    _, state = lact_scan(weights, keys, keys, seen, rates, momentum, chunk=tokens, rule=rule)
    answers = lact_apply(state.w, clean.reshape(1, 1, -1, d)).reshape(CHUNKS, OBJECTS, d)
    centred = unit(values - values.mean(1, keepdims=True))
    nearest = jnp.argmax(jnp.einsum("cod,cpd->cop", unit(answers - answers.mean(1, keepdims=True)), centred), axis=-1)
    return (nearest == jnp.arange(OBJECTS)).mean(axis=1)[::-1]


def unit(x: jax.Array) -> jax.Array:
    """To length 1 along the last axis; zeros stay zero."""
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-5)


def mechanism_train(config: Config, rule: UpdateRule, rate: float) -> Train:
    """An "update" is one more stream: nothing is trained."""

    def metrics(key):
        by_age = recall_by_age(key, rule, rate)
        return {"recall by age": by_age} | {f"recall at age {age}": by_age[age] for age in (0, 1, 2, 4, 8, 11)}

    def init(key):
        return key, jnp.int32(0), jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(metrics, key))

    def advance(state, numbers):
        key, count, _ = state
        chunk = min(config.chunk, config.updates)
        streams = jax.lax.map(lambda i: metrics(jax.random.fold_in(key, count + i)), jnp.arange(chunk))
        return (key, count + chunk, jax.tree.map(lambda x: x[-1], streams)), streams

    return Train(init, advance, lambda state, numbers: state[2])


# --- The task: facts in a stream ------------------------------------------------------------------------------------

NOISE_KEYS = 16


class Streams(NamedTuple):
    """Alphabet: `B` streams, `T` tokens (the length and then the questions), `Q` questions.

    Attributes:
      key: int `[B, T]`: of facts and questions below `keys`, of noise above.
      value: int `[B, T]`: of facts below `values`; then "none" for noise, and "asked".
      answer: int `[B, Q]`.
      age: int `[B, Q]`, tokens between a question and its fact.
    """

    key: jax.Array
    value: jax.Array
    answer: jax.Array
    age: jax.Array


def sample_streams(key: jax.Array, config: Config, count: int, length: int) -> Streams:
    """Each fact once, with a key of its own, at a random place; questions ask for different facts."""

    def one(key):
        place_key, key_key, value_key, noise_key, ask_key = jax.random.split(key, 5)
        at, fact_keys = (shuffled(*x)[: config.facts] for x in ((place_key, length), (key_key, config.keys)))
        fact_values = jax.random.randint(value_key, (config.facts,), 0, config.values)
        keys = config.keys + jax.random.randint(noise_key, (length,), 0, NOISE_KEYS)
        values = jnp.full(length, config.values)
        asked = shuffled(ask_key, config.facts)[: config.questions]
        return Streams(
            jnp.concatenate([keys.at[at].set(fact_keys), fact_keys[asked]]),
            jnp.concatenate([values.at[at].set(fact_values), jnp.full(config.questions, config.values + 1)]),
            fact_values[asked],
            length + jnp.arange(config.questions) - at[asked],
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
      rate: LaCT's first inner learning rate; Muon ignores its size.
      size: tokens of LaCT's chunk or of TTT's mini-batch.
    """

    memory: str = ""
    attention: str = "window"
    rule: UpdateRule = UpdateRule(muon=True, momentum=True, norm="pre")
    rate: float = 1e-3
    size: int = 32


LACT = Arm("lact")
ARMS = {
    "full": Arm(attention="full"),
    "window": Arm(),
    "window + anchor": Arm(attention="anchor"),
    "linear": Arm("linear"),
    "ttt_linear": Arm("ttt_linear", size=16),
    "ttt_mlp": Arm("ttt_mlp", size=16),
    "lact": LACT,
    "lact + anchor": LACT._replace(attention="anchor"),
    "lact, post-norm": LACT._replace(rule=UpdateRule(muon=True, momentum=True, norm="post")),
    "lact, no momentum": LACT._replace(rule=UpdateRule(muon=True, momentum=False, norm="pre")),
    "lact, gradient": LACT._replace(rule=UpdateRule(muon=False, momentum=False, norm="pre"), rate=0.1),
    "lact, only w1": LACT._replace(rule=UpdateRule(muon=True, momentum=True, norm="pre", only=("w1",))),
    "lact, ascent": LACT._replace(rule=UpdateRule(muon=True, momentum=True, norm="pre", sign=-1)),
    "lact, chunk 16": LACT._replace(size=16),
    "lact, chunk 64": LACT._replace(size=64),
}


def normal(key: jax.Array, *shape: int) -> jax.Array:
    """Weights `[..., in, out]` with variance 1 / in."""
    return jax.random.normal(key, shape) * shape[-2] ** -0.5


def init_layer(key: jax.Array, config: Config, arm: Arm, memory: str) -> dict[str, Any]:
    """One layer's parameters."""
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
        params |= {"rate": 0.1 * normal(next(keys), D, 3 * H), "momentum": 0.1 * normal(next(keys), D, H)}
    if memory.startswith("ttt"):
        sizes = ((d, d),) if memory == "ttt_linear" else ((d, 4 * d), (4 * d, d))
        weights = [(0.02 * jax.random.normal(next(keys), (H, *s)), jnp.zeros((H, 1, s[1]))) for s in sizes]
        params["fast"] = [x for pair in weights for x in pair]
        params |= {"rate": 0.1 * normal(next(keys), D, H), "position": jnp.zeros(arm.size)}
        params["inner_norm"] = (jnp.ones((H, d)), jnp.zeros((H, d)))
    return params


def kinds(config: Config, arm: Arm) -> list[tuple[str, str]]:
    """(attention, memory) of each layer."""
    if arm.attention != "anchor":
        return [(arm.attention, arm.memory)] * config.layers
    return [("window", arm.memory)] * (config.layers - 1) + [("full", "")]


def init_params(key: jax.Array, config: Config, arm: Arm) -> dict[str, Any]:
    D = config.width
    key_key, value_key, head_key, *layer_keys = jax.random.split(key, 3 + config.layers)
    layers = [init_layer(k, config, arm, memory) for k, (_, memory) in zip(layer_keys, kinds(config, arm), strict=True)]
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


def remember(params: dict, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, arm: Arm) -> jax.Array:
    """What the memory of a layer answers, `[B, H, T, d]`; x `[B, T, D]` is the layer's normed input."""
    q, k, v = (jax.nn.silu(y) for y in (q, k, v))
    if arm.memory == "linear":
        return linear_attention(q, k, v, arm.size)
    q, k = unit(q), unit(k)
    H, d = q.shape[1], q.shape[3]
    if arm.memory == "lact":
        start = jnp.log(jnp.expm1(arm.rate))
        rates = jax.nn.softplus(x @ params["rate"] + start).reshape(*x.shape[:2], H, 3)
        momentum = jax.nn.sigmoid(x @ params["momentum"]).transpose(0, 2, 1) if arm.rule.momentum else None
        rates = jnp.moveaxis(rates, 2, 1)
        return lact_scan(params["fast"], q, k, v, rates, momentum, chunk=arm.size, rule=arm.rule)[0]
    base = 1.0 if arm.memory == "ttt_linear" else 0.1
    by_position = jnp.maximum(1 / jnp.arange(1, arm.size + 1) + params["position"], 0)
    gate = base / d * jax.nn.sigmoid(x @ params["rate"]).transpose(0, 2, 1)
    scan = ttt_linear_scan if arm.memory == "ttt_linear" else ttt_mlp_scan
    ln = params["inner_norm"]
    return scan(q, k, v, by_position, gate, params["fast"], ln, mini_batch=arm.size)[0]


def apply_layer(params: dict, x: jax.Array, config: Config, arm: Arm, kind: tuple[str, str], reset_at: int | None):
    """`x + mix(norm(x))`, then the MLP; the mixers share q, k, v, and are summed before the output projection.

    reset_at: the memory forgets everything before this token.
    """
    attention, memory = kind
    normed = rms_norm(x, params["attention_norm"])
    q, k, v = (split_heads(normed @ params[name], config.heads) for name in "qkv")
    if attention == "full":  # without positions, so that it knows no longest length
        mixed = jax.nn.dot_product_attention(*(y.swapaxes(1, 2) for y in (q, k, v)), is_causal=True).swapaxes(1, 2)
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
    """Of the questions, `[B, Q, values]`."""
    x = params["key"][streams.key] + params["value"][streams.value]
    for layer, kind in zip(params["layers"], kinds(config, arm), strict=True):
        x = apply_layer(layer, x, config, arm, kind, reset_at)
    return rms_norm(x[:, -config.questions :], params["norm"]) @ params["head"]


# --- Training -------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that training carries."""

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array


def reach(config: Config) -> int:
    """How far back stacked windows see, in tokens."""
    return config.layers * (config.window - 1)


def recall_train(config: Config, arm: Arm) -> Train:
    """The functions of one run of one network."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(config.lr, config.updates))
    )
    # The same for all networks and seeds: less to compile, and pairs to compare.
    crowded = dataclasses.replace(config, facts=min(2 * config.facts, config.keys, 4 * config.length))
    held_out = {
        "": sample_streams(jax.random.key(2**20), config, config.eval_streams, config.length),
        ", long": sample_streams(jax.random.key(2**20 + 1), crowded, config.eval_streams // 4 or 1, 4 * config.length),
    }

    def init(key):
        params = init_params(jax.random.fold_in(key, 0), config, arm)
        return State(params, optimizer.init(params), jax.random.fold_in(key, 1), jnp.int32(0))

    def loss(params, streams):
        logits = logits_of(params, streams, config, arm)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, streams.answer)
        return losses.mean(), (logits.argmax(-1) == streams.answer).mean()

    def update(state, _):
        streams = sample_streams(jax.random.fold_in(state.key, state.step), config, config.batch, config.length)
        (value, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(state.params, streams)
        steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"accuracy": accuracy, "loss": value, "tokens": jnp.int32(streams.key.size)}
        return State(optax.apply_updates(state.params, steps), opt_state, state.key, state.step + 1), metrics

    def advance(state, numbers):
        return jax.lax.scan(update, state, length=min(config.chunk, config.updates))

    def evaluate(state, numbers):
        """Accuracy by age of the fact; also of streams that are four times as long and hold twice the facts."""
        metrics = {}
        for name, streams in held_out.items():
            length = streams.key.shape[1] - config.questions
            right = logits_of(state.params, streams, config, arm).argmax(-1) == streams.answer
            far = streams.age > reach(config)
            metrics |= {f"far{name}": mean_where(right, far), f"near{name}": mean_where(right, ~far)}
            bins = jax.nn.one_hot(jnp.minimum(streams.age * 8 // (length + config.questions), 7), 8, axis=0)
            metrics[f"by age{name}"] = (bins * right).sum((1, 2)) / bins.sum((1, 2))
            if not name:
                again = logits_of(state.params, streams, config, arm, reset_at=length).argmax(-1) == streams.answer
                metrics["far, reset"] = mean_where(again, far)
        return metrics

    return Train(init, advance, evaluate)


def mean_where(x: jax.Array, where: jax.Array) -> jax.Array:
    """The mean of the chosen elements; NaN where there is none."""
    return jnp.sum(x * where) / jnp.sum(where)


# --- Time and memory against length ---------------------------------------------------------------------------------


def cost_table(config: Config, arms: Sequence[str], lengths: Sequence[int]) -> str:
    """Of one stream: milliseconds of the forward pass, MiB that it holds, MiB to go on with (caches, fast weights)."""
    lines = [f"{'':20s}" + "".join(f"{f'{length} tokens':>26s}" for length in lengths)]
    for name in arms:
        cells = []
        for length in lengths:
            streams = sample_streams(jax.random.key(0), config, 1, length)
            params = init_params(jax.random.key(0), config, ARMS[name])
            forward = jax.jit(functools.partial(logits_of, config=config, arm=ARMS[name]))
            compiled = forward.lower(params, streams).compile()
            jax.block_until_ready(compiled(params, streams))
            seconds = min(timed(compiled, params, streams) for _ in range(3))
            held = compiled.memory_analysis().temp_size_in_bytes
            kept = state_bytes(config, ARMS[name], length)
            cells.append(f"{1e3 * seconds:8.1f} {held / 2**20:8.2f} {kept / 2**20:8.3f}")
        lines.append(f"{name:20s}" + "".join(f"{cell:>26s}" for cell in cells))
    return "\n".join(["ms, MiB held, MiB to go on with", *lines])


def timed(function: Callable, *args) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begun


def state_bytes(config: Config, arm: Arm, length: int) -> int:
    """What a stream must keep to go on, float32: keys and values in reach of attention, fast weights, what waits."""
    D, d = config.width, config.width // config.heads
    total = 0
    for attention, memory in kinds(config, arm):
        total += 2 * D * (length if attention == "full" else min(length, config.window - 1))
        per_head = {"": 0, "linear": d * (d + 1), "ttt_linear": d * (d + 1), "ttt_mlp": 8 * d * d + 5 * d}
        if memory == "lact":
            copies = 1 + (arm.rule.norm == "pre") + arm.rule.momentum  # weights, their unnormalised copy, momentum
            total += config.heads * 3 * d * d * copies
        else:
            total += config.heads * per_head[memory]
        if memory:
            total += arm.size * 2 * D  # keys and values of the chunk that is not yet written
    return 4 * total


# --- The study ------------------------------------------------------------------------------------------------------


def build(config: Config) -> Build:
    if config.study == "mechanism":
        trains = {name: mechanism_train(config, rule, rate) for name, (rule, rate) in RULES.items()}
        return Build(trains, dict.fromkeys(trains, ()))
    arms = config.arms or tuple(ARMS)
    trains = {name: recall_train(config, ARMS[name]) for name in arms}

    def episodes(state_of) -> list[Episode]:
        """One stream with the answers of the first network, and what the networks cost."""
        streams = sample_streams(jax.random.key(config.seed), config, 1, config.length)
        logits = jax.jit(lambda params: logits_of(params, streams, config, ARMS[arms[0]]))(state_of(arms[0]).params)
        shown = show_stream(jax.device_get(streams), np.asarray(logits[0]), config)
        right = float(np.mean(logits[0].argmax(-1) == streams.answer[0]))
        table = cost_table(config, arms, [times * config.length for times in (4, 8, 16, 32)])
        return [Episode(f"{arms[0]}: a stream", [shown], right), Episode("cost by length", [table], 0.0)]

    return Build(trains, dict.fromkeys(trains, ()), episodes)


def show_stream(streams: Streams, logits: np.ndarray, config: Config) -> str:
    """Facts as `key=value` (noise as a dot), then the questions with the answer and how old the fact is."""
    tokens = [
        f"{k}={v}" if v < config.values else "."
        for k, v in zip(streams.key[0], streams.value[0], strict=True)
        if v <= config.values
    ]
    asked = streams.key[0, -config.questions :]
    answers = zip(asked, logits.argmax(-1), streams.answer[0], streams.age[0], strict=True)
    lines = [f"{k}? {said} ({'right' if said == true else f'it was {true}'}, {age} tokens ago)"
             for k, said, true, age in answers]  # fmt: skip
    return " ".join(tokens) + "\n" + "\n".join(lines)


def late_mean(metric: str) -> Callable[[Results, str], np.ndarray]:
    """Mean over all streams of the mechanism, `[seeds]`."""
    return lambda results, row: results.train[row][metric].mean(axis=1)


def mechanism(row: str, age: int) -> Callable[[Results], np.ndarray]:
    return lambda results: late_mean(f"recall at age {age}")(results, row)


def at_end(row: str, metric: str) -> Callable[[Results], np.ndarray]:
    return lambda results: final(results, row, metric)


def far_gap(better: str, worse: str, metric: str = "far") -> Callable[[Results], np.ndarray]:
    return gap(better, worse, final, metric)


CLAIMS = [
    Claim("M1", "Muon with pre-norm recalls chunks that are 8 chunks old", mechanism("pre-norm", 8), "above", 0.9,
          "recall", needs=("pre-norm",)),
    Claim("M2", "Muon with post-norm has forgotten much of them", mechanism("post-norm", 8), "below", 0.7,
          "recall", needs=("post-norm",)),
    Claim("M3", "Plain gradient steps at the rate 1e-3 store almost nothing", mechanism("gradient 1e-3", 1), "below",
          0.25, "recall", needs=("gradient 1e-3",)),
    Claim("M4", "Momentum makes post-norm forget faster",
          lambda r: mechanism("post-norm", 8)(r) - mechanism("post-norm, momentum", 8)(r), unit="recall",
          needs=("post-norm", "post-norm, momentum")),
    Claim("T1", "Facts beyond the reach of stacked windows are lost by windows alone: accuracy of chance (1/8) + .05",
          at_end("window", "far"), "below", 1 / 8 + 0.05, "accuracy", needs=("window",)),
    Claim("T2a", "LaCT keeps them: at least 15 points over windows alone", far_gap("lact", "window"), "above", 0.15,
          "accuracy", needs=("lact", "window")),
    Claim("T2b", "So does TTT-Linear", far_gap("ttt_linear", "window"), "above", 0.15, "accuracy",
          needs=("ttt_linear", "window")),
    Claim("T2c", "So does TTT-MLP", far_gap("ttt_mlp", "window"), "above", 0.15, "accuracy",
          needs=("ttt_mlp", "window")),
    Claim("T3a", "Memory with an anchor recalls more than memory without", far_gap("lact + anchor", "lact"),
          unit="accuracy", needs=("lact + anchor", "lact")),
    Claim("T3b", "In longer, fuller streams too", far_gap("lact + anchor", "lact", "far, long"), unit="accuracy",
          needs=("lact + anchor", "lact")),
    Claim("T3c", "Memory with an anchor is as good as full attention", far_gap("lact + anchor", "full"), "within", 0.05,
          "accuracy", needs=("lact + anchor", "full")),
    Claim("T4a", "TTT-Linear recalls more than linear attention", far_gap("ttt_linear", "linear"), unit="accuracy",
          needs=("ttt_linear", "linear")),
    Claim("T4b", "TTT-MLP recalls more than TTT-Linear", far_gap("ttt_mlp", "ttt_linear"), unit="accuracy",
          needs=("ttt_mlp", "ttt_linear")),
    Claim("T5", "The memory is in the fast weights: without them at the questions, at least 10 points are lost",
          lambda r: final(r, "lact", "far") - final(r, "lact", "far, reset"), "above", 0.1, "accuracy",
          needs=("lact",)),
    Claim("T6", "In longer, fuller streams pre-norm recalls more than post-norm",
          far_gap("lact", "lact, post-norm", "far, long"), unit="accuracy", needs=("lact", "lact, post-norm")),
    Claim("T7a", "Writing w1 alone is as good (arXiv 2602.21204)", far_gap("lact, only w1", "lact"), "within", 0.05,
          "accuracy", needs=("lact, only w1", "lact")),
    Claim("T7b", "Gradient ascent is as good (arXiv 2602.21204)", far_gap("lact, ascent", "lact"), "within", 0.05,
          "accuracy", needs=("lact, ascent", "lact")),
    Claim("T8", "Muon recalls more than plain gradient steps", far_gap("lact", "lact, gradient"), unit="accuracy",
          needs=("lact", "lact, gradient")),
    Claim("T9", "In longer, fuller streams chunks of 16 and of 64 tokens recall alike",
          far_gap("lact, chunk 16", "lact, chunk 64", "far, long"), "within", 0.05, "accuracy",
          needs=("lact, chunk 16", "lact, chunk 64")),
]  # fmt: skip


def column(metric: str) -> Callable[[Results, str], np.ndarray]:
    """At the last evaluation; of the mechanism, over all streams. NaN where the other study has it."""

    def measure(results, row):
        if metric in results.held_out[row]:
            return late_mean(metric)(results, row) if metric in results.train[row] else final(results, row, metric)
        return np.full(next(iter(results.train[row].values())).shape[0], np.nan)

    return measure


FIGURE = ("full", "window + anchor", "lact + anchor", "lact", "ttt_mlp", "ttt_linear", "linear", "window")


def panels(results: Results) -> list[Panel]:
    rows = [row for row in results.train if row in (*FIGURE, *RULES)] or list(results.train)
    if "recall by age" in results.train[rows[0]]:
        curves = {row: results.train[row]["recall by age"].mean(axis=1) for row in rows}
        return [Panel("objects recalled", np.array(AGES), curves, "age of the chunk (chunks)")]
    updates = np.arange(1, results.evaluated_at[-1] + 1)
    eighths = (np.arange(8) + 0.5) / 8
    shown = [Panel("accuracy of training", updates, {row: results.train[row]["accuracy"] for row in rows})]
    for name in ("", ", long"):
        curves = {row: results.held_out[row][f"by age{name}"][:, -1] for row in rows}
        title = "longer, fuller streams" if name else "streams as in training"
        shown.append(Panel(title, eighths, curves, "age of the fact (share of the stream)"))
    return shown


def configs_of(argv: Sequence[str] | None = None) -> dict[str, Config]:
    """The command line over the defaults of each study: the mechanism needs few, cheap updates."""
    study = parse(Config(), __doc__, argv, check=False).study
    presets = {"mechanism": Config(study="mechanism", seeds=12, updates=4, chunk=4), "recall": Config(study="recall")}
    names = [name for name in STUDIES if study in (name, "both")]
    with one_line_errors():
        if not names:
            raise ValueError(f"study: expected one of {', '.join((*STUDIES, 'both'))}, got {study!r}")
        configs = {n: dataclasses.replace(parse(presets[n], __doc__, argv, check=False), study=n) for n in names}
        for config in configs.values():
            config.check()
    return configs


STUDY = Study(
    name="ttt_recall",
    title="Recall by test-time training (arXiv 2407.04620, 2505.23884, 2603.12255)",
    configs=configs_of,
    build=build,
    claims=CLAIMS,
    columns={name: column(name) for name in ("far", "near", "far, reset", "far, long", "recall at age 1",
                                             "recall at age 8")},
    panels=panels,
    order=FIGURE,
    smoke=("--seeds", "2", "--updates", "4", "--chunk", "2", "--batch", "2", "--length", "48", "--facts", "12",
           "--questions", "4", "--width", "16", "--eval-streams", "4", "--arms", "window", "lact", "ttt_linear"),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
