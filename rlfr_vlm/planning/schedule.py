"""What a command will do, from its config and the size of its data file: `--dry-run` prints it.
Loads no model and no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlfr_vlm.config import Config, config_hash, differences
from rlfr_vlm.errors import UserError
from rlfr_vlm.planning.fit_schedule import fit_schedule
from rlfr_vlm.planning.loaded import field_lines, memory_lines, model_lines, policy_lines
from rlfr_vlm.planning.rows import count_rows
from rlfr_vlm.planning.wording import (
    Lines,
    bad_rows_file,
    due_steps,
    learning_rate,
    listed,
    number,
    required,
)
from rlfr_vlm.run.trackers import STATE_FILE, check_recording
from rlfr_vlm.storage.checkpoint import list_checkpoints


def schedule(verb: str, cfg: Config) -> str:
    """Steps, tokens, what is loaded and what is written where, as YAML comments. Raises UserError
    for what the command would refuse.
    """
    parts = {"flow": fit_schedule, "train": _train, "eval": _eval}[verb](cfg)
    text = []
    for title, lines in zip(("schedule", "loaded", "written"), parts, strict=True):
        text.append(f"# {title}")
        width = max(len(name) for name, _ in lines)
        text += [f"#   {name:{width}}  {value}".rstrip() for name, value in lines]
    return "\n".join(text) + "\n"


# -- RL --------------------------------------------------------------------------------------------


def _train(cfg: Config) -> tuple[Lines, Lines, Lines]:
    check_recording(cfg)
    rows = count_rows(required(cfg.data.train, "data.train"), cfg.data.limit)
    rollout, steps = cfg.rollout, cfg.train.steps
    if rows.count is not None and rollout.num_prompts > rows.count:
        raise UserError(
            f"rollout.num_prompts={rollout.num_prompts} exceeds the {rows.count} rows of "
            f"{cfg.data.train}"
        )
    samples, updates = rollout.num_prompts * rollout.group_size, cfg.algorithm.updates_per_rollout
    per_sample = cfg.data.max_prompt_tokens + rollout.max_new_tokens
    learning = steps - (cfg.flow.online.warmup_steps if cfg.flow is not None else 0)
    least = "at least " if rollout.max_rounds > 1 else ""
    passes = (
        f", {least}{steps * rollout.num_prompts / rows.count:.2f} passes over its rows"
        if rows.count
        else ""
    )
    plan = [
        *_resumed(cfg),
        ("data", rows.text),
        ("steps", f"{number(steps)}{passes}"),
        (
            "rollouts",
            f"{number(rollout.num_prompts)} prompts x {rollout.group_size} responses = "
            f"{number(samples)} samples per step",
        ),
        (
            "updates",
            f"{updates} per step of {number(samples // updates)} samples each, "
            f"{number(learning * updates)} in total",
        ),
        (
            "learning rate",
            learning_rate(
                cfg.optim.lr, learning * updates, cfg.optim.warmup_frac, cfg.optim.min_lr_ratio
            ),
        ),
        (
            "tokens per step",
            f"at most {number(samples * per_sample)}: {number(samples)} samples of a prompt of "
            f"{number(cfg.data.max_prompt_tokens)}"
            f" and a response of {number(rollout.max_new_tokens)}",
        ),
        (
            "response tokens",
            f"at most {number(steps * samples * rollout.max_new_tokens * rollout.max_rounds)} in "
            "total",
        ),
    ]
    if rollout.max_rounds > 1:
        plan.append(
            (
                "rounds",
                f"up to {rollout.max_rounds} per step, each sampling anew for groups that are all "
                "right or all wrong",
            )
        )
    if learning < steps:
        plan.append(
            (
                "flow warm-up",
                f"in the first {number(steps - learning)} steps only the field learns",
            )
        )
    evaluated, saved = due_steps(cfg.eval.every, steps), due_steps(cfg.train.save_steps, steps)
    plan.append(
        (
            "evaluations",
            f"{_heldout(cfg)}, after steps {listed(evaluated)}"
            if evaluated
            else "none (eval.every=0)",
        )
    )
    kept = (
        f"; the newest {cfg.train.keep_checkpoints} are kept"
        if len(saved) > cfg.train.keep_checkpoints
        else ""
    )
    plan.append(("checkpoints", f"{len(saved)}, after steps {listed(saved)}{kept}"))
    return (
        plan,
        [*model_lines(cfg), *field_lines(cfg), *memory_lines(cfg, trained=True)],
        _train_files(cfg, evaluated, saved),
    )


def _resumed(cfg: Config) -> Lines:
    """Where a run would go on from. Raises UserError where it would refuse to; whether the
    checkpoint is whole is not looked at.
    """
    folder = Path(cfg.output_dir) / "checkpoints"
    if not (found := list_checkpoints(folder)):
        return []
    if not cfg.resume:
        raise UserError(f"resume=false, but {folder} holds checkpoints; use another output_dir")
    step = int(found[-1].name.rpartition("_")[2])
    try:
        state = json.loads((found[-1] / "state.json").read_text())
        if state["config_hash"] != config_hash(cfg):
            changed = differences(state["config"], cfg.model_dump(mode="json"))
            raise UserError(
                f"{found[-1]} was written with another config: {changed}; use another output_dir"
            )
    except (OSError, ValueError, KeyError, TypeError):
        return [("resumes", f"from {found[-1]}, or from one before it if it is damaged")]
    return [
        (
            "resumes",
            f"from {found[-1]}: {number(max(0, cfg.train.steps - step))} of the steps are left",
        )
    ]


def _train_files(cfg: Config, evaluated: list[int], saved: list[int]) -> Lines:
    out, steps = Path(cfg.output_dir), cfg.train.steps
    contents = [
        "rank_N/ with each rank's share of policy, optimiser and generators",
        "state.json",
        "manifest.json",
    ]
    if cfg.flow is not None:
        contents.append("flow/")
    if cfg.algorithm.advantage == "gae" or cfg.algorithm.loss == "flowrl":
        contents.append("head.safetensors")
    files = [
        (f"{out}/config.resolved.yaml", ""),
        (f"{out}/env.json", "versions and devices"),
        (f"{out}/metrics.jsonl", f"a line per step{' and per evaluation' if evaluated else ''}"),
        (f"{out}/events.jsonl", "what the monitors say"),
        (f"{out}/report.html", "the page, written anew now and then"),
    ]
    places = {
        "tensorboard": ("tb/", "TensorBoard"),
        "wandb": ("wandb/", "Weights & Biases"),
        "trackio": ("trackio/", "trackio"),
    }
    files += [
        (f"{out}/{place}", f"the same for {name}")
        for tracker, (place, name) in places.items()
        if tracker in cfg.train.trackers
    ]
    if {"wandb", "trackio"} & set(cfg.train.trackers):
        files.append(
            (f"{out}/{STATE_FILE}", "what they know of the run by, so that a resumed one goes on")
        )
    if cfg.train.log_rollouts:
        shown = min(cfg.train.log_rollouts, cfg.rollout.num_prompts)
        form = cfg.train.rollout_format
        names = f"step_{1:06d}.{form}" + (f" to step_{steps:06d}.{form}" if steps > 1 else "")
        files.append(
            (
                f"{out}/rollouts/",
                f"{names}: {shown} of the {cfg.rollout.num_prompts} groups of each step, with "
                "their pictures",
            )
        )
    if evaluated:
        files.append(
            (f"{out}/eval/", f"step_N.json and step_N.jsonl, N = {listed(evaluated, '{:06d}')}")
        )
    files.append(
        (
            f"{out}/checkpoints/",
            f"global_step_N, N = {listed(saved)}: {', '.join(contents)}; and `latest`, the newest "
            "one's name",
        )
    )
    files.append(
        (f"{out}/hf/global_step_{steps}/", "the trained model as a plain Hugging Face folder")
    )
    return files + bad_rows_file(cfg)


# -- flow fitting ----------------------------------------------------------------------------------


# -- evaluation ------------------------------------------------------------------------------------


def _eval(cfg: Config) -> tuple[Lines, Lines, Lines]:
    name = "step_000000" + ("" if cfg.eval.pictures == "as_is" else f"_{cfg.eval.pictures}")
    folder = Path(cfg.output_dir) / "eval"
    files = [
        (f"{folder}/{name}.json", "accuracies"),
        (f"{folder}/{name}.jsonl", "every response"),
        *bad_rows_file(cfg),
    ]
    return [("evaluation", _heldout(cfg))], policy_lines(cfg), files


def _heldout(cfg: Config) -> str:
    rows = count_rows(required(cfg.data.eval, "data.eval"), cfg.eval.limit)
    each = (
        f"{cfg.eval.heldout_samples} responses at temperature {cfg.eval.heldout_temperature:g} "
        "and a greedy one to each problem"
    )
    if rows.count is None:
        return f"{each} ({rows.text})"
    responses = rows.count * (cfg.eval.heldout_samples + 1)
    budget = f"{number(responses)} responses of at most {number(cfg.rollout.max_new_tokens)} tokens"
    return f"{each} ({rows.text}): {budget}"


# -- what is loaded --------------------------------------------------------------------------------


# -- figures ---------------------------------------------------------------------------------------
