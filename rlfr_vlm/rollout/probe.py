"""The probe: whether an engine that holds the policy's weights computes what the policy does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from rlfr_vlm.config import Config
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import StoppedError
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout

if TYPE_CHECKING:
    from rlfr_vlm.models.policy import Policy

TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
}  # mean log-prob gap; measured: right 5e-6 and 0.03 to 0.06, stale head 0.38 and 0.42
PROBE = SamplingConfig(
    group_size=4, temperature=1.0, max_new_tokens=8, ignore_eos=True, seed_key=("probe",)
)
PROBE_QUESTIONS = ("3 + 4 =", "The capital of France is", "What do you see?")
MIN_PROBE_TOKENS = 64


def probe_prompts(cfg: Config, policy: Policy) -> list[EncodedPrompt]:
    """A few short questions, the last with a picture of noise where the policy sees."""
    renderer = Renderer(policy, cfg.data.model_copy(update={"max_prompt_tokens": 10**6}), "")
    prompts = []
    for number, question in enumerate(PROBE_QUESTIONS):
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        images: tuple[Image.Image, ...] = ()
        if policy.processor is not None and number == len(PROBE_QUESTIONS) - 1:
            noise = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
            parts, images = [{"type": "image"}, *parts], (Image.fromarray(noise),)
        message = {"role": "user", "content": parts}
        prompts.append(renderer.encode(Prompt(f"probe-{number}", (message,), images, "")))
    return prompts


def logprob_gap(rollouts: Sequence[Rollout], policy: Any, temperature: float) -> float:
    """Mean |engine's log-prob - policy's| over the tokens of rollouts sampled at this temperature,
    of which there must be 64.
    """
    engine = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    if len(engine) < MIN_PROBE_TOKENS:
        raise ValueError(f"a log-prob probe of {len(engine)} tokens; it needs {MIN_PROBE_TOKENS}")
    return float((engine - torch.cat(policy.score(rollouts, temperature))).abs().mean())


def tolerance(cfg: Config, dtypes: Iterable[torch.dtype]) -> float:
    """Largest mean log-prob gap: as configured, else by the dtypes of policy and engine."""
    return cfg.rollout.vllm.probe_tolerance or max(TOLERANCE.get(dtype, 0.1) for dtype in dtypes)


def check_gap(
    rollouts: Sequence[Rollout],
    policy: Policy,
    limit: float,
    cause: Callable[[], str | None] = lambda: None,
) -> float:
    """The gap of the probe's rollouts. Raises StoppedError above the limit, with what `cause`
    finds: the tensor that differs, if one does.
    """
    gap = logprob_gap(rollouts, policy, PROBE.temperature)
    if not gap <= limit:
        found = (
            cause()
            or "all weights are equal, so the engine computes something else with them; set "
            "rollout.engine=hf"
        )
        raise StoppedError(
            f"weight sync: the engine's log-probs are {gap:.4g} away from the policy's on average "
            f"(limit {limit:.4g}): {found}"
        )
    return gap
