"""`import-flow` and `export-flow`: fields in the published format."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from rlfr_vlm.commands.parts import say
from rlfr_vlm.errors import UserError
from rlfr_vlm.flow.official import export_field, import_field
from rlfr_vlm.flow.spec import SPEC_FILE, read_spec
from rlfr_vlm.models.families import find_family
from rlfr_vlm.models.paths import resolve_path


def import_flow(source: str, model: str, out: str, given: dict[str, str | None]) -> Path:
    """Write a published flow checkpoint as a field for this model; returns its folder. `given`:
    context, shift, layers, times as `a+b`.
    """
    with _writing(out):
        if (Path(out) / SPEC_FILE).exists():
            raise UserError(f"--out: {out} holds a field already: remove it, or name another place")
    field, origins = import_field(Path(source), identity_from_config(model), given, model)
    with _writing(out):
        field.save(out)
    spec = field.spec
    texts = {
        "context": spec.context,
        "shift": spec.shift,
        "layers": spec.layers,
        "times": spec.times,
    }
    said = "; ".join(
        f"{name} {'+'.join(map(str, value))} ({origins[name]})" for name, value in texts.items()
    )
    say(
        f"a field of depth {spec.depth} on latents of size {field.network.size}, layers of "
        f"{spec.num_layers}: {said}"
    )
    if "token_post" in spec.context and origins["context"].endswith(".json"):
        say(
            "the released RL configs say token_post of fields that were fitted at token_pre; "
            "--context token_pre reads it as fitted"
        )
    return Path(out)


def export_flow(folder: str, out: str, dtype: torch.dtype | None) -> Path:
    """Write a field as the published code's flow_model.bin; returns the file."""
    spec = read_spec(Path(folder))
    with _writing(out):
        file = export_field(Path(folder), Path(out), dtype)
    theirs = {
        "flow_context_mode": spec.context,
        "flow_shift": spec.shift,
        "hook_layers_percentile": [f"{layer / spec.num_layers:.6g}" for layer in spec.layers],
        "rewarding_timesteps": spec.times,
        "num_layers_flow": [spec.depth],
    }
    said = ", ".join(f"{key} {'+'.join(map(str, values))}" for key, values in theirs.items())
    say(f"for their config: {said}")
    return file


def identity_from_config(path: str) -> dict[str, str | int | float]:
    """What `Policy.identity` says of a model, from its config alone: weights are not read, so its
    fingerprint is "", unknown.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolve_path(path), trust_remote_code=False)
        find_family(config.model_type)
        text = config.get_text_config()
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(
            f"--model: the config of `{path}` does not load: {' '.join(str(error).split())[:300]}"
        ) from None
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "rms_norm_eps": float(getattr(text, "rms_norm_eps", 1e-6)),
        "fingerprint": "",
    }


@contextmanager
def _writing(out: str) -> Iterator[None]:
    """Turns an output path that cannot be written to into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"--out: {out} cannot be written: {error.strerror}") from None
