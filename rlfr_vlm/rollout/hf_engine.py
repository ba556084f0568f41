"""Sampling with a transformers model: packed prefill with each prompt once, then decoding with a
preallocated cache.

The model is the policy's own, adapters and all, so there is nothing to synchronise; where the
policy's weights are sharded, or in another process, it is a copy with the adapters merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlfr_vlm.config import ModelConfig, RolloutConfig
from rlfr_vlm.errors import StoppedError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.finite import check_finite
from rlfr_vlm.models.attention import PackedLayout, Segment, grouped_sdpa
from rlfr_vlm.models.pack import concatenate_vision
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout.engine import SamplingConfig, sample_indices
from rlfr_vlm.rollout.weights import Arrivals
from rlfr_vlm.types import EncodedPrompt, FinishReason, Rollout, RolloutGroup, request_seed

PREFILL_TOKENS = 32768  # prompt tokens, pictures included, of one forward


def batches(
    prompts: Sequence[EncodedPrompt], max_prompts: int, max_tokens: int
) -> list[list[EncodedPrompt]]:
    """Prompts in order, in runs of at most so many prompts and tokens; a longer single one goes
    alone.
    """
    parts: list[list[EncodedPrompt]] = []
    tokens = 0
    for prompt in prompts:
        if (
            not parts
            or len(parts[-1]) == max_prompts
            or tokens + len(prompt.token_ids) > max_tokens
        ):
            parts.append([])
            tokens = 0
        parts[-1].append(prompt)
        tokens += len(prompt.token_ids)
    return parts


class _Prefill:
    """Attention of the packed prompts, which keeps every layer's keys and values."""

    def __init__(self, prompts: Sequence[EncodedPrompt], device: torch.device) -> None:
        ends = torch.tensor([len(p.token_ids) for p in prompts]).cumsum(0).tolist()
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self._layout = PackedLayout([Segment(a, b) for a, b in self.spans], device)
        self.max_keys = self._layout.max_keys
        self.states: list[tuple[Tensor, Tensor]] = []  # per layer, [H_kv, S, D] each

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See models.attention.Layout."""
        assert layer == len(self.states)
        self.states.append((key[0], value[0]))
        return self._layout.attend(layer, query, key, value, scale)


class _Decode:
    """One token of each of n requests; keys and values stand in a cache of [n, H_kv, capacity, D]
    per layer.
    """

    def __init__(self, prefill: _Prefill, owners: Sequence[int], new_tokens: int) -> None:
        """owners: for each request, the index of its prompt in the prefill."""
        spans = [prefill.spans[i] for i in owners]
        self.used = torch.tensor([b - a for a, b in spans], device=prefill.states[0][0].device)
        self.max_keys = int(self.used.max())
        capacity = self.max_keys + new_tokens
        self.cache = []
        for states in prefill.states:
            pair = []
            for state in states:
                room = state.new_zeros(len(spans), state.shape[0], capacity, state.shape[2])
                for request, (a, b) in enumerate(spans):
                    room[request, :, : b - a] = state[:, a:b]
                pair.append(room)
            self.cache.append(pair)
        self._rows = torch.arange(len(spans), device=self.used.device)
        self._mask = self._visible()

    def _visible(self) -> Tensor:
        positions = torch.arange(self.max_keys, device=self.used.device)
        return (positions < self.used[:, None])[:, None, None]

    def advance(self) -> None:
        """Make room for one more token of every request."""
        self._slot = self.used
        self.used = self.used + 1
        self.max_keys += 1
        self._mask = self._visible()

    def keep(self, rows: Tensor) -> None:
        """Drop finished requests. rows: indices of those that go on."""
        self.cache = [[state.index_select(0, rows) for state in pair] for pair in self.cache]
        self.used = self.used[rows]
        self._rows = self._rows[: len(rows)]
        self.max_keys = int(self.used.max())

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """See models.attention.Layout."""
        keys, values = self.cache[layer]
        keys[self._rows, :, self._slot] = key[0].transpose(0, 1)
        values[self._rows, :, self._slot] = value[0].transpose(0, 1)
        seen = slice(0, self.max_keys)
        attended = grouped_sdpa(
            query[0].transpose(0, 1)[:, :, None],
            keys[:, :, seen],
            values[:, :, seen],
            self._mask,
            scale,
        )
        return attended[:, :, 0][None]


class _Request:
    """A response in the making."""

    def __init__(
        self, prompt: EncodedPrompt, sample_index: int, owner: int, sampling: SamplingConfig
    ) -> None:
        self.prompt, self.sample_index, self.owner = prompt, sample_index, owner
        seed = request_seed(*sampling.seed_key, prompt.prompt.id, sample_index)
        generator = torch.Generator().manual_seed(seed)
        self.uniforms = torch.rand(
            sampling.max_new_tokens, dtype=torch.float64, generator=generator
        )
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest set of most probable tokens that holds at least `top_p`; zero elsewhere, not
    rescaled. [n, V] -> [n, V].
    """
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(
        -1, order, torch.where(before < top_p, ordered, 0.0)
    )


class HFEngine:
    """Rollouts by the policy's own model, or by a copy of it."""

    name = "hf"

    def __init__(self, cfg: RolloutConfig, policy: Policy, copy: ModelConfig | None = None) -> None:
        """copy: sample with a model of its own, made from this config, which waits for
        `load_weights` or `load_bucket`.
        """
        self.batch_size, self.bucket_bytes = cfg.hf_batch_size, cfg.sync_bucket_mib * 2**20
        self.policy = policy
        self.sampler = policy
        self._arrivals: Arrivals | None = None
        # of the copy's weights; none: the policy's are not there yet
        self._version: int | None = None
        if copy is not None:
            self.sampler = Policy(
                copy.model_copy(update={"lora": None, "gradient_checkpointing": "off"})
            )
            self._arrivals = Arrivals(self.sampler.weight_specs())

    def load_weights(self, policy: Policy) -> None:
        """Where the engine samples from the policy's own tensors, only a look whether they are
        finite. Else see RolloutEngine.
        """
        if self._arrivals is None:
            if policy is not self.policy:
                raise ValueError("the HF engine samples from the policy that it was made with")
            check_finite(dict(policy.model.named_parameters()), "an engine")
            return
        self._arrivals.forget()
        for bucket in policy.weight_buckets(self.bucket_bytes):
            self.load_bucket(bucket)
        self.finish_load(policy.version)

    @torch.no_grad()
    def load_bucket(self, bucket: Mapping[str, Tensor]) -> None:
        """See RolloutEngine. Raises ValueError for an engine without a copy."""
        self._own().check(bucket)
        self.sampler.model.to(self.sampler.device)  # back from `sleep`
        tensors = self.sampler.model.state_dict(keep_vars=True)
        for name, tensor in bucket.items():
            tensors[name].copy_(tensor)
            if not torch.equal(tensors[name], tensor.to(tensors[name].device, tensors[name].dtype)):
                raise StoppedError(
                    f"weight sync: the engine's copy of `{name}` differs from the trainer's, or "
                    "holds what is no number"
                )
        self._own().note(bucket)

    def finish_load(self, version: int) -> None:
        """See RolloutEngine. Raises ValueError for an engine without a copy."""
        self._own().finish()
        self._version = version

    def sleep(self) -> None:
        """A copy on a GPU waits in host memory."""
        if self._arrivals is not None and self.sampler.device.type == "cuda":
            self.sampler.model.to("cpu")
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Nothing to shut down."""

    def _own(self) -> Arrivals:
        if self._arrivals is None:
            raise ValueError(
                "the HF engine has no copy to load: it samples from the tensors of its policy; one "
                "made without weights gives it one"
            )
        return self._arrivals

    def _check_loaded(self) -> None:
        if self._arrivals is not None and (self._version is None or self._arrivals.begun):
            part = "only some of" if self._arrivals.begun else "none of"
            raise StoppedError(
                f"the HF engine has {part} the policy's weights: finish a load first"
            )

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig
    ) -> list[RolloutGroup]:
        """`group_size` responses to each prompt, in order. Seeds depend on (seed key, prompt id,
        sample index) alone.

        Raises StoppedError where a copy lacks weights.
        """
        self._check_loaded()
        training = self.sampler.model.training
        self.sampler.model.eval()  # no recomputation of layers while sampling
        try:
            parts = batches(prompts, max(1, self.batch_size // sampling.group_size), PREFILL_TOKENS)
            return [group for part in parts for group in self._sample_batch(part, sampling)]
        finally:
            self.sampler.model.train(training)

    def _sample_batch(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig
    ) -> list[RolloutGroup]:
        requests = [
            _Request(p, i, owner, sampling)
            for owner, p in enumerate(prompts)
            for i in sample_indices(sampling)
        ]
        prefill = _Prefill(prompts, self.sampler.device)
        states = self._forward(
            torch.tensor([t for p in prompts for t in p.token_ids]),
            torch.cat([p.position_ids for p in prompts], dim=1),
            prefill,
            concatenate_vision(prompts),
        )
        owners = [r.owner for r in requests]
        hidden = states[
            torch.tensor([prefill.spans[i][1] - 1 for i in owners], device=states.device)
        ]
        decode = _Decode(prefill, owners, sampling.max_new_tokens)
        positions = torch.tensor([int(r.prompt.position_ids.max()) for r in requests])
        active = requests
        while True:
            tokens = self._sample_tokens(hidden, active, sampling)
            going = [i for i, r in enumerate(active) if r.finish_reason is None]
            if not going:
                break
            if len(going) <= len(active) // 2:  # worth the copy of the cache
                rows = torch.tensor(going)
                decode.keep(rows.to(decode.used.device))
                active, tokens, positions = (
                    [active[i] for i in going],
                    tokens[rows],
                    positions[rows],
                )
            decode.advance()
            faultpoint("decode")
            positions = positions + 1
            hidden = self._forward(
                tokens, positions.expand(self.sampler.family.position_axes, -1), decode, {}
            )
        groups = [
            requests[i : i + sampling.group_size]
            for i in range(0, len(requests), sampling.group_size)
        ]
        return [
            RolloutGroup(group[0].prompt, tuple(self._finish(r) for r in group)) for group in groups
        ]

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: _Prefill | _Decode,
        vision: dict[str, Tensor],
    ) -> Tensor:
        """One pass of the backbone over tokens [S] at positions [A, S]. Returns states [S, D]."""
        device = self.sampler.device
        positions = positions.to(device)
        return self.sampler.model.model(
            input_ids=tokens.to(device)[None],
            position_ids=positions[:, None] if self.sampler.family.position_axes > 1 else positions,
            use_cache=False,
            layout=layout,
            **{k: v.to(device) for k, v in vision.items()},
        ).last_hidden_state[0]

    def _sample_tokens(
        self, hidden: Tensor, active: Sequence[_Request], sampling: SamplingConfig
    ) -> Tensor:
        """Append one token to every unfinished request. Returns the tokens [n]; those of finished
        requests are arbitrary.
        """
        logits = self.sampler.model.get_output_embeddings()(hidden).float()
        logits[:, list(self.sampler.banned_token_ids)] = float("-inf")
        if sampling.temperature > 0:
            logprobs = (logits / sampling.temperature).log_softmax(-1)
            cumulative = nucleus(logprobs.double().exp_(), sampling.top_p).cumsum(-1)
            steps = [min(len(r.tokens), len(r.uniforms) - 1) for r in active]
            uniform = torch.stack(
                [r.uniforms[step] for r, step in zip(active, steps, strict=True)]
            ).to(logits.device)
            tokens = torch.searchsorted(
                cumulative, (uniform * cumulative[:, -1])[:, None], right=True
            )[:, 0]
            # of NaN it is beyond the last one; its log-prob says so
            tokens = tokens.clamp(max=cumulative.shape[1] - 1)
        else:
            logprobs = logits.log_softmax(-1)
            tokens = logits.argmax(-1)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        for request, token, logprob in zip(active, tokens.tolist(), chosen.tolist(), strict=True):
            if request.finish_reason is None:
                request.tokens.append(token)
                request.logprobs.append(logprob)
                request.finish_reason = self._finished(request, token, sampling)
        return tokens.cpu()

    def _finished(
        self, request: _Request, token: int, sampling: SamplingConfig
    ) -> FinishReason | None:
        if token in self.sampler.eos_token_ids and not sampling.ignore_eos:
            return "stop"
        if sampling.stop:
            text = self.sampler.decode(request.tokens)
            if any(stop in text for stop in sampling.stop):
                return "stop"
        return "length" if len(request.tokens) >= sampling.max_new_tokens else None

    def _finish(self, request: _Request) -> Rollout:
        assert request.finish_reason is not None
        return Rollout(
            prompt=request.prompt,
            sample_index=request.sample_index,
            token_ids=tuple(request.tokens),
            logprobs=tuple(request.logprobs),
            text=self.sampler.decode(request.tokens),
            finish_reason=request.finish_reason,
            policy_version=self.sampler.version if self._version is None else self._version,
        )
