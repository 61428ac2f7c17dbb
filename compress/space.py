"""What a run takes on the disk and in memory, by name and in bytes, from the architecture and the recipe alone.

The resume files in OUT/state are of three phases; what a phase leaves stays until OUT/checkpoint is written:

    calibration   moments of every block, and one stream (samples x tokens x d, float32) per block until the backward
                  pass has read it
    plan          rotations in float64, those of each round beside the final ones
    fit           the blocks as fitted, in float32, and the two streams (dense, compressed) before and after one block
"""

from __future__ import annotations

from compress.allocation.budget import most_parameters, overhead_of
from compress.architecture import Architecture
from compress.methods.planned import ROUNDS, needs_moments
from compress.recipe import Recipe, kinds_of

FLOAT, DOUBLE = 4, 8


def state_parts(arch: Architecture, recipe: Recipe) -> dict[str, int]:
    """Name -> bytes of what OUT/state holds when it is largest. Menus and records, a few MB, are left out."""
    blocks = {"fitted blocks": FLOAT * (_projections(arch, recipe) + overhead_of(arch, recipe))}
    if not recipe.needs_text():
        return blocks
    few, whole, rotations = _stream(arch, recipe, True), _stream(arch, recipe, False), rotation_bytes(arch, recipe)
    if recipe.structure == "slice":
        during, after = {"streams": 2 * whole}, {"streams": whole, **blocks}
        return {"rotations": rotations, **_larger(during, after)}
    forward, backward = moment_bytes(arch, recipe)
    layers = arch.num_layers
    moments = {"moments": layers * (forward + backward)}
    if recipe.fit == "paper":
        factors = FLOAT * _projections(arch, recipe)
        calibrated = {**moments, "rotations": rotations, "factors": factors, **blocks}
    else:
        fitted = {"rotations": rotations, "neuron orders": _rewrites(arch, recipe), "streams": 4 * whole, **blocks}
        turns = ROUNDS + 2 if uses_terms(recipe) else 2
        planned = {"rotations": turns * rotations, "neuron orders": 2 * _rewrites(arch, recipe)}
        calibrated = {**moments, **_larger(planned, fitted)}
    if not needs_moments(recipe):
        return calibrated
    if backward:  # before the first block of the backward pass, or after the last
        first = {"moments": layers * forward + backward, "streams": (layers + 2) * few}
        last = {**moments, "streams": 3 * few}
        return _larger(_larger(first, last), calibrated)
    return _larger({**moments, "streams": 2 * few}, calibrated)


def memory_parts(arch: Architecture, recipe: Recipe) -> dict[str, int]:
    """Name -> bytes of what is in memory when it is most, about: the interpreter and its libraries are left out.

    A GGUF file adds nothing: its tensors are read one at a time.
    """
    d = arch.hidden_size
    block = FLOAT * sum(n * m for n, m in arch.linears().values())
    ends = {"embeddings and head": FLOAT * arch.vocab_size * d * (1 if arch.tied else 2)}
    if not recipe.needs_text():
        return {"one block": 4 * block, **ends}
    forward, backward = moment_bytes(arch, recipe)
    fit = {"one block": 6 * block, "moments of one block": 4 * forward, "streams": 4 * _stream(arch, recipe, False)}
    plan = {"one block": 6 * block, "moments of one block": 3 * (forward + backward)}
    if uses_terms(recipe):
        # Two (d, d) matrices for each linear that has the rotation in common with others, and their copies.
        together = arch.num_layers if recipe.rotation == "shared" else 1
        plan["the plan's matrices"] = 3 * DOUBLE * d * d * len(arch.linears()) * together
    return {**_larger(plan, fit), **ends}


def moment_bytes(arch: Architecture, recipe: Recipe) -> tuple[int, int]:
    """Bytes of the second moments of one block: of what its linears read, and of the gradients of what they write."""
    if not needs_moments(recipe) or not recipe.needs_text() or recipe.structure == "slice":
        return 0, 0
    linears, inner = arch.linears(), ("attn.o", "mlp.down")
    forward = FLOAT * sum(arch.hidden_size**2 + linears[role][1] ** 2 for role in inner)
    backward = FLOAT * sum(n * n for n, _ in linears.values()) if recipe.sensitivity == "fisher" else 0
    return forward, backward


def rotation_bytes(arch: Architecture, recipe: Recipe) -> int:
    """Of the rotations in float64, in OUT/state and in OUT/checkpoint."""
    count = {"none": 0, "shared": 1, "block": 2 * arch.num_layers + 1}[recipe.rotation]
    return DOUBLE * count * arch.hidden_size**2


def uses_terms(recipe: Recipe) -> bool:
    """Whether rotations are searched for nested subspaces, in rounds, with a pair of (d, d) matrices a linear."""
    return recipe.rotation != "none" and recipe.fit != "paper" and "kron" in kinds_of(recipe)


def _projections(arch: Architecture, recipe: Recipe) -> int:
    return int(most_parameters(arch, recipe))


def _stream(arch: Architecture, recipe: Recipe, few: bool) -> int:
    """The residual stream of all calibration sequences, or of those that the moments are of."""
    c = recipe.calibration
    samples = min(recipe.sensitivity_samples, c.samples) if few else c.samples
    return FLOAT * samples * c.sequence_length * arch.hidden_size


def _rewrites(arch: Architecture, recipe: Recipe) -> int:
    neurons = arch.intermediate_size if "neurons" in recipe.inner else 0
    values = arch.num_kv_heads * arch.head_dim**2 if "vo" in recipe.inner else 0
    return DOUBLE * arch.num_layers * (neurons + values)


def _larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return one if sum(one.values()) > sum(other.values()) else other
