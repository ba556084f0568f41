"""The policy: one class over every language and vision-language family."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlfr_vlm.config import ModelConfig
from rlfr_vlm.finite import check_finite
from rlfr_vlm.flow.latents import LatentRequest, Latents
from rlfr_vlm.models.loading import (
    end_token_ids,
    find_device,
    load_parts,
    vision_token_ids,
)
from rlfr_vlm.models.lora import add_adapters, factors_of, merged, plain_name
from rlfr_vlm.models.pack import PackedBatch, micro_batches, pack
from rlfr_vlm.models.packed_model import PackedModel
from rlfr_vlm.models.paths import resolve_path
from rlfr_vlm.types import EncodedPrompt, PolicyOutput, Rollout

SAVE_BYTES = 2**30


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the model as engines and exports know it: whole, with adapters merged."""

    shape: torch.Size
    dtype: torch.dtype
    tied: str | None  # the name of the weight whose storage it shares


def _plainly(_: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class WeightAccess:
    """How a policy's weights are reached: as they are, or through a backend that shards them.

    run: the packed model's forward. whole, whole_for_writing: a block in which these parameters
        can be read, or written. shape_of: a tensor's whole shape. shared: whether a tensor may be a
        view of the backend's buffer.
    """

    run: Callable[..., Any]
    shared: bool = False
    sharded: bool = False
    whole: Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]] = _plainly
    whole_for_writing: Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]] = _plainly
    shape_of: Callable[[Any], torch.Size] = lambda tensor: tensor.shape


class Policy:
    """Weights, tokenizer and processor of the model that is trained.

    Attributes: `model` the Hugging Face model, `tokenizer`, `processor` (None for text), `family`,
        `device`, `dtype`,
    `version` the number of optimiser steps behind the weights, `identity` what a flow field must
    match.
    """

    def __init__(self, cfg: ModelConfig, field: str = "model.path", weights: bool = True) -> None:
        """Load from a folder or the hub. Raises UserError naming the field of the config that does
        not fit.

        weights: false makes a policy that reads and writes text but computes nothing, for engines
            that hold weights of their own.
        """
        self.path = resolve_path(cfg.path)
        self.device = find_device(cfg.device)
        self.dtype = getattr(torch, cfg.dtype)
        parts = load_parts(cfg, field, self.path, self.dtype, self.device, weights)
        self.family, self.model = parts.family, parts.model
        self.processor, self.tokenizer = parts.processor, parts.tokenizer
        self.model.eval()
        self.version = 0
        self.layers: nn.ModuleList = self.model.get_submodule(self.family.language).layers
        config = parts.config
        self.text_config = config.get_text_config()
        self.max_length: int | None = getattr(self.text_config, "max_position_embeddings", None)
        self.banned_token_ids = vision_token_ids(config)
        self._banned = torch.tensor(self.banned_token_ids, dtype=torch.long, device=self.device)
        self.eos_token_ids = end_token_ids(self.model, self.tokenizer)
        self.image_token_id: int | None = getattr(config, "image_token_id", None)
        if cfg.freeze_vision and self.family.vision:
            self.model.get_submodule(self.family.vision).requires_grad_(False)
        self.identity = self._identify(config.model_type) if weights else {}
        if cfg.lora is not None and weights:
            add_adapters(self.model, self.family.language, cfg.lora)
        if cfg.gradient_checkpointing != "off":
            self._recompute(cfg)
        self.module = PackedModel(self.model, self.layers, self.family.position_axes, self._banned)
        self.has_weights = weights
        self.weights_as_stored = cfg.lora is None  # whole, and without adapters
        # a backend that shards puts itself in between
        self.access = WeightAccess(self.module)

    def _recompute(self, cfg: ModelConfig) -> None:
        """Recompute layers in the backward."""
        reentrant = cfg.gradient_checkpointing == "reentrant"
        self.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        if cfg.lora is None:
            # set above; trained embeddings need none, a frozen tower would get one
            self.model.disable_input_require_grads()
        # transformers recomputes in training mode only; packed attention has no dropout
        self.model.train()

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of every weight only, which a forward gathers."""
        return self.access.sharded

    @property
    def hidden_size(self) -> int:
        """D of the latents."""
        return self.text_config.hidden_size

    def _identify(self, model_type: str) -> dict[str, str | int | float]:
        """What a flow field fitted on these latents is bound to: architecture, sizes and a digest
        of sampled weights (as bfloat16).
        """
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
        """Rotary positions of a prompt, [A, P]: 0, 1, 2, ... for text, the model's own M-RoPE index
        around pictures.
        """
        axes = self.family.position_axes
        if not vision:
            return torch.arange(len(token_ids)).expand(axes, -1)
        ids = torch.tensor([token_ids])
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=torch.eq(ids, self.image_token_id or 0).int(),
            image_grid_thw=vision["image_grid_thw"],
        )
        return positions[:, 0]

    def states(
        self, batch: PackedBatch, request: LatentRequest | None = None
    ) -> tuple[Tensor, Latents | None]:
        """One forward of the backbone. Returns the final states [S, D], after the last norm, and
        the latents asked for.
        """
        return self.module.states(batch, request)

    def forward(
        self,
        batch: PackedBatch,
        temperature: float = 1.0,
        request: LatentRequest | None = None,
        with_entropy: bool = False,
        with_prompt_means: bool = False,
    ) -> PolicyOutput:
        """Log-probs of the response tokens (and latents, entropy, mean prompt states, where asked
        for) in one pass.
        """
        logprobs, entropy, hidden, means, captured = self.access.run(
            batch, temperature, request, with_entropy, with_prompt_means
        )
        return PolicyOutput(
            logprobs, entropy, None if captured is None else Latents(*captured), hidden, means
        )

    # -- whole weights, for engines and exports ----------------------------------------------------

    def weight_specs(self) -> dict[str, WeightSpec]:
        """Every weight by its name in the plain Hugging Face model, tied ones under each of their
        names.
        """
        specs: dict[str, WeightSpec] = {}
        owners: dict[int, str] = {}
        for own, tensor in self.model.state_dict(keep_vars=True).items():
            name = plain_name(own)
            if name is not None:
                first = owners.setdefault(id(tensor), name)
                specs[name] = WeightSpec(
                    self.access.shape_of(tensor), tensor.dtype, first if first != name else None
                )
        return specs

    def weight_buckets(self, max_bytes: int) -> Iterator[dict[str, Tensor]]:
        """Every weight once, by name, whole and with adapters merged, about `max_bytes` at a time;
        a decoder layer is never split.

        A bucket's tensors are good until the next one is asked for. Where weights are sharded, all
        ranks must iterate together. Raises NonFiniteWeightError naming a weight that holds NaN or
        an infinity.
        """
        tensors = self.model.state_dict(keep_vars=True)
        owners: dict[int, str] = {}
        parts: dict[str, list[str]] = {}
        for own, tensor in tensors.items():
            if plain_name(own) is not None and owners.setdefault(id(tensor), own) == own:
                layer = re.match(r".*?\.(layers|blocks)\.\d+\.", own)
                parts.setdefault(layer[0] if layer else own, []).append(own)
        bucket: list[str] = []
        size = 0
        for names in parts.values():
            added = sum(
                self.access.shape_of(tensors[own]).numel() * tensors[own].element_size()
                for own in names
            )
            if bucket and size + added > max_bytes:
                yield from self._gathered(bucket, tensors)
                bucket, size = [], 0
            bucket, size = [*bucket, *names], size + added
        yield from self._gathered(bucket, tensors)

    def _gathered(
        self, names: Sequence[str], tensors: dict[str, Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        needed = [tensors[own] for own in names] + [
            factor for own in names for factor in factors_of(self.model, own)
        ]
        with self.access.whole([p for p in needed if isinstance(p, nn.Parameter)]):
            bucket = {
                str(plain_name(own)): merged(self.model, own, tensors[own].detach())
                for own in names
            }
            check_finite(bucket, "an engine or an export")
            yield bucket

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def score(
        self, rollouts: Sequence[Rollout], temperature: float = 1.0, token_budget: int = 16384
    ) -> list[Tensor]:
        """Log-probs of each response under the current weights, one [T] float32 tensor per
        rollout.
        """
        scored: list[Tensor] = []
        for part in micro_batches(rollouts, token_budget):
            chosen = [rollouts[i] for i in part]
            output = self.forward(pack(chosen, self.device), temperature)
            scored += output.logprobs.cpu().split([len(r.token_ids) for r in chosen])
        return scored

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def save(self, folder: str | Path, write: bool = True) -> None:
        """A plain Hugging Face folder that transformers and vLLM load, adapters merged.

        Where weights are sharded all ranks must call it, and one of them with `write`: it holds the
        whole model in host memory meanwhile.
        """
        if self.device.type == "cpu":
            # saving imports DeepSpeed where it is installed, which else warns on standard output
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if self.weights_as_stored:
            if write:
                self.model.save_pretrained(folder)
                (self.processor or self.tokenizer).save_pretrained(folder)
            return
        weights: dict[str, Tensor] = {}
        for bucket in self.weight_buckets(SAVE_BYTES):
            if write:
                weights |= {
                    name: tensor.detach().to("cpu", copy=True) for name, tensor in bucket.items()
                }
        if write:
            tied = {
                name: weights[spec.tied]
                for name, spec in self.weight_specs().items()
                if spec.tied is not None
            }
            self.model.save_pretrained(folder, state_dict=weights | tied)
            (self.processor or self.tokenizer).save_pretrained(folder)


def expert_rollout(prompt: EncodedPrompt, tokenizer: Any, eos: int) -> Rollout:
    """An expert's solution as if it had been sampled: its tokens and EOS."""
    text = prompt.prompt.response or ""
    ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], eos)
    return Rollout(prompt, 0, ids, (0.0,) * len(ids), text, "stop", 0)
