"""docs/add_an_algorithm.md: the places that it names are there, and its code fits into them.

The package may have the page's algorithm; its loss and its settings must then be the page's.
"""

import ast
import inspect
import re
from typing import get_args

import pytest
import torch
import yaml

from rlfr_vlm.algorithm import losses
from rlfr_vlm.algorithm.objective import objective
from rlfr_vlm.config import AlgorithmConfig, parse_config
from rlfr_vlm.errors import UserError
from rlfr_vlm.config.methods import METHODS
from tests.docs.pages import DOCS, ROOT, blocks, resolve

PAGE = "add_an_algorithm.md"
TEXT = (DOCS / PAGE).read_text(encoding="utf-8")
LOSS, BRANCH, ENTRY = blocks(PAGE, "python")
NAME = "cispo"


def page_loss():
    """The page's function, in the namespace that it is to stand in."""
    space = dict(vars(losses))
    exec(LOSS, space)
    return space["cispo_loss"]


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`(rlfr_vlm/\S+?)`", TEXT))))
def test_places_are_there(place):
    if "::" in place:
        assert resolve(place) is not None
    else:
        assert (ROOT / place).is_file()


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`((?:tests|scripts)/\S+?\.py)`", TEXT))))
def test_files_of_tests_are_there(place):
    assert (ROOT / place).is_file()


def test_the_loss_is_its_formula():
    """High ratios are capped and keep a gradient, which PPO's clip takes from them."""
    old = torch.tensor([-1.0, -1.0, -2.0, -0.5], dtype=torch.float64)
    new = torch.tensor([-0.2, -1.3, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=torch.float64)
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    loss, metrics = page_loss()(new - old, new, advantages, weights, 0.28)
    (gradient,) = torch.autograd.grad(loss, new)
    cap = (new - old).detach().exp().clamp(max=1.28)
    assert torch.allclose(gradient, -weights * cap * advantages)
    assert loss.item() == pytest.approx(-(weights * cap * advantages * new).sum().item(), abs=1e-12)
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(0.5)
    clipped, _ = losses.policy_loss(new - old, advantages, weights, 0.2, 0.28)
    (none,) = torch.autograd.grad(clipped, new)
    assert none[0] == 0 and gradient[0] != 0
    parts = [
        page_loss()(*(x[rows] for x in (new - old, new, advantages, weights)), 0.28)[0]
        for rows in (slice(0, 3), slice(3, 4))
    ]
    assert sum(parts).item() == pytest.approx(loss.item(), abs=1e-12)


def test_the_branch_names_what_is_there_in_objective():
    tree = ast.parse(BRANCH.replace("elif", "if", 1))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    local = set(objective.__code__.co_varnames)
    assert names - {"cispo_loss"} <= local
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert len(call.args) == len(inspect.signature(page_loss()).parameters)


def test_the_settings_are_settings_of_the_config():
    ((name, settings),) = ast.literal_eval(ENTRY).items()
    (config,) = blocks(PAGE, "yaml")
    tree = {"output_dir": "x", "model": {"path": "y"}, **yaml.safe_load(config)}
    assert name == tree["algorithm"]["method"] == NAME
    assert all(key.split(".")[1] in AlgorithmConfig.model_fields for key in settings)
    if NAME not in METHODS:
        with pytest.raises(UserError, match=r"algorithm\.method"):
            parse_config(tree)
        return
    resolved = parse_config(tree).algorithm.model_dump()
    assert all(resolved[key.split(".")[1]] == value for key, value in settings.items())
    assert NAME in get_args(AlgorithmConfig.model_fields["loss"].annotation)


def test_the_packages_own_loss_has_the_pages_gradient():
    """Where the package has it; arguments go by their names."""
    own = getattr(losses, "cispo_loss", None)
    if own is None:
        assert NAME not in METHODS
        return
    torch.manual_seed(0)
    old, advantages = torch.randn(2, 20, dtype=torch.float64)
    new = (old + 0.5 * torch.randn(20, dtype=torch.float64)).requires_grad_()
    given = {
        "log_ratio": new - old,
        "logprobs": new,
        "old_logprobs": old,
        "advantages": advantages,
        "weights": torch.full((20,), 0.05, dtype=torch.float64),
        "clip_high": 0.28,
    }
    gradients = []
    for function in (page_loss(), own):
        wanted = inspect.signature(function).parameters
        loss, _ = function(**{k: v for k, v in given.items() if k in wanted})
        gradients.append(torch.autograd.grad(loss, new, retain_graph=True)[0])
    assert torch.allclose(*gradients)
