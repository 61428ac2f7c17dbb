"""Recipes: strict fields, sentences for mistakes, and one digest per choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from compress.errors import UsageError
from compress.options import recipe_from
from compress.recipe import Recipe, parse_recipe, read_yaml, set_value
from compress.run import parser


def of(*arguments: str) -> Recipe:
    """The recipe of a command line."""
    return recipe_from(parser().parse_args(["--model", "m", "--out", "o", *arguments]))


def test_defaults() -> None:
    recipe = Recipe()
    assert of() == recipe == parse_recipe({}, "nothing")
    assert (recipe.structure, recipe.ratio, recipe.rotation, recipe.skip) == ("kron", 0.75, "shared", "none")
    assert Recipe.model_validate({"structure": "gs"}).rotation == "none"
    assert Recipe.model_validate({"rotation": "block"}).skip == "dense"


@pytest.mark.parametrize(
    ("values", "rotation", "skip", "inner", "menus"),
    [
        ({"structure": "auto"}, "none", "none", ("neurons",), True),
        ({"structure": "auto", "inner": []}, "none", "none", (), True),
        (
            {"structure": "auto", "rotation": "shared", "menu": ["lowrank", "kron"]},
            "shared",
            "none",
            ("neurons",),
            True,
        ),
        ({"structure": "auto", "rotation": "block"}, "block", "dense", ("neurons",), True),
        ({"structure": "kron"}, "shared", "none", ("neurons",), True),
        ({"structure": "kron", "inner": []}, "shared", "none", (), True),
        ({"structure": "kron", "inner": ["vo"]}, "shared", "none", ("vo",), True),
        ({"structure": "kron", "ties": False}, "shared", "none", (), False),
        ({"structure": "kron", "rotation": "none"}, "none", "none", (), False),
        ({"structure": "kron", "rotation": "block", "skip": "householder"}, "block", "householder", (), False),
        ({"structure": "kron", "fit": "paper"}, "block", "dense", (), False),
        ({"structure": "gs", "fit": "paper"}, "block", "dense", (), False),
        ({"structure": "gs"}, "none", "none", ("neurons",), True),
        ({"structure": "gs", "rotation": "shared"}, "shared", "none", (), False),
        ({"structure": "lowrank", "joint": True, "inner": ["vo", "bias"]}, "none", "none", ("vo", "bias"), True),
        ({"structure": "slice"}, "block", "slice", (), False),
        ({"structure": "jrk"}, "none", "none", (), False),
        ({"structure": "compot24", "inner": ["bias"]}, "none", "none", ("bias",), False),
        ({"structure": "dense"}, "none", "none", (), False),
    ],
)
def test_what_follows_from_the_structure(
    values: dict[str, Any], rotation: str, skip: str, inner: tuple[str, ...], menus: bool
) -> None:
    recipe = parse_recipe(values, "here")
    assert (recipe.rotation, recipe.skip, recipe.inner, recipe.has_menus()) == (rotation, skip, inner, menus)
    # What a recipe has resolved is what it says when it is read back.
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), "back") == recipe


def test_digest() -> None:
    assert Recipe().digest() == Recipe(ratio=0.75).digest()
    changed = [Recipe(ratio=0.7), Recipe(unit=8), Recipe(calibration={"seed": 1}), Recipe(sensitivity="none")]
    assert len({r.digest() for r in [Recipe(), *changed]}) == 5


def test_yaml_round_trip(tmp_path: Path) -> None:
    layers = {"layers.0.attn.q": {"structure": "lowrank", "in_features": 4, "out_features": 4, "rank": 1}}
    recipe = parse_recipe({"ratio": 0.6, "rotation": "block", "layers": layers}, "here")
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    back = parse_recipe(read_yaml(tmp_path / "r.yaml"), "there")
    assert back == recipe
    assert back.digest() == recipe.digest()


def test_flags_win_over_set_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"ratio": 0.5, "unit": 8, "calibration": {"seed": 5, "samples": 3}})
    )
    recipe = of("--recipe", str(tmp_path / "r.yaml"), "--set", "unit=16", "--set", "calibration.seed=6", "--seed", "7")
    assert (recipe.ratio, recipe.unit, recipe.calibration.seed, recipe.calibration.samples) == (0.5, 16, 7, 3)


def test_every_flag_reaches_its_field() -> None:
    recipe = of(
        *("--structure", "auto", "--rotation", "block", "--skip", "dense", "--unit", "4"),
        *("--menu", "lowrank,kron", "--inner", "vo,bias", "--joint", "--embedding", "0.5", "--allocation", "uniform"),
        *("--budget-bytes", "1000", "--latency-table", "t.json"),
        *("--sensitivity", "none", "--correction", "0.25", "--checkpoint-dtype", "bfloat16"),
        *("--calibration-data", "x.txt", "--calibration-samples", "2", "--sequence-length", "9", "--seed", "3"),
    )
    expected = {
        "structure": "auto",
        "rotation": "block",
        "skip": "dense",
        "unit": 4,
        "menu": ["lowrank", "kron"],
        "inner": ["vo", "bias"],
        "joint": True,
        "embedding": 0.5,
        "allocation": "uniform",
        "budget_bytes": 1000,
        "latency_table": "t.json",
        "sensitivity": "none",
        "correction": 0.25,
        "checkpoint_dtype": "bfloat16",
        "calibration": {"data": "x.txt", "samples": 2, "sequence_length": 9, "seed": 3},
    }
    assert recipe == parse_recipe(expected, "here")
    assert of("--no-ties") == Recipe(ties=False)
    assert of("--fit", "paper").fit == "paper"
    assert of("--budget-latency", "0.5").budget_latency == 0.5
    assert of("--ratio", "0.6").ratio == 0.6
    assert of("--structure", "auto", "--inner", "none").inner == ()
    assert of("--structure", "auto").inner == ("neurons",)
    assert not of("--structure", "auto", "--no-joint").joint


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ratio", "0.5", "--budget-bytes", "1000"], "--ratio 0.5 and --budget-bytes 1000 are two budgets"),
        (["--ratio", "0.5", "--budget-latency", "0.1"], "--ratio 0.5 and --budget-latency 0.1 are two budgets"),
        (
            ["--budget-bytes", "9", "--budget-latency", "0.1"],
            "--budget-bytes 9 and --budget-latency 0.1 are two budgets",
        ),
        (["--set", "ratio=0.5", "--budget-bytes", "1000"], "--set ratio=0.5 and --budget-bytes 1000 are two budgets"),
        (["--structure", "dense", "--ratio", "0.5"], "--ratio 0.5 has nothing to act on: structure dense"),
        (["--structure", "dense", "--budget-bytes", "1000"], "--budget-bytes 1000 has nothing to act on"),
        (["--set", "structure=dense", "--set", "ratio=0.5"], "--set ratio=0.5 has nothing to act on"),
    ],
)
def test_budgets_that_contradict_each_other(arguments: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=f"^{says}"):
        of(*arguments)


@pytest.mark.parametrize("others", [{"budget_bytes": 1000}, {"budget_latency": 0.1, "latency_table": "t.json"}, {}])
def test_the_command_lines_budget_takes_the_place_of_the_files(others: dict[str, Any], tmp_path: Path) -> None:
    """The file of a finished run has a value in every field; --ratio was obeyed by nothing where it had another."""
    file = tmp_path / "recipe.yaml"
    file.write_text(parse_recipe({"structure": "auto", **others}, "a test").to_yaml())
    for arguments, expected in (
        (["--ratio", "0.5"], (0.5, None, None)),
        (["--set", "ratio=0.5", "--set", "budget_bytes=null"], (0.5, None, None)),
        (["--budget-bytes", "77"], (0.75, 77, None)),
        (["--budget-latency", "0.2"], (0.75, None, 0.2)),
        ([], (0.75, others.get("budget_bytes"), others.get("budget_latency"))),
    ):
        found = of("--recipe", str(file), *arguments)
        assert (found.ratio, found.budget_bytes, found.budget_latency) == expected, arguments


def test_a_dense_recipe_may_be_given_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(of("--structure", "dense").to_yaml())
    assert of("--recipe", str(tmp_path / "r.yaml")).structure == "dense"
    assert of("--recipe", str(tmp_path / "r.yaml"), "--structure", "auto", "--ratio", "0.5").ratio == 0.5
    assert of("--structure", "dense", "--ratio", "1").ratio == 1
    with pytest.raises(UsageError, match=r"--ratio 0.5 has nothing to act on"):
        of("--recipe", str(tmp_path / "r.yaml"), "--ratio", "0.5")


def test_set_values_are_yaml() -> None:
    values: dict[str, Any] = {}
    for assignment in ("ratio=0.5", "calibration.data=a=b.txt", "layers={}", "new.deep.er=null"):
        set_value(values, assignment)
    assert values == {"ratio": 0.5, "calibration": {"data": "a=b.txt"}, "layers": {}, "new": {"deep": {"er": None}}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"ratio": 0}, r"ratio: .*greater than 0"),
        ({"ratio": 1.01}, r"ratio: .*less than or equal to 1, not 1\.01$"),
        ({"ratio": float("nan")}, r"ratio: "),
        ({"ratio": "most"}, r"ratio: .*valid number"),
        ({"structure": "butterfly"}, r"structure: .*'auto', 'kron', 'gs', .* or 'dense'"),
        ({"structure": ["kron"]}, r"structure: "),
        ({"structure": None}, r"structure: "),
        ({"rotation": "global"}, r"rotation: "),
        ({"rotation": "shared", "skip": "dense"}, r"rotation 'shared' with skip 'dense'"),
        ({"rotation": "block", "skip": "none"}, r"rotation 'block' with skip 'none'"),
        ({"structure": "dense", "rotation": "shared"}, r"a dense model is not rotated"),
        ({"corection": 0.1}, r"corection: there is no such field, did you mean correction\?"),
        ({"calibration": {"sample": 1}}, r"calibration\.sample: there is no such field, did you mean samples\?"),
        ({"calibration": 3}, r"calibration: "),
        ({"calibration": {"samples": 0}}, r"calibration\.samples: "),
        ({"calibration": {"sequence_length": 1}}, r"calibration\.sequence_length: "),
        ({"layers": [1]}, r"layers: "),
        ({"layers": {"layers.0.attn.q": 3}}, r"layers\.layers\.0\.attn\.q: "),
        ({"version": 2}, r"version: "),
        ({"unit": -1}, r"unit: "),
        ({"correction": 1.5}, r"correction: "),
        ({"gram_damping": 0}, r"gram_damping: "),
        ({1: 2}, r"1: there is no such field$"),
        # What one choice makes of another: nothing that is asked for is ignored.
        ({"structure": "slice", "rotation": "block", "skip": "dense"}, r"'slice' with skip 'dense'"),
        ({"structure": "kron", "rotation": "block", "skip": "slice"}, r"'kron' with skip 'slice'"),
        ({"structure": "gs", "rotation": "block", "skip": "cs"}, r"skip 'cs' serves one kept width"),
        ({"structure": "auto", "rotation": "block", "skip": "householder"}, r"skip 'householder' serves"),
        *(
            ({"structure": structure, "rotation": "shared"}, rf"'{structure}' with rotation 'shared'")
            for structure in ("jrk", "lowrank", "compot", "compot24")
        ),
        ({"fit": "paper", "structure": "lowrank"}, r"fit 'paper' with structure 'lowrank'"),
        ({"fit": "paper", "rotation": "shared"}, r"the paper has kron and gs, with rotation 'block'"),
        ({"fit": "paper", "skip": "cs"}, r"fit 'paper' .* skip 'cs'"),
        ({"menu": ["lowrank"]}, r"menu \['lowrank'\] is for structure 'auto', not 'kron'"),
        ({"structure": "auto", "menu": ["kron"]}, r"a menu with kron needs a rotation"),
        ({"structure": "auto", "menu": ["gs"], "rotation": "shared"}, r"a rotation serves kron alone"),
        ({"structure": "auto", "menu": ["jrk"]}, r"menu\.0: "),
        ({"structure": "gs", "joint": True}, r"joint low rank .* not 'gs'"),
        ({"structure": "gs", "ties": False}, r"ties false with structure 'gs'"),
        ({"structure": "auto", "ties": False}, r"ties false with structure 'auto'"),
        ({"rotation": "block", "skip": "cs", "ties": False}, r"ties false .* skip 'cs'"),
        *(
            ({**fields, "inner": [option]}, rf"inner \['{option}'\]: neurons and value coordinates")
            for option in ("neurons", "vo")
            for fields in (
                {"structure": "compot"},
                {"structure": "slice"},
                {"structure": "jrk"},
                {"structure": "dense"},
                {"fit": "paper"},
                {"rotation": "none"},
                {"ties": False},
                {"rotation": "block", "skip": "cs"},
                {"structure": "gs", "rotation": "shared"},
            )
        ),
        ({"fit": "paper", "inner": ["bias"]}, r"inner 'bias' with structure 'kron', fit 'paper'"),
        ({"structure": "slice", "inner": ["bias"]}, r"inner 'bias' with structure 'slice'"),
        ({"structure": "jrk", "inner": ["bias"]}, r"inner 'bias' with structure 'jrk'"),
        ({"inner": ["qk"]}, r"inner\.0: "),
        ({"structure": "compot", "budget_latency": 1.0}, r"budget_latency with structure 'compot'"),
        ({"rotation": "none", "budget_latency": 1.0}, r"budget_latency .* rotation 'none'"),
        ({"budget_latency": 1.0, "budget_bytes": 10}, r"two budgets: give one"),
        ({"budget_bytes": 0}, r"budget_bytes: "),
        ({"embedding": 0}, r"embedding: "),
        ({"calibration": {"seed": 2**70}}, r"calibration\.seed: .*less than 9223372036854775808"),
        ({"calibration": {"data": "x" * 10_000}, "ratio": "x" * 10_000}, r"ratio: .{,200}$"),
    ],
)
def test_mistakes_are_named(values: dict[Any, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=rf"^my recipe is not a valid recipe: .*{sentence}"):
        parse_recipe(values, "my recipe")


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("ratio", r"FIELD=VALUE"),
        ("=3", r"FIELD=VALUE"),
        ("ratio=[", r"--set 'ratio=\[': the value is not YAML"),
        ("ratio.x.y=1", r"ratio is 0\.5, not a group of fields"),
    ],
)
def test_wrong_assignments(assignment: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        set_value({"ratio": 0.5}, assignment)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"ratio: [", "is not YAML"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"- 1\n- 2\n", r"must be a mapping .* it is \[1, 2\]"),
        (b"", "must be a mapping .* it is None"),
        (b"ratio: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        (b"ratio: 2021-02-30\n", "ratio: .*valid number.* not '2021-02-30'"),
        (b"ratio: !!int abc\n", "is not YAML .*the type of its tag: .*'abc'"),
        (b"ratio: !!bool 7\n", "is not YAML .*the type of its tag"),
        (b"ratio: !!timestamp abc\n", "is not YAML .line 1"),
        (b"ratio: 1:30\n", "is not YAML .*'1:30' is no number"),
        (b"ratio: 0.5\nratio: 0.6\n", "is not YAML .line 2, column 1: the key 'ratio' twice"),
        (b"layers: &a [*a]\n", "nested more than 64 deep"),
        (b"layers: " + b"[" * 5000, "nested more than 64 deep"),
        (b"layers: " + b"[" * 80 + b"]" * 80, "nested more than 64 deep"),
        (b'structure: "\\ud800"\n', "half a surrogate pair"),
        (b"ratio: " + b" " * (1 << 20) + b"0.5\n", "more than the 1,048,576 bytes"),
    ],
)
def test_wrong_files(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=sentence):
        of("--recipe", str(tmp_path / "r.yaml"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is missing"):
        of("--recipe", str(tmp_path / "r.yaml"))
    with pytest.raises(UsageError, match="is not a file but a folder"):
        of("--recipe", str(tmp_path))


def test_a_flag_on_a_broken_group(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("calibration: 3\n")
    with pytest.raises(UsageError, match="calibration is 3, not a group of fields"):
        of("--recipe", str(tmp_path / "r.yaml"), "--seed", "1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none", "--menu none leaves nothing beside dense .* --structure dense"),
        ("", r"menu\.0: Input should be 'kron'"),
        ("pifa,none", r"menu\.1: Input should be 'kron'"),
    ],
)
def test_a_menu_of_nothing_is_refused(given: str, said: str) -> None:
    """The recipe's empty menu is the default one, which nobody asks for by 'none'."""
    with pytest.raises(UsageError, match=said):
        of("--structure", "auto", "--menu", given)


def test_inner_none_is_none() -> None:
    assert of("--structure", "auto").inner == ("neurons",)
    assert of("--structure", "auto", "--inner", "none").inner == ()
    with pytest.raises(UsageError, match=r"inner\.1: Input should be"):
        of("--structure", "auto", "--inner", "vo,none")


def test_biases_are_corrected_where_something_is_fitted() -> None:
    fitted = {"layers.0.attn.q": {"structure": "lowrank", "rank": 8}}
    for changes, expected in (
        ({"structure": "lowrank", "inner": ["bias"]}, True),
        ({"structure": "lowrank", "inner": []}, False),
        ({"structure": "dense", "inner": ["bias"]}, False),
        ({"structure": "dense", "inner": ["bias"], "layers": fitted}, True),
    ):
        assert parse_recipe(changes, "here").corrects_biases() is expected
