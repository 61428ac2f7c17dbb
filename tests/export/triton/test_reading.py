"""Whatever a client sends is understood or refused by a sentence: every tensor, messages, chat templates that raise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from compress.errors import UsageError
from export.triton.config import INPUTS
from export.triton.failures import A_BUG, LONGEST_REASON, Contained, sendable
from export.triton.passes import check_feeds
from export.triton.reading import Question, Reader
from export.triton.settings import LARGEST_PROMPT, LONGEST_STOP, Settings
from tests import tiny

TYPES = {
    "TYPE_BOOL": np.bool_,
    "TYPE_INT32": np.int32,
    "TYPE_UINT64": np.uint64,
    "TYPE_FP32": np.float32,
    "TYPE_STRING": np.object_,
}
TEMPLATE = """
{%- for m in messages %}
{{- m.role + ': ' + m.content }}
{%- if m.role == 'robot' %}{{ raise_exception('no such role here: ' + m.content) }}{% endif %}
{%- if m.tool_calls is defined %}
{%- for call in m.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}{% endif %}
{%- if m.weight is defined %}{{ 1 / m.weight }}{% endif %}
{%- if m.name is defined %}{{ m.name.upper() }}{{ m.name[0] }}{% endif %}
{%- if m.nothing is defined %}{{ m.nothing.at.all }}{% endif %}
{%- if m.times is defined %}{{ m.content * m.times }}{% endif %}
{%- endfor %}"""


def a_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = a_tokenizer()
READER = Reader(TOKENIZER, longest=128)


def read(reader: Reader = READER, /, **sent: Any) -> Question:
    """A request of these inputs, each as the array that Triton makes of it."""
    kinds = {name: (TYPES[kind], size) for name, kind, size in INPUTS}

    def values(name: str) -> Any:
        if name not in sent:
            return None
        kind, _ = kinds[name]
        given = sent[name] if isinstance(sent[name], list) else [sent[name]]
        return np.array([[v.encode() if isinstance(v, str) else v for v in given]], kind)

    return reader.read(values)


def chat(*messages: dict[str, Any], **more: Any) -> Question:
    return read(messages=json.dumps(messages), **more)


def test_a_question() -> None:
    question = read(text_input="The mill", max_tokens=3, stream=True, stop=["x", "y"], stop_words=["z"], seed=2**64 - 1)
    assert list(question.ids) == TOKENIZER("The mill")["input_ids"]
    assert question.settings == Settings(max_tokens=3, stop=("x", "y", "z"), seed=2**64 - 1)
    assert (question.stream, question.before) == (True, "")
    assert read(text_input="The mill", exclude_input_in_output=False).before == "The mill"
    assert read(text_input="The mill").settings.max_tokens == 128 - len(question.ids)
    assert read(text_input="The mill", min_tokens=127).settings.max_tokens == 127  # which the batcher may refuse
    assert list(chat({"role": "user", "content": "hi"}).ids) == TOKENIZER("user: hi")["input_ids"]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("no", "messages are not JSON"),
        ("{}", "messages must be a JSON list"),
        ("[]", "messages must be a JSON list"),
        ("[1]", r"messages\[0\] must be an object"),
        ('[{"role": "user", "content": "x"}, {"role": "user"}]', r'messages\[1\] must have a "content"'),
        ('[{"role": 1, "content": "x"}]', r'messages\[0\] must have a "role"'),
        ('[{"role": "user", "content": null}]', 'must have a "content"'),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('[{"role": "user", "content": "\\ud800"}]', r"half of a character: \\ud800"),
        ('[{"role": "user\\udfff", "content": "x"}]', r"half of a character: \\udfff"),
        ('[{"role": "user", "content": "x", "tool_calls": 5}]', "cannot read these messages"),
        ('[{"role": "user", "content": "x", "tool_calls": [1]}]', "refuses these messages"),
        ('[{"role": "user", "content": "x", "weight": 0}]', "cannot read these messages"),
        ('[{"role": "user", "content": "x", "weight": {}}]', "cannot read these messages"),
        ('[{"role": "user", "content": "x", "name": []}]', "these messages"),
        ('[{"role": "user", "content": "x", "nothing": 1}]', "refuses these messages"),
        ('[{"role": "user", "content": "x", "times": "x"}]', "cannot read these messages"),
        ('[{"role": "user", "content": "xx", "times": 1000000}]', "more than 1048576 characters"),
        ('[{"role": "robot", "content": "\\ud800"}]', "no such role here"),
        (f'[{{"role": "user", "content": "x", "a": 1{"0" * 5000}}}]', "messages are not JSON"),
        (
            '[{"role": "user", "content": "x", "tool_calls": [{"function": {"arguments": '
            + "[" * 900
            + "]" * 900
            + "}}]}]",
            None,  # as deep as JSON may be; what the template makes of it depends on Python
        ),
    ],
)
def test_messages_that_cannot_be_read(messages: str, sentence: str | None) -> None:
    if sentence is None:
        answered_or_refused(lambda: read(messages=messages))
        return
    with pytest.raises(UsageError, match=sentence) as refused:
        read(messages=messages)
    sendable(str(refused.value)).encode()


def test_a_model_without_a_chat_template() -> None:
    with pytest.raises(UsageError, match="has no chat template; give text_input"):
        read(Reader(a_tokenizer(None), 128), messages='[{"role": "user", "content": "x"}]')


@pytest.mark.parametrize(
    ("sent", "sentence"),
    [
        ({}, "give text_input, or messages"),
        ({"text_input": "a", "messages": "[]"}, "and not both"),
        ({"text_input": ["a", "b"]}, "text_input must have one value, not 2"),
        ({"text_input": []}, "text_input must have one value, not 0"),
        ({"text_input": b"\xff"}, "text_input is not UTF-8"),
        ({"text_input": b"\xed\xa0\x80"}, "text_input is not UTF-8"),
        ({"text_input": "a", "stop": [b"x", b"\xff"]}, "stop is not UTF-8"),
        ({"text_input": "a", "stop_words": ["x", ""]}, "must not be empty"),
        (
            {"text_input": "a", "stop": ["x" * (LONGEST_STOP + 1)]},
            "a stop string has at most 1024 characters, not 1025",
        ),
        ({"text_input": "a", "stop_words": ["x"] * 17}, "stop_words has 17 strings; at most 16"),
        ({"text_input": "a", "stop": ["x"] * 10, "stop_words": ["x"] * 10}, "at most 16 stop strings, not 20"),
        ({"text_input": "a" * (LARGEST_PROMPT + 1)}, "more than 1048576 characters"),
        ({"text_input": "a", "temperature": 1e38, "top_p": 1e-30}, "temperature must be 0 .greedy. to 100, not 1e"),
        ({"text_input": "a", "temperature": [1.0, 1.0]}, "temperature must have one value"),
        ({"text_input": "a", "repetition_penalty": 1e-40}, "repetition_penalty must be 0.1 to 10"),
        ({"text_input": "a", "repetition_penalty": float("nan")}, "repetition_penalty must be"),
        ({"text_input": "a", "presence_penalty": float("inf")}, "presence_penalty must be"),
        ({"text_input": "a", "top_p": float("nan")}, "top_p must be"),
        ({"text_input": "a", "max_tokens": 3, "min_tokens": 4}, r"min_tokens must be 0 to max_tokens \(3\), not 4"),
        ({"text_input": "a", "min_tokens": -(2**31)}, "min_tokens must be"),
    ],
)
def test_inputs_that_make_no_sense(sent: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        read(**sent)


def test_settings_are_refused_before_a_long_prompt_is_read() -> None:
    class Never:
        chat_template = None

        def __call__(self, text: str, **options: Any) -> Any:
            raise AssertionError("the prompt was read")

    with pytest.raises(UsageError, match="top_k must be"):
        read(Reader(Never(), 128), text_input="a" * LARGEST_PROMPT, top_k=-1)  # type: ignore[arg-type]


def answered_or_refused(ask: Any) -> None:
    """The one thing that must hold for everything: a question that the batcher takes, or a sentence."""
    reason = ""
    try:
        question = ask()
    except UsageError as refused:
        reason = str(refused)
    if reason:
        sendable(reason).encode()
        return
    assert all(0 <= token < len(TOKENIZER) for token in question.ids)
    assert question.settings.max_tokens >= 1
    question.before.encode()


def arrays_of(kind: str) -> st.SearchStrategy[Any]:
    elements: dict[str, st.SearchStrategy[Any]] = {
        "TYPE_BOOL": st.booleans(),
        "TYPE_INT32": st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 130),
        "TYPE_UINT64": st.integers(0, 2**64 - 1),
        "TYPE_FP32": st.floats(width=32) | st.floats(0, 2, width=32),
        "TYPE_STRING": st.binary(max_size=20) | st.text(max_size=20).map(lambda t: t.encode("utf-8", "surrogatepass")),
    }
    # One value as a rule, for else nothing but shapes is tested.
    count = st.sampled_from([1] * 12 + [0, 2, 20])
    return count.flatmap(
        lambda n: st.lists(elements[kind], min_size=n, max_size=n).map(lambda v: np.array([v], TYPES[kind]))
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["tool_calls", "weight", "name", "nothing", "other"])
a_message = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["user", "assistant", "robot"]) | json_values,
    st.text(st.characters(), max_size=20) | json_values,
    st.dictionaries(keys, json_values, max_size=2),
)
some_messages = (st.lists(a_message, max_size=3) | json_values).map(lambda value: json.dumps(value).encode())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {"text_input": arrays_of("TYPE_STRING")},
        optional={name: arrays_of(kind) for name, kind, _ in INPUTS if name not in ("text_input", "messages")},
    )
)
def test_any_tensors_are_read_or_refused(sent: dict[str, Any]) -> None:
    answered_or_refused(lambda: READER.read(sent.get))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_messages | st.binary(max_size=30))
def test_any_messages_are_read_or_refused(messages: bytes) -> None:
    answered_or_refused(lambda: READER.read({"messages": np.array([[messages]], np.object_)}.get))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=2000))
def test_any_reason_can_be_sent(reason: str) -> None:
    assert len(sendable(reason).encode()) <= 10 * LONGEST_REASON + 10


def test_a_failure_that_nobody_thought_of_ends_one_request(capsys: pytest.CaptureFixture[str]) -> None:
    told = list[str]()
    for error in (KeyError("/srv/secret"), UsageError("no")):
        with Contained(told.append):
            raise error
    assert told == [A_BUG, "no"]
    assert "/srv/secret" in capsys.readouterr().err  # for the operator
    with pytest.raises(KeyboardInterrupt), Contained(told.append):
        raise KeyboardInterrupt


def feeds(**changes: Any) -> dict[str, Any]:
    made = {
        "input_ids": np.array([[1, 2]]),
        "attention_mask": np.ones((1, 5), np.int64),
        "position_ids": np.array([[3, 4]]),
        "past_key_values.0.key": np.zeros((1, 2, 3, 8), np.float32),
    }
    return {**made, **changes}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"input_ids": np.array([[1, 61]])}, "input_ids must be 0 to 60; found 1 to 61"),
        ({"input_ids": np.array([[-1, 2]])}, "input_ids must be 0 to 60; found -1 to 2"),
        ({"input_ids": np.zeros((1, 0), np.int64)}, "with at least one token"),
        ({"input_ids": np.zeros((0, 2), np.int64)}, "with at least one token"),
        ({"position_ids": np.array([[3, 64]])}, "position_ids must be 0 to 63"),
        ({"position_ids": np.array([[3]])}, "position_ids must have the shape of input_ids"),
        ({"attention_mask": np.ones((1, 1), np.int64)}, "attention_mask must be"),
        ({"attention_mask": np.ones((2, 5), np.int64)}, "attention_mask must be"),
        ({"attention_mask": np.full((1, 5), 2)}, "0 and 1 alone"),
        ({"past_key_values.0.key": np.zeros((1, 2, 4, 8))}, r"past_key_values.0.key must be \(1, heads, 3, head_dim\)"),
        ({"past_key_values.0.key": np.zeros((2, 2, 3, 8))}, "past_key_values.0.key must be"),
    ],
)
def test_passes_that_contradict_themselves(changes: dict[str, Any], sentence: str) -> None:
    check_feeds(feeds(), vocabulary=61, positions=64)
    with pytest.raises(UsageError, match=sentence):
        check_feeds(feeds(**changes), vocabulary=61, positions=64)


def test_a_pass_of_too_many_logits() -> None:
    with pytest.raises(UsageError, match="send fewer at a time"):
        check_feeds(feeds(), vocabulary=1 << 28, positions=64)
