"""What a fit of the flow field keeps while it goes on, so that a stopped one need not start anew;
and how long it will take.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlfr_vlm.faults import faultpoint
from rlfr_vlm.learner.optim import Optimizer

FOLDER = ".fit"  # beside the field's files, until the fit is done
LOG_FILE = "flow_fit.jsonl"
MOMENTS = "moments of "


class Work:
    """Weights, moments and the step, written now and then; and the log, a line per step."""

    def __init__(self, folder: Path, key: str, say: Callable[[str], None]) -> None:
        """key: digest of what decides the fit's numbers; what was kept under another one is thrown
        away, and that is said.
        """
        self.folder, self.key, self.say = folder / FOLDER, key, say
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log = self.folder / "state.safetensors", folder / LOG_FILE
        self._tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                facts = file.metadata() or {}
                if facts.pop("key", None) == self.key:
                    self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    self.facts = {name: json.loads(value) for name, value in facts.items()}
        except (SafetensorError, OSError, ValueError):
            pass
        if not self.facts:
            self.say(
                f"{self.path} is of a fit with other settings or rows, or damaged: this one starts "
                "anew"
            )

    def keep(
        self,
        step: int,
        optimizers: Mapping[str, Optimizer],
        weights: Mapping[str, Mapping[str, Tensor]],
        **facts: object,
    ) -> None:
        """Keep this in place of what was kept before."""
        parts = {
            **weights,
            **{MOMENTS + name: dict(optimizer.entries()) for name, optimizer in optimizers.items()},
        }
        tensors = {
            f"{name}/{key}": t.detach().cpu().contiguous().clone()
            for name, part in parts.items()
            for key, t in part.items()
        }
        metadata = {"key": self.key, "step": str(step)} | {
            name: json.dumps(value) for name, value in facts.items()
        }
        temporary = self.path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(self.path)
        faultpoint("fit_state")

    def restore(
        self, optimizers: Mapping[str, Optimizer], networks: Mapping[str, torch.nn.Module]
    ) -> int:
        """Put weights and moments back, and the log to where it was then. Returns the step that was
        done, 0 for a fresh start.
        """
        step = int(self.facts.get("step", 0))
        lines = self.log.read_text().splitlines()[:step] if self.log.exists() else []
        self.log.write_text("".join(f"{line}\n" for line in lines))
        if not step:
            return 0
        for name, network in networks.items():
            network.load_state_dict(self.part(name))
        for name, optimizer in optimizers.items():
            optimizer.load_entries(self.part(MOMENTS + name).get, step)
        self.say(f"flow fit: goes on after step {step}")
        return step

    def part(self, name: str) -> dict[str, Tensor]:
        """Tensors kept under a name."""
        return {
            key.removeprefix(f"{name}/"): tensor
            for key, tensor in self._tensors.items()
            if key.startswith(f"{name}/")
        }

    def clear(self) -> None:
        """The fit is done."""
        shutil.rmtree(self.folder)


class Clock:
    """Time left, from the steps done so far."""

    def __init__(self, done: int, steps: int) -> None:
        self.done, self.steps, self.start = done, steps, time.monotonic()

    def left(self, step: int) -> str:
        """`  42 s left`; nothing at the end or before there is a pace."""
        if step <= self.done + 1 or step >= self.steps:
            return ""
        seconds = (time.monotonic() - self.start) / (step - self.done) * (self.steps - step)
        return f"  {seconds:.0f} s left" if seconds < 120 else f"  {seconds / 60:.0f} min left"
