"""How tests damage an exported model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx


def damage(onnx_folder: Path, which: int = 0) -> None:
    """Add 1 to the first value of one weight of a layer, in the external data; `which` counts by name."""
    model = onnx.load(str(onnx_folder / "model.onnx"), load_external_data=False)
    weights = [t for t in model.graph.initializer if t.external_data and t.name.startswith("layers.")]
    tensor = sorted(weights, key=lambda t: t.name)[which]
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (onnx_folder / where["location"]).open("r+b") as file:
        file.seek(int(where.get("offset", 0)))
        value = np.frombuffer(file.read(4), np.float32) + 1
        file.seek(int(where.get("offset", 0)))
        file.write(value.astype(np.float32).tobytes())
