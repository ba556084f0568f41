"""Dynamic sampling: groups that are all right or all wrong are replaced by further prompts, and
fill up where nothing better is found.
"""

import pytest

from rlfr_vlm.batch import GradedGroup
from rlfr_vlm.config import DataConfig, parse_config
from rlfr_vlm.data.bad_rows import BadRows
from rlfr_vlm.data.prompts import parse_row
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import PromptSource, PromptStream
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.training.collect import collect
from rlfr_vlm.types import Outcome, Rollout, RolloutGroup
from tests.training.test_update import config

REWARD = """
from collections import defaultdict

def reward(prompts, completions, id, **columns):
    seen = defaultdict(int)
    scores = []
    for row in id:
        seen[row] += 1
        scores.append(float(seen[row] == 1) if int(row) in {hard} else 0.0)
    return scores
"""


@pytest.fixture(scope="module")
def parts(model_folder):
    cfg = config(model_folder("qwen2"))
    policy = Policy(cfg.model)
    with Grader(cfg.reward.grader, "text") as grader:
        yield policy, grader


def run(parts, model_folder, tmp_path, informative, max_rounds, num_rows=9):
    """Prompts whose number is in `informative` earn different rewards within their group, the
    others all the same.
    """
    policy, grader = parts
    path = tmp_path / "reward.py"
    path.write_text(REWARD.replace("{hard}", repr(set(informative) or {-1})))
    cfg = config(
        model_folder("qwen2"),
        rollout={"num_prompts": 3, "group_size": 2, "max_new_tokens": 4, "max_rounds": max_rounds},
        reward={"function": f"{path}:reward", "answer": "text"},
    )
    rows = [
        parse_row({"id": str(i), "prompt": f"{i}?", "answer": "1"}, f"r:{i}", DataConfig())
        for i in range(num_rows)
    ]
    source = PromptSource(
        rows,
        Renderer(policy, DataConfig(), "r"),
        PromptStream(num_rows, 0, False),
        BadRows(DataConfig()),
    )
    return collect(cfg, HFEngine(cfg.rollout, policy), source, grader, 1), source


class Scripted:
    """An engine that gives each prompt's two samples the texts that stand for it, a token per
    character.
    """

    def __init__(self, texts):
        self.texts = texts

    def sample(self, prompts, sampling):
        def rollout(prompt, index):
            text = self.texts[prompt.prompt.id][index]
            return Rollout(prompt, index, (0,) * len(text), (0.0,) * len(text), text, "stop", 0)

        return [
            RolloutGroup(p, tuple(rollout(p, i) for i in range(sampling.group_size)))
            for p in prompts
        ]


def ids(groups):
    return [g.prompt.prompt.id for g in groups]


def test_one_round_keeps_what_it_drew(parts, model_folder, tmp_path):
    batch, _ = run(parts, model_folder, tmp_path, {1}, 1)
    assert ids(batch.groups) == ["0", "1", "2"]
    assert batch.rounds == 1


def test_flat_groups_are_replaced_by_as_many_further_prompts(parts, model_folder, tmp_path):
    batch, source = run(parts, model_folder, tmp_path, {1, 4, 5, 6}, 10)
    assert ids(batch.groups) == ["1", "4", "5"]
    assert [g.informative for g in batch.kept] == [True] * 3
    assert (batch.rounds, source.stream.position) == (
        3,
        6,
    )  # 3 drawn, 2 missing: 3 and 4, 1 missing: 5
    assert len(batch.sampled) == 6
    assert [o.reward for o in batch.outcomes] == [1, 0] * 3


def test_the_last_round_falls_back_on_flat_groups(parts, model_folder, tmp_path):
    batch, _ = run(parts, model_folder, tmp_path, {4}, 2)
    assert batch.rounds == 2
    assert len(batch.kept) == 3
    assert sum(g.informative for g in batch.kept) == 1
    nothing, _ = run(parts, model_folder, tmp_path, set(), 2)
    assert len(nothing.kept) == 3


def test_a_prompt_drawn_again_in_a_later_round_is_sampled_anew(parts, model_folder, tmp_path):
    batch, _ = run(parts, model_folder, tmp_path, set(), 3, num_rows=3)
    by_prompt = {}
    for graded in batch.sampled:
        by_prompt.setdefault(graded.group.prompt.prompt.id, []).append(
            [r.token_ids for r in graded.group.rollouts]
        )
    assert all(len(rounds) == 3 and rounds[0] != rounds[1] for rounds in by_prompt.values())


def outcome(verdict, reward, **parts):
    return Outcome(reward, verdict, parts)


@pytest.mark.parametrize(
    ("outcomes", "mixed", "informative"),
    [
        ([outcome("correct", 1), outcome("wrong", -1)], True, True),
        ([outcome("correct", 0), outcome("wrong", 0)], True, False),
        ([outcome("correct", 1), outcome("correct", 0.25, overlong=-0.75)], False, True),
        ([outcome("wrong", -1), outcome("wrong", -0.5, format=1.0)], False, True),
        ([outcome("correct", 1), outcome("error", 0), outcome("correct", 1)], False, False),
        ([outcome("correct", 1), outcome("error", 0)], False, False),
        (
            [outcome("wrong", 0.25, function=0.25), outcome("wrong", 0.75, function=0.75)],
            True,
            True,
        ),
        (
            [
                outcome("correct", 0.5, function=0.5),
                outcome("wrong", 0.25, function=0.5, overlong=-0.25),
            ],
            False,
            True,
        ),
    ],
)
def test_a_group_is_mixed_by_its_answers_alone(outcomes, mixed, informative):
    """0 < right < G of those that were graded, or scores of a user's function that differ, whatever
    format and length earned.
    """
    found = GradedGroup(RolloutGroup(None, ()), tuple(outcomes))
    assert (found.mixed, found.informative) == (mixed, informative)


def test_groups_that_differ_in_length_alone_are_replaced(parts):
    """DAPO as published: of the prompts drawn, 0 is all right and 1 all wrong, each with a sibling
    in the last fifth of the budget.
    """
    policy, grader = parts
    texts = {
        "0": ("1", "0000000001"),
        "1": ("2", "0000000002"),
        "2": ("1", "2"),
        "3": ("1", "1"),
        "4": ("2", "0000000001"),
    }
    rollout = {"num_prompts": 2, "group_size": 2, "max_new_tokens": 10}
    tree = {
        "output_dir": "o",
        "model": {"path": "m"},
        "algorithm": {"method": "dapo"},
        "rollout": rollout,
        "reward": {"answer": "text"},
    }
    rows = [
        parse_row({"id": i, "prompt": "?", "answer": "1"}, f"r:{i}", DataConfig()) for i in texts
    ]
    source = PromptSource(
        rows,
        Renderer(policy, DataConfig(), "r"),
        PromptStream(len(rows), 0, False),
        BadRows(DataConfig()),
    )
    batch = collect(parse_config(tree), Scripted(texts), source, grader, 1)
    assert [[o.reward for o in g.outcomes] for g in batch.sampled] == [
        [1, 0],
        [-1, -2],
        [1, -1],
        [1, 1],
        [-1, 0],
    ]
    assert (ids(batch.groups), batch.rounds) == (["2", "4"], 3)
