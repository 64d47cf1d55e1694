"""The choice of implementation: names, refusals, what the GPU must be, and the one argument that has two names."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rollax.kernels import backends, flash_prefill, ttt
from rollax.kernels.flash_prefill import pallas_mgpu as prefill_kernels
from rollax.kernels.ttt import pallas_mgpu as ttt_kernels

PACKAGE = "rollax.kernels.flash_prefill"
HOPPER = SimpleNamespace(device_kind="NVIDIA H100", compute_capability="9.0")


def gpu(monkeypatch, device, cuda=13000):
    """This process as if it had that GPU under that version of CUDA."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    monkeypatch.setattr(backends, "cuda_version", lambda: cuda)


def refusals_of_both():
    width, tokens = jax.ShapeDtypeStruct((2, 64, 64), "float32"), jax.ShapeDtypeStruct((2, 64, 64), "bfloat16")
    return (
        prefill_kernels.refusal(jnp.bfloat16, jnp.bfloat16, 128, 128, 128),
        ttt_kernels.refusal("ttt_linear_scan", tokens, [width], 16),
        ttt_kernels.refusal("lact_grads", tokens, [width] * 3),
    )


@pytest.mark.parametrize("cuda", [12060, 12080, 12090, 12091, 13000])
def test_compilers_that_break_masks_are_refused(monkeypatch, cuda):
    gpu(monkeypatch, HOPPER, cuda)
    broken = f"CUDA 12.8.0 to 12.9.0 miscompile causal masks, got version {cuda}"
    assert refusals_of_both() == (broken if 12080 <= cuda <= 12090 else None,) * 3


def test_other_gpus_are_refused(monkeypatch):
    gpu(monkeypatch, SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0"))
    for reason in refusals_of_both():
        assert reason == "needs a Hopper GPU (compute capability 9.0), got NVIDIA A100 (8.0)"
    assert backends.choose("f", PACKAGE, None, lambda kernels: backends.hopper_refusal()) == "xla"


def test_hopper_kernels_refuse_integers_of_64_bits():
    ask = lambda: prefill_kernels.refusal(jnp.bfloat16, jnp.bfloat16, 128, 128, 128)  # noqa: E731
    with jax.enable_x64(True):
        assert ask() == "needs JAX's integers of 32 bits, got jax_enable_x64"
        with pytest.raises(
            ValueError, match="'pallas_tpu' of newton_schulz cannot take this: needs JAX's integers of 32"
        ):
            ttt.newton_schulz(jnp.eye(8, dtype=jnp.float32), implementation="pallas_tpu")
        ttt.newton_schulz(jnp.eye(8, dtype=jnp.float32), implementation="interpret")
    assert ask() is None


def test_the_kernel_of_the_platform_is_asked(monkeypatch):
    asked = []
    ask = lambda kernels: asked.append(kernels.__name__.split(".")[-1])  # noqa: E731
    assert backends.choose("f", PACKAGE, None, ask) == "xla" and not asked
    assert backends.choose("f", PACKAGE, "interpret", ask) == "interpret"
    gpu(monkeypatch, HOPPER)
    assert [backends.choose("f", PACKAGE, name, ask) for name in (None, "pallas", "xla", "pallas_tpu")] == [
        "pallas_mgpu", "pallas_mgpu", "xla", "pallas_tpu",
    ]  # fmt: skip
    assert asked == ["pallas_tpu", "pallas_mgpu", "pallas_mgpu", "pallas_tpu"]
    with pytest.raises(ValueError, match="implementation 'pallas' of f cannot take this: too wide"):
        backends.choose("f", PACKAGE, "pallas", lambda kernels: "too wide")


def test_refusals_are_errors_where_a_kernel_is_named():
    with pytest.raises(ValueError, match="needs a TPU or a GPU, this is cpu"):
        backends.choose("f", PACKAGE, "pallas", lambda kernels: None)
    with pytest.raises(ValueError, match="has no such kernel"):
        backends.resolve("f", "pallas_mgpu", {})


def test_scores_of_packed_tiles_explain_themselves(capsys):
    cfg = flash_prefill.PackedPrefillConfig(alpha=0.5, block_size=8, tile_rows=8)
    flash_prefill.packed_energy(jnp.zeros((8, 2, 4)), jnp.zeros((1, 1, 4)), cfg, implementation="xla", explain=True)
    assert capsys.readouterr().out == "packed_energy: xla (as asked)\n"


def test_two_names_of_one_argument_are_refused():
    zero, both = jnp.zeros, dict(implementation="xla", impl="reference")
    w, q, eta, gate = ttt.FastWeights(*[zero((1, 2, 2))] * 3), zero((1, 1, 4, 2)), zero(2), zero((1, 1, 4))
    norm, rule = (zero((1, 2)), zero((1, 2))), ttt.UpdateRule(momentum=False)
    linear, lr = (zero((1, 2, 2)), zero((1, 1, 2))), zero((1, 1, 4, 3))
    mlp = (zero((1, 2, 8)), zero((1, 1, 8)), zero((1, 8, 2)), zero((1, 1, 2)))
    state = ttt.lact_init(w, batch=1, chunk=2, rule=rule)
    for call in (
        lambda: ttt.newton_schulz(zero((2, 2)), **both),
        lambda: ttt.lact_apply(w, q, **both),
        lambda: ttt.lact_grads(w, q, q, lr, **both),
        lambda: ttt.lact_scan(w, q, q, q, lr, chunk=2, rule=rule, **both),
        lambda: ttt.lact_step(state, q, q, q, lr, chunk=2, rule=rule, **both),
        lambda: ttt.lact_segments(w, q, q, q, lr, segments=[(0, 4, 1, 1)], rule=rule, **both),
        lambda: ttt.ttt_linear_scan(q, q, q, eta, gate, linear, norm, mini_batch=2, **both),
        lambda: ttt.ttt_mlp_scan(q, q, q, eta, gate, mlp, norm, mini_batch=2, **both),
        lambda: ttt.sliding_window_attention(q, q, q, window=2, **both),
    ):
        with pytest.raises(ValueError, match="implementation and impl are one argument, got 'xla' and 'reference'"):
            call()
