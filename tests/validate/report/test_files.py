"""Reports beside each other in OUT/reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.artifact.store import Artifact
from validate.report.files import add_report, read_report


def test_reports_are_kept_beside_each_other(built: Any, tmp_path: Path) -> None:
    artifact = Artifact(built.copy(tmp_path / "out").out)
    assert read_report(artifact, "a.json") is None
    add_report(artifact, "a.json", {"a": 1})
    add_report(artifact, "b.json", {"b": 2})
    assert (read_report(artifact, "a.json"), read_report(artifact, "b.json")) == ({"a": 1}, {"b": 2})
    artifact.verify()
    with artifact.stage("checkpoint") as folder:  # another one: its reports say nothing of it
        (folder / "config.json").write_text("{}")
    assert read_report(artifact, "a.json") is None
    add_report(artifact, "c.json", {"c": 3})
    assert sorted(p.name for p in artifact.path("reports").iterdir()) == ["c.json"]
