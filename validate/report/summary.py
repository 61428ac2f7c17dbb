"""reports/: what a manager reads (summary.md), what a program reads (json), and the plots of validate/report/plots.py.

Everything here is made from one dictionary, `Report`, that validate/run.py fills; what was skipped is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import catalog
from compress.artifact.reading import read_artefact_json, shown
from compress.errors import ArtifactError
from validate.report.files import write_json
from validate.report.machine import machine_text
from validate.report.markdown import markdown_table


@dataclass(frozen=True)
class Report:
    """All results of one validation. `model` and `size` describe the artifact; `fit` is checkpoint/fit.json."""

    name: str
    model: dict[str, Any]
    recipe: dict[str, Any]
    size: dict[str, Any]
    fit: list[dict[str, Any]]
    commands: list[str]
    machine: dict[str, Any]
    parity: list[dict[str, Any]] | None = None
    quality: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None
    gates: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The object that --json prints."""
        return {
            "model": self.model,
            "size": self.size,
            "failed_fits": {r["name"]: r["note"] for r in self.fit if r.get("failed")},
            "parity": self.parity,
            "quality": self.quality,
            "speed": self.speed,
            "engine": self.engine,
            "gates": self.gates,
            "machine": self.machine,
        }


def write(report: Report, folder: Path, plot: bool = True) -> None:
    """summary.md, the plots and a json file for each part that was not skipped, into `folder`."""
    parts = {"parity": report.parity, "quality": report.quality, "speed": report.speed, "engine": report.engine}
    for name, value in parts.items():
        if value is not None:
            write_json(folder / f"{name}.json", value)
    (folder / "summary.md").write_text(summary(report, plot), encoding="utf-8")
    if plot:
        from validate.report.plots import plot_frontier, plot_layers

        plot_layers(report.fit, folder / "layers.png", report.name)
        if report.quality is not None:
            plot_frontier(report.size, report.quality, report.speed, folder / "frontier.png", report.name)


def read_fit(checkpoint: Path) -> list[dict[str, Any]]:
    """checkpoint/fit.json: what became of each linear. Raises ArtifactError when it is missing or malformed."""
    path = checkpoint / "fit.json"
    records: list[Any] = read_artefact_json(path, list, "compress the model again")
    needed = {"name": str, "structure": str, "parameters": int, "dense_parameters": int, "relative_error": float}
    optional = {"note": str, "damped": str}
    for record in records:
        if not isinstance(record, dict):
            raise ArtifactError(f"{path} has {shown(record)} in its list, no record; compress the model again")
        kept = {name: record.get(name) for name in needed}
        told = {name: record[name] for name in optional if record.get(name) is not None}
        for name, value in (kept | told).items():
            kind = (needed | optional)[name]
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
            if not (isinstance(value, str) if kind is str else number and (kind is float or isinstance(value, int))):
                raise ArtifactError(
                    f"{path} has a record with {name} = {shown(value)}, no {kind.__name__}; compress the model again"
                )
    return records


def with_shares(fit: list[dict[str, Any]], leaders: Mapping[str, str]) -> list[dict[str, Any]]:
    """`fit` with the kept fraction of each linear's parameters as `kept`. Linears that have a factor in common, which
    the first of them stores, have that of all together: its own would be above 1, and theirs that of half a linear.

    leaders: linear -> the one that stores what it shares.
    """
    totals: dict[str, list[int]] = {}
    for record in fit:
        total = totals.setdefault(leaders.get(record["name"], record["name"]), [0, 0])
        total[0] += record["parameters"]
        total[1] += record["dense_parameters"]
    kept = {name: parameters / dense for name, (parameters, dense) in totals.items()}
    return [{**record, "kept": kept[leaders.get(record["name"], record["name"])]} for record in fit]


def summary(report: Report, plot: bool = True) -> str:
    """reports/summary.md."""
    parts = [
        f"# {report.name}, compressed",
        _gate_text(report),
        "## What was compressed",
        _model_table(report),
        _dense_layers(report),
        _failed_fits(report),
        "## Quality",
        _quality_text(report.quality),
        "![Perplexity against size and speed](frontier.png)" if plot and report.quality is not None else "",
        "## Speed",
        _speed_text(report.speed),
        _engine_text(report.engine),
        "## Is it the same model? The parity ladder",
        _parity_text(report.parity),
        "## Error of each layer",
        _fit_text(report, plot),
        "## How to reproduce",
        "```sh\n" + "\n".join(report.commands) + "\n```",
        machine_text(report.machine),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gate_text(report: Report) -> str:
    failed = [name for name, gate in report.gates.items() if not gate["passed"]]
    if failed:
        return f"**FAILED**: {', '.join(failed)} (figures below)."
    return f"All {len(report.gates)} gates passed." if report.gates else "No gate was set."


def _model_table(report: Report) -> str:
    size, recipe, source = report.size, report.recipe, report.model["source"]
    rows = [
        ("source model", f"{source['id']}" + (f" at {source['revision']}" if source.get("revision") else "")),
        ("family", report.model["family"]),
        ("structure, rotation", f"{recipe['structure']}, {recipe['rotation']}"),
        ("kept of the projection weights", f"{size['ratio']:.2%} (asked: {asked(recipe)})"),
        ("kept of the whole model", f"{size['model_ratio']:.2%}"),
        (
            "parameters, dense -> compressed",
            f"{millions(size['dense_parameters'])} -> {millions(size['parameters'])}",
        ),
        ("linear layers structured / dense", f"{size['structured_linears']} / {size['dense_linears']}"),
        (
            "calibrated on",
            f"{recipe['calibration']['data']}, {recipe['calibration']['samples']} sequences of "
            f"{recipe['calibration']['sequence_length']} tokens"
            if _read_text(report)
            else "nothing: no text was read",
        ),
    ]
    note = "Kept fractions count what the rotation adds (skip matrices, the map before a tied head)."
    if source.get("kind") == "gguf":
        note += " The source is a quantised file: the dense baseline is the de-quantised model."
    return markdown_table(("", ""), rows) + "\n\n" + note


def _dense_layers(report: Report) -> str:
    dense = [record["name"] for record in report.fit if record["structure"] == "dense"]
    if not dense:
        return "No layer was left dense."
    roles = Counter(name.split(".", 2)[2] for name in dense)
    text = ", ".join(f"{role} {count}x" for role, count in sorted(roles.items()))
    return f"Left dense: {len(dense)} of {len(report.fit)} layers ({text})."


def _failed_fits(report: Report) -> str:
    """What fell back (compress/fit/fallback.py), and how often damping was needed; nothing where all went well."""
    notes = [(r["name"], r["note"]) for r in report.fit if r.get("failed")]
    parts = []
    if notes:
        parts.append(f"**Warning**: {len(notes)} of {len(report.fit)} fits failed; these layers are as they were:")
        parts.append(markdown_table(("layer", "what happened"), notes))
    singular = sum(bool(r.get("damped")) for r in report.fit if r["structure"] != "dense")
    if singular:
        parts.append(f"{singular} fits rest on damped singular moments: too little calibration text, or dead features.")
    return "\n\n".join(parts)


def _quality_text(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return "Not measured."
    data, protocol = quality["data"], quality["protocol"]
    rows = [
        (
            label,
            readable(quality[side]["perplexity"]),
            f"{quality[side]['mean_nll']:.4f}{_error(quality[side]['standard_error'])}",
        )
        for label, side in (("dense", "dense"), ("compressed", "compressed"))
    ]
    stride = "non-overlapping" if protocol["stride"] == protocol["window"] else f"{protocol['stride']} apart"
    bos = "begins with BOS" if protocol["begins_with_bos"] else "without BOS"
    text = [
        markdown_table(("", "perplexity", "nats per token"), rows),
        f"Perplexity changes by **{change(quality['relative_increase'])}**"
        f"{_error(quality['increase_standard_error'], ' (standard error of the log-ratio: {:.4f})')}. "
        f"KL(dense || compressed) is {quality['kl']:.4f} nats per token; both rank the same token first on "
        f"{quality['top1_agreement']:.1%} of the tokens.",
        f"Text: {data['name']} ({data['description']}; sha256 {data['sha256'][:12]}). {protocol['windows']} windows "
        f"of {protocol['window']} tokens, {stride}; {protocol['predicted_tokens']} tokens predicted; the text {bos}. "
        f"Dense in {protocol['dense_runtime']}, compressed in {protocol['compressed_runtime']}, float32.",
    ]
    text += [f"**Warning**: {warning}" for warning in quality["warnings"]]
    if quality["calibrated_on_this_text"]:
        text.append("**The model was calibrated on this very text: the figure is too good.**")
    return "\n\n".join(text)


def _speed_text(speed: dict[str, Any] | None) -> str:
    if speed is None:
        return "Not measured."
    rows = [
        (
            case["name"],
            f"**{case['speedup']:.3f}x**",
            f"{case['ratio_quartiles'][0]:.3f} - {case['ratio_quartiles'][1]:.3f}",
            f"{case['limit']:.3f}x ({case['limit_by']})",
            f"{case['share_of_limit']:.1%}",
            f"{case['tokens_per_second_dense']:.1f} -> {case['tokens_per_second_compressed']:.1f}",
        )
        for case in speed["cases"]
    ]
    header = ("case", "speed-up", "quartiles", "limit", "share of limit", "tokens/s")
    per_token, memory, graph = speed["bytes_per_token"], speed["peak_memory"], speed["graph"]
    more = [
        ("bytes moved per token, batch 1", megabytes(per_token["dense"]), megabytes(per_token["compressed"])),
        ("peak memory of the process", megabytes(memory["dense"]["peak"]), megabytes(memory["compressed"]["peak"])),
        (
            "of that, before the model is loaded",
            megabytes(memory["dense"]["before_load"]),
            megabytes(memory["compressed"]["before_load"]),
        ),
        ("nodes in the file", str(graph["dense"]["nodes"]), str(graph["compressed"]["nodes"])),
        (
            "nodes that ONNX Runtime runs",
            str(graph["dense"]["executed_nodes"]),
            str(graph["compressed"]["executed_nodes"]),
        ),
    ]
    case = speed["cases"][0]
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"{speed['runtime']}, {speed['dtype']}, {speed['threads']} thread(s), against the dense model exported by "
            f"the same code and timed in turn ({case['clock']}, medians of pairwise ratios). The limit is what the "
            "model's own size allows: bytes moved in a decode step, FLOPs of a prefill.",
            markdown_table(("", "dense", "compressed"), more),
        ]
    )


def _engine_text(engine: dict[str, Any] | None) -> str:
    """The engines on a GPU; nothing where none was run."""
    if engine is None:
        return ""
    ways = [name for name in ("native", "cpp") if name in engine["cases"][0]]
    rows = []
    for case in engine["cases"]:
        cells = [f"{case['name']}, {case['tokens']} tokens", f"{1e3 * case[ways[0]]['seconds_dense']:.3f} ms"]
        for way in ways:
            low, high = case[way]["quartiles"]
            cells.append(f"**{case[way]['speedup']:.3f}x** ({low:.3f} - {high:.3f})")
        rows.append(cells)
    versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
    note = (
        f"{engine['gpu']['name']}, {versions}; medians of pairwise ratios of wall time. OUT/engine is {engine['kept']}."
    )
    return "\n\n".join(["### TensorRT engines", markdown_table(("case", "dense", *ways), rows), note])


def _parity_text(parity: list[dict[str, Any]] | None) -> str:
    if parity is None:
        return "Not checked."
    rows = [
        (
            str(rung["number"]),
            rung["title"],
            figure(rung["value"]),
            f"{rung['tolerance']:g}",
            ("passed" if rung["passed"] else "FAILED") + "".join(f"; {f}" for f in rung["failures"]),
        )
        for rung in parity
    ]
    text = [markdown_table(("rung", "compared", "worst error", "tolerance", ""), rows)]
    for rung in parity:
        if "top1_agreement" in rung["facts"]:
            greedy = rung["facts"]["greedy"]
            text.append(
                f"Rung {rung['number']}: the same token ranked first at {rung['facts']['top1_agreement']:.2%} of "
                f"{rung['facts']['positions']} positions; {greedy['equal']} of {greedy['sequences']} greedy "
                f"continuations equal, {greedy['ties']} part at a tie within the tolerance."
            )
    return "\n\n".join(text)


def _fit_text(report: Report, plot: bool) -> str:
    structured = [r for r in report.fit if r["structure"] != "dense" and r["relative_error"] is not None]
    if not structured:
        return "Nothing was approximated."
    worst = sorted(structured, key=lambda r: r["relative_error"], reverse=True)[:5]
    rows = [(r["name"], r["structure"], f"{kept_of(r):.1%}", f"{r['relative_error']:.4f}") for r in worst]
    mean = sum(r["relative_error"] for r in structured) / len(structured)
    image = "![Errors by layer](layers.png)" if plot else ""
    of = "the layer's output on the calibration text" if _read_text(report) else "the weight, in the Frobenius norm"
    text = f"Relative error of {of}: mean {mean:.4f}; the five largest:"
    shared = ""
    if any(abs(kept_of(r) - r["parameters"] / r["dense_parameters"]) > 1e-9 for r in worst):
        shared = "Linears that share a factor are told what all of them together keep."
    table = markdown_table(("layer", "structure", "kept", "relative error"), rows)
    return "\n\n".join(filter(None, [text, table, shared, image]))


def readable(perplexity: float, digits: int = 3) -> str:
    """18.005; or 1.234e+09, where digits say nothing."""
    return f"{perplexity:.{digits}f}" if perplexity < 1e6 else f"{perplexity:.{digits}e}"


def change(relative: float) -> str:
    """+31.37%; 1.23e+08 times, where a percentage has as many digits."""
    return f"{relative:+.2%}" if relative < 100 else f"{1 + relative:.3g} times"


def kept_of(record: dict[str, Any]) -> float:
    """The kept fraction of a linear, see `with_shares`."""
    return float(record.get("kept", record["parameters"] / record["dense_parameters"]))


def _read_text(report: Report) -> bool:
    """True if the compression read a calibration text; see `Recipe.needs_text`."""
    entry = catalog.get(report.recipe["structure"], report.recipe.get("fit", catalog.USUAL_FIT))
    return entry.reads_text(fits_named=bool(report.size["structured_linears"]))


def asked(recipe: dict[str, Any]) -> str:
    """The budget as the recipe has it; a dense copy has none."""
    if not catalog.get(recipe["structure"], recipe.get("fit", catalog.USUAL_FIT)).compresses:
        return "all"
    if recipe.get("budget_latency") is not None:
        return f"{recipe['budget_latency']:g} s"
    if recipe.get("budget_bytes") is not None:
        return megabytes(recipe["budget_bytes"])
    return f"{recipe['ratio']:.2%}"


def _error(value: float | None, form: str = " ± {:.4f}") -> str:
    return "" if value is None else form.format(value)


def figure(value: float | str) -> str:
    """A figure of rounding size; text as it is."""
    return value if isinstance(value, str) else f"{value:.2e}"


def millions(count: int) -> str:
    """A count of parameters."""
    return f"{count / 1e6:,.1f} M"


def megabytes(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e6:,.1f} MB"
