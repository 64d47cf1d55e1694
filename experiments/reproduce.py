"""Runs the claims of all studies and writes one table of results, RESULTS.md.

    python -m rollax.experiments.reproduce                      # every study with its defaults
    python -m rollax.experiments.reproduce --studies bandpo
    python -m rollax.experiments.reproduce --smoke              # seconds a study: does everything run?
    python -m rollax.experiments.reproduce --table              # runs nothing, writes the table of what has run

A run is named after the commit, so it is resumed or read if it exists, and runs anew when the code has changed. Of each
part of a study the run that began last counts, also one started by hand under a name that begins with "reproduce-": of
whole parts, for all lines of a part are replaced. Parts that have no run here keep the lines that they have.
"""

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rollax.experiments.harness.claims import Verdict
from rollax.experiments.harness.command_line import one_line_errors, parse
from rollax.experiments.harness.report import asked, effect_and_interval, markdown
from rollax.experiments.harness.run_folder import RunFolder, git_state
from rollax.experiments.harness.study import load_study, study_names

HEAD = ("paper", "claim", "says", "verdict", "effect and interval", "asked", "seeds", "run", "date", "commit")


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """What to run."""

    studies: tuple[str, ...] = ()
    """Names of studies; all when empty."""
    smoke: bool = False
    """Seconds a study: shows that everything runs, says nothing of the claims."""
    table: bool = False
    """Run nothing."""
    runs: str = "runs"
    """Where run folders go."""
    out: str = "RESULTS.md"
    """Where the table goes."""

    def check(self) -> None:
        for name in self.studies:
            if name not in study_names():
                raise ValueError(f"studies: expected some of {', '.join(study_names())}, got {name!r}")


def main(argv: Sequence[str] | None = None) -> None:
    asked_for = parse(Reproduce(), __doc__, argv)
    names = asked_for.studies or study_names()
    failed = [] if asked_for.table else [name for name in names if run(name, asked_for)]
    lines = [line for name in names for line in lines_of(name, asked_for)]
    with one_line_errors():
        if not lines:
            raise ValueError(f"runs: expected a finished run with claims in {asked_for.runs}, found none")
        if not asked_for.smoke:
            lines = with_kept(lines, Path(asked_for.out))
        Path(asked_for.out).write_text(page(lines, asked_for.smoke))
    print(f"{len(lines)} verdicts: {asked_for.out}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def run(name: str, asked_for: Reproduce) -> int:
    """Trains a study in a process of its own, or goes on where it stopped; its exit status."""
    command = [sys.executable, "-m", f"rollax.experiments.{name}", "--runs", asked_for.runs]
    command += ["--name", run_name(asked_for.smoke), "--resume", *(load_study(name).smoke if asked_for.smoke else ())]
    print(f"==> {name}", flush=True)
    return subprocess.run(command, check=False).returncode


def run_name(smoke: bool) -> str:
    commit, changed = git_state()
    return "-".join(["smoke" if smoke else "reproduce", (commit or "unknown")[:10], *["changed"] * changed])


def parts_of(name: str) -> list[str]:
    """The parts that a study has by default, as its lines name them."""
    study = load_study(name)
    return [f"{study.title}, {label}" for label in study.configs([])]


def lines_of(name: str, asked_for: Reproduce) -> list[list[str]]:
    """The verdicts of each part of a study in its latest finished run, a line each."""
    kind = run_name(smoke=True) if asked_for.smoke else "reproduce-*"
    finished = [path.parent for path in (Path(asked_for.runs) / name).glob(f"{kind}/results.json")]
    read = [[RunFolder.read(folder, file) for file in ("results.json", "versions.json")] for folder in finished]
    parts: dict[str, list[list[str]]] = {}
    for results, versions in sorted(read, key=lambda both: both[1]["started"]):
        commit = (versions["commit"] or "unknown")[:10] + (", changed" if versions["uncommitted"] else "")
        where = [f"`{shlex.join(versions['command'])}`", versions["started"][:10], commit]
        for label, part in results.items():
            lines = []
            for claim in part["claims"]:
                verdict = Verdict(**{field: float("nan") if value is None else value for field, value in claim.items()})
                numbers = [f"{effect_and_interval(verdict)} {verdict.unit}".strip(), asked(verdict), str(verdict.seeds)]
                paper = f"{load_study(name).title}, {label}"
                lines.append([paper, verdict.name, verdict.statement, verdict.verdict, *numbers, *where])
            if lines:
                parts[label] = lines
    return [line for lines in parts.values() for line in lines]


def with_kept(lines: list[list[str]], table: Path) -> list[list[str]]:
    """The lines of an older table whose part has none among `lines`, and these, in the order of studies and parts."""
    written = table.read_text().splitlines() if table.is_file() else []
    plain = lambda cell: cell.replace(r"\|", "|").replace(r"\<", "<")  # noqa: E731
    rows = [[plain(c) for c in line.removeprefix("| ").removesuffix(" |").split(" | ")] for line in written]
    kept = [row for row in rows if len(row) == len(HEAD) and row[0] not in (HEAD[0], "---")]
    order = [part for name in study_names() for part in parts_of(name)]
    ran = list(dict.fromkeys(line[0] for line in lines))
    title = lambda part: part.rsplit(", ", 1)[0]  # noqa: E731
    for part in ran:  # that no study has by default: behind the others of its study
        if part not in order:
            order.insert(max(i + 1 for i, known in enumerate(order) if title(known) == title(part)), part)
    lines = [line for line in kept if line[0] in order and line[0] not in ran] + lines
    return sorted(lines, key=lambda line: order.index(line[0]))


def page(lines: Sequence[Sequence[str]], smoke: bool) -> str:
    """RESULTS.md."""
    command = "python -m rollax.experiments.reproduce" + (" --smoke" if smoke else "")
    count = {verdict: sum(line[3] == verdict for line in lines) for verdict in ("holds", "fails", "inconclusive")}
    note = "A smoke run: it shows that everything runs and says nothing of the claims." if smoke else (
        "A claim holds if the whole 95 % interval over seeds agrees with it, and fails if none of it does."
    )  # fmt: skip
    counted = ", ".join(f"{number} {'hold' if name == 'holds' else name}" for name, number in count.items() if number)
    head = f"# Results\n\nWritten by `{command}`. {note}\nOf {len(lines)} verdicts: {counted}."
    return f"{head}\n\n{markdown(HEAD, lines)}\n"


if __name__ == "__main__":
    main()
