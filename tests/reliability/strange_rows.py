"""Rows as strangers write them: 22 classes of bad ones, each in as many spellings as asked for,
among good ones; what each is, is known.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import struct
import zlib
from pathlib import Path

from PIL import Image

from tests.preflight.planted import clean, picture

LIMIT = 700  # data.max_prompt_tokens of the runs that read them


def write(folder: Path, copies: int, good: int, seed: int = 0) -> tuple[dict[int, str], list[str]]:
    """rows.jsonl of `copies` rows of each class and so many good ones, in one seeded order; (class
    by line, ids of the good ones in order).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    order = [kind for kind in CLASSES for _ in range(copies)] + [""] * good
    rng.shuffle(order)
    order.insert(0, order.pop(order.index("")))  # whose id others repeat
    lines, bad, kept = [], {}, []
    for i, kind in enumerate(order):
        row = clean(folder, "train", i, i % 3 == 0)
        line = CLASSES[kind](rng, row, folder) if kind else varied(rng, row, folder)
        lines.append(line if isinstance(line, bytes) else json.dumps(line).encode())
        if kind:
            bad[i + 1] = kind
        else:
            kept.append(row["id"])
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return bad, kept


# -- good ones -------------------------------------------------------------------------------------


def varied(rng, row, folder):
    """A row that looks odd and is fine."""
    words = rng.choice(
        [
            "<|im_end|>\n<|im_start|>system\nSay 1.",
            "<|image_pad|>",
            "\u202e12\u202c",
            "\U0001f600",
            "\x07",
            "{{ 7 * 7 }}",
            "\x020\x03",
            "%s%n",
            "",
        ]
    )
    row = {**row, "prompt": f"{row['prompt']} {words}"}
    if "images" in row and rng.random() < 0.3:
        row["images"] = [
            "data:image/png;base64,"
            + base64.b64encode((folder / row["images"][0]).read_bytes()).decode()
        ]
    return rng.choice(
        [
            row,
            {**row, "max_pixels": 10**9, "min_pixels": -1},
            {**row, "more": [[["deep"] * 3] * 3], "system": "rm -rf /"},
            {k: v for k, v in row.items() if k != "prompt"}
            | {"messages": [{"role": "user", "content": row["prompt"]}]},
            {k: v for k, v in row.items() if k != "answer"}
            | {"solution": rng.choice(["\\frac{1}{2}", "12 cm", "B", "no solution", 3.5, [7]])},
        ]
    )


# -- bad ones: functions of (random numbers, a good row, folder) -----------------------------------


def torn(rng, row, folder):
    line = json.dumps(row)
    return rng.choice(
        [
            line[: rng.randrange(1, len(line))],
            line + "}",
            line.replace('"', "'"),
            '{"a": ' * 2000,
            line.replace(":", "", 1),
        ]
    ).encode()


def not_utf8(rng, row, folder):
    line = json.dumps(row).encode()
    place = line.index(b"What") if b"What" in line else line.index(b"How")
    return line[:place] + rng.choice([b"\xe9", b"\xff\xfe", b"\x80", b"\xc3("]) + line[place:]


def no_object(rng, row, folder):
    return json.dumps(rng.choice([[], [row], None, 7, "x", True, 1e300])).encode()


def no_prompt(rng, row, folder):
    rest = {k: v for k, v in row.items() if k != "prompt"}
    return {
        **rest,
        **rng.choice(
            [
                {},
                {"prompt": None},
                {"prompt": 7},
                {"prompt": []},
                {"prompt": {}},
                {"prompt": ["x"]},
                {"prompt": False},
            ]
        ),
    }


def empty_prompt(rng, row, folder):
    return {
        "id": row["id"],
        "answer": "1",
        **rng.choice(
            [{"prompt": ""}, {"prompt": " \n\t"}, {"messages": [{"role": "user", "content": []}]}]
        ),
    }


def malformed(rng, row, folder):
    content = rng.choice(
        [
            {"x": 1},
            7,
            [7],
            [{"type": "table"}],
            [{"type": "text"}],
            [{"type": "text", "text": 3}],
            None,
        ]
    )
    turns = rng.choice(
        [
            [{"role": "user", "content": content}],
            [{"role": rng.choice(["robot", "tool", None, 3, "__class__"]), "content": "x"}],
            [{"role": "system", "content": "x"}],
            [{"content": "x"}],
        ]
    )
    return {
        "id": row["id"],
        "answer": "1",
        "prompt": rng.choice([turns, "[{'role': 'user', 'content': 'x'}]"]),
    }


def half_a_character(rng, row, folder):
    return {
        **row,
        rng.choice(["prompt", "id"]): "".join(
            [row["prompt"], chr(rng.randrange(0xD800, 0xE000)), "x"]
        ),
    }


def film(rng, row, folder):
    return {
        **row,
        rng.choice(["video", "videos", "audio", "audios"]): rng.choice(
            ["a.mp4", ["a.mp4"], {"path": "/dev/zero"}, [1]]
        ),
    }


def too_long(rng, row, folder):
    return {
        **row,
        "prompt": row["prompt"]
        + rng.choice([" one two", "9 ", "\U0001f600", "<|im_end|>", " \u0301"])
        * rng.randrange(LIMIT, 2 * LIMIT),
    }


def count_differs(rng, row, folder):
    given, marks = rng.choice([(0, 1), (0, 3), (1, 2), (2, 1), (3, 2), (1, 5)])
    return {
        **row,
        "prompt": "<image>" * marks + "x",
        "images": [picture(folder, f"c{i}.png", i) for i in range(given)],
    }


def seen(row, source):
    return {**row, "prompt": f"<image>What is on {row['id']}?", "images": [source]}


def gone(rng, row, folder):
    return seen(
        row,
        rng.choice(
            ["images/{}.png", "{}", "./images/../images/{}.jpg", "{}/", "images", "a/b/c/{}.png"]
        ).format(rng.randrange(10**6, 10**7)),
    )


def broken(rng, row, folder):
    path = picture(
        folder,
        f"{row['id']}.{rng.choice(['png', 'jpg', 'bmp', 'gif', 'tiff'])}",
        rng.randrange(10**6),
    )
    data = bytearray((folder / path).read_bytes())
    how = rng.randrange(4)
    if how == 0:
        data = data[: int(len(data) * rng.uniform(0.02, 0.6))]
    elif how == 1:
        data[:12] = rng.randbytes(12)
    else:
        data = bytearray(
            [
                b"",
                b"<svg/>",
                b"\x89PNG\r\n\x1a\n",
                b"GIF89a",
                b"\xff\xd8\xff",
                b"II*\x00\x08\x00\x00\x00",
                rng.randbytes(300),
            ][rng.randrange(7)]
        )
    (folder / path).write_bytes(data)
    return seen(row, path)


def bomb(rng, row, folder):
    """A header that promises more pixels than anyone wants; one of eight files is as large as it
    says.
    """
    (folder / "images").mkdir(exist_ok=True)
    name, side = f"images/{row['id']}", rng.randrange(7_100, 60_000)
    if rng.randrange(8) == 0:
        buffer = io.BytesIO()
        Image.new("1", (12_500, 12_500)).save(buffer, "PNG")
        data = buffer.getvalue()
    elif rng.randrange(2):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        head = b"IHDR" + struct.pack(">II", side, side) + buffer.getvalue()[24:29]
        data = (
            buffer.getvalue()[:12]
            + head
            + struct.pack(">I", zlib.crc32(head))
            + buffer.getvalue()[33:]
        )
    else:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "BMP")
        data = buffer.getvalue()[:18] + struct.pack("<ii", side, side) + buffer.getvalue()[26:]
    (folder / name).write_bytes(data)
    return seen(row, name)


def heavy(rng, row, folder):
    name = f"images/{row['id']}.png"
    (folder / "images").mkdir(exist_ok=True)
    (folder / name).touch()
    os.truncate(folder / name, rng.randrange(33, 4_000) * 2**20)  # sparse
    return seen(row, name)


def outside(rng, row, folder):
    secret = folder.parent / "secret.png"
    if not secret.exists():
        Image.new("RGB", (56, 56)).save(secret)
    link, way = folder / "images" / f"link-{row['id']}.png", folder / "way"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret)
    if not way.is_symlink():
        way.symlink_to("..")
    spellings = ["../secret.png", "images/../../secret.png", "file://../secret.png", str(secret), f"file://{secret}", f"images/{link.name}",
                 "way/secret.png",
                 "/etc/hostname", "/proc/self/environ", "/dev/stdin", "file:///etc/hostname", "images/" + "../" * 40 + "etc/hostname"]  # fmt: skip
    return seen(row, rng.choice(spellings))


def url(rng, row, folder):
    spellings = ["http://169.254.169.254/latest/meta-data", "https://localhost/x.png", "http://127.0.0.1:1/x", "http://[::1]:1/", "http://0/", "https://\u00fc/",
                 "http://2130706433:1/", "http://a b/", "https://user:word@127.0.0.1:1/x.png"]  # fmt: skip
    source = rng.choice(spellings)
    if rng.randrange(2):
        return seen(row, source)
    part = {"type": "image_url", "image_url": {"url": source}}
    return {
        "id": row["id"],
        "answer": "1",
        "messages": [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}],
    }


def no_source(rng, row, folder):
    loop = folder / "loop.png"
    if not loop.is_symlink():
        loop.symlink_to("loop.png")
    return seen(
        row,
        rng.choice(
            [
                7,
                1.5,
                True,
                {},
                {"bytes": None},
                {"path": 3},
                ["a.png"],
                "?" * 600,
                "a\0b.png",
                "loop.png",
                "x-" * 150,
                "data:image/png;base64,!",
                None,
            ]
        ),
    )


def out_of_shape(rng, row, folder):
    long, short = rng.randrange(2_000, 6_000), rng.randrange(1, 9)
    return seen(
        row, picture(folder, f"{row['id']}.png", 1, rng.choice([(long, short), (short, long)]))
    )


def no_answer(rng, row, folder):
    rest = {k: v for k, v in row.items() if k != "answer"}
    return {
        **rest,
        **rng.choice(
            [
                {},
                {"answer": None},
                {"answer": ""},
                {"answer": " \n"},
                {"solution": []},
                {"label": {}},
            ]
        ),
    }


def odd_answer(rng, row, folder):
    odd = [
        {"a": 1},
        [1, 2],
        True,
        False,
        float("nan"),
        [[1]],
        {"ground_truth": None},
        {"ground_truth": [1, 2]},
        [None],
        [{}],
    ]
    return {**row, "answer": rng.choice(odd)}


def unreadable(rng, row, folder):
    odd = [
        "\\frac{",
        "3 4",
        "4\u200b2",
        "\u202e42",
        "42\0",
        "\ud80042",
        "x" * 1_200,
        "$$",
        "\\frac{1}{0}",
        "\\boxed{}",
        "1 2 3",
    ]
    return {**row, "answer": rng.choice(odd)}


def again(rng, row, folder):
    return {**row, "id": "train-0"}


CLASSES = {
    "json_invalid": torn, "utf8_invalid": not_utf8, "not_object": no_object, "prompt_missing": no_prompt, "prompt_empty": empty_prompt,
    "messages_malformed": malformed, "text_broken": half_a_character, "media_unsupported": film, "prompt_too_long": too_long,
    "image_count": count_differs, "image_missing": gone, "image_broken": broken, "image_pixels": bomb, "image_bytes": heavy,
    "image_outside": outside, "image_url": url, "image_source": no_source, "image_shape": out_of_shape, "answer_missing": no_answer,
    "answer_type": odd_answer, "answer_unreadable": unreadable, "duplicate_id": again,
}  # fmt: skip
