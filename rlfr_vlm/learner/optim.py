"""AdamW or SGD with gradient clipping, a schedule, and float32 master weights where the model is in
bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rlfr_vlm.config import Config
from rlfr_vlm.errors import CheckpointError, NonFiniteError

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
SAMPLED = 2**18  # weights that are watched
# the entry that says how often the moments were updated: skipped updates are not among them
COUNT = "adamw/step"


def cosine_schedule(step: int, total: int, warmup_frac: float, min_ratio: float) -> float:
    """Factor of the peak learning rate for the step-th update (from 0) of `total`: linear warm-up,
    then cosine down to `min_ratio`.
    """
    warmup = int(total * warmup_frac)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class OptimizerSettings:
    """What decides an optimiser's numbers."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    total_steps: int
    warmup_frac: float
    min_lr_ratio: float
    name: str = "adamw"
    setting: str = "optim.lr"  # of the config, that holds the learning rate, for messages

    @classmethod
    def of(cls, cfg: Config, updates: int) -> OptimizerSettings:
        """The policy's."""
        optim = cfg.optim
        schedule = (updates, optim.warmup_frac, optim.min_lr_ratio)
        lr = optim.lr * cfg.monitors.roll_back_lr**cfg.monitors.roll_backs
        return cls(
            lr, optim.betas, optim.weight_decay, optim.max_grad_norm, *schedule, name=optim.name
        )

    def lr_at(self, step: int) -> float:
        """Learning rate of the step-th update, from 0."""
        return self.lr * cosine_schedule(
            step, self.total_steps, self.warmup_frac, self.min_lr_ratio
        )

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """torch's optimiser over these tensors."""
        if self.name == "sgd":
            return torch.optim.SGD(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay, fused=True
        )


class PolicyOptimizer(Protocol):
    """What trains the policy, in one process or sharded over ranks."""

    steps: int  # updates so far

    @property
    def current_lr(self) -> float:
        """Learning rate of the next update."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's share of the loss; shares of all ranks and micro-batches
        add up.
        """
        ...

    def step(self) -> float:
        """Clip, update, clear the gradients. Returns the norm before clipping. Raises
        NonFiniteError when it is not finite.
        """
        ...

    def skip(self) -> float:
        """Let an update pass in which there was nothing to learn: the weights stay, the schedule
        goes on. Returns 0.0.
        """
        ...

    def sample(self) -> Tensor:
        """Every so-many-th of the weights that this rank steps, about 2^18 of them, [K] float32: to
        see how far they move.
        """
        ...

    def entries(self) -> Iterator[tuple[str, Tensor]]:
        """Master weights and moments, whole, as (`part/parameter`, tensor). Where they are sharded,
        all ranks iterate together.
        """
        ...

    def load_entries(self, read: Callable[[str], Tensor | None], steps: int) -> None:
        """Restore what `entries` gave, at any number of ranks; `read` returns None for what was not
        stored.
        """
        ...

    def destroy(self) -> None:
        """Let go of whatever keeps model and state in memory. The optimiser is of no use
        afterwards.
        """
        ...


class Optimizer:
    """One optimiser over named parameters that every rank holds whole; its state is everything that
    a resumed run needs of it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimizerSettings,
        master_weights: bool = False,
        add_up: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        """add_up: sums gradients over ranks, in place."""
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.settings, self.add_up = settings, add_up
        self.steps = 0
        self.master: dict[str, Tensor] = {}
        if master_weights:
            self.master = {
                name: p.detach().float()
                for name, p in self.parameters.items()
                if p.dtype != torch.float32
            }
        self.torch = settings.make(list(self._trained.values()))

    @property
    def _trained(self) -> dict[str, Tensor]:
        return {name: self.master.get(name, p) for name, p in self.parameters.items()}

    @property
    def current_lr(self) -> float:
        """Learning rate of the next update."""
        return self.settings.lr_at(self.steps)

    def backward(self, loss: Tensor) -> None:
        """See PolicyOptimizer."""
        loss.backward()
        self.accumulate()

    def accumulate(self) -> None:
        """After each backward: add low-precision gradients to float32 ones, so that their sum does
        not depend on the micro-batches.
        """
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

        Raises NonFiniteError, with nothing changed, when the norm is not finite: no such value may
        reach the weights.
        """
        self.accumulate()
        trained = self._trained
        if self.add_up is not None or any(p.grad is not None for p in trained.values()):
            for parameter in trained.values():
                if (
                    parameter.grad is None
                    # another rank may have one; and where there is but one, the numbers are to be
                    # the same
                ):
                    parameter.grad = torch.zeros_like(parameter)
        if self.add_up is not None:
            self.add_up([p.grad for p in trained.values() if p.grad is not None])
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if not math.isfinite(norm):
            broken = [
                name
                for name, p in trained.items()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            raise not_finite(
                self.steps, self.settings, f" (first: `{broken[0] if broken else '?'}`)"
            )
        if norm > self.settings.max_grad_norm:
            torch._foreach_mul_(gradients, self.settings.max_grad_norm / (norm + 1e-6))
        for group in self.torch.param_groups:
            group["lr"] = self.current_lr
        self.torch.step()
        with torch.no_grad():
            for name, master in self.master.items():
                self.parameters[name].copy_(master)
        for parameter in trained.values():
            parameter.grad = None
        self.steps += 1
        return norm

    def skip(self) -> float:
        """See PolicyOptimizer."""
        self.steps += 1
        return 0.0

    def sample(self) -> Tensor:
        """See PolicyOptimizer."""
        return sampled(list(self._trained.values()))

    def entries(self) -> Iterator[tuple[str, Tensor]]:
        """See PolicyOptimizer."""
        for name, master in self.master.items():
            yield f"master/{name}", master
        for name, parameter in self._trained.items():
            state = self.torch.state.get(parameter, {})
            for part in MOMENTS:
                if part in state:
                    yield f"{part}/{name}", state[part]
        count = next(
            (state["step"] for state in self.torch.state.values() if "step" in state), None
        )
        if count is not None:
            yield COUNT, count

    @torch.no_grad()
    def load_entries(self, read: Callable[[str], Tensor | None], steps: int) -> None:
        """See PolicyOptimizer. Call it after the weights themselves are in place."""
        for name, master in self.master.items():
            stored = read(f"master/{name}")
            master.copy_(self.parameters[name] if stored is None else stored)
        count = read(COUNT)
        if count is not None:
            for name, parameter in self._trained.items():
                state = {
                    part: stored_moment(read, part, name).to(
                        parameter.device, torch.float32, copy=True
                    )
                    for part in MOMENTS
                }
                self.torch.state[parameter] = {
                    "step": count.to(parameter.device, copy=True),
                    **state,
                }
        self.steps = steps

    def destroy(self) -> None:
        """See PolicyOptimizer: nothing else holds them."""


def stored_moment(read: Callable[[str], Tensor | None], part: str, name: str) -> Tensor:
    """A moment that was stored. Raises CheckpointError where it was not."""
    found = read(f"{part}/{name}")
    if found is None:
        raise CheckpointError(
            f"the checkpoint has no `{part}` of parameter `{name}`: it is of another model"
        )
    return found


@torch.no_grad()
def sampled(tensors: Sequence[Tensor]) -> Tensor:
    """Every so-many-th element of each of these, about SAMPLED in all, as a new [K] float32."""
    every = max(1, sum(t.numel() for t in tensors) // SAMPLED)
    return torch.cat([t.detach().flatten()[::every].float() for t in tensors])


def not_finite(steps: int, settings: OptimizerSettings, where: str = "") -> NonFiniteError:
    """What to say of a gradient that is not finite."""
    return NonFiniteError(
        f"the gradient is not finite at update {steps}{where}; lower {settings.setting}"
    )
