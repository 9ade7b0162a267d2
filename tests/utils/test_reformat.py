"""reformat_data and reformat_data_glaive: what they keep, skip and report, and that no file is ever lost."""

import ast
import contextlib
import copy
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.cli import run_cli
from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder, SampleType
from model.errors import UserError
from utils import reformat_data, reformat_data_glaive
from utils.tables.chat_rows import reformat_row
from utils.tables.jsonl import LineReport, SkippedRowError
from utils.tables.rewrite import call_ids, rewrite_jsonl
from utils.tables.tool_calls import json_arguments, link_tool_calls

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "reformat"


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def copied(name, tmp_path):
    return Path(shutil.copy(FIXTURES / name, tmp_path / name))


def convert_row(row, convert=reformat_row):
    warnings = []
    return convert(row, call_ids(0), warnings.append), warnings


def convert_messages(*messages, **row):
    return convert_row({"messages": list(messages), **row})[0]["messages"]


def user(content="a"):
    return {"role": "user", "content": content}


def assistant(content="b"):
    return {"role": "assistant", "content": content}


def calls(*functions):
    return {"role": "assistant", "tool_calls": list(functions)}


def call(name="f", arguments="{}", **more):
    return {"function": {"name": name, "arguments": arguments}, **more}


def answer(content="1", **more):
    return {"role": "tool", "content": content, **more}


def without_ids(value):
    if isinstance(value, dict):
        return {key: without_ids(item) for key, item in value.items() if key not in ("id", "tool_call_id")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def assert_trainable(row):
    """mistral-common's own finetuning validator accepts the row, and our encoder finds something to train on."""
    validator = get_validator(TokenizerVersion.v3, mode=ValidationMode.finetuning)
    conversation = parse_conversation(row)
    validator.validate_messages(conversation.messages)
    for tool in conversation.tools or []:
        validator._validate_function(tool.function)
    sample = SampleEncoder(MistralTokenizer.v3().instruct_tokenizer).encode(row, SampleType.INSTRUCT)
    assert any(sample.masks)


# What the original wrote, where it was right


def test_reformat_data_matches_the_original_and_keeps_tool_calls(tmp_path):
    path = copied("reformat_data.jsonl", tmp_path)
    result = rewrite_jsonl(path, reformat_row)
    rows = read_rows(path)
    with_tools = [row for row in rows if any("tool_calls" in message for message in row.get("messages", []))]
    assert [row for row in rows if row not in with_tools] == read_rows(FIXTURES / "reformat_data.out.jsonl")
    assert (result.read, result.skipped.count) == (11, 4)
    assert len(with_tools) == 3
    for row in with_tools:
        assert_trainable(row)
    assert with_tools[0]["messages"][1]["tool_calls"][0]["function"] == {
        "name": "get_weather",
        "arguments": '{"town":   "Brest"}',
    }
    assert with_tools[0]["messages"][2]["role"] == "tool"
    assert with_tools[0]["tools"][0]["function"]["name"] == "get_weather" and "functions" not in with_tools[0]


def test_reformat_glaive_matches_the_original_except_for_json_arguments(tmp_path):
    path = copied("glaive.jsonl", tmp_path)
    result = rewrite_jsonl(path, reformat_row)
    ours, theirs = read_rows(path), read_rows(FIXTURES / "glaive.out.jsonl")[:-1]
    for row in theirs:
        for message in row["messages"]:
            for theirs_call in message.get("tool_calls", []):
                function = theirs_call["function"]
                function["arguments"] = ast.literal_eval(function["arguments"] or "{}")
    for row in ours:
        assert_trainable(row)
        for message in row["messages"]:
            for our_call in message.get("tool_calls", []):
                our_call["function"]["arguments"] = json.loads(our_call["function"]["arguments"])
    assert without_ids(ours) == without_ids(theirs)
    assert result.skipped.count == 3  # the original removes the turn of an unknown speaker without a word


def test_a_single_glaive_row_is_converted(tmp_path):
    path = write_rows(tmp_path / "one.jsonl", read_rows(FIXTURES / "glaive.jsonl")[:1])
    assert "Kept: 1" in str(rewrite_jsonl(path, reformat_row))
    assert len(read_rows(path)) == 1


# Rows of chat


def test_messages_after_the_last_answer_are_removed():
    assert convert_messages(user(), assistant(), user("and?"), answer()) == [user(), assistant()]
    assert convert_messages(user(), calls(call()), answer())[-1]["tool_calls"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": None}, "`messages` is not a list"),
        ({"messages": []}, "no assistant message"),
        ({"messages": [user()]}, "no assistant message"),
        ({"messages": [user(), assistant("")]}, "an empty message"),
        ({"messages": [user(" \n"), assistant()]}, "an empty message"),
        ({"messages": [user(), {"role": "assistant"}]}, "an empty message"),
        ({"messages": [{"role": "system", "content": ""}, user(), assistant()]}, "an empty message"),
        ({"messages": [{"content": "a"}, assistant()]}, "a message without a `role`"),
        ({"messages": ["a", assistant()]}, "a message without a `role`"),
        (
            {"messages": [user(), calls(call(arguments="not json"))]},
            "the arguments of a tool call are not a JSON object",
        ),
        ({"messages": [user(), calls(call(arguments="[1]"))]}, "the arguments of a tool call are not a JSON object"),
        ({"messages": [user(), calls({"function": {}})]}, "a tool call has no function name"),
        ({"messages": [user(), calls("f")]}, "`tool_calls` is not a list of objects"),
        (
            {"messages": [user(), {**calls(call()), "function_call": {"name": "f"}}]},
            "both `function_call` and `tool_calls`",
        ),
        (
            {"messages": [user(), calls(call("p")), answer(name="q"), assistant()]},
            "a tool message matches no unanswered call before it",
        ),
        (
            {"messages": [user(), calls(call(id="call_1")), answer(tool_call_id="call_2"), assistant()]},
            "a tool message matches no unanswered call before it",
        ),
        ({"messages": [user(), assistant()], "functions": [{}]}, "a function description has no name"),
        ({"messages": [user(), assistant()], "functions": {"name": "f"}}, "`functions` is not a list"),
        (
            {"messages": [user(), assistant()], "functions": [{"name": "f"}], "tools": [{}]},
            "both `functions` and `tools`",
        ),
    ],
)
def test_unconvertible_rows_are_skipped_with_a_reason(row, reason):
    with pytest.raises(SkippedRowError) as skip:
        convert_row(row)
    assert skip.value.reason == reason


@pytest.mark.parametrize("row", [{"text": "a document", "id": 3}, {"text": "a mail", "from": "Bob", "role": "author"}])
def test_rows_without_a_conversation_are_unchanged(row):
    assert convert_row(row) == (row, [])


def test_messages_and_interactions_are_converted():
    row = {"interactions": [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}, {"role": "user"}]}
    assert convert_row(row)[0] == {"interactions": row["interactions"][:2]}


def test_an_answer_without_a_call_is_skipped():
    with pytest.raises(SkippedRowError, match="a function response without a call"):
        convert_messages(user(), assistant(), answer(), assistant())


def test_the_given_row_is_not_modified():
    for row in read_rows(FIXTURES / "reformat_data.jsonl"):
        before = copy.deepcopy(row)
        with contextlib.suppress(SkippedRowError):
            convert_row(row)
        assert row == before


def test_a_function_description_needs_no_parameters():
    row = {"messages": [user(), assistant()], "functions": [{"name": "now", "parameters": None}]}
    converted, _ = convert_row(row)
    assert converted["tools"] == [
        {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}
    ]
    assert_trainable(converted)


def test_empty_functions_and_null_calls_mean_none():
    row = {"messages": [user(), {**assistant(), "function_call": None, "tool_calls": []}], "functions": []}
    assert convert_row(row)[0] == {"messages": [user(), assistant()]}


def test_tool_answers_may_be_empty_and_objects_become_json():
    messages = convert_messages(user(), calls(call(), call()), answer(""), answer({"degré": 9}), assistant())
    assert [message["content"] for message in messages[2:4]] == ["", '{"degré": 9}']
    assert_trainable({"messages": messages})


def test_content_next_to_a_call_is_kept_with_a_warning():
    row = {"messages": [user(), {**assistant("Let me see."), "function_call": {"name": "p", "arguments": "{}"}}]}
    converted, warnings = convert_row(row)
    assert converted["messages"][1]["content"] == "Let me see."
    assert converted["messages"][1]["tool_calls"][0]["function"]["name"] == "p"
    assert len(warnings) == 1 and "before v7" in warnings[0]


# Arguments and ids


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ({"kg": 70, "é": None}, '{"kg": 70, "é": null}'),
        ('{"kg":  70}', '{"kg":  70}'),
        ("{'kg': 70, 'ok': True, 'no': None}", '{"kg": 70, "ok": true, "no": null}'),
        ("", "{}"),
        (None, "{}"),
    ],
)
def test_arguments_are_json(arguments, written):
    assert json_arguments(arguments) == written


@pytest.mark.parametrize("arguments", ["x", "[1]", "3", 3, [], "{'a': {1, 2}}", "{" * 10_000, '"{}"'])
def test_other_arguments_are_rejected(arguments):
    with pytest.raises(SkippedRowError):
        json_arguments(arguments)


def test_missing_ids_are_nine_alphanumerics_shared_by_call_and_answer():
    linked = link_tool_calls([user(), calls(call("p", id=None)), answer(name="p"), assistant()], call_ids(0))
    call_id = linked[1]["tool_calls"][0]["id"]
    assert linked[2]["tool_call_id"] == call_id
    assert len(call_id) == 9 and set(call_id) <= set(string.ascii_letters + string.digits)


def test_valid_ids_are_kept_even_if_only_one_side_has_them():
    both = [calls(call(id="abcdefgh1")), answer(tool_call_id="abcdefgh1")]
    assert link_tool_calls(both, call_ids(0)) == both
    for messages in (
        [calls(call(id=None)), answer(tool_call_id="abcdefgh1")],
        [calls(call(id="abcdefgh1")), answer()],
    ):
        assert link_tool_calls(messages, call_ids(0)) == both


def test_foreign_ids_are_replaced_on_both_sides_and_answers_may_come_in_any_order():
    messages = [calls(call("p", id="call_p"), call("p", id="call_q")), answer("q", tool_call_id="call_q"), answer("p")]
    linked = link_tool_calls(messages, call_ids(0))
    first, second = (one["id"] for one in linked[0]["tool_calls"])
    assert linked[1]["tool_call_id"] == second != first == linked[2]["tool_call_id"]
    assert len({first, second}) == 2 and all(len(one) == 9 for one in (first, second))


def test_answers_without_ids_are_matched_by_name_then_by_order():
    messages = [calls(call("p", id=None), call("q", id=None), call("q", id=None))]
    messages += [answer(name="q"), answer(name="p"), answer()]
    linked = link_tool_calls(messages, call_ids(0))
    p, q1, q2 = (one["id"] for one in linked[0]["tool_calls"])
    assert [message["tool_call_id"] for message in linked[1:]] == [q1, p, q2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([None, "null", "call_", "valid"])), max_size=4), st.data())
def test_linked_conversations_are_valid_and_linking_twice_changes_nothing(turns, data):
    messages = [user()]
    for number, (parallel, id_kind) in enumerate(turns):
        written = [
            {"call_": f"call_{number}_{i}", "valid": f"abcdefg{number}{i}"}.get(id_kind, id_kind) for i in range(3)
        ]
        messages.append(calls(*(call(f"f{i}", id=written[i]) for i in range(parallel))))
        answers = [answer(str(i), name=f"f{i}", tool_call_id=written[i]) for i in range(parallel)]
        messages += data.draw(st.permutations(answers))
        messages.append(assistant())
    messages.append(assistant())
    linked = link_tool_calls(messages, call_ids(1))
    assert_trainable({"messages": linked})
    assert link_tool_calls(linked, call_ids(2)) == linked
    for before, after in zip(messages, linked):
        if before["role"] == "tool":
            names = {one["id"]: one["function"]["name"] for turn in linked for one in turn.get("tool_calls", [])}
            assert names[after["tool_call_id"]] == after["name"]


# Glaive rows


def glaive(*turns, description="{}"):
    return {
        "function_description": description,
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
    }


BMI = '{"name": "bmi", "description": "IMC", "parameters": {"type": "object", "properties": {}}}'


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "bmi", "arguments": {"kg": 70}}', {"kg": 70}),
        ("""{"name": "bmi", "arguments": '{"kg": 70}'}""", {"kg": 70}),
        ("""{"name": "bmi", "arguments": '{"who": "l'homme", "ok": true}'}""", {"who": "l'homme", "ok": True}),
        ("""{"name": "bmi", "arguments": '{"text": "a\\nb \\"c\\""}'}""", {"text": 'a\nb "c"'}),
        ("""{"name": "bmi", "arguments": '{"who": "l\\'homme"}'}""", {"who": "l'homme"}),
        ("""{'name': 'bmi', 'arguments': {'ok': True}}""", {"ok": True}),
        ('{"name": "bmi"}', {}),
    ],
)
def test_glaive_calls_are_parsed_in_every_quoting(written, arguments):
    row = glaive(
        ("human", "?"), ("function-call", written), ("function-response", "22"), ("gpt", "22"), description=BMI
    )
    converted, _ = convert_row(row, reformat_row)
    assert json.loads(converted["messages"][1]["tool_calls"][0]["function"]["arguments"]) == arguments
    assert_trainable(converted)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (glaive(("human", "a"), ("gpt", "b"), description="{broken"), "`function_description` is not JSON"),
        (glaive(("human", "a"), ("gpt", "b"), description='{"x": 1}'), "a function description has no name"),
        (glaive(("human", "a"), ("function-call", "garbage {")), "a function call cannot be parsed"),
        (glaive(("human", "a"), ("function-response", "1"), ("gpt", "b")), "a function response without a call"),
        (
            glaive(
                ("human", "a"),
                ("function-call", '[{"name": "f"}, {"name": "f"}]'),
                ("function-response", "1"),
                ("gpt", "b"),
            ),
            "a function call without a response",
        ),
        ({"conversations": [{"from": "human"}]}, "a turn of `conversations` without a `value`"),
        (glaive(("human", "a")), "no assistant message"),
    ],
)
def test_unparsable_glaive_rows_are_skipped_with_a_reason(row, reason):
    with pytest.raises(SkippedRowError) as skip:
        convert_row(row, reformat_row)
    assert skip.value.reason == reason


def test_only_repeated_functions_are_removed_from_the_system_prompt():
    system = "You have well-known functions. Use them if required -"
    row = glaive(("system", system + BMI), ("human", "a"), ("gpt", "b"), description=BMI)
    assert convert_row(row, reformat_row)[0]["messages"][0]["content"] == system.removesuffix(" -")


# The file


def test_the_same_seed_gives_the_same_file(tmp_path):
    texts = []
    for seed in (0, 0, 1):
        path = copied("glaive.jsonl", tmp_path)
        rewrite_jsonl(path, reformat_row, seed=seed)
        texts.append(path.read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]


def test_a_converted_file_is_not_written_again(tmp_path):
    path = copied("reformat_data.jsonl", tmp_path)
    rewrite_jsonl(path, reformat_row)
    first = path.stat()
    result = rewrite_jsonl(path, reformat_row, seed=7)
    assert (result.changed, result.backup) == (0, None)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


def test_backups_are_kept_and_never_overwritten(tmp_path):
    path = copied("reformat_data.jsonl", tmp_path)
    original = path.read_bytes()
    assert rewrite_jsonl(path, reformat_row).backup.read_bytes() == original
    second = write_rows(path, [{"messages": [user(), assistant(), user()]}]).read_bytes()
    result = rewrite_jsonl(path, reformat_row)
    assert (result.backup.name, result.backup.read_bytes()) == ("reformat_data.jsonl.bak1", second)
    assert (tmp_path / "reformat_data.jsonl.bak").read_bytes() == original


def test_no_backup_writes_no_other_file(tmp_path):
    rewrite_jsonl(copied("reformat_data.jsonl", tmp_path), reformat_row, backup=False, allow_skipped=True)
    assert [file.name for file in tmp_path.iterdir()] == ["reformat_data.jsonl"]


def test_a_file_without_a_usable_row_is_not_replaced(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n1,bonjour\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.csv is not jsonl: its first line .* `python -m utils.import_data"):
        rewrite_jsonl(path, reformat_row)
    assert path.read_text(encoding="utf-8") == "id,text\n1,bonjour\n"
    assert list(tmp_path.iterdir()) == [path]


ROW = {"messages": [user("Compte rendu confidentiel"), assistant()]}
GOOD_LINE = json.dumps(ROW)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("blank", ["", "\n", "\ufeff"])
def test_a_json_list_becomes_jsonl(indent, blank, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [user(f"é {n}"), assistant("[1],\n")], "id": n} for n in range(30)]
    path.write_text(blank + json.dumps([*rows, 5], indent=indent, ensure_ascii=False) + blank.strip("\ufeff"), "utf-8")
    before = path.read_bytes()
    result = rewrite_jsonl(path, reformat_row)
    assert read_rows(path) == rows and result.backup.read_bytes() == before
    assert (result.read, result.changed, result.skipped.count) == (31, 0, 1)
    assert "was a JSON list" in str(result) and "not a valid JSON object: row 31" in str(result)


def test_an_empty_json_list_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(" [ ]\n", encoding="utf-8")
    with pytest.raises(UserError, match="it has no rows"):
        rewrite_jsonl(path, reformat_row)


NOT_JSONL = {
    "a truncated list": (
        f"[\n{GOOD_LINE},\n{GOOD_LINE},\n{GOOD_LINE}",
        "begins like a JSON list but is not valid JSON",
    ),
    "a list with a comma too many": (f"[{GOOD_LINE},]", "begins like a JSON list but is not valid JSON"),
    "rows with commas": (f"{GOOD_LINE},\n{GOOD_LINE},\n{GOOD_LINE}", "its first line and 1 others are not rows"),
    "a list in an object": (f'{{"data": [\n{GOOD_LINE},\n{GOOD_LINE}\n]}}', "its first line and 2 others are not rows"),
    "an object over several lines": (json.dumps(ROW, indent=1), "its first line and .* are not rows"),
    "an object of columns": (json.dumps({"messages": {"0": ROW["messages"]}}), "`messages` is not a list: line 1"),
    "columns of Alpaca": (json.dumps({"instruction": ["q"], "output": ["a"]}), "`instruction` is not a string: line 1"),
    "one conversation": (json.dumps(ROW["messages"]), "a single message, not a row .*: rows 1, 2"),
    "conversations without rows": (f"{json.dumps(ROW['messages'])}\n" * 3, "its first line and 2 others are not rows"),
    "a list, then a row": (f"[{GOOD_LINE}, {GOOD_LINE}]\n{GOOD_LINE}\n", "its first line and 0 others are not rows"),
    "csv": ('id,text\n1,"bonjour"\n', "its first line and 1 others are not rows"),
    "other columns": (
        '{"prompt": "q", "completion": "a"}\n',
        r"its keys: prompt, completion.*\n`python -m utils.import",
    ),
    "UTF-16": (GOOD_LINE.encode("utf-16"), "begins like text in UTF-16.*Save it as UTF-8"),
    "UTF-16 without a mark": (GOOD_LINE.encode("utf-16-le"), "NUL bytes.*Save it as UTF-8"),
    "parquet": (b"PAR1" + bytes(100), "begins like a parquet table.*`python -m utils.import_data"),
    "gzip": (b"\x1f\x8b" + bytes(100), "begins like a gzip archive"),
    "nothing": ("\n", "it has no rows"),
}


@pytest.mark.parametrize("kind", NOT_JSONL)
def test_a_file_of_another_kind_is_refused_and_unchanged(kind, tmp_path, run_command):
    content, sentence = NOT_JSONL[kind]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = path.read_bytes()
    for options in ([], ["--no_backup", "--allow_skipped"]):
        code, output = run_command(reformat_data, path, *options)
        assert code == 1 and "is unchanged" in output and re.search(sentence, output, re.DOTALL), output
        assert "confidentiel" not in output
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_rows_without_a_known_layout_stay_next_to_others(tmp_path):
    lines = [GOOD_LINE, '{"prompt": "q"}', json.dumps({"messages": [user(), assistant(), user()]})]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    result = rewrite_jsonl(path, reformat_row)
    assert path.read_text(encoding="utf-8").splitlines()[:2] == lines[:2]
    assert "no layout that is known, kept as it is: line 2 (line 2: its keys: prompt)" in str(result)
    assert "messages after the last answer removed: line 3\n" in str(result)


def test_left_out_rows_end_in_exit_code_1_unless_allowed(tmp_path, run_command):
    content = f"{GOOD_LINE}\n{{}}}}\n{json.dumps({'messages': [user()]})}\n".encode()
    path = tmp_path / "rows.jsonl"
    for options, expected in (([], 1), (["--allow_skipped"], 0), (["--allow_skipped", "--no_backup"], 0)):
        path.write_bytes(content)
        code, output = run_command(reformat_data, path, *options)
        assert code == expected and path.read_text(encoding="utf-8") == GOOD_LINE + "\n"
        assert "not a valid JSON object: line 2" in output and "no assistant message: line 3" in output
    assert [(tmp_path / f"rows.jsonl.bak{number}").read_bytes() for number in ("", "1")] == [content] * 2
    assert code == 0 and not (tmp_path / "rows.jsonl.bak2").exists()
    path.write_bytes(content)
    code, output = run_command(reformat_data, path, "--no_backup")
    assert code == 1 and path.read_bytes() == content and "2 of 3 rows of" in output and "line 3" in output


def test_nothing_is_replaced_before_the_report_is_printed(tmp_path):
    path = copied("reformat_data.jsonl", tmp_path)
    original = path.read_bytes()

    def fail(result):
        raise UnicodeEncodeError("cp1252", "患", 0, 1, "cannot be printed")

    with pytest.raises(UnicodeEncodeError):
        rewrite_jsonl(path, reformat_row, announce=fail)
    assert path.read_bytes() == original and not list(tmp_path.glob(".*"))


def test_a_crash_changes_nothing(tmp_path):
    path = copied("glaive.jsonl", tmp_path)
    original = path.read_bytes()
    rows = iter(range(3))

    def crash(row, new_id, warn):
        if next(rows) == 2:
            raise RuntimeError("power cut")
        return reformat_row(row, new_id, warn)

    with pytest.raises(RuntimeError):
        rewrite_jsonl(path, crash)
    assert path.read_bytes() == original and list(tmp_path.iterdir()) == [path]


def test_invalid_lines_do_not_affect_other_rows(tmp_path):
    good = json.dumps({"messages": [user("é"), assistant("b\u2028c")]}, ensure_ascii=False).encode()
    lines = [
        b"\xef\xbb\xbf" + good,
        b"hello",
        b'{"a": "\xe9"}',
        b"[1]",
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b"",
        good,
    ]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\r\n".join(lines) + b"\r" + good)
    result = rewrite_jsonl(path, reformat_row)
    assert path.read_bytes() == (good + b"\n") * 3
    assert (result.read, result.skipped.count) == (8, 5)
    assert "not a valid JSON object: lines 2, 3, 4, 5, 6" in str(result)


def test_a_call_whose_text_has_no_utf8_is_skipped(tmp_path):
    broken = glaive(("human", "a"), ("function-call", '{"name": "f", "arguments": {"a": "\\ud800"}}'))
    path = write_rows(tmp_path / "data.jsonl", [broken, glaive(("human", "a"), ("gpt", "b"))])
    assert "an unpaired surrogate, which is not a character: line 1" in str(rewrite_jsonl(path, reformat_row))


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_permissions_are_those_of_the_original_at_all_times(mode, tmp_path):
    path = copied("reformat_data.jsonl", tmp_path)
    path.chmod(mode)
    seen = []

    def look(row, new_id, warn):
        seen.extend(file.stat().st_mode & 0o777 for file in tmp_path.glob(".*"))
        return reformat_row(row, new_id, warn)

    backup = rewrite_jsonl(path, look).backup
    assert set(seen) == {0o600} and {file.stat().st_mode & 0o777 for file in (path, backup)} == {mode}


def test_a_symlink_is_preserved(tmp_path):
    path = copied("reformat_data.jsonl", tmp_path)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    rewrite_jsonl(link, reformat_row)
    assert link.is_symlink() and len(read_rows(path)) == 7


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for rows in (10, 300, 2000):  # the first one fills caches
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number in range(rows):
                file.write(json.dumps({"messages": [user("x" * 200), assistant("b" * (number % 2))]}) + "\n")
        tracemalloc.start()
        rewrite_jsonl(path, reformat_row)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1]


def test_a_report_lists_the_first_lines_and_counts_the_rest():
    report = LineReport()
    for line in range(1, 3001):
        report.add(line, "broken", f"row {line}")
    report.add(3001, "empty")
    assert str(report) == (
        f"  broken: lines {', '.join(map(str, range(1, 21)))} and 2,980 more (line 1: row 1)\n  empty: line 3001"
    )


def test_reasons_beyond_a_hundred_are_counted_together():
    report = LineReport()
    for line in range(1, 151):
        report.add(line, f"reason {line}")
    report.add(151, "reason 1", times=3)
    assert report.count == 151 and len(str(report).splitlines()) == 101
    assert "  other reasons: lines 101, 102, " in str(report) and "and 30 more (line 101: reason 101)" in str(report)
    assert "  reason 1: lines 1, 151 (4 in total)" in str(report)


@pytest.mark.parametrize(
    ("tool", "fixture"), [(reformat_data, "reformat_data.jsonl"), (reformat_data_glaive, "glaive.jsonl")]
)
def test_the_commands(tool, fixture, tmp_path, monkeypatch, capsys):
    path = copied(fixture, tmp_path)
    monkeypatch.setattr(sys, "argv", [tool.__name__, str(path), "--no_backup", "--allow_skipped"])
    run_cli(tool.main)
    assert "Skipped: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_a_user_error_is_one_line_and_exit_code_1(tmp_path):
    missing = tmp_path / "missing.jsonl"
    command = [sys.executable, "-m", "utils.reformat_data", str(missing)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"error: {missing} does not exist.\n")


def test_output_that_the_stream_cannot_encode_is_escaped(tmp_path):
    path = tmp_path / "患者.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "患者", "content": "q"}, assistant()]}) + f"\n{GOOD_LINE}", "utf-8"
    )
    command = [sys.executable, "-m", "utils.reformat_data", str(path)]
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert rb"\u60a3\u8005.jsonl.bak" in done.stdout and b"the unknown speaker: line 1" in done.stdout


def test_call_ids_are_reproducible_without_the_global_generator():
    state = random.getstate()
    assert [call_ids(3)() for _ in range(2)] == [call_ids(3)()] * 2
    assert random.getstate() == state
