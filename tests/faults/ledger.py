"""What became of the cases of the fault suite, counted over all processes that ran tests."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

RIGHT, LINE, WRONG, LOST, TRACEBACK = (
    "right answer",
    "clear line",
    "wrong answer",
    "lost or half-written",
    "traceback",
)
OUTCOMES = (RIGHT, LINE, WRONG, LOST, TRACEBACK)


@dataclass
class Ledger:
    """What became of all cases of a run of the tests."""

    counts: dict[str, Counter] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def count(self, group: str, outcome: str) -> None:
        """Note the end of a case."""
        self.counts.setdefault(group, Counter())[outcome] += 1

    def plain(self) -> dict[str, Any]:
        """In a form that can be sent to another process."""
        return {"counts": {group: dict(counts) for group, counts in self.counts.items()}, "notes": self.notes}

    def add(self, sent: Mapping[str, Any]) -> None:
        """Add what another process sent."""
        for group, counts in sent["counts"].items():
            self.counts.setdefault(group, Counter()).update(counts)
        self.notes += sent["notes"]

    def table(self) -> list[str]:
        """Lines of a Markdown table."""
        lines = [f"| group | cases | {' | '.join(OUTCOMES)} |", "|:--|--:" + "|--:" * len(OUTCOMES) + "|"]
        total: Counter = Counter()
        for group, counts in [*sorted(self.counts.items()), ("all", total)]:
            if group != "all":
                total += counts
            figures = [sum(counts.values()), *(counts[outcome] for outcome in OUTCOMES)]
            lines.append(f"| {group} | {' | '.join(map(str, figures))} |")
        return [*lines, "", *(f"- {note}" for note in self.notes)]


_LEDGER = pytest.StashKey[Ledger]()


def ledger_of(config: pytest.Config) -> Ledger:
    """The one of this run."""
    return config.stash.setdefault(_LEDGER, Ledger())
