"""Whatever a file contains, a command works or reports what is wrong with it: no other exception, no hang.

`make fuzz` tries 10,000 inputs of each kind instead of 300.
"""

import contextlib
import copy
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from finetune.args import load_train_args, read_train_args
from finetune.data.args import DataArgs, parse_sources
from finetune.data.dataset import build_eval_stream
from finetune.data.exceptions import RowError
from finetune.data.rows import parse_row
from finetune.data.tokenize import SampleEncoder, SampleType
from model.errors import Problem, UserError
from model.weights import open_weights
from tests.finetune.test_tokenize import TOOL_ROW, paths
from tests.support.golden import instruct_tokenizer
from tests.support.tiny_tekken import load_tiny_tekken
from utils.icd10.answers import parse_answer
from utils.tables.chat_rows import reformat_row
from utils.tables.jsonl import LineReport, SkippedRowError
from utils.tables.rewrite import Rewriting, call_ids, rewrite_jsonl

CPU_LIMIT_S = 20  # for one input, of this process, whatever else the machine does; milliseconds are usual
fuzz = settings(
    deadline=None,
    max_examples=max(150, settings.default.max_examples),
    suppress_health_check=list(HealthCheck),
)


@contextlib.contextmanager
def mistakes_only() -> Iterator[None]:
    """Pass if the block works or raises UserError with a readable message, in time."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
    try:
        yield
    except UserError as error:
        assert 0 < len(str(error)) < 30_000
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# ---- inputs

CONTROL = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "<unk>", "[IMG]", "[THINK]"]
ODD = ["", " ", "\0", "\ufeff", "\u2028", "\r\n", "e\u0301", "👩‍⚕️", "\uffff"]
ODD += ["[" * 150, "1" * 5000, "~", "../", "{}", "[[", "NaN"]
TEXTS = st.one_of(
    st.text(max_size=20), st.sampled_from(CONTROL + ODD), st.lists(st.sampled_from(CONTROL + ODD)).map("".join)
)
NAMES = ["messages", "interactions", "role", "content", "text", "weight", "tools", "available_tools", "function"]
NAMES += ["parameters", "name", "description", "arguments", "id", "tool_calls", "tool_call_id", "type", "only_last"]
NAMES += ["conversations", "from", "value", "train", "functions", "function_call", "system", "chat", "instruction"]
NAMES += ["input", "output", "history"]
KEYS = st.one_of(st.sampled_from(NAMES), TEXTS)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -(10**4000), 1e308, -0.0]))
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "function", "developer", "gpt", "observation"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, ROLES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, valid: dict[str, Any], values: st.SearchStrategy[Any] = VALUES) -> dict[str, Any]:
    """Return `valid` with some values replaced, removed or moved to another key, at any depth."""
    result = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        if not (places := paths(result)):
            break
        *above, last = draw(st.sampled_from(places))
        block = result
        for key in above:
            block = block[key]
        match draw(st.sampled_from(["replace", "remove", "rename"])):
            case "replace":
                block[last] = draw(values)
            case "remove":
                del block[last]
            case "rename" if isinstance(block, dict):
                block[draw(KEYS)] = block.pop(last)
    return result


def as_line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")


PLAIN_ROW = {"messages": [{"role": role, "content": "é"} for role in ("system", "user", "assistant")]}
ROWS = st.one_of(mutated(TOOL_ROW), mutated(PLAIN_ROW), st.dictionaries(KEYS, VALUES, max_size=5))


@st.composite
def corrupted(draw: st.DrawFn, valid: bytes) -> bytes:
    """Return `valid` with some bytes changed, removed, repeated or inserted."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(start + draw(st.integers(0, 12)), len(data))
        data[start:end] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[start:end]) * 2)))
    return bytes(data)


LINES = st.one_of(
    st.binary(max_size=200), ROWS.map(as_line), corrupted(as_line(TOOL_ROW)), corrupted(as_line(PLAIN_ROW))
)

# ---- rows


@pytest.fixture(scope="module", params=["v3", "v7", "v15", "sentencepiece"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SampleEncoder:
    if request.param == "sentencepiece":
        return SampleEncoder(instruct_tokenizer("v3"))
    folder = tmp_path_factory.mktemp(request.param)
    return SampleEncoder(load_tiny_tekken(folder, request.param).instruct_tokenizer)


@given(line=LINES)
@example(line=b'{"a":' * 100_000)
@example(line=b'{"a":' + b"9" * 5000 + b"}")
@example(line=b'{"\\ud800": 1, "\\ud800": 2}')
@fuzz
def test_a_line_is_a_row_or_refused(line: bytes):
    with mistakes_only():
        assert isinstance(parse_row(line), dict)


@given(row=ROWS, sample_type=st.sampled_from(SampleType))
@fuzz
def test_a_row_is_encoded_or_refused(encoder: SampleEncoder, row: dict[str, Any], sample_type: SampleType):
    with mistakes_only():
        try:
            sample = encoder.encode(parse_row(as_line(row)), sample_type)
        except RowError as error:  # and no other UserError: the reader adds file and line to these
            assert str(error)
        else:
            assert len(sample.tokens) == len(sample.masks) > 0


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> SampleEncoder:
    return SampleEncoder(load_tiny_tekken(tmp_path_factory.mktemp("v7"), "v7").instruct_tokenizer)


@given(
    lines=st.lists(st.one_of(LINES, st.just(as_line(PLAIN_ROW))), max_size=4),
    ends=st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]),
    packing=st.sampled_from(["concat", "best_fit"]),
)
@fuzz
def test_a_file_is_read_or_its_bad_line_named(
    tmp_path_factory: pytest.TempPathFactory,
    small_encoder: SampleEncoder,
    lines: list[bytes],
    ends: bytes,
    packing: str,
):
    file = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    file.write_bytes(ends.join(lines))
    data = DataArgs(eval_instruct_data=str(file), packing=packing)
    with mistakes_only():
        try:
            for sequence in build_eval_stream(small_encoder, data, 64, 0, 1):
                assert len(sequence.x) == 64
        except UserError as error:
            assert re.search(rf"line \d+ of dataset {re.escape(str(file))}", str(error))
            raise


# ---- reformatting

# Texts that conversion must not lose are zq1, zq2, ...
CALLED = '{"name": "f", "arguments": {"x": "zq3"}}'
FUNCTION = {"name": "f", "description": "zq4", "parameters": {"type": "object", "properties": {"x": {}}}}
TURNS = [("system", "zq1"), ("human", "zq2"), ("function_call", CALLED), ("observation", "zq5"), ("gpt", "zq6")]
HERMES = [
    ("human", "zq1"),
    ("gpt", f"zq2 <tool_call>{CALLED}</tool_call>"),
    ("tool", "<tool_response>zq5</tool_response>"),
]
GLAIVE = "USER: zq1\n\n\nASSISTANT: <functioncall> {} <|endoftext|>\n\n\nFUNCTION RESPONSE: zq5\n\n\nASSISTANT: zq6"
OPENAI_CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": "zq2"}'}}
CHATS = [
    {"conversations": [{"from": speaker, "value": text} for speaker, text in TURNS], "tools": json.dumps([FUNCTION])},
    {"conversations": [{"from": speaker, "value": text} for speaker, text in [*HERMES, *TURNS[-1:]]], "system": "zq7"},
    {"conversations": [{"from": "human", "value": "zq1"}, {"from": "gpt", "value": "zq2", "weight": 0}], "id": "zq8"},
    {"system": f"SYSTEM: zq7 - {json.dumps(FUNCTION)}", "chat": GLAIVE.replace("{}", CALLED)},
    {"instruction": "zq1", "input": "zq2", "output": "zq3", "history": [["zq4", "zq5"]], "system": "zq6"},
    {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "zq5"}]},
            {"role": "user", "content": "zq1"},
            OPENAI_CALL,
            {"role": "function", "name": "f", "content": "zq3"},
            {"role": "assistant", "content": "zq4", "train": True},
        ],
        "functions": [FUNCTION],
    },
    {"prompt": "zq1", "completion": "zq2"},
]
ROLE_OF = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
ROLE_OF |= {"developer": "system", **{role: role for role in ("system", "user", "assistant", "tool")}}
EXCHANGES = [["human", "gpt"], ["user", "assistant"], ["user", "function_call", "observation", "gpt"]]
ODD_SPEAKERS = ["critic", "developer", "system", "gpt", "human", "tool", "function_call"]


@st.composite
def chats(draw: st.DrawFn) -> dict[str, Any]:
    """Return a row whose turns have a text each; some have an odd speaker, or are masked."""
    speakers = [speaker for part in draw(st.lists(st.sampled_from(EXCHANGES), max_size=2)) for speaker in part]
    for odd in draw(st.lists(st.sampled_from(ODD_SPEAKERS), max_size=2)):
        speakers.insert(draw(st.integers(0, len(speakers))), odd)
    keys = draw(st.sampled_from([("from", "value"), ("role", "content")]))
    turns: list[dict[str, Any]] = []
    for number, speaker in enumerate(speakers, start=1):
        text = CALLED.replace("zq3", f"zq{number}") if speaker == "function_call" else f"zq{number}"
        turns.append(
            dict(zip(keys, (speaker, text))) | draw(st.sampled_from([{}, {}, {"weight": 0}, {"train": False}]))
        )
    return {draw(st.sampled_from(["messages", "conversations"])): turns}


CHAT_LINES = st.one_of(
    chats().map(as_line),
    st.sampled_from(CHATS).map(as_line),
    *(mutated(chat).map(as_line) for chat in CHATS),
    corrupted(as_line(CHATS[0])),
    LINES,
)


@st.composite
def chat_files(draw: st.DrawFn) -> bytes:
    """Return jsonl, a JSON list, or a part of one."""
    lines = draw(st.lists(CHAT_LINES, max_size=5))
    match draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "list", "truncated"])):
        case "jsonl":
            return draw(st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"])).join(lines)
        case "list":
            return b"[" + draw(st.sampled_from([b",", b",\n", b"\n,\r\n  "])).join(lines) + b"]\n"
        case _:
            return b"[\n" + b",\n".join(lines)


def row_texts(content: bytes) -> dict[int, str]:
    """Return the rows of jsonl by line, or of a JSON list by position; a naive reader."""
    text = content.decode("utf-8-sig", "surrogateescape")
    try:
        rows = json.loads(text, parse_int=str, parse_float=str)
        if isinstance(rows, list):
            return dict(enumerate(map(json.dumps, rows), start=1))
    except (ValueError, RecursionError):
        pass
    return {number: line for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1) if line.strip()}


def texts_in(line: str) -> set[str]:
    return set(re.findall(r"zq\d", line))


def numbers_in(report: LineReport, reason: str = ".*?") -> set[int]:
    found = re.findall(rf"(?m)^  {reason}: (?:line|row)s? ([\d, ]+)", str(report))
    return {int(number) for numbers in found for number in numbers.split(", ") if number.strip()}


@given(row=chats())
@fuzz
def test_a_chat_keeps_every_turn_or_is_left_out(row: dict[str, Any]):
    turns = row.get("messages") or row.get("conversations") or []
    speakers = [turn.get("role", turn.get("from")) for turn in turns]
    warnings: list[str] = []
    try:
        converted = reformat_row(row, call_ids(0), warnings.append)
    except SkippedRowError:
        return
    assert converted is not None and set(speakers) <= ROLE_OF.keys()
    messages = converted["messages"]
    removed = warnings.count("messages after the last answer removed")
    assert len(messages) == len(turns) - removed and "gpt" not in speakers[len(messages) :]
    for speaker, turn, message in zip(speakers, turns, messages):
        assert message["role"] == ROLE_OF[speaker]
        assert texts_in(json.dumps(message)) == texts_in(json.dumps(turn))
        assert ("tool_calls" in message) == (speaker == "function_call")
        is_masked = not (turn.get("weight", 1) and turn.get("train", True))
        assert (message.get("weight") == 0) == (is_masked and message["role"] == "assistant")


@given(content=chat_files(), backup=st.booleans(), allow_skipped=st.booleans())
@example(content=b"[" * 100_000, backup=False, allow_skipped=True)
@example(content=b"[" + b",".join(map(as_line, CHATS)) + b"]", backup=False, allow_skipped=True)
@example(content=b"\n".join(map(as_line, CHATS)), backup=True, allow_skipped=False)
@fuzz
def test_reformatting_never_loses_a_row_without_a_line(
    tmp_path_factory: pytest.TempPathFactory,
    small_encoder: SampleEncoder,
    content: bytes,
    backup: bool,
    allow_skipped: bool,
):
    folder = tmp_path_factory.getbasetemp() / "reformatted"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    file = folder / "chats.jsonl"
    file.write_bytes(content)
    with mistakes_only():
        try:
            result = rewrite_jsonl(file, reformat_row, backup=backup, allow_skipped=allow_skipped)
        except UserError:
            assert file.read_bytes() == content and list(folder.iterdir()) == [file]
            raise
        check_reformatted(file, content, result, small_encoder)
        assert backup or allow_skipped or not result.skipped.count
        after = file.read_bytes()
        again = rewrite_jsonl(file, reformat_row, seed=1)
        assert file.read_bytes() == after and (again.changed, again.skipped.count) == (0, 0)


def check_reformatted(file: Path, content: bytes, result: Rewriting, encoder: SampleEncoder) -> None:
    """Each row is in the file, with its texts, or named in the report; what was changed can be trained on."""
    after = file.read_bytes()
    if after != content and result.backup is not None:
        assert result.backup.read_bytes() == content
    before = row_texts(content)
    skipped = numbers_in(result.skipped)
    kept = {number: text for number, text in before.items() if number not in skipped}
    assert len(before) == result.read and len(skipped) == result.skipped.count
    written = list(row_texts(after).values())
    assert len(written) == len(kept)
    assert "utils.reformat_data" not in str(result)
    cut = numbers_in(result.warnings, "messages after the last answer removed")
    for (number, old), new in zip(kept.items(), written, strict=True):
        row = json.loads(new)
        assert number in cut or texts_in(old) <= texts_in(new), (old, new)
        if row != json.loads(old):
            sample = encoder.encode(row, SampleType.INSTRUCT)
            assert len(sample.tokens) == len(sample.masks) > 0


# ---- settings

SETTINGS = {
    "model_id_or_path": "model",
    "run_dir": "run",
    "data": {"instruct_data": "a.jsonl:1", "data": "", "instruct": {"shuffle": True}, "keep_sections": ["Conclusion"]},
    "optim": {"lr": 1e-4, "pct_start": 0.1},
    "lora": {"rank": 8, "from_adapter": None},
    "wandb": {"project": "", "key": "0123456789abcdef"},
    "seq_len": 512,
    "no_eval": True,
    "early_stopping": {"patience": 2},
}
PIECES = ["&a ", "*a", "<<: ", "!!python/name:os.system ", "!!int ", "!!binary ", "!!set ", "---\n", "\t", "? "]
PIECES += [": ", "- ", "{", "[", "]", "}", '"', "'", "|\n", "#", "%YAML 1.1\n", "\\ud800", "2024-13-45", "lora"]
PIECES += ["0x" + "f" * 5000, "1:59", ".inf", "~", "on", "wandb.key"]
YAML_TEXTS = st.one_of(
    st.lists(st.one_of(TEXTS, st.sampled_from([*PIECES, *SETTINGS, "\n", "\n  "])), max_size=30).map("".join),
    corrupted(yaml.safe_dump(SETTINGS).encode()).map(lambda data: data.decode("latin-1")),
    mutated(SETTINGS).map(lambda keys: json.dumps(keys)),
    mutated(SETTINGS).map(lambda keys: yaml.safe_dump(keys, allow_unicode=True)),
)


@given(text=YAML_TEXTS, encoding=st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "cp1252"]))
@example(text="a: &a {b: *a}", encoding="utf-8")
@example(
    text="a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)), encoding="utf-8"
)
@example(text=".".join(["data"] * 20_000) + ": 1", encoding="utf-8")
@example(text="seed: 0x" + "f" * 5000, encoding="utf-8")
@fuzz
def test_a_configuration_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str, encoding: str):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(text.encode(encoding, "replace"))
    with mistakes_only():
        read_train_args(file)
    with mistakes_only():
        load_train_args(file)


# ---- sources

SOURCE_PIECES = ["a.jsonl", "b", ":", ",", " ", "~", "C:\\", "1", "1e999", "nan", "-1", "0", "1e-320", "1e308"]
SOURCE_PIECES += ["_", "\n", "\0", "é", "٣", "../"]
SOURCES = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(SOURCE_PIECES), max_size=10).map("".join))


@given(text=SOURCES)
@example(text=("x" * 5000 + ",") * 3)
@fuzz
def test_sources_are_parsed_or_refused(text: str):
    with mistakes_only():
        sources = parse_sources(text)
        assert all(str(source.path) and 0 < source.weight <= 1e9 for source in sources)
        assert sum(source.weight for source in sources) < float("inf")
    if "/" not in text and "." not in text.split(","):  # folders are searched, and these may be large
        with mistakes_only():
            assert all(isinstance(found, Problem) for found in DataArgs(data=text, instruct_data=text).problems())


# ---- answers

ANSWER_PIECES = ["Diagnostic principal", "diagnostics associés significatifs", "relié", "DP", "DAS", "(I10)", "I10"]
ANSWER_PIECES += ["J45.9", "(code", "(cim 10", "C00-D48", "((", "))", "[", "]", " : ", ", ", " - ", "\n", "aucun"]
ANSWER_PIECES += ["vitamine ", "à ", "*", "+", "†", " " * 300, "(" * 300]
ANSWERS = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(ANSWER_PIECES), max_size=40).map("".join))


@given(text=ANSWERS)
@example(text="(" * 20_000 + ")" * 20_000)
@example(text="(code" + " " * 50_000)
@example(text="diagn" * 20_000)
@fuzz
def test_any_answer_can_be_parsed(text: str):
    with mistakes_only():
        diagnoses = parse_answer(text)
    assert len({diagnosis.code for diagnosis in diagnoses}) == len(diagnoses)
    assert all(re.fullmatch(r"\S+", diagnosis.code) for diagnosis in diagnoses)  # invented codes are kept as they are


# ---- weights

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def as_safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(32)


@given(
    content=st.one_of(
        st.binary(max_size=100),
        mutated(HEADER).map(as_line).map(as_safetensors),
        corrupted(as_safetensors(as_line(HEADER))),
    )
)
@example(content=as_safetensors(as_line(HEADER)))
@example(content=as_safetensors(b"[" * 100_000))
@fuzz
def test_weights_are_opened_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(content)
    with mistakes_only():
        weights = open_weights(file)
        for name, shape in weights.shapes.items():
            assert tuple(weights.read(name).shape) == shape
