"""The page of an evaluation: problems in an index, responses compressed in chunks, pictures once,
and no more than the page's size allows.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from rlfr_vlm.evaluation.statistics import Estimate
from rlfr_vlm.report.evaluation import (
    STEP,
    BenchmarkFiles,
    EvaluatedProblem,
    EvaluatedResponse,
    flat,
    headline,
    model_names,
    read_benchmark,
)
from rlfr_vlm.report.pictures import PictureData, load_picture
from rlfr_vlm.report.reading import FileNote, as_number, as_text
from rlfr_vlm.report.scripts import joined
from rlfr_vlm.report.template import (
    asset,
    compress,
    json_block,
    json_text,
    page,
    shown,
    text_block,
    write_page,
)

TEXT_BYTES = 16_000_000  # of responses as the page carries them
PICTURE_BYTES = 16_000_000  # of pictures
PICTURE_RANGE = (9_000, 150_000)  # bytes that one picture may take, fewer the more there are
BATCH = 64  # problems whose pictures are read together
PICTURE_SIDE = 1280  # pixels, of pictures made smaller
CUTS = (
    10**9,
    40_000,
    20_000,
    10_000,
    5_000,
    2_000,
    800,
)  # characters of a response, tried in turn until TEXT_BYTES are enough
CHUNK = 200_000  # characters that are unpacked together
MAX_NOTES = 50  # shown one by one
TELLING = (
    "accuracy",
    "accuracy_ci",
    "verdicts",
    "protocol",
    "benchmark",
    "title",
    "num_problems",
    "num_samples",
    "truncated",
    "mean_length",
)
IN_INDEX = ("verdict", "reply", "attempts", "model")  # of a judge's record


class BenchmarkData(TypedDict):
    """A benchmark's numbers and protocol."""

    name: str
    title: str
    folder: str
    hash: str
    protocol: list[tuple[str, str]]
    summary: list[tuple[str, str]]
    accuracy: Estimate | None
    provisional: bool
    withheld: bool
    counts: dict[str, int]  # by verdict
    truncated: int
    meanLength: float | None
    agreement: tuple[int, int]  # of rule and judge: the same, both decided
    numProblems: int
    numSamples: int
    passAt: tuple[int, float | None] | None
    majority: float | None
    greedy: float | None
    judge: str


class EvaluationData(TypedDict):
    """The page of an evaluation."""

    name: str
    model: str
    writtenAt: str
    benchmarks: list[BenchmarkData]
    problems: list[FileNote]
    numMoreProblems: int
    numChunks: int


class JudgeData(TypedDict):
    """What a judge said of a response."""

    verdict: str
    model: str
    attempts: float | None
    seconds: float | None


class SampleData(TypedDict):
    """A response without its text; what is empty is left out."""

    index: int
    verdict: str
    prediction: NotRequired[str]
    reason: NotRequired[str]
    rule: NotRequired[str]
    finish: NotRequired[str]
    promptTokens: NotRequired[int]
    tokens: NotRequired[int]
    seconds: NotRequired[float]
    judge: NotRequired[JudgeData]


class ProblemData(TypedDict):
    """A problem and its samples."""

    benchmark: int
    id: str
    question: str
    golds: tuple[str, ...]
    source: str
    images: list[PictureData]
    chunk: int  # that holds the texts of its samples
    at: int  # place in there
    samples: list[SampleData]


class SampleTexts(TypedDict):
    """The texts of a sample; what is empty is left out."""

    response: NotRequired[list[str]]  # its beginning and its end, where its middle is left out
    left: NotRequired[int]  # characters left out
    reply: NotRequired[str]  # of the judge
    judge: NotRequired[list[tuple[str, str]]]  # its settings


def write_evaluation(
    base: Path, folders: Sequence[Path], path: Path
) -> tuple[Path, list[BenchmarkData]]:
    """Write the page of these benchmark folders below `base`. Returns it and the benchmarks'
    headline numbers.
    """
    notes: list[FileNote] = []
    benchmarks = [read_benchmark(folder, base, notes) for folder in folders]
    pictures = _ProblemPictures(base, benchmarks, notes)
    chunks, places = _responses(benchmarks, notes)
    rows = [
        json_text(_problem_row(number, problem, pictures, *next(places)))
        for number, files in enumerate(benchmarks)
        for problem in files.problems
    ]
    heads = _named_apart([_benchmark_row(files, base) for files in benchmarks])
    models = [_shared(names) for names in zip(*map(model_names, benchmarks), strict=True)]
    data: EvaluationData = {
        "name": shown(models[0] or os.fsencode(base.resolve().name).decode("utf-8", "replace")),
        "model": models[1],
        "writtenAt": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "benchmarks": heads,
        "problems": notes[:MAX_NOTES],
        "numMoreProblems": max(0, len(notes) - MAX_NOTES),
        "numChunks": len(chunks),
    }
    blocks = [json_block("evaluation-data", data), text_block("problem-index", compress(rows))]
    blocks += [text_block(f"responses-{number}", chunk) for number, chunk in enumerate(chunks)]
    blocks += [text_block(f"picture-{key}", url) for key, url in pictures.urls.items()]
    title = (
        f"{data['name']}, "
        f"{', '.join(head['title'] for head in heads[:3])}{' …' if len(heads) > 3 else ''}"
    )
    style = asset("page.css") + asset("evaluation.css")
    return write_page(
        path,
        page("evaluation.html", title, style, blocks, {"script": joined("evaluation")}),
    ), heads


def _shared(names: Sequence[str]) -> str:
    """The name that all have, else nothing."""
    return names[0] if len(set(names)) == 1 else ""


def _named_apart(heads: list[BenchmarkData]) -> list[BenchmarkData]:
    """Says the step of an evaluation during training, and the folder above where two benchmarks
    have the same title.
    """
    titles = Counter(head["title"] for head in heads)
    for head in heads:
        *above, _ = head["name"].split("/")
        steps = [int(match[1]) for part in above if (match := STEP.fullmatch(part))]
        if steps:
            head["title"] += f", step {steps[0]}"
        elif above and titles[head["title"]] > 1:
            head["title"] += f" ({'/'.join(above)})"
    return heads


def _benchmark_row(files: BenchmarkFiles, base: Path) -> BenchmarkData:
    """Its numbers and its protocol. What summary.json alone knows is shown only while it speaks of
    the same verdicts.
    """
    numbers, summary = headline(files), files.summary
    current = not numbers.provisional and not numbers.withheld
    rest = (
        {}
        if numbers.provisional
        else {key: value for key, value in summary.items() if key not in TELLING}
    )
    pass_at = summary.get("pass_at_k") if current else None
    ks = sorted(int(k) for k in pass_at if k.isdecimal()) if isinstance(pass_at, dict) else []
    judge = summary.get("judge")
    return {
        "name": files.name,
        "title": files.title or files.name.rpartition("/")[2],
        "folder": _relative(files.folder, base),
        "hash": files.protocol_hash,
        "protocol": flat(files.protocol),
        "summary": flat(rest),
        "accuracy": numbers.accuracy,
        "provisional": numbers.provisional,
        "withheld": numbers.withheld,
        "counts": numbers.counts,
        "truncated": numbers.truncated,
        "meanLength": numbers.mean_length,
        "agreement": numbers.agreement,
        "numProblems": len(files.problems),
        "numSamples": max((len(problem.samples) for problem in files.problems), default=0),
        "passAt": (ks[-1], _value(pass_at[str(ks[-1])]))
        if ks and isinstance(pass_at, dict) and str(ks[-1]) in pass_at
        else None,
        "majority": _value(summary.get("maj_at_k")) if current else None,
        "greedy": _value(summary.get("greedy")) if current else None,
        "judge": as_text(judge.get("model")) if isinstance(judge, dict) else as_text(judge),
    }


def _value(number: Any) -> float | None:
    """A mean, written as a number or with its interval."""
    if isinstance(number, dict):
        number = number.get("value", number.get("accuracy"))
    elif isinstance(number, list) and number:
        number = number[0]
    return as_number(number)


def _problem_row(
    number: int, problem: EvaluatedProblem, pictures: _ProblemPictures, chunk: int, at: int
) -> ProblemData:
    return {
        "benchmark": number,
        "id": problem.id,
        "question": problem.question,
        "golds": problem.golds,
        "source": problem.data_source,
        "images": [pictures.entry(number, image) for image in problem.images],
        "chunk": chunk,
        "at": at,
        "samples": [_sample_row(sample) for sample in problem.samples],
    }


def _sample_row(sample: EvaluatedResponse) -> SampleData:
    row: dict[str, Any] = {
        "index": sample.index,
        "verdict": sample.verdict,
        "prediction": sample.prediction,
        "reason": sample.reason,
        "rule": sample.rule,
        "finish": sample.finish_reason,
        "promptTokens": sample.prompt_tokens,
        "tokens": sample.response_tokens,
        "seconds": sample.seconds,
    }
    if sample.judge:
        row["judge"] = {
            "verdict": as_text(sample.judge.get("verdict")),
            "model": as_text(sample.judge.get("model")),
            "attempts": as_number(sample.judge.get("attempts")),
            "seconds": sample.judge_seconds,
        }
    told = {key: value for key, value in row.items() if value not in ("", None)}
    return cast(SampleData, told | {"verdict": sample.verdict})


# Responses.


def _responses(
    benchmarks: Sequence[BenchmarkFiles], notes: list[FileNote]
) -> tuple[list[str], Iterator[tuple[int, int]]]:
    """Compressed chunks, and for every problem its chunk and its place in there. Says so where
    responses had to be cut.
    """
    problems = [problem for files in benchmarks for problem in files.problems]
    chunks: list[str] = []
    places: list[tuple[int, int]] = []
    for cut in CUTS:
        chunks, places = _pack(problems, cut)
        if sum(map(len, chunks)) <= TEXT_BYTES:
            break
    num_cut = sum(len(sample.response) > cut for problem in problems for sample in problem.samples)
    if num_cut:
        text = (
            f"{num_cut:,} responses of more than {cut:,} characters are shown without their "
            "middle, to keep this file small"
        )
        notes.append(FileNote("note", "ledger.jsonl", text))
    return chunks, iter(places)


def _pack(
    problems: Sequence[EvaluatedProblem], cut: int
) -> tuple[list[str], list[tuple[int, int]]]:
    chunks: list[str] = []
    places: list[tuple[int, int]] = []
    texts: list[str] = []
    size = 0
    for problem in problems:
        text = json.dumps(
            [_texts(sample, cut) for sample in problem.samples], separators=(",", ":")
        )
        if texts and size + len(text) > CHUNK:
            chunks.append(compress(texts))
            texts, size = [], 0
        places.append((len(chunks), len(texts)))
        texts.append(text)
        size += len(text)
    return [*chunks, compress(texts)], places


def _texts(sample: EvaluatedResponse, cut: int) -> SampleTexts:
    """The response and what the judge wrote. A response that is cut keeps more of its end, where
    its answer stands.
    """
    text, left = sample.response, len(sample.response) - cut
    parts = [text] if left <= 0 else [text[: cut // 3], text[cut // 3 + left :]]
    row: SampleTexts = {"response": parts, "left": max(0, left)} if text else {}
    if sample.judge:
        row["reply"] = as_text(sample.judge.get("reply"))[:cut]
        row["judge"] = [
            (key, text[:cut])
            for key, text in flat({k: v for k, v in sample.judge.items() if k not in IN_INDEX})
        ]
    return row


# Pictures.


class _ProblemPictures:
    """The page's pictures, those of problems that were not all answered right first."""

    def __init__(
        self, base: Path, benchmarks: Sequence[BenchmarkFiles], notes: list[FileNote]
    ) -> None:
        self.base = base
        self.folders = [files.folder for files in benchmarks]
        self.urls: dict[str, str] = {}  # key -> data URL
        self.keys: dict[tuple[int, str], str | None] = {}  # None: no picture; absent: left out
        wanted = [
            (number, problem)
            for number, files in enumerate(benchmarks)
            for problem in files.problems
            if problem.images
        ]
        wanted.sort(key=lambda item: all(sample.verdict == "correct" for sample in item[1].samples))
        each = len({(number, image) for number, problem in wanted for image in problem.images})
        self.room = PICTURE_BYTES
        self.most = min(
            max(PICTURE_RANGE[0], PICTURE_BYTES * 3 // 4 // max(1, each)), PICTURE_RANGE[1]
        )
        left_out = []
        # Pillow's work runs in parallel
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(wanted), BATCH):
                left_out += self._take_all(wanted[start : start + BATCH], pool)
        missing = [image for (_, image), key in self.keys.items() if key is None]
        if missing:
            text = (
                f"{len(missing)} pictures are missing, outside the folder or not pictures, "
                f"first {missing[0]}"
            )
            notes.append(FileNote("damaged", "images", text))
        if left_out:
            text = (
                f"the pictures of {len(left_out):,} of {len(wanted):,} problems were left out "
                "to keep this file small; each problem names them"
            )
            notes.append(FileNote("note", "images", text))

    def entry(self, number: int, image: str) -> PictureData:
        """What the page knows of a picture: where it is kept, or the file that it was left out
        of.
        """
        if (number, image) not in self.keys:
            return {"path": image, "file": f"{_relative(self.folders[number], self.base)}/{image}"}
        return {"path": image, "key": self.keys[number, image]}

    def _take_all(
        self, wanted: Sequence[tuple[int, EvaluatedProblem]], pool: ThreadPoolExecutor
    ) -> list[EvaluatedProblem]:
        """Keep the pictures of these problems while there is room. Returns the problems whose
        pictures are left out.
        """
        named = dict.fromkeys(
            (number, image) for number, problem in wanted for image in problem.images
        )
        new = (
            [each for each in named if each not in self.keys]
            if self.room >= PICTURE_RANGE[0]
            else []
        )
        loaded = dict(zip(new, pool.map(self._load, new), strict=True))
        return [
            problem
            for number, problem in wanted
            if not self._take([(number, image) for image in problem.images], loaded)
        ]

    def _load(self, each: tuple[int, str]) -> tuple[str, str] | None:
        return load_picture(self.folders[each[0]] / each[1], self.base, self.most, PICTURE_SIDE)

    def _take(
        self,
        images: Sequence[tuple[int, str]],
        loaded: Mapping[tuple[int, str], tuple[str, str] | None],
    ) -> bool:
        """Keep all pictures of a problem, or none."""
        new = [each for each in dict.fromkeys(images) if each not in self.keys]
        if any(each not in loaded for each in new):
            return False
        found = {each: loaded[each] for each in new}
        urls = {
            picture[0]: picture[1]
            for picture in found.values()
            if picture and picture[0] not in self.urls
        }
        cost = sum(map(len, urls.values()))
        if cost > self.room:
            return False
        self.room -= cost
        self.urls.update(urls)
        self.keys.update({each: picture[0] if picture else None for each, picture in found.items()})
        return True


def _relative(folder: Path, base: Path) -> str:
    return os.fsencode(folder.relative_to(base)).decode("utf-8", "replace")
