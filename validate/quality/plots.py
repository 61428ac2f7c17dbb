"""Perplexity against the size of the calibration text, a line for each text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.lazy import require


def plot_calibration(
    rows: Sequence[dict[str, Any]], dense: float, sequence_length: int, path: Path, title: str
) -> None:
    """`rows` of group calibration, by their recipe's calibration; those that failed are left out.

    Both axes are logarithmic. Raises MissingDependencyError without matplotlib.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    sizes = set()
    for source, points in calibration_series(rows).items():
        xs, ys, errors = zip(*points, strict=True)
        axes.errorbar(xs, ys, yerr=errors, marker="o", markersize=4, linewidth=1, capsize=2, label=source)
        sizes |= set(xs)
    axes.axhline(dense, color="0.4", linewidth=1, linestyle="--", label="dense")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(sizes), [str(size) for size in sorted(sizes)])
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(f"calibration sequences of {sequence_length:,} tokens")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def calibration_series(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float, float]]]:
    """Text -> (sequences, perplexity, its standard error), in order of size."""
    series: dict[str, list[tuple[int, float, float]]] = {}
    for row in rows:
        if row["group"] == "calibration" and row["error"] is None:
            calibration = row["recipe"]["calibration"]
            point = (int(calibration["samples"]), row["perplexity"], row["standard_error"] or 0.0)
            series.setdefault(calibration["data"], []).append(point)
    return {source: sorted(points) for source, points in series.items()}


def require_matplotlib() -> None:
    """Raise MissingDependencyError without matplotlib: before hours of work, not after."""
    require("matplotlib", pip="'procrustes-llm[eval]'", purpose="draw the plot of --sensitivity-plot")
