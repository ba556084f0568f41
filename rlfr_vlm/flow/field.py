"""The flow field: a velocity network and everything that decides what its numbers mean."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlfr_vlm.errors import UserError
from rlfr_vlm.faults import faultpoint, poison
from rlfr_vlm.finite import check_finite
from rlfr_vlm.flow.latents import LatentRequest, Latents
from rlfr_vlm.flow.network import VelocityNet
from rlfr_vlm.flow.objective import debias_weight, logit_normal_times, velocity_deviation
from rlfr_vlm.flow.reward import TokenTypes
from rlfr_vlm.flow.spec import SPEC_FILE, FlowSpec, Scale, check_spec, read_spec
from rlfr_vlm.types import request_seed

WEIGHTS_FILE = "flow.safetensors"
TILE_ELEMENTS = 2**20  # latents per forward of the network times their size: bounds its memory
CONTRAST, SCALE, TYPES = (
    "contrast.",
    "scale.",
    "types.",
)  # what a field's file holds beside the published network's tensors


@dataclass(frozen=True)
class Tile:
    """n tokens with their context on one side, at all L hooked layers."""

    tokens: Tensor  # [n] positions among the batch's response tokens
    share: Tensor  # [n] one over the number of sides on which the token has a context
    target: Tensor  # [L, n, D]
    context: Tensor  # [L, n, D]
    noise: Tensor  # [L, n, D]
    time_normal: Tensor  # [L, n] standard normal, for logit-normal times
    layer: Tensor  # [L, n] depth in [0, 1]
    prompt: Tensor | None = None  # [L, n, D] the last prompt token's


class FlowField:
    """Scores how far latents stray from the field, and learns from latents.

    Attributes: `network` the field's own; `contrast` a second one, fitted on what is to be told
        from it, or None; `scale` of the latents;
    `types` what deviations are usual for a token, by its id.
    """

    def __init__(
        self,
        spec: FlowSpec,
        network: VelocityNet | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        contrast: VelocityNet | None = None,
        scale: Scale | None = None,
        types: TokenTypes | None = None,
    ) -> None:
        """compute_dtype: of the network's products, the backbone's as published; weights, noise and
        errors stay in float32.
        """
        self.spec, self.compute_dtype = spec, compute_dtype
        if network is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = VelocityNet(
                    spec.backbone["hidden_size"],
                    spec.depth,
                    spec.backbone["rms_norm_eps"],
                    prompt_context=spec.prompt_context,
                )
        self.network = network.to(device)
        if spec.contrast != "none" and contrast is None:
            # from the same weights the difference starts at exactly 0
            contrast = copy.deepcopy(network)
        self.contrast = None if contrast is None else contrast.to(device)
        self.device = torch.device(device)
        self.types = types
        self.scale: Scale | None = None
        if scale is not None:
            self.set_scale(scale)

    def set_scale(self, scale: Scale) -> None:
        """Read latents less this mean and over this deviation from now on; the spec remembers their
        digest.
        """
        self.scale = Scale(
            scale.mean.to(self.device, torch.float32), scale.std.to(self.device, torch.float32)
        )
        self.spec = replace(self.spec, statistics=self.scale.digest)

    @property
    def networks(self) -> dict[str, VelocityNet]:
        """The networks that there are, by name."""
        return {"network": self.network} | (
            {} if self.contrast is None else {"contrast": self.contrast}
        )

    @property
    def request(self) -> LatentRequest:
        """The latents this field reads."""
        return LatentRequest(self.spec.layers, self.spec.sides, self.spec.prompt_context)

    def score(
        self, latents: Latents, lengths: Sequence[int], seeds: Sequence[int], draws: int = 1
    ) -> Tensor:
        """Deviation score of each response token: mean over layers, times, its sides and noise
        draws of t / (1 - t) * deviation (arXiv:2510.10201).

        lengths, seeds: one per response of the packed batch. Returns [N] float32; 0 where the token
            has no context.
        """
        return self._scores(latents, lengths, seeds, draws, [self.network])[0]

    def score_both(
        self, latents: Latents, lengths: Sequence[int], seeds: Sequence[int], draws: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """The score of `score`, and the same of the contrast's network under the same noise; None
        where there is none. [N] each.
        """
        scores = self._scores(latents, lengths, seeds, draws, list(self.networks.values()))
        return scores[0], scores[1] if len(scores) > 1 else None

    @torch.no_grad()
    def _scores(
        self,
        latents: Latents,
        lengths: Sequence[int],
        seeds: Sequence[int],
        draws: int,
        networks: Sequence[VelocityNet],
    ) -> list[Tensor]:
        scores = [torch.zeros(len(latents.target), device=self.device) for _ in networks]
        for draw in range(draws):
            for tile in self.tiles(latents, lengths, [draw_seed(seed, draw) for seed in seeds]):
                for network, column in zip(networks, scores, strict=True):
                    column.index_add_(
                        0, tile.tokens, self.weighted(tile, network) * tile.share / draws
                    )
        return [poison("flow_score", column) for column in scores]

    def weighted(self, tile: Tile, network: VelocityNet) -> Tensor:
        """Mean over layers and reward times of t / (1 - t) * deviation, of each token of a tile.
        Returns [n] float32.
        """
        return torch.stack(
            [debias_weight(t) * self.deviation(tile, t, network).mean(0) for t in self.spec.times]
        ).mean(0)

    def accumulate_gradient(
        self,
        latents: Latents,
        lengths: Sequence[int],
        seeds: Sequence[int],
        weights: Tensor,
        times: Literal["reward", "logit_normal"] = "reward",
        network: VelocityNet | None = None,
    ) -> float:
        """Add the gradient of sum_n weights_n * deviation_n, undebiased, to a network's parameters
        (default: the field's own): at the reward times, or random ones.

        weights: [N]; responses whose tokens all weigh nothing are not touched: their latents are
            rejected. Returns the weighted loss.
        """
        chosen = [
            b for b, part in enumerate(weights.split(list(lengths))) if bool((part > 0).any())
        ]
        loss = 0.0
        for tile in self.tiles(latents, lengths, seeds, chosen):
            deviations = self.losses(tile, times, network)
            part = poison("flow_loss", (deviations * tile.share * weights[tile.tokens]).sum())
            part.backward()
            loss += part.item()
        return loss

    def losses(
        self,
        tile: Tile,
        times: Literal["reward", "logit_normal"],
        network: VelocityNet | None = None,
    ) -> Tensor:
        """Deviation of each token of a tile, undebiased, over its layers and over the reward times,
        or at random ones. Returns [n] float32.
        """
        at: Sequence[float | Tensor] = (
            self.spec.times if times == "reward" else [logit_normal_times(tile.time_normal)]
        )
        return torch.stack([self.deviation(tile, t, network).mean(0) for t in at]).mean(0)

    def deviation(
        self, tile: Tile, t: float | Tensor, network: VelocityNet | None = None
    ) -> Tensor:
        """Deviation of each latent of a tile at one time, or at times [L, n], from a network
        (default: the field's). Returns [L, n] float32.
        """
        times = t if isinstance(t, Tensor) else torch.full_like(tile.layer, t)
        arguments = (
            x.flatten(0, 1) for x in (tile.target, tile.context, tile.noise, times, tile.layer)
        )
        velocity: Any = network or self.network
        if tile.prompt is not None:
            velocity = partial(velocity, prompt=tile.prompt.flatten(0, 1))
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16
        ):
            return velocity_deviation(velocity, *arguments).view(tile.layer.shape)

    def tiles(
        self,
        latents: Latents,
        lengths: Sequence[int],
        seeds: Sequence[int],
        chosen: Sequence[int] | None = None,
    ) -> Iterator[Tile]:
        """Tokens of the chosen responses (default: all) that have a context, side by side, a
        bounded number of latents at a time.

        Noise is drawn per response from its own seed, one draw shared by all times and sides but
        not by layers, so that neighbours in the batch and its split change nothing.
        """
        for side in range(len(self.spec.sides)):
            yield from self._side_tiles(
                latents, side, lengths, seeds, range(len(lengths)) if chosen is None else chosen
            )

    def _side_tiles(
        self,
        latents: Latents,
        side: int,
        lengths: Sequence[int],
        seeds: Sequence[int],
        chosen: Sequence[int],
    ) -> Iterator[Tile]:
        room = max(1, TILE_ELEMENTS // (self.network.size * len(self.spec.layers)))
        starts = (torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)).tolist()
        tokens: list[Tensor] = []
        draws: list[Tensor] = []
        used = 0
        for b in chosen:
            inside = latents.valid[side, starts[b] : starts[b] + lengths[b]].nonzero().flatten()
            draw = self.draw(lengths[b], seeds[b]).index_select(1, inside)
            rows = starts[b] + inside
            while len(rows):
                taken = min(room - used, len(rows))
                tokens.append(rows[:taken])
                draws.append(draw[:, :taken])
                rows, draw, used = rows[taken:], draw[:, taken:], used + taken
                if used == room:
                    yield self.tile(latents, side, torch.cat(tokens), torch.cat(draws, dim=1))
                    tokens, draws, used = [], [], 0
        if tokens:
            yield self.tile(latents, side, torch.cat(tokens), torch.cat(draws, dim=1))

    def tile(self, latents: Latents, side: int, tokens: Tensor, draw: Tensor) -> Tile:
        """These tokens, each with a context on this side, under this draw of noise. tokens: [n]
        int; draw: [L, n, D + 1].
        """
        rows = [
            latents.target,
            latents.context[side],
            *([latents.prompt] if latents.prompt is not None else []),
        ]
        target, context, *prompt = (self._read(latents.states, each[tokens]) for each in rows)
        share = (1.0 / latents.valid[:, tokens].sum(0)).to(self.device)
        depth = torch.tensor(self.spec.layers, device=self.device) / self.spec.num_layers
        noise, normal = draw[..., :-1], draw[..., -1]
        return Tile(
            tokens,
            share,
            target,
            context,
            noise,
            normal,
            depth[:, None].expand(-1, len(tokens)),
            *prompt,
        )

    def _read(self, states: Tensor, rows: Tensor) -> Tensor:
        """Rows of latents as the networks see them. [L, R, D] -> [L, n, D] float32."""
        # index_select would copy all of a file's view first
        found = states[:, rows.to(states.device)].to(self.device).float()
        if self.spec.standardise:
            if self.scale is None:
                raise ValueError(
                    "the field reads standardised latents, but nothing says where they lie: fit it "
                    "first"
                )
            found = self.scale.apply(found)
        return found

    def draw(self, length: int, seed: int) -> Tensor:
        """[L, T, D + 1] standard normal: the noise, and in the last column the draw behind a random
        time.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        size = (len(self.spec.layers), length, self.network.size + 1)
        return torch.randn(size, generator=generator, device=self.device)

    def save(self, folder: str | Path) -> None:
        """Write weights (safetensors) and then the spec (JSON) into a folder, each whole or not at
        all: beside a spec the weights are whole.

        Raises NonFiniteWeightError naming a weight that holds NaN or an infinity.
        """
        network = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()
        }
        check_finite(
            {name: tensor for name, tensor in network.items() if tensor.is_floating_point()},
            "a field's checkpoint",
        )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPEC_FILE).unlink(missing_ok=True)
        weights, spec = (folder / f".tmp-{name}" for name in (WEIGHTS_FILE, SPEC_FILE))
        spec.write_text(json.dumps(asdict(self.spec), indent=1))
        save_file(network, weights)
        faultpoint("field_weights")
        weights.replace(folder / WEIGHTS_FILE)
        faultpoint("field_spec")
        spec.replace(folder / SPEC_FILE)

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the field that is a number, by the name under which its file holds it."""
        found = dict(self.network.state_dict())
        if self.contrast is not None:
            found |= {
                CONTRAST + name: tensor for name, tensor in self.contrast.state_dict().items()
            }
        for prefix, part in ((SCALE, self.scale), (TYPES, self.types)):
            found |= (
                {}
                if part is None
                else {prefix + name: tensor for name, tensor in vars(part).items()}
            )
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take what `tensors` of a field of the same spec gave."""
        parts = {prefix: _part(tensors, prefix) for prefix in (CONTRAST, SCALE, TYPES)}
        self.network.load_state_dict(
            {name: t for name, t in tensors.items() if not name.startswith(tuple(parts))}
        )
        if self.contrast is not None:
            self.contrast.load_state_dict(parts[CONTRAST])
        if parts[SCALE]:
            self.set_scale(Scale(**parts[SCALE]))
        self.types = TokenTypes(**parts[TYPES]) if parts[TYPES] else None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        expected: FlowSpec,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
    ) -> FlowField:
        """Read a field and check that it fits the run.

        Raises UserError that names the file, or each setting that differs with both its values: a
        field read on another side, layer, time or backbone than it was fitted on gives numbers
        without meaning.
        """
        folder = Path(folder)
        spec = read_spec(folder)
        check_spec(spec, expected, folder)
        field = cls(spec, device=device, compute_dtype=compute_dtype)
        try:
            weights = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"flow.checkpoint: {folder / WEIGHTS_FILE} cannot be read: {error}"
            ) from None
        own = field.tensors()
        given = {name for name in weights if not name.startswith((SCALE, TYPES))}
        if given != own.keys():
            missing, extra = sorted(own.keys() - given), sorted(given - own.keys())
            raise UserError(
                f"flow.checkpoint: {folder / WEIGHTS_FILE}: missing keys {missing[:3]}, unexpected "
                f"keys {extra[:3]}"
            )
        for name in sorted(given):
            if weights[name].shape != own[name].shape:
                raise UserError(
                    f"flow.checkpoint: {folder / WEIGHTS_FILE}: `{name}` is "
                    f"{tuple(weights[name].shape)}, the spec says {tuple(own[name].shape)}"
                )
        field._check_parts(weights, folder)
        field.load_tensors(weights)
        if field.spec.statistics != spec.statistics:
            raise UserError(
                f"flow.checkpoint: {folder / WEIGHTS_FILE} and {SPEC_FILE} are not of one fit: "
                f"mean and deviation of the latents are {field.spec.statistics or 'missing'}, the "
                f"spec says {spec.statistics or 'none'}; fit the field anew"
            )
        return field

    def _check_parts(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Raises UserError naming what is missing or misshapen among the statistics of a
        checkpoint.
        """
        shape = (len(self.spec.layers), self.network.size)
        scale, types = _part(weights, SCALE), _part(weights, TYPES)
        good = {name: tuple(tensor.shape) for name, tensor in scale.items()} == (
            dict.fromkeys(("mean", "std"), shape) if self.spec.standardise else {}
        )
        if not good:
            raise UserError(
                f"flow.checkpoint: {folder / WEIGHTS_FILE}: `scale.mean` and `scale.std` must be "
                f"{shape} where standardise is set"
            )
        if types and (
            types.keys() != {"ids", "mean", "std"}
            or not len(types["mean"]) == len(types["std"]) == len(types["ids"]) + 1
        ):
            raise UserError(
                f"flow.checkpoint: {folder / WEIGHTS_FILE}: `types.*` is no table of token types"
            )


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def draw_seed(seed: int, draw: int) -> int:
    """Seed of a response's further noise draws; the first has the seed as it is."""
    return seed if draw == 0 else request_seed("draw", seed, draw)
