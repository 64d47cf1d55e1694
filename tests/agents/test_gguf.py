"""The GGUF reader: block formats bit by bit, golden files, and files that are broken."""

import dataclasses
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents.gguf import dequantise, read_gguf
from rollax.agents.huggingface import path_keys, to_stored, unpermute, weight_names
from rollax.agents.pretrained import load_pretrained
from rollax.agents.transformer import RopeScaling, TransformerConfig, rope_frequencies, transformer, unstack_layers

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf_tiny"
FAMILIES = ("llama", "qwen2", "qwen3")


def text(value):
    value = value.encode()
    return struct.pack("<Q", len(value)) + value


def write_gguf(path, entries=(), tensors=(), *, magic=b"GGUF", version=3, alignment=32):
    """A GGUF file from (key, type, payload) and (name, dims fastest first, type, bytes)."""
    if alignment != 32:
        entries = [*entries, ("general.alignment", 4, struct.pack("<I", alignment))]
    head = magic + struct.pack("<IQQ", version, len(tensors), len(entries))
    head += b"".join(text(key) + struct.pack("<I", kind) + payload for key, kind, payload in entries)
    offset, data = 0, b""
    for name, dims, kind, payload in tensors:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        data += payload + bytes(-len(payload) % alignment)
        offset = len(data)
    path.write_bytes(head + bytes(-len(head) % alignment) + data)
    return path


def quantised(kind, rng):
    """One block of 32 random values: (type code, bytes, float32 values computed one by one)."""
    d, m = (rng.normal(size=2) * 0.1).astype(np.float16)
    bits = rng.integers(0, 32 if "5" in kind else 16, 32)
    if kind == "Q8_0":
        q = rng.integers(-128, 128, 32).astype(np.int8)
        return 8, d.tobytes() + q.tobytes(), [np.float32(d) * np.float32(x) for x in q]
    packed = bytes(int(bits[j] & 15) | int(bits[j + 16] & 15) << 4 for j in range(16))
    high = struct.pack("<I", sum(int(bits[j] >> 4) << j for j in range(32))) if "5" in kind else b""
    if kind.endswith("_0"):
        code, zero = {"Q4_0": (2, 8), "Q5_0": (6, 16)}[kind]
        return code, d.tobytes() + high + packed, [np.float32(d) * np.float32(x - zero) for x in bits]
    code = {"Q4_1": 3, "Q5_1": 7}[kind]
    values = [np.float32(d) * np.float32(x) + np.float32(m) for x in bits]
    return code, d.tobytes() + m.tobytes() + high + packed, values


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_block_formats(kind, tmp_path):
    rng = np.random.default_rng(0)
    blocks = [quantised(kind, rng) for _ in range(6)]
    payload = b"".join(block for _, block, _ in blocks)
    file = read_gguf(write_gguf(tmp_path / "x.gguf", (), [("w", (64, 3), blocks[0][0], payload)]))
    expected = np.array([values for _, _, values in blocks], np.float32).reshape(3, 64)
    assert file.tensors["w"].kind == kind
    np.testing.assert_array_equal(dequantise(file, "w"), expected)


def test_metadata_of_every_type(tmp_path):
    numbers = {0: ("B", 200), 1: ("b", -7), 2: ("H", 60000), 3: ("h", -300), 4: ("I", 4000000000), 5: ("i", -70000)}
    numbers |= {6: ("f", 0.5), 7: ("?", True), 10: ("Q", 2**60), 11: ("q", -(2**60)), 12: ("d", 0.1)}
    entries = [(f"n{kind}", kind, struct.pack("<" + code, value)) for kind, (code, value) in numbers.items()]
    entries += [
        ("s", 8, text("grüße")),
        ("strings", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
        ("floats", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 4)),
        ("nested", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ2i", 5, 2, 8, 9)),
    ]
    metadata = read_gguf(write_gguf(tmp_path / "x.gguf", entries)).metadata
    assert {kind: metadata[f"n{kind}"] for kind in numbers} == {kind: value for kind, (_, value) in numbers.items()}
    assert metadata["s"] == "grüße" and metadata["strings"] == ["a", ""]
    np.testing.assert_array_equal(metadata["floats"], [1, 2, 4])
    np.testing.assert_array_equal(metadata["nested"][0], [8, 9])


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_alignment(alignment, tmp_path):
    values = {"a": np.float32([1.5, -2.0, 3.0]), "b": np.float32([[4.0], [5.0]])}
    tensors = [(name, x.shape[::-1], 0, x.tobytes()) for name, x in values.items()]
    file = read_gguf(write_gguf(tmp_path / "x.gguf", (), tensors, alignment=alignment))
    for name, value in values.items():
        np.testing.assert_array_equal(dequantise(file, name), value)


def test_unpermute_row_by_row():
    heads, d, width = 3, 8, 5
    stored = np.arange(heads * d * width).reshape(heads * d, width)
    for rows in (stored, stored[:, 0]):
        result = unpermute(rows, heads)
        for h in range(heads):
            for c in range(2):
                for j in range(d // 2):
                    np.testing.assert_array_equal(result[h * d + c * d // 2 + j], rows[h * d + 2 * j + c])


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_tensors(family):
    with np.load(GOLDEN / f"{family}.npz") as file:
        expected = dict(file)
    p = load_pretrained(GOLDEN / f"{family}.gguf")
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(p.params)[0]:
        (name,) = weight_names(path_keys(path), p.config.num_layers, "hf")
        tensors[name] = to_stored(path_keys(path), np.asarray(leaf))
    assert sorted(tensors) == sorted(expected["weight_names"].tolist())
    for i, name in enumerate(expected["weight_names"].tolist()):
        value = tensors[name]
        assert value.shape == tuple(x for x in expected["weight_shapes"][i] if x)
        np.testing.assert_allclose(value.sum(dtype=np.float64), expected["weight_sum"][i], atol=1e-9, err_msg=name)
        np.testing.assert_allclose(np.abs(value).sum(dtype=np.float64), expected["weight_abs_sum"][i], rtol=1e-12)
        np.testing.assert_array_equal(value.ravel()[:8], expected["weight_head"][i], err_msg=name)
        second = value[1, :8] if value.ndim == 2 else value[8:16]
        np.testing.assert_array_equal(second, expected["weight_row1_head"][i], err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_logits_and_greedy(family):
    with np.load(GOLDEN / f"{family}.npz") as file:
        expected = dict(file)
    p = load_pretrained(GOLDEN / f"{family}.gguf")
    ids = expected["input_ids"]
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    apply = jax.jit(p.model.apply)
    np.testing.assert_allclose(apply(p.params, ids, positions)[0], expected["logits"], atol=5e-5, rtol=0)
    length = int(expected["greedy_prompt_len"])
    logits, cache = apply(p.params, ids[:1, :length], positions[:1, :length], p.model.init_cache(1, length + 12))
    chosen = []
    for i in range(12):
        chosen.append(int(jnp.argmax(logits[0, -1])))
        step = jnp.asarray([[chosen[-1]]], jnp.int32), jnp.asarray([[length + i]], jnp.int32)
        logits, cache = apply(p.params, *step, cache)
    assert chosen == expected["greedy_ids"].tolist()


def test_only_llama_is_permuted():
    """Forgetting the permutation, or doing it where it does not belong, is far outside the tolerance."""
    for family in ("llama", "qwen2"):
        with np.load(GOLDEN / f"{family}.npz") as file:
            ids, logits = file["input_ids"], file["logits"]
        p = load_pretrained(GOLDEN / f"{family}.gguf")
        positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
        H, K = p.config.num_heads, p.config.kv_heads
        wrong = jax.tree.map(np.asarray, p.params)
        for layer in wrong["layers"]:
            for kind, heads in (("q", H), ("k", K)):
                for part, value in layer["attention"][kind].items():
                    stored = to_stored((kind, part), value)
                    order = unpermute(np.arange(len(stored)), heads)
                    order = np.argsort(order) if family == "llama" else order
                    moved = stored[order]
                    layer["attention"][kind][part] = (moved.T if moved.ndim == 2 else moved).reshape(value.shape)
        moved = np.abs(jax.jit(p.model.apply)(wrong, ids, positions)[0] - logits).max()
        assert moved > 1, (family, moved)


def small_llama(path, *, drop=(), extra=()):
    """A float32 GGUF file of a fresh llama with biases and llama3 frequencies; gives (config, params)."""
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    biases = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
    config = TransformerConfig(13, 16, 2, 2, 1, mlp_width=24, norm_eps=1e-5, rope_theta=5e5, max_positions=99, **biases)
    init, draw = transformer(config).init, jax.random.normal
    disturbed = lambda key: jax.tree.map(lambda x: x + 0.1 * draw(jax.random.key(1), x.shape), init(key))  # noqa: E731
    params = jax.jit(disturbed)(jax.random.key(0))
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    divisors = (rope_frequencies(config) / rope_frequencies(scaled)).astype(np.float32)
    values = {"rope_freqs.weight": divisors}
    for place, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        (name,) = weight_names(path_keys(place), 2, "gguf")
        value = to_stored(path_keys(place), np.asarray(leaf))
        if "attn_q" in name or "attn_k" in name:
            heads = 2 if "attn_q" in name else 1
            value = value[np.argsort(unpermute(np.arange(len(value)), heads))]
        values[name] = np.ascontiguousarray(value)
    values = {name: value for name, value in values.items() if name not in drop} | dict(extra)
    numbers = {"embedding_length": 16, "block_count": 2, "feed_forward_length": 24, "context_length": 99}
    numbers |= {"attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 13}
    entries = [("general.architecture", 8, text("llama"))]
    entries += [(f"llama.{key}", 4, struct.pack("<I", value)) for key, value in numbers.items()]
    entries += [("llama.rope.freq_base", 6, struct.pack("<f", 5e5))]
    entries += [("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))]
    write_gguf(path, entries, [(name, x.shape[::-1], 0, x.tobytes()) for name, x in values.items()])
    return scaled, params


@pytest.mark.parametrize("scan_layers", [False, True])
def test_stored_rope_divisors_and_biases(scan_layers, tmp_path):
    config, params = small_llama(tmp_path / "x.gguf")
    p = load_pretrained(tmp_path / "x.gguf", scan_layers=scan_layers)
    assert p.tokenizer is None and p.stop_ids == ()
    same = {"rope_scaling": config.rope_scaling, "rope_divisors": None, "scan_layers": None, "head_dim": None}
    assert dataclasses.replace(p.config, **same) == config
    assert p.config.norm_eps == 1e-5 and p.config.rope_theta == 5e5  # the decimal numbers, not their float32
    for a, b in zip(jax.tree.leaves(unstack_layers(p.params)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    ids, positions = jnp.asarray([[1, 2, 3, 4]]), jnp.asarray([[0, 40, 80, 200]])
    logits = jax.jit(p.model.apply)(p.params, ids, positions)[0]
    expected = jax.jit(transformer(config).apply)(params, ids, positions)[0]
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    plain = dataclasses.replace(config, rope_scaling=None)
    assert np.abs(jax.jit(transformer(plain).apply)(params, ids, positions)[0] - expected).max() > 0.01


def test_missing_extra_and_misshapen_tensors(tmp_path):
    path = tmp_path / "x.gguf"
    small_llama(path, drop=["blk.1.attn_v.bias"])
    with pytest.raises(ValueError, match=r"x.gguf: tensor blk.1.attn_v.bias of shape \(8,\) is missing"):
        load_pretrained(path)
    small_llama(path, extra={"blk.0.attn_sinks.weight": np.zeros(2, np.float32)}.items())
    with pytest.raises(ValueError, match=r"tensor blk.0.attn_sinks.weight of shape \(2,\) has no place in this model"):
        load_pretrained(path)
    small_llama(path, extra={"blk.1.ffn_up.weight": np.zeros((16, 24), np.float32)}.items())
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight has shape \(16, 24\), expected \(24, 16\)"):
        load_pretrained(path)


@pytest.mark.parametrize("keep", [0, 3, 20, 60, 3000])
def test_truncated_file(keep, tmp_path):
    whole = (GOLDEN / "llama.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"cut.gguf: truncated GGUF file, its header does not end within"):
        read_gguf(path)
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"cut.gguf: truncated GGUF file, tensor output_norm.weight ends at byte"):
        load_pretrained(path)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(FileNotFoundError, match=r"x.gguf: no such GGUF file"):
        read_gguf(path)
    with pytest.raises(ValueError, match=r"not a GGUF file, it starts with b'GGML'"):
        read_gguf(write_gguf(path, magic=b"GGML"))
    with pytest.raises(ValueError, match="GGUF version 2 or 3 expected, got 1"):
        read_gguf(write_gguf(path, version=1))
    with pytest.raises(ValueError, match="tensor w has GGUF type 12, supported are F32, F16, Q4_0"):
        read_gguf(write_gguf(path, (), [("w", (256,), 12, bytes(144))]))
    with pytest.raises(ValueError, match=r"rows of tensor w \(33,\) are not whole Q8_0 blocks of 32"):
        read_gguf(write_gguf(path, (), [("w", (33,), 8, bytes(68))]))
    with pytest.raises(ValueError, match="unknown architecture 'mamba' in the GGUF file, supported are llama, qwen2"):
        load_pretrained(write_gguf(path, [("general.architecture", 8, text("mamba"))]))
    with pytest.raises(ValueError, match=r"the GGUF file has no metadata entry llama.attention.head_count"):
        load_pretrained(write_gguf(path, [("general.architecture", 8, text("llama"))]))
