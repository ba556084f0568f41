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
TILE_ELEMENTS = 2**20  # latents per forward of the network times their size: bounds its memory


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
        if len(set(layers)) < len(layers):
            raise UserError(f"flow.layers: {list(cfg.layers)} are the layers {list(layers)} of {num_layers}: one of them twice; name fewer")
        return cls(layers, num_layers, cfg.context, cfg.shift, tuple(cfg.times), cfg.network.depth, dict(backbone))

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> FlowSpec:
        """Read back what `asdict` wrote."""
        return cls(**{**tree, "layers": tuple(tree["layers"]), "times": tuple(tree["times"])})


@dataclass(frozen=True)
class Tile:
    """n tokens at all L hooked layers."""

    tokens: Tensor  # [n] positions among the batch's response tokens
    target: Tensor  # [L, n, D]
    context: Tensor  # [L, n, D]
    noise: Tensor  # [L, n, D]
    time_normal: Tensor  # [L, n] standard normal, for logit-normal times
    layer: Tensor  # [L, n] depth in [0, 1]


class FlowField:
    """Scores how far latents stray from the field, and learns from latents."""

    def __init__(
        self,
        spec: FlowSpec,
        network: VelocityNet | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """compute_dtype: of the network's products, the backbone's as published; weights, noise and errors stay in float32."""
        self.spec, self.compute_dtype = spec, compute_dtype
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
        for tile in self.tiles(latents, lengths, seeds):
            total = sum(debias_weight(t) * self.deviation(tile, t).mean(0) for t in self.spec.times)
            scores[tile.tokens] = total / len(self.spec.times)
        return scores * latents.valid

    def accumulate_gradient(self, latents: Latents, lengths: Sequence[int], seeds: Sequence[int], weights: Tensor) -> float:
        """Add the gradient of sum_n weights_n * deviation_n at the reward times, undebiased, to the network's parameters.

        weights: [N]; responses whose tokens all weigh nothing are not touched: their latents are rejected. Returns the weighted loss.
        """
        chosen = [b for b, part in enumerate(weights.split(list(lengths))) if bool((part > 0).any())]
        loss = 0.0
        for tile in self.tiles(latents, lengths, seeds, chosen):
            deviations = torch.stack([self.deviation(tile, t).mean(0) for t in self.spec.times]).mean(0)
            part = (deviations * weights[tile.tokens]).sum()
            part.backward()
            loss += part.item()
        return loss

    def deviation(self, tile: Tile, t: float | Tensor) -> Tensor:
        """Deviation of each latent of a tile at one time, or at times [L, n]. Returns [L, n] float32."""
        times = t if isinstance(t, Tensor) else torch.full_like(tile.layer, t)
        arguments = (x.flatten(0, 1) for x in (tile.target, tile.context, tile.noise, times, tile.layer))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
            return velocity_deviation(self.network, *arguments).view(tile.layer.shape)

    def tiles(self, latents: Latents, lengths: Sequence[int], seeds: Sequence[int], chosen: Sequence[int] | None = None) -> Iterator[Tile]:
        """Tokens of the chosen responses (default: all), a bounded number of latents at a time.

        Noise is drawn per response from its own seed, one draw shared by all times but not by layers, so that neighbours in the batch and
        its split change nothing.
        """
        room = max(1, TILE_ELEMENTS // (self.network.size * len(self.spec.layers)))
        starts = (torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)).tolist()
        tokens: list[Tensor] = []
        draws: list[Tensor] = []
        used = 0
        for b in range(len(lengths)) if chosen is None else chosen:
            draw = self._draw(lengths[b], seeds[b])
            rows = torch.arange(starts[b], starts[b] + lengths[b], device=self.device)
            while len(rows):
                taken = min(room - used, len(rows))
                tokens.append(rows[:taken])
                draws.append(draw[:, :taken])
                rows, draw, used = rows[taken:], draw[:, taken:], used + taken
                if used == room:
                    yield self._tile(latents, torch.cat(tokens), torch.cat(draws, dim=1))
                    tokens, draws, used = [], [], 0
        if tokens:
            yield self._tile(latents, torch.cat(tokens), torch.cat(draws, dim=1))

    def _tile(self, latents: Latents, tokens: Tensor, draw: Tensor) -> Tile:
        target, context = (latents.states.index_select(1, rows[tokens]).float() for rows in (latents.target, latents.context))
        depth = torch.tensor(self.spec.layers, device=self.device) / self.spec.num_layers
        return Tile(tokens, target, context, draw[..., :-1], draw[..., -1], depth[:, None].expand(-1, len(tokens)))

    def _draw(self, length: int, seed: int) -> Tensor:
        """[L, T, D + 1] standard normal: the noise, and in the last column the draw behind a random time."""
        generator = torch.Generator(self.device).manual_seed(seed)
        size = (len(self.spec.layers), length, self.network.size + 1)
        return torch.randn(size, generator=generator, device=self.device)

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and spec (JSON) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}, folder / WEIGHTS_FILE)
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self.spec), indent=1))

    @classmethod
    def load(
        cls, folder: str | Path, expected: FlowSpec, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32
    ) -> FlowField:
        """Read a field and check that it fits the run.

        Raises UserError that names the file, or each setting that differs with both its values: a field read on another side, layer, time
        or backbone than it was fitted on gives numbers without meaning.
        """
        folder = Path(folder)
        spec = read_spec(folder)
        check_spec(spec, expected, folder)
        field = cls(spec, device=device, compute_dtype=compute_dtype)
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
