"""What a run holds in memory, by part and phase, from its config alone: formulas only, no torch, no
model.

Bytes throughout. The trainer's own parts are counted as the code makes them (models/attention.py,
models/logprobs.py, flow/field.py, rollout/hf_engine.py, learner/optim.py): what autograd keeps of
each layer was counted with saved-tensor hooks, what a process holds beyond that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlfr_vlm.config import Config
from rlfr_vlm.planning.shapes import ModelShape

GIB = 2**30
TOKEN_TILE, VOCAB_TILE = 2048, 8192  # of models/logprobs.py
FIELD_TILE = 2**20  # of flow/field.py
SHORT_KEYS = 512  # of models/attention.py
PREFILL_TOKENS = 32768  # of rollout/hf_engine.py
REDUCE_BUCKET = 50_000_000  # of learner/deepspeed_backend.py: elements
# of activations: glibc keeps their freed blocks, and the moments that settle among them keep those
# apart; measured
CPU_HELD = 0.45
CUDA_HELD = 0.05  # of activations: torch's caching allocator; assumed
CUDA_CONTEXT = 800 * 2**20  # kernels and cuBLAS workspaces; assumed
GRADER = 70 * 2**20  # a worker with sympy and math-verify; measured

Parts = dict[str, float]


@dataclass(frozen=True)
class Machine:
    """What a plan is made for."""

    kind: Literal["cpu", "cuda"]
    memory: float  # bytes of one device; on CPU of the machine
    process: float  # bytes of an interpreter with the libraries
    vllm_process: float  # the same with vLLM imported
    has_vllm: bool  # what rollout.engine=auto takes


@dataclass(frozen=True)
class Table:
    """A kind of device: what is on each of `count` of them, by phase and part."""

    name: str
    count: int
    phases: dict[str, Parts]

    @property
    def peak(self) -> float:
        """Bytes of the largest phase."""
        return max(sum(parts.values()) for parts in self.phases.values())


@dataclass(frozen=True)
class BatchShape:
    """A packed batch of prompts and responses of one length each; see models/pack.py."""

    prompt: int  # tokens
    response: int
    prompts: float  # how many
    samples: float
    distinct: float  # shapes of response segments: each has an attention mask of its own on CPU

    @property
    def responses(self) -> float:
        """Response tokens."""
        return self.samples * self.response

    @property
    def tokens(self) -> float:
        """All tokens."""
        return self.prompts * self.prompt + self.responses

    @property
    def keys(self) -> float:
        """Tokens whose keys attention gathers in a layer: a prompt's stand once more for each of
        its responses.
        """
        return self.tokens + self.samples * self.prompt


def samples_per_update(cfg: Config) -> int:
    """Responses that one rank's optimiser step learns from."""
    ranks = (cfg.deepspeed.ranks or 1) if cfg.deepspeed else 1
    return max(
        1,
        cfg.rollout.num_prompts
        * cfg.rollout.group_size
        // cfg.algorithm.updates_per_rollout
        // ranks,
    )


def micro_batch(cfg: Config, budget: int) -> BatchShape:
    """A micro-batch as full as `budget` tokens let it be, of prompts and responses at their limits;
    a single sample may exceed it.
    """
    prompt, response = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    group = min(cfg.rollout.group_size, samples_per_update(cfg))
    tokens = min(max(budget, prompt + response), update_tokens(cfg))
    prompts = max(1.0, tokens / (prompt + group * response))
    samples = (tokens - prompts * prompt) / response
    return BatchShape(
        prompt, response, prompts, samples, prompts if cfg.rollout.ignore_eos else samples
    )


def update_tokens(cfg: Config) -> int:
    """Packed tokens of one rank's optimiser step, at most."""
    samples = samples_per_update(cfg)
    groups = -(-samples // cfg.rollout.group_size)
    return groups * cfg.data.max_prompt_tokens + samples * cfg.rollout.max_new_tokens


# -- weights and what learns -----------------------------------------------------------------------


def element(cfg: Config) -> int:
    """Bytes of one weight in forward and backward."""
    return 4 if cfg.model.dtype == "float32" else 2


def num_trained(cfg: Config, shape: ModelShape) -> int:
    """Parameters of the policy that learn."""
    if cfg.model.lora is not None:
        return shape.adapters(cfg.model.lora.rank, cfg.model.lora.targets)
    return shape.language if cfg.model.freeze_vision else shape.parameters


def bytes_per_trained(cfg: Config) -> tuple[int, int]:
    """Bytes of gradient, and of optimiser (master weight and moments), for each parameter that
    learns, before any sharding.
    """
    half = cfg.model.dtype == "bfloat16"
    precise = not half or cfg.model.master_weights
    gradient = 4 if precise else 2
    # DeepSpeed keeps float32 copies of float32 weights too
    master = 4 if cfg.deepspeed is not None or (half and precise) else 0
    moments = 0 if cfg.optim.name == "sgd" else 2 * gradient
    return gradient, master + moments


def bytes_per_parameter(cfg: Config) -> int:
    """Bytes for each parameter that learns, at the end of a backward and before any sharding;
    low-precision gradients are there twice.
    """
    gradient, optimiser = bytes_per_trained(cfg)
    return element(cfg) + gradient + optimiser + (element(cfg) if gradient > element(cfg) else 0)


def held(cfg: Config, shape: ModelShape) -> tuple[Parts, Parts]:
    """Of one rank: (on its device, in host memory): weights, gradients and optimiser as ZeRO's
    stage and offload lay them out.
    """
    gradient, optimiser = bytes_per_trained(cfg)
    trained = num_trained(cfg, shape)
    weights, gradients, state = (
        float(shape.parameters * element(cfg)),
        float(trained * gradient),
        float(trained * optimiser),
    )
    own: Parts = {}
    host: Parts = {}
    if cfg.deepspeed is not None:
        ranks, stage, offload = (
            cfg.deepspeed.ranks or 1,
            cfg.deepspeed.zero_stage,
            cfg.deepspeed.offload,
        )
        state /= ranks if stage >= 1 else 1
        gradients /= ranks if stage >= 2 else 1
        if stage >= 1:
            own["reduce buckets"] = 4.0 * min(REDUCE_BUCKET, trained)
        if stage == 3:
            weights /= ranks
            own["gathered layers"] = (
                float(element(cfg) * (max(shape.embedding, shape.layer) + shape.layer))
                if ranks > 1
                else 0.0
            )
        if offload != "none":
            host |= {"optimiser": state, "gradients": gradients}
            state = gradients = 0.0
        if offload == "all":
            host["weights"] = weights
            weights = 0.0
    return {"weights": weights, "gradients": gradients, "optimiser": state, **own}, host


# -- activations -----------------------------------------------------------------------------------


def layer_activations(cfg: Config, shape: ModelShape, batch: BatchShape, kind: str) -> float:
    """What autograd keeps of one decoder layer.

    Two norms (their input in float32, the normed state, their output), queries, keys, values and
    the attention's output as it gathers them, the input of its projection, and four tensors of the
    MLP's width.
    """
    size, tokens = element(cfg), batch.tokens
    norm = _norm(cfg, shape.hidden) * tokens
    mlp = 4 * size * shape.intermediate * tokens
    extra = 0.0
    if shape.qk_norm:
        extra += (
            (4 + (0 if cfg.model.lora is not None else size))
            * (shape.queries + shape.keys)
            * tokens
        )
    if cfg.model.lora is not None:
        extra += size * cfg.model.lora.rank * len(cfg.model.lora.targets) * tokens
    return (
        2 * norm
        + mlp
        + extra
        + size * shape.queries * tokens
        + _attention(shape, batch, kind, size)
    )


def _norm(cfg: Config, width: int) -> int:
    """Bytes of an RMSNorm's saved states, of one token; a frozen one does not keep the normed
    state.
    """
    size = element(cfg)
    return width * (4 + size + (0 if cfg.model.lora is not None else size))


def _attention(shape: ModelShape, batch: BatchShape, kind: str, size: int) -> float:
    """Gathered queries, keys, values, the output, and on CPU what the masks or probabilities
    take.
    """
    # flash attention over ragged sequences, keys and values repeated for each query head
    if kind == "cuda" and size == 2:
        return 2 * size * shape.queries * (batch.tokens + batch.keys)
    total = 2 * size * shape.keys * batch.keys
    last = batch.prompt + batch.response
    for rows, keys, count, distinct in (
        (batch.prompt, batch.prompt, batch.prompts, batch.prompts),
        (batch.response, last, batch.samples, batch.distinct),
    ):
        if size == 2 and keys <= SHORT_KEYS:  # plain products: the probabilities stay
            total += size * (shape.queries * rows * count + shape.heads * rows * keys * count)
        else:
            total += size * (
                2 * shape.queries * rows * count
                + shape.heads // shape.kv_heads * rows * keys * distinct
            )
    return total


def activations(cfg: Config, shape: ModelShape, batch: BatchShape, kind: str) -> float:
    """What autograd keeps of a micro-batch's forward; with gradient checkpointing each layer's
    input and one layer whole.
    """
    layer = layer_activations(cfg, shape, batch, kind)
    ends = _norm(cfg, shape.hidden) * batch.tokens + element(cfg) * shape.hidden * batch.responses
    if cfg.model.gradient_checkpointing == "off":
        return shape.layers * layer + ends
    return shape.layers * element(cfg) * shape.hidden * batch.tokens + layer + ends


def vision_activations(cfg: Config, shape: ModelShape, batch: BatchShape) -> float:
    """The same of a vision tower that learns; of a frozen one only a block's states come and go."""
    if shape.vision is None:
        return 0.0
    vision, size = shape.vision, element(cfg)
    patches = batch.prompts * patches_per_prompt(cfg, shape)
    values = size * vision.patch_values * patches
    inner = (4 if vision.gated else 3) * vision.intermediate
    block = patches * (2 * _norm(cfg, vision.hidden) + size * (5 * vision.hidden + inner))
    if cfg.model.freeze_vision or cfg.model.lora is not None:
        return values + block
    if cfg.model.gradient_checkpointing == "off":
        return values + vision.depth * block
    return values + vision.depth * size * vision.hidden * patches + block


def patches_per_prompt(cfg: Config, shape: ModelShape) -> float:
    """Patches of one picture of the largest size, as far as the prompt's limit has room for its
    tokens.
    """
    if shape.vision is None:
        return 0.0
    tokens = min(
        cfg.data.max_pixels / (shape.vision.patch * shape.vision.merge) ** 2,
        cfg.data.max_prompt_tokens,
    )
    return tokens * shape.vision.merge**2


def head_tiles(cfg: Config, shape: ModelShape, batch: BatchShape) -> tuple[float, float]:
    """What models/logprobs.py holds beyond its inputs: (in its forward with entropy, in its
    backward with the head's gradient).
    """
    rows, columns, size = (
        min(TOKEN_TILE, batch.responses),
        min(VOCAB_TILE, shape.vocab),
        element(cfg),
    )
    tile = 4.0 * rows * columns
    forward = 3 * tile
    states = 4 * shape.hidden * batch.responses + size * shape.hidden * rows
    own = (
        0.0 if cfg.model.lora is not None else size * (shape.embedding + 3 * columns * shape.hidden)
    )
    return forward, tile + (tile / 2 if size == 2 else 0) + states + own


def frozen_forward(cfg: Config, shape: ModelShape, tokens: float) -> float:
    """Tensors that a forward without gradient has at one time: a layer's MLP is the widest."""
    return element(cfg) * tokens * (3 * shape.intermediate + 4 * shape.hidden)
