"""The command line: every verb and what it can be told."""

from __future__ import annotations

import argparse
from typing import Any

Verbs = Any  # what argparse adds verbs to; its own class has no public name

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
    for add in (
        add_config_verbs,
        add_flow_files,
        add_plan,
        add_validate,
        add_export,
        add_report,
        add_bench,
        add_compare,
        add_doctor,
        add_demo,
    ):
        add(verbs)
    return parser


def add_config_verbs(verbs: Verbs) -> None:
    """Flow, train and eval, which take a config."""
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


def add_flow_files(verbs: Verbs) -> None:
    """Import-flow and export-flow."""
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


def add_plan(verbs: Verbs) -> None:
    """`plan`"""
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


def add_export(verbs: Verbs) -> None:
    """`export`"""
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


def add_report(verbs: Verbs) -> None:
    """`report`"""
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


def add_bench(verbs: Verbs) -> None:
    """`bench`"""
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


def add_compare(verbs: Verbs) -> None:
    """`compare`"""
    compare = verbs.add_parser(
        "compare", help="two evaluations on the same problems: difference, interval, p value, flips"
    )
    compare.add_argument(
        "a", metavar="A", help="output folder of eval, or a benchmark's folder in it"
    )
    compare.add_argument("b", metavar="B", help="the one to compare with it")
    compare.add_argument("--format", choices=("md", "csv", "latex"), default="md")
    compare.add_argument("--out", metavar="FILE", help="default: standard output")


def add_doctor(verbs: Verbs) -> None:
    """`doctor`"""
    doctor = verbs.add_parser(
        "doctor",
        help="versions, devices, which engines are there, what is missing and how to install it",
    )
    doctor.add_argument(
        "--deep",
        action="store_true",
        help="import each part to see whether it loads; takes about a minute",
    )


def add_demo(verbs: Verbs) -> None:
    """`demo`"""
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


def add_validate(verbs: Verbs) -> None:
    """`validate`."""
    verb = verbs.add_parser(
        "validate",
        help="look at every row of the data before a run depends on it: what training would "
        "refuse, and what is odd",
    )
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
