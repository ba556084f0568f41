"""`rlfr-vlm VERB`: parses arguments and calls the command; no logic here."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlfr_vlm.arguments import build_parser
from rlfr_vlm.config import Config, load_config, to_yaml
from rlfr_vlm.errors import DiskFullError, Preempted, UserError


def eval_overrides(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The options of `eval` as overrides of the config; those given as `a.b=c` win."""
    given: dict[str, Any] = {
        "model.path": arguments.model,
        "eval.benchmarks": arguments.benchmarks,
        "eval.data_dir": arguments.data_dir,
        "output_dir": arguments.out,
        "eval.limit": arguments.limit,
        "rollout.engine": arguments.engine,
    }
    if arguments.server is not None:
        given["eval.endpoint"] = {"api_base": arguments.server, "model": arguments.model}
    if arguments.judge is not None:
        from rlfr_vlm.evaluation.server.judge import load_judge

        judge = load_judge(arguments.judge).model_dump(mode="json")
        if arguments.judge_model is not None:
            judge[
                "serve" if judge["serve"] is not None or arguments.judge == "local" else "model"
            ] = arguments.judge_model
        given |= {"eval.judge": judge, "eval.grading": "rule_then_judge"}
    elif arguments.judge_model is not None:
        raise UserError("--judge-model needs --judge: local serves it, api asks for it by name")
    if arguments.config is None and arguments.model is not None and arguments.server is None:
        from rlfr_vlm.evaluation.parity import training_settings

        given = {**training_settings(arguments.model), **given}
    return (
        *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None),
        *arguments.overrides,
    )


def run(arguments: argparse.Namespace) -> int:
    """Carry out one verb. Returns the exit code."""
    if arguments.verb == "doctor":
        from rlfr_vlm.doctor import doctor

        return doctor(arguments.deep)
    if arguments.verb == "demo":
        from rlfr_vlm.demo.verb import demo

        demo(arguments.task, arguments.seed, arguments.overrides)
        return 0
    if arguments.verb == "report":
        return run_report(arguments)
    if arguments.verb == "compare":
        return run_compare(arguments)
    if arguments.verb == "bench":
        from rlfr_vlm.bench import bench

        print(json.dumps(bench(arguments)))
        return 0
    if arguments.verb == "export":
        from rlfr_vlm.storage.export import export_checkpoint

        checkpoint = export_checkpoint(
            Path(arguments.source), Path(arguments.out), arguments.best, arguments.model
        )
        print(f"{arguments.out} from {checkpoint}")
        return 0
    if arguments.verb in ("import-flow", "export-flow"):
        return run_flow_files(arguments)
    if arguments.verb == "plan":
        return run_plan(arguments)
    if arguments.verb == "validate":
        return run_validate(arguments)
    overrides = (
        eval_overrides(arguments) if arguments.verb == "eval" else tuple(arguments.overrides)
    )
    cfg: Config = load_config(arguments.config, overrides)
    if arguments.dry_run:
        from rlfr_vlm.planning.schedule import schedule

        print(to_yaml(cfg) + schedule(arguments.verb, cfg), end="")
        return 0
    from rlfr_vlm import commands
    from rlfr_vlm.ranks import alone, launched

    if arguments.verb == "train":
        folder = commands.train(cfg)  # which hears SIGTERM itself while there are steps to save
        if launched().rank == 0:
            print(folder)
        return 0
    alone(arguments.verb)
    if arguments.verb == "flow":
        print(commands.flow(cfg))
    elif cfg.eval.benchmarks:
        print(json.dumps(commands.evaluate_benchmarks(cfg), indent=1))
    else:
        print(json.dumps(asdict(commands.evaluate(cfg)), indent=1))
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    """Carry out report. Returns the exit code."""
    from rlfr_vlm.report.comparison_page import write_comparison
    from rlfr_vlm.report.html import write_report
    from rlfr_vlm.report.serve import serve

    folders = [Path(run) for run in arguments.runs]
    if arguments.serve:
        if arguments.out is not None:
            raise UserError("--out writes a file, --serve writes none: leave one of them out")
        return serve(folders, arguments.port or 0, lambda text: print(text, flush=True))
    if arguments.port is not None:
        raise UserError("--port is the port of --serve, which is not given")
    if len(folders) == 1:
        print(write_report(folders[0], None if arguments.out is None else Path(arguments.out)))
    else:
        print(write_comparison(folders, Path(arguments.out or "comparison.html")))
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """Carry out compare. Returns the exit code."""
    from rlfr_vlm.evaluation.compare import compare
    from rlfr_vlm.evaluation.comparison_text import render

    text = render(compare(Path(arguments.a), Path(arguments.b)), arguments.format)
    if arguments.out is None:
        print(text, end="")
        return 0
    if not Path(arguments.out).parent.is_dir():
        raise UserError(f"--out {arguments.out}: there is no folder {Path(arguments.out).parent}")
    Path(arguments.out).write_text(text)
    print(arguments.out)
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    """Carry out plan. Returns 0 where the run fits, 2 where it does not."""
    from rlfr_vlm.planning.plan import as_json, as_text, plan

    given = tuple(arguments.overrides)
    found = plan(
        lambda more: load_config(arguments.config, (*given, *more)),
        arguments.device_memory,
        arguments.model_config,
        not arguments.no_calibrate,
    )
    print(as_json(found) if arguments.format == "json" else as_text(found), end="")
    return 0 if found.fits else 2


def run_validate(arguments: argparse.Namespace) -> int:
    """Carry out validate. Returns 0, or 2 where there are bad rows."""
    files = [text for text in arguments.data if "=" not in text or Path(text).exists()]
    if len(files) > 1:
        raise UserError(
            f"one data file at a time, not {' and '.join(files)}; the held-out rows go with "
            "--test, an expert's with --expert"
        )
    if arguments.workers < 1:
        raise UserError(f"--workers={arguments.workers} must be at least 1")
    given = {
        "data.train": files[0] if files else None,
        "data.eval": arguments.test,
        "data.expert": arguments.expert,
    }
    given["model.path"] = arguments.model
    if arguments.config is None:  # a quick look: nothing depends on the size of a step
        given |= {
            "output_dir": ".",
            "rollout.num_prompts": "1",
            "model.path": arguments.model or "none",
        }
    settings = tuple(f"{key}={value}" for key, value in given.items() if value is not None)
    cfg = load_config(
        arguments.config, (*settings, *(text for text in arguments.data if text not in files))
    )
    from rlfr_vlm.preflight.verb import Options, validate

    return validate(
        cfg,
        Options(
            folder=Path(arguments.out or Path(cfg.output_dir) / "validate"),
            workers=arguments.workers,
            count_tokens=not arguments.no_model
            and (arguments.config is not None or arguments.model is not None),
            clean=arguments.clean,
            quarantine=tuple(filter(None, arguments.quarantine.split(","))),
            as_json=arguments.format == "json",
        ),
    )


def run_flow_files(arguments: argparse.Namespace) -> int:
    """Carry out import-flow or export-flow. Returns the exit code."""
    import torch

    from rlfr_vlm import commands

    if arguments.verb == "import-flow":
        given = {name: getattr(arguments, name) for name in ("context", "shift", "layers", "times")}
        print(commands.import_flow(arguments.source, arguments.model, arguments.out, given))
    else:
        print(
            commands.export_flow(
                arguments.folder,
                arguments.out,
                torch.bfloat16 if arguments.dtype == "bfloat16" else None,
            )
        )
    return 0


def main(argv: list[str] | None = None) -> None:
    """Entry point: 0 done, 2 bad config or data, 3 stopped by a check, 4 no good checkpoint, 5 disk
    full, 75 saved on SIGTERM.

    argv: None for this process's own arguments, whose signals and end are then its business too.
    """
    arguments = build_parser().parse_args(argv)
    if argv is not None or arguments.verb != "train":
        sys.exit(exit_code(arguments))
    signal.signal(signal.SIGTERM, _leave)
    try:
        code = exit_code(arguments)
    except _Leaving:
        code = Preempted.exit_code
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is settled
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from rlfr_vlm.ranks import end_rank

        end_rank(code)
    sys.exit(code)


def exit_code(arguments: argparse.Namespace) -> int:
    """Carry out one verb, and say in one line what went wrong."""
    try:
        return run(arguments)
    except (UserError, Preempted) as error:
        print(f"rlfr-vlm {arguments.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"rlfr-vlm {arguments.verb}: no space left on the disk: {error.filename}",
            file=sys.stderr,
        )
        return DiskFullError.exit_code
    except KeyboardInterrupt:
        return 130


class _Leaving(BaseException):
    """SIGTERM while a run starts or ends."""


def _leave(*_: object) -> None:
    """A handler of SIGTERM: there is nothing to save that is not saved. Asked twice, at once."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(Preempted.exit_code))
    os.write(2, b"rlfr-vlm train: stopped on SIGTERM; run the same command to go on\n")
    raise _Leaving


if __name__ == "__main__":
    main()
