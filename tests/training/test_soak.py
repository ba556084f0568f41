"""Hundreds of steps: memory stays, and nothing is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from rlfr_vlm.training.processes import processes_with
from tests.runs import ROOT, make_config, make_data

STEPS, WARM = 300, 50
MOST_GROWTH = 0.02


def resident(mark):
    """Resident bytes of every process of a run, shared pages by share."""
    total = 0
    for pid, _ in processes_with(mark):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


def left_over(folder, members):
    """What a run forgot: files in its temporary folder, and shared memory named after one of its processes.

    torchrun's folder of logs and torch's cache of compiled functions are meant to stay.
    """
    theirs = ("torchelastic_", "torchinductor_")
    named = [p for p in Path("/dev/shm").iterdir() if any(str(pid) in p.name for pid in members)]
    return [str(p) for p in (*folder.iterdir(), *named) if not p.name.startswith(theirs)]


def steps_done(metrics):
    return len([line for line in metrics.read_text().splitlines() if "reward/mean" in json.loads(line)]) if metrics.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one process", "two ranks, stage 3, vLLM"])
def test_memory_stays_and_nothing_is_left(model_folder, tmp_path, kind):
    make_data(tmp_path)
    engine = "hf" if kind == "one process" else "vllm"
    config = make_config(
        tmp_path, model_folder("qwen2_5_vl"), rollout={"engine": engine, "num_prompts": 2, "group_size": 2, "max_new_tokens": 4},
        train={"steps": STEPS, "save_steps": 25, "log_rollouts": 1}, eval={"every": 50, "num_samples": 1, "limit": 2},
    )  # fmt: skip
    module = ["-m", "rlfr_vlm.cli", "train", "--config", str(config)]
    if kind != "one process":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
        module = [*launcher, *module, "deepspeed.zero_stage=3"]
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path / "tmp")}
    name, value = (mark := f"RLFR_TEST_RUN={uuid.uuid4().hex}").split("=")
    environment[name] = value
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *module], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
    samples, seen = {}, set()
    try:
        while process.poll() is None:
            done = steps_done(tmp_path / "run" / "metrics.jsonl")
            samples[done] = max(samples.get(done, 0), resident(mark))
            seen |= {pid for pid, _ in processes_with(mark)}
            time.sleep(0.2)
    finally:
        for pid, _ in processes_with(mark) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    warm = [size for step, size in samples.items() if WARM - 10 <= step <= WARM + 10]
    late = [size for step, size in samples.items() if STEPS - 30 <= step < STEPS]
    growth = sorted(late)[len(late) // 2] / sorted(warm)[len(warm) // 2] - 1
    print(f"{kind}: {sorted(warm)[len(warm) // 2] / 2**20:.1f} MiB at step {WARM}, {growth:+.2%} at step {STEPS}")
    assert growth < MOST_GROWTH
    assert not processes_with(mark)
    assert left_over(tmp_path / "tmp", seen) == []
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"global_step_275", "global_step_300", "latest", "best.json"} <= kept
    assert len(kept) <= 5  # and the best one
