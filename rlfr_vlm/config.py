"""The configuration of every command: one tree of sections, read from YAML plus `a.b=c` overrides,
and what must hold across sections.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from rlfr_vlm.errors import UserError
from rlfr_vlm.methods import fill_method, fill_profile, forget_method
from rlfr_vlm.sections import (
    AlgorithmConfig,
    DataConfig,
    DeepSpeedConfig,
    EndpointConfig,
    EntropyShapingConfig,
    EvalConfig,
    FlowConfig,
    FlowFitConfig,
    FlowNetworkConfig,
    FlowOnlineConfig,
    FlowRewardConfig,
    FlowRLConfig,
    GraderConfig,
    JudgeConfig,
    KlConfig,
    LikelihoodShapingConfig,
    LoraConfig,
    ModelConfig,
    MonitorsConfig,
    OptimConfig,
    RayConfig,
    RewardConfig,
    RolloutConfig,
    Section,
    ShapingConfig,
    TokenRewardConfig,
    TrainConfig,
    ValueConfig,
    VllmConfig,
)
from rlfr_vlm.types import request_seed

__all__ = [
    "AlgorithmConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "EndpointConfig",
    "EntropyShapingConfig",
    "EvalConfig",
    "FlowConfig",
    "FlowFitConfig",
    "FlowNetworkConfig",
    "FlowOnlineConfig",
    "FlowRLConfig",
    "FlowRewardConfig",
    "GraderConfig",
    "JudgeConfig",
    "KlConfig",
    "LikelihoodShapingConfig",
    "LoraConfig",
    "ModelConfig",
    "MonitorsConfig",
    "OptimConfig",
    "RayConfig",
    "RewardConfig",
    "RolloutConfig",
    "ShapingConfig",
    "TokenRewardConfig",
    "TrainConfig",
    "ValueConfig",
    "VllmConfig",
    "config_hash",
    "differences",
    "load_config",
    "parse_config",
    "to_yaml",
]


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
    def _cross(self) -> Config:
        batch = self.rollout.num_prompts * self.rollout.group_size
        if batch % self.algorithm.updates_per_rollout:
            raise ValueError(
                f"algorithm.updates_per_rollout={self.algorithm.updates_per_rollout} does not "
                f"divide the batch: rollout.num_prompts x rollout.group_size = {batch}"
            )
        if self.rollout.group_size < 2 and self.algorithm.advantage not in ("whitened", "gae"):
            raise ValueError(
                f"rollout.group_size=1: algorithm.advantage={self.algorithm.advantage} needs at "
                "least 2 responses per prompt"
            )
        if self.rollout.max_rounds > 1 and self.algorithm.advantage in ("whitened", "gae"):
            raise ValueError(
                f"rollout.max_rounds={self.rollout.max_rounds} leaves out groups that are all "
                "right or all wrong, which algorithm.advantage="
                f"{self.algorithm.advantage} does learn from"
            )
        if self.algorithm.loss == "flowrl" and (
            self.flow or self.shaping.entropy or self.shaping.likelihood
        ):
            extra = (
                "flow"
                if self.flow
                else "shaping.entropy"
                if self.shaping.entropy
                else "shaping.likelihood"
            )
            raise ValueError(f"algorithm.loss=flowrl has no token advantages: leave `{extra}` out")
        if self.flow and self.shaping.likelihood:
            raise ValueError(
                "flow and shaping.likelihood are two scores for one pipeline, to be compared: "
                "leave one of them out"
            )
        rewards = {
            "flow.reward": self.flow.reward if self.flow else None,
            "shaping.likelihood": self.shaping.likelihood,
        }
        for name, how in rewards.items():
            if (
                how is not None
                and how.credit == "token"
                and self.algorithm.advantage in ("whitened", "gae")
            ):
                raise ValueError(
                    f"{name}.credit=token is centred in the group, which "
                    f"algorithm.advantage={self.algorithm.advantage} does not look at: use to_go"
                )
        if self.shaping.likelihood and self.shaping.likelihood.normalise == "token_type":
            raise ValueError(
                "shaping.likelihood.normalise=token_type needs the statistics of a flow field's "
                "fit: use group or group_z"
            )
        if self.flow and self.flow.online.warmup_steps >= self.train.steps:
            raise ValueError(
                f"flow.online.warmup_steps={self.flow.online.warmup_steps} leaves the policy none "
                f"of train.steps={self.train.steps}"
            )
        if self.reward.overlong_buffer >= self.rollout.max_new_tokens:
            raise ValueError(
                f"reward.overlong_buffer={self.reward.overlong_buffer} must be below "
                f"rollout.max_new_tokens={self.rollout.max_new_tokens}"
            )
        if not 0 < self.data.min_pixels <= self.data.max_pixels:
            raise ValueError(
                f"data.min_pixels={self.data.min_pixels} must be above 0 and at most "
                f"data.max_pixels={self.data.max_pixels}"
            )
        if not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"optim.betas={list(self.optim.betas)} must be in [0, 1)")
        if self.deepspeed is not None:
            self._check_deepspeed(self.deepspeed)
        if self.ray.engines and self.launcher != "ray":
            raise ValueError(f"ray.engines={self.ray.engines} needs launcher=ray")
        if self.rollout.vllm.tensor_parallel > 1 and not self.ray.engines:
            raise ValueError(
                f"rollout.vllm.tensor_parallel={self.rollout.vllm.tensor_parallel} needs engines "
                "of their own: set ray.engines"
            )
        if self.rollout.staleness and not self.ray.engines:
            raise ValueError(
                f"rollout.staleness={self.rollout.staleness} needs engines of their own: set "
                "ray.engines"
            )
        if (
            self.rollout.staleness
            and self.algorithm.importance_cap is None
            and self.algorithm.loss != "flowrl"
        ):
            raise ValueError(
                f"rollout.staleness={self.rollout.staleness} samples from older weights: set "
                "algorithm.importance_cap to correct for it"
            )
        if "" in self.rollout.stop:
            raise ValueError("rollout.stop: an empty string would end every response at once")
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

    def _check_deepspeed(self, settings: DeepSpeedConfig) -> None:
        if settings.offload == "all" and settings.zero_stage != 3:
            raise ValueError(
                f"deepspeed.offload=all needs deepspeed.zero_stage=3, not {settings.zero_stage}: "
                "others keep whole weights"
            )
        if settings.offload == "optimizer" and settings.zero_stage == 0:
            raise ValueError(
                "deepspeed.offload=optimizer needs deepspeed.zero_stage of at least 1: stage 0 "
                "shards no optimiser"
            )
        if settings.offload != "none" and self.optim.name != "adamw":
            raise ValueError(
                f"deepspeed.offload={settings.offload} steps with DeepSpeed's Adam: optim.name "
                "must be adamw"
            )
        if self.model.dtype == "bfloat16" and not self.model.master_weights:
            raise ValueError(
                "model.master_weights=false: DeepSpeed keeps float32 master weights; leave "
                "deepspeed out, or master_weights on"
            )


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the tree."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += _known_keys(candidate, f"{prefix}{name}.")
    return keys


def _nearest(key: str) -> str:
    keys = _known_keys(Config)
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not found:  # the right leaf in the wrong section
        leaf = difflib.get_close_matches(
            key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], n=1, cutoff=0.7
        )
        found = [k for k in keys if leaf and k.rsplit(".", 1)[-1] == leaf[0]][:1]
    return f"; did you mean `{found[0]}`?" if found else ""


def _override(tree: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"override `{assignment}` is not of the form key.path=value")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override `{assignment}`: `{parent}` is a value, not a section")
        node = child
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override `{assignment}`: the value is not YAML") from error
    # YAML 1.1 reads 1e-4 as text; what is quoted is meant as text
    if isinstance(value, str) and value == text:
        with contextlib.suppress(ValueError):
            value = float(value)
    node[leaf] = value


def _floats(node: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; read it as the number that was meant."""
    if isinstance(node, dict):
        return {k: _floats(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_floats(v) for v in node]
    if isinstance(node, str) and node[:1] in "+-.0123456789" and "e" in node.lower():
        try:
            return float(node)
        except ValueError:
            return node
    return node


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a tree. Raises UserError naming the field, and for an unknown key the nearest known
    one.
    """
    try:
        return Config.model_validate(_floats(tree))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key `{key}`{_nearest(key)}")
            elif problem["type"] == "missing":
                lines.append(f"`{key}` is required")
            else:
                given = (
                    "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
                )
                where = f"`{key}`: " if key else ""
                lines.append(f"{where}{problem['msg'].removeprefix('Value error, ')}{given}")
        raise UserError(f"{source}: " + "; ".join(lines)) from None


def load_config(path: str | Path | None, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file (none: start from nothing), apply `a.b=c` overrides; another
    `algorithm.method` than the file's brings its settings along.

    Raises UserError for whatever does not fit.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path is not None else {}
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected a mapping of sections at the top")
    named = (
        (tree.get("algorithm") or {}).get("method", "grpo")
        if isinstance(tree.get("algorithm") or {}, dict)
        else None
    )
    if any(a.startswith("algorithm.method=") and a.partition("=")[2] != named for a in overrides):
        tree = forget_method(tree)  # the file's settings are those of its own method
    for assignment in overrides:
        _override(tree, assignment)
    return parse_config(tree, f"config {path}" if path is not None else "options")


def to_yaml(cfg: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


RESOURCES: dict[str, Any] = {
    "output_dir": True,
    "resume": True,
    "eval": True,
    "model": {"device"},
    "rollout": {
        "hf_batch_size": True,
        "sync_bucket_mib": True,
        "vllm": {
            "gpu_memory_utilization",
            "kv_cache_gib",
            "max_num_seqs",
            "enforce_eager",
            "tensor_parallel",
            "sleep",
        },
    },
    "reward": {"grader": {"workers"}},
    "train": {
        "keep_checkpoints",
        "save_steps",
        "log_rollouts",
        "log_attention",
        "rollout_format",
        "trackers",
        "project",
        "tokens_per_microbatch",
        "timeout_s",
    },
    "monitors": True,
    "deepspeed": True,
    "launcher": True,
    "ray": True,
}


def config_hash(cfg: Config) -> str:
    """Digest of what decides a run's numbers: everything but where it is written, what it is given
    to run on, and what is measured of it.

    A run may go on with other resources; the sums are then rounded differently, so its weights are
    equal no longer to the bit.
    """
    tree = cfg.model_dump(mode="json", exclude=RESOURCES)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], limit: int = 6) -> str:
    """The dotted settings in which two trees differ, with both values."""

    def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= (
                flatten(value, f"{prefix}{key}.")
                if isinstance(value, Mapping)
                else {f"{prefix}{key}": value}
            )
        return flat

    a, b = flatten(before), flatten(now)
    changed = [
        f"{k}: {a.get(k)} -> {b.get(k)}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]
    return ", ".join(changed[:limit])
