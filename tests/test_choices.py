"""What a structure, a fit or a skip means is known to its method and the catalogue alone: no others compare names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ("structure", "fit", "skip")
KNOWING = ("compress/methods/", "compress/catalog.py", "compress/refusals.py")

OTHERS = {"args": "--skip of validate.run names its parts", "config": "the skips of a checkpoint", "r": "a FitRecord"}
"""Objects that have a field of the same name, and what it is. Every other object counts as a recipe."""


def field_of(node: ast.expr) -> str | None:
    """The object.field of recipe.structure, self.fit, recipe["skip"], values.get("structure"); None for another."""
    match node:
        case ast.Attribute(value=owner, attr=name) if name in FIELDS:
            keyed = False
        case ast.Subscript(value=owner, slice=ast.Constant(value=name)) if name in FIELDS:
            keyed = True
        case ast.Call(func=ast.Attribute(value=owner, attr="get"), args=[ast.Constant(value=name), *_]) if (
            name in FIELDS
        ):
            keyed = True
        case ast.Call(args=[inner]):  # str(recipe.structure), set(recipe["fit"])
            return field_of(inner)
        case _:
            return None
    last = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
    return None if last in OTHERS or (keyed and last not in ("recipe", "values")) else ast.unparse(node)


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, field) of every comparison, match and lookup in a literal dictionary by such a field."""
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        match node:
            case ast.Compare():
                parts = [node.left, *node.comparators]
                parts += [e for p in parts if isinstance(p, ast.Tuple | ast.List | ast.Set) for e in p.elts]
            case ast.Match():
                parts = [node.subject]
            case ast.Subscript(value=ast.Dict()):
                parts = [node.slice]
            case ast.Call(func=ast.Attribute(value=ast.Dict())):
                parts = node.args
            case ast.Call(func=ast.Attribute(value=owner, attr="startswith" | "endswith")):
                parts = [owner]
        for part in parts:
            if (found := field_of(part)) is not None:
                yield part.lineno, found


@pytest.mark.parametrize("package", ["compress", "export", "validate", "trt_plugins"])
def test_only_methods_and_the_catalogue_compare_them(package: str) -> None:
    paths = [p for p in sorted((ROOT / package).rglob("*.py")) if not str(p.relative_to(ROOT)).startswith(KNOWING)]
    assert paths
    assert not [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in paths
        for line, what in compared(ast.parse(path.read_text()))
    ]


@pytest.mark.parametrize(
    "code",
    [
        "recipe.structure == 'kron'",
        "'dense' != self.recipe.fit",
        "wanted.skip in ('cs', 'slice')",
        "recipe['structure'] == 'jrk'",
        "report.recipe.get('fit') == 'paper'",
        "(recipe.structure, recipe.fit) == ('kron', 'paper')",
        "str(values.get('structure', 'kron')) != 'dense'",
        "{'a': 1}[recipe.structure]",
        "{'a': 1}.get(recipe.skip, 2)",
        "recipe.structure.startswith('compot')",
        "match recipe.fit:\n    case 'paper': pass",
    ],
)
def test_a_comparison_is_found(code: str) -> None:
    assert list(compared(ast.parse(code)))


def test_what_is_no_comparison() -> None:
    for code in ("registry()[recipe.structure]", "reader.config.skip == 'slice'", "args.skip == ['speed']"):
        assert not list(compared(ast.parse(code)))
