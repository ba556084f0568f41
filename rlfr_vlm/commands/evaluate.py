"""`eval`: held-out problems and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlfr_vlm.commands.parts import Workbench, say, workbench
from rlfr_vlm.commands.rows import encode_heldout, forget_bad_rows, heldout_prompts
from rlfr_vlm.config import Config
from rlfr_vlm.evaluation.heldout import HeldoutResult, evaluate_heldout
from rlfr_vlm.evaluation.parity import parity
from rlfr_vlm.evaluation.suite import (
    endpoint,
    endpoint_responder,
    engine_responder,
    for_engine,
    judge_of,
    plan,
    run_planned,
)
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout import make_engine
from rlfr_vlm.types import EncodedPrompt


def evaluate(cfg: Config) -> HeldoutResult:
    """Held-out accuracy of `model.path`, written to `output_dir/eval`."""
    forget_bad_rows(cfg)
    heldout = heldout_prompts(cfg)
    with workbench(cfg) as bench:
        return run_evaluation(bench, encode_heldout(bench, heldout))


def evaluate_benchmarks(cfg: Config) -> dict[str, dict[str, Any]]:
    """Every benchmark of `eval.benchmarks`, on `model.path` or the server of `eval.endpoint`;
    results in `output_dir/BENCHMARK`.

    Returns their summaries. Raises UserError before the first request for whatever does not fit.
    """
    planned = plan(cfg)
    folder = Path(cfg.output_dir)
    with judge_of(cfg) as judge:
        if cfg.eval.endpoint is not None:
            with endpoint(cfg.eval.endpoint) as (found, own):
                return run_planned(
                    cfg, planned, endpoint_responder(cfg, found, own), judge, folder, say
                )
        roomy = for_engine(cfg, planned)
        policy = Policy(cfg.model)
        for difference in parity(cfg, planned):
            say(f"differs from training: {difference}")
        engine = make_engine(roomy, policy)
        try:
            engine.load_weights(policy)
            return run_planned(
                cfg,
                planned,
                lambda each: engine_responder(roomy, policy, engine, each),
                judge,
                folder,
                say,
            )
        finally:
            engine.close()


def run_evaluation(
    bench: Workbench, prompts: Sequence[EncodedPrompt], step: int = 0
) -> HeldoutResult:
    """Held-out accuracy with parts that are already up."""
    cfg = bench.cfg
    bench.engine.load_weights(bench.policy)
    return evaluate_heldout(
        cfg, bench.engine, prompts, bench.grader, step, Path(cfg.output_dir) / "eval"
    )
