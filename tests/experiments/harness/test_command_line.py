"""A dataclass becomes a command line; what is wrong gets one line."""

from dataclasses import dataclass

import pytest

from rollax.experiments.harness.command_line import Options as Surround
from rollax.experiments.harness.command_line import (
    first_message,
    glance,
    one_line_end,
    one_line_errors,
    parse,
)


@dataclass(frozen=True)
class Options:
    """Options of a pretended study."""

    lr: float = 0.1
    """Learning rate."""
    arms: tuple[str, ...] = ()
    """Arms."""
    loud: bool = False
    """A flag."""

    def check(self):
        if self.lr < 0:
            raise ValueError(f"lr: expected at least 0, got {self.lr}")


def test_command_line():
    parsed = parse(Options(lr=0.3), "doc", ["--arms", "a", "b", "--loud"])
    assert parsed == Options(lr=0.3, arms=("a", "b"), loud=True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", "x"], ["--lr", "'x'"]),
        (["--lrr", "1"], ["--lrr"]),
        (["--lr", "-1"], ["lr: expected at least 0, got -1.0"]),
        (["--lr"], ["--lr"]),
    ],
)
def test_a_bad_value_gets_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options(), "doc", argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(word in said for word in words), said


def test_help_exits_with_success(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options(), "What it does.", ["--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "What it does." in said
    assert "Learning rate." in said


def test_first_message():
    assert first_message("╭─ Value error ─╮\n│ Bad --lr │\n│ ──────── │\n│ more │\n╰──╯") == "Bad --lr"
    assert first_message(" Value error \n ------ \n  Bad --lr \n  ------\n  more \n \n") == "Bad --lr"  # to ASCII


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("lr: expected more\nand a second line"), "error: lr: expected more\n"),
        (ValueError(), "error: ValueError\n"),
        (ModuleNotFoundError("no ray"), "error: no ray\n"),
        (OSError(28, "No space left on device", "runs/a"), "error: runs/a: No space left on device\n"),
        (OSError("checkpoints: cannot write"), "error: checkpoints: cannot write\n"),
    ],
)
def test_errors_that_a_user_can_mend_are_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == line
    with pytest.raises(KeyError), one_line_errors():  # a bug keeps its traceback
        raise KeyError("a bug")
    with pytest.raises(ValueError, match="mine"), one_line_errors(OSError):
        raise ValueError("mine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(save_every=-1.0), "save_every: expected at least 0 seconds, got -1.0"),
        (dict(save_every=float("nan")), "save_every: expected at least 0 seconds, got nan"),
        (dict(profile=-1), "profile: expected at least 0 chunks, got -1"),
        (dict(name="../x"), "name: expected a name without / and a leading dot, got '../x'"),
        (dict(name=".x"), "name: expected a name without"),
    ],
)
def test_what_surrounds_a_run_is_checked(options, words):
    with pytest.raises(ValueError, match=words):
        Surround(**options).check()
    Surround(save_every=float("inf"), name="x").check()


def test_a_glance_is_deaf_to_help_and_does_not_check():
    assert glance(Options(), ["--lr", "-1", "--help"]) == Options(lr=-1.0)
    assert glance(Options(lr=0.2), ["-h"]) == Options(lr=0.2)


def test_a_program_ends_in_one_line(capsys):
    @one_line_end()
    def program(error):
        raise error

    for error, status, line in ((ValueError("no"), 2, "error: no\n"), (KeyboardInterrupt(), 130, "interrupted\n")):
        with pytest.raises(SystemExit) as stop:
            program(error)
        assert (stop.value.code, capsys.readouterr().err) == (status, line)
