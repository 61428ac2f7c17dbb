"""What a run takes on the disk and in memory, by name and in bytes, from the architecture and the recipe alone.

The resume files in OUT/state are of three phases; what a phase leaves stays until OUT/checkpoint is written:

    calibration   moments of every block, and one stream (samples x tokens x d, float32) per block until the backward
                  pass has read it
    plan          rotations in float64, those of each round beside the final ones
    fit           the blocks as fitted, in float32, and the two streams (dense, compressed) before and after one block

Menus and records, a few MB, are left out, and so are the interpreter and its libraries. A GGUF file adds nothing: its
tensors are read one at a time.
"""

from __future__ import annotations

from compress.allocation.budget import most_parameters, overhead_of
from compress.architecture import Architecture
from compress.methods.calibrated import needs_moments
from compress.recipe import Recipe

FLOAT, DOUBLE = 4, 8


def fitted_blocks(arch: Architecture, recipe: Recipe) -> dict[str, int]:
    """All blocks as fitted."""
    return {"fitted blocks": FLOAT * (projections(arch, recipe) + overhead_of(arch, recipe))}


def with_calibration(arch: Architecture, recipe: Recipe, after: dict[str, int]) -> dict[str, int]:
    """The larger of what calibration keeps at its largest, and its moments with what comes `after`."""
    forward, backward = moment_bytes(arch, recipe)
    few, layers = stream_bytes(arch, recipe, few=True), arch.num_layers
    moments = {"moments": layers * (forward + backward)}
    calibrated = {**moments, **after}
    if not needs_moments(recipe):
        return calibrated
    if backward:  # before the first block of the backward pass, or after the last
        first = {"moments": layers * forward + backward, "streams": (layers + 2) * few}
        last = {**moments, "streams": 3 * few}
        return larger(larger(first, last), calibrated)
    return larger({**moments, "streams": 2 * few}, calibrated)


def memory_alone(arch: Architecture) -> dict[str, int]:
    """Memory of a method that fits every block by itself, from its weights."""
    return {"one block": 4 * _block(arch), **_ends(arch)}


def memory_with_streams(
    arch: Architecture, recipe: Recipe, moments: tuple[int, int], plan: dict[str, int] | None = None
) -> dict[str, int]:
    """Memory of a method that runs the text through its blocks. moments: see `moment_bytes`; plan: what planning
    takes beside one block and its moments."""
    forward, backward = moments
    block, streams = 6 * _block(arch), 4 * stream_bytes(arch, recipe, few=False)
    fitting = {"one block": block, "moments of one block": 4 * forward, "streams": streams}
    planning = {"one block": block, "moments of one block": 3 * (forward + backward), **(plan or {})}
    return {**larger(planning, fitting), **_ends(arch)}


def terms_bytes(arch: Architecture, recipe: Recipe) -> int:
    """Memory of the search for a rotation: two (d, d) matrices, and their copies, for each linear that has it in common
    with others."""
    together = arch.num_layers if recipe.rotation == "shared" else 1
    return 3 * DOUBLE * arch.hidden_size**2 * len(arch.linears()) * together


def moment_bytes(arch: Architecture, recipe: Recipe) -> tuple[int, int]:
    """Bytes of the second moments of one block: of what its linears read, and of the gradients of what they write."""
    if not needs_moments(recipe):
        return 0, 0
    linears, inner = arch.linears(), ("attn.o", "mlp.down")
    forward = FLOAT * sum(arch.hidden_size**2 + linears[role][1] ** 2 for role in inner)
    backward = FLOAT * sum(n * n for n, _ in linears.values()) if recipe.sensitivity == "fisher" else 0
    return forward, backward


def rotation_bytes(arch: Architecture, recipe: Recipe) -> int:
    """Bytes of the rotations in float64, in OUT/state and in OUT/checkpoint."""
    count = {"none": 0, "shared": 1, "block": 2 * arch.num_layers + 1}[recipe.rotation]
    return DOUBLE * count * arch.hidden_size**2


def rewrite_bytes(arch: Architecture, recipe: Recipe) -> int:
    """Bytes of the orders of neurons and the bases of values, in OUT/state."""
    neurons = arch.intermediate_size if "neurons" in recipe.inner else 0
    values = arch.num_kv_heads * arch.head_dim**2 if "vo" in recipe.inner else 0
    return DOUBLE * arch.num_layers * (neurons + values)


def projections(arch: Architecture, recipe: Recipe) -> int:
    """Parameters of all projections, at most."""
    return int(most_parameters(arch, recipe))


def stream_bytes(arch: Architecture, recipe: Recipe, *, few: bool) -> int:
    """The residual stream of all calibration sequences, or of the `few` that the moments are of."""
    c = recipe.calibration
    samples = min(recipe.sensitivity_samples, c.samples) if few else c.samples
    return FLOAT * samples * c.sequence_length * arch.hidden_size


def larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """The one with the larger sum."""
    return one if sum(one.values()) > sum(other.values()) else other


def _block(arch: Architecture) -> int:
    return FLOAT * sum(n * m for n, m in arch.linears().values())


def _ends(arch: Architecture) -> dict[str, int]:
    return {"embeddings and head": FLOAT * arch.vocab_size * arch.hidden_size * (1 if arch.tied else 2)}
