"""The rooms: lower ones never import higher ones, and rooms of one number do not import each other."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
OURS = {"dsv2_jax", "kernels_pallas", "experiments"}
NUMBERS = {
    **dict.fromkeys(("config", "config_io", "presets", "types"), 0),
    **dict.fromkeys(("sharding", "checkpoint", "data"), 1),
    "model": 2,
    **dict.fromkeys(("train", "inference", "hf"), 3),
    **dict.fromkeys(("alignment", "evaluation", "planning"), 4),
}
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "numpy", "kernels_pallas"} | sys.stdlib_module_names
BENCH_MAY_IMPORT = KERNELS_MAY_IMPORT | {"matplotlib"}  # for its plot


def modules_imported(file: pathlib.Path, root: pathlib.Path) -> set[str]:
    """Dotted names of all that `file` imports, at any depth, relative imports resolved."""
    package = file.relative_to(root).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def scripts(root: pathlib.Path) -> set[str]:
    return {file.stem for file in (root / "experiments").glob("*.py")}


def complaint(file: pathlib.Path, imported: str, root: pathlib.Path) -> str | None:
    """Why `file` may not import `imported`; None where it may."""
    place, target = file.relative_to(root).with_suffix("").parts, imported.split(".")
    top = {"experiments"} | (scripts(root) - sys.stdlib_module_names)
    if place[0] == "kernels_pallas":
        allowed = BENCH_MAY_IMPORT if place == ("kernels_pallas", "bench") else KERNELS_MAY_IMPORT
        return None if target[0] in allowed else "kernels_pallas imports JAX, NumPy and itself only"
    if place[:2] == ("tests", "oracles"):
        return "an oracle imports nothing of ours but oracles" if target[0] in OURS | top else None
    if place[0] != "dsv2_jax" or place == ("dsv2_jax", "__init__"):
        return None
    if target[0] in top or target[0] == "tests":
        return f"{target[0]} is at the top: only experiments and tests import it"
    if target[0] != "dsv2_jax":
        return None
    mine, room = place[1], target[1] if len(target) > 1 else ""
    if room not in NUMBERS:
        return f"{room!r} is no room: import the module that has it"
    if NUMBERS[room] > NUMBERS[mine]:
        return f"{mine} is in room {NUMBERS[mine]}, {room} in {NUMBERS[room]}"
    if NUMBERS[room] == NUMBERS[mine] != 0 and room != mine:
        return f"{mine} and {room} are different rooms of number {NUMBERS[mine]}"
    return None


def violations(root: pathlib.Path) -> list[str]:
    files = [file for top in ("dsv2_jax", "kernels_pallas", "tests/oracles") for file in (root / top).rglob("*.py")]
    found = []
    for file in sorted(files):
        for imported in sorted(modules_imported(file, root)):
            if reason := complaint(file, imported, root):
                found.append(f"{file.relative_to(root)} imports {imported}: {reason}")
    return found


def test_rooms_import_only_downwards():
    assert violations(ROOT) == []


def test_every_module_is_in_a_room():
    names = {path.stem for path in (ROOT / "dsv2_jax").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert names - {"__init__", "__pycache__"} <= set(NUMBERS)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("dsv2_jax/config.py", "import dsv2_jax.types as t, dsv2_jax.model.rope"),
        ("dsv2_jax/data/packing.py", "from dsv2_jax.checkpoint import save"),
        ("dsv2_jax/model/moe.py", "from ..train import step"),
        ("dsv2_jax/model/moe.py", "from dsv2_jax import train"),
        ("dsv2_jax/model/moe.py", "import dsv2_jax"),
        ("dsv2_jax/train/loop.py", "def f():\n    from dsv2_jax.inference import generate"),
        ("dsv2_jax/train/loop.py", "import experiments.common"),
        ("dsv2_jax/train/loop.py", "import common"),
        ("kernels_pallas/select.py", "from dsv2_jax.config import ConfigError"),
        ("kernels_pallas/select.py", "import flax"),
        ("kernels_pallas/select.py", "from matplotlib.figure import Figure"),
        ("tests/oracles/moe.py", "from kernels_pallas import select"),
        ("tests/oracles/moe.py", "import dsv2_jax.model.moe"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, line):
    plant(tmp_path, "experiments/common.py", "")
    plant(tmp_path, file, line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("dsv2_jax/presets.py", "from dsv2_jax.config import ModelConfig"),
        ("dsv2_jax/model/moe.py", "from . import router\nfrom dsv2_jax.types import MoEStats"),
        ("dsv2_jax/model/moe.py", "import kernels_pallas.select"),
        ("dsv2_jax/train/loop.py", "from dsv2_jax import checkpoint, config\nfrom dsv2_jax.model import moe"),
        ("dsv2_jax/__init__.py", "from dsv2_jax.train import loop"),
        ("kernels_pallas/select.py", "import functools\nfrom jax.experimental import pallas"),
        ("kernels_pallas/bench.py", "def plot():\n    from matplotlib.figure import Figure"),
        ("tests/oracles/moe.py", "import numpy\nfrom oracles import routing"),
    ],
)
def test_imports_that_go_downwards_are_allowed(tmp_path, file, line):
    plant(tmp_path, file, line)
    assert violations(tmp_path) == []


def plant(root: pathlib.Path, file: str, text: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(text)
