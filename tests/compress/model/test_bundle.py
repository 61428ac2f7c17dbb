"""The Python files of a checkpoint: every structure, skip and family runs from them where this package is not there."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compress
from compress.architecture import Architecture
from compress.model.blocks import StructuredLinear
from compress.model.bundle import AUTO_MAP, bundle
from compress.model.config import ProcrustesConfig
from compress.model.decoder import ProcrustesForCausalLM
from compress.model.skips import FORMS, CSSkip, DenseSkip, HouseholderSkip, SkipForm, SliceSkip
from compress.structures import (
    GroupShuffleStructure,
    KroneckerStructure,
    LowRankStructure,
    PivotedStructure,
    SelectStructure,
    Structure,
    registry,
)
from tests import tiny
from tests.compress.helpers import TinyModel, compressed, tiny_source

PACKAGES = ("compress", "export", "validate", "trt_plugins")

STRUCTURES: dict[str, Callable[[int, int], Structure]] = {
    "kron, leading": lambda n, m: KroneckerStructure(m, n, 16, 12, mix="leading"),
    "kron, mixed": lambda n, m: KroneckerStructure(m, n, 16, 12, side="out"),
    "kron, two sides": lambda n, m: KroneckerStructure(m, n, 16, 3, side="both", n1=4, m1=4),
    "gs": lambda n, m: GroupShuffleStructure(m, n, 4, 4, 2),
    "lowrank": lambda n, m: LowRankStructure(m, n, 12),
    "pifa, out": lambda n, m: PivotedStructure(m, n, 12),
    "pifa, in": lambda n, m: PivotedStructure(m, n, 12, side="in"),
    "compot": lambda n, m: registry()["compot"].for_ratio(m, n, "in", 0.7, 16),
    "compot24": lambda n, m: registry()["compot24"].for_ratio(m, n, "in", 0.9, 16),
}
"""One for each way through `apply`."""


def written(folder: Path, arch: Architecture, structures: dict[str, Structure], **choices: Any) -> Path:
    """A checkpoint of random numbers, factors fitted to random matrices where any will not do."""
    torch.manual_seed(0)
    model = ProcrustesForCausalLM(ProcrustesConfig.from_architecture(arch, structures, **choices))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
        if isinstance(module, StructuredLinear):
            shape = (module.structure.out_features, module.structure.in_features)
            if "V" in module.structure.shapes() or not getattr(module.structure, "shares", None):
                for name, factor in module.structure.fit(torch.randn(shape) / shape[1] ** 0.5).items():
                    getattr(module, name).copy_(factor)
    model.save_pretrained(folder)
    return folder


def checkpoints(tiny_model: TinyModel, folder: Path) -> dict[Path, set[str]]:
    """Folder -> the structures that it has: all of them in one model, shared factors, selections, and every skip."""
    opt, llama = (tiny_source(tiny_model, name).architecture() for name in ("tiny_opt", "tiny_qwen3"))
    made: dict[Path, set[str]] = {}
    for arch, name in ((opt, "opt"), (llama, "llama")):
        kinds = cycle(STRUCTURES.values())
        structures: dict[str, Structure] = {}
        for layer in range(arch.num_layers):
            for role, (n, m) in arch.linears().items():
                structures[f"layers.{layer}.{role}"] = next(kinds)(n, m)
        n, m = arch.linears()["attn.q"]
        structures["layers.0.attn.q"] = LowRankStructure(m, n, 10)
        n, m = arch.linears()["attn.k"]
        structures["layers.0.attn.k"] = LowRankStructure(m, n, 10, shares="attn.q")
        n, m = arch.linears()["mlp.down"]
        structures["layers.1.mlp.down"] = SelectStructure(m, n, m - 16, core=LowRankStructure(m - 16, n, 8))
        path = written(folder / name, arch, structures, head_map=arch.tied, tie_word_embeddings=arch.tied)
        made[path] = {structure.name for structure in structures.values()}
    d = llama.hidden_size
    forms: list[SkipForm] = [DenseSkip(d), CSSkip(d, 48, 16), HouseholderSkip(d, 4), SliceSkip(d, 48, 48)]
    assert {form.name for form in forms} == set(FORMS), "every form of skip has a case"
    for form in forms:
        skips = [form.to_config()] * (2 * llama.num_layers)
        made[written(folder / form.name, llama, {}, rotation="block", skip=form.name, skip_config=skips)] = set()
    made[written(folder / "ends", llama, {}, embedding_rank=8, head_rank=8)] = {"dense"}
    return made


BARE = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"no module named {{name!r}}", name=name)
sys.meta_path.insert(0, Nowhere())
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_grad_enabled(False)
ids = torch.tensor({ids!r})
found = {{}}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    found[folder.replace("/", "|")] = model(ids).logits
    found[folder.replace("/", "|") + "|generated"] = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False)
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
assert torch.equal(again(ids).logits, model(ids).logits)
try:
    AutoModelForCausalLM.from_pretrained("damaged", trust_remote_code=True)
except Exception as error:
    print(type(error).__name__, error)
assert not {packages!r} & {{name.partition(".")[0] for name in sys.modules}}
save_file(found, sys.argv[1])
"""


def bare_run(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` where this package cannot be imported: outside of the checkout, PYTHONPATH without it, and a finder
    that refuses its names, since a test environment has it installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@torch.no_grad()
def test_where_this_package_is_not(tiny_model: TinyModel, tmp_path: Path) -> None:
    ids, folders = tiny.token_ids(2, 20), checkpoints(tiny_model, tmp_path / "made")
    ours = {name for name, kind in registry().items() if kind.__module__.startswith("compress.structures.")}
    assert set[str]().union(*folders.values()) == ours, "every structure has a case here"
    shutil.copytree(next(iter(folders)), tmp_path / "damaged")
    config = json.loads((tmp_path / "damaged" / "config.json").read_text())
    config["structures"]["layers.0.attn.q"] = {"structure": "origami"}
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    code = BARE.format(packages=set(PACKAGES), ids=ids.tolist())
    done = bare_run(code, str(tmp_path / "logits"), *map(str, folders), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ArtifactError unknown structure 'origami'"), "in our words there too"
    found = load_file(tmp_path / "logits")
    compress.register()
    for folder in folders:
        model, name = AutoModelForCausalLM.from_pretrained(folder), str(folder).replace("/", "|")
        assert isinstance(model, ProcrustesForCausalLM)
        assert torch.equal(found[name], model(ids).logits), folder
        generated = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False)
        assert torch.equal(found[f"{name}|generated"], generated)


def test_the_files_are_complete() -> None:
    """Each parses, imports of this package are relative, and every file that one imports is there."""
    files = bundle()
    assert {reference.partition(".")[0] + ".py" for reference in AUTO_MAP.values()} <= set(files)
    imported = set()
    for text in files.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert str(node.module).partition(".")[0] not in PACKAGES
                if node.level:
                    assert node.level == 1
                    imported.add(f"{node.module}.py")
    assert imported <= set(files)
    assert set(files) - imported == {"modeling_procrustes.py"}, "no file that nothing imports"
    assert not [name for name, text in files.items() if "def fit(" in text or "def menu(" in text]


def test_where_this_package_is_nothing_is_trusted(tiny_model: TinyModel, tmp_path: Path) -> None:
    """The files of a checkpoint are not run: here they raise."""
    folder = compressed(tiny_source(tiny_model, "tiny_llama"), tmp_path, structure="dense").path("checkpoint")
    shutil.copytree(folder, tmp_path / "copy")
    for name in bundle():
        (tmp_path / "copy" / name).write_text("raise SystemExit('was run')\n")
    model, tokenizer = compress.load(tmp_path / "copy")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert type(plain) is type(model)
    assert AutoTokenizer.from_pretrained(tmp_path / "copy")("A mill").input_ids == tokenizer("A mill").input_ids


def test_saving_again_writes_the_files(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = compressed(tiny_source(tiny_model, "tiny_llama"), tmp_path, structure="dense").path("checkpoint")
    model, _ = compress.load(folder)
    model.save_pretrained(tmp_path / "again")
    for name, text in bundle().items():
        assert (folder / name).read_text() == (tmp_path / "again" / name).read_text() == text
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("kept", [True, False], ids=["sealed", "changed"])
def test_the_files_are_sealed(tiny_model: TinyModel, tmp_path: Path, kept: bool) -> None:
    from compress.errors import ArtifactError

    artifact = compressed(tiny_source(tiny_model, "tiny_llama"), tmp_path, structure="dense")
    if kept:
        artifact.verify()
        return
    path = artifact.path("checkpoint") / "modeling_procrustes.py"
    path.write_text(path.read_text() + "import os\n")
    with pytest.raises(ArtifactError, match="modeling_procrustes"):
        artifact.verify()
