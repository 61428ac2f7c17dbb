"""Exit codes and sentences of `run_cli`, and the errors of `require`."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compress.cli.entry import run_cli
from compress.errors import ArtifactError, GateError, MissingDependencyError, ProcrustesError, UsageError
from compress.lazy import require


def raising(error: BaseException) -> Callable[[object], int]:
    def main(argv: object) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("kind", "code"),
    [(ProcrustesError, 1), (UsageError, 2), (GateError, 3), (MissingDependencyError, 4), (ArtifactError, 5)],
)
def test_each_error_has_its_exit_code(kind, code, capsys):
    assert run_cli(raising(kind("ratio is 7; give one in (0, 1]")), []) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "error: ratio is 7; give one in (0, 1]\n"


def test_success_passes_through():
    assert run_cli(lambda argv: 0, []) == 0
    assert run_cli(lambda argv: len(argv or []), ["a", "b"]) == 2


def test_interrupt_is_130_and_says_how_to_resume(capsys):
    assert run_cli(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to resume\n"


BUSY = """
import os, signal, sys, time
from compress.cli.entry import run_cli
def main(argv):
    try:
        print("ready", flush=True)
        while True:
            signal.pause()
    finally:
        if "twice" in argv:
            os.kill(os.getpid(), signal.SIGTERM)
        print("tidied up", flush=True)
if "ignoring" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = run_cli(main, sys.argv[1:])
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
sys.exit(code)
"""


def busy(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """A command in the middle of its work."""
    (tmp_path / "busy.py").write_text(BUSY)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, str(tmp_path / "busy.py"), *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGTERM, 143, []), (signal.SIGTERM, 143, ["twice"]), (signal.SIGINT, 130, [])]
)
def test_signals_end_a_command_cleanly(number: int, code: int, words: list[str], tmp_path: Path) -> None:
    process = busy(tmp_path, *words)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert (out, err) == ("tidied up\n", "interrupted; run the same command again to resume\n")


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    process = busy(tmp_path, "ignoring")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert "interrupted" in process.communicate(timeout=60)[1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG])
def test_refused_writes_are_5_and_name_the_path(code, capsys):
    assert run_cli(raising(OSError(code, os.strerror(code), "out/demo/model.onnx")), []) == 5
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"error: {os.strerror(code)}: 'out/demo/model.onnx'; ")
    assert "Traceback" not in sentence


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda argv: 1 // 0, [])
    with pytest.raises(FileNotFoundError):
        run_cli(raising(FileNotFoundError(errno.ENOENT, "No such file", "x")), [])


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.delenv("PROCRUSTES_DEBUG", raising=False)
    assert run_cli(raising(UsageError("no")), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("PROCRUSTES_DEBUG", "1")
    assert run_cli(raising(UsageError("no")), []) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("PROCRUSTES_DEBUG", "0")
    assert run_cli(raising(UsageError("no")), []) == 2
    assert "Traceback" not in capsys.readouterr().err


TALK = """
import os, sys
from compress.cli.entry import run_cli
from compress.errors import UsageError
from compress.progress import log, track
def main(argv):
    for line in track(range(20000), description="line") if "progress" in argv else range(20000):
        print(line)
    with open(argv[0], "w") as file:
        assert file.fileno() > 2  # a free descriptor 1 or 2 would get the chatter of libraries
        file.write("whole")
    os.write(1, b"chatter")
    os.write(2, b"chatter")
    if "fail" in argv:
        raise UsageError("no")
    return 3 if "gate" in argv else 0
sys.exit(run_cli(main, sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("redirection", "outcome", "code"),
    [
        ("| true", "fine", 0),
        ("| head -1", "gate", 3),
        ("| head -1", "fail", 2),
        (">&-", "fine", 0),
        ("2>&-", "fine", 0),
        ("2>&-", "fail", 2),
        ("<&- >&- 2>&-", "gate", 3),
        ("2>&1 | true", "fine", 0),
        ("> >(true) 2> >(true)", "fail", 2),
    ],
)
def test_nobody_need_listen(redirection: str, outcome: str, code: int, tmp_path: Path) -> None:
    """The command does its work to the end and gives its own exit code, and no traceback."""
    (tmp_path / "talk.py").write_text(TALK)
    command = f"{sys.executable} -u talk.py file {outcome} progress {redirection}; exit ${{PIPESTATUS[0]}}"
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == code
    assert (tmp_path / "file").read_text() == "whole"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("before", "within", "outcome", "code"),
    [
        ("os.close(1)", "", "fine", 0),
        ("os.close(2)", "", "fail", 2),
        ("os.close(0), os.close(1), os.close(2)", "", "gate", 3),
        ("sys.stdout.close()", "", "fine", 0),
        ("sys.stderr.close()", "", "fail", 2),
        ("print('held back'), os.close(1)", "", "fine", 0),
        ("", "os.close(1)", "gate", 3),
    ],
)
def test_streams_may_be_closed_since_the_start(
    before: str, within: str, outcome: str, code: int, tmp_path: Path
) -> None:
    """By a wrapper that closes descriptors before it calls a command, or by a library during it."""
    talk = TALK.replace("def main(argv):\n", f"def main(argv):\n    {within or 'pass'}\n")
    talk = talk.replace("sys.exit(run_cli", f"{before or 'pass'}\nsys.exit(run_cli")
    (tmp_path / "talk.py").write_text(talk)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [sys.executable, "talk.py", "file", outcome]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "file").read_text() == "whole"
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_disk_that_is_full_is_told() -> None:
    code = "import sys; from compress.cli.entry import run_cli; sys.exit(run_cli(lambda argv: print(1) or 0, []))"
    command = f"{sys.executable} -c '{code}' > /dev/full"
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 5
    assert done.stderr.startswith("error: No space left on device; free some space")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("outcome", "code"), [("fine", 0), ("gate", 3), ("fail", 2)])
def test_a_log_that_is_full_ends_nothing(outcome: str, code: int, tmp_path: Path) -> None:
    """`2> log` on a full disk: the work goes on, and the exit code is its own, though its sentence is lost."""
    (tmp_path / "talk.py").write_text(TALK)
    command = f"exec {sys.executable} talk.py file {outcome} progress > said 2> /dev/full"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == code
    assert (tmp_path / "file").read_text() == "whole"
    assert (tmp_path / "said").read_text().endswith("\n19999\n")


@pytest.mark.parametrize("wanted", ["tempfile.mkdtemp()", "__import__('matplotlib')"])
def test_no_temporary_folder_is_4(wanted: str, tmp_path: Path) -> None:
    """No byte can be written anywhere, as on a read-only or full disk, which also stops root."""
    code = f"""
import resource, sys, tempfile
from compress.cli.entry import run_cli
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
sys.exit(run_cli(lambda argv: {wanted}))
"""
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "MPLCONFIGDIR": "/dev/null/none", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no temporary folder can be written to")
    assert "Traceback" not in done.stderr


def test_a_write_that_knows_no_file_names_the_temporary_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_cli(raising(OSError(errno.ENOSPC, "No space left on device")), []) == 5
    assert f"in the temporary folder {str(tmp_path)!r}, which TMPDIR sets" in capsys.readouterr().err
    assert run_cli(raising(OSError(errno.ENOSPC, "No space left on device", "out/x")), []) == 5
    assert str(tmp_path) not in capsys.readouterr().err


def test_require_gives_the_module():
    assert require("json.decoder", pip="nothing", purpose="decode").JSONDecoder is not None


def test_require_names_the_package_and_the_purpose():
    with pytest.raises(MissingDependencyError) as caught:
        require("no_such_module.part", pip="'procrustes-llm[gpu]'", purpose="build TensorRT engines")
    assert str(caught.value) == (
        "The Python package 'no_such_module.part' is not installed; it is needed to build TensorRT engines. "
        "Run: pip install 'procrustes-llm[gpu]'"
    )


def test_require_tells_a_broken_install_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import its_missing_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"cannot be imported \(No module named 'its_missing"):
        require("half_installed", pip="x", purpose="test")


@pytest.mark.parametrize("package", ["compress.errors", "compress.artifact", "export", "validate", "trt_plugins"])
def test_light_modules_import_nothing_heavy(package):
    heavy = "{'torch', 'transformers', 'onnxruntime', 'onnx', 'matplotlib', 'datasets', 'pyarrow'}"
    code = f"import sys, {package}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_long_value_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """A number of 400 digits is told as one; a path is told as it is, however long."""
    path = "/".join(["x" * 255] * 8)

    def main(argv: Sequence[str] | None) -> int:
        raise UsageError(f"ratio: not {10**400}, of {path}; give another")

    assert run_cli(main, []) == 2
    message = capsys.readouterr().err
    assert message == f"error: ratio: not 1{'0' * 55}... (402 characters) of {path}; give another\n"
