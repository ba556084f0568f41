"""Prompt -> token ids and vision tensors, exactly as the model reads them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from PIL import Image

from rlfr_vlm.config import DataConfig
from rlfr_vlm.data.bad_rows import RowError
from rlfr_vlm.data.images import ImageError, open_image
from rlfr_vlm.errors import UserError
from rlfr_vlm.types import EncodedPrompt, Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from rlfr_vlm.models.policy import Policy


class Renderer:
    """Encodes prompts for one policy."""

    def __init__(
        self, policy: Policy, cfg: DataConfig, data_file: str, pictures: str = "as_is"
    ) -> None:
        """data_file: its folder is where picture paths are looked up first. pictures: "blank"
        replaces each by a grey one of its size.
        """
        self.policy, self.cfg, self.pictures = policy, cfg, pictures
        self.roots = [Path(data_file).parent, *(Path(d) for d in cfg.media_dirs)]
        self.tokenizer = policy.tokenizer
        self.special = re.compile(
            "|".join(
                re.escape(t) for t in sorted(special_tokens(self.tokenizer), key=len, reverse=True)
            )
            or r"(?!)"
        )
        banned = (
            self.tokenizer.convert_ids_to_tokens(list(policy.banned_token_ids))
            if policy.processor is not None
            else []
        )
        self.vision_text = re.compile("|".join(re.escape(token) for token in banned) or r"(?!)")

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Raises RowError naming the row: a picture that does not open, pictures for a text model,
        a prompt over the limit.
        """
        self.check_media(prompt)
        try:
            images = [
                self._fit(open_image(source, self.roots, self.cfg.allow_urls))
                for source in prompt.images
            ]
        except ImageError as error:
            raise bad_picture(prompt, error) from None
        vision, counts = self._vision(images)
        short, expanded = self._tokens(prompt, counts)
        self.check_length(prompt, len(expanded))
        return EncodedPrompt(
            prompt,
            expanded,
            tuple(short),
            self.policy.position_ids(expanded, vision),
            tuple(images),
            vision,
        )

    def count_tokens(self, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens that `encode` would give for pictures of these sizes (width, height), without
        their pixels. Raises RowError like it.
        """
        self.check_media(prompt)
        try:
            fitted = [self._fitted_size(*size) for size in sizes]
        except ImageError as error:
            raise bad_picture(prompt, error) from None
        return len(
            self._tokens(prompt, [width * height // self._factor**2 for width, height in fitted])[1]
        )

    def check_media(self, prompt: Prompt) -> None:
        """Raises RowError for pictures that the model cannot see, and for an expert response with
        tokens that stand for pictures.
        """
        if prompt.images and self.policy.processor is None:
            raise RowError(
                "images",
                f"{prompt.origin}: the row has pictures, but model.path is a text model",
                "text_model",
            )
        if prompt.response and (typed := self.vision_text.search(prompt.response)):
            problem = (
                f"{prompt.origin}: the response holds `{typed[0]}`, a token that only a "
                "picture may bring"
            )
            raise RowError("response", problem, "response_vision_token")

    def check_length(self, prompt: Prompt, num_tokens: int) -> None:
        """Raises RowError for a prompt over the limit."""
        if num_tokens > self.cfg.max_prompt_tokens:
            raise RowError(
                "too_long",
                f"{prompt.origin}: {num_tokens} tokens, pictures included, exceed "
                f"data.max_prompt_tokens={self.cfg.max_prompt_tokens}",
                "prompt_too_long",
            )

    @property
    def _factor(self) -> int:
        """Side of the square of pixels that is one token."""
        processor = self.policy.processor.image_processor
        return processor.patch_size * processor.merge_size

    def _fitted_size(self, width: int, height: int) -> tuple[int, int]:
        """Size to which Qwen's processor would bring a picture within the config's pixel limits.
        Raises ImageError where it has none.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        try:
            rows, columns = smart_resize(
                height, width, self._factor, self.cfg.min_pixels, self.cfg.max_pixels
            )
        except ValueError as error:
            raise ImageError(
                f"a picture of {width} x {height} pixels: {error}", "image_shape"
            ) from None
        return columns, rows

    def _fit(self, image: Image.Image) -> Image.Image:
        """Resized in such a way that every later processor leaves the picture as it is."""
        size = self._fitted_size(*image.size)
        if self.pictures == "blank":
            return Image.new("RGB", size, (128, 128, 128))
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)

    def _tokens(self, prompt: Prompt, counts: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
        """Token ids with one image token per picture, and with as many as each has features."""
        short = self._tokenize(prompt.messages)
        return short, self._expand(short, counts, prompt)

    def _vision(self, images: Sequence[Image.Image]) -> tuple[dict[str, Tensor], list[int]]:
        """The processor's tensors, and the number of image tokens of each picture."""
        if not images:
            return {}, []
        processor = self.policy.processor.image_processor
        features = processor(images=list(images), return_tensors="pt", do_resize=False)
        vision = {key: features[key] for key in ("pixel_values", "image_grid_thw")}
        vision["pixel_values"] = vision["pixel_values"].to(self.policy.dtype)
        return vision, (vision["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist()

    def _tokenize(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids with one image token per picture.

        Special tokens typed by a row's author stay plain text: the template is rendered around
        stand-ins, and such texts are tokenised on their own with special tokens split. Parts of
        text that only together spell one, as templates write them end to end, are joined.
        """
        messages = [{**m, "content": self._joined(m["content"])} for m in messages]
        texts_of = [p["text"] for m in messages for p in m["content"] if p["type"] == "text"]
        # what holds \x02 might be taken for a stand-in
        typed = [text for text in texts_of if self.special.search(text) or "\x02" in text]
        marks = {text: f"\x02{number}\x03" for number, text in enumerate(dict.fromkeys(typed))}

        def marked(part: dict[str, Any]) -> dict[str, Any]:
            return (
                {**part, "text": marks.get(part["text"], part["text"])}
                if part["type"] == "text"
                else part
            )

        rendered = self._render([{**m, "content": [*map(marked, m["content"])]} for m in messages])
        texts = {mark: text for text, mark in marks.items()}
        ids: list[int] = []
        for piece in re.split("(\x02\\d+\x03)", rendered) if marks else [rendered]:
            plain = piece in texts
            ids += self.tokenizer(
                texts.get(piece, piece), add_special_tokens=False, split_special_tokens=plain
            )["input_ids"]
        return ids

    def _joined(self, parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The parts of a message; texts that follow one another are one where they hold a special
        token across a seam.
        """
        joined: list[dict[str, Any]] = []
        for kind, run in itertools.groupby(parts, key=lambda part: part["type"]):
            texts = [*run]
            whole = "".join(part.get("text", "") for part in texts)
            found = (
                sum(len(self.special.findall(part["text"])) for part in texts)
                if kind == "text"
                else 0
            )
            joined += (
                [{"type": "text", "text": whole}]
                if found != len(self.special.findall(whole))
                else texts
            )
        return joined

    def _render(self, messages: list[dict[str, Any]]) -> str:
        """The chat template's text up to where the response starts; without a template, the texts
        end to end.
        """
        speaker, given = self.policy.processor, messages
        if speaker is None:
            speaker, given = (
                self.tokenizer,
                [{**m, "content": "".join(p["text"] for p in m["content"])} for m in messages],
            )
            if not self.tokenizer.chat_template:
                return (self.tokenizer.bos_token or "") + "\n".join(m["content"] for m in given)
        try:
            return speaker.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:  # among them: it reaches for what a template may not
            raise UserError(
                f"model.path: the chat template of `{self.policy.path}` fails: {error}"
            ) from None

    def _expand(
        self, short: Sequence[int], counts: Sequence[int], prompt: Prompt
    ) -> tuple[int, ...]:
        """Each image token repeated as often as its picture has features."""
        image_token = self.policy.image_token_id
        found = sum(token == image_token for token in short)
        if found != len(counts):
            raise RowError(
                "image_count",
                f"{prompt.origin}: the template wrote {found} image tokens for {len(counts)} "
                "pictures",
            )
        remaining = iter(counts)
        return tuple(
            t
            for token in short
            for t in ([token] * next(remaining) if token == image_token else [token])
        )


def bad_picture(prompt: Prompt, error: ImageError) -> RowError:
    """A row whose picture cannot be used."""
    return RowError("image", f"{prompt.origin}: {error}", error.fault)


def special_tokens(tokenizer: Any) -> list[str]:
    """Every token that must stay plain text when a row's author types it: named ones and added
    ones.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*dict.fromkeys([*tokenizer.all_special_tokens, *added])]
