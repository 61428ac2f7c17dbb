"""What --dry-run says of disk against what a run of the same recipe leaves in OUT, at its largest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from compress.artifact.ledger import KeptFolder
from compress.cli.entry import run_cli
from compress.forecast import forecast, lines, readable
from compress.pipeline import compress_model
from compress.run import main
from tests import tiny
from tests.compress import helpers
from tests.compress.helpers import TinyModel, text_file, tiny_source

FACTOR = 1.25  # menus, ledgers and records are left out of the forecast

CASES: list[tuple[str, dict[str, Any]]] = [
    ("tiny_opt", {"structure": "kron"}),
    ("tiny_opt", {"structure": "kron", "rotation": "block"}),
    ("tiny_opt", {"structure": "auto"}),
    ("tiny_llama", {"structure": "auto", "inner": ("neurons", "vo")}),
    ("tiny_opt", {"structure": "gs"}),
    ("tiny_llama", {"structure": "gs", "rotation": "shared"}),
    ("tiny_opt", {"structure": "lowrank", "ratio": 0.5, "sensitivity": "none"}),
    ("tiny_opt", {"structure": "jrk", "ratio": 0.5}),
    ("tiny_opt", {"structure": "slice", "ratio": 0.9}),
    ("tiny_opt", {"structure": "kron", "fit": "paper", "ratio": 0.95}),
    ("tiny_opt", {"structure": "dense"}),
    # Many tokens: streams are most of it, in the fit, and in the calibration.
    ("tiny_opt", {"structure": "kron", "calibration": {"samples": 64, "sequence_length": 64}}),
    (
        "tiny_opt",
        {
            "structure": "auto",
            "calibration": {"samples": 64, "sequence_length": 64},
            "sensitivity_samples": 64,
        },
    ),
]


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of OUT/state at its largest: measured before each piece takes the place of what it makes superfluous."""
    found, keep = [0], KeptFolder.keep

    def measured(self: KeptFolder, *names: str, drop: Iterable[str] = ()) -> None:
        found[0] = max(found[0], sum(path.stat().st_size for path in self.folder.iterdir()))
        keep(self, *names, drop=drop)

    monkeypatch.setattr(KeptFolder, "keep", measured)
    return found


@pytest.mark.parametrize(("name", "changes"), CASES, ids=lambda value: str(value)[:60])
def test_the_disk_of_a_run(
    name: str, changes: dict[str, Any], tiny_model: TinyModel, tmp_path: Path, largest: list[int]
) -> None:
    source, text = tiny_source(tiny_model, name), text_file(tmp_path)
    text.write_text(text.read_text() * 20)
    wanted = helpers.recipe(text, **changes)
    said = forecast(source.architecture(), wanted)
    artifact = compress_model(source, wanted, tmp_path / "out")
    assert said["state_bytes_about"] / FACTOR < largest[0] < said["state_bytes_about"] * FACTOR, said["disk"]
    stored = sum(path.stat().st_size for path in artifact.path("checkpoint").glob("*.safetensors"))
    assert said["checkpoint_bytes_about"] / FACTOR < stored < said["checkpoint_bytes_about"] * FACTOR


def test_parts_add_up_and_have_names(tiny_model: TinyModel, tmp_path: Path) -> None:
    wanted = helpers.recipe(text_file(tmp_path), structure="kron")
    said = forecast(tiny_source(tiny_model, "tiny_opt").architecture(), wanted, materialize_dense=True)
    state = {name: size for name, size in said["disk"].items() if name.startswith("state: ")}
    assert {"state: moments", "state: streams", "state: rotations", "state: fitted blocks"} <= state.keys()
    assert sum(state.values()) == said["state_bytes_about"]
    assert said["disk"].keys() - state.keys() == {"checkpoint", "dense"}
    assert sum(said["memory"].values()) == said["memory_bytes_about"]
    text = "\n".join(lines(said))
    assert "disk: about" in text
    assert f"\n  checkpoint: {readable(said['checkpoint_bytes_about'])}" in text


def test_the_plan_s_matrices_are_of_all_layers(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A shared rotation is searched with a pair of (d, d) matrices for every linear of the model."""
    arch = tiny_source(tiny_model, "tiny_llama").architecture()
    memory = {
        rotation: forecast(arch, helpers.recipe(text_file(tmp_path), structure="kron", rotation=rotation))["memory"]
        for rotation in ("shared", "block")
    }
    assert memory["shared"]["the plan's matrices"] == arch.num_layers * memory["block"]["the plan's matrices"]
    assert memory["shared"]["the plan's matrices"] >= 2 * 8 * arch.num_layers * 7 * arch.hidden_size**2


def test_the_command_lists_them(tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(tiny_model("tiny_llama"), tmp_path / "mine")
    text = tmp_path / "text.txt"
    text.write_text(tiny.TEXT)
    given = ["--model", str(model), "--dry-run", "--sequence-length", "32", "--calibration-samples", "2"]
    given += ["--calibration-data", str(text), "--materialize-dense"]
    assert run_cli(main, given) == 0
    printed = capsys.readouterr().out
    for name in ("state: moments", "state: streams", "checkpoint", "dense"):
        assert f"\n  {name}: " in printed
    assert run_cli(main, [*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disk"]["checkpoint"] > 0


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 bytes"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (5 * 10**15, "5000.0 TB")]
)
def test_readable(size: int, text: str) -> None:
    assert readable(size) == text
