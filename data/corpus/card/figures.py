"""Draw the counts of a corpus as PNG images."""

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MOST_BARS = 20
INK, QUIET = "#2b5d8a", "#666666"
# Title, label of an axis, and the text of a bin's number.
HISTOGRAMS: dict[str, tuple[str, str, Callable[[int], str]]] = {
    "side": ("Longer side of images", "pixels, from", lambda number: f"{2**number:,}"),
    "megapixels": ("Pixels of images", "millions", lambda number: f"{number / 10:g}"),
    "words": ("Words of a caption", "words (100: more)", str),
    "similarity": ("Similarity of image and text", "cosine", lambda number: f"{number / 100:g}"),
    "confidence": ("Confidence of the language", "confidence, from", lambda number: f"{number / 20:g}"),
}


def histogram(name: str, counts: Mapping[int, int]) -> bytes:
    """Return a histogram of HISTOGRAMS as PNG; `counts` are rows by number of a bin."""
    title, label, text = HISTOGRAMS[name]
    first, last = min(counts), max(counts)
    bins = range(first, last + 1)
    figure, axes = plt.subplots(figsize=(5, 2.6), dpi=110)
    axes.bar(list(bins), [counts.get(each, 0) for each in bins], width=0.9, color=INK)
    ticks = list(bins) if len(bins) <= 10 else [first + round(each * (last - first) / 8) for each in range(9)]
    axes.set_xticks(ticks, [text(each) for each in ticks])
    axes.set_xlabel(label)
    axes.set_ylabel("rows")
    axes.set_title(title, loc="left", fontsize=11)
    return _png(figure)


def bars(title: str, counts: Sequence[tuple[str, int]]) -> bytes:
    """Return horizontal bars of the largest counts as PNG, with the number at each bar."""
    shown = list(counts)[:MOST_BARS]
    figure, axes = plt.subplots(figsize=(5, 0.8 + 0.24 * len(shown)), dpi=110)
    places = range(len(shown))
    drawn = axes.barh(list(places), [number for _, number in shown], color=INK)
    axes.bar_label(drawn, [f"{number:,}" for _, number in shown], padding=3, fontsize=8, color=QUIET)
    axes.set_yticks(list(places), [name for name, _ in shown])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, loc="left", fontsize=11)
    return _png(figure)


def _png(figure: plt.Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})  # the same counts give the same bytes
    plt.close(figure)
    return content.getvalue()
