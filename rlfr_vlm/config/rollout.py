"""Sampling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlfr_vlm.config.base import Section


class VllmConfig(Section):
    """vLLM in process."""

    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="share of GPU memory for weights and KV cache"
    )
    kv_cache_gib: int = Field(1, ge=1, description="KV cache on CPU, GiB")
    max_num_seqs: int = Field(256, ge=1, description="requests decoded together")
    max_model_len: int | None = Field(
        None, description="tokens; default: longest prompt plus max_new_tokens"
    )
    enforce_eager: bool = Field(
        True, description="no CUDA graphs or compilation: starts faster, decodes slower"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: the policy's")
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that one engine is split over; needs ray.engines"
    )
    sleep: bool = Field(
        True,
        description="GPU, beside a trainer: give the engine's memory back while the policy trains",
    )
    probe_tolerance: float | None = Field(
        None,
        description="largest mean log-prob gap after a sync; default 1e-3 in float32, 0.1 in "
        "bfloat16",
    )


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="auto: vLLM where installed, else transformers"
    )
    num_prompts: int = Field(128, ge=1, description="prompts per step (arXiv:2510.10201: 128)")
    group_size: int = Field(8, ge=1, description="responses per prompt, G (arXiv:2510.10201: 8)")
    max_new_tokens: int = Field(1024, ge=1, description="response budget, tokens")
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; log-probs are taken at it too"
    )
    stop: tuple[str, ...] = Field((), description="strings that end a response, besides EOS")
    ignore_eos: bool = Field(False, description="force max_new_tokens tokens (benchmarks)")
    max_rounds: int = Field(
        1,
        ge=1,
        description="sample anew in place of groups that are all right or all wrong, up to so many "
        "rounds (DAPO); 1: never",
    )
    hf_batch_size: int = Field(256, ge=1, description="HF engine: requests decoded together")
    sync_bucket_mib: int = Field(
        512,
        ge=1,
        description="weights gathered and sent to an engine at a time; one layer is the least",
    )
    staleness: Literal[0, 1] = Field(
        0,
        description="1: sample the next step's responses while this one trains, from weights one "
        "step old; needs ray.engines",
    )
    vllm: VllmConfig = VllmConfig()
