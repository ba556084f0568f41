"""Steps, optimiser and what is watched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rlfr_vlm.config.base import Section


def _off(value: Any) -> Any:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


Action = Annotated[Literal["off", "warn", "stop", "roll_back"], BeforeValidator(_off)]


class OptimConfig(Section):
    """The policy's optimiser."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="sgd has no momentum and no state")
    lr: float = Field(1e-6, gt=0, description="peak learning rate (arXiv:2510.10201: 1e-6)")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW")
    weight_decay: float = Field(0.0, ge=0, description="AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    warmup_frac: float = Field(
        0.03, ge=0, lt=1, description="share of the steps with linear warm-up"
    )
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="cosine decay ends at this share of lr; 1: constant"
    )


class TrainConfig(Section):
    """The schedule of a run."""

    steps: int = Field(100, ge=1, description="rollout batches")
    tokens_per_microbatch: int = Field(
        16384,
        ge=1,
        description="packed tokens per forward and backward (a longer single sample goes alone)",
    )
    save_steps: int = Field(50, ge=1, description="checkpoint every so many steps, and at the end")
    keep_checkpoints: int = Field(2, ge=2, description="newest ones kept")
    log_rollouts: int = Field(4, ge=0, description="groups per step written to rollouts/; 0: none")
    log_attention: int = Field(
        1,
        ge=0,
        description="of these, the first ones with pictures: also where each token looked in them, "
        "by one more forward; 0: none",
    )
    rollout_format: Literal["jsonl", "parquet"] = Field(
        "jsonl", description="of the files in rollouts/"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",),
        description="where metrics.jsonl is copied to; W&B is offline without an API key",
    )
    project: str = Field(
        "rlfr_vlm",
        min_length=1,
        description="of W&B and trackio; the run has the name of output_dir",
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        description="longest wait for another rank or an engine before the run stops and says "
        "which",
    )


class MonitorsConfig(Section):
    """What is watched during training, and what follows when it looks wrong: nothing, a warning, an
    end with exit code 3, or a way back to the newest checkpoint from before it began.
    docs/monitors.md says what each of them sees.
    """

    non_finite: Literal["stop", "roll_back"] = Field(
        "stop", description="a loss, deviation, gradient or figure that is no finite number"
    )
    update: Action = Field(
        "warn", description="a step changes the weights by more than max_update of their size"
    )
    mismatch: Action = Field(
        "warn",
        description="responses that were not drawn from the policy: engine and trainer disagree",
    )
    accuracy: Action = Field("warn", description="accuracy falls to half of its best")
    entropy: Action = Field(
        "warn", description="entropy falls below entropy_floor, or doubles and rises by a nat"
    )
    length: Action = Field(
        "warn",
        description="the reward pays for length, or lengths double or halve while accuracy does "
        "not rise",
    )
    truncation: Action = Field(
        "warn", description="more than max_truncated of the responses are cut off"
    )
    repetition: Action = Field(
        "warn", description="more than max_repetition of the 4-grams repeat within their response"
    )
    format: Action = Field("warn", description="the format is learnt while accuracy is flat")
    zero_variance: Action = Field(
        "warn",
        description="in more than max_zero_variance of the groups all siblings earn the same",
    )
    flow_share: Action = Field(
        "warn", description="more than max_flow_share of the advantages' size comes from the flow"
    )
    flow_collapse: Action = Field(
        "warn",
        description="deviations no longer differ, nothing is rewarded or learnt, or the flow loss "
        "triples",
    )
    flow_inverted: Action = Field(
        "warn",
        description="right answers are charged more than wrong siblings, though wrong ones stray "
        "further",
    )
    flow_hacked: Action = Field(
        "warn",
        description="accuracy and deviations fall together: the policy learns to be easy to "
        "predict",
    )
    flow_unfit: Action = Field(
        "warn", description="the flow loss is above that of v = x_t / t, which knows nothing"
    )
    patience: int = Field(
        3,
        ge=1,
        description="steps in a row that must look wrong before anything follows (non_finite: one)",
    )
    max_update: float = Field(
        0.03,
        gt=0,
        description="change of the weights over their size (healthy: 1e-5 to 3e-3); adapters: ten "
        "times it",
    )
    max_mismatch: float | None = Field(
        None, gt=0, description="mean log-prob gap, nats; default 1e-3 in float32, 0.1 in bfloat16"
    )
    entropy_floor: float = Field(0.01, ge=0, description="nats per token")
    max_truncated: float = Field(0.9, gt=0, le=1, description="share of the responses")
    max_repetition: float = Field(0.3, gt=0, le=1, description="share of a response's 4-grams")
    max_zero_variance: float = Field(0.95, gt=0, le=1, description="share of the groups")
    max_flow_share: float = Field(0.5, gt=0, le=1, description="share of the advantages' size")
    max_roll_backs: int = Field(
        2, ge=0, description="after so many roll-backs the next one is a stop"
    )
    roll_back_lr: float = Field(
        0.5, gt=0, le=1, description="factor on optim.lr with each roll-back"
    )
    roll_backs: int = Field(
        0, ge=0, description="how often this run was rolled back; kept by the run itself"
    )
