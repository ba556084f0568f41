"""The command line in processes that can be killed, what such runs leave, and what two runs must
have in common.
"""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from rlfr_vlm.launch.processes import processes_with
from rlfr_vlm.storage.checkpoint import PREFIX, list_checkpoints
from tests.runs import ROOT, make_config, make_data, make_text_data

STEPS, SAVE_STEPS = 12, 3
END_SECONDS = 5.0  # for what a killed process started to be gone
NOISY_REWARD = """
import random

def reward(prompts, completions, **columns):  # draws from a generator that only the checkpoint can bring back
    return [random.random() for _ in completions]
"""


def prepared(folder, model_folder, kind, **sections):
    """The config of a small run (text, vision, or `two ranks...` with text), and how it is started."""
    folder.mkdir(exist_ok=True)
    (make_data if kind == "vision" else make_text_data)(folder)
    (folder / "noisy.py").write_text(NOISY_REWARD)
    sections = {
        "reward": {"function": f"{folder / 'noisy.py'}:reward"},
        "train": {"steps": STEPS, "save_steps": SAVE_STEPS},
        "eval": {"every": SAVE_STEPS, "num_samples": 1, "limit": 2},
        **sections,
    }
    config = make_config(
        folder, model_folder("qwen2_5_vl" if kind == "vision" else "qwen2"), **sections
    )
    two = kind.startswith("two ranks")
    return (
        config,
        ["model.dtype=bfloat16", "deepspeed.zero_stage=2"] if two else [],
        2 if two else 1,
    )


class Started:
    """`rlfr-vlm train` in a session of its own, on one or several ranks. Its temporary folder marks
    every process that comes of it.
    """

    def __init__(self, config, out, *overrides, ranks=1, fault=None, forks=None):
        """forks: start it as one of these."""
        self.out, self.temporary = Path(out), tempfile.mkdtemp(prefix="rlfr")
        self.log = Path(self.temporary) / "log"
        self.log.touch()
        added = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": self.temporary} | (
            {"RLFR_FAULT": fault} if fault else {}
        )
        arguments = ["train", "--config", str(config), f"output_dir={out}", *overrides]
        if forks is not None and ranks == 1:
            self.process = forks.start(arguments, added, self.log)
            return
        command = ["-m", "rlfr_vlm.cli", *arguments]
        if ranks > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = str(free.getsockname()[1])
            launcher = [
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(ranks),
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                port,
            ]
            command = [*launcher, *command]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env={k: v for k, v in os.environ.items() if k != "RLFR_FAULT"} | added,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=self.log.open("w"),
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        for pid, _ in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def text(self):
        return self.log.read_text()

    def left(self):
        """Every process of it that is still there."""
        return [
            (pid, since)
            for pid, since in processes_with(f"TMPDIR={self.temporary}")
            if since is not None
        ]

    def end(self, timeout=300.0):
        """Its exit code."""
        return self.process.wait(timeout)

    def wait_for(self, path, timeout=300.0):
        """Until this file is there and not empty, or the process has ended; whether it is there."""
        deadline = time.monotonic() + timeout
        while (
            not (found := path.exists() and path.stat().st_size > 0) and self.process.poll() is None
        ):
            assert time.monotonic() < deadline, f"no {path} in:\n{self.text[-3000:]}"
            time.sleep(0.01)
        return found

    def orphans(self):
        """What is still there END_SECONDS after its end."""
        deadline = time.monotonic() + END_SECONDS
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            for pid, _ in left
        ]


def finished(config, out, *overrides, ranks=1, forks=None):
    """The same command to its end."""
    with Started(config, out, *overrides, ranks=ranks, forks=forks) as run:
        assert run.end() == 0, run.text[-3000:]


def sums(run, step):
    """sha256 of everything that a run's checkpoint and its exported model hold; of the description,
    what is not about the folder.
    """
    folder = run / "checkpoints" / f"{PREFIX}{step}"
    found = {
        str(p.relative_to(run)): p
        for base in (folder, run / "hf" / f"{PREFIX}{step}")
        for p in base.rglob("*")
        if p.is_file()
    }
    described = json.loads((folder / "state.json").read_text())
    kept = {
        name: described[name]
        for name in ("step", "policy_version", "data_position", "updates", "ranks", "data")
    }
    skipped = ("state.json", "manifest.json")
    return {
        name: hashlib.sha256(p.read_bytes()).hexdigest()
        for name, p in found.items()
        if p.name not in skipped
    } | {"state": kept}


def ledger(run):
    """Per step, every reward figure, every response's reward, and how held-out problems went."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [
        {k: v for k, v in row.items() if k == "step" or k.startswith(("reward/", "val/"))}
        for row in metrics
    ]
    rewards = []
    for path in sorted((run / "rollouts").glob("step_*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            rewards.append(
                (row["step"], row["prompt_id"], row["sample_index"], row["tokens"], row["reward"])
            )
    return figures, rewards


def newest_step(run):
    """Of the checkpoints; 0 where there is none."""
    found = list_checkpoints(run / "checkpoints")
    return int(found[-1].name.removeprefix(PREFIX)) if found else 0


def steps_done(run):
    """The last step whose figures are on record."""
    path = run / "metrics.jsonl"
    steps = [0]
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            steps.append(json.loads(line)["step"])
    return max(steps)
