"""Does a token reward gain over RLVR from the same responses? Methods side by side, paired by seed,
with 95 % intervals.

    python scripts/rl_gain.py vision|text [--responses 32|256] [--steps N] [--seeds N] [--start
    initial|supervised] [--only NAME ...]

Fits each kind of field once, for the policy that all seeds start from; trains every method from
that policy on the same prompts; counts every response, those that a field was fitted on too.
Results are appended to runs/rl_gain/TASK-RESPONSES-STEPS-START.jsonl as runs end, and what is there
already is not run again; the table goes to standard output and, as Markdown, beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch

from rlfr_vlm import commands
from rlfr_vlm.config import Config, load_config
from rlfr_vlm.data.bad_rows import BadRows
from rlfr_vlm.data.prompts import load_prompts
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.demo.verb import prepare
from rlfr_vlm.models.pack import pack
from rlfr_vlm.models.policy import Policy, expert_rollout

FOLDER = Path("runs/rl_gain")
BASE = "RLVR"
INFORMED = ("flow.profile=informed", "flow.fit.probe_prompts=0")
FROZEN = (*INFORMED, "flow.online.enabled=false", "flow.online.window=0")
SLOWER = ("flow.online.lr=1e-4", "flow.online.updates=20")
LEARNS = ("flow.online.enabled=true", "flow.online.window=12", *SLOWER)
OWN = (*FROZEN, "flow.contrast=own", "flow.reward.centre=group")
WRONG = (
    *FROZEN,
    "flow.contrast=wrong",
    "flow.fit.source=rollouts",
    "flow.reward.centre=group",
    "flow.reward.coef=0.3",
)
METHODS: dict[str, tuple[str, ...]] = {
    BASE: ("flow=null",),
    "RLFR published": (
        "flow.fit={steps: 60, batch_size: 64, batch_mul: 2, lr: 1.0e-3}",
    ),  # as the demo had it
    "informed, 0.1": INFORMED,
    "informed, 0.3": (*INFORMED, "flow.reward.coef=0.3"),
    "informed, 1": (*INFORMED, "flow.reward.coef=1"),
    "informed, 0.1, 20 small steps": (*INFORMED, *SLOWER),
    "informed, 0.1, frozen": FROZEN,
    "informed, 0.3, frozen": (*FROZEN, "flow.reward.coef=0.3"),
    "informed, 1, frozen": (*FROZEN, "flow.reward.coef=1"),
    "deviation, centred in the group, 0.1": (*FROZEN, "flow.reward.centre=group"),
    "deviation, centred in the group, 0.3": (
        *FROZEN,
        "flow.reward.centre=group",
        "flow.reward.coef=0.3",
    ),
    "contrast own, 0.1": (*OWN, "flow.reward.coef=0.1"),
    "contrast own, 0.3": (*OWN, "flow.reward.coef=0.3"),
    "contrast own, 1": (*OWN, "flow.reward.coef=1"),
    "contrast own, 0.3, by token type": (
        *OWN,
        "flow.reward.coef=0.3",
        "flow.reward.normalise=token_type",
    ),
    "contrast own, learning": (
        *OWN,
        "flow.reward.coef=0.3",
        *LEARNS,
        "flow.online.networks=contrast",
    ),
    "contrast wrong": WRONG,
    "contrast wrong, learning": (*WRONG, *LEARNS),
    "likelihood, a reward": ("flow=null", "shaping.likelihood={}"),
    "likelihood, an advantage": (
        "flow=null",
        "shaping.likelihood={coef: 0.3, normalise: group_z, threshold: 0, top_k: 0, credit: token}",
    ),
}
DEFAULTS = {
    "vision": {32: (8, 4), 256: (32, 8)},
    "text": {32: (8, 4), 128: (16, 8)},
}  # responses per step -> prompts, group


def supervised(
    cfg: Config, seed: int = 0, epochs: int = 1, batch: int = 64, lr: float = 1e-3
) -> str:
    """The policy after cross entropy on the experts: what the same rows buy without any response.
    Returns its folder.
    """
    folder = FOLDER / f"supervised-{Path(cfg.output_dir).name}-{epochs}-seed{seed}"
    if (folder / "config.json").exists():
        return str(folder)
    policy = Policy(cfg.model)
    rows = load_prompts(str(cfg.data.expert), cfg.data, BadRows(cfg.data), need="response")
    renderer = Renderer(policy, cfg.data, str(cfg.data.expert))
    rollouts = [
        expert_rollout(renderer.encode(row), policy.tokenizer, policy.tokenizer.eos_token_id)
        for row in rows
    ]
    optimizer = torch.optim.AdamW(list(policy.trained().values()), lr=lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    batches = [
        part
        for _ in range(epochs)
        for part in torch.randperm(len(rollouts), generator=order).split(batch)
    ]
    for step, part in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            )
        output = policy.forward(pack([rollouts[i] for i in part.tolist()], policy.device))
        (-output.logprobs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    policy.save(folder)
    return str(folder)


def fitted_field(cfg: Config) -> str:
    """The field of these settings for this policy, fitted with seed 0 where it is not there yet.
    Returns its folder.
    """
    assert cfg.flow is not None
    settings = [
        cfg.model.path,
        cfg.flow.model_dump(mode="json", exclude={"checkpoint", "reward", "online"}),
    ]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = FOLDER / "fields" / key
    if not (folder / "flow" / "flow_config.json").exists():
        rollout = cfg.rollout.model_copy(update={"num_prompts": 32, "group_size": 8})
        commands.flow(
            cfg.model_copy(update={"output_dir": str(folder), "seed": 0, "rollout": rollout})
        )
    return str(folder / "flow")


def method_config(
    task: str,
    name: str,
    start: str,
    shape: tuple[int, int],
    steps: int,
    seed: int,
    folder: Path,
    extra: tuple[str, ...],
) -> tuple[Config, int]:
    """What one method trains with, its field fitted; and the responses that the field has seen.
    `folder` is emptied.
    """
    shutil.rmtree(folder, ignore_errors=True)
    own = [s for s in METHODS[name] if not s.startswith("flow=")]
    settings = [
        f"output_dir={folder}",
        f"seed={seed}",
        f"train.steps={steps}",
        f"train.save_steps={steps}",
        "train.log_rollouts=0",
        "train.trackers=[]",
        "rollout.engine=hf",
        f"rollout.num_prompts={shape[0]}",
        f"rollout.group_size={shape[1]}",
        f"eval.every={max(1, steps // 2)}",
        "eval.num_samples=4",
        *own,
    ]
    plain = ("flow=null",) if "flow=null" in METHODS[name] else ()
    # or there would be a flow again
    extra = tuple(s for s in extra if not (plain and s.startswith("flow")))
    base = Path(__file__).with_name(f"rl_gain_{task}.yaml")
    cfg = load_config(base, (*plain, *settings, *extra))
    if start == "supervised":
        cfg = cfg.model_copy(
            update={"model": cfg.model.model_copy(update={"path": supervised(load_config(base))})}
        )
    if cfg.flow is None:
        return cfg, 0
    cfg = cfg.model_copy(
        update={"flow": cfg.flow.model_copy(update={"checkpoint": fitted_field(cfg)})}
    )
    assert cfg.flow is not None
    return cfg, cfg.flow.fit.rollout_prompts * 8 if commands.needs_responses(cfg) else 0


def run_method(
    task: str,
    name: str,
    start: str,
    shape: tuple[int, int],
    steps: int,
    seed: int,
    extra: tuple[str, ...],
) -> dict[str, Any]:
    """Train one method with one seed. Returns its figures."""
    plain = name.replace(", ", "_").replace(" ", "_")
    folder = FOLDER / "runs" / f"{task}-{shape[0] * shape[1]}-{steps}-{start}-{plain}-{seed}"
    cfg, fitted = method_config(task, name, start, shape, steps, seed, folder, extra)
    commands.train(cfg)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "reward/accuracy" in line]
    held = {line["step"]: line for line in lines if "val/accuracy" in line}
    row = {
        "name": name,
        "seed": seed,
        "area": statistics.mean(line["reward/accuracy"] for line in found),
        "half": held[max(1, steps // 2)]["val/accuracy"],
        "end": held[steps]["val/accuracy"],
        "greedy": held[steps]["val/greedy"],
        "responses": steps * shape[0] * shape[1],
        "fitted": fitted,
        "last": found[-1]["reward/accuracy"],
        "charged_auc": over_run([line.get("flow/charged_auc_in_group") for line in found]),
        "auc": over_run([line.get("flow/auc_in_group") for line in found]),
    }
    shutil.rmtree(folder)
    return row


def over_run(values: list[float | None]) -> list[float | None]:
    """Mean of the first ten steps and of the last ten, over those that have a value."""
    parts = ([v for v in part if v is not None] for part in (values[:10], values[-10:]))
    return [statistics.mean(part) if part else None for part in parts]


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval (Student's t)."""
    from scipy.stats import t

    if len(values) < 2:
        return f"{100 * values[0]:+.1f}" if values else ""
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):+.1f} +- {100 * half:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the first method as it is, the others as paired differences in points."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["seed"]] = row
    base = by_name.get(BASE, {})
    lines = [
        "| method | seeds | area under the rollouts' accuracy | held-out sampled, half-way | at "
        "the end | greedy "
        "| AUC of the charge, first and last ten steps | responses, and to fit on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in by_name.items():
        seeds = sorted(found.keys() & base.keys()) if name != BASE else sorted(found)
        cells = []
        for key in ("area", "half", "end", "greedy"):
            if name == BASE:
                cells.append(f"{100 * statistics.mean(found[s][key] for s in seeds):.1f} %")
            else:
                cells.append(interval([found[s][key] - base[s][key] for s in seeds]))
        one = found[seeds[0]] if seeds else next(iter(found.values()))
        known = [row["charged_auc"] for row in found.values() if None not in row["charged_auc"]]
        cells.append(", ".join(f"{statistics.mean(part):.2f}" for part in zip(*known, strict=True)))
        lines.append(
            f"| {name} | {len(seeds)} | {' | '.join(cells)} | {one['responses']:,} + "
            f"{one['fitted']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("task", choices=sorted(DEFAULTS))
    parser.add_argument(
        "--responses",
        type=int,
        help="per step: 32 (default), or 256 (vision) and 128 (text)",
        default=32,
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(8)])
    parser.add_argument(
        "--start",
        choices=("initial", "supervised"),
        default="initial",
        help="supervised: one epoch of cross entropy before",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(METHODS), metavar="NAME", help=", ".join(METHODS)
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parser.parse_args()
    prepare(arguments.task)
    shape = DEFAULTS[arguments.task][arguments.responses]
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = (
        FOLDER / f"{arguments.task}-{arguments.responses}-{arguments.steps}-{arguments.start}.jsonl"
    )
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["name"], row["seed"]) for row in known}
    for seed in arguments.seeds:
        for name in arguments.only or METHODS:
            if (name, seed) not in done:
                row = run_method(
                    arguments.task,
                    name,
                    arguments.start,
                    shape,
                    arguments.steps,
                    seed,
                    tuple(arguments.overrides),
                )
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                commands.say(f"== {json.dumps(row)}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    text = table(rows)
    file.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
