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

from rlfr_vlm.config import Config, load_config, to_yaml
from rlfr_vlm.errors import DiskFullError, Preempted, UserError

CONFIG_VERBS = {
    "flow": "fit the flow field on expert solutions (data.expert)",
    "train": "RL with verifiable rewards and, where the config has a flow section, flow rewards",
    "eval": "accuracy of a model, a checkpoint or a server on benchmarks, or of model.path on "
    "data.eval",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="rlfr-vlm",
        description="Post-train language and vision-language models with GRPO and flow rewards.",
    )
    # deepspeed's launcher passes it; the environment says it too
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in CONFIG_VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("--config", required=name != "eval", metavar="FILE", help="YAML file")
        if name == "eval":
            add_eval_options(verb)
        verb.add_argument(
            "--dry-run",
            action="store_true",
            help="print the resolved config, and what would be run and written, and stop",
        )
        verb.add_argument(
            "overrides", nargs="*", metavar="a.b=c", help="settings that override the file's"
        )
    theirs = verbs.add_parser(
        "import-flow",
        help="read a published flow checkpoint (flow_model.bin) as a field for a model",
    )
    theirs.add_argument(
        "source",
        help="flow_model.bin, pytorch_model.bin of an offline fit (also sharded), or a folder that "
        "holds one",
    )
    theirs.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="folder or hub name of the backbone; only its config is read",
    )
    theirs.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder to write the field to, for flow.checkpoint",
    )
    theirs.add_argument(
        "--context",
        metavar="A+B",
        help="token_pre, token_post or identity; needed where no config beside it says so",
    )
    theirs.add_argument(
        "--shift",
        metavar="N+N",
        help="tokens between target and context; default: the config's, else 1",
    )
    theirs.add_argument(
        "--layers",
        metavar="P+P",
        help="hooked layers as fractions of depth; default: the config's, else 0.25+0.5+0.75",
    )
    theirs.add_argument(
        "--times", metavar="T+T", help="flow times of the reward; default: the config's, else 0.8"
    )
    ours = verbs.add_parser(
        "export-flow", help="write a field as the published code's flow_model.bin"
    )
    ours.add_argument("folder", help="the field's folder")
    ours.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="a .bin file, or the folder to put flow_model.bin in",
    )
    ours.add_argument(
        "--dtype",
        choices=("keep", "bfloat16"),
        default="keep",
        help="of the weights; keep: as stored",
    )
    plan = verbs.add_parser(
        "plan",
        help="predict memory, disk and time of `train` before anything starts, and what would make "
        "it fit",
    )
    plan.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    plan.add_argument("--format", choices=("text", "json"), default="text")
    plan.add_argument(
        "--device-memory",
        type=float,
        metavar="GIB",
        help="default: that of the GPU found, or main memory on CPU",
    )
    plan.add_argument(
        "--model-config", metavar="FILE", help="config.json of a model that is not at hand"
    )
    plan.add_argument(
        "--no-calibrate",
        action="store_true",
        help="time and measure nothing on this machine: loads no torch",
    )
    plan.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that override the file's"
    )
    add_validate_options(
        verbs.add_parser(
            "validate",
            help="look at every row of the data before a run depends on it: what training would "
            "refuse, and what is odd",
        )
    )
    export = verbs.add_parser(
        "export",
        help="write a checkpoint's model as a plain Hugging Face folder, checked by one forward",
    )
    export.add_argument(
        "source", help="a run's folder (its newest checkpoint), or checkpoints/global_step_N in it"
    )
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    export.add_argument(
        "--best",
        action="store_true",
        help="of a run: the checkpoint with the best evaluation instead of the newest",
    )
    export.add_argument(
        "--model",
        metavar="PATH",
        help="where the model that training started from lies now; default: as in the run",
    )
    report = verbs.add_parser(
        "report", help="write report.html of a run or an evaluation, or compare runs"
    )
    report.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="its folder; several: they are compared with the first",
    )
    report.add_argument(
        "--out",
        metavar="FILE",
        help="default: report.html in the run's folder; of a comparison ./comparison.html",
    )
    report.add_argument(
        "--serve",
        action="store_true",
        help="serve the page on 127.0.0.1 instead, and keep it up to date while the run writes",
    )
    report.add_argument("--port", type=int, metavar="N", help="of --serve; default: a free one")
    bench = verbs.add_parser("bench", help="time the GRPO step on a fixed workload; one JSON line")
    bench.add_argument("--model", required=True, help="folder of a Hugging Face model")
    bench.add_argument("--task", choices=("text", "vision"), default="text")
    bench.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    bench.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    bench.add_argument("--steps", type=int, default=3, help="measured steps")
    bench.add_argument("--warmup", type=int, default=1, help="steps before")
    bench.add_argument("--prompts-per-step", type=int, default=8)
    bench.add_argument("--group-size", type=int, default=8)
    bench.add_argument(
        "--max-new-tokens", type=int, default=64, help="forced length of every response"
    )
    bench.add_argument(
        "--tokens-per-microbatch", type=int, help="default: 2048 for text, 16384 for vision"
    )
    bench.add_argument("--threads", type=int, default=2)
    bench.add_argument("--no-flow", action="store_true", help="plain GRPO: what the flow costs")
    compare = verbs.add_parser(
        "compare", help="two evaluations on the same problems: difference, interval, p value, flips"
    )
    compare.add_argument(
        "a", metavar="A", help="output folder of eval, or a benchmark's folder in it"
    )
    compare.add_argument("b", metavar="B", help="the one to compare with it")
    compare.add_argument("--format", choices=("md", "csv", "latex"), default="md")
    compare.add_argument("--out", metavar="FILE", help="default: standard output")
    doctor = verbs.add_parser(
        "doctor",
        help="versions, devices, which engines are there, what is missing and how to install it",
    )
    doctor.add_argument(
        "--deep",
        action="store_true",
        help="import each part to see whether it loads; takes about a minute",
    )
    demo = verbs.add_parser(
        "demo",
        help="a small model learns, on a CPU in minutes: to read pictures of digits, or arithmetic",
        description="Data, flow field, held-out accuracy, RL with flow rewards, accuracy again and "
        "the page, all in ./runs. The last line printed is one JSON object.",
    )
    demo.add_argument(
        "task",
        nargs="?",
        choices=("vision", "text"),
        default="vision",
        help="vision (default): a Qwen2.5-VL of 0.9M parameters; text: SmolLM2-135M-Instruct",
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N")
    demo.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="settings that override the demo's"
    )
    return parser


def add_validate_options(verb: argparse.ArgumentParser) -> None:
    """What `validate` can be told."""
    verb.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of a run: data.train, data.eval and data.expert are looked at",
    )
    verb.add_argument(
        "--test",
        metavar="DATA",
        help="held-out rows, which the others must not overlap with (data.eval)",
    )
    verb.add_argument("--expert", metavar="DATA", help="rows with a response (data.expert)")
    verb.add_argument(
        "--model",
        metavar="PATH",
        help="folder or hub name; only its tokenizer and processor are read (model.path)",
    )
    verb.add_argument(
        "--no-model",
        action="store_true",
        help="count no tokens; without a config that is so unless --model is given",
    )
    verb.add_argument(
        "--out",
        metavar="DIR",
        help="where results go; default: output_dir/validate, or ./validate without a config",
    )
    verb.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default 2")
    verb.add_argument("--format", choices=("text", "json"), default="text")
    verb.add_argument(
        "--clean",
        action="store_true",
        help="write a copy of each data file without the quarantined rows",
    )
    verb.add_argument(
        "--quarantine",
        default="",
        metavar="KIND,KIND",
        help="warnings that count as errors, such as overlap_problem",
    )
    verb.add_argument(
        "data",
        nargs="*",
        metavar="DATA | a.b=c",
        help="a data file or hub name (data.train), and settings",
    )


def add_eval_options(verb: argparse.ArgumentParser) -> None:
    """What `eval` can be told without a config; each stands for a setting that could be overridden
    as well.
    """
    verb.add_argument("--model", metavar="PATH", help="folder or hub name (model.path)")
    verb.add_argument(
        "--benchmarks",
        nargs="+",
        metavar="NAME",
        help="names as math500, vlmeval/NAME, or YAML files (eval.benchmarks)",
    )
    verb.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder with the benchmarks' files; default: the hub (eval.data_dir)",
    )
    verb.add_argument(
        "--out", metavar="DIR", help="where results go; run again to go on (output_dir)"
    )
    verb.add_argument(
        "--limit", type=int, metavar="N", help="the first N problems of each (eval.limit)"
    )
    verb.add_argument("--engine", choices=("hf", "vllm"), help="rollout.engine")
    verb.add_argument(
        "--server",
        metavar="URL",
        help="evaluate this OpenAI-compatible server instead (eval.endpoint.api_base)",
    )
    verb.add_argument(
        "--judge",
        metavar="NAME",
        help="local, api, or qwen2.5-7b-local, or a YAML file (eval.judge)",
    )
    verb.add_argument(
        "--judge-model",
        metavar="PATH",
        help="model of the judge: a folder that `local` serves, or a name that the API knows",
    )


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
    from rlfr_vlm.evaluation.compare import compare, render

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
