"""Weight sync into a vLLM engine in this process, and the proof that the engine holds the trainer's weights.

On CPU, vLLM packs every linear weight after loading and drops the original, so its own `load_weights` cannot run a second time; a tied
head keeps a packed copy of its own beside the embedding it shares. Here each packed weight is rebuilt from the trainer's, heads included.
On other devices weights stay as they are and vLLM's `load_weights` does the copy.

The proof is exact, and part of every sync: plain parameters are compared whole; of a packed weight, columns are read back through the layer
itself (a one-hot input returns a column, bit for bit), and one row of random signs covers the columns that were not drawn.
What it cannot see, a model that computes something else with the right weights, `logprob_gap` shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rlfr_vlm.errors import StoppedError
from rlfr_vlm.types import Rollout

NUM_COLUMNS = 8  # columns of every packed weight that one check reads back
MIN_PROBE_TOKENS = 64
_SHARDS = {"q": 0, "k": 1, "v": 2}  # the order in which vLLM stacks attention weights; others are numbered


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the trainer stands in the engine."""

    source: str  # the trainer's name
    start: int  # rows of the engine's parameter
    end: int


@dataclass(frozen=True)
class Layout:
    """Every tensor of the trainer and its place. Stacked weights (q, k, v; gate, up) have several slots."""

    slots: dict[str, tuple[Slot, ...]]  # by the engine's parameter name
    tied: dict[str, str] = field(default_factory=dict)  # trainer's tensors that share another one's storage


@dataclass(frozen=True)
class Mismatch:
    """A tensor that differs between trainer and engine."""

    source: str
    target: str
    difference: float  # largest absolute one; infinite where a value is not finite
    stale_head: bool = False

    def __str__(self) -> str:
        what = "the tied head is stale: " if self.stale_head else ""
        return f"{what}engine tensor `{self.target}` differs from the trainer's `{self.source}` by up to {self.difference:.3g}"


def trainer_tensors(policy: Any) -> dict[str, Tensor]:
    """The policy's weights by name, tied ones under each of their names."""
    return policy.model.state_dict()


def map_weights(model: Any, tensors: Mapping[str, Tensor]) -> Layout:
    """Ask vLLM's own loader (its name mapper, its stacking rules) where each tensor goes: run it with loaders that note instead of copying.

    Raises StoppedError naming a tensor that vLLM does not know, reshapes, or would be left without.
    """
    sources: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        first = sources.setdefault(tensor.data_ptr(), name)
        if first != name:
            tied[name] = first
    notes: dict[str, list[tuple[Any, Tensor]]] = {}
    with _recording_loaders(model, notes):
        try:
            model.load_weights((name, tensor) for name, tensor in tensors.items() if name not in tied)
        except (ValueError, KeyError) as error:
            raise StoppedError(f"weight sync: vLLM's loader refuses the trainer's tensors: {' '.join(str(error).split())}") from error
    slots = {}
    for target, noted in notes.items():
        rows, found = 0, []
        for _, tensor in sorted(noted, key=lambda note: _SHARDS.get(note[0], note[0] or 0)):
            source = sources.get(tensor.data_ptr())
            if source is None or tensor.shape != tensors[source].shape:
                raise StoppedError(f"weight sync: vLLM changes a tensor while loading `{target}`: this model cannot be synchronised")
            found.append(Slot(source, rows, rows + len(tensor)))
            rows += len(tensor)
        slots[target] = tuple(found)
    _check_complete(model, slots, set(sources.values()))
    return Layout(slots, tied)


@contextmanager
def _recording_loaders(model: Any, notes: dict[str, list[tuple[Any, Tensor]]]) -> Iterator[None]:
    """While open, loading a parameter only notes (shard, tensor) under its name."""

    def recorder(target: str) -> Any:
        def record(_: Any, loaded: Tensor, *shard: Any, **named: Any) -> None:
            notes.setdefault(target, []).append((next(iter((*shard, *named.values())), None), loaded))

        return record

    originals = [(parameter, getattr(parameter, "weight_loader", None)) for parameter in model.parameters()]
    for name, parameter in model.named_parameters():
        parameter.weight_loader = recorder(name)
    try:
        yield
    finally:
        for parameter, original in originals:
            if original is None:
                del parameter.weight_loader
            else:
                parameter.weight_loader = original


def _check_complete(model: Any, slots: Mapping[str, Sequence[Slot]], sources: set[str]) -> None:
    """Every tensor of the trainer has a place, and every row of the engine's parameters has a tensor."""
    unmapped = sorted(sources - {slot.source for found in slots.values() for slot in found})
    if unmapped:
        raise StoppedError(f"weight sync: {len(unmapped)} tensors of the trainer have no place in the engine, the first is `{unmapped[0]}`")
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        rows = len(parameter) if parameter.numel() else sum(module.output_partition_sizes)
        rows = getattr(module, "org_vocab_size", rows)  # the rest is padding
        given = slots[name][-1].end if name in slots else 0
        if given != rows:
            raise StoppedError(f"weight sync: engine tensor `{name}` has {rows} rows, of which the trainer's tensors fill {given}")


@torch.no_grad()
def copy_weights(model: Any, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Put the trainer's tensors into the engine, cast to its dtype. Raises StoppedError naming a tensor of the wrong shape."""
    for slot in (slot for slots in layout.slots.values() for slot in slots):
        tensor = tensors[slot.source]
        if len(tensor) != slot.end - slot.start or not tensor.is_floating_point():
            raise StoppedError(
                f"weight sync: `{slot.source}` is now {tensor.dtype} of shape {tuple(tensor.shape)}, unlike at the first sync"
            )
    if next(model.parameters()).device.type != "cpu":
        model.load_weights((name, tensor) for name, tensor in tensors.items() if name not in layout.tied)
        return
    staging = torch.empty(0)  # one buffer for all layers: fresh memory for each would cost as much as the packing
    for target, slots in layout.slots.items():
        parameter, parts = model.get_parameter(target), [tensors[slot.source] for slot in slots]
        if parameter.numel():
            for slot, part in zip(slots, parts, strict=True):
                parameter[slot.start : slot.end].copy_(part)
            continue
        size = sum(part.numel() for part in parts)
        if staging.numel() < size or staging.dtype != parameter.dtype:
            staging = torch.empty(size, dtype=parameter.dtype)
        weight = staging[:size].view(-1, parts[0].shape[1])
        for slot, part in zip(slots, parts, strict=True):
            weight[slot.start : slot.end].copy_(part)
        module = model.get_submodule(target.rpartition(".")[0])
        module.weight = nn.Parameter(weight, requires_grad=False)
        _pack(module)
        if module.weight.numel():  # nothing packed it: it computes with this very tensor
            module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    for module in _unpacked_linears(model):
        _pack(module)


def _pack(module: Any) -> None:
    """What vLLM does with a layer's weight after loading it."""
    module.quant_method.process_weights_after_loading(module)


def _unpacked_linears(model: Any) -> list[Any]:
    """Layers that keep their weight beside a packed copy of it: the head, tied or not.

    vLLM packs the embedding as well, which nobody multiplies by where a head stands of its own: that copy is dropped on the way.
    """
    packed = [m for m in model.modules() if hasattr(m, "cpu_linear") and m.weight.numel() and m.cpu_linear is not linear]
    heads = [m for m in packed if any(base.__name__ == "ParallelLMHead" for base in type(m).__mro__)]
    for module in packed:
        if heads and module not in heads and hasattr(module, "org_vocab_size"):
            module.cpu_linear = linear
    return [m for m in packed if m.cpu_linear is not linear]


@torch.no_grad()
def compare_weights(model: Any, layout: Layout, tensors: Mapping[str, Tensor], seed: int = 0, exhaustive: bool = False) -> list[Mismatch]:
    """The tensors that differ, the worst first. seed: which columns of packed weights are read back; exhaustive: all of them."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Mismatch] = []
    for target, slots in layout.slots.items():
        parameter = model.get_parameter(target)
        if parameter.numel():
            for slot in slots:
                difference = _difference(parameter[slot.start : slot.end], tensors[slot.source].to(parameter.device, parameter.dtype))
                if difference:
                    found.append(Mismatch(slot.source, target, difference))
        else:
            module = model.get_submodule(target.rpartition(".")[0])
            found += _compare_packed(module, target, slots, tensors, parameter.dtype, generator, exhaustive)
    owners = {model.get_parameter(target).data_ptr(): target for target in layout.slots if model.get_parameter(target).numel()}
    names = {module: name for name, module in model.named_modules()}
    for module in _unpacked_linears(model):
        target, owner = f"{names[module]}.weight", owners[module.weight.data_ptr()]
        bad = _compare_packed(module, target, layout.slots[owner], tensors, module.weight.dtype, generator, exhaustive)
        found += [Mismatch(m.source, m.target, m.difference, stale_head=target != owner) for m in bad]
    return sorted(found, key=lambda mismatch: -mismatch.difference)


def _compare_packed(
    module: Any,
    target: str,
    slots: Sequence[Slot],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    generator: torch.Generator,
    exhaustive: bool,
) -> list[Mismatch]:
    """Multiply by one-hot rows, which give back columns exactly, and by a row of random signs, which every column enters."""
    weights = [tensors[slot.source].to("cpu", dtype) for slot in slots]
    width = weights[0].shape[1]
    columns = torch.arange(width) if exhaustive else torch.randperm(width, generator=generator)[:NUM_COLUMNS]
    signs = torch.randint(0, 2, (1, width), generator=generator).to(dtype) * 2 - 1
    worst = [0.0] * len(slots)
    for part in columns.split(256):
        one_hot = torch.zeros(len(part), width, dtype=dtype)
        one_hot[torch.arange(len(part)), part] = 1
        rows = torch.cat([one_hot, signs])
        read = module.cpu_linear(rows, module.weight, None)
        for number, (slot, weight) in enumerate(zip(slots, weights, strict=True)):
            engine, trainer = read[:, slot.start : slot.end], linear(rows, weight)
            columns_differ = _difference(engine[:-1], trainer[:-1])
            worst[number] = max(worst[number], columns_differ or _sum_error(engine[-1].float(), trainer[-1].float(), dtype))
    return [Mismatch(slot.source, target, value) for slot, value in zip(slots, worst, strict=True) if value]


def _sum_error(engine: Tensor, trainer: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of sums beyond what two orders of summation and one rounding explain; 0 where there is none."""
    error = (engine - trainer).abs()
    relative = 2**-6 if dtype != torch.float32 else 1e-4  # bfloat16 rounds by up to 2^-8
    allowed = relative * (trainer.abs() + trainer.square().mean().sqrt())
    return 0.0 if bool((error <= allowed).all()) else _largest(error)


def _difference(engine: Tensor, trainer: Tensor) -> float:
    """Largest absolute difference; 0 only for equal tensors, infinite where a value is not finite."""
    return 0.0 if torch.equal(engine, trainer) else _largest((engine.float() - trainer.float()).abs())


def _largest(error: Tensor) -> float:
    return float(error.nan_to_num(nan=float("inf")).max())


def sync_weights(llm: Any, layout: Layout | None, tensors: Mapping[str, Tensor], seed: int = 0) -> Layout:
    """Copy, empty the caches, compare. Returns the layout, to be passed to the next call. Raises StoppedError naming the worst tensor."""
    model = engine_model(llm)
    layout = layout or map_weights(model, tensors)
    copy_weights(model, layout, tensors)
    after_sync(llm)
    bad = compare_weights(model, layout, tensors, seed)
    if bad:
        raise StoppedError(f"weight sync: {bad[0]} ({len(bad)} of {sum(map(len, layout.slots.values()))} tensors differ)")
    return layout


def engine_model(llm: Any) -> Any:
    """The module that the engine computes with."""
    return llm.apply_model(lambda model: model)[0]


def after_sync(llm: Any) -> None:
    """Forget whatever was computed with the old weights: KV blocks of prompts, picture features, and the inputs that point at them."""
    if not llm.reset_prefix_cache():
        raise StoppedError("weight sync: requests are still running in the engine: its prefix cache cannot be emptied")
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()


def logprob_gap(rollouts: Sequence[Rollout], policy: Any, temperature: float) -> float:
    """Mean |engine's log-prob - policy's| over the tokens of rollouts sampled at this temperature, of which there must be 64."""
    engine = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    if len(engine) < MIN_PROBE_TOKENS:
        raise ValueError(f"a log-prob probe of {len(engine)} tokens; it needs {MIN_PROBE_TOKENS}")
    return float((engine - torch.cat(policy.score(rollouts, temperature))).abs().mean())
