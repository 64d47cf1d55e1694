"""The Hugging Face layout of Llama, SmolLM2, Qwen2 and Qwen3 checkpoints: configurations, weight names, safetensors.

Reads the published `config.json` (rope_theta, rope_scaling, torch_dtype) and the newer one (rope_parameters, dtype)
and writes the published one. Weights are stored `[out, in]`; tensors stay in the mapped file until they are used.
"""

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from rollax.agents.transformer import RopeScaling, TransformerConfig

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Our name -> (name in a Hugging Face file, name in a GGUF file), without ".weight" and ".bias" for linear maps.
MODEL_NAMES = {
    ("embed", "embedding"): ("model.embed_tokens.weight", "token_embd.weight"),
    ("norm", "scale"): ("model.norm.weight", "output_norm.weight"),
    ("head", "kernel"): ("lm_head.weight", "output.weight"),
}
LAYER_NAMES = {
    ("attention_norm",): ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("attention", "q"): ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("attention", "k"): ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("attention", "v"): ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("attention", "o"): ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("attention", "q_norm"): ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    ("attention", "k_norm"): ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    ("mlp_norm",): ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("mlp", "gate"): ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("mlp", "up"): ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("mlp", "down"): ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
}
STYLES = {"hf": 0, "gguf": 1}


def path_keys(path) -> tuple:
    """A tree path as plain strings and integers."""
    return tuple(key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key for key in path)


def weight_names(keys: tuple, num_layers: int, style: str) -> list[str]:
    """The file's names of one parameter: one, or L of them for a parameter stacked over the layers.

    Args:
      keys: path of the parameter in the tree of `agents.transformer`.
      style: "hf" or "gguf".
    """
    if keys[0] != "layers":
        return [MODEL_NAMES[keys][STYLES[style]]]
    layers, rest = ([keys[1]], keys[2:]) if isinstance(keys[1], int) else (range(num_layers), keys[1:])
    suffix = ".bias" if rest[-1] == "bias" else ".weight"
    return [LAYER_NAMES[rest[:-1]][STYLES[style]].format(i) + suffix for i in layers]


def input_axes(keys: tuple) -> int:
    """How many leading axes of a kernel (of one layer) are inputs; 0 for anything that is not a kernel."""
    return 0 if keys[-1] != "kernel" else 2 if keys[-2] == "o" else 1


def stored_shape(keys: tuple, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the file of a parameter that has `shape` here, without a layer axis: `[out, in]`, flat for a bias."""
    inputs = input_axes(keys)
    if inputs:
        return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
    return (int(np.prod(shape)),) if keys[-1] == "bias" else tuple(shape)


def from_stored(keys: tuple, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a file in our orientation; a view, nothing is read or copied."""
    return (stored.T if input_axes(keys) else stored).reshape(shape)


def to_stored(keys: tuple, value: np.ndarray) -> np.ndarray:
    """The inverse of `from_stored`."""
    shape = stored_shape(keys, value.shape)
    return value.reshape(shape[::-1]).T if input_axes(keys) else value.reshape(shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; FileNotFoundError or ValueError that name it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views of the mapped file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a safetensors file, a dtype that is no float, or a truncated file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path}: truncated safetensors file, its header does not end within {size} bytes")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError):
            header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file, its header is not a JSON object")
    data = np.memmap(path, np.uint8, "r")[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            code, (begin, end), shape = entry["dtype"], entry["data_offsets"], tuple(entry["shape"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}: tensor {name} needs dtype, shape and data_offsets, got {entry}") from None
        if code not in DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {code}, supported are {', '.join(DTYPES)}")
        dtype = DTYPES[code]
        if end > data.size:
            raise ValueError(f"{path}: truncated safetensors file, tensor {name} ends at byte {end} of {data.size}")
        if end - begin != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{path}: tensor {name} of shape {shape} does not fill its {end - begin} bytes")
        tensors[name] = data[begin:end].view(dtype).reshape(shape)
    return tensors


def write_safetensors(path: Path, tensors: Iterable[tuple[str, tuple[int, ...], Callable]], dtype) -> None:
    """Writes a safetensors file one tensor at a time.

    Args:
      path: the file.
      tensors: (name, shape, read) with `read()` the array, called once and in order.
      dtype: of all tensors: float32, float16 or bfloat16.
    """
    dtype = np.dtype(dtype)
    code = next((code for code, known in DTYPES.items() if known == dtype), None)
    if code is None:
        raise ValueError(f"dtype must be one of {', '.join(str(known) for known in DTYPES.values())}, got {dtype}")
    tensors, header, offset = list(tensors), {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors:
        end = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, read in tensors:
            file.write(np.ascontiguousarray(read(), dtype).tobytes())


def read_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint directory, in one file or in shards; the single file wins where both exist.

    Raises:
      FileNotFoundError: no weights, or a shard of the index is missing.
      ValueError: a broken file, or shards whose tensors are not those of the index.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return read_safetensors(single)
    if not index.is_file():
        raise FileNotFoundError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map", {})
    tensors = {}
    for file in sorted(set(weight_map.values())):
        for name, value in read_safetensors(directory / file).items():
            if weight_map.get(name) != file:
                raise ValueError(
                    f"{directory / file}: tensor {name} is not where the index says, {weight_map.get(name)}"
                )
            tensors[name] = value
    for name, file in weight_map.items():
        if name not in tensors:
            raise ValueError(f"{directory / file}: tensor {name} of the index is missing")
    return tensors


def parse_rope(published: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of a configuration in either layout; ValueError for scalings that are not supported."""
    rope = published.get("rope_scaling") or published.get("rope_parameters") or {}
    theta = rope.get("rope_theta", published.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if published.get("rope_interleaved"):
        raise ValueError("rope_interleaved true is not supported")
    if rope.get("partial_rotary_factor", published.get("partial_rotary_factor", 1.0)) not in (1.0, None):
        raise ValueError(f"partial_rotary_factor must be 1, got {rope or published}")
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        length = rope.get("original_max_position_embeddings") or published.get("max_position_embeddings", 2048)
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return float(theta), RopeScaling("llama3", float(rope["factor"]), low, high, int(length))
    raise ValueError(f'rope type must be "default", "linear" or "llama3", got {kind!r}')


def config_from_hf(published: dict[str, Any]) -> TransformerConfig:
    """The configuration that a `config.json` describes.

    Raises:
      ValueError: another architecture, activation, rope scaling or attention pattern than the three families have.
    """
    family = published.get("model_type")
    architectures = published.get("architectures") or [FAMILIES.get(family)]
    if family not in FAMILIES or architectures[0] != FAMILIES[family]:
        known = ", ".join(FAMILIES.values())
        raise ValueError(f"unknown architecture {family!r} {published.get('architectures')}, supported are {known}")
    if published.get("hidden_act", "silu") != "silu":
        raise ValueError(f'hidden_act must be "silu", got {published["hidden_act"]!r}')
    others = set(published.get("layer_types") or ()) - {"full_attention"}
    if others or published.get("use_sliding_window"):
        raise ValueError(f"only full attention is supported, got {', '.join(others) or 'use_sliding_window'}")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        if not isinstance(published[name], int):
            raise ValueError(f"{name} must be an integer, got {published[name]!r}")
    theta, scaling = parse_rope(published)
    bias = True if family == "qwen2" else bool(published.get("attention_bias", False))
    heads = published["num_attention_heads"]
    return TransformerConfig(
        vocab_size=published["vocab_size"],
        width=published["hidden_size"],
        num_layers=published["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=published.get("num_key_value_heads") or heads,
        head_dim=published.get("head_dim") or (128 if family == "qwen3" else published["hidden_size"] // heads),
        mlp_width=published["intermediate_size"],
        norm_eps=published.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        output_bias=bias and family != "qwen2",
        mlp_bias=bool(published.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        tied_head=bool(published.get("tie_word_embeddings", False)),
        max_positions=published.get("max_position_embeddings"),
    )


def config_to_hf(config: TransformerConfig, dtype) -> dict[str, Any]:
    """The `config.json` of a configuration, in the published layout.

    Raises:
      ValueError: a combination of biases and norms, or rope divisors, that none of the families can express.
    """
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias and not config.output_bias else "llama"
    biases = (config.qkv_bias, config.output_bias, config.mlp_bias)
    allowed = {
        "llama": config.qkv_bias == config.output_bias,
        "qwen2": biases == (True, False, False),
        "qwen3": config.qkv_bias == config.output_bias and not config.mlp_bias,
    }
    if not allowed[family]:
        raise ValueError(f"no published family has qk_norm {config.qk_norm} with (qkv, output, mlp) biases {biases}")
    if config.rope_divisors is not None:
        raise ValueError("rope_divisors cannot be written to a config.json; use rope_scaling")
    published = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions or 2048,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": str(np.dtype(dtype)),
    }
    if family != "qwen2":
        published["attention_bias"] = config.qkv_bias
    if family == "llama":
        published["mlp_bias"] = config.mlp_bias
    scaling = config.rope_scaling
    if scaling is not None:
        published["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            published["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    return published


def config_from_gguf(metadata: dict[str, Any], tensors) -> TransformerConfig:
    """The configuration of a GGUF file, from its metadata and the names and shapes of its tensors.

    Raises:
      ValueError: another architecture, or a missing entry.
    """
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ValueError(f"unknown architecture {family!r} in the GGUF file, supported are {', '.join(FAMILIES)}")

    def entry(name, default=None):
        value = metadata.get(f"{family}.{name}", default)
        if value is None:
            raise ValueError(f"the GGUF file has no metadata entry {family}.{name}")
        return value

    # float32 in the file: its shortest decimal form is the number that was meant (1e-05, not 9.9999997e-06).
    number = lambda value: float(str(np.float32(value)))  # noqa: E731
    if entry("rope.scaling.type", "none") not in ("none", "linear"):
        raise ValueError(f"rope scaling {entry('rope.scaling.type')!r} of the GGUF file is not supported")
    linear = entry("rope.scaling.factor", 1.0) if entry("rope.scaling.type", "none") == "linear" else 1.0
    heads, width = entry("attention.head_count"), entry("embedding_length")
    head_dim = entry("attention.key_length", entry("rope.dimension_count", width // heads))
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = entry("vocab_size", tensors["token_embd.weight"].shape[0] if tokens is None else len(tokens))
    return TransformerConfig(
        vocab_size=vocab,
        width=width,
        num_layers=entry("block_count"),
        num_heads=heads,
        num_kv_heads=entry("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_width=entry("feed_forward_length"),
        norm_eps=number(entry("attention.layer_norm_rms_epsilon")),
        rope_theta=number(entry("rope.freq_base", 10_000.0)),
        rope_scaling=None if linear == 1.0 else RopeScaling("linear", number(linear)),
        qkv_bias=family == "qwen2" or "blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=family == "qwen3",
        tied_head="output.weight" not in tensors,
        max_positions=entry("context_length"),
    )


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order of q and k in GGUF files of architecture llama: rotation partners side by side.

    Args:
      rows: `[n d]` or `[n d, in]` with n heads; file row `h d + 2 j + c` is row `h d + c d/2 + j` of the result.
    """
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
