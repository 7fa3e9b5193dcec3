"""Score labeled boxes against those of a reference, in [0, 1]; higher is better."""

from collections.abc import Sequence

from evaluation.text_scores import normalized

IOU_MATCH = 0.5  # least overlap at which a box counts as found (PASCAL VOC's criterion)

Box = Sequence[float]  # ymin, xmin, ymax, xmax


def box_matches(
    predicted: Sequence[tuple[str, Box]], reference: Sequence[tuple[str, Box]], threshold: float = IOU_MATCH
) -> int:
    """Count the (label, box) pairs that match one of the reference: same label, overlap of `threshold` or more.

    Matching is greedy, largest overlap first, and each box matches once at most.
    """
    pairs = sorted(
        (
            (-intersection_over_union(box, other), i, j)
            for i, (label, box) in enumerate(predicted)
            for j, (name, other) in enumerate(reference)
            if normalized(label) == normalized(name)
        ),
    )
    used_predicted: set[int] = set()
    used_reference: set[int] = set()
    for negative_overlap, i, j in pairs:
        if -negative_overlap >= threshold and i not in used_predicted and j not in used_reference:
            used_predicted.add(i)
            used_reference.add(j)
    return len(used_predicted)


def box_f1(
    predicted: Sequence[tuple[str, Box]], reference: Sequence[tuple[str, Box]], threshold: float = IOU_MATCH
) -> float:
    """Return 2 x matches / (boxes predicted + boxes in the reference); 1 where both are empty."""
    total = len(predicted) + len(reference)
    return 2.0 * box_matches(predicted, reference, threshold) / total if total else 1.0


def intersection_over_union(a: Box, b: Box) -> float:
    """Return the overlap of two boxes (ymin, xmin, ymax, xmax), in any unit."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    if height <= 0 or width <= 0:
        return 0.0
    union = _area(a) + _area(b) - height * width
    return height * width / union


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
