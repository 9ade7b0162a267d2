"""Rows -> tokens and loss masks: equal to mistral-finetune and mistral-common; every kind of invalid row."""

import copy
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.data.conversation import chunk_ends, parse_conversation
from finetune.data.exceptions import (
    ConversationFormatError,
    JsonError,
    MessageFormatError,
    PretrainFormatError,
    RowError,
)
from finetune.data.rows import parse_row
from finetune.data.tokenize import SampleEncoder, SampleType, TokenSample
from finetune.data.tokenizer_files import load_instruct_tokenizer
from model.errors import UserError
from tests.support.golden import GOLDEN, fixture, instruct_tokenizer, load_json_gz, load_jsonl_gz, unfold_mask
from tests.support.tiny_tekken import load_tiny_tekken, write_tiny_tekken

VERSIONS = ("v3", "v7", "v11", "v13", "v15")
GOLDEN_TOKENS = {"v3": "v3_spm", "tekken": "v3_tekken"}
GOLDEN_FILES = (
    "train_icd.jsonl",
    "pretrain.jsonl",
    "instruct.jsonl",
    "function_calling.jsonl",
    "function_calling_parallel.jsonl",
    "eval_instruct.jsonl",
    "folder/a.jsonl",
    "folder/b.jsonl",
    "folder/sub/c.jsonl",
    "folder/odd_name_jsonl",
)
# Invalid for mistral-finetune, valid for us or for current mistral-common.
VALID_BAD_FILES = {"system_content_empty", "user_after_tool", "only_last_null", "tool_call_parallel_then_answer"}
VALID_BAD_FILES |= {"assistant_content_list", "system_content_list"}
VALID_BAD_FILES |= {"tool_function_missing", "tool_parameters_missing", "tool_parameters_null"}  # OpenAI's spellings

CALL = {"id": "abcdefghi", "function": {"name": "meteo", "arguments": '{"ville": "Brest"}'}}
TOOL = {"type": "function", "function": {"name": "meteo", "description": "Le temps", "parameters": {}}}
TOOL_ROW = {
    "messages": [
        {"role": "system", "content": "Tu es utile."},
        {"role": "user", "content": "Bonjour"},
        {"role": "assistant", "content": "Salut !", "weight": 1},
        {"role": "user", "content": "Météo à Brest ?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"ciel": "bleu"}', "tool_call_id": "abcdefghi", "name": "meteo"},
        {"role": "assistant", "content": "Il fait beau.", "weight": 1},
    ],
    "tools": [TOOL],
}


@pytest.fixture(scope="module", params=VERSIONS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MistralTokenizer:
    return load_tiny_tekken(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tiny_v3(tmp_path_factory: pytest.TempPathFactory) -> MistralTokenizer:
    return load_tiny_tekken(tmp_path_factory.mktemp("v3"), "v3")


def row(*turns: tuple[str, Any], **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **keys}


def encode(tokenizer: MistralTokenizer, raw: dict[str, Any]) -> TokenSample:
    sample = SampleEncoder(tokenizer.instruct_tokenizer).encode(raw, SampleType.INSTRUCT)
    assert len(sample.tokens) == len(sample.masks)
    return sample


def text(tokenizer: MistralTokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)


def trained(tokenizer: MistralTokenizer, raw: dict[str, Any]) -> list[str]:
    """The text of each run of trained tokens, including control tokens."""
    sample = encode(tokenizer, raw)
    runs = itertools.groupby(zip(sample.tokens, sample.masks), key=lambda pair: pair[1])
    return [text(tokenizer, [token for token, _ in run]) for is_trained, run in runs if is_trained]


# ---- mistral-finetune's tokens ----


def golden_rows(name: str) -> list[dict[str, Any]]:
    """Every row's tokens, with the rows replaced that newer versions of mistral-common encode differently."""
    file = GOLDEN_TOKENS[name]
    newer = load_json_gz(fixture("expected/tokens/rows_that_differ_under_mistral_common_1.5.4.json.gz"))[file]
    replaced = {(item["file"], item["line"]): item for item in newer}
    rows = load_jsonl_gz(fixture(f"expected/tokens/{file}.jsonl.gz"))
    return [replaced.get((item["file"], item["line"]), item) for item in rows]


def golden_line(file: str, line: int) -> bytes:
    return fixture(f"inputs/{file}").read_bytes().splitlines()[line - 1]


def as_sample(item: dict[str, Any]) -> TokenSample:
    return TokenSample(item["tokens"], unfold_mask(item["mask_rle"]))


@pytest.mark.parametrize("name", GOLDEN_TOKENS)
@pytest.mark.parametrize("file", GOLDEN_FILES)
def test_tokens_and_masks_equal_those_of_mistral_finetune(name: str, file: str):
    encoder = SampleEncoder(instruct_tokenizer(name))
    sample_type = SampleType.PRETRAIN if file == "pretrain.jsonl" else SampleType.INSTRUCT
    expected = {item["line"]: as_sample(item) for item in golden_rows(name) if item["file"] == file}
    lines = fixture(f"inputs/{file}").read_bytes().splitlines()
    assert list(expected) == list(range(1, len(lines) + 1))
    wrong = [
        number
        for number, line in enumerate(lines, 1)
        if encoder.encode(parse_row(line), sample_type) != expected[number]
    ]
    assert wrong == []


@pytest.mark.parametrize("name", GOLDEN_TOKENS)
def test_chunks_equal_those_of_mistral_finetune(name: str):
    encoder = SampleEncoder(instruct_tokenizer(name))
    chunks = 0
    for item in golden_rows(name):
        if item["file"] == "pretrain.jsonl":
            continue
        conversation = parse_conversation(parse_row(golden_line(item["file"], item["line"])))
        shorter = [encoder.encode_conversation(conversation.up_to(end)) for end in chunk_ends(conversation)]
        assert shorter == [as_sample(extra) for extra in item["chunk_extra"]], (item["file"], item["line"])
        chunks += len(shorter)
    assert chunks > 50


def test_only_last_is_recognized_as_in_mistral_finetune():
    for item in golden_rows("v3"):
        if item["file"] != "pretrain.jsonl":
            conversation = parse_conversation(parse_row(golden_line(item["file"], item["line"])))
            assert conversation.only_last == item["only_last"], (item["file"], item["line"])


def bad_files() -> dict[str, dict[str, Any]]:
    if GOLDEN is None:
        return {}
    kinds = json.loads((GOLDEN / "inputs/bad/KINDS.json").read_text(encoding="utf-8"))
    return {name: kind for name, kind in kinds.items() if "bad_line" in kind}


def test_every_bad_file_is_rejected_at_its_bad_line():
    encoder = SampleEncoder(instruct_tokenizer("v3"))
    for name, kind in bad_files().items():
        refused = []
        for number, line in enumerate((GOLDEN / f"inputs/bad/{name}.jsonl").read_bytes().splitlines(), 1):
            try:
                sample = encoder.encode(parse_row(line), SampleType(kind["kind"]))
                assert len(sample.tokens) == len(sample.masks)
            except RowError as error:
                refused.append(number)
                assert str(error).strip(), name
        assert refused == ([] if name in VALID_BAD_FILES else [kind["bad_line"]]), name


# ---- loss masks ----


def test_tokens_equal_those_of_mistral_common(tiny: MistralTokenizer):
    conversation = parse_conversation(TOOL_ROW)
    request = ChatCompletionRequest(messages=conversation.messages, tools=conversation.tools)
    assert encode(tiny, TOOL_ROW).tokens == tiny.encode_chat_completion(request).tokens


def test_tokens_equal_those_of_mistral_common_for_consecutive_messages_of_one_role(tiny: MistralTokenizer):
    if tiny.version.version_num < 7:
        return  # see test_consecutive_messages_of_one_role_are_not_merged_up_to_v3
    raw = row(("user", "un"), ("user", "deux"), ("assistant", "trois"))
    request = ChatCompletionRequest(messages=parse_conversation(raw).messages)
    assert encode(tiny, raw).tokens == tiny.encode_chat_completion(request).tokens
    assert trained(tiny, raw) == ["trois</s>"]


def test_consecutive_messages_of_one_role_are_not_merged_up_to_v3(tiny_v3: MistralTokenizer):
    sample = encode(tiny_v3, row(("user", "un"), ("user", "deux"), ("assistant", "trois")))
    assert text(tiny_v3, sample.tokens) == "<s>[INST]un[/INST][INST]deux[/INST]trois</s>"


def test_every_answer_without_weight_0_is_trained(tiny: MistralTokenizer):
    for weights in itertools.product((None, 0, 1), repeat=3):
        raw = row(*[turn for i in range(3) for turn in (("user", f"q{i}"), ("assistant", f"r{i}"))])
        for message, weight in zip(raw["messages"][1::2], weights):
            message |= {} if weight is None else {"weight": weight}
        assert trained(tiny, raw) == [f"r{i}</s>" for i in range(3) if weights[i] != 0], weights
        is_last = [f"r{i}</s>" for i in range(3) if i == 2 and weights[i] != 0]
        assert trained(tiny, raw | {"only_last": True}) == is_last
        assert trained(tiny, raw | {"tools": [TOOL]}) == is_last


def test_tool_rows_train_only_the_last_answer(tiny: MistralTokenizer):
    assert trained(tiny, TOOL_ROW) == ["Il fait beau.</s>"]


def test_ids_of_the_last_tool_calls_are_not_trained(tiny: MistralTokenizer):
    calls = [CALL, CALL | {"id": "ihgfedcba"}]
    raw = {"messages": [*TOOL_ROW["messages"], {"role": "user", "content": "Et Nice ?"}], "tools": [TOOL]}
    raw["messages"].append({"role": "assistant", "tool_calls": calls})
    call = '[TOOL_CALLS]meteo[ARGS]{"ville": "Brest"}'
    if tiny.version.version_num < 11:
        call = '{"name": "meteo", "arguments": {"ville": "Brest"}}'
        assert trained(tiny, raw) == [f"[TOOL_CALLS][{call}, {call}]</s>"]
    else:
        assert trained(tiny, raw) == [f"{call}{call}</s>"]
    if tiny.version.version_num < 13:  # from then on no id is encoded
        everything = text(tiny, encode(tiny, raw).tokens)
        assert "abcdefghi" in everything.split("Et Nice ?")[0]


def test_a_chunk_that_ends_with_a_call_does_not_train_its_id(tiny: MistralTokenizer):
    conversation = parse_conversation(TOOL_ROW)
    assert chunk_ends(conversation) == [5, 3]
    encoder = SampleEncoder(tiny.instruct_tokenizer)
    chunks = [encoder.encode_conversation(conversation.up_to(end)) for end in chunk_ends(conversation)]
    trained_texts = [text(tiny, [token for token, mask in zip(chunk.tokens, chunk.masks) if mask]) for chunk in chunks]
    assert "abcdefghi" not in trained_texts[0] and "Brest" in trained_texts[0]
    assert trained_texts[1] == "Salut !</s>"


def test_chunks_end_at_trained_answers_of_only_last_rows():
    weighted = row(*[("user", "q"), ("assistant", "r")] * 4)
    weighted["messages"][3]["weight"] = 0
    assert chunk_ends(parse_conversation(weighted)) == []
    assert chunk_ends(parse_conversation(weighted | {"only_last": True})) == [6, 2]


def test_pretrain_rows_train_everything(tiny: MistralTokenizer):
    encoder = SampleEncoder(tiny.instruct_tokenizer)
    for key in ("text", "content"):
        sample = encoder.encode({key: "Fièvre [INST]"}, SampleType.PRETRAIN)
        assert text(tiny, sample.tokens) == "<s>Fièvre [INST]</s>"
        assert sample.masks == [True] * len(sample.tokens)
    assert len(encoder.encode({"text": ""}, SampleType.PRETRAIN).tokens) == 2


CONTROL = st.sampled_from(["[INST]", "[/INST]", "</s>", "<s>", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]"])
WORDS = st.lists(st.one_of(CONTROL, st.text(st.characters(codec="utf-8"), max_size=8)), min_size=1)
SPOKEN = WORDS.map("".join).map(str.strip).filter(bool)


@given(question=SPOKEN, answer=SPOKEN)
@settings(deadline=None, max_examples=60)
def test_control_tokens_in_text_are_ordinary_text(tiny: MistralTokenizer, question: str, answer: str):
    raw = row(("user", question), ("assistant", answer))
    sample = encode(tiny, raw)
    assert text(tiny, sample.tokens) == f"<s>[INST]{question}[/INST]{answer}</s>"
    assert trained(tiny, raw) == [f"{answer}</s>"]
    control = [token for token in sample.tokens if token < tiny.instruct_tokenizer.tokenizer.num_special_tokens]
    assert len(control) == 4


@pytest.mark.parametrize("name", ["v3", "tekken"])
def test_real_tokenizers_encode_control_tokens_in_text_as_ordinary_text(name: str):
    tokenizer = instruct_tokenizer(name)
    sample = SampleEncoder(tokenizer).encode(
        row(("user", "a [INST] </s> [/INST]"), ("assistant", "b </s> c")), SampleType.INSTRUCT
    )
    for control in ("<s>", "[INST]", "[/INST]", "</s>"):
        assert sample.tokens.count(tokenizer.tokenizer.get_special_token(control)) == 1, control


# ---- details ----


def test_an_empty_available_tools_trains_only_the_last_answer_and_an_empty_tools_does_not(tiny: MistralTokenizer):
    raw = row(("user", "x"), ("assistant", "y"), ("user", "x"), ("assistant", "z"))
    assert trained(tiny, raw | {"available_tools": []}) == ["z</s>"]
    assert trained(tiny, raw | {"tools": []}) == ["y</s>", "z</s>"]
    assert encode(tiny, raw | {"available_tools": []}).tokens == encode(tiny, raw).tokens


def test_weights_of_other_types_are_converted(tiny_v3: MistralTokenizer):
    raw = row(("user", "x"), ("assistant", "y"), ("user", "x"), ("assistant", "z"))
    for weight, expected in (("0", ["z</s>"]), ("1", ["y</s>", "z</s>"]), (True, ["y</s>", "z</s>"]), (0.0, ["z</s>"])):
        raw["messages"][1]["weight"] = weight
        assert trained(tiny_v3, raw) == expected


def test_text_chunks_are_joined_without_separator(tiny_v3: MistralTokenizer):
    chunks = [{"type": "text", "text": "dou"}, {"type": "text", "text": "leur"}]
    joined = encode(tiny_v3, row(("user", "douleur"), ("assistant", "oui")))
    assert encode(tiny_v3, row(("user", chunks), ("assistant", "oui"))) == joined


def test_an_empty_system_message_counts_as_one_and_adds_nothing(tiny_v3: MistralTokenizer):
    turns = (("user", "x"), ("assistant", "y"))
    assert encode(tiny_v3, row(("system", ""), *turns)) == encode(tiny_v3, row(*turns))
    for raw in (row(("system", ""), ("system", "Réponds."), *turns), row(("system", "Ré."), *turns, system_prompt="")):
        with pytest.raises(MessageFormatError, match="Multiple messages with role 'system'"):
            encode(tiny_v3, raw)


def test_system_prompt_is_a_system_message(tiny: MistralTokenizer):
    turns = (("user", "x"), ("assistant", "y"))
    assert encode(tiny, row(*turns, system_prompt="Réponds.")) == encode(tiny, row(("system", "Réponds."), *turns))


def test_both_names_of_a_key_are_accepted(tiny: MistralTokenizer):
    other = {
        "interactions": [
            {("text" if key == "content" else key): value for key, value in message.items()}
            for message in TOOL_ROW["messages"]
        ],
        "available_tools": TOOL_ROW["tools"],
    }
    assert encode(tiny, other) == encode(tiny, TOOL_ROW)


# ---- invalid rows ----


def changed(*path: Any, to: Any) -> bytes:
    """TOOL_ROW with one value replaced."""
    raw = copy.deepcopy(TOOL_ROW)
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return json.dumps(raw, ensure_ascii=False).encode("utf-8")


def without(*path: Any) -> bytes:
    raw = json.loads(changed(*path, to=None))
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return json.dumps(raw).encode("utf-8")


CALL_PATH = ("messages", 4, "tool_calls", 0)
MALFORMED = {
    "not JSON": (b"{'messages': []}", JsonError, "Expecting property name"),
    "cut short": (changed("only_last", to=True)[:-9], JsonError, "line 1 column"),
    "blank": (b"", JsonError, "The line is blank"),
    "not UTF-8": (b'{"messages": "\xe9"}', JsonError, "Byte 15 is not valid UTF-8"),
    "unpaired surrogate": (rb'{"messages": "\ud83d"}', JsonError, "unpaired surrogate"),
    "nested too deeply": (b"[" * 100_000, JsonError, "nested too deeply"),
    "a list": (b"[]", JsonError, "Expected a JSON object, found a list"),
    "null": (b"null", JsonError, "Expected a JSON object, found null"),
    "a key twice": (b'{"messages": [], "messages": []}', JsonError, "'messages' is repeated"),
    "no messages": (without("messages"), ConversationFormatError, "neither a 'messages' nor an 'interactions'"),
    "both names": (changed("interactions", to=[]), ConversationFormatError, "both a 'messages' and an 'interactions'"),
    "messages no list": (changed("messages", to="x"), ConversationFormatError, "must be a list, found a string"),
    "no message": (changed("messages", to=[]), ConversationFormatError, "at least one message"),
    "message no object": (changed("messages", 1, to="x"), MessageFormatError, "must be an object, found a string"),
    "no role": (without("messages", 1, "role"), MessageFormatError, "does not contain a 'role' key; its keys: content"),
    "unknown role": (changed("messages", 1, "role", to="human"), MessageFormatError, "'human'; expected system"),
    "role no text": (
        changed("messages", 1, "role", to={}),
        MessageFormatError,
        "a role that is an object",
    ),
    "no content": (without("messages", 1, "content"), MessageFormatError, "neither a 'content' nor a 'text'"),
    "content and text": (changed("messages", 1, "text", to="x"), MessageFormatError, "both a 'content' and a 'text'"),
    "content a number": (
        changed("messages", 2, "content", to=3),
        MessageFormatError,
        "must be a string, found a number",
    ),
    "image": (changed("messages", 1, "content", to=[{"type": "image_url"}]), MessageFormatError, "text chunks"),
    "weight 2": (changed("messages", 2, "weight", to=2), ConversationFormatError, "is 2; expected 0 to 1"),
    "weight no number": (changed("messages", 2, "weight", to="un"), MessageFormatError, "invalid `weight`"),
    "last is user": (changed("messages", 6, to={"role": "user", "content": "x"}), ConversationFormatError, "last role"),
    "two system messages": (changed("system_prompt", to="x"), MessageFormatError, "only one is allowed"),
    "user calls": (
        changed("messages", 1, "tool_calls", to=[CALL]),
        MessageFormatError,
        "only an assistant message can",
    ),
    "call without id": (without(*CALL_PATH, "id"), MessageFormatError, "must have an 'id' that is a string"),
    "call id too short": (changed(*CALL_PATH, "id", to="abc"), ConversationFormatError, "Tool call id was abc"),
    "call id with newline": (
        changed(*CALL_PATH, "id", to="abcdefghi\n"),
        ConversationFormatError,
        "A tool message answers|blanks around it",
    ),
    "function name": (
        changed(*CALL_PATH, "function", "name", to="a b"),
        ConversationFormatError,
        "was a string of 3",
    ),
    "calls no list": (changed("messages", 4, "tool_calls", to=CALL), MessageFormatError, "must be a list"),
    "answer without id": (without("messages", 5, "tool_call_id"), MessageFormatError, "'tool_call_id' key"),
    "answer to no call": (
        changed("messages", 5, "tool_call_id", to="zzzzzzzzz"),
        ConversationFormatError,
        "answers the call 'zzzzzzzzz', which no earlier",
    ),
    "tools no list": (changed("tools", to=TOOL), ConversationFormatError, "`tools` must be a list, found an object"),
    "both tools": (
        changed("available_tools", to=[]),
        ConversationFormatError,
        "both an `available_tools` and a `tools`",
    ),
    "tool type": (
        changed("tools", 0, "type", to="retrieval"),
        ConversationFormatError,
        "only 'function' can be trained",
    ),
    "parameters no object": (
        changed("tools", 0, "function", "parameters", to="{}"),
        ConversationFormatError,
        "must be an object, found a string",
    ),
    "schema": (
        changed("tools", 0, "function", "parameters", to={"type": "objet"}),
        ConversationFormatError,
        "Invalid tool schema",
    ),
}


@pytest.mark.parametrize(("line", "kind", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_row_is_rejected_with_its_reason(
    tiny_v3: MistralTokenizer, line: bytes, kind: type[RowError], reason: str
):
    with pytest.raises(kind, match=reason) as caught:
        encode(tiny_v3, parse_row(line))
    assert caught.type is kind


MALFORMED_PRETRAIN = {
    "no text": ({"body": "x"}, "neither a 'text' nor a 'content' key with a value; its keys: body"),
    "null": ({"text": None}, "neither a 'text' nor a 'content'"),
    "both": ({"text": "x", "content": "x"}, "both a 'text' and a 'content'"),
    "a number": ({"text": 3}, "must be a string, found a number"),
    "a conversation": (TOOL_ROW, "its keys: messages, tools"),
}


@pytest.mark.parametrize(("raw", "reason"), MALFORMED_PRETRAIN.values(), ids=MALFORMED_PRETRAIN)
def test_a_malformed_pretrain_row_is_rejected_with_its_reason(
    tiny_v3: MistralTokenizer, raw: dict[str, Any], reason: str
):
    with pytest.raises(PretrainFormatError, match=reason):
        SampleEncoder(tiny_v3.instruct_tokenizer).encode(raw, SampleType.PRETRAIN)


def test_a_schema_nested_too_deeply_is_rejected(tiny_v3: MistralTokenizer):
    schema: dict[str, Any] = {}
    for _ in range(300):
        schema = {"type": "object", "properties": {"inner": schema}}
    with pytest.raises(JsonError, match="nested too deeply"):
        encode(tiny_v3, parse_row(changed("tools", 0, "function", "parameters", to=schema)))


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for path in [path] if path] + [inner for key, item in items for inner in paths(item, (*path, key))]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "user", "tool", "abcdefghi", "é\n"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "text", "id"]), inner),
    max_leaves=4,
)


@given(path=st.sampled_from(paths(TOOL_ROW)), value=VALUES, remove=st.booleans())
@settings(deadline=None, max_examples=250)
def test_any_row_is_encoded_or_rejected(tiny: MistralTokenizer, path: tuple[Any, ...], value: Any, remove: bool):
    line = without(*path) if remove else changed(*path, to=value)
    try:
        encode(tiny, parse_row(line))
    except RowError as error:
        assert str(error)


# ---- choice of the tokenizer ----


@pytest.mark.parametrize(("vocab_size", "is_tekken"), [(32000, False), (32768, False), (32769, True), (131072, True)])
def test_without_a_tokenizer_file_the_vocabulary_size_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_v3: MistralTokenizer, vocab_size: int, is_tekken: bool
):
    asked = []
    monkeypatch.setattr(MistralTokenizer, "v3", lambda is_tekken: asked.append(is_tekken) or tiny_v3)
    assert load_instruct_tokenizer(tmp_path, vocab_size) is tiny_v3.instruct_tokenizer
    assert asked == [is_tekken]


def test_the_models_own_tokenizer_is_used(tmp_path: Path):
    write_tiny_tekken(tmp_path / "tekken.json", "v7")
    tokenizer = load_instruct_tokenizer(tmp_path, 1000).tokenizer
    assert (tokenizer.version.value, tokenizer.n_words) == ("v7", 256 + tokenizer.num_special_tokens)


def test_a_sentencepiece_tokenizer_is_used(tmp_path: Path):
    shutil.copyfile(instruct_tokenizer("v3").tokenizer.file_path, tmp_path / "tokenizer.model.v3")
    tokenizer = load_instruct_tokenizer(tmp_path, 32768).tokenizer
    assert (tokenizer.version.value, tokenizer.n_words) == ("v3", 32768)


def test_two_tokenizers_are_an_error(tmp_path: Path):
    write_tiny_tekken(tmp_path / "tekken.json", "v7")
    (tmp_path / "tokenizer.model.v3").touch()
    with pytest.raises(UserError, match=r"several tokenizers \(tekken.json, tokenizer.model.v3\)"):
        load_instruct_tokenizer(tmp_path, 32768)


def test_a_tokenizer_larger_than_the_model_is_an_error(tmp_path: Path):
    write_tiny_tekken(tmp_path / "tekken.json", "v7")
    with pytest.raises(UserError, match="tokens but the model's vocabulary is 256"):
        load_instruct_tokenizer(tmp_path, 256)


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3", "tokenizer.model.v99"])
@pytest.mark.parametrize("content", ["", "nothing", "[]", "{}", "null", '{"config": 1}'])
def test_a_tokenizer_that_cannot_be_read_is_an_error(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load_instruct_tokenizer(tmp_path, 32768)
