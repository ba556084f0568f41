"""docs/add_a_model_family.md, followed for a family that the package does not have."""

import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlfr_vlm.config import ModelConfig, RolloutConfig
from rlfr_vlm.errors import UserError
from rlfr_vlm.models import families
from rlfr_vlm.models.families import FAMILIES, Family
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.planning.shapes import read_shape
from rlfr_vlm.rollout.engine import SamplingConfig
from rlfr_vlm.rollout.hf_engine import HFEngine
from tests import tiny_models
from tests.docs.pages import DOCS, ROOT, blocks, source
from tests.models.test_policy import reference_logprobs, rollouts_of

PAGE = "add_a_model_family.md"
TEXT = (DOCS / PAGE).read_text(encoding="utf-8")
ROW, BUILDER = blocks(PAGE, "python")


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The folder of the page's tiny model, its family known."""
    row = eval(ROW, {"Family": Family})
    (name,) = row
    assert name not in FAMILIES, "the example is a family that is there: take another one"
    space = dict(vars(tiny_models))
    exec(BUILDER, space)
    folder = space[f"tiny_{name}"](tmp_path)
    with pytest.raises(UserError, match=f"model type `{name}` is not known"):
        Policy(ModelConfig(path=str(folder), dtype="float32"))
    monkeypatch.setitem(families.FAMILIES, name, row[name])
    return folder


def test_the_row_is_enough_for_log_probs_and_rollouts(added):
    policy = Policy(ModelConfig(path=str(added), dtype="float32"))
    rollouts = rollouts_of(policy, (0, 0))
    plain = AutoModelForCausalLM.from_pretrained(added, dtype=torch.float32)
    for ours, theirs in zip(
        policy.score(rollouts), reference_logprobs(plain, rollouts, 0), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)
    engine = HFEngine(RolloutConfig(engine="hf"), policy)
    sampling = SamplingConfig(group_size=2, temperature=1.0, max_new_tokens=6, seed_key=(0,))
    (group,) = engine.sample([rollouts[0].prompt], sampling)
    for rollout, scored in zip(group.rollouts, policy.score(group.rollouts), strict=True):
        assert scored.tolist() == pytest.approx(list(rollout.logprobs), abs=1e-5)


def test_plan_counts_its_weights(added):
    weights = {k: v for f in added.glob("*.safetensors") for k, v in load_file(f).items()}
    total = sum(tensor.numel() for tensor in weights.values())
    assert read_shape(str(added)).parameters == pytest.approx(total, rel=0.02)


def test_the_fields_and_messages_are_the_packages():
    fields = re.findall(r"^\| `(\w+)` \| (\S+) \|", TEXT, re.MULTILINE)
    told = {name: default.strip("`") for name, default in fields}
    assert told == {
        name: {None: "none"}.get(value, str(value)) for name, value in vars(Family()).items()
    }
    spelt = " ".join(source().split())
    for message in re.findall(r"refused: (.*?) \|", TEXT):
        for part in re.findall(r"`([^`]+)`", message):
            assert part in spelt, part


@pytest.mark.parametrize("place", re.findall(r"`(tests/\S+::\w+)`", TEXT))
def test_the_tests_that_it_names_are_there(place):
    file, _, name = place.partition("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")
