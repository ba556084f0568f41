"""The velocity network: an MLP with adaptive layer norm, one for all hooked layers (MAR's diffusion
head, arXiv:2406.11838).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

EMBEDDING_SIZE = 256


class RMSNorm(nn.Module):
    """weight * x / rms(x), in float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D]; returns the same shape and dtype."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class ScalarEmbedding(nn.Module):
    """Fourier features of a scalar, then a two-layer MLP. The scalar is taken as it is, without
    DiT's factor 1000, as in the published code.
    """

    freqs: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = EMBEDDING_SIZE // 2
        self.register_buffer(
            "freqs", torch.exp(-math.log(10000.0) * torch.arange(half) / half)[None]
        )
        self.mlp = nn.Sequential(
            nn.Linear(EMBEDDING_SIZE, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, scalar: Tensor) -> Tensor:
        """scalar: [N]; returns [N, W]."""
        angles = scalar.to(self.freqs.dtype)[:, None] * self.freqs
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class ResidualBlock(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift); shift, scale and gate come from the
    condition.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.in_ln = RMSNorm(width, eps)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition: [N, W]; returns [N, W]."""
        shift, scale, gate = self.adaLN_modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Modulated norm, then the projection back to the latent's size."""

    def __init__(self, width: int, size: int, eps: float) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width, eps)
        self.linear = nn.Linear(width, size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x, condition: [N, W]; returns [N, D]."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class VelocityNet(nn.Module):
    """v(x_t, t, layer | context): the velocity from noise to data at flow time t.

    Parameter names follow the published network, so that its checkpoints map one to one.
    Modulations and the last projection start at
    zero: a new field is v = 0 everywhere.
    """

    def __init__(
        self,
        size: int,
        depth: int,
        eps: float = 1e-6,
        width: int | None = None,
        prompt_context: bool = False,
    ) -> None:
        """size: D of the latents; width: of the network, by default D; eps: the backbone's
        rms_norm_eps; prompt_context: whether the last prompt token's latent is a condition too.
        """
        super().__init__()
        width = width or size
        self.size, self.depth, self.width, self.eps = size, depth, width, eps
        self.input_proj = nn.Linear(size, width)
        self.cond_embed = nn.Linear(size, width)
        self.prompt_embed = nn.Linear(size, width) if prompt_context else None
        self.time_embed = ScalarEmbedding(width)
        self.layer_embed = ScalarEmbedding(width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width, eps) for _ in range(depth))
        self.final_layer = FinalLayer(width, size, eps)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)

    def forward(
        self, x_t: Tensor, t: Tensor, layer: Tensor, context: Tensor, prompt: Tensor | None = None
    ) -> Tensor:
        """x_t, context, prompt (where the network reads it): [N, D]; t in [0, 1] and layer depth in
        [0, 1]: [N]. Returns [N, D].
        """
        dtype = self.input_proj.weight.dtype
        condition = (
            self.cond_embed(context.to(dtype))
            + _embed_unique(self.time_embed, t)
            + _embed_unique(self.layer_embed, layer)
        )
        if self.prompt_embed is not None:
            assert prompt is not None
            condition = condition + self.prompt_embed(prompt.to(dtype))
        x = self.input_proj(x_t.to(dtype))
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)


def _embed_unique(embedding: ScalarEmbedding, scalar: Tensor) -> Tensor:
    """Embed each distinct value once: at reward time a batch holds one time and a few layers."""
    values, index = torch.unique(scalar, return_inverse=True)
    return (
        embedding(values).index_select(0, index) if len(values) < len(scalar) else embedding(scalar)
    )
