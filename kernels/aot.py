"""Compiles every kernel for TPUs and GPUs that are not there, with the compilers that a machine with them would run.

    python -m rollax.kernels.aot                    # all targets, all cases
    python -m rollax.kernels.aot v5e h100 --match decode
    python -m rollax.kernels.aot --table            # writes the table of kernels/README.md from the results

`libtpu` and the CUDA plug-in offer devices without hardware ("topologies"): programs are laid out, scheduled and
assembled for them, memory limits included, and refused as the hardware's compiler would refuse them. It shows nothing
about numbers or speed. `sh .ci/aot` makes the environment that this needs. Results are lines of JSON in `runs/aot/`.

A target has a process of its own (the two plug-ins do not share one), and a case that kills the compiler is recorded
and passed over.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "runs" / "aot"
README = ROOT / "kernels" / "README.md"
MARKERS = ("<!-- made by `sh .ci/aot`, do not edit: begin -->", "<!-- end -->")
NO_TARGET = "no target: "  # how a child says that it could not begin
CASE_SECONDS = 600  # a child has so many for each of its cases; the slowest takes a third of that on a free core

# An H100 SXM in the text form of XLA's GpuTargetConfig (public figures of the product).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A device to compile for: `platform` "tpu" or "cuda", its topology, and the name of our kernels for it."""

    platform: str
    topology: str
    kernel: str


TARGETS = {
    "v4": Target("tpu", "v4:2x2x1", "pallas_tpu"),
    "v5e": Target("tpu", "v5e:2x2", "pallas_tpu"),
    "v5p": Target("tpu", "v5p:2x2x1", "pallas_tpu"),
    "v6e": Target("tpu", "v6e:2x2", "pallas_tpu"),
    "tpu7x": Target("tpu", "tpu7x:2x2x1", "pallas_tpu"),
    "h100": Target("cuda", "1x1x1", "pallas_mgpu"),
}


class Case(NamedTuple):
    """One program to compile.

    Attributes:
      operator: folder of `kernels/`.
      variant: what of it, at which shapes.
      step: "forward", or "backward" for the gradient of a sum of all outputs (its forward pass included).
      dtype: of the floating-point arguments.
      build: `build(implementation) -> function`; imports the operator.
      shapes: of its arguments: a tuple for `dtype`, or a pair of tuple and another dtype.
      wrt: which arguments the backward pass differentiates.
      implementation: None for the target's kernel, or a name.
      targets: for which it is compiled.
    """

    operator: str
    variant: str
    step: str
    dtype: str
    build: Callable[[str], Callable]
    shapes: tuple
    wrt: tuple[int, ...]
    implementation: str | None = None
    targets: tuple[str, ...] = tuple(TARGETS)

    @property
    def name(self) -> str:
        by = f" ({self.implementation})" if self.implementation else ""
        return " ".join((self.operator, self.variant + by, self.step, self.dtype))


def missing(target: str) -> str | None:
    """What has to be installed before anything can be compiled for a target; None where all is there."""
    plug_in = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}[TARGETS[target].platform]
    return None if importlib.util.find_spec(plug_in) else f"{target} needs {plug_in}: `sh .ci/aot` installs it"


def mesh_of(target: str) -> jax.sharding.Mesh:
    """A mesh of the one device of a target, axis "x"."""
    from jax.experimental import topologies

    platform, topology, _ = TARGETS[target]
    name = {"topology": topology, "target_config": H100} if platform == "cuda" else {"topology_name": topology}
    devices = topologies.get_topology_desc(platform=platform, **name).devices
    return jax.sharding.Mesh(np.array(devices[:1]), ("x",))


def abstract(mesh: jax.sharding.Mesh, shapes: Sequence, dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Arguments without data on the mesh's device; see `Case.shapes`."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    pairs = [(s, dtype) if all(isinstance(n, int) for n in s) else s for s in shapes]
    return tuple(jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in pairs)


def program(case: Case, implementation: str) -> Callable:
    """The function of a case: the operator itself, or the gradient of the sum of its floating-point outputs."""
    forward = case.build(implementation)
    if case.step == "forward":
        return forward

    def total(*args):
        outputs = jax.tree.leaves(forward(*args))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in outputs if jnp.issubdtype(x.dtype, jnp.floating))

    return jax.grad(total, case.wrt)


def compile_case(case: Case, target: str, mesh: jax.sharding.Mesh) -> dict:
    """Compiles one case: seconds from tracing to machine code, and what `measured` reads from the program."""
    function = program(case, case.implementation or TARGETS[target].kernel)
    begun = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it which generation they are lowered for
        traced = jax.jit(function).trace(*abstract(mesh, case.shapes, case.dtype))
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds} | measured(compiled) | {"smem_bytes": prefetched(traced.jaxpr.jaxpr)}


def measured(compiled) -> dict:
    """Bytes that a compiled program asks for: in the device's memory, and (TPU) in VMEM by its largest kernel."""
    memory, kernels = compiled.memory_analysis(), []
    for line in compiled.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
            kernels.append(int(used[1]) if used else 0)
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "vmem_bytes": max(kernels, default=None),
    }


def prefetched(jaxpr) -> int | None:
    """Bytes of the scalars that Pallas TPU kernels keep in SMEM, the most of any kernel in a jaxpr; None: no kernel."""
    most = None
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call" and (grid := equation.params["grid_mapping"]).num_index_operands:
            # After the sizes of a grid that is not static come the prefetched scalars.
            scalars = equation.invars[grid.num_dynamic_grid_bounds :][: grid.num_index_operands]
            most = max(most or 0, sum(x.aval.size * x.aval.dtype.itemsize for x in scalars))
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                found = prefetched(inner)
                most = most if found is None else max(most or 0, found)
    return most


def assembled(report: str) -> dict:
    """Shared memory, registers a thread, spilled bytes: each the most of any Mosaic GPU kernel that was assembled."""
    most = lambda pattern: max((int(n) for n in re.findall(pattern, report)), default=None)  # noqa: E731
    return {
        "smem_bytes": most(r"smem_scratch_bytes=(\d+)"),
        "registers": most(r"Used (\d+) registers"),
        "spill_bytes": most(r"(\d+) bytes spill stores"),
    }


def first_line(error: Exception) -> str:
    """An error as one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def work(target: str, names: Sequence[str], out: Path) -> None:
    """The child's part: compiles the named cases in this process and appends a line of JSON for each to `out`."""
    try:
        mesh = mesh_of(target)
    except Exception as error:
        sys.exit(f"{NO_TARGET}{first_line(error)}")
    # Mosaic GPU prints the resources of each kernel on standard output, from C++: it goes to a file that we read.
    with tempfile.TemporaryFile("w+") as report:
        os.dup2(report.fileno(), 1)
        for name in names:
            case = cases()[name]
            start = os.lseek(report.fileno(), 0, os.SEEK_END)
            try:
                result = {"ok": True} | compile_case(case, target, mesh)
            except Exception as error:
                result = {"ok": False, "error": first_line(error)}
            sys.stdout.flush()
            report.seek(start)
            if result["ok"] and TARGETS[target].platform == "cuda":
                result |= assembled(report.read())
            with out.open("a") as file:
                file.write(json.dumps({"case": name, "target": target} | result) + "\n")


def environment(target: str) -> dict[str, str]:
    """Variables of a child: no device is looked for, and the GPU's assembler says what it used."""
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # no chip is claimed, so processes need no lock against each other
    report = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
    extra = quiet if TARGETS[target].platform == "tpu" else report
    return {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"} | extra


def compile_all(target: str, names: Sequence[str]) -> dict[str, dict]:
    """Compiles the named cases for one target, in processes of their own.

    Returns:
      A result for each case name, earlier ones of other cases included, also written to `runs/aot/TARGET.jsonl`: "ok",
      then seconds and bytes, or "error".
    Raises:
      ValueError: the target's plug-in is not installed.
      RuntimeError: the plug-in does not start.
    """
    if reason := missing(target):
        raise ValueError(reason)
    RESULTS.mkdir(parents=True, exist_ok=True)
    out = RESULTS / f"{target}.jsonl"
    kept = [line for name, line in lines_of(out) if name in cases() and name not in names]
    out.write_text("".join(f"{line}\n" for line in kept))
    left = list(names)
    while left:
        command = [sys.executable, "-m", "rollax.kernels.aot", target, "--child", str(out), *left]
        done = len(lines_of(out))
        try:
            child = subprocess.run(
                command, env=os.environ | environment(target), capture_output=True, text=True, check=False,
                timeout=CASE_SECONDS * len(left),
            )  # fmt: skip
            last = (child.stderr.strip().splitlines() or [""])[-1]
            if last.startswith(NO_TARGET):
                raise RuntimeError(f"{target}: {last.removeprefix(NO_TARGET)}")
            how = f"the compiler died with status {child.returncode}: {last}"
        except subprocess.TimeoutExpired:
            how = f"nothing within {CASE_SECONDS * len(left)} s"
        left = left[len(lines_of(out)) - done :]
        if left:
            line = json.dumps({"case": left[0], "target": target, "ok": False, "error": how[:300]})
            with out.open("a") as file:
                file.write(line + "\n")
            left = left[1:]
    return results(target)


def lines_of(out: Path) -> list[tuple[str, str]]:
    """(case name, line) of each result in a file; none where there is no file."""
    text = out.read_text() if out.is_file() else ""
    return [(json.loads(line)["case"], line) for line in text.splitlines()]


def results(target: str) -> dict[str, dict]:
    """The results on disk of one target, by case name."""
    return {name: json.loads(line) for name, line in lines_of(RESULTS / f"{target}.jsonl")}


def size(count: int) -> str:
    """Bytes in the unit that keeps them short."""
    units = (("GiB", 30), ("MiB", 20), ("KiB", 10))
    name, unit = next((name, unit) for name, unit in units if count >> unit or unit == 10)
    return f"{count / 2**unit:.3g} {name}"


def cell(result: dict | None) -> str:
    """One result in the table: seconds, then what the kernel holds on chip, then temporary bytes of device memory."""
    if result is None:
        return "not run"
    if not result["ok"]:
        return f"**no**: {result['error'].replace('|', '/')}"
    parts = [f"{result['seconds']:.1f} s"]
    if result.get("vmem_bytes") is not None:
        parts.append(f"VMEM {size(result['vmem_bytes'])}")
    if result.get("smem_bytes"):
        parts.append(f"SMEM {size(result['smem_bytes'])}")
    if result.get("registers"):
        spilled = f", {result['spill_bytes']} B spilled" if result.get("spill_bytes") else ""
        parts.append(f"{result['registers']} registers{spilled}")
    return ", ".join([*parts, f"temporary {size(result['temporary_bytes'])}"])


def table(by_target: dict[str, dict[str, dict]], earlier: dict[tuple[str, str], str] | None = None) -> Iterator[str]:
    """Lines of Markdown: for each operator a table with a row a case and a column a target.

    Args:
      by_target: results by case name, of each target.
      earlier: what `cells_of` read from a table before, for what has no result.
    """
    earlier = earlier or {}
    for operator in dict.fromkeys(case.operator for case in cases().values()):
        yield from (f"\n**{operator}**\n", f"| case | {' | '.join(by_target)} |", "|---" * (1 + len(by_target)) + "|")
        for name, case in cases().items():
            if case.operator == operator:
                row = [
                    cell(found[name])
                    if name in found
                    else earlier.get((name, target), cell(None) if target in case.targets else "-")
                    for target, found in by_target.items()
                ]
                yield f"| {name.removeprefix(operator + ' ')} | {' | '.join(row)} |"


def cells_of(lines: Iterable[str]) -> dict[tuple[str, str], str]:
    """The cells of what `table` wrote, by case name and target."""
    found, operator, targets = {}, "", []
    for line in lines:
        name, *cells = line.strip("| ").split(" | ")
        if line.startswith("**"):
            operator = line.strip("*")
        elif name == "case":
            targets = cells
        elif line.startswith("| "):
            found |= {(f"{operator} {name}", target): text for target, text in zip(targets, cells, strict=True)}
    return found


def write_table() -> None:
    """Puts the results on disk between the two marker lines of kernels/README.md.

    What has no result on disk keeps the cell that it has there: a checkout has the table and not the results. A cell is
    thus of the code that was last compiled; a change of a kernel needs its cases compiled again.

    Raises:
      ValueError: the file has not exactly one of each marker.
    """
    text = README.read_text()
    begin, end = MARKERS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README: expected one {begin!r} and one {end!r} in {README}")
    head, rest = text.split(begin)
    old, tail = rest.split(end)
    by_target = {target: results(target) for target in TARGETS}
    kept = {
        (name, target): text
        for (name, target), text in cells_of(old.splitlines()).items()
        if name in cases() and name not in by_target.get(target, {}) and text != cell(None)
    }
    # Cells that stay are of the jax that is named already.
    versions = re.findall(r"\d[\w.]*", old.split(";")[0]) if kept else []
    named = " and ".join(dict.fromkeys([*versions, jax.__version__]))
    lines = [begin, f"jax {named}; seconds are those of two shared CPU cores.", *table(by_target, kept), "", end]
    README.write_text(head + "\n".join(lines) + tail)


# The cases, at the sizes of a model of today: 32 query heads over 8 key and value heads of width 128.

STEPS = ("forward", "backward")
DTYPES = ("bfloat16", "float32")
EVERY = tuple((step, dtype) for step in STEPS for dtype in DTYPES)
BFLOAT16, FLOAT32 = (tuple((step, dtype) for step in STEPS) for dtype in ("bfloat16", "float32"))
Q, KV = 32, 8
WIDTH = 128


def decode_attention_of(implementation):
    from rollax.kernels.decode_attention import decode_attention

    return lambda q, k, v, length, mask=None: decode_attention(
        q, k, v, length, mask=mask, implementation=implementation
    )


def linear_log_prob_of(implementation):
    from rollax.kernels.linear_log_prob import linear_log_prob

    return partial(linear_log_prob, implementation=implementation)


def prefill_of(implementation, **more):
    from rollax.kernels.flash_prefill import FlashPrefillConfig, flash_prefill

    return lambda q, k, v: flash_prefill(
        q, k, v, FlashPrefillConfig(alpha=0.1, **more), slots=64, implementation=implementation
    )[0]


def packed_prefill_of(implementation):
    from rollax.kernels.flash_prefill import PackedPrefillConfig, flash_prefill_packed

    return lambda q, k, v, prefix=0: flash_prefill_packed(
        q, k, v, PackedPrefillConfig(alpha=0.1), prefix=prefix, slots=64, implementation=implementation
    )[0]


def window_of(implementation):
    from rollax.kernels.flash_prefill import window_attention

    return lambda q, k, v: window_attention(q, k, v, implementation=implementation)[0]


def dense_of(implementation):
    from rollax.kernels.flash_prefill import dense_attention

    return lambda q, k, v: dense_attention(q, k, v, implementation=implementation)[0]


def ttt_linear_of(implementation):
    from rollax.kernels.ttt import ttt_linear_scan

    return lambda q, k, v, eta, gate, w, b, scale, shift: ttt_linear_scan(
        q, k, v, eta, gate, (w, b), (scale, shift), mini_batch=16, implementation=implementation
    )


def ttt_mlp_of(implementation):
    from rollax.kernels.ttt import ttt_mlp_scan

    return lambda q, k, v, eta, gate, w1, b1, w2, b2, scale, shift: ttt_mlp_scan(
        q, k, v, eta, gate, (w1, b1, w2, b2), (scale, shift), mini_batch=16, implementation=implementation
    )


def lact_apply_of(implementation):
    from rollax.kernels.ttt import FastWeights, lact_apply

    return lambda w0, w1, w2, q: lact_apply(FastWeights(w0, w1, w2), q, implementation=implementation)


def lact_grads_of(implementation):
    from rollax.kernels.ttt import FastWeights, lact_grads

    return lambda w0, w1, w2, k, v, lr: lact_grads(FastWeights(w0, w1, w2), k, v, lr, implementation=implementation)


def newton_schulz_of(implementation):
    from rollax.kernels.ttt import newton_schulz

    return lambda g: newton_schulz(g, implementation=implementation)


def wide(*shape: int) -> tuple:
    """An argument that is float32 in every case."""
    return shape, "float32"


def cases() -> dict[str, Case]:
    """Every case by its name."""
    # (operator, variant, build, shapes, arguments to differentiate, implementation[, passes and dtypes[, targets]])
    rows = []
    for tokens in (32768, 131072):
        keys = (tokens, KV, WIDTH)
        qkv = ((tokens, Q, WIDTH), keys, keys)
        for variant, build in (("v1, 64 slots", prefill_of), ("v2, 64 slots", packed_prefill_of), ("dense", dense_of)):
            rows.append(("flash_prefill", f"{variant}, {tokens // 1024}K", build, qkv, (0, 1, 2), None))
    normalised, chunk = partial(prefill_of, row_normalised=True), ((8192, Q, WIDTH), keys, keys, ((), "int32"))
    rows += [  # `qkv` and `keys` of the longer prompt
        ("flash_prefill", "v1 row-normalised, 64 slots, 128K", normalised, qkv, (0, 1, 2), None, BFLOAT16),
        ("flash_prefill", "v2 chunk, 64 slots, 8K of 128K", packed_prefill_of, chunk, (0, 1, 2), None, BFLOAT16),
        ("flash_prefill", "window, 128K", window_of, qkv, (0, 1, 2), None),
    ]
    H, L, f = 32, 32768, 64
    sequence = (*[(1, H, L, f)] * 3, wide(16), wide(1, H, L))
    norm = (wide(H, f), wide(H, f))
    linear = (wide(H, f, f), wide(H, 1, f))
    mlp = (wide(H, f, 4 * f), wide(H, 1, 4 * f), wide(H, 4 * f, f), wide(H, 1, f))
    fast = (wide(1, 4, 512, 512),) * 3
    matrices = ("ttt", "newton-schulz, 12 of 512 x 512", newton_schulz_of, ((12, 512, 512),), (0,))
    small = ("ttt", "newton-schulz, 1536 of 128 x 128", newton_schulz_of, ((1536, 128, 128),), (0,))
    head = ((4096, 2048), (2048, 151936), ((4096,), "int32"))
    rows += [
        ("ttt", "linear, 32K", ttt_linear_of, (*sequence, *linear, *norm), tuple(range(9)), None),
        ("ttt", "mlp, 32K", ttt_mlp_of, (*sequence, *mlp, *norm), tuple(range(11)), None),
    ]
    for label, tokens in (("2K", 2048), ("2648", 2648)):  # the latter is Spatial-TTT's, no multiple of any tile
        chunk, lr = (1, 4, tokens, 512), wide(1, 4, tokens, 3)
        rows += [
            ("ttt", f"lact apply, 4 heads, {label}", lact_apply_of, (*fast, chunk), tuple(range(4)), None),
            ("ttt", f"lact grads, 4 heads, {label}", lact_grads_of, (*fast, chunk, chunk, lr), tuple(range(6)), None),
        ]
    rows += [
        (*small, None),
        (*matrices, None),
        (*matrices, "xla"),
    ]
    for rows_at_once, of in ((32, EVERY[:-1]), (16, EVERY[-1:])):  # 32 with gradients in float32 are 16 GiB
        cache = (rows_at_once, KV, 32768, WIDTH)
        shapes = ((rows_at_once, Q, WIDTH), cache, cache, ((rows_at_once,), "int32"))
        decode = ("decode_attention", f"batch {rows_at_once}, 32K", decode_attention_of, shapes, (0, 1, 2))
        rows += [(*decode, None, of), (*decode, "xla", of)]
    masked = (*shapes, ((rows_at_once, 32768), "bool"))  # of the smaller batch
    rows += [("decode_attention", "batch 16, 32K, masked", decode_attention_of, masked, (0, 1, 2), None, BFLOAT16)]
    rows += [
        ("linear_log_prob", "4K tokens, D 2048, V 151936", linear_log_prob_of, head, (0, 1), "xla"),
    ]
    # What runs in float32 on an H100, whose kernels refuse it.
    refused = ("v1, 64 slots, 32K", "v2, 64 slots, 32K", "linear, 32K", "mlp, 32K", "lact apply, 4 heads, 2K")
    refused = [row for row in rows if row[1] in (*refused, "lact grads, 4 heads, 2K")]
    rows += [(*row[:5], "xla", FLOAT32, ("h100",)) for row in refused]
    every = [
        Case(operator, variant, step, dtype, build, shapes, wrt, implementation, *of[1:])
        for operator, variant, build, shapes, wrt, implementation, *of in rows
        for step, dtype in (of[0] if of else EVERY)
    ]
    return {case.name: case for case in every}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--table", action="store_true", help="write the table from the results on disk, compile nothing"
    )
    parser.add_argument("--child", nargs="+", metavar=("FILE", "CASE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"targets must be of {', '.join(TARGETS)}, got {', '.join(sorted(unknown))}")
    if options.child:
        work(options.targets[0], options.child[1:], Path(options.child[0]))
    elif options.table:
        write_table()
    else:
        for target in options.targets or TARGETS:
            names = [name for name, case in cases().items() if options.match in name and target in case.targets]
            for name, result in compile_all(target, names).items():
                if name in names:
                    print(f"{target}: {name}: {cell(result)}", flush=True)


if __name__ == "__main__":
    main()
