"""The flow field: a velocity network and everything that decides what its numbers mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlfr_vlm.config import FlowConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.latents import ContextMode, LatentRequest, Latents, resolve_layers
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.objective import debias_weight, velocity_deviation

WEIGHTS_FILE = "flow.safetensors"
SPEC_FILE = "flow_config.json"
ROW_TILE = 1024  # latents per forward of the network: bounds its memory


@dataclass(frozen=True)
class FlowSpec:
    """What a field was fitted on and how it is read; stored beside its weights, and compared with the run's before use."""

    layers: tuple[int, ...]  # decoder layers
    num_layers: int  # of the backbone; layer k enters the network as k / num_layers
    context: ContextMode
    shift: int
    times: tuple[float, ...]
    depth: int
    backbone: dict[str, Any]

    @classmethod
    def of(cls, cfg: FlowConfig, backbone: dict[str, Any]) -> FlowSpec:
        """The spec of a run: its config and its policy's identity."""
        num_layers = int(backbone["num_layers"])
        layers = resolve_layers(cfg.layers, num_layers)
        return cls(layers, num_layers, cfg.context, cfg.shift, tuple(cfg.times), cfg.network.depth, dict(backbone))

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> FlowSpec:
        """Read back what `asdict` wrote."""
        return cls(**{**tree, "layers": tuple(tree["layers"]), "times": tuple(tree["times"])})


class FlowField:
    """Scores how far latents stray from the field, and learns from latents."""

    def __init__(self, spec: FlowSpec, network: VelocityNet | None = None, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        if network is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = VelocityNet(spec.backbone["hidden_size"], spec.depth, spec.backbone["rms_norm_eps"])
        self.network = network.to(device)
        self.device = torch.device(device)

    @property
    def request(self) -> LatentRequest:
        """The latents this field reads."""
        return LatentRequest(self.spec.layers, self.spec.context, self.spec.shift)

    @torch.no_grad()
    def score(self, latents: Latents, lengths: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Deviation score of each response token: mean over layers and times of t / (1 - t) * deviation (arXiv:2510.10201).

        lengths, seeds: one per response of the packed batch. Returns [N] float32; 0 where the token has no context.
        """
        scores = torch.zeros(len(latents.target), device=self.device)
        for tokens, target, context, noise, layer in self._tiles(latents, lengths, seeds, range(len(lengths))):
            total = sum(
                debias_weight(t) * self._deviation(target, context, noise, t, layer).unflatten(0, (len(self.spec.layers), -1)).mean(0)
                for t in self.spec.times
            )
            scores[tokens] = total / len(self.spec.times)
        return scores * latents.valid

    def accumulate_gradient(self, latents: Latents, lengths: Sequence[int], seeds: Sequence[int], weights: Sequence[float]) -> float:
        """Add the gradient of sum_b weights_b * mean_t deviation_bt at the reward times, undebiased, to the network's parameters.

        Responses of weight zero are not touched: their latents are rejected (arXiv:2510.10201). Returns the weighted loss.
        """
        chosen = [b for b, weight in enumerate(weights) if weight > 0]
        per_token = self._token_weights(latents, lengths, weights)
        loss = 0.0
        for tokens, target, context, noise, layer in self._tiles(latents, lengths, seeds, chosen):
            tiled = per_token[tokens].repeat(len(self.spec.layers)) / (len(self.spec.layers) * len(self.spec.times))
            part = sum((self._deviation(target, context, noise, t, layer) * tiled).sum() for t in self.spec.times)
            assert isinstance(part, Tensor)
            part.backward()
            loss += part.item()
        return loss

    def _deviation(self, target: Tensor, context: Tensor, noise: Tensor, t: float, layer: Tensor) -> Tensor:
        return velocity_deviation(self.network, target, context, noise, torch.full_like(layer, t), layer)

    def _token_weights(self, latents: Latents, lengths: Sequence[int], weights: Sequence[float]) -> Tensor:
        """A response's weight shared out over its tokens that have a context. [N]."""
        parts = [
            mask * (weight / max(int(mask.sum()), 1))
            for mask, weight in zip(latents.valid.float().split(list(lengths)), weights, strict=True)
        ]
        return torch.cat(parts)

    def _tiles(
        self, latents: Latents, lengths: Sequence[int], seeds: Sequence[int], chosen: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Whole responses, a bounded number of rows at a time: token indices [n], then target, context, noise [L * n, D], layer [L * n].

        Noise is drawn per response from its own seed, one draw shared by all times but not by layers, so that neighbours in the batch and
        its split change nothing.
        """
        starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        depth = torch.tensor(self.spec.layers, device=self.device) / self.spec.num_layers
        tile: list[int] = []
        for position, b in enumerate(chosen):
            tile.append(b)
            following = lengths[chosen[position + 1]] if position + 1 < len(chosen) else ROW_TILE
            if (sum(lengths[i] for i in tile) + following) * len(self.spec.layers) <= ROW_TILE and position + 1 < len(chosen):
                continue
            tokens = torch.cat([torch.arange(int(starts[i]), int(starts[i]) + lengths[i]) for i in tile]).to(self.device)
            noise = torch.cat([self._noise(lengths[i], seeds[i]) for i in tile], dim=1)
            target = latents.states.index_select(1, latents.target[tokens]).float()
            context = latents.states.index_select(1, latents.context[tokens]).float()
            yield tokens, target.flatten(0, 1), context.flatten(0, 1), noise.flatten(0, 1), depth.repeat_interleave(len(tokens))
            tile = []

    def _noise(self, length: int, seed: int) -> Tensor:
        """[L, T, D] standard normal."""
        generator = torch.Generator(self.device).manual_seed(seed)
        size = (len(self.spec.layers), length, self.network.size)
        return torch.randn(size, generator=generator, device=self.device)

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and spec (JSON) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self.spec), indent=1))

    @classmethod
    def load(cls, folder: str | Path, expected: FlowSpec, device: torch.device | str = "cpu") -> FlowField:
        """Read a field and check that it fits the run.

        Raises UserError that names the file, or each setting that differs with both its values: a field read on another side, layer, time
        or backbone than it was fitted on gives numbers without meaning.
        """
        folder = Path(folder)
        spec = read_spec(folder)
        check_spec(spec, expected, folder)
        field = cls(spec, device=device)
        try:
            weights = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(f"flow.checkpoint: {folder / WEIGHTS_FILE} cannot be read: {error}") from None
        own = field.network.state_dict()
        if weights.keys() != own.keys():
            missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
            raise UserError(f"flow.checkpoint: {folder / WEIGHTS_FILE}: missing keys {missing[:3]}, unexpected keys {extra[:3]}")
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape:
                raise UserError(
                    f"flow.checkpoint: {folder / WEIGHTS_FILE}: `{name}` is {tuple(tensor.shape)}, the spec says {tuple(own[name].shape)}"
                )
        field.network.load_state_dict(weights)
        return field


def read_spec(folder: Path) -> FlowSpec:
    """The spec beside a field's weights. Raises UserError naming the file."""
    path = folder / SPEC_FILE
    try:
        return FlowSpec.from_json(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(f"flow.checkpoint: {path}: {error.strerror}; fit a field first with `rlfr-vlm flow`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"flow.checkpoint: {path} is not a flow spec: {error}") from None


def check_spec(found: FlowSpec, expected: FlowSpec, folder: Path) -> None:
    """Raises UserError listing every setting in which a checkpoint and a run differ."""
    ours, theirs = asdict(expected), asdict(found)
    ours |= {f"backbone.{k}": v for k, v in ours.pop("backbone").items()}
    theirs |= {f"backbone.{k}": v for k, v in theirs.pop("backbone").items()}
    differences = [f"{key}: checkpoint {theirs.get(key)}, run {value}" for key, value in ours.items() if theirs.get(key) != value]
    if differences:
        raise UserError(
            f"flow.checkpoint: {folder} does not fit this run ({'; '.join(differences)}); fit a field for this backbone and config"
        )
