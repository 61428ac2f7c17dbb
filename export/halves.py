"""float16 or bfloat16: chosen by the largest activations in calibration (compress/calibration/largest.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.calibration.largest import FLOAT16_MAX, SAFE
from compress.errors import ArtifactError
from compress.progress import log


def graph_dtype(asked: str | None, half: bool, watched: object) -> str:
    """The type of the graph. `asked`: --dtype, obeyed; `half`: whether the engine runs in 16 bits by default.

    `watched` is the manifest's record of the checkpoint, None where nothing was watched: a recipe that reads no text,
    or an older checkpoint. Warns where float16 is at risk. Raises ArtifactError for a record that is none.
    """
    if asked is None and not half:
        return "float32"
    if asked not in (None, "float16"):
        return str(asked)
    if watched is None:
        log("float16: no activations were watched, as no text was read; validate.run --gpu shows whether it overflows")
        return "float16"
    beyond, value = _record(watched)
    if not beyond:
        return "float16"
    places = ", ".join(f"{name} ({size if isinstance(size, str) else f'{size:,.0f}'})" for name, size in beyond[:3])
    more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
    end = "is beyond" if value > FLOAT16_MAX else "comes near"
    seen = f"what {places}{more} reached on the calibration text {end} float16's {FLOAT16_MAX:,.0f}"
    if asked is None:
        log(f"bfloat16 in place of float16: {seen} (--dtype float16 overrides)")
        return "bfloat16"
    log(f"warning: float16 as asked for, though {seen}: expect infinities; --dtype bfloat16 has none")
    return "float16"


def at_risk(watched: object) -> bool:
    """True if `graph_dtype` would choose bfloat16."""
    return watched is not None and bool(_record(watched)[0])


def _record(watched: object) -> tuple[list[tuple[str, float | str]], float]:
    """(places beyond what is safe, largest first; the largest value)."""
    beyond = watched.get("beyond") if isinstance(watched, Mapping) else None
    if not isinstance(beyond, Mapping) or not all(_is_size(size) for size in beyond.values()):
        raise ArtifactError("the manifest's record of the largest activations is damaged; compress the model again")
    listed = sorted(beyond.items(), key=lambda item: -float(item[1]))
    return listed, float(listed[0][1]) if listed else 0.0


def _is_size(value: Any) -> bool:
    return value == "inf" or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= SAFE)
