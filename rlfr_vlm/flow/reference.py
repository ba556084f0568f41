"""The loss of v = x_t / t, which needs no field and knows nothing of latents: what lies above it
has learnt less than nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# mean of 1 / t^2 = (1 + e^-z)^2 over t = sigmoid(z), z standard normal
LOGIT_NORMAL = 1 + 2 * math.exp(0.5) + math.exp(2)


def unfit_loss(times: Sequence[float], drawn: str = "reward") -> float:
    """1 / t^2 on average, whatever the latents: at these times, or with drawn=logit_normal at
    random ones.
    """
    return LOGIT_NORMAL if drawn == "logit_normal" else sum(t**-2 for t in times) / len(times)
