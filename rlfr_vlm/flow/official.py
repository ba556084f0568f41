"""The published flow checkpoints (RLFR, arXiv:2510.10201): theirs into a FlowField, ours into
theirs.

Their files are pickles from elsewhere: they are read as tensors only, nothing in them runs, and
    every key, shape and value is checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from rlfr_vlm.config import FlowConfig, FlowNetworkConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import WEIGHTS_FILE, FlowField
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.official_files import (
    FILES,
    MAX_VALUES,
    check_network,
    find_file,
    find_network,
    load_pickle,
    load_shards,
    shown,
)
from rlfr_vlm.flow.spec import SPEC_FILE, FlowSpec, read_spec

SPELLINGS = {  # of the settings in their configs, and likely ones
    "context": ("flow_context_mode", "flow_context"),
    "shift": ("flow_shift",),
    "layers": ("hook_layers_percentile", "flow_layers_percentile", "flow_layers"),
    "times": ("rewarding_timesteps", "flow_times"),
}
MAX_CONFIG_BYTES = 2**20  # longer files are tokenizers and logs


def split_values(value: Any, origin: str) -> list[Any]:
    """`a+b` of their configs and of the command line, a flat list, or a single value. Raises
    UserError for anything else.
    """
    values = (
        [part.strip() for part in value.split("+")]
        if isinstance(value, str)
        else value
        if isinstance(value, list)
        else [value]
    )
    wrong = [
        type(v).__name__
        for v in values
        if isinstance(v, bool) or not isinstance(v, str | int | float)
    ]
    if wrong or not 0 < len(values) <= MAX_VALUES:
        found = (
            f"{'a list with ' if isinstance(value, list) else ''}{wrong[0]}"
            if wrong
            else f"a list of {len(values)} values"
        )
        raise UserError(f"{origin} is {found}, neither a value nor a flat list of a few")
    return values


def read_settings(path: Path) -> list[tuple[str, Any]]:
    """The settings that a config spells out, by our names; none for a file that mentions none or is
    no mapping. Raises UserError for one with aliases, of which a few lines can stand for more than
    memory holds.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not any(key in text for keys in SPELLINGS.values() for key in keys):
            return []
        if path.suffix != ".json" and any(
            isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)
        ):
            raise UserError(
                f"{path} has YAML aliases and is not read: write its values out, or move it away "
                "and name them as options"
            )
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []
    spelled = ((name, key) for name, keys in SPELLINGS.items() for key in keys)
    return [
        (name, tree[key])
        for name, key in spelled
        if isinstance(tree, dict) and tree.get(key) is not None
    ]


def find_settings(
    folder: Path, given: Mapping[str, str | None]
) -> dict[str, tuple[list[Any], str]]:
    """Each setting that is known, and where from: the command line, else a config in the folder;
    files that are none say nothing.

    Raises UserError where two configs differ, and where nothing says on which side the contexts
    stood.
    """
    found = {
        name: (split_values(value, f"--{name}"), f"--{name}")
        for name, value in given.items()
        if value is not None
    }
    configs = (
        path
        for path in folder.iterdir()
        if path.suffix in (".json", ".yaml", ".yml") and path.is_file()
    )
    for path in sorted(path for path in configs if path.stat().st_size <= MAX_CONFIG_BYTES):
        for name, value in read_settings(path):
            theirs = split_values(value, f"{name} in {path}")
            values, origin = found.setdefault(name, (theirs, path.name))
            if not origin.startswith("--") and [str(v) for v in values] != [str(v) for v in theirs]:
                differ = (
                    f"{name} is {shown(values)} in {origin}, but {shown(theirs)} in {path.name}"
                )
                raise UserError(f"{folder}: {differ}; name the right one with --{name}")
    if "context" not in found:
        uses = (
            "offline fitting used token_pre (the token after the target), the released RL "
            "configs token_post (the token before)"
        )
        raise UserError(
            f"{folder} does not say where the contexts stood, and {uses}; name it, as in --context "
            "token_pre"
        )
    return found


def as_config(
    settings: Mapping[str, list[Any]], origins: Mapping[str, str], source: Path
) -> FlowConfig:
    """The flow section that settings make. Raises UserError naming each wrong one by its option, or
    by the file that it stands in.
    """
    try:
        return FlowConfig.model_validate(settings)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            text = problem["msg"].removeprefix("Value error, ")
            name, _, text = (
                (str(problem["loc"][0]), "", text) if problem["loc"] else text.partition(": ")
            )
            where = origins[name] if origins[name].startswith("--") else f"{name} ({origins[name]})"
            given = (
                ""
                if isinstance(problem["input"], dict)
                else f" (given: {shown([problem['input']])[0]})"
            )
            problems.append(f"{where}: {text}{given}")
        raise UserError(f"{source}: {'; '.join(problems)}") from None


def import_field(
    source: Path, backbone: dict[str, Any], given: Mapping[str, str | None], model: str
) -> tuple[FlowField, dict[str, str]]:
    """A published checkpoint as a field with float32 weights of exactly the stored values, `freqs`
    included.

    backbone: as `Policy.identity`, with the fingerprint "": a published file has none; given:
        context, shift, layers, times, as `a+b`, where
    the user names them. Returns the field, and where each setting comes from. Raises UserError
    naming file and key.
    """
    path = find_file(source)
    found = find_settings(path.parent, given)
    origins = {
        name: f"default {'+'.join(map(str, FlowConfig.model_fields[name].default))}"
        for name in SPELLINGS
    }
    origins |= {name: origin for name, (_, origin) in found.items()}
    cfg = as_config({name: values for name, (values, _) in found.items()}, origins, source)
    if origins["shift"] == "--shift" and not any(shift for _, shift in cfg.sides):
        raise UserError(
            "--shift: with --context identity a token is its own context, at no distance; leave "
            "--shift out"
        )
    state = load_shards(path) if path.name.endswith(".index.json") else load_pickle(path)
    tensors = check_network(*find_network(state, path), path, int(backbone["hidden_size"]), model)
    depth = (len(tensors) - 19) // 7
    cfg = cfg.model_copy(update={"network": FlowNetworkConfig(depth=depth)})
    with torch.device("meta"):
        network = VelocityNet(int(backbone["hidden_size"]), depth, float(backbone["rms_norm_eps"]))
    network.load_state_dict(
        {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}, assign=True
    )
    return FlowField(FlowSpec.of(cfg, backbone), network), origins


def export_field(folder: Path, out: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a field's weights, as stored or in a dtype, as the published code does: to `out` where
    it ends in .bin, else flow_model.bin inside it. Returns the file; raises UserError naming file
    and key, and where there is such a file already.
    """
    path, spec = folder / WEIGHTS_FILE, read_spec(folder)
    file = out if out.suffix == ".bin" and not out.is_dir() else out / FILES[0]
    if own := [name for name in ("standardise", "prompt_context") if getattr(spec, name)] + [
        "contrast"
    ] * (spec.contrast != "none"):
        raise UserError(
            f"{folder}: the published code has no {own[0]}, and would read this field wrongly: fit "
            "one with flow.profile=published"
        )
    if file.exists():
        raise UserError(f"--out: {file} is there already: remove it, or name another place")
    try:
        tensors = check_network(load_file(path), "", path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    depth = (len(tensors) - 19) // 7
    if depth != spec.depth:
        raise UserError(
            f"{path} has {depth} blocks, but {folder / SPEC_FILE} says depth {spec.depth}: not of "
            "one field"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".tmp-{file.name}")
    with temporary.open("wb") as stream:
        torch.save(
            {
                f"model.{name}": tensor.to(dtype or tensor.dtype, copy=True)
                for name, tensor in tensors.items()
            },
            stream,
        )
    temporary.replace(file)
    return file
