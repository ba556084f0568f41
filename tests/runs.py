"""Small real runs for the tests: a config, a data folder, and the command line in a process of its
own.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

POLICY = "rank_0000/policy-0000.safetensors"  # of a checkpoint by one process
ROOT = Path(__file__).resolve().parent.parent


def make_data(folder: Path, count: int = 8) -> None:
    """Pictures with one or two bars and the question how many; rows for training, evaluation and
    fitting the flow.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("train", "test", "expert"):
        rows = []
        for i in range(count):
            picture = Image.new("RGB", (56, 56), (20 * i, 40, 90))
            for bar in range(i % 2 + 1):
                ImageDraw.Draw(picture).rectangle(
                    [8 + 24 * bar, 8, 20 + 24 * bar, 48], fill=(255, 255, 255)
                )
            picture.save(folder / "images" / f"{name}{i}.png")
            row = {
                "id": f"{name}{i}",
                "prompt": "<image>How many?",
                "images": [f"images/{name}{i}.png"],
                "answer": str(i % 2 + 1),
            }
            rows.append({**row, "response": f"= \\boxed{{{row['answer']}}}", "data_source": "bars"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_text_data(folder: Path, count: int = 8) -> None:
    """The same files with sums to do, for models without eyes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test", "expert"):
        rows = [
            {
                "id": f"{name}{i}",
                "prompt": f"How much is {i} + 2?",
                "answer": str(i + 2),
                "data_source": "sums",
            }
            for i in range(count)
        ]
        lines = [json.dumps({**row, "response": f"= \\boxed{{{row['answer']}}}"}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def make_config(folder: Path, model: str, **sections) -> Path:
    """A run of four small steps with the flow on, saved at every second one."""
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"path": model, "dtype": "float32", "freeze_vision": False},
        "data": {
            f: str(folder / f"{n}.jsonl")
            for f, n in (("train", "train"), ("eval", "test"), ("expert", "expert"))
        }
        | {"min_pixels": 784},
        "rollout": {"engine": "hf", "num_prompts": 2, "group_size": 4, "max_new_tokens": 8},
        "reward": {"answer": "text", "max_error_frac": 1.0, "grader": {"workers": 1}},
        "flow": {
            "fit": {"steps": 2, "batch_size": 4, "batch_mul": 1},
            "network": {"depth": 1},
            "online": {"soft_weight": 0.5},
        },
        "optim": {"lr": 1e-3},
        "train": {"steps": 4, "save_steps": 2},
        "eval": {"num_samples": 2, "limit": 4},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def cli(
    *arguments: str, fault: str | None = None, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run the real command line in its own process group, one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    env.pop("RLFR_FAULT", None)
    if fault:
        env["RLFR_FAULT"] = fault
    command = [sys.executable, "-m", "rlfr_vlm.cli", *arguments]
    return subprocess.run(
        command,
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        start_new_session=True,
    )


def digest(run: Path, step: int) -> dict[str, str]:
    """sha256 of the final weights, policy and field."""
    folder = run / "checkpoints" / f"global_step_{step}"
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in (POLICY, "flow/flow.safetensors")
    }


def python(module: str, *arguments: object, timeout: float = 300, **environment: str) -> str:
    """Run a module in a process of its own, one thread. Returns what it printed; fails with its
    last words where it fails.
    """
    return _checked([sys.executable, "-m", module, *map(str, arguments)], timeout, environment)


def torchrun(
    ranks: int, module: str, *arguments: object, timeout: float = 300, **environment: str
) -> str:
    """The same on several ranks, over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = [
        "--nproc-per-node",
        str(ranks),
        "--master-addr",
        "127.0.0.1",
        "--master-port",
        str(port),
        "-m",
    ]
    return _checked(
        [sys.executable, "-m", "torch.distributed.run", *start, module, *map(str, arguments)],
        timeout,
        environment,
    )


def _checked(command: list[str], timeout: float, environment: dict[str, str]) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        command,
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
