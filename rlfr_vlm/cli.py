"""`rlfr-vlm VERB`: parses arguments and calls the command; no logic here."""

from __future__ import annotations

import argparse
import errno
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rlfr_vlm.config import Config, load_config, to_yaml
from rlfr_vlm.errors import DiskFullError, Preempted, UserError

CONFIG_VERBS = {
    "flow": "fit the flow field on expert solutions (data.expert)",
    "train": "RL with verifiable rewards and, where the config has a flow section, flow rewards",
    "eval": "held-out accuracy of model.path on data.eval",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rlfr-vlm", description="Post-train language and vision-language models with GRPO and flow rewards."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in CONFIG_VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--config", required=True, metavar="FILE", help="YAML file")
        verb.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
        verb.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that override the file's")
    report = verbs.add_parser("report", help="write report.html of a run")
    report.add_argument("run", help="the run's folder")
    bench = verbs.add_parser("bench", help="time the GRPO step on a fixed workload; one JSON line")
    bench.add_argument("--model", required=True, help="folder of a Hugging Face model")
    bench.add_argument("--task", choices=("text", "vision"), default="text")
    bench.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    bench.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    bench.add_argument("--steps", type=int, default=3, help="measured steps")
    bench.add_argument("--warmup", type=int, default=1, help="steps before")
    bench.add_argument("--prompts-per-step", type=int, default=8)
    bench.add_argument("--group-size", type=int, default=8)
    bench.add_argument("--max-new-tokens", type=int, default=64, help="forced length of every response")
    bench.add_argument("--tokens-per-microbatch", type=int, help="default: 2048 for text, 16384 for vision")
    bench.add_argument("--threads", type=int, default=2)
    bench.add_argument("--no-flow", action="store_true", help="plain GRPO: what the flow costs")
    verbs.add_parser("doctor", help="versions, devices, which engines work, what is missing and how to install it")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Carry out one verb. Returns the exit code."""
    if arguments.verb == "doctor":
        from rlfr_vlm.doctor import doctor

        return doctor()
    if arguments.verb == "report":
        from rlfr_vlm.report.html import write_report

        print(write_report(Path(arguments.run)))
        return 0
    if arguments.verb == "bench":
        from rlfr_vlm.bench import bench

        print(json.dumps(bench(arguments)))
        return 0
    cfg: Config = load_config(arguments.config, tuple(arguments.overrides))
    if arguments.dry_run:
        print(to_yaml(cfg), end="")
        return 0
    from rlfr_vlm import commands

    if arguments.verb == "flow":
        print(commands.flow(cfg))
    elif arguments.verb == "train":
        print(commands.train(cfg))
    else:
        print(json.dumps(asdict(commands.evaluate(cfg)), indent=1))
    return 0


def main(argv: list[str] | None = None) -> None:
    """Entry point: 0 done, 2 bad config or data, 3 stopped by a check, 4 no good checkpoint, 5 disk full, 75 saved on SIGTERM."""
    arguments = build_parser().parse_args(argv)
    try:
        sys.exit(run(arguments))
    except (UserError, Preempted) as error:
        print(f"rlfr-vlm {arguments.verb}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"rlfr-vlm {arguments.verb}: no space left on the disk: {error.filename}", file=sys.stderr)
        sys.exit(DiskFullError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
