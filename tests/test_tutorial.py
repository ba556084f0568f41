"""docs/tutorial.md, word for word: its commands in a fresh clone, in order, and what it says of
them.
"""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlfr_vlm.arguments import build_parser
from rlfr_vlm.config import load_config, parse_config
from rlfr_vlm.rewards.custom import load_reward_function

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/tutorial.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
SAID = "\n".join(text for kind, text in BLOCKS if not kind)


def commands(*kinds: str) -> list[list[str]]:
    """Every command of ours, as words."""
    lines = [
        line
        for kind, text in BLOCKS
        if kind in kinds
        for line in text.replace("\\\n", "").splitlines()
    ]
    inline = re.findall(r"`(rlfr-vlm [^`]*--[^`]*)`", TEXT)
    words = [shlex.split(line, comments=True) for line in (*lines, *inline)]
    ours = [found[1:] for found in words if found[:1] == ["rlfr-vlm"]]
    return ours + [
        found[found.index("rlfr_vlm.cli") + 1 :] for found in words if "rlfr_vlm.cli" in found
    ]


@pytest.mark.parametrize("words", commands("sh", "console"), ids=" ".join)
def test_every_command_of_the_tutorial_parses(words):
    words = [word for word in words if word != "&"]
    arguments = build_parser().parse_args(words)
    config = getattr(arguments, "config", None)
    if config not in (None, "...", "my_run.yaml"):
        load_config(ROOT / config, tuple(getattr(arguments, "overrides", ())))
    for word in words:
        if re.match(r"(examples|docs|data)/[\w.]+$", word):
            assert (ROOT / word).exists(), word


def test_its_configs_load_and_its_links_lead_somewhere():
    (gpu,) = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
    assert parse_config(gpu).rollout.engine == "vllm"
    assert load_config(ROOT / "examples/tutorial.yaml").flow is not None
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
    assert max(map(len, TEXT.split("\n"))) <= 150


def test_the_reward_of_ones_own_scores_and_says_what_is_right():
    assert load_reward_function(f"{ROOT}/examples/reward.py:compute_score")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from reward import compute_score
    finally:
        sys.path.pop(0)
    assert compute_score("", r"4 + 7 = \boxed{11}", "11", {}) == {"score": 1 - 0.05, "acc": 1.0}
    assert compute_score("", r"so \boxed{1} or \boxed{ 12 }", "11", {}) == {
        "score": -0.06,
        "acc": 0.0,
    }
    assert compute_score("", "eleven", "11", {}) == {"score": -0.01, "acc": 0.0}


def clone(folder: Path) -> Path:
    """What git has, and the virtual environment that `make install` would make."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path):
    """A few minutes on two cores; set RLFR_TUTORIAL_LOG to a folder to keep what each block
    printed.
    """
    repo = clone(tmp_path / "clone")
    env = {**os.environ, "PYTHONPATH": str(repo), "PATH": f"{repo}/.venv/bin:{os.environ['PATH']}"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    where = subprocess.run(
        ["python", "-c", "import rlfr_vlm; print(rlfr_vlm.__file__)"],
        cwd=repo,
        env=env,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(repo)), where
    printed, seconds, cpu = [], [], resource.getrusage(resource.RUSAGE_CHILDREN)
    for number, block in enumerate(SHELL):
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", block], cwd=repo, env=env, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0 or "kill -9" in block, (
            f"{block}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
        printed.append(done.stdout + done.stderr)
        seconds.append(time.monotonic() - start)
        if log := os.environ.get("RLFR_TUTORIAL_LOG"):
            (Path(log) / f"{number:02d}.txt").write_text(
                f"$ {block}{printed[-1]}\n{seconds[-1]:.1f} s\n"
            )
    everything = "\n".join(printed)

    assert next(text for kind, text in BLOCKS if kind == "json").strip() in printed[0]
    assert "no bad rows, 0 warnings" in printed[1] and "commonest answer: '3', 14.5 %" in printed[1]
    assert printed[2].strip().endswith("fits")
    first, *_, last = (float(found) for found in re.findall(r"held-out ([\d.]+)", printed[3]))
    assert last < first / 2
    assert "resumed from global_step_10" in everything
    run = repo / "runs/tutorial"
    steps = [
        line["step"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "reward/mean" in line
    ]
    assert steps == list(range(1, 41))
    said = (
        (run / "events.jsonl").read_text().splitlines() if (run / "events.jsonl").exists() else []
    )
    assert {json.loads(line)["monitor"] for line in said} <= {
        "flow_unfit"
    }  # its field is fitted for a minute

    before, after, blank = (
        json.loads((repo / f"runs/tutorial_eval/{name}/digits/summary.json").read_text())
        for name in ("before", "after", "blank")
    )
    assert after["accuracy_ci"][0] > before["accuracy_ci"][1] + 0.1, (
        "accuracy rises, and the intervals are far apart"
    )
    assert blank["accuracy_ci"][1] < before["accuracy_ci"][0], "blank pictures leave little"
    (change,) = re.findall(r"\| digits \| 200 .*\[\+([\d.]+), \+([\d.]+)\]", everything)
    assert float(change[0]) > 15
    for page in (run / "report.html", repo / "runs/tutorial_eval/after/report.html"):
        assert page.stat().st_size > 100_000

    best = json.loads((run / "checkpoints/best.json").read_text())["step"]
    greedy = [
        line
        for line in map(json.loads, (run / f"eval/step_{best:06d}.jsonl").read_text().splitlines())
        if line["sample_index"] == -1
    ]
    for line in greedy[:10]:
        assert f"{line['response']}  (gold: {line['answer']})" in everything, (
            "transformers alone says what training measured"
        )
    assert everything.count("mean deviation") == 2
    assert (repo / "runs/tutorial_reward/checkpoints/global_step_2").is_dir()
    assert subprocess.run(
        ["git", "status", "--porcelain"], cwd=repo, capture_output=True, text=True
    ).stdout in ("", "?? .venv\n")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime
    print(
        f"{sum(seconds):.0f} s, of a core {cores:.0f} s: "
        f"{', '.join(f'{found:.0f}' for found in seconds)}"
    )
