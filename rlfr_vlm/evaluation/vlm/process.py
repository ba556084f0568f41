"""The process that VLMEvalKit runs in (see `vlm`), and the only place where it is imported. One
JSON line in, one out.

What is different here from VLMEvalKit as it is installed (`vlm_guards`):

- no text is ever executed: its `eval` reads literals and arithmetic, sympy's only numbers, its
    `exec` is refused;
- its judge is a stand-in that asks through our endpoint (retries, circuit breaker, the key in no
    log and no file, no proxy on loopback, none of
  its environment variables) and keeps every reply on disk. A row whose judge did not answer is
  taken out and reported as `failed`; it is
  never scored as wrong, and no random option is drawn for it. Without a judge, rows that need one
  are `unjudged`;
- MathVista's free-form text and list answers can be right, and an empty DynaMath answer cannot;
- predictions are neither cut at a spreadsheet's limit nor read as missing values;
- a TSV of the user's is taken as it is; one that VLMEvalKit downloads is checked against its MD5,
    and comes over a verified connection.
"""

from __future__ import annotations

import builtins
import csv
import functools
import json
import os
import shutil
import ssl
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlfr_vlm.config import JudgeConfig
from rlfr_vlm.evaluation.server.endpoint import Endpoint
from rlfr_vlm.evaluation.vlm.guards import (
    Judging,
    Lost,
    NoDice,
    StandIn,
    arithmetic,
    bounded_equal,
    guarded,
    refuse,
    with_an_answer,
    with_text_answers,
)

PASSES = 3  # times that a row is tried whose judge did not answer
MAX_PASSES = 50
DATA_ROOT = "LMUData"  # environment variable
KEY = "RLFR_VLM_JUDGE_KEY"  # the judge's key here, out of reach of VLMEvalKit's own clients
HEADLINES = {
    "WeMath": "Score (Strict)",
    "DynaMath": "Worst Case|Overall",
    "MMMU_DEV_VAL": "split=validation|Overall",
}  # ends of names
VERDICTS = ("hit", "score", "correct", "match")  # columns of its result tables
EXTRACTS, LOGS = ("extracted", "extract", "res", "opt"), ("log", "log_score")
MAX_LOG = 2000  # characters


def install_guards() -> None:
    """Import VLMEvalKit and put ours in the place of what is not safe or not right in it."""
    from vlmeval.dataset import dynamath
    from vlmeval.dataset.utils import mathv, mathvista

    ssl._create_default_https_context = ssl.create_default_context
    builtins.eval, builtins.exec = guarded(eval, arithmetic), guarded(exec, refuse)  # type: ignore[assignment]
    mathv.is_equal = bounded_equal(mathv.is_equal)
    mathvista.post_check = with_text_answers(mathvista.post_check)
    dynamath.DynaMath_auxeval = with_an_answer(dynamath.DynaMath_auxeval)


def install_judge(judging: Judging) -> None:
    """Whatever module of VLMEvalKit asks for a judge gets ours."""
    import vlmeval.api
    from vlmeval.dataset.utils import multiple_choice

    stand_in = functools.partial(StandIn, judging)
    for name, module in list(sys.modules.items()):
        if name.startswith("vlmeval.") and hasattr(module, "build_judge"):
            module.build_judge = stand_in  # type: ignore[attr-defined]
    vlmeval.api.OpenAIWrapper = stand_in
    multiple_choice.rd = NoDice(judging)


@functools.cache
def build(name: str, root: str) -> Any:
    """The data set of a data folder. A TSV that is a link is the user's own, any other is (or will
    be) a download. Raises ValueError.
    """
    import vlmeval.dataset as kit

    os.environ[DATA_ROOT] = root
    own = (Path(root) / f"{name}.tsv").is_symlink()
    for known in kit.DATASET_CLASSES:
        if own and name in getattr(known, "DATASET_MD5", {}):
            known.DATASET_MD5[name] = None
    if not own and name not in kit.SUPPORTED_DATASETS:
        raise ValueError("unknown; put its TSV under eval.data_dir")
    dataset = kit.build_dataset(name)
    if (
        dataset is None
        or getattr(dataset, "MODALITY", "") != "IMAGE"
        or getattr(dataset, "TYPE", "") == "MT"
    ):
        raise ValueError("not a data set of single questions on pictures")
    return dataset


def load(order: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row with VLMEvalKit's prompt, its pictures unpacked."""
    import filelock

    with filelock.FileLock(Path(order["root"]) / ".lock"):
        dataset, rows = build(order["name"], order["root"]), []
        for position in range(len(dataset.data)):
            line = dataset.data.iloc[position]
            parts = [
                {"type": p["type"], "value": str(p["value"])} for p in dataset.build_prompt(line)
            ]
            if odd := {p["type"] for p in parts} - {"text", "image"}:
                raise ValueError(f"its prompts have {', '.join(sorted(odd))}")
            source = next(
                (str(line[c]) for c in ("task", "category", "skill", "subject") if c in line),
                order["name"],
            )
            answer = str(line["answer"]) if "answer" in line else ""
            rows.append(
                {"id": str(line["index"]), "parts": parts, "answer": answer, "source": source}
            )
    return rows


def score(order: dict[str, Any]) -> dict[str, Any]:
    """VLMEvalKit's verdict on every prediction, and its table over those that it could judge; its
    files go into the order's folder.
    """
    folder, endpoint = Path(order["folder"]), None
    folder.mkdir(parents=True, exist_ok=True)
    if order["judge"] is not None:
        os.environ.pop(order["judge"]["key_env"], None)
        os.environ[KEY] = order["key"]
        endpoint = Endpoint(JudgeConfig(**{**order["judge"], "key_env": KEY}))
    left: dict[str, str] = dict(order["predictions"])
    lost: dict[str, str] = {}
    judging = Judging(endpoint, folder / "judge.jsonl", left)
    install_judge(judging)
    threads = 1 if endpoint is None else endpoint.cfg.concurrency
    rows: dict[str, Any] = {}
    table, error = None, "no predictions"
    for turn in range(1, MAX_PASSES + 1):
        if not left:
            break
        judging.begin()
        rows, table, error = one_pass(order, left, judging, threads)
        if not judging.lost:
            break
        if "" in judging.lost:
            rows, table, error = (
                {},
                None,
                f"a judge call failed, for which row is not known: {judging.lost['']}",
            )
            break
        if endpoint is None or endpoint.down or turn >= PASSES:
            lost |= judging.lost
            left = {name: text for name, text in left.items() if name not in lost}
        rows, table, error = {}, None, f"verdicts were still missing after {turn} passes"
    return {
        "rows": {
            name: verdict(name, rows.get(name), lost, error, judging)
            for name in order["predictions"]
        },
        "scored": len(left) if table is not None else 0,
        "score": {**headline(order, table), "table": records(table), "error": error},
    }


def verdict(
    name: str, row: dict[str, Any] | None, lost: Mapping[str, str], error: str, judging: Judging
) -> dict[str, Any]:
    """What became of a prediction."""
    said = [text for _, text in judging.said.get(name, ())]
    found: dict[str, Any] = {
        "prediction": "",
        "reason": "",
        "asked": bool(said) or (name in lost and judging.endpoint is not None),
    }
    if name in lost:
        found |= {
            "verdict": "unjudged" if judging.endpoint is None else "failed",
            "reason": lost[name],
        }
    elif row is None or row["correct"] is None:
        found |= {
            "verdict": "failed" if error else "unjudged",
            "reason": error or "VLMEvalKit gives no verdict on single rows of this set",
        }
    else:
        found |= {
            "verdict": "correct" if row["correct"] else "wrong",
            "prediction": row["prediction"],
        }
    return found | {"reply": "\n".join(said)[-MAX_LOG:]}


def one_pass(
    order: dict[str, Any], left: Mapping[str, str], judging: Judging, threads: int
) -> tuple[dict[str, Any], Any, str]:
    """Its `evaluate` in a fresh folder: (row by id, table, error). Rows that the judge left without
    a word are in `judging.lost`.
    """
    dataset, name = build(order["name"], order["root"]), order["name"]
    work = Path(tempfile.mkdtemp(prefix="vlmeval-"))
    os.chdir(work)
    os.environ[DATA_ROOT] = order["root"]
    try:
        table = dataset.data[[c for c in dataset.data if c != "image"]]
        table = table[[str(i) in left for i in table["index"]]].copy()
        table["prediction"] = [readable(left[str(i)]) for i in table["index"]]
        own = f"model_{name}.tsv"
        table.to_csv(own, sep="\t", index=False, encoding="utf-8", quoting=csv.QUOTE_ALL)
        result, error = None, ""
        try:
            result = dataset.evaluate(own, model="judge", nproc=threads)
        except Lost:
            return {}, None, ""
        # anything may happen in a hundred scoring functions: no score, and the reason
        except Exception as failure:
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
        rows = read_verdicts(name, work, own)
        for row, found in rows.items():
            if "All 5 retries failed" in found["log"] or found["unparsed"]:
                judging.lose(row, "the judge's reply could not be read")
        if not judging.lost:
            for path in work.iterdir():
                if path.suffix in (".tsv", ".csv", ".json"):
                    shutil.copy(path, Path(order["folder"]) / path.name)
        return rows, result, error
    finally:
        os.chdir("/")
        shutil.rmtree(work, ignore_errors=True)


def readable(text: str) -> str:
    """A prediction that pandas reads back as the same text, a space apart."""
    from pandas._libs.parsers import STR_NA_VALUES

    text = text.replace("\0", "").encode("utf-8", "replace").decode()
    return f" {text}" if text.strip() in STR_NA_VALUES else text


def read_verdicts(name: str, work: Path, own: str) -> dict[str, dict[str, Any]]:
    """Row by id from the newest result table that has verdicts: whether correct (None: not told),
    the answer as extracted, the log.
    """
    import pandas as pd
    from vlmeval.dataset.utils import mathv, mathvista, multiple_choice, visulogic
    from vlmeval.utils import can_infer

    if name == "VisuLogic":
        data = pd.read_csv(work / own, sep="\t")
        found = [visulogic.extract_answer(text)[0] for text in data["prediction"]]
        read = zip(data["index"], found, data["answer"], strict=True)
        return {
            str(i): {
                "correct": a == gold,
                "prediction": a.replace("Z", ""),
                "log": "",
                "unparsed": False,
            }
            for i, a, gold in read
        }
    check = {"MathVista": mathvista.post_check, "MathVision": mathv.post_check}.get(
        name.partition("_")[0]
    )
    for path in sorted(work.glob("*.tsv"), key=lambda p: p.stat().st_mtime, reverse=True):
        data = pd.read_csv(path, sep="\t")
        column = next((c for c in VERDICTS if c in data), None)
        if (
            path.name == own
            or "index" not in data
            or (column is None and (check is None or "res" not in data))
        ):
            continue
        rows = {}
        for _, line in data.iterrows():
            value = check(line) if check else line[column]
            extract = next((line[c] for c in EXTRACTS if c in line), "")
            log = str(next((line[c] for c in LOGS if c in line), ""))
            if log.startswith("Match Log: "):  # multiple choice: what the option was read from
                extract = (
                    can_infer(
                        log.removeprefix("Match Log: ").strip(), multiple_choice.build_choices(line)
                    )
                    or ""
                )
            rows[str(line["index"])] = {
                "correct": bool(value) if value in (0, 1) else None,
                "prediction": "" if pd.isna(extract) else str(extract),
                "log": log,
                "unparsed": "parse" in line and not line["parse"],
            }
        return rows
    return {}


def records(table: Any) -> Any:
    """A score table as JSON."""
    import pandas as pd

    return json.loads(
        table.to_json(orient="records")
        if isinstance(table, pd.DataFrame)
        else json.dumps(table, default=str)
    )


def headline(order: dict[str, Any], table: Any) -> dict[str, Any]:
    """The number of a table that is reported, in the unit of the table, and what it is called
    there.
    """
    from vlmeval.smp.status_report import flatten_summary_metrics

    if table is None:
        return {"metric": None, "value": None}
    wanted = HEADLINES.get(order["name"], "")
    if wanted in getattr(table, "columns", ()):
        return {"metric": wanted, "value": float(str(table[wanted].iloc[0]).rstrip("%"))}
    flat = flatten_summary_metrics(table)
    key = next((k for k in flat if wanted and k.endswith(wanted)), None)
    named = (
        {key: flat[key]} if key else build(order["name"], order["root"]).report_primary_metric(flat)
    )
    metric, value = next(iter(named.items()), (None, None))
    return {"metric": metric, "value": value}


def main() -> None:
    """Carry out the commands that stand on the lines of stdin, and answer each with a line."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # VLMEvalKit prints
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    install_guards()
    for line in sys.stdin:
        order = json.loads(line)
        try:
            reply = {"result": {"load": load, "score": score}[order["command"]](order)}
        except Exception as error:  # reported to whoever asked
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
