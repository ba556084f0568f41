"""A checkpoint of any number of ranks -> a plain Hugging Face folder, checked by a forward of
transformers' own model.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlfr_vlm.config import Config, parse_config
from rlfr_vlm.errors import CheckpointError, StoppedError, UserError
from rlfr_vlm.faults import faultpoint
from rlfr_vlm.models.loading import auto_model
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.rollout.probe import TOLERANCE, probe_prompts
from rlfr_vlm.storage.checkpoint import PREFIX, list_checkpoints, read_best, verify
from rlfr_vlm.storage.state import load_weights
from rlfr_vlm.types import Rollout

ANSWER = "The answer is 4, because 1 + 3 = 4."  # what the exported model is asked the log-probs of


def find_checkpoint(source: Path, best: bool = False) -> Path:
    """The checkpoint that a path means: itself, or of a run the newest one, or the best. Raises
    UserError naming what is not there.
    """
    if (source / "state.json").is_file():
        return source
    root = source if list_checkpoints(source) else source / "checkpoints"
    found = list_checkpoints(root)
    if not found:
        raise UserError(f"{source}: neither a checkpoint nor a run that holds one")
    if not best:
        return found[-1]
    named = read_best(root)
    if named is None:
        raise UserError(
            f"{root}/best.json names no checkpoint: the run had no evaluation (eval.every=0)"
        )
    return root / f"{PREFIX}{named['step']:.0f}"


def export_checkpoint(
    source: Path, out: Path, best: bool = False, model: str | None = None
) -> Path:
    """Write the trained model of a checkpoint to `out`; returns the checkpoint that it was.

    model: where the model that training started from lies now. Raises CheckpointError for a damaged
        checkpoint, naming the file, and
    UserError where `out` is taken or the base model does not load.
    """
    if out.exists():
        raise UserError(f"--out: {out} exists already: remove it, or name another place")
    folder = find_checkpoint(source, best)
    verify(folder)
    try:
        tree = json.loads((folder / "state.json").read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'state.json'} cannot be read: {error!r}") from None
    tree["model"] |= {
        "gradient_checkpointing": "off",
        **({"path": model} if model is not None else {}),
    }
    cfg = parse_config(tree, f"{folder / 'state.json'}")
    policy = Policy(cfg.model, "--model" if model is not None else "model.path of the run")
    load_weights(folder, policy)
    temporary = out.with_name(f".tmp-{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        policy.save(temporary)
        check_export(cfg, policy, temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def check_export(cfg: Config, policy: Policy, folder: Path) -> float:
    """Mean gap between the log-probs of the exported model, in transformers' own forward, and the
    policy's; StoppedError if it is too large.
    """
    rollouts = [_answered(prompt, policy) for prompt in probe_prompts(cfg, policy)]
    exported: Any = auto_model(bool(policy.family.vision)).from_pretrained(
        folder, dtype=policy.dtype, attn_implementation="sdpa"
    )
    exported = exported.to(policy.device).eval()
    theirs = torch.cat(
        [plain_logprobs(exported, rollout, policy.banned_token_ids) for rollout in rollouts]
    )
    ours = torch.cat(policy.score(rollouts))
    gap = float((theirs - ours).abs().mean())
    if not gap <= TOLERANCE[policy.dtype]:
        raise StoppedError(
            f"the exported model's log-probs are {gap:.4g} away from the policy's (limit "
            f"{TOLERANCE[policy.dtype]:.4g})"
        )
    return gap


def _answered(prompt: Any, policy: Policy) -> Rollout:
    token_ids = tuple(policy.tokenizer(ANSWER, add_special_tokens=False)["input_ids"])
    return Rollout(prompt, 0, token_ids, (0.0,) * len(token_ids), ANSWER, "stop", 0)


@torch.no_grad()
def plain_logprobs(model: Any, rollout: Rollout, banned: Sequence[int]) -> torch.Tensor:
    """Log-probs of a response by a model as transformers loads it, one sequence without packing.
    Returns [T] float32 on the CPU.
    """
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]], device=model.device)
    vision: dict[str, Any] = {k: v.to(model.device) for k, v in rollout.prompt.vision.items()}
    if vision:
        vision["mm_token_type_ids"] = torch.eq(ids, model.config.image_token_id).int()
    logits = model(input_ids=ids, **vision).logits[0].float()
    logits[:, list(banned)] = float("-inf")
    first = len(rollout.prompt.token_ids)
    return logits.log_softmax(-1)[first - 1 : -1].gather(1, ids[0, first:, None])[:, 0].cpu()


def export_policy(policy: Policy, folder: Path, ranks: Ranks = ALONE) -> None:
    """Write the policy as it is, whole or not at all; all ranks call it where it is sharded."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    if ranks.first:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
    try:
        policy.save(temporary, write=ranks.first)
    except Exception:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if ranks.first:
        faultpoint("export")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    ranks.gather(None, f"writing {folder}")
