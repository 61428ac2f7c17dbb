"""Task scoring against a loop, prompts on hand-made records, and the command."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from compress.artifact.store import Artifact
from compress.cli.entry import run_cli
from compress.errors import MissingDependencyError, UsageError
from compress.model.config import ProcrustesConfig
from compress.model.decoder import ProcrustesForCausalLM
from tests import tiny
from tests.validate.conftest import LLAMA, fill
from validate.tasks import __main__ as tasks
from validate.tasks import data as taskdata
from validate.tasks.data import Example, Task, arc, hellaswag, lambada, piqa, winogrande
from validate.tasks.scores import difference, figures
from validate.tasks.scoring import Item, Score, encode, score

MakeModel = Callable[..., ProcrustesForCausalLM]


def items_of(model: ProcrustesForCausalLM, seed: int = 0) -> list[Item]:
    """Contexts of 1 to 40 tokens, 1 to 4 continuations of 1 to 9 tokens; one says what the model would."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> tuple[int, ...]:
        count = int(torch.randint(1, most + 1, (), generator=generator))
        return tuple(torch.randint(3, 190, (count,), generator=generator).tolist())

    items = [Item(tokens(40), tuple(tokens(9) for _ in range(1 + i % 4))) for i in range(9)]
    said = list(items[0].context)
    for _ in range(3):
        said.append(int(model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax()))
    return [replace(items[0], continuations=(*items[0].continuations, tuple(said[-3:]))), *items[1:]]


def by_hand(model: ProcrustesForCausalLM, item: Item, longest: int = 128) -> list[Score]:
    """One pass for each continuation, as lm-eval-harness does: cut from the left, the last token not read."""
    scores = []
    for continuation in item.continuations:
        tokens = [*item.context, *continuation][-(longest + 1) :][:-1]
        log_p = model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
        log_p = log_p[-len(continuation) :]
        total = sum(float(log_p[i, token]) for i, token in enumerate(continuation))
        scores.append(Score(total, log_p.argmax(-1).tolist() == list(continuation)))
    return scores


@pytest.mark.parametrize("kind", ["llama", "opt", "llama-kron"])
@pytest.mark.parametrize("tokens_at_once", [1, 90, 4096])
def test_equals_one_pass_for_each_choice(make_model: MakeModel, kind: str, tokens_at_once: int) -> None:
    model = make_model(kind)
    items = items_of(model)
    found = dict(score(model, items, tokens_at_once))
    assert sorted(found) == list(range(len(items)))
    for index, item in enumerate(items):
        expected = by_hand(model, item)
        assert [s.greedy for s in found[index]] == [s.greedy for s in expected]
        assert [s.log_likelihood for s in found[index]] == pytest.approx([s.log_likelihood for s in expected], abs=1e-4)
    assert found[0][-1].greedy


def test_sliding_window() -> None:
    """Distances count positions, not places in the row that the choices share."""
    arch = replace(LLAMA, sliding_window=4)
    model = ProcrustesForCausalLM(ProcrustesConfig.from_architecture(arch, {}, tie_word_embeddings=False))
    fill(model)
    model.requires_grad_(False).eval()
    item = Item(tuple(range(3, 14)), ((20, 21, 22, 23, 24), (30, 31, 32, 33)))
    [(_, found)] = score(model, [item])
    assert [s.log_likelihood for s in found] == pytest.approx(
        [s.log_likelihood for s in by_hand(model, item)], abs=1e-4
    )


def test_contexts_that_are_too_long_lose_their_beginning(make_model: MakeModel) -> None:
    """128 positions: of 150 tokens, each continuation leaves room for another part."""
    model = make_model("llama")
    item = Item(tuple(3 + i % 100 for i in range(150)), ((5,), (6, 7, 8, 9), (10, 11)))
    [(index, found)] = score(model, [item])
    assert index == 0
    assert [s.log_likelihood for s in found] == pytest.approx(
        [s.log_likelihood for s in by_hand(model, item)], abs=1e-4
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item((3,), ((4,), ())), "empty"),
        (Item((), ((4,),)), "empty"),
        (Item((3,), (tuple(range(3, 132)),)), "129 tokens"),
    ],
)
def test_items_refused(make_model: MakeModel, item: Item, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(score(make_model("llama"), [item]))


def test_encoding_moves_the_space_and_tokenises_both_together() -> None:
    tokenizer = tiny.tokenizer()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    item = encode(tokenizer, "The mill stands ", ["where the river", "by the bridge"])
    assert list(item.context) == ids("The mill stands")
    for continuation, text in zip(item.continuations, (" where the river", " by the bridge"), strict=True):
        assert [*item.context, *continuation] == ids(f"The mill stands{text}")
    empty = encode(tokenizer, "", ["The mill"])
    assert empty.context == (tokenizer.bos_token_id,)
    assert list(empty.continuations[0]) == list(tokenizer("The mill", add_special_tokens=False)["input_ids"])


# --- Prompts ---


def test_arc_prompt() -> None:
    record = {"question": "Why?", "choices": {"text": ["No", "Yes é"], "label": ["1", "2"]}, "answerKey": "2"}
    assert arc(record) == Example(
        (("Question: Why?\nAnswer:", " No"), ("Question: Why?\nAnswer:", " Yes é")), gold=1, characters=(2, 5)
    )


def test_piqa_prompt() -> None:
    example = piqa({"goal": "Dry it", "sol1": "sun", "sol2": "water", "label": 0})
    assert example.choices == (("Question: Dry it\nAnswer:", " sun"), ("Question: Dry it\nAnswer:", " water"))
    assert (example.gold, example.characters) == (0, (3, 5))


def test_hellaswag_prompt_without_the_marks_of_wikihow() -> None:
    record = {
        "activity_label": "Baking",
        "ctx_a": "How to bake [header] Begin. [title] Heat the oven.",
        "ctx_b": "the COOK",
        "endings": ["waits. [step] Then eats.", "  sleeps."],
        "label": "1",
    }
    example = hellaswag(record)
    context = "Baking: How to bake Begin.. Heat the oven. The cook"
    assert example.choices == ((context, " waits. Then eats."), (context, " sleeps."))
    assert example.gold == 1


def test_winogrande_scores_the_rest_of_the_sentence() -> None:
    record = {"sentence": "Ann thanked Eve, _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"}
    example = winogrande(record)
    assert example.choices == (("Ann thanked Eve, Ann", " had helped."), ("Ann thanked Eve, Eve", " had helped."))
    assert example.gold == 1


def test_lambada_scores_the_last_word() -> None:
    assert lambada({"request": {"context": "a b", "continuation": " word"}}).choices == (("a b", " word"),)


@pytest.mark.parametrize("name", sorted(taskdata.TASKS))
def test_the_packages_own_data_are_read(name: str) -> None:
    task = taskdata.TASKS[name]
    try:
        examples = task.load(30)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert len(examples) == 30
    assert all(0 <= e.gold < len(e.choices) == len(e.characters) for e in examples)
    assert all(continuation.startswith(" ") and context for e in examples for context, continuation in e.choices)
    assert examples == task.load(40)[:30]


# --- Figures ---


def made_task(examples: Sequence[Example], normalised: bool = True) -> Task:
    return Task("piqa", "PIQA", "acc", "", "", lambda record: examples[record], normalised)


def test_figures() -> None:
    """The longer choice wins once it is taken by its characters."""
    pair = Example((("c", " ab"), ("c", " abcdef")), 1, (2, 6))
    scores = [[Score(-2.0, False), Score(-3.0, False)], [Score(-4.0, False), Score(-3.0, True)]]
    found = figures(made_task([pair, pair]), [pair, pair], scores)
    assert (found["acc"], found["acc_norm"]) == (0.5, 1.0)
    assert (found["acc_answers"], found["acc_norm_answers"]) == ("01", "11")
    assert found["acc_standard_error"] == pytest.approx(statistics.stdev([0, 1]) / math.sqrt(2))
    assert found["acc_norm_standard_error"] == 0
    assert "perplexity" not in found


def test_a_single_choice_is_right_when_it_is_greedy() -> None:
    one = Example((("c", " word"),), 0, (4,))
    scores = [[Score(-1.0, True)], [Score(-3.0, False)], [Score(-2.0, True)]]
    found = figures(made_task([one], normalised=False), [one] * 3, scores)
    assert found["acc"] == pytest.approx(2 / 3)
    assert found["perplexity"] == pytest.approx(math.exp(2))
    error = statistics.stdev([1, 3, 2]) / math.sqrt(3)
    assert found["perplexity_standard_error"] == pytest.approx(math.exp(2) * error)
    assert "acc_norm" not in found


def test_the_difference_is_paired() -> None:
    dense = {"piqa": {"main": "acc", "acc_answers": "1111"}}
    other = {"piqa": {"main": "acc", "acc_answers": "1101"}}
    entry = difference(dense, other)["piqa"]
    assert entry["difference"] == -0.25
    assert entry["standard_error"] == pytest.approx(statistics.stdev([0, 0, -1, 0]) / 2)


def test_one_question_has_no_standard_error() -> None:
    one = Example((("c", " word"),), 0, (4,))
    assert figures(made_task([one], normalised=False), [one], [[Score(-1.0, True)]])["acc_standard_error"] is None


# --- The command ---


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of hand-made questions, in place of the package's."""

    def load(self: Task, limit: int | None = None) -> list[Example]:
        pairs = [
            Example((("The mill stands", " where"), ("The mill stands", " by the bridge")), 0, (5, 13)),
            Example((("He looks", " more"), ("She listens", " more")), 1, (4, 4)),
            Example((("The wheel is", " still."), ("The wheel is", " loud")), 0, (6, 4)),
        ]
        words = [Example((("The water comes", " down"),), 0, (4,)), Example((("the smell of the", " heat"),), 0, (4,))]
        return (words if self.name == "lambada" else pairs)[:limit]

    monkeypatch.setattr(Task, "load", load)


@pytest.mark.usefixtures("few_questions")
def test_command(built: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = built.copy(tmp_path / "out")
    flags = ["--model", str(copy.source), "--tasks", "piqa,lambada"]
    assert run_cli(tasks.main, [str(copy.out), *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"protocol", "dense", "compressed", "difference"}
    assert report["dense"]["piqa"]["questions"] == 3
    assert report == json.loads((copy.out / "reports" / "tasks.json").read_text())
    Artifact(copy.out).verify()
    # Choices with a context of their own and with a common one are scored alike.
    model, tokenizer = tasks.load_compressed(copy.out, "float32")
    example = taskdata.TASKS["piqa"].load()[1]
    by_choice = [by_hand(model, encode(tokenizer, c, [text]))[0].log_likelihood for c, text in example.choices]
    answer = by_choice.index(max(by_choice)) == example.gold
    assert report["compressed"]["piqa"]["acc_answers"][1] == "01"[answer]
    assert run_cli(tasks.main, [str(copy.out), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "| task | questions | dense acc | dense acc_norm | compressed acc | compressed acc_norm | difference |"
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| PIQA", "| LAMBADA"]


@pytest.mark.usefixtures("few_questions")
def test_limit_and_a_plain_checkpoint(built: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(tasks.main, [str(built.out / "checkpoint"), "--tasks", "piqa", "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compressed"]["piqa"]["questions"] == 2
    assert not (built.out / "reports").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to score"),
        (["--model", "x", "--tasks", "piqa,nope"], "no task 'nope'"),
        (["--model", "x", "--limit", "0"], "--limit"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(tasks.main, arguments) == 2
    assert message in capsys.readouterr().err


# --- lm-eval ---


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of lm-eval's shape: its base class keeps nothing but the interface."""

    class LM:
        def __init__(self) -> None:
            self._rank, self._world_size = 0, 1

    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = LM  # type: ignore[attr-defined]


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


@pytest.mark.usefixtures("harness")
def test_adapter_for_the_harness(built: Any) -> None:
    from validate.tasks.harness import harness_model

    model, tokenizer = tasks.load_compressed(built.out, "float32")
    adapter = harness_model(model, tokenizer)
    assert isinstance(adapter, sys.modules["lm_eval.api.model"].LM)  # type: ignore[attr-defined]
    pairs = [
        ("The mill stands", " where"),
        ("He looks", " more"),
        ("The mill stands", " by the bridge"),
        ("", "In winter"),
    ]
    found = adapter.loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (likelihood, greedy) in zip(pairs, found, strict=True):
        [expected] = by_hand(model, encode(tokenizer, context, [continuation]))
        assert (likelihood, greedy) == (pytest.approx(expected.log_likelihood, abs=1e-4), expected.greedy)


@pytest.mark.usefixtures("harness")
def test_adapter_rolls_over_long_text(built: Any) -> None:
    """Each token once, the first from BOS, with as much context as fits."""
    from validate.tasks.harness import harness_model

    model, tokenizer = tasks.load_compressed(built.out, "float32")
    text = tiny.TEXT[:350]
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    longest = tiny.MAX_POSITIONS
    assert longest + 20 < len(ids) < 2 * longest + 1  # two windows, the second one shorter
    expected = 0.0
    for begin, end in ((1, longest + 1), (longest + 1, len(ids))):
        start = max(0, end - longest - 1)
        log_p = model(torch.tensor([ids[start : end - 1]]), use_cache=False).logits[0].double().log_softmax(-1)
        expected += sum(float(log_p[t - 1 - start, ids[t]]) for t in range(begin, end))
    assert harness_model(model, tokenizer).loglikelihood_rolling([request(text)]) == [pytest.approx(expected, abs=1e-3)]


@pytest.mark.usefixtures("harness")
def test_adapter_generates_until(built: Any) -> None:
    from validate.tasks.harness import harness_model

    model, tokenizer = tasks.load_compressed(built.out, "float32")
    inputs = tokenizer("The mill", return_tensors="pt")
    text = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :],
        skip_special_tokens=True,
    )
    adapter = harness_model(model, tokenizer)
    whole, cut = adapter.generate_until(
        [request("The mill", {"max_gen_toks": 8}), request("The mill", {"max_gen_toks": 8, "until": [text[3:5]]})]
    )
    assert whole == text
    assert cut == text[: text.index(text[3:5])]


def test_adapter_without_the_harness(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from validate.tasks.harness import harness_model

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'procrustes-llm\[harness\]'"):
        harness_model(make_model("llama"), tiny.tokenizer())
