"""The quality table as Markdown, its bars, and the text around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from validate.gates import Gate
from validate.quality.methods import BARS, Bar
from validate.report.machine import machine_text
from validate.report.markdown import markdown_table
from validate.report.summary import readable

Row = dict[str, Any]

HEADER = (
    *("method", "ratio", "kept", "projections, MB", "model, MB", "read a token, MB", "MMACs a token"),
    *("perplexity", "x dense", "KL, nats", "top-1", "compress, s", "peak, GiB"),
)
LARGEST_EXCESS = 5e-5  # of the kept ratio above the one asked for: what four digits do not show


def document(result: dict[str, Any], level: int = 2) -> str:
    """OUT/quality.md from OUT/quality.json's object, without its title; `level`: of the headings."""
    rows, parts, head = result["rows"], [_protocol_text(result)], "#" * level
    main = [row for row in rows if row["group"] == "methods"]
    ablation = [row for row in rows if row["group"] == "ablation"]
    calibration = [row for row in rows if row["group"] == "calibration"]
    parts += [f"{head} Methods", table(main), LEGEND]
    if ablation:
        full = [row for row in rows if row["key"] == result["best"]]
        parts += [f"{head} Ablation: one thing of the best recipe switched off", table(full + ablation)]
    if calibration:
        parts += [f"{head} Calibration text and its size", table(calibration)]
    if result["tasks"]:
        parts += [f"{head} Zero-shot tasks", tasks_text(result["tasks"])]
    if any(bar["value"] is not None for bar in result["bars"]):
        parts += [f"{head} Bars", bars_table(result["bars"])]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "`kept`: fraction of the projection parameters, skip and head maps counted. Bytes are those of float16; "
    "`projections` has everything that a method adds; `read a token` is a decode step at batch 1 without the cache; "
    "multiply-accumulates without attention. KL is that of dense to compressed. Seconds and memory are those of "
    "`compress.run` in a process of its own; a run whose first part was killed shows at least (>=)."
)


def table(rows: Sequence[Row]) -> str:
    """A line for each row; one that failed has the reason in place of its figures."""
    return markdown_table(HEADER, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    head = [row["title"], f"{row['asked']:g}"]
    if row["error"] is not None:
        # Cells that follow are empty; a bar would end the cell.
        reason = row["error"].replace("|", "/")
        return [*head, f"**failed**: {reason}", *[""] * (len(HEADER) - 3)]
    cost = row["cost"]
    seconds = "" if cost["seconds"] is None else ("" if cost["complete"] else ">= ") + f"{cost['seconds']:.0f}"
    return [
        *head,
        f"{row['kept']:.4f}",
        *(
            f"{row[name] / 1e6:.1f}"
            for name in ("projection_bytes", "model_bytes", "bytes_per_token", "macs_per_token")
        ),
        readable(row["perplexity"], 2) + _error(row["standard_error"], 2),
        f"{row['x_dense']:.3f}" + _error(row["x_dense_standard_error"], 3),
        f"{row['kl']:.4f}" + _error(row["kl_standard_error"], 4),
        f"{row['top1']:.1%}",
        seconds,
        "" if cost["peak_bytes"] is None else f"{cost['peak_bytes'] / 2**30:.2f}",
    ]


def _error(value: float | None, digits: int) -> str:
    return "" if value is None else f" ± {value:.{digits}f}"


# --- Bars ---


def gates(rows: Sequence[Row]) -> list[Gate]:
    """Each bar of validate/quality/methods.py; one whose line did not run, or failed, has the value NaN and fails."""
    by_key = {row["key"]: row for row in rows if row["error"] is None}
    found = []
    for bar in BARS:
        limit = bar.limit
        if bar.against is not None:
            limit = _increase(by_key.get(bar.against)) / 2
        found.append(Gate(bar.name, _value(bar, by_key.get(bar.key)), math.nan if limit is None else limit))
        if bar.figure != "seconds" and bar.key in by_key:
            row = by_key[bar.key]
            found.append(Gate(f"{bar.name}-kept", row["kept"], row["asked"] + LARGEST_EXCESS))
    return found


def _value(bar: Bar, row: Row | None) -> float:
    if row is None:
        return math.nan
    if bar.figure == "seconds":
        cost = row["cost"]
        return math.nan if cost["seconds"] is None or not cost["complete"] else float(cost["seconds"])
    return float(row["x_dense"]) if bar.figure == "x_dense" else _increase(row)


def _increase(row: Row | None) -> float:
    return math.nan if row is None else float(row["x_dense"]) - 1


def bars_table(bars: Sequence[dict[str, Any]]) -> str:
    """A line for each gate."""
    rows = []
    for bar in bars:
        verdict = "passed" if bar["passed"] else ("not run" if bar["value"] is None else "**FAILED**")
        rows.append((bar["name"], _figure(bar["value"]), _figure(bar["limit"]), verdict))
    return markdown_table(("bar", "value", "limit", ""), rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def bars_json(found: Sequence[Gate]) -> list[dict[str, Any]]:
    """For quality.json; what did not run is null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return [
        {"name": gate.name, "value": number(gate.value), "limit": number(gate.limit), "passed": gate.passed}
        for gate in found
    ]


# --- Text ---


def tasks_text(results: dict[str, Any]) -> str:
    """The tables of validate/tasks/__main__.py: dense against each line that was scored."""
    from validate.tasks.scores import difference, table

    parts = []
    for key, scored in results.items():
        if key == "dense" and len(results) > 1:
            continue
        models, title = {"dense": results["dense"]}, "Dense"
        if key != "dense":
            title = f"Dense and `{key}`"
            models |= {"compressed": scored, "difference": difference(results["dense"], scored)}
        parts.append(f"{title}, in percent, main figure of each task in bold:\n\n{table(models)}")
    return "\n\n".join(parts)


def _protocol_text(result: dict[str, Any]) -> str:
    protocol, dense = result["protocol"], result["rows"][0]
    text = (
        f"{result['model']}; {protocol['windows']} windows of {protocol['window']} tokens of "
        f"{protocol['text']['name']} (rows joined by blank lines, tokenised once, no overlap), {protocol['dtype']}; "
        f"calibrated on {result['calibration']['samples']} x {result['calibration']['sequence_length']} tokens of "
        f"`{result['calibration']['data']}` where a line says nothing else. "
    )
    if "float32" in dense:
        both = dense["float32"]
        text += (
            f"The decoder ran in {protocol['dtype']}, head and softmax in float32: on the first "
            f"{both['dense']['windows']} windows the dense model's perplexity is "
            f"{both['compressed']['perplexity']:.4f}, in float32 {both['dense']['perplexity']:.4f} "
            f"({both['relative_increase']:+.3%}). "
        )
    text += machine_text(result["machine"])
    for processor in sorted({row["processor"] for row in result["rows"]} - {result["machine"]["processor"]}):
        titles = [f"{row['title']} {row['asked']:g}" for row in result["rows"] if row["processor"] == processor]
        text += f" Measured on another machine ({processor}): {'; '.join(titles)}."
    return f"{text}\n\n    {result['command']}"
