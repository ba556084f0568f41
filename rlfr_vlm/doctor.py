"""`rlfr-vlm doctor`: what this machine has, which engines are there, and the line that installs
what is missing.

Nothing heavy is imported: versions come from the installed packages' metadata. That an engine
really loads is seen with `--deep` alone, which imports each in an interpreter of its own and takes
a minute.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

CORE = (
    "torch",
    "torchvision",
    "transformers",
    "safetensors",
    "math-verify",
    "pydantic",
    "pillow",
    "numpy",
)
PARTS = (
    ("HF engine", "transformers", "pip install rlfr-vlm"),
    ("vLLM engine", "vllm", "pip install 'rlfr-vlm[vllm]' (GPU) or 'rlfr-vlm[cpu]' (CPU)"),
    ("DeepSpeed", "deepspeed", "pip install 'rlfr-vlm[deepspeed]'"),
    ("Ray", "ray", "pip install 'rlfr-vlm[ray]'"),
    ("multimodal benchmarks", "vlmeval", "pip install 'rlfr-vlm[eval]'"),
    ("adapters (model.lora)", "peft", "pip install 'rlfr-vlm[lora]'"),
    ("data from the hub, Parquet", "datasets", "pip install 'rlfr-vlm[data]'"),
    ("Weights & Biases", "wandb", "pip install 'rlfr-vlm[trackers]'"),
    ("trackio", "trackio", "pip install 'rlfr-vlm[trackers]'"),
    ("demo data", "sklearn", "pip install 'rlfr-vlm[demo]'"),
    ("report charts", "plotly", "pip install rlfr-vlm"),
)
NEEDED = ("torch", "transformers")  # without them nothing works


def imports(module: str) -> str:
    """Empty when a fresh interpreter imports the module, else the last line of its error."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]


def version(package: str) -> str:
    """Installed version, or "missing"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def mismatch(package: str, other: str) -> str:
    """Empty where the version of `other` is one that `package` asks for, else what it asks for;
    `missing` where either is not installed.
    """
    if "missing" in (version(package), version(other)):
        return "missing"
    for line in metadata.requires(package) or []:
        try:
            asked = Requirement(line)
        except InvalidRequirement:  # of a package that says it in a way of its own
            continue
        applies = asked.marker is None or asked.marker.evaluate({"extra": ""})
        if asked.name == other and applies and not asked.specifier.contains(version(other), True):
            return f"asks for {other}{asked.specifier}, {version(other)} is installed"
    return ""


def builds(package: str, other: str) -> str:
    """Empty where both are builds of one kind, else both versions: `2.13.0+cpu` beside `0.28.0` may
    not load, which only importing them tells.
    """
    found = [version(name) for name in (package, other)]
    kinds = {text.partition("+")[2] for text in found}
    return "" if len(kinds) == 1 else f"{package} {found[0]}, {other} {found[1]}"


def devices() -> str:
    """What there is to compute on, as the driver and the system say."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    if lines:
        return "; ".join(lines)
    memory = psutil.virtual_memory().total / 2**30
    return f"CPU, {os.cpu_count()} cores, {memory:.0f} GiB"


def part_state(module: str, distributions: Mapping[str, Sequence[str]], deep: bool) -> str:
    """`missing`, or which version is installed; deep: `works`, or the last line of its error."""
    if importlib.util.find_spec(module) is None:
        return "missing"
    if deep:
        return imports(module) or "works"
    names = sorted(set(distributions.get(module, ())))
    return "installed" + "".join(f", {name} {version(name)}" for name in names)


def doctor(deep: bool = False) -> int:
    """Print the tables; deep: import what is installed, to see whether it loads. Returns 0 when the
    core is there (deep: works), else 1.
    """
    console = Console()
    console.print(
        f"python {sys.version.split()[0]}   devices: {devices()}   disk free: "
        f"{shutil.disk_usage('.').free / 2**30:.0f} GiB",
        highlight=False,
    )
    console.print("   ".join(f"{name} {version(name)}" for name in CORE), highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("part", "state", "to install"):
        table.add_column(column)
    distributions = metadata.packages_distributions()
    modules = dict.fromkeys((*NEEDED, *(module for _, module, _ in PARTS)))
    states = {module: part_state(module, distributions, deep) for module in modules}
    well = {name for name, state in states.items() if state.startswith(("works", "installed"))}
    for part, module, line in PARTS:
        table.add_row(part, escape(states[module]), "" if module in well else escape(line))
    vision = imports("torchvision") if deep else mismatch("torchvision", "torch")
    other = "" if deep else builds("torchvision", "torch")
    table.add_row(
        "torchvision matches torch",
        escape(vision)
        or ("works" if deep else f"version yes, build unsure ({other})" if other else "yes"),
        "pip install a torchvision built for this torch, or run make" if vision else "",
    )
    console.print(table)
    if not deep:
        console.print("rlfr-vlm doctor --deep imports each of them to see whether it loads")
    return 0 if not vision and well.issuperset(NEEDED) else 1
