"""ONNX Runtime: sessions that run where they were asked to, prefill, decode with the cache, generation."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from compress.errors import ArtifactError, MissingDependencyError, UsageError
from compress.lazy import require
from export.engines.sampling import Sampler

if TYPE_CHECKING:
    import onnxruntime

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating[Any]]
CPU = ("CPUExecutionProvider",)

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Tokenizer(Protocol):
    """The two methods of a Hugging Face tokenizer that generation uses."""

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""


class OrtRunner:
    """One exported model in ONNX Runtime, with the key-value cache inside: prefill, then decode.

    Raises ArtifactError when the model cannot be loaded, MissingDependencyError when a provider that was asked
    for is not the one that runs (ONNX Runtime falls back to the CPU without an error).
    """

    def __init__(
        self, path: Path, *, threads: int = 1, providers: Sequence[str] = CPU, profile: str | None = None
    ) -> None:
        """threads: of one operator; profile: prefix of a file for ONNX Runtime's own profile, if wanted."""
        self.path = Path(path)
        self.session = _session(self.path, threads, providers, profile)
        self.outputs = [output.name for output in self.session.get_outputs()]
        caches = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        if "logits" not in self.outputs or not caches:
            raise ArtifactError(f"{path} is not a decoder exported by this project: no logits or no past_key_values")
        if caches[0].type not in _NUMPY_TYPES:
            raise UsageError(f"{path} keeps its cache as {caches[0].type}, which numpy has not; use --dtype float32")
        self._caches = [cache.name for cache in caches]
        self._cache_type = _NUMPY_TYPES[caches[0].type]
        _, self._kv_heads, _, self._head_dim = caches[0].shape
        values = self.session.get_modelmeta().custom_metadata_map
        self.metadata: dict[str, Any] = {k.removeprefix("procrustes."): json.loads(v) for k, v in values.items()}
        self.vocabulary = int(self.session.get_outputs()[0].shape[2])
        self._past: list[onnxruntime.OrtValue] = []
        self._mask: Ids = np.zeros((0, 0), np.int64)

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included; 0 before `prefill`."""
        return int(self._mask.shape[1])

    def reset(self) -> None:
        """Forget the cache."""
        self._past, self._mask = [], np.zeros((0, 0), np.int64)

    def prefill(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Logits:
        """Start anew with prompts (batch, length), padded on the left where attention_mask is 0.

        Returns logits (batch, length, vocabulary); (batch, 1, vocabulary) from a graph with last logits only.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        self.reset()
        empty = np.zeros((len(ids), self._kv_heads, 0, self._head_dim), self._cache_type)
        past = [_ort_value(empty) for _ in self._caches]
        return self._step(ids, mask, past)

    def decode(self, token_ids: npt.ArrayLike) -> Logits:
        """Append tokens (batch,) or (batch, new) to the cache -> logits (batch, new, vocabulary)."""
        if not self._past:
            raise UsageError("decode needs a cache: call prefill first")
        ids = np.asarray(token_ids, np.int64)
        ids = ids[:, None] if ids.ndim == 1 else ids
        if len(ids) != len(self._mask):
            raise UsageError(f"decode got {len(ids)} sequences where the cache holds {len(self._mask)}")
        ids, new = self._checked(ids, None)
        return self._step(ids, np.concatenate([self._mask, new], axis=1), self._past)

    def run_full(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None = None) -> Logits:
        """One forward pass over whole sequences, as for perplexity; the cache of `decode` stays as it is."""
        kept = self._past, self._mask
        try:
            return self.prefill(input_ids, attention_mask)
        finally:
            self._past, self._mask = kept

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        *,
        max_new_tokens: int,
        tokenizer: Tokenizer | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt (ids, or text with a tokenizer), up to and including the end token.

        Greedy by default. temperature > 0 samples, from the top_k likeliest tokens and from the smallest set
        whose probability reaches top_p. `eos` defaults to the model's own end token(s). Prompts of unlike length
        are padded on the left. Raises UsageError for prompts or options that make no sense.
        """
        ids = [_encode(prompt, tokenizer) for prompt in prompts]
        if not ids or not all(ids):
            raise UsageError("generate needs at least one prompt, and every prompt at least one token")
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        longest = max(map(len, ids)) + max_new_tokens
        if longest > self.metadata["max_positions"]:
            raise UsageError(
                f"{longest} tokens are more than the {self.metadata['max_positions']} positions of this model"
            )
        sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        ends = _ends(self.metadata["eos_token_id"] if eos is None else eos)
        made: list[list[int]] = [[] for _ in ids]
        running = np.ones(len(ids), bool)
        logits = self.prefill(*left_pad(ids, self.metadata["pad_token_id"] or 0))
        while True:
            tokens = sampler(logits[:, -1])  # (batch,)
            for row in np.flatnonzero(running):
                made[row].append(int(tokens[row]))
                running[row] = tokens[row] not in ends
            if not running.any() or max(map(len, made)) >= max_new_tokens:
                return made
            logits = self.decode(tokens)

    def generate_text(self, prompts: Sequence[str], tokenizer: Tokenizer, **options: Any) -> list[str]:
        """`generate`, text in and text out, without the special tokens."""
        made = self.generate(prompts, tokenizer=tokenizer, **options)
        return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]

    def _checked(self, input_ids: npt.ArrayLike, attention_mask: npt.ArrayLike | None) -> tuple[Ids, Ids]:
        ids = np.ascontiguousarray(input_ids, np.int64)
        if ids.ndim != 2 or ids.size == 0:
            raise UsageError(f"input_ids must be (batch, length) with at least one token, not {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise UsageError(f"token ids must be in 0 ... {self.vocabulary - 1}, found {ids.min()} ... {ids.max()}")
        mask = np.ones_like(ids) if attention_mask is None else np.ascontiguousarray(attention_mask, np.int64)
        if mask.shape != ids.shape:
            raise UsageError(f"attention_mask is {mask.shape} where input_ids are {ids.shape}")
        return ids, mask

    def _step(self, ids: Ids, mask: Ids, past: list[onnxruntime.OrtValue]) -> Logits:
        """mask: (batch, past + new). Outputs become the next step's inputs as they are, without a copy."""
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]  # (batch, new)
        if positions.max() >= self.metadata["max_positions"]:
            raise UsageError(f"this model has {self.metadata['max_positions']} positions; the sequence is longer")
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.ascontiguousarray(positions)}
        values = {name: _ort_value(value) for name, value in feeds.items()}
        values |= zip(self._caches, past, strict=True)
        results = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, values), strict=True))
        self._past = [results[name.replace("past_key_values.", "present.")] for name in self._caches]
        self._mask = mask
        return cast(Logits, results["logits"].numpy())


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Ids, Ids]:
    """input_ids and attention_mask (batch, longest), the shorter prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def executed_nodes(path: Path) -> dict[str, int]:
    """op_type -> how many nodes ONNX Runtime runs for a prefill of two tokens, after its own optimisation.

    No function of ours may be among them: every one is inlined. Also a smoke test: the model loads and runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = OrtRunner(path, profile=str(Path(folder) / "profile"))
        runner.prefill([[0, 0]])
        events = json.loads(Path(runner.session.end_profiling()).read_text())
    # One event a node and run; shape nodes that were folded away have none.
    nodes = {event["name"]: event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    return dict(sorted(Counter(nodes.values()).items()))


def _session(path: Path, threads: int, providers: Sequence[str], profile: str | None) -> onnxruntime.InferenceSession:
    ort = require("onnxruntime", pip="onnxruntime", purpose="run an exported model")
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; run python -m export.build first")
    missing = [p for p in providers if p not in ort.get_available_providers()]
    if missing:
        raise MissingDependencyError(
            f"ONNX Runtime has no {missing[0]} here, only {', '.join(ort.get_available_providers())}; "
            "install the onnxruntime package that has it (for CUDA: pip install onnxruntime-gpu)"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only: they come back as exceptions, with their text
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    errors = ort.capi.onnxruntime_pybind11_state
    try:
        session = ort.InferenceSession(str(path), options, providers=list(providers))
    except errors.NotImplemented as error:
        raise UsageError(
            f"ONNX Runtime cannot run {path} on {providers[0]}: it lacks an operator for this type, as it does for "
            f"bfloat16 on the CPU ({str(error).strip()}); export it with --dtype float32"
        ) from error
    except (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.InvalidProtobuf,
        errors.NoSuchFile,
        errors.RuntimeException,
    ) as error:
        raise ArtifactError(f"ONNX Runtime cannot load {path} ({str(error).strip()}); export it again") from error
    running = session.get_providers()
    if running[: len(providers)] != list(providers):
        raise MissingDependencyError(
            f"ONNX Runtime runs {path.name} on {running[0]} though {', '.join(providers)} was asked for; "
            "check the driver and libraries of that provider"
        )
    return session


def _ort_value(array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _encode(prompt: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise UsageError("prompts are text: give a tokenizer, or token ids")
    return tokenizer.encode(prompt)


def _ends(eos: int | Sequence[int] | None) -> frozenset[int]:
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
