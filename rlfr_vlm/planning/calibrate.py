"""How long a step will take, from single layers of the model's sizes timed on this machine. Random
weights; nothing is downloaded.

A layer is timed in training and without gradient on a packed batch, and in decoding, one token of
each request; beside it a tile of the log-prob head, a tile of the sampler, the velocity network and
the optimiser. What a run does more often, or on longer sequences, is scaled by its floating-point
operations. Pictures, grading, saving and evaluation are left out.

On a CPU the clock is CPU time, so that what else runs on the machine does not lengthen it, and one
thread works: several spin while they wait for one that has lost its core, which is CPU time too. A
run's threads are taken to share the work evenly, each with a core to itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlfr_vlm.algorithm.credit import compares_siblings, scores_first
from rlfr_vlm.config import Config
from rlfr_vlm.flow.network import RMSNorm, VelocityNet
from rlfr_vlm.models.attention import PackedLayout, Segment, grouped_sdpa
from rlfr_vlm.models.logprobs import token_logprobs
from rlfr_vlm.planning.footprint import num_ranks
from rlfr_vlm.planning.memory import (
    FIELD_TILE,
    PREFILL_TOKENS,
    VOCAB_TILE,
    BatchShape,
    Machine,
    micro_batch,
    num_trained,
)
from rlfr_vlm.planning.shapes import ModelShape

BUDGET = {"cpu": 1e10, "cuda": 2e13}  # floating-point operations of one timed call, about
REPEATS = 3  # timed calls; the fastest counts: the others met cold caches or a busy machine
OPTIMISER_SIZE = 2**22  # parameters that its step is timed on


@dataclass(frozen=True)
class Bench:
    """Where and in which precision to time."""

    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    budget: float

    def random(self, *size: int, grad: bool = False) -> Tensor:
        """Normal numbers scaled down, so that products stay finite."""
        return (torch.randn(size, device=self.device) * 0.02).to(self.dtype).requires_grad_(grad)

    def now(self) -> float:
        """Seconds on the clock: of a GPU the wall's, when it has done what it was given; of a CPU
        those that this process worked.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def seconds(self, call: Callable[[], object]) -> float:
        """The fastest of a few calls after a first one."""
        found = []
        for _ in range(REPEATS + 1):
            start = self.now()
            call()
            found.append(self.now() - start)
        return min(found[1:])


def cpu_threads() -> int:
    """Threads that a run's operations use on this CPU."""
    return torch.get_num_threads()


class _Layer(nn.Module):
    """A decoder layer without rotary positions and biases."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.norms = nn.ModuleList(RMSNorm(shape.hidden, 1e-6) for _ in range(2))
        widths = [
            (shape.hidden, shape.queries),
            (shape.hidden, shape.keys),
            (shape.hidden, shape.keys),
            (shape.queries, shape.hidden),
        ]
        widths += [
            (shape.hidden, shape.intermediate),
            (shape.hidden, shape.intermediate),
            (shape.intermediate, shape.hidden),
        ]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in widths)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """x: [S, D]; attend: [1, H, S, d] of queries, keys and values to [1, S, H, d]."""
        q, k, v, o, gate, up, down = self.linears
        states = self.norms[0](x)
        heads = [
            linear(states).view(1, len(x), -1, self.shape.head_size).transpose(1, 2)
            for linear in (q, k, v)
        ]
        x = x + o(attend(*heads).flatten(2)[0])
        states = self.norms[1](x)
        return x + down(F.silu(gate(states)) * up(states))


def step_seconds(
    cfg: Config, shape: ModelShape, machine: Machine, vllm: bool
) -> dict[str, float] | None:
    """Seconds of a training step by part, with every prompt and response at the config's limits;
    None where no such device is here to be timed.

    Prompts are mostly shorter: give it a config whose limit is a typical one's length.
    """
    if machine.kind == "cuda" and not torch.cuda.is_available():
        return None
    bench = Bench(
        shape, torch.device(machine.kind), getattr(torch, cfg.model.dtype), BUDGET[machine.kind]
    )
    generator, threads = torch.get_rng_state(), cpu_threads()
    try:
        if machine.kind == "cuda":
            return _step(cfg, bench, vllm)
        torch.set_num_threads(1)
        return {name: spent / threads for name, spent in _step(cfg, bench, vllm).items()}
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(generator)


def _step(cfg: Config, bench: Bench, vllm: bool) -> dict[str, float]:
    ranks, rollout = num_ranks(cfg), cfg.rollout
    samples = rollout.num_prompts * rollout.group_size / ranks
    batch = micro_batch(cfg, cfg.train.tokens_per_microbatch)
    batches = samples / batch.samples
    forward, both = layer_rates(cfg, bench, batch)
    logprobs, logprobs_both = head_seconds(bench, cfg.model.lora is None)
    work = bench.shape.layers * layer_operations(bench.shape, batch) * batches
    tokens = samples * rollout.max_new_tokens
    passes = {
        "forward": work * forward + tokens * logprobs,
        "both": work * both + tokens * logprobs_both,
    }
    engines = cfg.ray.engines or ranks
    parts = {
        "rollout": rollout_seconds(
            cfg, bench, vllm, rollout.num_prompts * rollout.group_size / engines, forward
        )
    }
    if scores_first(cfg) or compares_siblings(cfg):
        parts["score"] = passes["forward"]
    if cfg.algorithm.needs_reference:
        parts["reference"] = passes["forward"]
    again = work * forward if cfg.model.gradient_checkpointing != "off" else 0.0
    sharded = ranks if cfg.deepspeed is not None and cfg.deepspeed.zero_stage else 1
    stepping = (
        optimiser_seconds(bench)
        * num_trained(cfg, bench.shape)
        / sharded
        * cfg.algorithm.updates_per_rollout
    )
    parts["update"] = passes["both"] + again + stepping
    if cfg.flow is not None:
        score, learn = field_seconds(cfg, bench)
        each = tokens * len(cfg.flow.layers) * len(cfg.flow.sides) * len(cfg.flow.times)
        online, networks = cfg.flow.online, 1 if cfg.flow.contrast == "none" else 2
        learnt = 0.0 if not online.enabled else each * learn
        if online.enabled and online.window:
            learnt = (
                online.updates
                * online.batch_tokens
                * len(cfg.flow.layers)
                * learn
                * cfg.algorithm.updates_per_rollout
            )
        parts["flow"] = networks * (each * score * cfg.flow.reward.draws + learnt)
    return parts


# -- forward and backward --------------------------------------------------------------------------


def layer_operations(shape: ModelShape, batch: BatchShape) -> float:
    """Floating-point operations of one layer's forward."""
    pairs = batch.prompts * batch.prompt**2 + batch.samples * batch.response * (
        batch.prompt + batch.response
    )
    return 2.0 * shape.layer * batch.tokens + 4.0 * shape.queries * pairs


def layer_rates(cfg: Config, bench: Bench, batch: BatchShape) -> tuple[float, float]:
    """Seconds of one operation of a layer's forward: without gradient, and with its backward."""
    group = max(1, min(cfg.rollout.group_size, round(batch.samples)))
    tokens = bench.budget / (6.0 * bench.shape.layer)
    scale = min(1.0, tokens / (batch.prompt + group * batch.response))
    small = BatchShape(
        max(1, int(batch.prompt * scale)), max(1, int(batch.response * scale)), 1, group, 1
    )
    starts = [small.prompt + i * small.response for i in range(group)]
    segments = [
        Segment(0, small.prompt),
        *(Segment(a, a + small.response, 0, small.prompt) for a in starts),
    ]
    layout = PackedLayout(segments, bench.device)
    layer = _Layer(bench.shape).to(bench.device, bench.dtype)
    x = bench.random(int(small.tokens), bench.shape.hidden, grad=True)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return layout.attend(0, query, key, value, bench.shape.head_size**-0.5)

    def forward() -> None:
        with torch.no_grad():
            layer(x, attend)

    done = layer_operations(bench.shape, small)
    return bench.seconds(forward) / done, bench.seconds(
        lambda: layer(x, attend).sum().backward()
    ) / done


def head_seconds(bench: Bench, trained: bool) -> tuple[float, float]:
    """Seconds of one token's log-prob and entropy: without gradient, and with its backward."""
    columns = min(VOCAB_TILE, bench.shape.vocab)
    rows = int(max(16, min(1024, bench.budget / (8.0 * columns * bench.shape.hidden))))
    weight = bench.random(columns, bench.shape.hidden, grad=trained)
    hidden = bench.random(rows, bench.shape.hidden, grad=True)
    tokens = torch.zeros(rows, dtype=torch.long, device=bench.device)
    banned = tokens[:0]

    def forward() -> None:
        with torch.no_grad():
            token_logprobs(hidden, weight, tokens, banned, 1.0, True)

    share = bench.shape.vocab / columns / rows
    both = bench.seconds(
        lambda: token_logprobs(hidden, weight, tokens, banned, 1.0, True)[0].sum().backward()
    )
    return bench.seconds(forward) * share, both * share


def optimiser_seconds(bench: Bench) -> float:
    """Seconds of AdamW for one parameter."""
    parameter = torch.zeros(OPTIMISER_SIZE, device=bench.device, requires_grad=True)
    parameter.grad = torch.zeros_like(parameter)
    adamw = torch.optim.AdamW([parameter], fused=True)
    return bench.seconds(adamw.step) / OPTIMISER_SIZE


def field_seconds(cfg: Config, bench: Bench) -> tuple[float, float]:
    """Seconds of one latent in the velocity network: without gradient, and with its backward."""
    assert cfg.flow is not None
    shape = bench.shape
    network = VelocityNet(shape.hidden, cfg.flow.network.depth).to(bench.device)
    weights = sum(p.numel() for p in network.parameters())
    rows = int(max(16, min(FIELD_TILE / shape.hidden, bench.budget / (6.0 * weights))))
    x, noise = (torch.randn(rows, shape.hidden, device=bench.device) for _ in range(2))
    at, layer = (torch.full((rows,), 0.5, device=bench.device) for _ in range(2))

    def forward() -> Tensor:
        with torch.autocast(
            bench.device.type, dtype=torch.bfloat16, enabled=bench.dtype == torch.bfloat16
        ):
            return network(noise, at, layer, x)

    def score() -> None:
        with torch.no_grad():
            forward()

    return bench.seconds(score) / rows, bench.seconds(
        lambda: forward().float().square().mean().backward()
    ) / rows


# -- sampling --------------------------------------------------------------------------------------


def rollout_seconds(cfg: Config, bench: Bench, vllm: bool, samples: float, forward: float) -> float:
    """Prompts once each, then one token of every request at a time. forward: seconds of an
    operation of a layer's forward.
    """
    shape, rollout = bench.shape, cfg.rollout
    prompt, response, group = cfg.data.max_prompt_tokens, rollout.max_new_tokens, rollout.group_size
    if vllm:
        requests = min(samples, rollout.vllm.max_num_seqs)
    else:
        prompts = min(
            samples / group,
            max(1, rollout.hf_batch_size // group),
            max(1, PREFILL_TOKENS // prompt),
        )
        requests = max(1.0, prompts) * group
    prefill = (
        samples
        / group
        * shape.layers
        * layer_operations(shape, BatchShape(prompt, response, 1, 0, 0))
        * forward
    )
    token = shape.layers * decode_seconds(cfg, bench, int(requests)) + sampler_seconds(
        bench, int(requests)
    )
    return prefill + samples / requests * response * token


@torch.no_grad()
def decode_seconds(cfg: Config, bench: Bench, requests: int) -> float:
    """Seconds of one token of every request in one layer, with half of the response in the
    cache.
    """
    shape = bench.shape
    length = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens // 2
    timed = max(
        1, min(requests, int(bench.budget / (2.0 * shape.layer + 4.0 * shape.queries * length)))
    )
    layer = _Layer(shape).to(bench.device, bench.dtype)
    x = bench.random(timed, shape.hidden)
    keys, values = (bench.random(timed, shape.kv_heads, length, shape.head_size) for _ in range(2))
    mask = torch.ones(timed, 1, 1, length, dtype=torch.bool, device=bench.device)

    def attend(query: Tensor, _key: Tensor, _value: Tensor) -> Tensor:
        return grouped_sdpa(
            query[0].transpose(0, 1)[:, :, None], keys, values, mask, shape.head_size**-0.5
        )[:, :, 0][None]

    return bench.seconds(lambda: layer(x, attend)) * requests / timed


@torch.no_grad()
def sampler_seconds(bench: Bench, requests: int) -> float:
    """Seconds of the head and the draw for one token of every request."""
    columns = min(VOCAB_TILE, bench.shape.vocab)
    weight, hidden = (
        bench.random(columns, bench.shape.hidden),
        bench.random(requests, bench.shape.hidden),
    )

    def draw() -> Tensor:
        return F.linear(hidden, weight).float().log_softmax(-1).double().exp_().cumsum(-1)

    return bench.seconds(draw) * bench.shape.vocab / columns
