"""`flow`: fit the flow field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rlfr_vlm.batch import GradedGroup
from rlfr_vlm.commands.parts import Workbench, say, workbench
from rlfr_vlm.commands.rows import (
    bad_rows_of,
    checked,
    expert_prompts,
    forget_bad_rows,
    required_data,
)
from rlfr_vlm.config import Config, FlowConfig
from rlfr_vlm.data.prompts import load_prompts
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import encode_all
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting.budget import new_field_folder
from rlfr_vlm.fitting.fit_flow import YARDSTICK_FILE, fit_flow, yardstick_lines
from rlfr_vlm.fitting.fit_solutions import FitData
from rlfr_vlm.fitting.probe import probe
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.spec import FlowSpec
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rewards.outcome import grade
from rlfr_vlm.storage.run_lock import held
from rlfr_vlm.training.collect import sampling
from rlfr_vlm.types import Prompt


def flow(cfg: Config) -> Path:
    """Fit the flow field offline, on `data.expert` or as `flow.fit.source` says; returns its
    folder, `output_dir/flow`.
    """
    new_field_folder(cfg)
    with held(Path(cfg.output_dir)):
        forget_bad_rows(cfg)
        rows = expert_prompts(cfg)
        if not needs_responses(cfg):
            return fit(cfg, Policy(cfg.model), rows)
        rl_rows = load_prompts(
            required_data(cfg.data.train, "data.train"), cfg.data, bad_rows_of(cfg), cfg.data.limit
        )
        with workbench(cfg) as bench:
            return fit(cfg, bench.policy, rows, sampled_for_fit(bench, rl_rows))


def needs_responses(cfg: Config) -> bool:
    """Whether a fit looks at responses of the policy itself."""
    return bool(
        cfg.flow is not None and (_learns_from_responses(cfg.flow) or cfg.flow.fit.probe_prompts)
    )


def _learns_from_responses(cfg: FlowConfig) -> bool:
    return cfg.fit.source != "expert" or cfg.contrast != "none"


@dataclass(frozen=True)
class Sampled:
    """Graded responses of the policy: to fit on, and to tell what the field knows."""

    fitted: Sequence[GradedGroup] = ()
    probed: Sequence[GradedGroup] = ()


def sampled_for_fit(bench: Workbench, prompts: Sequence[Prompt]) -> Sampled:
    """Responses to as many rows of data.train as the fit asks for, none of them for both uses.
    Raises UserError where there are too few.
    """
    cfg = bench.cfg
    assert cfg.flow is not None and cfg.data.train is not None
    fit = cfg.flow.fit
    wanted = fit.rollout_prompts if _learns_from_responses(cfg.flow) else 0
    bad = bad_rows_of(cfg)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    chosen = [prompts[i] for i in order[: wanted + fit.probe_prompts]]
    rows = checked(cfg, chosen, bench.grader, bad)
    if len(rows) < 2 or len(prompts) < wanted + fit.probe_prompts:
        raise UserError(
            f"data.train: {len(prompts)} rows are too few for flow.fit.rollout_prompts={wanted} "
            f"and flow.fit.probe_prompts={fit.probe_prompts}, which take different ones: lower them"
        )
    source = Renderer(bench.policy, cfg.data, cfg.data.train)
    bench.engine.load_weights(bench.policy)
    say(f"sampling {len(rows)} x {cfg.rollout.group_size} responses for the field")
    groups: list[GradedGroup] = []
    for start in range(0, len(rows), cfg.rollout.num_prompts):
        encoded = encode_all(
            rows[start : start + cfg.rollout.num_prompts], source, bad, num_rows=len(prompts)
        )
        sampling_ = replace(sampling(cfg, 0), seed_key=(cfg.seed, "flow fit"))
        sampled = bench.engine.sample(encoded, sampling_)
        outcomes = iter(grade(sampled, cfg.reward, bench.grader, cfg.rollout.max_new_tokens))
        groups += [
            GradedGroup(g, tuple(next(outcomes) for _ in g.rollouts), len(groups) + k)
            for k, g in enumerate(sampled)
        ]
    probes = {
        prompt.id for prompt in chosen[wanted:]
    }  # by name: rows of either use may have fallen out as bad ones
    is_probe = [g.group.rollouts[0].prompt.prompt.id in probes for g in groups]
    return Sampled(
        *(
            [g for g, probed in zip(groups, is_probe, strict=True) if probed is use]
            for use in (False, True)
        )
    )


def fit(
    cfg: Config, policy: Policy, rows: Sequence[Prompt], sampled: Sampled | None = None
) -> Path:
    """Fit a new field for this policy, and say what it is worth. Raises UserError where one was
    fitted before.
    """
    if cfg.flow is None:
        raise UserError("the config has no `flow` section: nothing to fit")
    folder, sampled = new_field_folder(cfg), sampled or Sampled()
    field = FlowField(
        FlowSpec.of(cfg.flow, policy.identity),
        seed=cfg.seed,
        device=policy.device,
        compute_dtype=policy.dtype,
    )
    data = FitData(
        rows, Renderer(policy, cfg.data, str(cfg.data.expert)), bad_rows_of(cfg), sampled.fitted
    )
    _, measured = fit_flow(cfg, policy, field, data, folder, say)
    for line in yardstick_lines(measured):
        say(line)
    yardstick: dict[str, Any] = {"deviation": measured}
    if sampled.probed:
        found = probe(cfg, policy, field, sampled.probed)
        yardstick["separation"] = found.as_json()
        say(found.line)
    (folder / YARDSTICK_FILE).write_text(json.dumps(yardstick, indent=1))
    return folder
