"""docs/add_an_algorithm.md: the places that it names are there, and its code is the package's."""

import ast
import inspect
import re
import textwrap
from typing import get_args

import pytest
import torch
import yaml

from rlfr_vlm.algorithm import losses, objective
from rlfr_vlm.config import parse_config
from rlfr_vlm.config.methods import METHODS, Loss, Method
from tests.docs.pages import DOCS, ROOT, blocks, resolve

PAGE = "add_an_algorithm.md"
TEXT = (DOCS / PAGE).read_text(encoding="utf-8")
LOSS, BRANCH, ENTRY = blocks(PAGE, "python")


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`(rlfr_vlm/\S+?)`", TEXT))))
def test_places_are_there(place):
    if "::" in place:
        assert resolve(place) is not None
    else:
        assert (ROOT / place).is_file()


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`((?:tests|scripts)/\S+?\.py)`", TEXT))))
def test_files_of_tests_are_there(place):
    assert (ROOT / place).is_file()


def test_the_pages_code_is_the_packages():
    assert inspect.getsource(losses.cispo_loss) == LOSS
    assert textwrap.indent(BRANCH, "    ") in inspect.getsource(objective._policy_objective)


def test_high_ratios_are_capped_and_keep_a_gradient_which_ppos_clip_takes_from_them():
    old = torch.tensor([-1.0, -1.0, -2.0, -0.5], dtype=torch.float64)
    new = torch.tensor([-0.2, -1.3, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    loss, metrics = losses.cispo_loss(new, new - old, advantages, weights, 0.28)
    (gradient,) = torch.autograd.grad(loss, new)
    cap = (new - old).detach().exp().clamp(max=1.28)
    assert torch.allclose(gradient, -weights * cap * advantages)
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(0.5)
    clipped, _ = losses.policy_loss(new - old, advantages, weights, 0.2, 0.28)
    (none,) = torch.autograd.grad(clipped, new)
    assert none[0] == 0 and gradient[0] != 0


def test_the_settings_are_the_configs():
    ((name, settings),) = ast.literal_eval(ENTRY).items()
    (config,) = blocks(PAGE, "yaml")
    tree = {"output_dir": "x", "model": {"path": "y"}, **yaml.safe_load(config)}
    assert METHODS[name] == settings
    resolved = parse_config(tree).algorithm.model_dump()
    assert all(resolved[key.split(".")[1]] == value for key, value in settings.items())
    assert name in get_args(Loss) and name in get_args(Method)
