"""The flags that describe a compression, shared by `compress.run` and `export.build`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from compress import catalog
from compress.cli.commands import add_common_arguments
from compress.cli.parser import fraction
from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.recipe import Recipe


def add_compress_arguments(parser: argparse.ArgumentParser, *, model_required: bool = True) -> None:
    """Model, recipe and run-time flags. Defaults are None: what is not given is decided by the recipe."""
    parser.add_argument(
        "--model",
        required=model_required,
        metavar="M",
        help="folder, .gguf file, ORG/NAME on the hub, or an alias such as smollm2-135m or opt-13b",
    )
    parser.add_argument("--revision", help="revision of a hub model (default: the alias's pinned one, else main)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let a hub repository run its own Python code")
    what = parser.add_argument_group("what to compress into")
    what.add_argument(
        "--structure",
        choices=catalog.structures(),
        help=catalog.structure_help(),
    )
    what.add_argument(
        "--menu",
        type=_menu,
        metavar="A,B",
        help=catalog.menu_help(),
    )
    what.add_argument(
        "--ratio",
        type=fraction,
        metavar="R",
        help="fraction of all projection weight bytes to keep, skip and head maps counted, as 0.75 or 75%% "
        "(default: 0.75)",
    )
    what.add_argument(
        "--rotation",
        choices=tuple(catalog.SKIPS_OF),
        help="rotation of the residual stream: one for the whole model (folds away), or one per block",
    )
    what.add_argument(
        "--skip",
        choices=get_args(catalog.SkipName),
        help="form of the skip matrices of --rotation block (default: dense)",
    )
    what.add_argument(
        "--inner",
        type=_names,
        metavar="A,B",
        help=catalog.inner_help(),
    )
    what.add_argument(
        "--joint", action=argparse.BooleanOptionalAction, help="let q,k,v and gate,up share a low-rank factor"
    )
    what.add_argument(
        "--embedding",
        type=fraction,
        metavar="R",
        help="fraction of embedding and head to keep, in two factors (default: 1, untouched). A lower --ratio saves "
        "the same bytes at a far smaller loss on the model measured in docs/quality.md",
    )
    what.add_argument(
        "--budget-bytes", type=int, metavar="N", help="bytes of all projections and skips, in place of --ratio"
    )
    what.add_argument(
        "--budget-latency",
        type=float,
        metavar="S",
        help="seconds of all projections, skips and head map one after another, by --latency-table, in place of "
        "--ratio; for as many tokens at once as the table was measured with",
    )
    what.add_argument(
        "--latency-table", metavar="FILE", help="measured cost of each structure, by python -m validate.latency"
    )
    what.add_argument(
        "--unit", type=int, help="sizes are multiples of this many features (default: by width, 16 to 64)"
    )
    how = parser.add_argument_group("how to find it")
    how.add_argument(
        "--sensitivity",
        choices=["fisher", "measured", "none"],
        help="weigh errors by what the loss minds (one backward pass), by trying each class of matrices (no backward "
        "pass), or each matrix alike (default: fisher)",
    )
    how.add_argument(
        "--fit",
        choices=catalog.fits(),
        help=f"our fits, or those of ProcrustesGPT (default: {catalog.USUAL_FIT})",
    )
    how.add_argument(
        "--allocation",
        choices=["global", "uniform"],
        help="sizes by predicted loss under one budget, or one ratio for all (default: global)",
    )
    how.add_argument(
        "--ties",
        action=argparse.BooleanOptionalAction,
        help="kron: keep leading coordinates of one rotated stream, or give every matrix a mix of its own",
    )
    how.add_argument(
        "--calibration-data",
        metavar="DATA",
        help="FILE.txt, FILE.jsonl, a hub dataset, or boolq from the demo's packages (default: boolq)",
    )
    how.add_argument("--calibration-samples", type=int, metavar="N", help="sequences (default: 24)")
    how.add_argument(
        "--sequence-length", type=int, metavar="T", help="tokens per sequence (default: 1024, or as the model allows)"
    )
    how.add_argument(
        "--calibration-dtype",
        choices=["float32", "bfloat16"],
        help="of the products in calibration; stream and second moments are float32 either way (default: float32)",
    )
    how.add_argument("--seed", type=int, help="of the text order and the sampled labels (default: 0)")
    how.add_argument(
        "--correction",
        type=fraction,
        metavar="BETA",
        help="share of the error made so far that each fit tries to undo, 0 to 1 (default: 0.5)",
    )
    how.add_argument("--recipe", type=Path, metavar="FILE", help="recipe.yaml; flags and --set override it")
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="A.B=V",
        help="any recipe field, e.g. calibration.seed=1",
    )
    run = parser.add_argument_group("how to run")
    run.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    run.add_argument(
        "--calibration-batch", type=int, default=4, metavar="N", help="calibration sequences at a time (default: 4)"
    )
    run.add_argument(
        "--statistics",
        type=Path,
        metavar="DIR",
        help="keep the calibration's second moments here and take them from here, for several recipes; runs that need "
        "the same ones wait for each other",
    )
    run.add_argument("--checkpoint-dtype", choices=["float32", "float16", "bfloat16"], help="default: float32")
    run.add_argument(
        "--materialize-dense",
        action="store_true",
        help="also write OUT/dense, a plain checkpoint of the compressed model that loads with no import",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the result goes and how it is told."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="OUT",
        help="artefact folder, made when it is missing (default: out/MODEL-STRUCTURE-RATIO)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and stop")
    add_common_arguments(parser)


def given_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *, only: Sequence[str] = (), without: Sequence[str] = ()
) -> list[str]:
    """The flags whose value in `args` is not their default; `only` these, or all `without` these (names in `args`)."""
    return [
        action.option_strings[0]
        for action in parser._actions
        if action.option_strings
        and action.dest != "help"
        and action.dest not in without
        and (not only or action.dest in only)
        and getattr(args, action.dest) != action.default
    ]


def _names(text: str) -> list[str]:
    """A comma-separated list; 'none' is the empty one."""
    return [] if text == "none" else text.split(",")


def _menu(text: str) -> list[str]:
    """A comma-separated list. Raises UsageError for 'none': in a recipe an empty menu is the default one."""
    if text == "none":
        raise UsageError("--menu none leaves nothing beside dense to choose from: give --structure dense, or name some")
    return text.split(",")


_FLAGS = {
    "structure": "structure",
    "menu": "menu",
    "inner": "inner",
    "joint": "joint",
    "embedding": "embedding",
    "budget_bytes": "budget_bytes",
    "budget_latency": "budget_latency",
    "latency_table": "latency_table",
    "fit": "fit",
    "allocation": "allocation",
    "ties": "ties",
    "ratio": "ratio",
    "rotation": "rotation",
    "skip": "skip",
    "unit": "unit",
    "sensitivity": "sensitivity",
    "correction": "correction",
    "checkpoint_dtype": "checkpoint_dtype",
    "calibration_data": "calibration.data",
    "calibration_samples": "calibration.samples",
    "sequence_length": "calibration.sequence_length",
    "calibration_dtype": "calibration_dtype",
    "seed": "calibration.seed",
}


# What a recipe that names the structure of every linear leaves nothing to decide for.
_PLANNED = (
    *("structure", "menu", "joint", "budget_bytes", "budget_latency", "latency_table"),
    *("allocation", "ties", "ratio", "unit"),
)


def _refuse_what_layers_decide(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Raise UsageError for flags beside the recipe of a finished run that would be obeyed by nothing.

    Such a recipe tells the multiply-accumulates of each linear; one that fixes a few linears by hand does not.
    """
    from compress.errors import UsageError

    layers = values.get("layers")
    if not isinstance(layers, dict) or not any(
        isinstance(entry, dict) and "macs" in entry for entry in layers.values()
    ):
        return
    for flag in _PLANNED:
        given = getattr(args, flag)
        if given is not None and given != values.get(_FLAGS[flag]):
            raise UsageError(
                f"--{flag.replace('_', '-')} would change nothing: {args.recipe} is the recipe of a finished run and "
                f"names the structure of every linear under `layers`; remove `layers` from it to plan anew"
            )


# Fields that say how much to keep; of a recipe file the ratio counts where neither of the others is given.
_BUDGETS = ("ratio", "budget_bytes", "budget_latency")


def _one_budget(values: dict[str, Any], given: dict[str, str]) -> None:
    """Let the budget of the command line take the place of the recipe file's.

    `given`: field -> how it was given. Raises UsageError for two of them, and beside a structure that keeps all.
    """
    from compress.errors import UsageError

    given = {field: given[field] for field in _BUDGETS if field in given and values[field] is not None}
    if len(given) > 1:
        raise UsageError(
            f"{' and '.join(given.values())} are two budgets, and only one can be kept to: give one of them"
        )
    entry = catalog.find(values.get("structure", catalog.USUAL_STRUCTURE))
    for field, how in given.items():
        if entry is not None and not entry.compresses and values[field] != 1:
            raise UsageError(
                f"{how} has nothing to act on: structure {entry.structure} keeps every weight as it is; leave it out, "
                f"or choose a structure that compresses, such as --structure auto"
            )
        for other in ("budget_bytes", "budget_latency"):
            if other != field and other in values:
                values[other] = None


def recipe_from(args: argparse.Namespace) -> Recipe:
    """recipe file < --set < flags. Raises UsageError."""
    from compress.recipe import parse_recipe, put, read_yaml, set_value

    values: dict[str, Any] = read_yaml(args.recipe) if args.recipe else {}
    if args.recipe:
        _refuse_what_layers_decide(args, values)
    told, flags = dict[str, str](), dict[str, str]()
    for assignment in args.set:
        set_value(values, assignment)
        name = assignment.partition("=")[0]
        told[name], flags[name] = f"--set {assignment:.100}", f"--set {name}"
    for flag, field in _FLAGS.items():
        given = getattr(args, flag)
        if given is not None:
            put(values, field, given, "--set" if args.recipe is None else str(args.recipe))
            flags[field] = f"--{flag.replace('_', '-')}"
            told[field] = f"{flags[field]} {given}"
    _one_budget(values, told)
    return parse_recipe(values, str(args.recipe) if args.recipe else "the command line", flags)
