"""Named tensors in several safetensors files, written by several ranks and read by any number of
them.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlfr_vlm.errors import CheckpointError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.finite import check_finite

FILE_BYTES = 2**29  # of tensors that are held before they are written


class ShardWriter:
    """Writes `STEM-NUMBER.safetensors` into a rank's folder."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self._held: dict[str, Tensor] = {}
        self._files = 0

    def __enter__(self) -> ShardWriter:
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write this tensor, now or with later ones: until then it must not change. Raises
        NonFiniteWeightError naming one that is not finite.
        """
        self._held[name] = tensor.detach().to("cpu").contiguous()
        check_finite({name: self._held[name]}, f"a checkpoint ({self.stem})")
        if sum(held.nbytes for held in self._held.values()) >= FILE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            path = self.folder / f"{self.stem}-{self._files:04d}.safetensors"
            save_file(self._held, path)
            faultpoint("checkpoint_file", path)
            self._held, self._files = {}, self._files + 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()


class ShardReader:
    """Reads what all ranks wrote under one stem into a checkpoint, tensor by tensor."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Raises CheckpointError naming the file that cannot be read."""
        self.folder, self.stem = folder, stem
        self._places: dict[str, Any] = {}
        for path in sorted(folder.glob(f"*/{stem}-*.safetensors")):
            try:
                handle = safe_open(path, "pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
            self._places |= dict.fromkeys(handle.keys(), handle)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._places)

    def find(self, name: str) -> Tensor | None:
        """The tensor on the CPU; None where none of that name was stored."""
        return self._places[name].get_tensor(name) if name in self._places else None

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU. Raises CheckpointError where it is missing."""
        found = self.find(name)
        if found is None:
            raise CheckpointError(
                f"{self.folder}: no tensor `{name}` in */{self.stem}-*.safetensors"
            )
        return found
