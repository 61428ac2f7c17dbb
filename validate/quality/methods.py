"""The methods of the quality table, as recipes: what `python -m validate.quality` runs. Edit here to tune a line;
each structure at its defaults has one by compress/catalog.py.

`recipe` has fields of compress/recipe.py. What all methods share (calibration text and its size, the ratio) is put
in by the command, unless a recipe says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from compress import catalog
from compress.errors import UsageError

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A line of the table, or one for each of `ratios`. `group`: methods, ablation or calibration."""

    name: str
    title: str
    recipe: Fields = field(default_factory=dict)
    ratios: tuple[float, ...] = (0.75,)
    group: str = "methods"


@dataclass(frozen=True)
class Line:
    """One method at one ratio; `key` is its folder and what --methods may call it."""

    key: str
    method: str
    title: str
    ratio: float
    recipe: dict[str, Any]
    group: str


SHARED: Fields = {"calibration_dtype": "bfloat16"}  # the same perplexity as float32 to 0.2 %, and faster on this CPU
BEST: Fields = {"structure": "auto"}  # what --structure auto does, and the ablation takes apart
# One-sided: the Gram matrix alone, each matrix by itself, with as little damping as the published method. Uniform sizes
# in fine steps: in the steps of 64 that matrices this wide have by default, one rank for all cannot keep what is asked.
FINE = {"allocation": "uniform", "unit": 2}
UNIFORM = {"allocation": "uniform", "unit": 16}
WHITENED = {"sensitivity": "none", "correction": 0.0, "gram_damping": 1e-4}
KRON_UNIFORM = {"structure": "kron", "inner": [], "allocation": "uniform"}


def _catalogued() -> dict[str, Method]:
    """The line of every structure at its defaults, dense first."""
    entries = sorted(catalog.entries(), key=lambda entry: entry.compresses)
    return {e.quality.name: Method(e.quality.name, e.quality.title, e.fields(), e.quality.ratios) for e in entries}


_OTHERS: Mapping[str, tuple[Method, ...]] = {
    "gs": (
        Method("svd-llm", "low rank, whitened, uniform (SVD-LLM)", {"structure": "lowrank", **WHITENED, **FINE}),
        Method("lowrank-uniform", "low rank, two-sided, uniform", {"structure": "lowrank", **FINE}),
    ),
    "lowrank": (Method("lowrank-joint", "low rank, joint q,k,v and gate,up", {"structure": "lowrank", "joint": True}),),
}
"""Further lines, by the one that they come after."""

METHODS: tuple[Method, ...] = (
    *(line for name, method in _catalogued().items() for line in (method, *_OTHERS.get(name, ()))),
    Method("kron-cs", "kron, block rotations, CS skips", {"structure": "kron", "rotation": "block", "skip": "cs"}),
    Method(
        "kron-householder",
        "kron, block rotations, Householder skips",
        {"structure": "kron", "rotation": "block", "skip": "householder"},
    ),
    Method("kron-plain", "kron, all neurons kept", {"structure": "kron", "inner": []}),
    Method("gs-plain", "gs, all neurons kept", {"structure": "gs", "inner": []}),
    Method(
        "auto-kron",
        "best recipe with kron on the menu",
        {**BEST, "menu": ["pifa", "kron"], "rotation": "shared", "inner": ["neurons"]},
    ),
    Method("inner-vo", "best recipe and V-O truncation", {**BEST, "inner": ["neurons", "vo"]}),
    Method("inner-bias", "best recipe and bias correction", {**BEST, "inner": ["neurons", "bias"]}),
    Method("embedding", "best recipe, embedding at 0.75", {**BEST, "embedding": 0.75}),
    # One thing of the best recipe switched off at a time. A line that changes nothing is left out.
    Method("no-metric", "one-sided metric", {**BEST, "sensitivity": "none"}, group="ablation"),
    Method("no-pivots", "plain low rank in place of PIFA", {**BEST, "menu": ["lowrank"]}, group="ablation"),
    Method("no-allocation", "uniform allocation", {**BEST, **UNIFORM}, group="ablation"),
    Method("no-correction", "no sequential recalibration", {**BEST, "correction": 0.0}, group="ablation"),
    Method("no-inner", "no inner freedoms", {**BEST, "inner": []}, group="ablation"),
    # Ties and rotation are those of kron, which chooses neurons and sizes by predicted loss only where it has both.
    Method("kron-uniform", "kron, all neurons, one size", KRON_UNIFORM, group="ablation"),
    Method("no-ties", "kron, all neurons, one size, no ties", {**KRON_UNIFORM, "ties": False}, group="ablation"),
    Method(
        "no-rotation",
        "kron, all neurons, one size, no rotation",
        {**KRON_UNIFORM, "rotation": "none"},
        group="ablation",
    ),
)


@dataclass(frozen=True)
class Bar:
    """A limit on one figure of the line `key`.

    x_dense: perplexity / dense perplexity; increase: that minus 1; seconds: of the compression. In place of a fixed
    limit, `against` names the line of which half the increase is the limit; both must then keep at most what was
    asked for.
    """

    name: str
    key: str
    figure: Literal["x_dense", "increase", "seconds"]
    limit: float | None = None
    against: str | None = None


BARS: tuple[Bar, ...] = (
    Bar("auto-0.75", "auto-0.75", "x_dense", 1.5),
    Bar("auto-0.85", "auto-0.85", "x_dense", 1.2),
    Bar("auto-0.9375", "auto-0.9375", "x_dense", 1.03),
    Bar("kron-half-of-svd-llm", "kron-0.75", "increase", against="svd-llm-0.75"),
    Bar("gs-half-of-svd-llm", "gs-0.75", "increase", against="svd-llm-0.75"),
    Bar("compress-minutes", "auto-0.75", "seconds", 25 * 60.0),
)


def lines(
    calibration: Fields,
    *,
    names: Sequence[str] | None = None,
    ratios: Sequence[float] | None = None,
    ablation: bool = False,
) -> list[Line]:
    """The lines to run, dense first. `calibration`: the recipe field of all of them, below their own.

    `names` are those of methods, or of methods at any ratio (kron, auto-0.85); None: every method of the table.
    `ablation` adds what changes something in the best recipe. `ratios` replace the methods' own, but not those in
    names. Raises UsageError for an unknown name.
    """
    own = {m.name: m.ratios if ratios is None or m.name == "dense" else ratios for m in METHODS}
    table = {m.name: own[m.name] for m in METHODS if m.group != "ablation"}
    asked = {"dense": own["dense"], **(table if names is None else _asked(names, own))}
    found = []
    for method in METHODS:
        if method.name in asked:
            found += _at(method, calibration, asked[method.name])
        elif method.group == "ablation" and ablation:
            at_own = _at(method, calibration, own[method.name])
            found += [line for line in at_own if not _changes_nothing(line, calibration)]
    return found


def _asked(names: Iterable[str], own: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """The ratios that `names` ask for, by method; `own`: those of each method's bare name."""
    found: dict[str, list[float]] = {}
    for name in names:
        method, _, digits = name.rpartition("-")
        if name in own:
            found.setdefault(name, []).extend(own[name])
        elif method in own.keys() - {"dense"} and re.fullmatch(r"[0-9]*\.?[0-9]+", digits) and 0 < float(digits) <= 1:
            found.setdefault(method, []).append(float(digits))
        else:
            raise UsageError(
                f"there is no method {name!r}; --methods takes these, also with a ratio such as auto-0.8: "
                f"{', '.join(own)}"
            )
    return found


def calibration_lines(calibration: Fields, name: str, sources: Iterable[str], sizes: Sequence[int]) -> list[Line]:
    """The method `name` at its first ratio, once for each text and number of calibration sequences."""
    method = next((m for m in METHODS if m.name == name), None)
    if method is None:
        raise UsageError(
            f"there is no method {name!r}; --sensitivity-method takes {', '.join(m.name for m in METHODS)}"
        )
    line = _at(method, calibration, method.ratios)[0]
    found = []
    for source in sources:
        safe = "".join(c if c.isalnum() else "-" for c in source)
        for size in sizes:
            recipe = line.recipe | {"calibration": {**line.recipe["calibration"], "data": source, "samples": size}}
            title = f"{method.title}, {size} sequences of {source}"
            found.append(Line(f"calibration-{safe}-{size}", method.name, title, line.ratio, recipe, "calibration"))
    return found


def _at(method: Method, calibration: Fields, ratios: Iterable[float]) -> list[Line]:
    """A line for each ratio, in their order, once."""
    found = []
    for ratio in dict.fromkeys(ratios):
        shared = {"calibration": {**calibration, **method.recipe.get("calibration", {})}, "ratio": ratio}
        key = method.name if method.name == "dense" else f"{method.name}-{ratio:g}"  # dense knows no ratio
        found.append(Line(key, method.name, method.title, ratio, {**SHARED, **method.recipe, **shared}, method.group))
    return found


def _changes_nothing(line: Line, calibration: Fields) -> bool:
    """Whether an ablation switches off what the best recipe does not have."""
    from compress.recipe import parse_recipe

    best = {**SHARED, **BEST, "calibration": calibration, "ratio": line.ratio}
    return parse_recipe(line.recipe, line.key).digest() == parse_recipe(best, "the best recipe").digest()
