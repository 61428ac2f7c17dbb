"""The plots of reports/: layers.png, size and error of each layer, and frontier.png, this artifact against dense.

Colours differ for people with any kind of colour vision: Okabe and Ito's for roles, each with a marker of its
own, and `cividis` for fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.lazy import require
from validate.report.summary import change, kept_of, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ORDER = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
DENSE, COMPRESSED, LIMIT = "#000000", "#0072B2", "#777777"


def roles_of(fit: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of checkpoint/fit.json by role, in the order of a block, each with its "block" and "kept" share."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in fit:
        _, block, role = record["name"].split(".", 2)
        found.setdefault(role, []).append({**record, "block": int(block), "kept": kept_of(record)})
    return {role: found[role] for role in ORDER if role in found}


def _figure(width: float, height: float) -> Figure:
    require("matplotlib", pip="'procrustes-llm[eval]'", purpose="draw the plots of reports/ (or give --no-plot)")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_layers(fit: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Kept share and error of every linear by block and role, and one against the other."""
    roles = roles_of(fit)
    figure = _figure(9, 9.5)
    figure.suptitle(f"{title}: size and error of each layer")
    sizes, errors, both = figure.subplots(3, 1, height_ratios=(1, 1, 1.9))
    _field(figure, sizes, roles, "kept", "kept share\nof the weights", (0.0, 1.0))
    _field(figure, errors, roles, "relative_error", "relative error\nof the output", (0.0, None))
    for (role, records), colour, marker in zip(roles.items(), COLOURS, MARKERS, strict=False):
        dense = sum(r["structure"] == "dense" for r in records)
        both.scatter(
            [100 * r["kept"] for r in records],
            [r["relative_error"] or 0.0 for r in records],
            s=30,
            color=colour,
            marker=marker,
            alpha=0.85,
            linewidths=0,
            label=role if not dense else f"{role} ({dense} dense)",
        )
    both.set_xlabel("kept share of the layer's weights [%]")
    both.set_ylabel("relative error of the layer's output\non the calibration text")
    both.set_title("One point a layer (a dense one errs by what makes up for the others)", fontsize="medium")
    both.set_ylim(0, 1.2 * max(*(r["relative_error"] or 0.0 for r in fit), 1e-3))
    both.grid(alpha=0.3)
    both.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def _field(
    figure: Figure,
    axes: Axes,
    roles: dict[str, list[dict[str, Any]]],
    key: str,
    label: str,
    limits: tuple[float, float | None],
) -> None:
    """A figure of every linear as a colour: a row for each role, a column for each block."""
    blocks = 1 + max(r["block"] for records in roles.values() for r in records)
    table = [[float("nan")] * blocks for _ in roles]
    for row, records in zip(table, roles.values(), strict=True):
        for record in records:
            row[record["block"]] = record[key] or 0.0
    image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set_yticks(range(len(roles)), list(roles))
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes, label=label, pad=0.01)


def plot_frontier(
    size: dict[str, Any], quality: dict[str, Any], speed: dict[str, Any] | None, path: Path, title: str
) -> None:
    """Perplexity against size and against speed: the dense model, and this artifact."""
    figure = _figure(9, 4.6)
    protocol = quality["protocol"]
    figure.suptitle(f"{title}: what the compression costs, and what it brings")
    count = 1 if speed is None else 2
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    before, after = (quality[side]["perplexity"] for side in ("dense", "compressed"))
    smaller = panels[0]
    dense, kept = size["dense_parameters"] / 1e6, size["parameters"] / 1e6
    arrow = {"arrowstyle": "->", "color": LIMIT, "shrinkA": 6, "shrinkB": 6}
    smaller.annotate("", (kept, after), (dense, before), arrowprops=arrow)
    smaller.plot(dense, before, "o", color=DENSE, markersize=8, label=f"dense: {dense:,.1f} M, {readable(before, 2)}")
    cost = f"{size['model_ratio']:.1%} of the size, perplexity {change(quality['relative_increase'])}"
    label = f"compressed: {kept:,.1f} M, {readable(after, 2)}\n({cost})"
    smaller.plot(kept, after, "s", color=COMPRESSED, markersize=8, label=label)
    smaller.legend(fontsize="small", loc="lower left")
    smaller.set_xlabel("parameters of the model [millions]")
    smaller.set_ylabel(
        "perplexity, lower is better\n"
        f"({protocol['windows']} x {protocol['window']} tokens of {quality['data']['name']})"
    )
    smaller.set_xlim(0, 1.15 * dense)
    if speed is not None:
        faster = panels[1]
        faster.plot(1, before, "o", color=DENSE, markersize=8, label="dense")
        for case, marker, colour in zip(speed["cases"], MARKERS[1:], COLOURS, strict=False):
            faster.plot(case["limit"], after, marker, color=LIMIT, markersize=11, fillstyle="none")
            faster.plot(case["speedup"], after, marker, color=colour, markersize=7, label=case["name"])
        faster.plot([], [], "s", color=LIMIT, markersize=9, fillstyle="none", label="what its size allows")
        faster.set_xlabel(f"times the dense model's speed\n({speed['runtime']}, {speed['threads']} thread(s))")
        faster.axvline(1, color=DENSE, linewidth=0.8, alpha=0.4)
        most = max(max(case["limit"], case["speedup"]) for case in speed["cases"])
        faster.set_xlim(min(0.9, 0.95 * min(case["speedup"] for case in speed["cases"])), 1.08 * max(1.0, most))
        faster.legend(fontsize="small", loc="lower right")
    for axes in panels:
        axes.grid(alpha=0.3)
    smaller.set_ylim(0, 1.25 * max(before, after))
    figure.savefig(path, dpi=120)
