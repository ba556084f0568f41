"""Two training ranks with an engine each, in one process group: the engines must not notice each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlfr_vlm.rollout.probe import PROBE, probe_prompts
from tests.rollout.test_weights import disturb, make_engine

ROOT = Path(__file__).parents[2]


def tokens(groups) -> dict[str, list[tuple[int, ...]]]:
    return {group.prompt.prompt.id: [r.token_ids for r in group.rollouts] for group in groups}


def sockets() -> set[str]:
    """Addresses that this process listens on."""
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")}
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


def rank_main(rank: int, size: int, folder: str, work: Path) -> dict[str, Any]:
    """What one rank does: its own prompts, in its own number of calls, before and after a sync."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", store=dist.FileStore(str(work / "store"), size), rank=rank, world_size=size)
    before = sockets(), {thread.name for thread in threading.enumerate()}
    engine = make_engine(folder, "float32")
    assert all(address.startswith("0100007F") for address in sockets())
    prompts = probe_prompts(engine.cfg, engine.policy)
    own = prompts if size == 1 else (prompts[:1], prompts[1:])[rank]
    found = {"first": tokens(engine.sample(own, PROBE))}
    for _ in range(3 * rank):
        engine.sample(own[:1], PROBE)
    disturb(engine.policy, 5)
    engine.load_weights(engine.policy)
    if rank == 0:  # while the other one does something else
        engine.sample(own, PROBE)
    found["second"] = tokens(engine.sample(own, PROBE))
    engine.close()
    assert dist.is_initialized() == (size > 1)
    if size > 1:
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        assert total.item() == 3.0
        assert sockets() == before[0]
        assert {thread.name for thread in threading.enumerate()} - before[1] <= {"tqdm_monitor"}
        dist.destroy_process_group()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux' socket tables")
def test_two_ranks_sample_what_one_process_would(model_folder, tmp_path):
    pytest.importorskip("vllm")
    folder = model_folder("qwen2_5_vl")
    runs = [("0", "1"), ("0", "2"), ("1", "2")]
    outputs = [tmp_path / f"{rank}-of-{size}.json" for rank, size in runs]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rollout.test_vllm_ranks", rank, size, folder, str(tmp_path), str(output)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for (rank, size), output in zip(runs, outputs, strict=True)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    alone, *ranks = [json.loads(output.read_text()) for output in outputs]
    for when in ("first", "second"):
        assert {**ranks[0][when], **ranks[1][when]} == alone[when]
        assert not ranks[0][when].keys() & ranks[1][when].keys()
    assert all(alone["first"][prompt] != alone["second"][prompt] for prompt in alone["first"])


if __name__ == "__main__":
    Path(sys.argv[5]).write_text(json.dumps(rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))))
