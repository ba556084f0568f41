"""Runs in which a value is made NaN or infinite at one place of the third step, and what became of
them.

python -m tests.reliability.spoilt_runs CONFIG FOLDER CASES     under torchrun, as a rank; CASES:
JSON, [[place, value, action], ...]
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlfr_vlm import faults
from rlfr_vlm.commands import train_rank
from rlfr_vlm.config import load_config
from rlfr_vlm.errors import StoppedError
from rlfr_vlm.ranks import end_rank, join
from rlfr_vlm.rollout.hf_engine import HFEngine
from rlfr_vlm.run.watch import read_lines
from rlfr_vlm.storage.shards import ShardReader

PLACES = (
    "logits",
    "old_logprob",
    "outcome",
    "advantage",
    "flow_score",
    "flow_loss",
    "gradient",
    "parameter",
)
ONE_RESPONSE = (
    "logits",
    "old_logprob",
    "outcome",
    "advantage",
    "flow_score",
)  # the places where one response is to blame
VALUES = ("nan", "inf", "-inf")
ACTIONS = ("stop", "roll_back")
SETTINGS = (
    "train.steps=4",
    "train.save_steps=1",
    "train.keep_checkpoints=4",
    "train.log_rollouts=0",
    "eval.every=0",
)


def spoil(config, folder, ranks, place, value, action, culprit=0):
    """Train; once, in the third step, a value at this place is spoilt on the rank `culprit`.
    Returns the policy as it was left, and the
    events. Raises nothing but AssertionError: the run has to stop, or to go back and end well, as
        `action` says.
    """
    cfg = load_config(config, (*SETTINGS, f"output_dir={folder}", f"monitors.non_finite={action}"))
    policies = []

    class Arming(HFEngine):
        def sample(self, prompts, sampling):
            groups = super().sample(prompts, sampling)
            if self.policy.version == 2 and len(policies) == 1 and ranks.rank == culprit:
                faults._reached = Counter()
                os.environ["RLFR_FAULT"] = f"{place}:1:{value}"
            return groups

    def make(policy, _):
        os.environ.pop("RLFR_FAULT", None)
        policies.append(policy)
        return Arming(cfg.rollout, policy)

    stopped = None
    try:
        train_rank(cfg, ranks, make)
    except StoppedError as error:
        stopped = str(error)
    finally:
        os.environ.pop("RLFR_FAULT", None)
    assert (stopped is not None) == (action == "stop"), stopped
    assert stopped is None or "monitors.non_finite=stop" in stopped, stopped
    return policies[-1], read_lines(Path(folder) / "events.jsonl")


def check(folder, policy, events, place, value, action, culprit=0):
    """Everything that has to hold after `spoil`, on the first rank."""
    (event,) = [event for event in events if event["monitor"] == "non_finite"]
    what = (place, value, action, event["what"])
    assert event["action"] == action, what
    assert "not finite" in event["what"] or "holds NaN or an infinity" in event["what"], what
    if place in ONE_RESPONSE:
        assert event["what"].partition(" of response ")[2].count("#") == 1, what
    root = Path(folder) / "checkpoints"
    good = (
        3 if place == "parameter" and culprit else 2
    )  # the first rank wrote that weight, of which its own copy was good
    steps = sorted(int(path.name.rpartition("_")[2]) for path in root.glob("global_step_*"))
    assert steps == ([*range(1, good + 1)] if action == "stop" else [1, 2, 3, 4]), what
    assert event["to"] == (None if action == "stop" else good), what
    for path in Path(folder).rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), (
            path,
            *what,
        )
    if place != "parameter":  # else memory itself was spoilt
        saved = ShardReader(root / f"global_step_{steps[-1]}", "policy")
        assert all(
            torch.equal(p.detach(), saved.read(name)) for name, p in policy.trained().items()
        ), what
    if action == "roll_back":
        assert [row["step"] for row in read_lines(Path(folder) / "metrics.jsonl")] == [
            1,
            2,
            3,
            4,
        ], what


def main():
    config, root, cases = sys.argv[1:]
    ranks = join(load_config(config))
    for place, value, action in json.loads(cases):
        folder = f"{root}/{place}_{value}_{action}"
        policy, events = spoil(config, folder, ranks, place, value, action, culprit=1)
        if ranks.first:
            check(folder, policy, events, place, value, action, culprit=1)
        ranks.gather(None, "next case")
    print(f"rank {ranks.rank}: {len(json.loads(cases))} caught")
    ranks.leave()
    end_rank(0)


if __name__ == "__main__":
    main()
