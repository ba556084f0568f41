"""Published data sets, each in its own schema, become rows that the loader reads; what cannot be
used is named, counted and written down.
"""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from rlfr_vlm.config import DataConfig
from rlfr_vlm.data.bad_rows import BadRows
from rlfr_vlm.data.images import open_image
from rlfr_vlm.data.prompts import load_prompts

SPEC = importlib.util.spec_from_file_location(
    "published", Path(__file__).parents[2] / "data" / "published.py"
)
published = sys.modules["published"] = importlib.util.module_from_spec(
    SPEC
)  # dataclasses look their module up
SPEC.loader.exec_module(published)

CFG = DataConfig()


def picture(seed, kind="PNG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, (40 + seed, 30), (20 * seed, 200, 90, 128)[: len(mode)]).save(
        buffer, kind, **options
    )
    return buffer.getvalue()


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def write_picture(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def run(name, out, source, *options):
    return published.main([name, str(out), "--source", str(source), *options])


def load(out, role="rl"):
    """What a run reads: the prompts, and each picture opened from where the row names it."""
    path = out / ("train.jsonl" if role == "rl" else "expert.jsonl")
    prompts = load_prompts(
        str(path), CFG, BadRows(CFG), need="answer" if role == "rl" else "response"
    )
    sizes = [[open_image(image, [out]).size for image in prompt.images] for prompt in prompts]
    return prompts, sizes


def question(prompt):
    return "".join(
        "<image>" if p["type"] == "image" else p["text"] for p in prompt.messages[-1]["content"]
    )


# --- the schemas ----------------------------------------------------------------------------------


def test_rlfr_lm(tmp_path):
    """Level 3 to 5 of MATH as `datasets.save_to_disk` writes it, and OpenR1-Math in LLaMA-Factory's
    shapes.
    """
    rows = [
        {"problem": f"What is ${i}+1$?", "answer": str(i + 1), "level": "Level 4"} for i in range(3)
    ]
    folder = tmp_path / "source" / "math_lvl3to5_8k"
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    (folder / "state.json").write_text('{"_split": "train"}')
    alpaca = {
        "instruction": "What is 2+2?",
        "input": "",
        "output": r"<think>easy</think> \boxed{4}",
        "system": "Think.",
    }
    turns = {
        "conversations": [
            {"from": "human", "value": "What is 3+3?"},
            {"from": "gpt", "value": r"\boxed{6}"},
        ]
    }
    (tmp_path / "source" / "openr1_math_default.json").write_text(json.dumps([alpaca, turns]))
    (tmp_path / "source" / "dataset_info.json").write_text(
        '{"openr1_math_default": {"file_name": "openr1_math_default.json"}}'
    )

    assert run("rlfr-lm", tmp_path / "out", tmp_path / "source") == 0
    prompts, _ = load(tmp_path / "out")
    assert [(question(p), p.answer) for p in prompts] == [(r["problem"], r["answer"]) for r in rows]
    assert {p.data_source for p in prompts} == {"JingHaoZ/RLFR-Dataset-LM"}

    assert run("rlfr-lm", tmp_path / "out", tmp_path / "source", "--role", "expert") == 0
    prompts, _ = load(tmp_path / "out", "expert")
    assert [(question(p), p.response) for p in prompts] == [
        ("What is 2+2?", alpaca["output"]),
        ("What is 3+3?", r"\boxed{6}"),
    ]
    assert [[m["role"] for m in p.messages] for p in prompts] == [["system", "user"], ["user"]]


def test_rlfr_vlm(tmp_path):
    source = tmp_path / "source"
    for i in range(2):
        write_picture(source / "MM-Eureka" / "images" / f"{i}.png", picture(i))
    rows = [
        {"prompt": f"How long is side {i}?", "answer": f"{i}", "images": [f"images/{i}.png"]}
        for i in range(2)
    ]
    write_jsonl(source / "MM-Eureka" / "mmeureka_prompt.jsonl", rows)
    turns = [
        {"role": "user", "content": "<image>Find x."},
        {"role": "assistant", "content": "x = 3"},
    ]
    write_jsonl(
        source / "MMPR-v1.1" / "MMPRv1.1_Math.jsonl",
        [{"messages": turns, "images": ["MM-Eureka/images/0.png"]}],
    )

    assert run("rlfr-vlm", tmp_path / "out", source) == 0
    prompts, sizes = load(tmp_path / "out")
    assert [(question(p), p.answer) for p in prompts] == [
        ("<image>How long is side 0?", "0"),
        ("<image>How long is side 1?", "1"),
    ]
    assert sizes == [[(40, 30)], [(41, 30)]]

    assert run("rlfr-vlm", tmp_path / "out", source, "--role", "expert") == 0
    prompts, sizes = load(tmp_path / "out", "expert")
    assert [(question(p), p.response) for p in prompts] == [
        ("<image>Find x.", "x = 3")
    ] and sizes == [[(40, 30)]]


def openr1_row(number, **changes):
    row = {
        "problem": f"What is {number} squared?",
        "solution": f"It is {number**2}.",
        "answer": str(number**2),
        "problem_type": "Algebra",
        "source": "olympiads",
        "uuid": f"u{number}",
        "is_reasoning_complete": [True, True],
        "generations": ["<think>a</think> first", "<think>b</think> second"],
        "correctness_math_verify": [True, True],
        "correctness_llama": None,
        "finish_reasons": ["stop", "stop"],
    }
    return {
        **row,
        "messages": [
            {"role": "user", "content": row["problem"]},
            {"role": "assistant", "content": "first"},
        ],
        **changes,
    }


def test_openr1_math(tmp_path):
    rows = [
        openr1_row(1),
        openr1_row(2, correctness_math_verify=[False, True]),
        openr1_row(3, correctness_math_verify=[False, False], correctness_llama=[False, True]),
        openr1_row(4, is_reasoning_complete=[False, False]),
        openr1_row(5, correctness_math_verify=[True, True], is_reasoning_complete=[False, True]),
        openr1_row(6, correctness_math_verify=None),
    ]
    for folder in ("data", "extended"):
        (tmp_path / "source" / folder).mkdir(parents=True)
        parquet.write_table(
            pa.Table.from_pylist(rows),
            tmp_path / "source" / folder / "train-00000-of-00001.parquet",
        )
    assert run("openr1-math", tmp_path / "out", tmp_path / "source") == 0
    prompts, _ = load(tmp_path / "out", "expert")
    first, second = rows[0]["generations"]
    assert [p.response for p in prompts] == [
        first,
        second,
        second,
        "It is 16.",
        second,
        "It is 36.",
    ]
    assert [p.id for p in prompts] == [f"u{i}" for i in range(1, 7)]  # `extended` was left alone
    assert (
        prompts[0].data_source == "open-r1/OpenR1-Math-220k/olympiads"
        and question(prompts[0]) == "What is 1 squared?"
    )

    assert (
        run("openr1-math", tmp_path / "out", tmp_path / "source", "--role", "rl", "--limit", "2")
        == 0
    )
    assert [(question(p), p.answer) for p in load(tmp_path / "out")[0]] == [
        ("What is 1 squared?", "1"),
        ("What is 2 squared?", "4"),
    ]


def test_openr1_without_any_solution_is_named(tmp_path, capsys):
    rows = [openr1_row(1), openr1_row(2, correctness_math_verify=[False, False], solution="")]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert run("openr1-math", tmp_path / "out", source) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {tmp_path}/rows.jsonl:2: none of its 2 generations is verified and complete, and "
        "it has no solution (--on-bad-row skip"
    )
    assert not (tmp_path / "out" / "expert.jsonl").exists()


@pytest.mark.parametrize("prefix", ["", "MMPR-v1.2/"])
def test_mmpr(tmp_path, prefix, capsys):
    source = tmp_path / "copy"
    for i in range(3):
        write_picture(source / "images" / "geo" / f"{i}.jpg", picture(i, "JPEG"))
    rows = [
        {
            "image": "0.jpg",
            "question": "<image>\nFind the area.",
            "chosen": "It is 6.",
            "rejected": "It is 7.",
        },
        {
            "image": "0.jpg",
            "question": "<image>\nFind the area.",
            "chosen": "It is 6.",
            "rejected": "It is 8.",
        },
        {
            "image": ["1.jpg", "2.jpg"],
            "question": "Image-1: <image>\nImage-2: <image>\nWhich?",
            "chosen": "The first.",
            "rejected": "No.",
        },
    ]
    write_jsonl(source / "annotations" / "geo.jsonl", rows)
    meta = {
        "geo_en": {
            "root": f"{prefix}images/geo",
            "annotation": f"{prefix}annotations/geo.jsonl",
            "repeat_time": 1,
            "length": 3,
        },
        "private": {
            "root": f"{prefix}images/private",
            "annotation": f"{prefix}annotations/private.jsonl",
        },
    }
    (source / "meta.json").write_text(json.dumps(meta))

    assert run("mmpr", tmp_path / "out", source) == 2
    assert (
        f"meta.json:private: its annotation {prefix}annotations/private.jsonl is missing"
        in capsys.readouterr().err
    )
    assert run("mmpr", tmp_path / "out", source, "--only", "^geo") == 0
    assert "2 rows, 1 repeats dropped, 0 bad rows" in capsys.readouterr().out
    prompts, sizes = load(tmp_path / "out", "expert")
    assert [p.response for p in prompts] == ["It is 6.", "The first."]
    assert sizes == [[(40, 30)], [(41, 30), (42, 30)]]
    assert question(prompts[1]) == "Image-1: <image>\nImage-2: <image>\nWhich?"
    assert prompts[0].data_source == "OpenGVLab/MMPR-v1.2/geo_en"


def test_mmpr_stays_in_its_folder(tmp_path, capsys):
    write_jsonl(tmp_path / "private.jsonl", [{"question": "secret?", "chosen": "yes"}])
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "meta.json").write_text(
        json.dumps({"x": {"root": "/", "annotation": "../private.jsonl"}})
    )
    assert run("mmpr", tmp_path / "out", tmp_path / "copy") == 2
    assert "its annotation ../private.jsonl is missing" in capsys.readouterr().err


def test_mm_eureka(tmp_path):
    source = tmp_path / "source"
    for i in range(3):
        write_picture(source / "K12" / f"{i}.png", picture(i))
    turns = [
        {"role": "system", "content": "Answer in <answer> tags."},
        {"role": "user", "content": "<image>\nHow many?"},
    ]
    message = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": f"file://{source}/K12/1.png"},
                {"type": "text", "text": "And now?"},
            ],
        }
    ]
    rows = [
        {"id": "0", "conversations": turns, "answer": "$3$", "image_urls": ["K12/0.png"]},
        {"id": "1", "message": json.dumps(message), "answer": "4"},
        {
            "id": "2",
            "conversations": json.dumps(turns),
            "answer": "5",
            "image_urls": [f"file://{source}/K12/2.png"],
        },
    ]
    write_jsonl(source / "dataset.jsonl", rows)
    assert run("mm-eureka", tmp_path / "out", source) == 0
    prompts, sizes = load(tmp_path / "out")
    assert [(p.id, question(p), p.answer) for p in prompts] == [
        ("0", "<image>\nHow many?", "$3$"),
        ("1", "<image>And now?", "4"),
        ("2", "<image>\nHow many?", "5"),
    ]
    assert [len(p.messages) for p in prompts] == [2, 1, 2] and sizes == [
        [(40, 30)],
        [(41, 30)],
        [(42, 30)],
    ]


def test_dapo_math_repeats_and_contradictions(tmp_path, capsys):
    def row(text, answer, index):
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": text, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": index},
        }

    rows = [
        row("What is 2+2?", "4", "a"),
        row("What is 3+3?", "6", "b"),
        row("What is 3+3?", "7", "c"),
    ] * 100
    (tmp_path / "source" / "data").mkdir(parents=True)
    parquet.write_table(
        pa.Table.from_pylist(rows), tmp_path / "source" / "data" / "dapo-math-17k.parquet"
    )
    assert run("dapo-math", tmp_path / "out", tmp_path / "source") == 2
    place = "data/dapo-math-17k.parquet"
    assert (
        f"error: {place}[2]: the answer is '7', but '6' to the same question at {place}[1]"
        in capsys.readouterr().err
    )
    assert run("dapo-math", tmp_path / "out", tmp_path / "source", "--on-bad-row", "skip") == 0
    assert (
        "2 rows, 297 repeats dropped, 1 bad rows left out (1 conflict; " in capsys.readouterr().out
    )
    prompts, _ = load(tmp_path / "out")
    assert [(p.id, question(p), p.answer, p.data_source) for p in prompts] == [
        ("math_dapo/a", "What is 2+2?", "4", "math_dapo"),
        ("math_dapo/b", "What is 3+3?", "6", "math_dapo"),
    ]


ALPHA = picture(3, mode="RGBA")
ANIMATED = picture(5, "GIF", save_all=True, append_images=[Image.new("RGB", (45, 30), (1, 2, 3))])


def geometry_rows():
    return [
        {
            "images": [{"bytes": data, "path": None} for data in pictures],
            "problem": "<image>" * len(pictures) + f"Find y{i}.",
            "answer": str(i),
            "id": 7,  # twice the same, as folders of two splits may be numbered
            "choices": ["1", "2", "3", "4"],
            "ground_truth": "B",
        }
        for i, pictures in enumerate([[ALPHA], [ANIMATED, picture(6, "JPEG")]])
    ]


def test_geometry3k_keeps_the_bytes_of_its_pictures(tmp_path):
    (tmp_path / "source" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = geometry_rows() if split == "train" else geometry_rows()[:1]
        parquet.write_table(
            pa.Table.from_pylist(rows),
            tmp_path / "source" / "data" / f"{split}-00000-of-00001.parquet",
        )
    assert run("geometry3k", tmp_path / "out", tmp_path / "source") == 0
    prompts, sizes = load(tmp_path / "out")
    assert [(p.id, question(p), p.answer) for p in prompts] == [
        ("7", "<image>Find y0.", "0"),
        ("7#1", "<image><image>Find y1.", "1"),
    ]
    assert sizes == [[(43, 30)], [(45, 30), (46, 30)]]
    assert [Path(i).suffix for p in prompts for i in p.images] == [".png", ".gif", ".jpeg"]
    assert [(tmp_path / "out" / i).read_bytes() for p in prompts for i in p.images][:2] == [
        ALPHA,
        ANIMATED,
    ]

    assert run("geometry3k", tmp_path / "out", tmp_path / "source", "--split", "test") == 0
    assert len((tmp_path / "out" / "test.jsonl").read_text().splitlines()) == 1


def test_the_hub_is_read_through_datasets(tmp_path, monkeypatch, capsys):
    import datasets

    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    rows = [{key: row[key] for key in features} for row in geometry_rows()]
    write_picture(tmp_path / "apart.png", picture(1))
    rows.append(
        {"images": [str(tmp_path / "apart.png")], "problem": "<image>?", "answer": "9"}
    )  # a picture that the client keeps as a file
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list(rows, features=features),
    )
    assert published.main(["geometry3k", str(tmp_path / "out")]) == 0
    assert asked == [(("hiyouga/geometry3k", None), {"split": "train"})]
    prompts, sizes = load(tmp_path / "out")
    assert [p.answer for p in prompts] == ["0", "1", "9"] and sizes[2] == [(41, 30)]
    assert (tmp_path / "out" / prompts[0].images[0]).read_bytes() == ALPHA

    assert published.main(["mmpr", str(tmp_path / "out")]) == 2
    assert (
        "hf download OpenGVLab/MMPR-v1.2 --repo-type dataset --local-dir DIR"
        in capsys.readouterr().err
    )
    assert len(asked) == 1


# --- rows that cannot be used ---------------------------------------------------------------------

BAD = {  # line -> the row, its class, and what is said of it
    2: ('{"prompt": "torn', "schema", "not JSON"),
    3: (
        {"prompt": "<image>x", "answer": "1", "images": ["gone.png"]},
        "image",
        "gone.png is missing",
    ),
    5: (
        {"prompt": "<image>x", "answer": "1", "images": ["broken.png"]},
        "image",
        "broken.png is not a readable picture",
    ),
    6: (
        {"prompt": "<image>x", "answer": "1", "images": ["/etc/hostname"]},
        "image",
        "lies outside",
    ),
    7: (
        {"prompt": "<image><image>x", "answer": "1", "images": ["ok.png"]},
        "image_count",
        "1 images but 2 image placeholders",
    ),
    8: ({"prompt": "x", "answer": ""}, "answer", "the answer is empty"),
    9: ({"prompt": " ", "answer": "1"}, "schema", "the prompt is empty"),
    10: ({"prompt": "x", "answer": "1", "videos": ["a.mp4"]}, "media", "the row has `videos`"),
    11: ("[]", "schema", "not a JSON object"),
    12: (
        {"prompt": "good?", "answer": "2"},
        "conflict",
        "the answer is '2', but '1' to the same question at mmeureka_prompt.jsonl:1",
    ),
}


@pytest.fixture
def bad_source(tmp_path):
    folder = tmp_path / "source"
    write_picture(folder / "ok.png", picture(0))
    write_picture(folder / "broken.png", picture(0)[:60])
    lines = {
        1: {"prompt": "good?", "answer": "1"},
        4: "",
        13: {"prompt": "<image>last", "answer": "3", "images": ["ok.png"]},
    }
    lines |= {number: row for number, (row, _, _) in BAD.items()}
    write_jsonl(folder / "mmeureka_prompt.jsonl", [lines[i] for i in sorted(lines)])
    return folder


def test_skipped_rows_are_named_with_file_line_and_reason_and_counted(tmp_path, bad_source, capsys):
    for _ in range(2):  # the record is of this run alone
        assert run("rlfr-vlm", tmp_path / "out", bad_source, "--on-bad-row", "skip") == 0
    out = capsys.readouterr().out.splitlines()[-1]
    assert (
        "2 rows, 0 repeats dropped, 10 bad rows left out (3 schema, 3 image, 1 image_count, 1 "
        "answer, 1 media, 1 conflict; " in out
    )
    recorded = [
        json.loads(line)
        for line in (tmp_path / "out" / "bad_rows_train.jsonl").read_text().splitlines()
    ]
    assert [(r["id"], r["kind"]) for r in recorded] == [
        (f"mmeureka_prompt.jsonl:{n}", kind) for n, (_, kind, _) in BAD.items()
    ]
    for row, (number, (_, _, reason)) in zip(recorded, BAD.items(), strict=True):
        assert (
            row["reason"].startswith(f"mmeureka_prompt.jsonl:{number}: ")
            and reason in row["reason"]
        )
    assert [p.answer for p in load(tmp_path / "out")[0]] == ["1", "3"]


@pytest.mark.parametrize("number", BAD)
def test_the_first_bad_row_stops_and_nothing_half_written_stays(
    tmp_path, bad_source, capsys, number
):
    file = bad_source / "mmeureka_prompt.jsonl"
    kept = [
        line if i in (1, number) else "" for i, line in enumerate(file.read_text().split("\n"), 1)
    ]
    file.write_text("\n".join(kept))
    assert run("rlfr-vlm", tmp_path / "out", bad_source) == 2
    assert capsys.readouterr().err.startswith(f"error: mmeureka_prompt.jsonl:{number}: ")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["images"]


def test_a_column_of_an_unexpected_type_is_a_bad_row(tmp_path, capsys):
    source = write_jsonl(
        tmp_path / "rows.jsonl", [openr1_row(1), openr1_row(2, generations=[1, 2])]
    )
    assert run("openr1-math", tmp_path / "out", source) == 2
    assert "rows.jsonl:2: not of this data set's schema" in capsys.readouterr().err


@pytest.mark.parametrize(
    "column",
    ["generations", "is_reasoning_complete", "correctness_math_verify", "correctness_llama"],
)
def test_a_list_encoded_as_text_is_no_list(tmp_path, capsys, column):
    """Its single characters would be taken for responses and verdicts."""
    encoded = json.dumps(openr1_row(1)[column] or [True, True])
    source = write_jsonl(tmp_path / "rows.jsonl", [openr1_row(1, **{column: encoded})])
    assert run("openr1-math", tmp_path / "out", source) == 2
    assert f"rows.jsonl:1: {column} is str, not a list" in capsys.readouterr().err
    assert not (tmp_path / "out" / "expert.jsonl").exists()


def test_a_verdict_as_text_is_none(tmp_path):
    rows = [
        openr1_row(1, correctness_math_verify=["False", "True"]),
        openr1_row(2, is_reasoning_complete=["False", "True"]),
    ]
    assert run("openr1-math", tmp_path / "out", write_jsonl(tmp_path / "rows.jsonl", rows)) == 0
    assert [p.response for p in load(tmp_path / "out", "expert")[0]] == ["It is 1.", "It is 4."]


def test_each_file_keeps_its_own_record_and_names_its_rows_by_path(tmp_path, capsys):
    for folder in ("a", "b"):
        write_jsonl(
            tmp_path / "source" / folder / "openr1_lvl3to5.jsonl",
            [openr1_row(folder == "a", answer=""), openr1_row(3)],
        )
    for role in ("rl", "expert"):
        assert (
            run(
                "rlfr-lm",
                tmp_path / "out",
                tmp_path / "source",
                "--role",
                role,
                "--on-bad-row",
                "skip",
            )
            == 0
        )
    records = {path.name: path.read_text() for path in (tmp_path / "out").glob("bad_rows_*")}
    assert list(records) == ["bad_rows_train.jsonl"]
    assert [json.loads(line)["id"] for line in records["bad_rows_train.jsonl"].splitlines()] == [
        "a/openr1_lvl3to5.jsonl:1",
        "b/openr1_lvl3to5.jsonl:1",
    ]


def test_messages_lead_on_in_this_programs_words(tmp_path, capsys):
    images = ["/etc/hostname", "http://localhost/x.png", "gone.png", "broken.png"]
    rows = [{"prompt": "<image>x", "answer": "1", "images": [image]} for image in images] + [
        {"prompt": "good", "answer": "1"}
    ]
    write_picture(tmp_path / "source/broken.png", b"no picture")
    write_jsonl(tmp_path / "source/rows.jsonl", rows)
    assert run("mm-eureka", tmp_path / "out", tmp_path / "source", "--on-bad-row", "skip") == 0
    reasons = [
        json.loads(line)["reason"]
        for line in (tmp_path / "out/bad_rows_train.jsonl").read_text().splitlines()
    ]
    assert [r.partition(": ")[2] for r in reasons] == [
        f"/etc/hostname lies outside {tmp_path}/source: name its folder with --media-dir",
        "http://localhost/x.png is a URL: download the pictures first, and name files",
        f"gone.png is missing (searched in {tmp_path}/source)",
        "broken.png is not a readable picture",
    ]


def test_no_arguments_print_the_names(capsys):
    assert published.main([]) == 2
    assert all(f"  {name} " in capsys.readouterr().err for name in ["rlfr-lm"]) and set(
        published.RECIPES
    ) >= {"mmpr"}


@pytest.mark.parametrize("limit", ["0", "-1", "x"])
def test_a_limit_is_one_row_or_more(tmp_path, capsys, limit):
    with pytest.raises(SystemExit) as exited:
        run("dapo-math", tmp_path / "out", tmp_path, "--limit", limit)
    assert exited.value.code == 2
    assert "1 or more" in capsys.readouterr().err or limit == "-1"


def test_a_place_that_cannot_be_written_to_stops_with_one_line(tmp_path, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "x", "answer": "1"}])
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/below"):
        assert run("dapo-math", place, source) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "file" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dapo-math", "OUT", "--source", "none.jsonl"], "does not exist"),
        (
            ["dapo-math", "OUT", "--role", "expert"],
            "dapo-math has rows for --role rl, not for expert",
        ),
        (
            ["rlfr-lm", "OUT", "--source", "SOURCE"],
            "of the files there (notes.json) none matches `lvl3to5`; see --only",
        ),
        (["dapo-math", "OUT", "--source", "SOURCE"], "no usable row"),
        (["mmpr", "OUT", "--source", "META"], "expected entries with annotation and root"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, capsys, arguments, message):
    for name, content in (("SOURCE/notes.json", "[]"), ("META/meta.json", '{"a": 1}')):
        write_picture(tmp_path / name, content.encode())
    places = {"OUT": tmp_path / "OUT", "SOURCE": tmp_path / "SOURCE", "META": tmp_path / "META"}
    assert published.main([str(places.get(a, a)) for a in arguments]) == 2
    assert message in capsys.readouterr().err
