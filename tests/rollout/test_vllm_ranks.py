"""Two training ranks with an engine each, in one process group, which must not notice each other; a
model split over two processes.
"""

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

from rlfr_vlm.config import ModelConfig
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.rollout.probe import PROBE, probe_prompts
from rlfr_vlm.rollout.weights import _put_shares
from tests.rollout.test_weights import disturb, make_engine, unpacked_model

ROOT = Path(__file__).parents[2]


def tokens(groups) -> dict[str, list[tuple[int, ...]]]:
    return {group.prompt.prompt.id: [r.token_ids for r in group.rollouts] for group in groups}


def sockets() -> set[str]:
    """Addresses that this process listens on."""
    own = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{fd}")
    }
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


def rank_main(rank: int, size: int, folder: str, work: Path) -> dict[str, Any]:
    """What one rank does: its own prompts, in its own number of calls, before and after a sync."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(work / "store"), size), rank=rank, world_size=size
        )
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


def shares_main(rank: int, size: int, folder: str, work: Path) -> dict[str, Any]:
    """One worker of a tensor-parallel model: what it holds after each load, and what is said of a
    loader that writes nothing.
    """
    torch.set_num_threads(1)
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo",
        VLLM_DIST_IDENT=work.name,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_HOST_IP="127.0.0.1",
    )
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(work / "shares"), size), rank=rank, world_size=size
    )
    model = unpacked_model(folder, size, "external_launcher")
    policy = Policy(ModelConfig(path=folder, dtype="float32"))
    for seed in range(2):
        disturb(policy, seed)
        for bucket in policy.weight_buckets(1):
            assert _put_shares(model, bucket) == []
    (whole,) = policy.weight_buckets(2**40)
    layer, source = "language_model.model.layers.1.", "model.language_model.layers.1."
    columns = whole[f"{source}self_attn.o_proj.weight"].chunk(size, 1)[rank]
    rows = torch.cat(
        [whole[f"{source}mlp.{name}_proj.weight"].chunk(size)[rank] for name in ("gate", "up")]
    )
    assert torch.equal(model.get_parameter(f"{layer}self_attn.o_proj.weight"), columns)
    assert torch.equal(model.get_parameter(f"{layer}mlp.gate_up_proj.weight"), rows)
    model.get_parameter(f"{layer}mlp.down_proj.weight").weight_loader = lambda *_: None
    return {"stale": [str(mismatch) for mismatch in _put_shares(model, whole)]}


def run_together(
    what: str, runs: list[tuple[str, str]], folder: str, work: Path
) -> list[dict[str, Any]]:
    """What each (rank, size) returns; all of them run at once."""
    outputs = [work / f"{what}-{rank}-of-{size}.json" for rank, size in runs]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.rollout.test_vllm_ranks",
                what,
                rank,
                size,
                folder,
                str(work),
                str(output),
            ],
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
    return [json.loads(output.read_text()) for output in outputs]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux' socket tables")
def test_two_ranks_sample_what_one_process_would(model_folder, tmp_path):
    pytest.importorskip("vllm")
    alone, *ranks = run_together(
        "rank_main", [("0", "1"), ("0", "2"), ("1", "2")], model_folder("qwen2_5_vl"), tmp_path
    )
    for when in ("first", "second"):
        assert {**ranks[0][when], **ranks[1][when]} == alone[when]
        assert not ranks[0][when].keys() & ranks[1][when].keys()
    assert all(alone["first"][prompt] != alone["second"][prompt] for prompt in alone["first"])


@pytest.mark.slow
def test_workers_of_a_split_model_take_their_shares_of_every_bucket(model_folder, tmp_path):
    pytest.importorskip("vllm")
    for found in run_together(
        "shares_main", [("0", "2"), ("1", "2")], model_folder("qwen2_5_vl"), tmp_path
    ):
        (stale,) = found["stale"]
        assert (
            "`language_model.model.layers.1.mlp.down_proj.weight` differs" in stale
            and "by up to inf" in stale
        )


if __name__ == "__main__":
    main = {"rank_main": rank_main, "shares_main": shares_main}[sys.argv[1]]
    Path(sys.argv[6]).write_text(
        json.dumps(main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])))
    )
