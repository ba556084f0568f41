"""The sections of the configuration: frozen, validated classes; every field says what it does, in
which unit, and where its default is from.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class LoraConfig(Section):
    """Low-rank adapters (arXiv:2106.09685), by peft, without dropout; engines and exported models
    get them merged into the weights.
    """

    rank: int = Field(16, ge=1, description="of each adapter")
    alpha: int = Field(32, gt=0, description="the adapters' product is scaled by alpha / rank")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers of the language tower",
    )


class ModelConfig(Section):
    """The policy."""

    path: str = Field(description="folder or hub name of a Hugging Face model")
    gguf_file: str | None = Field(None, description="file inside `path`, for checkpoints in GGUF")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of the weights in forward and backward"
    )
    master_weights: bool = Field(
        True,
        description="keep fp32 weights and optimiser state beside bfloat16 ones (at lr 1e-6 bf16 "
        "steps vanish)",
    )
    gradient_checkpointing: Literal["off", "reentrant", "nonreentrant"] = Field(
        "off", description="recompute layers in the backward"
    )
    freeze_vision: bool = Field(
        True, description="keep the vision tower as it is (RLFR's VLM recipes do)"
    )
    lora: LoraConfig | None = Field(
        None, description="train low-rank adapters of the language tower instead of its weights"
    )
    trust_remote_code: bool = Field(False, description="run Python code found in the model folder")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads `off` as false."""
        return "off" if value is False else value


class DataConfig(Section):
    """Prompts, their pictures and their gold answers."""

    train: str | None = Field(
        None,
        description="JSONL, JSON or Parquet file, or `hub-name@split`, `hub-name:config@split`",
    )
    eval: str | None = Field(
        None, description="held-out rows for `eval` and for evaluation during training"
    )
    expert: str | None = Field(
        None, description="rows with a `response` (an expert solution): what the flow is fitted on"
    )
    media_dirs: tuple[str, ...] = Field(
        (), description="folders that picture paths may point into, besides the data file's own"
    )
    allow_urls: bool = Field(False, description="let rows name pictures by http(s) URL")
    system: str | None = Field(
        None, description="system message put before every prompt that has none"
    )
    suffix: str = Field("", description="text put after every user question")
    min_pixels: int = Field(4 * 28 * 28, description="pictures are scaled up to at least this area")
    max_pixels: int = Field(
        640 * 28 * 28, description="pictures are scaled down to at most this area"
    )
    max_prompt_tokens: int = Field(
        3000, ge=1, description="longer prompts are bad rows; nothing is ever truncated"
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="stop with exit code 2, or skip, write bad_rows.jsonl and go on"
    )
    max_bad_frac: float = Field(
        0.01, ge=0, le=1, description="with `skip`: stop above this share of bad rows"
    )
    shuffle: bool = Field(True, description="a new seeded order in every epoch")
    limit: int | None = Field(None, ge=1, description="use only the first rows of the training set")


class VllmConfig(Section):
    """vLLM in process."""

    gpu_memory_utilization: float = Field(
        0.3, gt=0, le=1, description="share of GPU memory for weights and KV cache"
    )
    kv_cache_gib: int = Field(1, ge=1, description="KV cache on CPU, GiB")
    max_num_seqs: int = Field(256, ge=1, description="requests decoded together")
    max_model_len: int | None = Field(
        None, description="tokens; default: longest prompt plus max_new_tokens"
    )
    enforce_eager: bool = Field(
        True, description="no CUDA graphs or compilation: starts faster, decodes slower"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: the policy's")
    tensor_parallel: int = Field(
        1, ge=1, description="GPUs that one engine is split over; needs ray.engines"
    )
    sleep: bool = Field(
        True,
        description="GPU, beside a trainer: give the engine's memory back while the policy trains",
    )
    probe_tolerance: float | None = Field(
        None,
        description="largest mean log-prob gap after a sync; default 1e-3 in float32, 0.1 in "
        "bfloat16",
    )


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["auto", "hf", "vllm"] = Field(
        "auto", description="auto: vLLM where installed, else transformers"
    )
    num_prompts: int = Field(128, ge=1, description="prompts per step (arXiv:2510.10201: 128)")
    group_size: int = Field(8, ge=1, description="responses per prompt, G (arXiv:2510.10201: 8)")
    max_new_tokens: int = Field(1024, ge=1, description="response budget, tokens")
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; log-probs are taken at it too"
    )
    stop: tuple[str, ...] = Field((), description="strings that end a response, besides EOS")
    ignore_eos: bool = Field(False, description="force max_new_tokens tokens (benchmarks)")
    max_rounds: int = Field(
        1,
        ge=1,
        description="sample anew in place of groups that are all right or all wrong, up to so many "
        "rounds (DAPO); 1: never",
    )
    hf_batch_size: int = Field(256, ge=1, description="HF engine: requests decoded together")
    sync_bucket_mib: int = Field(
        512,
        ge=1,
        description="weights gathered and sent to an engine at a time; one layer is the least",
    )
    staleness: Literal[0, 1] = Field(
        0,
        description="1: sample the next step's responses while this one trains, from weights one "
        "step old; needs ray.engines",
    )
    vllm: VllmConfig = VllmConfig()


class GraderConfig(Section):
    """The answer checker's worker processes."""

    workers: int = Field(2, ge=1, description="processes")
    cpu_seconds: float = Field(
        2.0, gt=0, description="CPU time of one verdict; beyond it the verdict is `error`"
    )
    wall_seconds: float = Field(
        5.0,
        gt=0,
        description="wall time a worker may stand still over one verdict (12 times that in all): "
        "then `error`",
    )
    memory_mib: int = Field(1024, ge=128, description="address space of a worker above its start")


class RewardConfig(Section):
    """What a response earns."""

    answer: Literal["boxed", "tag", "text"] = Field(
        "boxed", description=r"where the answer stands: \boxed{}, <answer>..</answer>, or anywhere"
    )
    wrong: float = Field(
        0.0,
        lt=1,
        allow_inf_nan=False,
        description="what a wrong answer earns, where a right one earns 1 (DAPO: -1)",
    )
    format: Literal["tags", "boxed"] = Field(
        "tags",
        description=r"one <think>..</think><answer>..</answer>, or between one and four \boxed{} "
        r"(RLFR's recipes)",
    )
    format_weight: float = Field(
        0.0, ge=0, description="reward of the format beside the accuracy (RLFR's VLM recipe: 0.5)"
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="tokens before max_new_tokens over which a penalty grows to -1 (DAPO); 0: none",
    )
    function: str | None = Field(
        None, description="`file.py:function` whose score stands in for the accuracy"
    )
    max_error_frac: float = Field(
        0.1, ge=0, le=1, description="stop when more verdicts of a step than this are errors"
    )
    grader: GraderConfig = GraderConfig()

    @model_validator(mode="after")
    def _scores_as_they_are(self) -> RewardConfig:
        if self.function is not None and self.wrong != 0:
            raise ValueError(
                f"wrong={self.wrong:g} is not read with a function, whose scores are taken as they "
                "are: leave it out, or at 0"
            )
        return self


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

    method: Literal[
        "grpo", "dr_grpo", "dapo", "gspo", "gmpo", "rloo", "reinforce_pp", "ppo", "flowrl"
    ] = Field("grpo", description="published objective whose settings are the defaults")
    advantage: Literal["group", "centred", "leave_one_out", "whitened", "gae"] = Field(
        "group",
        description="outcome normalised or centred within its group, less its siblings' mean, "
        "whitened over the batch, or GAE",
    )
    loss: Literal["clip", "gspo", "gmpo", "flowrl"] = Field(
        "clip", description="of token ratios, of sequence ratios, or trajectory balance"
    )
    clip_low: float = Field(
        0.2, gt=0, lt=1, description="ratio clipped at 1 - clip_low (gmpo: log-ratio at -clip_low)"
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
    def needs_reference(self) -> bool:
        """Whether log-probs of a reference policy enter the loss."""
        return self.kl.coef > 0 or self.loss == "flowrl"

    @model_validator(mode="after")
    def _exclusions(self) -> AlgorithmConfig:
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1")
        if self.dual_clip is not None and self.loss in ("gmpo", "flowrl"):
            raise ValueError(f"dual_clip has no meaning with loss={self.loss}")
        if self.loss != "clip" and self.loss_aggregation != "sequence":
            raise ValueError(
                f"loss={self.loss} is one number per sequence: loss_aggregation must be sequence, "
                f"not {self.loss_aggregation}"
            )
        if self.loss == "flowrl":
            if self.advantage != "group":
                raise ValueError(
                    "loss=flowrl takes the group-normalised outcome: advantage must be group, not "
                    f"{self.advantage}"
                )
            if self.kl.coef > 0:
                raise ValueError(
                    "loss=flowrl has the reference policy in its residual: kl.coef must be 0"
                )
            if self.importance_cap is not None:
                raise ValueError(
                    "loss=flowrl has its own importance weight: importance_cap must be unset"
                )
            if self.gamma != 1:
                raise ValueError("loss=flowrl takes whole responses: gamma must be 1")
        if self.gae_lambda != 1 and self.advantage != "gae":
            raise ValueError(f"gae_lambda={self.gae_lambda} is read with advantage=gae only")
        if self.reference is not None and not self.needs_reference:
            raise ValueError(
                "reference is set, but nothing uses it: set kl.coef above 0, or loss=flowrl"
            )
        return self


class FlowNetworkConfig(Section):
    """The velocity network (METHOD: one network for all hooked layers, width = hidden size)."""

    depth: int = Field(
        4, ge=1, description="residual blocks (arXiv:2510.10201: 4 up to 3B, 6 above)"
    )


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
    def _ranges(self) -> FlowConfig:
        for p in self.layers:
            if not 0 <= p <= 1:
                raise ValueError(f"layers: {p} is not a fraction of depth between 0 and 1")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: {list(self.layers)} must rise from the first to the last")
        for t in self.times:
            if not 0 < t < 1:
                raise ValueError(
                    f"times: {t} is not between 0 (noise, which weighs nothing) and 1 (data)"
                )
        if len(set(self.times)) < len(self.times):
            raise ValueError(f"times: {list(self.times)} has one of them twice")
        if not self.layers or not self.times or not self.context:
            raise ValueError("layers, times and context need at least one value each")
        if any(s < 1 for s in self.shift):
            raise ValueError(f"shift: {list(self.shift)} must be 1 or more")
        if len(self.shift) not in (1, len(self.context)):
            raise ValueError(
                f"shift: {len(self.shift)} values for {len(self.context)} contexts; give one for "
                "all, or one each"
            )
        if len(set(self.sides)) < len(self.sides):
            raise ValueError(f"context: {'+'.join(self.context)} names the same context twice")
        if self.online.warmup_steps and not self.online.enabled:
            raise ValueError(
                "online.warmup_steps needs online.enabled: in these steps only the field learns"
            )
        if self.reward.at == "context" and set(self.context) != {"token_pre"}:
            raise ValueError(
                "reward.at=context needs context token_pre alone, whose context stands after its "
                f"target: {'+'.join(self.context)}"
            )
        if self.reward.at == "context" and len(self.context) > 1:
            raise ValueError(
                "reward.at=context needs one context: with several there are several tokens to "
                "charge"
            )
        if self.online.window and ("entropy" in self.online.select or self.online.soft_weight):
            raise ValueError(
                "online.window takes responses whole or not at all: leave entropy out of "
                "online.select, and online.soft_weight at 0"
            )
        if self.online.networks == "contrast" and self.contrast == "none":
            raise ValueError("online.networks=contrast needs flow.contrast: own or wrong")
        if (
            self.standardise or self.contrast != "none" or self.fit.source != "expert"
        ) and self.fit.batch_tokens is None:
            name = (
                "standardise"
                if self.standardise
                else "contrast"
                if self.contrast != "none"
                else "fit.source"
            )
            raise ValueError(
                f"{name} needs fit.batch_tokens (256, say): statistics and sampled responses come "
                "from latents computed once"
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


class OptimConfig(Section):
    """The policy's optimiser."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="sgd has no momentum and no state")
    lr: float = Field(1e-6, gt=0, description="peak learning rate (arXiv:2510.10201: 1e-6)")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW")
    weight_decay: float = Field(0.0, ge=0, description="AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping")
    warmup_frac: float = Field(
        0.03, ge=0, lt=1, description="share of the steps with linear warm-up"
    )
    min_lr_ratio: float = Field(
        0.1, ge=0, le=1, description="cosine decay ends at this share of lr; 1: constant"
    )


class TrainConfig(Section):
    """The schedule of a run."""

    steps: int = Field(100, ge=1, description="rollout batches")
    tokens_per_microbatch: int = Field(
        16384,
        ge=1,
        description="packed tokens per forward and backward (a longer single sample goes alone)",
    )
    save_steps: int = Field(50, ge=1, description="checkpoint every so many steps, and at the end")
    keep_checkpoints: int = Field(2, ge=2, description="newest ones kept")
    log_rollouts: int = Field(4, ge=0, description="groups per step written to rollouts/; 0: none")
    log_attention: int = Field(
        1,
        ge=0,
        description="of these, the first ones with pictures: also where each token looked in them, "
        "by one more forward; 0: none",
    )
    rollout_format: Literal["jsonl", "parquet"] = Field(
        "jsonl", description="of the files in rollouts/"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",),
        description="where metrics.jsonl is copied to; W&B is offline without an API key",
    )
    project: str = Field(
        "rlfr_vlm",
        min_length=1,
        description="of W&B and trackio; the run has the name of output_dir",
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        description="longest wait for another rank or an engine before the run stops and says "
        "which",
    )


Action = Literal["off", "warn", "stop", "roll_back"]


class MonitorsConfig(Section):
    """What is watched during training, and what follows when it looks wrong: nothing, a warning, an
    end with exit code 3, or a way back to the newest checkpoint from before it began.
    docs/monitors.md says what each of them sees.
    """

    non_finite: Literal["stop", "roll_back"] = Field(
        "stop", description="a loss, deviation, gradient or figure that is no finite number"
    )
    update: Action = Field(
        "warn", description="a step changes the weights by more than max_update of their size"
    )
    mismatch: Action = Field(
        "warn",
        description="responses that were not drawn from the policy: engine and trainer disagree",
    )
    accuracy: Action = Field("warn", description="accuracy falls to half of its best")
    entropy: Action = Field(
        "warn", description="entropy falls below entropy_floor, or doubles and rises by a nat"
    )
    length: Action = Field(
        "warn",
        description="the reward pays for length, or lengths double or halve while accuracy does "
        "not rise",
    )
    truncation: Action = Field(
        "warn", description="more than max_truncated of the responses are cut off"
    )
    repetition: Action = Field(
        "warn", description="more than max_repetition of the 4-grams repeat within their response"
    )
    format: Action = Field("warn", description="the format is learnt while accuracy is flat")
    zero_variance: Action = Field(
        "warn",
        description="in more than max_zero_variance of the groups all siblings earn the same",
    )
    flow_share: Action = Field(
        "warn", description="more than max_flow_share of the advantages' size comes from the flow"
    )
    flow_collapse: Action = Field(
        "warn",
        description="deviations no longer differ, nothing is rewarded or learnt, or the flow loss "
        "triples",
    )
    flow_inverted: Action = Field(
        "warn",
        description="right answers are charged more than wrong siblings, though wrong ones stray "
        "further",
    )
    flow_hacked: Action = Field(
        "warn",
        description="accuracy and deviations fall together: the policy learns to be easy to "
        "predict",
    )
    flow_unfit: Action = Field(
        "warn", description="the flow loss is above that of v = x_t / t, which knows nothing"
    )
    patience: int = Field(
        3,
        ge=1,
        description="steps in a row that must look wrong before anything follows (non_finite: one)",
    )
    max_update: float = Field(
        0.03,
        gt=0,
        description="change of the weights over their size (healthy: 1e-5 to 3e-3); adapters: ten "
        "times it",
    )
    max_mismatch: float | None = Field(
        None, gt=0, description="mean log-prob gap, nats; default 1e-3 in float32, 0.1 in bfloat16"
    )
    entropy_floor: float = Field(0.01, ge=0, description="nats per token")
    max_truncated: float = Field(0.9, gt=0, le=1, description="share of the responses")
    max_repetition: float = Field(0.3, gt=0, le=1, description="share of a response's 4-grams")
    max_zero_variance: float = Field(0.95, gt=0, le=1, description="share of the groups")
    max_flow_share: float = Field(0.5, gt=0, le=1, description="share of the advantages' size")
    max_roll_backs: int = Field(
        2, ge=0, description="after so many roll-backs the next one is a stop"
    )
    roll_back_lr: float = Field(
        0.5, gt=0, le=1, description="factor on optim.lr with each roll-back"
    )
    roll_backs: int = Field(
        0, ge=0, description="how often this run was rolled back; kept by the run itself"
    )


class DeepSpeedConfig(Section):
    """Training over several processes (ranks), by DeepSpeed: what each of them holds."""

    ranks: int | None = Field(
        None,
        ge=1,
        description="training processes; launcher=ray starts so many (default 1), torchrun must "
        "have",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2,
        description="0: each rank holds everything; 1: its share of the optimiser, 2: and of the "
        "gradients, 3: and of the weights",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="keep the optimiser, or with stage 3 the weights too, in host memory and step "
        "there",
    )


class RayConfig(Section):
    """launcher=ray: actors on a cluster."""

    address: str = Field(
        "local",
        description="local: a cluster of the run's own on this machine; auto or HOST:PORT: one "
        "that is running",
    )
    engines: int = Field(
        0,
        ge=0,
        description="rollout actors with devices of their own; 0: every training rank samples for "
        "itself",
    )
    bind: str = Field(
        "127.0.0.1",
        description="address that actors listen on; another than loopback is for several nodes, "
        "and is warned of",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="deaths of actors that a run survives; after them it stops with exit code 3",
    )


class EndpointConfig(Section):
    """An OpenAI-compatible server."""

    model: str | None = Field(
        None, description="name that the server knows it by; with `serve`, chosen by itself"
    )
    api_base: str | None = Field(
        None, description="http(s)://HOST:PORT/v1; default: the environment's OPENAI_API_BASE"
    )
    key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key; never its value"
    )
    serve: str | None = Field(
        None,
        description="folder or hub name of a model that a vLLM server is started for, on loopback, "
        "and stopped",
    )
    concurrency: int = Field(8, ge=1, description="requests at a time")
    retries: int = Field(
        6,
        ge=0,
        description="further attempts after 429, 5xx, a timeout or a broken reply, with backoff",
    )
    timeout: float = Field(120.0, gt=0, description="seconds of one attempt")


class JudgeConfig(EndpointConfig):
    """The model that decides whether a response is right where rules cannot."""

    temperature: float = Field(0.0, ge=0, description="of the judge")
    max_tokens: int = Field(256, ge=16, description="of its reply")
    prompt: Literal["equivalence-1"] = Field(
        "equivalence-1", description="name and version of what it is asked"
    )


class EvalConfig(Section):
    """Evaluation: on `data.eval`, and on benchmarks."""

    benchmarks: tuple[str, ...] = Field(
        (), description="names as math500, or paths of YAML files; none: data.eval"
    )
    data_dir: str | None = Field(
        None, description="folder with the benchmarks' files; default: the hub"
    )
    every: int = Field(0, ge=0, description="steps between evaluations during training; 0: none")
    num_samples: int | None = Field(
        None, ge=1, description="sampled responses per problem; default: 8, or the benchmark's"
    )
    temperature: float | None = Field(
        None,
        ge=0,
        description="of the sampled responses; 0: greedy; default: 1, or the benchmark's",
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="nucleus that is sampled from; default: 1, or the benchmark's"
    )
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="response budget; default: rollout.max_new_tokens, or the benchmark's",
    )
    limit: int | None = Field(None, ge=1, description="problems; default all")
    pictures: Literal["as_is", "blank", "swapped"] = Field(
        "as_is", description="blank, or another problem's: are the pictures used at all?"
    )
    grading: Literal["rule", "judge", "rule_then_judge", "both"] = Field(
        "rule",
        description="rules alone, the judge alone, the judge where rules find nothing right, or "
        "both and how often they agree",
    )
    judge: JudgeConfig | None = Field(
        None, description="a model that decides whether an answer is right"
    )
    endpoint: EndpointConfig | None = Field(
        None, description="evaluate this server instead of loading model.path"
    )
    max_failed_frac: float = Field(
        0.01,
        ge=0,
        le=1,
        description="above this share of answers without a verdict no score is given",
    )

    @property
    def heldout_samples(self) -> int:
        """Sampled responses per row of `data.eval`."""
        return self.num_samples or 8

    @property
    def heldout_temperature(self) -> float:
        """Of the sampled responses to `data.eval`."""
        return 1.0 if self.temperature is None else self.temperature
