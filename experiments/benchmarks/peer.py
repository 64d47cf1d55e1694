"""A peer library in a process of its own: its environment, made when it is missing, and questions over pipes.

The peer's side of a benchmark is a file with a function `handlers() -> {name: function}`. It runs under the peer's
interpreter, which need not have rollax or even jax: this file, which serves it there, is all standard library.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "benchmarks"


class Peer(NamedTuple):
    """What to install, and where from.

    Attributes:
      name: of its environment, `.cache/benchmarks/NAME` of the checkout.
      modules: what must be importable for an environment to serve as it is.
      requirements: what pip installs where that fails, exact versions.
      shared: the environment sees our own packages: both sides then run the same jax.
      dependencies: pip installs what the requirements ask for. Off, it installs them alone, whatever range of jax they
        declare.
    """

    name: str
    modules: tuple[str, ...]
    requirements: tuple[str, ...]
    shared: bool = True
    dependencies: bool = False


def interpreter(peer: Peer, python: str = "", index: str = "") -> str:
    """The Python that runs the peer; makes its environment when there is none yet.

    Args:
      python: an interpreter: taken as it is where the peer's modules import, else the base of the environment. Empty
        for the one that runs this.
      index: a further index for pip.
    Raises:
      ValueError: no such interpreter, or pip cannot install the peer.
    """
    if python and shutil.which(python) is None:
        raise ValueError(f"python: expected an interpreter, got {python!r}")
    base = python or sys.executable
    if has_modules(base, peer.modules):
        return base
    root = CACHE / peer.name
    inside, installed = str(root / "bin" / "python"), root / "installed.json"
    wanted = json.dumps([base, *peer.requirements, peer.shared, peer.dependencies])
    if installed.is_file() and installed.read_text() == wanted:
        return inside
    print(f"making {root} with {', '.join(peer.requirements)}", file=sys.stderr, flush=True)
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: E731
    done = run(base, "-m", "venv", "--clear", str(root))
    if not done.returncode and peer.shared:
        where = run(inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
        Path(where, "ours.pth").write_text("".join(lines))
    if not done.returncode:
        options = [*([] if peer.dependencies else ["--no-deps"]), *(["--extra-index-url", index] if index else [])]
        done = run(inside, "-m", "pip", "install", "--quiet", "--compile", *options, *peer.requirements)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
        raise ValueError(f"python: {base} cannot have {', '.join(peer.requirements)}: {reason[-1]}")
    installed.write_text(wanted)
    return inside


def has_modules(python: str, modules: Sequence[str]) -> bool:
    """Whether an interpreter finds all these modules; it imports none of them."""
    code = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *modules], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def serving(python: str, file: str | Path, **environment: str) -> Iterator[Any]:
    """Starts the peer's side and yields `ask(name, **arguments) -> answer`, both plain JSON.

    Raises:
      RuntimeError: in `ask`, when the handler failed or the process died; its own words are on stderr.
    """
    command = [python, str(Path(__file__).resolve()), str(file)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | environment, **pipes)

    def ask(name, /, **arguments):
        process.stdin.write(json.dumps([name, arguments]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ({file}) ended with status {process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the peer ({file}) failed in {name}: {answer['error']}")
        return answer["answer"]

    try:
        yield ask
    finally:
        process.stdin.close()  # which ends its loop
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def serve(file: str) -> None:
    """The loop inside the peer's process: a request a line in, an answer a line out; what the peer prints to stderr."""
    spec = importlib.util.spec_from_file_location("peer_side", file)
    module = importlib.util.module_from_spec(spec)
    answers, sys.stdout = sys.stdout, sys.stderr
    spec.loader.exec_module(module)
    handlers = module.handlers()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"answer": handlers[name](**arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
