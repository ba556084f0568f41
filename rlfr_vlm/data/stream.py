"""Prompts of a run, one batch after another: their order, and rows that turn out bad replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rlfr_vlm.data.bad_rows import BadRows, RowError
from rlfr_vlm.data.digests import RowDigests
from rlfr_vlm.data.render import Renderer
from rlfr_vlm.errors import UserError
from rlfr_vlm.ranks import ALONE, Ranks
from rlfr_vlm.types import EncodedPrompt, Prompt


class PromptStream:
    """Prompts in a seeded order, a new one each epoch, from a position that a checkpoint can
    hold.
    """

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.position = 0  # rows drawn since the start

    def draw(self) -> int:
        """Index of the next row."""
        epoch, offset = divmod(self.position, self.size)
        self.position += 1
        if not self.shuffle:
            return offset
        import torch  # here: who only reads rows need not wait for it

        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = (
                epoch,
                torch.randperm(self.size, generator=generator).tolist(),
            )
        return self._order[offset]


class PromptSource:
    """Encoded training prompts, in the stream's order; rows that turn out bad when opened are
    replaced by the next ones.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        renderer: Renderer,
        stream: PromptStream,
        bad: BadRows,
        check: Callable[[EncodedPrompt], None] | None = None,
        rows: RowDigests | None = None,
    ) -> None:
        """check: raises RowError for an encoded prompt that cannot be used after all. rows: of the
        data set as it was read, for checkpoints.
        """
        self.prompts, self.renderer, self.stream, self.bad, self.check = (
            prompts,
            renderer,
            stream,
            bad,
            check,
        )
        self.rows = rows or RowDigests()
        self._known_bad: set[int] = set()
        self._held: int | None = None

    def next(self, count: int, ranks: Ranks = ALONE) -> list[EncodedPrompt]:
        """The next `count` prompts, none of them twice: equal requests have equal seeds. With
        several ranks, who share the encoding, those at `ranks.places(count)`.

        A row that turns out bad is replaced, in its place, by the next one. Raises UserError as
        `data.on_bad_row` says, or when fewer rows than that can be used.
        """
        drawn: dict[int, int] = {}  # place -> row
        encoded: dict[int, EncodedPrompt] = {}
        while len(drawn) < count:
            for place in range(count):
                if place not in drawn:
                    drawn[place] = self._draw(count, drawn.values())
            problems = []
            for place in ranks.places(count):
                if place not in encoded:
                    try:
                        encoded[place] = self._encode(self.prompts[drawn[place]])
                    except RowError as error:
                        problems.append((place, error.kind, str(error)))
            for place, kind, message in sorted(ranks.merge(problems, "encoding prompts")):
                row = drawn.pop(place)
                self.bad.add(self.prompts[row].id, RowError(kind, message), len(self.prompts))
                self._known_bad.add(row)
        return [encoded[place] for place in ranks.places(count)]

    @property
    def position(self) -> int:
        """Where a run that resumes has to go on: rows drawn, less those drawn since `hold`, which
        nobody has learnt from.
        """
        return self.stream.position if self._held is None else self._held

    def hold(self) -> None:
        """What is drawn from now on is drawn ahead."""
        self._held = self.stream.position

    def release(self) -> None:
        """Nothing is drawn ahead any more."""
        self._held = None

    def _draw(self, count: int, taken: Iterable[int]) -> int:
        """The next row of the stream that is neither bad nor taken."""
        if count > (usable := len(self.prompts) - len(self._known_bad)):
            raise UserError(
                f"{count} different rows are needed per step, but the data set has {usable} that "
                "can be used"
            )
        while (row := self.stream.draw()) in self._known_bad or row in taken:
            continue
        return row

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        encoded = self.renderer.encode(prompt)
        if self.check is not None:
            self.check(encoded)
        return encoded


def encode_all(
    prompts: Sequence[Prompt],
    renderer: Renderer,
    bad: BadRows,
    check: Callable[[EncodedPrompt], None] | None = None,
    num_rows: int | None = None,
) -> list[EncodedPrompt]:
    """Encode a whole (small) data set; bad rows, and those that `check` raises RowError for, as
    `data.on_bad_row` says.

    num_rows: of the data set that these prompts are a part of.
    """
    encoded = []
    for prompt in prompts:
        try:
            found = renderer.encode(prompt)
            if check is not None:
                check(found)
            encoded.append(found)
        except RowError as error:
            bad.add(prompt.id, error, num_rows or len(prompts))
    return encoded
