"""From a config to what learns: optimisers, sharded where the config says so, heads, the flow
field, the reference policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlfr_vlm.config import Config, FlowConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.reward import TokenTypes
from rlfr_vlm.flow.spec import FlowSpec
from rlfr_vlm.learner.latent_window import LatentWindow
from rlfr_vlm.learner.optim import Optimizer, OptimizerSettings, PolicyOptimizer
from rlfr_vlm.models.heads import LogPartitionHead, ValueHead
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Learner:
    """Everything that learns, and the reference that does not."""

    policy: Policy
    optimizer: PolicyOptimizer
    field: FlowField | None = None
    flow_optimizer: PolicyOptimizer | None = None  # None: the field is frozen
    reference: Policy | None = None
    head: nn.Module | None = None  # of values (PPO), or log Z (FlowRL)
    head_optimizer: PolicyOptimizer | None = None
    contrast_optimizer: PolicyOptimizer | None = None  # of the field's contrast
    # what the field learns from in small steps; None: each update's own latents
    window: LatentWindow | None = None
    field_start: Tensor | None = None  # a sample of the field's weights as the run began with them
    ranks: Ranks = ALONE  # who learns together: each has its share of every batch

    @property
    def optimizers(self) -> dict[str, PolicyOptimizer]:
        """Those that there are, by the name under which a checkpoint holds them."""
        every = {
            "optimizer": self.optimizer,
            "flow_optimizer": self.flow_optimizer,
            "head_optimizer": self.head_optimizer,
        }
        every["contrast_optimizer"] = self.contrast_optimizer
        return {name: optimizer for name, optimizer in every.items() if optimizer is not None}

    @property
    def field_optimizers(self) -> dict[str, PolicyOptimizer]:
        """Of the field's networks that learn, by their names."""
        every = {"network": self.flow_optimizer, "contrast": self.contrast_optimizer}
        return {name: optimizer for name, optimizer in every.items() if optimizer is not None}

    @property
    def token_types(self) -> TokenTypes | None:
        """Of the field."""
        return None if self.field is None else self.field.types


def make_learner(cfg: Config, policy: Policy, ranks: Ranks = ALONE) -> Learner:
    """Everything that learns, with its optimisers, sharded where the config says so; the reference
    policy where the objective has one.
    """
    warmup_steps = cfg.flow.online.warmup_steps if cfg.flow is not None else 0
    updates = (cfg.train.steps - warmup_steps) * cfg.algorithm.updates_per_rollout
    settings = OptimizerSettings.of(cfg, updates)
    reference, head = make_reference(cfg, policy), make_head(cfg, policy)
    field = make_field(cfg.flow, policy, cfg.seed) if cfg.flow is not None else None
    learner = Learner(
        policy, make_optimizer(cfg, policy, settings, ranks), reference=reference, ranks=ranks
    )
    if head is not None:
        value, flowrl = cfg.algorithm.value, cfg.algorithm.flowrl
        lr, decay, name = (
            (value.lr, 0.0, "value")
            if isinstance(head, ValueHead)
            else (flowrl.lr, flowrl.weight_decay, "flowrl")
        )
        own = replace(
            settings, lr=lr, weight_decay=decay, name="adamw", setting=f"algorithm.{name}.lr"
        )
        head_optimizer = Optimizer(
            dict(head.named_parameters()), own, add_up=adder(cfg, ranks, mean=sharded(cfg))
        )
        learner = replace(learner, head=head, head_optimizer=head_optimizer)
    if cfg.flow is None or field is None:
        return learner
    if not cfg.flow.online.enabled:
        for network in field.networks.values():
            network.requires_grad_(False)
        return replace(learner, field=field)
    online = cfg.flow.online
    every = (
        cfg.train.steps
        * cfg.algorithm.updates_per_rollout
        * (online.updates if online.window else 1)
    )
    schedule = (every, cfg.optim.warmup_frac, cfg.optim.min_lr_ratio)
    flow_settings = OptimizerSettings(
        online.lr, (0.9, 0.95), 0.0, 1.0, *schedule, setting="flow.online.lr"
    )
    learns = [name for name in field.networks if name == "contrast" or online.networks == "all"]
    optimizers = {
        name: make_flow_optimizer(cfg, field.networks[name], flow_settings, ranks)
        for name in learns
    }
    for name, network in field.networks.items():
        network.requires_grad_(name in learns)
    return replace(
        learner,
        field=field,
        flow_optimizer=optimizers.get("network"),
        contrast_optimizer=optimizers.get("contrast"),
        window=LatentWindow(online.window * cfg.algorithm.updates_per_rollout, online.window_tokens)
        if online.window
        else None,
        field_start=optimizers["network"].sample() if "network" in optimizers else None,
    )


def sharded(cfg: Config) -> bool:
    """Whether DeepSpeed shards the policy's optimiser; at stage 0 every rank has all of it, and
    nothing is to be sharded.
    """
    return cfg.deepspeed is not None and cfg.deepspeed.zero_stage > 0


def adder(
    cfg: Config, ranks: Ranks, mean: bool = False
) -> Callable[[Sequence[Tensor]], None] | None:
    """Sums gradients over ranks; `mean`: of losses that were multiplied by the number of ranks."""
    if ranks.size == 1:
        return None

    def add_up(gradients: Sequence[Tensor]) -> None:
        ranks.add_up(gradients, "summing gradients")
        if mean:
            torch._foreach_div_(list(gradients), float(ranks.size))

    return add_up


def make_optimizer(
    cfg: Config, policy: Policy, settings: OptimizerSettings, ranks: Ranks
) -> PolicyOptimizer:
    """The policy's."""
    if cfg.deepspeed is not None and sharded(cfg):
        from rlfr_vlm.learner.deepspeed_backend import shard_policy

        return shard_policy(policy, settings, cfg.deepspeed, ranks)
    master = cfg.model.master_weights and policy.dtype != torch.float32
    return Optimizer(policy.trained(), settings, master, adder(cfg, ranks))


def make_flow_optimizer(
    cfg: Config, network: VelocityNet, settings: OptimizerSettings, ranks: Ranks
) -> PolicyOptimizer:
    """The field's: where the policy is sharded, its moments are too."""
    if cfg.deepspeed is not None and sharded(cfg):
        from rlfr_vlm.learner.deepspeed_backend import shard_field

        return shard_field(network, settings, cfg.deepspeed, ranks)
    return Optimizer(dict(network.named_parameters()), settings, add_up=adder(cfg, ranks))


def make_field(cfg: FlowConfig, policy: Policy, seed: int) -> FlowField:
    """The checkpoint's flow field, or a new one."""
    spec = FlowSpec.of(cfg, policy.identity)
    if cfg.checkpoint is not None:
        field = FlowField.load(cfg.checkpoint, spec, policy.device, policy.dtype)
        if cfg.reward.normalise == "token_type" and field.types is None:
            raise UserError(
                f"flow.reward.normalise=token_type: {cfg.checkpoint} has no table of token types: "
                "fit it with flow.fit.batch_tokens"
            )
        return field
    return FlowField(spec, seed=seed, device=policy.device, compute_dtype=policy.dtype)


def make_reference(cfg: Config, policy: Policy) -> Policy | None:
    """The reference policy, frozen: the initial one unless the config names another. Raises
    UserError where their tokens differ.
    """
    if not cfg.algorithm.needs_reference:
        return None
    path = cfg.algorithm.reference or cfg.model.path
    model = cfg.model.model_copy(update={"path": path, "gradient_checkpointing": "off"})
    if cfg.algorithm.reference is not None:
        model = model.model_copy(update={"gguf_file": None})
    reference = Policy(model, "algorithm.reference")
    if (reference.family, reference.tokenizer.get_vocab()) != (
        policy.family,
        policy.tokenizer.get_vocab(),
    ):
        raise UserError(
            f"algorithm.reference: {path} has another vocabulary or architecture than model.path "
            f"{cfg.model.path}: its log-probs mean nothing"
        )
    reference.model.requires_grad_(False)
    return reference


def make_head(cfg: Config, policy: Policy) -> ValueHead | LogPartitionHead | None:
    """The value head of GAE or the partition function of FlowRL, newly made from the seed."""
    if cfg.algorithm.advantage != "gae" and cfg.algorithm.loss != "flowrl":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        kind = ValueHead if cfg.algorithm.advantage == "gae" else LogPartitionHead
        return kind(policy.hidden_size).to(policy.device)
