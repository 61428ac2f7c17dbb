"""Why choices of a recipe do not go together, in words that are made from the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from compress.catalog import (
    ONE_WIDTH,
    ROTATED,
    SKIPS_OF,
    USUAL_FIT,
    Entry,
    Inner,
    MenuName,
    RotationName,
    SkipName,
    Variant,
    entries,
    find,
    listed,
)

_FITS: dict[str, str] = {"paper": "the paper"}  # in messages


class Choices(Protocol):
    """The fields of a recipe that depend on each other."""

    @property
    def structure(self) -> str: ...
    @property
    def fit(self) -> str: ...
    @property
    def rotation(self) -> RotationName: ...
    @property
    def skip(self) -> SkipName: ...
    @property
    def ties(self) -> bool: ...
    @property
    def menu(self) -> tuple[MenuName, ...]: ...
    @property
    def joint(self) -> bool: ...
    @property
    def inner(self) -> tuple[Inner, ...]: ...
    @property
    def budget_latency(self) -> float | None: ...


def refusal(r: Choices) -> str | None:
    """Why these choices do not go together, in one sentence; None where they do."""
    if r.skip not in SKIPS_OF[r.rotation]:
        return (
            f"rotation {r.rotation!r} with skip {r.skip!r}: rotation 'block' needs a skip, for instance 'dense' (each "
            f"block has its own basis), the other rotations need none"
        )
    entry = find(r.structure, r.fit)
    if entry is None:
        return _other_fit(r)
    variant = entry.variant(r.rotation, r.skip, r.ties)
    if variant is None:
        return _no_variant(entry, r)
    return _wrong_menu(entry, r) or _wrong_inner(variant, r)


def _other_fit(r: Choices) -> str:
    by = [e for e in entries() if e.fit == r.fit]
    where = f", rotation {r.rotation!r}, skip {r.skip!r}" if any(e.structure == r.structure for e in by) else ""
    return (
        f"fit {r.fit!r} with structure {r.structure!r}{where}: "
        f"{_FITS.get(r.fit, f'fit {r.fit}')} has {listed((e.structure for e in by), 'and', str)}, with "
        f"{_pairs_of(by)}"
    )


def _no_variant(entry: Entry, r: Choices) -> str:
    pairs = dict.fromkeys(pair for variant in entry.variants for pair in variant.pairs())
    if (r.rotation, r.skip) in pairs:
        some = [e.structure for e in entries() for v in e.variants if r.ties in v.ties and e.fit == USUAL_FIT]
        by = f", fit {r.fit!r}" if r.fit != USUAL_FIT else ""
        return (
            f"ties {str(r.ties).lower()} with structure {r.structure!r}, skip {r.skip!r}{by}: only structure "
            f"{listed(some, 'or')} with skip none or dense has mixes to give to each matrix"
        )
    if entry.fit != USUAL_FIT:
        return _other_fit(r)
    if r.rotation not in {rotation for rotation, _ in pairs}:
        takes = listed((rotation for rotation, _ in pairs), "or")
        why = f": {entry.why}" if entry.why else ""
        return f"structure {r.structure!r} with rotation {r.rotation!r}{why}; it takes rotation {takes}"
    takes = listed((skip for rotation, skip in pairs if rotation == r.rotation), "or")
    serving = [e.structure for e in entries() for v in e.variants if r.skip in v.skips]
    what = "one kept width of the stream" if r.skip in ONE_WIDTH else "a stream of full width"
    return (
        f"structure {r.structure!r} with skip {r.skip!r}: skip {r.skip!r} serves {what}, which is structure "
        f"{listed(serving, 'or')} only; {r.structure!r} takes skip {takes}"
    )


def _wrong_menu(entry: Entry, r: Choices) -> str | None:
    if r.menu and not entry.chooses:
        choosing = listed((e.structure for e in entries() if e.chooses), "or")
        return f"menu {list(r.menu)} is for structure {choosing}, not {r.structure!r}"
    if r.joint and not entry.joint:
        joint = listed((e.structure for e in entries() if e.joint), "and")
        return f"joint low rank is for structures {joint}, not {r.structure!r}"
    turned = [kind for kind in r.menu if kind in ROTATED]
    if turned and r.rotation == "none":
        return f"a menu with {turned[0]} needs a rotation, which absorbs its mix: --rotation shared"
    if r.menu and not turned and r.rotation != "none":
        serves = listed(ROTATED, "and", str)
        return f"menu {list(r.menu)} with rotation {r.rotation!r}: a rotation serves {serves} alone"
    return None


def _wrong_inner(variant: Variant, r: Choices) -> str | None:
    refused = [option for option in r.inner if option not in variant.inner]
    if [option for option in refused if option != "bias"]:
        return (
            f"inner {list(r.inner)}: neurons and value coordinates are dropped where sizes are chosen by predicted "
            f"loss: structures {_where(lambda v: v.menus)}"
        )
    if refused:
        return f"inner 'bias' with structure {r.structure!r}, fit {r.fit!r}, which correct no bias"
    if r.budget_latency is not None and not variant.menus:
        return (
            f"budget_latency with structure {r.structure!r}, fit {r.fit!r}, rotation {r.rotation!r}, skip {r.skip!r}: "
            f"it needs sizes chosen by predicted loss; --structure auto chooses them"
        )
    return None


def _where(holds: Callable[[Variant], bool]) -> str:
    """The structures of which some variant has a property, with the choices that it needs where not every one has."""
    parts = []
    for entry in entries():
        able = [v for v in entry.variants if holds(v)]
        if not able:
            continue
        conditions = []
        if len(able) < len(entry.variants):
            conditions = [f"rotation {listed((r for v in able for r in v.rotations), 'or', str)}"]
            skips = [s for v in able for s in v.skips]
            conditions += [f"skip {listed(skips, 'or', str)}"] if set(skips) != {"none"} else []
            conditions += ["ties"] if any(False in v.ties for v in entry.variants) else []
        if entry.fit != USUAL_FIT:
            conditions.append(f"fit {entry.fit}")
        parts.append(entry.structure + (f" ({', '.join(conditions)})" if conditions else ""))
    return listed(parts, "and", str) + f", each with fit {USUAL_FIT}"


def _pairs_of(some: Iterable[Entry]) -> str:
    pairs = dict.fromkeys(pair for e in some for v in e.variants for pair in v.pairs())
    return listed((f"rotation {r!r} and skip {s!r}" for r, s in pairs), "or", str)
