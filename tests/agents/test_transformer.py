"""The forward pass against arrays computed with transformers 5.23 and in true float64, and its own invariances."""

import dataclasses
import functools
import json
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.agents.huggingface import path_keys, to_stored, weight_names
from rollax.agents.language_model import repeat_rows, token_log_probs
from rollax.agents.pretrained import load_pretrained
from rollax.agents.transformer import (
    RopeScaling,
    TransformerConfig,
    rope_frequencies,
    rotary_angles,
    transformer,
    unstack_layers,
)
from rollax.tests.support import compiled

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_tiny"
FAMILIES = ("llama", "qwen2", "qwen3")
ATOL = 5e-5  # of logits with standard deviation 2.2; the smallest fault below moves them by 2.7e-4
module = import_module("rollax.agents.transformer")


@functools.cache
def golden(family):
    with np.load(GOLDEN / family / "expected.npz") as file:
        return dict(file)


@functools.cache
def loaded(family):
    return load_pretrained(GOLDEN / family)


@functools.cache
def jitted(config):
    return jax.jit(transformer(config).apply)


def positions_of(mask):
    """0, 1, ... over the real tokens and -1 at padding."""
    mask = np.asarray(mask, bool)
    return np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32)


def logits_of(family, ids, positions, params=None):
    p = loaded(family)
    return np.asarray(jitted(p.config)(p.params if params is None else params, ids, positions)[0])


@functools.cache
def baseline(family):
    expected = golden(family)
    return logits_of(family, expected["input_ids"], positions_of(expected["attention_mask"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    expected = golden(family)
    mask = expected["attention_mask"].astype(bool)
    np.testing.assert_allclose(baseline(family)[mask], expected["logits"][mask], atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs(family):
    expected, p = golden(family), loaded(family)
    ids, mask = expected["input_ids"], expected["attention_mask"].astype(bool)
    score = jax.jit(functools.partial(token_log_probs, p.model, chunk=8))
    log_prob, entropy = score(p.params, ids[:, :-1], positions_of(mask)[:, :-1], ids[:, 1:])
    real = mask[:, 1:]
    np.testing.assert_allclose(np.where(real, log_prob, 0), expected["log_probs"], atol=ATOL, rtol=0)
    logits = expected["logits_f64"][:, :-1]
    q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(entropy[real], -(np.exp(q) * q).sum(-1)[real], atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states(family):
    expected, p = golden(family), loaded(family)
    states, scale = expected["hidden_states"], np.asarray(p.params["norm"]["scale"])
    for layers in range(1, p.config.num_layers + 1):
        model = transformer(dataclasses.replace(p.config, num_layers=layers))
        params = p.params | {"layers": p.params["layers"][:layers]}
        hidden, _ = jax.jit(model.hidden)(
            params, expected["input_ids"][:1], positions_of(expected["attention_mask"])[:1]
        )
        state = states[layers]
        if layers < p.config.num_layers:  # the golden array has them before the final norm, which hidden includes
            state = state / np.sqrt((state**2).mean(-1, keepdims=True) + p.config.norm_eps) * scale
        length = expected["lengths"][0]
        np.testing.assert_allclose(hidden[0, :length], state[:length], atol=ATOL, rtol=0)
    np.testing.assert_array_equal(states[0], np.asarray(p.params["embed"]["embedding"])[expected["input_ids"][0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding(family):
    expected = golden(family)
    mask = expected["left_attention_mask"]
    assert (positions_of(mask)[mask == 1] == expected["left_position_ids"][mask == 1]).all()
    logits = logits_of(family, expected["left_input_ids"], positions_of(mask))
    np.testing.assert_allclose(logits[:, -1], expected["left_last_logits"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_far_positions(family):
    expected = golden(family)
    logits = logits_of(family, expected["input_ids"][:1], expected["jump_position_ids"])
    np.testing.assert_allclose(logits, expected["jump_logits"], atol=ATOL, rtol=0)


# qwen2 has biases and a head of its own, qwen3 norms of queries and keys.
@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), *FAMILIES[1:]])
def test_float64_to_ten_digits(family):
    expected = golden(family)
    with jax.enable_x64(True):
        p = load_pretrained(GOLDEN / family, dtype="float64", param_dtype="float64")
        ids, mask = expected["input_ids"], expected["attention_mask"].astype(bool)
        positions = positions_of(mask)
        apply = jax.jit(p.model.apply)
        np.testing.assert_allclose(apply(p.params, ids, positions)[0][mask], expected["logits_f64"][mask], atol=1e-10)
        far, _ = apply(p.params, ids[:1], expected["jump_position_ids"])
        np.testing.assert_allclose(far, expected["jump_logits_f64"], atol=1e-10)
        real = jnp.asarray(mask[:, 1:])

        def nll(params):
            log_prob, _ = token_log_probs(p.model, params, ids[:, :-1], positions[:, :-1], ids[:, 1:], chunk=16)
            return -jnp.sum(jnp.where(real, log_prob, 0)) / real.sum(), log_prob

        (value, log_prob), gradients = jax.jit(jax.value_and_grad(nll, has_aux=True))(p.params)
        np.testing.assert_allclose(np.where(real, log_prob, 0), expected["log_probs_f64"], atol=1e-10)
        np.testing.assert_allclose(value, expected["nll_f64"], atol=1e-12)
        by_name = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(gradients)[0]:
            keys = path_keys(path)
            (name,) = weight_names(keys, p.config.num_layers, "hf")
            by_name[name] = to_stored(keys, np.asarray(leaf))
    names = expected["grad_names"].tolist()
    assert sorted(names) == sorted(by_name)
    for name, norm, tail in zip(names, expected["grad_norm_f64"], expected["grad_head_f64"], strict=True):
        np.testing.assert_allclose(np.linalg.norm(by_name[name]), norm, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(by_name[name].ravel()[-8:], tail, rtol=1e-8, atol=1e-12, err_msg=name)


# test_gguf.py decodes the other families greedily.
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("family", [*(pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES[:2]), "qwen3"])
def test_greedy_with_cache(family, scanned):
    expected = golden(family)
    p = load_pretrained(GOLDEN / family, scan_layers=scanned)
    mask = expected["left_attention_mask"]
    B, T = mask.shape
    steps = expected["greedy_ids"].shape[1]

    @jax.jit
    def greedy(params, ids, positions):
        logits, cache = p.model.apply(params, ids, positions, p.model.init_cache(B, T + steps))

        def step(carry, i):
            last, cache = carry
            token = jnp.argmax(last, axis=-1)
            logits, cache = p.model.apply(params, token[:, None], (positions[:, -1] + 1 + i)[:, None], cache)
            return (logits[:, 0], cache), (token, last)

        _, (tokens, logits) = jax.lax.scan(step, (logits[:, -1], cache), jnp.arange(steps))
        return tokens.T, jnp.moveaxis(logits, 0, 1)

    tokens, logits = greedy(p.params, expected["left_input_ids"], positions_of(mask))
    np.testing.assert_array_equal(tokens, expected["greedy_ids"])
    np.testing.assert_allclose(logits, expected["greedy_logits"], atol=ATOL, rtol=0)


def test_bfloat16():
    expected = golden("llama_bf16")
    mask, positions = expected["attention_mask"].astype(bool), positions_of(expected["attention_mask"])
    ids = expected["input_ids"]
    wide = load_pretrained(GOLDEN / "llama_bf16")
    logits = np.asarray(jax.jit(wide.model.apply)(wide.params, ids, positions)[0])
    np.testing.assert_allclose(logits[mask], expected["logits_f32_compute"][mask], atol=ATOL, rtol=0)
    p = load_pretrained(GOLDEN / "llama_bf16", dtype="bfloat16", param_dtype="bfloat16")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(p.params))
    # Operation by operation nothing is fused, every rounding happens where the reference model has it, and all is
    # equal but the logits themselves, which stay float32 here and are rounded there.
    logits, _ = p.model.apply(p.params, ids, positions)
    assert logits.dtype == jnp.float32
    rounded = np.asarray(logits.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(rounded[mask], expected["logits_bf16_compute"][mask])
    # Compiled, roundings are left out: no further from float32 than the reference's bfloat16 is (0.21).
    logits, _ = compiled(p.model.apply)(p.params, ids, positions)
    assert np.abs(logits - expected["logits_f32_compute"])[mask].max() < 0.21


def rope_case(case):
    settings = json.loads(str(case))
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = RopeScaling("llama3", *(settings[name] for name in names)) if "factor" in settings else None
    return TransformerConfig(8, head_dim=settings["head_dim"], rope_theta=settings["rope_theta"], rope_scaling=scaling)


@pytest.mark.parametrize("case", range(6))
def test_rope(case):
    with np.load(GOLDEN / "rope.npz") as file:
        expected = {name.rsplit("_", 1)[0]: file[name] for name in file.files if name.endswith(f"_{case}")}
        config, positions = rope_case(file["cases"][case]), file["positions"]
    one_unit_in_the_last_place = 1.2e-7
    np.testing.assert_allclose(rope_frequencies(config), expected["inv_freq"], rtol=one_unit_in_the_last_place)
    np.testing.assert_allclose(rope_frequencies(config, np.float64), expected["inv_freq_f64"], rtol=1e-14)
    half = config.head_size // 2
    for name, actual in zip(("cos", "sin"), rotary_angles(config, positions[None]), strict=True):
        np.testing.assert_allclose(actual[0, :, 0], expected[name][:, :half], atol=3e-7)
        np.testing.assert_array_equal(expected[name][:, :half], expected[name][:, half:])


def test_rope_divisors_are_the_same_scaling():
    with np.load(GOLDEN / "rope.npz") as file:
        scaled = rope_case(file["cases"][3])
    plain = dataclasses.replace(scaled, rope_scaling=None)
    divisors = rope_frequencies(plain, np.float64) / rope_frequencies(scaled, np.float64)
    assert divisors.min() == 1 and divisors.max() == 32
    divided = dataclasses.replace(plain, rope_divisors=tuple(divisors.tolist()))
    np.testing.assert_allclose(rope_frequencies(divided), rope_frequencies(scaled), rtol=2e-7)
    linear = dataclasses.replace(plain, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_array_equal(rope_frequencies(linear), rope_frequencies(plain) / 4)


# Typical faults and how far they move the golden logits, for llama, qwen2 and qwen3, as measured with transformers.
FAULTS = {
    "interleaved rope": (7.0, 8.8, 8.0),
    "rope of the wrong sign": (9.3, 8.5, 8.3),
    "theta 1e4": (4.6, 6.0, 4.5),
    "kv heads tiled": (12, 15, 12),
    "scale by width / heads": (0, 0, 1.2),
    "q/k norm after rope": (0, 0, 3.0),
    "norm weight 1 + g": (16, 15, 15),
    "tanh gelu": (3.7, 3.2, 1.6),
    "eps swapped": (1.8e-3, 2.7e-4, 4.7e-4),
}


def introduce(fault, family, monkeypatch):
    """(config, params) with a fault in them or in the patched module."""
    config, params = loaded(family).config, loaded(family).params
    rotate, attend = module.rotate, module.attend

    def interleaved(x, cos, sin):
        even, odd = x[..., 0::2], x[..., 1::2]
        return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)

    def tiled(q, k, v, visible):
        groups = q.shape[2] // k.shape[2]
        return attend(q, jnp.tile(k, (1, 1, groups, 1)), jnp.tile(v, (1, 1, groups, 1)), visible)

    def late_norm(self, x, cos, sin, visible, cached, index):
        q, k = self.q_norm(rotate(self.q(x), cos, sin)), self.k_norm(rotate(self.k(x), cos, sin))
        return self.o(attend(q, k, self.v(x), visible)), cached

    if fault == "interleaved rope":
        monkeypatch.setattr(module, "rotate", interleaved)
    elif fault == "rope of the wrong sign":
        monkeypatch.setattr(module, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))
    elif fault == "theta 1e4":
        config = dataclasses.replace(config, rope_theta=1e4)
    elif fault == "kv heads tiled":
        monkeypatch.setattr(module, "attend", tiled)
    elif fault == "scale by width / heads":
        factor = (config.head_size / (config.width / config.num_heads)) ** 0.5
        monkeypatch.setattr(module, "attend", lambda q, k, v, visible: attend(q * factor, k, v, visible))
    elif fault == "q/k norm after rope" and config.qk_norm:
        monkeypatch.setattr(module.Attention, "__call__", late_norm)
    elif fault == "norm weight 1 + g":
        is_scale = lambda path: path[-1].key == "scale"  # noqa: E731
        params = jax.tree_util.tree_map_with_path(lambda path, x: x + 1 if is_scale(path) else x, params)
    elif fault == "tanh gelu":
        monkeypatch.setattr(jax.nn, "silu", functools.partial(jax.nn.gelu, approximate=True))
    elif fault == "eps swapped":
        config = dataclasses.replace(config, norm_eps=1.1e-5 - config.norm_eps)
    return config, params


# qwen3 has every part that a fault can be in.
@pytest.mark.parametrize("family", [*(pytest.param(x, marks=pytest.mark.slow) for x in FAMILIES[:2]), "qwen3"])
@pytest.mark.parametrize("fault", FAULTS)
def test_typical_faults_are_seen(fault, family, monkeypatch):
    expected, size = golden(family), FAULTS[fault][FAMILIES.index(family)]
    config, params = introduce(fault, family, monkeypatch)
    mask = expected["attention_mask"].astype(bool)
    apply = jax.jit(transformer(config).apply)
    logits = np.asarray(apply(params, expected["input_ids"], positions_of(mask))[0])
    moved = np.abs(logits - expected["logits"])[mask].max()
    if size:
        assert moved > 5 * ATOL
        assert moved == pytest.approx(size, rel=0.06)
    else:
        assert moved < ATOL


SMALL = TransformerConfig(19, width=32, num_layers=2, num_heads=4, num_kv_heads=2, qk_norm=True, qkv_bias=True)


@functools.cache
def small(**changes):
    config = dataclasses.replace(SMALL, **dict(changes))
    model = transformer(config)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(3)))
    # Fresh biases are zero and fresh scales one: disturb everything, so that every parameter matters.
    draw = np.random.default_rng(4)
    return model, jax.tree.map(lambda x: x + 0.1 * draw.normal(size=x.shape[-1:]).astype(x.dtype), params)


def stacked(params):
    return params | {"layers": jax.tree.map(lambda *x: np.stack(x), *params["layers"])}


def tokens_and_positions(batch=3, length=9):
    tokens = np.random.default_rng(5).integers(0, SMALL.vocab_size, (batch, length), "int32")
    return tokens, np.broadcast_to(np.arange(length, dtype="int32"), tokens.shape)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("cuts", [pytest.param((3,), marks=pytest.mark.slow), (1, 2, 8), (3, 4, 5, 6, 7, 8)])
def test_cache_in_chunks_is_one_pass(scan_layers, cuts):
    model, params = small(scan_layers=scan_layers)
    tokens, positions = tokens_and_positions()
    apply = jax.jit(model.apply)
    whole, none = apply(params, tokens, positions)
    assert none is None
    cache, parts = model.init_cache(3, 12), []
    for begin, end in zip((0, *cuts), (*cuts, 9), strict=True):
        logits, cache = apply(params, tokens[:, begin:end], positions[:, begin:end], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    assert int(cache.index) == 9
    np.testing.assert_array_equal(cache.positions[:, 9:], -1)
    assert len(cache.keys) == SMALL.num_layers and cache.keys[0].shape == (3, 2, 12, 8)


def test_padding_anywhere_and_whatever_it_holds():
    model, params = small()
    tokens, positions = tokens_and_positions()
    apply = jax.jit(model.apply)
    whole, _ = apply(params, tokens, positions)
    spread = [1, 2, 4, 7, 8, 9, 11, 12, 13]  # the same tokens with holes before and between them
    for filler in (0, 7):
        wide, where = np.full((3, 15), filler, "int32"), np.full((3, 15), -1, "int32")
        wide[:, spread], where[:, spread] = tokens, positions
        np.testing.assert_allclose(np.asarray(apply(params, wide, where)[0])[:, spread], whole, atol=1e-5)
        cached, cache = apply(params, wide[:, :10], where[:, :10], model.init_cache(3, 15))
        rest, _ = apply(params, wide[:, 10:], where[:, 10:], cache)
        both = np.concatenate([cached, rest], axis=1)
        assert np.isfinite(both).all()
        np.testing.assert_allclose(both[:, spread], whole, atol=1e-5)


def test_steps_over_blocks_of_the_cache_are_the_whole(monkeypatch):
    monkeypatch.setattr("rollax.kernels.decode_attention.xla.BLOCK", 4)
    monkeypatch.setattr("rollax.kernels.decode_attention.xla.SMALL", 0)  # else a short cache is taken whole
    model, params = small()
    blocks, _ = small(block_decode=True)
    tokens, positions = tokens_and_positions()
    positions = np.array(positions)
    positions[0, 2] = positions[1, 6] = -1  # padding among the prompt and among the steps
    whole, _ = jax.jit(model.apply)(params, tokens, positions)

    @jax.jit
    def stepped(params):
        _, cache = blocks.apply(params, tokens[:, :4], positions[:, :4], blocks.init_cache(3, 11))

        def step(cache, token):
            logits, cache = blocks.apply(params, *(x[:, None] for x in token), cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, cache, (tokens[:, 4:].T, positions[:, 4:].T))[1].swapaxes(0, 1)

    seen = np.asarray(positions[:, 4:]) >= 0
    np.testing.assert_allclose(np.asarray(stepped(params))[seen], np.asarray(whole)[:, 4:][seen], atol=1e-5)
    for one, loops in ((blocks, True), (model, False)):
        step = functools.partial(one.apply, params, tokens[:, :1], positions[:, :1])
        assert ("while[" in str(jax.make_jaxpr(step)(one.init_cache(3, 11)))) == loops


def test_no_visible_key_is_finite_and_so_is_its_gradient():
    model, params = small()
    tokens, _ = tokens_and_positions()

    def loss(params):
        logits, _ = model.apply(params, tokens, jnp.full(tokens.shape, -1))
        return jnp.sum(logits**2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


def test_future_tokens_never_matter():
    model, params = small()
    tokens, positions = tokens_and_positions()
    apply = jax.jit(model.apply)
    changed = np.where(np.arange(9) < 5, tokens, (tokens + 1) % SMALL.vocab_size)
    one, other = (np.asarray(apply(params, x, positions)[0]) for x in (tokens, changed))
    np.testing.assert_allclose(one[:, :5], other[:, :5], atol=1e-6)
    assert np.abs(one[:, 5:] - other[:, 5:]).max() > 0.1


@pytest.mark.slow  # in float32, test_rollout.py compares the gradients of shared starts
@pytest.mark.parametrize("scanned", [False, True])
def test_shared_prefix_training_is_exact(scanned):
    with jax.enable_x64(True):  # rounding in float32 would hide what is not exact
        plain, params = small(dtype="float64", param_dtype="float64")
        config = dataclasses.replace(SMALL, scan_layers=scanned, dtype="float64", param_dtype="float64")
        model, draw = transformer(config), np.random.default_rng(6)
        prompts, _ = tokens_and_positions(2, 5)
        answers = draw.integers(0, SMALL.vocab_size, (6, 4))
        positions = np.broadcast_to(np.arange(9), (6, 9))
        weights = draw.normal(size=(6, 3))

        def shared(params):
            _, cache = model.apply(params, prompts, positions[:2, :5], model.init_cache(2, 9))
            inputs = answers[:, :-1], positions[:, 5:8], answers[:, 1:]
            log_prob, _ = token_log_probs(model, params, *inputs, repeat_rows(cache, 3), temperature=0.8)
            return jnp.sum(weights * log_prob), log_prob

        def separate(params):
            rows = jnp.concatenate([jnp.repeat(prompts, 3, axis=0), answers], axis=1)
            log_prob, _ = token_log_probs(plain, params, rows[:, :-1], positions[:, :8], rows[:, 1:], temperature=0.8)
            return jnp.sum(weights * log_prob[:, 5:]), log_prob[:, 5:]

        expected, expected_log_prob = jax.jit(jax.grad(separate, has_aux=True))(params)
        form = stacked(params) if scanned else params
        gradient, log_prob = compiled(jax.grad(shared, has_aux=True))(form)
        np.testing.assert_allclose(log_prob, expected_log_prob, atol=1e-12)
        gradient = unstack_layers(gradient)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12 * max(1, np.abs(b).max()))
        keys = gradient["layers"][1]["attention"]["k"]["kernel"]
        assert np.abs(keys).max() > 0.01  # the prompt's keys do carry gradient


@pytest.mark.parametrize("scanned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_scanned_remat_and_plain_are_one_model(scanned):
    tokens, positions = tokens_and_positions()
    plain, params = small()

    def gradient(model):
        return compiled(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply(p, tokens, positions)[0]))))

    value, expected = gradient(plain)(params)
    model = transformer(dataclasses.replace(SMALL, remat=True, scan_layers=scanned))
    other, actual = gradient(model)(stacked(params) if scanned else params)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(unstack_layers(actual)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))
    fresh, unrolled = (unstack_layers(jax.jit(x.init)(jax.random.key(3))) for x in (model, plain))
    for a, b in zip(jax.tree.leaves(fresh), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_array_equal(a, b)


def test_remat_keeps_less():
    tokens, positions = tokens_and_positions(16, 64)

    def temporary(remat):
        config = dataclasses.replace(SMALL, num_layers=8, scan_layers=True, remat=remat)
        model = transformer(config)
        loss = lambda p: jnp.sum(model.hidden(p, tokens, positions)[0] ** 2)  # noqa: E731
        params = jax.eval_shape(model.init, jax.random.key(0))
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) < temporary(False) / 2


def test_vmap_over_seeds():
    model, _ = small()
    tokens, positions = tokens_and_positions()
    params = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(0), 2))

    def run(params):
        logits, cache = model.apply(params, tokens[:, :6], positions[:, :6], model.init_cache(3, 9))
        rest, _ = model.apply(params, tokens[:, 6:], positions[:, 6:], cache)
        return jnp.concatenate([logits, rest], axis=1)

    together = jax.jit(jax.vmap(run))(params)
    for i in range(2):
        alone, _ = jax.jit(model.apply)(jax.tree.map(lambda x, i=i: x[i], params), tokens, positions)
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"scan_layers": True}, {"block_decode": True}])
def test_decoding_never_copies_the_cache(changes):
    model, params = small(**changes)
    B, S = 5, 33

    def decode(params, tokens, cache):
        def step(carry, i):
            tokens, cache = carry
            logits, cache = model.apply(params, tokens[:, None], jnp.full((B, 1), i), cache)
            return (jnp.argmax(logits[:, 0], -1).astype(jnp.int32), cache), None

        return jax.lax.scan(step, (tokens, cache), jnp.arange(S))[0]

    program = jax.jit(decode, donate_argnums=2).lower(params, jnp.zeros(B, jnp.int32), model.init_cache(B, S))
    text = program.compile().as_text()
    shape = f"{B},2,{S},8]"
    assert f"f32[{shape}" in text and "dynamic-update-slice" in text
    assert f"f32[{SMALL.num_layers},{shape}" not in text  # never stacked
    assert not [line for line in text.splitlines() if f"= f32[{shape}" in line and " copy(" in line]


def test_axes_name_every_axis():
    for changes in ({}, {"scan_layers": True}, {"tied_head": False, "output_bias": True, "mlp_bias": True}):
        model = transformer(dataclasses.replace(SMALL, **changes))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        is_names = lambda x: isinstance(x, tuple) and all(isinstance(name, str) for name in x)  # noqa: E731
        assert jax.tree.structure(shapes) == jax.tree.structure(model.axes, is_leaf=is_names)
        assert jax.tree.all(jax.tree.map(lambda leaf, names: leaf.ndim == len(names), shapes, model.axes))


def test_fresh_model_is_nearly_uniform():
    config = TransformerConfig(40, width=64, num_layers=2)
    model = transformer(config)
    params = jax.jit(model.init)(jax.random.key(0))
    assert isinstance(params["layers"], tuple) and type(params) is dict
    tokens = jax.random.randint(jax.random.key(1), (8, 32), 0, 40)
    positions = jnp.broadcast_to(jnp.arange(32), tokens.shape)
    _, entropy = jax.jit(functools.partial(token_log_probs, model))(params, tokens, positions, tokens)
    assert 0.8 * np.log(40) < float(entropy.mean()) < np.log(40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "width 30 is not a multiple of num_heads 4"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"rope_scaling": RopeScaling("yarn", 2.0)}, 'rope_scaling.kind must be "linear" or "llama3", got \'yarn\''),
        ({"rope_divisors": (1.0,)}, "rope_divisors needs head_dim / 2 = 4, got 1"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        transformer(dataclasses.replace(SMALL, **changes))


def test_impossible_shapes():
    model, params = small()
    tokens, positions = tokens_and_positions()
    with pytest.raises(ValueError, match=r"one \[B, T\], got \(3, 9\) and \(3, 8\)"):
        model.apply(params, tokens, positions[:, :8])
    with pytest.raises(ValueError, match=r"cache has 2 rows of 9 slots, tokens are \(3, 9\)"):
        model.apply(params, tokens, positions, model.init_cache(2, 9))
    with pytest.raises(ValueError, match=r"cache has 3 rows of 8 slots, tokens are \(3, 9\)"):
        model.apply(params, tokens, positions, model.init_cache(3, 8))
    with pytest.raises(ValueError, match=r"targets must have the shape of tokens \(3, 9\), got \(3, 8\)"):
        token_log_probs(model, params, tokens, positions, tokens[:, 1:])
