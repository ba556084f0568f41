"""What each verb of the command line does, as functions of a config: build the parts, run, take
them down.
"""

from __future__ import annotations

import errno
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console

from rlfr_vlm.batch import GradedGroup
from rlfr_vlm.config import Config, FlowConfig
from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.digests import RowDigests
from rlfr_vlm.data.prompts import load_prompts
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import PromptSource, PromptStream, encode_all
from rlfr_vlm.errors import RolledBack, UserError
from rlfr_vlm.evaluation.heldout import HeldoutResult, evaluate_heldout
from rlfr_vlm.evaluation.parity import parity
from rlfr_vlm.evaluation.responders import Responder
from rlfr_vlm.evaluation.suite import (
    Planned,
    endpoint,
    endpoint_responder,
    engine_responder,
    for_engine,
    in_training,
    judge_of,
    plan,
    run_planned,
)
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.fitting.budget import check_field, new_field_folder
from rlfr_vlm.fitting.fit_flow import YARDSTICK_FILE, fit_flow, yardstick_lines
from rlfr_vlm.fitting.fit_solutions import FitData
from rlfr_vlm.fitting.probe import probe
from rlfr_vlm.flow.field import SPEC_FILE, FlowField, FlowSpec, read_spec
from rlfr_vlm.flow.official import export_field, import_field
from rlfr_vlm.learner.learner import Learner, make_learner
from rlfr_vlm.models.families import find_family
from rlfr_vlm.models.paths import resolve_path
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import Ranks, join
from rlfr_vlm.report.during import ReportKeeper
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rewards.outcome import grade, load_reward_function
from rlfr_vlm.rollout import make_engine
from rlfr_vlm.rollout.engine import RolloutEngine, Sampler
from rlfr_vlm.run.run import Run
from rlfr_vlm.run.trackers import check_recording
from rlfr_vlm.run.watch import with_roll_backs
from rlfr_vlm.storage.export import export_policy
from rlfr_vlm.storage.resume import check_resumable
from rlfr_vlm.storage.run_lock import held
from rlfr_vlm.training.collect import sampling
from rlfr_vlm.training.loop import train as train_loop
from rlfr_vlm.types import EncodedPrompt, Prompt

console = Console(stderr=True)


def say(message: str) -> None:
    """A line for the user."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Workbench:
    """The parts that every verb needs."""

    cfg: Config
    policy: Policy
    grader: Grader
    engine: RolloutEngine
    learner: Learner | None = None  # none: made when training starts


@contextmanager
def workbench(cfg: Config) -> Iterator[Workbench]:
    """Load the policy, start grader and engine; stop them afterwards."""
    policy = Policy(cfg.model)
    with Grader(cfg.reward.grader, cfg.reward.answer) as grader:
        engine = make_engine(cfg, policy)
        try:
            yield Workbench(cfg, policy, grader, engine)
        finally:
            engine.close()


def flow(cfg: Config) -> Path:
    """Fit the flow field offline, on `data.expert` or as `flow.fit.source` says; returns its
    folder, `output_dir/flow`.
    """
    new_field_folder(cfg)
    with held(Path(cfg.output_dir)):
        _forget_bad_rows(cfg)
        rows = expert_prompts(cfg)
        if not needs_responses(cfg):
            return fit(cfg, Policy(cfg.model), rows)
        rl_rows = load_prompts(
            _required(cfg.data.train, "data.train"), cfg.data, _bad_rows(cfg), cfg.data.limit
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
    bad = _bad_rows(cfg)
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
        rows, Renderer(policy, cfg.data, str(cfg.data.expert)), _bad_rows(cfg), sampled.fitted
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


def import_flow(source: str, model: str, out: str, given: dict[str, str | None]) -> Path:
    """Write a published flow checkpoint as a field for this model; returns its folder. `given`:
    context, shift, layers, times as `a+b`.
    """
    with _writing(out):
        if (Path(out) / SPEC_FILE).exists():
            raise UserError(f"--out: {out} holds a field already: remove it, or name another place")
    field, origins = import_field(Path(source), identity_from_config(model), given, model)
    with _writing(out):
        field.save(out)
    spec = field.spec
    texts = {
        "context": spec.context,
        "shift": spec.shift,
        "layers": spec.layers,
        "times": spec.times,
    }
    said = "; ".join(
        f"{name} {'+'.join(map(str, value))} ({origins[name]})" for name, value in texts.items()
    )
    say(
        f"a field of depth {spec.depth} on latents of size {field.network.size}, layers of "
        f"{spec.num_layers}: {said}"
    )
    if "token_post" in spec.context and origins["context"].endswith(".json"):
        say(
            "the released RL configs say token_post of fields that were fitted at token_pre; "
            "--context token_pre reads it as fitted"
        )
    return Path(out)


def export_flow(folder: str, out: str, dtype: torch.dtype | None) -> Path:
    """Write a field as the published code's flow_model.bin; returns the file."""
    spec = read_spec(Path(folder))
    with _writing(out):
        file = export_field(Path(folder), Path(out), dtype)
    theirs = {
        "flow_context_mode": spec.context,
        "flow_shift": spec.shift,
        "hook_layers_percentile": [f"{layer / spec.num_layers:.6g}" for layer in spec.layers],
        "rewarding_timesteps": spec.times,
        "num_layers_flow": [spec.depth],
    }
    said = ", ".join(f"{key} {'+'.join(map(str, values))}" for key, values in theirs.items())
    say(f"for their config: {said}")
    return file


def identity_from_config(path: str) -> dict[str, str | int | float]:
    """What `Policy.identity` says of a model, from its config alone: weights are not read, so its
    fingerprint is "", unknown.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_path(path), trust_remote_code=False)
        find_family(config.model_type)
        text = config.get_text_config()
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"--model: the config of `{path}` does not load: {' '.join(str(error).split())[:300]}"
        ) from None
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "rms_norm_eps": float(getattr(text, "rms_norm_eps", 1e-6)),
        "fingerprint": "",
    }


@contextmanager
def _writing(out: str) -> Iterator[None]:
    """Turns an output path that cannot be written to into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None


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
                    _forget_bad_rows(cfg)  # they are met again
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
                _forget_bad_rows(cfg)
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


def evaluate(cfg: Config) -> HeldoutResult:
    """Held-out accuracy of `model.path`, written to `output_dir/eval`."""
    _forget_bad_rows(cfg)
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


# -- data ------------------------------------------------------------------------------------------


def _bad_rows(cfg: Config) -> BadRows:
    return BadRows(cfg.data, Path(cfg.output_dir) / "bad_rows.jsonl")


def _forget_bad_rows(cfg: Config) -> None:
    """The record is of one command: its data files share it, and the next command starts it
    anew.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        (Path(cfg.output_dir) / "bad_rows.jsonl").unlink()


def _required(value: str | None, field: str) -> str:
    if value is None:
        raise UserError(f"{field} is required for this command")
    return value


def rl_prompts(cfg: Config) -> tuple[list[Prompt], list[Prompt], BadRows]:
    """Training and held-out rows, read before anything heavy starts."""
    bad = _bad_rows(cfg)
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
    prompts = load_prompts(_required(cfg.data.train, "data.train"), cfg.data, bad, cfg.data.limit)
    needed = cfg.eval.every and not (cfg.eval.benchmarks and cfg.data.eval is None)
    return prompts, heldout_prompts(cfg) if needed else [], bad


def heldout_prompts(cfg: Config) -> list[Prompt]:
    """Held-out rows."""
    return load_prompts(
        _required(cfg.data.eval, "data.eval"), cfg.data, _bad_rows(cfg), cfg.eval.limit
    )


def expert_prompts(cfg: Config) -> list[Prompt]:
    """Rows with an expert response; none where the field is fitted on the policy's own responses
    alone.
    """
    if cfg.flow is not None and cfg.flow.fit.source == "rollouts":
        return []
    return load_prompts(
        _required(cfg.data.expert, "data.expert"), cfg.data, _bad_rows(cfg), need="response"
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
    cfg, bad = bench.cfg, _bad_rows(bench.cfg)
    renderer = Renderer(bench.policy, cfg.data, str(cfg.data.eval), cfg.eval.pictures)
    return encode_all(checked(cfg, heldout, bench.grader, bad), renderer, bad)
