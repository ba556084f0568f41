"""Sampling by vLLM, in this process. The only module that imports vllm."""

from __future__ import annotations

import gc
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlfr_vlm.config import Config
from rlfr_vlm.errors import StoppedError, UserError
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout.engine import SamplingConfig, sample_indices
from rlfr_vlm.rollout.probe import PROBE, check_gap, probe_prompts, tolerance
from rlfr_vlm.rollout.undisturbed import undisturbed, undisturbed_generators
from rlfr_vlm.rollout.weights import WeightSync
from rlfr_vlm.types import EncodedPrompt, Rollout, RolloutGroup, request_seed

TEMPERATURES = (0.01, 2.0)  # beyond these vLLM clamps (with a warning) or refuses
SOCKET_ROOM = 48  # letters of the temporary folder's path: those of a socket's end at 107
MIN_MODEL_LEN = 64  # room for the probe, whatever the config's limits


class VllmEngine:
    """vLLM holding its own copy of the policy's weights.

    One at a time in a process: they share vLLM's process groups, so that closing one ends every
        other.
    """

    name = "vllm"

    def __init__(self, cfg: Config, policy: Policy) -> None:
        """Start vLLM and give it the policy's weights, or wait for `load_bucket` where the policy
        has none.

        Raises UserError for limits that do not fit, StoppedError as `load_weights` does.
        """
        self.cfg, self.policy = cfg, policy
        self.max_model_len = max_model_len(cfg, policy.max_length)
        self.version: int | None = None  # of the weights; none: there are none yet
        self._asleep: tuple[str, ...] = ()  # vLLM's names of the memory that is given back
        self._scratch = tempfile.TemporaryDirectory(
            prefix="rlfr-vllm-", dir="/tmp" if len(tempfile.gettempdir()) > SOCKET_ROOM else None
        )
        folder = self._scratch.name
        with undisturbed(), temporary_files_in(folder):
            # vLLM reads no such file: it starts with random weights, which the first load replaces
            if cfg.model.gguf_file:
                policy.model.config.save_pretrained(folder)
                policy.tokenizer.save_pretrained(folder)
            self.llm = start(
                cfg, policy, folder if cfg.model.gguf_file else policy.path, self.max_model_len
            )
        self.llm.apply_model(partial(ban_tokens, token_ids=policy.banned_token_ids))
        if on_cpu():
            hold_generators_of_partial_prompts(
                self.llm.collective_rpc(lambda worker: worker.model_runner)[0]
            )
        self._sync = WeightSync(self.llm, policy.weight_specs(), cfg.rollout.vllm.tensor_parallel)
        if policy.has_weights:
            self.load_weights(policy)

    def load_weights(self, policy: Policy) -> None:
        """Copy the policy's weights and prove that they arrived; the first time also that the
        engine computes what the policy does.

        Where the weights are sharded, all ranks must call it together. Raises StoppedError naming
        the tensor that differs, or the gap between the log-probs.
        """
        self.policy = policy
        first = self.version is None
        self._sync.arrivals.forget()
        for bucket in policy.weight_buckets(self.cfg.rollout.sync_bucket_mib * 2**20):
            self.load_bucket(bucket)
        self.finish_load(policy.version)
        if first:
            self.probe()

    def load_bucket(self, bucket: Mapping[str, Tensor]) -> None:
        """See RolloutEngine."""
        self._wake("weights")
        self._sync.load(bucket)

    def finish_load(self, version: int) -> None:
        """See RolloutEngine."""
        self._wake("kv_cache")
        self._sync.finish()
        self.version = version

    def sleep(self) -> None:
        """On a GPU that the trainer uses as well, drop weights and KV cache; on CPU nothing."""
        if sleeps(self.cfg, self.policy):
            self.llm.sleep(level=2)
            self._asleep = ("weights", "kv_cache")

    def _wake(self, memory: str) -> None:
        if memory in self._asleep:
            torch.cuda.empty_cache()  # what the trainer has freed, torch still holds
            self.llm.wake_up(tags=[memory])
            self._asleep = tuple(name for name in self._asleep if name != memory)

    def _check_loaded(self) -> None:
        if self.version is None or self._sync.arrivals.begun or self._asleep:
            part = "only some of" if self._sync.arrivals.begun else "none of"
            raise StoppedError(f"vLLM has {part} the policy's weights: finish a load first")

    def probe(self) -> float:
        """Sample from a few fixed prompts and score the tokens with the policy. Returns the mean
        log-prob gap.

        Raises StoppedError where it exceeds the tolerance, naming the worst tensor if one differs.
        """
        prompts = probe_prompts(self.cfg, self.policy)
        rollouts = [rollout for group in self.sample(prompts, PROBE) for rollout in group.rollouts]
        limit = tolerance(self.cfg, {self.policy.dtype, self.llm.llm_engine.model_config.dtype})

        def cause() -> str | None:
            if self.policy.sharded:  # the others would have to gather the weights as well
                return None
            bad = self._sync.differences(
                self.policy.weight_buckets(self.cfg.rollout.sync_bucket_mib * 2**20)
            )
            return str(bad[0]) if bad else None

        return check_gap(rollouts, self.policy, limit, cause)

    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig
    ) -> list[RolloutGroup]:
        """See RolloutEngine. Tokens depend on the weights and each request's seed, not on order or
        batch.

        Raises UserError naming a prompt that leaves no room for `max_new_tokens`, or a temperature
        out of vLLM's range, and StoppedError naming a prompt that vLLM reads as other tokens than
        the trainer, or where weights are missing.
        """
        from vllm import SamplingParams

        self._check_loaded()
        assert self.version is not None
        for prompt in prompts:
            length = len(prompt.token_ids)
            # vLLM would shorten the response without a word
            if length + sampling.max_new_tokens > self.max_model_len:
                raise UserError(
                    f"prompt `{prompt.prompt.id}`: its {length} tokens and "
                    f"{sampling.max_new_tokens} new ones exceed vLLM's limit of "
                    f"{self.max_model_len}; raise rollout.vllm.max_model_len, or lower "
                    "data.max_prompt_tokens or rollout.max_new_tokens"
                )
        inputs = [engine_input(prompt) for prompt in prompts for _ in range(sampling.group_size)]
        parameters = [
            SamplingParams(
                **sampling_parameters(prompt, index, sampling, self.policy.eos_token_ids)
            )
            for prompt in prompts
            for index in sample_indices(sampling)
        ]
        # vLLM draws from torch's own generator at every step, whatever the seeds
        with undisturbed_generators():
            outputs = self.llm.generate(inputs, parameters, use_tqdm=False) if inputs else []
        rollouts = iter(outputs)
        return [
            RolloutGroup(
                prompt,
                tuple(
                    self._rollout(prompt, index, next(rollouts), self.version)
                    for index in sample_indices(sampling)
                ),
            )
            for prompt in prompts
        ]

    def _rollout(self, prompt: EncodedPrompt, index: int, output: Any, version: int) -> Rollout:
        read = tuple(output.prompt_token_ids)
        if read != prompt.token_ids:
            raise StoppedError(
                f"prompt `{prompt.prompt.id}`: the trainer reads it as {len(prompt.token_ids)} "
                f"tokens, vLLM as {len(read)}"
                f"{' other ones' if len(read) == len(prompt.token_ids) else ''}: "
                "their processors disagree about a picture; set rollout.engine=hf"
            )
        (completion,) = output.outputs
        if completion.finish_reason not in ("stop", "length"):
            raise StoppedError(
                f"prompt `{prompt.prompt.id}`: vLLM ended a response with "
                f"`{completion.finish_reason}`"
            )
        tokens = tuple(completion.token_ids)
        return Rollout(
            prompt=prompt,
            sample_index=index,
            token_ids=tokens,
            # flat: one per token, that of the sampled one
            logprobs=tuple(completion.logprobs.logprobs[: len(tokens)]),
            text=self.policy.decode(tokens),
            finish_reason=completion.finish_reason,
            policy_version=version,
        )

    def close(self) -> None:
        """Stop the engine, free its memory and leave its process groups; the default group only
        where starting vLLM made it.
        """
        from vllm.v1.engine import core

        self.llm.llm_engine.renderer.shutdown()
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self._sync
        core.cleanup_dist_env_and_memory()
        self._scratch.cleanup()


@contextmanager
def temporary_files_in(folder: str) -> Iterator[None]:
    """While open, vLLM puts its files and sockets here; it never removes them."""
    before = tempfile.tempdir
    tempfile.tempdir = os.environ["VLLM_RPC_BASE_PATH"] = folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def engine_input(prompt: EncodedPrompt) -> dict[str, Any]:
    """What vLLM is given: one image token per picture and the pictures."""
    given: dict[str, Any] = {"prompt_token_ids": list(prompt.engine_token_ids)}
    if prompt.images:
        given["multi_modal_data"] = {"image": list(prompt.images)}
    return given


def sampling_parameters(
    prompt: EncodedPrompt, index: int, sampling: SamplingConfig, eos: Sequence[int]
) -> dict[str, Any]:
    """Every field that shapes the distribution, so that no default of the model or of vLLM does.

    Raises UserError for a temperature that vLLM would change.
    """
    low, high = TEMPERATURES
    if sampling.temperature and not low <= sampling.temperature <= high:
        raise UserError(
            f"temperature {sampling.temperature}: vLLM samples between {low} and {high}, and "
            "greedily at 0"
        )
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": request_seed(*sampling.seed_key, prompt.prompt.id, index),
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": 0,
        # The policy's own list of EOS tokens decides, not the one vLLM takes from the tokenizer.
        "ignore_eos": True,
        "stop_token_ids": [] if sampling.ignore_eos else list(eos),
        "stop": list(sampling.stop),
        "detokenize": bool(sampling.stop),
        "logprobs": 0,  # that of the sampled token only
        "flat_logprobs": True,
    }


def max_model_len(cfg: Config, limit: int | None) -> int:
    """Tokens of the longest sequence: as configured, else the longest prompt plus response, within
    the model's limit.
    """
    given = cfg.rollout.vllm.max_model_len
    if given and limit and given > limit:
        raise UserError(
            f"rollout.vllm.max_model_len={given}: the model reads at most {limit} tokens"
        )
    wanted = given or max(cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens, MIN_MODEL_LEN)
    return min(wanted, limit) if limit else wanted


def on_cpu() -> bool:
    """Whether this vLLM is built for CPUs."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def sleeps(cfg: Config, policy: Policy) -> bool:
    """Whether the engine gives its memory back between rollouts: on a GPU that trains the policy as
    well.
    """
    return cfg.rollout.vllm.sleep and policy.has_weights and not on_cpu()


def placement(cfg: Config, policy: Policy) -> dict[str, Any]:
    """How vLLM finds its processes and devices. Raises UserError for tensor parallelism on CPU."""
    size = cfg.rollout.vllm.tensor_parallel
    if size > 1:
        if on_cpu():
            raise UserError(
                f"rollout.vllm.tensor_parallel={size}: vLLM on CPU runs in one process per engine; "
                "leave it at 1"
            )
        return {"distributed_executor_backend": "mp", "tensor_parallel_size": size}
    if on_cpu() or not (dist.is_initialized() and dist.get_world_size() > 1):
        return {"distributed_executor_backend": "uni"}
    # One engine per training rank: "uni" would put each on the first GPU. vLLM reads rank and
    # device from the environment.
    device = torch.cuda.current_device() if policy.device.index is None else policy.device.index
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(device))
    return {"distributed_executor_backend": "external_launcher"}


def start(cfg: Config, policy: Policy, path: str, length: int) -> Any:
    """vLLM's LLM object. Raises UserError with vLLM's own words where it refuses the settings."""
    # in this process: weights are reachable, and a dead engine cannot hang us
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for key, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }.items():
        os.environ.setdefault(key, value)
    # else its groups join the trainer's ranks, which may be elsewhere
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        os.environ["GLOO_SOCKET_IFNAME"] = next(
            (name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo"
        )
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    from vllm.platforms import current_platform

    settings = cfg.rollout.vllm
    dtype: Any = (
        settings.dtype if settings.dtype != "auto" else str(policy.dtype).removeprefix("torch.")
    )
    options = placement(cfg, policy)
    if current_platform.is_cpu():
        options["kv_cache_memory_bytes"] = settings.kv_cache_gib * 2**30
        # else the sampler's helpers are compiled with a C++ compiler: 8 s at first use
        current_platform.simple_compile_backend = "eager"
        operators: Any = torch.ops._C
        # would bind the memory of the whole process to one NUMA node
        operators.init_cpu_memory_env = lambda nodes: None
    else:
        options["gpu_memory_utilization"] = settings.gpu_memory_utilization
        options["enable_sleep_mode"] = sleeps(cfg, policy)
    if policy.processor is not None:
        options["limit_mm_per_prompt"] = {"video": 0}
        # Pictures come in the size in which the trainer reads them; the limits only size vLLM's
        # buffers.
        options["mm_processor_kwargs"] = {
            "do_resize": False,
            "size": {"shortest_edge": cfg.data.min_pixels, "longest_edge": cfg.data.max_pixels},
        }
    from vllm import LLM

    keep_default_group()
    try:
        return LLM(
            path,
            dtype=dtype,
            trust_remote_code=cfg.model.trust_remote_code,
            max_model_len=length,
            max_num_seqs=settings.max_num_seqs,
            enforce_eager=settings.enforce_eager,
            enable_prefix_caching=True,
            generation_config="vllm",  # vLLM's neutral defaults, not the model's
            logprobs_mode="processed_logprobs",  # at the temperature and without the banned tokens
            use_tqdm_on_load=False,
            load_format="dummy" if cfg.model.gguf_file else "auto",
            **options,
        )
    except ValueError as error:
        raise UserError(
            f"rollout.vllm: vLLM does not start: {' '.join(str(error).split())[:500]}"
        ) from error


def keep_default_group() -> None:
    """Have an engine that is shut down, or merely collected, leave the default process group alone
    where the trainer's ranks made it.

    vLLM 0.32 ends it in both cases, whoever made it.
    """
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = (
        leave_groups if dist.is_initialized() else cleanup_dist_env_and_memory
    )


def leave_groups(*_: Any, **__: Any) -> None:
    """What vLLM's cleanup_dist_env_and_memory does, less ending the default group."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def ban_tokens(model: Any, token_ids: Sequence[int]) -> None:
    """Set the logits of these tokens to -inf where the model computes them, so that every request
    and every log-prob is without them.

    vLLM's own means fall short: a logit_bias is clamped at -100, bad_words loops over requests in
    Python, and a logits processor has another interface in each of vLLM's two model runners.
    """
    compute_logits = model.compute_logits
    banned = torch.tensor(token_ids, dtype=torch.long, device=next(model.parameters()).device)

    def compute_allowed(*args: Any, **kwargs: Any) -> Any:
        logits = compute_logits(*args, **kwargs)
        return logits if logits is None else logits.index_fill_(-1, banned, float("-inf"))

    if token_ids:
        model.compute_logits = compute_allowed


def hold_generators_of_partial_prompts(runner: Any) -> None:
    """Keep vLLM 0.32 from touching the generator of a request whose prompt is only partly read.

    A batch of more prompt tokens than one step takes splits a prompt. vLLM then samples a token for
    it all the same, drops it, and rewinds the request's generator, which CPU generators cannot do:
    `RuntimeError: CPU Generator does not use offset` ends the run. Without its generator in sight
    the request draws nothing that counts, and its tokens do not depend on where its prompt was
    split.
    """
    sample_tokens = runner.sample_tokens

    def sample_whole_prompts(*args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        partial = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        held = {row: batch.generators.pop(row) for row in partial if row in batch.generators}
        try:
            return sample_tokens(*args, **kwargs)
        finally:
            batch.generators.update(held)

    runner.sample_tokens = sample_whole_prompts
