"""Hugging Face directories: both layouts of configurations, one file or several, saving, and what is refused."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents.huggingface import config_from_hf, config_to_hf, read_safetensors, write_safetensors
from rollax.agents.pretrained import Pretrained, load_pretrained, packaged_path, save_pretrained
from rollax.agents.sharding import make_mesh, named_shardings
from rollax.agents.transformer import RopeScaling, TransformerConfig, transformer, unstack_layers

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"
FAMILIES = ("llama", "qwen2", "qwen3")


def published(family, file="config.json"):
    return json.loads((GOLDEN / family / file).read_text())


def copy_of(family, target):
    shutil.copytree(GOLDEN / family, target, ignore=shutil.ignore_patterns("expected*"))
    return target


def edit(path, change):
    """Rewrites a JSON file through a function of its content."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_are_one_configuration(family):
    config = config_from_hf(published(family))
    assert config == config_from_hf(published(family, "config_legacy.json"))
    assert hash(config) == hash(config_from_hf(published(family)))
    assert config.rope_theta == (1e5 if family == "llama" else 1e6)
    assert config.norm_eps == (1e-5 if family == "llama" else 1e-6)
    assert config.tied_head == (family != "qwen2") and config.qkv_bias == (family == "qwen2")
    assert config.qk_norm == (family == "qwen3") and not config.output_bias and not config.mlp_bias
    assert config_from_hf(config_to_hf(config, "float32")) == config


def test_what_a_configuration_may_leave_out():
    base = published("llama", "config_legacy.json")
    change = lambda **changes: config_from_hf({k: v for k, v in (base | changes).items() if v != "absent"})  # noqa: E731
    assert change(head_dim="absent").head_dim == change(head_dim=None).head_dim == 12
    assert change(head_dim=20).head_dim == 20
    assert change(num_key_value_heads=None).num_kv_heads == change(num_key_value_heads="absent").num_kv_heads == 4
    assert change(rms_norm_eps="absent").norm_eps == 1e-6
    assert change(rope_theta="absent").rope_theta == 1e4
    assert change(rope_scaling="absent").rope_scaling is None
    assert change(tie_word_embeddings="absent").tied_head is False
    assert change(attention_bias=True).qkv_bias and change(attention_bias=True).output_bias
    assert change(mlp_bias=True).mlp_bias
    assert change(sliding_window=4096, use_sliding_window=False) == change()
    assert change(rope_interleaved=False) == change()
    qwen = published("qwen3", "config_legacy.json")
    assert config_from_hf({k: v for k, v in qwen.items() if k != "head_dim"}).head_dim == 128


def test_rope_in_every_layout():
    base = published("llama", "config_legacy.json")
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    expected = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    for key in ("rope_type", "type"):
        assert config_from_hf(base | {"rope_scaling": numbers | {key: "llama3"}}).rope_scaling == expected
    newer = {k: v for k, v in base.items() if k not in ("rope_theta", "rope_scaling")}
    config = config_from_hf(newer | {"rope_parameters": numbers | {"rope_type": "llama3", "rope_theta": 5e5}})
    assert config.rope_scaling == expected and config.rope_theta == 5e5
    del numbers["original_max_position_embeddings"]
    fallback = config_from_hf(base | {"rope_scaling": numbers | {"rope_type": "llama3"}})
    assert fallback.rope_scaling.original_length == 512
    linear = config_from_hf(base | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)
    for parsed in (config, fallback, linear):
        assert config_from_hf(config_to_hf(parsed, "float32")) == parsed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "unknown architecture 'gemma2'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "unknown architecture 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act must be \"silu\", got 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type must be .* got 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type must be .* got 'dynamic'"),
        ({"rope_interleaved": True}, "rope_interleaved true is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "only full attention .* got sliding_attention"),
        ({"use_sliding_window": True}, "only full attention .* got use_sliding_window"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(published("llama", "config_legacy.json") | changes)


def test_one_file_and_several_hold_the_same(tmp_path):
    sharded = load_pretrained(GOLDEN / "qwen2")
    directory = copy_of("qwen2", tmp_path / "single")
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= read_safetensors(file)
        file.unlink()
    entries = [(name, x.shape, lambda x=x: x) for name, x in tensors.items()]
    write_safetensors(directory / "model.safetensors", entries, "float32")  # the index stays: the single file wins
    single = load_pretrained(directory)
    for a, b in zip(jax.tree.leaves(single.params), jax.tree.leaves(sharded.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_who_ends_a_text(tmp_path):
    assert load_pretrained(GOLDEN / "llama").stop_ids == (2,)
    directory = copy_of("llama", tmp_path / "x")
    edit(directory / "config.json", lambda c: c | {"eos_token_id": [2, 0], "pad_token_id": None, "bos_token_id": None})
    p = load_pretrained(directory)
    assert (p.stop_ids, p.bos_id, p.pad_id) == ((2, 0), None, None)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "pad_token_id": None}))
    assert load_pretrained(directory).stop_ids == (0, 5)
    edit(directory / "config.json", lambda c: c | {"eos_token_id": None})
    (directory / "generation_config.json").unlink()
    assert load_pretrained(directory).stop_ids == ()


def with_tensors(directory, change):
    """Rewrites `model.safetensors` through a function of a dict of arrays."""
    path = directory / "model.safetensors"
    tensors = change({name: np.array(value) for name, value in read_safetensors(path).items()})
    write_safetensors(path, [(name, x.shape, lambda x=x: x) for name, x in tensors.items()], "float32")
    return directory


def test_leftovers_that_are_tolerated(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6), "lm_head.weight": np.ones((320, 48))}
    directory = with_tensors(copy_of("llama", tmp_path / "x"), lambda t: t | extra)
    for a, b in zip(*(jax.tree.leaves(load_pretrained(d).params) for d in (directory, GOLDEN / "llama")), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_tensors_that_do_not_fit_are_named(scan_layers, tmp_path):
    name = "model.layers.2.self_attn.k_proj.weight"
    drop = lambda tensors: {k: v for k, v in tensors.items() if k != name}  # noqa: E731
    cases = [
        (drop, rf"tensor {name} of shape \(24, 48\) is missing"),
        (lambda t: t | {name: t[name].T}, rf"tensor {name} has shape \(48, 24\), expected \(24, 48\)"),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.zeros(48)},
            r"tensor model.layers.0.self_attn.q_proj.bias of shape \(48,\) has no place in this model",
        ),
        (
            lambda t: t | {"model.layers.3.input_layernorm.weight": np.zeros(48)},
            r"tensor model.layers.3.input_layernorm.weight of shape \(48,\) has no place in this model",
        ),
    ]
    for i, (change, message) in enumerate(cases):
        directory = with_tensors(copy_of("llama", tmp_path / str(i)), change)
        with pytest.raises(ValueError, match=message):
            load_pretrained(directory, scan_layers=scan_layers)


@pytest.mark.parametrize("shape", [None, {"data": 1}])
def test_weights_do_not_depend_on_the_file_afterwards(shape, tmp_path):
    directory = copy_of("llama", tmp_path / "x")
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    spaces = -end % 64  # aligned like this, the data could be used where it lies
    file.write_bytes((end - 8 + spaces).to_bytes(8, "little") + raw[8:end] + b" " * spaces + raw[end:])
    p = load_pretrained(directory, mesh=None if shape is None else make_mesh(shape))
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    for a, b in zip(*(jax.tree.leaves(q.params) for q in (p, load_pretrained(GOLDEN / "llama"))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_untied_model_needs_its_head(tmp_path):
    directory = copy_of("llama", tmp_path / "x")
    edit(directory / "config.json", lambda c: c | {"tie_word_embeddings": False})
    with pytest.raises(ValueError, match=r"tensor lm_head.weight of shape \(320, 48\) is missing"):
        load_pretrained(directory)


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or directory"):
        load_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty/config.json: no such file"):
        load_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"empty/config.json: not valid JSON"):
        load_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(published("llama")))
    with pytest.raises(FileNotFoundError, match=r"empty: no model.safetensors and no model.safetensors.index.json"):
        load_pretrained(tmp_path / "empty")

    directory = copy_of("llama", tmp_path / "cut")
    whole = (directory / "model.safetensors").read_bytes()
    for keep, message in (
        (5, "truncated safetensors file, its header does not end within 5 bytes"),
        (500, "truncated safetensors file, its header does not end within 500 bytes"),
        (len(whole) - 100, r"truncated safetensors file, tensor \S+ ends at byte"),
    ):
        (directory / "model.safetensors").write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=message):
            load_pretrained(directory)
    (directory / "model.safetensors").write_bytes(whole[:8] + b"x" + whole[9:])
    with pytest.raises(ValueError, match="not a safetensors file, its header is not a JSON object"):
        load_pretrained(directory)

    directory = copy_of("qwen2", tmp_path / "shards")
    index = directory / "model.safetensors.index.json"
    name, file = "model.norm.weight", json.loads(index.read_text())["weight_map"]["model.norm.weight"]
    original = index.read_text()
    edit(index, lambda c: c | {"weight_map": c["weight_map"] | {"model.ghost.weight": file}})
    with pytest.raises(ValueError, match=f"{file}: tensor model.ghost.weight of the index is missing"):
        load_pretrained(directory)
    index.write_text(original)
    edit(index, lambda c: c | {"weight_map": {k: v for k, v in c["weight_map"].items() if k != name}})
    with pytest.raises(ValueError, match=f"{file}: tensor {name} is not where the index says, None"):
        load_pretrained(directory)
    index.write_text(original)
    (directory / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: no such file"):
        load_pretrained(directory)


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    pytest.importorskip("tokenizers")
    directory = with_tensors(
        copy_of("llama", tmp_path / "x"),
        lambda t: t | {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:300]},
    )
    edit(directory / "config.json", lambda c: c | {"vocab_size": 300})
    with pytest.raises(ValueError, match="the tokenizer has 320 tokens, more than the model's 300"):
        load_pretrained(directory)


def test_packaged_models(monkeypatch):
    with pytest.raises(ValueError, match="unknown model 'gpt5', packaged are smollm2"):
        packaged_path("gpt5")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="the weights of smollm2 are not installed: run `make models`"):
        load_pretrained("smollm2")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("source", ["hf_tiny/qwen2", "gguf_tiny/llama.gguf"])
def test_straight_onto_a_mesh(source, scan_layers):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    alone = load_pretrained(GOLDEN.parent / source, scan_layers=scan_layers)
    p = load_pretrained(GOLDEN.parent / source, mesh=mesh, scan_layers=scan_layers, param_dtype="bfloat16")
    expected = named_shardings(p.model.axes, p.params, mesh)
    for a, b, place in zip(*map(jax.tree.leaves, (p.params, alone.params, expected)), strict=True):
        assert a.sharding == place and a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
    up = (p.params["layers"] if scan_layers else p.params["layers"][0])["mlp"]["up"]["kernel"]
    assert len({str(shard.index) for shard in up.addressable_shards}) == 4


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_is_equal(family, scan_layers, tmp_path):
    p = load_pretrained(GOLDEN / family, scan_layers=scan_layers)
    assert save_pretrained(tmp_path / "a" / "b", p) == tmp_path / "a" / "b"
    again = load_pretrained(tmp_path / "a" / "b", scan_layers=scan_layers)
    assert again.config == p.config
    assert (again.stop_ids, again.bos_id, again.pad_id) == (p.stop_ids, p.bos_id, p.pad_id)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(p.params), strict=True):
        np.testing.assert_array_equal(a, b)
    if p.tokenizer is not None:
        assert again.tokenizer.encode("The answer is 46.") == p.tokenizer.encode("The answer is 46.")
        assert again.tokenizer.chat_template == p.tokenizer.chat_template
    written = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert written["torch_dtype"] == "float32" and "rope_theta" in written and "rope_parameters" not in written
    original = {}
    for file in (GOLDEN / family).glob("*.safetensors"):
        original |= read_safetensors(file)
    stored = read_safetensors(tmp_path / "a" / "b" / "model.safetensors")
    assert sorted(stored) == sorted(original)
    for name, value in original.items():
        np.testing.assert_array_equal(stored[name], value)


def test_saved_from_scratch_in_bfloat16(tmp_path):
    config = TransformerConfig(17, width=16, num_layers=2, num_heads=2, max_positions=64)
    params = transformer(config).init(jax.random.key(0))
    save_pretrained(tmp_path / "x", Pretrained(None, config, params, None, (), None, None), dtype="bfloat16")
    again = load_pretrained(tmp_path / "x")
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))
    assert again.stop_ids == () and again.tokenizer is None


def test_a_broken_save_leaves_nothing_and_destroys_nothing(tmp_path, monkeypatch):
    p = load_pretrained(GOLDEN / "llama")
    target = save_pretrained(tmp_path / "x", p)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(FileExistsError, match="x exists; pass overwrite=True to replace it"):
        save_pretrained(target, p)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("rollax.agents.pretrained.save_tokenizer", fail)
    for directory in (target, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(directory, p, overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    monkeypatch.undo()
    doubled = p._replace(params=jax.tree.map(lambda x: 2 * x, p.params))
    save_pretrained(target, doubled, overwrite=True)
    np.testing.assert_array_equal(
        load_pretrained(target).params["embed"]["embedding"], doubled.params["embed"]["embedding"]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_an_overwrite_that_breaks_at_the_last_step_brings_the_old_one_back(tmp_path, monkeypatch):
    p = load_pretrained(GOLDEN / "llama")
    target = save_pretrained(tmp_path / "x", p)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    replace, calls = os.replace, []

    def second_fails(source, destination):
        calls.append(destination)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(target, p, overwrite=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_the_old_one_is_kept_where_it_cannot_come_back(tmp_path, monkeypatch):
    p = load_pretrained(GOLDEN / "llama")
    target = save_pretrained(tmp_path / "x", p)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    replace = os.replace

    def somebody_is_faster(source, destination):
        replace(source, destination)
        if Path(source) == target:
            target.mkdir()
            (target / "theirs").touch()

    monkeypatch.setattr("os.replace", somebody_is_faster)
    with pytest.raises(OSError, match="not empty"):
        save_pretrained(target, p, overwrite=True)
    (kept,) = tmp_path.glob(".x.*.replaced")
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
    assert [file.name for file in target.iterdir()] == ["theirs"] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("scanned", [True, False])
def test_both_forms_of_the_layers_are_saved(scanned, tmp_path):
    p = load_pretrained(GOLDEN / "llama", scan_layers=scanned)
    other = load_pretrained(GOLDEN / "llama", scan_layers=not scanned)
    save_pretrained(tmp_path / "x", p._replace(params=other.params))
    again = load_pretrained(tmp_path / "x", scan_layers=scanned)
    jax.tree.map(np.testing.assert_array_equal, again.params, p.params)
    cut = p.params | {"norm": {"scale": p.params["norm"]["scale"][:-1]}}
    with pytest.raises(ValueError, match=r"params: norm.scale has shape \(47,\), expected shape \(48,\)"):
        save_pretrained(tmp_path / "y", p._replace(params=cut))
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("scanned", [True, False])
def test_parameters_that_do_not_fit_the_configuration_are_named(scanned, tmp_path):
    p = load_pretrained(GOLDEN / "llama", scan_layers=scanned)
    stacked = load_pretrained(GOLDEN / "llama", scan_layers=True).params
    layers = unstack_layers(stacked)["layers"]
    cut = lambda tree: jax.tree.map(lambda x: x[:2], tree)  # noqa: E731
    kernel = "attention.k.kernel has"
    for changes, message in (
        ({"layers": layers[:2]}, rf"layers.2.{kernel} no entry, expected shape \(48, 2, 12\)"),
        ({"layers": (*layers, layers[0])}, rf"layers.3.{kernel} shape \(48, 2, 12\), expected no entry"),
        ({"layers": (*layers[:2], cut(layers[2]))}, rf"layers.2.{kernel} shape \(2, 2, 12\), expected shape \(48, 2"),
        ({"layers": cut(stacked["layers"])}, rf"layers.{kernel} shape \(2, 48, 2, 12\), expected shape \(3, 48, 2"),
        ({"norm": {}}, r"norm.scale has no entry, expected shape \(48,\)"),
        ({"head": {"kernel": jnp.ones((48, 320))}}, r"head.kernel has shape \(48, 320\), expected no entry"),
    ):
        with pytest.raises(ValueError, match=f"params: {message}"):
            save_pretrained(tmp_path / "x", p._replace(params=p.params | changes))
    assert not list(tmp_path.iterdir())


def test_files_of_another_form_are_named(tmp_path):
    def broken(name, text, error):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        copy_of("llama", directory)
        (directory / name).write_text(text)
        with pytest.raises(ValueError, match=error):
            load_pretrained(directory)

    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    broken("config.json", "[]", r"config.json: expected a JSON object, got list")
    for key in ("hidden_size", "vocab_size", "num_attention_heads"):
        without = {name: value for name, value in config.items() if name != key}
        broken("config.json", json.dumps(without), rf"config.json: the entry '{key}' is missing")
    broken("config.json", json.dumps(config | {"hidden_size": None}), r"hidden_size must be an integer, got None")
    plain = {name: value for name, value in config.items() if name != "rope_parameters"}
    linear = json.dumps(plain | {"rope_scaling": {"type": "linear"}})
    broken("config.json", linear, r"config.json: the entry 'factor' is missing")
    for entry in ("[]", "{}", '{"dtype": "F32", "shape": [1], "data_offsets": [0]}'):
        header = f'{{"a": {entry}}}'
        text = len(header).to_bytes(8, "little").decode() + header
        broken("model.safetensors", text, "model.safetensors: tensor a needs dtype, shape and data_offsets, got")
    (tmp_path / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ValueError, match=r"x.safetensors: not a safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")


def test_models_that_no_family_describes(tmp_path):
    config = TransformerConfig(17, width=16, num_heads=2)
    for changes, message in (
        ({"qk_norm": True, "qkv_bias": True}, "no published family has qk_norm True with"),
        ({"output_bias": True}, "no published family has qk_norm False with"),
        ({"rope_divisors": (1.0,) * 4}, "rope_divisors cannot be written to a config.json"),
    ):
        bad = dataclasses.replace(config, **changes)
        with pytest.raises(ValueError, match=message):
            save_pretrained(tmp_path / "x", Pretrained(None, bad, {}, None, (), None, None))
    assert not list(tmp_path.iterdir())


def test_the_safetensors_library_agrees(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
    safetensors.save_file(values, tmp_path / "x.safetensors")
    for name, value in read_safetensors(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(value, values[name])
    entries = [(name, x.shape, lambda x=x: x) for name, x in values.items()]
    write_safetensors(tmp_path / "y.safetensors", entries, "float32")
    for name, value in safetensors.load_file(tmp_path / "y.safetensors").items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, values[name])
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got int32"):
        write_safetensors(tmp_path / "z.safetensors", entries, "int32")
    safetensors.save_file({"i": np.arange(3)}, tmp_path / "i.safetensors")
    with pytest.raises(ValueError, match="tensor i has dtype I64, supported are F64, F32, F16, BF16"):
        read_safetensors(tmp_path / "i.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_write(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    p = load_pretrained(GOLDEN / family, scan_layers=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save_pretrained(tmp_path / "x", p)).eval()
    with np.load(GOLDEN / family / "expected.npz") as file:
        ids = file["input_ids"][:1, : file["lengths"][0]]
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    ours, _ = jax.jit(p.model.apply)(unstack_layers(p.params), ids, positions)
    np.testing.assert_allclose(ours, expected, atol=5e-5, rtol=0)
    if p.tokenizer is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
        text, chat = "x<|im_end|>\n 12  <tool_call>", [{"role": "user", "content": "What is 12 + 34?"}]
        assert tokenizer(text)["input_ids"] == p.tokenizer.encode(text)
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
            p.tokenizer.render_chat(chat)
        )
        assert tokenizer.eos_token_id == p.stop_ids[0] and tokenizer.pad_token_id == p.pad_id
