"""Show a run to the user: a live table on a terminal, plain lines elsewhere (logs of batch jobs)."""

import time
from collections import Counter
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table

from train.run.metrics_file import Line

PLAIN_EVERY_S = 10.0
TABLE_WIDTH = 110  # characters
MOST_NAMED = 3  # causes of skipped records, or components, in a line
SHARE_TOLERANCE = 0.05  # relative: a component whose share misses the configured one by more is reported
PLAIN_FIRST_STEPS = 3  # printed at once, so that a log soon shows that the run works


class Display:
    """Show a run to the user; this base class shows nothing, and serves every rank but the main one."""

    def step(self, line: Line) -> None:
        """Show the metrics of a step."""

    def note(self, text: str) -> None:
        """Show one line of text."""

    def close(self) -> None:
        """End the display with the run."""


class Progress(Display):
    """Compute the facts that displays show, with the time that is left at the pace of this process so far."""

    def __init__(self, name: str, total_steps: int) -> None:
        self.name, self.total_steps = name, total_steps
        self.started: tuple[float, int] | None = None
        self.skipped: Counter[str] = Counter()  # records by "<source>/<cause>" since this process began

    def left(self, step: int) -> str:
        """Return the time to the end as h:mm:ss."""
        if self.started is None:
            self.started = (time.monotonic(), step)
        began, first = self.started
        if step == first:
            return "?"
        return str(timedelta(seconds=round((time.monotonic() - began) / (step - first) * (self.total_steps - step))))

    def facts(self, line: Line) -> list[tuple[str, str]]:
        """Return (name, value with its unit) of each fact that is shown."""
        step = line["step"]
        facts = [
            ("step", f"{step}/{self.total_steps}"),
            ("loss", _nats(line["loss"])),
            ("gradient norm", "skipped" if line["grad_norm"] is None else f"{line['grad_norm']:.3g}"),
            ("learning rate", f"{line['lr']:.2e}"),
            ("speed", f"{line['examples_per_s']:.1f} examples/s, {line['tokens_per_s']:.0f} tokens/s"),
            (
                "compute",
                f"{line['tflops_per_device']:.3g} TFLOP/s per device" + _percent(line["mfu"], " of peak", ", "),
            ),
            ("padding", _percent(line["padding_fraction"])),
            ("data wait", f"{1000 * line['data_wait_s']:.0f} ms"),
            ("memory", f"{line['memory_gib']:.2f} GiB"),
            *self._skipped(line),
            *_slowest(line),
            ("left", self.left(step)),
        ]
        if "validation/loss" in line:
            facts.insert(2, ("validation loss", _nats(line["validation/loss"])))
        return facts

    def _skipped(self, line: Line) -> list[tuple[str, str]]:
        """Return the number of records skipped so far, with the most frequent causes."""
        for key, count in line.items():
            if key.startswith("skipped/"):
                self.skipped[key.removeprefix("skipped/")] += count
        if not self.skipped:
            return []
        named = [f"{count:,} x {cause}" for cause, count in self.skipped.most_common(MOST_NAMED)]
        if (more := len(self.skipped) - MOST_NAMED) > 0:
            named.append(f"{more} more cause{'s' * (more > 1)}")
        return [("skipped records", f"{self.skipped.total():,} ({', '.join(named)})")]


class Plain(Progress):
    """Print lines of text, at most one every PLAIN_EVERY_S seconds after the first steps."""

    def __init__(self, name: str, total_steps: int, console: Console) -> None:
        super().__init__(name, total_steps)
        self.console = console
        self.shown, self.last = 0, 0.0

    def step(self, line: Line) -> None:
        """See Display.step."""
        now = time.monotonic()
        facts = [*self.facts(line), *_parted(line)]
        due = now - self.last >= PLAIN_EVERY_S or self.shown < PLAIN_FIRST_STEPS
        if due or line["step"] == self.total_steps or "validation/loss" in line or _is_refused(line):
            self.shown, self.last = self.shown + 1, now
            self.note(" | ".join(f"{name} {value}" for name, value in facts))

    def note(self, text: str) -> None:
        """See Display.note."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)


class LiveTable(Progress):
    """Redraw a table in place."""

    def __init__(self, name: str, total_steps: int, console: Console) -> None:
        super().__init__(name, total_steps)
        self.validation: dict[str, float] = {}
        self.live = Live(console=console, refresh_per_second=4)
        self.live.start()

    def step(self, line: Line) -> None:
        """See Display.step."""
        self.validation |= {key: value for key, value in line.items() if key.startswith("validation/loss")}
        table = Table(title=self.name, show_header=False)
        for name, value in self.facts(line | self.validation):
            table.add_row(name, value)
        for key, value in line.items():
            if key.startswith("loss/"):
                objective = key.removeprefix("loss/")
                accuracy = _percent(line[f"accuracy/{objective}"], " of tokens right", ", ")
                table.add_row(objective, f"{value:.4f} nats{accuracy}")
        for name, asked, achieved in _shares(line):
            table.add_row(name, f"share {_percent(achieved) or 'none'}{_percent(asked, ' asked', ' of ')}")
        self.live.update(table)

    def note(self, text: str) -> None:
        """See Display.note."""
        self.live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """See Display.close."""
        self.live.stop()


def open_display(name: str, total_steps: int, rank: int) -> Display:
    """Return the display of this rank."""
    if rank != 0:
        return Display()
    console = Console()
    return LiveTable(name, total_steps, console) if console.is_terminal else Plain(name, total_steps, console)


def as_text(table: Table) -> str:
    """Return a table as lines of text, for `note`."""
    console = Console(width=TABLE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def _nats(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f} nats"


def _is_refused(line: Line) -> bool:
    """Return whether the guard skipped the step; a step without any target is not urgent."""
    return line["grad_norm"] is None and "empty_steps" not in line


def _shares(line: Line) -> list[tuple[str, float, float | None]]:
    """Return (component, asked, achieved) of each component of the mixture."""
    names = [key.removeprefix("share_asked/") for key in line if key.startswith("share_asked/")]
    return [(name, line[f"share_asked/{name}"], line[f"share/{name}"]) for name in names]


def _parted(line: Line) -> list[tuple[str, str]]:
    """Return the components whose achieved share is furthest from the configured one, if any is far."""
    far = [(abs((got or 0.0) / asked - 1), name, asked, got or 0.0) for name, asked, got in _shares(line) if asked]
    worst = sorted((each for each in far if each[0] > SHARE_TOLERANCE), reverse=True)[:MOST_NAMED]
    listing = ", ".join(f"{name} {_percent(got)} of {_percent(asked)} asked" for _, name, asked, got in worst)
    return [("shares", listing or "as asked")] if far else []


def _percent(fraction: float | None, what: str = "", before: str = "") -> str:
    return "" if fraction is None else f"{before}{100 * fraction:.1f} %{what}"


def _slowest(line: Line) -> list[tuple[str, str]]:
    """Return the rank that works longest in a step, where there are several."""
    if not line.get("communication_wait_s"):
        return []
    busy, median = (1000 * line[name] for name in ("slowest_rank_busy_s", "median_rank_busy_s"))
    return [("slowest rank", f"{line['slowest_rank']}, busy {busy:.0f} ms (median {median:.0f} ms)")]
