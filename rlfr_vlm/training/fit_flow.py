"""Offline: fit the flow field to the frozen policy's latents on expert solutions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlfr_vlm.config import Config, to_yaml
from rlfr_vlm.data.prompts import BadRows, PromptStream, RowError
from rlfr_vlm.data.render import PromptSource, Renderer, encode_all
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.objective import logit_normal_times
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy, expert_rollout
from rlfr_vlm.training.optim import Optimizer, OptimizerSettings
from rlfr_vlm.training.schedule import FIT_WARMUP_FRAC, fit_steps, num_heldout
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout, request_seed


def fit_flow(
    cfg: Config,
    policy: Policy,
    field: FlowField,
    prompts: Sequence[Prompt],
    renderer: Renderer,
    bad: BadRows,
    folder: Path,
    say: Callable[[str], None] = print,
) -> float:
    """Flow matching (arXiv:2210.02747) on expert latents, the backbone frozen: logit-normal times, `batch_mul` draws per latent.

    A twentieth of the rows is held out. Writes the config, flow_fit.jsonl and, at the end, the field into `folder`. Returns the held-out loss.
    """
    assert cfg.flow is not None
    fit = cfg.flow.fit
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    held = num_heldout(len(order))
    batch_size, steps = fit_steps(cfg, len(order))
    train = [prompts[i] for i in order[held:]]
    schedule = (steps, FIT_WARMUP_FRAC, 0.0)
    settings = OptimizerSettings(fit.lr, (0.9, 0.999), fit.weight_decay, 1.0, *schedule, setting="flow.fit.lr")
    optimizer = Optimizer(dict(field.network.named_parameters()), settings)
    experts = Experts(policy, fit.max_tokens)
    source = PromptSource(train, renderer, PromptStream(len(train), cfg.seed, shuffle=True), bad, experts.check)
    heldout = [experts.rollout(p) for p in encode_all([prompts[i] for i in order[:held]], renderer, bad, experts.check, len(prompts))]
    if not heldout:
        raise UserError("data.expert: none of the rows that were held out can be used")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.resolved.yaml").write_text(to_yaml(cfg))
    with (folder / "flow_fit.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            batch = [experts.rollout(p) for p in source.next(batch_size)]
            loss = fit_step(cfg, policy, field, batch, step)
            record = {"step": step, "loss": loss, "lr": optimizer.current_lr, "grad_norm": optimizer.step()}
            if step == 1 or step == steps or step % max(1, steps // 10) == 0:
                record["eval_loss"] = heldout_loss(cfg, policy, field, heldout)
                say(f"flow fit {step}/{steps}  loss {loss:.4f}  held-out {record['eval_loss']:.4f}")
            log.write(json.dumps(record) + "\n")
    field.save(folder)
    return record["eval_loss"]


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
            raise RowError("too_long", f"{prompt.prompt.origin}: {length} tokens exceed flow.fit.max_tokens={self.max_tokens}")


def fit_step(cfg: Config, policy: Policy, field: FlowField, experts: Sequence[Rollout], step: int) -> float:
    """Accumulate the gradient of the mean loss over this batch's tokens that have a context, layers and draws."""
    assert cfg.flow is not None
    repeats = cfg.flow.fit.batch_mul
    mean, count = 0.0, sum(num_valid(field, rollout) for rollout in experts) * len(field.spec.layers) * repeats
    if count == 0:
        raise UserError("data.expert: no response token has a context: the responses are shorter than flow.shift")
    for losses in expert_losses(cfg, policy, field, experts, [("flow fit", step, draw) for draw in range(repeats)]):
        loss = losses.sum() / count
        loss.backward()
        mean += loss.item()
    return mean


@torch.no_grad()
def heldout_loss(cfg: Config, policy: Policy, field: FlowField, experts: Sequence[Rollout]) -> float:
    """Mean deviation over held-out response tokens, with the same noise and times at every call."""
    losses = torch.cat(list(expert_losses(cfg, policy, field, experts, [("flow held out",)])))
    return losses.sum().item() / max(1, sum(num_valid(field, rollout) for rollout in experts) * len(field.spec.layers))


def num_valid(field: FlowField, rollout: Rollout) -> int:
    """Tokens of a response that have a context on some side."""
    length, prompt = len(rollout.token_ids), len(rollout.prompt.token_ids)
    missing = (shift if mode == "token_pre" else max(0, shift - prompt) if mode == "token_post" else 0 for mode, shift in field.spec.sides)
    return max(0, length - min(missing))


def expert_losses(
    cfg: Config, policy: Policy, field: FlowField, experts: Sequence[Rollout], draws: Sequence[tuple[int | str, ...]]
) -> Iterator[Tensor]:
    """Deviations at logit-normal times of every layer, token with a context, side (by its share) and draw, a bounded number at a time."""
    for part in micro_batches(experts, cfg.train.tokens_per_microbatch):
        chosen = [experts[i] for i in part]
        with torch.no_grad():
            _, latents = policy.states(pack(chosen, policy.device), field.request)
        assert latents is not None
        lengths = [len(rollout.token_ids) for rollout in chosen]
        for draw in draws:
            seeds = [request_seed(cfg.seed, *draw, rollout.prompt.prompt.id) for rollout in chosen]
            for tile in field.tiles(latents, lengths, seeds):
                yield (field.deviation(tile, logit_normal_times(tile.time_normal)) * tile.share).flatten()
