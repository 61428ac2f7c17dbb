"""One cell's road: every command in turn on one tiny model, each held to figures of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.allocation.size import bias_parameters
from compress.artifact.store import Artifact
from compress.checkpoint.reader import CheckpointReader
from tests import tiny
from tests.roads import figures
from tests.roads.arguments import SMALL, counted_table, flags_of
from tests.roads.backend import ask, serving
from tests.roads.cells import RATIOS, UNSET, Cell
from tests.roads.commands import refuse, run, succeed
from validate.latency import STRUCTURES
from validate.tasks.data import Example, Task

MEASURED = ("--sequence-length", "64", "--max-windows", "2", "--prefill", "16", "--past", "8")
MEASURED += ("--batch-sizes", "1,2", "--seconds", "0.02")
BY_LATENCY = 0.8
"""Of the dense model's seconds, for cells with --budget-latency."""
ROUNDING = 1e-5
"""Of a budget in whole bytes."""
RANK_STEP = 0.1
"""Of the ratio of a compressed embedding: its ranks are multiples of the unit, here of 8 of some 40."""
QUESTIONS = [
    Example((("The mill stands", " where"), ("The mill stands", " by the bridge")), 0, (5, 13)),
    Example((("He looks", " more"), ("She listens", " more")), 1, (4, 4)),
]


class Road:
    """`model` is what --model takes, `recipe` a file for --recipe. Steps run in the order in which they stand here;
    later ones need earlier ones."""

    NEEDED = ("compress.run", "export.build", "generate")
    """Steps that others need."""

    def __init__(self, cell: Cell, model: str, folder: Path, recipe: Path | None = None) -> None:
        self.file = recipe
        self.cell, self.model, self.folder, self.out = cell, model, folder, folder / "out"
        self.text = folder / "text.txt"
        self.text.write_text(tiny.TEXT)
        self.words = folder / "words.txt"
        self.words.write_text(40 * "t a s w b ")  # a token each: prompts have up to 96 words, the models 128 positions
        structure, fit, rotation, _ = cell["method"]
        self.structure = structure
        self.ratio = RATIOS.get((fit, rotation), 0.75)
        self.served = True

    # -- arguments -----------------------------------------------------------------------------------------

    @cached_property
    def arguments(self) -> list[str]:
        """Of compress.run and export.build: the model and everything that the cell chooses, but for --out."""
        words = ["--model", self.model, "--calibration-data", str(self.text), *SMALL, *flags_of(self.cell)]
        words += [] if self.file is None else ["--recipe", str(self.file)]
        return words + self._budget()

    def _budget(self) -> list[str]:
        if self.structure == "dense":
            return []
        if self.cell["budget"] == "ratio":
            return ["--ratio", str(self.ratio)]
        if self.cell["budget"] == "bytes":
            return ["--budget-bytes", str(int(self.ratio * self.projections * self.item))]
        seconds = BY_LATENCY * self.projections
        return [
            "--budget-latency",
            str(seconds),
            "--latency-table",
            str(counted_table(self.architecture, self.kinds, self.folder)),
        ]

    @property
    def item(self) -> int:
        """Bytes of a stored number."""
        return 4 if self.cell["checkpoint_dtype"] == "float32" else 2

    @cached_property
    def projections(self) -> int:
        """Numbers of the dense model's projections."""
        arch = self.architecture
        return int(arch.num_layers * sum(n * m for n, m in arch.linears().values()))

    @property
    def unchanged(self) -> bool:
        """Whether the projections are those of the source."""
        return self.structure == "dense" and self.file is None

    @cached_property
    def architecture(self) -> Any:
        from compress.source import families

        return families.architecture(tiny.config(self.cell["model"]))

    # -- steps ---------------------------------------------------------------------------------------------

    def latency(self) -> None:
        """validate.latency: every shape is there, dense and in one structure."""
        kind = next((kind for kind in self.kinds if kind in STRUCTURES), "lowrank")
        file = self.folder / "table.json"
        options = ["--structures", kind, "--inner", "none", "--unit", "16", "--seconds", "0.001", "--working-set", "1"]
        done = succeed("validate.latency", "--model", self.model, "--out", file, "--json", *options)
        table = json.loads(file.read_text())
        assert table == done.result
        assert {entry["structure"] for entry in table["entries"]} == {"dense", kind}
        dense = {(e["in_features"], e["out_features"]) for e in table["entries"] if e["structure"] == "dense"}
        assert {(m, n) for n, m in self.architecture.linears().values()} <= dense
        assert all(entry["seconds"] > 0 for entry in table["entries"])

    @property
    def kinds(self) -> tuple[str, ...]:
        """Structures that a table for this method has."""
        return ("pifa", "lowrank", "kron", "gs") if self.structure == "auto" else (self.structure,)

    def source(self) -> None:
        """What the project reads is what was written: logits of the tiny model in memory."""
        from compress.source.resolve import resolve

        ids = tiny.token_ids(2, 24)
        read = figures.logits_of(resolve(self.model).reference_model(torch.float32), ids)
        assert figures.distance(figures.logits_of(tiny.model(self.cell["model"]), ids), read) < 1e-5

    def dry_run(self) -> None:
        """Writes nothing."""
        arguments = self.arguments
        before = sorted(self.folder.rglob("*"))
        self.plan = succeed("compress.run", *arguments, "--out", self.out, "--dry-run", "--json").result
        shown = succeed("compress.run", *arguments, "--out", self.out, "--dry-run").out
        told = [line.split(": ", 1)[0] for line in shown.splitlines() if not line.startswith(" ")]
        assert told == [key for key in self.plan if not key.endswith("_bytes_about")]
        assert sorted(self.folder.rglob("*")) == before

    def compress(self) -> None:
        """The ratio is the one asked for, the one counted in the files, and the one that the dry run told."""
        done = succeed("compress.run", *self.arguments, "--out", self.folder / "first", "--json").result
        facts = Artifact(self.folder / "first").read_manifest()["stages"]["checkpoint"]
        assert (done["ratio"], done["model_ratio"]) == (facts["ratio"], facts["model_ratio"])
        stored = figures.stored_projections(self.folder / "first" / "checkpoint")
        assert stored == facts["projections"] + facts["overhead"], (stored, facts)
        assert facts["dense_projections"] == self.projections == self.plan["dense_projection_parameters"]
        self.hold_ratios(facts)
        assert (facts["projections"] + facts["overhead"]) / self.projections == pytest.approx(facts["ratio"])
        self.facts = facts

    def hold_ratios(self, facts: dict[str, Any]) -> None:
        """Kept is what was asked for, or less by no more than the steps of the sizes: as the dry run told."""
        if self.structure == "dense":
            assert (facts["ratio"] == 1.0) == (self.file is None)
            assert self.plan["rotation_overhead"] == facts["overhead"] == 0
            return
        asked, kept = self.ratio, facts["ratio"]
        if self.cell["budget"] == "latency":  # in seconds, of which additions take none
            reader = CheckpointReader(self.folder / "first" / "checkpoint")
            asked, kept = (
                BY_LATENCY,
                kept - bias_parameters(reader.architecture, reader.extra_biases) / self.projections,
            )
        assert 0 <= asked + ROUNDING - kept <= self.granularity, (asked, kept)
        if self.cell["budget"] != "latency":
            assert self.plan["ratio_asked"] == pytest.approx(asked, abs=1e-4)
            # A skip has a direction fewer where one of the stream is empty, as the mean of OPT's is: known once found.
            least = 0 if self.cell["method"][3] not in ("cs", "householder") else 4 * self.architecture.num_layers
            spared = self.plan["rotation_overhead"] - facts["overhead"]
            assert 0 <= spared <= least * self.architecture.hidden_size, (self.plan, facts)
            projections = facts["dense_projections"] + facts["dense_embeddings"] + facts["rest"]
            told = self.plan["model_ratio"] - facts["model_ratio"]
            room = self.granularity * facts["dense_projections"] + facts["dense_embeddings"] * RANK_STEP
            assert -1e-4 <= told <= room / projections + 1e-4, (self.plan["model_ratio"], facts["model_ratio"])

    @property
    def granularity(self) -> float:
        """The steps of the ratio: fine where a plan spends one budget, coarse where all matrices have one size."""
        kinds = ("auto", "kron", "gs", "lowrank", "pifa")
        planned = self.structure in kinds and self.cell["allocation"] == "global" and self.cell["ties"]
        rotated = self.cell["method"][1] == "paper" or self.cell["method"][3] in ("cs", "householder", "slice")
        unplanned = self.structure in ("kron", "gs") and (self.structure == "gs") == (self.cell["method"][2] != "none")
        return 0.03 if planned and not rotated and not unplanned else 0.16

    def _named(self, name: str) -> list[str]:
        """--serve-as, of a model that is served."""
        return ["--serve-as", name] if self.architecture.sliding_window is None else []

    def build(self) -> None:
        """export.build makes the same checkpoint, and OUT/dense where there is one."""
        graph = [
            "--engine",
            "ort",
            "--dtype",
            self.cell["graph"],
            "--logits",
            self.cell["logits"],
            *self._named("small"),
        ]
        self.build_arguments = [*self.arguments, *graph, "--out", self.out]
        sure = self.no_dense_model() is None and not self.may_write_means()
        self.build_arguments += ["--materialize-dense"] if sure else []
        done = succeed("export.build", *self.build_arguments, "--json")
        assert figures.files_of(self.out / "checkpoint") == figures.files_of(self.folder / "first" / "checkpoint")
        assert done.result["ratio"] == self.facts["ratio"]
        Artifact(self.out).verify()
        reader = CheckpointReader(self.out / "checkpoint")
        self.found = {reader.structure(linear).name for linear in reader.linears()}
        self.served = self.architecture.sliding_window is None
        assert (self.out / "triton").exists() == self.served

    def again(self) -> None:
        """Nothing is made anew, by the same command, by --dry-run or by --resume."""
        before = Artifact(self.out).read_manifest()
        done = succeed("export.build", *self.build_arguments, "--json")
        assert done.err.count("re-using") == (4 if self.served else 3), str(done)
        assert "reuse checkpoint" in succeed("export.build", *self.build_arguments, "--dry-run").out
        succeed("export.build", "--resume", "--engine", "ort", "--out", self.out)
        assert Artifact(self.out).read_manifest() == before

    def recipe(self) -> None:
        """OUT/recipe.yaml alone gives the same checkpoint."""
        words = ["--model", self.model, "--recipe", self.out / "recipe.yaml", "--calibration-batch", "2"]
        succeed("compress.run", *words, "--out", self.folder / "again")
        assert figures.files_of(self.folder / "again" / "checkpoint") == figures.files_of(self.out / "checkpoint")

    def validate(self, *named: str) -> None:
        """All parts; `named`: --model, or nothing."""
        words = [self.out, *named, "--data", self.text, *MEASURED]
        report = succeed("validate.run", *words, "--json").result
        assert report["passed"], report["gates"]
        assert [rung["number"] for rung in report["parity"]] == [1, 2, 3]
        for rung in report["parity"]:
            assert rung["value"] <= rung["tolerance"], rung
        assert report["size"]["ratio"] == pytest.approx(self.facts["ratio"]), (report["size"], self.facts)
        assert report["size"]["parameters"] == sum(
            self.facts[part] for part in ("projections", "overhead", "embeddings", "rest")
        )
        dense, small = (report["quality"][side]["perplexity"] for side in ("dense", "compressed"))
        assert 1 < dense < 1e6
        assert 1 < small < 1e6
        if self.unchanged and self.cell["embedding"] == 1.0:
            assert small == pytest.approx(dense, rel=1e-4 if self.cell["checkpoint_dtype"] == "float32" else 2e-2)
        assert len(report["speed"]["cases"]) == 3
        assert all(case["speedup"] > 0 for case in report["speed"]["cases"])
        assert {"summary.md", "layers.png"} <= {p.name for p in (self.out / "reports").iterdir()}
        Artifact(self.out).verify()

    def tasks(self) -> None:
        """validate.tasks on hand-made questions: the artefact's figures are those of its checkpoint."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Task, "load", lambda task, limit=None: QUESTIONS[:limit])
            words = ["--tasks", "piqa,arc_easy", "--limit", "2", "--json"]
            both = succeed("validate.tasks", self.out, "--model", self.model, *words).result
            alone = succeed("validate.tasks", self.out / "checkpoint", *words).result
        assert both["compressed"] == alone["compressed"]
        assert both["dense"]["piqa"]["questions"] == 2
        assert json.loads((self.out / "reports" / "tasks.json").read_text()) == both
        if self.unchanged and self.cell["embedding"] == 1.0 and self.cell["checkpoint_dtype"] == "float32":
            assert both["compressed"] == both["dense"]

    def generate(self) -> None:
        """from_pretrained and generate, and the runner: the same greedy tokens."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from export.runtime.ort import OrtRunner

        folder = self.out / "checkpoint"
        self.pytorch = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        ends = self.pytorch.generation_config.eos_token_id
        self.ends = list(ends) if isinstance(ends, list) else [ends]
        assert self.ends == [2]
        runner = OrtRunner(self.out / "onnx" / "model.onnx")
        for prompt in figures.PROMPTS:
            ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
            made = self.pytorch.generate(ids, max_new_tokens=figures.NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
            figures.assert_follows(self.pytorch, ids[0].tolist(), made.tolist(), self.ends, "float32")
            [run] = runner.generate([ids[0].tolist()], max_new_tokens=figures.NEW_TOKENS)
            figures.assert_follows(self.pytorch, ids[0].tolist(), run, self.ends, self.cell["graph"])

    def dense_model(self) -> Path:
        """An artefact of the model as it is, served as `dense`: what validate.serving compares with."""
        base = self.folder / "dense-model"
        words = ["--model", self.model, "--structure", "dense", "--engine", "ort", *self._named("dense"), "--out", base]
        succeed("export.build", *words)
        return base

    def serve(self) -> None:
        """OUT/triton beside the dense model's, by the python backend in this process."""
        if self.served:
            with serving(self.out, self.dense_model()) as url:
                self.answers(url)

    def answers(self, url: str) -> None:
        """Of a server with both models: the same greedy tokens, and validate.serving's report."""
        for prompt in figures.PROMPTS:
            pieces = ask(url, "small", text_input=prompt, max_tokens=figures.NEW_TOKENS, stream=True)
            tokens = [token for piece in pieces for token in _listed(piece["tokens"])]
            assert pieces[-1]["finish_reason"] == ("stop" if tokens[-1] in self.ends else "length")
            figures.assert_follows(
                self.pytorch, self.tokenizer(prompt)["input_ids"], tokens, self.ends, self.cell["graph"]
            )
        words = ["--clients", "1,2", "--tokens", "3", "--requests", "1", "--rounds", "1", "--json"]
        words += ["--baseline", str(self.folder / "dense-model"), "--url", url, "--prompts", str(self.words)]
        report = succeed("validate.serving", self.out, *words).result
        assert (report["dense"], report["compressed"]) == ("dense", "small")
        assert [case["clients"] for case in report["cases"]] == [1, 2]
        assert json.loads((self.out / "reports" / "serving.json").read_text()) == report
        Artifact(self.out).verify()

    def materialize(self) -> None:
        """OUT/dense loads as the source's own class and says what the checkpoint says; or it is refused."""
        from transformers import AutoModelForCausalLM

        words = [*self.build_arguments, "--materialize-dense"]
        if self.no_dense_model() is not None:
            refuse("export.build", *words)
        elif self.may_write_means() and run("export.build", words).code != 0:
            assert "LayerNorm" in refuse("export.build", *words).sentence
        if not (self.out / "dense").exists():
            assert "--materialize-dense" not in self.build_arguments
            return
        plain = AutoModelForCausalLM.from_pretrained(self.out / "dense", dtype=torch.float32)
        assert plain.config.model_type == tiny.config(self.cell["model"]).model_type
        kind = self.cell["checkpoint_dtype"]
        ids = tiny.token_ids(2, 24)
        expected = figures.logits_of(self.pytorch, ids)
        assert figures.distance(expected, figures.logits_of(plain, ids)) < figures.TOLERANCE[kind]
        for prompt in figures.PROMPTS:
            ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
            made = plain.generate(ids, max_new_tokens=figures.NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
            figures.assert_follows(self.pytorch, ids[0].tolist(), made.tolist(), self.ends, kind)

    def no_dense_model(self) -> str | None:
        """Why this cell has no OUT/dense: what the source's own class cannot express."""
        arch = self.architecture
        if self.structure == "slice":
            return "parts of the stream are dropped"
        if "bias" in self.cell["inner"] and self.structure != "dense" and not (arch.mlp_bias and arch.output_bias):
            return "biases that it has not"
        if self.cell["embedding"] != 1.0 and arch.norm == "layernorm" and not arch.tied:
            return "a bias of the head"
        return None

    def may_write_means(self) -> bool:
        """Whether what a linear writes may have a mean, which the source's LayerNorm would remove: only the fitted
        weights say so. Low rank keeps to the columns of the weight, and the mix of kron with a rotation to the stream.
        """
        if self.architecture.norm != "layernorm" or self.structure in ("dense", "lowrank", "pifa", "jrk"):
            return False
        return not (self.structure == "auto" and self.cell["menu"] in (UNSET, (), ("pifa",), ("lowrank",)))

    def steps(self) -> list[tuple[str, Callable[[], None]]]:
        """In order."""
        return [
            ("source", self.source),
            ("validate.latency", self.latency),
            ("--dry-run", self.dry_run),
            ("compress.run", self.compress),
            ("export.build", self.build),
            ("again", self.again),
            ("--recipe", self.recipe),
            ("validate.run --model", lambda: self.validate("--model", self.model)),
            ("validate.run", self.validate),
            ("validate.tasks", self.tasks),
            ("generate", self.generate),
            ("serving", self.serve),
            ("--materialize-dense", self.materialize),
        ]


def _listed(value: Any) -> list[Any]:
    """Triton says a list of one as its only value."""
    return value if isinstance(value, list) else [value]
