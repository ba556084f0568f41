"""Hundreds of steps: memory stays, and nothing is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from rlfr_vlm.launch.processes import processes_with
from tests.runs import ROOT, make_config, make_data

WARM, SAVED = 50, 25  # steps
MOST_GROWTH, MOST_MORE = 0.02, 2
MOST_MIB = 20.0  # of growth, per training process


@dataclass(frozen=True)
class Held:
    """What all processes of a run hold at one moment."""

    resident: int = 0  # bytes, shared pages by share
    files: int = 0
    threads: int = 0
    shared: int = 0  # entries of /dev/shm with the number of one of them in the name

    @classmethod
    def now(cls, mark):
        """Of the processes with this mark; those that end meanwhile are left out."""
        pids = [pid for pid, _ in processes_with(mark)]
        total = cls(shared=len(in_shared_memory(pids)))
        for pid in pids:
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                size = next(
                    int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")
                )
                files, threads = (
                    len(os.listdir(f"/proc/{pid}/{folder}")) for folder in ("fd", "task")
                )
            except (OSError, StopIteration):
                continue
            total = replace(
                total,
                resident=total.resident + size,
                files=total.files + files,
                threads=total.threads + threads,
            )
        return total

    @classmethod
    def typical(cls, moments):
        """The median of each, whatever happened at one moment."""
        return cls(
            *(
                sorted(getattr(moment, field.name) for moment in moments)[len(moments) // 2]
                for field in fields(cls)
            )
        )


def left_over(folder, members):
    """What a run forgot: files in its temporary folder, and shared memory named after one of its
    processes.

    torchrun's folder of logs and torch's cache of compiled functions are meant to stay.
    """
    theirs = ("torchelastic_", "torchinductor_")
    return [
        str(p)
        for p in (*folder.iterdir(), *in_shared_memory(members))
        if not p.name.startswith(theirs)
    ]


def in_shared_memory(pids):
    """What is named after one of these processes."""
    return [
        path for path in Path("/dev/shm").iterdir() if any(str(pid) in path.name for pid in pids)
    ]


def steps_done(metrics):
    return (
        len(
            [line for line in metrics.read_text().splitlines() if "reward/mean" in json.loads(line)]
        )
        if metrics.exists()
        else 0
    )


@dataclass(frozen=True)
class Soaked:
    """What a run held when it was warm and when it ended, and every process of it."""

    warm: Held
    late: Held
    mark: str
    seen: set

    @property
    def growth(self):
        """Of resident memory, as a share."""
        return self.late.resident / self.warm.resident - 1

    @property
    def more(self):
        """Of what is counted."""
        return {
            name: getattr(self.late, name) - getattr(self.warm, name)
            for name in ("files", "threads", "shared")
        }


def soaked(config, folder, steps, launcher=(), overrides=()):
    """Run it to its end, looking at what it holds."""
    command = [*launcher, "-m", "rlfr_vlm.cli", "train", "--config", str(config), *overrides]
    (folder / "tmp").mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder / "tmp"),
    }
    name, value = (mark := f"RLFR_TEST_RUN={uuid.uuid4().hex}").split("=")
    environment[name] = value
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
    samples, seen = {}, set()
    try:
        while process.poll() is None:
            done = steps_done(folder / "run" / "metrics.jsonl")
            samples.setdefault(done, []).append(Held.now(mark))
            seen |= {pid for pid, _ in processes_with(mark)}
            time.sleep(0.2)
    finally:
        for pid, _ in processes_with(mark) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 0, (folder / "log").read_text()[-3000:]
    warm = Held.typical(
        [held for step in samples if WARM - 10 <= step <= WARM + 10 for held in samples[step]]
    )
    late = Held.typical(
        [held for step in samples if steps - 30 <= step < steps for held in samples[step]]
    )
    return Soaked(warm, late, mark, seen)


def quantile(values, share):
    return sorted(values)[int(share * (len(values) - 1))]


KINDS = ["one process", "two ranks, stage 3, vLLM"]
LENGTHS = [
    pytest.param(300, marks=pytest.mark.slow),
    pytest.param(500, marks=pytest.mark.reliability),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", LENGTHS)
def test_memory_stays_and_nothing_is_left(model_folder, tmp_path, kind, steps, figure):
    make_data(tmp_path)
    engine = "hf" if kind == "one process" else "vllm"
    config = make_config(
        tmp_path, model_folder("qwen2_5_vl"), rollout={"engine": engine, "num_prompts": 2, "group_size": 2, "max_new_tokens": 4},
        train={"steps": steps, "save_steps": SAVED, "log_rollouts": 1}, eval={"every": 50, "num_samples": 1, "limit": 2},
    )  # fmt: skip
    launcher, overrides = [], []
    if kind != "one process":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            port,
        ]
        overrides = ["deepspeed.zero_stage=3"]
    found = soaked(config, tmp_path, steps, launcher, overrides)
    mib = (found.late.resident - found.warm.resident) / 2**20
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    seconds = [row["timing_s/step"] for row in rows if "timing_s/step" in row]
    slower = [
        quantile(seconds[-100:], share) / quantile(seconds[:100], share) for share in (0.5, 0.95)
    ]
    told = (
        f"{kind}: {found.warm.resident / 2**20:.0f} MiB at step {WARM}, {found.growth:+.2%} "
        f"({mib:+.1f} MiB) at step {steps}; {found.more} more; the last 100 steps take "
        f"{slower[0]:.2f} (median) and {slower[1]:.2f} (p95) of the first 100"
    )
    print(told)
    assert found.growth < MOST_GROWTH and max(found.more.values()) <= MOST_MORE, told
    assert mib < MOST_MIB * (1 if kind == "one process" else 2), told
    assert slower[0] <= 1.15, told  # the p95 of a shared machine is its neighbours'
    assert not processes_with(found.mark)
    assert left_over(tmp_path / "tmp", found.seen) == []
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {f"global_step_{steps - SAVED}", f"global_step_{steps}", "latest", "best.json"} <= kept
    assert len(kept) <= 5  # and the best one
    figure("R17", told.replace("{", "").replace("}", "").replace("'", ""))
