"""Sampling responses: the engines, and the proof that an engine holds the policy's weights."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from rlfr_vlm.errors import UserError

if TYPE_CHECKING:
    from rlfr_vlm.config import Config
    from rlfr_vlm.rollout.engine import RolloutEngine


def engine_name(cfg: Config) -> Literal["hf", "vllm"]:
    """The engine that `cfg.rollout.engine` names; `auto` is vLLM where it is installed. UserError
    where vLLM is named but missing.
    """
    installed = importlib.util.find_spec("vllm") is not None  # looks, does not import
    if cfg.rollout.engine == "vllm" and not installed:
        raise UserError(
            "rollout.engine=vllm: vLLM is not installed; install it (extra `vllm`, or `cpu`) or "
            "set rollout.engine=hf"
        )
    return "hf" if cfg.rollout.engine == "hf" or not installed else "vllm"


def make_engine(cfg: Config, policy: Any) -> RolloutEngine:
    """The engine of a config, beside this policy or, where the policy has no weights, in a process
    of its own. Raises UserError as it does.
    """
    if engine_name(cfg) == "hf":
        from rlfr_vlm.rollout.hf_engine import HFEngine

        return HFEngine(
            cfg.rollout, policy, cfg.model if policy.sharded or not policy.has_weights else None
        )
    from rlfr_vlm.rollout.vllm_engine import VllmEngine

    return VllmEngine(cfg, policy)
