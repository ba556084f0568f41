"""What the protections cost: the time inside them, as a share of a step of the text benchmark, and
of a save.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from rlfr_vlm import bench, faults
from rlfr_vlm.models import policy
from rlfr_vlm.rollout import weights
from rlfr_vlm.rollout.vllm_engine import VllmEngine
from rlfr_vlm.run.watch import Watch
from rlfr_vlm.storage import checkpoint, shards
from rlfr_vlm.training import collect, update
from rlfr_vlm.training.metrics import UpdateMetrics

EVERY_STEP = [
    (faults, "_due", "fault points"),
    (update, "not_finite_here", "finite checks"),
    (collect, "check_finite", "finite checks"),
    (policy, "check_finite", "finite checks"),
    (UpdateMetrics, "add_tokens", "figures"),
    (UpdateMetrics, "result", "figures"),
    (update, "moved", "figures"),
    (Watch, "look", "monitors"),
    (weights.Arrivals, "check", "sync proof"),
    (weights, "compare_weights", "sync proof"),
]
SHARE, SAVE_SHARE = 0.02, 0.05
SAVES = 5


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    subprocess.run(
        [sys.executable, "-m", "rlfr_vlm.demo.arithmetic", "model", str(folder)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return folder


@pytest.fixture
def spent(monkeypatch):
    """Seconds inside functions, by kind; `watch(owner, name, kind)` adds one."""
    seconds = Counter()

    def watch(owner, name, kind):
        original = getattr(owner, name)

        def clocked(*arguments, **named):
            start = time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                seconds[kind] += time.perf_counter() - start

        monkeypatch.setattr(owner, name, clocked)

    seconds.watch = watch
    return seconds


@pytest.mark.reliability
def test_of_a_step(smollm2, spent, figure):
    """The one probe of an engine's first sync belongs to starting it."""
    pytest.importorskip("vllm")
    for place in EVERY_STEP:
        spent.watch(*place)
    spent.watch(VllmEngine, "probe", "probe")
    steps = 2
    shape = {
        "task": "text",
        "engine": "vllm",
        "dtype": "bf16",
        "prompts_per_step": 8,
        "group_size": 8,
        "max_new_tokens": 64,
    }
    settings = {
        **shape,
        "steps": steps,
        "warmup": 0,
        "threads": 1,
        "tokens_per_microbatch": None,
        "no_flow": False,
    }
    row = bench.bench(argparse.Namespace(model=str(smollm2), **settings))
    whole = sum(row["step_s_all"])
    probe = spent.pop("probe")
    told = ", ".join(
        f"{kind} {seconds / steps * 1000:.0f} ms" for kind, seconds in spent.most_common()
    )
    share = spent.total() / (whole + spent["monitors"])
    text = (
        f"SmolLM2-135M, 64 responses of 64 tokens: {share:.2%} of a step of {whole / steps:.1f} s "
        f"({told}); probe once {probe:.1f} s"
    )
    print(text)
    assert share < SHARE, text
    figure("cost", text)


@pytest.mark.reliability
def test_of_a_save(tmp_path, monkeypatch, figure):
    """Beside the same files written, flushed and rotated, and hashed, in CPU time: the disk is
    shared with others.
    """
    tensors = {f"layers.{i}.weight": torch.randn(2**22) for i in range(12)}  # 192 MiB

    def write(folder):
        with shards.ShardWriter(checkpoint.rank_folder(folder, 0), "policy") as file:
            for name, tensor in tensors.items():
                file.add(name, tensor)

    def plain(folder):
        checkpoint.rank_folder(folder, 0).mkdir(parents=True)
        with monkeypatch.context() as without:
            without.setattr(shards, "check_finite", lambda *_: None)
            write(folder)
        for path in folder.rglob("*.safetensors"):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(folder)

    def seconds(act, *arguments):
        start = time.process_time()
        act(*arguments)
        return time.process_time() - start

    saves: dict[str, list[float]] = {"plain": [], "hash": [], "ours": []}
    for step in range(1, SAVES + 1):
        saves["plain"].append(seconds(plain, tmp_path / "plain"))
        saves["ours"].append(
            seconds(checkpoint.commit_checkpoint, tmp_path / "ours", step, write, 2)
        )
        (file,) = (tmp_path / "ours" / f"global_step_{step}").rglob("*.safetensors")
        saves["hash"].append(seconds(checkpoint.sha256, file))
    least = {name: min(values) for name, values in saves.items()}
    more = least["ours"] / (least["plain"] + least["hash"]) - 1
    text = (
        f"a save of 192 MiB: {least['ours']:.3f} s of CPU, {more:+.1%} beside "
        f"{least['plain']:.3f} plain and {least['hash']:.3f} of sha256"
    )
    print(text)
    assert more < SAVE_SHARE, text
    figure("cost", text)
