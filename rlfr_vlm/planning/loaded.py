"""What a command loads, and about how much memory that takes."""

from __future__ import annotations

from pathlib import Path

from rlfr_vlm.config import Config
from rlfr_vlm.fitting.budget import (
    FIELD_SPEC,
    check_field,
)
from rlfr_vlm.planning.memory import bytes_per_parameter, element
from rlfr_vlm.planning.shapes import hidden_size, num_flow_parameters, num_parameters
from rlfr_vlm.planning.wording import Lines, gib, number


def policy_lines(cfg: Config) -> Lines:
    """The policy."""
    return [("policy", f"{cfg.model.path} in {cfg.model.dtype} (model.device={cfg.model.device})")]


def model_lines(cfg: Config) -> Lines:
    """The policy and the reference."""
    lines = policy_lines(cfg)
    if cfg.algorithm.needs_reference:
        lines.append(
            (
                "reference",
                f"{cfg.algorithm.reference or cfg.model.path} in {cfg.model.dtype}, frozen",
            )
        )
    if cfg.algorithm.advantage == "gae":
        lines.append(("value head", "new, on the policy's last state"))
    if cfg.algorithm.loss == "flowrl":
        lines.append(("partition head", "new, on the policy's last states of the prompt"))
    return lines


def field_lines(cfg: Config) -> Lines:
    """The flow field."""
    if cfg.flow is None:
        return []
    folder = cfg.flow.checkpoint
    if folder is None:
        source = "a new one (flow.checkpoint is unset)"
    elif (Path(folder) / FIELD_SPEC).exists():
        check_field(cfg.flow)
        source = folder
    else:
        source = f"{folder}, which is not there yet: fit it first with `rlfr-vlm flow`"
    return [
        ("flow field", f"{source}{'' if cfg.flow.online.enabled else ', frozen'}{_field_size(cfg)}")
    ]


def _field_size(cfg: Config) -> str:
    hidden = hidden_size(cfg.model.path)
    assert cfg.flow is not None
    return "" if hidden is None else f", {number(num_flow_parameters(hidden, cfg.flow))} parameters"


def memory_lines(cfg: Config, trained: bool) -> Lines:
    """What weights, gradients and AdamW's two moments take; a bfloat16 policy has float32 ones of
    each beside its own two.
    """
    weight = element(cfg)
    each = bytes_per_parameter(cfg) if trained else weight
    size, hidden = num_parameters(cfg.model.path), hidden_size(cfg.model.path)
    sharded = cfg.deepspeed is not None and cfg.deepspeed.zero_stage > 0
    where = "before sharding over ranks (see `rlfr-vlm plan`)" if sharded else "on one device"
    rest = f"{where}; activations and the KV cache come on top"
    if size is None:
        return [
            (
                "memory",
                f"{each} bytes for each parameter of the policy, {gib(10**9 * each)} per billion, "
                f"{rest}",
            )
        ]
    parts = [("policy", size, each)]
    if trained and cfg.algorithm.needs_reference:
        parts.append(("reference", size, weight))  # taken to be as large
    if cfg.flow is not None and hidden is not None:
        parts.append(
            (
                "field",
                num_flow_parameters(hidden, cfg.flow),
                16 if not trained or cfg.flow.online.enabled else 4,
            )
        )
    sums = ", ".join(
        f"{name} {count / 1e6:,.1f}M parameters x {one} bytes" for name, count, one in parts
    )
    return [("memory", f"about {gib(sum(count * one for _, count, one in parts))} {rest}: {sums}")]
