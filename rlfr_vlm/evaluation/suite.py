"""An evaluation: several benchmarks, one model under test, perhaps a judge. Everything that can be
refused is refused before the first request.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfr_vlm.config import Config, EndpointConfig
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import UserError
from rlfr_vlm.evaluation.benchmarks import (
    Benchmark,
    Problem,
    chosen,
    find_benchmark,
    find_source,
    load_problems,
    resolve,
)
from rlfr_vlm.evaluation.responders import EndpointResponder, EngineResponder, Responder
from rlfr_vlm.evaluation.runner import BenchmarkRun, check_grading, run_benchmark
from rlfr_vlm.evaluation.server.endpoint import Endpoint
from rlfr_vlm.evaluation.server.judge import Judge
from rlfr_vlm.evaluation.server.serve import serve
from rlfr_vlm.evaluation.vlm import adapter as vlm
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout.engine import Sampler
from rlfr_vlm.shares import points


@dataclass(frozen=True)
class Planned:
    """A benchmark as this run asks for it."""

    benchmark: Benchmark
    problems: tuple[Problem, ...]
    source: str

    @property
    def root(self) -> Path:
        """Folder of its pictures."""
        return Path(self.source).parent


def plan(cfg: Config) -> list[Planned]:
    """Every benchmark of the config, its problems read. Raises UserError for whatever could not be
    carried out.
    """
    check_grading(cfg)
    planned = []
    for name in cfg.eval.benchmarks:
        definition, folder = find_benchmark(name)
        benchmark = resolve(cfg, definition)
        if benchmark.vlmeval is not None:
            source = vlm.find_tsv(cfg, benchmark, folder)
            problems = vlm.load(benchmark, source)
        else:
            source = find_source(cfg, benchmark, folder)
            problems = load_problems(benchmark, source)
        planned.append(Planned(benchmark, tuple(chosen(cfg, benchmark, source, problems)), source))
    names = [p.benchmark.name for p in planned]
    if len(set(names)) < len(names):
        raise UserError(f"eval.benchmarks: {', '.join(names)}: one of them twice")
    return planned


def for_engine(cfg: Config, planned: Sequence[Planned]) -> Config:
    """The config whose engine has room for the longest response of these benchmarks."""
    budget = max(p.benchmark.max_new_tokens for p in planned)
    return cfg.model_copy(
        update={"rollout": cfg.rollout.model_copy(update={"max_new_tokens": budget})}
    )


def in_training(cfg: Config) -> Config:
    """The config under which benchmarks are run between training steps: graded by rules, within the
    response budget of the rollouts.
    """
    if cfg.eval.grading != "rule" or cfg.eval.endpoint is not None:
        raise UserError(
            "during training benchmarks are graded by rules, on the model that is trained: unset "
            "eval.judge, eval.grading, eval.endpoint"
        )
    budget = min(cfg.eval.max_new_tokens or cfg.rollout.max_new_tokens, cfg.rollout.max_new_tokens)
    return cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"max_new_tokens": budget})})


def engine_identity(cfg: Config, policy: Policy, engine: Sampler) -> dict[str, Any]:
    """What of a loaded model decides its numbers: architecture, a digest of its weights, chat
    template, dtype, engine.
    """
    template = str(getattr(policy.tokenizer, "chat_template", None) or "")
    digest = hashlib.sha256(template.encode()).hexdigest()[:16]
    return {
        **policy.identity,
        "chat_template": digest,
        "dtype": cfg.model.dtype,
        "engine": engine.name,
    }


def engine_responder(cfg: Config, policy: Policy, engine: Sampler, planned: Planned) -> Responder:
    """The policy, asked through a rollout engine."""
    pictures = "blank" if cfg.eval.pictures == "blank" else "as_is"
    renderer = Renderer(policy, cfg.data, planned.source, pictures)
    return EngineResponder(engine, renderer, cfg.seed, engine_identity(cfg, policy, engine))


@contextmanager
def endpoint(cfg: EndpointConfig) -> Iterator[tuple[Endpoint, EndpointConfig]]:
    """A probed endpoint, started here on loopback where the config names a model to serve."""
    if cfg.serve is None:
        found = Endpoint(cfg)
        found.probe()
        yield found, cfg
        return
    with serve(cfg.serve, cfg.model or Path(cfg.serve).name) as api_base:
        own = cfg.model_copy(
            update={"api_base": api_base, "model": cfg.model or Path(cfg.serve).name, "serve": None}
        )
        found = Endpoint(own)
        found.probe()
        yield found, own


@contextmanager
def judge_of(cfg: Config) -> Iterator[Judge | None]:
    """The judge of the config, probed, or none."""
    if cfg.eval.judge is None:
        yield None
        return
    with endpoint(cfg.eval.judge) as (found, own):
        yield Judge(
            cfg.eval.judge.model_copy(
                update=own.model_dump(include={"api_base", "model", "serve"})
            ),
            found,
        )


def run_planned(
    cfg: Config,
    planned: Sequence[Planned],
    responder: Callable[[Planned], Responder],
    judge: Judge | None,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Run each; returns their summaries by name."""
    summaries = {}
    for each in planned:
        with Grader(cfg.reward.grader, each.benchmark.answer) as grader:
            run = BenchmarkRun(
                cfg,
                each.benchmark,
                each.problems,
                responder(each),
                grader,
                judge,
                folder / each.benchmark.name,
                (each.root,),
                say,
            )
            summaries[each.benchmark.name] = (
                vlm.run_vlm if each.benchmark.vlmeval is not None else run_benchmark
            )(run)
        say(line(summaries[each.benchmark.name]))
    return summaries


def endpoint_responder(
    cfg: Config, found: Endpoint, own: EndpointConfig
) -> Callable[[Planned], Responder]:
    """A server under test. Its address is no part of what decides the numbers, its model's name
    is.
    """
    identity = {"endpoint": own.model}
    return lambda planned: EndpointResponder(
        found, (planned.root,), cfg.seed, identity, blank=cfg.eval.pictures == "blank"
    )


def line(summary: dict[str, Any]) -> str:
    """One benchmark's numbers for people."""
    counts = summary["verdicts"]
    kit = "; ".join(
        f"VLMEvalKit's {s['metric']}: {s['value']:g}"
        for s in summary.get("vlmeval", ())
        if s["complete"]
    )
    if summary["accuracy"] is None:
        return f"{summary['benchmark']}: {kit or 'no score'}"
    low, high = summary["accuracy_ci"]
    text = (
        f"{summary['benchmark']}: accuracy {summary['accuracy']:.3f} ({low:.3f} to {high:.3f}), "
        f"{summary['num_problems']} problems"
    )
    if summary["num_samples"] > 1:
        k = summary["num_samples"]
        text += (
            f" x {k}, pass@{k} {summary['pass_at_k'][str(k)]:.3f}, maj@{k} "
            f"{summary['maj_at_k']:.3f}"
        )
    text += (
        f"; truncated {points(summary['truncated'])}%, no answer found "
        f"{points(1 - summary['extracted'])}%, {summary['mean_length']:.0f} tokens"
    )
    without = {name: counts[name] for name in ("unjudged", "failed", "error") if counts[name]}
    return (
        text
        + (f"; not counted: {json.dumps(without)}" if without else "")
        + (f"; {kit}" if kit else "")
    )
