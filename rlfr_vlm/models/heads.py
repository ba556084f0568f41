"""Small networks on the policy's last states: the value of a state, and FlowRL's partition
function. Their weights stay in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """V(s_t): one linear map without bias, init N(0, 1 / (D + 1)) as in OpenRLHF."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, 1, bias=False)
        nn.init.normal_(self.linear.weight, std=1 / (size + 1))

    def forward(self, states: Tensor) -> Tensor:
        """states: [N, D], those that predict each token. Returns [N] float32."""
        return self.linear(states.float())[:, 0]


class LogPartitionHead(nn.Module):
    """log Z(x): a three-layer MLP on the mean of the prompt's last states (FlowRL,
    arXiv:2509.15207).

    The published network has dropout between its layers, also while the loss is taken; this one has
    none, so that a run can be repeated.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(size, size),
            nn.GELU(),
            nn.LayerNorm(size),
            nn.Linear(size, size),
            nn.GELU(),
            nn.LayerNorm(size),
            nn.Linear(size, 1),
        )

    def forward(self, prompt_means: Tensor) -> Tensor:
        """prompt_means: [B, D]. Returns [B] float32."""
        return self.mlp(prompt_means.float())[:, 0]


def prompt_means(states: Tensor, prompt_start: Tensor, prompt_end: Tensor) -> Tensor:
    """Mean state over ALL tokens of each response's prompt, in float32; responses that share a
    prompt share its mean.

    states: [S, D]; prompt_start, prompt_end: [B] rows. Returns [B, D].
    """
    spans, index = torch.unique(
        torch.stack([prompt_start, prompt_end], dim=1), dim=0, return_inverse=True
    )
    means = [states[start:end].float().mean(0) for start, end in spans.tolist()]
    return torch.stack(means).index_select(0, index)
