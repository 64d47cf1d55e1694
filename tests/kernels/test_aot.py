"""Every kernel compiles ahead of time for every accelerator that it is written for, and the machinery says so truly."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from rollax.kernels import aot

CASES = aot.cases()

# (pattern of case names, targets) -> what the compiler or the operator says. Anything else must compile, and what is
# listed here must still fail: a line that no longer holds fails its test.
REFUSED = {
    # Hopper's tensor cores multiply float32 numbers rounded to 10 bits only: the kernels leave float32 to "xla".
    (
        r"^(flash_prefill|ttt|decode_attention)(?!.*\(xla\)).* float32$",
        ("h100",),
    ): "float32",
}

SHARED_MEMORY = 227 * 1024  # bytes that a thread block of an H100 may use
# Bytes that the worst kernel of a program may spill from its registers on an H100; none in all other programs.
SPILLED = {
    # The kernel of dk and dv is one register short where a key head has one head of rows.
    r"^flash_prefill v2.* backward": 4,
    # A step's chain of products and norms over tiles [64, 64] has more values than 255 registers a thread hold.
    r"^ttt linear, .* backward": 436,
    r"^ttt mlp, .* forward": 204,
    # The places of 36 tiles in shared memory, which do not change and are kept rather than worked out again: as much is
    # spilled where all arithmetic between the products is left out.
    r"^ttt mlp, .* backward": 1832,
    r"^ttt lact grads, .* backward": 72,
}


def reason(case: str, target: str) -> str | None:
    """The pattern of the error that a case must end with on a target; None if it must compile."""
    return next((why for (what, where), why in REFUSED.items() if target in where and re.search(what, case)), None)


@pytest.fixture(scope="module", params=aot.TARGETS)
def compiled(request):
    """(target, results of those of its cases that were asked for); compiling all of them takes minutes."""
    if missing := aot.missing(target := request.param):
        pytest.skip(missing)
    asked = [x.callspec.params for x in request.session.items if getattr(x, "originalname", "") == "test_compiles"]
    wanted = [each["case"] for each in asked if each["compiled"] == target]
    return target, aot.compile_all(target, [case for case in wanted if target in CASES[case].targets])


@pytest.mark.aot
@pytest.mark.timeout(7200)  # the first test of a target waits for all its programs
@pytest.mark.parametrize("case", CASES)
def test_compiles(compiled, case):
    target, results = compiled
    if target not in CASES[case].targets:  # cases and targets are crossed, and a few cases are of one target
        pytest.skip("another target's")
    result, why = results[case], reason(case, target)
    if why:
        assert not result["ok"] and re.search(why, result["error"]), f"expected {why!r}, got {result}"
    else:
        assert result["ok"], result["error"]
        assert result["temporary_bytes"] >= 0
        if CASES[case].operator == "linear_log_prob":  # no logits [4096, 151936]; some targets copy the head
            assert result["temporary_bytes"] < 0.6 * 4 * 4096 * 151_936
        if CASES[case].implementation is None:  # the kernel itself is in the program, not something in its place
            assert result["vmem_bytes" if target != "h100" else "registers"] > 0
            if target == "h100":
                assert 0 < result["smem_bytes"] <= SHARED_MEMORY
                assert (result["spill_bytes"] or 0) <= next((n for x, n in SPILLED.items() if re.search(x, case)), 0)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if len(case.targets) > 1])  # others repeat them
def test_cases_are_whole(case):
    """Each case's function takes its shapes, by the plain-jnp form, which compiles nothing."""
    case = CASES[case]
    shapes = [(s, case.dtype) if all(isinstance(n, int) for n in s) else s for s in case.shapes]
    args = [jax.ShapeDtypeStruct(*pair) for pair in shapes]
    outputs = jax.tree.leaves(jax.eval_shape(aot.program(case, "xla"), *args))
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in outputs)
    if case.step == "backward":
        assert [(x.shape, x.dtype) for x in outputs] == [(args[i].shape, args[i].dtype) for i in case.wrt]


def test_every_operator_has_cases_in_both_passes_and_dtypes():
    operators = {p.parent.name for p in (aot.ROOT / "kernels").glob("*/api.py")}
    found = {(case.operator, case.step, case.dtype) for case in CASES.values()}
    assert found == {(o, step, dtype) for o in operators for step in aot.STEPS for dtype in aot.DTYPES}


def test_table_shows_failures_and_gaps():
    name, *_ = CASES
    good = {"ok": True, "seconds": 1.26, "temporary_bytes": 3 * 2**20, "vmem_bytes": 2**20, "smem_bytes": 512}
    bad = {"ok": False, "error": "ValueError: a | b"}
    row = next(line for line in aot.table({"v4": {name: good}, "v5e": {name: bad}, "h100": {}}) if "forward" in line)
    assert "| 1.3 s, VMEM 1 MiB, SMEM 0.5 KiB, temporary 3 MiB | **no**: ValueError: a / b | not run |" in row


def test_table_keeps_what_was_not_compiled_again(tmp_path, monkeypatch):
    """Of two cases one was compiled again, for one target: that cell alone changes, and both versions are named."""
    first, second = [name for name, case in CASES.items() if case.operator == "decode_attention"][:2]
    monkeypatch.setattr(aot, "cases", lambda: {name: CASES[name] for name in (first, second)})
    monkeypatch.setattr(aot, "TARGETS", dict.fromkeys(("v4", "h100")))
    monkeypatch.setattr(aot, "README", tmp_path / "README.md")
    monkeypatch.setattr(aot, "RESULTS", tmp_path)
    old = {"v4": {first: {"ok": False, "error": "a | b"}}, "h100": {second: {"ok": False, "error": "c"}}}
    begin, end = aot.MARKERS
    aot.README.write_text("\n".join((begin, "jax 0.9.1; seconds are old.", *aot.table(old), end)))
    (tmp_path / "v4.jsonl").write_text(json.dumps({"case": second, "ok": False, "error": "new"}) + "\n")
    aot.write_table()
    text = aot.README.read_text()
    cells = aot.cells_of(text.splitlines())
    assert list(cells.values()) == ["**no**: a / b", "not run", "**no**: new", "**no**: c"]
    assert f"jax 0.9.1 and {jax.__version__}; " in text and "seconds are old" not in text


def test_write_table_replaces_what_is_between_the_markers(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    begin, end = aot.MARKERS
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(aot, "README", readme)
    monkeypatch.setattr(aot, "RESULTS", tmp_path)
    aot.write_table()
    aot.write_table()
    text = readme.read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n") and "old" not in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected one"):
        aot.write_table()


def test_reads_what_the_assembler_reports():
    report = "Resources(smem_scratch_bytes=165888, x)\nUsed 168 registers\n 40 bytes spill stores\nUsed 90 registers"
    assert aot.assembled(report) == {"smem_bytes": 165888, "registers": 168, "spill_bytes": 40}
    assert aot.assembled("") == {"smem_bytes": None, "registers": None, "spill_bytes": None}


def test_a_dead_compiler_costs_one_case(tmp_path, monkeypatch):
    """A child that dies is started again after the case that killed it, which is recorded."""
    names = list(CASES)[:3]
    monkeypatch.setattr(aot, "RESULTS", tmp_path)
    monkeypatch.setattr(aot, "missing", lambda target: None)
    monkeypatch.setattr(aot, "cases", lambda: {name: CASES[name] for name in names})

    class Child:
        returncode, stderr = -6, "noise\nAborted"

    def run(command, **_):
        out, left = tmp_path / "v4.jsonl", command[command.index("--child") + 2 :]
        with out.open("a") as file:
            for name in left[: left.index(names[1])] if names[1] in left else left:
                file.write(f'{{"case": "{name}", "target": "v4", "ok": true}}\n')
        return Child

    monkeypatch.setattr(aot.subprocess, "run", run)
    results = aot.compile_all("v4", names)
    assert [results[name]["ok"] for name in names] == [True, False, True]
    assert results[names[1]]["error"] == "the compiler died with status -6: Aborted"
