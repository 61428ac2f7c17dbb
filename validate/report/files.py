"""JSON files of figures; single reports in OUT/reports, kept beside those that are there already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compress.artifact.reading import read_artefact_json
from compress.artifact.store import Artifact


def write_json(path: Path, value: Any) -> None:
    """Indented, and NaN is an error."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_report(artifact: Artifact, name: str) -> dict[str, Any] | None:
    """OUT/reports/NAME, or None where it is not there or was made from another checkpoint.

    Raises ArtifactError when it is not a JSON object.
    """
    path = artifact.path("reports") / name
    if not _current(artifact) or not path.is_file():
        return None
    report: dict[str, Any] = read_artefact_json(path, dict, f"remove {path.parent} and run again")
    return report


def add_report(artifact: Artifact, name: str, value: dict[str, Any]) -> None:
    """Publish OUT/reports with this report added; what belongs to another checkpoint is left out."""
    with artifact.lock():
        inputs = ["checkpoint"]
        kept = artifact.path("reports") if _current(artifact) else None
        if kept is not None:  # validate.run also reports on the export
            inputs = list(artifact.read_manifest()["stages"]["reports"].get("inputs", {})) or inputs
        with artifact.stage("reports", inputs=inputs) as folder:
            if kept is not None:
                shutil.copytree(kept, folder, dirs_exist_ok=True)
            write_json(folder / name, value)


def _current(artifact: Artifact) -> bool:
    """True if OUT/reports was made from the present checkpoint (and export)."""
    if not artifact.has_stage("reports"):
        return False
    stages = artifact.read_manifest()["stages"]
    inputs = stages["reports"].get("inputs", {})
    return all(source in stages and artifact.stage_digest(source) == digest for source, digest in inputs.items())
