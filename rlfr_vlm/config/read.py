"""Reading the configuration: YAML plus `a.b=c` overrides, and what two of them differ in."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlfr_vlm.config.base import parse_yaml
from rlfr_vlm.config.methods import forget_method
from rlfr_vlm.config.tree import Config
from rlfr_vlm.errors import UserError


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the tree."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += _known_keys(candidate, f"{prefix}{name}.")
    return keys


def _nearest(key: str) -> str:
    keys = _known_keys(Config)
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not found:  # the right leaf in the wrong section
        leaf = difflib.get_close_matches(
            key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], n=1, cutoff=0.7
        )
        found = [k for k in keys if leaf and k.rsplit(".", 1)[-1] == leaf[0]][:1]
    return f"; did you mean `{found[0]}`?" if found else ""


def _override(tree: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"override `{assignment}` is not of the form key.path=value")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override `{assignment}`: `{parent}` is a value, not a section")
        node = child
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"override `{assignment}`: the value is not YAML") from error
    # YAML 1.1 reads 1e-4 as text; what is quoted is meant as text
    if isinstance(value, str) and value == text:
        with contextlib.suppress(ValueError):
            value = float(value)
    node[leaf] = value


def _floats(node: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text; read it as the number that was meant."""
    if isinstance(node, dict):
        return {k: _floats(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_floats(v) for v in node]
    if isinstance(node, str) and node[:1] in "+-.0123456789" and "e" in node.lower():
        try:
            return float(node)
        except ValueError:
            return node
    return node


def parse_config(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a tree. Raises UserError naming the field, and for an unknown key the nearest known
    one.
    """
    try:
        return Config.model_validate(_floats(tree))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"unknown key `{key}`{_nearest(key)}")
            elif problem["type"] == "missing":
                lines.append(f"`{key}` is required")
            else:
                given = (
                    "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
                )
                where = f"`{key}`: " if key else ""
                lines.append(f"{where}{problem['msg'].removeprefix('Value error, ')}{given}")
        raise UserError(f"{source}: " + "; ".join(lines)) from None


def load_config(path: str | Path | None, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file (none: start from nothing), apply `a.b=c` overrides; another
    `algorithm.method` than the file's brings its settings along.

    Raises UserError for whatever does not fit.
    """
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8")) if path is not None else {}
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config {path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected a mapping of sections at the top")
    named = (
        (tree.get("algorithm") or {}).get("method", "grpo")
        if isinstance(tree.get("algorithm") or {}, dict)
        else None
    )
    if any(a.startswith("algorithm.method=") and a.partition("=")[2] != named for a in overrides):
        tree = forget_method(tree)  # the file's settings are those of its own method
    for assignment in overrides:
        _override(tree, assignment)
    return parse_config(tree, f"config {path}" if path is not None else "options")


def to_yaml(cfg: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False)


RESOURCES: dict[str, Any] = {
    "output_dir": True,
    "resume": True,
    "eval": True,
    "model": {"device"},
    "rollout": {
        "hf_batch_size": True,
        "sync_bucket_mib": True,
        "vllm": {
            "gpu_memory_utilization",
            "kv_cache_gib",
            "max_num_seqs",
            "enforce_eager",
            "tensor_parallel",
            "sleep",
        },
    },
    "reward": {"grader": {"workers"}},
    "train": {
        "keep_checkpoints",
        "save_steps",
        "log_rollouts",
        "log_attention",
        "rollout_format",
        "trackers",
        "project",
        "tokens_per_microbatch",
        "timeout_s",
    },
    "monitors": True,
    "deepspeed": True,
    "launcher": True,
    "ray": True,
}


def config_hash(cfg: Config) -> str:
    """Digest of what decides a run's numbers: everything but where it is written, what it is given
    to run on, and what is measured of it.

    A run may go on with other resources; the sums are then rounded differently, so its weights are
    equal no longer to the bit.
    """
    tree = cfg.model_dump(mode="json", exclude=RESOURCES)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], limit: int = 6) -> str:
    """The dotted settings in which two trees differ, with both values."""

    def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            flat |= (
                flatten(value, f"{prefix}{key}.")
                if isinstance(value, Mapping)
                else {f"{prefix}{key}": value}
            )
        return flat

    a, b = flatten(before), flatten(now)
    changed = [
        f"{k}: {a.get(k)} -> {b.get(k)}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]
    return ", ".join(changed[:limit])
