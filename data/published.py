"""From published data sets to this project's rows.

    .venv/bin/python data/published.py NAME OUT_DIR [--role rl|expert] [--source HUB_FILE_OR_FOLDER]
    [--on-bad-row stop|skip]

writes OUT_DIR/train.jsonl (rl: id, prompt, images, answer, data_source) or OUT_DIR/expert.jsonl
(with `response`, a solution that the flow is fitted on), and the pictures, byte for byte, as
OUT_DIR/images/HASH.png. Other columns stay behind. Rows that repeat an earlier one are dropped and
counted; a row that cannot be used stops the run, or is skipped, counted and named in
bad_rows_train.jsonl or bad_rows_expert.jsonl. Of a question with different answers the first row
stays, and each row with another answer is a bad one.

Where pictures are archives beside the rows, the data set has to be downloaded and unpacked first,
and its folder given as the source. DAPO's questions ask for a last line `Answer: ...`: train on
them with reward.answer=text.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from rlfr_vlm.config import DataConfig
from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.images import ImageError, open_image, read_bytes
from rlfr_vlm.data.prompts import IMAGE_MARK, parse_row
from rlfr_vlm.data.rows import read_rows
from rlfr_vlm.errors import DiskFullError, UserError
from rlfr_vlm.types import Prompt

Row = dict[str, Any]
Role = Literal["rl", "expert"]
SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
ABOUT = (
    "meta.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
    "dataset_dict.json",
)  # of the data set, not its rows


VERDICTS = (
    "correctness_math_verify",
    "correctness_llama",
    "correctness",
)  # of OpenR1-Math's generations, the most trusted first
HINTS = {  # the trainer's, in the words of this program
    "name its folder in data.media_dirs": "name its folder with --media-dir",
    "set data.allow_urls=true to download pictures": "download the pictures first, and name files",
}


def as_published(row: Row) -> Row:
    """The loader knows these columns: problem, message, conversations, image_urls, reward_model,
    chosen, ...
    """
    return row


def llama_factory(row: Row) -> Row:
    """LLaMA-Factory's two shapes, turns or instruction/input/output, each perhaps with a system
    text; the last turn is the response.
    """
    turns = row.get("messages") or row.get("conversations")
    if not turns and row.get("instruction") is None:
        return row
    if not turns:
        question = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
        pairs = [*(row.get("history") or []), (question, row.get("output"))]
        turns = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    return {**row, "messages": turns}


def openr1(row: Row) -> Row | str:
    """The first complete generation that Math-Verify found right, else one that the judge did, else
    the published solution.
    """
    for column in ("generations", "is_reasoning_complete", *VERDICTS):
        if row.get(column) is not None and not isinstance(row[column], list):
            return f"{column} is {type(row[column]).__name__}, not a list"
    generations = row.get("generations")
    if not generations:
        return llama_factory(row)
    complete = row.get("is_reasoning_complete") or [True] * len(generations)
    for flags in VERDICTS:
        for text, right, ended in zip(generations, row.get(flags) or [], complete, strict=False):
            if right is True and ended is True and text and text.strip():
                return {
                    **row,
                    "prompt": row.get("problem"),
                    "response": text,
                    "response_source": flags,
                }
    if not (row.get("solution") or "").strip():
        return (
            f"none of its {len(generations)} generations is verified and complete, and it has "
            "no solution"
        )
    return {
        **row,
        "prompt": row.get("problem"),
        "response": row["solution"],
        "response_source": "solution",
    }


@dataclass(frozen=True)
class Part:
    """How one role's rows are made, and the regular expression that tells their files in a
    folder.
    """

    # a row -> a row with columns that the loader knows, or why it cannot be used
    convert: Callable[[Row], Row | str]
    files: str = "."


@dataclass(frozen=True)
class Recipe:
    """A published data set."""

    hub: str
    parts: dict[Role, Part]
    # rows or pictures lie in archives and folders of their own: only from a local copy
    archives: bool = False
    meta: bool = False  # a folder's meta.json lists the files of rows and where their pictures are


RECIPES = {
    "rlfr-lm": Recipe(
        "JingHaoZ/RLFR-Dataset-LM",
        {"rl": Part(as_published, "lvl3to5"), "expert": Part(openr1, "openr1")},
        archives=True,
    ),
    "rlfr-vlm": Recipe(
        "JingHaoZ/RLFR-Dataset-VLM",
        {"rl": Part(as_published, "eureka"), "expert": Part(llama_factory, "MMPR")},
        archives=True,
    ),
    "openr1-math": Recipe(
        "open-r1/OpenR1-Math-220k",
        {
            "expert": Part(openr1, "(^|data/){split}-"),
            "rl": Part(as_published, "(^|data/){split}-"),
        },
    ),
    "mmpr": Recipe("OpenGVLab/MMPR-v1.2", {"expert": Part(as_published)}, archives=True, meta=True),
    "mm-eureka": Recipe("FanqingM/MM-Eureka-Dataset", {"rl": Part(as_published)}, archives=True),
    "dapo-math": Recipe("BytedTsinghua-SIA/DAPO-Math-17k", {"rl": Part(as_published)}),
    "geometry3k": Recipe("hiyouga/geometry3k", {"rl": Part(as_published, "{split}-")}),
}

# where, the row, the problem where there is none, folders of its pictures
Found = tuple[str, Row | None, str, list[Path]]


def find_rows(recipe: Recipe, files: str, source: str, media: Sequence[Path]) -> Iterator[Found]:
    """Rows of the hub's data set, of one file, of the files in a folder that match, or of those
    that a folder's meta.json lists (MMPR).
    """
    path = Path(source)
    if recipe.meta and (path / "meta.json").is_file():
        yield from _meta_rows(path, files, media)
    elif path.is_dir():
        present = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.name not in ABOUT)
        names = [p.relative_to(path).as_posix() for p in present]
        chosen = [
            p
            for p, name in zip(present, names, strict=True)
            if re.search(files, name, re.IGNORECASE)
        ]
        if not chosen:
            raise UserError(
                f"{source}: of the files there ({', '.join(names[:5]) or 'none'}) none matches "
                f"`{files}`; see --only"
            )
        for file in chosen:
            yield from (
                (*found, [file.parent, path, *media])
                for found in _named_rows(file, file.relative_to(path).as_posix())
            )
    elif not path.exists() and source.partition("@")[0] == recipe.hub and recipe.archives:
        raise UserError(
            f"{recipe.hub} keeps files in archives or folders of its own: `hf download "
            f"{recipe.hub} --repo-type dataset --local-dir DIR`, "
            "unpack what is packed, and run this again with --source DIR"
        )
    elif path.exists():
        yield from ((*found, [path.parent, *media]) for found in _named_rows(path, source))
    else:
        yield from ((*found, [*media]) for found in read_rows(source))


def _named_rows(file: Path, name: str) -> Iterator[tuple[str, Row | None, str]]:
    """A file's rows, their places told by a name that no other file of the source has."""
    for where, row, problem in read_rows(str(file)):
        yield name + where.removeprefix(file.name), row, problem


def _meta_rows(folder: Path, files: str, media: Sequence[Path]) -> Iterator[Found]:
    """meta.json: {name: {"annotation": file, "root": folder of its pictures}}, both with or without
    the data set's own folder in front.
    """
    try:
        entries = {
            name: (entry["annotation"], entry["root"])
            for name, entry in json.loads((folder / "meta.json").read_bytes()).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'meta.json'}: expected entries with annotation and root: {error!r}"
        ) from None
    for name, (annotation, root) in entries.items():
        if not re.search(files, name, re.IGNORECASE):
            continue
        file, pictures = _inside(folder, annotation), _inside(folder, root)
        if file is None:
            yield f"meta.json:{name}", None, f"its annotation {annotation} is missing", []
            continue
        for where, row, problem in _named_rows(file, file.relative_to(folder.resolve()).as_posix()):
            yield (
                where,
                None if row is None else {"source": name, **row},
                problem,
                [*filter(None, [pictures]), folder, *media],
            )


def _inside(folder: Path, name: str) -> Path | None:
    """That file or folder, if it is there and nowhere else."""
    paths = ((folder / n).resolve() for n in (name, "/".join(Path(name).parts[1:])) if n)
    return next(
        (path for path in paths if path.exists() and path.is_relative_to(folder.resolve())), None
    )


def store_picture(source: Any, roots: Sequence[Path], folder: Path) -> str:
    """Write a picture as it was published, under a name made from its bytes. Returns that name.
    Raises ImageError if it cannot be read.
    """
    open_image(source, roots)
    data = read_bytes(source, roots, allow_urls=False)[1]
    suffix = str(Image.open(io.BytesIO(data)).format).lower()
    path = folder / f"{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"
    if not path.exists():
        partial = path.with_suffix(".part")
        partial.write_bytes(data)
        partial.replace(path)
    return f"{folder.name}/{path.name}"


def plain_reason(text: str) -> str:
    """What is wrong with a picture, in words that lead on here."""
    for theirs, ours in HINTS.items():
        text = text.replace(theirs, ours)
    return re.sub(r": cannot identify image file <.*?>", "", text)


def plain_prompt(prompt: Prompt) -> str | list[dict[str, str]]:
    """The question as text with <image> marks, or the messages where there are several."""
    messages = [
        {
            "role": m["role"],
            "content": "".join(
                IMAGE_MARK if p["type"] == "image" else p["text"] for p in m["content"]
            ),
        }
        for m in prompt.messages
    ]
    text = messages[0]["content"]
    return messages if len(messages) > 1 or text.lstrip().startswith("[") else text


@dataclass
class Built:
    """What a run has written and left out so far."""

    name: str
    role: Role
    file: Path
    bad: BadRows
    written: int = 0
    repeats: int = 0
    # by where they come from, for rows that offer several
    responses: Counter[str] = field(default_factory=Counter)
    # hash of question, pictures and response -> answer -> where
    seen: dict[bytes, dict[str, str]] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)

    def line(self, row: Row, where: str, number: int, roots: Sequence[Path]) -> Row | None:
        """Our row, or None for a repetition. Raises RowError."""
        recipe, need = RECIPES[self.name], "answer" if self.role == "rl" else "response"
        try:
            found = recipe.parts[self.role].convert(row)
        except (
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # a column of another type than the schema's
            found = f"not of this data set's schema: {error}"
        if isinstance(found, str):
            raise RowError("unusable", f"{where}: {found}")
        prompt = parse_row(found, where, DataConfig(), need)
        try:
            images = [
                store_picture(image, list(dict.fromkeys(roots)), self.file.parent / "images")
                for image in prompt.images
            ]
        except ImageError as error:
            raise RowError("image", f"{where}: {plain_reason(str(error))}") from None
        line: Row = {"prompt": plain_prompt(prompt), "images": images} | (
            {"response": prompt.response} if need == "response" else {}
        )
        key = hashlib.sha256(json.dumps(line).encode()).digest()[:16]
        answers = self.seen.setdefault(key, {})
        if prompt.answer in answers or (answers and need == "response"):
            self.repeats += 1
            return None
        answers[prompt.answer] = where
        if len(answers) > 1:
            first, other = next(iter(answers.items()))
            raise RowError(
                "conflict",
                f"{where}: the answer is {prompt.answer!r}, but {first!r} to the same question at "
                f"{other}",
            )
        self.written += 1
        self.responses.update([found["response_source"]] if "response_source" in found else [])
        row_id = prompt.id if prompt.id != where else f"{self.name}-{number}"
        row_id += f"#{number}" if row_id in self.ids else ""
        self.ids.add(row_id)
        group = f"/{row['source']}" if isinstance(row.get("source"), str) else ""
        return {
            "id": row_id,
            **line,
            "answer": prompt.answer,
            "data_source": prompt.data_source or recipe.hub + group,
        }

    def summary(self) -> str:
        """For the user."""
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in Counter(row.kind for row in self.bad.rows).items()
        )
        text = (
            f"{self.file}: {self.written} rows, {self.repeats} repeats dropped, "
            f"{len(self.bad.rows)} bad rows left out"
        )
        text += f" ({kinds}; {self.bad.record})" if kinds else ""
        return text + "".join(
            f"; {count} responses from {column}" for column, count in self.responses.items()
        )


def build(
    name: str,
    out_dir: Path,
    role: Role,
    source: str | None = None,
    split: str = "train",
    on_bad_row: Literal["stop", "skip"] = "stop",
    limit: int | None = None,
    media: Sequence[Path] = (),
    only: str | None = None,
) -> Built:
    """Convert one data set. Raises UserError at a bad row (unless they are skipped), for an
    unreadable file, and where no row can be used.
    """
    recipe = RECIPES[name]
    if role not in recipe.parts:
        raise UserError(f"{name} has rows for --role {' or '.join(recipe.parts)}, not for {role}")
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    stem = split if role == "rl" else role
    record = out_dir / f"bad_rows_{stem}.jsonl"
    record.unlink(missing_ok=True)  # of an earlier run
    bad = BadRows(DataConfig(on_bad_row=on_bad_row, max_bad_frac=1.0), record, "--on-bad-row skip")
    built = Built(name, role, out_dir / f"{stem}.jsonl", bad)
    files = only or recipe.parts[role].files.format(split=re.escape(split))
    partial = built.file.with_suffix(".part")
    try:
        with partial.open("w") as file:
            for number, (where, row, problem, roots) in enumerate(
                find_rows(recipe, files, source or f"{recipe.hub}@{split}", media)
            ):
                try:
                    if row is None:
                        raise RowError("schema", f"{where}: {problem}")
                    line = built.line(row, where, number, roots)
                except RowError as error:
                    bad.add(where, error, number + 1)
                    continue
                if line is not None:
                    file.write(json.dumps(line) + "\n")
                if built.written == limit:
                    break
        if not built.written:
            raise UserError(
                f"{source or recipe.hub}: no usable row; {len(bad.rows)} bad rows"
                + (f" in {record}" if bad.rows else "")
            )
        partial.replace(built.file)
    finally:
        partial.unlink(missing_ok=True)
    return built


def pattern(text: str) -> str:
    """A regular expression that compiles."""
    try:
        return re.compile(text).pattern
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from None


def at_least_one(text: str) -> int:
    """A number of rows."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows: 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    names = "\n".join(
        f"  {name:12} {recipe.hub} ({', '.join(recipe.parts)})" for name, recipe in RECIPES.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"names, and the roles that their rows have:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=RECIPES, metavar="NAME", help="see the end")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument(
        "--role", choices=("rl", "expert"), help="default: the first that the data set has"
    )
    parser.add_argument("--source", help="hub name, file or folder (default: the hub's data set)")
    parser.add_argument(
        "--split",
        default="train",
        help="of the hub's data set or of files named after splits; also names the rl file",
    )
    parser.add_argument(
        "--only",
        metavar="REGEX",
        type=pattern,
        help="use the files, or the entries of meta.json, whose name matches",
    )
    parser.add_argument(
        "--media-dir",
        type=Path,
        action="append",
        default=[],
        help="a further folder that picture paths start from",
    )
    parser.add_argument(
        "--limit", type=at_least_one, metavar="N", help="stop after so many written rows"
    )
    parser.add_argument(
        "--on-bad-row",
        choices=("stop", "skip"),
        default="stop",
        help="stop with exit code 2, or skip and count",
    )
    given = sys.argv[1:] if arguments is None else arguments
    if not given:
        parser.print_help(sys.stderr)
        return UserError.exit_code
    args = parser.parse_args(given)
    role = args.role or next(iter(RECIPES[args.name].parts))
    try:
        built = build(
            args.name,
            args.out_dir,
            role,
            args.source,
            args.split,
            args.on_bad_row,
            args.limit,
            args.media_dir,
            args.only,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"error: {error.filename or args.out_dir}: {error.strerror}", file=sys.stderr)
        return DiskFullError.exit_code if full else UserError.exit_code
    print(built.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
