"""What the passes did to the network, layer by layer, and what they skipped and why."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One pass at one place.

    action: a verb phrase, the same for every layer ("equalized"). where: the layer, or the layers of a region.
    detail: what was measured; of what was skipped, the reason.
    """

    action: str
    where: str
    detail: str = ""
    skipped: bool = False


@dataclass
class PassLog:
    """The passes write it; the summary, the report and --verbose read it.

    notes, warnings: of the whole network; a warning also says what to try. weights: by pass and layer, the smallest and
    the largest weight [C_out, 2] of every channel.
    """

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def applied(self, action: str, where: str, detail: str = "") -> None:
        self.entries.append(Entry(action, where, detail))

    def skipped(self, action: str, where: str, reason: str) -> None:
        self.entries.append(Entry(action, where, reason, skipped=True))

    def note(self, text: str) -> None:
        """Something of the whole network that its user should know."""
        self.notes.append(text)

    def warn(self, text: str) -> None:
        """Something that may cost accuracy, and what to try."""
        self.warnings.append(text)

    def counts(self) -> dict[str, dict[str, int]]:
        """For each action, at how many places it was 'applied' and 'skipped'."""
        applied = Counter(entry.action for entry in self.entries if not entry.skipped)
        skipped = Counter(entry.action for entry in self.entries if entry.skipped)
        actions = dict.fromkeys(entry.action for entry in self.entries)
        return {action: {"applied": applied[action], "skipped": skipped[action]} for action in actions}

    def summary(self) -> str:
        """A line per action: at how many places it was applied, at how many skipped, and the commonest reasons."""
        lines = []
        for action, count in self.counts().items():
            line = f"  {action:<28} {count['applied']:>5}"
            if count["skipped"]:
                line += f"   skipped {count['skipped']}: {'; '.join(self.reasons(action))}"
            lines.append(line)
        return "\n".join([*lines, *(f"  note: {text}" for text in self.notes), *self.warning_lines()])

    def warning_lines(self) -> list[str]:
        return [f"  warning: {text}" for text in self.warnings]

    def reasons(self, action: str) -> list[str]:
        """The commonest reasons for which an action was skipped, each behind its number."""
        # Reasons that differ only in the name they end on are counted together.
        found = (entry.detail for entry in self.entries if entry.skipped and entry.action == action)
        merged = Counter(reason.partition(" '")[0] for reason in found)
        return [f"{number} {reason}" for reason, number in merged.most_common(3)]

    def report(self, verbose: bool) -> str:
        return f"{self.listing()}\n{self.summary()}" if verbose else self.summary()

    def listing(self) -> str:
        """A line per entry."""
        lines = []
        for entry in self.entries:
            detail = f" ({entry.detail})" if entry.detail else ""
            lines.append(f"  {'skipped, ' if entry.skipped else ''}{entry.action}: {entry.where}{detail}")
        return "\n".join(lines)
