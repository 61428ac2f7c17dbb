"""Arguments of every command that can be checked without work are checked before it, and none is silently ignored."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.source import resolve as resolving

COMMANDS = (
    *("compress.run", "export.build", "trt_plugins.build", "trt_plugins.resources", "compress.methods.paper.compare"),
    *("validate.latency", "validate.quality", "validate.run", "validate.serving", "validate.speed", "validate.tasks"),
)
MAINS = ("validate.quality.__main__", "validate.speed.__main__", "validate.tasks.__main__")
BUILD = "export.build --model MODEL"
RUN = "validate.run OUT --no-plot"


class Worked(BaseException):
    """Raised where the work would begin."""


def work(*_: object, **__: object) -> None:
    raise Worked


@pytest.fixture
def fill(tmp_path: Path, tiny_model: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Words of the commands below -> paths. OUT is an artefact as far as that shows without reading it."""
    (tmp_path / "file").write_text("a file")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    Artifact(tmp_path / "out").update_manifest({})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolving, "_from_path", work)
    monkeypatch.setattr(Artifact, "verify", work)
    return {"MODEL": str(tmp_path / "model"), "OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        # Names that are none, or not there.
        (f"{BUILD} --serve-as ../../x", "--serve-as '../../x'"),
        (f"{BUILD} --serve-as ../../x --dry-run", "--serve-as '../../x'"),
        (f"{BUILD} --serve-as a/b --engine none", "--serve-as 'a/b'"),
        (f"{BUILD} --serve-as=", "--serve-as ''"),
        (f"{BUILD} --serve-as={'x' * 300}", "up to 200 letters"),
        (f"{BUILD} --out FILE", "is not, or is not in, a folder"),
        (f"{BUILD} --engine trt --plugin-libraries nowhere", "--plugin-libraries nowhere has no"),
        (f"{BUILD} --engine trt --timing-cache nowhere/cache", "--timing-cache nowhere/cache"),
        (f"{BUILD} --engine trt --sequences 9", "--sequences 9 is more than the 8"),
        # Ranges that are none, whatever they are for.
        (f"{BUILD} --engine ort --batch 3,2,1", "must rise"),
        (f"{BUILD} --engine none --cache 0,1,2", "must rise"),
        # Flags that would change nothing.
        (f"{BUILD} --engine ort --batch 1,2,3", "--batch would change nothing with --engine ort"),
        (f"{BUILD} --engine ort --opt-level 3 --workspace 5", "--opt-level and --workspace would change nothing"),
        (f"{BUILD} --engine ort --plugin cpp", "--plugin would change nothing"),
        (f"{BUILD} --engine none --serve-as foo", "--serve-as would change nothing with --engine none"),
        (f"{BUILD} --engine none --serve-network python", "--serve-network would change nothing"),
        (f"{BUILD} --engine trt-rtx --sequences 3", "--sequences would change nothing"),
        ("export.build --resume --out OUT --ratio 0.5 --device cuda", "leave out --ratio and --device"),
        (f"{RUN} --skip speed --prefill 256 --seconds 5", "--prefill and --seconds would change nothing"),
        (f"{RUN} --skip perplexity --data lambada --stride 5", "--data and --stride would change nothing"),
        (f"{RUN} --skip perplexity --skip speed --threads 2", "--threads would change nothing"),
        ("validate.speed --layers --model MODEL --past 5", "--past and --model would change nothing"),
        ("validate.speed OUT --write-docs FILE", "--write-docs would change nothing"),
        # What was looked at after minutes.
        (f"{RUN} --data nope.txt", "nope.txt"),
        (f"{RUN} --data nonsense", "there is no text called"),
        (f"{RUN} --dense nowhere", "--dense 'nowhere' is not there"),
        (f"{RUN} --model nowhere/", "There is no file or folder"),
        (f"{RUN} --sequence-length 1", "--sequence-length must be at least 2"),
        ("validate.speed OUT --dense nowhere", "--dense 'nowhere' is not there"),
        ("validate.speed OUT --seconds -1", "--seconds must be above 0"),
        ("validate.tasks nowhere --model MODEL", "nowhere is neither an artefact folder nor a checkpoint"),
        ("validate.tasks MODEL --model nowhere/", "There is no file or folder"),
        ("validate.latency --model MODEL --out nowhere/table.json", "--out nowhere/table.json"),
        ("validate.serving OUT --baseline OUT --prompts nowhere", "--prompts nowhere cannot be read"),
        ("validate.quality --model MODEL --data nope.txt", "nope.txt"),
        ("validate.quality --model MODEL --calibration-data nope.txt --data FILE", "FILE"),
        ("validate.quality --model MODEL --out FILE", "is not, or is not in, a folder"),
        ("validate.quality --model MODEL --window 1", "--window must be at least 2"),
        ("validate.quality --model nowhere/", "There is no file or folder"),
        ("validate.quality --model MODEL --compress-arg=--devise=cpu", "--devise"),
        ("trt_plugins.build --out FILE", "is not, or is not in, a folder"),
        ("trt_plugins.build --arch 70", "--arch '70'"),
    ],
)
def test_refused_before_any_work(
    command: str, words: str, fill: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *arguments = [fill.get(word, word) for word in command.split()]
    module = f"{module}.__main__" if f"{module}.__main__" in MAINS else module
    before = sorted(tmp_path.rglob("*"))
    main = importlib.import_module(module).main
    try:
        code = run_cli(main, arguments)
    except SystemExit as error:  # argparse
        code = int(str(error.code))
    assert code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert fill.get(words, words) in printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        f"{BUILD} --serve-as a.b-c_1 --threads 2",
        f"{BUILD} --engine trt --batch 1,2,16 --sequences 9",
        f"{RUN} --skip speed --sequence-length 64",
        "validate.speed OUT --past 8",
    ],
)
def test_taken(command: str, fill: dict[str, str]) -> None:
    module, *arguments = [fill.get(word, word) for word in command.split()]
    module += ".__main__" if module == "validate.speed" else ""
    with pytest.raises(Worked):
        run_cli(importlib.import_module(module).main, arguments)


@pytest.mark.parametrize("module", COMMANDS)
def test_a_wrong_flag_is_told_in_one_line(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And not below 30 lines of usage."""
    entry = importlib.import_module(f"{module}.__main__" if f"{module}.__main__" in MAINS else module)
    with pytest.raises(SystemExit) as caught:
        entry.main(["--no-such-flag"])
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"; see python -m {module} --help")


@pytest.mark.parametrize(("text", "ratio"), [("75%", 0.75), ("0.75", 0.75), ("12.5%", 0.125)])
def test_a_ratio_may_be_a_percentage(text: str, ratio: float) -> None:
    args = importlib.import_module("compress.run").parser().parse_args(["--model", "m", "--ratio", text])
    assert args.ratio == ratio


@pytest.mark.parametrize("text", ["75%%", "%", "three quarters"])
def test_a_ratio_that_is_none_is_told_how_to_write_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("compress.run").parser().parse_args(["--model", "m", "--ratio", text])
    assert "write 0.75, or 75%; see python -m compress.run --help" in capsys.readouterr().err
