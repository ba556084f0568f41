"""Offline: fit the flow field to the frozen policy's latents on expert solutions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlfr_vlm.config import Config
from rlfr_vlm.data.prompts import PromptStream
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import ROW_TILE, FlowField
from rlfr_vlm.flow.latents import Latents
from rlfr_vlm.flow.objective import sample_times, velocity_deviation
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy, expert_rollout
from rlfr_vlm.training.optim import Optimizer
from rlfr_vlm.types import Prompt, Rollout, request_seed

HELDOUT_FRAC = 0.05


def fit_flow(
    cfg: Config, policy: Policy, field: FlowField, prompts: Sequence[Prompt], renderer: Renderer, folder: Path, say=print
) -> float:
    """Flow matching (arXiv:2210.02747) on expert latents, the backbone frozen: logit-normal times, `batch_mul` draws per latent.

    A twentieth of the rows is held out. Writes flow_fit.jsonl and, at the end, the field into `folder`. Returns the held-out loss.
    """
    assert cfg.flow is not None
    fit = cfg.flow.fit
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    num_heldout = min(64, max(1, int(len(order) * HELDOUT_FRAC)))
    heldout, train = [prompts[i] for i in order[:num_heldout]], [prompts[i] for i in order[num_heldout:]]
    if not train:
        raise UserError(f"data.expert: {len(prompts)} rows are too few to fit a flow and hold some out")
    steps = fit.steps or max(1, math.ceil(len(train) * fit.epochs / fit.batch_size))
    optimizer = Optimizer(
        dict(field.network.named_parameters()), fit.lr, (0.9, 0.999), fit.weight_decay, 1.0, steps, warmup_frac=0.1, min_lr_ratio=0.0
    )
    stream = PromptStream(len(train), cfg.seed, shuffle=True)
    folder.mkdir(parents=True, exist_ok=True)
    check = Heldout(cfg, policy, field, [_expert(p, policy, renderer, fit.max_tokens) for p in heldout])
    with (folder / "flow_fit.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            experts = [_expert(train[stream.draw()], policy, renderer, fit.max_tokens) for _ in range(fit.batch_size)]
            loss = _fit_step(cfg, policy, field, experts, step)
            norm = optimizer.step()
            record = {"step": step, "loss": loss, "grad_norm": norm, "lr": optimizer.current_lr}
            if step == 1 or step == steps or step % max(1, steps // 10) == 0:
                record["eval_loss"] = check.loss()
                say(f"flow fit {step}/{steps}  loss {loss:.4f}  held-out {record['eval_loss']:.4f}")
            log.write(json.dumps(record) + "\n")
    field.save(folder)
    return record["eval_loss"]


class Heldout:
    """The held-out loss, with the same noise and times at every call."""

    def __init__(self, cfg: Config, policy: Policy, field: FlowField, experts: Sequence[Rollout]) -> None:
        self.cfg, self.policy, self.field, self.experts = cfg, policy, field, experts

    @torch.no_grad()
    def loss(self) -> float:
        """Mean deviation over held-out response tokens."""
        total, count = 0.0, 0
        for latents in _latents(self.cfg, self.policy, self.field, self.experts):
            for losses in _losses(self.field, latents, 1, request_seed(self.cfg.seed, "flow heldout")):
                total, count = total + losses.sum().item(), count + len(losses)
        return total / max(1, count)


def _expert(prompt: Prompt, policy: Policy, renderer: Renderer, max_tokens: int) -> Rollout:
    rollout = expert_rollout(renderer.encode(prompt), policy.tokenizer, policy.tokenizer.eos_token_id)
    if len(rollout.token_ids) + len(rollout.prompt.token_ids) > max_tokens:
        raise UserError(f"{prompt.origin}: the expert row is longer than flow.fit.max_tokens={max_tokens}")
    return rollout


def _fit_step(cfg: Config, policy: Policy, field: FlowField, experts: Sequence[Rollout], step: int) -> float:
    """Accumulate the gradient of the mean loss over this batch's tokens that have a context."""
    assert cfg.flow is not None
    batches = list(_latents(cfg, policy, field, experts))
    count = sum(int(latents.valid.sum()) for latents in batches) * len(field.spec.layers) * cfg.flow.fit.batch_mul
    total = 0.0
    for number, latents in enumerate(batches):
        for losses in _losses(field, latents, cfg.flow.fit.batch_mul, request_seed(cfg.seed, "flow fit", step, number)):
            loss = losses.sum() / count
            loss.backward()
            total += loss.item()
    return total


def _latents(cfg: Config, policy: Policy, field: FlowField, experts: Sequence[Rollout]) -> list[Latents]:
    batches = []
    for part in micro_batches(experts, cfg.train.tokens_per_microbatch):
        with torch.no_grad():
            _, latents = policy.states(pack([experts[i] for i in part], policy.device), field.request)
        assert latents is not None
        batches.append(latents)
    return batches


def _losses(field: FlowField, latents: Latents, repeats: int, seed: int):
    """Deviations of every (layer, token with a context, draw), a bounded number of rows at a time."""
    generator = torch.Generator().manual_seed(seed)
    valid = latents.valid.nonzero()[:, 0]
    depth = torch.tensor(field.spec.layers, device=field.device) / field.spec.num_layers
    per_tile = max(1, ROW_TILE // len(field.spec.layers))
    for _ in range(repeats):
        for start in range(0, len(valid), per_tile):
            tokens = valid[start : start + per_tile]
            target = latents.states.index_select(1, latents.target[tokens]).float().flatten(0, 1)
            context = latents.states.index_select(1, latents.context[tokens]).float().flatten(0, 1)
            noise: Tensor = torch.randn(target.shape, generator=generator).to(field.device)
            t = sample_times(len(target), generator, field.device)
            yield velocity_deviation(field.network, target, context, noise, t, depth.repeat_interleave(len(tokens)))
