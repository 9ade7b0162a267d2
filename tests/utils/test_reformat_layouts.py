"""Layouts of chats that reformat_data reads: what each becomes, and which rows it leaves out with which reason."""

import json

import pytest

from finetune.data.conversation import chunk_ends, parse_conversation
from finetune.data.tokenize import SampleEncoder, SampleType
from tests.support.golden import instruct_tokenizer
from utils.tables.chat_rows import reformat_row
from utils.tables.jsonl import SkippedRowError
from utils.tables.rewrite import call_ids
from utils.tables.tool_calls import as_tool

PARAMETERS = {"type": "object", "properties": {"label": {"type": "string"}}}
FUNCTION = {"name": "get_code", "description": "Finds a code", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
SCHEMA_KEYS = ("input_schema", "inputSchema", "args")
CALL = '{"name": "get_code", "arguments": {"label": "fièvre"}}'
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def encoder():
    return SampleEncoder(instruct_tokenizer("v3"))


@pytest.fixture
def convert(encoder):
    """Convert a row that training must accept afterwards, and that a second conversion must not change."""

    def convert(row):
        warnings = []
        converted = reformat_row(row, call_ids(0), warnings.append)
        parse_conversation(converted)
        assert len(encoder.encode(converted, SampleType.INSTRUCT).tokens) > 0
        assert reformat_row(converted, call_ids(1), [].append) == converted
        return converted, warnings

    return convert


def skipped(row):
    with pytest.raises(SkippedRowError) as skip:
        reformat_row(row, call_ids(0), [].append)
    return skip.value.reason


def share_gpt(*turns, **columns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **columns}


def brief(row):
    """Return role and content of each message; of a call, name and arguments; ids must match."""
    found, ids = [], []
    for message in row["messages"]:
        if message["role"] == "tool":
            assert message["tool_call_id"] == ids.pop(0)
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
        ids += [call["id"] for call in message.get("tool_calls", [])]
        found.append((message["role"], *([message["content"]] if "content" in message else []), *calls))
    return found


CONVERSATION = [
    ("system", "Vous codez."),
    ("user", "Le code ?"),
    ("assistant", ("get_code", '{"label": "fièvre"}')),
    ("tool", '{"code": "R50"}'),
    ("assistant", "R50."),
]
GLAIVE_SYSTEM = f"SYSTEM: Vous codez. Use them if required -\n{json.dumps(FUNCTION, indent=4)}\n"
GLAIVE_PROMPT = "Vous codez. Use them if required"
GLAIVE_CALL = """<functioncall> {"name": "get_code", "arguments": '{"label": "fièvre"}'} <|endoftext|>"""


@pytest.mark.parametrize("speakers", [("function_call", "observation"), ("function-call", "function-response")])
@pytest.mark.parametrize("tools", [[FUNCTION], [TOOL], json.dumps([FUNCTION]), json.dumps([TOOL], indent=1)])
def test_share_gpt_with_calls_as_llama_factory_writes_it(speakers, tools, convert):
    called, answered = speakers
    turns = [("human", "Le code ?"), (called, CALL), (answered, '{"code": "R50"}'), ("gpt", "R50.")]
    row, warnings = convert(share_gpt(*turns, system="Vous codez.", tools=tools, id=7))
    assert brief(row) == CONVERSATION and row["tools"] == [TOOL] and row["id"] == 7
    assert row.keys() == {"messages", "tools", "id"} and not warnings


@pytest.mark.parametrize("key", ["conversations", "conversation", "messages"])
def test_hermes_calls_and_answers_are_in_tags(key, convert):
    turns = [("system", "Vous codez."), ("human", "Le code ?"), ("gpt", f"<tool_call>\n{CALL}\n</tool_call>")]
    turns += [("tool", '<tool_response>\n{"code": "R50"}\n</tool_response>'), ("gpt", "R50.")]
    row, _ = convert({key: share_gpt(*turns)["conversations"], "tools": json.dumps([TOOL])})
    assert brief(row) == CONVERSATION and row["tools"] == [TOOL]


def test_parallel_calls_and_answers_in_one_turn_are_separated(convert):
    calls = "".join(f'<tool_call>{{"name": "f", "arguments": {{"n": {n}}}}}</tool_call>\n' for n in (1, 2))
    answers = "<tool_response>un</tool_response>\n<tool_response>deux</tool_response>"
    row, _ = convert(share_gpt(("human", "q"), ("gpt", calls), ("tool", answers), ("gpt", "a")))
    assert brief(row)[1:3] == [("assistant", ("f", '{"n": 1}'), ("f", '{"n": 2}')), ("tool", "un")]
    assert brief(row)[3] == ("tool", "deux")


@pytest.mark.parametrize("text", [f"{CALL}\n{CALL}", f"[{CALL}, {CALL}]", f"[{CALL}] [{CALL}]"])
def test_several_calls_in_one_text(text, convert):
    row, _ = convert(share_gpt(("human", "q"), ("function_call", text)))
    assert brief(row)[1] == ("assistant", *[("get_code", '{"label": "fièvre"}')] * 2)


def test_text_before_a_hermes_call_is_kept(convert):
    turns = [("human", "q"), ("gpt", f"Je cherche. <tool_call>{CALL}</tool_call>")]
    warnings = []
    row = reformat_row(share_gpt(*turns), call_ids(0), warnings.append)
    assert row["messages"][1]["content"] == "Je cherche." and len(row["messages"][1]["tool_calls"]) == 1
    assert len(warnings) == 1 and "before v7" in warnings[0]


def test_tags_in_our_own_layout_are_text(convert):
    messages = [USER, {"role": "assistant", "content": "<tool_call>{}</tool_call>"}]
    assert convert({"messages": messages})[0] == {"messages": messages}


@pytest.mark.parametrize("blank", ["\n\n\n", "\n", " "])
def test_glaive_v2_is_text(blank, convert):
    parts = ["USER: Le code ?", f"ASSISTANT: {GLAIVE_CALL}", 'FUNCTION RESPONSE: {"code": "R50"}']
    parts += ["ASSISTANT: R50. <|endoftext|>", "USER: Merci", "ASSISTANT: De rien. <|endoftext|>"]
    row, warnings = convert({"system": GLAIVE_SYSTEM, "chat": blank.join(parts) + blank})
    expected = [("system", GLAIVE_PROMPT), *CONVERSATION[1:], ("user", "Merci"), ("assistant", "De rien.")]
    assert brief(row) == expected and row["tools"] == [TOOL] and not warnings


def test_glaive_v2_without_functions(convert):
    chat = "USER: q\n\n\nASSISTANT: a\n\nwith: a list <|endoftext|>\n\n\n"
    row, _ = convert({"system": "SYSTEM: You are helpful - and kind.", "chat": chat})
    assert brief(row) == [
        ("system", "You are helpful - and kind."),
        ("user", "q"),
        ("assistant", "a\n\nwith: a list"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chat": "Hello"}, "`chat` has no label ASSISTANT:"),
        ({"chat": "Hello\nUSER: q\nASSISTANT: a"}, "the messages of `chat` cannot be separated"),
        ({"chat": "USER: q\nUSER: q\n\n\nASSISTANT: a"}, "the messages of `chat` cannot be separated"),
        ({"chat": "USER: q\nASSISTANT: a <|endoftext|> b"}, "text after <|endoftext|>"),
        ({"chat": "USER: q\nASSISTANT: <functioncall> f(x)"}, "a function call cannot be parsed"),
        ({"chat": "USER: q\nASSISTANT: a", "system": 'Use - {"name": '}, "`system` is not JSON"),
        ({"chat": "USER: q\nASSISTANT: a", "system": 5}, "`system` is not a string"),
        ({"chat": "USER: q\nFUNCTION RESPONSE: 1\nASSISTANT: a"}, "a function response without a call"),
    ],
)
def test_glaive_v2_is_skipped_rather_than_cut(row, reason):
    assert skipped(row) == reason


def test_white_space_around_texts_is_removed_from_glaive_rows_only(convert):
    turns = [("human", "a\n\n"), ("gpt", "b")]
    assert brief(convert(share_gpt(*turns, function_description="{}"))[0])[0] == ("user", "a")
    assert brief(convert(share_gpt(*turns))[0])[0] == ("user", "a\n\n")


def test_alpaca(convert):
    row = {"instruction": "Codez.", "input": "Fièvre", "output": "R50", "system": "Vous codez."}
    assert brief(convert(row)[0]) == [("system", "Vous codez."), ("user", "Codez.\nFièvre"), ("assistant", "R50")]
    row = {"instruction": "Codez.", "input": "", "output": "R50", "history": [["q", "a"]], "source": "x"}
    converted, warnings = convert(row)
    assert brief(converted) == [("user", "q"), ("assistant", "a"), ("user", "Codez."), ("assistant", "R50")]
    assert converted.keys() == {"messages", "source"} and not warnings


def test_the_prompt_that_alpaca_repeats_stays_metadata(convert):
    row = {"instruction": "Codez.", "output": "R50", "text": "### Instruction:\nCodez.\n\n### Response:\nR50"}
    converted, _ = convert(row)
    assert brief(converted) == [("user", "Codez."), ("assistant", "R50")] and converted["text"] == row["text"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "output": ["a", "b"]}, "`output` is not a string"),
        ({"instruction": "", "input": "", "output": "a"}, "an empty message"),
        ({"instruction": "q", "output": ""}, "an empty message"),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "`history` is not a list of pairs"),
    ],
)
def test_alpaca_rows_that_are_skipped(row, reason):
    assert skipped(row).startswith(reason)


# Roles, contents, weights


def test_developer_is_system_and_names_may_be_capitalized(convert):
    messages = [{"role": "developer", "content": "s"}, {"role": "User", "content": "q"}, ASSISTANT]
    assert brief(convert({"messages": messages})[0]) == [("system", "s"), ("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize("part", [{"type": "text", "text": "{}"}, {"type": "output_text", "text": "{}"}, "{}"])
def test_text_parts_stay_in_every_role_in_the_spelling_that_is_read(part, convert):
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    messages = [{"role": role, "content": [part, part]} for role in ("developer", "user", "assistant", "user")]
    messages += [{"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": [part, part]}]
    messages += [{"role": "assistant", "content": [part]}]
    contents = [message.get("content") for message in convert({"messages": messages})[0]["messages"]]
    text = {"type": "text", "text": "{}"}
    assert contents == [[text] * 2] * 4 + [None, [text] * 2, [text]]


def test_an_answer_that_is_an_object_or_a_list_is_written_as_json(convert):
    for value, text in (({"é": 1}, '{"é": 1}'), ([], "[]"), ([{"code": "R50"}], '[{"code": "R50"}]'), (5, "5")):
        row, _ = convert(share_gpt(("human", "q"), ("function_call", CALL), ("observation", value), ("gpt", "a")))
        assert brief(row)[2] == ("tool", text)


@pytest.mark.parametrize(
    ("masked", "weight"),
    [({"weight": 0}, 0), ({"train": False}, 0), ({"loss": False}, 0), ({"weight": 0, "train": False}, 0)],
)
def test_what_is_not_to_be_trained_has_weight_zero(masked, weight, convert, encoder):
    turn = {"from": "gpt", "value": "BAD"} | masked
    row, _ = convert(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                turn,
                *share_gpt(("human", "q"), ("gpt", "a"))["conversations"],
            ]
        }
    )
    assert [message.get("weight") for message in row["messages"]] == [None, weight, None, None]
    sample = encoder.encode(row, SampleType.INSTRUCT)
    trained = [token for token, mask in zip(sample.tokens, sample.masks) if mask]
    assert "BAD" not in encoder.instruct_tokenizer.tokenizer.decode(trained)
    assert encoder.instruct_tokenizer.tokenizer.decode(trained).strip() == "a"


def test_other_weights_are_kept(convert):
    messages = [USER, ASSISTANT | {"weight": 0.5}, USER, ASSISTANT | {"train": True}]
    converted, warnings = convert({"messages": messages})
    assert [message.get("weight") for message in converted["messages"]] == [None, 0.5, None, 1] and not warnings


def test_weights_of_zero_outside_answers_are_removed_with_a_warning(convert):
    converted, warnings = convert({"messages": [USER | {"weight": 0.0}, USER | {"train": False}, ASSISTANT]})
    assert converted == {"messages": [USER, USER, ASSISTANT]}
    assert warnings == ["weights of 0 removed from messages that are never trained on"] * 2


def test_removed_messages_are_counted(convert):
    converted, warnings = convert({"messages": [USER, ASSISTANT, USER, USER]})
    assert converted == {"messages": [USER, ASSISTANT]}
    assert warnings == ["messages after the last answer removed"] * 2


def test_other_keys_of_a_turn_are_kept(convert):
    turns = [{"from": "human", "value": "q", "lang": "fr"}, {"role": "gpt", "from": "Bob", "value": "a"}]
    expected = {"messages": [USER | {"lang": "fr"}, ASSISTANT | {"from": "Bob"}]}
    assert convert({"conversations": turns})[0] == expected


def test_calls_that_are_given_twice_are_not_lost(convert):
    call = {"name": "f", "arguments": "{}"}
    turn = {"role": "tool_call", "content": None, "tool_calls": [{"function": call}]}
    assert brief(convert({"messages": [USER, turn]})[0])[1] == ("assistant", ("f", "{}"))
    turn |= {"content": CALL}
    assert reformat_row({"messages": [USER, turn]}, call_ids(0), [].append)["messages"][1]["content"] == CALL


def test_harmless_nulls_mean_nothing(convert):
    message = ASSISTANT | {"tool_calls": None, "function_call": None, "refusal": None, "weight": None}
    assert convert({"messages": [USER, message]})[0] == {"messages": [USER, ASSISTANT]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (share_gpt(("human", "q"), ("narrator", "x"), ("gpt", "a")), "a message of the unknown speaker `narrator`"),
        (share_gpt(("Patient de 70 ans admis", "q"), ("gpt", "a")), "a message of the unknown speaker"),
        (share_gpt(("human", "q"), ("function_call", "f(x)"), ("gpt", "a")), "a function call cannot be parsed"),
        (share_gpt(("human", "q"), ("function_call", CALL), ("gpt", "a")), "a function call without a response"),
        (share_gpt(("human", "q"), ("observation", "1"), ("gpt", "a")), "a function response without a call"),
        (share_gpt(("human", "q"), ("gpt", "<tool_call>{}")), "a <tool_call> that is not closed, or text after it"),
        (share_gpt(("human", "q"), ("gpt", "a"), tools="[{"), "`tools` is not JSON"),
        (share_gpt(("human", "q"), ("gpt", "a"), system=["s"]), "`system` is not a string"),
        (share_gpt(("system", "s"), ("human", "q"), ("gpt", "a"), system="t"), "both a column `system` and a"),
        (share_gpt(("human", "q"), ("gpt", "a"), messages=[USER]), "both `messages` and `conversations`"),
        ({"messages": [USER, ASSISTANT | {"weight": 2}]}, "the `weight` of a message is not a number from 0"),
        ({"messages": [USER, ASSISTANT | {"train": "no"}]}, "the `train` of a message is not true or false"),
        (
            {"messages": [USER, ASSISTANT | {"weight": 1, "train": False}]},
            "the `train` and `weight` of a message contradict",
        ),
        ({"messages": [USER | {"train": True}, ASSISTANT]}, "a message that is not the assistant's asks to be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "a content part that is"),
        ({"messages": [USER | {"text": "t"}, ASSISTANT]}, "a message with both `content` and `text`"),
        ({"messages": [USER | {"tool_calls": [{"function": {"name": "f"}}]}, ASSISTANT]}, "a tool call in a message"),
        ({"messages": [{"role": "user", "content": 5}, ASSISTANT]}, "training would refuse it: The content of"),
        ({"messages": [ASSISTANT, {"role": "system", "content": "s"}, ASSISTANT]}, "training would refuse it: Unexp"),
        ({"messages": [ASSISTANT, ASSISTANT], "tools": [FUNCTION]}, "tools, but no user message to carry them"),
        (USER, "a single message, not a row with a list of messages"),
    ],
)
def test_rows_that_cannot_be_converted_without_loss_are_skipped(row, reason):
    assert skipped(row).startswith(reason)


def test_the_reason_does_not_recommend_the_command_that_gives_it():
    reason = skipped({"messages": [USER, ASSISTANT | {"functionCall": {"name": "f"}}]})
    assert reason.endswith("`functionCall`: it cannot be converted")


def test_a_default_of_openai_requests_is_removed_with_a_warning(convert):
    row, warnings = convert({"messages": [USER, ASSISTANT], "functions": [FUNCTION], "function_call": "auto"})
    assert row.keys() == {"messages", "tools"} and warnings == ["a column `function_call` that is `auto` removed"]


def test_what_training_accepts_is_never_left_out(convert):
    call = {"id": "abcdefgh1", "function": {"name": "f", "arguments": "{}", "latency": 5}}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    assert convert(row) == (row, [])


def test_unknown_rows_are_kept_and_marked():
    for row in ({"prompt": "q", "completion": "a"}, {}, {"text": ["a"]}):
        assert reformat_row(row, call_ids(0), [].append) is None


# Tools


@pytest.mark.parametrize(
    "tool",
    [
        FUNCTION,
        TOOL,
        {"function": FUNCTION, "type": "function"},
        {"type": "function", **FUNCTION},
        FUNCTION | {"parameters": json.dumps(PARAMETERS)},
        *({"name": "get_code", "description": "Finds a code", key: PARAMETERS} for key in SCHEMA_KEYS),
        {"type": "function", "function": FUNCTION | {"strict": None}},
    ],
)
def test_every_spelling_of_a_tool(tool, convert):
    assert as_tool(tool) == TOOL
    for tools in ([tool], json.dumps([tool])):
        assert convert({"messages": [USER, ASSISTANT], "tools": tools})[0]["tools"] == [TOOL]


@pytest.mark.parametrize("tool", [{"name": "now"}, {"name": "now", "description": None, "parameters": None}])
def test_a_tool_needs_neither_description_nor_parameters(tool, convert):
    expected = [{"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}]
    for spelled in (tool, {"type": "function", "function": tool}):
        assert convert({"messages": [USER, ASSISTANT], "tools": [spelled]})[0]["tools"] == expected


@pytest.mark.parametrize("tools", [[], "", "[]", None])
def test_empty_tools_mean_none(tools, convert):
    assert convert(share_gpt(("human", "q"), ("gpt", "a"), tools=tools))[0] == {"messages": [USER, ASSISTANT]}


def test_available_tools_stay_so(convert):
    row = {"messages": [USER, ASSISTANT], "available_tools": [FUNCTION]}
    assert convert(row)[0] == {"messages": [USER, ASSISTANT], "available_tools": [TOOL]}
    empty = {"messages": [USER, ASSISTANT], "available_tools": []}
    assert convert(empty)[0] == empty


@pytest.mark.parametrize(
    ("tool", "reason"),
    [
        ({"type": "web_search"}, "a function description has no name"),
        ({"type": "code_interpreter", "name": "x"}, "a tool that is not a function"),
        (FUNCTION | {"parameters": "none"}, "the `parameters` of a function are not an object"),
        (FUNCTION | {"parameters": {"type": "dict"}}, "training would refuse it: Invalid tool schema"),
        ({"name": "f", "descripton": "x"}, "The function of a tool has the key `descripton`"),
        ({"name": "f", "inputs": {"x": {"type": "string"}}}, "The function of a tool has the key `inputs`: the schema"),
        ("get_code", "a function description has no name"),
    ],
)
def test_tools_that_would_lose_something_are_skipped(tool, reason):
    found = skipped({"messages": [USER, ASSISTANT], "tools": [tool]})
    assert found.startswith(reason) and "utils.reformat_data" not in found


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"name": "f", "args": {"x": 1}}, "a function call has other keys than `name` and `arguments`"),
        ({"name": "f", "arguments": {}, "parameters": {"x": 1}}, "a function call has other keys than"),
        ({"name": "f", "arguments": {"x": float("nan")}}, "the arguments of a tool call are not a JSON object"),
        ({"name": "f", "arguments": '{"x": NaN}'}, "the arguments of a tool call are not a JSON object"),
        ({"type": "custom", "name": "f"}, "a tool call that is not a function's"),
        ({"name": "get code"}, "training would refuse it: Function name"),
    ],
)
def test_calls_that_would_lose_something_are_skipped(call, reason):
    assert skipped({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).startswith(reason)


MULTI_HOP = {
    "question": "Lequel est le plus haut, le Puy de Dôme ou le Ballon d'Alsace ?",
    "multihop": True,
    "sub_questions": [
        {
            "question": "Quelle est l'altitude du Puy de Dôme ?",
            "paragraph": "Le Puy de Dôme culmine à 1 465 m.",
            "long_answer": "Le paragraphe la donne.\nAnswer:1 465 m",
        },
        {
            "question": "Quelle est l'altitude du Ballon d'Alsace ?",
            "paragraph": "Le Ballon d'Alsace culmine à 1 247 m.",
            "long_answer": "Le paragraphe la donne.\nAnswer:1 247 m",
        },
    ],
    "final_answer": "Summary:1 465 m et 1 247 m.\nAnswer:Le Puy de Dôme.",
    "answer": None,
    "meta_info": {"source": "2_entities"},
    "tag": "entities-train.json",
}


def retrieved(part):
    query = json.dumps({"query": part["question"]}, ensure_ascii=False)
    return [("assistant", ("retrieve", query)), ("tool", part["paragraph"])]


def test_every_turn_of_a_multi_hop_question_is_trained(convert, encoder):
    row, warnings = convert(MULTI_HOP)
    first, second = map(retrieved, MULTI_HOP["sub_questions"])
    final = MULTI_HOP["final_answer"]
    assert brief(row) == [("user", MULTI_HOP["question"]), *first, *second, ("assistant", final)]
    assert [tool["function"]["name"] for tool in row["tools"]] == ["retrieve"] and not warnings
    assert row.keys() - {"messages", "tools"} == {"multihop", "answer", "meta_info", "tag"}

    conversation = parse_conversation(row)
    trained = []
    for end in sorted(chunk_ends(conversation)):  # the samples that training makes of the row
        sample = encoder.encode_conversation(conversation.up_to(end))
        tokens = [token for token, mask in zip(sample.tokens, sample.masks) if mask]
        trained.append(encoder.instruct_tokenizer.tokenizer.decode(tokens))
    whole = encoder.encode_conversation(conversation)
    kept = [token for token, mask in zip(whole.tokens, whole.masks) if mask]
    trained.append(encoder.instruct_tokenizer.tokenizer.decode(kept))
    found = "\n".join(trained)
    for part in MULTI_HOP["sub_questions"]:
        assert part["question"] in found and part["paragraph"] not in found
    assert final in found and MULTI_HOP["question"] not in found


def test_a_single_question_is_retrieved_once(convert):
    part = MULTI_HOP["sub_questions"][0]
    row, _ = convert(MULTI_HOP | {"question": part["question"], "sub_questions": [part], "multihop": False})
    assert brief(row)[:-1] == [("user", part["question"]), *retrieved(part)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sub_questions": []}, "`sub_questions` is not a list with entries"),
        ({"sub_questions": ["Quand ?"]}, "an entry of `sub_questions` is not an object"),
        ({"sub_questions": [{"question": "Quand ?"}]}, "`sub_questions.paragraph` is not a string with text"),
        ({"final_answer": None}, "`final_answer` is not a string with text"),
        ({"question": " "}, "`question` is not a string with text"),
    ],
)
def test_multi_hop_questions_that_lack_a_part_are_skipped(change, reason):
    assert skipped(MULTI_HOP | change) == reason


def test_flat_calls_and_parameters_are_read(convert):
    for call in ({"name": "f", "parameters": {"x": 1}}, {"id": "call_1", "name": "f", "arguments": {"x": 1}}):
        row, _ = convert({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
        assert brief(row)[1] == ("assistant", ("f", '{"x": 1}'))
