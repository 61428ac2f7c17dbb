"""The catalogue: what each `--structure` (and `--fit`) is, takes and is called, in one place. Data only, no torch.

The recipe takes its checks and defaults from here, the commands their choices and help, README.md its table of
structures, `validate.quality` its lines, and `compress/methods/registry.py` finds the code by `Variant.method`. Nothing
else compares the name of a structure, a fit or a skip: what others need to know is a question of `compress.recipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

RotationName = Literal["none", "shared", "block"]
SkipName = Literal["none", "dense", "cs", "householder", "slice"]
Inner = Literal["vo", "neurons", "bias"]
MenuName = Literal["kron", "gs", "lowrank", "pifa"]

USUAL_STRUCTURE, USUAL_FIT = "kron", "loss-aware"

SKIPS_OF: Mapping[str, tuple[SkipName, ...]] = {
    "none": ("none",),
    "shared": ("none",),
    "block": ("dense", "cs", "householder", "slice"),
}
"""Rotation -> the skips that go with it, the default first: where each block has a basis of its own, a skip is needed
between two of them."""

ONE_WIDTH: tuple[SkipName, ...] = ("cs", "householder", "slice")
"""Skips of a stream that keeps the same width at every position."""

ROTATED: tuple[MenuName, ...] = ("kron",)
"""Entries of a menu whose mix of coordinates a rotation absorbs: they need one, and no others gain from it."""

ALL: tuple[Inner, ...] = get_args(Inner)


@dataclass(frozen=True)
class Variant:
    """One way to compress into a structure, for some rotations and skips. Of all that take a recipe the first counts.

    method: its name in compress/methods/registry.py. ties: values of `ties` that it takes. inner: freedoms inside a
    block that it takes, and those that it uses by default. menus: sizes are chosen by predicted loss. menu: what
    each linear chooses from by default where the structure lets it choose. unit: the default alignment of a kept width,
    None for that of the other sizes. plain: the result may have an equivalent in the source's own class.
    """

    method: str
    rotations: tuple[RotationName, ...] = ("none",)
    skips: tuple[SkipName, ...] = ("none",)
    ties: tuple[bool, ...] = (True,)
    inner: tuple[Inner, ...] = ("bias",)
    default_inner: tuple[Inner, ...] = ()
    menus: bool = False
    menu: tuple[MenuName, ...] = ()
    unit: int | None = None
    plain: bool = True

    def pairs(self) -> Iterator[tuple[RotationName, SkipName]]:
        """(rotation, skip) that it takes."""
        for rotation in self.rotations:
            yield from ((rotation, skip) for skip in SKIPS_OF[rotation] if skip in self.skips)


@dataclass(frozen=True)
class Row:
    """A line of README's table of structures."""

    structure: str
    replaced_by: str
    weights: str
    macs: str
    limits: str


@dataclass(frozen=True)
class QualityLine:
    """What `validate.quality` calls a structure at its defaults, and the ratios that it is measured at."""

    name: str
    title: str
    ratios: tuple[float, ...] = (0.75,)


@dataclass(frozen=True)
class Entry:
    """One structure by one fit.

    help: a line for `--help`. rotation: the default, one of those of the variants. text: whether calibration text is
    read, "named" where only for linears that the recipe names. compresses: False for a copy. joint: linears may share a
    low-rank factor. chooses: each linear has a menu of structures. why: the reason for its rotations, for messages.
    steps: what to say of sizes that come in steps of the method's own, not of --unit. explicit_mixes: the rotation
    absorbs no mix.
    """

    structure: str
    variants: tuple[Variant, ...]
    help: str
    quality: QualityLine
    rotation: RotationName = "none"
    fit: str = USUAL_FIT
    text: Literal["always", "named", "never"] = "always"
    compresses: bool = True
    joint: bool = False
    chooses: bool = False
    why: str = ""
    steps: str = ""
    explicit_mixes: bool = False
    rows: tuple[Row, ...] = ()

    def variant(self, rotation: str, skip: str, ties: bool) -> Variant | None:
        """The first variant that takes these choices; None where there is none."""
        taking = (v for v in self.variants if (rotation, skip) in set(v.pairs()) and ties in v.ties)
        return next(taking, None)

    def default_skip(self, rotation: str) -> str:
        """The first skip of its variants that goes with a rotation; that of any structure where it has none."""
        own = [skip for v in self.variants for r, skip in v.pairs() if r == rotation]
        return own[0] if own else default_skip(rotation)

    def reads_text(self, fits_named: bool) -> bool:
        """True if any calibration text is read; `fits_named`: the recipe names a linear that has something to fit."""
        return self.text == "always" or (self.text == "named" and fits_named)

    def fields(self) -> dict[str, Any]:
        """The fields of a recipe that name it: structure, and fit with its rotation and skip where it is another."""
        if self.fit == USUAL_FIT:
            return {"structure": self.structure}
        skip = self.default_skip(self.rotation)
        return {"structure": self.structure, "fit": self.fit, "rotation": self.rotation, "skip": skip}


LOW_RANK = "low rank is the same in every rotation"
PAPER_STEPS = "the paper's sizes come in steps, and the next larger one exceeds the budget"
DICTIONARIES = "its dictionaries are bases of their own"

_ENTRIES: list[Entry] = [
    Entry(
        "auto",
        (
            Variant("planned", inner=ALL, default_inner=("neurons",), menus=True, menu=("pifa",)),
            Variant(
                "planned",
                ("shared", "block"),
                ("none", "dense"),
                inner=ALL,
                default_inner=("neurons",),
                menus=True,
                menu=("pifa", "kron"),
            ),
        ),
        "every matrix gets what does best for it",
        QualityLine("auto", "best recipe (auto)", (0.75, 0.85, 0.9375, 0.678)),  # 0.678: the bytes of `embedding`
        joint=True,
        chooses=True,
        rows=(
            Row(
                "`auto`",
                "what each matrix does best with: `pifa` at any rank, fewer neurons, both, or dense",
                "the budget",
                "the same",
                "best quality measured so far",
            ),
        ),
    ),
    Entry(
        "kron",
        (
            # Measured best at equal bytes on SmolLM2-135M with a shared rotation (docs/quality.md).
            Variant(
                "planned", ("shared", "block"), ("none", "dense"), inner=ALL, default_inner=("neurons",), menus=True
            ),
            Variant("uniform", ("none", "shared", "block"), ("none", "dense"), (True, False)),
            Variant("one-width", ("block",), ("cs", "householder")),
        ),
        "sum of Kronecker products",
        QualityLine("kron", "kron (and selected neurons)"),
        rotation="shared",
        rows=(
            Row(
                "`kron`, one-sided (default)",
                "sum of `terms` products A_i (x) B_i with A_i a row or column of length `blocks`: a small mix of "
                "chunks on the residual stream's side, and one dense product",
                "n m terms / blocks",
                "the same, and d terms more where the mix is explicit",
                "W has rank at most terms / blocks of that side",
            ),
            Row(
                "`kron`, general",
                "the same with A_i of both sides > 1",
                "smaller still",
                "more than the weights; often more than dense",
                "for storage rather than for speed",
            ),
        ),
    ),
    Entry(
        "gs",
        (
            # Its blocks could gain from a rotation, but each alternation refits every matrix: not measured.
            Variant("planned", inner=ALL, default_inner=("neurons",), menus=True),
            Variant("uniform", ("shared", "block"), ("none", "dense")),
        ),
        "group-and-shuffle: two block-diagonal matrices",
        QualityLine("gs", "gs (and selected neurons)"),
        rows=(
            Row(
                "`gs`",
                "two block-diagonal matrices with a shuffle between them: a grid of blocks, each of low rank",
                "s (m / left + n / right)",
                "the same",
                "block sizes must be worth a matrix product",
            ),
        ),
    ),
    Entry(
        "lowrank",
        (Variant("planned", inner=ALL, menus=True),),
        "two thin factors",
        QualityLine("lowrank", "low rank, two-sided, global"),
        joint=True,
        why=LOW_RANK,
        rows=(
            Row(
                "`lowrank`",
                "the same matrix as U V, of inner width k",
                "k (m + n)",
                "the same",
                "saves below half of the full rank only; a baseline to compare with",
            ),
        ),
    ),
    Entry(
        "pifa",
        (Variant("planned", inner=ALL, menus=True),),
        "low rank by pivots, smaller than dense at every rank",
        QualityLine("pifa", "pivoted low rank (PIFA), two-sided, global"),
        why=LOW_RANK,
        rows=(
            Row(
                "`pifa`",
                "a matrix of rank k: k of its rows (or columns), the pivots, and the combinations that make the others",
                "k (m + n - k)",
                "the same",
                "below dense at every rank; features change places once, a gather that costs where arithmetic is cheap",
            ),
        ),
    ),
    Entry(
        "jrk",
        (Variant("joint-rank-k", inner=()),),
        "low rank from the weights alone, some factors shared",
        QualityLine("jrk", "joint rank-k, data-free"),
        text="never",
        why=LOW_RANK,
        rows=(
            Row(
                "`jrk`",
                "low rank from the weights alone, q with k and gate with up sharing a factor",
                "k (m + n)",
                "the same",
                "opens no calibration text",
            ),
        ),
    ),
    Entry(
        "compot",
        (Variant("compot"),),
        "a dictionary times sparse coefficients",
        QualityLine("compot", "COMPOT"),
        why=DICTIONARIES,
        rows=(
            Row(
                "`compot`, `compot24`",
                "a dictionary of atoms times sparse coefficients, half of each row or 2 of every 4",
                "(k m + k n / 2) and a bit mask",
                "k (m + n) where zeros are multiplied, which all but 2:4 tensor cores do",
                "smaller, and faster only with 2:4",
            ),
        ),
    ),
    Entry(
        "compot24",
        (Variant("compot"),),
        "the same with 2 of every 4 coefficients",
        QualityLine("compot24", "COMPOT, 2:4"),
        why=DICTIONARIES,
    ),
    Entry(
        "slice",
        # The alignment is SliceGPT's round_interval.
        (Variant("slicegpt", ("block",), ("slice",), inner=(), unit=8, plain=False),),
        "SliceGPT: a narrower stream",
        QualityLine("slice", "SliceGPT"),
        rotation="block",
        why="it cuts the stream of each block in a basis of its own",
        rows=(
            Row(
                "`slice`",
                "leading principal components of the stream (SliceGPT), with k x k skips",
                "k n",
                "the same",
                "a baseline",
            ),
        ),
    ),
    Entry(
        "dense",
        (Variant("dense"),),
        "a copy, the baseline",
        QualityLine("dense", "dense", (1.0,)),
        text="named",
        compresses=False,
        why="a dense model is not rotated",
        rows=(Row("`dense`", "itself", "n m", "n m", "the baseline that every speed-up is measured against"),),
    ),
    Entry(
        "kron",
        (Variant("paper", ("block",), ("dense",), inner=()),),
        "kron as ProcrustesGPT fits it",
        # Dense skips take 0.1875 of SmolLM2-135M: 0.75 is the paper's half size, 0.96 its three quarters.
        QualityLine("kron-paper", "kron, the paper's fit and rotations", (0.75, 0.96)),
        rotation="block",
        fit="paper",
        steps=PAPER_STEPS,
        explicit_mixes=True,
    ),
    Entry(
        "gs",
        (Variant("paper", ("block",), ("dense",), inner=()),),
        "gs as ProcrustesGPT fits it",
        QualityLine("gs-paper", "gs, the paper's fit and rotations"),
        rotation="block",
        fit="paper",
        steps=PAPER_STEPS,
        explicit_mixes=True,
    ),
]


def add(entry: Entry) -> None:
    """Add a structure, or another fit of one. Raises ValueError for one that is there."""
    if find(entry.structure, entry.fit) is not None:
        raise ValueError(f"structure {entry.structure!r} by fit {entry.fit!r} is in the catalogue already")
    _ENTRIES.append(entry)


def entries() -> tuple[Entry, ...]:
    """All of them, in the order in which users see them."""
    return tuple(_ENTRIES)


def find(structure: object, fit: object = USUAL_FIT) -> Entry | None:
    """The entry of a structure and a fit; None where there is none, whatever was given."""
    return next((e for e in _ENTRIES if (e.structure, e.fit) == (structure, fit)), None)


def get(structure: str, fit: str = USUAL_FIT) -> Entry:
    """The entry of a structure and a fit. Raises KeyError where there is none."""
    entry = find(structure, fit)
    if entry is None:
        raise KeyError(f"no structure {structure!r} by fit {fit!r}")
    return entry


def structures() -> tuple[str, ...]:
    """Values of `--structure`."""
    return tuple(dict.fromkeys(e.structure for e in _ENTRIES))


def fits() -> tuple[str, ...]:
    """Values of `--fit`, the default first."""
    return tuple(dict.fromkeys(e.fit for e in _ENTRIES))


def label(structure: str, fit: str) -> str:
    """A structure, and its fit where that is not the usual one: kron-paper."""
    return structure if fit == USUAL_FIT else f"{structure}-{fit}"


def flags(structure: str, fit: str) -> str:
    """What names them on the command line: --structure kron --fit paper."""
    return f"--structure {structure}" + ("" if fit == USUAL_FIT else f" --fit {fit}")


def structure_help() -> str:
    """Help of `--structure`."""
    lines = "; ".join(f"{e.structure}: {e.help}" for e in _ENTRIES if e.fit == USUAL_FIT)
    return f"what each matrix becomes (default: {USUAL_STRUCTURE}). {lines}"


def inner_help() -> str:
    """Help of `--inner`."""
    usual = dict.fromkeys(e.structure for e in _ENTRIES for v in e.variants if v.default_inner)
    return (
        "freedoms inside a block: neurons (drop, refit the rest), vo (drop value coordinates), bias (correct the "
        f"mean); 'none' for none (default: neurons for {', '.join(usual)})"
    )


def menu_help() -> str:
    """Help of `--menu`."""
    first, *_ = [v.menu for e in _ENTRIES if e.chooses for v in e.variants]
    others = [name for name in get_args(MenuName) if name not in first]
    choosing = listed((e.structure for e in _ENTRIES if e.chooses), "or", str)
    return f"what --structure {choosing} chooses from beside dense: {', '.join(first)} (default), {', '.join(others)}"


def is_one_width(skip: str) -> bool:
    """True for a skip of a stream that keeps the same width at every position."""
    return skip in ONE_WIDTH


def default_skip(rotation: str) -> str:
    """The skip of a rotation where nothing else is asked for."""
    return SKIPS_OF.get(rotation, ("none",))[0]


def kinds(entry: Entry, variant: Variant, menu: tuple[MenuName, ...]) -> tuple[str, ...]:
    """The structures that each linear may choose from beside dense, `menu` being what the recipe asks for."""
    return (menu or variant.menu) if entry.chooses else (entry.structure,)


def markdown_table() -> str:
    """README's table of structures."""
    head = ("structure", "W is replaced by", "weights", "multiply-accumulates a token", "limits")
    rows = [(r.structure, r.replaced_by, r.weights, r.macs, r.limits) for r in _readme_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, *rows)).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


def _readme_rows() -> Iterator[Row]:
    """By use: what is chosen, then what is compared with."""
    order = ("kron", "gs", "pifa", "lowrank", "compot", "jrk", "slice", "auto", "dense")
    entries = sorted(
        (e for e in _ENTRIES if e.rows),
        key=lambda e: order.index(e.structure) if e.structure in order else len(order),
    )
    for entry in entries:
        yield from entry.rows


def listed(names: Iterable[str], word: str, shown: Callable[[str], str] = repr) -> str:
    """'a', 'b' and 'c', each once."""
    *first, last = [shown(name) for name in dict.fromkeys(names)]
    return f"{', '.join(first)} {word} {last}" if first else last
