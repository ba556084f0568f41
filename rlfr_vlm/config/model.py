"""The policy, and how it is sharded and placed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from rlfr_vlm.config.base import Section


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685), by peft, without dropout; engines and exported models
    get them merged into the weights.
    """

    rank: int = Field(16, ge=1, description="of each adapter")
    alpha: int = Field(32, gt=0, description="the adapters' product is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers of the language tower",
    )


class ModelConfig(Section):
    """The policy."""

    path: str = Field(description="folder or hub name of a Hugging Face model")
    gguf_file: str | None = Field(None, description="file inside `path`, for checkpoints in GGUF")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the weights in forward and backward"
    )
    master_weights: bool = Field(
        True,
        description="keep fp32 weights and optimiser state beside bfloat16 ones (at lr 1e-6 bf16 "
        "steps vanish)",
    )
    gradient_checkpointing: Literal["off", "reentrant", "nonreentrant"] = Field(
        "off", description="recompute layers in the backward"
    )
    freeze_vision: bool = Field(
        True, description="keep the vision tower as it is (RLFR's VLM recipes do)"
    )
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters of the language tower instead of its weights"
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the model folder")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads `off` as false."""
        return "off" if value is False else value


class DeepSpeedConfig(Section):
    """Training over several processes (ranks), by DeepSpeed: what each of them holds."""

    ranks: int | None = Field(
        None,
        ge=1,
        description="training processes; launcher=ray starts so many (default 1), torchrun must "
        "have",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="0: each rank holds everything; 1: its share of the optimiser, 2: and of the "
        "gradients, 3: and of the weights",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="keep the optimiser, or with stage 3 the weights too, in host memory and step "
        "there",
    )


class RayConfig(Section):
    """launcher=ray: actors on a cluster."""

    address: str = Field(
        "local",
        description="local: a cluster of the run's own on this machine; auto or HOST:PORT: one "
        "that is running",
    )
    engines: int = Field(
        0,
        ge=0,
        description="rollout actors with devices of their own; 0: every training rank samples for "
        "itself",
    )
    bind: str = Field(
        "127.0.0.1",
        description="address that actors listen on; another than loopback is for several nodes, "
        "and is warned of",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="deaths of actors that a run survives; after them it stops with exit code 3",
    )
