"""A frozen dataclass becomes a command line; a bad value gets one line, not a traceback."""

import contextlib
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Options:
    """What surrounds a run, the same for every study: the `Config` of a study inherits these fields.

    None of them changes what is computed, so a run may be resumed with other ones.
    """

    runs: str = "runs"
    """Where run folders go."""
    name: str = ""
    """Of the run folder; the time when empty."""
    resume: bool = False
    """Go on with the run of this name (without a name: with the latest), bitwise as if it had not stopped."""
    save_every: float = 60.0
    """Seconds between checkpoints, at least (more where saving is slow); 0 after each chunk, inf at the end alone."""
    track: tuple[str, ...] = ()
    """Sinks for the metrics besides the run folder: tensorboard, wandb, trackio."""
    mesh: str = ""
    """Devices, for example "data=4,tensor=2"; all there are when empty."""
    deterministic: bool = False
    """Only deterministic kernels, where an accelerator has a choice."""
    debug_nans: bool = False
    """Stop with an error where the first NaN appears (slow)."""
    looks: int = 1
    """How often the claims were judged, this time included, while seeds were added: more widen every interval."""
    profile: int = 0
    """Chunks of updates to trace, after the first, into the run folder (open with xprof or TensorBoard)."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work, before anything is computed."""
        if not self.save_every >= 0:
            raise ValueError(f"save_every: expected at least 0 seconds, got {self.save_every}")
        if self.looks < 1:
            raise ValueError(f"looks: expected at least 1, got {self.looks}")
        if self.profile < 0:
            raise ValueError(f"profile: expected at least 0 chunks, got {self.profile}")
        if "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name: expected a name without / and a leading dot, got {self.name!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The fields that surround a run and do not define it."""
        return tuple(field.name for field in fields(Options))


class UserError(ValueError):
    """Something that a user can mend, found after the command line was read: one line tells it, not a traceback."""


def parse(default: Any, description: str, argv: list[str] | None = None, *, check: bool = True) -> Any:
    """Reads a frozen dataclass from the command line; a bad value gets one line on stderr and exit status 2.

    Args:
      default: an instance; the command line overrides its fields.
      check: call the method `check()`, which raises ValueError for values that cannot work.
    """
    config, _ = read(type(default), description, argv, default=default)
    if check:
        with one_line_errors():
            config.check()
    return config


def glance(default: Any, argv: Sequence[str] | None = None) -> Any:
    """`parse`, unchecked and deaf to --help: for a field that decides over what defaults the line is then parsed."""
    words = sys.argv[1:] if argv is None else argv
    return parse(default, "", [word for word in words if word not in ("-h", "--help")], check=False)


def parse_known(kind: type, description: str, argv: list[str] | None = None) -> tuple[Any, list[str]]:
    """Reads a dataclass and leaves the options that it does not know, in order."""
    return read(kind, description, argv, return_unknown_args=True)


def read(kind: type, description: str, argv: list[str] | None, **how: Any) -> tuple[Any, list[str]]:
    import tyro  # half a second, and only the command line needs it

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read = tyro.cli(kind, description=description, args=argv, **how)
    except SystemExit as stop:
        if stop.code:
            fail(first_message(said.getvalue()))
        raise
    return read if isinstance(read, tuple) else (read, [])


def first_message(boxed: str) -> str:
    """The message of an error that tyro wraps and frames, in dashes where it must: from the title to the next rule."""
    lines = [line.strip("│ ") for line in boxed.splitlines()[1:]]
    says = lambda line: line.strip("─╰╯-")  # noqa: E731
    message = itertools.takewhile(says, itertools.dropwhile(lambda line: not says(line), lines))
    return " ".join(message) or "bad command line"


def fail(message: str) -> None:
    """One line on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns the errors that a user can mend (a value, a file, a missing library) into one line and exit status 2.

    Args:
      kinds: of error; ValueError, ImportError and OSError when empty.
    """
    kinds = kinds or (ValueError, ImportError, OSError)
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.strerror:  # a full disk, a file that is not there
            fail(": ".join(str(part) for part in (error.filename, error.strerror) if part))
        fail(next(iter(str(error).strip().splitlines()), type(error).__name__))


@contextlib.contextmanager
def one_line_end() -> Iterator[None]:
    """`one_line_errors` around a whole program that has nothing to resume: Ctrl-C is one line too, exit status 130."""
    try:
        with one_line_errors():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
