"""What a flow field knows of right and wrong, and what its reward keeps of that: by fit, side,
scaling and normalisation.

    python scripts/flow_signal.py vision|text [--model FOLDER] [--prompts N] [--only NAME ...]
    [a.b=c ...]

Fits each field on the policy (the demo's, or FOLDER: after RL, say), samples 16 responses to each
of N prompts that no fit has seen, and writes the AUC among siblings (wrong has more; 95 % by the
bootstrap over prompts) of the mean deviation and of what each normalisation charges;
beside them what needs no field: surprisal, entropy, a cross-fitted linear probe on the latents; and
    what the best of 16 without a verifier
would earn. Tables go to standard output and to runs/signal/NAME.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlfr_vlm import commands
from rlfr_vlm.algorithm.credit import make_samples, token_rewards
from rlfr_vlm.batch import GradedGroup, Sample, Scores
from rlfr_vlm.config import Config, load_config, parse_config
from rlfr_vlm.demo import recipe
from rlfr_vlm.demo.verb import prepare
from rlfr_vlm.fitting.probe import per_response, score_responses
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.flow.separation import separation
from rlfr_vlm.flow.spec import FlowSpec
from rlfr_vlm.models.pack import micro_batches, pack

FOLDER = Path("runs/signal")
SMALL: dict[str, Any] = {"batch_tokens": 256, "steps": 600, "lr": None}
GOOD: dict[str, Any] = {"context": "token_post", "standardise": True, "fit": SMALL}
FIELDS: dict[str, dict[str, Any]] = {
    "60 steps of 64 solutions, raw, token_pre (the demo until now)": {
        "fit": {"steps": 60, "batch_size": 64, "batch_mul": 2, "lr": 1e-3}
    },
    "600 small steps, raw, token_pre": {"fit": {**SMALL, "lr": 1e-3}},
    "600, standardised, token_pre": {"standardise": True, "fit": SMALL},
    "600, standardised, token_post": GOOD,
    "2,400, standardised, token_post": {**GOOD, "fit": {**SMALL, "steps": 2400}},
    "600, the same, the prompt as a condition": {**GOOD, "prompt_context": True},
    "600, the same, less the policy's own": {**GOOD, "prompt_context": True, "contrast": "own"},
    "600, own right rollouts": {
        **GOOD,
        "prompt_context": True,
        "fit": {**SMALL, "source": "rollouts"},
    },
    "600, own right rollouts less wrong ones": {
        **GOOD,
        "prompt_context": True,
        "contrast": "wrong",
        "fit": {**SMALL, "source": "rollouts"},
    },
}
PUBLISHED = {"threshold": 0.6, "top_k": 15}
REWARDS: dict[str, dict[str, Any]] = {
    "minmax, 0.6, top 15": {"normalise": "minmax", **PUBLISHED},
    "bilateral": {"normalise": "bilateral", **PUBLISHED},
    "group": {"normalise": "group", "threshold": 0, "top_k": 0},
    "group_z": {"normalise": "group_z", "threshold": 0, "top_k": 0},
    "token_type": {"normalise": "token_type", "threshold": 0, "top_k": 0},
}


def base_config(
    task: str, model: str | None, prompts: int, flow: dict[str, Any], extra: tuple[str, ...]
) -> Config:
    """The demo's config with this flow section."""
    settings = (
        "rollout.engine=hf",
        "rollout.group_size=16",
        f"output_dir={FOLDER / task}",
        "flow=null",
        *extra,
    )
    tree = load_config(recipe(task), settings).model_dump(mode="json")
    fit = {"rollout_prompts": 256, "probe_prompts": prompts, **flow.get("fit", {})}
    tree["flow"] = {**flow, "fit": fit}
    tree["model"]["path"] = model or tree["model"]["path"]
    return parse_config(tree)


def of_field(
    cfg: Config,
    bench: commands.Workbench,
    experts: Any,
    sampled: commands.Sampled,
    samples: list[Sample],
) -> dict[str, Any]:
    """Fit one field, then AUCs of its deviation and of every charge."""
    assert cfg.flow is not None
    shutil.rmtree(Path(cfg.output_dir) / "flow", ignore_errors=True)
    start = time.process_time()
    rows = [] if cfg.flow.fit.source == "rollouts" else experts
    folder = commands.fit(cfg, bench.policy, rows, commands.Sampled(sampled.fitted))
    seconds = time.process_time() - start
    spec = FlowSpec.of(cfg.flow, bench.policy.identity)
    field = FlowField.load(folder, spec, bench.policy.device, bench.policy.dtype)
    scores = score_responses(cfg, bench.policy, field, samples)
    lengths = torch.tensor([s.length for s in samples])
    assert (
        scores.straying is not None and scores.valid is not None and scores.deviations is not None
    )
    found: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "deviation": auc(per_response(scores.straying, scores.valid, lengths), samples),
    }
    for name, reward in REWARDS.items():
        if reward["normalise"] == "token_type" and field.types is None:
            continue
        how = cfg.flow.reward.model_copy(update={"coef": 1.0, **reward})
        own = cfg.model_copy(update={"flow": cfg.flow.model_copy(update={"reward": how})})
        charges = -token_rewards(own, samples, scores, lengths, field.types)
        found[name] = auc([part.sum().item() for part in charges.split(lengths.tolist())], samples)
    return found | {
        "best of 16": best_of(per_response(scores.straying, scores.valid, lengths), samples)
    }


def auc(values: list[float], samples: list[Sample]) -> str:
    """Among siblings, with its interval."""
    return str(
        separation(values, [s.outcome.correct for s in samples], [s.position for s in samples])
    )


def best_of(values: list[float], samples: list[Sample]) -> str:
    """Accuracy of taking the least of each group."""
    groups: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.position, []).append(i)
    best = [min(part, key=lambda i: values[i]) for part in groups.values()]
    return f"{np.mean([samples[i].outcome.correct for i in best]):.1%}"


def majority(samples: list[Sample]) -> str:
    """Accuracy of each group's commonest answer."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.position, []).append(sample)
    right = []
    for part in groups.values():
        answer = Counter(s.outcome.prediction for s in part).most_common(1)[0][0]
        right.append(next(s.outcome.correct for s in part if s.outcome.prediction == answer))
    return f"{np.mean(right):.1%}"


def without_field(
    cfg: Config, bench: commands.Workbench, samples: list[Sample]
) -> dict[str, dict[str, str]]:
    """What a logit, or a linear probe that has seen other prompts' verdicts, knows."""
    field = FlowField(FlowSpec.of(load_flow(cfg), bench.policy.identity))
    scores: Scores = score_responses(cfg, bench.policy, field, samples)
    lengths = torch.tensor([s.length for s in samples])
    everywhere = torch.ones_like(scores.logprobs, dtype=torch.bool)
    values = {
        "surprisal, mean over tokens": per_response(-scores.logprobs, everywhere, lengths),
        "entropy, mean over tokens": per_response(scores.entropy, everywhere, lengths),
        "a linear probe on mean latents, cross-fitted": probe_values(bench, field, samples),
    }
    rows = {
        name: {"deviation": auc(v, samples), "best of 16": best_of(v, samples)}
        for name, v in values.items()
    }
    return rows | {"the commonest answer": {"best of 16": majority(samples)}}


def load_flow(cfg: Config) -> Any:
    """The flow section of a config that has one."""
    assert cfg.flow is not None
    return cfg.flow.model_copy(
        update={"standardise": False, "contrast": "none", "prompt_context": False}
    )


def probe_values(bench: commands.Workbench, field: FlowField, samples: list[Sample]) -> list[float]:
    """Being wrong by ridge regression on the mean latents, each time fitted on the other four
    fifths of the prompts.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.preprocessing import StandardScaler

    features: list[Any] = [None] * len(samples)
    for part in micro_batches([s.rollout for s in samples], 16384):
        with torch.no_grad():
            _, latents = bench.policy.states(
                pack([samples[i].rollout for i in part], bench.policy.device), field.request
            )
        assert latents is not None
        for i, rows in zip(
            part, latents.target.split([samples[i].length for i in part]), strict=True
        ):
            features[i] = (
                latents.states.index_select(1, rows).float().mean(1).flatten().cpu().numpy()
            )
    x = np.stack(features)
    wrong, fold = (
        np.array([not s.outcome.correct for s in samples]),
        np.array([s.position % 5 for s in samples]),
    )
    values = np.zeros(len(samples))
    for k in range(5):
        scaler = StandardScaler().fit(x[fold != k])
        model = RidgeClassifierCV(alphas=np.logspace(0, 5, 6)).fit(
            scaler.transform(x[fold != k]), wrong[fold != k]
        )
        values[fold == k] = model.decision_function(scaler.transform(x[fold == k]))
    return values.tolist()


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    columns = ["seconds", "deviation", *REWARDS, "best of 16"]
    lines = [
        f"| | CPU s | deviation | {' | '.join(REWARDS)} | best of 16 |",
        "|---" * (len(columns) + 1) + "|",
    ]
    return "\n".join(
        [
            *lines,
            *(
                f"| {name} | " + " | ".join(str(row.get(c, "")) for c in columns) + " |"
                for name, row in rows.items()
            ),
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("task", choices=("vision", "text"))
    parser.add_argument("--model", help="folder of another policy: after RL, say")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument(
        "--only", nargs="+", choices=list(FIELDS), metavar="NAME", help=", ".join(FIELDS)
    )
    parser.add_argument("--name", help="of the table; default: the task")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_args()
    prepare(arguments.task)
    configs = {
        name: base_config(
            arguments.task, arguments.model, arguments.prompts, flow, tuple(arguments.overrides)
        )
        for name, flow in FIELDS.items()
        if not arguments.only or name in arguments.only
    }
    first = base_config(
        arguments.task,
        arguments.model,
        arguments.prompts,
        FIELDS["600, the same, less the policy's own"],
        tuple(arguments.overrides),
    )
    rows: dict[str, dict[str, Any]] = {}
    with commands.workbench(first) as bench:
        prompts, _, _ = commands.rl_prompts(first.model_copy(update={"flow": None}))
        sampled = commands.sampled_for_fit(bench, prompts)
        probed: list[GradedGroup] = list(sampled.probed)
        outcomes = [o for g in probed for o in g.outcomes]
        samples = make_samples([g.group for g in probed], outcomes, first.seed, 0, first.algorithm)
        right = np.mean([s.outcome.correct for s in samples])
        commands.say(f"{len(samples)} responses to {len(probed)} prompts, {right:.1%} right")
        rows |= without_field(first, bench, samples)
        experts = commands.expert_prompts(first)
        for name, cfg in configs.items():
            rows[name] = of_field(cfg, bench, experts, sampled, samples)
            commands.say(f"== {name}: {json.dumps(rows[name])}")
    text = f"{len(samples)} responses, {right:.1%} right.\n\n{table(rows)}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{arguments.name or arguments.task}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
