"""One row as training would read it, and what else is odd about it. Runs in worker processes; loads
no weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from rlfr_vlm.config import Config, FlowConfig
from rlfr_vlm.data.bad_rows import RowError
from rlfr_vlm.data.images import UNREADABLE, ImageError, decode, open_header
from rlfr_vlm.data.prompts import read_prompt
from rlfr_vlm.data.render import Renderer, bad_picture
from rlfr_vlm.preflight.facts import Facts, Notice, Role, Task, digest_of
from rlfr_vlm.preflight.notices import (
    answer_notices,
    column_notices,
    marks_pictures,
    normalised,
    own_text,
    response_notices,
    text_notices,
)
from rlfr_vlm.shares import percent
from rlfr_vlm.types import Prompt

MIN_SIDE = 28  # pixels: below it a picture has less than a token to a side
FLAT = 8  # of 255: colours that differ by no more are one
MAX_ASPECT = 200  # where no model says it; the processors' own limit
CLEAR_SHARE = 0.01  # of a picture's pixels that may be transparent
CACHED_PICTURES = 4096
ORIENTATION = 0x0112  # EXIF
# where no model says which tokens are special
COMMON_SPECIAL = re.compile(r"<\|[A-Za-z_]{2,40}\|>")


@dataclass(frozen=True)
class Picture:
    """A picture that opened."""

    size: tuple[int, int]
    digest: bytes
    notices: tuple[Notice, ...]


@dataclass
class Examiner:
    """Looks at rows of one data file."""

    cfg: Config
    source: str
    role: Role
    renderer: Renderer | None  # none: no model is at hand, and tokens are not counted
    need: str = field(init=False)

    def __post_init__(self) -> None:
        self.need = "response" if self.role == "expert" else "answer"
        data = self.cfg.data
        self._roots = [Path(self.source).parent, *(Path(d) for d in data.media_dirs)]
        self._added = [text for text in (data.system, data.suffix) if text]
        self._max_tokens = (self.cfg.flow or FlowConfig()).fit.max_tokens
        self._cached: Callable[[str], Picture | ImageError] = lru_cache(CACHED_PICTURES)(self._open)

    def examine(self, task: Task) -> Facts:
        """Never raises for what a row holds."""
        notices = [] if task.row is None else column_notices(task.row, self.need)
        try:
            prompt = read_prompt(
                task.row, task.problem, task.where, self.cfg.data, self.need, task.name
            )
        except RowError as error:
            own = "" if task.row is None else str(task.row.get("id") or "")[:200]
            return Facts(
                task.number, task.name, task.where, own, ((error.fault, str(error)), *notices)
            )
        text = own_text(prompt, self._added)
        notices += text_notices(prompt, text, self._special_in(text))
        if self.need == "answer" and self.cfg.reward.function is None:
            notices += answer_notices(prompt, text)
        if self.need == "response" and prompt.response:
            # an error, told below
            vision = self.renderer is not None and self.renderer.vision_text.search(prompt.response)
            notices += response_notices(
                prompt.response,
                self.cfg.reward,
                None if vision else self._special_in(prompt.response),
            )
        opened: list[Picture] = []
        tokens = None
        try:
            if self.renderer is not None:
                self.renderer.check_media(prompt)
            for number, source in enumerate(prompt.images):
                opened.append(picture := self._picture(prompt, source))
                which = f"picture {number + 1}: " if len(prompt.images) > 1 else ""
                notices += [(kind, which + reason) for kind, reason in picture.notices]
            tokens = self._count(prompt, [picture.size for picture in opened])
        except RowError as error:
            notices.insert(0, (error.fault, str(error)))
        if tokens is not None:
            notices += self._lengths(prompt, tokens)
        plain = normalised(text)
        return Facts(
            number=task.number,
            name=task.name,
            where=task.where,
            id=prompt.id,
            notices=tuple({kind: (kind, reason) for kind, reason in reversed(notices)}.values())[
                ::-1
            ],  # of several of a kind the first
            parsed=True,
            tokens=tokens,
            text=digest_of(plain.encode()),
            text_length=len(plain),
            pictures=tuple(p.digest for p in opened) if len(opened) == len(prompt.images) else None,
            sizes=tuple(p.size for p in opened),
            num_pictures=len(prompt.images),
            marked=not prompt.images or (task.row is not None and marks_pictures(task.row)),
            answer=prompt.answer,
            response=prompt.response if self.need == "response" else None,
        )

    def _special_in(self, text: str) -> str | None:
        found = (
            COMMON_SPECIAL.search(text)
            if self.renderer is None
            else self.renderer.special.search(text)
        )
        return found[0] if found else None

    def _count(self, prompt: Prompt, sizes: list[tuple[int, int]]) -> int | None:
        """Tokens of the prompt; None where no model is at hand. Raises RowError for a picture out
        of shape.
        """
        if self.renderer is not None:
            return self.renderer.count_tokens(prompt, sizes)
        for width, height in sizes:
            if max(width, height) > MAX_ASPECT * min(width, height):
                problem = ImageError(
                    f"a picture of {width} x {height} pixels: one side is over {MAX_ASPECT} times "
                    "the other",
                    "image_shape",
                )
                raise bad_picture(prompt, problem)
        return None

    def _lengths(self, prompt: Prompt, tokens: int) -> list[Notice]:
        """What is too long."""
        assert self.renderer is not None
        try:
            self.renderer.check_length(prompt, tokens)
        except RowError as error:
            return [(error.fault, str(error))]
        if self.need == "response" and prompt.response:
            whole = (
                tokens
                + len(
                    self.renderer.tokenizer(prompt.response, add_special_tokens=False)["input_ids"]
                )
                + 1
            )  # EOS
            if whole > self._max_tokens:
                return [
                    (
                        "expert_too_long",
                        f"{prompt.origin}: {whole} tokens exceed "
                        f"flow.fit.max_tokens={self._max_tokens}",
                    )
                ]
        return []

    def _picture(self, prompt: Prompt, source: Any) -> Picture:
        found = (
            self._cached(source)
            if isinstance(source, str) and len(source) <= 512
            else self._open(source)
        )
        if isinstance(found, ImageError):
            raise bad_picture(prompt, found)
        return found

    def _open(self, source: Any) -> Picture | ImageError:
        """A picture of this file's rows, or why there is none."""
        try:
            name, image = open_header(source, self._roots, self.cfg.data.allow_urls)
            pixels = decode(name, image)
        except ImageError as error:
            return error.with_traceback(None)
        notices: list[Notice] = []
        if all(high - low <= FLAT for low, high in pixels.getextrema()):  # type: ignore[misc, union-attr]
            notices.append(
                (
                    "image_blank",
                    f"the {pixels.width} x {pixels.height} pixels have one colour, about "
                    f"{pixels.getpixel((0, 0))}",
                )
            )
        if clear := _clear_share(image):
            notices.append(
                ("image_transparent", f"{percent(clear, 0)} of the picture is transparent")
            )
        # last: to count frames moves the picture on, and a damaged one need not come back
        notices += header_notices(image)
        return Picture(
            pixels.size, digest_of(repr(pixels.size).encode() + pixels.tobytes()), tuple(notices)
        )


def header_notices(image: Image.Image) -> list[Notice]:
    """What a picture's header says."""
    found: list[Notice] = []
    if min(image.size) < MIN_SIDE:
        found.append(("image_tiny", f"the picture has {image.width} x {image.height} pixels"))
    try:
        turned = image.getexif().get(ORIENTATION, 1)
        frames = getattr(image, "n_frames", 1)
    except UNREADABLE:  # damaged metadata: of no use to anyone, and to training no matter
        return found
    if turned in range(2, 9):
        found.append(("image_rotated", f"EXIF orientation {turned}"))
    if frames > 1:
        found.append(("image_frames", f"the picture has {frames} frames"))
    return found


def _clear_share(image: Image.Image) -> float:
    """Share of a decoded picture's pixels that are more transparent than not; 0 where it is too
    small to matter.
    """
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return 0.0
    histogram = image.convert("RGBA").getchannel("A").histogram()
    share = sum(histogram[:128]) / max(1, sum(histogram))
    return share if share > CLEAR_SHARE else 0.0


def make_examiners(cfg: Config, sources: dict[Role, str], with_model: bool) -> dict[Role, Examiner]:
    """One for each data file, on one tokenizer and processor. Raises UserError where the model's do
    not load.
    """
    policy = None
    if with_model:
        # here: without a model nobody waits for its libraries
        from rlfr_vlm.models.policy import Policy

        reader = {"device": "cpu", "lora": None, "gradient_checkpointing": "off"}
        policy = Policy(cfg.model.model_copy(update=reader), weights=False)
    return {
        role: Examiner(
            cfg, source, role, None if policy is None else Renderer(policy, cfg.data, source)
        )
        for role, source in sources.items()
    }
