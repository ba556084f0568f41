"""`rlfr-vlm bench`: the GRPO step on a fixed workload, to be set beside another trainer's on the
same model, prompts and lengths.

Every step draws P prompts x G samples of exactly N new tokens and takes one optimiser step on all
of them, with flow rewards and the online flow update on. The update follows every response, right
or wrong (`soft_weight` 1): the most that it can cost.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rlfr_vlm.config import Config, parse_config
from rlfr_vlm.errors import UserError


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the workload. Returns medians over the measured steps: seconds by phase, tokens/s, peak
    memory of this process.
    """
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch

    from rlfr_vlm import commands

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        rows = (text_rows if arguments.task == "text" else vision_rows)(
            arguments.prompts_per_step * (arguments.steps + arguments.warmup)
        )
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = bench_config(arguments, data, Path(folder) / "run")
        prompts, heldout, bad = commands.rl_prompts(cfg)
        with commands.workbench(cfg) as parts:
            commands.run_training(parts, prompts, heldout, bad)
            device = str(parts.policy.device)
            gpu_peak = (
                torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
            )
        lines = [
            json.loads(line)
            for line in (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
        ]
    measured = lines[arguments.warmup :]
    tokens = arguments.prompts_per_step * arguments.group_size * arguments.max_new_tokens
    row: dict[str, Any] = {
        "trainer": "rlfr_vlm",
        "task": arguments.task,
        "engine": arguments.engine,
        "dtype": arguments.dtype,
        "device": device,
        "threads": arguments.threads,
        "flow": not arguments.no_flow,
        "prompts": arguments.prompts_per_step,
        "group": arguments.group_size,
        "new_tokens": arguments.max_new_tokens,
        "steps": arguments.steps,
        "step_s_all": [round(line["timing_s/step"], 3) for line in measured],
    }
    for phase in (
        "step",
        "sync",
        "rollout",
        "reward",
        "update",
        *(() if arguments.no_flow else ("flow_score", "flow_update")),
    ):
        row[f"{phase}_s"] = round(
            statistics.median(line[f"timing_s/{phase}"] for line in measured), 3
        )
    row["generated_tokens_per_s"] = round(tokens / row["step_s"], 1)
    row["response_length"] = measured[-1]["response_length/mean"]
    row["peak_rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    if gpu_peak is not None:
        row["peak_gpu_gib"] = round(gpu_peak, 2)
    return row


def bench_config(arguments: argparse.Namespace, data: Path, output: Path) -> Config:
    """The workload as a config: pure bfloat16 or float32, one on-policy update, no evaluation,
    nothing saved before the end.
    """
    return parse_config({
        "output_dir": str(output),
        "model": {
            "path": arguments.model,
            "dtype": "bfloat16" if arguments.dtype == "bf16" else "float32",
            "master_weights": False,
            "freeze_vision": False,
        },
        "data": {"train": str(data), "max_pixels": 1280 * 28 * 28},
        "rollout": {
            "engine": arguments.engine,
            "num_prompts": arguments.prompts_per_step,
            "group_size": arguments.group_size,
            "max_new_tokens": arguments.max_new_tokens,
            "ignore_eos": True,
        },
        "reward": {"answer": "text"},
        "flow": None if arguments.no_flow else {"online": {"soft_weight": 1.0}},
        "train": {
            "steps": arguments.steps + arguments.warmup,
            "save_steps": 10**9,
            "tokens_per_microbatch": arguments.tokens_per_microbatch
            or (2048 if arguments.task == "text" else 16384),
            "log_rollouts": 0,
        },
    })  # fmt: skip


def text_rows(count: int) -> list[dict[str, Any]]:
    """Two-digit sums in words."""
    import numpy as np

    generator = np.random.default_rng(0)
    pairs = [generator.integers(10, 100, 2) for _ in range(count)]
    return [
        {"id": str(i), "prompt": f"What is {x} + {y}?", "answer": str(x + y)}
        for i, (x, y) in enumerate(pairs)
    ]


def vision_rows(count: int) -> list[dict[str, Any]]:
    """Two handwritten digits side by side, 112 x 56 pixels."""
    import base64
    import io

    import numpy as np
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the vision workload draws scikit-learn's digits: pip install 'rlfr-vlm[demo]'"
        ) from None
    digits = load_digits()
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        i, j = generator.integers(0, len(digits.target), 2)
        pixels = (np.concatenate([digits.images[i], digits.images[j]], 1) / 16 * 255).astype(
            np.uint8
        )
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((112, 56), Image.Resampling.BILINEAR).convert("RGB").save(
            buffer, "PNG"
        )
        picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        question = "<image>What is the sum of the two digits?"
        rows.append(
            {
                "id": str(number),
                "prompt": question,
                "images": [picture],
                "answer": str(digits.target[i] + digits.target[j]),
            }
        )
    return rows
