"""What can be wrong with a configuration, as values that a person or a program can use."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sidecar import units

Path = tuple[str | int, ...]

# Beyond this many problems the rest are counted, not listed.
PROBLEMS_MAX = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it stands, what is wrong, what would be right. All text is printable."""

    source: str  # file name
    line: int | None  # 1-based; None where the mistake has no place in the text
    column: int | None
    path: str  # dotted, as routes[2].budget; empty for the whole file
    what: str
    remedy: str

    @property
    def where(self) -> str:
        """file:line:column, as editors and compilers write it."""
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"

    def __str__(self) -> str:
        subject = f"{self.path}: " if self.path else ""
        return f"{self.where}: {subject}{self.what}; {self.remedy}"

    def record(self) -> dict[str, object]:
        """For JSON output."""
        return asdict(self)


class ConfigError(Exception):
    """A configuration that cannot be used, with every problem found in it."""

    def __init__(self, problems: list[Problem], more: int = 0) -> None:
        self.problems = tuple(problems)
        self.more = more  # found but not listed
        super().__init__(
            "\n".join([str(problem) for problem in problems] + ([f"... and {more} more"] if more else []))
        )


def dotted(path: Path) -> str:
    """("routes", 2, "budget") -> routes[2].budget; keys that aren't plain words are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        name = (
            part if part.isascii() and part.replace("_", "").replace("-", "").isalnum() else units.shown(part)
        )
        text += f".{name}" if text else name
    return text


def printable(text: str) -> str:
    """Text for a terminal: whatever could steer one stands escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
