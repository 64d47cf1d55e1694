"""Decoder-only transformer: one forward pass for the Llama, SmolLM2, Qwen2 and Qwen3 families, which differ in data.

RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245), SwiGLU (2002.05202).
The flax modules are split once into functions of a plain tree of arrays; caches are arguments and results.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rollax.agents.language_model import LanguageModel
from rollax.kernels.decode_attention import decode_attention

NO_KEY = -1e30  # finite, so that a row with no visible key averages instead of dividing zero by zero
# Layers from which a stack is scanned when the configuration does not say. Unrolled, the 30 of SmolLM2 compile a
# gradient in 3.6 s instead of 1.4 on a CPU, and that is worth their faster decoding.
SCAN_FROM = 32


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for longer contexts: "linear" divides them all, "llama3" only those of few turns.

    Attributes:
      kind: "linear" or "llama3".
      factor: by how much the slow frequencies are divided.
      low_freq_factor, high_freq_factor: turns within `original_length`, below which a frequency is divided in full and
        above which not at all; linear in between ("llama3" only).
      original_length: context length of the original training, tokens ("llama3" only).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class TransformerConfig:
    """Static shape of a decoder. All of it is hashable; nothing here can be swept without compiling again.

    Attributes:
      vocab_size: V.
      width: D, the size of the residual stream.
      num_layers: L.
      num_heads: H, query heads.
      num_kv_heads: K, key and value heads, a divisor of H; None for H. Query head j reads head j // (H / K).
      head_dim: d, even; None for D / H.
      mlp_width: F; None for 8/3 D rounded up to a multiple of 32.
      norm_eps: added to the mean square in every RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: see `RopeScaling`; None leaves the frequencies alone.
      rope_divisors: d/2 numbers that divide the frequencies, as GGUF files store llama3 scaling; None for none.
      qkv_bias, output_bias, mlp_bias: whether those projections have biases.
      qk_norm: RMSNorm over each query and key head before the rotation (Qwen3).
      tied_head: the head is the transposed embedding.
      max_positions: context length the weights were trained for; informative, never enforced.
      dtype: of the computation. Norms, rotary angles, softmax and logits are float32 at least.
      param_dtype: of the parameters.
      scan_layers: True: parameters stacked `[L, ...]` and layers scanned, which compiles in constant time; False: a
        tuple of layers, unrolled, which runs faster; None: scanned from 32 layers on.
      remat: recompute each layer in the backward pass instead of keeping its activations.
      block_decode: steps of one token read the cache block by block, up to the last slot in use
        (`rollax.kernels.decode_attention`; its kernels, where the cache has a multiple of 128 slots). On a CPU it pays
        from some thousand slots a row on, and not for a sharded batch; in bfloat16 it rounds otherwise than a forward
        pass.
    """

    vocab_size: int
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_divisors: tuple[float, ...] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = True
    max_positions: int | None = None
    dtype: Any = "float32"
    param_dtype: Any = "float32"
    scan_layers: bool | None = None
    remat: bool = False
    block_decode: bool = False

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        return -(-8 * self.width // 96) * 32 if self.mlp_width is None else self.mlp_width

    @property
    def scanned(self) -> bool:
        return self.num_layers >= SCAN_FROM if self.scan_layers is None else self.scan_layers


class Cache(NamedTuple):
    """Rotated keys and values of the tokens seen so far. `B` batch, `S` slots, `K` key and value heads, `d` head size.

    Attributes:
      keys, values: a tuple of L arrays `[B, K, S, d]`: one array a layer, so that a step writes its own slots only, and
        slots beside the head size, so that a step's products read the cache as it lies.
      positions: int32 `[B, S]`, negative where a slot holds no token.
      index: int32 `[]`, the first free slot, shared by all rows.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions: jax.Array
    index: jax.Array


def check_config(config: TransformerConfig) -> None:
    """Raises ValueError for a configuration that no model has."""
    for name in ("vocab_size", "width", "num_layers", "num_heads", "kv_heads", "head_size", "mlp_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.head_dim is None and config.width % config.num_heads:
        raise ValueError(f"width {config.width} is not a multiple of num_heads {config.num_heads}; set head_dim")
    if config.head_size % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {config.head_size}")
    if config.num_heads % config.kv_heads:
        raise ValueError(f"num_kv_heads {config.kv_heads} does not divide num_heads {config.num_heads}")
    if config.rope_scaling is not None and config.rope_scaling.kind not in ("linear", "llama3"):
        raise ValueError(f'rope_scaling.kind must be "linear" or "llama3", got {config.rope_scaling.kind!r}')
    if config.rope_divisors is not None and len(config.rope_divisors) != config.head_size // 2:
        raise ValueError(f"rope_divisors needs head_dim / 2 = {config.head_size // 2}, got {len(config.rope_divisors)}")


def rope_frequencies(config: TransformerConfig, dtype=np.float32) -> np.ndarray:
    """Rotary frequencies in radians a position, `[d / 2]`, rounded where the reference models round theirs.

    At position 8191 one unit in the last place of a float32 frequency turns the angle by 5e-4, so the order counts:
    exponent in `dtype`, the power correctly rounded to `dtype`, then the reciprocal.
    """
    exponents = np.arange(0, config.head_size, 2, dtype=dtype) / dtype(config.head_size)
    frequencies = dtype(1) / (np.float64(config.rope_theta) ** exponents.astype(np.float64)).astype(dtype)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / dtype(scaling.factor)
    elif scaling is not None:
        turns = dtype(scaling.original_length) * frequencies / dtype(2 * np.pi)
        span = dtype(scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip((turns - dtype(scaling.low_freq_factor)) / span, 0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / dtype(scaling.factor)
    if config.rope_divisors is not None:
        frequencies = frequencies / np.asarray(config.rope_divisors, dtype)
    return frequencies.astype(dtype)


def island(dtype) -> jnp.dtype:
    """The type in which norms, angles, softmax and logits are computed in a model of type `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


def rotary_angles(config: TransformerConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) `[B, T, 1, d / 2]` in the computation's type, of positions `[B, T]`; negative ones count as 0."""
    dtype = island(config.dtype)
    frequencies = rope_frequencies(config, np.dtype(dtype).type)
    angles = jnp.maximum(positions, 0).astype(dtype)[..., None, None] * frequencies
    return jnp.cos(angles).astype(config.dtype), jnp.sin(angles).astype(config.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x` `[B, T, H, d]`; dimension i is paired with i + d / 2."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention with grouped heads, keys and values never repeated in memory.

    Args:
      q: `[B, T, H, d]`; k, v: `[B, S, K, d]`, K a divisor of H.
      visible: bool `[B, T, S]`.
    Returns:
      `[B, T, H, d]`; the mean of v where nothing is visible.
    """
    B, T, H, d = q.shape
    K, S = k.shape[2], k.shape[1]
    wide = island(q.dtype)
    # Both products are written with the queries on the left: `einsum` puts the keys there, and a step of one token then
    # multiplies tall matrices by narrow ones, which took twice the time on a CPU.
    grouped = q.reshape(B, T, K, H // K, d).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, d)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jax.lax.dot_general(grouped, k, (((3,), (3,)), ((0, 1), (0, 1)))).reshape(B, K, -1, T, S)
    # Rounded to the computation's type after the product and after the scale, as in the reference models: bfloat16
    # results are then equal to theirs, bit for bit, wherever the compiler keeps the roundings.
    scores = scores.astype(wide) * d**-0.5
    scores = jnp.where(visible[:, None, None], scores.astype(q.dtype).astype(wide), NO_KEY)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, -1, S)
    attended = jax.lax.dot_general(weights, v, (((3,), (2,)), ((0, 1), (0, 1))))
    return attended.reshape(B, K, -1, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, back to the computation's type, then times the scale."""

    def __init__(self, size: int, config: TransformerConfig):
        self.eps = config.norm_eps
        self.dtype = config.dtype
        self.scale = nnx.Param(jnp.ones((size,), config.param_dtype))

    def __call__(self, x):
        wide = x.astype(island(self.dtype))
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(self.dtype) * self.scale[...].astype(self.dtype)


def linear(config: TransformerConfig, inputs, outputs, *, bias: bool, std: float, rngs: nnx.Rngs) -> nnx.LinearGeneral:
    """A linear map between the trailing axes `inputs` and new trailing axes `outputs`; kernel `[*inputs, *outputs]`."""
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=tuple(range(-len(inputs), 0)),
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal self-attention of one layer, over its own tokens or over a cache.

    `visible` is a mask `[B, T, S]`, or an operator `(q, k, v) -> out` over its own tokens alone, which still go into
    the cache (`LanguageModel.prefill`).
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, H, K, d = config.width, config.num_heads, config.kv_heads, config.head_size
        out_std = (H * d * 2 * config.num_layers) ** -0.5
        self.q = linear(config, (D,), (H, d), bias=config.qkv_bias, std=D**-0.5, rngs=rngs)
        self.k = linear(config, (D,), (K, d), bias=config.qkv_bias, std=D**-0.5, rngs=rngs)
        self.v = linear(config, (D,), (K, d), bias=config.qkv_bias, std=D**-0.5, rngs=rngs)
        self.o = linear(config, (H, d), (D,), bias=config.output_bias, std=out_std, rngs=rngs)
        self.q_norm = RMSNorm(d, config) if config.qk_norm else None
        self.k_norm = RMSNorm(d, config) if config.qk_norm else None
        self.block_decode = config.block_decode

    def __call__(self, x, cos, sin, visible, cached, index):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        own = (q, k, v)
        if cached is not None:
            cached = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype).swapaxes(1, 2), index, axis=2)
                for old, new in zip(cached, (k, v), strict=True)
            )
            k, v = (x.swapaxes(1, 2) for x in cached)  # no copies: the compiler cancels them against those of `attend`
        if callable(visible):
            attended = visible(*own)
        elif self.block_decode and cached is not None and q.shape[1] == 1:
            attended = decode_attention(q[:, 0], *cached, index + 1, mask=visible[:, 0])[:, None]
        else:
            attended = attend(q, k.astype(q.dtype), v.astype(q.dtype), visible)
        return self.o(attended), cached


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_size
        self.gate = linear(config, (D,), (F,), bias=config.mlp_bias, std=D**-0.5, rngs=rngs)
        self.up = linear(config, (D,), (F,), bias=config.mlp_bias, std=D**-0.5, rngs=rngs)
        self.down = linear(config, (F,), (D,), bias=config.mlp_bias, std=(F * 2 * config.num_layers) ** -0.5, rngs=rngs)

    def __call__(self, x):
        gate = self.gate(x)
        return self.down(jax.nn.silu(gate.astype(island(gate.dtype))).astype(gate.dtype) * self.up(x))


class Layer(nnx.Module):
    """One pre-norm layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.width, config)
        self.mlp = MLP(config, rngs)

    def __call__(self, x, cos, sin, visible, cached, index):
        attended, cached = self.attention(self.attention_norm(x), cos, sin, visible, cached, index)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cached


def as_functions(build):
    """Splits the module that `build(rngs)` makes into `init(key) -> tree` and `apply(tree, *args)`."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def init(key):
        return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(params=key)), nnx.Param))

    def apply(tree, *args):
        return nnx.merge(graph, tree)(*args)

    return init, apply


def transformer_axes(config: TransformerConfig) -> dict:
    """Logical axis names of every parameter, a tree like the parameters (`agents.sharding` gives them a mesh)."""
    norm = {"scale": ("norm",)}

    def kernel(inputs, outputs, bias):
        return {"kernel": (*inputs, *outputs)} | ({"bias": outputs} if bias else {})

    layer = {
        "attention_norm": norm,
        "attention": {
            "q": kernel(("embed",), ("heads", "head_dim"), config.qkv_bias),
            "k": kernel(("embed",), ("kv_heads", "head_dim"), config.qkv_bias),
            "v": kernel(("embed",), ("kv_heads", "head_dim"), config.qkv_bias),
            "o": kernel(("heads", "head_dim"), ("embed",), config.output_bias),
        }
        | ({"q_norm": norm, "k_norm": norm} if config.qk_norm else {}),
        "mlp_norm": norm,
        "mlp": {
            "gate": kernel(("embed",), ("mlp",), config.mlp_bias),
            "up": kernel(("embed",), ("mlp",), config.mlp_bias),
            "down": kernel(("mlp",), ("embed",), config.mlp_bias),
        },
    }
    if config.scanned:
        layers = jax.tree.map(lambda names: ("layers", *names), layer, is_leaf=lambda x: isinstance(x, tuple))
    else:
        layers = (layer,) * config.num_layers
    head = {} if config.tied_head else {"head": {"kernel": ("embed", "vocab")}}
    return {"embed": {"embedding": ("vocab", "embed")}, "layers": layers, "norm": norm} | head


def unstack_layers(params: dict) -> dict:
    """Parameters with their layers as a tuple, whichever form they had; every function of a model takes both forms.

    For a decoding loop over a scanned model: sliced here, outside the loop, the weights are copied once and not in
    every step (SmolLM2 on a CPU: 2.5 times faster). For gradients keep the stacked form.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    depth = jax.tree.leaves(layers)[0].shape[0]
    return params | {"layers": tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(depth))}


def transformer(config: TransformerConfig) -> LanguageModel:
    """The model of a configuration, as functions.

    Parameters are `{"embed": {"embedding": [V, D]}, "layers": ..., "norm": {"scale": [D]}}` and, untied,
    `{"head": {"kernel": [D, V]}}`; layers a tuple of L trees or, scanned, one tree with leading axis L. One key gives
    the same numbers in both forms. Fresh linear maps have standard deviation 1/sqrt(inputs), those that write into the
    residual stream 1/sqrt(2 L) of that.

    Args:
      config: see `TransformerConfig`.
    Returns:
      A `LanguageModel`. `apply` and `hidden` raise ValueError at trace time for tokens and positions that are not the
      same `[B, T]`, and for a cache of other rows or fewer than T slots. Filling a cache beyond its slots cannot be
      seen at trace time and is the caller's to avoid.
    Raises:
      ValueError: an impossible configuration.
    """
    check_config(config)
    D, V, L = config.width, config.vocab_size, config.num_layers
    dtype = jnp.dtype(config.dtype)
    init_layer, layer = as_functions(lambda rngs: Layer(config, rngs))
    init_norm, norm = as_functions(lambda rngs: RMSNorm(D, config))
    dense_layer = jax.checkpoint(layer) if config.remat else layer

    def init(key):
        embed_key, head_key, layers_key = jax.random.split(key, 3)
        normal = nnx.initializers.normal(D**-0.5)
        # One draw a kind for all layers: it compiles once, and both forms of the parameters get the same numbers.
        layers = jax.vmap(init_layer)(jax.random.split(layers_key, L))
        params = {
            "embed": {"embedding": normal(embed_key, (V, D), config.param_dtype)},
            "layers": layers,
            "norm": init_norm(head_key),
        }
        if not config.tied_head:
            params["head"] = {"kernel": normal(head_key, (D, V), config.param_dtype)}
        return params if config.scanned else unstack_layers(params)

    def init_cache(batch, slots, dtype=None):
        shape = (batch, config.kv_heads, slots, config.head_size)
        empty = lambda: tuple(jnp.zeros(shape, dtype or config.dtype) for _ in range(L))  # noqa: E731
        return Cache(empty(), empty(), jnp.full((batch, slots), -1, jnp.int32), jnp.zeros((), jnp.int32))

    def hidden(params, tokens, positions, cache=None, prefill=None):
        if tokens.ndim != 2 or tokens.shape != positions.shape:
            raise ValueError(
                f"tokens and positions must be one [B, T], got {tuple(tokens.shape)} and {tuple(positions.shape)}"
            )
        T = tokens.shape[1]
        if cache is None:
            index, key_positions, slots = None, positions, jnp.arange(T)
        else:
            B, S = cache.positions.shape
            if tokens.shape[0] != B or S < T:
                raise ValueError(f"cache has {B} rows of {S} slots, tokens are {tuple(tokens.shape)}")
            index, slots = cache.index, cache.index + jnp.arange(T)
            key_positions = jax.lax.dynamic_update_slice_in_dim(
                cache.positions, positions.astype(cache.positions.dtype), index, axis=1
            )
        # Order is by slot, presence by position: padding may stand anywhere, and positions may jump.
        causal = jnp.arange(key_positions.shape[1]) <= slots[:, None]
        visible = causal[None] & (key_positions >= 0)[:, None, :]
        cos, sin = rotary_angles(config, positions)
        run_layer = dense_layer
        if prefill is not None:
            lengths = (positions >= 0).sum(axis=1)
            run_layer, visible = layer, lambda q, k, v: prefill(q, k, v, lengths)
        x = params["embed"]["embedding"].astype(dtype)[tokens]
        layers = params["layers"]
        stacked = not isinstance(layers, tuple)
        if stacked and (cache is None or T > 1):
            kv = None if cache is None else (jnp.stack(cache.keys), jnp.stack(cache.values))
            run = lambda x, xs: run_layer(xs[0], x, cos, sin, visible, xs[1], index)  # noqa: E731
            x, kv = jax.lax.scan(run, x, (layers, kv))
            keys, values = (None, None) if cache is None else (tuple(kv[0]), tuple(kv[1]))
        else:
            # A step of one token is unrolled even over stacked layers: scanned, it would copy the whole cache. It then
            # copies the slices of the weights instead; `unstack_layers` before a decoding loop does that once.
            new = []
            for i, p in enumerate(unstack_layers(params)["layers"]):
                cached = None if cache is None else (cache.keys[i], cache.values[i])
                x, cached = run_layer(p, x, cos, sin, visible, cached, index)
                new.append(cached)
            keys, values = (None, None) if cache is None else zip(*new, strict=True)
        if cache is not None:
            cache = Cache(keys, values, key_positions, index + T)
        return norm(params["norm"], x), cache

    def head(params):
        kernel = params["embed"]["embedding"].T if config.tied_head else params["head"]["kernel"]
        return kernel.astype(dtype)

    def apply(params, tokens, positions, cache=None):
        x, cache = hidden(params, tokens, positions, cache)
        # float32 logits even of a bfloat16 model: a rounded log-probability is noise in every ratio built on it.
        return jnp.einsum("btd,dv->btv", x, head(params), preferred_element_type=island(dtype)), cache

    return LanguageModel(init, apply, init_cache, hidden, head, transformer_axes(config), V, unstack_layers)
