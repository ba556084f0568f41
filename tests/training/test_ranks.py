"""Several ranks give the numbers of one process: real DeepSpeed over gloo, started as users start it."""

import json

import pytest
import torch

from tests.runs import make_config, make_data, python, torchrun

MOST = 1e-5  # relative difference of gradients and weights in float32


def differences(one, other):
    """Relative difference of gradients, the largest over the updates, and of the weights."""

    def relative(a, b):
        assert a.keys() == b.keys()
        error = sum((a[n].double() - b[n].double()).square().sum() for n in a) / sum(a[n].double().square().sum() for n in a)
        return float(error.sqrt())

    assert len(one["gradients"]) == len(other["gradients"])
    gradients = [relative(a, b) for a, b in zip(one["gradients"], other["gradients"], strict=True)]
    return {"gradients": max(gradients), "weights": relative(one["weights"], other["weights"])} | (
        {"field": relative(one["field"], other["field"])} if "field" in one else {}
    )


def mixed_rows(folder):
    """Text only at every second place."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows[1::2]:
        row.update(prompt="How many are one and one?", answer="2", images=[])
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def recorded(model_folder, tmp_path_factory):
    """Config and recorded rollouts; `mixed`: pictures in the first rank's share only."""
    made = {}

    def make(mixed=False):
        if mixed not in made:
            folder = tmp_path_factory.mktemp("ranks")
            make_data(folder, 16)
            if mixed:
                mixed_rows(folder)
            sections = {
                "rollout": {"engine": "hf", "num_prompts": 5, "group_size": 4, "max_new_tokens": 8},
                "data": {"shuffle": False},
                "optim": {"name": "sgd", "lr": 0.1, "max_grad_norm": 1e9},
                "train": {"steps": 5, "tokens_per_microbatch": 200},
            }
            config = make_config(folder, model_folder("qwen2_5_vl"), **sections)
            python("tests.training.rank_worker", "record", config, folder / "rollouts")
            made[mixed] = (folder, config)
        return made[mixed]

    return make


CASES = {
    "stage 0": (False, 0, []),
    "stage 1": (False, 1, []),
    "stage 2": (False, 2, []),
    "stage 3": (False, 3, []),
    "stage 2, adapters": (False, 2, ["model.lora.rank=4"]),
    "stage 3, adapters": (False, 3, ["model.lora.rank=4"]),
    "stage 2, pictures on one rank": (True, 2, []),
    "stage 3, pictures on one rank": (True, 3, []),
    "stage 3, pictures on one rank, frozen tower": (True, 3, ["model.freeze_vision=true"]),
    "stage 3, recomputed layers": (False, 3, ["model.gradient_checkpointing=nonreentrant"]),
    "stage 2, recomputed layers": (False, 2, ["model.gradient_checkpointing=reentrant"]),
    "stage 2, PPO": (False, 2, ["algorithm.method=ppo", "algorithm.updates_per_rollout=2"]),
    "stage 3, FlowRL": (False, 3, ["algorithm.method=flowrl", "flow=null"]),
}
FAST = ("stage 2", "stage 3, pictures on one rank")


def replay(recorded, cases, ranks):
    """What each case's updates gave, by name: {name: overrides} of one recording, in one start of the processes."""
    folder, config = recorded
    out = folder / f"by_{ranks}"
    out.mkdir(exist_ok=True)
    arguments = ("tests.training.rank_worker", "replay", config, folder / "rollouts", out, json.dumps(cases))
    python(*arguments) if ranks == 1 else torchrun(ranks, *arguments, timeout=900)
    return {name: torch.load(out / f"{name}.pt", weights_only=False) for name in cases}


def compared(recorded, names, ranks=2):
    """Differences between one process and several, by case."""
    found = {}
    for mixed in (False, True):
        chosen = {name: CASES[name] for name in names if CASES[name][0] == mixed}
        if chosen:
            one = replay(recorded(mixed), {name: settings for name, (_, _, settings) in chosen.items()}, 1)
            sharded = {name: [f"deepspeed.zero_stage={stage}", *settings] for name, (_, stage, settings) in chosen.items()}
            many = replay(recorded(mixed), sharded, ranks)
            found |= {name: differences(one[name], many[name]) for name in chosen}
    for name, values in found.items():
        print(f"{name}, {ranks} ranks:", ", ".join(f"{part} {value:.1e}" for part, value in values.items()))
    return found


def test_two_ranks_give_the_numbers_of_one_process(recorded):
    for name, found in compared(recorded, FAST).items():
        assert max(found.values()) <= MOST, (name, found)


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one_process_in_every_case(recorded):
    for name, found in compared(recorded, CASES).items():
        assert max(found.values()) <= MOST, (name, found)


@pytest.mark.slow
def test_three_ranks_of_which_one_has_less_to_do(recorded):
    for name, found in compared(recorded, ["stage 2", "stage 3, pictures on one rank"], ranks=3).items():
        assert max(found.values()) <= MOST, (name, found)
