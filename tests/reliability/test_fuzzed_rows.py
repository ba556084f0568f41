"""Rows of strangers and their pictures, fuzzed: a RowError that names its kind, or a prompt that
everything behind the reader can rely on.

Each property holds for a few examples in the fast lane and for thousands under the marker
`reliability`.
"""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from rlfr_vlm.config import DataConfig, load_config
from rlfr_vlm.data.bad_rows import UNPRINTABLE, BadRows, RowError
from rlfr_vlm.data.images import ImageError, open_header, open_image
from rlfr_vlm.data.prompts import COLUMNS, LONE_SURROGATE, UNSUPPORTED, load_prompts, read_prompt
from rlfr_vlm.data.render import Renderer, special_tokens
from rlfr_vlm.data.rows import read_rows
from rlfr_vlm.errors import UserError
from rlfr_vlm.models.policy import Policy
from rlfr_vlm.preflight.examine import Examiner
from rlfr_vlm.preflight.facts import Task
from rlfr_vlm.preflight.kinds import KINDS
from tests.reliability.fuzzing import CORPUS, SCALARS, TEXTS, TREES, run
from tests.runs import ROOT

CFG = DataConfig()
CFG_ALL = load_config(None, ("output_dir=.", "model.path=none"))

# -- rows ------------------------------------------------------------------------------------------

NAMES = [
    *dict.fromkeys(name for names in COLUMNS.values() for name in names),
    *UNSUPPORTED,
    "extra_info",
    "max_pixels",
    "imgaes",
]
PARTS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image", "image_url", "video", None]),
        "text": TEXTS,
        "image": SCALARS,
        "url": TEXTS,
        "image_url": st.one_of(TEXTS, st.fixed_dictionaries({"url": SCALARS})),
    },
)
TURNS = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", None, 3]),
        "from": st.sampled_from(["human", "gpt"]),
        "content": st.one_of(SCALARS, st.lists(PARTS, max_size=3)),
        "value": TEXTS,
    },
)
ROWS = st.one_of(
    st.dictionaries(
        st.sampled_from(NAMES), st.one_of(TEXTS, TREES, st.lists(TURNS, max_size=3)), max_size=6
    ),
    st.fixed_dictionaries(
        {"prompt": st.one_of(TEXTS, st.lists(TURNS, min_size=1, max_size=3)), "answer": TREES},
        optional={"images": TREES, "id": TREES},
    ),
)
LINES = st.one_of(
    ROWS.map(lambda row: json.dumps(row).encode()),
    st.tuples(ROWS, st.integers(0, 400)).map(lambda pair: json.dumps(pair[0]).encode()[: pair[1]]),
    ROWS.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")),
    st.binary(max_size=60),
    st.integers(1, 3000).map(
        lambda depth: (
            b'{"prompt": "x", "answer": "1", "more": ' + b"[" * depth + b"]" * depth + b"}"
        )
    ),
).map(lambda line: line.replace(b"\n", b" "))


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    cfg = load_config(
        None, ("output_dir=.", f"model.path={ROOT / 'rlfr_vlm/demo/tiny_vlm'}", "model.device=cpu")
    )
    return Renderer(
        Policy(cfg.model, weights=False), CFG, str(tmp_path_factory.mktemp("fuzz") / "rows.jsonl")
    )


def check_prompt(prompt, need):
    """What everything behind the reader relies on."""
    assert prompt.id and isinstance(prompt.id, str) and prompt.messages[-1]["role"] == "user"
    assert {m["role"] for m in prompt.messages} <= {"user", "assistant", "system"}
    parts = [part for m in prompt.messages for part in m["content"]]
    assert sum(part["type"] == "image" for part in parts) == len(prompt.images)
    assert all(
        part.keys() == ({"type"} if part["type"] == "image" else {"type", "text"}) for part in parts
    )
    assert not any(LONE_SURROGATE.search(part["text"]) for part in parts if part["type"] == "text")
    assert prompt.answer.strip() if need == "answer" else prompt.response.strip()


def check_tokens(prompt, renderer):
    """However its author words it, a prompt brings the template's special tokens and one image
    token per picture, and no others.
    """
    plain = [
        {
            **m,
            "content": [
                p if p["type"] == "image" else {"type": "text", "text": "x"} for p in m["content"]
            ],
        }
        for m in prompt.messages
    ]
    special = set(renderer.tokenizer.convert_tokens_to_ids(special_tokens(renderer.tokenizer)))
    found = [
        [token for token in renderer._tokenize(messages) if token in special]
        for messages in (prompt.messages, plain)
    ]
    assert found[0] == found[1]
    assert found[0].count(renderer.policy.image_token_id) == len(prompt.images)


def row_checker(folder, renderer):
    examiners = {
        need: Examiner(CFG_ALL, str(folder / "rows.jsonl"), role, None)
        for need, role in (("answer", "train"), ("response", "expert"))
    }

    def check(line):
        (folder / "rows.jsonl").write_bytes(line + b"\n")
        rows = list(read_rows(str(folder / "rows.jsonl")))
        assert len(rows) == bool(line.strip())
        for name, row, problem in rows:
            for need, examiner in examiners.items():
                facts = examiner.examine(Task(0, name, "rows.jsonl:1", row, problem))
                assert {kind for kind, _ in facts.notices} <= KINDS.keys()
                try:
                    prompt = read_prompt(row, problem, "rows.jsonl:1", CFG, need, name)
                except RowError as error:
                    assert KINDS[error.fault].refused_as == error.kind and not UNPRINTABLE.search(
                        str(error)
                    )
                    assert not facts.parsed and error.fault == facts.notices[0][0]
                    continue
                assert facts.parsed
                check_prompt(prompt, need)
                if sum(p["type"] == "image" for m in prompt.messages for p in m["content"]) < 4:
                    check_tokens(prompt, renderer)

    return check


def test_rows(renderer, tmp_path):
    check = row_checker(tmp_path, renderer)
    for line in (CORPUS / "rows.jsonl").read_bytes().splitlines():
        check(line)
    run(check, LINES, examples=150)


@pytest.mark.reliability
def test_rows_in_thousands(renderer, tmp_path, figure):
    count, slowest = run(row_checker(tmp_path, renderer), LINES, examples=5_000)
    figure(
        "R9",
        f"{count} random rows read, examined and tokenised: RowError or a sound prompt; slowest "
        f"{slowest:.2f} s of CPU time",
    )


def test_a_file_of_anything_is_read_in_order_and_every_line_is_accounted_for(tmp_path):
    """Through `load_prompts`: what is kept is in order, what is not is recorded, and no more than
    that.
    """
    cfg = DataConfig(on_bad_row="skip", max_bad_frac=1.0)

    def check(lines):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"\n".join(lines))
        bad = BadRows(cfg)
        try:
            kept = [int(p.origin.rpartition(":")[2]) for p in load_prompts(str(path), cfg, bad)]
        except UserError as error:
            assert "no rows" in str(error) or "no usable rows" in str(error)
            kept = []
        left_out = [int(row.id.rpartition(":")[2]) for row in bad.rows]
        text = b"\n".join(lines).removeprefix(b"\xef\xbb\xbf").split(b"\n")
        assert kept == sorted(kept) and sorted(kept + left_out) == [
            i for i, line in enumerate(text, 1) if line.strip()
        ]

    run(check, st.lists(LINES, max_size=8), examples=60)


# -- pictures --------------------------------------------------------------------------------------


def pictures():
    """A small file in each format and some of their ways to pack pixels."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for form, mode, options in [
        ("PNG", "RGB", {"exif": exif}),
        ("PNG", "P", {}),
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "CMYK", {}),
        ("WEBP", "RGBA", {}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("GIF", "P", {"save_all": True, "append_images": [image.convert("P").rotate(9)]}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "L", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", "RGB", {"save_all": True, "append_images": [image]}),
    ]:
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, form, **options)
        yield buffer.getvalue()


CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["byte", "four", "cut", "head", "copy"]),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=8,
)


def damaged(data, changes):
    """The file with bytes changed, cut off or doubled."""
    spoilt = bytearray(data)
    for where, how, value in changes:
        i = int(where * (len(spoilt) - 1))
        if how == "cut":
            spoilt = spoilt[: max(1, i)]
        elif how == "copy":
            spoilt[i:i] = spoilt[i : i + value]
        elif how == "four":
            spoilt[i : i + 4] = [
                b"\xff\xff\xff\xff",
                b"\0\0\0\0",
                b"\x7f\xff\xff\xff",
                b"\0\0\0\1",
            ][value % 4]
        else:
            spoilt[min(i, 63) if how == "head" else i] = value
    return bytes(spoilt)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of metadata
def check_picture(data):
    """It opens or is an ImageError; the preflight, which also looks at frames and metadata, says
    the same.
    """
    found = Examiner(CFG_ALL, "rows.jsonl", "train", None)._open(data)
    try:
        pixels = open_image(data, [])
    except ImageError as error:
        assert isinstance(found, ImageError) and found.fault == error.fault
        return
    assert not isinstance(found, ImageError) and found.size == pixels.size and pixels.mode == "RGB"
    assert open_header(data, [])[1].size[0] * pixels.height <= 50_000_000


@pytest.mark.filterwarnings("ignore")
def test_pictures(capfd):
    for line in (CORPUS / "pictures.jsonl").read_text().splitlines():
        check_picture(base64.b64decode(json.loads(line)["base64"]))
    run(
        lambda seed, changes: check_picture(damaged(seed, changes)),
        st.sampled_from([*pictures()]),
        CHANGES,
        examples=300,
    )
    capfd.readouterr()  # what libtiff prints


@pytest.mark.reliability
@pytest.mark.filterwarnings("ignore")
def test_pictures_in_thousands(figure, capfd):
    check = lambda seed, changes: check_picture(damaged(seed, changes))  # noqa: E731
    count, slowest = run(check, st.sampled_from([*pictures()]), CHANGES, examples=20_000)
    capfd.readouterr()
    figure(
        "R9",
        f"{count} damaged pictures of 6 formats: opened or an ImageError; slowest {slowest:.2f} s "
        "of CPU time",
    )
