"""The Hugging Face model as a function of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlfr_vlm.faults import poison
from rlfr_vlm.flow.latents import LatentRequest, Latents, capture_latents, context_rows
from rlfr_vlm.models.heads import prompt_means
from rlfr_vlm.models.logprobs import token_logprobs
from rlfr_vlm.models.pack import PackedBatch


class PackedModel(nn.Module):
    """The Hugging Face model as a function of a packed batch. Every weight is used inside its
    forward, where a backend can gather it.
    """

    def __init__(
        self, model: Any, layers: nn.ModuleList, position_axes: int, banned: Tensor
    ) -> None:
        super().__init__()
        self.model = model
        self.hooked = list(layers)  # a plain list: the layers are parts of `model` already
        self.position_axes, self.banned = position_axes, banned

    def states(
        self, batch: PackedBatch, request: LatentRequest | None = None
    ) -> tuple[Tensor, Latents | None]:
        """One pass of the backbone. Returns the final states [S, D], after the last norm, and the
        latents asked for.
        """
        positions = batch.position_ids[:, None] if self.position_axes > 1 else batch.position_ids
        rows = index = valid = None
        if request is not None:
            spans = (batch.response_rows, batch.lengths, batch.prompt_start, batch.prompt_end)
            context, valid = (
                torch.stack(x)
                for x in zip(*(context_rows(*spans, *side) for side in request.sides), strict=True)
            )
            last = (batch.prompt_end - 1).repeat_interleave(batch.lengths)[None]
            wanted = [batch.response_rows[None], context, *([last] if request.prompt else [])]
            rows, index = torch.unique(torch.cat(wanted), return_inverse=True)
        with capture_latents(
            [self.hooked[k] for k in request.layers] if request else [], rows
        ) as captured:
            output = self.model.model(
                input_ids=batch.token_ids[None],
                position_ids=positions,
                use_cache=False,
                layout=batch.layout,
                **batch.vision,
            )
        if rows is None or index is None or valid is None:
            return output.last_hidden_state[0], None
        sides = len(valid)
        prompt = index[1 + sides] if request is not None and request.prompt else None
        return output.last_hidden_state[0], Latents(
            torch.stack(captured), index[0], index[1 : 1 + sides], valid, prompt
        )

    def forward(
        self,
        batch: PackedBatch,
        temperature: float,
        request: LatentRequest | None,
        with_entropy: bool,
        with_prompt_means: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, tuple[Tensor | None, ...] | None]:
        """See Policy.forward; a plain tuple, because DeepSpeed looks for tensors in nothing
        else.
        """
        states, latents = self.states(batch, request)
        hidden = poison("logits", states.index_select(0, batch.predict_rows))
        head = self.model.get_output_embeddings().weight
        logprobs, entropy = token_logprobs(
            hidden, head, batch.response_ids, self.banned, temperature, with_entropy
        )
        means = (
            prompt_means(states, batch.prompt_start, batch.prompt_end)
            if with_prompt_means
            else None
        )
        captured = (
            None
            if latents is None
            else (latents.states, latents.target, latents.context, latents.valid, latents.prompt)
        )
        return logprobs, entropy, hidden, means, captured
