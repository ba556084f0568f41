"""The flow field: its network, its fit, its reward and how it learns online."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlfr_vlm.config.algorithm import TokenRewardConfig
from rlfr_vlm.config.base import Section, refuse


class FlowNetworkConfig(Section):
    """The velocity network (METHOD: one network for all hooked layers, width = hidden size)."""

    depth: int = Field(
        4, ge=1, description="residual blocks (arXiv:2510.10201: 4 up to 3B, 6 above)"
    )


class FlowRewardConfig(TokenRewardConfig):
    """From deviations to token rewards."""

    draws: int = Field(
        1, ge=1, description="noise draws that a deviation is averaged over (as published: 1)"
    )
    at: Literal["target", "context"] = Field(
        "target",
        description="token that is charged: the target, or with context token_pre the one after "
        "it, whose arrival made the target unlikely",
    )


class FlowFitConfig(Section):
    """Offline flow matching on solutions: of experts, or of the model itself."""

    source: Literal["expert", "rollouts", "both"] = Field(
        "expert",
        description="what the field is fitted on: expert solutions (as published), the model's own "
        "right answers, or both",
    )
    steps: int | None = Field(
        None,
        ge=1,
        description="optimiser steps; default: `epochs` over the rows, or 2,400 with batch_tokens",
    )
    epochs: float = Field(
        2.0, gt=0, description="passes over the rows when neither `steps` nor `batch_tokens` is set"
    )
    batch_size: int = Field(
        128,
        ge=1,
        description="solutions per step; all of them where there are fewer; not read with "
        "batch_tokens",
    )
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens per step, from latents that are computed once; unset: whole solutions, "
        "computed anew (as published)",
    )
    patience: int = Field(
        4,
        ge=1,
        description="with batch_tokens: stop when so many of the 20 looks at the held-out "
        "deviation in a row were no better",
    )
    cache_gib: float = Field(
        8.0,
        gt=0,
        description="with batch_tokens: disk for latents, GiB; of rows beyond it, and how many, is "
        "told",
    )
    rollout_prompts: int = Field(
        512,
        ge=1,
        description="prompts of data.train that group_size responses are sampled to, where source "
        "or contrast need some",
    )
    probe_prompts: int = Field(
        0,
        ge=0,
        description="further prompts whose responses are sampled and graded to tell what the field "
        "knows of right and wrong; 0: none",
    )
    batch_mul: int = Field(4, ge=1, description="independent (noise, time) draws per latent")
    lr: float | None = Field(
        1e-4,
        gt=0,
        description="AdamW, cosine, 10 % warm-up; null: 0.384 over the size of the latents (3e-3 "
        "at 128)",
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW")
    max_tokens: int = Field(8192, ge=1, description="expert rows longer than this are bad rows")


class FlowOnlineConfig(Section):
    """Online update by rejection sampling."""

    enabled: bool = Field(
        True,
        description="follow the latents of selected responses during RL; false: the field is "
        "frozen",
    )
    lr: float = Field(1e-4, gt=0, description="AdamW(0.9, 0.95)")
    select: tuple[Literal["correct", "entropy"], ...] = Field(
        ("correct",),
        description="responses with a right answer, and tokens of high entropy; empty: everything",
    )
    entropy_quantile: float = Field(
        0.8,
        ge=0,
        le=1,
        description="select entropy: tokens at or above this quantile of their response",
    )
    soft_weight: float = Field(
        0.0, ge=0, le=1, description="weight of what is not selected; 0 rejects it"
    )
    times: Literal["reward", "logit_normal"] = Field(
        "reward", description="at the reward's times (as published), or as in offline fitting"
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="steps at the start in which only the field learns, the policy does not",
    )
    window: int = Field(
        0,
        ge=0,
        description="learn from the latents of so many last steps, in small steps; 0: from each "
        "update's own, in one (as published)",
    )
    updates: int = Field(
        20, ge=1, description="with window: small steps of the field per update of the policy"
    )
    batch_tokens: int = Field(256, ge=1, description="with window: tokens per small step")
    window_tokens: int = Field(
        8192,
        ge=1,
        description="with window: latents kept of each step, drawn at random where there are more",
    )
    networks: Literal["all", "contrast"] = Field(
        "all", description="contrast: the field itself stays as fitted, its contrast learns"
    )


class FlowConfig(Section):
    """The flow field and its reward; `null` in the YAML is plain RLVR."""

    profile: Literal["published", "informed"] = Field(
        "published",
        description="published: as released, to the letter; informed: what docs/flow_signal.md "
        "found to carry information",
    )
    checkpoint: str | None = Field(
        None,
        description="field written by `rlfr-vlm flow` or `import-flow`; none: a new, zero field",
    )
    layers: tuple[float, ...] = Field(
        (0.25, 0.5, 0.75), description="hooked decoder layers, as fractions of depth"
    )
    context: tuple[Literal["token_pre", "token_post", "identity"], ...] = Field(
        ("token_pre",),
        description="the token after, before, or the target itself; `a+b` or a list mixes them",
    )
    shift: tuple[int, ...] = Field(
        (1,), description="tokens between target and context; one for all contexts, or one each"
    )
    times: tuple[float, ...] = Field(
        (0.8,), description="flow times of the reward, between 0 (noise) and 1 (data)"
    )
    standardise: bool = Field(
        False,
        description="read latents less their mean, over their standard deviation, by layer and "
        "dimension, as the fit found them",
    )
    prompt_context: bool = Field(
        False,
        description="the last prompt token's latent beside the context: the field knows the "
        "question",
    )
    contrast: Literal["none", "own", "wrong"] = Field(
        "none",
        description="charge the deviation less that from a second field, under the same noise: one "
        "of the policy's own responses, ungraded, or "
        "of its wrong ones",
    )
    network: FlowNetworkConfig = FlowNetworkConfig()
    reward: FlowRewardConfig = FlowRewardConfig()
    fit: FlowFitConfig = FlowFitConfig()
    online: FlowOnlineConfig = FlowOnlineConfig()

    @field_validator("context", "shift", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """`a+b`, as in the published configs, or a single value."""
        if isinstance(value, str):
            return value.split("+")
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _places(self) -> FlowConfig:
        layers, times, shift = list(self.layers), list(self.times), list(self.shift)
        for p in layers:
            refuse(not 0 <= p <= 1, f"layers: {p} is not a fraction of depth between 0 and 1")
        refuse(
            layers != sorted(set(layers)), f"layers: {layers} must rise from the first to the last"
        )
        for t in times:
            refuse(
                not 0 < t < 1,
                f"times: {t} is not between 0 (noise, which weighs nothing) and 1 (data)",
            )
        refuse(len(set(times)) < len(times), f"times: {times} has one of them twice")
        refuse(
            not (layers and times and self.context),
            "layers, times and context need at least one value each",
        )
        refuse(any(s < 1 for s in shift), f"shift: {shift} must be 1 or more")
        refuse(
            len(shift) not in (1, len(self.context)),
            f"shift: {len(shift)} values for {len(self.context)} contexts; give one for all, or "
            "one each",
        )
        refuse(
            len(set(self.sides)) < len(self.sides),
            f"context: {'+'.join(self.context)} names the same context twice",
        )
        return self

    @model_validator(mode="after")
    def _combinations(self) -> FlowConfig:
        online, contrast = self.online, self.contrast != "none"
        refuse(
            online.warmup_steps and not online.enabled,
            "online.warmup_steps needs online.enabled: in these steps only the field learns",
        )
        refuse(
            self.reward.at == "context" and set(self.context) != {"token_pre"},
            "reward.at=context needs context token_pre alone, whose context stands after its "
            f"target: {'+'.join(self.context)}",
        )
        refuse(
            self.reward.at == "context" and len(self.context) > 1,
            "reward.at=context needs one context: with several there are several tokens to charge",
        )
        refuse(
            online.window and ("entropy" in online.select or online.soft_weight),
            "online.window takes responses whole or not at all: leave entropy out of "
            "online.select, and online.soft_weight at 0",
        )
        refuse(
            online.networks == "contrast" and not contrast,
            "online.networks=contrast needs flow.contrast: own or wrong",
        )
        needs = {
            "standardise": self.standardise,
            "contrast": contrast,
            "fit.source": self.fit.source != "expert",
        }
        refuse(
            any(needs.values()) and self.fit.batch_tokens is None,
            f"{next((name for name, wanted in needs.items() if wanted), '')} needs "
            "fit.batch_tokens (256, say): statistics and sampled responses come from latents "
            "computed once",
        )
        return self

    @property
    def sides(self) -> tuple[tuple[Literal["token_pre", "token_post", "identity"], int], ...]:
        """Each context with its shift; identity has none (0)."""
        shifts = self.shift * len(self.context) if len(self.shift) == 1 else self.shift
        return tuple(
            (mode, 0 if mode == "identity" else shift)
            for mode, shift in zip(self.context, shifts, strict=True)
        )
