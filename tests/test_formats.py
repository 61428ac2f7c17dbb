"""What an earlier version wrote is read: an OUT folder made before the packages got their present order."""

from __future__ import annotations

import shlex
import tarfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.artifact.store import Artifact
from tests.roads.backend import ask, serving
from tests.roads.commands import succeed

ARCHIVE = Path(__file__).parent / "data" / "before-the-move.tar.xz"
"""tiny (a random Llama), text.txt, and out, which the command below made."""

COMMAND = (
    "--model tiny --structure auto --menu pifa,gs,kron --rotation shared --ratio 0.6 --unit 4 "
    "--calibration-data text.txt --calibration-samples 8 --sequence-length 64 --engine ort"
)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_it_validates(earlier: Path) -> None:
    Artifact(earlier / "out").verify()
    given = ["--model", earlier / "tiny", "--data", earlier / "text.txt"]
    done = succeed("validate.run", earlier / "out", *given, "--skip", "speed", "--json")
    assert all(gate["passed"] for gate in done.result["gates"].values())


def test_it_loads_and_serves_the_same_tokens(earlier: Path) -> None:
    checkpoint = earlier / "out" / "checkpoint"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("The mill stands", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    with serving(earlier / "out") as url:
        answer = ask(url, "tiny", text_input="The mill stands", max_tokens=8, temperature=0.0)
    assert "".join(piece["text_output"] for piece in answer) == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_build_goes_on_from_it(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request: nothing is compressed again, and nothing that was written changes."""
    monkeypatch.chdir(earlier)
    before = Artifact(Path("out")).read_manifest()["files"]
    done = succeed("export.build", *shlex.split(COMMAND), "--out", "out")
    assert "re-using out/checkpoint" in done.err
    after = Artifact(Path("out")).read_manifest()["files"]
    assert {name: entry for name, entry in after.items() if name.startswith("checkpoint/")} == {
        name: entry for name, entry in before.items() if name.startswith("checkpoint/")
    }
