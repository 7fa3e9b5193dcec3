"""Compare the shares of a mixture's components with the configured ones.

Records of a source that its objective cannot use are missing from the component's share.
"""

from collections.abc import Mapping
from typing import Any

from data.config import Mixture, shares
from train.run.display import SHARE_TOLERANCE
from train.run.metrics_file import Line

FIRST_DUE = 1_000  # examples
ROUNDING = 2  # examples by which interleaving may miss a share at any moment


class Shares:
    """Count examples by component since the phase began, those of all ranks on every rank."""

    def __init__(self, mixture: Mixture, phase: str, state: Mapping[str, Any] | None = None) -> None:
        """`state`: that of the last checkpoint, if it is of this phase; that of another mixture is ignored."""
        self.phase, self.names = phase, list(mixture)
        self.asked = shares(mixture)
        self.due, self.counts = 0, dict.fromkeys(self.names, 0)
        if state is not None and state["asked"] == self.asked:
            self.due, self.counts = state["due"], dict(state["counts"])
        self.warned = False

    @property
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for a resumed run to continue the counts."""
        return {"asked": self.asked, "due": self.due, "counts": dict(self.counts)}

    def add(self, counts: Mapping[str, int], due: int) -> None:
        """Count a step's examples by component, and the `due` ones of its global batch."""
        self.due += due
        for name in self.names:
            self.counts[name] += counts[name]

    def metrics(self) -> Line:
        """Return `share_asked/<component>`, and `share/<component>` since the phase began, in 0 … 1."""
        total = sum(self.counts.values())
        line: Line = {f"share_asked/{name}": round(share, 6) for name, share in self.asked.items()}
        return line | {f"share/{name}": round(self.counts[name] / total, 6) if total else None for name in self.names}

    def too_rare(self, steps: int, global_batch_size: int) -> str | None:
        """Return a sentence that names components so rare that a phase has less than one example of them."""
        due = {name: share * steps * global_batch_size for name, share in self.asked.items()}
        rare = ", ".join(f"{name} ({due[name]:.2g})" for name in self.names if due[name] < 1)
        if not rare:
            return None
        return (
            f"Phase {self.phase!r} asks for less than one example in its {steps:,} steps of {rare}; give it a larger "
            "weight (mixture.<name>.weight), or leave it out with 0."
        )

    def parted(self) -> list[str]:
        """Return the components whose share misses the configured one by more than SHARE_TOLERANCE and rounding."""
        total = sum(self.counts.values())
        misses = {name: abs(self.counts[name] - share * total) for name, share in self.asked.items()}
        return [
            name for name, miss in misses.items() if miss > max(SHARE_TOLERANCE * self.asked[name] * total, ROUNDING)
        ]

    def warning(self) -> str | None:
        """Return a sentence for the user, once, where shares differ after FIRST_DUE examples were due."""
        if self.warned or self.due < FIRST_DUE or not (parted := self.parted()):
            return None
        self.warned = True
        total = max(sum(self.counts.values()), 1)
        achieved = {name: self.counts[name] / total for name in parted}
        listing = ", ".join(f"{name} {achieved[name]:.2%} (asked {self.asked[name]:.2%})" for name in parted)
        return (
            f"Shares of the mixture differ from the configured ones by more than {SHARE_TOLERANCE:.0%} since phase "
            f"{self.phase!r} began: {listing}; too few records of a source serve its objective, so give it other "
            "records, or another weight (mixture.<name>.weight)."
        )
