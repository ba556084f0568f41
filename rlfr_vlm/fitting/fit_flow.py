"""Offline: fit the flow field to the frozen policy's latents on solutions of experts, or of the
policy itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from rlfr_vlm.batch import GradedGroup
from rlfr_vlm.config import Config, to_yaml
from rlfr_vlm.data.stream import encode_all
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting.budget import num_heldout
from rlfr_vlm.fitting.fit_solutions import Experts, FitData, Rows, fit_solutions, settings_of
from rlfr_vlm.fitting.latent_store import store_latents
from rlfr_vlm.fitting.progress import Work
from rlfr_vlm.fitting.small_steps import fit_tokens
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.yardstick import REFERENCE
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.types import Prompt, Rollout

YARDSTICK_FILE = "flow_yardstick.json"


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
        loss, rows = fit_solutions(cfg, policy, field, data, work)
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
