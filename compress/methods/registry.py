"""The method of each recipe: compress/catalog.py says its name, here is what has the name."""

from __future__ import annotations

from compress.allocation.explicit import explicit_layers
from compress.architecture import Architecture
from compress.errors import UsageError
from compress.methods.base import Method
from compress.methods.compot import Compot
from compress.methods.dense import Dense
from compress.methods.jrk import JointRank
from compress.methods.one_width import OneWidth
from compress.methods.paper.method import Paper
from compress.methods.planned import Planned
from compress.methods.slicegpt import SliceGPT
from compress.methods.uniform import Uniform
from compress.progress import log
from compress.recipe import Recipe

_METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Add a method, by its name. Raises ValueError for a name that is taken."""
    if method.name in _METHODS:
        raise ValueError(f"there is a method {method.name!r} already")
    _METHODS[method.name] = method


for _method in (Planned(), Uniform(), OneWidth(), Compot(), JointRank(), SliceGPT(), Paper(), Dense()):
    register(_method)


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_METHODS)


def method_of(recipe: Recipe) -> Method:
    """What compresses by `recipe`."""
    return _METHODS[recipe.variant().method]


def check_recipe(arch: Architecture, recipe: Recipe) -> None:
    """Raise UsageError for what no calibration can make work, before anything is read or computed."""
    slower = [s.macs(1) / (s.in_features * s.out_features) for s in explicit_layers(arch, recipe).values()]
    if max(slower, default=0) > 1:
        log(
            f"warning: {sum(x > 1 for x in slower)} linears of this recipe need more arithmetic than dense ones, up to "
            f"{max(slower):.2f} times (Kronecker products of two sides do): smaller, but not faster"
        )
    length = recipe.calibration.sequence_length
    if recipe.needs_text() and length > arch.max_positions:
        raise UsageError(
            f"sequences of {length} tokens are longer than the {arch.max_positions} positions of this model: "
            f"give --sequence-length {arch.max_positions} or less"
        )
    method_of(recipe).check(arch, recipe)
