"""The files of a published flow checkpoint: found, read without running anything, and checked."""

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
from torch import Tensor

from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.field import WEIGHTS_FILE
from rlfr_vlm.flow.network import VelocityNet

MAX_VALUES, MAX_SHOWN = 64, 80  # values of a setting; characters of a foreign text in a message
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
