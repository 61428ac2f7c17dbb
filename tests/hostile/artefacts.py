"""Artefacts from elsewhere: damaged, and signed anew, so that their manifest vouches for the damage."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.artifact.files import sha256_of


def sign(out: Path) -> None:
    """Let manifest.json give the sizes and hashes that the files have now, and the digests of each stage's inputs."""
    from compress.artifact.manifest import Manifest

    path = out / "manifest.json"
    values = json.loads(path.read_text())
    for name, entry in values["files"].items():
        file = out / name
        if file.is_file():
            entry.update(size=file.stat().st_size, sha256=sha256_of(file))
    manifest = Manifest(**values)
    for facts in values["stages"].values():
        for source in facts.get("inputs", {}):
            facts["inputs"][source] = manifest.digest(source)
    path.write_text(json.dumps(values))


def edited(name: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A JSON file of the artefact edited, and signed."""

    def damage(out: Path) -> None:
        path = out / name
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))
        if name != "manifest.json":
            sign(out)

    return damage


def replaced(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A file with another content, and signed."""

    def damage(out: Path) -> None:
        (out / name).write_bytes(content.encode() if isinstance(content, str) else content)
        if name != "manifest.json":
            sign(out)

    return damage


def unsigned(make: Callable[[Path], Any], name: str = "manifest.json") -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def damage(out: Path) -> None:
        (out / name).unlink()
        make(out / name)

    return damage


CONFIG, INDEX, FIT = "checkpoint/config.json", "checkpoint/model.safetensors.index.json", "checkpoint/fit.json"
Damage = Callable[[Path], None]


def architecture(**values: Any) -> Damage:
    """Fields of the architecture in the checkpoint's config.json."""
    return edited(CONFIG, lambda c: c["architecture"].update(values))


def layer(**values: Any) -> Damage:
    """Fields of one linear's structure."""
    return edited(CONFIG, lambda c: c["structures"]["layers.0.mlp.up"].update(values))


KINDS: dict[str, tuple[Damage, str]] = {
    "manifest is a pipe": (unsigned(os.mkfifo), "manifest.json is not a regular file"),
    "manifest is endless": (unsigned(lambda p: p.symlink_to("/dev/zero")), "manifest.json is not a regular file"),
    "manifest is a folder": (unsigned(Path.mkdir), "manifest.json is not a regular file"),
    "manifest is nested": (replaced("manifest.json", "[" * 100_000), "manifest.json has values nested"),
    "manifest is large": (replaced("manifest.json", " " * (17 << 20)), "manifest.json has more than the 16,777,216"),
    "manifest of a long number": (replaced("manifest.json", '{"schema": ' + "1" * 5000 + "}"), "manifest.json is not"),
    "manifest with half a pair": (replaced("manifest.json", '{"schema": "\\ud800"}'), "half a surrogate pair"),
    "manifest twice": (replaced("manifest.json", '{"schema": 1, "schema": 1}'), "the key 'schema' twice"),
    "stages are a list": (edited("manifest.json", lambda m: m.update(stages=[])), "'stages' is a list"),
    "a size of 2^70": (edited("manifest.json", lambda m: m["files"][FIT].update(size=2**70)), "fit.json is truncated"),
    "a file outside": (
        edited("manifest.json", lambda m: m["files"].update({"../x": m["files"][FIT]})),
        "leaves its folder",
    ),
    "a million layers": (architecture(num_layers=10**6), "num_layers = 1000000, but a whole number"),
    "a billion layers": (architecture(num_layers=10**9), "num_layers = 1000000000, but a whole number"),
    "4,096 layers": (
        edited(CONFIG, lambda c: (c["architecture"].update(num_layers=4096), c.update(num_hidden_layers=4096))),
        "has 4096 layers, but .* has tensors of 3",
    ),
    "no heads": (architecture(num_heads=0), "num_heads = 0, but a whole number"),
    "rope of strings": (architecture(rope={"rope_type": "linear", "rope_theta": 1e4, "factor": "4"}), "factor = '4'"),
    "rope of yarn 1": (
        architecture(rope={"rope_type": "yarn", "rope_theta": 1, "factor": 4, "original_max_position_embeddings": 8}),
        "yarn needs a number above 1",
    ),
    "an activation that is a list": (architecture(activation=["silu"]), "activation = .*a short string"),
    "a norm of no kind": (architecture(norm="batch"), "one of rmsnorm, layernorm"),
    "an architecture that is a list": (edited(CONFIG, lambda c: c.update(architecture=[])), "no `architecture`"),
    "heads that contradict": (edited(CONFIG, lambda c: c.update(head_dim=1 << 40)), "head_dim = .* beside"),
    "a rotation that is none": (edited(CONFIG, lambda c: c.update(rotation=7)), "the rotation 7"),
    "extra biases of objects": (edited(CONFIG, lambda c: c.update(extra_biases=[{}])), "extra_biases"),
    "skips of a string": (edited(CONFIG, lambda c: c.update(skip_config="x")), "skip_config"),
    "a wide structure": (layer(in_features=2**70), "layers.0.mlp.up a structure of|not valid"),
    "a structure of nan": (layer(out_features=float("nan")), "wrong type"),
    "structures in structures": (
        edited(CONFIG, lambda c: c["structures"].update({"layers.0.mlp.up": nested_selects(60)})),
        "nested more than 64 deep|not valid|a structure of|has no tensor",
    ),
    "an index of numbers": (edited(INDEX, lambda i: i.update(weight_map={"a": 1})), "no weight_map of names"),
    "an index that leads out": (
        edited(INDEX, lambda i: i["weight_map"].update(dict.fromkeys(i["weight_map"], "../../x"))),
        "points outside its folder",
    ),
    "a shard of text": (replaced("checkpoint/model-00001-of-00001.safetensors", "no tensors"), "cannot be read"),
    "a header of 2^62 bytes": (
        replaced("checkpoint/model-00001-of-00001.safetensors", (1 << 62).to_bytes(8, "little") + b"{}"),
        "cannot be read",
    ),
    "rotations of text": (replaced("checkpoint/rotation.safetensors", "no"), "rotation.safetensors cannot be read"),
    "fit.json nested": (replaced(FIT, "[" * 100_000), "fit.json"),
    "fit.json of numbers": (replaced(FIT, "[1, 2]"), "fit.json"),
    "recipe of dates": (replaced("recipe.yaml", "version: 2021-02-30\n"), "recipe.yaml is not a valid recipe"),
    "recipe nested": (replaced("recipe.yaml", "layers: " + "[" * 5000), "recipe.yaml has values nested"),
    "tokenizer of nothing": (replaced("checkpoint/tokenizer.json", "{}"), ""),
    "a graph of text": (replaced("onnx/model.onnx", "no graph"), "model.onnx"),
}
"""Name -> damage, and what the command says when it meets it. Some parts are read by some commands only."""

UNREAD = {"tokenizer of nothing"}
"""Validation takes the source's tokenizer."""


def nested_selects(depth: int) -> Any:
    """A selection from a selection from a selection."""
    sizes = {"in_features": 64, "out_features": 160, "kept": 160, "groups": 1, "side": "out"}
    structure: dict[str, Any] = {"structure": "select", **sizes}
    for _ in range(depth):
        structure = {"structure": "select", **sizes, "core": structure}
    return structure
