"""Keys of rows: what they say is trained, refused or counted as metadata; messages about rows quote no note."""

import copy
import itertools
import json
from typing import Any

import pytest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.data.conversation import parse_conversation, pretrain_text
from finetune.data.exceptions import ConversationFormatError, MessageFormatError, PretrainFormatError, RowError
from finetune.data.rows import parse_row
from finetune.data.tokenize import SampleEncoder, SampleType, TokenSample
from finetune.data.tools import read_arguments
from tests.finetune.test_tokenize import CALL, TOOL, TOOL_ROW, paths
from tests.support.tiny_tekken import load_tiny_tekken

VERSIONS = ("v3", "v7", "v11", "v13")
TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "r1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "r2"},
]
SECRET = "Mme DURAND née le 12/03/1950, pneumopathie"


@pytest.fixture(scope="module", params=VERSIONS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MistralTokenizer:
    return load_tiny_tekken(tmp_path_factory.mktemp(request.param), request.param)


def row(index: int = 1, /, **keys: Any) -> dict[str, Any]:
    """Two turns, with other keys in message `index`."""
    messages = [dict(message) for message in TURNS]
    messages[index] |= keys
    return {"messages": messages}


def encode(tokenizer: MistralTokenizer, raw: dict[str, Any]) -> TokenSample:
    return SampleEncoder(tokenizer.instruct_tokenizer).encode(raw, SampleType.INSTRUCT)


def trained(tokenizer: MistralTokenizer, raw: dict[str, Any]) -> list[str]:
    sample = encode(tokenizer, raw)
    runs = itertools.groupby(zip(sample.tokens, sample.masks), key=lambda pair: pair[1])
    texts = [[token for token, _ in run] for is_trained, run in runs if is_trained]
    return [tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP) for tokens in texts]


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises((ConversationFormatError, MessageFormatError)) as caught:
        parse_conversation(raw)
    return str(caught.value)


# ---- keys that are honoured ----


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss"])
def test_flags_of_other_tools_say_whether_an_answer_is_trained(tiny: MistralTokenizer, key: str):
    for value, expected in (
        (False, ["r2</s>"]),
        (0, ["r2</s>"]),
        (True, ["r1</s>", "r2</s>"]),
        (None, ["r1</s>", "r2</s>"]),
    ):
        assert trained(tiny, row(**{key: value})) == expected
    assert trained(tiny, row(**{key: False, "weight": 0})) == ["r2</s>"]
    assert set(encode(tiny, row(**{key: True, "weight": 0.5})).masks) == {False, 0.5, True}


@pytest.mark.parametrize(
    "keys", [{"weight": 1, "train": False}, {"weight": 0, "loss": True}, {"train": True, "loss": 0}]
)
def test_flags_that_contradict_each_other_are_refused(keys: dict[str, Any]):
    assert "contradict each other" in refusal(row(**keys))


@pytest.mark.parametrize("value", ["false", "no", 0.5, 2, [], {"a": 1}])
def test_a_flag_is_true_or_false(value: Any):
    assert "`train` of an assistant message must be true or false" in refusal(row(train=value))


def test_only_answers_can_be_trained(tiny: MistralTokenizer):
    for index, key in itertools.product((0, 2), ("train", "loss", "weight")):
        assert encode(tiny, row(index, **{key: 0})) == encode(tiny, row())
        assert "only assistant messages can be trained" in refusal(row(index, **{key: 1}))


@pytest.mark.parametrize("system", ["Réponds.", [{"type": "text", "text": "Réponds."}], [{"text": "Réponds."}]])
def test_the_system_prompt_of_a_row(tiny: MistralTokenizer, system: Any):
    expected = encode(tiny, {"messages": [{"role": "system", "content": "Réponds."}, *TURNS]})
    assert expected != encode(tiny, row())
    for key in ("system", "system_prompt"):
        assert encode(tiny, row() | {key: system}) == expected
    for role in ("system", "developer"):
        assert encode(tiny, {"messages": [{"role": role, "content": system}, *TURNS]}) == expected


def test_two_system_prompts_are_refused(tiny: MistralTokenizer):
    assert "both `system_prompt` and `system`" in refusal(row() | {"system": "a", "system_prompt": "b"})
    for key in ("system", "system_prompt"):
        assert "only one is allowed" in refusal({"messages": [{"role": "developer", "content": "a"}, *TURNS], key: "b"})
    assert encode(tiny, row() | {"system": ""}) == encode(tiny, row() | {"system": None}) == encode(tiny, row())
    assert "`system` must be a string, found a number" in refusal(row() | {"system": 3})


def test_text_chunks_of_any_role_are_text(tiny: MistralTokenizer):
    chunked = copy.deepcopy(TOOL_ROW)
    for message in chunked["messages"]:
        if "content" in message:
            message["content"] = [{"type": "text", "text": message["content"], "cache_control": None}]
    assert encode(tiny, chunked) == encode(tiny, TOOL_ROW)


def test_several_text_chunks_of_any_role_are_joined_as_the_tokenizer_joins_them(tiny: MistralTokenizer):
    version = tiny.instruct_tokenizer.tokenizer.version.version_num
    two = [{"type": "text", "text": "un"}, {"type": "text", "text": "deux"}]
    joined = "undeux" if version < 7 else "un\n\ndeux"
    for index, message in enumerate(TOOL_ROW["messages"]):
        if "content" in message:
            raws = copy.deepcopy(TOOL_ROW), copy.deepcopy(TOOL_ROW)
            for raw, content in zip(raws, (two, joined)):
                raw["messages"][index]["content"] = content
            assert encode(tiny, raws[0]) == encode(tiny, raws[1]), message["role"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "thinking", "input_text"])
def test_chunks_other_than_text_are_refused_by_name(kind: str):
    for index in range(4):
        assert f"chunk of the type '{kind}'" in refusal(row(index, content=[{"type": kind, kind: "x"}]))


# ---- keys that are refused ----

MISSPELLED = {
    "weight": ("wieght", "weigth", "weights", "Weight"),
    "train": ("trian", "Train"),
    "loss": ("los", "losss"),
    "tool_calls": ("toolCalls", "tool_call", "tool_cals", "tool-calls"),
}
MESSAGE_KEYS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thinking_blocks",
    "images",
    "image_url",
    "audio",
    "refusal",
)
MESSAGE_KEYS += ("function_call", "tool_results", "prefix", "mask", "masked", "loss_mask", "train_detail", "is_trained")
MESSAGE_KEYS += ("loss_scale", "no_loss", "skip", "tools", "tool_call_id")


@pytest.mark.parametrize(("key", "written"), [(key, written) for key, all in MISSPELLED.items() for written in all])
def test_a_misspelled_key_of_a_message_is_refused_with_the_right_one(key: str, written: str):
    for value in (0, True, "x"):
        assert f"has the key `{written}`: it is not read; did you mean `{key}`?" in refusal(row(**{written: value}))


@pytest.mark.parametrize("key", MESSAGE_KEYS)
def test_keys_of_a_message_that_would_be_lost_are_refused_by_name(key: str):
    assert f"An assistant message has the key `{key}`" in refusal(row(**{key: "x"}))
    for empty in (None, "", [], {}):
        assert not parse_conversation(row(**{key: empty})).unread


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("mesages", "messages"),
        ("Messages", "messages"),
        ("interacions", "interactions"),
        ("sytem_prompt", "system_prompt"),
        ("systemPrompt", "system_prompt"),
        ("avaliable_tools", "available_tools"),
        ("tool", "tools"),
        ("onlylast", "only_last"),
        ("only_lats", "only_last"),
    ],
)
def test_a_misspelled_key_of_a_row_is_refused_with_the_right_one(written: str, key: str):
    raw = {written: TURNS} if key in ("messages", "interactions") else row() | {written: "x"}
    assert f"The row has the key `{written}`: it is not read; did you mean `{key}`?" in refusal(raw)


@pytest.mark.parametrize(
    "key",
    ["weight", "wieght", "train", "loss", "mask", "train_on_inputs", "unmask", "images", "videos", "chosen", "rejected"]
    + ["reasoning_content", "system_message", "sys_prompt", "instructions", "functions", "conversations", "kto_tag"]
    + ["ignore", "toolConfig"],
)
def test_keys_of_a_row_that_would_be_lost_are_refused_by_name(key: str):
    assert f"The row has the key `{key}`" in refusal(row() | {key: "x"})
    assert not parse_conversation(row() | {key: None}).unread


def test_a_chunk_that_is_not_to_be_trained_is_refused():
    for keys in ({"train": False}, {"weight": 0}, {"image_url": "a"}):
        assert "A chunk of a message has the key" in refusal(row(content=[{"type": "text", "text": "a", **keys}]))


def test_a_pretrain_row_is_not_left_out_by_a_key():
    for key in ("weight", "train", "loss_mask", "skip"):
        with pytest.raises(PretrainFormatError, match=f"has the key `{key}`"):
            pretrain_text({"text": "Un texte.", key: 1})
    unread: set[str] = set()
    assert pretrain_text({"text": "Un texte.", "url": "x", "height": 170}, unread) == "Un texte."
    assert unread == {"url", "height"}


@pytest.mark.parametrize("value", ["no", "false", [], 2])
def test_only_last_is_true_or_false(value: Any):
    assert "`only_last` must be true or false" in refusal(row() | {"only_last": value})


@pytest.mark.parametrize(("key", "flag"), [("label", False), ("use_for_training", False), ("completion_mask", [0, 1])])
def test_flags_of_a_row_are_refused_and_its_metadata_of_the_same_name_is_not(key: str, flag: Any):
    assert f"The row has the key `{key}`" in refusal(row() | {key: flag})
    assert parse_conversation(row() | {key: "R50"}).unread == {key}


# ---- metadata ----


def test_metadata_is_accepted_and_named(tiny: MistralTokenizer):
    raw = row(3, name="Dr", id="m4", timestamp=3, height=2, context="x") | {"id": 7, "source": "a", "split": "train"}
    raw |= {
        "prompt": "q1",
        "prompt_id": "a",
        "message_id": 3,
        "system_id": 4,
        "label": "R50",
        "num_images": 2,
        "images": 0,
    }
    raw |= {
        "message": "x",
        "weight_kg": 80,
        "weight_loss": True,
        "excluded": False,
        "birth_weight": 3.2,
        "training_split": "a",
        "score": 0.5,
        SECRET: 1,
    }
    raw |= {"weight_loss": True, "excluded": False}
    raw["messages"][3].pop("height")  # too close to `weight`
    assert encode(tiny, raw) == encode(tiny, row())
    expected = "id source split prompt prompt_id message_id system_id label num_images images message weight_kg "
    expected += "birth_weight training_split score messages.name messages.id messages.timestamp messages.context"
    assert parse_conversation(raw).unread == {*expected.split(), "weight_loss", "excluded", "..."}
    assert not parse_conversation(TOOL_ROW).unread


def test_metadata_of_tools_and_calls(tiny: MistralTokenizer):
    raw = copy.deepcopy(TOOL_ROW)
    raw["tools"][0]["cache_control"] = {"type": "ephemeral"}
    raw["tools"][0]["function"] |= {"strict": True, "return": {"type": "string"}}
    raw["messages"][4]["tool_calls"][0] |= {"index": 0, "type": "function"}
    assert encode(tiny, raw) == encode(tiny, TOOL_ROW)
    assert parse_conversation(raw).unread == {"tools.cache_control", "tools.return", "tool_calls.index"}


# ---- tools ----


def with_tool(tool: Any) -> dict[str, Any]:
    return TOOL_ROW | {"tools": tool}


@pytest.mark.parametrize(
    "tools",
    [
        [{"function": {"name": "meteo", "description": "", "parameters": {}}}],
        [{"type": "function", "function": {"name": "meteo"}}],
        [{"type": "function", "function": {"name": "meteo", "description": None, "parameters": None, "strict": None}}],
        [{"type": "function", "name": "meteo"}],
        [{"name": "meteo", "description": ""}],
        '[{"type": "function", "function": {"name": "meteo"}}]',
        ['{"name": "meteo", "parameters": {}}'],
    ],
)
def test_spellings_of_tools(tiny: MistralTokenizer, tools: Any):
    plain = {"type": "function", "function": {"name": "meteo", "description": "", "parameters": {}}}
    assert encode(tiny, with_tool(tools)) == encode(tiny, with_tool([plain]))


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("{", "`tools` is text that is not JSON"),
        ('{"a": 1}', "`tools` must be a list, found an object"),
        ([3], "found a number"),
        ([{"type": "function"}], "with a 'function' object"),
        ([{"type": "web_search"}], "`type` is 'web_search'"),
        ([{"name": "a", "input_schema": {"type": "object"}}], "has the key `input_schema`"),
        ([{"name": "a", "parametres": {"type": "object"}}], "did you mean `parameters`"),
        ([{"function": {"name": 3}}], "'name' that is a string"),
        ([{"function": {"name": "a", "description": 3}}], "'description' of a tool's function must be a string"),
        ([{"function": {"name": "a", "parameters": "{}"}}], "utils.reformat_data"),
    ],
)
def test_other_tools_are_refused(tools: Any, reason: str):
    assert reason in refusal(with_tool(tools))


def test_text_of_an_empty_list_counts_like_an_empty_list(tiny: MistralTokenizer):
    for key, value in itertools.product(("tools", "available_tools"), ("[]", [])):
        assert trained(tiny, row() | {key: value}) == (["r1</s>", "r2</s>"] if key == "tools" else ["r2</s>"])
        assert trained(tiny, row() | {key: ""}) == ["r1</s>", "r2</s>"]


def test_tools_are_not_lost(tiny: MistralTokenizer):
    raw = {"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [TOOL]}
    with pytest.raises(ConversationFormatError, match="no user message to carry them"):
        encode(tiny, raw)


# ---- calls ----

VALID_ARGUMENTS = (
    "{}",
    '{"ville": "Brest"}',
    ' {"n": [1, null]}\n',
    '{"é": "\\u00e9"}',
    '{"n": 1e300}',
    '{"a": {"a": 1}}',
)
INVALID_ARGUMENTS = {
    "": "an empty string",
    "  ": "an empty string",
    "{ville: Brest}": "text that is not JSON",
    "{'ville': 'Brest'}": "text that is not JSON",
    "[]": "the text of a list",
    "3": "the text of a number",
    "null": "the text of null",
    '"{}"': "the text of a string",
    '{"n": NaN}': "a number that JSON does not have",
    '{"n": -Infinity}': "a number that JSON does not have",
    '{"n": 1e999}': "a number that JSON does not have",
    '{"n": ' + "9" * 5000 + "}": "a number that JSON does not have",
    '{"a": 1, "a": 2}': "a repeated key",
    '{"a": {"b": 1, "b": 2}}': "a repeated key",
    '{"a": "\\ud83d"}': "an unpaired surrogate",
    '{"a":' * 100_000: "nested too deeply",
}


def last_call(arguments: Any, **keys: Any) -> dict[str, Any]:
    """A row that ends with a call, which is trained."""
    call = CALL | {"function": {"name": "meteo", "arguments": arguments, **keys}}
    return {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}


@pytest.mark.parametrize("arguments", VALID_ARGUMENTS)
def test_arguments_are_the_text_of_an_object_or_an_object(tiny: MistralTokenizer, arguments: str):
    assert read_arguments(arguments) == arguments
    assert encode(tiny, last_call(arguments)) == encode(tiny, last_call(json.loads(arguments)))


@pytest.mark.parametrize(("arguments", "found"), INVALID_ARGUMENTS.items(), ids=range(len(INVALID_ARGUMENTS)))
def test_other_arguments_are_refused(tiny: MistralTokenizer, arguments: str, found: str):
    with pytest.raises(MessageFormatError, match=f"'arguments' of a tool call must be .*found .*{found}"):
        encode(tiny, last_call(arguments))


@pytest.mark.parametrize("arguments", [None, [], 3, True, {"n": float("nan")}, {"n": {"m": float("inf")}}])
def test_arguments_of_other_types_are_refused(arguments: Any):
    for raw in (last_call(arguments), {**TOOL_ROW, "messages": copy.deepcopy(TOOL_ROW["messages"])}):
        raw["messages"][-1 if raw["messages"][-1].get("tool_calls") else 4]["tool_calls"][0]["function"][
            "arguments"
        ] = arguments
        assert "'arguments' of a tool call must be" in refusal(raw)


def test_the_message_names_the_command_that_repairs_the_arguments():
    assert all("utils.reformat_data" in refusal(last_call(fixable)) for fixable in (None, "", "{'ville': 'Brest'}"))
    assert all("utils.reformat_data" not in refusal(last_call(other)) for other in ([], "[]", "{a: 1}", '{"a": NaN}'))


def test_arguments_in_other_notations_are_refused_even_as_context():
    for arguments in ("{ville: Brest}", "{'ville': 'Brest'}", "[]", "3", [], None):
        raw = copy.deepcopy(TOOL_ROW)
        raw["messages"][4]["tool_calls"][0]["function"]["arguments"] = arguments
        assert "'arguments' of a tool call must be" in refusal(raw)


def answers(*ids: str, calls: tuple[str, ...]) -> dict[str, Any]:
    messages = [TURNS[0], {"role": "assistant", "tool_calls": [CALL | {"id": call} for call in calls]}]
    messages += [{"role": "tool", "content": "x", "tool_call_id": answer} for answer in ids]
    return {"messages": [*messages, {"role": "assistant", "content": "r"}], "tools": [TOOL]}


def test_parallel_calls_have_different_ids_and_one_answer_each(tiny: MistralTokenizer):
    one, two = "abcdefgh1", "abcdefgh2"
    assert encode(tiny, answers(two, one, calls=(one, two))).tokens
    for raw, reason in (
        (answers(one, one, calls=(one, one)), "Two calls of an assistant message have the id 'abcdefgh1'"),
        (answers(one, one, calls=(one, two)), "'abcdefgh1', which is answered already"),
        (answers(one, "zzzzzzzzz", calls=(one, two)), "'zzzzzzzzz', which no earlier assistant message makes"),
    ):
        with pytest.raises(ConversationFormatError, match=reason):
            encode(tiny, raw)


def test_an_id_may_be_used_again_by_a_later_message(tiny: MistralTokenizer):
    once = answers("abcdefgh1", calls=("abcdefgh1",))
    again = once | {"messages": [*once["messages"], *once["messages"]]}
    assert encode(tiny, again).tokens
    stale = answers("abcdefgh2", calls=("abcdefgh2",))["messages"]
    mixed = once | {"messages": [*stale, *answers("abcdefgh2", calls=("abcdefgh1",))["messages"]]}
    with pytest.raises(ConversationFormatError, match="'abcdefgh2', which is answered already"):
        encode(tiny, mixed)


# ---- only the last answer ----


def test_an_answer_just_before_the_last_one_is_not_trained(tiny: MistralTokenizer):
    turns = [TURNS[0], {"role": "assistant", "content": "un"}, {"role": "assistant", "content": "deux"}]
    assert trained(tiny, {"messages": turns, "only_last": True}) == ["deux</s>"]


# ---- privacy ----


def test_messages_about_rows_quote_no_note(tiny: MistralTokenizer):
    assert all(SECRET not in str(error) and "DURAND" not in str(error) for error in errors_with_a_note(tiny))


def errors_with_a_note(tokenizer: MistralTokenizer) -> list[RowError]:
    """The errors of a row in which each value in turn, or each key, is a note."""
    found: list[RowError] = []
    raw = TOOL_ROW | {"tools": [{"type": "function", "function": TOOL["function"] | {"strict": True}}]}
    for path in paths(raw):
        for change in ("value", "list", "key", "no key"):
            changed = copy.deepcopy(raw)
            inner: Any = changed
            for key in path[:-1]:
                inner = inner[key]
            if change == "value":
                inner[path[-1]] = SECRET
            elif change == "list":
                inner[path[-1]] = [{SECRET: SECRET}]
            elif isinstance(inner, dict):
                value = inner.pop(path[-1])
                inner[SECRET] = value if change == "key" else SECRET
            try:
                encode(tokenizer, parse_row(json.dumps(changed).encode()))
            except RowError as error:
                found.append(error)
    assert len(found) > 60
    return found


def test_role_and_content_that_are_swapped_are_not_quoted():
    assert "a role of 42 characters" in refusal({"messages": [{"role": SECRET, "content": "user"}, TURNS[1]]})
    for role in ("humain", "pneumopathie", "DURAND"):
        assert role not in refusal({"messages": [{"role": role, "content": "user"}, TURNS[1]]})
    assert "the role 'asistant'" in refusal({"messages": [TURNS[0], {"role": "asistant", "content": "a"}]})
    for role in ("gpt", "human", "function", "User", "Assistant"):
        message = refusal({"messages": [{"role": role, "content": "a"}, TURNS[1]]})
        assert f"the role '{role}'" in message and "utils.reformat_data" in message
