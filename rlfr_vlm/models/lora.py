"""Low-rank adapters (arXiv:2106.09685) by peft: put into a model in place, and merged again
wherever whole weights are wanted.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from rlfr_vlm.config import LoraConfig
from rlfr_vlm.errors import UserError

ADAPTER = "default"
BASE, FACTOR = ".base_layer.", ".lora_"


def add_adapters(model: nn.Module, language: str, cfg: LoraConfig) -> None:
    """Freeze the model and give the named linear layers of its decoder adapters that start at zero;
    A is drawn from a fixed seed.

    language: dotted path of the language tower. Raises UserError where peft is missing, or nothing
        has such a name.
    """
    try:
        import peft
    except ImportError:
        raise UserError("model.lora needs peft: pip install 'rlfr-vlm[lora]'") from None
    names = "|".join(re.escape(name) for name in cfg.targets)
    dtype = next(model.parameters()).dtype
    settings = peft.LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        target_modules=rf"{re.escape(language)}\.layers\.\d+\..*\.({names})",
        lora_dropout=0.0,
    )  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            peft.inject_adapter_in_model(settings, model, ADAPTER)
        except ValueError as error:
            raise UserError(
                f"model.lora.targets: {list(cfg.targets)}: {' '.join(str(error).split())[:200]}"
            ) from None
    for name, parameter in model.named_parameters():
        if FACTOR in name:
            parameter.data = parameter.data.to(dtype)


def plain_name(name: str) -> str | None:
    """A parameter's name in the model without adapters; None for an adapter's own."""
    return None if FACTOR in name else name.replace(BASE, ".")


def factors_of(model: nn.Module, name: str) -> tuple[nn.Parameter, ...]:
    """The adapter's factors A and B that belong to this parameter of `model`; none where it has no
    adapter.
    """
    if BASE not in name or not name.endswith(".weight"):
        return ()
    layer: Any = model.get_submodule(name.partition(BASE)[0])
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def merged(model: nn.Module, name: str, weight: Tensor) -> Tensor:
    """W + alpha / rank * B A, taken in float32 and rounded to the weight's dtype; the weight itself
    where it has no adapter.
    """
    factors = factors_of(model, name)
    if not factors:
        return weight
    layer: Any = model.get_submodule(name.partition(BASE)[0])
    a, b = (factor.detach().float() for factor in factors)
    return (weight.float() + layer.scaling[ADAPTER] * (b @ a)).to(weight.dtype)
