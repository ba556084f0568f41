"""Imports run downward, and heavy libraries have one importer each."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import rlfr_vlm

ROOT = Path(rlfr_vlm.__file__).parent
LEVELS = [
    {"errors", "faults", "finite", "shares"},
    {"config", "types"},
    {"ranks", "batch"},
    {"flow"},
    {"models", "rewards"},
    {"data"},
    {"algorithm"},
    {"rollout"},
    {"learner"},
    {"storage", "evaluation"},
    {"run"},
    {"training"},
    {"fitting"},
    {"launch", "planning", "preflight"},
    {"report"},
    {"commands", "bench", "doctor", "arguments", "demo", "cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
ONE_IMPORTER = {
    "vllm": "rollout/vllm_engine.py",
    "deepspeed": "learner/deepspeed_backend.py",
    "ray": "launch/ray_launch.py",
    "vlmeval": "evaluation/vlm/process.py",
}


def imported(path):
    """Modules imported anywhere in a file, except for type checking only."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_imports_run_downward():
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imported(path):
            if name.startswith("rlfr_vlm."):
                assert LEVEL[name.split(".")[1]] <= LEVEL[own], (
                    f"{path.relative_to(ROOT)} imports {name}"
                )


def test_heavy_libraries_have_one_importer():
    for path in ROOT.rglob("*.py"):
        for name in imported(path):
            owner = ONE_IMPORTER.get(name.split(".")[0])
            assert owner is None or path.relative_to(ROOT).as_posix() == owner, (
                f"{path} imports {name}"
            )


def test_light_modules_load_nothing_heavy():
    code = (
        "import sys, rlfr_vlm, rlfr_vlm.config, rlfr_vlm.types, rlfr_vlm.algorithm.losses, "
        "rlfr_vlm.algorithm.advantages\n"
        "import rlfr_vlm.flow.field, rlfr_vlm.flow.reward, rlfr_vlm.cli\n"
        "heavy = {'vllm', 'deepspeed', 'ray', 'vlmeval', 'transformers', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_the_core_runs_without_the_heavy_libraries():
    """The whole training path imports, and an engine is found, where none of them can be imported."""
    code = (
        "import sys, importlib.machinery as machinery\n"
        "absent = {'vllm', 'deepspeed', 'ray', 'vlmeval', 'datasets', 'peft', 'trl', 'sklearn', "
        "'plotly', 'accelerate'}\n"
        "class Filtered(machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.split('.')[0] in absent else super().find_spec(name, path, "
        "target)\n"
        "sys.meta_path[:] = [Filtered if f is machinery.PathFinder else f for f in sys.meta_path]\n"
        "sys.path.insert(0, '.')\n"
        "import rlfr_vlm.commands, rlfr_vlm.rollout.hf_engine, rlfr_vlm.bench, "
        "rlfr_vlm.training.loop\n"
        "from rlfr_vlm.rollout import make_engine\n"
        "assert not absent & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_a_fault_point_and_a_poisoned_value_never_share_a_name():
    """Their passings are counted together: a fault planted at the third step would come at the
    third response.
    """
    text = "".join(path.read_text() for path in ROOT.rglob("*.py"))
    points, values = (
        set(re.findall(rf'\b{call}\("(\w+)"', text)) for call in ("faultpoint", "poison")
    )
    assert points and values and not points & values


def test_a_class_name_has_one_meaning():
    """Over the whole package, also beside the aliases of types at the top of a module."""
    classes, aliases = {}, {}
    for path in sorted(ROOT.rglob("*.py")):
        tree, place = ast.parse(path.read_text()), path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(place)
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        aliases.setdefault(target.id, []).append(place)
    assert len(classes) > 200
    found = {name: places + aliases.get(name, []) for name, places in classes.items()}
    assert not {name: places for name, places in found.items() if len(places) > 1}
