"""What a flow field was fitted as: bound to it, stored with it, and compared before it is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlfr_vlm.config import FlowConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.latents import ContextMode, Side, resolve_layers

SPEC_FILE = "flow_config.json"


Contrast = Literal["none", "own", "wrong"]


@dataclass(frozen=True)
class FlowSpec:
    """What a field was fitted on and how it is read; stored beside its weights, and compared with
    the run's before use.
    """

    layers: tuple[int, ...]  # decoder layers
    num_layers: int  # of the backbone; layer k enters the network as k / num_layers
    context: tuple[ContextMode, ...]  # several weigh the same
    shift: tuple[int, ...]  # one for each context, 0 for identity
    times: tuple[float, ...]
    depth: int
    backbone: dict[str, Any]
    # latents are read less their mean, over their standard deviation, by layer and dimension
    standardise: bool = False
    prompt_context: bool = False  # the last prompt token's latent is a condition too
    contrast: Contrast = "none"  # what the second network was fitted on
    statistics: str = ""  # digest of mean and deviation; "": none yet

    @classmethod
    def of(cls, cfg: FlowConfig, backbone: dict[str, Any]) -> FlowSpec:
        """The spec of a run: its config and its policy's identity."""
        num_layers = int(backbone["num_layers"])
        layers = resolve_layers(cfg.layers, num_layers)
        if len(set(layers)) < len(layers):
            raise UserError(
                f"flow.layers: {list(cfg.layers)} are the layers {list(layers)} of {num_layers}: "
                "one of them twice; name fewer"
            )
        modes, shifts = zip(*cfg.sides, strict=True)
        own = (cfg.standardise, cfg.prompt_context, cfg.contrast)
        return cls(
            layers,
            num_layers,
            modes,
            shifts,
            tuple(cfg.times),
            cfg.network.depth,
            dict(backbone),
            *own,
        )

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> FlowSpec:
        """Read back what `asdict` wrote."""
        return cls(
            **{
                **tree,
                **{name: tuple(tree[name]) for name in ("layers", "context", "shift", "times")},
            }
        )

    @property
    def sides(self) -> tuple[Side, ...]:
        """Each context with its shift."""
        return tuple(zip(self.context, self.shift, strict=True))


@dataclass(frozen=True)
class Scale:
    """Where latents lie, by layer and dimension: half of a model's mean square can sit in a
    hundredth of its dimensions.
    """

    mean: Tensor  # [L, D]
    std: Tensor  # [L, D], above 0

    def apply(self, states: Tensor) -> Tensor:
        """[L, n, D] -> the same, standardised."""
        return (states - self.mean[:, None]) / self.std[:, None]

    @property
    def digest(self) -> str:
        """Of both, to the bit."""
        data = torch.stack([self.mean, self.std]).detach().float().cpu().contiguous()
        return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def read_spec(folder: Path) -> FlowSpec:
    """The spec beside a field's weights. Raises UserError naming the file."""
    path = folder / SPEC_FILE
    try:
        return FlowSpec.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(
            f"flow.checkpoint: {path}: {error.strerror}; fit a field first with `rlfr-vlm flow`"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"flow.checkpoint: {path} is not a flow spec: {error}") from None


def check_spec(found: FlowSpec, expected: FlowSpec, folder: Path) -> None:
    """Raises UserError listing every setting in which a checkpoint and a run differ.

    An imported checkpoint does not know the weights it was fitted on: its fingerprint is "", which
    fits every run.
    """
    if not isinstance(found.backbone, dict):
        raise UserError(
            f"flow.checkpoint: {folder / SPEC_FILE} is not a flow spec: backbone is "
            f"{found.backbone!r}"
        )
    ours, theirs = asdict(expected), asdict(found)
    if expected.statistics == "":  # a config does not know them
        ours.pop("statistics")
    if found.backbone.get("fingerprint") == "":
        ours["backbone"].pop("fingerprint", None)
    ours |= {f"backbone.{k}": v for k, v in ours.pop("backbone").items()}
    theirs |= {f"backbone.{k}": v for k, v in theirs.pop("backbone").items()}
    differences = [
        f"{key}: checkpoint {_shown(theirs.get(key))}, run {_shown(value)}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if differences:
        raise UserError(
            f"flow.checkpoint: {folder} does not fit this run ({'; '.join(differences)}); fit a "
            "field for this backbone and config"
        )


def _shown(value: Any) -> Any:
    """Several values as configs write them: a+b."""
    return "+".join(str(part) for part in value) if isinstance(value, tuple | list) else value
