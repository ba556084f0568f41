"""Rows -> Prompt: every accepted shape, and how a row that cannot be used is named."""

import json
from pathlib import Path

import pytest

from rlfr_vlm.config import DataConfig
from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.prompts import load_prompts, parse_row
from rlfr_vlm.data.stream import PromptStream
from rlfr_vlm.errors import UserError

CFG = DataConfig()


def kinds(prompt):
    return [(m["role"], [p["type"] for p in m["content"]]) for m in prompt.messages]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<image>How many?", "images": ["a.png"], "answer": "3"},
        {"problem": "<image>How many?", "images": ["a.png"], "answer": 3},
        {"question": "How many?", "image": "a.png", "solution": "3"},
        {
            "message": json.dumps([{"role": "user", "content": "<image>How many?"}]),
            "image_path": "a.png",
            "ground_truth": "3",
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "How many?"}],
                }
            ],
            "images": ["a.png"],
            "label": "3",
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.png"},
                        {"type": "text", "text": "How many?"},
                    ],
                }
            ],
            "label": "3",
        },
        {
            "conversations": [
                {"from": "human", "value": "<image>How many?"},
                {"from": "gpt", "value": "3"},
            ],
            "image": "a.png",
            "answer": "3",
        },
        {
            "prompt": [{"role": "user", "content": "<image>How many?"}],
            "images": ["a.png"],
            "reward_model": {"ground_truth": "3", "style": "rule"},
        },
        {"query": "How many?", "image_path": ["a.png"], "ground_truth": ["3"]},
        {
            "conversations": [
                {"from": "human", "value": "<image>How many?"},
                {"from": "gpt", "value": "3"},
            ],
            "image": "a.png",
        },  # VLM-R1
        {
            "conversations": [{"role": "user", "content": "<image>How many?"}],
            "answer": "3",
            "image_urls": ["file://a.png"],
        },  # MM-EUREKA
        {
            "conversations": ' [ {"role": "user", "content": "<image>How many?"}]',
            "answer": "3",
            "image_urls": ["a.png"],
        },
        {
            "message": '[\n{"role": "user", "content": [{"type": "image", "image": '
            '"file://a.png"}, {"type": "text", "text": "How many?"}]}]',
            "answer": "3",
        },
        {
            "messages": [
                {"role": "user", "content": "<image>How many?"},
                {"role": "assistant", "content": "It is 4."},
            ],  # swift
            "images": ["a.png"],
            "solution": "3",
            "videos": [],
        },
    ],
)
def test_accepted_shapes_all_give_the_same_prompt(row):
    prompt = parse_row(row, "f:1", CFG)
    assert kinds(prompt) == [("user", ["image", "text"])]
    assert prompt.messages[0]["content"][1]["text"] == "How many?"
    assert (prompt.images, prompt.answer) == (("a.png",), "3")


def test_system_and_suffix_are_added_once():
    cfg = DataConfig(system="Think.", suffix=" Box it.")
    prompt = parse_row({"prompt": "1+1?", "answer": "2"}, "f:1", cfg)
    assert [m["role"] for m in prompt.messages] == ["system", "user"]
    assert [p["text"] for p in prompt.messages[1]["content"]] == ["1+1?", " Box it."]


def test_other_columns_travel_with_the_row():
    prompt = parse_row(
        {"id": 7, "prompt": "x", "answer": "1", "level": 3, "data_source": "s"}, "f:1", CFG
    )
    assert (prompt.id, prompt.extra, prompt.data_source) == ("7", {"level": 3}, "s")


def test_the_columns_of_verl_travel_too():
    row = {
        "data_source": "math_dapo",
        "prompt": "x",
        "ability": "MATH",
        "difficulty": 3,
        "reward_model": {"ground_truth": "1"},
    }
    prompt = parse_row({**row, "extra_info": {"index": 7, "split": "train"}}, "f:1", CFG)
    assert prompt.id == "math_dapo/7"  # the index counts anew in each data source
    assert prompt.extra == {
        "ability": "MATH",
        "difficulty": 3,
        "extra_info": {"index": 7, "split": "train"},
    }
    assert parse_row({**row, "id": "own", "extra_info": {"index": 7}}, "f:1", CFG).id == "own"
    assert (
        parse_row({"prompt": "x", "answer": "1", "uuid": "u", "datasource": "d"}, "f:1", CFG).id
        == "u"
    )
    assert [
        parse_row({"prompt": "x", "answer": "1", **r}, "f:1", CFG).id
        for r in ({}, {"id": ""}, {"id": 0})
    ] == ["f:1", "f:1", "0"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x", "response": "R"},
        {"question": "x", "chosen": "R", "rejected": "no"},  # MMPR
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": [{"type": "text", "text": "R"}]},
            ]
        },
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "R"}]},
    ],
)
def test_expert_rows_in_every_shape(row):
    assert parse_row(row, "f:1", CFG, need="response").response == "R"
    assert parse_row({"prompt": "x", "answer": "1"}, "f:1", CFG).response is None


@pytest.mark.parametrize(
    "text",
    [
        "[{1, 2}, {3}] is a list of what?",
        '[{"a": 1}] has which keys?',
        '[{"a": 1}]',
        "[1, 2]",
        "[{x}",
    ],
)
def test_a_question_may_look_like_a_list(text):
    assert parse_row({"prompt": text, "answer": "1"}, "f:1", CFG).messages[0]["content"] == [
        {"type": "text", "text": text}
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"message": "[{'role': 'user', 'content': 'x'}]", "answer": "1"},
            "f:1: the prompt looks like messages, but is not JSON",
        ),
        (
            {"prompt": "x", "answer": "1", "videos": ["a.mp4"]},
            "f:1: the row has `videos`; only pictures are supported",
        ),
        ({"prompt": "x", "answer": "1", "video": {"path": "a.mp4"}}, "the row has `video`"),
        ({"prompt": "x", "answer": float("nan")}, "the answer is empty"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "3"}]},
            "the answer is empty",
        ),
        ({"prompt": "x"}, "f:1: the answer is empty or missing"),
        ({"prompt": "x", "answer": "  "}, "the answer is empty"),
        ({"prompt": "x", "answer": {"a": 1}}, "the answer is empty"),
        ({"prompt": "x", "answer": ["3", "4"]}, "the answer is empty"),  # which one?
        ({"answer": "1"}, "no prompt"),
        ({"prompt": "", "answer": "1"}, "prompt is empty"),
        (
            {"prompt": "<image><image>x", "images": ["a.png"], "answer": "1"},
            "1 images but 2 image placeholders",
        ),
        (
            {"prompt": "<image>x", "images": ["a.png", "b.png"], "answer": "1"},
            "2 images but 1 image placeholders",
        ),
        ({"prompt": "<image>x", "answer": "1"}, "0 images but 1"),
        ({"messages": [{"role": "user"}], "answer": "1"}, "needs a role"),
        (
            {"messages": [{"role": "system", "content": "x"}], "answer": "1"},
            "last message must be the user's",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}], "answer": "1"},
            "neither text nor an image",
        ),
    ],
)
def test_unusable_rows_name_themselves(row, message):
    with pytest.raises(RowError, match=message):
        parse_row(row, "f:1", CFG)


def write(folder, *lines):
    path = folder / "rows.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return str(path)


GOOD = [{"id": str(i), "prompt": f"{i}?", "answer": str(i)} for i in range(8)]


def test_stop_names_the_first_bad_row(tmp_path):
    path = write(tmp_path, GOOD[0], "{torn", {"prompt": "x"})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not JSON"):
        load_prompts(path, CFG, BadRows(CFG))


def test_skip_records_and_counts(tmp_path):
    cfg = DataConfig(on_bad_row="skip", max_bad_frac=0.5)
    path = write(
        tmp_path,
        *GOOD,
        "[]",
        {"id": "3", "prompt": "again", "answer": "1"},
        {"prompt": "x", "answer": ""},
    )
    bad = BadRows(cfg, tmp_path / "bad_rows.jsonl")
    assert [p.id for p in load_prompts(path, cfg, bad)] == [str(i) for i in range(8)]
    recorded = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in recorded] == ["schema", "duplicate_id", "answer"]
    assert "rows.jsonl:4" in recorded[1]["reason"]


def test_a_row_is_named_by_its_path_and_numbered_wherever_its_file_lies(tmp_path):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        path = write(folder, {"prompt": "x", "answer": "1"})
        found.append(load_prompts(path, CFG, BadRows(CFG))[0])
        path = write(folder, {"prompt": "x"})
        with pytest.raises(UserError, match=f"{folder.name}/rows.jsonl:1: the answer"):
            load_prompts(path, CFG, BadRows(CFG))
    assert [p.id for p in found] == ["rows.jsonl:1"] * 2
    assert [p.origin for p in found] == [f"{tmp_path}/{folder}/rows.jsonl:1" for folder in "ab"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_are_counted_as_an_editor_counts_them(tmp_path, newline, mark):
    """With blank lines, either line end, a byte order mark, and Unicode line separators inside
    strings.
    """
    lines = [
        '{"prompt": "a\u2028b\u2029c\x85d", "answer": "1"}',
        "",
        "  ",
        '{"prompt": "é", "answer": "2"}',
        "{",
        "\t",
        '"x"',
        "[" * 100_000,
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(mark + newline.join(lines).encode())
    cfg = DataConfig(on_bad_row="skip", max_bad_frac=1.0)
    bad = BadRows(cfg)
    prompts = load_prompts(str(path), cfg, bad)
    assert [(Path(p.origin).name, p.messages[0]["content"][0]["text"]) for p in prompts] == [
        ("rows.jsonl:1", "a\u2028b\u2029c\x85d"),
        ("rows.jsonl:4", "é"),
    ]
    assert [r.id for r in bad.rows] == [f"{path}:{line}" for line in (5, 7, 8)]


def test_a_byte_order_mark_alone_is_a_blank_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf\n{"prompt": "x", "answer": "1"}')
    assert (
        load_prompts(str(tmp_path / "rows.jsonl"), CFG, BadRows(CFG))[0].origin
        == f"{tmp_path}/rows.jsonl:2"
    )


def test_too_many_bad_rows_stop(tmp_path):
    cfg = DataConfig(on_bad_row="skip", max_bad_frac=0.1)
    with pytest.raises(UserError, match=r"2 bad rows of 10 exceed data\.max_bad_frac=0\.1"):
        load_prompts(write(tmp_path, *GOOD, {}, {}), cfg, BadRows(cfg))


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "rows.arrow"])
def test_other_formats(tmp_path, name):
    path = tmp_path / name
    if name.endswith("json"):
        path.write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        table = pa.Table.from_pylist(
            [{**row, "images": [{"bytes": b"png", "path": None}]} for row in GOOD]
        )
        if name.endswith("parquet"):
            parquet.write_table(table, path)
        else:
            with (
                pa.OSFile(str(path), "wb") as file,
                pa.ipc.new_stream(file, table.schema) as stream,
            ):
                stream.write_table(table)
    prompts = load_prompts(str(path), CFG, BadRows(CFG))
    assert [p.origin for p in prompts] == [f"{tmp_path}/{name}[{i}]" for i in range(8)]
    assert name.endswith("json") or prompts[0].images == ({"bytes": b"png", "path": None},)


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "rows.arrow"])
def test_broken_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"[[[[ PAR1")
    with pytest.raises(UserError, match=rf"{name} is not"):
        load_prompts(str(tmp_path / name), CFG, BadRows(CFG))


@pytest.mark.parametrize("name", ["none.jsonl", "rows.csv", "rows.py", "rows.pkl", "folder"])
def test_files_that_cannot_be_read(tmp_path, name):
    """Rows are data: no script is imported, nothing is unpickled."""
    (tmp_path / "folder").mkdir()
    for file in ("rows.csv", "rows.py", "rows.pkl", "folder/folder.py"):
        (tmp_path / file).write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    message = "does not exist" if name == "none.jsonl" else "expected .jsonl"
    with pytest.raises(UserError, match=message):
        load_prompts(str(tmp_path / name), CFG, BadRows(CFG))
    assert not (tmp_path / "mark").exists()


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no rows"):
        load_prompts(write(tmp_path, ""), CFG, BadRows(CFG))


def test_the_stream_covers_every_row_each_epoch_and_resumes():
    stream = PromptStream(10, seed=3, shuffle=True)
    epochs = [[stream.draw() for _ in range(10)] for _ in range(2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = PromptStream(10, seed=3, shuffle=True)
    again.position = 7
    assert [again.draw() for _ in range(5)] == (epochs[0] + epochs[1])[7:12]


def test_a_later_look_is_at_fewer_rows_and_the_share_is_still_of_all():
    """The reader sees 100 rows, the grader the 95 that it left, the renderer what those two left."""
    cfg = DataConfig(on_bad_row="skip", max_bad_frac=0.1)
    bad = BadRows(cfg)
    for i in range(10):
        bad.add(str(i), RowError("image", f"row {i}"), 100 if i < 5 else 95)
    with pytest.raises(UserError, match="11 bad rows of 100 exceed"):
        bad.add("10", RowError("image", "row 10"), 90)


def test_messages_hold_nothing_that_steers_a_terminal_or_cannot_be_encoded(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "x", "answer": "1", "id": "\x1b[2J\u202e\ud800"},
        {"prompt": "x", "answer": "1", "id": "\x1b[2J"},
    )
    cfg = DataConfig(on_bad_row="skip", max_bad_frac=1.0)
    bad = BadRows(cfg)
    load_prompts(path, cfg, bad)
    assert "half a character" in bad.rows[0].reason
    path = write(tmp_path, *[{"prompt": "x", "answer": "1", "id": "\x1b[2J\u202eé"}] * 2)
    with pytest.raises(UserError, match=r"id `\\x1b\[2J\\u202eé` was already used"):
        load_prompts(path, CFG, BadRows(CFG))


def test_rows_that_are_nested_too_deep_for_what_walks_over_them(tmp_path):
    deep = '{"prompt": "x", "answer": "1", "more": ' + "[" * 99 + "]" * 99 + "}"
    deeper = deep.replace("[]", "[[]]")
    (tmp_path / "rows.json").write_text(f"[{deep}, {deeper}]")
    for source in (write(tmp_path, deep, deeper), str(tmp_path / "rows.json")):
        with pytest.raises(UserError, match=r"(:2|\[1\]): nested more than 100 deep"):
            load_prompts(source, CFG, BadRows(CFG))


def test_a_limit_takes_the_first_rows_good_or_bad(tmp_path):
    rows = "".join(json.dumps({"prompt": f"{i}?", "answer": "1"}) + "\n" for i in range(5))
    cfg = DataConfig(on_bad_row="skip", max_bad_frac=0.5)
    bad = BadRows(cfg)
    found = load_prompts(write(tmp_path, '{"prompt": "x"}\n' + rows), cfg, bad, limit=3)
    assert ([p.messages[0]["content"][0]["text"] for p in found], len(bad.rows)) == (
        ["0?", "1?"],
        1,
    )


def test_no_two_seeds_share_an_order():
    """Epochs of one seed are not those of the next, moved on by one."""
    orders = set()
    for seed in range(4):
        stream = PromptStream(20, seed=seed, shuffle=True)
        orders |= {tuple(stream.draw() for _ in range(20)) for _ in range(4)}
    assert len(orders) == 16
