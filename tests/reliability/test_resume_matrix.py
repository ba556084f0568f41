"""R18: what a run may not go on from is refused by name, before weights are loaded or an engine
starts; what it may is told.
"""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest

from rlfr_vlm.config import config_hash, parse_config
from rlfr_vlm.data.digests import RowDigests
from rlfr_vlm.errors import UserError
from rlfr_vlm.rewards.custom import reward_digest
from rlfr_vlm.storage import checkpoint as protocol
from rlfr_vlm.storage import resume
from rlfr_vlm.storage.resume import check_resumable, find_checkpoint
from rlfr_vlm.storage.state import FORMAT, ROWS_FILE, STATE_FILE, environment
from rlfr_vlm.types import Prompt
from tests.runs import cli, make_config, make_text_data

SECONDS = 3.0  # of CPU time, beside imports: the clock of a busy machine says nothing


def sealed(folder, **changes):
    """A checkpoint whose description says something else, and whose sums are right."""
    path = folder / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / protocol.MANIFEST).unlink()
    files = [p for p in folder.rglob("*") if p.is_file()]
    entries = {
        str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": protocol.sha256(p)}
        for p in files
    }
    protocol._seal(folder, int(folder.name.removeprefix(protocol.PREFIX)), entries)


def with_package(folder, name, version):
    described = environment()
    sealed(folder, environment=described | {"versions": described["versions"] | {name: version}})


def row(number, answer="1", **more):
    content = {"role": "user", "content": [{"type": "text", "text": f"question {number}"}]}
    return Prompt(
        f"row{number}",
        (content,),
        (b"a picture",),
        answer,
        origin=f"rows.jsonl:{number + 1}",
        **more,
    )


ROWS = [row(number) for number in range(4)]


@pytest.fixture
def saved(tmp_path):
    """A config and the checkpoints of steps 1 and 2 of its run, with nothing in them but what they
    say of themselves.
    """
    cfg = parse_config(
        {"output_dir": str(tmp_path), "model": {"path": "nowhere"}, "rollout": {"engine": "hf"}}
    )
    rows = RowDigests.of(ROWS)

    def write(folder):
        state = {
            "format": FORMAT,
            "ranks": 1,
            "config_hash": config_hash(cfg),
            "config": cfg.model_dump(mode="json"),
        }
        state |= {"data": {"rows": 4, "sha256": rows.sha256}, "environment": environment()}
        (folder / ROWS_FILE).write_bytes(rows.digests)
        (folder / STATE_FILE).write_text(json.dumps(state))

    for step in (1, 2):
        protocol.commit_checkpoint(tmp_path / "checkpoints", step, write, keep=2)
    return cfg, tmp_path / "checkpoints" / "global_step_2"


def test_the_same_command_goes_on_without_a_word(saved):
    cfg, newest = saved
    assert check_resumable(cfg, RowDigests.of(ROWS), 1) == []
    assert find_checkpoint(cfg, newest.parent, RowDigests.of(ROWS), pytest.fail) == newest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [*ROWS[:2], row(2, answer="7"), ROWS[3]],
            r"other rows of data\.train: rows\.jsonl:3 is not what it was; put them back",
        ),
        ([*ROWS[:2], row(2, extra={"level": 3}), ROWS[3]], r"rows\.jsonl:3 is not what it was"),
        ([*ROWS, row(4)], r"5 usable rows, not 4; rows\.jsonl:5 is not what it was"),
        (ROWS[:3], r"3 usable rows, not 4; those after rows\.jsonl:3 are gone"),
        ([ROWS[1], ROWS[0], *ROWS[2:]], r"rows\.jsonl:2 is not what it was"),
    ],
)
def test_other_rows_are_named(saved, rows, message):
    cfg, newest = saved
    with pytest.raises(UserError, match=message):
        check_resumable(cfg, RowDigests.of(rows), 1)
    with pytest.raises(UserError, match=message):
        find_checkpoint(cfg, newest.parent, RowDigests.of(rows), pytest.fail)


def test_negative_control_without_the_check_it_goes_on_with_anything(saved, monkeypatch):
    cfg, newest = saved
    monkeypatch.setattr(resume, "check_state", lambda *_: None)
    other = cfg.model_copy(update={"seed": cfg.seed + 1})
    assert check_resumable(other, RowDigests.of(ROWS[1:]), 1) == []
    assert find_checkpoint(other, newest.parent, RowDigests.of(ROWS[1:]), pytest.fail) == newest


def test_rows_are_the_same_wherever_their_file_lies():
    moved = [
        Prompt(r.id, r.messages, r.images, r.answer, origin=f"elsewhere/{r.origin}") for r in ROWS
    ]
    assert RowDigests.of(moved).sha256 == RowDigests.of(ROWS).sha256


def test_another_major_version_is_refused_and_a_minor_one_told(saved):
    cfg, newest = saved
    with_package(newest, "torch", "1.13.1+cpu")
    with pytest.raises(
        UserError,
        match=r"written with torch 1\.13\.1\+cpu, and this is 2\..*pip install 'torch==1\.13\.1'",
    ):
        check_resumable(cfg, RowDigests.of(ROWS), 1)
    with_package(newest, "torch", "2.0.0")
    assert [
        note
        for note in check_resumable(cfg, RowDigests.of(ROWS), 1)
        if note.startswith("torch was 2.0.0 and is 2.")
    ]
    with_package(newest, "deepspeed", "7.0")  # which this run does not use
    assert check_resumable(cfg, RowDigests.of(ROWS), 1) == []


def test_a_reward_function_that_was_edited_is_told(saved, tmp_path):
    """Not refused: it may be what a crash was mended by."""
    cfg, newest = saved
    file = tmp_path / "mine.py"
    file.write_text("def score(completions): return [0.0] * len(completions)")
    spec = f"{file}:score"
    cfg = cfg.model_copy(update={"reward": cfg.reward.model_copy(update={"function": spec})})
    described = {"config_hash": config_hash(cfg), "config": cfg.model_dump(mode="json")}
    sealed(newest, **described, reward_sha256=reward_digest(spec))
    assert check_resumable(cfg, RowDigests.of(ROWS), 1) == []
    file.write_text("def score(completions): return [1.0] * len(completions)")
    reward_digest.cache_clear()
    (note,) = check_resumable(cfg, RowDigests.of(ROWS), 1)
    assert (
        note
        == f"the file of reward.function {spec} has changed since global_step_2: rewards may differ"
    )


def test_another_number_of_ranks_is_told(saved):
    cfg, newest = saved
    sealed(newest, ranks=2)
    (note,) = check_resumable(cfg, RowDigests.of(ROWS), 1)
    assert note.startswith("global_step_2 was written by 2 ranks, this run has 1")


def test_a_damaged_description_says_nothing(saved):
    """It is found damaged, and set aside, when the run goes on; the one before it is asked."""
    cfg, newest = saved
    newest.joinpath(STATE_FILE).write_text(
        newest.joinpath(STATE_FILE).read_text().replace('"ranks": 1', '"ranks": 3')
    )
    assert check_resumable(cfg, RowDigests.of(ROWS), 1) == []
    warnings = []
    assert (
        find_checkpoint(cfg, newest.parent, RowDigests.of(ROWS), warnings.append).name
        == "global_step_1"
    )
    assert re.search(r"global_step_2 is damaged: .*state\.json has sha256", warnings[0])


def cpu_seconds(*arguments):
    """CPU time of the command line, and how it ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cli(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.reliability
def test_every_cell_has_its_message_before_weights_are_loaded(model_folder, tmp_path, figure):
    make_text_data(tmp_path / "a")
    model = shutil.copytree(model_folder("qwen2"), tmp_path / "model")
    config = make_config(tmp_path / "a", str(model), train={"steps": 1, "save_steps": 1})
    out = tmp_path / "run"
    arguments = ("train", "--config", str(config), f"output_dir={out}")
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    (weights,) = Path(model).glob("*.safetensors")
    weights.rename(tmp_path / "weights")  # whoever wants to load them now fails in another way
    checkpoint = out / "checkpoints" / "global_step_1"
    good = shutil.copytree(checkpoint, tmp_path / "good")
    data = tmp_path / "a" / "train.jsonl"
    lines = data.read_text().splitlines()
    changed = {**json.loads(lines[2]), "answer": "99"}
    cells = {
        "old format": (
            lambda: sealed(checkpoint, format=1),
            (),
            r"another version of rlfr-vlm \(format 1, this one reads \d+\)",
        ),
        "changed config": (
            lambda: None,
            ("optim.lr=0.5",),
            r"another config: optim\.lr: 0\.001 -> 0\.5",
        ),
        "changed row": (
            lambda: data.write_text("\n".join([*lines[:2], json.dumps(changed), *lines[3:]])),
            (),
            r"other rows of data\.train: \S*train\.jsonl:3 is not what it was",
        ),
        "package major": (
            lambda: with_package(checkpoint, "torch", "1.13.1"),
            (),
            r"written with torch 1\.13\.1, and this is 2\.",
        ),
    }
    nothing = cpu_seconds(*arguments, "data.train=nowhere.jsonl")[
        0
    ]  # what imports take on this machine, at this moment
    slowest = 0.0
    for name, (change, more, message) in cells.items():
        change()
        seconds, done = cpu_seconds(*arguments, *more)
        slowest = max(slowest, seconds)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), (name, done.stderr)
        assert re.search(message, done.stderr), (name, done.stderr)
        data.write_text("\n".join(lines))
        shutil.rmtree(checkpoint)
        shutil.copytree(good, checkpoint)
    (tmp_path / "weights").rename(weights)
    sealed(checkpoint, ranks=2)
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "global_step_1 was written by 2 ranks, this run has 1: it goes on" in done.stderr
    assert slowest < nothing + SECONDS
    figure(
        "R18",
        f"old format, changed config, changed row, other package major: {len(cells)} of "
        f"{len(cells)} exit 2 in one line of their own, without "
        f"weights or engine, in at most {slowest:.1f} s of CPU time ({nothing:.1f} s are imports); "
        "another number of ranks is told and goes on",
    )
