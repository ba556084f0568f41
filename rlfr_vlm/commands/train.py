"""`train`: RL, in one process or as one of several ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rlfr_vlm.commands.parts import Workbench, say
from rlfr_vlm.commands.rows import checked, encode_heldout, forget_bad_rows, rl_prompts
from rlfr_vlm.config import Config
from rlfr_vlm.data.bad_rows import BadRows
from rlfr_vlm.data.digests import RowDigests
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import PromptSource, PromptStream
from rlfr_vlm.errors import RolledBack, UserError
from rlfr_vlm.evaluation.responders import Responder
from rlfr_vlm.evaluation.suite import (
    Planned,
    engine_responder,
    in_training,
    plan,
    run_planned,
)
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.learner.learner import make_learner
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import Ranks, join
from rlfr_vlm.report.during import ReportKeeper
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout import make_engine
from rlfr_vlm.rollout.engine import RolloutEngine, Sampler
from rlfr_vlm.run.run import Run
from rlfr_vlm.run.watch import with_roll_backs
from rlfr_vlm.storage.export import export_policy
from rlfr_vlm.storage.resume import check_resumable
from rlfr_vlm.storage.run_lock import held
from rlfr_vlm.training.loop import train as train_loop
from rlfr_vlm.types import Prompt


def train(cfg: Config) -> Path:
    """RL, in this process, as one of the ranks that torchrun or deepspeed started, or by Ray;
    returns the run's folder.
    """
    if cfg.launcher == "ray":
        from rlfr_vlm.launch.ray_launch import launch

        if Path(cfg.output_dir).exists():
            with held(Path(cfg.output_dir)):
                pass  # rank 0 holds it; whoever cannot have it is told before a cluster starts
        return launch(cfg, train_rank)
    ranks = join(cfg)
    try:
        return train_rank(cfg, ranks)
    finally:
        ranks.leave()


def train_rank(
    cfg: Config, ranks: Ranks, make: Callable[[Policy, Ranks], RolloutEngine] | None = None
) -> Path:
    """What each training process does. make: the rollout engine; default: one of its own, as the
    config says.

    Where a monitor rolls the run back everything is made anew: nothing of the steps that went wrong
    is left in optimisers or engines.
    """
    with _folder_of(cfg, ranks):
        while True:
            try:
                return _train_once(with_roll_backs(cfg, ranks), ranks, make)
            # said already; leaving this block lets go of what the traceback holds
            except RolledBack:
                # what is gone on from was made by this command
                cfg = cfg.model_copy(update={"resume": True})
                if ranks.first:
                    forget_bad_rows(cfg)  # they are met again
            gc.collect()


@contextmanager
def _folder_of(cfg: Config, ranks: Ranks) -> Iterator[None]:
    """The first rank holds the run's folder, before anything is read or written there. Raises
    UserError on all ranks where it cannot.
    """
    with ExitStack() as stack:
        problem = None
        try:
            if ranks.first:
                stack.enter_context(held(Path(cfg.output_dir)))
                forget_bad_rows(cfg)
        except UserError as error:
            problem = error
        ranks.agree(problem, "output_dir")
        yield


def _train_once(
    cfg: Config, ranks: Ranks, make: Callable[[Policy, Ranks], RolloutEngine] | None
) -> Path:
    prompts, heldout, bad = rl_prompts(cfg)
    if not ranks.first:
        bad.record = None  # written once
    rows = _rows_to_go_on_with(cfg, prompts, ranks)
    planned = plan(in_training(cfg)) if cfg.eval.every and ranks.first else []
    faultpoint("load")
    policy = Policy(cfg.model)
    learner = make_learner(cfg, policy, ranks)
    with ranks.named(), Grader(cfg.reward.grader, cfg.reward.answer) as grader:
        engine = make_engine(cfg, policy) if make is None else make(policy, ranks)
        try:
            bench = Workbench(cfg, policy, grader, engine, learner)
            return run_training(bench, prompts, heldout if ranks.first else [], bad, planned, rows)
        except RolledBack:
            for optimizer in learner.optimizers.values():
                optimizer.destroy()
            raise
        finally:
            engine.close()


def _rows_to_go_on_with(cfg: Config, prompts: Sequence[Prompt], ranks: Ranks) -> RowDigests:
    """Digests of the rows, on the first rank. Raises UserError on all ranks where the folder holds
    a run that this one cannot go on with.
    """
    rows, problem = RowDigests(), None
    try:
        if ranks.first:
            rows = RowDigests.of(prompts)
            for note in check_resumable(cfg, rows, ranks.size):
                say(f"warning: {note}")
    except UserError as error:
        problem = error
    ranks.agree(problem, "looking for a checkpoint")
    return rows


def run_training(
    bench: Workbench,
    prompts: Sequence[Prompt],
    heldout: Sequence[Prompt],
    bad: BadRows,
    planned: Sequence[Planned] = (),
    rows: RowDigests | None = None,
) -> Path:
    """RL with parts that are already up; `planned` benchmarks are run every `eval.every` steps.
    rows: digests of the prompts.
    """
    cfg, policy = bench.cfg, bench.policy
    learner = bench.learner or make_learner(cfg, policy)
    ranks = learner.ranks
    assert cfg.data.train is not None
    kept = checked(cfg, prompts, bench.grader, bad)
    if len(kept) < cfg.rollout.num_prompts:
        raise UserError(
            f"rollout.num_prompts={cfg.rollout.num_prompts} exceeds the {len(kept)} usable rows of "
            f"{cfg.data.train}"
        )
    source = PromptSource(
        kept,
        Renderer(policy, cfg.data, cfg.data.train),
        PromptStream(len(kept), cfg.run_seed, cfg.data.shuffle),
        bad,
        rows=rows or RowDigests.of(prompts),
    )
    encoded = encode_heldout(bench, heldout) if heldout else []

    def benchmarks(
        engine: Sampler, folder: Path, tell: Callable[[str], None]
    ) -> dict[str, dict[str, Any]]:
        during = in_training(cfg)

        def responder(each: Planned) -> Responder:
            return engine_responder(during, policy, engine, each)

        return run_planned(during, planned, responder, None, folder, tell)

    run = Run(
        cfg,
        bench.grader,
        encoded,
        ranks,
        decode=lambda token: policy.tokenizer.decode([token]),
        benchmarks=benchmarks if planned else None,
        report=ReportKeeper,
    )
    try:
        train_loop(cfg, learner, bench.engine, source, bench.grader, run)
        export_policy(policy, run.folder / "hf" / f"global_step_{cfg.train.steps}", ranks)
        run.end()
    finally:
        run.close()
    if bad.rows and ranks.first:
        say(f"{len(bad.rows)} bad rows were left out: {Path(cfg.output_dir) / 'bad_rows.jsonl'}")
    return run.folder
