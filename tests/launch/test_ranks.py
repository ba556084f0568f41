"""Several ranks give the numbers of one process: real DeepSpeed over gloo, started as users start
it.
"""

import json
import statistics
import subprocess
import sys

import pytest
import torch

from rlfr_vlm.demo import recipe
from tests.runs import ROOT, make_config, make_data, python, torchrun

MOST = 1e-5  # relative difference of gradients and weights in float32


def differences(one, other):
    """Relative difference of gradients, the largest over the updates, and of the weights."""

    def relative(a, b):
        assert a.keys() == b.keys()
        error = sum((a[n].double() - b[n].double()).square().sum() for n in a) / sum(
            a[n].double().square().sum() for n in a
        )
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
            python("tests.launch.rank_worker", "record", config, folder / "rollouts")
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
WINDOW = [
    "flow.contrast=own", "flow.fit.batch_tokens=16", "flow.online={window: 2, updates: 3, "
        "batch_tokens: 16, lr: 1e-3}",
    "flow.reward={coef: 0.3, normalise: group_z, threshold: 0, top_k: 0, credit: token, centre: "
        "type}",
]  # fmt: skip
CASES["stage 2, a contrast in small steps"] = (False, 2, WINDOW)
FAST = ("stage 2, a contrast in small steps", "stage 3, pictures on one rank")


def replay(recorded, cases, ranks):
    """What each case's updates gave, by name: {name: overrides} of one recording, in one start of
    the processes.
    """
    folder, config = recorded
    out = folder / f"by_{ranks}"
    out.mkdir(exist_ok=True)
    arguments = (
        "tests.launch.rank_worker",
        "replay",
        config,
        folder / "rollouts",
        out,
        json.dumps(cases),
    )
    python(*arguments) if ranks == 1 else torchrun(ranks, *arguments, timeout=900)
    return {name: torch.load(out / f"{name}.pt", weights_only=False) for name in cases}


def compared(recorded, names, ranks=2):
    """Differences between one process and several, by case."""
    found = {}
    for mixed in (False, True):
        chosen = {name: CASES[name] for name in names if CASES[name][0] == mixed}
        if chosen:
            one = replay(
                recorded(mixed), {name: settings for name, (_, _, settings) in chosen.items()}, 1
            )
            sharded = {
                name: [f"deepspeed.zero_stage={stage}", *settings]
                for name, (_, stage, settings) in chosen.items()
            }
            many = replay(recorded(mixed), sharded, ranks)
            found |= {name: differences(one[name], many[name]) for name in chosen}
    for name, values in found.items():
        print(
            f"{name}, {ranks} ranks:",
            ", ".join(f"{part} {value:.1e}" for part, value in values.items()),
        )
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
    for name, found in compared(
        recorded, ["stage 2", "stage 3, pictures on one rank"], ranks=3
    ).items():
        assert max(found.values()) <= MOST, (name, found)


# -- the demo, live --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The demo's data, as it builds it, and the same with text-only rows at every second place."""
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run(
        [sys.executable, "-m", "rlfr_vlm.demo.digits", "build", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows[1::2]:
        row.update(prompt="What is 2 + 3? Put the answer into a box.", answer="5", images=[])
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def live(folder, name, *overrides, ranks=1):
    """Metrics and first rollouts of five steps of the demo with vLLM, through the command line."""
    run = folder / name
    settings = [
        "flow.profile=published",
        f"output_dir={run}", f"data.train={folder / 'train.jsonl'}", "rollout.engine=vllm", "train.steps=5", "train.log_rollouts=32",
        "eval.every=0", "data.eval=null", "data.shuffle=false", *overrides,
    ]  # fmt: skip
    arguments = ("train", "--config", recipe("vision"), *settings)
    python("rlfr_vlm.cli", *arguments, timeout=900) if ranks == 1 else torchrun(
        ranks, "rlfr_vlm.cli", *arguments, timeout=1200
    )
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rollouts = [
        json.loads(line) for line in (run / "rollouts/step_000001.jsonl").read_text().splitlines()
    ]
    return metrics, rollouts


LIVE = {
    "stage 2": (2, []),
    "stage 3": (3, []),
    "stage 3, adapters": (3, ["model.lora.rank=8", "optim.lr=1e-3"]),
    "stage 3, pictures on one rank": (3, ["data.train={folder}/mixed.jsonl"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LIVE)
def test_the_demo_on_two_ranks_with_vllm(digits, case):
    stage, settings = LIVE[case]
    given = [s.format(folder=digits) for s in settings]
    name = case.replace(", ", "_").replace(" ", "_")
    one, alone = live(digits, f"one_{name}", *given)
    two, both = live(digits, f"two_{name}", f"deepspeed.zero_stage={stage}", *given, ranks=2)
    assert [r["tokens"] for r in alone] == [r["tokens"] for r in both]
    assert len(alone) == 32 * 8
    spread = statistics.stdev(r["reward"] for r in alone) / (5 * 32 * 8) ** 0.5
    means = [statistics.mean(m["reward/mean"] for m in metrics) for metrics in (one, two)]
    print(
        f"{case}: mean reward of 5 steps {means[0]:.4f} and {means[1]:.4f}, standard error "
        f"{spread:.4f}"
    )
    assert abs(means[0] - means[1]) <= spread
    assert [m["actor/grad_norm"] for m in two[:1]] == pytest.approx(
        [m["actor/grad_norm"] for m in one[:1]], rel=1e-4
    )
