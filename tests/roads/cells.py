"""Cells of the matrix: a model, a source, a method and its options, every two choices of which are driven together.

The axes are read from where the product keeps its names (the recipe's fields, the tiny models of all families, the
kinds of sources), so that a new name is driven without a line here. What the recipe itself refuses is no cell: a test
holds the command against each such pair (`split_pairs`) and each such method (`REFUSED_METHODS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from itertools import combinations, product
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from compress.errors import UsageError
from compress.recipe import OneOf, Recipe, parse_recipe
from tests import tiny
from tests.roads.sources import MODELS_OF, SOURCES, TOKENIZERS, in_gguf
from validate.quality.methods import METHODS as METHODS_OF_THE_TABLE
from validate.quality.methods import Method

Cell = dict[str, Any]
"""Axis -> the value chosen."""
Pair = tuple[tuple[str, Any], tuple[str, Any]]

METHOD = ("structure", "fit", "rotation", "skip")
"""Fields of a recipe that depend on each other: one axis together."""
NUMBERS = {
    "ratio": "follows from the method: see RATIOS",
    "budget_bytes": "a value of the axis budget",
    "budget_latency": "a value of the axis budget",
    "latency_table": "comes with budget_latency",
    "embedding": "an axis of its own",
    "reflections": "a size",
    "sensitivity_samples": "a size",
    "rotation_iterations": "a size",
    "correction": "a size",
    "gram_damping": "a size",
    "metric_damping": "a size",
    "unit": "a size",
    "calibration": "a size, and the text",
    "layers": "written by --recipe OUT/recipe.yaml, which every cell feeds back",
    "version": "there is one",
}
"""Fields of a recipe that have no names to choose from, and where they are driven."""
UNSET = "unset"


def _names(hint: Any) -> tuple[Any, ...] | None:
    """What a field may be: names, truth values, lists of names; None for a number or a group."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) is Annotated:
        return next((each.names() for each in hint.__metadata__ if isinstance(each, OneOf)), None)
    if hint is bool:
        return (False, True)
    if get_origin(hint) is tuple:
        single = _names(get_args(hint)[0])
        return None if single is None else (UNSET, (), *((name,) for name in single), tuple(single))
    return None


def _recipe_axes() -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(Recipe, include_extras=True)
    named = {field: _names(hints[field]) for field in Recipe.model_fields if field not in NUMBERS}
    return {field: names for field, names in named.items() if names is not None}


RECIPE = _recipe_axes()
OPTIONS = {field: names for field, names in RECIPE.items() if field not in METHOD}


def refusal(cell: Mapping[str, Any]) -> str | None:
    """What the recipe says against a cell, or against some of its choices; sizes and the text are the usual ones."""
    fields = dict(zip(METHOD, cell["method"], strict=True)) if "method" in cell else {}
    fields |= {field: cell[field] for field in OPTIONS if cell.get(field, UNSET) != UNSET}
    if cell.get("budget") == "latency":
        fields |= {"budget_latency": 1.0, "latency_table": "table.json"}
    return _refusal(tuple(sorted(fields.items())))


@cache
def _refusal(fields: tuple[tuple[str, Any], ...]) -> str | None:
    try:
        parse_recipe(dict(fields), "this cell")
    except UsageError as error:
        return str(error)
    return None


METHODS = tuple(method for method in product(*(RECIPE[field] for field in METHOD)) if not refusal({"method": method}))
"""(structure, fit, rotation, skip) that the recipe takes."""
REFUSED_METHODS = tuple(method for method in product(*(RECIPE[field] for field in METHOD)) if method not in METHODS)

RATIOS: dict[tuple[str, str], float] = {("paper", "block"): 0.96, ("loss-aware", "block"): 0.9}
"""(fit, rotation) -> the ratio of such cells: the matrices that rotations add leave less room. Others: 0.75."""

AXES: dict[str, tuple[Any, ...]] = {
    "method": METHODS,
    "model": tuple(tiny.CONFIGS),
    "source": SOURCES,
    "tokenizer": tuple(TOKENIZERS),
    **OPTIONS,
    "embedding": (1.0, 0.75),
    "budget": ("ratio", "bytes", "latency"),
    "graph": ("float32", "float16"),
    "logits": ("all", "last"),
}
PLAIN: Cell = {axis: values[0] for axis, values in AXES.items()} | {"ties": True, "sensitivity": "fisher"}
"""What is chosen where nothing else is asked for."""


@cache
def model_type(name: str) -> str:
    """Of a tiny model."""
    return str(tiny.config(name).model_type)


def exists(cell: Mapping[str, Any]) -> bool:
    """Whether there are such files: not every model is told in a GGUF file, nor has every kind of tokenizer."""
    model, source, tokenizer = (cell.get(axis) for axis in ("model", "source", "tokenizer"))
    kind = None if model is None else model_type(model)
    if source == "gguf" and (tokenizer not in (None, "tokenizer.json") or (model is not None and not in_gguf(model))):
        return False
    return tokenizer is None or kind is None or kind in MODELS_OF.get(tokenizer, (kind,))


def allowed(cell: Mapping[str, Any]) -> bool:
    """Whether the road can be driven."""
    return exists(cell) and refusal(cell) is None


def _completions(part: Mapping[str, Any]) -> Iterator[Cell]:
    """Whole cells with these values and otherwise plain ones, the free axes that others depend on in turn."""
    methods = (part["method"],) if "method" in part else METHODS
    models = (part["model"],) if "model" in part else AXES["model"]
    for method in methods:
        if refusal({**part, "method": method}) is None:
            for model in models:
                cell = {**PLAIN, **part, "method": method, "model": model}
                if allowed(cell):
                    yield cell
                    break


def pairs_of(cell: Mapping[str, Any]) -> set[Pair]:
    """Every two choices of a cell."""
    return set(combinations(sorted(cell.items(), key=lambda item: item[0]), 2))


@cache
def split_pairs() -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """All pairs of choices of two axes that some cell can have, and those that the recipe refuses in any cell."""
    possible, refused = list[Pair](), list[Pair]()
    for one, other in combinations(sorted(AXES), 2):
        for pair in product(((one, v) for v in AXES[one]), ((other, v) for v in AXES[other])):
            if next(_completions(dict(pair)), None) is not None:
                possible.append(pair)
            elif exists(dict(pair)):
                refused.append(pair)
    return tuple(possible), tuple(refused)


@cache
def matrix() -> tuple[Cell, ...]:
    """The quick cells, the methods of the quality table, and cells for every other pair of choices that is possible:
    few of them (greedy, in a fixed order)."""
    cells = list(diagonal())
    seen = set[Pair]().union(*map(pairs_of, cells))
    for part in (*map(part_of, METHODS_OF_THE_TABLE), *map(dict, split_pairs()[0])):
        if not any(part.items() <= cell.items() for cell in cells):
            cells.append(_filled(next(_completions(part)), part, seen))
            seen |= pairs_of(cells[-1])
    return tuple(cells)


def part_of(method: Method) -> Cell:
    """The choices of a line of the quality table, without its sizes."""
    recipe = parse_recipe(dict(method.recipe), method.name)
    fields = {field: getattr(recipe, field) for field in OPTIONS if field in method.recipe}
    return {"method": tuple(getattr(recipe, field) for field in METHOD), "embedding": recipe.embedding, **fields}


@cache
def diagonal() -> tuple[Cell, ...]:
    """The quick cells: every name of METHOD, model type, kind of source and kind of tokenizer at least once."""
    cells, seen, facts = list[Cell](), set[Pair](), set[tuple[str, Any]]()
    wanted = [{"method": method} for method in METHODS]
    wanted += [{axis: value} for axis in ("model", "source", "tokenizer") for value in AXES[axis]]
    for part in wanted:
        first = next(_completions(part))
        if not facts_of({**first, **part}, part) <= facts:
            cells.append(_filled(first, part, seen))
            seen |= pairs_of(cells[-1])
            facts |= facts_of(cells[-1], cells[-1])
    return tuple(cells)


def facts_of(cell: Mapping[str, Any], axes: Iterable[str]) -> set[tuple[str, Any]]:
    """What the quick cells have at least once each, as far as it is chosen by these axes."""
    found = set(zip(METHOD, cell["method"], strict=True)) if "method" in axes else set[tuple[str, Any]]()
    if "model" in axes:
        found.add(("model type", model_type(cell["model"])))
    return found | {(axis, cell[axis]) for axis in ("source", "tokenizer") if axis in axes}


def _filled(cell: Cell, fixed: Mapping[str, Any], seen: set[Pair]) -> Cell:
    """The cell with those values, the others so that it has as many pairs as possible that were not seen."""
    for axis in sorted(AXES, key=lambda a: -len(AXES[a])):
        if axis not in fixed:
            able = [v for v in AXES[axis] if allowed({**cell, axis: v})]
            cell = {**cell, axis: max(able, key=lambda v: _gain(cell, axis, v, seen))}
    return cell


def _gain(cell: Cell, axis: str, value: Any, seen: set[Pair]) -> int:
    """Pairs that the choice brings."""
    item = (axis, value)
    return sum(
        ((item, other) if axis < other[0] else (other, item)) not in seen for other in cell.items() if other[0] != axis
    )


def label(cell: Mapping[str, Any]) -> str:
    """Short, for the names of tests: what is not plain."""
    method = "-".join(part for part in cell["method"] if part not in ("loss-aware", "none"))
    rest = [
        f"{axis}={_plain(cell[axis])}" for axis in AXES if axis not in ("method", "model") and cell[axis] != PLAIN[axis]
    ]
    return ",".join([method, cell["model"].removeprefix("tiny_"), *rest])


def _plain(value: Any) -> str:
    return ("+".join(value) or "none") if isinstance(value, tuple) else str(value)
