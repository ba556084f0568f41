"""Shared fixtures: tiny random models, made once per session."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import tiny_models
from tests.reliability.conftest import figure  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # else DeepSpeed, which saving a model imports, warns on standard output

torch.set_num_threads(1)  # tiny models; a second thread only waits


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Folder of a tiny random model of a family, made at first use."""
    made = {}

    def folder(family: str, **options) -> str:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = str(
                getattr(tiny_models, f"tiny_{family}")(tmp_path_factory.mktemp(family), **options)
            )
        return made[key]

    return folder
