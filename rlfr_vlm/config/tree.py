"""The whole configuration, and what must hold across its sections."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rlfr_vlm.config.algorithm import (
    AlgorithmConfig,
    ShapingConfig,
)
from rlfr_vlm.config.base import Section, refuse
from rlfr_vlm.config.data import DataConfig, RewardConfig
from rlfr_vlm.config.evaluation import EvalConfig
from rlfr_vlm.config.flow import (
    FlowConfig,
)
from rlfr_vlm.config.methods import fill_method, fill_profile
from rlfr_vlm.config.model import DeepSpeedConfig, ModelConfig, RayConfig
from rlfr_vlm.config.rollout import RolloutConfig
from rlfr_vlm.config.training import MonitorsConfig, OptimConfig, TrainConfig
from rlfr_vlm.types import request_seed


class Config(Section):
    """Everything a command needs."""

    seed: int = Field(0, ge=0, lt=2**31, description="every random choice derives from it")
    output_dir: str = Field(description="folder of the run")
    resume: bool = Field(
        True,
        description="go on from the newest good checkpoint in output_dir; false refuses a folder "
        "that has one",
    )
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    flow: FlowConfig | None = None
    shaping: ShapingConfig = ShapingConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    monitors: MonitorsConfig = MonitorsConfig()
    deepspeed: DeepSpeedConfig | None = Field(
        None, description="shard training over ranks; none: one process"
    )
    launcher: Literal["process", "ray"] = Field(
        "process", description="process: this one, or the ranks of torchrun or deepspeed; or Ray"
    )
    ray: RayConfig = RayConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, tree: Any) -> Any:
        return fill_profile(fill_method(tree)) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _across_sections(self) -> Config:
        for check in (_batches, _token_rewards, _lengths, _sharding, _engines):
            check(self)
        return self

    @property
    def run_seed(self) -> int:
        """What samples, noise and the order of prompts derive from: the seed, and another one after
        each roll-back.
        """
        return (
            self.seed
            if not self.monitors.roll_backs
            else request_seed("roll back", self.seed, self.monitors.roll_backs) % 2**31
        )


def _batches(cfg: Config) -> None:
    rollout, algorithm = cfg.rollout, cfg.algorithm
    batch, whole = rollout.num_prompts * rollout.group_size, algorithm.looks_at_whole_batch
    refuse(
        batch % algorithm.updates_per_rollout,
        f"algorithm.updates_per_rollout={algorithm.updates_per_rollout} does not divide the batch: "
        f"rollout.num_prompts x rollout.group_size = {batch}",
    )
    refuse(
        rollout.group_size < 2 and not whole,
        f"rollout.group_size=1: algorithm.advantage={algorithm.advantage} needs at least 2 "
        "responses per prompt",
    )
    refuse(
        rollout.max_rounds > 1 and whole,
        f"rollout.max_rounds={rollout.max_rounds} leaves out groups that are all right or all "
        f"wrong, which algorithm.advantage={algorithm.advantage} does learn from",
    )


def _token_rewards(cfg: Config) -> None:
    flow, shaping, advantage = cfg.flow, cfg.shaping, cfg.algorithm.advantage
    named = {
        "flow": flow,
        "shaping.entropy": shaping.entropy,
        "shaping.likelihood": shaping.likelihood,
    }
    given = [name for name, section in named.items() if section is not None]
    refuse(
        cfg.algorithm.loss == "flowrl" and given,
        f"algorithm.loss=flowrl has no token advantages: leave `{(given or [''])[0]}` out",
    )
    refuse(
        flow and shaping.likelihood,
        "flow and shaping.likelihood are two scores for one pipeline, to be compared: leave one of "
        "them out",
    )
    rewards = {"flow.reward": flow and flow.reward, "shaping.likelihood": shaping.likelihood}
    for name, how in rewards.items():
        refuse(
            how and how.credit == "token" and cfg.algorithm.looks_at_whole_batch,
            f"{name}.credit=token is centred in the group, which algorithm.advantage={advantage} "
            "does not look at: use to_go",
        )
    refuse(
        shaping.likelihood and shaping.likelihood.normalise == "token_type",
        "shaping.likelihood.normalise=token_type needs the statistics of a flow field's fit: use "
        "group or group_z",
    )
    refuse(
        flow and flow.online.warmup_steps >= cfg.train.steps,
        f"flow.online.warmup_steps={flow.online.warmup_steps if flow else 0} leaves the policy "
        f"none of train.steps={cfg.train.steps}",
    )


def _lengths(cfg: Config) -> None:
    refuse(
        cfg.reward.overlong_buffer >= cfg.rollout.max_new_tokens,
        f"reward.overlong_buffer={cfg.reward.overlong_buffer} must be below "
        f"rollout.max_new_tokens={cfg.rollout.max_new_tokens}",
    )
    refuse(
        not 0 < cfg.data.min_pixels <= cfg.data.max_pixels,
        f"data.min_pixels={cfg.data.min_pixels} must be above 0 and at most "
        f"data.max_pixels={cfg.data.max_pixels}",
    )
    refuse(
        not all(0 <= beta < 1 for beta in cfg.optim.betas),
        f"optim.betas={list(cfg.optim.betas)} must be in [0, 1)",
    )
    refuse("" in cfg.rollout.stop, "rollout.stop: an empty string would end every response at once")


def _sharding(cfg: Config) -> None:
    sharding = cfg.deepspeed
    if sharding is None:
        return
    refuse(
        sharding.offload == "all" and sharding.zero_stage != 3,
        f"deepspeed.offload=all needs deepspeed.zero_stage=3, not {sharding.zero_stage}: others "
        "keep whole weights",
    )
    refuse(
        sharding.offload == "optimizer" and sharding.zero_stage == 0,
        "deepspeed.offload=optimizer needs deepspeed.zero_stage of at least 1: stage 0 shards no "
        "optimiser",
    )
    refuse(
        sharding.offload != "none" and cfg.optim.name != "adamw",
        f"deepspeed.offload={sharding.offload} steps with DeepSpeed's Adam: optim.name must be "
        "adamw",
    )
    refuse(
        cfg.model.dtype == "bfloat16" and not cfg.model.master_weights,
        "model.master_weights=false: DeepSpeed keeps float32 master weights; leave deepspeed out, "
        "or master_weights on",
    )


def _engines(cfg: Config) -> None:
    rollout, own = cfg.rollout, cfg.ray.engines
    refuse(own and cfg.launcher != "ray", f"ray.engines={own} needs launcher=ray")
    refuse(
        rollout.vllm.tensor_parallel > 1 and not own,
        f"rollout.vllm.tensor_parallel={rollout.vllm.tensor_parallel} needs engines of their own: "
        "set ray.engines",
    )
    refuse(
        rollout.staleness and not own,
        f"rollout.staleness={rollout.staleness} needs engines of their own: set ray.engines",
    )
    corrected = cfg.algorithm.importance_cap is not None or cfg.algorithm.loss == "flowrl"
    refuse(
        rollout.staleness and not corrected,
        f"rollout.staleness={rollout.staleness} samples from older weights: set "
        "algorithm.importance_cap to correct for it",
    )
