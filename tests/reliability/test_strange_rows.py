"""R9: a data file of strangers' rows through the real command line: each bad row is left out for
its own reason, each good one is kept.
"""

import json
import os
import re
import site
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rlfr_vlm.config import load_config
from rlfr_vlm.data.bad_rows import BadRows
from rlfr_vlm.data.prompts import load_prompts
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.data.stream import encode_all
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.preflight.kinds import KINDS
from tests.reliability.strange_rows import CLASSES, LIMIT, write
from tests.runs import ROOT, cli

MODEL = ROOT / "rlfr_vlm/demo/tiny_vlm"
MAX_MIB = 1024
SECONDS = 60  # of CPU time: the machine may be busy


def config(folder: Path) -> Path:
    """All rows of folder/data, as held-out ones: `eval` then opens every one of them, and answers
    those that are left.
    """
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(MODEL), "dtype": "float32"},
        "data": {"eval": str(folder / "data/rows.jsonl"), "on_bad_row": "skip", "max_bad_frac": 1.0}
        | {"max_prompt_tokens": LIMIT, "max_pixels": 50_000},
        "rollout": {"engine": "hf", "max_new_tokens": 2, "num_prompts": 2},
        "eval": {"num_samples": 1},
        "reward": {"max_error_frac": 1.0, "grader": {"workers": 2}},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def watched(
    folder: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess, dict, float]:
    """The command line under the audit hook: how it ended, what was seen, seconds."""
    command = [
        sys.executable,
        "-m",
        "tests.reliability.watched_cli",
        str(folder / "seen.json"),
        *arguments,
    ]
    (folder / "tmp").mkdir()
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder / "tmp"),
        **environment,
    }
    start = time.monotonic()
    done = subprocess.run(
        command,
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    return done, json.loads((folder / "seen.json").read_text()), time.monotonic() - start


def left_out(folder: Path) -> dict[int, str]:
    """Class by line, from bad_rows.jsonl."""
    rows = [json.loads(line) for line in (folder / "run/bad_rows.jsonl").read_text().splitlines()]
    return {int(re.search(r"rows\.jsonl:(\d+)", row["reason"])[1]): row["kind"] for row in rows}


def strangers(opened: list[str], folder: Path) -> list[str]:
    """What was opened beside the data, the run, the program and the system's own files."""
    ours = [folder / name for name in ("data", "run", "tmp", "seen.json", "config.yaml")]
    theirs = [
        ROOT,
        sys.prefix,
        sys.base_prefix,
        *site.getsitepackages(),
        "/proc",
        "/sys",
        "/dev/null",
        "/dev/shm",
        "/usr/lib",
        "/usr/share",
    ]
    theirs += ["/lib", "/etc/ld.so.cache", "/etc/nsswitch.conf", "/etc/passwd"]
    known = tuple(str(Path(place).resolve()) for place in (*ours, *theirs))
    return [
        path
        for path in opened
        if not os.path.realpath(path).startswith(known) or path.endswith("environ")
    ]


@pytest.mark.reliability
def test_a_thousand_rows_of_strangers(tmp_path, figure):
    bad, kept = write(tmp_path / "data", copies=40, good=200)
    done, seen, seconds = watched(tmp_path, "eval", "--config", str(config(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    found = left_out(tmp_path)
    assert {
        line: (kind, found.get(line))
        for line, kind in bad.items()
        if found.get(line) != KINDS[kind].refused_as
    } == {}
    assert found.keys() == bad.keys() and len(bad) == 40 * len(CLASSES)
    lines = next((tmp_path / "run/eval").glob("*.jsonl")).read_text().splitlines()
    answered = [line["id"] for line in map(json.loads, lines) if line["sample_index"] == 0]
    assert answered == kept and len(kept) == 200
    assert strangers(seen["opened"], tmp_path) == [] and seen["connected"] == []
    assert [start for start in seen["started"] if "rlfr_vlm.rewards.grader" not in start] == []
    assert any(
        "rlfr_vlm.rewards.grader" in start for start in seen["started"]
    )  # the watch sees what is started
    assert max(seen["mib"]) < MAX_MIB and seen["cpu_seconds"] < SECONDS
    checked = cli("validate", "--config", str(tmp_path / "config.yaml"), timeout=200)
    findings = json.loads((tmp_path / "run/validate/validate.json").read_text())["findings"]
    named = [
        (f["line"], f["kind"])
        for f in findings
        if f["severity"] == "error" and f["line"] is not None
    ]
    assert sorted(named) == sorted(bad.items()), checked.stderr[-2000:]
    figure(
        "R9",
        f"{len(bad)} of {len(bad)} bad rows of {len(CLASSES)} classes left out, each under its "
        f"class in training and by its own name in validate; {len(answered)} of {len(kept)} good "
        "ones kept in order; 0 files opened outside, 0 connections, 0 processes but the grader's; "
        f"{max(seen['mib']):.0f} MiB, {seen['cpu_seconds']:.0f} s of CPU time in {seconds:.0f} s",
    )


@pytest.mark.reliability
def test_sixty_rows_of_strangers_through_vllm(tmp_path, figure):
    """What the renderer lets through, vLLM's own processor takes: it reads pictures and
    placeholders once more.
    """
    pytest.importorskip("vllm")
    bad, kept = write(tmp_path / "data", copies=2, good=60 - 2 * len(CLASSES), seed=2)
    assert len(bad) + len(kept) == 60
    done = cli("eval", "--config", str(config(tmp_path)), "rollout.engine=vllm", timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert left_out(tmp_path) == {line: KINDS[kind].refused_as for line, kind in bad.items()}
    lines = next((tmp_path / "run/eval").glob("*.jsonl")).read_text().splitlines()
    sampled = [line["id"] for line in map(json.loads, lines) if line["sample_index"] == 0]
    assert sampled == kept
    figure(
        "R9",
        f"60 rows through vLLM: {len(bad)} of {len(bad)} left out under their class, "
        f"{len(sampled)} of {len(kept)} good ones sampled",
    )


@pytest.mark.reliability
def test_the_watch_would_see_it(tmp_path, figure):
    """With the protections off: the same watch sees the file outside, the connection and the
    memory.
    """
    (tmp_path / "data").mkdir()
    Image.new("RGB", (56, 56)).save(tmp_path / "secret.png")
    Image.new("1", (13_000, 13_000)).save(tmp_path / "data/bomb.png")
    Image.new("RGB", (56, 56)).save(tmp_path / "data/good.png")
    sources = ["../secret.png", "http://127.0.0.1:1/x", "bomb.png", "good.png"]
    rows = [
        {"prompt": f"<image>{source}?", "images": [source], "answer": "1"} for source in sources
    ]
    (tmp_path / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, seen, _ = watched(
        tmp_path,
        "eval",
        "--config",
        str(config(tmp_path)),
        "data.allow_urls=true",
        RLFR_TEST_UNPROTECTED="1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [Path(path).name for path in strangers(seen["opened"], tmp_path)] == ["secret.png"]
    assert any("127.0.0.1" in place for place in seen["connected"]) and seen["mib"][0] > MAX_MIB
    figure(
        "R9",
        "the same watch with the protections off sees the file outside, the connection and "
        f"{seen['mib'][0]:.0f} MiB",
    )


@pytest.mark.filterwarnings("ignore")  # Pillow's, of bombs
def test_rows_of_strangers(tmp_path):
    """The same classes, a few of each, through the reader, the grader's check and the renderer of
    training, in this process.
    """
    from rlfr_vlm.commands import checked
    from rlfr_vlm.rewards.grader import Grader

    bad, kept = write(tmp_path / "data", copies=3, good=20, seed=1)
    cfg = load_config(config(tmp_path), ("model.device=cpu",))
    record = BadRows(cfg.data, tmp_path / "run/bad_rows.jsonl")
    prompts = load_prompts(cfg.data.eval, cfg.data, record)
    with Grader(cfg.reward.grader) as grader:
        prompts = checked(cfg, prompts, grader, record)
    encoded = encode_all(
        prompts, Renderer(Policy(cfg.model, weights=False), cfg.data, cfg.data.eval), record
    )
    assert left_out(tmp_path) == {line: KINDS[kind].refused_as for line, kind in bad.items()}
    assert [each.prompt.id for each in encoded] == kept
    assert Counter(bad.values()) == dict.fromkeys(CLASSES, 3)
