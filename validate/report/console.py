"""The summary on stdout: dense and compressed side by side, then what became of each kind of layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from validate.report.summary import asked, change, figure, megabytes, millions, readable

if TYPE_CHECKING:
    from validate.report.summary import Report

BAR = 20  # characters of a whole matrix


def console(report: Report) -> str:
    """The summary as text, figures as in summary.md."""
    recipe = report.recipe
    parts = [
        [f"{report.name} ({report.model['family']}), compressed: {recipe['structure']}, rotation {recipe['rotation']}"],
        _aligned(_figures(report), ("<", ">", ">", "<")),
        _aligned(_layers(report), ("<", "<", ">", ">", ">", ">")),
        _parity(report),
        [f"warning: {warning}" for warning in (report.quality or {}).get("warnings", [])],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _figures(report: Report) -> list[tuple[str, ...]]:
    """(what, dense, compressed, a remark) for everything that was measured."""
    size, quality, speed = report.size, report.quality, report.speed
    kept = f"{size['model_ratio']:.2%} kept; of the projections {size['ratio']:.2%} (asked {asked(report.recipe)})"
    rows: list[tuple[str, ...]] = [
        ("", "dense", "compressed", ""),
        ("parameters", millions(size["dense_parameters"]), millions(size["parameters"]), kept),
    ]
    if quality is not None:
        protocol, before, after = quality["protocol"], *(quality[s]["perplexity"] for s in ("dense", "compressed"))
        text = f"{protocol['windows']} x {protocol['window']} tokens of {quality['data']['name']}"
        remark = f"{change(quality['relative_increase'])} on {text}"
        rows.append(("perplexity", readable(before), readable(after), remark))
    if speed is not None:
        for case in speed["cases"]:
            rates = (f"{case[f'tokens_per_second_{side}']:,.1f} tok/s" for side in ("dense", "compressed"))
            rows.append((case["name"], *rates, case_line(case)))
        before, after = (speed["peak_memory"][side]["peak"] for side in ("dense", "compressed"))
        rows.append(("peak memory", megabytes(before), megabytes(after), f"{after / before:.1%}"))
    for case in report.engine["cases"] if report.engine is not None else ():
        ways = [f"{way} {case[way]['speedup']:.3f}x" for way in ("native", "cpp") if way in case]
        rows.append((f"{case['name']}, GPU", "", "", ", ".join(ways)))
    return rows


def case_line(case: dict[str, Any]) -> str:
    """A measured speed-up beside what the sizes allow."""
    return (
        f"{case['speedup']:.3f}x (limit {case['limit']:.3f}x by {case['limit_by']}, {case['share_of_limit']:.1%} of it)"
    )


def _layers(report: Report) -> list[tuple[str, ...]]:
    """(role, a bar of what is kept, the share, mean and largest error, layers left dense) for each kind of layer."""
    from validate.report.plots import roles_of

    rows: list[tuple[str, ...]] = [("layers", "kept of their weights", "", "error, mean", "worst", "left dense")]
    for role, records in roles_of(report.fit).items():
        dense_parameters = [r["dense_parameters"] for r in records]
        share = sum(r["kept"] * size for r, size in zip(records, dense_parameters, strict=True)) / sum(dense_parameters)
        errors = [r["relative_error"] or 0.0 for r in records]
        dense = sum(r["structure"] == "dense" for r in records)
        bar = ("#" * round(BAR * min(share, 1))).ljust(BAR, ".")
        figures = (
            f"{share:.0%}",
            f"{sum(errors) / len(errors):.3f}",
            f"{max(errors):.3f}",
            f"{dense} of {len(records)}",
        )
        rows.append((role, bar, *figures))
    return rows


def _parity(report: Report) -> list[str]:
    """A line for each rung, and for each fit that failed."""
    lines = []
    for rung in report.parity or []:
        verdict = "passed" if rung["passed"] else "FAILED"
        value = f"{figure(rung['value'])} (tolerance {rung['tolerance']:g})"
        lines.append(f"parity rung {rung['number']}  {value} {verdict}: {rung['title']}")
    failed = [r["name"] for r in report.fit if r.get("failed")]
    if failed:
        lines.append(f"failed fits: {', '.join(failed)} were left as they were (summary.md)")
    return lines


def _aligned(rows: list[tuple[str, ...]], sides: tuple[str, ...]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    cells = ([f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in cells]
