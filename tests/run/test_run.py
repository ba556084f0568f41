"""What a run writes down, and what it makes up for after a kill."""

import json

import pytest

from rlfr_vlm.config import parse_config
from rlfr_vlm.rewards.grader import Grader
from rlfr_vlm.run.records import over_updates
from rlfr_vlm.run.run import Run
from rlfr_vlm.storage.checkpoint import commit_checkpoint, list_checkpoints, read_best


def test_metrics_of_several_updates_weigh_by_their_samples():
    first = {"actor/pg_loss": 1.0, "rollout/logprob_diff_max": 0.1, "flow/loss": 3.0}
    second = {
        "actor/pg_loss": 4.0,
        "rollout/logprob_diff_max": 0.7,
    }  # nothing was selected: no flow loss, which is not a loss of 0
    merged = over_updates([(first, 2), (second, 1)])
    assert merged == {
        "actor/pg_loss": pytest.approx(2.0),
        "rollout/logprob_diff_max": 0.7,
        "flow/loss": pytest.approx(3.0),
    }
    assert over_updates([]) == {}
    updates = [
        {"rollout/surprisal_z": 3.0, "actor/update_ratio": 0.01, "flow/drift": drift}
        for drift in (0.1, 0.2, 0.3, 0.4)
    ]
    assert over_updates([(found, 2) for found in updates]) == {
        "rollout/surprisal_z": pytest.approx(6.0),
        "actor/update_ratio": pytest.approx(0.04),
        "flow/drift": 0.4,
    }


@pytest.fixture
def run(tmp_path):
    cfg = parse_config(
        {
            "output_dir": str(tmp_path),
            "model": {"path": "m"},
            "eval": {"every": 2},
            "train": {"steps": 5},
        }
    )
    with Grader(cfg.reward.grader, "text") as grader:
        run = Run(cfg, grader)
        yield run
        run.close()


def test_an_evaluation_lost_to_a_kill_is_owed(run):
    done, begun = (
        [{"step": 2, "val/accuracy": 0.5}, {"step": 2, "val/score": 0.5}],
        {"step": 4, "val/accuracy": 0.5},
    )
    lines = [{"step": 1}, {"step": 2}, *done, {"step": 4}, begun, {"step": 5}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [run.owes_evaluation(step) for step in (0, 1, 2, 4, 5)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    kept = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert kept == [line for line in lines if line is not begun]  # and is written anew


def test_the_best_evaluations_checkpoint_outlives_the_others(run):
    """In a run long enough to prune; the first of equal scores stays the best."""
    for step, score in ((1, 0.2), (2, 0.8), (3, 0.5), (4, 0.8), (5, 0.1)):
        commit_checkpoint(
            run.checkpoints, step, lambda folder: (folder / "x").write_text("x"), keep=2
        )
        run.keep_if_best(step, score, learner=None, prompts=None)  # saved already: nothing to save
    assert [p.name for p in list_checkpoints(run.checkpoints)] == [
        "global_step_2",
        "global_step_4",
        "global_step_5",
    ]
    assert read_best(run.checkpoints) == {"step": 2, "score": 0.8}
