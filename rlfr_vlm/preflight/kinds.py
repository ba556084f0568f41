"""What can be wrong with a row: the names, what they mean and what to do. docs/validate.md is this
table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Kind:
    """A defect. `refused_as`: the class under which training counts such a row in bad_rows.jsonl;
    "" for what training does not refuse.
    """

    id: str
    severity: Severity
    meaning: str
    do: str
    refused_as: str = ""


def _error(id: str, refused_as: str, meaning: str, do: str) -> Kind:
    return Kind(id, "error", meaning, do, refused_as)


def _warning(id: str, meaning: str, do: str) -> Kind:
    return Kind(id, "warning", meaning, do)


_ALL = (
    # the line
    _error(
        "json_invalid",
        "schema",
        "the line is not JSON, or nested more than 100 deep",
        "write the line again; a torn last line is a copy that was cut off",
    ),
    _error("utf8_invalid", "schema", "the line is not UTF-8", "convert the file to UTF-8"),
    _error(
        "not_object",
        "schema",
        "the line is JSON, but no object of columns",
        "write one {...} per line",
    ),
    # the prompt
    _error(
        "prompt_missing",
        "schema",
        "there is no prompt, or it is neither text nor messages",
        "name the column prompt, problem, question, messages, ...",
    ),
    _error(
        "prompt_empty",
        "schema",
        "the prompt has no text and no picture",
        "fill it in, or drop the row",
    ),
    _error(
        "messages_malformed",
        "schema",
        "a message lacks role or content, has a part that is neither text nor picture, or the last "
        "one is not the user's",
        "write messages as {role, content}",
    ),
    _error(
        "text_broken",
        "schema",
        "text with half a character (a lone surrogate), which no tokenizer takes",
        "write the text again from its source",
    ),
    _error(
        "media_unsupported",
        "media",
        "the row has video or sound",
        "drop the row; only pictures are read",
    ),
    _error(
        "prompt_too_long",
        "too_long",
        "more tokens, pictures included, than data.max_prompt_tokens",
        "raise data.max_prompt_tokens, lower data.max_pixels, or drop the row",
    ),
    _error(
        "duplicate_id",
        "duplicate_id",
        "another row of the file has this id",
        "give each row an id of its own, or none",
    ),
    _warning(
        "special_tokens",
        "the question spells a special token of the model; it is read as plain text",
        "remove it: the model never sees it as that token",
    ),
    _warning(
        "foreign_image_mark",
        "the text holds another project's mark for a picture, such as <image_1> or <img>",
        "write <image> where the picture goes",
    ),
    _warning(
        "text_garbled",
        "the text holds control characters, replacement characters, or UTF-8 that was decoded as "
        "something else",
        "convert the text again from its source",
    ),
    _warning(
        "column_typo",
        "a column that nothing reads, with nearly the name of one that is missing",
        "rename the column",
    ),
    _warning(
        "pixel_limits",
        "the row sets pixel limits of its own (min_pixels, ...), which nothing reads",
        "set data.min_pixels and data.max_pixels; the config always wins",
    ),
    # pictures
    _error(
        "image_count",
        "image_count",
        "the number of <image> marks is not that of the pictures",
        "add or remove marks, or the pictures that are left over",
    ),
    _error(
        "text_model",
        "images",
        "the row has pictures, but the model reads text alone",
        "choose a vision-language model, or drop the row",
    ),
    _error(
        "image_missing",
        "image",
        "there is no file of this name",
        "check the path; name its folder in data.media_dirs",
    ),
    _error(
        "image_broken",
        "image",
        "a file that is empty, cut off, or no picture",
        "download or export it again",
    ),
    _error(
        "image_pixels",
        "image",
        "more than 50 million pixels by its header; it is not decoded",
        "scale it down",
    ),
    _error("image_bytes", "image", "a file of more than 32 MiB", "scale it down or compress it"),
    _error(
        "image_outside",
        "image",
        "a path that leads out of the data's folder: absolute, with .., or by a link",
        "move the picture, or name its folder in data.media_dirs",
    ),
    _error(
        "image_url",
        "image",
        "a URL, which may not or cannot be fetched",
        "download the pictures, or set data.allow_urls=true",
    ),
    _error(
        "image_source",
        "image",
        "neither a path, URL, bytes, base64 text nor a picture",
        "give a path, or {bytes, path}",
    ),
    _error(
        "image_shape", "image", "one side is more than 200 times the other", "crop it or pad it"
    ),
    _warning(
        "image_tiny",
        "a side of less than 28 pixels, the size of one token",
        "check the export; it is scaled up",
    ),
    _warning(
        "image_blank",
        "all pixels have nearly one colour",
        "check the export; the question cannot be answered from it",
    ),
    _warning(
        "image_transparent",
        "transparent parts, which turn into the colour hidden under them, mostly black",
        "put it on a white ground",
    ),
    _warning(
        "image_rotated",
        "EXIF says that it has to be turned, which nothing does",
        "turn the pixels and drop the tag",
    ),
    _warning(
        "image_frames",
        "more than one frame or page; only the first is used",
        "export the frame that is meant",
    ),
    _warning(
        "image_unmarked",
        "no <image> mark, where most rows of the file have them; its pictures come first",
        "mark the places",
    ),
    _warning(
        "image_absent",
        "the text speaks of a figure that is shown, but the row has no picture",
        "add the picture, or drop the row",
    ),
    # the gold answer
    _error(
        "answer_missing",
        "answer",
        "there is no gold answer, or it is empty",
        "fill it in, or drop the row",
    ),
    _error(
        "answer_type",
        "answer",
        "the gold answer is no text and no number, but a list, an object, true, false or NaN",
        "write it as text",
    ),
    _error(
        "answer_unreadable",
        "answer",
        "the grader cannot read the gold answer",
        "write the final answer alone, as text or LaTeX",
    ),
    _warning(
        "answer_unreachable",
        "even the gold answer itself, given as a response, is not graded right",
        "write one answer, with its brackets closed",
    ),
    _warning(
        "answer_placeholder",
        "the gold answer looks like a missing value: None, nan, N/A, unknown, ...",
        "fill it in, or drop the row",
    ),
    _warning(
        "answer_question",
        "the gold answer is a question: columns swapped?",
        "swap prompt and answer",
    ),
    _warning(
        "answer_prose",
        "a gold answer of many words, which a response must repeat word for word",
        "keep the final answer alone, or use a judge or reward.function",
    ),
    _warning(
        "answer_in_prompt", "the prompt gives the gold answer away", "cut it out of the prompt"
    ),
    _warning(
        "choice_not_offered",
        "the gold answer is the letter of an option that the prompt does not offer",
        "add the options, or correct the letter",
    ),
    _warning(
        "answer_majority",
        "one gold answer covers more than half of the rows: guessing it pays",
        "balance the answers, or keep this accuracy in mind",
    ),
    # expert responses
    _error(
        "response_missing",
        "response",
        "there is no expert response, or it is empty",
        "name the column response, or drop the row",
    ),
    _error(
        "response_vision_token",
        "response",
        "the expert response holds a token that stands for a picture",
        "remove it",
    ),
    _error(
        "expert_too_long",
        "too_long",
        "prompt and expert response together exceed flow.fit.max_tokens",
        "raise flow.fit.max_tokens, or drop the row",
    ),
    _warning(
        "response_wrong",
        "the expert's own answer is graded wrong against the gold answer",
        "drop the row, or correct one of the two",
    ),
    _warning(
        "response_no_answer",
        "no answer is found in the expert response, as reward.answer looks for it",
        "check reward.answer, or add the answer",
    ),
    _warning(
        "response_format",
        "the format reward of the expert response is zero",
        "check reward.format, or bring the responses into it",
    ),
    _warning(
        "response_special_tokens",
        "the expert response spells a special token, which is read as that token",
        "remove it; the end of the response is added by itself",
    ),
    # between rows
    _warning(
        "duplicate_row",
        "an earlier row has the same question, pictures and answer",
        "drop one of them",
    ),
    _warning(
        "answer_conflict",
        "an earlier row has the same question and pictures, but another gold answer",
        "find out which is right, and drop the other",
    ),
    _warning(
        "overlap_problem",
        "a row of data.eval has the same question and pictures",
        "drop the row here: the accuracy would be of what was trained on",
    ),
    _warning(
        "overlap_image",
        "a row of data.eval has one of the pictures, with another question",
        "drop the row here, or be sure that it does not matter",
    ),
    _warning(
        "overlap_text",
        "a row of data.eval has this long question word for word, with other pictures",
        "check whether the pictures are the same ones in another file",
    ),
    # the file
    _error(
        "file_unreadable",
        "",
        "the file cannot be read, or has no rows",
        "check its path and format",
    ),
    _error(
        "too_few_rows",
        "",
        "fewer usable rows than rollout.num_prompts",
        "add rows, or lower rollout.num_prompts",
    ),
    _error(
        "row_crash",
        "",
        "the process that read the row died or hung, twice",
        "drop the row, and look at its pictures",
    ),
)
KINDS: dict[str, Kind] = {kind.id: kind for kind in _ALL}
