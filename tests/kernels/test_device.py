"""Every kernel on the accelerator at hand, forward and backward, against the definition in float32 on the CPU.

The same test runs the kernels of the platform (`-m gpu`) and, in minutes, those for TPUs under the interpreter
(`-m slow`). `test_on_the_accelerator` is how a plain run of the suite gets to the former.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollax.kernels import flash_prefill, ttt
from rollax.kernels.decode_attention import decode_attention

ROOT = Path(__file__).parents[2]
PLUG_INS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
OF_LARGEST = {"float32": 2e-5, "bfloat16": 2e-2}  # tolerance, of the largest entry of an array
STEPS_OF_ROUNDING = 2  # times that for Newton-Schulz: every step multiplies what the one before has rounded
S, HQ, HK, D, BLOCK = 256, 4, 2, 64, 64


def normal(key, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(key), shape)


def attention():
    mask = jax.random.bernoulli(jax.random.key(9), 0.6, (HQ, S // BLOCK, S // BLOCK)).at[..., 0].set(True)
    index = flash_prefill.compact_index(mask & flash_prefill.dense_mask(S // BLOCK), S // BLOCK)
    run = lambda q, k, v, **how: flash_prefill.block_sparse_attention(q, k, v, index, block_size=BLOCK, **how)[0]  # noqa: E731
    return run, [normal(0, S, HQ, D), normal(1, S, HK, D), normal(2, S, HK, D)], []


def corrected_attention():
    """What is not listed enters by its means: a second pass of the kernels, by masks of tiles."""
    mask = flash_prefill.dense_mask(S // BLOCK) & (jnp.eye(S // BLOCK, dtype=bool) | (jnp.arange(S // BLOCK) == 1))
    index = flash_prefill.compact_index(jnp.broadcast_to(mask, (HQ, *mask.shape)), S // BLOCK)

    def run(q, k, v, **how):
        means = dict(zip(("kbar", "vbar"), (flash_prefill.mean_pool(x, BLOCK) for x in (k, v)), strict=True))
        return flash_prefill.block_sparse_attention(q, k, v, index, block_size=BLOCK, **means, **how)[0]

    return run, [normal(0, S, HQ, D), normal(1, S, HK, D), normal(2, S, HK, D)], []


def packed_attention():
    """Dense by decree: what is selected by rounded scores may differ in a block."""
    cfg = flash_prefill.PackedPrefillConfig(alpha=0.0, block_size=BLOCK, tile_rows=64, min_sparse_queries=10**6)
    run = lambda q, k, v, **how: flash_prefill.flash_prefill_packed(q, k, v, cfg, prefix=S - 100, **how)[0]  # noqa: E731
    return run, [normal(0, 100, HQ, D), normal(1, S, HK, D), normal(2, S, HK, D)], []


def energies():
    cfg = flash_prefill.FlashPrefillConfig(alpha=0.5, block_size=BLOCK)
    kbar = normal(1, S // BLOCK, HK, D).astype(jnp.bfloat16).astype(jnp.float32)
    run = lambda q, **how: flash_prefill.score(flash_prefill.block_energy(q, kbar, cfg, **how))  # noqa: E731
    return run, [normal(0, S, HQ, D)], []


def energies_of_zeros():
    """Each row adds one to every block that it sees."""
    run, tokens, others = energies()
    return run, [0 * x for x in tokens], others


def decoding():
    lengths = jnp.array([S, 0, 100])
    run = lambda q, k, v, **how: decode_attention(q, k, v, lengths, **how)  # noqa: E731
    return run, [normal(0, 3, HQ, D), normal(1, 3, HK, S, D), normal(2, 3, HK, S, D)], []


def masked_decoding():
    lengths, mask = jnp.array([S, 0, 100]), jax.random.bernoulli(jax.random.key(9), 0.5, (3, S))
    run = lambda q, k, v, **how: decode_attention(q, k, v, lengths, mask=mask, **how)  # noqa: E731
    return run, *decoding()[1:]


def dual_form(scan, *shapes, K=16, L=72):
    """Two groups of mini-batches, the second not full, and a tail."""

    def run(q, k, v, eta_pos, gate, weight, bias, *params, **how):
        return scan(q, k, v, eta_pos, gate, params, (weight, bias), mini_batch=K, **how)

    tokens = [normal(i, 2, 2, L, D, scale=0.5) for i in range(3)]
    eta_pos, gate = 4 / (1 + jnp.arange(K)) / D, jax.nn.sigmoid(normal(3, 2, 2, L))
    norm = 1 + normal(4, 2, D, scale=0.1), normal(5, 2, D, scale=0.1)
    return run, tokens, [eta_pos, gate, *norm, *(normal(6 + i, 2, *s, scale=0.1) for i, s in enumerate(shapes))]


def ttt_linear():
    return dual_form(ttt.ttt_linear_scan, (D, D), (1, D))


def ttt_mlp():
    return dual_form(ttt.ttt_mlp_scan, (D, 4 * D), (1, 4 * D), (4 * D, D), (1, D))


def fast_weights():
    return [normal(6 + i, 2, *s, scale=s[1] ** -0.5) for i, s in enumerate(((128, D), (D, 128), (128, D)))]


def lact_apply():
    return lambda q, *w, **how: ttt.lact_apply(w, q, **how), [normal(0, 1, 2, 100, D)], fast_weights()


def lact_grads():
    run = lambda k, v, lr, *w, **how: tuple(ttt.lact_grads(w, k, v, lr, **how))  # noqa: E731
    return run, [normal(i, 1, 2, 100, D) for i in range(2)], [jax.nn.softplus(normal(3, 1, 2, 100, 3)), *fast_weights()]


def newton_schulz():
    return ttt.newton_schulz, [normal(0, 3, 64, 48)], []


CASES = (
    attention,
    corrected_attention,
    packed_attention,
    energies,
    energies_of_zeros,
    decoding,
    masked_decoding,
    ttt_linear,
    ttt_mlp,
    lact_apply,
    lact_grads,
    newton_schulz,
)


def outputs_and_gradients(run, implementation, args):
    """All outputs, then the gradients of a weighted sum of them."""

    def total(args):
        outputs = jax.tree.leaves(run(*args, implementation=implementation))
        weigh = lambda x: jnp.sum(x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape))  # noqa: E731
        return sum(map(weigh, outputs)), outputs

    (_, outputs), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(args)
    return [np.asarray(x.astype(jnp.float32)) for x in (*outputs, *gradients)]


@pytest.mark.parametrize(
    "implementation",
    [pytest.param("pallas", marks=pytest.mark.gpu), pytest.param("interpret", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("dtype", OF_LARGEST)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_kernels_are_the_definition(case, dtype, implementation):
    on_gpu = implementation == "pallas" and jax.default_backend() == "gpu"
    if on_gpu and dtype == "float32":
        pytest.skip("on a GPU float32 is left to xla")
    with jax.default_device(jax.devices("cpu")[0]):
        run, tokens, others = case()
        narrow = [x.astype(dtype) for x in tokens]
        wide = [x.astype(jnp.float32) for x in narrow]
        expected = outputs_and_gradients(run, "reference", [*wide, *others])
    place = jax.devices()[0]
    found = outputs_and_gradients(case()[0], implementation, jax.device_put([*narrow, *others], place))
    tolerance = OF_LARGEST[dtype] * (STEPS_OF_ROUNDING if case is newton_schulz else 1)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max() + 1e-30)


def accelerator():
    """The platform of a process that may choose; plug-ins are looked for first, since such a process takes seconds."""
    if not any(map(importlib.util.find_spec, PLUG_INS)):
        return "cpu"
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    return child.stdout.strip() if child.returncode == 0 else "cpu"


def none_found():
    """Why nothing runs on an accelerator: there is none, or JAX has no plug-in that finds it."""
    asked = subprocess.run(["sh", ROOT / ".ci" / "setup", "device"], capture_output=True, text=True, check=False)
    extra = asked.stdout.strip()
    return f"JAX does not find the device of this machine: is jax[{extra}] there?" if extra else "no GPU or TPU here"


@pytest.mark.timeout(3600)
def test_on_the_accelerator():
    """Every test that is marked `gpu`, in a process that has the accelerator: this one has the CPU."""
    if (platform := accelerator()) == "cpu":
        pytest.skip(none_found())
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(Path(__file__).parent)]
    child = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    said = (child.stdout + child.stderr)[-8000:]
    assert child.returncode == 0 and re.search(r"\d+ passed", child.stdout), f"on the {platform}:\n{said}"


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06\n580.65.06", "cuda13"), ("550.54.15", "cuda12"), ("No devices were found", "")]
)
def test_setup_installs_the_plug_in_of_a_gpu(tmp_path, monkeypatch, driver, extra):
    """Where there is a device; that the plug-in cannot be had, as here, is said in a line and no failure."""

    def script(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    script(tmp_path / "bin" / "nvidia-smi", f"echo '{driver}'")
    script(tmp_path / ".venv" / "bin" / "python", 'echo "$@" >>asked; case "$*" in *jax*) exit 1 ;; esac')
    (tmp_path / ".ci").mkdir()
    for name in (".ci/setup", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    missing = f"JAX does not find the device of this machine: is jax[{extra}] there?"
    assert none_found() == (missing if extra else "no GPU or TPU here")
    child = subprocess.run(["sh", tmp_path / ".ci" / "setup"], capture_output=True, text=True, check=True)
    assert ("==> not available: the tests that need the device" in child.stdout) == bool(extra)
    assert (tmp_path / "asked").read_text().endswith(f" jax[{extra}]\n" if extra else " .[test]\n")
    assert (tmp_path / ".venv" / "installed.toml").exists()  # what is missing is not asked for again
