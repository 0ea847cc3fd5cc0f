"""What a job takes of a machine's memory, phase by phase: the plan that ``--dry-run`` shows and limits come from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_ltx.errors import UserError

# Of the machine's memory; the rest is for the system and for other programs.
USABLE = 0.85
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class PhasePlan:
    """A phase and what it takes.

    Attributes:
        name, title: as in :class:`mlx_ltx.events.Phase`.
        resident: what is in memory during all of it, with bytes.
        works_in: dtype or bits of the weights that work in it.
        chunking: into what its work is divided.
        peak_bytes: the most that MLX will have in use, as predicted.
    """

    name: str
    title: str
    resident: dict[str, int]
    works_in: str
    chunking: str
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """All phases of a job.

    Attributes:
        memory_bytes: what the machine has, or was assumed to have.
        advice: what would make the job fit; empty if it does.
    """

    phases: tuple[PhasePlan, ...]
    memory_bytes: int
    advice: tuple[str, ...] = ()

    @property
    def limit_bytes(self) -> int:
        """What a phase should stay under."""
        return int(USABLE * self.memory_bytes)

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.limit_bytes

    @property
    def worst(self) -> PhasePlan:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    def check(self) -> None:
        """Refuse what cannot run.

        A job over the limit but within the machine's memory may run, slower than it should: it is only told.

        Raises:
            UserError: a phase needs more than all of the memory.
        """
        if self.peak_bytes > self.memory_bytes:
            raise UserError(self.complaint)

    @property
    def complaint(self) -> str:
        """What does not fit, and what would, in one line."""
        return (
            f"{self.worst.title} needs {size_text(self.peak_bytes)} of memory, but of {size_text(self.memory_bytes)} "
            f"only {size_text(self.limit_bytes)} should be used; what would fit: {', or '.join(self.advice)}"
        )

    def to_json(self) -> dict[str, Any]:
        totals = {"limit_bytes": self.limit_bytes, "peak_bytes": self.peak_bytes, "fits": self.fits}
        return {**asdict(self), **totals}

    def table(self) -> list[str]:
        """The plan for people, one line per phase under a heading."""
        limit = size_text(self.limit_bytes)
        rows = [("phase", "in memory", "weights", "in pieces of", "peak", "limit")]
        for phase in self.phases:
            resident = " + ".join(f"{name} {size_text(size)}" for name, size in phase.resident.items()) or "-"
            rows.append((phase.name, resident, phase.works_in, phase.chunking, size_text(phase.peak_bytes), limit))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def advise(plan: Plan, ways: Sequence[tuple[str, Plan]]) -> tuple[str, ...]:
    """Of some ways to change a request, with their plans, those that fit, in the order given."""
    fitting = [way for way, changed in ways if changed.fits]
    if plan.fits:
        return ()
    return tuple(fitting) or ("no single change is enough; make the clip smaller and shorter",)


def size_text(size: int) -> str:
    """Bytes as people read them: 1.5 GB (of 2^30 bytes, as memory is sold)."""
    if size >= 1 << 30:
        return f"{size / (1 << 30):.1f} GB"
    return f"{size / (1 << 20):.0f} MB" if size >= 10 << 20 else f"{size / (1 << 20):.1f} MB"


def parse_size(text: str) -> int:
    """``16GB``, ``16 GiB``, ``16g`` or a number of bytes, as bytes; units are powers of 1024.

    Raises:
        UserError: it is not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise UserError(f"{text!r} is not a size of memory; give one such as 16GB")
    return size
