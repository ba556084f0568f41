"""Where a run's memory lies: tables of the trainer's devices, of engines with devices of their own,
of host memory and of the disk.
"""

from __future__ import annotations

from rlfr_vlm.config import Config
from rlfr_vlm.planning.memory import (
    CPU_HELD,
    CUDA_CONTEXT,
    CUDA_HELD,
    FIELD_TILE,
    GIB,
    GRADER,
    PREFILL_TOKENS,
    BatchShape,
    Machine,
    Parts,
    Table,
    activations,
    bytes_per_trained,
    element,
    frozen_forward,
    head_tiles,
    held,
    micro_batch,
    num_trained,
    patches_per_prompt,
    update_tokens,
    vision_activations,
)
from rlfr_vlm.planning.schedule import due_steps
from rlfr_vlm.planning.shapes import ModelShape, num_flow_parameters

ROLLOUT, UPDATE, SAVING = "rollout", "update", "saving"
FILE_BYTES = 2**29  # of storage/shards.py: held in host memory before they are written
# bytes of one token in rollouts/step_N.jsonl: text, log-prob, advantage, flow reward, entropy;
# measured
TOKEN_TEXT = 60


def num_ranks(cfg: Config) -> int:
    """Training processes."""
    return (cfg.deepspeed.ranks or 1) if cfg.deepspeed else 1


def uses_vllm(cfg: Config, machine: Machine) -> bool:
    """Which engine the config comes to."""
    return cfg.rollout.engine == "vllm" or (cfg.rollout.engine == "auto" and machine.has_vllm)


def predict(cfg: Config, shape: ModelShape, machine: Machine) -> list[Table]:
    """One table per kind of device, the trainer's first, then host memory."""
    tables = [Table("trainer", num_ranks(cfg), _trainer(cfg, shape, machine))]
    if cfg.ray.engines:
        phases = {
            ROLLOUT: {
                **_engine(cfg, shape, machine),
                "process": _process(cfg, machine, engine=True),
            }
        }
        tables.append(Table("engine", cfg.ray.engines * cfg.rollout.vllm.tensor_parallel, phases))
    return [*tables, Table("host", 1, _host(cfg, shape, machine))]


def _process(cfg: Config, machine: Machine, engine: bool) -> float:
    if machine.kind == "cuda":
        return float(CUDA_CONTEXT)
    return machine.vllm_process if engine and uses_vllm(cfg, machine) else machine.process


# -- the trainer's device --------------------------------------------------------------------------


def _trainer(cfg: Config, shape: ModelShape, machine: Machine) -> dict[str, Parts]:
    """What stands through the whole step, and on top what sampling and each part of the update need
    at their height.
    """
    own, _ = held(cfg, shape)
    gradients = own.pop("gradients")
    here = not cfg.ray.engines
    static = {**own, **_beside(cfg, shape), "process": _process(cfg, machine, engine=here)}
    engine = _engine(cfg, shape, machine) if here else {}
    rollout = {**static, **engine}
    if not uses_vllm(cfg, machine):
        engine = {name: size for name, size in engine.items() if name == "engine weights"}
    elif machine.kind == "cuda" and cfg.rollout.vllm.sleep:
        engine = {}
    updates = [{**static, **engine, **parts} for parts in _updates(cfg, shape, machine, gradients)]
    phases = {ROLLOUT: rollout, UPDATE: max(updates, key=lambda parts: sum(parts.values()))}
    if machine.kind == "cpu":
        # DeepSpeed keeps its buffers
        kept = {"gradients": gradients} if cfg.deepspeed is not None else {}
        kept["held by the allocator"] = updates[0]["held by the allocator"] if kept else 0.0
        phases[SAVING] = {
            **static,
            **engine,
            **kept,
            "copies being written": _copies(cfg, shape, machine),
        }
    return phases


def _copies(cfg: Config, shape: ModelShape, machine: Machine) -> float:
    """Tensors that one rank's checkpoint copies to host memory before a file of them is written;
    weights that lie there whole are not copied.
    """
    if cfg.deepspeed is None and machine.kind == "cpu":
        return 0.0
    trained = num_trained(cfg, shape)
    return min(
        float(FILE_BYTES),
        trained * max(float(element(cfg)), bytes_per_trained(cfg)[1] / num_ranks(cfg)),
    )


def _beside(cfg: Config, shape: ModelShape) -> Parts:
    """Networks beside the policy: the reference, the field, the head; none of them is sharded."""
    parts: Parts = {}
    if cfg.algorithm.needs_reference:
        parts["reference"] = float(shape.parameters * element(cfg))
    if cfg.flow is not None:
        weights = num_flow_parameters(shape.hidden, cfg.flow)
        parts["flow field"] = weights * (12.0 if cfg.flow.online.enabled else 4.0)
    if cfg.algorithm.loss == "flowrl":
        parts["head"] = 16.0 * 2 * shape.hidden**2
    return parts


def _updates(cfg: Config, shape: ModelShape, machine: Machine, gradients: float) -> list[Parts]:
    """The candidates for the update's height: a first micro-batch, a later one, the end of a
    backward, the field's backward.
    """
    kind, total = machine.kind, update_tokens(cfg)
    first = micro_batch(cfg, cfg.train.tokens_per_microbatch)
    field = (
        4.0 * num_flow_parameters(shape.hidden, cfg.flow)
        if cfg.flow and cfg.flow.online.enabled
        else 0.0
    )
    after = {"gradients": gradients} | ({"flow gradients": field} if field else {})
    found = [_forward(cfg, shape, first, kind)]
    # it keeps what the largest micro-batch had
    after["held by the allocator"] = found[0]["held by the allocator"]
    if total > first.tokens:
        rest = int(total - first.tokens) + cfg.data.max_prompt_tokens
        later = _forward(
            cfg, shape, micro_batch(cfg, min(cfg.train.tokens_per_microbatch, rest)), kind
        )
        found.append({**after, **later} | {"held by the allocator": after["held by the allocator"]})
    found.append({**after, "backward": _end_of_backward(cfg, shape)})
    if cfg.flow is not None:
        found.append({**after, "flow tiles": _field_backward(cfg, shape, first)})
    return found


def _forward(cfg: Config, shape: ModelShape, batch: BatchShape, kind: str) -> Parts:
    """Forward and the start of the backward: all activations are there."""
    parts: Parts = {"activations": activations(cfg, shape, batch, kind)}
    if shape.vision is not None:
        parts["vision activations"] = vision_activations(cfg, shape, batch)
    forward, backward = head_tiles(cfg, shape, batch)
    if cfg.algorithm.needs_reference:
        forward = max(forward, frozen_forward(cfg, shape, batch.tokens))
    if cfg.flow is not None:
        parts["flow latents"] = (
            len(cfg.flow.layers) * element(cfg) * shape.hidden * (batch.responses + batch.samples)
        )
        forward = max(forward, 12 * 4.0 * FIELD_TILE)
    parts["log-prob tiles"] = max(forward, backward)
    rate = CPU_HELD if kind == "cpu" else CUDA_HELD
    return {**parts, "held by the allocator": rate * sum(parts.values())}


def _end_of_backward(cfg: Config, shape: ModelShape) -> float:
    """Gradients in the weights' own precision before they are added up in float32; and the
    embedding's before it is added to a tied head's.
    """
    if cfg.model.lora is not None:
        return 0.0
    sharded = cfg.deepspeed is not None and cfg.deepspeed.zero_stage >= 2
    copies = (
        num_trained(cfg, shape)
        if element(cfg) == 2 and bytes_per_trained(cfg)[0] == 4 and not sharded
        else 0
    )
    return float(element(cfg) * (copies + shape.embedding))


def _field_backward(cfg: Config, shape: ModelShape, batch: BatchShape) -> float:
    """The latents, one tile's graph (per block 14 tensors of its size, in float32 or under
    autocast) and the noise of a response.
    """
    assert cfg.flow is not None
    latents = (
        len(cfg.flow.layers) * shape.hidden * (element(cfg) * batch.tokens + 4.0 * batch.response)
    )
    return latents + 4.0 * FIELD_TILE * (10 + 14 * cfg.flow.network.depth * len(cfg.flow.times))


# -- sampling --------------------------------------------------------------------------------------


def _engine(cfg: Config, shape: ModelShape, machine: Machine) -> Parts:
    """An engine's share of one device."""
    if not uses_vllm(cfg, machine):
        apart = cfg.ray.engines or (cfg.deepspeed is not None and cfg.deepspeed.zero_stage == 3)
        copy = {"engine weights": float(element(cfg) * shape.parameters)} if apart else {}
        return {**copy, **_hf_engine(cfg, shape, machine)}
    settings = cfg.rollout.vllm
    size = {"auto": element(cfg), "float32": 4, "bfloat16": 2}[settings.dtype]
    weights = size * shape.parameters / settings.tensor_parallel
    if machine.kind == "cuda":
        least = (
            kv_bytes(shape, size)
            * (cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens)
            / settings.tensor_parallel
        )
        room = settings.gpu_memory_utilization * machine.memory
        return {"engine weights": weights, "KV cache": max(least, room - weights)}
    packed_head = size * shape.embedding if shape.tied else 0
    logits = 4 * 4.0 * settings.max_num_seqs * shape.vocab
    return {
        "engine weights": float(weights + packed_head),
        "KV cache": float(settings.kv_cache_gib * GIB),
        "sampling": logits,
    }


def kv_bytes(shape: ModelShape, size: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * size * shape.keys * shape.layers


def _hf_engine(cfg: Config, shape: ModelShape, machine: Machine) -> Parts:
    """The cache with room for every response, the prompts' states that it is filled from, and the
    logits of one token per request.
    """
    rollout, size = cfg.rollout, element(cfg)
    prompts = min(
        rollout.num_prompts // num_ranks(cfg) or 1,
        max(1, rollout.hf_batch_size // rollout.group_size),
    )
    prompts = min(prompts, max(1, PREFILL_TOKENS // cfg.data.max_prompt_tokens))
    requests = prompts * rollout.group_size
    capacity = cfg.data.max_prompt_tokens + rollout.max_new_tokens
    copies = 1.0 if rollout.ignore_eos else 1.5  # finished requests leave: half of it is copied
    each = kv_bytes(shape, size)
    prefill = frozen_forward(cfg, shape, prompts * cfg.data.max_prompt_tokens)
    vision = (
        size
        * patches_per_prompt(cfg, shape)
        * prompts
        * (shape.vision.patch_values + 8 * shape.vision.hidden)
        if shape.vision
        else 0.0
    )
    return {
        "KV cache": copies * each * requests * capacity
        + each * prompts * cfg.data.max_prompt_tokens,
        # float32 logits and log-probs, float64 sums; or the prompts
        "sampling": max(24.0 * requests * shape.vocab, prefill + vision),
    }


def engine_problem(cfg: Config, shape: ModelShape, machine: Machine) -> str | None:
    """Why vLLM would not start in its share of a GPU; None where it does."""
    if machine.kind != "cuda" or not uses_vllm(cfg, machine):
        return None
    parts, share = _engine(cfg, shape, machine), cfg.rollout.vllm.gpu_memory_utilization
    if sum(parts.values()) <= share * machine.memory * 1.001:
        return None
    return (
        f"rollout.vllm.gpu_memory_utilization={share:g} gives vLLM "
        f"{share * machine.memory / GIB:.1f} GiB, but its weights and the KV cache of "
        f"one sequence take {sum(parts.values()) / GIB:.1f} GiB"
    )


# -- host memory and disk --------------------------------------------------------------------------


def _host(cfg: Config, shape: ModelShape, machine: Machine) -> dict[str, Parts]:
    """Main memory beside what the tables of CPU devices show."""
    ranks = num_ranks(cfg)
    graders = cfg.reward.grader.workers * ranks * float(GRADER)
    prompts = cfg.rollout.num_prompts * (16.0 * cfg.data.max_prompt_tokens + _pictures(cfg, shape))
    if machine.kind == "cpu":
        return {"run": {"graders": graders, "encoded prompts": prompts}}
    _, offloaded = held(cfg, shape)
    processes = ranks * (machine.process if cfg.ray.engines else _host_process(cfg, machine))
    processes += cfg.ray.engines * cfg.rollout.vllm.tensor_parallel * _host_process(cfg, machine)
    weights = float(element(cfg) * shape.parameters)
    run = {"processes": processes, "graders": graders, "encoded prompts": prompts}
    run |= {f"offloaded {name}": ranks * size for name, size in offloaded.items()}
    # the exported model, or the ranks' parts of a checkpoint
    saving = max(weights, ranks * _copies(cfg, shape, machine))
    return {
        "loading": {**run, "weights being loaded": ranks * weights},
        SAVING: {**run, "copies being written": saving},
    }


def _host_process(cfg: Config, machine: Machine) -> float:
    return machine.vllm_process if uses_vllm(cfg, machine) else machine.process


def _pictures(cfg: Config, shape: ModelShape) -> float:
    """Bytes of one prompt's picture, as pixels and as patches."""
    if shape.vision is None:
        return 0.0
    return patches_per_prompt(cfg, shape) * (
        3.0 * shape.vision.patch**2 + element(cfg) * shape.vision.patch_values
    )


def disk(cfg: Config, shape: ModelShape) -> Parts:
    """Bytes under output_dir at the end, and while the last checkpoint is being written."""
    _, optimiser = bytes_per_trained(cfg)
    checkpoint = num_trained(cfg, shape) * float(element(cfg) + optimiser)
    if cfg.flow is not None:
        checkpoint += num_flow_parameters(shape.hidden, cfg.flow) * (
            12.0 if cfg.flow.online.enabled else 4.0
        )
    if cfg.algorithm.loss == "flowrl":
        checkpoint += 12.0 * 2 * shape.hidden**2
    saved = len(due_steps(cfg.train.save_steps, cfg.train.steps))
    count = min(saved, cfg.train.keep_checkpoints + 1) + (1 if cfg.eval.every else 0)
    shown = min(cfg.train.log_rollouts, cfg.rollout.num_prompts) * cfg.rollout.group_size
    return {
        f"checkpoints: {count} of {checkpoint / GIB:.2f} GiB": count * checkpoint,
        "exported model": float(element(cfg) * shape.parameters),
        "rollouts": float(cfg.train.steps * shown * cfg.rollout.max_new_tokens * TOKEN_TEXT),
    }
