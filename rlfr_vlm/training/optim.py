"""AdamW with gradient clipping, a schedule, and float32 master weights where the model is in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlfr_vlm.errors import StoppedError


def cosine_schedule(step: int, total: int, warmup_frac: float, min_ratio: float) -> float:
    """Factor of the peak learning rate for the step-th update (from 0) of `total`: linear warm-up, then cosine down to `min_ratio`."""
    warmup = int(total * warmup_frac)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizer:
    """One AdamW over named parameters; its state is everything that a resumed run needs of it."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float,
        total_steps: int,
        warmup_frac: float,
        min_lr_ratio: float,
        master_weights: bool = False,
        setting: str = "optim.lr",
    ) -> None:
        """setting: of the config, that holds this learning rate, for messages."""
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.lr, self.max_grad_norm, self.setting = lr, max_grad_norm, setting
        self.schedule = (total_steps, warmup_frac, min_lr_ratio)
        self.steps = 0
        self.master: dict[str, Tensor] = {}
        if master_weights:
            self.master = {name: p.detach().float() for name, p in self.parameters.items() if p.dtype != torch.float32}
        trained = [self.master.get(name, p) for name, p in self.parameters.items()]
        self.adamw = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    @property
    def current_lr(self) -> float:
        """Learning rate of the next update."""
        return self.lr * cosine_schedule(self.steps, *self.schedule)

    def accumulate(self) -> None:
        """After each backward: add low-precision gradients to float32 ones, so that their sum does not depend on the micro-batches."""
        for name, master in self.master.items():
            gradient = self.parameters[name].grad
            if gradient is None:
                continue
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad.add_(gradient)
            self.parameters[name].grad = None

    def step(self) -> float:
        """Clip, update, clear the gradients. Returns the gradient's norm before clipping.

        Raises StoppedError, with nothing changed, when the norm is not finite: no such value may reach the weights.
        """
        self.accumulate()
        trained = {name: self.master.get(name, p) for name, p in self.parameters.items()}
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm):
            broken = [name for name, p in trained.items() if p.grad is not None and not p.grad.isfinite().all()]
            raise StoppedError(
                f"the gradient is not finite at update {self.steps} (first: `{broken[0] if broken else '?'}`); lower {self.setting}"
            )
        if norm > self.max_grad_norm:
            torch._foreach_mul_(gradients, self.max_grad_norm / (norm + 1e-6))
        for group in self.adamw.param_groups:
            group["lr"] = self.current_lr
        self.adamw.step()
        with torch.no_grad():
            for name, master in self.master.items():
                self.parameters[name].copy_(master)
        for parameter in trained.values():
            parameter.grad = None
        self.steps += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Moments, master weights and the number of updates."""
        return {"adamw": self.adamw.state_dict(), "master": self.master, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, for the same parameters."""
        self.adamw.load_state_dict(state["adamw"])
        for name, master in state["master"].items():
            self.master[name].copy_(master)
        self.steps = state["steps"]
