"""`rlfr-vlm plan`: what a run will need before anything starts, and the smallest change that makes
one fit which does not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import psutil

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError
from rlfr_vlm.planning.footprint import disk, engine_problem, num_ranks, predict, uses_vllm
from rlfr_vlm.planning.memory import GIB, Machine, Parts, Table
from rlfr_vlm.planning.shapes import ModelShape, read_shape
from rlfr_vlm.planning.workload import typical_prompt

LATER = (
    60 * 2**20
    # resident bytes of what a process loads and touches after its imports, before the model;
    # measured
)
PROCESS, VLLM_PROCESS = (
    590 * 2**20,
    850 * 2**20,
)  # resident bytes of the libraries, where they are not measured: torch 2.13, vLLM 0.32
# what a training process has loaded when its model is there; imports of ours that are late too
IMPORTS = (
    "rlfr_vlm.commands",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "torch.utils.tensorboard",
)
VLLM_IMPORTS = {
    "cpu": ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"),
    "cuda": ("vllm.entrypoints.llm",),
}
# share of a device's peak from which the libraries are imported to be weighed, which takes 20
# seconds of a core; below it the sizes above are near enough
WEIGHED = 0.05
SMALLEST_BATCH = 512  # tokens_per_microbatch is not proposed below it
RANKS = (2, 4, 8, 16, 32, 64)
SHARES = (
    0.9,
    0.8,
    0.7,
    0.6,
    0.5,
    0.4,
    0.3,
    0.25,
    0.2,
    0.15,
    0.1,
)  # of a GPU, that are tried for vLLM

Vary = Callable[[Sequence[str]], Config]  # the config with further overrides
Knob = tuple[str, ...]  # overrides that belong together


@dataclass(frozen=True)
class Plan:
    """What a run comes to. Sizes in bytes, times in seconds."""

    model: str
    shape: ModelShape
    machine: Machine
    engine: str
    tables: list[Table]
    shortfalls: list[str]  # why it does not fit; empty where it does
    disk: Parts
    disk_free: int
    steps: int
    samples: int  # per step
    tokens: int  # per step, at most
    response_tokens: int  # of these
    typical_prompt: int  # tokens, for the time; the limit where data.train is not at hand
    seconds: dict[str, float] | None  # of a step, by part; None without calibration
    threads: int | None  # of a CPU, which share the measured CPU time; None of a GPU
    overrides: list[str] | None  # that make it fit; None where nothing that was tried does

    @property
    def fits(self) -> bool:
        """Whether every device holds its share."""
        return not self.shortfalls


def plan(
    vary: Vary,
    device_memory: float | None = None,
    model_config: str | None = None,
    calibrate: bool = True,
) -> Plan:
    """Predict a run. vary(()) is its config; device_memory in GiB.

    Raises UserError where the model's sizes or the device's memory are not known.
    """
    cfg = vary(())
    shape = read_shape(cfg.model.path, model_config)
    machine = find_machine(cfg, device_memory, False)
    tables = predict(cfg, shape, machine)
    if calibrate and WEIGHED * max(table.peak for table in tables) < PROCESS:
        machine = find_machine(cfg, device_memory, True)
        tables = predict(cfg, shape, machine)
    shortfalls = find_shortfalls(cfg, shape, machine, tables)
    rollout = cfg.rollout
    samples = rollout.num_prompts * rollout.group_size
    prompt = typical_prompt(cfg, shape)
    seconds = threads = None
    if calibrate:
        from rlfr_vlm.planning.calibrate import cpu_threads, step_seconds

        shorter = cfg.model_copy(
            update={"data": cfg.data.model_copy(update={"max_prompt_tokens": prompt})}
        )
        seconds = step_seconds(shorter, shape, machine, uses_vllm(cfg, machine))
        threads = cpu_threads() if machine.kind == "cpu" else None
    return Plan(
        model=cfg.model.path,
        shape=shape,
        machine=machine,
        engine="vllm" if uses_vllm(cfg, machine) else "hf",
        tables=tables,
        shortfalls=shortfalls,
        disk=disk(cfg, shape),
        disk_free=_free(Path(cfg.output_dir)),
        steps=cfg.train.steps,
        samples=samples,
        tokens=rollout.num_prompts * cfg.data.max_prompt_tokens + samples * rollout.max_new_tokens,
        response_tokens=samples * rollout.max_new_tokens,
        typical_prompt=prompt,
        seconds=seconds,
        threads=threads,
        overrides=find_overrides(vary, shape, machine) if shortfalls else [],
    )


# -- the machine -----------------------------------------------------------------------------------


def find_machine(cfg: Config, device_memory: float | None, measure: bool) -> Machine:
    """The device that model.device names, with `device_memory` GiB where given. Raises UserError
    for a GPU of unknown memory.
    """
    kind: Literal["cpu", "cuda"] = "cpu"
    gpu = None if cfg.model.device == "cpu" else gpu_memory()
    if cfg.model.device.startswith("cuda") or gpu is not None:
        kind = "cuda"
    memory = (
        device_memory * GIB
        if device_memory is not None
        else gpu
        if kind == "cuda"
        else host_memory()
    )
    if memory is None:
        raise UserError(
            f"model.device={cfg.model.device}: no GPU is found here: say what one holds with "
            "--device-memory GIB"
        )
    machine = Machine(
        kind,
        float(memory),
        float(PROCESS + LATER),
        float(VLLM_PROCESS + LATER),
        find_spec("vllm") is not None,
    )
    if not measure:
        return machine
    if uses_vllm(cfg, machine) and machine.has_vllm:
        return replace(
            machine,
            vllm_process=LATER + (imported_bytes(IMPORTS + VLLM_IMPORTS[kind]) or VLLM_PROCESS),
        )
    return replace(machine, process=LATER + (imported_bytes(IMPORTS) or PROCESS))


def gpu_memory() -> int | None:
    """Bytes of the first GPU that the driver lists; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return int(float(found.stdout.split()[0]) * 2**20) if found.returncode == 0 else None
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def host_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's limit."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit
        return total


def imported_bytes(modules: Sequence[str]) -> float | None:
    """Resident bytes of a fresh interpreter that imports these modules; None where it cannot."""
    code = f"import psutil, {', '.join(modules)}\nprint(psutil.Process().memory_info().rss)"
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment,
        )
        return float(done.stdout.split()[-1]) if done.returncode == 0 else None
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def _free(folder: Path) -> int:
    """Free bytes of the disk that a folder is or will be on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


# -- does it fit? ----------------------------------------------------------------------------------


def find_shortfalls(
    cfg: Config, shape: ModelShape, machine: Machine, tables: Sequence[Table]
) -> list[str]:
    """What lacks memory, as lines; CPU devices share the machine's."""
    found = []
    if machine.kind == "cpu":
        needed = sum(table.count * table.peak for table in tables)
        if needed > machine.memory:
            found.append(
                f"{gib(needed)} of main memory are needed, {gib(machine.memory)} are there"
            )
    else:
        for table in tables:
            if table.name != "host" and table.peak > machine.memory:
                found.append(
                    f"each {table.name} device needs {gib(table.peak)} and has "
                    f"{gib(machine.memory)}"
                )
    problem = engine_problem(cfg, shape, machine)
    return [*found, problem] if problem else found


def find_overrides(vary: Vary, shape: ModelShape, machine: Machine) -> list[str] | None:
    """The first knob that makes the run fit; where none does alone, as few as do together. None
    where nothing does.
    """

    def fits(overrides: Sequence[str]) -> bool:
        try:
            cfg = vary(overrides)
        except UserError:
            return False
        return not find_shortfalls(cfg, shape, machine, predict(cfg, shape, machine))

    groups = list(knobs(vary(()), machine))
    for knob in chain.from_iterable(groups):
        if fits(knob):
            return list(knob)
    together: list[Knob] = []
    for group in groups:
        for knob in group:
            if fits([*chain.from_iterable(together), *knob]):
                return _needed([*together, knob], fits)
        together.append(group[-1])
    return None


def _needed(chosen: list[Knob], fits: Callable[[Sequence[str]], bool]) -> list[str]:
    """The knobs without which it would not fit."""
    for knob in list(chosen):
        others = [other for other in chosen if other is not knob]
        if fits(list(chain.from_iterable(others))):
            chosen = others
    return list(chain.from_iterable(chosen))


def knobs(cfg: Config, machine: Machine) -> Iterator[list[Knob]]:
    """Groups of overrides, the cheapest first; within a group from the gentlest to the
    strongest.
    """
    least = max(SMALLEST_BATCH, cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens)
    budgets, size = [], cfg.train.tokens_per_microbatch // 2
    while size >= least:
        budgets.append((f"train.tokens_per_microbatch={size}",))
        size //= 2
    yield from filter(None, [budgets])
    if cfg.model.gradient_checkpointing == "off":
        yield [("model.gradient_checkpointing=nonreentrant",)]
    yield from filter(None, [list(_engine_knobs(cfg, machine))])
    yield from filter(None, [list(_sharding_knobs(cfg, machine))])
    if cfg.model.lora is None:
        yield [("model.lora.rank=16",)]
    if cfg.model.dtype == "float32":
        yield [("model.dtype=bfloat16",)]
    if not cfg.deepspeed and cfg.model.master_weights:
        yield [("model.dtype=bfloat16", "model.master_weights=false")]


def _engine_knobs(cfg: Config, machine: Machine) -> Iterator[Knob]:
    if not uses_vllm(cfg, machine):
        size = min(cfg.rollout.hf_batch_size, cfg.rollout.num_prompts * cfg.rollout.group_size) // 2
        while size >= cfg.rollout.group_size:
            yield (f"rollout.hf_batch_size={size}",)
            size //= 2
        return
    settings = cfg.rollout.vllm
    if machine.kind == "cpu":
        if settings.kv_cache_gib > 1:
            yield ("rollout.vllm.kv_cache_gib=1",)
        return
    asleep: Knob = () if settings.sleep or cfg.ray.engines else ("rollout.vllm.sleep=true",)
    if asleep:
        yield asleep
    for share in SHARES:
        if share != settings.gpu_memory_utilization:
            yield (*asleep, f"rollout.vllm.gpu_memory_utilization={share}")


def _sharding_knobs(cfg: Config, machine: Machine) -> Iterator[Knob]:
    """More devices, then stronger sharding, then the host's memory; on CPU ranks share one memory,
    so that none of it helps.
    """
    if machine.kind == "cpu":
        return
    now, stage = num_ranks(cfg), cfg.deepspeed.zero_stage if cfg.deepspeed else 0
    started: Knob = () if cfg.launcher == "ray" else ("launcher=ray",)
    if now > 1:
        for higher in range(stage + 1, 4):
            yield (f"deepspeed.zero_stage={higher}",)
    for ranks in (r for r in RANKS if r > now):
        for higher in (2, 3):
            yield (*started, f"deepspeed.ranks={ranks}", f"deepspeed.zero_stage={higher}")
    if cfg.deepspeed is None or cfg.deepspeed.offload == "none":
        yield (f"deepspeed.ranks={now}", "deepspeed.zero_stage=2", "deepspeed.offload=optimizer")
    yield (f"deepspeed.ranks={now}", "deepspeed.zero_stage=3", "deepspeed.offload=all")


# -- telling ---------------------------------------------------------------------------------------


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:,.2f} GiB"


def as_json(found: Plan) -> str:
    """The plan as one JSON object; sizes in bytes, times in seconds."""
    tree: dict[str, Any] = {**asdict(found), "fits": found.fits}
    for table, own in zip(tree["tables"], found.tables, strict=True):
        table["peak"] = own.peak
    return json.dumps(tree, indent=1)


def as_text(found: Plan) -> str:
    """The plan for people."""
    machine, shape = found.machine, found.shape
    device = "GPU" if machine.kind == "cuda" else "CPU"
    lines = [
        f"model    {found.model}: {shape.parameters / 1e6:,.1f}M parameters, {shape.layers} layers "
        f"of width {shape.hidden}, {shape.vocab:,} tokens",
        f"device   {device} with {gib(machine.memory)}; rollouts by {found.engine}",
        f"step     {found.samples:,} samples, at most {found.tokens:,} tokens, "
        f"{found.response_tokens:,} of them responses; {found.steps:,} steps",
    ]
    for table in found.tables:
        lines += ["", *_table_lines(table)]
    lines += ["", "disk (output_dir)"]
    lines += [f"  {name:34} {gib(size):>12}" for name, size in found.disk.items()]
    needed = sum(found.disk.values())
    lines.append(
        f"  {'free here':34} "
        f"{gib(found.disk_free):>12}{'   too little' if needed > found.disk_free else ''}"
    )
    lines += ["", *_time_lines(found), "", *_verdict(found)]
    return "\n".join(lines) + "\n"


def _table_lines(table: Table) -> list[str]:
    """Parts as rows, the largest first; phases as columns."""
    phases = list(table.phases)
    names = {name for parts in table.phases.values() for name in parts}
    rows = sorted(
        names, key=lambda name: -max(parts.get(name, 0.0) for parts in table.phases.values())
    )
    title = {
        "trainer": "memory of each trainer device",
        "engine": "memory of each engine device",
        "host": "host memory",
    }[table.name]
    lines = [
        f"{title + (f' ({table.count} of them)' if table.count > 1 else ''):36}"
        + "".join(f"{phase:>14}" for phase in phases)
    ]
    for name in rows:
        sizes = [parts.get(name, 0.0) for parts in table.phases.values()]
        if max(sizes) >= 0.005 * GIB:
            lines.append(
                f"  {name:34}" + "".join(f"{gib(size) if size else '-':>14}" for size in sizes)
            )
    totals = [sum(parts.values()) for parts in table.phases.values()]
    return [*lines, f"  {'together':34}" + "".join(f"{gib(total):>14}" for total in totals)]


def _time_lines(found: Plan) -> list[str]:
    if found.seconds is None:
        return ["time per step: not estimated (--no-calibrate)"]
    measured = "  nothing else running"
    if found.threads is not None:
        shared = f", and shared evenly by {found.threads} threads" if found.threads > 1 else ""
        measured = "  CPU time of one thread, which other programs do not lengthen" + shared
    total = sum(found.seconds.values())
    parts = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in found.seconds.items())
    return [
        f"time per step, about {total:,.1f} s ({parts}); {total * found.steps / 3600:,.1f} h for "
        "all steps",
        "  an estimate from single layers timed on this machine: prompts of about "
        f"{found.typical_prompt:,} tokens, every response at its limit,",
        f"{measured}; pictures, grading, saving and evaluation are not in it",
    ]


def _verdict(found: Plan) -> list[str]:
    if found.fits:
        return ["fits"]
    lines = [f"does not fit: {reason}" for reason in found.shortfalls]
    if found.overrides is None:
        return [
            *lines,
            "no setting that was tried makes it fit: take a larger device, a smaller model or "
            "shorter sequences",
        ]
    return [*lines, f"with this it fits: {' '.join(found.overrides)}"]
