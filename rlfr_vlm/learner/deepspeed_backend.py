"""Training sharded over ranks by DeepSpeed's ZeRO (arXiv:1910.02054). The only module that imports
deepspeed.
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rlfr_vlm.config import DeepSpeedConfig
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.learner.optim import (
    COUNT,
    MOMENTS,
    OptimizerSettings,
    not_finite,
    sampled,
    stored_moment,
)
from rlfr_vlm.models.policy import Policy, WeightAccess
from rlfr_vlm.ranks import Ranks

REDUCE_BUCKET = 50_000_000  # elements of gradient that are reduced at a time
PERSISTENT = 10_000  # stage 3: parameters of fewer elements stay whole on every rank


def import_deepspeed(device: str) -> Any:
    """The library, quiet. Raises UserError where it is not installed."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)\."
    )
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"deepspeed: DeepSpeed cannot be imported ({error}); pip install 'rlfr-vlm[deepspeed]'"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory reduction is for inference only, and compiles C++ at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ShardedOptimizer:
    """A module whose training DeepSpeed shards; see PolicyOptimizer.

    Losses are this rank's shares, which add up over ranks, while DeepSpeed averages: each is
    multiplied by the number of ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        settings: OptimizerSettings,
        cfg: DeepSpeedConfig,
        stage: int,
        ranks: Ranks,
        dtype: torch.dtype,
        backward_elsewhere: bool = False,
    ) -> None:
        """parameters: those of `module` that learn, by name. backward_elsewhere: gradients come
        without a call of `backward` (stage 1).
        """
        self.parameters, self.settings, self.stage, self.ranks = (
            dict(parameters),
            settings,
            stage,
            ranks,
        )
        self.steps, self.backward_elsewhere = 0, backward_elsewhere
        device = next(iter(parameters.values())).device
        self._library = import_deepspeed(device.type)
        trained = list(self.parameters.values())
        if cfg.offload != "none" and device.type != "cpu":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer: Any = DeepSpeedCPUAdam(
                trained, settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
            )
        else:
            optimizer = settings.make(trained)
        self.engine, *_ = self._library.initialize(
            model=module,
            model_parameters=trained,
            optimizer=optimizer,
            config=engine_config(cfg, stage, dtype, settings.max_grad_norm),
            dist_init_required=False,
        )
        ranks.limit_waits()  # DeepSpeed makes groups of its own with torch's default limit

    @property
    def current_lr(self) -> float:
        """Learning rate of the next update."""
        return self.settings.lr_at(self.steps)

    def backward(self, loss: Tensor) -> None:
        """See PolicyOptimizer; stages 2 and 3 reduce here, so every rank must call it equally
        often.
        """
        self.ranks.at(f"backward, update {self.steps}")
        self.engine.backward(loss * self.ranks.size)

    def step(self) -> float:
        """See PolicyOptimizer."""
        self.ranks.at(f"optimiser step, update {self.steps}")
        if self.stage == 1:
            for parameter in self.parameters.values():
                if parameter.grad is None:  # another rank may have one, and reducing is for all
                    parameter.grad = torch.zeros_like(parameter)
        if self.backward_elsewhere:
            torch._foreach_mul_(
                [p.grad for p in self.parameters.values() if p.grad is not None],
                float(self.ranks.size),
            )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.current_lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        if not self.engine.was_step_applied() or norm is None or not math.isfinite(float(norm)):
            raise not_finite(self.steps, self.settings)
        self.steps += 1
        return float(norm)

    def skip(self) -> float:
        """See PolicyOptimizer."""
        self.steps += 1
        return 0.0

    def sample(self) -> Tensor:
        """See PolicyOptimizer: of this rank's shard."""
        return sampled(self._flat_tensors())

    # -- whole tensors -----------------------------------------------------------------------------

    def entries(self) -> Iterator[tuple[str, Tensor]]:
        """See PolicyOptimizer: a collective of all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        low = any(p.dtype != torch.float32 for p in self.parameters.values())
        started = bool(self._flat_state())
        for name, parameter in self.parameters.items():
            self.ranks.at(f"gathering `{name}`")
            if low:
                yield (
                    f"master/{name}",
                    _view(safe_get_full_fp32_param(parameter), self.shape_of(parameter)),
                )
            for part in MOMENTS if started and self.settings.name == "adamw" else ():
                yield (
                    f"{part}/{name}",
                    _view(safe_get_full_optimizer_state(parameter, part), self.shape_of(parameter)),
                )
        if "step" in (state := self._flat_state()):
            yield COUNT, torch.as_tensor(state["step"], dtype=torch.float32)

    @torch.no_grad()
    def load_entries(self, read: Callable[[str], Tensor | None], steps: int) -> None:
        """See PolicyOptimizer: a collective of all ranks. Call it after the weights themselves are
        in place.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if (count := read(COUNT)) is not None:
            self._start_state(float(count))
        for name, parameter in self.parameters.items():
            stored = read(f"master/{name}")
            with self.whole([parameter]):
                value = (
                    parameter.detach().float().clone()
                    if stored is None
                    else stored.to(parameter.device, torch.float32)
                )
            safe_set_full_fp32_param(parameter, value)
            for part in MOMENTS if count is not None else ():
                moment = stored_moment(read, part, name).to(parameter.device, torch.float32)
                safe_set_full_optimizer_state(parameter, moment, part)
        self.steps = steps

    def _flat_tensors(self) -> list[Tensor]:
        """The flat float32 shards that torch's optimiser steps."""
        sharded = self.engine.optimizer
        if self.stage == 3:
            return list(sharded.fp32_partitioned_groups_flat)
        return [p for group in sharded.optimizer.param_groups for p in group["params"]]

    def _flat_state(self) -> dict[str, Any]:
        inner = self.engine.optimizer.optimizer
        return next(
            (inner.state[flat] for flat in self._flat_tensors() if inner.state.get(flat)), {}
        )

    def _start_state(self, count: float) -> None:
        """Moments of zeros, as after a first step, for DeepSpeed to know where each parameter's
        stand.
        """
        sharded = self.engine.optimizer
        for flat in self._flat_tensors():
            zeros = {part: torch.zeros_like(flat, dtype=torch.float32) for part in MOMENTS}
            sharded.optimizer.state[flat] = {
                "step": torch.tensor(count, device=flat.device),
                **zeros,
            }
        if hasattr(sharded, "_lazy_init_hp_params_optimizer_state"):
            sharded._lazy_init_hp_params_optimizer_state()

    def whole(
        self, parameters: Sequence[nn.Parameter], source: int | None = None
    ) -> AbstractContextManager[Any]:
        """While open, these parameters are whole on every rank; with `source`, what that rank makes
        of them counts afterwards.
        """
        if self.stage < 3:
            return nullcontext()
        return self._library.zero.GatheredParameters(list(parameters), modifier_rank=source)

    def shape_of(self, tensor: Any) -> torch.Size:
        """The whole shape of a parameter, sharded or not."""
        return torch.Size(getattr(tensor, "ds_shape", tensor.shape))

    def destroy(self) -> None:
        """See PolicyOptimizer: hooks, buffers, and at stage 3 DeepSpeed's list of the modules that
        it is in the middle of.
        """
        self.engine.destroy()
        if self.stage == 3:
            from deepspeed.runtime.zero import parameter_offload

            parameter_offload.FWD_MODULE_STACK.clear()


def _view(tensor: Tensor | None, shape: torch.Size) -> Tensor:
    if tensor is None:
        raise StoppedError(
            "DeepSpeed does not give back a parameter's optimiser state; another version than "
            "0.19.8?"
        )
    return tensor.detach().view(shape)


def engine_config(
    cfg: DeepSpeedConfig, stage: int, dtype: torch.dtype, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's configuration. Gradients add up in float32, whatever the model's dtype, and a
    step comes when the caller says so.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
    }
    pinned = torch.cuda.is_available()
    if cfg.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": PERSISTENT,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
        if cfg.offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "steps_per_print": None,
    }


def shard_policy(
    policy: Policy, settings: OptimizerSettings, cfg: DeepSpeedConfig, ranks: Ranks
) -> ShardedOptimizer:
    """Hand the policy's weights to DeepSpeed; its forward, engines' weights and exports go through
    it from now on.
    """
    optimizer = ShardedOptimizer(
        policy.module, policy.trained(), settings, cfg, cfg.zero_stage, ranks, policy.dtype
    )
    if cfg.zero_stage < 3:
        policy.access = WeightAccess(optimizer.engine, shared=True)
        return optimizer
    head = policy.model.get_output_embeddings().weight
    optimizer._library.zero.register_external_parameter(policy.module, head)
    policy.weights_as_stored = False
    names = {
        id(p): re.sub(r"^model\.", "", name, count=1)
        for name, p in policy.module.named_parameters()
    }

    def whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        first = names.get(id(parameters[0]), "?") if parameters else "?"
        ranks.at(f"gathering {len(parameters)} weights from `{first}`")
        return optimizer.whole(parameters)

    policy.access = WeightAccess(
        optimizer.engine,
        shared=True,
        sharded=True,
        whole=whole,
        whole_for_writing=lambda parameters: optimizer.whole(parameters, source=0),
        shape_of=optimizer.shape_of,
    )
    return optimizer


def shard_field(
    network: VelocityNet, settings: OptimizerSettings, cfg: DeepSpeedConfig, ranks: Ranks
) -> ShardedOptimizer:
    """A second engine, for the flow field: its moments are sharded, its weights whole on every
    rank.

    Ranks go backwards through it as often as they have latents to follow; its gradients meet at the
    step (stage 1).
    """
    parameters = dict(network.named_parameters())
    return ShardedOptimizer(
        network, parameters, settings, cfg, 1, ranks, torch.float32, backward_elsewhere=True
    )
