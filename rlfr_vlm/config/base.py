"""What every section of the configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def refuse(wrong: object, why: str) -> None:
    """For checks across fields: raises ValueError, which becomes one line that names the field."""
    if wrong:
        raise ValueError(why)
