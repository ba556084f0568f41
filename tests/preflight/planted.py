"""Data files with known defects: clean rows of which some, at known lines, are spoilt in one way
each.

Every spoiler takes a clean row and the folder and returns the row, or the raw line, that has the
defect; which kinds validate must then find on it is written beside it. `write` spreads them over
the files and says what must be found where.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

Expected = set[tuple[str, int, str]]  # role, line, kind


def picture(
    folder: Path,
    name: str,
    seed: int,
    size: tuple[int, int] = (84, 56),
    mode: str = "RGB",
    **options,
) -> str:
    """A coloured pattern of its own for each seed, saved under `images`; returns the path that a
    row gives.
    """
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BILINEAR).convert(mode).save(path, **options)
    return f"images/{name}"


def clean(
    folder: Path,
    role: str,
    i: int,
    with_picture: bool,
    size: tuple[int, int] = (84, 56),
    suffix: str = "png",
) -> dict:
    """A row that nothing is wrong with; no two have the same question, picture or id."""
    i += {"train": 0, "eval": 1_000_000, "expert": 2_000_000}[role]
    if with_picture:
        path = picture(folder, f"{i}.{suffix}", i, size)
        row = {
            "id": f"{role}-{i}",
            "prompt": f"<image>How many dots has the object numbered {i}?",
            "images": [path],
            "answer": str(i % 97),
        }
    else:
        row = {
            "id": f"{role}-{i}",
            "prompt": f"What is {i} plus {i % 7}?",
            "answer": str(i + i % 7),
        }
    return {**row, "response": f"I count: \\boxed{{{row['answer']}}}."} if role == "expert" else row


def _file(folder: Path, name: str, data: bytes) -> str:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / name).write_bytes(data)
    return f"images/{name}"


def _torn(folder: Path) -> str:
    path = picture(folder, "torn.png", 1)
    data = (folder / path).read_bytes()
    return _file(folder, "torn.png", data[: len(data) // 2])


def _bomb(folder: Path) -> str:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    return _file(folder, "bomb.png", buffer.getvalue())


def _heavy(folder: Path) -> str:
    path = _file(folder, "heavy.png", b"")
    os.truncate(folder / path, 33 * 2**20)
    return path


def _outside(folder: Path) -> Path:
    secret = folder.parent / "secret.png"
    Image.new("RGB", (56, 56)).save(secret)
    return secret


def _link(folder: Path) -> str:
    path = folder / "images" / "link.png"
    path.parent.mkdir(exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(_outside(folder))
    return "images/link.png"


def _clear(folder: Path, seed: int) -> str:
    path = picture(folder, f"clear{seed}.png", seed)
    image = Image.open(folder / path).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(folder / path)
    return path


def _turned(folder: Path, seed: int) -> str:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(folder, f"turned{seed}.jpg", seed, exif=exif)


def _moving(folder: Path, seed: int) -> str:
    second = Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    )
    return picture(folder, f"moving{seed}.gif", seed, save_all=True, append_images=[second])


def _line(text: str | bytes):
    return lambda row, folder: text if isinstance(text, bytes) else text.encode()


def _with(**changes):
    return lambda row, folder: {**row, **changes}


def _without(*names):
    return lambda row, folder: {k: v for k, v in row.items() if k not in names}


def _user(*parts):
    return lambda row, folder: {
        **{k: v for k, v in row.items() if k != "prompt"},
        "messages": [{"role": "user", "content": [*parts]}],
    }


def _text(form: str):
    return lambda row, folder: {**row, "prompt": form.format(row["prompt"])}


def _seen(make):
    """A row with the picture that `make(folder, seed)` writes."""
    return lambda row, folder: {
        **row,
        "prompt": f"<image>What is to be seen on {row['id']}?",
        "images": [make(folder, int(row["id"].rsplit("-", 1)[1]) + 7_000_000)],
    }


def _named(make):
    """A row with the picture whose name `make(folder)` gives."""
    return lambda row, folder: {
        **row,
        "prompt": f"<image>What is to be seen on {row['id']}?",
        "images": [make(folder)],
    }


def _asked(*parts):
    """The question, and further parts of the message."""
    return lambda row, folder: _user({"type": "text", "text": row["prompt"]}, *parts)(row, folder)


def _source(source):
    return _named(lambda folder: source)


# Of rows without a picture. (kinds that must be found, spoiler)
SPOILERS = [
    (["json_invalid"], _line('{"prompt": "What is 1 plus 1?", "ans')),
    (["json_invalid"], _line("What is 1 plus 1?,2")),
    (["utf8_invalid"], _line(b'{"prompt": "caf\xe9", "answer": "1"}')),
    (["not_object"], _line("[1, 2]")),
    (["not_object"], _line("null")),
    (["prompt_missing"], _without("prompt")),
    (["prompt_missing"], _with(prompt=7)),
    (["prompt_missing"], _with(prompt=[])),
    (["prompt_empty"], _with(prompt=" \n")),
    (["messages_malformed"], _with(prompt=[{"role": "user"}])),
    (["messages_malformed"], _with(prompt=[{"role": "robot", "content": "x"}])),
    (["messages_malformed"], _with(prompt="[{'role': 'user', 'content': 'x'}]")),
    (["messages_malformed"], _user({"type": "table", "table": []})),
    (["messages_malformed"], _with(prompt=[{"role": "system", "content": "x"}])),
    (["text_broken"], _text("{} \ud800")),
    (["media_unsupported"], _with(videos=["a.mp4"])),
    (["prompt_too_long"], lambda row, folder: {**row, "prompt": row["prompt"] + " one two three" * 400}),
    (["special_tokens"], _text("<|im_end|>\n<|im_start|>system\n{}")),
    (["special_tokens"], _text("{} <|image_pad|>")),
    (["special_tokens"], _asked({"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"})),
    (["foreign_image_mark"], _text("{} <image_1>")),
    (["foreign_image_mark"], _text("{} <img src='a.png'>")),
    (["text_garbled"], _text("{} isn\ufffdt")),
    (["text_garbled"], _text("{} isnâ€™t")),
    (["text_garbled"], _text("{} \x07")),
    (["column_typo"], _with(imgaes=["images/a.png"])),
    (["column_typo"], _with(Image="images/a.png")),
    (["column_typo", "answer_missing"], lambda row, folder: {**_without("answer")(row, folder), "anwser": "1"}),
    (["pixel_limits"], _with(max_pixels=10**8)),
    (["pixel_limits"], _asked({"type": "text", "text": "Say it.", "min_pixels": 1})),
    (["image_count"], _text("<image>{}")),
    (["image_count"], lambda row, folder: {**_text("<image><image>{}")(row, folder), "images": [picture(folder, "one.png", 1)]}),
    (["image_count"], lambda row, folder: {**_text("<image>{}")(row, folder), "images": ["images/1.png", "images/2.png"]}),
    (["image_count"], lambda row, folder: {**_text("<image>{}")(row, folder), "images": []}),
    (["image_missing"], _source("images/gone.png")),
    (["image_broken"], _named(lambda folder: _file(folder, "empty.png", b""))),
    (["image_broken"], _named(lambda folder: _file(folder, "words.png", b"no picture"))),
    (["image_broken"], _named(_torn)),
    (["image_pixels"], _named(_bomb)),
    (["image_bytes"], _named(_heavy)),
    (["image_outside"], _named(lambda folder: f"../{_outside(folder).name}")),
    (["image_outside"], _source("/etc/hostname")),
    (["image_outside"], _source("file:///etc/hostname")),
    (["image_outside"], _named(_link)),
    (["image_url"], _source("http://169.254.169.254/latest/meta-data")),
    (["image_url"], _asked({"type": "image_url", "image_url": {"url": "https://localhost/x.png"}})),
    (["image_source"], _source(7)),
    (["image_source"], _source(None)),
    (["image_source"], _source("?" * 600)),
    (["image_source"], _source({"bytes": None})),
    (["image_shape"], _seen(lambda folder, seed: picture(folder, f"long{seed}.png", seed, (30, 6100)))),
    (["image_tiny"], _seen(lambda folder, seed: picture(folder, f"tiny{seed}.png", seed, (40, 20)))),
    (["image_blank"], _seen(lambda folder, seed: _flat(folder, seed))),
    (["image_transparent"], _seen(_clear)),
    (["image_rotated"], _seen(_turned)),
    (["image_frames"], _seen(_moving)),
    (["image_unmarked"], lambda row, folder: {**_seen(lambda f, s: picture(f, f"plain{s}.png", s))(row, folder), "prompt": row["prompt"]}),
    (["image_absent"], _text("In the figure shown below, a line is drawn. {}")),
    (["answer_missing"], _without("answer")),
    (["answer_missing"], _with(answer=None)),
    (["answer_missing"], _with(answer="  ")),
    (["answer_missing"], _with(answer=[])),
    (["answer_type"], _with(answer={"a": 1})),
    (["answer_type"], _with(answer=[1, 2])),
    (["answer_type"], _with(answer=True)),
    (["answer_type"], _with(answer=float("nan"))),
    (["answer_unreadable"], _with(answer="\\frac{")),
    (["answer_unreadable"], _with(answer="3 4")),
    (["answer_unreadable"], _with(answer="4\u200b2")),
    (["answer_unreachable"], _with(answer="hello {world")),
    (["answer_placeholder"], _with(answer="None")),
    (["answer_placeholder"], _with(answer="nan")),
    (["answer_question"], lambda row, folder: {**row, "prompt": f"{row['answer']} or so", "answer": row["prompt"]}),
    (["answer_prose"], _with(answer="because the two of them are parallel and never meet each "
        "other")),
    (["answer_in_prompt"], lambda row, folder: {**row, "prompt": f"{row['prompt']} (Answer: "
        f"{row['answer']})"}),
    (["answer_in_prompt"], lambda row, folder: {**row, "prompt": f"{row['prompt']} "
        f"\\boxed{{{row['answer']}}}"}),
    (["choice_not_offered"], lambda row, folder: {**row, "prompt": f"{row['prompt']} (A) 1 (B) 2 "
        "(C) 3 (D) 4", "answer": "E"}),
    (["choice_not_offered"], _with(answer="(C)")),
]  # fmt: skip
EXPERT_SPOILERS = [
    (["response_missing"], _without("response")),
    (["response_missing"], _with(response=" ")),
    (["response_missing"], _with(response=["x"])),
    (
        ["response_vision_token"],
        lambda row, folder: {**row, "response": row["response"] + "<|image_pad|>"},
    ),
    (["expert_too_long"], lambda row, folder: {**row, "response": "so " * 900 + row["response"]}),
    (["response_wrong"], _with(response="I count: \\boxed{-5}.")),
    (["response_no_answer", "response_format"], _with(response="I count, and that is it.")),
    (
        ["response_format"],
        lambda row, folder: {**row, "response": "\\boxed{0} " * 4 + row["response"]},
    ),
    (
        ["response_special_tokens"],
        lambda row, folder: {**row, "response": row["response"] + "<|im_end|>"},
    ),
    (["image_missing"], _source("images/gone.png")),
    (
        ["column_typo", "response_missing"],
        lambda row, folder: {**_without("response")(row, folder), "respones": "x"},
    ),
]


def _flat(folder: Path, seed: int) -> str:
    size = (57 + seed % 11, 60 + seed % 1009)
    Image.new("RGB", size, (200, 200, 200)).save(folder / f"images/blank{seed}.png")
    return f"images/blank{seed}.png"


def _relations(rows: dict[str, list], free: list[int], folder: Path, expected: Expected) -> None:
    """Defects between rows: the free lines of the training rows copy earlier ones, or held-out
    ones.
    """
    train, heldout = rows["train"], rows["eval"]
    seen = next(row for row in heldout if "images" in row)
    first, second, third = (
        row for row in train if isinstance(row, dict) and str(row.get("id")).startswith("clean")
    )
    again = "images/again.bmp"  # the same pixels in another file
    Image.open(folder / seen["images"][0]).save(folder / again)
    rival = picture(folder, "rival.png", 31_337)
    words = "<image>A farmer has a field of this form; what is its area in square metres?"
    heldout[-1] = {
        **seen,
        "id": "words",
        "prompt": words,
        "images": [picture(folder, "words-there.png", 31_338)],
    }
    for kind, row in [
        ("duplicate_id", {**train[free[0]], "id": first["id"]}),
        ("duplicate_row", {**first, "id": "again"}),
        ("duplicate_row", {**second, "id": "loud", "prompt": "  " + second["prompt"].upper()}),
        ("answer_conflict", {**third, "id": "other", "answer": "-1"}),
        (
            "overlap_problem",
            {**next(row for row in heldout if "images" not in row), "id": "from-eval"},
        ),
        ("overlap_problem", {**seen, "id": "from-eval-2", "images": [again]}),
        (
            "overlap_image",
            {
                **seen,
                "id": "from-eval-3",
                "prompt": "<image>What colour has the object?",
                "images": [again],
            },
        ),
        ("overlap_text", {**seen, "id": "from-eval-4", "prompt": words, "images": [rival]}),
    ]:
        line = free.pop(0)
        train[line] = row
        expected.add(("train", line + 1, kind))


def write(
    folder: Path,
    rows: int = 260,
    pictures: int = 60,
    copies: int = 1,
    size: tuple[int, int] = (84, 56),
    suffix: str = "png",
) -> Expected:
    """train.jsonl of so many rows and pictures, test.jsonl and expert.jsonl, each spoiler `copies`
    times; returns what must be found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"train": rows, "eval": max(8, rows // 20), "expert": max(40, rows // 20)}
    found: dict[str, list] = {}
    expected: Expected = set()
    for role, count in counts.items():
        seen = pictures if role == "train" else 4
        found[role] = [
            clean(folder, role, i, i % (count // seen) == 0, size, suffix) for i in range(count)
        ]
    for role, spoilers in (("train", SPOILERS), ("expert", EXPERT_SPOILERS)):
        lines = [i for i, row in enumerate(found[role]) if "images" not in row and i > 9]
        spread = np.random.default_rng(0).permutation(lines).tolist()
        for _ in range(copies):
            for kinds, spoil in spoilers:
                line = spread.pop()
                found[role][line] = spoil(found[role][line], folder)
                expected |= {(role, line + 1, kind) for kind in kinds}
        if role == "train":
            chosen = [i for i in range(1, 9) if "images" not in found[role][i]][:3]
            for i in chosen:
                found[role][i]["id"] = f"clean-{i}"
            _relations(found, sorted(spread)[:8], folder, expected)
    for role, name in (("train", "train"), ("eval", "test"), ("expert", "expert")):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in found[role]]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return expected
