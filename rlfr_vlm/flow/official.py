"""The published flow checkpoints (RLFR, arXiv:2510.10201): theirs into a FlowField, ours into
theirs.

Their files are pickles from elsewhere: they are read as tensors only, nothing in them runs, and
    every key, shape and value is checked.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlfr_vlm.config import FlowConfig, FlowNetworkConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import SPEC_FILE, WEIGHTS_FILE, FlowField, FlowSpec, read_spec
from rlfr_vlm.flow.network import VelocityNet

FILES = (
    "flow_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # looked for in a folder, in this order
PREFIXES = (
    "model.",
    "flow.model.",
    "flow.",
    "",
)  # saved during RL; saved by offline fitting; either without its wrapper
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # all exact in float32
SPELLINGS = {  # of the settings in their configs, and likely ones
    "context": ("flow_context_mode", "flow_context"),
    "shift": ("flow_shift",),
    "layers": ("hook_layers_percentile", "flow_layers_percentile", "flow_layers"),
    "times": ("rewarding_timesteps", "flow_times"),
}
MAX_CONFIG_BYTES = 2**20  # longer files are tokenizers and logs
MAX_VALUES, MAX_SHOWN = 64, 80  # values of a setting; characters of a foreign text in a message
STRANGERS = {  # first bytes of what a download can leave in a checkpoint's place
    b"version https://git-lfs": "a Git LFS pointer and not the file itself: fetch that with `git "
    "lfs pull` or `hf download`",
    b"<!doctype html": "a web page: download the file itself, as with `hf download`",
    b"<html": "a web page: download the file itself, as with `hf download`",
}


def network_shapes(size: int, depth: int) -> dict[str, tuple[int, ...]]:
    """Shape of each of the 19 + 7 * depth tensors of a network of this size; nothing is
    allocated.
    """
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape)
            for name, tensor in VelocityNet(size, depth).state_dict().items()
        }


def load_pickle(path: Path) -> dict[str, Any]:
    """The dict in a torch file. Raises UserError naming the file for anything that is not one; no
    code in the file is run.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file() or path.suffix == ".safetensors":
        raise UserError(
            f"{path} is not a torch file; published flow fields are one, or a folder with one: "
            f"{', '.join(FILES)}"
        )
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if stranger := next((text for mark, text in STRANGERS.items() if start.startswith(mark)), None):
        raise UserError(f"{path} is {stranger}")
    try:
        if zipfile.is_zipfile(
            path
            # torch stores without compression; a small packed file could unpack to more than memory
            # holds
        ):
            with zipfile.ZipFile(path) as archive:
                if packed := [
                    i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED
                ]:
                    raise UserError(
                        f"{path}: {shown(packed)} in it is compressed, which no torch file is; "
                        "nothing in it was read"
                    )
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        foreign = re.search(r"nsupported (?:global: )?(\S+ \S+)", str(error))
        reason = (
            f"it asks for {foreign[1]}"
            if foreign
            else f"empty, truncated or damaged; {type(error).__name__} {str(error)[:99]}"
        )
        raise UserError(
            f"{path} is not a plain torch file of tensors, and nothing in it was run ({reason})"
        ) from None
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise UserError(
            f"{path} holds a {type(state).__name__}, not a dict of named tensors with one in it at "
            "least"
        )
    return state


def load_shards(index: Path) -> dict[str, Any]:
    """The shards that hold flow keys, merged. Raises UserError naming the index, or a shard."""
    try:
        shards = {
            str(shard)
            for key, shard in json.loads(index.read_text())["weight_map"].items()
            if key.startswith("flow.")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index} is not an index of shards: {type(error).__name__}: {error}"
        ) from None
    if not shards or any(Path(shard).name != shard for shard in shards):
        raise UserError(
            f"{index} must place `flow.*` keys in files beside it, but names "
            f"{sorted(shards) or 'no such key'}"
        )
    return {
        key: value
        for shard in sorted(shards)
        for key, value in load_pickle(index.parent / shard).items()
    }


def find_file(source: Path) -> Path:
    """A checkpoint, or the one in a folder. Raises UserError that says what was looked for."""
    path = next((source / name for name in FILES if (source / name).is_file()), source)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        own = (
            f"; {WEIGHTS_FILE} there is this program's own format, which needs no import"
            if (path / WEIGHTS_FILE).exists()
            else ""
        )
        raise UserError(f"{source} holds none of {', '.join(FILES)}{own}")
    return path


def find_network(state: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """What belongs to the flow network, and its prefix: beside `flow.*` keys the others are the
    backbone's.
    """
    anchors = [name for name in network_shapes(1, 1) if not name.startswith("res_blocks.")]
    prefix = max(PREFIXES, key=lambda p: sum(p + name in state for name in anchors))
    if not any(prefix + name in state for name in anchors):
        raise UserError(
            f"{path} holds no flow network: no key like `model.input_proj.weight`, but "
            f"{shown(sorted(state))}"
        )
    return {
        key: value
        for key, value in state.items()
        if not prefix.startswith("flow.") or key.startswith("flow.")
    }, prefix


def check_network(
    state: Mapping[str, Any],
    prefix: str,
    path: Path,
    hidden_size: int | None = None,
    model: str = "",
) -> dict[str, Tensor]:
    """The network's tensors without prefix. Raises UserError naming file and key: keys, dtypes,
    sizes, shapes, values, in this order.
    """
    depth = max(
        1,
        len(
            {
                m[1]
                for key in state
                if (m := re.match(re.escape(prefix) + r"res_blocks\.(\d+)\.", key))
            }
        ),
    )
    names = {prefix + name for name in network_shapes(1, depth)}
    if state.keys() != names:
        missing, extra = sorted(names - state.keys()), sorted(state.keys() - names)
        raise UserError(
            f"{path}: {len(missing)} missing keys {shown(missing)}, {len(extra)} unexpected keys "
            f"{shown(extra)}"
        )
    for key, value in state.items():
        if (
            not isinstance(value, Tensor)
            or value.dtype not in DTYPES
            or value.layout != torch.strided
            or value.device.type != "cpu"
        ):
            raise UserError(
                f"{path}: `{key}` is {kind_of(value)}, not a plain tensor of float32, bfloat16 or "
                "float16"
            )
    entry = f"{prefix}input_proj.weight"
    # else: mis-shaped, as said below
    width, size = state[entry].shape if state[entry].ndim == 2 else (hidden_size or 1,) * 2
    if hidden_size is not None and size != hidden_size:
        raise UserError(
            f"{path}: `{entry}` reads latents of size {size}, but {model} has hidden_size "
            f"{hidden_size}"
        )
    if width != size:
        raise UserError(
            f"{path}: `{entry}` is {(width, size)}: only a network as wide as its latents can be "
            "read"
        )
    shapes = network_shapes(size, depth)
    for name, shape in shapes.items():
        if tuple(state[prefix + name].shape) != shape:
            raise UserError(
                f"{path}: `{prefix + name}` is {tuple(state[prefix + name].shape)}, of size {size} "
                f"it must be {shape}"
            )
        if not bool(state[prefix + name].isfinite().all()):
            raise UserError(f"{path}: `{prefix + name}` holds NaN or infinite values")
    return {name: state[prefix + name] for name in shapes}


def shown(values: Iterable[Any]) -> list[str]:
    """The first few, none longer than a message can take."""
    texts = [str(value) for value in itertools.islice(values, 3)]
    return [text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..." for text in texts]


def kind_of(value: Any) -> str:
    """What something that is not a plain tensor is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    layout = (
        ""
        if value.layout == torch.strided
        else f" in the layout {str(value.layout).removeprefix('torch.')}"
    )
    return f"{value.dtype}{layout}{' without data (meta)' if value.device.type == 'meta' else ''}"


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
