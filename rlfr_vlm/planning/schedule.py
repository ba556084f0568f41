"""What a command will do, from its config and the size of its data file: `--dry-run` prints it.
Loads no model and no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rlfr_vlm.config import Config, config_hash, differences
from rlfr_vlm.errors import UserError
from rlfr_vlm.fitting.budget import (
    FIELD_SPEC,
    FIT_LOOKS,
    FIT_STEPS,
    FIT_WARMUP_FRAC,
    LR_TIMES_SIZE,
    check_field,
    fit_lr,
    fit_steps,
    new_field_folder,
    num_heldout,
)
from rlfr_vlm.planning.memory import bytes_per_parameter, element
from rlfr_vlm.planning.shapes import hidden_size, num_flow_parameters, num_parameters
from rlfr_vlm.run.trackers import STATE_FILE, check_recording
from rlfr_vlm.shares import points
from rlfr_vlm.storage.checkpoint import list_checkpoints

SHOWN = 8  # numbers of a list that are spelled out

Lines = list[tuple[str, str]]  # name, text


@dataclass(frozen=True)
class RowCount:
    """How many rows a data file has, as far as can be told without downloading or checking them."""

    count: int | None
    text: str


def schedule(verb: str, cfg: Config) -> str:
    """Steps, tokens, what is loaded and what is written where, as YAML comments. Raises UserError
    for what the command would refuse.
    """
    parts = {"flow": _flow, "train": _train, "eval": _eval}[verb](cfg)
    text = []
    for title, lines in zip(("schedule", "loaded", "written"), parts, strict=True):
        text.append(f"# {title}")
        width = max(len(name) for name, _ in lines)
        text += [f"#   {name:{width}}  {value}".rstrip() for name, value in lines]
    return "\n".join(text) + "\n"


# -- RL --------------------------------------------------------------------------------------------


def _train(cfg: Config) -> tuple[Lines, Lines, Lines]:
    check_recording(cfg)
    rows = count_rows(_required(cfg.data.train, "data.train"), cfg.data.limit)
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
        ("steps", f"{_number(steps)}{passes}"),
        (
            "rollouts",
            f"{_number(rollout.num_prompts)} prompts x {rollout.group_size} responses = "
            f"{_number(samples)} samples per step",
        ),
        (
            "updates",
            f"{updates} per step of {_number(samples // updates)} samples each, "
            f"{_number(learning * updates)} in total",
        ),
        (
            "learning rate",
            _learning_rate(
                cfg.optim.lr, learning * updates, cfg.optim.warmup_frac, cfg.optim.min_lr_ratio
            ),
        ),
        (
            "tokens per step",
            f"at most {_number(samples * per_sample)}: {_number(samples)} samples of a prompt of "
            f"{_number(cfg.data.max_prompt_tokens)}"
            f" and a response of {_number(rollout.max_new_tokens)}",
        ),
        (
            "response tokens",
            f"at most {_number(steps * samples * rollout.max_new_tokens * rollout.max_rounds)} in "
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
                f"in the first {_number(steps - learning)} steps only the field learns",
            )
        )
    evaluated, saved = due_steps(cfg.eval.every, steps), due_steps(cfg.train.save_steps, steps)
    plan.append(
        (
            "evaluations",
            f"{_heldout(cfg)}, after steps {_listed(evaluated)}"
            if evaluated
            else "none (eval.every=0)",
        )
    )
    kept = (
        f"; the newest {cfg.train.keep_checkpoints} are kept"
        if len(saved) > cfg.train.keep_checkpoints
        else ""
    )
    plan.append(("checkpoints", f"{len(saved)}, after steps {_listed(saved)}{kept}"))
    return (
        plan,
        [*_models(cfg), *_field(cfg), *_memory(cfg, trained=True)],
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
            f"from {found[-1]}: {_number(max(0, cfg.train.steps - step))} of the steps are left",
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
            (f"{out}/eval/", f"step_N.json and step_N.jsonl, N = {_listed(evaluated, '{:06d}')}")
        )
    files.append(
        (
            f"{out}/checkpoints/",
            f"global_step_N, N = {_listed(saved)}: {', '.join(contents)}; and `latest`, the newest "
            "one's name",
        )
    )
    files.append(
        (f"{out}/hf/global_step_{steps}/", "the trained model as a plain Hugging Face folder")
    )
    return files + _bad_rows(cfg)


# -- flow fitting ----------------------------------------------------------------------------------


def _flow(cfg: Config) -> tuple[Lines, Lines, Lines]:
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
                _learning_rate(fit_lr(cfg.flow.fit, size or 1), steps, FIT_WARMUP_FRAC, 0.0),
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
        *_bad_rows(cfg),
    ]
    contrast = ", half of them its contrast's" if cfg.flow.contrast != "none" else ""
    return (
        plan,
        [
            *_policy(cfg),
            ("flow field", f"a new one{_field_size(cfg)}{contrast}"),
            *_memory(cfg, trained=False),
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
        plan.append(("data", count_rows(_required(cfg.data.expert, "data.expert")).text))
    if fit.source != "expert" or contrast != "none":
        rows = count_rows(_required(cfg.data.train, "data.train"), cfg.data.limit)
        use = " and ".join(
            [
                *(["the right ones for the field"] if fit.source != "expert" else []),
                *([f"{contrast} for its contrast"] if contrast != "none" else []),
            ]
        )
        plan.append(
            (
                "responses",
                f"{cfg.rollout.group_size} to each of {_number(fit.rollout_prompts)} of "
                f"{rows.text}; {use}",
            )
        )
    if fit.probe_prompts:
        plan.append(
            (
                "probe",
                f"{cfg.rollout.group_size} responses to each of {_number(fit.probe_prompts)} "
                "further prompts",
            )
        )
    plan.append(
        (
            "steps",
            f"at most {_number(steps)}, fewer where {fit.patience} of {FIT_LOOKS} looks at what is "
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
    rows = count_rows(_required(cfg.data.expert, "data.expert"))
    fit, flow = cfg.flow.fit, cfg.flow
    batch, steps = (fit.batch_size, fit.steps) if rows.count is None else fit_steps(cfg, rows.count)
    plan = [("data", rows.text)]
    if rows.count is not None:
        held = num_heldout(rows.count)
        plan.append(("held out", f"{held} rows, {_number(rows.count - held)} are fitted"))
    of_epochs = "" if fit.steps else f": {fit.epochs:g} passes"
    plan.append(
        (
            "steps",
            f"{_number(steps)}{of_epochs}"
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
            f"at most {_number(batch * fit.max_tokens)}: {batch} rows of {_number(fit.max_tokens)}",
        )
    )
    if steps:
        plan.append(("tokens", f"at most {_number(steps * batch * fit.max_tokens)} in total"))
    return steps, plan


# -- evaluation ------------------------------------------------------------------------------------


def _eval(cfg: Config) -> tuple[Lines, Lines, Lines]:
    name = "step_000000" + ("" if cfg.eval.pictures == "as_is" else f"_{cfg.eval.pictures}")
    folder = Path(cfg.output_dir) / "eval"
    files = [
        (f"{folder}/{name}.json", "accuracies"),
        (f"{folder}/{name}.jsonl", "every response"),
        *_bad_rows(cfg),
    ]
    return [("evaluation", _heldout(cfg))], _policy(cfg), files


def _heldout(cfg: Config) -> str:
    rows = count_rows(_required(cfg.data.eval, "data.eval"), cfg.eval.limit)
    each = (
        f"{cfg.eval.heldout_samples} responses at temperature {cfg.eval.heldout_temperature:g} "
        "and a greedy one to each problem"
    )
    if rows.count is None:
        return f"{each} ({rows.text})"
    responses = rows.count * (cfg.eval.heldout_samples + 1)
    budget = (
        f"{_number(responses)} responses of at most {_number(cfg.rollout.max_new_tokens)} tokens"
    )
    return f"{each} ({rows.text}): {budget}"


# -- what is loaded --------------------------------------------------------------------------------


def _policy(cfg: Config) -> Lines:
    return [("policy", f"{cfg.model.path} in {cfg.model.dtype} (model.device={cfg.model.device})")]


def _models(cfg: Config) -> Lines:
    lines = _policy(cfg)
    if cfg.algorithm.needs_reference:
        lines.append(
            (
                "reference",
                f"{cfg.algorithm.reference or cfg.model.path} in {cfg.model.dtype}, frozen",
            )
        )
    if cfg.algorithm.advantage == "gae":
        lines.append(("value head", "new, on the policy's last state"))
    if cfg.algorithm.loss == "flowrl":
        lines.append(("partition head", "new, on the policy's last states of the prompt"))
    return lines


def _field(cfg: Config) -> Lines:
    if cfg.flow is None:
        return []
    folder = cfg.flow.checkpoint
    if folder is None:
        source = "a new one (flow.checkpoint is unset)"
    elif (Path(folder) / FIELD_SPEC).exists():
        check_field(cfg.flow)
        source = folder
    else:
        source = f"{folder}, which is not there yet: fit it first with `rlfr-vlm flow`"
    return [
        ("flow field", f"{source}{'' if cfg.flow.online.enabled else ', frozen'}{_field_size(cfg)}")
    ]


def _field_size(cfg: Config) -> str:
    hidden = hidden_size(cfg.model.path)
    assert cfg.flow is not None
    return (
        "" if hidden is None else f", {_number(num_flow_parameters(hidden, cfg.flow))} parameters"
    )


def _memory(cfg: Config, trained: bool) -> Lines:
    """What weights, gradients and AdamW's two moments take; a bfloat16 policy has float32 ones of
    each beside its own two.
    """
    weight = element(cfg)
    each = bytes_per_parameter(cfg) if trained else weight
    size, hidden = num_parameters(cfg.model.path), hidden_size(cfg.model.path)
    rest = "on one device, for nothing is sharded; activations and the KV cache come on top"
    if size is None:
        return [
            (
                "memory",
                f"{each} bytes for each parameter of the policy, {_gib(10**9 * each)} per billion, "
                f"{rest}",
            )
        ]
    parts = [("policy", size, each)]
    if trained and cfg.algorithm.needs_reference:
        parts.append(("reference", size, weight))  # taken to be as large
    if cfg.flow is not None and hidden is not None:
        parts.append(
            (
                "field",
                num_flow_parameters(hidden, cfg.flow),
                16 if not trained or cfg.flow.online.enabled else 4,
            )
        )
    sums = ", ".join(
        f"{name} {count / 1e6:,.1f}M parameters x {one} bytes" for name, count, one in parts
    )
    return [("memory", f"about {_gib(sum(count * one for _, count, one in parts))} {rest}: {sums}")]


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


# -- figures ---------------------------------------------------------------------------------------


def count_rows(source: str, limit: int | None = None) -> RowCount:
    """Rows of a data file, good and bad ones, at most `limit`. Raises UserError for one that cannot
    be read.
    """
    path = Path(source)
    if not path.exists():
        local = path.suffix or source.startswith((".", "/"))
        return RowCount(
            None,
            f"rows unknown: {source} {'is not there yet' if local else 'is read from the hub'}",
        )
    if path.suffix not in ROW_FILES or not path.is_file():
        raise UserError(f"data file {source}: expected .jsonl, .json, .parquet or .arrow")
    try:
        found = ROW_FILES[path.suffix](path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"data file {source} cannot be read as {path.suffix}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    except ImportError:
        return RowCount(
            None,
            f"rows unknown: {source}: reading Parquet and Arrow needs the extra: pip install "
            "'rlfr-vlm[data]'",
        )
    count = min(found, limit or found)
    return RowCount(
        count, f"{_number(count)}{f' of {_number(found)}' if count < found else ''} rows: {source}"
    )


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _count_list(path: Path) -> int:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError("expected a list of rows")
    return len(rows)


def _count_parquet(path: Path) -> int:
    from pyarrow.parquet import read_metadata

    return int(read_metadata(path).num_rows)


def _count_arrow(path: Path) -> int:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return sum(batch.num_rows for batch in pa.ipc.open_stream(file))


ROW_FILES = {
    ".jsonl": _count_lines,
    ".json": _count_list,
    ".parquet": _count_parquet,
    ".arrow": _count_arrow,
}


def due_steps(every: int, steps: int) -> list[int]:
    """Steps after which something done every so many steps (0: never) is done; the last step
    counts.
    """
    return [*range(every, steps, every), steps] if every else []


def _learning_rate(peak: float, updates: int | None, warmup_frac: float, min_ratio: float) -> str:
    end = "constant after that" if min_ratio == 1 else f"then a cosine down to {peak * min_ratio:g}"
    if updates is None:
        return f"{peak:g} after {points(warmup_frac, 0)}% of warm-up, {end}"
    warmup = int(updates * warmup_frac)
    return (
        f"{peak:g} after {_number(warmup)} {'update' if warmup == 1 else 'updates'} of warm-up, "
        f"{end}"
    )


def _bad_rows(cfg: Config) -> Lines:
    return (
        [(f"{cfg.output_dir}/bad_rows.jsonl", "rows left out, with the reason")]
        if cfg.data.on_bad_row == "skip"
        else []
    )


def _required(value: str | None, field: str) -> str:
    if value is None:
        raise UserError(f"{field} is required for this command")
    return value


def _listed(numbers: list[int], form: str = "{}") -> str:
    """`50, 100, 150`; a long list with its middle left out."""
    text = [form.format(n) for n in numbers]
    return ", ".join(text if len(text) <= SHOWN else [*text[: SHOWN - 3], "...", *text[-2:]])


def _number(value: int) -> str:
    return f"{value:,}"
