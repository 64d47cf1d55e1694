"""The README's worked example runs, and its commands exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_worked_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    shorter = code.replace("UPDATES, SEEDS = 8, 16, 60, 10", "UPDATES, SEEDS = 8, 16, 12, 3")
    assert shorter != code
    names = {}
    exec(compile(shorter, "README.md", "exec"), names)
    assert names["reward"].shape == (2, 3, 12)
    assert "GRPO and Dr. GRPO end equal" in capsys.readouterr().out


def test_the_commands_and_files_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"make (demo|test|lint|aot|models)", README)) <= set(targets)
    for name in set(re.findall(r"(?:experiments|tests|agents|kernels|envs|objectives)/[\w/]*\.(?:py|png)", README)):
        assert (ROOT / name).is_file(), name
