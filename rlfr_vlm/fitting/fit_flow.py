"""Offline: fit the flow field to the frozen policy's latents on solutions of experts, or of the
policy itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlfr_vlm.batch import GradedGroup
from rlfr_vlm.config import Config, FlowFitConfig, to_yaml
from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import PromptSource, PromptStream, encode_all
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting.budget import FIT_WARMUP_FRAC, fit_lr, fit_steps, num_heldout
from rlfr_vlm.fitting.latent_store import store_latents
from rlfr_vlm.fitting.progress import Clock, Work
from rlfr_vlm.fitting.small_steps import fit_tokens
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.objective import logit_normal_times
from rlfr_vlm.flow.stored import some_tiles
from rlfr_vlm.flow.yardstick import REFERENCE, measure
from rlfr_vlm.learner.optim import Optimizer, OptimizerSettings
from rlfr_vlm.models.pack import micro_batches, pack
from rlfr_vlm.models.policy import Policy, expert_rollout
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout, request_seed

YARDSTICK_FILE = "flow_yardstick.json"
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


def fit_flow(
    cfg: Config,
    policy: Policy,
    field: FlowField,
    data: FitData,
    folder: Path,
    say: Callable[[str], None] = print,
) -> tuple[float, Rows]:
    """Flow matching (arXiv:2210.02747) on latents of the frozen backbone, at logit-normal times.

    With `flow.fit.batch_tokens` in small steps over latents that are computed once; else as
    published, whole solutions with `batch_mul` draws per latent. A twentieth is held out. Writes
    the config, flow_fit.jsonl and, at the end, the field into `folder`; a fit that was stopped goes
    on where it last looked at what was held out. Returns the held-out loss, and what it is measured
    against (flow/yardstick.py).
    """
    assert cfg.flow is not None
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(folder, _key(cfg, policy, data), say)
    (folder / "config.resolved.yaml").write_text(to_yaml(cfg))
    if cfg.flow.fit.batch_tokens is None:
        loss, rows = _fit_solutions(cfg, policy, field, data, work)
    else:
        loss, rows = _fit_tokens(cfg, policy, field, data, work)
    field.save(folder)
    work.clear()
    return loss, rows


def _key(cfg: Config, policy: Policy, data: FitData) -> str:
    """Digest of everything that decides a fit's numbers."""
    assert cfg.flow is not None
    settings = cfg.flow.model_dump(
        mode="json", exclude={"profile", "checkpoint", "online", "reward"}
    )
    rows = [[p.id, p.response] for p in data.prompts] + [
        [r.token_ids for r in g.group.rollouts] for g in data.responses
    ]
    tree = [
        cfg.seed,
        settings,
        policy.identity,
        str(policy.dtype),
        cfg.data.model_dump(mode="json"),
        rows,
    ]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def yardstick_lines(rows: Sequence[Mapping[str, float | int | str]]) -> list[str]:
    """Held-out deviations beside what needs no field; and a warning where the field is no better
    than v = x_t / t.
    """
    lines = []
    for at, when in (("fit", "random times"), ("reward", "the reward's times")):
        row = {
            name: value
            for name, value in next(r for r in rows if r["layer"] == -1 and r["at"] == at).items()
            if isinstance(value, float)
        }
        lines.append(
            f"held-out deviation at {when}:  "
            + "  ".join(f"{name} {value:.3g}" for name, value in row.items())
        )
        if row["field"] >= row[REFERENCE]:
            lines.append(
                f"warning: at {when} the field deviates by {row['field']:.3g}, and v = x_t / t, "
                f"which knows nothing, by {row[REFERENCE]:.3g}: it "
                "has not learnt yet. Give it more flow.fit.steps or a higher flow.fit.lr "
                "(flow.profile=informed does), or fewer rows at a time"
            )
    return lines


def settings_of(fit: FlowFitConfig, steps: int, size: int) -> OptimizerSettings:
    """AdamW, cosine to 0 after a tenth of warm-up. size: D of the latents."""
    schedule = (steps, FIT_WARMUP_FRAC, 0.0)
    return OptimizerSettings(
        fit_lr(fit, size), (0.9, 0.999), fit.weight_decay, 1.0, *schedule, setting="flow.fit.lr"
    )


# -- small steps over latents that are computed once -----------------------------------------------


def _fit_tokens(
    cfg: Config, policy: Policy, field: FlowField, data: FitData, work: Work
) -> tuple[float, Rows]:
    """Divide solutions and responses into what is fitted and what is held out, compute their
    latents, fit.
    """
    assert cfg.flow is not None
    fit = cfg.flow.fit
    order = torch.randperm(
        len(data.prompts), generator=torch.Generator().manual_seed(cfg.seed)
    ).tolist()
    held_rows, held_groups = (
        num_heldout(len(part)) if part else 0 for part in (order, data.responses)
    )
    experts = Experts(policy, fit.max_tokens)
    items: list[Prompt | GradedGroup] = [*(data.prompts[i] for i in order), *data.responses]
    held = [*items[:held_rows], *items[len(order) : len(order) + held_groups]]
    train = [*items[held_rows : len(order)], *items[len(order) + held_groups :]]
    mixed = torch.randperm(
        len(train), generator=torch.Generator().manual_seed(cfg.seed + 1)
    ).tolist()
    stores = []
    for name, part in (("held-out", held), ("fit", [train[i] for i in mixed])):
        roles: list[tuple[bool, bool]] = []
        solutions = _solutions(cfg, experts, part, data, roles)
        room = fit.cache_gib * 2**30
        stored = store_latents(
            policy,
            field,
            solutions,
            work.folder / f"{name}.bin",
            cfg.train.tokens_per_microbatch,
            room,
        )
        pools = [
            stored.tokens([i for i, role in enumerate(roles[: stored.num_responses]) if role[k]])
            for k in range(2)
        ]
        stores.append((stored, dict(zip(("network", "contrast"), pools, strict=True))))
        if stored.full:
            work.say(
                f"flow.fit.cache_gib={fit.cache_gib:g} has room for the latents of "
                f"{stored.num_responses} responses: the others are left out"
            )
    for name in field.networks:
        for (_, found), what in zip(stores, ("held out", "fit"), strict=True):
            if not len(found[name]):
                raise UserError(_nothing(cfg, name, what))
    return fit_tokens(cfg, field, settings_of, stores[1], stores[0], work)


def _nothing(cfg: Config, network: str, what: str) -> str:
    """Why a network has nothing to learn from."""
    assert cfg.flow is not None
    flow, doing = cfg.flow, "hold out" if what == "held out" else "fit on"
    if network == "network" and flow.fit.source == "expert":
        return (
            f"data.expert: nothing to {doing}: no response token has a context; the responses "
            "are shorter than flow.shift, or too few"
        )
    setting, kind = (
        ("flow.fit.source", "right")
        if network == "network"
        else (f"flow.contrast={flow.contrast}", flow.contrast)
    )
    return (
        f"{setting}: nothing to {doing}: too few of the sampled responses are {kind}; sample "
        "more (flow.fit.rollout_prompts)"
    )


def _solutions(
    cfg: Config,
    experts: Experts,
    items: Sequence[Prompt | GradedGroup],
    data: FitData,
    roles: list[tuple[bool, bool]],
) -> Iterator[list[Rollout]]:
    """Solutions of each item, and whether the field and its contrast learn from each, added to
    `roles` as they are handed out.
    """
    assert cfg.flow is not None
    source, contrast = cfg.flow.fit.source, cfg.flow.contrast
    for item in items:
        if isinstance(item, Prompt):
            encoded = encode_all([item], data.renderer, data.bad, experts.check, len(data.prompts))
            roles += [(True, False)] * len(encoded)
            yield [experts.rollout(prompt) for prompt in encoded]
        else:
            chosen = []
            for rollout, outcome in zip(item.group.rollouts, item.outcomes, strict=True):
                own = contrast == "own" or (
                    contrast == "wrong" and outcome.graded and not outcome.correct
                )
                role = (outcome.correct and source != "expert", own)
                if any(role):
                    chosen.append(rollout)
                    roles.append(role)
            yield chosen


# -- as published: whole solutions, computed anew in every step ------------------------------------


def _fit_solutions(
    cfg: Config, policy: Policy, field: FlowField, data: FitData, work: Work
) -> tuple[float, Rows]:
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
    stores = [
        store_latents(
            policy,
            field,
            [part],
            work.folder / f"{name}.bin",
            cfg.train.tokens_per_microbatch,
            fit.cache_gib * 2**30,
        )
        for name, part in (("fit", known), ("held-out", heldout))
    ]
    return loss, measure(
        field,
        *(
            some_tiles(field, stored, stored.tokens(range(stored.num_responses)), cfg.seed)
            for stored in stores
        ),
    )


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
