"""`rlfr-vlm doctor`: what this machine has, which engines work, and the line that installs what is
missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib import metadata

import psutil
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
    ("HF engine", "transformers", "pip install -e ."),
    ("vLLM engine", "vllm", "pip install -e '.[vllm]' (GPU) or '.[cpu]' (CPU)"),
    ("DeepSpeed", "deepspeed", "pip install -e '.[deepspeed]'"),
    ("Ray", "ray", "pip install -e '.[ray]'"),
    ("multimodal benchmarks", "vlmeval", "pip install -e '.[eval]'"),
    ("adapters (model.lora)", "peft", "pip install -e '.[lora]'"),
    ("data from the hub, Parquet", "datasets", "pip install -e '.[data]'"),
    ("Weights & Biases", "wandb", "pip install -e '.[trackers]'"),
    ("trackio", "trackio", "pip install -e '.[trackers]'"),
    ("demo data", "sklearn", "pip install -e '.[demo]'"),
    ("report charts", "plotly", "pip install -e ."),
)


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


def devices() -> str:
    """What there is to compute on."""
    import torch

    if torch.cuda.is_available():
        names = [
            f"{torch.cuda.get_device_name(i)} "
            f"({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
            for i in range(torch.cuda.device_count())
        ]
        return ", ".join(names)
    memory = psutil.virtual_memory().total / 2**30
    return f"CPU, {os.cpu_count()} cores, {memory:.0f} GiB"


def doctor() -> int:
    """Print the tables. Returns 0 when the core works, else 1."""
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
    broken = ""
    for part, module, line in PARTS:
        problem = imports(module) if importlib.util.find_spec(module) is not None else "missing"
        table.add_row(part, escape(problem) or "works", escape(line) if problem else "")
        broken = broken or (problem if module == "transformers" else "")
    vision = imports("torchvision")
    table.add_row(
        "torchvision matches torch",
        vision or "works",
        "pip install a torchvision built for this torch, or run make" if vision else "",
    )
    console.print(table)
    return 1 if broken or vision else 0
