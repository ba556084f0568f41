"""docs/add_a_reward.md: its function is loaded and scores; its shapes are those that are told
apart.
"""

import re

import torch

from rlfr_vlm.rewards.custom import load_reward_function
from rlfr_vlm.types import EncodedPrompt, Prompt, Rollout
from tests.docs.pages import DOCS, blocks

PAGE = "add_a_reward.md"


def rollout(text: str, **extra) -> Rollout:
    """A response to a question whose answer is Paris."""
    messages = ({"role": "user", "content": [{"type": "text", "text": "Where?"}]},)
    prompt = Prompt("q1", messages, (), "Paris", extra=extra)
    encoded = EncodedPrompt(prompt, (1,), (1,), torch.zeros(1, 1))
    return Rollout(encoded, 0, (1, 2), (0.0, 0.0), text, "stop", 0)


def test_its_function_scores(tmp_path):
    (text,) = blocks(PAGE, "python")
    (tmp_path / "my_reward.py").write_text(text, encoding="utf-8")
    score = load_reward_function(f"{tmp_path}/my_reward.py:compute_score")
    right, wordy, wrong = score(
        [rollout("It is Paris"), rollout("It is Paris", words=2), rollout("Rome")]
    )
    assert (right.reward, right.correct, right.parts["brief"]) == (1.1, True, 1.0)
    assert (wordy.reward, wordy.parts["brief"]) == (1.0, 0.0)
    assert (wrong.reward, wrong.correct) == (0.1, False)


def test_each_shape_of_its_table_is_taken(tmp_path):
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    shapes = dict(re.findall(r"^\| (verl|TRL|EasyR1|OpenRLHF) \| (.*?) \|", text, re.MULTILINE))
    parameters = {
        "verl": re.search(r"`([^`]*)`", shapes["verl"])[1],
        "TRL": "prompts, completions, **kwargs",
        "EasyR1": re.search(r"`(reward_inputs)`", shapes["EasyR1"])[1],
        "OpenRLHF": re.search(r"`([^`]*)`", shapes["OpenRLHF"])[1],
    }
    assert "`prompts, completions`" in shapes["TRL"] and "`**kwargs`" in shapes["TRL"]
    returns = {
        "verl": "0.5",
        "TRL": "[0.5] * len(completions)",
        "EasyR1": "[{'overall': 0.5, 'accuracy': 1.0} for _ in reward_inputs]",
        "OpenRLHF": "[0.5] * len(queries)",
    }
    assert len(shapes) == len(returns)
    for name, value in returns.items():
        path = tmp_path / f"{name}.py"
        path.write_text(f"def score({parameters[name]}):\n    return {value}\n")
        (found,) = load_reward_function(f"{path}:score")([rollout("Paris")])
        assert found.reward == 0.5, name
