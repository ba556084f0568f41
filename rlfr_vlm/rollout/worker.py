"""What runs in an engine's process: a policy of its own, whose weights come by buckets, and the
engine that samples from it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlfr_vlm import errors
from rlfr_vlm.config import Config, ModelConfig
from rlfr_vlm.data.bad_rows import RowError
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout import engine_name, make_engine
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.types import EncodedPrompt, FinishReason, Prompt

NO_LIMIT = 10**9  # prompt tokens: the trainer has checked them


@dataclass(frozen=True)
class Packed:
    """A tensor as plain bytes, which processes can share and numpy knows; bfloat16 is none of its
    types.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True)
class Request:
    """A prompt on its way to a worker. Pictures go as the row names them; `pictures` tells whether
    the worker sees the same ones.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    pictures: str  # digest of the trainer's

    @classmethod
    def of(cls, encoded: EncodedPrompt) -> Request:
        """What a worker needs to know of a prompt."""
        lean = replace(encoded.prompt, answer="", response=None, extra={})
        return cls(lean, encoded.token_ids, digest(encoded.images))

    def with_pictures(self, encoded: EncodedPrompt) -> Request:
        """The same with the pictures themselves: blank ones, say, stand in no row."""
        return replace(self, prompt=replace(self.prompt, images=encoded.images))


@dataclass(frozen=True)
class SampledResponse:
    """A response on its way back."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True)
class Refusal:
    """Why a worker did not sample: its weights are not those asked for, or it cannot see the
    pictures of these requests.
    """

    reason: Literal["stale", "pictures"]
    requests: tuple[int, ...] = ()


@dataclass(frozen=True)
class ErrorMessage:
    """An error that is meant for the user, on its way to another process."""

    kind: str  # a class of rlfr_vlm.errors
    text: str

    @classmethod
    def of(cls, error: Exception) -> ErrorMessage:
        """The error as a value, under the nearest class that the command line knows."""
        known = (
            base.__name__ for base in type(error).__mro__ if base.__module__ == errors.__name__
        )
        return cls(next(known, "StoppedError"), str(error))

    def error(self) -> Exception:
        """The error again."""
        return getattr(errors, self.kind)(self.text)


@dataclass(frozen=True)
class WorkerState:
    """Who a worker is, and which load its weights are from; None where it has had none, or one that
    broke off.
    """

    engine: str
    pid: int
    host: str
    sync_id: str | None


class RolloutWorker:
    """An engine in a process of its own. It samples from nothing but a completed load: initial
    weights are stale.
    """

    def __init__(self, cfg: Config) -> None:
        """Load model and engine. Raises UserError as they do."""
        self.name = engine_name(cfg)
        faultpoint("engine_load")
        model = worker_model(cfg.model)
        self.policy = Policy(model, weights=False)
        self.engine = make_engine(cfg.model_copy(update={"model": model}), self.policy)
        data = cfg.data.model_copy(update={"max_prompt_tokens": NO_LIMIT})
        self.renderer = Renderer(self.policy, data, cfg.data.train or "")
        # the load under way, and how many buckets of it have come
        self._loading: tuple[str, int] | None = None
        self._sync_id: str | None = None

    def state(self) -> WorkerState:
        """Who this is, and what its weights are."""
        return WorkerState(self.name, os.getpid(), socket.gethostname(), self._sync_id)

    def load_bucket(self, bucket: Mapping[str, Packed], sync_id: str) -> None:
        """Take a part of the weights. From the first one on, until `finish_load`, nothing is
        sampled.
        """
        count = self._loading[1] if self._loading is not None and self._loading[0] == sync_id else 0
        self._sync_id, self._loading = None, (sync_id, count + 1)
        faultpoint("engine_sync")
        self.engine.load_bucket({name: unpacked(tensor) for name, tensor in bucket.items()})

    def finish_load(self, version: int, sync_id: str, num_buckets: int) -> WorkerState:
        """All weights are here. A worker that was started anew in between stays stale."""
        if self._loading == (sync_id, num_buckets):
            self.engine.finish_load(version)
            self._sync_id = sync_id
        self._loading = None
        return self.state()

    def sample(
        self, requests: Sequence[Request], sampling: SamplingConfig, sync_id: str
    ) -> list[tuple[SampledResponse, ...]] | Refusal:
        """Responses to each request, or why there are none. Raises StoppedError naming a prompt
        that reads as other tokens here.
        """
        if self._sync_id != sync_id:
            return Refusal("stale")
        faultpoint("engine_prefill")
        encoded = [self._encode(request) for request in requests]
        if None in encoded:
            return Refusal("pictures", tuple(i for i, found in enumerate(encoded) if found is None))
        groups = self.engine.sample([prompt for prompt in encoded if prompt is not None], sampling)
        return [
            tuple(
                SampledResponse(r.token_ids, r.logprobs, r.text, r.finish_reason, r.policy_version)
                for r in group.rollouts
            )
            for group in groups
        ]

    def _encode(self, request: Request) -> EncodedPrompt | None:
        """The prompt as the model reads it; None where its pictures are not to be had here, or are
        others than the trainer's.
        """
        sent = any(isinstance(image, Image.Image) for image in request.prompt.images)
        try:
            encoded = self.renderer.encode(request.prompt)
        except RowError as error:
            if request.prompt.images and not sent:
                return None
            raise StoppedError(
                f"prompt `{request.prompt.id}`: the engine on {socket.gethostname()} cannot read "
                f"it: {error}"
            ) from None
        if digest(encoded.images) != request.pictures and not sent:
            return None
        if (encoded.token_ids, digest(encoded.images)) != (request.token_ids, request.pictures):
            equal = len(encoded.token_ids) == len(request.token_ids)
            raise StoppedError(
                f"prompt `{request.prompt.id}`: the trainer reads it as {len(request.token_ids)} "
                f"tokens, the engine on {socket.gethostname()} as "
                f"{len(encoded.token_ids)}{' other ones' * equal}: "
                "are model files and versions of packages the same there?"
            )
        return encoded

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()


def worker_model(cfg: ModelConfig) -> ModelConfig:
    """The model as an engine holds it: whole weights come, with adapters merged, and nothing is
    trained.
    """
    return cfg.model_copy(update={"lora": None, "gradient_checkpointing": "off"})


def digest(images: Sequence[Image.Image]) -> str:
    """Of sizes and pixels; "" of no pictures."""
    if not images:
        return ""
    found = hashlib.blake2b(digest_size=16)
    for image in images:
        found.update(f"{image.mode} {image.size}".encode())
        found.update(image.tobytes())
    return found.hexdigest()


def packed(bucket: Mapping[str, Tensor]) -> dict[str, Packed]:
    """Tensors as bytes in host memory."""
    return {
        name: Packed(
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(),
        )
        for name, tensor in bucket.items()
    }


def unpacked(tensor: Packed) -> Tensor:
    """The tensor over the same memory, which may be shared: to be read only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that cannot be written to
        return torch.from_numpy(tensor.data).view(getattr(torch, tensor.dtype)).view(tensor.shape)


def answered(worker: RolloutWorker, method: str, arguments: Sequence[Any]) -> Any:
    """What a method returns, or the ErrorMessage that it met: errors that are meant for the
    user travel as values.
    """
    try:
        return getattr(worker, method)(*arguments)
    except UserError as error:
        return ErrorMessage.of(error)
