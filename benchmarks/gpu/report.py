"""Write the results as tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def as_markdown(found: Mapping[str, Any]) -> str:
    """Return tables of the sections that have run."""
    machine = found["machine"]
    lines = [f"# {machine['device']}, torch {machine['torch']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}", ""]
    if "correctness" in found:
        lines += ["## Correctness", "", *_table(("check", "result", "largest relative error"), _checks(found))]
    if "kernels" in found:
        lines += [
            "## T5 attention, bf16, forward and backward",
            "",
            *_table(KERNEL_COLUMNS, _kernels(found["kernels"])),
        ]
    if "steps" in found:
        lines += ["## Training steps, bf16", "", *_table(STEP_COLUMNS, _steps(found["steps"]))]
        for name, each in found["steps"].items():
            if "trace" in each:
                lines += [f"### Kernels of one step: {name}", "", *_trace(each["trace"])]
    return "\n".join(lines) + "\n"


KERNEL_COLUMNS = ("attention", "median ms", "least", "largest", "MiB", "plain / this")
STEP_COLUMNS = (
    "step",
    "examples",
    "step s",
    "least",
    "largest",
    "examples/s",
    "TFLOP/s",
    "MFU",
    "GiB",
    "/ Hugging Face",
)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(columns), _row(["---"] * len(columns)), *map(_row, rows), ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _checks(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, each in found["correctness"].items():
        errors = each.get("errors", {})
        worst = max(errors, key=errors.__getitem__, default="")
        result = each.get("failed") or ("right" if each["ok"] else "WRONG")
        rows.append([name, result, f"{errors[worst]:.1e} ({worst})" if worst else "-"])
    return rows


def _kernels(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [[name, each["failed"], *["-"] * 4] for name, each in found.items() if "failed" in each]
    found = {name: row for each in found.values() for name, row in each.get("rows", {}).items()}
    for name, each in sorted(found.items()):
        if "failed" in each:
            rows.append([name, each["failed"], *["-"] * 4])
            continue
        plain = found.get(f"{name.rpartition(', ')[0]}, plain", {}).get("median_ms")
        memory = f"{each['memory_mib']:.0f}" if "memory_mib" in each else "-"
        times = [f"{each[key]:.2f}" for key in ("median_ms", "least_ms", "largest_ms")]
        rows.append([name, *times, memory, f"{plain / each['median_ms']:.2f}" if plain else "-"])
    return rows


def _steps(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, each in found.items():
        if "failed" in each:
            rows.append([name, each["failed"], *["-"] * 8])
            continue
        theirs = found.get(f"{name.removesuffix(', ours')}, Hugging Face", {}).get("examples_per_s")
        rows.append([
            name, str(each["examples"]), *(f"{each[key]:.3f}" for key in ("step_s", "least_s", "largest_s")),
            f"{each['examples_per_s']:.1f}", f"{each['tflops']:.1f}", f"{each['mfu']:.1%}" if each["mfu"] else "-",
            f"{each['memory_gib']:.1f}" if each["memory_gib"] else "-",
            f"{each['examples_per_s'] / theirs:.2f}" if theirs and name.endswith("ours") else "-",
        ])  # fmt: skip
    return rows


def _trace(trace: Mapping[str, Any]) -> list[str]:
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in trace["shares"].items())
    lines = [f"{shares}; idle {trace['idle']:.0%} of the step; {trace['launches']:,} launches.", ""]
    rows = [[f"`{each['kernel']}`", f"{each['ms']:.2f}", str(each["calls"])] for each in trace["slowest"]]
    return lines + _table(("slowest kernels", "ms", "calls"), rows)
