"""A source model: where its files are, and how its config, tokenizer and weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from compress.architecture import Architecture
from compress.artifact.files import sha256_of
from compress.artifact.reading import RefusedError, read_json, reason, shown
from compress.errors import ArtifactError, MissingDependencyError
from compress.progress import LARGE, track
from compress.source import families
from compress.source.generation import GENERATION_CONFIG, end_tokens, read_generation_config
from compress.source.tokenizer_files import check_use, rust_errors, tokenizer_class
from compress.source.vocabulary import warn_beyond

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from compress.source.gguf import GgufHeader
    from compress.source.readers import WeightReader

Kind = Literal["folder", "gguf", "hub", "memory"]

# What transformers lets through on damaged files: it indexes and converts by their values.
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
        """The tokenizer, which may know more tokens than the model has: that is a warning.

        Raises ArtifactError when it is missing or damaged, UsageError when it is code that is not trusted,
        MissingDependencyError when a package is missing that reads it.
        """
        from transformers import PreTrainedTokenizerFast

        if self.gguf_file is not None:
            from compress.source.gguf import check_tokenizer, split_as_trained

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
        from compress.source import readers as source

        architecture = self.architecture()
        names = families.tensor_names(architecture)
        if self.gguf_file is not None:
            from compress.source.gguf import GgufReader

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
        from transformers import AutoModelForCausalLM

        reader = self.reader()
        if self.gguf_file is not None:
            return self._filled(reader, dtype)
        model = self._from_pretrained(AutoModelForCausalLM, "model", dtype=dtype)
        return cast("PreTrainedModel", model.eval())

    def _filled(self, reader: WeightReader, dtype: torch.dtype) -> PreTrainedModel:
        """The model of this config in eval mode, with the weights of `reader` in `dtype`."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self._config, dtype=dtype)  # type: ignore[no-untyped-call]
        # One tensor at a time: the model is the only copy in memory.
        with torch.no_grad():
            for name in reader.names():
                model.get_parameter(name).copy_(reader.get(name, dtype))
        return cast("PreTrainedModel", model.eval())

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Weight file name -> SHA-256, computed at the first use (seconds a gigabyte)."""
        from compress.source.weight_files import weight_files

        files = (self.gguf_file,) if self.gguf_file is not None else weight_files(self.path)
        size = sum((self.path / file).stat().st_size for file in files)
        shown_files = track(files, description="hash weights") if size > LARGE else files
        return {file: sha256_of(self.path / file) for file in shown_files}

    def to_dict(self) -> dict[str, Any]:
        """Entry of the source in the manifest: kind, id, revision and hashes; no path of this machine."""
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
            from compress.source.gguf import config_of

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
        from compress.source.gguf import read_header

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


def tokenizer_in(folder: Path, model_type: str) -> PreTrainedTokenizerFast:
    """The tokenizer whose files are in `folder`, those of a checkpoint say, with `ModelSource.tokenizer`'s errors."""
    cls, options = tokenizer_class(folder, model_type, False)
    source = ModelSource(str(folder), "folder", folder, None, folder.name, None)
    return cast("PreTrainedTokenizerFast", source._from_pretrained(cls, "tokenizer", **options))


def _reason(error: BaseException, tokenizer_class: str | None) -> str:
    """A library's complaint about damaged files, as a clause that goes on after a colon.

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


def _supported_model_type(folder: Path) -> None:
    """Read config.json before transformers does: it knows other types than we, and believes any number."""
    from compress.config_values import check_config
    from compress.source.weight_files import read_json

    values = read_json(folder / "config.json")
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ArtifactError(
            f"The file {folder / 'config.json'} has no model_type; supported are "
            f"{', '.join(families.supported_model_types())}."
        )
    families.family_of(model_type)
    check_config(values, folder / "config.json")
