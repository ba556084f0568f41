"""R5: whatever happens to a checkpoint's files is detected, the file is named, and the run goes on
from the one before.
"""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from rlfr_vlm.errors import CheckpointError
from rlfr_vlm.storage import checkpoint
from rlfr_vlm.storage.checkpoint import MANIFEST, commit_checkpoint, newest_good
from tests.runs import cli, digest, make_config, make_data, torchrun

OLD, NEW = "global_step_2", "global_step_4"
FULL = {
    "bit flip": 200,
    "truncation": 50,
    "deletion": 20,
    "swap between ranks": 20,
    "edited manifest": 20,
}
FEW = {
    "bit flip": 40,
    "truncation": 10,
    "deletion": 4,
    "swap between ranks": 4,
    "edited manifest": 12,
}


# What can happen to a folder: each changes it and returns the files of which one has to be named.


def own(path: Path) -> Path:
    """The file, no longer shared with the folder that it was copied from."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def bit_flip(folder, rng, files, _):
    name = rng.choice(files)
    path = own(folder / name)
    place = rng.randrange(path.stat().st_size)
    with path.open("rb+") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return [name]


def truncation(folder, rng, files, _):
    name = rng.choice(files)
    path = own(folder / name)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return [name]


def deletion(folder, rng, files, _):
    name = rng.choice(files)
    (folder / name).unlink()
    return [name]


def swap(folder, rng, files, _):
    """Two ranks' files of one name change places, or one is copied over the other, or into a name
    of its own.
    """
    pairs = [
        (a, b)
        for a in files
        for b in files
        if a < b
        and Path(a).name == Path(b).name
        and (folder / a).read_bytes() != (folder / b).read_bytes()
    ]
    one, other = rng.choice(pairs)
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    how = rng.randrange(3)
    if how == 2:
        stray = str(Path(one).with_name(f"{Path(one).stem}-copy{Path(one).suffix}"))
        (folder / stray).write_bytes(second)
        return [stray]
    own(folder / one).write_bytes(second)
    if how == 0:
        own(folder / other).write_bytes(first)
    return [one, other]


def edit(folder, rng, _, number):
    """A manifest that still reads as one, and some that do not."""
    path = own(folder / MANIFEST)
    content = json.loads(path.read_text())
    files = content["files"]
    name = rng.choice(sorted(files))
    entry = files[name]
    changed = {"size": entry["size"] + 1, "sha256": entry["sha256"][::-1]}
    edits = [
        lambda: files.pop(name),
        lambda: entry.update(size=changed["size"]),
        lambda: entry.update(sha256=changed["sha256"]),
        lambda: files.update({f"{name}.old": files.pop(name)}),
        lambda: files.update({"rank_0009/policy-0000.safetensors": entry}),
        lambda: files.update({f"../{OLD}/{name}": entry}),
        lambda: files.clear(),
        lambda: content.update(step=content["step"] + 1),
        lambda: content.pop("sha256"),
        lambda: content.update(sha256="0" * 64),
        lambda: content.pop("files"),
        lambda: content.update(files=[name]),
    ]
    if number % (len(edits) + 2) < len(edits):
        edits[number % (len(edits) + 2)]()
        path.write_text(json.dumps(content, indent=1))
    else:
        path.write_text(path.read_text()[:-1] if number % 2 else "[]")
    return [MANIFEST]


KINDS = {
    "bit flip": bit_flip,
    "truncation": truncation,
    "deletion": deletion,
    "swap between ranks": swap,
    "edited manifest": edit,
}


def copied(root: Path, place: Path) -> Path:
    """The checkpoints once more, sharing what nobody changes."""
    shutil.copytree(root, place, copy_function=os.link)
    return place


def missed(root: Path, scratch: Path, counts: dict[str, int]) -> list[str]:
    """Damages after which the checkpoint before was not taken, or no damaged file was named."""
    rng = random.Random(0)
    files = sorted(str(p.relative_to(root / NEW)) for p in (root / NEW).rglob("*") if p.is_file())
    found = []
    for kind, count in counts.items():
        for number in range(count):
            place = copied(root, scratch / "copy")
            names = KINDS[kind](place / NEW, rng, files, number)
            warnings: list[str] = []
            try:
                good = newest_good(place, warnings.append)
            except (
                Exception
            ) as error:  # a damage that is met too late may lead to anything: it was missed
                good, warnings = (
                    None,
                    [repr(error) if isinstance(error, CheckpointError) else "met too late"],
                )
            if good != place / OLD or not any(name in warnings[0] for name in names):
                found.append(f"{kind} {number} of {names}: {warnings}")
            shutil.rmtree(place)
    return found


# Small files.


def synthetic(root: Path) -> Path:
    """Two checkpoints with the files of two ranks, each different."""

    def write(folder: Path) -> None:
        for rank in ("a", "b"):
            for name in ("policy.safetensors", "optimizer.safetensors", "rng.pt"):
                (folder / rank).mkdir(exist_ok=True)
                (folder / rank / name).write_bytes(random.Random(f"{rank}{name}").randbytes(400))
        (folder / "state.json").write_text('{"step": 4}')

    for step in (2, 4):
        commit_checkpoint(root, step, write, keep=2)
    return root


def test_every_damage_to_small_files_is_detected_and_named(tmp_path):
    assert missed(synthetic(tmp_path / "root"), tmp_path, FEW) == []


@pytest.mark.parametrize(
    ("protection", "kinds"),
    [("sha256", {"bit flip", "swap between ranks"}), ("_digest", {"edited manifest"})],
)
def test_negative_control_without_sums_damage_is_missed(tmp_path, monkeypatch, protection, kinds):
    monkeypatch.setattr(checkpoint, protection, lambda content: "the same for everything")
    found = missed(synthetic(tmp_path / "root"), tmp_path, FEW)
    assert {kind for kind in FEW if any(line.startswith(kind) for line in found)} >= kinds


# A real checkpoint.


@pytest.mark.reliability
def test_310_damages_of_a_checkpoint_of_two_ranks(model_folder, tmp_path, figure):
    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"))
    torchrun(2, "rlfr_vlm.cli", "train", "--config", config, "deepspeed.zero_stage=2")
    root = tmp_path / "run/checkpoints"
    files = [str(p.relative_to(root / NEW)) for p in (root / NEW).rglob("*") if p.is_file()]
    assert Counter(Path(name).name for name in files)["policy-0000.safetensors"] == 2
    assert missed(root, tmp_path, FULL) == []
    figure(
        "R5",
        f"{sum(FULL.values())} of {sum(FULL.values())} damages detected, the file named, the "
        "checkpoint before taken",
    )


@pytest.mark.reliability
def test_the_command_falls_back_and_with_nothing_left_exits_with_4(model_folder, tmp_path, figure):
    make_data(tmp_path)
    config = make_config(tmp_path, model_folder("qwen2_5_vl"))
    assert cli("train", "--config", str(config)).returncode == 0
    root, expected = tmp_path / "run/checkpoints", digest(tmp_path / "run", 4)
    bit_flip(root / NEW, random.Random(0), ["rank_0000/policy-0000.safetensors"], 0)
    again = cli("train", "--config", str(config))
    assert again.returncode == 0, again.stderr[-2000:]
    assert (
        "policy-0000.safetensors has sha256" in again.stderr
        and f"resumed from {OLD}" in again.stderr
    )
    assert digest(tmp_path / "run", 4) == expected
    for name in (OLD, NEW):
        (root / name / "state.json").write_text("{}")
    before = sorted(str(p) for p in root.rglob("*"))
    nothing = cli("train", "--config", str(config))
    assert nothing.returncode == 4, nothing.stderr[-2000:]
    assert (
        "no good checkpoint is left in" in nothing.stderr
        and "state.json has 2 bytes" in nothing.stderr
        and "Traceback" not in nothing.stderr
    )
    assert sorted(str(p) for p in root.rglob("*")) == before
    figure(
        "R5",
        "the command: from the one before with equal weights to the bit; both damaged: exit 4, "
        "nothing touched",
    )
