"""Weight sync into a vLLM engine, a bucket of whole weights at a time, and the proof that the
engine holds the trainer's weights.

On CPU, vLLM packs every linear weight after loading and drops the original, so its own
`load_weights` cannot run a second time; a tied head keeps a packed copy of its own beside the
embedding it shares. Here each packed weight is rebuilt from the trainer's, heads included. On other
devices weights stay as they are and vLLM's `load_weights` does the copy.

The proof is exact, and part of every bucket: plain parameters are compared whole; of a packed
weight, columns are read back through the layer itself (a one-hot input returns a column, bit for
bit), and one row of random signs covers the columns that were not drawn. What it cannot see, a
model that computes something else with the right weights, the probe shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from rlfr_vlm.errors import StoppedError
from rlfr_vlm.models.policy import WeightSpec

NUM_COLUMNS = 8  # columns of every packed weight that one check reads back
_SHARDS = {
    "q": 0,
    "k": 1,
    "v": 2,
}  # the order in which vLLM stacks attention weights; others are numbered


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the trainer stands in the engine."""

    source: str  # the trainer's name
    start: int  # rows of the engine's parameter
    end: int


@dataclass(frozen=True)
class WeightMap:
    """Every tensor of the trainer and its place. Stacked weights (q, k, v; gate, up) have several
    slots.
    """

    slots: dict[str, tuple[Slot, ...]]  # by the engine's parameter name
    # trainer's tensors that share another one's storage
    tied: dict[str, str] = field(default_factory=dict)

    def filled_by(self, bucket: Mapping[str, Tensor]) -> dict[str, tuple[Slot, ...]]:
        """The engine's tensors that this bucket fills.

        Raises StoppedError naming a tensor that is stacked with one that the bucket lacks, or has
        no place.
        """
        found, placed = {}, set()
        for target, slots in self.slots.items():
            here = [slot.source for slot in slots if slot.source in bucket]
            if here:
                absent = [slot.source for slot in slots if slot.source not in bucket]
                if absent:
                    raise StoppedError(
                        f"weight sync: `{here[0]}` came without `{absent[0]}`, with which the "
                        f"engine stacks it in `{target}`"
                    )
                found[target] = slots
                placed |= set(here)
        if unknown := sorted(bucket.keys() - placed):
            raise StoppedError(f"weight sync: `{unknown[0]}` has no place in the engine")
        return found


@dataclass(frozen=True)
class Mismatch:
    """A tensor that differs between trainer and engine."""

    source: str
    target: str
    difference: float  # largest absolute one; infinite where a value is not finite
    stale_head: bool = False

    def __str__(self) -> str:
        what = "the tied head is stale: " if self.stale_head else ""
        return (
            f"{what}engine tensor `{self.target}` differs from the trainer's `{self.source}` by up "
            f"to {self.difference:.3g}"
        )


class Arrivals:
    """Which of the trainer's weights have come since the last load was finished."""

    def __init__(self, specs: Mapping[str, WeightSpec]) -> None:
        self._shapes = {name: spec.shape for name, spec in specs.items() if spec.tied is None}
        self._arrived: set[str] = set()

    @property
    def begun(self) -> bool:
        """Whether a load is under way."""
        return bool(self._arrived)

    def check(self, bucket: Mapping[str, Tensor]) -> None:
        """Raises StoppedError naming a tensor of this bucket that is unknown, or of another shape
        or kind.
        """
        for name, tensor in bucket.items():
            if name not in self._shapes:
                raise StoppedError(
                    f"weight sync: the trainer sends `{name}`, which is none of the model's weights"
                )
            if tensor.shape != self._shapes[name] or not tensor.is_floating_point():
                raise StoppedError(
                    f"weight sync: `{name}` comes as {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}; the engine's has the shape {tuple(self._shapes[name])}"
                )

    def note(self, bucket: Mapping[str, Tensor]) -> None:
        """This bucket is where it belongs."""
        self._arrived |= bucket.keys()

    def forget(self) -> None:
        """A new load begins, whatever became of the last."""
        self._arrived.clear()

    def finish(self) -> None:
        """Raises StoppedError naming a tensor that has not come."""
        missing = sorted(self._shapes.keys() - self._arrived)
        self.forget()
        if missing:
            raise StoppedError(
                f"weight sync: {len(missing)} of {len(self._shapes)} tensors did not come, the "
                f"first is `{missing[0]}`"
            )


def map_weights(model: Any, specs: Mapping[str, WeightSpec]) -> WeightMap:
    """Ask vLLM's own loader (its name mapper, its stacking rules) where each tensor goes: run it
    with loaders that note instead of copying.

    It is given stand-ins of the right shapes that take no memory. Raises StoppedError naming a
    tensor that vLLM does not know, reshapes, or would be left without.
    """
    tied = {name: spec.tied for name, spec in specs.items() if spec.tied is not None}
    tensors = {
        name: torch.empty((), dtype=spec.dtype).expand(spec.shape)
        for name, spec in specs.items()
        if name not in tied
    }
    sources = {tensor.data_ptr(): name for name, tensor in tensors.items()}
    notes: dict[str, list[tuple[Any, Tensor]]] = {}
    with _recording_loaders(model, notes):
        try:
            model.load_weights(iter(tensors.items()))
        except (ValueError, KeyError, RuntimeError) as error:
            raise StoppedError(
                "weight sync: vLLM's loader refuses the trainer's tensors: "
                f"{' '.join(str(error).split())}"
            ) from error
    slots = {}
    for target, noted in notes.items():
        rows, found = 0, []
        for _, tensor in sorted(noted, key=lambda note: _SHARDS.get(note[0], note[0] or 0)):
            source = sources.get(tensor.data_ptr())
            if source is None or tensor.shape != tensors[source].shape:
                raise StoppedError(
                    f"weight sync: vLLM changes a tensor while loading `{target}`: this model "
                    "cannot be synchronised"
                )
            found.append(Slot(source, rows, rows + len(tensor)))
            rows += len(tensor)
        slots[target] = tuple(found)
    _check_complete(model, slots, set(tensors))
    return WeightMap(slots, tied)


@contextmanager
def _recording_loaders(model: Any, notes: dict[str, list[tuple[Any, Tensor]]]) -> Iterator[None]:
    """While open, loading a parameter only notes (shard, tensor) under its name."""

    def recorder(target: str) -> Any:
        def record(_: Any, loaded: Tensor, *shard: Any, **named: Any) -> None:
            notes.setdefault(target, []).append(
                (next(iter((*shard, *named.values())), None), loaded)
            )

        return record

    originals = [
        (parameter, getattr(parameter, "weight_loader", None)) for parameter in model.parameters()
    ]
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
    """Every tensor of the trainer has a place, and every row of the engine's parameters has a
    tensor.
    """
    unmapped = sorted(sources - {slot.source for found in slots.values() for slot in found})
    if unmapped:
        raise StoppedError(
            f"weight sync: {len(unmapped)} tensors of the trainer have no place in the engine, the "
            f"first is `{unmapped[0]}`"
        )
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        rows = len(parameter) if parameter.numel() else sum(module.output_partition_sizes)
        rows = getattr(module, "org_vocab_size", rows)  # the rest is padding
        given = slots[name][-1].end if name in slots else 0
        if given != rows:
            raise StoppedError(
                f"weight sync: engine tensor `{name}` has {rows} rows, of which the trainer's "
                f"tensors fill {given}"
            )


@torch.no_grad()
def copy_weights(model: Any, layout: WeightMap, bucket: Mapping[str, Tensor]) -> None:
    """Put a bucket of the trainer's tensors into the engine, cast to its dtype. Raises StoppedError
    as Layout.filled_by does.
    """
    filled = layout.filled_by(bucket)
    if not any(hasattr(module, "cpu_linear") for module in model.modules()):  # nothing is packed
        model.load_weights(iter(bucket.items()))
        return
    # one buffer for all layers: fresh memory for each would cost as much as the packing
    staging = torch.empty(0)
    for target, slots in filled.items():
        parameter, parts = model.get_parameter(target), [bucket[slot.source] for slot in slots]
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
    for module, owner in _heads(model, layout).items():
        if owner in filled:
            _pack(module)


def _pack(module: Any) -> None:
    """What vLLM does with a layer's weight after loading it."""
    module.quant_method.process_weights_after_loading(module)


def _heads(model: Any, layout: WeightMap) -> dict[Any, str]:
    """Layers that keep their weight beside a packed copy of it (the head, tied or not), and which
    of the engine's tensors that weight is.

    vLLM packs the embedding as well, which nobody multiplies by where a head stands of its own:
    that copy is dropped on the way.
    """
    packed = [
        m
        for m in model.modules()
        if hasattr(m, "cpu_linear") and m.weight.numel() and m.cpu_linear is not linear
    ]
    heads = [
        m for m in packed if any(base.__name__ == "ParallelLMHead" for base in type(m).__mro__)
    ]
    for module in packed:
        if heads and module not in heads and hasattr(module, "org_vocab_size"):
            module.cpu_linear = linear
    owners = {
        parameter.data_ptr(): target
        for target in layout.slots
        if (parameter := model.get_parameter(target)).numel()
    }
    return {m: owners[m.weight.data_ptr()] for m in packed if m.cpu_linear is not linear}


@torch.no_grad()
def compare_weights(
    model: Any,
    layout: WeightMap,
    bucket: Mapping[str, Tensor],
    seed: int = 0,
    exhaustive: bool = False,
) -> list[Mismatch]:
    """The tensors of this bucket that differ, the worst first. seed: which columns of packed
    weights are read back; exhaustive: all.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[Mismatch] = []
    filled = layout.filled_by(bucket)
    for target, slots in filled.items():
        parameter = model.get_parameter(target)
        if parameter.numel():
            for slot in slots:
                difference = _difference(
                    parameter[slot.start : slot.end],
                    bucket[slot.source].to(parameter.device, parameter.dtype),
                )
                if difference:
                    found.append(Mismatch(slot.source, target, difference))
        else:
            module = model.get_submodule(target.rpartition(".")[0])
            found += _compare_packed(
                module, target, slots, bucket, parameter.dtype, generator, exhaustive
            )
    names = {module: name for name, module in model.named_modules()}
    for module, owner in _heads(model, layout).items():
        if owner in filled:
            target = f"{names[module]}.weight"
            bad = _compare_packed(
                module, target, filled[owner], bucket, module.weight.dtype, generator, exhaustive
            )
            found += [
                Mismatch(m.source, m.target, m.difference, stale_head=target != owner) for m in bad
            ]
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
    """Multiply by one-hot rows, which give back columns exactly, and by a row of random signs,
    which every column enters.
    """
    weights = [tensors[slot.source].to("cpu", dtype) for slot in slots]
    width = weights[0].shape[1]
    columns = (
        torch.arange(width)
        if exhaustive
        else torch.randperm(width, generator=generator)[:NUM_COLUMNS]
    )
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
            worst[number] = max(
                worst[number],
                columns_differ or _sum_error(engine[-1].float(), trainer[-1].float(), dtype),
            )
    return [
        Mismatch(slot.source, target, value)
        for slot, value in zip(slots, worst, strict=True)
        if value
    ]


def _sum_error(engine: Tensor, trainer: Tensor, dtype: torch.dtype) -> float:
    """Largest difference of sums beyond what two orders of summation and one rounding explain; 0
    where there is none.
    """
    error = (engine - trainer).abs()
    relative = 2**-6 if dtype != torch.float32 else 1e-4  # bfloat16 rounds by up to 2^-8
    allowed = relative * (trainer.abs() + trainer.square().mean().sqrt())
    return 0.0 if bool((error <= allowed).all()) else _largest(error)


def _difference(engine: Tensor, trainer: Tensor) -> float:
    """Largest absolute difference; 0 only for equal tensors, infinite where a value is not
    finite.
    """
    return (
        0.0 if torch.equal(engine, trainer) else _largest((engine.float() - trainer.float()).abs())
    )


def _largest(error: Tensor) -> float:
    return float(error.nan_to_num(nan=float("inf")).max())


class WeightSync:
    """The way of the trainer's weights into one vLLM."""

    def __init__(self, llm: Any, specs: Mapping[str, WeightSpec], tensor_parallel: int = 1) -> None:
        """Raises StoppedError as map_weights does."""
        self._llm = llm
        self.layout = map_weights(engine_model(llm), specs) if tensor_parallel == 1 else None
        self.arrivals = Arrivals(specs)
        self._buckets = 0  # another seed for each

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        """Copy this part and prove that it arrived. Raises StoppedError naming the tensor that does
        not fit or differs.
        """
        self.arrivals.check(bucket)
        if self.layout is None:  # workers in processes of their own
            sent = {name: tensor.detach().cpu() for name, tensor in bucket.items()}
            found = self._llm.apply_model(partial(_put_shares, bucket=sent))
        else:
            found = self._llm.apply_model(
                partial(_put, layout=self.layout, bucket=bucket, seed=self._buckets)
            )
        bad = [mismatch for worker in found for mismatch in worker]
        if bad:
            raise StoppedError(
                f"weight sync: {bad[0]} ({len(bad)} of the {len(bucket)} tensors of this part "
                "differ)"
            )
        self.arrivals.note(bucket)
        self._buckets += 1

    def finish(self) -> None:
        """Every tensor has come: empty the caches. Raises StoppedError naming one that has not."""
        self.arrivals.finish()
        after_sync(self._llm)

    def differences(self, buckets: Iterable[Mapping[str, Tensor]]) -> list[Mismatch]:
        """All the tensors that differ, the worst first, every column of every weight read."""
        if self.layout is None:
            raise ValueError(
                "weights that are split over workers cannot be compared without loading them"
            )
        model = engine_model(self._llm)
        found = [
            bad
            for bucket in buckets
            for bad in compare_weights(model, self.layout, bucket, exhaustive=True)
        ]
        return sorted(found, key=lambda mismatch: -mismatch.difference)


def _put(model: Any, layout: WeightMap, bucket: Mapping[str, Tensor], seed: int) -> list[Mismatch]:
    """Runs where the engine's model is."""
    copy_weights(model, layout, bucket)
    return compare_weights(model, layout, bucket, seed)


@torch.no_grad()
def _put_shares(model: Any, bucket: Mapping[str, Tensor]) -> list[Mismatch]:
    """Runs in each worker of a tensor-parallel engine, which holds its share of the weights only.

    vLLM's own loader cuts the shares, once into the engine's tensors and once into fresh ones of
    NaN, which must then be equal: rows that it leaves out show. Whether it cuts them rightly only
    the probe shows. Tested on vLLM's models in two processes on CPU; an engine over two GPUs has
    not run so far.
    """
    notes: dict[str, list[tuple[Any, Tensor]]] = {}
    model.load_weights(iter(bucket.items()))
    with _recording_loaders(model, notes):
        model.load_weights(iter(bucket.items()))
    held = {target: model.get_parameter(target).data for target in notes}
    names = {tensor.data_ptr(): name for name, tensor in bucket.items()}
    try:
        for target, tensor in held.items():
            model.get_parameter(target).data = torch.full_like(tensor, float("nan"))
        model.load_weights(iter(bucket.items()))
        worst = {
            target: _difference(tensor, model.get_parameter(target).data)
            for target, tensor in held.items()
        }
    finally:
        for target, tensor in held.items():
            model.get_parameter(target).data = tensor
    return [
        Mismatch(names.get(notes[t][0][1].data_ptr(), "?"), t, value)
        for t, value in worst.items()
        if value
    ]


def engine_model(llm: Any) -> Any:
    """The module that the engine computes with."""
    return llm.apply_model(lambda model: model)[0]


def after_sync(llm: Any) -> None:
    """Forget whatever was computed with the old weights: KV blocks of prompts, picture features,
    and the inputs that point at them.
    """
    if not llm.reset_prefix_cache():
        raise StoppedError(
            "weight sync: requests are still running in the engine: its prefix cache cannot be "
            "emptied"
        )
    llm.llm_engine.reset_mm_cache()
    llm.llm_engine.reset_encoder_cache()
