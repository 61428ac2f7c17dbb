"""Downloading a model from the Hugging Face hub: the files that are read, and a sentence for each refusal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.artifact.reading import reason
from compress.errors import MissingDependencyError, UsageError
from compress.source.network import unreachable

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)

_CONFIG = ["config.json"]
_CODE = ["*.py"]
# Files beside config.json and the weights that decide what the model reads or writes.
SETTINGS = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
]
# Not `*.safetensors`: some repositories hold the weights a second time under another name (Mistral).
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def download_config(repository: str, revision: str | None, cache_dir: Path | None, code: bool = False) -> Path:
    """Fetch config.json alone and return the folder: a refusal should not cost a download of the weights.

    `code`: the repository's Python files too, which --trust-remote-code runs.
    """
    return _snapshot(repository, revision, cache_dir, _CONFIG + _CODE * code)


def download(repository: str, revision: str | None, cache_dir: Path | None, code: bool = False) -> Path:
    """Fetch config, tokenizer and weights and return their folder; `.bin` only when there are no safetensors.

    What is in the cache already is not fetched again, and with all of it there no network is needed. Raises
    MissingDependencyError (exit 4) when the hub cannot be reached, UsageError (exit 2) when it refuses.
    """
    from compress.source.weight_files import ENTRIES

    always = _CONFIG + SETTINGS + _CODE * code
    folder = _snapshot(repository, revision, cache_dir, always + _SAFETENSORS)
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(repository, revision, cache_dir, always + _PICKLES)
    if not any((folder / entry).is_file() for entry in ENTRIES) and (why := no_network()) is not None:
        raise _out_of_reach(repository, why)  # config.json alone is in the cache, from an interrupted download
    return folder


def no_network() -> str | None:
    """Why the hub is not asked, or None."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)


@contextmanager
def caches_alone(why: str | None) -> Iterator[None]:
    """With a reason not to ask the hub, `datasets` looks into its cache alone, in place of half a minute of tries."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = (offline or why is not None for offline in before)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _out_of_reach(repository: str, why: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"The hub model {repository!r} is not in the local cache and the Hugging Face hub cannot be reached ({why}); "
        "check the network (HF_HUB_OFFLINE, HF_ENDPOINT, proxy), or download the model elsewhere and name its folder."
    )


def _status(error: BaseException) -> int | None:
    """The status that the server answered with, where that is what `error` came from."""
    following: BaseException | None = error
    while following is not None:
        status = getattr(getattr(following, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        following = following.__cause__ or following.__context__
    return None


def _refused(repository: str, status: int) -> MissingDependencyError:
    from huggingface_hub import constants

    known = {404: "not found", 429: "too many requests", 403: "forbidden", 401: "not authorised"}
    meaning = known.get(status, "an error of the server" if status >= 500 else "refused")
    advice = "check that it is a hub (HF_ENDPOINT)" if status == 404 else "try again later, or check HF_ENDPOINT"
    return MissingDependencyError(
        f"The hub model {repository!r} is not in the local cache, and {constants.ENDPOINT} answers {status} "
        f"({meaning}) when asked for it: {advice}, or download the model elsewhere and name its folder."
    )


def commit_of(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache, whose folder is named after it."""
    return folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else None


def _snapshot(repository: str, revision: str | None, cache_dir: Path | None, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    # The base class of the HTTP library that huggingface_hub uses: httpx, or its successor.
    network_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]

    page = f"https://huggingface.co/{repository}"
    why = no_network()
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            local_files_only=why is not None,  # else it tries five times, for 39 s, before it looks into the cache
        )
    except errors.GatedRepoError as error:
        raise UsageError(
            f"The hub model {repository!r} is gated: accept its terms at {page}, then run `hf auth login` "
            "with a token of that account, or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(
            f"The hub model {repository!r} has no revision {revision!r}; see {page}/commits/main."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"There is no hub model {repository!r}, or it is private, and no local folder of that name; "
            "check the spelling, or run `hf auth login` if it is private."
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repository!r} cannot be the name of a hub model; it is ORG/NAME.") from error
    except (errors.LocalEntryNotFoundError, OSError, network_error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own refusal (full, not writable), which `run_cli` puts into words
        # No connection, or an answer that is none of the above (5xx, 429, another server's 404), and not in the cache.
        status = None if why is not None else _status(error)
        if status is not None:
            raise _refused(repository, status) from error
        raise _out_of_reach(repository, why or reason(error)) from error
    return Path(folder)
