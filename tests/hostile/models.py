"""Model folders that nobody should trust: each kind takes a sound tiny model and damages it in one way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Damage = Callable[[Path], None]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Kind:
    """What to do to the folder of a tiny model (of which one is in shards), and what the command says then."""

    damage: Damage
    code: int
    says: str
    model: str = "tiny_llama"


def config(says: str, model: str = "tiny_llama", code: int = 5, **values: Any) -> Kind:
    """config.json with other values."""
    return Kind(lambda folder: change(folder / "config.json", **values), code, says, model)


def rope(says: str, code: int = 5, **values: Any) -> Kind:
    """config.json with other rotary parameters."""
    return config(says, code=code, rope_parameters={"rope_type": "default", "rope_theta": 1e4, **values})


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def replaced(name: str, content: str | bytes) -> Damage:
    """A file with another content."""
    return lambda folder: void((folder / name).write_bytes(content.encode() if isinstance(content, str) else content))


def instead(name: str, make: Callable[[Path], Any]) -> Damage:
    """Something that is no file in the place of one."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def pipe(name: str) -> Damage:
    """A pipe that nobody writes to."""
    return instead(name, os.mkfifo)


def link(name: str, target: str) -> Damage:
    """A symbolic link."""
    return instead(name, lambda path: path.symlink_to(target))


def tokenizer(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """tokenizer.json edited."""

    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return damage


def shards(name_of: Callable[[list[Path]], Path], what: Callable[[Path], Any]) -> Damage:
    """One of the shards damaged."""
    return lambda folder: void(what(name_of(sorted(folder.glob("model-*.safetensors")))))


def pickled(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """pytorch_model.bin in place of safetensors, edited."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        edit(tensors)
        (folder / SINGLE).unlink()
        torch.save(tensors, folder / "pytorch_model.bin")

    return damage


def settings(says: str, **values: Any) -> Kind:
    """tokenizer_config.json with other values."""
    return Kind(lambda folder: change(folder / "tokenizer_config.json", **values), 5, says)


def vocabulary(folder: Path, **values: Any) -> None:
    """A tokenizer's older files, of a class of its own."""
    (folder / "vocab.json").write_text('{"a": 0}')
    (folder / "merges.txt").write_text("")
    change(folder / "tokenizer_config.json", **values)


def as_link(path: Path) -> None:
    """A link that leads nowhere in the place of a file, as an interrupted download leaves it in the hub's cache."""
    path.unlink()
    path.symlink_to("../../blobs/0123456789abcdef")


def void(value: object) -> None:
    """A call's result, not wanted."""


NORM = "model.norm.weight"
DEEP = "[" * 100_000

KINDS: dict[str, Kind] = {
    # Weights
    "a shard is missing": Kind(
        shards(lambda s: s[1], Path.unlink), 5, "00002-of-.* is missing, but the index", "shards"
    ),
    "a shard is a broken link": Kind(shards(lambda s: s[0], as_link), 5, "is a link to .* not there", "shards"),
    "the only file is a broken link": Kind(link(SINGLE, "gone"), 5, "is a link to 'gone', which is not there"),
    "a link to itself": Kind(link(SINGLE, SINGLE), 5, "is a link that leads back to itself"),
    "weights are a pipe": Kind(pipe(SINGLE), 5, "is not a file but a pipe"),
    "weights are a folder": Kind(instead(SINGLE, Path.mkdir), 5, "is not a file but a folder"),
    "weights are a device": Kind(link(SINGLE, "/dev/zero"), 5, "is not a file but a device"),
    "index is a pipe": Kind(pipe(INDEX), 5, "is not a file but a pipe", "shards"),
    "index is nested": Kind(replaced(INDEX, DEEP), 5, "nested more than 64 deep", "shards"),
    "index is endless": Kind(link(INDEX, "/dev/zero"), 5, "a device", "shards"),
    "index names a path": Kind(replaced(INDEX, '{"weight_map": {"a": "../x.safetensors"}}'), 5, "forged", "shards"),
    "index names a number": Kind(replaced(INDEX, '{"weight_map": {"a": 1}}'), 5, "forged", "shards"),
    "a sparse tensor": Kind(pickled(lambda t: t.update({NORM: torch.ones(64).to_sparse()})), 5, "sparse_coo"),
    "a meta tensor": Kind(pickled(lambda t: t.update({NORM: torch.ones(64, device="meta")})), 5, "the device 'meta'"),
    "a tensor of more than there is": Kind(
        pickled(lambda t: t.update({NORM: torch.zeros(1).expand(1 << 40)})), 5, "more numbers than the file holds"
    ),
    "a quantised tensor": Kind(
        pickled(lambda t: t.update({NORM: torch.quantize_per_tensor(torch.ones(64), 1.0, 0, torch.qint8)})),
        5,
        "quantised",
    ),
    # config.json
    "config is a pipe": Kind(pipe("config.json"), 2, "no config.json"),
    "config is endless": Kind(link("config.json", "/dev/zero"), 2, "no config.json"),
    "config is large": Kind(replaced("config.json", " " * (17 << 20)), 5, "more than the 16,777,216 bytes"),
    "config is nested": Kind(replaced("config.json", DEEP), 5, "nested more than 64 deep"),
    "config has half a surrogate pair": config("half a surrogate pair", hidden_act="\ud800"),
    "a million layers": config("num_hidden_layers = 1000000, but a whole number", num_hidden_layers=10**6),
    "a billion layers": config("num_hidden_layers = 1000000000, but a whole number", num_hidden_layers=10**9),
    "4,096 layers": config("has no tensor 'model.layers.3", num_hidden_layers=4096),
    "a billion labels": config("num_labels = 1000000000, but a whole number", num_labels=10**9),
    "no heads": config("num_attention_heads = 0, but a whole number", num_attention_heads=0),
    "no heads of OPT": config("num_attention_heads = 0", "tiny_opt", num_attention_heads=0),
    "a width of 2^70": config(r"hidden_size = 1180591620717411303424, but", hidden_size=2**70),
    "a true width": config("hidden_size = True, but a whole number", hidden_size=True),
    "positions are a list": config(r"max_position_embeddings = \[\], but", max_position_embeddings=[]),
    "a long activation": config("hidden_act = 'xxx.* a short string", hidden_act="x" * 100_000),
    "a type of its own": config("dtype = .*, but one of float32, float16", dtype=["float32"]),
    "a type that there is not": config("dtype = 'frob', but one of float32, float16", dtype="frob"),
    "a name of torch that is no type": config("torch_dtype = 'Tensor', but one of", torch_dtype="Tensor"),
    "quantization_config a string": config("quantization_config = 'x', but an object", quantization_config="x"),
    "an epsilon that is none": config("rms_norm_eps = nan", rms_norm_eps=float("nan")),
    "end tokens are an object": config("eos_token_id", eos_token_id={"a": 1}),
    "layer_types of one": config("layer_types", layer_types=["full_attention"]),
    "rope_theta null": rope("rope_parameters with rope_theta = None", rope_theta=None),
    "rope_theta a string": rope("rope_parameters with rope_theta = '1e4'", rope_theta="1e4"),
    "rope_theta infinite": rope("rope_parameters with rope_theta = inf", rope_theta=float("inf")),
    "rope_theta of 400 digits": rope(r"with rope_theta = 10{40,60} \.\.\., but a finite number", rope_theta=10**400),
    "rope_theta null beside": config("rope_theta = None", rope_theta=None),
    "factor a string": rope("rope_parameters with factor = '4'", rope_type="linear", factor="4"),
    "factor missing": rope("without its factor", rope_type="linear"),
    "factor zero": rope("rope_parameters with factor = 0", rope_type="yarn", factor=0),
    "yarn of theta 1": rope(
        "yarn needs a number above 1", rope_type="yarn", factor=4.0, rope_theta=1.0, original_max_position_embeddings=32
    ),
    "llama3 without a band": rope(
        "below high_freq_factor",
        **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        original_max_position_embeddings=32,
    ),
    "rope is a list": config("rope_parameters = .*, but an object", rope_parameters=[1]),
    # Tokenizers
    "tokenizer empty": Kind(replaced("tokenizer.json", ""), 5, "cannot read the tokenizer"),
    "tokenizer cut": Kind(replaced("tokenizer.json", '{"version": "1.0", "model": {'), 5, "cannot read the tokenizer"),
    "tokenizer not UTF-8": Kind(replaced("tokenizer.json", b"\xff\xfe{}"), 5, "cannot read the tokenizer"),
    "tokenizer a list": Kind(replaced("tokenizer.json", "[]"), 5, "cannot read the tokenizer"),
    "tokenizer nested": Kind(replaced("tokenizer.json", DEEP), 5, "cannot read the tokenizer"),
    "tokenizer of nothing": Kind(replaced("tokenizer.json", "{}"), 5, "cannot read the tokenizer"),
    "tokenizer without a model": Kind(tokenizer(lambda t: t.pop("model")), 5, "cannot read the tokenizer"),
    "tokenizer of another kind": Kind(tokenizer(lambda t: t["model"].update(type="X")), 5, "cannot read the tokenizer"),
    "vocabulary null": Kind(tokenizer(lambda t: t["model"].update(vocab=None)), 5, "cannot read the tokenizer"),
    "ids are strings": Kind(tokenizer(lambda t: t["model"]["vocab"].update(a="1")), 5, "cannot read the tokenizer"),
    "ids beyond 2^32": Kind(tokenizer(lambda t: t["model"]["vocab"].update(a=2**40)), 5, "cannot read the tokenizer"),
    "a merge of nothing": Kind(
        tokenizer(lambda t: t["model"].update(merges=[["no", "such"]])), 5, "cannot read the tokenizer"
    ),
    "an added token null": Kind(tokenizer(lambda t: t.update(added_tokens=[None])), 5, "cannot read the tokenizer"),
    "an added token that panics": Kind(
        tokenizer(lambda t: t["model"].update(continuing_subword_prefix="longer than a token")),
        5,
        "tokenizer in .*: it is refused by the library tokenizers",
    ),
    "added_tokens of strings": Kind(replaced("added_tokens.json", '{"zz": "5"}'), 5, "gives 'zz' = '5', but a whole"),
    "vocab.json of lists": Kind(replaced("vocab.json", '{"zz": [5]}'), 5, r"gives 'zz' = \[5\], but a whole"),
    "chat template of numbers": settings("chat_template = {'a': 1}, but a string", chat_template={"a": 1}),
    "chat template without names": settings("chat_template = .*, but a string", chat_template=[{"a": "b"}]),
    "an added token a string": settings(
        "added_tokens_decoder = .*an object of token ids", added_tokens_decoder={"5": "z"}
    ),
    "a class of numbers": settings("tokenizer_class = 5, but a short string", tokenizer_class=5),
    "a class of other files": settings(
        r"its class \('BertJapaneseTokenizer' in tokenizer_config.json\) does not expect \(TypeError",
        tokenizer_class="BertJapaneseTokenizer",
    ),
    "a length of letters": settings("model_max_length = 'long', but a number", model_max_length="long"),
    "an end token of numbers": settings("eos_token = {'content': 7}, but a string", eos_token={"content": 7}),
    "extra tokens a number": settings("extra_special_tokens = 5, but a list of", extra_special_tokens=5),
    "a class unknown, without tokenizer.json": Kind(
        instead("tokenizer.json", lambda path: vocabulary(path.parent, tokenizer_class="Own")),
        5,
        r"no tokenizer.json, and the class of the tokenizer \('Own' .* add --trust-remote-code",
    ),
    "code, without tokenizer.json": Kind(
        instead("tokenizer.json", lambda path: vocabulary(path.parent, auto_map={"AutoTokenizer": ["own.Own", None]})),
        2,
        "not run unless you say so: read it, then add --trust-remote-code",
    ),
    "code, without any file that we know": Kind(
        instead("tokenizer.json", lambda p: change(p.parent / "tokenizer_config.json", auto_map={"AutoTokenizer": []})),
        2,
        "not run unless you say so: read it, then add --trust-remote-code",
    ),
    "tokenizer is a pipe": Kind(pipe("tokenizer.json"), 5, "tokenizer.json is not a file but a pipe"),
    "tokenizer_config a list": Kind(replaced("tokenizer_config.json", "[]"), 5, "is not a JSON object but"),
    "tokenizer_config nested": Kind(replaced("tokenizer_config.json", DEEP), 5, "nested more than 64 deep"),
    "tokenizer_config is a pipe": Kind(pipe("tokenizer_config.json"), 5, "is not a file but a pipe"),
    "added_tokens a device": Kind(link("added_tokens.json", "/dev/zero"), 5, "is not a file but a device"),
    "chat template not UTF-8": Kind(replaced("chat_template.jinja", b"\xff"), 5, "is not UTF-8 text"),
    # generation_config.json
    "generation_config a list": Kind(replaced("generation_config.json", "[]"), 5, "is not a JSON object"),
    "generation_config nested": Kind(replaced("generation_config.json", DEEP), 5, "nested more than 64 deep"),
}


def damaged(source: Path, folder: Path, kind: Kind) -> Path:
    """A copy of the model at `source`, damaged."""
    shutil.copytree(source, folder)
    kind.damage(folder)
    return folder
