"""The policy objective, and shaping that needs no flow field."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlfr_vlm.config.base import Section, refuse
from rlfr_vlm.config.methods import DUAL_CLIPPED, PER_SEQUENCE, Loss, Method


class KlConfig(Section):
    """Divergence from the reference policy."""

    coef: float = Field(
        0.0, ge=0, description="weight; 0: none, and no reference policy is loaded for it"
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="of http://joschu.net/blog/kl-approx.html; in the loss, k1 has no gradient in "
        "expectation",
    )
    place: Literal["loss", "reward"] = Field(
        "loss", description="added to the loss (GRPO) or taken from each token's reward (PPO)"
    )


class ValueConfig(Section):
    """The value head of PPO: one linear map from the policy's last state."""

    lr: float = Field(
        9e-6, gt=0, description="of the head (OpenRLHF's critic: 9e-6); AdamW without weight decay"
    )
    coef: float = Field(
        0.1,
        gt=0,
        description="weight of the value loss beside the policy's: its gradient reaches the shared "
        "backbone",
    )
    clip: float = Field(0.2, gt=0, description="a new value stays within this of the old one (PPO)")


class FlowRLConfig(Section):
    """FlowRL (arXiv:2509.15207): match the distribution of rewards."""

    beta: float = Field(
        15.0, gt=0, description="inverse temperature of the reward (arXiv:2509.15207: 15)"
    )
    lr: float = Field(
        1e-4,
        gt=0,
        description="of the partition function (as published: 1e-6, at which it hardly moves)",
    )
    weight_decay: float = Field(
        0.1, ge=0, description="of the partition function (arXiv:2509.15207: 0.1)"
    )


class AlgorithmConfig(Section):
    """The policy objective. `method` sets what it defines, here and in other sections, wherever the
    config is silent; named on the command line over a file with another method, it also drops that
    file's settings of methods: see methods.py.
    """

    method: Method = Field(
        "grpo", description="published objective whose settings are the defaults"
    )
    advantage: Literal["group", "centred", "leave_one_out", "whitened", "gae"] = Field(
        "group",
        description="outcome normalised or centred within its group, less its siblings' mean, "
        "whitened over the batch, or GAE",
    )
    loss: Loss = Field(
        "clip",
        description="of token ratios (clip; cispo: their clipped weight times the log-prob), of "
        "sequence ratios (gspo, gmpo), or trajectory balance (flowrl)",
    )
    clip_low: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="ratio clipped at 1 - clip_low (gmpo: log-ratio at -clip_low; cispo: not)",
    )
    clip_high: float = Field(
        0.2, gt=0, description="ratio clipped at 1 + clip_high (gmpo: log-ratio at clip_high)"
    )
    dual_clip: float | None = Field(
        None, description="bound c > 1 of the loss where the advantage is negative (verl: 3)"
    )
    loss_aggregation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="mean over tokens; per-sequence means averaged (RLFR as published); sums over "
        "max_new_tokens (Dr. GRPO)",
    )
    updates_per_rollout: int = Field(
        1, ge=1, description="optimiser steps per batch of rollouts; 1 is on-policy"
    )
    gamma: float = Field(1.0, gt=0, le=1, description="discount of rewards to come")
    gae_lambda: float = Field(
        1.0, ge=0, le=1, description="GAE's bias against variance; 1: plain return less value"
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="weigh each token's loss by min(pi_old / pi_rollout, cap): the engine's "
        "log-probs are not the trainer's",
    )
    reference: str | None = Field(
        None, description="folder or hub name of the reference policy; default: model.path"
    )
    kl: KlConfig = KlConfig()
    value: ValueConfig = ValueConfig()
    flowrl: FlowRLConfig = FlowRLConfig()

    @property
    def looks_at_whole_batch(self) -> bool:
        """Whether advantages are taken over the batch and not within groups."""
        return self.advantage in ("whitened", "gae")

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of a reference policy enter the loss."""
        return self.kl.coef > 0 or self.loss == "flowrl"

    @model_validator(mode="after")
    def _exclusions(self) -> AlgorithmConfig:
        flowrl = self.loss == "flowrl"
        refuse(
            self.dual_clip is not None and self.dual_clip <= 1,
            f"dual_clip={self.dual_clip} must be above 1",
        )
        refuse(
            self.dual_clip is not None and self.loss not in DUAL_CLIPPED,
            f"dual_clip has no meaning with loss={self.loss}",
        )
        refuse(
            self.loss in PER_SEQUENCE and self.loss_aggregation != "sequence",
            f"loss={self.loss} is one number per sequence: loss_aggregation must be sequence, not "
            f"{self.loss_aggregation}",
        )
        refuse(
            flowrl and self.advantage != "group",
            "loss=flowrl takes the group-normalised outcome: advantage must be group, not "
            f"{self.advantage}",
        )
        refuse(
            flowrl and self.kl.coef > 0,
            "loss=flowrl has the reference policy in its residual: kl.coef must be 0",
        )
        refuse(
            flowrl and self.importance_cap is not None,
            "loss=flowrl has its own importance weight: importance_cap must be unset",
        )
        refuse(flowrl and self.gamma != 1, "loss=flowrl takes whole responses: gamma must be 1")
        refuse(
            self.gae_lambda != 1 and self.advantage != "gae",
            f"gae_lambda={self.gae_lambda} is read with advantage=gae only",
        )
        refuse(
            self.reference is not None and not self.needs_reference,
            "reference is set, but nothing uses it: set kl.coef above 0, or loss=flowrl",
        )
        return self


class TokenRewardConfig(Section):
    """From token scores to token rewards; the same for flow deviations and for likelihood
    shaping.
    """

    coef: float = Field(
        0.01, ge=0, description="weight of the token reward (arXiv:2510.10201: 0.01); 0: none"
    )
    normalise: Literal["minmax", "bilateral", "mean", "group", "group_z", "token_type"] = Field(
        "minmax",
        description="within each response (as published): minmax, penalty only, or signed "
        "bilateral and mean; their level is lost, so that a "
        "response that strays everywhere is charged no more than one that strays nowhere. Keeping "
        "it: over all siblings of the prompt, "
        "group in [0, 1], group_z in standard deviations; token_type in standard deviations of the "
        "token's id on the data of the fit",
    )
    threshold: float = Field(
        0.6, description="keep scores beyond it (signed: by absolute value); <= 0: keep all"
    )
    top_k: int = Field(
        15,
        ge=0,
        description="keep the k largest per response (signed: k/2 of each sign); 0: keep all",
    )
    gamma: float = Field(1.0, gt=0, description="power of the score's size")
    credit: Literal["to_go", "token"] = Field(
        "to_go",
        description="a reward, summed to the end, which charges every token before it as well (as "
        "published); or an advantage of its own "
        "token, centred as `centre` says",
    )
    centre: Literal["group", "type"] = Field(
        "group",
        description="with credit=token: less the mean over the group's tokens, or over all tokens "
        "of the step with the same id, so that no "
        "kind of token is preferred for itself; the latter takes a scoring pass over the step "
        "before its update",
    )

    @model_validator(mode="after")
    def _signed_top_k(self) -> TokenRewardConfig:
        if self.normalise in ("minmax", "group") and self.threshold >= 1:
            raise ValueError(
                f"threshold={self.threshold} keeps nothing: {self.normalise} scores lie in [0, 1]"
            )
        if self.normalise not in ("minmax", "group") and self.top_k == 1:
            raise ValueError(
                "top_k=1 keeps nothing with a signed normalise: half of it goes to each sign; use "
                "0 or at least 2"
            )
        if self.centre == "type" and self.credit != "token":
            raise ValueError("centre=type is read with credit=token only: rewards are not centred")
        return self


class EntropyShapingConfig(Section):
    """A_t + min(alpha * H_t, |A_t| / kappa) (arXiv:2506.14758)."""

    alpha: float = Field(
        0.4,
        gt=0,
        description="weight of the token's entropy in nats (arXiv:2506.14758: 0.4 with GRPO, 0.1 "
        "with PPO)",
    )
    kappa: float = Field(
        2.0,
        gt=1,
        description="the bonus is at most |A_t| / kappa; above 1 no advantage changes its sign",
    )


class LikelihoodShapingConfig(TokenRewardConfig):
    """Token rewards from the policy's own likelihood, through the pipeline of the flow reward:
    latent against logit.
    """

    signal: Literal["surprisal", "entropy"] = Field(
        "surprisal",
        description="score of a token: -log pi_old(y_t), or the entropy where it was drawn",
    )
    sign: Literal[-1, 1] = Field(
        -1, description="-1 charges for a high score, as the flow reward does; 1 pays for it"
    )


class ShapingConfig(Section):
    """The baselines that shape advantages or token rewards without a flow field."""

    entropy: EntropyShapingConfig | None = Field(
        None, description="a bonus on the advantages of uncertain tokens; none where unset"
    )
    likelihood: LikelihoodShapingConfig | None = Field(
        None, description="token rewards from likelihood; none where unset"
    )
