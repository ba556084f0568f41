"""What fitting a flow field will do."""

from __future__ import annotations

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting.budget import (
    FIELD_SPEC,
    FIT_LOOKS,
    FIT_STEPS,
    FIT_WARMUP_FRAC,
    LR_TIMES_SIZE,
    fit_lr,
    fit_steps,
    new_field_folder,
    num_heldout,
)
from rlfr_vlm.planning.loaded import _field_size, memory_lines, policy_lines
from rlfr_vlm.planning.rows import count_rows
from rlfr_vlm.planning.shapes import hidden_size
from rlfr_vlm.planning.wording import Lines, bad_rows_file, learning_rate, number, required


def fit_schedule(cfg: Config) -> tuple[Lines, Lines, Lines]:
    """Steps of a fit, what it loads and what it writes."""
    if cfg.flow is None:
        raise UserError("the config has no `flow` section: nothing to fit")
    out = new_field_folder(cfg)
    size = hidden_size(cfg.model.path)
    steps, plan = _solution_steps(cfg) if cfg.flow.fit.batch_tokens is None else _small_steps(cfg)
    if cfg.flow.fit.lr is None and size is None:
        plan.append(("learning rate", f"{LR_TIMES_SIZE:g} over the size of the latents"))
    else:
        plan.append(
            (
                "learning rate",
                learning_rate(fit_lr(cfg.flow.fit, size or 1), steps, FIT_WARMUP_FRAC, 0.0),
            )
        )
    files = [
        (f"{out}/config.resolved.yaml", ""),
        (f"{out}/flow_fit.jsonl", "a line per step, with the held-out loss now and then"),
        (f"{out}/.fit/", "what a fit that is stopped goes on from; gone at the end"),
        (f"{out}/flow.safetensors", "the field, at the end"),
        (f"{out}/{FIELD_SPEC}", "what it was fitted on"),
        (
            f"{out}/flow_yardstick.json",
            "held-out deviation beside what needs no field; what it knows of right and wrong",
        ),
        *bad_rows_file(cfg),
    ]
    contrast = ", half of them its contrast's" if cfg.flow.contrast != "none" else ""
    return (
        plan,
        [
            *policy_lines(cfg),
            ("flow field", f"a new one{_field_size(cfg)}{contrast}"),
            *memory_lines(cfg, trained=False),
        ],
        files,
    )


def _small_steps(cfg: Config) -> tuple[int, Lines]:
    """How many, and what is to be said of them."""
    assert cfg.flow is not None
    fit, contrast = cfg.flow.fit, cfg.flow.contrast
    steps = fit.steps or FIT_STEPS
    plan: Lines = []
    if fit.source != "rollouts":
        plan.append(("data", count_rows(required(cfg.data.expert, "data.expert")).text))
    if fit.source != "expert" or contrast != "none":
        rows = count_rows(required(cfg.data.train, "data.train"), cfg.data.limit)
        use = " and ".join(
            [
                *(["the right ones for the field"] if fit.source != "expert" else []),
                *([f"{contrast} for its contrast"] if contrast != "none" else []),
            ]
        )
        plan.append(
            (
                "responses",
                f"{cfg.rollout.group_size} to each of {number(fit.rollout_prompts)} of "
                f"{rows.text}; {use}",
            )
        )
    if fit.probe_prompts:
        plan.append(
            (
                "probe",
                f"{cfg.rollout.group_size} responses to each of {number(fit.probe_prompts)} "
                "further prompts",
            )
        )
    plan.append(
        (
            "steps",
            f"at most {number(steps)}, fewer where {fit.patience} of {FIT_LOOKS} looks at what is "
            "held out are no better",
        )
    )
    plan.append(
        (
            "batch",
            f"{fit.batch_tokens} tokens at {len(cfg.flow.layers)} layers, from latents computed "
            f"once (at most {fit.cache_gib:g} GiB)",
        )
    )
    return steps, plan


def _solution_steps(cfg: Config) -> tuple[int | None, Lines]:
    """How many, where that is known, and what is to be said of them."""
    assert cfg.flow is not None
    rows = count_rows(required(cfg.data.expert, "data.expert"))
    fit, flow = cfg.flow.fit, cfg.flow
    batch, steps = (fit.batch_size, fit.steps) if rows.count is None else fit_steps(cfg, rows.count)
    plan = [("data", rows.text)]
    if rows.count is not None:
        held = num_heldout(rows.count)
        plan.append(("held out", f"{held} rows, {number(rows.count - held)} are fitted"))
    of_epochs = "" if fit.steps else f": {fit.epochs:g} passes"
    plan.append(
        (
            "steps",
            f"{number(steps)}{of_epochs}"
            if steps
            else f"rows x {fit.epochs:g} / {batch}, rounded up",
        )
    )
    plan.append(
        (
            "batch",
            f"{batch} expert solutions, {len(flow.layers)} layers and {fit.batch_mul} draws of "
            "noise and time for each token",
        )
    )
    plan.append(
        (
            "tokens per step",
            f"at most {number(batch * fit.max_tokens)}: {batch} rows of {number(fit.max_tokens)}",
        )
    )
    if steps:
        plan.append(("tokens", f"at most {number(steps * batch * fit.max_tokens)} in total"))
    return steps, plan
