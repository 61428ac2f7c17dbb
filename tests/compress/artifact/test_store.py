"""The artefact folder: whole stages, an honest manifest, and refusal of what is not as it was written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compress.artifact.files
import compress.artifact.store
from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.errors import ArtifactError, UsageError

ROOT = Path(__file__).resolve().parents[3]


def build(out: Path, stage: str = "checkpoint", text: str = "weights", **arguments) -> Artifact:
    artifact = Artifact(out)
    with artifact.stage(stage, **arguments) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "shards").mkdir()
        (folder / "shards" / "model.bin").write_text(text)
    return artifact


def edit_manifest(out: Path, change) -> None:
    value = json.loads((out / "manifest.json").read_text())
    change(value)
    (out / "manifest.json").write_text(json.dumps(value))


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir()) if out.exists() else []


# -- writing --------


def test_a_stage_appears_whole_with_its_hashes(tmp_path):
    artifact = build(tmp_path / "new" / "out", facts={"ratio": 0.75}, section={"source": {"id": "tiny"}})
    manifest = artifact.read_manifest()
    assert names(artifact.out) == ["checkpoint", "manifest.json"]
    assert manifest["schema"] == 1
    assert manifest["files"]["checkpoint/config.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    assert set(manifest["files"]) == {"checkpoint/config.json", "checkpoint/shards/model.bin"}
    assert manifest["stages"] == {"checkpoint": {"ratio": 0.75}}
    assert manifest["source"] == {"id": "tiny"}
    assert artifact.has_stage("checkpoint")
    assert not artifact.has_stage("onnx")
    artifact.verify()


def test_nothing_shows_before_the_block_ends(tmp_path):
    artifact = Artifact(tmp_path)
    with artifact.stage("onnx") as folder:
        (folder / "model.onnx").write_text("x")
        assert folder.parent == tmp_path
        assert not artifact.path("onnx").exists()
        assert not artifact.exists()
    assert artifact.path("onnx").is_dir()


def test_a_stage_replaces_the_older_one_and_forgets_its_files(tmp_path):
    artifact = build(tmp_path)
    with artifact.stage("checkpoint") as folder:
        (folder / "other.json").write_text("[]")
    assert set(artifact.read_manifest()["files"]) == {"checkpoint/other.json"}
    assert names(artifact.path("checkpoint")) == ["other.json"]
    artifact.verify()


@pytest.mark.parametrize("error", [RuntimeError("solver"), KeyboardInterrupt(), UsageError("ratio")])
def test_a_failed_stage_leaves_nothing_and_keeps_the_older_one(tmp_path, error):
    artifact = build(tmp_path, text="old")
    before = (tmp_path / "manifest.json").read_bytes()

    def fail():
        with artifact.stage("checkpoint") as folder:
            (folder / "config.json").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert names(tmp_path) == ["checkpoint", "manifest.json"]
    assert (tmp_path / "manifest.json").read_bytes() == before
    artifact.verify()


def test_a_failed_first_stage_leaves_no_manifest(tmp_path):
    artifact = Artifact(tmp_path)
    with pytest.raises(RuntimeError), artifact.stage("onnx"):
        raise RuntimeError
    assert names(tmp_path) == []
    with pytest.raises(ArtifactError, match="no build has been completed there"):
        artifact.read_manifest()


def test_an_empty_stage_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="nothing was written for onnx"), Artifact(tmp_path).stage("onnx"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["manifest.json", "state", "../x", "a/b", "/etc", ".hidden", ""])
def test_stage_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="no stage name"):
        Artifact(tmp_path).stage(name)


def test_text_files_are_published_like_stages(tmp_path):
    artifact = build(tmp_path)
    assert artifact.write_text("recipe.yaml", "ratio: 0.75\n") == tmp_path / "recipe.yaml"
    artifact.write_text("recipe.yaml", "ratio: 0.5\n")
    assert (tmp_path / "recipe.yaml").read_text() == "ratio: 0.5\n"
    assert artifact.read_manifest()["files"]["recipe.yaml"]["size"] == 11
    assert names(tmp_path) == ["checkpoint", "manifest.json", "recipe.yaml"]
    artifact.verify(["recipe.yaml"])


def test_a_folder_of_the_user_is_not_replaced(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="was not written by this program"):
        build(tmp_path)
    assert (tmp_path / "checkpoint" / "thesis.txt").read_text() == "years of work"
    assert names(tmp_path) == ["checkpoint"]


def test_sections(tmp_path):
    artifact = build(tmp_path)
    artifact.update_manifest({"versions": {"torch": "2"}, "source": {"id": "a", "revision": "1"}})
    artifact.update_manifest({"gates": {"parity": True}})
    artifact.update_manifest({"versions": {"onnx": "1"}, "source": {"id": "b"}, "gates": {"speed": True}})
    manifest = artifact.read_manifest()
    assert manifest["versions"] == {"torch": "2", "onnx": "1"}
    assert manifest["source"] == {"id": "b"}
    assert manifest["gates"] == {"speed": True}
    with pytest.raises(ValueError, match="'files' is not one of"):
        artifact.update_manifest({"files": {}})
    with pytest.raises(ValueError, match="'source' is a str"):
        artifact.update_manifest({"source": "b"})
    assert artifact.read_manifest() == manifest


def test_gates_end_with_what_they_were_measured_on(tmp_path):
    artifact = build(tmp_path, section={"gates": {"speed": True}})
    build(tmp_path, "reports")
    assert artifact.read_manifest()["gates"] == {"speed": True}
    build(tmp_path, "onnx")
    assert artifact.read_manifest()["gates"] == {}


def test_a_stage_knows_what_it_was_made_from(tmp_path):
    artifact = build(tmp_path)
    build(tmp_path, "onnx", inputs=["checkpoint"])
    assert artifact.require_stage("onnx") == tmp_path / "onnx"
    build(tmp_path, text="weights")  # the same bytes again: still the same input
    artifact.require_stage("onnx")
    build(tmp_path, text="other weights")
    with pytest.raises(ArtifactError, match="made from another checkpoint"):
        artifact.require_stage("onnx")
    with pytest.raises(ArtifactError, match="no complete engine"):
        artifact.require_stage("engine")


def test_state_is_outside_the_manifest(tmp_path):
    artifact = build(tmp_path)
    kept = artifact.open_state({"ratio": 0.75})
    kept.path("layer-3.safetensors").write_text("x")
    kept.keep("layer-3.safetensors")
    build(tmp_path, "onnx")
    assert "layer-3.safetensors" in artifact.open_state({"ratio": 0.75})
    artifact.verify()
    artifact.clear_state()
    assert names(tmp_path) == ["checkpoint", "manifest.json", "onnx"]


# -- refusals of the operating system --------


def test_out_is_a_file_or_in_one(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UsageError, match="choose another --out"):
            build(out)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_unwritable_out_is_exit_5(tmp_path, monkeypatch, capsys, code):
    def refuse(path, mode=0o777):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    assert run_cli(lambda argv: build(tmp_path / "out") and 0, []) == 5
    assert f"{os.strerror(code)}: '{tmp_path / 'out'}'" in capsys.readouterr().err


def test_disk_full_in_the_block_is_exit_5_and_names_the_folder(tmp_path, capsys):
    artifact = build(tmp_path, text="old")

    def main(argv):
        with artifact.stage("checkpoint") as folder:
            (folder / "config.json").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() raises it: without a name
        return 0

    assert run_cli(main, []) == 5
    sentence = capsys.readouterr().err
    assert sentence.startswith(f"error: No space left on device: '{tmp_path / '.tmp-checkpoint'}'; free some")
    assert names(tmp_path) == ["checkpoint", "manifest.json"]
    artifact.verify()


def test_disk_full_while_a_folder_is_copied_is_recognised(tmp_path, monkeypatch, capsys):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "a.py").write_text("x")

    def refuse(source, target, **keywords):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))

    def copy(argv):
        with Artifact(tmp_path / "out").stage("triton") as folder:
            shutil.copytree(tmp_path / "from", folder / "lib", copy_function=refuse)
        return 0

    assert run_cli(copy, []) == 5
    assert capsys.readouterr().err.startswith("error: No space left on device: ")
    assert names(tmp_path / "out") == []


def test_disk_full_inside_safetensors_is_recognised(tmp_path, capsys):
    """A real refusal by the kernel, through the library: the file-size limit is at 4 kB."""
    script = (
        "import resource, sys, numpy\n"
        "from pathlib import Path\n"
        "from safetensors.numpy import save_file\n"
        "from compress.artifact import Artifact\n"
        "from compress.cli.entry import run_cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "def main(argv):\n"
        "    with Artifact(Path(argv[0])).stage('checkpoint') as folder:\n"
        "        save_file({'w': numpy.zeros(10000)}, folder / 'model.safetensors')\n"
        "    return 0\n"
        "sys.exit(run_cli(main, sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error: File too large: ")
    assert "Traceback" not in done.stderr
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("failing", ["hash", "manifest", "rename-away", "rename-in"])
def test_a_failure_while_publishing_keeps_the_older_stage(tmp_path, monkeypatch, failing):
    artifact = build(tmp_path, text="old")
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rename = os.rename

    def refuse(*arguments):
        raise no_space

    def refuse_one(source, target):
        if Path(target).name.startswith(".old-" if failing == "rename-away" else "checkpoint"):
            monkeypatch.setattr(os, "rename", rename)  # only once: recovery renames too
            raise no_space
        rename(source, target)

    if failing == "hash":
        monkeypatch.setattr(compress.artifact.files, "sha256_of", refuse)
    elif failing == "manifest":
        monkeypatch.setattr(compress.artifact.store.Manifest, "to_json", refuse)
    else:
        monkeypatch.setattr(os, "rename", refuse_one)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path, text="new")
    monkeypatch.undo()
    assert (tmp_path / "checkpoint" / "shards" / "model.bin").read_text() == "old"
    assert names(tmp_path) == ["checkpoint", "manifest.json"]
    artifact.verify()
    build(tmp_path, text="new").verify()


# Runs one publication in a process that dies, without any clean-up, at its n-th change of a name.
KILLED = """
import os, sys
from pathlib import Path
from compress.artifact import Artifact
out, moment = Path(sys.argv[1]), int(sys.argv[2])
count = 0
def dying(call):
    def wrapped(*arguments, **keywords):
        global count
        count += 1
        if count == moment:
            os._exit(9)
        return call(*arguments, **keywords)
    return wrapped
for name in ("rename", "replace", "unlink", "rmdir"):
    setattr(os, name, dying(getattr(os, name)))
with Artifact(out).stage("checkpoint", section={"source": {"id": "new"}}) as folder:
    (folder / "config.json").write_text("new")
"""


def test_a_kill_at_any_moment_leaves_one_whole_stage(tmp_path):
    seen = []
    for moment in range(1, 30):
        out = tmp_path / str(moment)
        build(out, text="old", section={"source": {"id": "old"}})
        done = subprocess.run([sys.executable, "-c", KILLED, out, str(moment)], cwd=ROOT, check=False)
        artifact = Artifact(out)
        with artifact.lock():
            pass
        artifact.verify()
        source = artifact.read_manifest()["source"]["id"]
        assert (out / "checkpoint" / "shards").exists() == (source == "old")
        assert names(out) == ["checkpoint", "manifest.json"]
        seen.append(source)
        if done.returncode == 0:
            break
        assert done.returncode == 9
    else:
        pytest.fail("the publication never ended by itself")
    # Kills on both sides of the point of no return were among them.
    assert seen == sorted(seen, reverse=True)
    assert seen.count("old") >= 2
    assert seen.count("new") >= 2


# -- one writer --------

HOLDER = """
import sys
from pathlib import Path
from compress.artifact import Artifact
with Artifact(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path):
    artifact = build(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArtifactError, match=f"is being written by process {holder.pid} on "):
            build(tmp_path, "onnx")
        artifact.verify()  # readers are not held up
    finally:
        holder.kill()
        holder.communicate()
    build(tmp_path, "onnx").verify()  # a killed holder holds nothing
    assert names(tmp_path) == ["checkpoint", "manifest.json", "onnx"]


def test_the_lock_nests_in_one_process(tmp_path):
    artifact = Artifact(tmp_path)
    with artifact.lock():
        build(tmp_path)
        assert ".lock" in names(tmp_path)
    assert ".lock" not in names(tmp_path)


# -- verification --------


def test_tampered_file_is_named(tmp_path):
    artifact = build(tmp_path)
    (tmp_path / "checkpoint" / "shards" / "model.bin").write_text("Weights")
    with pytest.raises(ArtifactError, match=r"checkpoint/shards/model\.bin is changed: its SHA-256"):
        artifact.verify()


def test_truncated_file_is_named(tmp_path):
    artifact = build(tmp_path)
    os.truncate(tmp_path / "checkpoint" / "shards" / "model.bin", 3)
    with pytest.raises(ArtifactError, match=r"model\.bin is truncated: 3 bytes, where the manifest has 7"):
        artifact.verify()


def test_missing_file_is_named(tmp_path):
    artifact = build(tmp_path)
    (tmp_path / "checkpoint" / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"checkpoint/config\.json is missing"):
        artifact.verify()


def test_file_that_nobody_listed_is_named(tmp_path):
    artifact = build(tmp_path)
    (tmp_path / "checkpoint" / "modeling.py").write_text("import os")
    with pytest.raises(ArtifactError, match=r"checkpoint/modeling\.py is not in the manifest"):
        artifact.verify()


def test_prefixes_limit_what_is_read(tmp_path):
    artifact = build(tmp_path)
    build(tmp_path, "onnx")
    (tmp_path / "checkpoint" / "config.json").write_text("[]")
    artifact.verify(["onnx/"])
    with pytest.raises(ArtifactError, match=r"checkpoint/config\.json is changed"):
        artifact.verify(["onnx", "checkpoint"])
    with pytest.raises(ArtifactError, match="lists no file under 'onn'"):
        artifact.verify(["onn"])


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_links_are_refused_when_reading(tmp_path, make):
    artifact = build(tmp_path / "out")
    config = tmp_path / "out" / "checkpoint" / "config.json"
    config.rename(tmp_path / "elsewhere")
    make(tmp_path / "elsewhere", config)
    with pytest.raises(ArtifactError, match=r"config\.json is a (symbolic|hard) link"):
        artifact.verify()


def test_linked_folder_is_refused_when_reading(tmp_path):
    artifact = build(tmp_path / "out")
    (tmp_path / "out" / "checkpoint").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="checkpoint is a symbolic link"):
        artifact.verify()


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_links_are_refused_when_writing(tmp_path, make):
    (tmp_path / "weights").write_text("x")
    with (
        pytest.raises(ArtifactError, match=r"model\.bin is a (symbolic|hard) link"),
        Artifact(tmp_path / "out").stage("onnx") as folder,
    ):
        make(tmp_path / "weights", folder / "model.bin")
    assert names(tmp_path / "out") == []
    assert (tmp_path / "weights").read_text() == "x"


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "checkpoint/../../secret", "C:/x", "a\\b", "", "a//b", "./a", "a\0b"]
)
def test_paths_that_leave_the_folder_are_refused(tmp_path, name):
    artifact = build(tmp_path / "out")
    entry = {"size": 0, "sha256": "0" * 64}
    edit_manifest(tmp_path / "out", lambda value: value["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match="malformed: file ") as caught:
        artifact.verify()
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda value: value.pop("files"), "it has no 'files'"),
        (lambda value: value.update(extra=1), "unknown key 'extra'"),
        (lambda value: value.update(schema=2), "its schema is 2, and this version reads 1; upgrade"),
        (lambda value: value.update(schema="1"), "its schema is '1'"),
        (lambda value: value.update(schema=True), "its schema is True"),
        (lambda value: value.update(stages=[]), "'stages' is a list"),
        (lambda value: value["stages"].update(onnx=1), "stage 'onnx' is not an object"),
        (lambda value: value["files"].update(a={"size": -1, "sha256": "0" * 64}), "has size -1"),
        (lambda value: value["files"].update(a={"size": 1, "sha256": "XYZ"}), "has sha256 'XYZ'"),
        (lambda value: value["files"].update(a={"size": 1}), "has not exactly a size and a sha256"),
    ],
)
def test_malformed_manifest(tmp_path, change, sentence):
    artifact = build(tmp_path)
    edit_manifest(tmp_path, change)
    with pytest.raises(ArtifactError) as caught:
        artifact.read_manifest()
    assert sentence in str(caught.value)
    assert str(tmp_path / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_manifest_that_is_not_json(tmp_path, content):
    artifact = build(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest.json (is not (JSON|UTF-8)|has values nested)"):
        artifact.verify()
