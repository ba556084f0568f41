"""How a plan is worded."""

from __future__ import annotations

from rlfr_vlm.config import Config
from rlfr_vlm.errors import UserError
from rlfr_vlm.shares import points

Lines = list[tuple[str, str]]  # name, text
SHOWN = 8  # numbers of a list that are spelled out


def learning_rate(peak: float, updates: int | None, warmup_frac: float, min_ratio: float) -> str:
    """Peak, warm-up and decay."""
    end = "constant after that" if min_ratio == 1 else f"then a cosine down to {peak * min_ratio:g}"
    if updates is None:
        return f"{peak:g} after {points(warmup_frac, 0)}% of warm-up, {end}"
    warmup = int(updates * warmup_frac)
    return (
        f"{peak:g} after {number(warmup)} {'update' if warmup == 1 else 'updates'} of warm-up, "
        f"{end}"
    )


def bad_rows_file(cfg: Config) -> Lines:
    """Where rows that are left out are written."""
    return (
        [(f"{cfg.output_dir}/bad_rows.jsonl", "rows left out, with the reason")]
        if cfg.data.on_bad_row == "skip"
        else []
    )


def required(value: str | None, field: str) -> str:
    """The value. Raises UserError where the field is unset."""
    if value is None:
        raise UserError(f"{field} is required for this command")
    return value


def listed(numbers: list[int], form: str = "{}") -> str:
    """`50, 100, 150`; a long list with its middle left out."""
    text = [form.format(n) for n in numbers]
    return ", ".join(text if len(text) <= SHOWN else [*text[: SHOWN - 3], "...", *text[-2:]])


def number(value: int) -> str:
    """With thousands set apart."""
    return f"{value:,}"


def gib(size: int) -> str:
    """Bytes, as GiB."""
    return f"{size / 2**30:,.1f} GiB"


def due_steps(every: int, steps: int) -> list[int]:
    """Steps after which something done every so many steps (0: never) is done; the last step
    counts.
    """
    return [*range(every, steps, every), steps] if every else []
