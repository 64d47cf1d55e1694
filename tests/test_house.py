"""The rules of the house: which package may import which, and that every folder is a listed package."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "objectives": set(),
    "envs": set(),
    "agents": {"kernels"},
    "experiments": {"kernels", "objectives", "envs", "agents"},
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module if node.module != "rollax" else f"rollax.{node.names[0].name}"


def test_arrows_point_down():
    upward = [
        f"{path.relative_to(ROOT)} imports {module}"
        for floor, allowed in MAY_IMPORT.items()
        for path in sorted((ROOT / floor).rglob("*.py"))
        for module in imported_modules(path)
        if module.startswith("rollax.") and module.split(".")[1] not in allowed | {floor}
    ]
    assert not upward, upward


def test_every_folder_is_a_listed_package():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        f"rollax.{'.'.join(path.parent.relative_to(ROOT).parts)}"
        for floor in [*MAY_IMPORT, "tests"]
        for path in (ROOT / floor).rglob("__init__.py")
    }
    assert set(tool["packages"]) == folders == set(tool["package-dir"])
    assert all(name == f"rollax.{folder.replace('/', '.')}" for name, folder in tool["package-dir"].items())


def test_importing_has_no_side_effects():
    """In a process of its own: no environment variable, no JAX option and no device is touched."""
    modules = [f"rollax.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}" for path in sources()]
    code = """if True:
        import importlib, os, sys
        import jax, flax, optax, matplotlib
        import jax.experimental.pallas.mosaic_gpu  # sets a variable itself
        before = dict(os.environ), dict(jax.config.values)
        for name in sys.argv[1:]:
            importlib.import_module(name)
        assert (dict(os.environ), dict(jax.config.values)) == before
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
    """
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def sources():
    return [path for floor in MAY_IMPORT for path in sorted((ROOT / floor).rglob("*.py")) if path.stem != "__init__"]
