"""The recipe: every choice that decides a compressed checkpoint, as a versioned, hashable document."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticKnownError, core_schema

from compress import catalog
from compress.artifact import reading
from compress.artifact.reading import shown
from compress.catalog import Entry, Inner, MenuName, RotationName, SkipName, Variant
from compress.errors import ArtifactError, UsageError
from compress.refusals import refusal

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Allocation = Literal["global", "uniform"]


@dataclass(frozen=True)
class OneOf:
    """Names that the catalogue has; a wrong one is reported as pydantic reports a wrong literal."""

    names: Callable[[], tuple[str, ...]]

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def _checked(self, value: object) -> str:
        *first, last = self.names()
        if isinstance(value, str) and value in (*first, last):
            return value
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(map(repr, first))} or {last!r}"})


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
    structure: Annotated[str, OneOf(catalog.structures)] = catalog.USUAL_STRUCTURE
    menu: tuple[MenuName, ...] = ()
    fit: Annotated[str, OneOf(catalog.fits)] = catalog.USUAL_FIT
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
    def _defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Rotation, skip and inner freedoms are the structure's where they are not given."""
        values = dict(values)
        structure, fit = values.get("structure", catalog.USUAL_STRUCTURE), values.get("fit", catalog.USUAL_FIT)
        entry = catalog.find(structure, fit)
        rotation = str(values.setdefault("rotation", "none" if entry is None else entry.rotation))
        usual = catalog.default_skip(rotation) if entry is None else entry.default_skip(rotation)
        skip = str(values.setdefault("skip", usual))
        variant = None if entry is None else entry.variant(rotation, skip, values.get("ties", True) is not False)
        if variant is not None and variant.default_inner:
            values.setdefault("inner", list(variant.default_inner))
        return values

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        problem = refusal(self)
        if problem is not None:
            raise ValueError(problem)
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

    def entry(self) -> Entry:
        """What the catalogue has of its structure and fit."""
        return catalog.get(self.structure, self.fit)

    def variant(self) -> Variant:
        """Which way of its structure it takes."""
        variant = self.entry().variant(self.rotation, self.skip, self.ties)
        assert variant is not None, "checked when the recipe was made"
        return variant

    def has_menus(self) -> bool:
        """Whether sizes are chosen from predicted losses; else every linear of a role has the same, or the method has
        an allocation of its own."""
        return self.variant().menus

    def needs_text(self) -> bool:
        """Whether any calibration text is read: a dense copy has nothing to fit, joint rank-k fits without data."""
        return self.entry().reads_text(any(c.get("structure") != "dense" for c in self.layers.values()))

    def corrects_biases(self) -> bool:
        """Whether linears get biases that make up for the means of what was lost: those of a copy lose nothing."""
        return "bias" in self.inner and self.needs_text()

    def compresses(self) -> bool:
        """Whether there is a budget to keep to: a dense copy has none."""
        return self.entry().compresses

    def keeps_one_width(self) -> bool:
        """Whether the stream keeps the same width at every position."""
        return catalog.is_one_width(self.skip)

    def absorbs_mixes(self) -> bool:
        """Whether a rotation absorbs the mix of each Kronecker sum, so that only leading coordinates are kept."""
        return self.rotation != "none" and self.ties and not self.entry().explicit_mixes

    def has_plain_equivalent(self) -> bool:
        """Whether the result may be expressed by the source's own class."""
        return self.variant().plain

    def label(self) -> str:
        """Its structure, and its fit where that is not the usual one: kron-paper."""
        return catalog.label(self.structure, self.fit)

    def flags(self) -> str:
        """The flags that name its structure: --structure kron --fit paper."""
        menu = f" --menu {','.join(self.menu)}" if self.menu else ""
        return catalog.flags(self.structure, self.fit) + menu

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
    return catalog.kinds(recipe.entry(), recipe.variant(), recipe.menu)
