"""A model's folder as a model, its tokenizer and its processor."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from rlfr_vlm.config import ModelConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.models.attention import register
from rlfr_vlm.models.families import Family, find_family


def find_device(name: str) -> torch.device:
    """The device of a config. Raises UserError for one that this machine or this torch does not
    have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        # transformers imports DeepSpeed where it is installed, which else warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device={name}: {str(error).splitlines()[0]}") from None
    return device


def auto_model(vision: bool) -> Any:
    """The class of transformers that builds a model of any family. Imported here: it costs seconds,
    which whoever only reads configs, rows or reports does not wait for.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if vision else AutoModelForCausalLM


def load_model(path: str, dtype: torch.dtype, vision: bool, options: dict[str, Any]) -> Any:
    """The Hugging Face model with packed attention in its language tower."""
    ours = register()
    attention = {"": ours, "text_config": ours, "vision_config": "sdpa"} if vision else ours
    model: Any = auto_model(vision).from_pretrained(
        path, dtype=dtype, attn_implementation=attention, **options
    )
    if "gguf_file" in options:  # dequantised on loading; without this save_pretrained refuses
        model.is_quantized = False
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def empty_model(path: str, config: Any, dtype: torch.dtype, vision: bool) -> Any:
    """The same architecture without weights, which takes no memory."""
    from transformers import GenerationConfig

    with torch.device("meta"):
        model = auto_model(vision).from_config(config, dtype=dtype)
    # it names tokens that end a response; where there is none, the model's config does
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def vision_token_ids(config: Any) -> tuple[int, ...]:
    """Tokens that only a processor may write; a sampled one would break every later forward."""
    names = (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_token_id",
    )
    return tuple(
        sorted({value for name in names if isinstance(value := getattr(config, name, None), int)})
    )


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the generation config's and the tokenizer's."""
    configured = (
        model.generation_config.eos_token_id if model.generation_config is not None else None
    )
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None}))


@dataclass(frozen=True)
class ModelParts:
    """What a model's folder holds."""

    config: Any
    family: Family
    processor: Any  # None for text
    tokenizer: Any
    model: Any


def load_parts(
    cfg: ModelConfig,
    field: str,
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    weights: bool,
) -> ModelParts:
    """Raises UserError naming the field of the config that does not fit."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    trusted = cfg.trust_remote_code
    options: dict[str, Any] = {"trust_remote_code": trusted}
    if cfg.gguf_file:
        options["gguf_file"] = cfg.gguf_file
    try:
        config = AutoConfig.from_pretrained(path, **options)
        family = find_family(config.model_type)
        processor: Any = None
        if family.vision:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trusted)
            tokenizer = processor.tokenizer
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if weights:
            model = load_model(path, dtype, bool(family.vision), options).to(device)
        else:
            model = empty_model(path, config, dtype, bool(family.vision))
    except pickle.UnpicklingError:
        raise UserError(
            f"{field}: `{cfg.path}` does not load: its weights are a pickle of more than tensors; "
            "nothing in it was run"
        ) from None
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise UserError(
            f"{field}: `{cfg.path}` does not load: {' '.join(str(error).split())[:300]}"
        ) from error
    return ModelParts(config, family, processor, tokenizer, model)
