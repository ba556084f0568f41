"""Expected step time against the number of nodes, from parts that were measured on one: the table
of docs/scaling.md.

    python scripts/throughput.py --samples 1024 --rollout 76.8 --update 137.6 --sync 1.0
    --parameters 135e6 --microbatches 65 --bandwidth 1.25

Every number but the bandwidth comes from one node's metrics.jsonl (timing_s/*) on the run's batch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

NODES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Parts:
    """What a step takes on one node."""

    samples: int  # of a step, whatever the number of nodes
    rollout: float  # seconds
    update: float  # seconds, flow included
    sync: float  # seconds, weights to this node's engine
    parameters: float  # that learn
    microbatches: int  # of a step on one node
    bandwidth: float  # GB/s between nodes

    def step_seconds(self, nodes: int, stage: int = 2) -> float:
        """Rollouts and updates are shared; every micro-batch's gradients (4 bytes) are reduced at
        stages 2 and 3, weights (2) gathered once at stage 2, and at stage 3 twice per micro-batch
        and once for the engines. Nothing overlaps: an upper bound.
        """
        most = -(-self.microbatches // nodes)
        away = (nodes - 1) / nodes
        gigabytes = 4 * self.parameters * away / 1e9
        weights = 2 * self.parameters * away / 1e9
        gathered = 1 if stage < 3 else 2 * most + 1
        reduced = most if stage > 1 else 1
        return (
            (self.rollout + self.update) / nodes
            + self.sync
            + (reduced * gigabytes + gathered * weights) / self.bandwidth
        )


def table(parts: Parts) -> str:
    """Markdown."""
    lines = [
        "| nodes | stage 1, s/step | samples/s | stage 2, s/step | samples/s | stage 3, s/step | "
        "samples/s |",
        "|" + "---|" * 7,
    ]
    for nodes in NODES:
        times = [parts.step_seconds(nodes, stage) for stage in (1, 2, 3)]
        lines.append(
            f"| {nodes} | " + " | ".join(f"{t:.1f} | {parts.samples / t:.1f}" for t in times) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind in (
        ("samples", int),
        ("rollout", float),
        ("update", float),
        ("sync", float),
        ("parameters", float),
    ):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--microbatches", type=int, required=True)
    parser.add_argument("--bandwidth", type=float, required=True, help="GB/s")
    print(table(Parts(**vars(parser.parse_args()))))
