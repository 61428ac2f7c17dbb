"""Commands that the documents and the commands' own help show, as they stand there, and which of them tests run."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from pkgutil import walk_packages

import compress
import export
import trt_plugins
import validate

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ("README.md", "docs/usage.md")
"""What a new user reads, in that order."""
DOCUMENTS = tuple(
    dict.fromkeys((*GUIDE, "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))))
)
# In a block, or after `run:` of a workflow: a line that begins with a program. In a sentence: a span of code.
LINE = re.compile(r"^\s+(?:run: )?((?:[A-Z_]+=\S+ )*(?:python|make|pip|curl|docker|bash|[^\s`]*\.sh)(?: .*)?)$", re.M)
SPAN = re.compile(r"`((?:python -m|make|pip|docker) [^`]+)`")

NOT_RUN = {
    r"^make ": "installs an environment; what it runs is in the Makefile, and a test holds that against the documents",
    r"^pip ": "needs a network",
    r"^docker ": "needs Docker",
    r"--gpu\b": "needs a GPU",
    r"--device cuda": "needs a GPU",
    r"--engine trt\b(?!-rtx)": "needs a GPU for its last step; tests/export/tensorrt/test_engines.py has the others",
    r"--engine trt-rtx\b": "minutes of NVIDIA's builder; tests/export/tensorrt/test_rtx.py builds such an engine",
    r"launch\.sh|client\.py|^curl ": "needs a Triton server; tests/export/triton/test_server.py has one",
    r"-m validate\.serving\b": "needs a Triton server; every road has one in this process",
    r"-m trt_plugins\.": "compiles for minutes; tests/trt_plugins does it once for all",
    r"-m validate\.speed --layers\b": "takes minutes and writes docs/speed.md; tests/validate/speed measures",
    r"-m validate\.quality .*--(?:ablation|sensitivity-plot)\b": "40 models: the methods are roads of their own",
    r"-m validate\.quality --model smollm2-135m --out out/quality --methods auto-0.75,kron,svd-llm ": "one such is run",
    r"^build_engine\.sh ": "a line of a list of files",
    r"--position P\b|-m [a-z.]+ OUT\b": "a form to fill in",
    r"-m [a-z_.]+$": "a command's name alone, in a sentence",
    r"-m export\.build --engine ort$": "a flag alone, in a sentence",
    r"-m tests\.pyproject\b": "writes constraints-lowest.txt, which tests/test_packaging.py checks",
    r"-m tests\.faults": "minutes of kills and load: a test of its own",
}
"""Pattern of a shown command -> why no test here runs it. One that is neither run nor listed fails a test."""


@dataclass(frozen=True)
class Shown:
    """A command in a document: its words, without comments."""

    document: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def module(self) -> str | None:
        """Of `python -m MODULE ...`, where it is one of ours."""
        found = re.search(r"python -m ([a-z_]+(?:\.[a-z_]+)+)", self.text)
        return found[1] if found else None

    @property
    def arguments(self) -> list[str]:
        """What follows the module."""
        words = self.words
        return words[words.index("-m") + 2 :]

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, self.text)), None)


def shown_in(document: str, text: str) -> list[Shown]:
    """The commands of a text, in its order; a line that ends in a backslash goes on in the next one."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = {match.start(1): match[1] for pattern in (LINE, SPAN) for match in pattern.finditer(joined)}
    return [Shown(document, _without_comment(found[at])) for at in sorted(found)]


def _without_comment(line: str) -> str:
    return re.sub(r"\s+#.*$", "", line).strip()


def epilogs() -> dict[str, str]:
    """Module -> the examples of its --help."""
    names = [
        module.name
        for package in (compress, export, trt_plugins, validate)
        for module in walk_packages(package.__path__, package.__name__ + ".")
        if "EXAMPLES = " in _source(module.name)
    ]
    return {name.removesuffix(".__main__"): str(importlib.import_module(name).EXAMPLES) for name in names}


def _source(name: str) -> str:
    path = ROOT / (name.replace(".", "/") + ".py")
    return (path if path.exists() else ROOT / name.replace(".", "/") / "__init__.py").read_text()


def all_shown() -> list[Shown]:
    """Of all documents, then of all commands' examples."""
    found = [shown for document in DOCUMENTS for shown in shown_in(document, (ROOT / document).read_text())]
    return found + [shown for module, text in epilogs().items() for shown in shown_in(f"{module} --help", text)]
