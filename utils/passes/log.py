"""What a run did to the network, layer by layer, and what it left out and why."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Entry:
    action: str  # a verb phrase, the same for every layer: "equalized"
    where: str  # the layer, or the pair of layers
    detail: str = ""  # what was measured; for what was left out, the reason
    left_out: bool = False


@dataclass
class Journal:
    """The passes write here; the summary and --verbose read."""

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by pass and layer: [C, 2], see weight_ranges

    def did(self, action: str, where: str, detail: str = "") -> None:
        self.entries.append(Entry(action, where, detail))

    def left(self, action: str, where: str, reason: str) -> None:
        self.entries.append(Entry(action, where, reason, left_out=True))

    def note(self, text: str) -> None:
        """Something of the whole network that its user should know."""
        self.notes.append(text)

    def counts(self) -> dict[str, dict[str, int]]:
        """For each action, how many layers were 'done' and 'left_out'."""
        done = Counter(entry.action for entry in self.entries if not entry.left_out)
        left = Counter(entry.action for entry in self.entries if entry.left_out)
        return {
            action: {"done": done[action], "left_out": left[action]}
            for action in dict.fromkeys(e.action for e in self.entries)
        }

    def summary(self) -> str:
        """A line per action: how many were done, how many left out and the commonest reasons."""
        lines = []
        for action, count in self.counts().items():
            line = f"  {action:<28} {count['done']:>5}"
            if count["left_out"]:
                line += f"   left out {count['left_out']}: {'; '.join(self.reasons(action))}"
            lines.append(line)
        return "\n".join([*lines, *(f"  note: {text}" for text in self.notes)])

    def reasons(self, action: str) -> list[str]:
        """The commonest reasons for which layers were left out, each with its number."""
        reasons = Counter(entry.detail for entry in self.entries if entry.left_out and entry.action == action)
        return [f"{number} {reason}" for reason, number in _merged(reasons).most_common(3)]

    def report(self, verbose: bool) -> str:
        return f"{self.listing()}\n{self.summary()}" if verbose else self.summary()

    def listing(self) -> str:
        """A line per entry."""
        return "\n".join(
            f"  {'left out of ' if entry.left_out else ''}{entry.action}: {entry.where}{f' ({entry.detail})' if entry.detail else ''}"
            for entry in self.entries
        )


def _merged(reasons: Counter) -> Counter:
    """Reasons that differ only in the name they end on, counted together."""
    merged = Counter()
    for reason, number in reasons.items():
        merged[reason.split(" '")[0]] += number
    return merged
