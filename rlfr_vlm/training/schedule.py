"""What a command will do, from its config and the size of its data file: `--dry-run` prints it. Loads no model and no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError

HELDOUT_FRAC, MOST_HELDOUT = 0.05, 64  # of the expert rows, as fit_flow holds them out
FIT_WARMUP_FRAC = 0.1
SHOWN = 8  # numbers of a list that are spelled out

Lines = list[tuple[str, str]]  # name, text


@dataclass(frozen=True)
class Rows:
    """How many rows a data file has, as far as can be told without downloading or checking them."""

    count: int | None
    text: str


def schedule(verb: str, cfg: Config) -> str:
    """Steps, tokens, what is loaded and what is written where, as YAML comments. Raises UserError for what the command would refuse."""
    parts = {"flow": _flow, "train": _train, "eval": _eval}[verb](cfg)
    text = []
    for title, lines in zip(("schedule", "loaded", "written"), parts, strict=True):
        text.append(f"# {title}")
        width = max(len(name) for name, _ in lines)
        text += [f"#   {name:{width}}  {value}".rstrip() for name, value in lines]
    return "\n".join(text) + "\n"


# -- RL ---------------------------------------------------------------------------------------------------------------


def _train(cfg: Config) -> tuple[Lines, Lines, Lines]:
    rows = count_rows(_required(cfg.data.train, "data.train"), cfg.data.limit)
    rollout, steps = cfg.rollout, cfg.train.steps
    if rows.count is not None and rollout.num_prompts > rows.count:
        raise UserError(f"rollout.num_prompts={rollout.num_prompts} exceeds the {rows.count} rows of {cfg.data.train}")
    samples, updates = rollout.num_prompts * rollout.group_size, cfg.algorithm.updates_per_rollout
    per_sample = cfg.data.max_prompt_tokens + rollout.max_new_tokens
    learning = steps - (cfg.flow.online.warmup_steps if cfg.flow is not None else 0)
    least = "at least " if rollout.max_rounds > 1 else ""
    passes = f", {least}{steps * rollout.num_prompts / rows.count:.2f} passes over its rows" if rows.count else ""
    plan = [
        ("data", rows.text),
        ("steps", f"{_number(steps)}{passes}"),
        ("rollouts", f"{_number(rollout.num_prompts)} prompts x {rollout.group_size} responses = {_number(samples)} samples per step"),
        ("updates", f"{updates} per step of {_number(samples // updates)} samples each, {_number(learning * updates)} in total"),
        ("learning rate", _learning_rate(cfg.optim.lr, learning * updates, cfg.optim.warmup_frac, cfg.optim.min_lr_ratio)),
        (
            "tokens per step",
            f"at most {_number(samples * per_sample)}: {_number(samples)} samples of a prompt of {_number(cfg.data.max_prompt_tokens)}"
            f" and a response of {_number(rollout.max_new_tokens)}",
        ),
        ("response tokens", f"at most {_number(steps * samples * rollout.max_new_tokens * rollout.max_rounds)} in total"),
    ]
    if rollout.max_rounds > 1:
        plan.append(("rounds", f"up to {rollout.max_rounds} per step, each sampling anew for groups of equal rewards"))
    if learning < steps:
        plan.append(("flow warm-up", f"in the first {_number(steps - learning)} steps only the field learns"))
    evaluated, saved = due_steps(cfg.eval.every, steps), due_steps(cfg.train.save_steps, steps)
    plan.append(("evaluations", f"{_heldout(cfg)}, after steps {_listed(evaluated)}" if evaluated else "none (eval.every=0)"))
    kept = f"; the newest {cfg.train.keep_checkpoints} are kept" if len(saved) > cfg.train.keep_checkpoints else ""
    plan.append(("checkpoints", f"{len(saved)}, after steps {_listed(saved)}{kept}"))
    return plan, [*_models(cfg), *_field(cfg)], _train_files(cfg, evaluated, saved)


def _train_files(cfg: Config, evaluated: list[int], saved: list[int]) -> Lines:
    out, steps = Path(cfg.output_dir), cfg.train.steps
    contents = ["policy.safetensors", "optimizer.pt", "rng.pt", "state.json", "manifest.json"]
    if cfg.flow is not None:
        contents += ["flow/", "flow_optimizer.pt"] if cfg.flow.online.enabled else ["flow/"]
    if cfg.algorithm.advantage == "gae" or cfg.algorithm.loss == "flowrl":
        contents += ["head.safetensors", "head_optimizer.pt"]
    files = [
        (f"{out}/config.resolved.yaml", ""),
        (f"{out}/env.json", "versions and devices"),
        (f"{out}/metrics.jsonl", f"a line per step{' and per evaluation' if evaluated else ''}"),
        (f"{out}/tb/", "the same for TensorBoard"),
    ]
    if cfg.train.log_rollouts:
        shown = min(cfg.train.log_rollouts, cfg.rollout.num_prompts)
        names = f"step_{1:06d}.jsonl" + (f" to step_{steps:06d}.jsonl" if steps > 1 else "")
        files.append((f"{out}/rollouts/", f"{names}: {shown} of the {cfg.rollout.num_prompts} groups of each step, with their pictures"))
    if evaluated:
        files.append((f"{out}/eval/", f"step_N.json and step_N.jsonl, N = {_listed(evaluated, '{:06d}')}"))
    files.append((f"{out}/checkpoints/", f"global_step_N, N = {_listed(saved)}: {', '.join(contents)}"))
    files.append((f"{out}/hf/global_step_{steps}/", "the trained model as a plain Hugging Face folder"))
    return files + _bad_rows(cfg)


# -- flow fitting -----------------------------------------------------------------------------------------------------


def _flow(cfg: Config) -> tuple[Lines, Lines, Lines]:
    rows = count_rows(_required(cfg.data.expert, "data.expert"))
    if cfg.flow is None:
        raise UserError("the config has no `flow` section: nothing to fit")
    fit, flow = cfg.flow.fit, cfg.flow
    batch, steps = fit_steps(cfg, rows.count)
    plan = [("data", rows.text)]
    if rows.count is not None:
        held = num_heldout(rows.count)
        plan.append(("held out", f"{held} rows, {_number(rows.count - held)} are fitted"))
    of_epochs = "" if fit.steps else f": {fit.epochs:g} passes"
    plan.append(("steps", f"{_number(steps)}{of_epochs}" if steps else f"rows x {fit.epochs:g} / {batch}, rounded up"))
    plan.append(
        ("batch", f"{batch} expert solutions, {len(flow.layers)} layers and {fit.batch_mul} draws of noise and time for each token")
    )
    plan.append(("learning rate", _learning_rate(fit.lr, steps, FIT_WARMUP_FRAC, 0.0)))
    plan.append(("tokens per step", f"at most {_number(batch * fit.max_tokens)}: {batch} rows of {_number(fit.max_tokens)}"))
    if steps:
        plan.append(("tokens", f"at most {_number(steps * batch * fit.max_tokens)} in total"))
    out = Path(cfg.output_dir) / "flow"
    files = [
        (f"{out}/flow_fit.jsonl", "a line per step, with the held-out loss at about ten of them"),
        (f"{out}/flow.safetensors", "the field, at the end"),
        (f"{out}/flow_config.json", "what it was fitted on"),
        *_bad_rows(cfg),
    ]
    return plan, [*_policy(cfg), ("flow field", f"a new one{_field_size(cfg)}")], files


def num_heldout(rows: int) -> int:
    """Expert rows that the fit is judged by."""
    return min(MOST_HELDOUT, max(1, int(rows * HELDOUT_FRAC)))


def fit_steps(cfg: Config, rows: int | None) -> tuple[int, int | None]:
    """Expert solutions per step, and steps where they can be told: `flow.fit.steps`, else the passes over the rows not held out."""
    assert cfg.flow is not None
    fit = cfg.flow.fit
    if rows is None:
        return fit.batch_size, fit.steps
    train = rows - num_heldout(rows)
    if train < 1:
        raise UserError(f"data.expert: {rows} rows are too few to fit a flow and hold some out")
    batch = min(fit.batch_size, train)
    return batch, fit.steps or max(1, math.ceil(train * fit.epochs / batch))


# -- evaluation -------------------------------------------------------------------------------------------------------


def _eval(cfg: Config) -> tuple[Lines, Lines, Lines]:
    name = "step_000000" + ("" if cfg.eval.pictures == "as_is" else f"_{cfg.eval.pictures}")
    folder = Path(cfg.output_dir) / "eval"
    files = [(f"{folder}/{name}.json", "accuracies"), (f"{folder}/{name}.jsonl", "every response"), *_bad_rows(cfg)]
    return [("evaluation", _heldout(cfg))], _policy(cfg), files


def _heldout(cfg: Config) -> str:
    rows = count_rows(_required(cfg.data.eval, "data.eval"), cfg.eval.limit)
    each = f"{cfg.eval.heldout_samples} responses at temperature {cfg.eval.heldout_temperature:g} and a greedy one to each problem"
    if rows.count is None:
        return f"{each} ({rows.text})"
    responses = rows.count * (cfg.eval.heldout_samples + 1)
    budget = f"{_number(responses)} responses of at most {_number(cfg.rollout.max_new_tokens)} tokens"
    return f"{each} ({rows.text}): {budget}"


# -- what is loaded ---------------------------------------------------------------------------------------------------


def _policy(cfg: Config) -> Lines:
    return [("policy", f"{cfg.model.path} in {cfg.model.dtype} (model.device={cfg.model.device})")]


def _models(cfg: Config) -> Lines:
    lines = _policy(cfg)
    if cfg.algorithm.needs_reference:
        lines.append(("reference", f"{cfg.algorithm.reference or cfg.model.path} in {cfg.model.dtype}, frozen"))
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
    else:
        source = folder if Path(folder).is_dir() else f"{folder}, which is not there yet: fit it first with `rlfr-vlm flow`"
    return [("flow field", f"{source}{_field_size(cfg)}{'' if cfg.flow.online.enabled else ', frozen'}")]


def _field_size(cfg: Config) -> str:
    hidden = hidden_size(cfg.model.path)
    assert cfg.flow is not None
    return "" if hidden is None else f", {_number(num_field_parameters(hidden, cfg.flow.network.depth))} parameters"


def num_field_parameters(hidden: int, depth: int) -> int:
    """Weights of a velocity network."""
    return hidden**2 * (7 + 5 * depth) + hidden * (522 + 6 * depth)


def hidden_size(model: str) -> int | None:
    """Size of a local model's latents, from its config.json; None for a hub name or a folder without one."""
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    size = {**config, **config.get("text_config", {})}.get("hidden_size")
    return size if isinstance(size, int) else None


# -- figures ----------------------------------------------------------------------------------------------------------


def count_rows(source: str, limit: int | None = None) -> Rows:
    """Rows of a data file, good and bad ones, at most `limit`."""
    path = Path(source)
    if not path.exists():
        local = path.suffix or source.startswith((".", "/"))
        return Rows(None, f"rows unknown: {source} {'is not there yet' if local else 'is read from the hub'}")
    try:
        found = _rows(path)
    except (OSError, ValueError) as error:
        return Rows(None, f"rows unknown: {source} cannot be read: {' '.join(str(error).split())[:200]}")
    except ImportError:
        return Rows(None, f"rows unknown: {source}: reading Parquet needs the extra: pip install 'rlfr-vlm[data]'")
    count = min(found, limit or found)
    return Rows(count, f"{_number(count)}{f' of {_number(found)}' if count < found else ''} rows: {source}")


def _rows(path: Path) -> int:
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(rows, list):
            raise ValueError("expected a list of rows")
        return len(rows)
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def due_steps(every: int, steps: int) -> list[int]:
    """Steps after which something done every so many steps (0: never) is done; the last step counts."""
    return [*range(every, steps, every), steps] if every else []


def _learning_rate(peak: float, updates: int | None, warmup_frac: float, min_ratio: float) -> str:
    end = "constant after that" if min_ratio == 1 else f"then a cosine down to {peak * min_ratio:g}"
    if updates is None:
        return f"{peak:g} after {warmup_frac:.0%} of warm-up, {end}"
    warmup = int(updates * warmup_frac)
    return f"{peak:g} after {_number(warmup)} {'update' if warmup == 1 else 'updates'} of warm-up, {end}"


def _bad_rows(cfg: Config) -> Lines:
    return [(f"{cfg.output_dir}/bad_rows.jsonl", "rows left out, with the reason")] if cfg.data.on_bad_row == "skip" else []


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
