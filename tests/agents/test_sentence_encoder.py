"""The sentence encoder against transformers: a tiny random BERT to the last digit, and the real all-MiniLM-L6-v2."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rollax.agents.sentence_encoder import (
    SentenceEncoder,
    encoder_init,
    encoder_params,
    encoder_path,
    encoder_states,
    load_sentence_encoder,
    mean_pool,
    sentence_embeddings,
    tokenise,
)
from rollax.tests.support import GOLDEN

TINY = GOLDEN / "bert_tiny"
run = jax.jit(sentence_embeddings)


@pytest.fixture(scope="module")
def tiny():
    return load_sentence_encoder(TINY)


@pytest.fixture(scope="module")
def expected():
    with np.load(TINY / "expected.npz") as file:
        return dict(file)


def test_the_tiny_model(tiny, expected):
    ids, mask = expected["ids"], expected["mask"]
    assert tiny.max_length == 16 and tiny.norm_eps == 1e-12 and tiny.tokenizer is None
    states = jax.jit(encoder_states)(tiny.params, ids, mask)
    assert states.dtype == jnp.float32
    np.testing.assert_allclose(np.where(mask[..., None], states, 0), expected["states"], atol=2e-5)
    with jax.enable_x64(True):
        params = load_sentence_encoder(TINY, dtype="float64").params
        states = jax.jit(encoder_states)(params, ids, mask)
        np.testing.assert_allclose(np.where(mask[..., None], states, 0), expected["states"], atol=1e-10)
        np.testing.assert_allclose(mean_pool(states, mask), expected["embeddings"], atol=1e-10)


def test_padding_does_not_matter(tiny, expected):
    ids, mask = expected["ids"], expected["mask"]
    before = run(tiny.params, ids, mask)
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(run(tiny.params, np.where(mask, ids, 63), mask), before)
    wider = run(tiny.params, *(np.pad(x, ((0, 0), (0, 3))) for x in (ids, mask)))
    np.testing.assert_allclose(wider, before, atol=1e-6)
    np.testing.assert_allclose(run(tiny.params, ids[1:2, :7], mask[1:2, :7]), before[1:2], atol=1e-6)
    empty = run(tiny.params, ids, np.zeros_like(mask))
    assert not empty.any()


def test_fresh_parameters_have_the_same_tree(tiny, expected):
    sizes = {"vocab_size": 64, "width": 24, "num_layers": 2, "num_heads": 4, "mlp_width": 40, "max_positions": 16}
    fresh = jax.jit(partial(encoder_init, **sizes))(jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, tiny.params)
    embeddings = run(fresh, expected["ids"], expected["mask"])
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert np.abs(embeddings[0] - embeddings[1]).max() > 0.01


def test_files_that_are_refused(tmp_path):
    tensors = load_file(TINY / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor embeddings.LayerNorm.bias is missing"):
        encoder_params({k: v for k, v in tensors.items() if k != "embeddings.LayerNorm.bias"}, 2, 4)
    with pytest.raises(ValueError, match=r"tensor encoder.layer.1.* has no place in the encoder"):
        encoder_params(tensors, 1, 4)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the width 24, got 5"):
        encoder_params(tensors, 2, 5)
    with pytest.raises(ValueError, match="unknown encoder 'other', packaged are minilm"):
        encoder_path("other")
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        load_sentence_encoder(tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file"):
        load_sentence_encoder(tmp_path)
    save_file(tensors | {"more": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: tensor more has no place in the encoder"):
        load_sentence_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file"):
        load_sentence_encoder(tmp_path)
    config = json.loads((TINY / "config.json").read_text())
    for change, message in (
        ({"model_type": "roberta"}, "model_type must be \"bert\", got 'roberta'"),
        ({"hidden_act": "relu"}, "hidden_act must be \"gelu\", got 'relu'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_sentence_encoder(tmp_path)


def test_bad_input(tiny):
    with pytest.raises(ValueError, match=r"ids and mask must be one \[B, T\], got \(2, 3\) and \(2, 4\)"):
        encoder_states(tiny.params, jnp.zeros((2, 3), int), jnp.ones((2, 4), bool))
    with pytest.raises(ValueError, match="ids: expected at most 16 tokens, got 17"):
        encoder_states(tiny.params, jnp.zeros((1, 17), int), jnp.ones((1, 17), bool))
    with pytest.raises(ValueError, match="encoder: expected one with a tokenizer"):
        tokenise(tiny, ["text"])


@pytest.fixture(scope="module")
def minilm():
    try:
        return load_sentence_encoder("minilm")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference():
    with np.load(GOLDEN / "minilm.npz") as file:
        return dict(file)


def test_minilm_against_transformers(minilm: SentenceEncoder, reference):
    texts = reference["texts"].tolist()
    ids, mask = tokenise(minilm, texts)
    assert ids.shape == (len(texts), 256) and minilm.max_length == 256
    np.testing.assert_array_equal(mask.sum(axis=1), reference["lengths"])
    np.testing.assert_array_equal(ids[mask], reference["ids"])
    assert "" in texts and mask.sum(axis=1).max() == 256  # [CLS] [SEP] alone, and one that is cut
    # Two compiled shapes, not one of 256 for all.
    short, long = mask[:, :64], mask[-1:]
    rows = np.flatnonzero(mask.sum(axis=1) <= 64)
    embeddings = run(minilm.params, ids[rows, :64], short[rows])
    np.testing.assert_allclose(embeddings, reference["embeddings"][rows], atol=2e-6)
    np.testing.assert_allclose(run(minilm.params, ids[-1:], long), reference["embeddings"][-1:], atol=2e-6)
    # Cosines of the reference run (transformers), to four digits.
    cosines = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(embeddings[:3] @ embeddings[:3].T, cosines, atol=6e-5)
    first = reference["lengths"][0]
    states = jax.jit(encoder_states)(minilm.params, ids[:1, :16], mask[:1, :16])
    np.testing.assert_allclose(states[0, :first], reference["states_first"], atol=2e-5)


def test_tokenise_lengths(minilm):
    ids, mask = tokenise(minilm, ["a b c", "a"])
    assert ids.shape == (2, 8) and ids.dtype == np.int32 and mask.sum(axis=1).tolist() == [5, 3]
    assert not ids[~mask].any()
    assert tokenise(minilm, ["a"], length=32)[0].shape == (1, 32)
    with pytest.raises(ValueError, match="length: expected at least 5, the longest text's tokens, got 4"):
        tokenise(minilm, ["a b c"], length=4)
    with pytest.raises(ValueError, match="texts: expected at least one, got none"):
        tokenise(minilm, [])
