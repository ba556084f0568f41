"""Dynamic sampling: flat groups are replaced by further prompts, and fill up where nothing better is found."""

import pytest

from rlfr_vlm.config import DataConfig
from rlfr_vlm.data.prompts import BadRows, PromptStream, parse_row
from rlfr_vlm.data.render import PromptSource, Renderer
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.training.collect import collect
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
    """Prompts whose number is in `informative` earn different rewards within their group, the others all the same."""
    policy, grader = parts
    path = tmp_path / "reward.py"
    path.write_text(REWARD.replace("{hard}", repr(set(informative) or {-1})))
    cfg = config(
        model_folder("qwen2"),
        rollout={"num_prompts": 3, "group_size": 2, "max_new_tokens": 4, "max_rounds": max_rounds},
        reward={"function": f"{path}:reward", "answer": "text"},
    )
    rows = [parse_row({"id": str(i), "prompt": f"{i}?", "answer": "1"}, f"r:{i}", DataConfig()) for i in range(num_rows)]
    source = PromptSource(rows, Renderer(policy, DataConfig(), "r"), PromptStream(num_rows, 0, False), BadRows(DataConfig()))
    return collect(cfg, HFEngine(cfg.rollout, policy), source, grader, 1), source


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
    assert (batch.rounds, source.stream.position) == (3, 6)  # 3 drawn, 2 missing: 3 and 4, 1 missing: 5
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
        by_prompt.setdefault(graded.group.prompt.prompt.id, []).append([r.token_ids for r in graded.group.rollouts])
    assert all(len(rounds) == 3 and rounds[0] != rounds[1] for rounds in by_prompt.values())
