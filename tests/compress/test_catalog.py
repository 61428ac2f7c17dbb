"""The catalogue of structures: what reads it says what it says, and nothing of it costs an import."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from compress import catalog
from compress.allocation.width import UNIT
from compress.catalog import Entry, Inner, Variant
from compress.errors import UsageError
from compress.recipe import Recipe, parse_recipe
from compress.run import parser
from validate.quality.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = pytest.mark.parametrize("entry", catalog.entries(), ids=lambda e: catalog.label(e.structure, e.fit))


def test_it_imports_nothing_but_the_standard_library() -> None:
    script = "import sys, compress; old = set(sys.modules); import compress.catalog; print(set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "compress.catalog" in done.stdout
    assert not [name for name in ("torch", "pydantic", "compress.errors") if name in done.stdout]


@ENTRIES
def test_the_defaults_of_a_recipe_are_the_entrys(entry: Entry) -> None:
    recipe = parse_recipe({"structure": entry.structure, "fit": entry.fit}, "a test")
    variant = entry.variant(entry.rotation, entry.default_skip(entry.rotation), True)
    assert variant is not None
    assert (recipe.entry(), recipe.variant()) == (entry, variant)
    assert (recipe.rotation, recipe.inner) == (entry.rotation, variant.default_inner)
    assert parse_recipe(entry.fields(), "a test") == recipe
    assert entry.reads_text(fits_named=False) is recipe.needs_text()


def takes(**fields: object) -> bool:
    try:
        parse_recipe(fields, "a test")
    except UsageError:
        return False
    return True


@ENTRIES
def test_a_recipe_takes_what_the_entry_has_and_nothing_else(entry: Entry) -> None:
    named = {"structure": entry.structure, "fit": entry.fit, "inner": []}
    possible = {(r, s, t) for v in entry.variants for r, s in v.pairs() for t in v.ties}
    rotations, skips = get_args(catalog.RotationName), get_args(catalog.SkipName)
    for rotation, skip, ties in product(rotations, skips, (True, False)):
        chosen = {**named, "rotation": rotation, "skip": skip, "ties": ties}
        assert takes(**chosen) is ((rotation, skip, ties) in possible), chosen
        variant = entry.variant(rotation, skip, ties)
        for option in get_args(Inner) if variant is not None else ():
            assert takes(**{**chosen, "inner": [option]}) is (option in variant.inner), (chosen, option)
    assert takes(**named, joint=True) is entry.joint
    assert takes(**named, menu=["pifa"]) is entry.chooses


@ENTRIES
def test_every_variant_can_be_chosen(entry: Entry) -> None:
    """The first that takes a recipe counts: one behind it that takes no more would be dead."""
    found = {entry.variant(r, s, t) for v in entry.variants for r, s in v.pairs() for t in v.ties}
    assert found == set(entry.variants)
    assert all(set(v.default_inner) <= set(v.inner) for v in entry.variants)


def test_the_readme_has_its_table() -> None:
    """`python -c "from compress import catalog; print(catalog.markdown_table())"` prints it."""
    assert catalog.markdown_table() in (ROOT / "README.md").read_text()
    named = {name.strip("`, ") for e in catalog.entries() for row in e.rows for name in row.structure.split("`")[1::2]}
    assert named == set(catalog.structures())


def test_choices_and_help_are_its_own() -> None:
    [action] = [action for action in parser()._actions if action.dest == "structure"]
    assert action.choices == catalog.structures()
    assert all(f"{e.structure}: {e.help}" in str(action.help) for e in catalog.entries() if e.fit == catalog.USUAL_FIT)


def test_quality_has_a_line_for_each_at_its_defaults() -> None:
    """Its group, by which a line is in the table that all runs have, included."""
    lines = {method.name: method for method in METHODS}
    assert METHODS[0].name == "dense"
    for entry in catalog.entries():
        line = lines[entry.quality.name]
        assert (line.title, line.ratios, line.group) == (entry.quality.title, entry.quality.ratios, "methods")
        assert parse_recipe(dict(line.recipe), line.name).entry() == entry


def test_an_entry_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"structure: one of 'auto', .*'dense' is needed, not 'toy'"):
        parse_recipe({"structure": "toy"}, "a test")
    monkeypatch.setattr(catalog, "_ENTRIES", list(catalog.entries()))
    toy = Entry("toy", (Variant("uniform"),), "a toy", catalog.QualityLine("toy", "a toy"))
    catalog.add(toy)
    assert Recipe(structure="toy").entry() == toy
    with pytest.raises(ValueError, match="'toy' by fit 'loss-aware' is in the catalogue already"):
        catalog.add(toy)
    with pytest.raises(UsageError, match="fit 'paper' with structure 'toy': the paper has kron and gs"):
        parse_recipe({"structure": "toy", "fit": "paper"}, "a test")


def test_the_width_of_slicegpt_is_aligned_as_published() -> None:
    assert catalog.get("slice").variants[0].unit == UNIT
