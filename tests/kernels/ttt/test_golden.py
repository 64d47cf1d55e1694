"""Every array of golden/spatial_ttt.npz: the authors' layers (and forms checked against them) in float64."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.kernels import ttt

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden" / "spatial_ttt.npz"))
IMPLEMENTATIONS = ("reference", "xla")
# The authors' GELU derivative has truncated constants, good for about 1e-9.
TOLERANCE = {"linear": 1e-12, "mlp": 1e-7}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def case(name):
    return {key.removeprefix(f"{name}/"): value for key, value in GOLDEN.items() if key.startswith(f"{name}/")}


def names(prefix):
    return sorted({key.split("/")[0] for key in GOLDEN if key.startswith(prefix)})


def close(actual, expected, tolerance):
    assert np.shape(actual) == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def rates(g):
    """eta_pos `[K]` and gate `[B, H, L]` of a golden TTT layer, whose 1 / (i + 1) is rounded to float32."""
    K, f = int(g["mini_batch"]), g["q"].shape[-1]
    reciprocals = 1 / np.arange(1, K + 1, dtype=np.float32)
    eta_pos = np.maximum(reciprocals + g["learnable_token_idx"], 0) * g["base_lr"] / f
    z = np.einsum("bld,hod->bhl", g["x"], g["lr_weight"]) + g["lr_bias"]
    return eta_pos, 1 / (1 + np.exp(-z))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((f"ttt_{name}", "dual") for name in ("linear_a", "linear_b", "mlp_b")),
        pytest.param("ttt_mlp_a", "dual", marks=pytest.mark.slow),  # which the TPU kernel has by default
        ("ttt_linear_b", "primal"),
        *(pytest.param(x, "primal", marks=pytest.mark.slow) for x in ("ttt_linear_a", "ttt_mlp_a", "ttt_mlp_b")),
    ],
)
def test_ttt(name, form):
    g = case(name)
    kind = name.split("_")[1]
    eta_pos, gate = rates(g)
    weights = ("W1", "b1") if kind == "linear" else ("W1", "b1", "W2", "b2")
    K, (B, H, L, f) = int(g["mini_batch"]), g["q"].shape
    close(eta_pos[:, None] * gate.reshape(B, H, L // K, 1, K), g["eta"], 1e-14)
    scan = ttt.ttt_linear_scan if kind == "linear" else ttt.ttt_mlp_scan

    def run(q, k, v, eta_pos, gate, params, ln):
        out, final = scan(q, k, v, eta_pos, gate, params, ln, mini_batch=K, form=form, checkpoint_every=2)
        return jnp.swapaxes(out, 1, 2).reshape(B, L, H * f), final

    arguments = (g["q"], g["k"], g["v"], eta_pos, gate, [g[n] for n in weights], (g["ln_weight"], g["ln_bias"]))
    gradients = jax.jit(lambda a, d: (*run(*a), jax.vjp(lambda *a: run(*a)[0], *a)[1](d)))
    out, final, (dq, dk, dv, d_eta_pos, d_gate, d_params, d_ln) = gradients(arguments, g["cotangent_out"])
    close(out, g["out"], TOLERANCE[kind])
    # What the golden gradient of eta says of its factors.
    d_eta, blocks = g["grad_eta"], gate.reshape(B, H, L // K, K)
    expected = {
        "q": (dq, g["grad_q"]),
        "k": (dk, g["grad_k"]),
        "v": (dv, g["grad_v"]),
        "eta_pos": (d_eta_pos, np.einsum("bhnij,bhnj->i", d_eta, blocks)),
        "gate": (d_gate, np.einsum("bhnij,i->bhnj", d_eta, eta_pos).reshape(B, H, L)),
        "ln_weight": (d_ln[0], g["grad_ln_weight"]),
        "ln_bias": (d_ln[1], g["grad_ln_bias"]),
    }
    for i, n in enumerate(weights):
        close(final[i], g[f"final_{n}"], TOLERANCE[kind])
        expected[n] = (d_params[i], g[f"grad_{n}"])
    for actual, wanted in expected.values():
        close(actual, wanted, 10 * TOLERANCE[kind])


@pytest.mark.parametrize("name", ["newton_schulz_square", "newton_schulz_tall", "newton_schulz_wide"])
def test_newton_schulz(name):
    g = case(name)

    @jax.jit
    def run(x, d):
        out, pull = jax.vjp(ttt.newton_schulz, x)
        narrow = x.astype(jnp.float32)
        half, pull_half = jax.vjp(partial(ttt.newton_schulz, dtype="bfloat16"), narrow)
        others = ttt.newton_schulz(x, coeffs=ttt.FIXED5), ttt.newton_schulz(narrow)
        return out, pull(d)[0], *others, half, pull_half(d.astype(jnp.float32))[0]

    out, gradient, fixed, single, half, half_gradient = run(g["in"], g["cotangent"])
    close(out, g["out_schedule5"], 1e-12)
    close(gradient, g["grad_in"], 1e-10)
    close(fixed, g["out_fixed5"], 1e-12)
    close(np.linalg.svd(out, compute_uv=False), g["singular_values_schedule5"], 1e-12)
    assert single.dtype == jnp.float32
    close(single, g["out_schedule5"], 5e-6)
    # Both bfloat16 runs round their products: ours is off by 0.014 an entry at most, the authors' by 0.023.
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, g["out_schedule5"], rtol=0, atol=0.016)
    np.testing.assert_allclose(half, g["out_schedule5_bf16ref"], rtol=0, atol=0.035)
    np.testing.assert_allclose(half_gradient, g["grad_in"], rtol=0, atol=0.08 * np.abs(g["grad_in"]).max())


def lact_inputs(g):
    """(w, q, k, v, lr, mom), the golden batch of heads as one row of heads."""
    w = ttt.FastWeights(g["w0"], g["w1"], g["w2"])
    lr = np.concatenate([g["lr0"], g["lr1"], g["lr2"]], -1)[None]
    return w, g["q"][None], g["k"][None], g["v"][None], lr, g["momentum"][None, ..., 0] if "momentum" in g else None


OTHER_RULES = [f"lact_muon{x}_mom{y}_pre{z}" for x, y, z in ("000", "011", "101", "110")]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        # Of the rule's eight forms, four that have each pair of its options.
        *(pytest.param(name, "xla", marks=[pytest.mark.slow] * (name in OTHER_RULES)) for name in names("lact_")),
        pytest.param("lact_muon1_mom1_pre1", "reference", marks=pytest.mark.slow),
    ],
)
def test_lact(name, implementation):
    g = case(name)
    rule = ttt.UpdateRule(
        muon=bool(g["use_muon"]), momentum=bool(g["use_momentum"]), norm="pre" if g["prenorm"] else "post"
    )
    C = int(g["chunk"])

    def run(*arguments):
        return ttt.lact_scan(*arguments, chunk=C, rule=rule, implementation=implementation)[0]

    arguments = lact_inputs(g)
    out, (dw, dq, dk, dv, d_lr, d_mom) = jax.jit(lambda a, d: (run(*a), jax.vjp(run, *a)[1](d)))(
        arguments, g["cotangent_out"][None]
    )
    close(out[0], g["out"], 1e-12)
    for actual, key in ((dq[0], "q"), (dk[0], "k"), (dv[0], "v"), (dw.w0, "w0"), (dw.w1, "w1"), (dw.w2, "w2")):
        close(actual, g[f"grad_{key}"], 1e-10)
    for i in range(3):
        close(d_lr[0, ..., i : i + 1], g[f"grad_lr{i}"], 1e-10)
    if rule.momentum:
        close(d_mom[0, ..., None], g["grad_momentum"], 1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", names("update_"))
def test_segments(name, implementation):
    g = case(name)
    w, *tokens, _ = lact_inputs(g)
    w = ttt.FastWeights(*(np.swapaxes(x, -1, -2) for x in w))  # this code's weights stand to the right of the tokens
    segments = g["segments_start_end_update_apply"].tolist()
    out, final = jax.jit(partial(ttt.lact_segments, segments=segments, implementation=implementation))(w, *tokens)
    close(out[0], g["out"], 1e-12)
    for n, x in zip(("w0", "w1", "w2"), final, strict=True):
        close(jnp.swapaxes(x[0], -1, -2), g[f"final_{n}"], 1e-12)


@pytest.mark.parametrize("name", ["depthwise_conv3d", "depthwise_conv3d_single_frame"])
def test_conv(name):
    g = case(name)
    kernel = np.moveaxis(g["weight_c_t_h_w"], 0, -1)
    y, pull = jax.vjp(jax.jit(ttt.depthwise_conv3d), g["x_thwc"][None], kernel)
    close(y[0], g["y_thwc"], 1e-13)
    dx, d_kernel = pull(g["cotangent_thwc"][None])
    close(dx[0], g["grad_x_thwc"], 1e-12)
    close(jnp.moveaxis(d_kernel, -1, 0), g["grad_weight_c_t_h_w"], 1e-12)


@pytest.mark.parametrize("name", ["ttt_linear_b", "ttt_mlp_b"])
def test_ttt_in_float32(name):
    g = case(name)
    weights = ("W1", "b1") if "linear" in name else ("W1", "b1", "W2", "b2")
    scan = ttt.ttt_linear_scan if "linear" in name else ttt.ttt_mlp_scan
    arguments = (g["q"], g["k"], g["v"], *rates(g), [g[n] for n in weights], (g["ln_weight"], g["ln_bias"]))
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arguments)
    out, final = scan(*narrow, mini_batch=int(g["mini_batch"]))
    assert out.dtype == final[0].dtype == jnp.float32
    np.testing.assert_allclose(jnp.swapaxes(out, 1, 2).reshape(g["out"].shape), g["out"], atol=5e-6, rtol=5e-6)
    for n, x in zip(weights, final, strict=True):
        np.testing.assert_allclose(x, g[f"final_{n}"], atol=2e-6, rtol=2e-6)
