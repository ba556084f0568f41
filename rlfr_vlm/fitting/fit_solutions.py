"""As published: whole solutions, computed anew in every step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfr_vlm.batch import GradedGroup
from rlfr_vlm.config import Config, FlowFitConfig
from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import PromptSource, PromptStream, encode_all
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting.budget import FIT_WARMUP_FRAC, fit_lr, fit_steps, num_heldout
from rlfr_vlm.fitting.latent_store import store_latents
from rlfr_vlm.fitting.progress import Clock, Work
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.objective import logit_normal_times
from rlfr_vlm.flow.stored import some_tiles
from rlfr_vlm.flow.yardstick import measure
from rlfr_vlm.learner.optim import Optimizer, OptimizerSettings
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy, expert_rollout
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout, request_seed

MEASURED = 256  # solutions that regressions are taken from

Rows = list[dict[str, float | int | str]]


@dataclass(frozen=True)
class FitData:
    """What a fit learns from."""

    # rows with an expert solution; none where only responses are asked for
    prompts: Sequence[Prompt]
    renderer: Renderer  # of these rows
    bad: BadRows
    responses: Sequence[GradedGroup] = ()  # of the policy itself


def settings_of(fit: FlowFitConfig, steps: int, size: int) -> OptimizerSettings:
    """AdamW, cosine to 0 after a tenth of warm-up. size: D of the latents."""
    schedule = (steps, FIT_WARMUP_FRAC, 0.0)
    return OptimizerSettings(
        fit_lr(fit, size), (0.9, 0.999), fit.weight_decay, 1.0, *schedule, setting="flow.fit.lr"
    )


def fit_solutions(
    cfg: Config, policy: Policy, field: FlowField, data: FitData, work: Work
) -> tuple[float, Rows]:
    """Fit on rows of experts, `flow.fit.batch_mul` draws per latent. Returns the held-out loss, and
    what it is measured against.
    """
    assert cfg.flow is not None
    fit, prompts = cfg.flow.fit, data.prompts
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    held = num_heldout(len(order))
    batch_size, steps = fit_steps(cfg, len(order))
    train = [prompts[i] for i in order[held:]]
    optimizer = Optimizer(
        dict(field.network.named_parameters()), settings_of(fit, steps, field.network.size)
    )
    experts = Experts(policy, fit.max_tokens)
    stream = PromptStream(len(train), cfg.seed, shuffle=True)
    source = PromptSource(train, data.renderer, stream, data.bad, experts.check)
    chosen = [prompts[i] for i in order[:held]]
    heldout = [
        experts.rollout(p)
        for p in encode_all(chosen, data.renderer, data.bad, experts.check, len(prompts))
    ]
    if not heldout:
        raise UserError("data.expert: none of the rows that were held out can be used")
    done = work.restore({"network": optimizer}, {"network": field.network})
    stream.position = work.facts.get("position", 0)
    loss, clock = work.facts.get("loss", float("nan")), Clock(done, steps)
    with work.log.open("a") as log:
        for step in range(done + 1, steps + 1):
            batch = [experts.rollout(p) for p in source.next(batch_size)]
            mean = fit_step(cfg, policy, field, batch, step)
            record = {
                "step": step,
                "loss": mean,
                "lr": optimizer.current_lr,
                "grad_norm": optimizer.step(),
            }
            look = step == 1 or step == steps or step % max(1, steps // 10) == 0
            if look:
                record["eval_loss"] = loss = heldout_loss(cfg, policy, field, heldout)
                work.say(
                    f"flow fit {step}/{steps}  loss {mean:.4f}  held-out "
                    f"{loss:.4f}{clock.left(step)}"
                )
            log.write(json.dumps(record) + "\n")
            if look:
                log.flush()
                work.keep(
                    step,
                    {"network": optimizer},
                    {"network": field.network.state_dict()},
                    position=stream.position,
                    loss=loss,
                )
    known = [
        experts.rollout(p)
        for _ in range(math.ceil(MEASURED / batch_size))
        for p in source.next(batch_size)
    ]
    return loss, _measured(cfg, policy, field, work, known, heldout)


def _measured(
    cfg: Config,
    policy: Policy,
    field: FlowField,
    work: Work,
    known: Sequence[Rollout],
    heldout: Sequence[Rollout],
) -> Rows:
    """What the field is worth beside what needs none."""
    assert cfg.flow is not None
    budget, room = cfg.train.tokens_per_microbatch, cfg.flow.fit.cache_gib * 2**30
    tiles = []
    for name, part in (("fit", known), ("held-out", heldout)):
        path = work.folder / f"{name}.bin"
        stored = store_latents(policy, field, [part], path, budget, room)
        every = stored.tokens(range(stored.num_responses))
        tiles.append(some_tiles(field, stored, every, cfg.seed))
    return measure(field, *tiles)


class Experts:
    """Expert rows as rollouts."""

    def __init__(self, policy: Policy, max_tokens: int) -> None:
        self.policy, self.max_tokens = policy, max_tokens

    def rollout(self, prompt: EncodedPrompt) -> Rollout:
        """The expert's solution as if it had been sampled."""
        return expert_rollout(prompt, self.policy.tokenizer, self.policy.tokenizer.eos_token_id)

    def check(self, prompt: EncodedPrompt) -> None:
        """Raises RowError for a row over the limit."""
        length = len(prompt.token_ids) + len(self.rollout(prompt).token_ids)
        if length > self.max_tokens:
            raise RowError(
                "too_long",
                f"{prompt.prompt.origin}: {length} tokens exceed "
                f"flow.fit.max_tokens={self.max_tokens}",
            )


def fit_step(
    cfg: Config, policy: Policy, field: FlowField, experts: Sequence[Rollout], step: int
) -> float:
    """Accumulate the gradient of the mean loss over this batch's tokens that have a context, layers
    and draws.
    """
    assert cfg.flow is not None
    repeats = cfg.flow.fit.batch_mul
    mean, count = (
        0.0,
        sum(num_valid(field, rollout) for rollout in experts) * len(field.spec.layers) * repeats,
    )
    if count == 0:
        raise UserError(
            "data.expert: no response token has a context: the responses are shorter than "
            "flow.shift"
        )
    for losses in expert_losses(
        cfg, policy, field, experts, [("flow fit", step, draw) for draw in range(repeats)]
    ):
        loss = losses.sum() / count
        loss.backward()
        mean += loss.item()
    return mean


@torch.no_grad()
def heldout_loss(
    cfg: Config, policy: Policy, field: FlowField, experts: Sequence[Rollout]
) -> float:
    """Mean deviation over held-out response tokens, with the same noise and times at every call."""
    losses = torch.cat(list(expert_losses(cfg, policy, field, experts, [("flow held out",)])))
    return losses.sum().item() / max(
        1, sum(num_valid(field, rollout) for rollout in experts) * len(field.spec.layers)
    )


def num_valid(field: FlowField, rollout: Rollout) -> int:
    """Tokens of a response that have a context on some side."""
    length, prompt = len(rollout.token_ids), len(rollout.prompt.token_ids)
    missing = (
        shift if mode == "token_pre" else max(0, shift - prompt) if mode == "token_post" else 0
        for mode, shift in field.spec.sides
    )
    return max(0, length - min(missing))


def expert_losses(
    cfg: Config,
    policy: Policy,
    field: FlowField,
    experts: Sequence[Rollout],
    draws: Sequence[tuple[int | str, ...]],
) -> Iterator[Tensor]:
    """Deviations at logit-normal times of every layer, token with a context, side (by its share)
    and draw, a bounded number at a time.
    """
    for part in micro_batches(experts, cfg.train.tokens_per_microbatch):
        chosen = [experts[i] for i in part]
        with torch.no_grad():
            _, latents = policy.states(pack(chosen, policy.device), field.request)
        assert latents is not None
        lengths = [len(rollout.token_ids) for rollout in chosen]
        for draw in draws:
            seeds = [request_seed(cfg.seed, *draw, rollout.prompt.prompt.id) for rollout in chosen]
            for tile in field.tiles(latents, lengths, seeds):
                yield (
                    field.deviation(tile, logit_normal_times(tile.time_normal)) * tile.share
                ).flatten()
