"""Nothing can be added to the product without a road: structures, families, kinds of sources, fields of the recipe."""

from __future__ import annotations

from itertools import product
from typing import get_args

import gguf
import pytest

from compress.options import add_compress_arguments
from compress.recipe import Recipe
from compress.source import tokenizer_files, weight_files
from compress.source.families import supported_model_types
from compress.source.model import Kind
from tests import tiny
from tests.roads.arguments import flags_of
from tests.roads.cells import (
    AXES,
    METHODS,
    NUMBERS,
    OPTIONS,
    RECIPE,
    allowed,
    diagonal,
    exists,
    facts_of,
    label,
    matrix,
    model_type,
    pairs_of,
    part_of,
    split_pairs,
)
from tests.roads.sources import ENTRIES, GGUF, NOT_IN_GGUF, SOURCES, TOKENIZERS
from validate.quality.methods import METHODS as METHODS_OF_THE_TABLE


def test_every_model_type_has_a_tiny_model() -> None:
    assert {model_type(name) for name in tiny.CONFIGS} == set(supported_model_types())


def test_every_kind_of_source_is_written() -> None:
    assert tuple(ENTRIES) == weight_files.ENTRIES
    assert set(SOURCES) == {*ENTRIES, *get_args(Kind)} - {"folder", "memory"}  # a folder by its files
    assert tuple(sorted(TOKENIZERS)) == tuple(sorted(tokenizer_files.ANY_OF))


def test_every_model_type_is_in_a_gguf_file_or_cannot_be() -> None:
    assert GGUF.keys() | NOT_IN_GGUF.keys() == set(supported_model_types())
    assert not GGUF.keys() & NOT_IN_GGUF.keys()
    known = set(gguf.MODEL_ARCH_NAMES.values())
    assert set(GGUF.values()) <= known
    assert not NOT_IN_GGUF.keys() & known


def test_every_field_of_the_recipe_is_an_axis_or_a_number() -> None:
    assert RECIPE.keys() | NUMBERS.keys() == Recipe.model_fields.keys()
    assert not RECIPE.keys() & NUMBERS.keys()


def test_every_structure_of_the_command_is_the_recipes() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_compress_arguments(parser)
    [action] = [action for action in parser._actions if action.dest == "structure"]
    assert sorted(action.choices or ()) == sorted(RECIPE["structure"])


def test_quick_roads_have_everything_once() -> None:
    found = set().union(*(facts_of(cell, AXES) for cell in diagonal()))
    assert found == set().union(*(facts_of(cell, AXES) for cell in matrix()))
    assert {value for name, value in found if name == "structure"} == set(RECIPE["structure"])
    assert {value for name, value in found if name == "model type"} == set(supported_model_types())
    assert len(diagonal()) <= 16


def test_every_two_choices_are_driven_together() -> None:
    possible, refused = split_pairs()
    driven = set().union(*map(pairs_of, matrix()))
    assert set(possible) <= driven
    assert not set(refused) & driven
    assert all(allowed(cell) for cell in matrix())
    assert len({label(cell) for cell in matrix()}) == len(matrix())


@pytest.mark.parametrize("axis", ["model", "source", "tokenizer", "graph", "logits", "checkpoint_dtype"])
def test_no_method_is_left_out_of_a_kind(axis: str) -> None:
    """Not by the recipe's own word, which the pairs above are taken from."""
    driven = {(cell["method"], cell[axis]) for cell in matrix()}
    assert driven == set(product(METHODS, AXES[axis]))
    assert {method[0] for method in METHODS} == set(RECIPE["structure"])


def test_models_and_sources_that_do_not_go_together() -> None:
    missing = {
        (name, kind)
        for name, kind in product(tiny.CONFIGS, SOURCES)
        if not any((cell["model"], cell["source"]) == (name, kind) for cell in matrix())
    }
    assert {kind for _, kind in missing} == {"gguf"}
    in_files = {model_type(cell["model"]) for cell in matrix() if cell["source"] == "gguf"}
    assert in_files == set(GGUF)
    assert not any(exists({"model": name, "source": kind}) for name, kind in missing)


def test_every_method_of_the_quality_table_is_driven() -> None:
    for method in METHODS_OF_THE_TABLE:
        part = part_of(method)
        assert any(part.items() <= cell.items() for cell in matrix()), method.name


def test_every_choice_has_a_flag() -> None:
    for field, values in OPTIONS.items():
        assert all(flags_of({field: value}) for value in values if value != "unset")
