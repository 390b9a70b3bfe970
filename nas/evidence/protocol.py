"""A protocol: what is asked, of what, and how it will be decided, written down before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nas.base.files import read_json, write_json
from nas.contracts import UserError, digest_of


@dataclass(frozen=True)
class Protocol:
    """`arms`: what is compared, by name, in words; `reference`: what with. `outcome`: the measured number, the less the better. `margin`: how much more of it
    still counts as no loss, in the unit that `outcome` names; 0 asks for no worse at all. `test`: the statistic that decides. `stopping`: when it ends. `after`:
    the protocol that this one tries again, and why, where there was one. `settings`: every number that a run of it reads.

    Raises UserError where it leaves out what has to be said beforehand.
    """

    name: str
    question: str
    arms: Mapping[str, str]
    reference: str
    seeds: tuple[int, ...]
    outcome: str
    margin: float
    test: str
    stopping: str
    after: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in ("name", "question", "arms", "reference", "seeds", "outcome", "test", "stopping"):
            if not getattr(self, one):
                raise UserError(f"protocol {self.name or 'without a name'} does not say its {one}; a protocol says all")
        if len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"protocol {self.name} names a seed twice, {self.seeds}; give each once")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise UserError(f"protocol {self.name} has the margin {self.margin}; give 0 or more")

        object.__setattr__(self, "margin", float(self.margin))  # 1 is written as it is read, 1.0

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of all that it says."""
        return digest_of(asdict(self))

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Protocol:
        """Raises UserError where the file is missing, damaged, or says what no protocol does."""
        return cls.from_json(read_json(path, "restore it: a protocol is not written anew after its rows"), str(path))

    @classmethod
    def from_json(cls, told: Mapping[str, Any], where: str) -> Protocol:
        """`where`: named by the UserError for a mapping that is none."""
        known = [one.name for one in fields(cls)]
        unknown = sorted(set(told) - set(known))
        missing = [name for name in known if name not in told and name not in ("after", "settings")]
        if unknown or missing:
            raise UserError(f"{where} is no protocol: " + _words(unknown, missing))
        if not isinstance(told["margin"], int | float) or not isinstance(told["seeds"], list):
            raise UserError(f"{where} is no protocol: margin is a number, seeds are a list")
        return cls(**{**told, "seeds": tuple(told["seeds"]), "margin": float(told["margin"])})


def _words(unknown: list[str], missing: list[str]) -> str:
    said = [f"it says {', '.join(unknown)}"] if unknown else []
    return "; ".join([*said, *([f"it lacks {', '.join(missing)}"] if missing else [])])
