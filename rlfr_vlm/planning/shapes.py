"""Sizes of a model from its config alone: hidden states, layers, heads, vocabulary, vision tower,
and how many weights they make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_vlm.config import FlowConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.models.paths import resolve_path

# From the config.json that each model is published with; read where no folder of that name is at
# hand.
_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
}


def _published(
    kind: str,
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    inner: int,
    vocab: int,
    tied: bool,
    limit: int,
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": limit,
    } | ({"vision_config": {**_VISION, "out_hidden_size": hidden}} if kind == "qwen2_5_vl" else {})


PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-Math-1.5B": _published("qwen2", 1536, 28, 12, 2, 8960, 151936, True, 4096),
    "Qwen/Qwen2.5-Math-7B": _published("qwen2", 3584, 28, 28, 4, 18944, 152064, False, 4096),
    "Qwen/Qwen2.5-7B": _published("qwen2", 3584, 28, 28, 4, 18944, 152064, False, 131072),
    "meta-llama/Llama-3.1-8B": _published("llama", 4096, 32, 32, 8, 14336, 128256, False, 131072),
    "Qwen/Qwen2.5-VL-3B-Instruct": _published(
        "qwen2_5_vl", 2048, 36, 16, 2, 11008, 151936, True, 128000
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": _published(
        "qwen2_5_vl", 3584, 28, 28, 4, 18944, 152064, False, 128000
    ),
}


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower."""

    hidden: int
    depth: int
    intermediate: int
    gated: bool  # gate, up and down projections; else two
    patch: int  # pixels of a patch's side
    merge: int  # patches of a token's side
    parameters: int

    @property
    def patch_values(self) -> int:
        """Numbers that stand for one patch: three colours, two frames."""
        return 3 * 2 * self.patch**2


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a policy."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool
    qk_norm: bool
    max_positions: int | None
    vision: VisionShape | None

    @property
    def queries(self) -> int:
        """Width of all heads' queries."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of all heads' keys, and of their values."""
        return self.kv_heads * self.head_size

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def layer(self) -> int:
        """Weights of one decoder layer, but for biases and norms."""
        return 2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.intermediate

    @property
    def language(self) -> int:
        """Weights of the language part."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.language + (self.vision.parameters if self.vision else 0)

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Weights of low-rank adapters of these linear layers."""
        ends = {
            "q_proj": self.hidden + self.queries,
            "k_proj": self.hidden + self.keys,
            "v_proj": self.hidden + self.keys,
            "o_proj": self.hidden + self.queries,
        }
        return (
            self.layers
            * rank
            * sum(ends.get(name, self.hidden + self.intermediate) for name in targets)
        )


def num_field_parameters(hidden: int, depth: int) -> int:
    """Weights of a velocity network."""
    return hidden**2 * (7 + 5 * depth) + hidden * (522 + 6 * depth)


def num_flow_parameters(hidden: int, cfg: FlowConfig) -> int:
    """Weights of a field and of its contrast, where it has one."""
    prompt = hidden**2 + hidden if cfg.prompt_context else 0
    return (num_field_parameters(hidden, cfg.network.depth) + prompt) * (
        1 if cfg.contrast == "none" else 2
    )


def text_config(model: str) -> dict[str, Any]:
    """Config of the language part of a local model, or of one of the published table; empty for
    other names and folders without one.
    """
    config = _find_config(model)
    try:
        return {**config, **config.get("text_config", {})}
    except (TypeError, AttributeError):
        return {}


def hidden_size(model: str) -> int | None:
    """Size of a model's latents; None where it is not known."""
    size = text_config(model).get("hidden_size")
    return size if isinstance(size, int) else None


def num_parameters(model: str) -> int | None:
    """Weights of a model's language part, but for a few biases and norms; None where they are not
    known, as with experts.
    """
    try:
        return shape_of(_find_config(model)).language
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None


def _find_config(model: str) -> dict[str, Any]:
    try:
        config = json.loads((Path(resolve_path(model)) / "config.json").read_text())
    except (OSError, ValueError, UserError):
        config = PUBLISHED.get(model, {})
    return config if isinstance(config, dict) else {}


def read_shape(model: str, config_file: str | None = None) -> ModelShape:
    """Sizes from `config_file`, else from the folder `model`, else from the table of published
    ones.

    Raises UserError naming the file, or model.path and the option that helps.
    """
    source = config_file or f"{model}/config.json"
    if config_file is not None:
        try:
            config = json.loads(Path(config_file).read_text())
        except OSError as error:
            raise UserError(f"--model-config {config_file}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"--model-config {config_file}: not JSON: {error}") from None
    elif not (config := _find_config(model)):
        raise UserError(
            f"model.path: the sizes of `{model}` are not known here: give its config.json with "
            "--model-config FILE"
        )
    try:
        return shape_of(config)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{source} does not have the sizes of a dense model: {error!r}") from None


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Sizes from a Hugging Face config. Raises KeyError, TypeError or ValueError where it has none,
    as for a mixture of experts.
    """
    text = {**config, **config.get("text_config", {})}
    if any("expert" in key for key in text):
        raise ValueError("a mixture of experts")
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    vision = config.get("vision_config")
    shape = ModelShape(
        hidden=hidden,
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or hidden // heads,
        intermediate=text["intermediate_size"],
        vocab=text["vocab_size"],
        tied=bool(text.get("tie_word_embeddings")),
        qk_norm="qwen3" in str(text.get("model_type", "")),
        max_positions=text.get("max_position_embeddings"),
        vision=_vision_shape(vision, hidden, str(config.get("model_type"))) if vision else None,
    )
    if not isinstance(shape.parameters, int):
        raise TypeError("sizes that are not whole numbers")
    return shape


def _vision_shape(config: Mapping[str, Any], out: int, kind: str) -> VisionShape:
    """Qwen's towers; Qwen2-VL names its width embed_dim, and its output hidden_size."""
    hidden = config.get("embed_dim") or config["hidden_size"]
    gated = kind == "qwen2_5_vl"
    inner = config.get("intermediate_size") or int(config["mlp_ratio"] * hidden)
    patch, merge = config.get("patch_size", 14), config.get("spatial_merge_size", 2)
    wide = hidden * merge**2
    mergers = 1 + len(config.get("deepstack_visual_indexes") or ())
    block = 4 * hidden**2 + (3 if gated else 2) * hidden * inner
    positions = config.get("num_position_embeddings", 0) * hidden
    total = (
        6 * patch**2 * hidden
        + config["depth"] * block
        + mergers * (wide**2 + wide * out)
        + positions
    )
    return VisionShape(hidden, config["depth"], inner, gated, patch, merge, total)
