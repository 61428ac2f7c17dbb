"""One line of the quality table: compress in a process of its own, evaluate against dense, keep both in OUT.

OUT/<key>/              the artifact; its checkpoint is reused when it was made by this very request
OUT/<key>/reports/      quality-<hash>.json, tasks-<hash>.json: figures, by a hash of their protocol
OUT/recipes/<key>.yaml  what compress.run was given
OUT/costs/<key>.json    wall time and peak memory of each attempt
OUT/cache/              the dense model's final hidden states
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from compress.artifact.store import Artifact
from compress.checkpoint.loading import load_model
from compress.checkpoint.reader import CheckpointReader
from compress.cli.entry import INTERRUPTED, TERMINATED, TerminatedError
from compress.errors import ProcrustesError
from compress.progress import log
from compress.recipe import parse_recipe
from compress.requests import has_checkpoint
from validate.cost import ModelCost
from validate.perplexity.hidden import fill_hidden, read_hidden, window_sha256
from validate.perplexity.scores import Comparison, HiddenLogits, TorchLogits, compare
from validate.report.files import add_report, read_report

if TYPE_CHECKING:
    from compress.source.model import ModelSource
    from validate.perplexity.windows import Windows
    from validate.quality.methods import Line
    from validate.tasks.data import Task

PROTOCOL = 1  # raised whenever this program measures anything differently
STORED = torch.float16  # the type that bytes are counted in
RESUMING = "resuming the interrupted run"  # what compress.pipeline says when it goes on from OUT/state
WINDOWS_OF_BOTH = 4  # on so many, float32 and another type of evaluation are set side by side


class FailedError(ProcrustesError):
    """A method that could not be compressed."""


@dataclass
class Bench:
    """What all lines share. `extra`: arguments for every compress.run; `text`: name and sha256 of the text."""

    model: str
    source: ModelSource
    out: Path
    text: dict[str, str]
    windows: Windows
    dtype: torch.dtype = torch.float32
    batch: int = 1
    extra: Sequence[str] = ()
    _hidden: HiddenLogits | None = field(default=None, repr=False)

    def artifact(self, key: str) -> Artifact:
        """OUT/<key>."""
        return Artifact(self.out / key)

    @cached_property
    def dense_digest(self) -> str:
        """Digest of the dense checkpoint, which must be there."""
        return self.artifact("dense").stage_digest("checkpoint")

    @property
    def evaluation(self) -> dict[str, Any]:
        """How any line is evaluated."""
        return {
            "version": PROTOCOL,
            "text": self.text,
            "tokens": window_sha256(self.windows),
            "window": self.windows.length,
            "stride": self.windows.stride,
            "windows": self.windows.count,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def protocol(self, key: str) -> dict[str, Any]:
        """What decides the figures of a line."""
        checkpoint = self.artifact(key).stage_digest("checkpoint")
        return {**self.evaluation, "dense": self.dense_digest, "checkpoint": checkpoint}

    # -- compress ------------------------------------------------------------------------------------------

    def compress(self, line: Line) -> None:
        """Make OUT/<key>/checkpoint unless it is there. Raises FailedError, UsageError for a recipe that is none."""
        recipe = parse_recipe(line.recipe, f"the recipe of {line.key}")
        artifact = self.artifact(line.key)
        if has_checkpoint(artifact, self.source, recipe):
            log(f"{line.key}: compressed before")
            return
        log(f"{line.key}: compressing")
        file = self._file("recipes", f"{line.key}.yaml")
        file.write_text(yaml.safe_dump(line.recipe, sort_keys=False))
        facts = self._file("costs", f"{line.key}.attempt.json")
        facts.unlink(missing_ok=True)
        command = [sys.executable, "-m", "validate.measure", str(facts), "compress.run", "--model", self.model]
        command += ["--recipe", str(file), "--out", str(artifact.out), *self.extra]
        printed: list[str] = []
        try:
            code = _run(command, printed)
        finally:
            self._note_attempt(line.key, facts, any(RESUMING in text for text in printed))
        if code in (INTERRUPTED, TERMINATED):
            raise KeyboardInterrupt if code == INTERRUPTED else TerminatedError
        if code:
            reason = printed[-1].removeprefix("error: ") if printed else "it printed nothing"
            raise FailedError(f"compress.run exit {code}: {reason}")
        if not has_checkpoint(artifact, self.source, recipe):
            raise FailedError(
                f"compress.run made another checkpoint than {file.name} asks for: the extra arguments "
                f"{' '.join(self.extra)!r} change the recipe; put them into validate/quality/methods.py"
            )

    def cost(self, key: str) -> dict[str, Any]:
        """{"seconds", "peak_bytes", "complete"} over the attempts since the last fresh start; None where unknown.

        `complete` is False when an attempt was killed before it could say how long it took.
        """
        path = self.out / "costs" / f"{key}.json"
        attempts = json.loads(path.read_text()) if path.is_file() else []
        begin = max((i for i, attempt in enumerate(attempts) if not attempt["resumed"]), default=0)
        chosen = [attempt for attempt in attempts[begin:] if attempt["seconds"] is not None]
        if not chosen:
            return {"seconds": None, "peak_bytes": None, "complete": False}
        return {
            "seconds": math.fsum(attempt["seconds"] for attempt in chosen),
            "peak_bytes": max(attempt["peak_bytes"] for attempt in chosen),
            "complete": len(chosen) == len(attempts) - begin and not attempts[begin]["resumed"],
        }

    def _note_attempt(self, key: str, facts: Path, resumed: bool) -> None:
        path = self._file("costs", f"{key}.json")
        attempts = json.loads(path.read_text()) if path.is_file() else []
        measured = json.loads(facts.read_text()) if facts.is_file() else {"seconds": None, "peak_bytes": None}
        facts.unlink(missing_ok=True)
        attempts.append(measured | {"resumed": resumed, "extra": list(self.extra)})
        path.write_text(json.dumps(attempts, indent=1) + "\n")

    def _file(self, folder: str, name: str) -> Path:
        (self.out / folder).mkdir(parents=True, exist_ok=True)
        return self.out / folder / name

    # -- evaluate ------------------------------------------------------------------------------------------

    def quality(self, line: Line) -> dict[str, Any]:
        """Perplexity, KL and agreement with dense, from OUT/<key>/reports where they were measured before."""
        artifact, protocol = self.artifact(line.key), self.protocol(line.key)
        name = f"quality-{digest(protocol)}.json"
        found = read_report(artifact, name)
        if found is not None and found["protocol"] == protocol:
            log(f"{line.key}: evaluated before")
            return found
        log(f"{line.key}: evaluating")
        start = time.monotonic()
        dense = self._dense_logits()
        if line.key == "dense":
            comparison = compare(dense, dense, self.windows, self.batch)
        else:
            model = load_model(artifact.path("checkpoint"), self.dtype)
            comparison = compare(dense, TorchLogits(model, wide_head=True), self.windows, self.batch)
        report: dict[str, Any] = {"protocol": protocol, **comparison.to_dict()}
        if line.key == "dense" and self.dtype != torch.float32:
            report["float32"] = self._against_float32().to_dict()
        report["evaluation_seconds"] = time.monotonic() - start
        add_report(artifact, name, report)
        return report

    def tasks(self, line: Line, tasks: Sequence[Task], limit: int | None) -> dict[str, Any]:
        """The zero-shot tasks (validate/tasks/__main__.py), from OUT/<key>/reports where they were scored before."""
        from validate.tasks.scores import evaluate

        artifact = self.artifact(line.key)
        results: dict[str, Any] = {}
        model = tokenizer = None
        for task in tasks:
            protocol = {
                "task": task.name,
                "data": task.sha256,
                "limit": limit,
                "dtype": str(self.dtype).removeprefix("torch."),
                "checkpoint": artifact.stage_digest("checkpoint"),
            }
            name = f"task-{task.name}-{digest(protocol)}.json"
            found = read_report(artifact, name)
            if found is None or found["protocol"] != protocol:
                if model is None:
                    model, tokenizer = load_model(artifact.path("checkpoint"), self.dtype), self.source.tokenizer()
                log(f"{line.key}: {task.name}")
                scored = evaluate(model, tokenizer, [task], {task.name: task.load(limit)})
                found = {"protocol": protocol, "result": scored[task.name]}
                add_report(artifact, name, found)
            results[task.name] = found["result"]
        return results

    def size(self, key: str) -> dict[str, Any]:
        """What the checkpoint keeps, stores and computes; bytes of float16.

        Bytes read and multiply-accumulates are those of one decoded token at batch 1, without the cache: attention
        is the same in every model.
        """
        artifact = self.artifact(key)
        cost = ModelCost.of(CheckpointReader(artifact.path("checkpoint")).config)
        read = cost.decode_bytes(1, 0, STORED)
        stored = read["projections"] + read["skip"] + read["head_map"]
        others = cost.parameters() - cost.projection_parameters() - cost.other["head_map"]
        flops = cost.flops(1, 1)
        return {
            "kept": artifact.read_manifest()["stages"]["checkpoint"]["ratio"],
            "projection_bytes": stored,
            "model_bytes": stored + STORED.itemsize * others,
            "bytes_per_token": sum(read.values()) - read["kv_cache"],
            "macs_per_token": (sum(flops.values()) - flops["attention"]) // 2,
        }

    def _dense_logits(self) -> HiddenLogits:
        """The dense model's head over hidden states that are computed once for all lines."""
        if self._hidden is None:
            checkpoint = self.artifact("dense").path("checkpoint")
            protocol = self.protocol("dense")
            path = self._file("cache", f"hidden-{digest(protocol)}.f32")
            reader = CheckpointReader(checkpoint)
            if not path.is_file():
                fill_hidden(load_model(checkpoint, self.dtype), self.windows, path)
            hidden = read_hidden(self.windows, reader.architecture.hidden_size, path)
            tied = reader.config.tie_word_embeddings
            weight = reader.get("model.embed_tokens.weight" if tied else "lm_head.weight").to(self.dtype)
            bias = reader.get("lm_head.bias").to(self.dtype) if reader.config.head_bias else None
            self._hidden = HiddenLogits(self.windows, hidden, weight, bias)
        return self._hidden

    def _against_float32(self) -> Comparison:
        """The dense model in float32 (`dense`) and in the type of evaluation (`compressed`) on the first windows."""
        from dataclasses import replace

        checkpoint = self.artifact("dense").path("checkpoint")
        windows = replace(self.windows, count=min(WINDOWS_OF_BOTH, self.windows.count))
        log(f"dense: float32 against {str(self.dtype).removeprefix('torch.')} on {windows.count} windows")
        return compare(TorchLogits(load_model(checkpoint)), self._dense_logits(), windows, self.batch)


def result_of(bench: Bench, line: Line) -> dict[str, Any]:
    """A row of the table; "error" says what failed, or is None. RuntimeError is what torch raises."""
    row: dict[str, Any] = {
        "key": line.key,
        "title": line.title,
        "asked": line.ratio,
        "group": line.group,
        "error": None,
    }
    try:
        bench.compress(line)
        quality = bench.quality(line)
        row |= bench.size(line.key)
    except (ProcrustesError, RuntimeError) as error:
        log(f"{line.key}: FAILED: {error}")
        return row | {"error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    compressed = quality["compressed"]
    row |= {
        "perplexity": compressed["perplexity"],
        "standard_error": _scaled(compressed["standard_error"], compressed["perplexity"]),
        "x_dense": 1 + quality["relative_increase"],
        "x_dense_standard_error": _scaled(quality["increase_standard_error"], 1 + quality["relative_increase"]),
        "kl": quality["kl"],
        "kl_standard_error": quality["kl_standard_error"],
        "top1": quality["top1_agreement"],
        "cost": bench.cost(line.key),
        "recipe": line.recipe,
    }
    if "float32" in quality:
        row["float32"] = quality["float32"]
    return row


def digest(value: dict[str, Any]) -> str:
    """Twelve digits of the sha256 of its canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _scaled(error: float | None, factor: float) -> float | None:
    """The error of exp(x) from that of x: exp(x) times it."""
    return None if error is None else error * factor


def _run(command: list[str], printed: list[str]) -> int:
    """The exit code; the lines of stderr that are not empty are passed on as they come, and put into `printed`."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            for text in process.stderr or ():
                sys.stderr.write(text)
                printed += [text.strip()] if text.strip() else []
        except TerminatedError:  # sent to this process alone, where Ctrl-C is sent to both
            process.terminate()
            raise
    return process.returncode
