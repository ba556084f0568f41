"""Rows that a command reads, before anything heavy starts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rlfr_vlm.commands.parts import Workbench
from rlfr_vlm.config import Config
from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.prompts import load_prompts
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import encode_all
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting.budget import check_field
from rlfr_vlm.rewards.custom import load_reward_function
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.run.trackers import check_recording
from rlfr_vlm.types import EncodedPrompt, Prompt


def bad_rows_of(cfg: Config) -> BadRows:
    """Of one command, recorded in its folder."""
    return BadRows(cfg.data, Path(cfg.output_dir) / "bad_rows.jsonl")


def forget_bad_rows(cfg: Config) -> None:
    """The record is of one command: its data files share it, and the next command starts it
    anew.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        (Path(cfg.output_dir) / "bad_rows.jsonl").unlink()


def required_data(value: str | None, field: str) -> str:
    """The value. Raises UserError where the field is unset."""
    if value is None:
        raise UserError(f"{field} is required for this command")
    return value


def rl_prompts(cfg: Config) -> tuple[list[Prompt], list[Prompt], BadRows]:
    """Training and held-out rows, read before anything heavy starts."""
    bad = bad_rows_of(cfg)
    check_recording(cfg)
    if cfg.reward.function is not None:
        load_reward_function(cfg.reward.function)
    if cfg.flow is not None and cfg.flow.checkpoint is None and not cfg.flow.online.enabled:
        raise UserError(
            "flow.online.enabled=false freezes a field that was never fitted: set flow.checkpoint, "
            "or leave the flow section out"
        )
    if (
        cfg.flow is not None
        and cfg.flow.checkpoint is None
        and (cfg.flow.standardise or cfg.flow.reward.normalise == "token_type")
    ):
        name = "standardise" if cfg.flow.standardise else "reward.normalise=token_type"
        raise UserError(
            f"flow.{name} takes its statistics from a fit: run `rlfr-vlm flow` first and set "
            "flow.checkpoint"
        )
    if cfg.flow is not None and cfg.flow.checkpoint is not None:
        if not Path(cfg.flow.checkpoint).is_dir():
            raise UserError(
                f"flow.checkpoint: {cfg.flow.checkpoint} is not a folder; fit a field first with "
                "`rlfr-vlm flow`"
            )
        check_field(cfg.flow)
    prompts = load_prompts(
        required_data(cfg.data.train, "data.train"), cfg.data, bad, cfg.data.limit
    )
    needed = cfg.eval.every and not (cfg.eval.benchmarks and cfg.data.eval is None)
    return prompts, heldout_prompts(cfg) if needed else [], bad


def heldout_prompts(cfg: Config) -> list[Prompt]:
    """Held-out rows."""
    return load_prompts(
        required_data(cfg.data.eval, "data.eval"), cfg.data, bad_rows_of(cfg), cfg.eval.limit
    )


def expert_prompts(cfg: Config) -> list[Prompt]:
    """Rows with an expert response; none where the field is fitted on the policy's own responses
    alone.
    """
    if cfg.flow is not None and cfg.flow.fit.source == "rollouts":
        return []
    return load_prompts(
        required_data(cfg.data.expert, "data.expert"), cfg.data, bad_rows_of(cfg), need="response"
    )


def checked(cfg: Config, prompts: Sequence[Prompt], grader: Grader, bad: BadRows) -> list[Prompt]:
    """Rows whose gold answer the grader can read; the others are bad rows. A custom reward function
    reads its answers itself.
    """
    if cfg.reward.function is not None:
        return list(prompts)
    kept = []
    for prompt, reason in zip(
        prompts, grader.check_golds([p.answer for p in prompts]), strict=True
    ):
        if reason is None:
            kept.append(prompt)
        else:
            bad.add(
                prompt.id,
                RowError("answer", f"{prompt.origin}: answer {prompt.answer[:80]!r}: {reason}"),
                len(prompts),
            )
    return kept


def encode_heldout(bench: Workbench, heldout: Sequence[Prompt]) -> list[EncodedPrompt]:
    """Held-out prompts as the model reads them, with blank pictures where the config says so."""
    cfg, bad = bench.cfg, bad_rows_of(bench.cfg)
    renderer = Renderer(bench.policy, cfg.data, str(cfg.data.eval), cfg.eval.pictures)
    return encode_all(checked(cfg, heldout, bench.grader, bad), renderer, bad)
