"""The recipe: every choice that decides a compressed checkpoint, as a versioned, hashable document."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from compress.artifact import reading
from compress.artifact.reading import shown
from compress.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

StructureName = Literal["auto", "kron", "gs", "lowrank", "pifa", "jrk", "compot", "compot24", "slice", "dense"]
Fit = Literal["loss-aware", "paper"]
Allocation = Literal["global", "uniform"]
SkipName = Literal["none", "dense", "cs", "householder", "slice"]
Inner = Literal["vo", "neurons", "bias"]
RotationName = Literal["none", "shared", "block"]

# kron: measured best at equal bytes on SmolLM2-135M (docs/quality.md). Low rank and dense gain nothing from rotations;
# the blocks of gs could, but each alternation refits every matrix, and its gain has not been measured.
DEFAULT_ROTATION: dict[str, RotationName] = {
    "kron": "shared",
    "auto": "none",
    "gs": "none",
    "lowrank": "none",
    "pifa": "none",
    "slice": "block",
    "dense": "none",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(_Strict):
    """Which text, how much of it."""

    data: str = "boolq"
    samples: int = Field(default=24, ge=1)
    sequence_length: int = Field(default=1024, ge=2)
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)  # what a generator of torch takes


class Recipe(_Strict):
    """See `python -m compress.run --help` for what each field does; field names are the flags' names.

    Raises UsageError, naming each wrong field, what was seen and what is allowed.
    """

    version: Literal[1] = 1
    structure: StructureName = "kron"
    menu: tuple[Literal["kron", "gs", "lowrank", "pifa"], ...] = ()
    fit: Fit = "loss-aware"
    ratio: float = Field(default=0.75, gt=0, le=1)
    budget_bytes: int | None = Field(default=None, gt=0)
    budget_latency: float | None = Field(default=None, gt=0)
    latency_table: str | None = None
    allocation: Allocation = "global"
    rotation: RotationName = "shared"
    skip: SkipName = "none"
    reflections: int = Field(default=32, ge=1)
    ties: bool = True
    joint: bool = False
    inner: tuple[Inner, ...] = ()
    embedding: float = Field(default=1.0, gt=0, le=1)
    sensitivity: Literal["fisher", "measured", "none"] = "fisher"
    sensitivity_samples: int = Field(default=32, ge=1)
    rotation_iterations: int = Field(default=30, ge=0)
    correction: float = Field(default=0.5, ge=0, le=1)
    gram_damping: float = Field(default=0.1, gt=0, lt=1)
    metric_damping: float = Field(default=0.1, gt=0, lt=1)
    unit: int = Field(default=0, ge=0)
    calibration_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    calibration: Calibration = Calibration()
    layers: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _default_rotation(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        structure = str(values.get("structure", "kron"))
        usual = "block" if values.get("fit") == "paper" else DEFAULT_ROTATION.get(structure, "none")
        rotation = values.setdefault("rotation", usual)
        values.setdefault("skip", "none" if rotation != "block" else "slice" if structure == "slice" else "dense")
        skip, ties = values["skip"], values.get("ties", True)
        menus = structure == "auto" or (structure == "gs" and rotation == "none")
        menus |= structure == "kron" and rotation != "none" and skip in ("none", "dense") and ties is not False
        if menus and values.get("fit") != "paper":
            values.setdefault("inner", ["neurons"])
        return values

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if (self.rotation == "block") != (self.skip != "none"):
            raise ValueError(
                f"rotation {self.rotation!r} with skip {self.skip!r}: rotation 'block' needs a skip, for instance "
                f"'dense' (each block has its own basis), the other rotations need none"
            )
        if (self.structure == "slice") != (self.skip == "slice"):
            raise ValueError(f"structure {self.structure!r} with skip {self.skip!r}: 'slice' goes with 'slice' only")
        if self.skip in ("cs", "householder") and self.structure != "kron":
            raise ValueError(f"skip {self.skip!r} serves one kept width of the stream, which is structure 'kron' only")
        if self.fit == "paper" and (self.structure not in ("kron", "gs") or self.skip != "dense"):
            raise ValueError(
                f"fit 'paper' with structure {self.structure!r}, rotation {self.rotation!r}, skip {self.skip!r}: the "
                f"paper has kron and gs, with rotation 'block' and skip 'dense'"
            )
        if self.structure in ("dense", "jrk", "lowrank", "pifa", "compot", "compot24") and self.rotation != "none":
            raise ValueError(
                f"structure {self.structure!r} with rotation {self.rotation!r}: low rank is the same in every "
                f"rotation, compot has dictionaries of its own, and a dense model is not rotated"
            )
        if self.menu and self.structure != "auto":
            raise ValueError(f"menu {list(self.menu)} is for structure 'auto', not {self.structure!r}")
        if self.joint and self.structure not in ("lowrank", "auto"):
            raise ValueError(f"joint low rank is for structures 'lowrank' and 'auto', not {self.structure!r}")
        if not self.ties and (self.structure != "kron" or self.skip in ("cs", "householder") or self.fit == "paper"):
            raise ValueError(
                f"ties false with structure {self.structure!r}, skip {self.skip!r}: only structure 'kron' with skip "
                f"none or dense has mixes to give to each matrix"
            )
        if "kron" in self.menu and self.rotation == "none":
            raise ValueError("a menu with kron needs a rotation, which absorbs its mix: --rotation shared")
        if self.menu and "kron" not in self.menu and self.rotation != "none":
            raise ValueError(f"menu {list(self.menu)} with rotation {self.rotation!r}: a rotation serves kron alone")
        if set(self.inner) & {"neurons", "vo"} and not self.has_menus():
            raise ValueError(
                f"inner {list(self.inner)}: neurons and value coordinates are dropped where sizes are chosen by "
                f"predicted loss: structures auto, pifa, lowrank, kron (with a rotation, ties, and no cheap skip) and "
                f"gs (without a rotation), each with fit loss-aware"
            )
        if "bias" in self.inner and (self.fit == "paper" or self.structure in ("jrk", "slice")):
            raise ValueError(f"inner 'bias' with structure {self.structure!r}, fit {self.fit!r}, which correct no bias")
        if self.budget_latency is not None and not self.has_menus():
            raise ValueError(
                f"budget_latency with structure {self.structure!r}, fit {self.fit!r}, rotation {self.rotation!r}: it "
                f"needs sizes chosen by predicted loss; --structure auto chooses them"
            )
        if self.budget_latency is not None and self.budget_bytes is not None:
            raise ValueError("budget_bytes and budget_latency are two budgets: give one")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _in_words(cls, values: Any, handler: ModelWrapValidatorHandler[Recipe], info: ValidationInfo) -> Recipe:
        """The errors of pydantic as one UsageError; `parse_recipe` gives the place and the flags as the context.

        The last of the validators: pydantic puts it around those that stand before it.
        """
        try:
            return handler(values)
        except ValidationError as error:
            place: tuple[str, Mapping[str, str]] = info.context or ("Recipe(...)", {})
            raise _usage_error(error, *place) from error

    def has_menus(self) -> bool:
        """Whether sizes are chosen from predicted losses; else every linear of a role has the same, or the method has
        an allocation of its own."""
        if self.fit == "paper":
            return False
        if self.structure == "kron":
            return self.rotation != "none" and self.ties and self.skip not in ("cs", "householder")
        return self.structure in ("auto", "lowrank", "pifa") or (self.structure == "gs" and self.rotation == "none")

    def needs_text(self) -> bool:
        """Whether any calibration text is read: a dense copy has nothing to fit, joint rank-k fits without data."""
        if self.structure == "jrk":
            return False
        return self.structure != "dense" or any(c.get("structure") != "dense" for c in self.layers.values())

    def corrects_biases(self) -> bool:
        """Whether linears get biases that make up for the means of what was lost: those of a copy lose nothing."""
        return "bias" in self.inner and self.needs_text()

    def digest(self) -> str:
        """sha256 of the canonical JSON: equal for equal choices."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """As recipe.yaml."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def parse_recipe(values: dict[str, Any], where: str, flags: Mapping[str, str] | None = None) -> Recipe:
    """Validate; raises UsageError naming each wrong field, what was seen, what is allowed and `where` it stands.

    `flags`: field -> the flag of the command line that gave it, by which the message calls it.
    """
    return Recipe.model_validate({str(key): value for key, value in values.items()}, context=(where, flags or {}))


def _usage_error(error: ValidationError, where: str, flags: Mapping[str, str]) -> UsageError:
    problems = [_problem(each, flags) for each in error.errors()[:5]]
    told = all(problem.startswith("--") for problem in problems)
    return UsageError(("" if told else f"{where} is not a valid recipe: ") + "; ".join(problems))


def _problem(error: ErrorDetails, flags: Mapping[str, str]) -> str:
    """`--ratio: a number above 0 and at most 1 is needed, not 7`; without a flag `ratio: ...`."""
    path = [str(part) for part in error["loc"]]
    field, message = ".".join(path), error["msg"].removeprefix("Value error, ")
    given = next((flags[name] for name in (field, ".".join(path[:-1])) if name in flags), field)
    if error["type"] == "extra_forbidden":
        known = Calibration.model_fields if path[0] == "calibration" else Recipe.model_fields
        near = difflib.get_close_matches(path[-1], known, n=1)
        return f"{given}: there is no such field" + (f", did you mean {near[0]}?" if near else "")
    if not field:
        return message
    return f"{given}: {_needed(path, error) or message}, not {shown(error['input'])}"


def _needed(path: list[str], error: ErrorDetails) -> str | None:
    """What a field takes, its whole range; None where pydantic says it as well."""
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"]
        return f"{'one of ' if ' or ' in expected else ''}{expected.replace(' or ', ', ')} is needed"
    fields = Calibration.model_fields if path[0] == "calibration" else Recipe.model_fields
    info = fields.get(path[-1])
    if info is None:
        return None
    kind = _KINDS.get(info.annotation)
    bounds = [f"{word} {getattr(m, key):,}" for m in info.metadata for key, word in _BOUNDS.items() if hasattr(m, key)]
    return None if kind is None else " ".join((kind, *[" and ".join(bounds)] * bool(bounds), "is needed"))


_KINDS: dict[object, str] = {
    bool: "true or false",
    **dict.fromkeys((int, int | None), "a whole number"),
    **dict.fromkeys((float, float | None), "a finite number"),
    **dict.fromkeys((str, str | None), "a text"),
}
_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}


def read_written(path: Path) -> Recipe:
    """OUT/recipe.yaml as a command wrote it; raises ArtifactError where it is no recipe, whatever the manifest says."""
    try:
        return parse_recipe(read_yaml(path), str(path))
    except UsageError as error:
        raise ArtifactError(f"{str(error).partition('; ')[0]}; compress the model again") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as a dictionary; raises UsageError when it is missing or not a mapping."""
    try:
        values = reading.parse_yaml(reading.read_bytes(path, reading.MAX_YAML_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"the recipe {path} cannot be read: {error.strerror}; change its permissions") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the recipe {path} is not UTF-8 text ({error.reason} at offset {error.start})") from error
    except reading.RefusedError as error:
        raise UsageError(f"the recipe {path} {error}; give a file such as the recipe.yaml of a build") from error
    if not isinstance(values, dict):
        raise UsageError(
            f"the recipe {path} must be a mapping of fields to values, it is {shown(values)}; give a file such as the "
            f"recipe.yaml of a build"
        )
    return values


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply `--set a.b=value` in place; the value is read as YAML. Raises UsageError when it is not an assignment."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UsageError(f"--set takes FIELD=VALUE, e.g. --set calibration.seed=1; seen: {shown(assignment)}")
    try:
        value = reading.parse_yaml(text)
    except reading.RefusedError as error:
        raise UsageError(f"--set {shown(assignment)}: the value {error}") from error
    put(values, key, value, f"--set {shown(assignment)}")


def put(values: dict[str, Any], key: str, value: object, where: str) -> None:
    """Set the field at the dotted path `key` in place; raises UsageError when the path crosses a plain value."""
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UsageError(f"{where}: {part} is {shown(values)}, not a group of fields")
    values[last] = value


def kinds_of(recipe: Recipe) -> tuple[str, ...]:
    """The structures that each linear may choose from."""
    if recipe.structure == "auto":
        return recipe.menu or (("pifa",) if recipe.rotation == "none" else ("pifa", "kron"))
    return (recipe.structure,)
