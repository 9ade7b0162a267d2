"""Malicious and broken files: no code is executed, nothing hangs, memory stays small, and the error is one message."""

import ast
import contextlib
import gzip
import io
import json
import os
import socket
import threading
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from mistral_common.tokens.tokenizers.base import SpecialTokens
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from safetensors.torch import save_file

from finetune.args import TrainArgs, load_train_args
from finetune.data.args import DataArgs, InstructArgs, parse_sources
from finetune.data.dataset import JsonlFile, build_training_stream
from finetune.data.exceptions import BadRowError, JsonError
from finetune.data.rows import MAX_ROW_BYTES, parse_row, read_rows
from finetune.data.tokenize import SampleEncoder, SampleType
from finetune.data.tokenizer_files import load_instruct_tokenizer
from finetune.inference import token_bytes
from finetune.wrapped_model import open_base_model
from model.args import load_model_args
from model.errors import UserError
from model.weights import open_safetensors, open_weights
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.patience import PATIENCE_S
from tests.support.tiny_tekken import load_tiny_tekken, write_tiny_tekken
from utils.tables.jsonl import read_lines
from utils.tables.rewrite import rewrite_jsonl
from utils.validation.check_rows import FileToCheck, RowChecker, Task

ROOT = Path(__file__).parents[2]
MB = 1 << 20
CPU_LIMIT_S = 20  # of this process, whatever else the machine does; milliseconds are usual
ROW = {"messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]}


def refusal(action: Callable[[], object], *, memory: int | None = None) -> str:
    """Return the message of the UserError that `action` raises within CPU_LIMIT_S and a number of bytes, if given."""
    start = time.process_time()
    with counted_memory() if memory else contextlib.nullcontext([0]) as peak, pytest.raises(UserError) as error:
        action()
    assert time.process_time() - start < CPU_LIMIT_S
    assert peak[0] <= (memory or 0)
    assert len(str(error.value)) < 2000
    return str(error.value)


@contextlib.contextmanager
def counted_memory() -> Iterator[list[int]]:
    """Yield a list that contains the peak memory of the block in bytes once it has ended."""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- Code in files


FORBIDDEN_CALLS = {"pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
FORBIDDEN_CALLS |= {"eval", "exec", "joblib.load", "dill.load", "marshal.loads", "shelve.open", "os.system"}


def test_no_source_file_loads_code():
    for folder in ("model", "finetune", "utils", "train.py"):
        for file in [ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    called, options = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
                    assert called not in FORBIDDEN_CALLS, f"{file}:{node.lineno} calls {called}"
                    assert called != "torch.load" or options.get("weights_only") == "True", f"{file}:{node.lineno}"
                    assert "allow_pickle" not in options, f"{file}:{node.lineno}"


class RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "old.bin", "weights.pt"])
def test_pickle_with_code(tmp_path: Path, name: str):
    marker = tmp_path / "executed"
    torch.save({"norm.weight": torch.ones(4), "evil": RunsCode(marker)}, tmp_path / name)
    assert f"{name} cannot be read as a table of tensors" in refusal(lambda: open_weights(tmp_path / name))
    assert not marker.exists()


def test_yaml_with_code(tmp_path: Path):
    config, marker = tmp_path / "config.yaml", tmp_path / "executed"
    config.write_text(f"seed: 1\nrun_dir: !!python/object/apply:os.system ['touch {marker}']\n", encoding="utf-8")
    message = refusal(lambda: load_train_args(config))
    assert "is not valid YAML" in message and "python/object/apply" in message and "(line 2, column 10)" in message
    assert not marker.exists()


# ---- Weights


class WrongSize:
    """A tensor whose size does not fit its storage."""

    def __init__(self, tensor: torch.Tensor, size: tuple[int, ...]) -> None:
        self.tensor, self.size = tensor, size

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        storage = torch.storage.TypedStorage(
            wrap_storage=self.tensor.untyped_storage(), dtype=self.tensor.dtype, _internal=True
        )
        strides = (1,) * len(self.size)
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.size, strides, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_pth_with_a_tensor_larger_than_its_storage(tmp_path: Path):
    torch.save({"a": WrongSize(torch.ones(4), (10**12,))}, tmp_path / "a.pth")
    assert "the end of 'a' according to its table" in refusal(lambda: open_weights(tmp_path / "a.pth"))


def test_compressed_pth_is_not_decompressed(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50 * MB))
    assert "compressed zip archive" in refusal(lambda: open_weights(tmp_path / "a.pth"), memory=16 * MB)


def test_pth_with_unsupported_tensors(tmp_path: Path):
    torch.save({"a": torch.ones(3).to_sparse()}, tmp_path / "a.pth")
    assert "is not a plain, named tensor" in refusal(lambda: open_weights(tmp_path / "a.pth"))
    torch.save({"a\n" * 9: torch.ones(3)}, tmp_path / "a.pth")
    assert "is not a plain, named tensor" in refusal(lambda: open_weights(tmp_path / "a.pth"))


def as_safetensors(header: bytes, data: bytes = bytes(16), length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def entry(**changes: Any) -> str:
    return json.dumps({"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes)


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", content)
    return file.getvalue()


UNREADABLE = "has a header that cannot be read"
HEADERS: dict[str, tuple[bytes, str]] = {
    "a length beyond the file": (as_safetensors(b"{}", length=1000), "its header alone should have 1008"),
    "a length of 2**63": (as_safetensors(b"{}", length=1 << 63), "does not begin with a safetensors header"),
    "a length of 2**64 - 1": (as_safetensors(b"{}", length=2**64 - 1), "does not begin with a safetensors header"),
    "a very long header": (as_safetensors(b" " * (20 * MB)), "does not begin with a safetensors header"),
    "offsets beyond the file": (
        as_safetensors(f'{{"a":{entry(shape=[400], data_offsets=[0, 1600])}}}'.encode()),
        "its header declares",
    ),
    "a huge shape": (as_safetensors(f'{{"a":{entry(shape=[1 << 40, 1 << 40])}}}'.encode()), UNREADABLE),
    "a huge shape and offsets": (
        as_safetensors(f'{{"a":{entry(shape=[1 << 50], data_offsets=[0, 1 << 52])}}}'.encode()),
        "its header declares",
    ),
    "a negative shape": (as_safetensors(f'{{"a":{entry(shape=[-2, -2])}}}'.encode()), UNREADABLE),
    "a shape with a fraction": (as_safetensors(f'{{"a":{entry(shape=[4.0])}}}'.encode()), UNREADABLE),
    "a shape of booleans": (
        as_safetensors(f'{{"a":{entry(shape=[True, 4])}}}'.encode()),
        UNREADABLE,
    ),
    "thousands of dimensions": (as_safetensors(f'{{"a":{entry(shape=[1] * 10**5 + [4])}}}'.encode()), UNREADABLE),
    "negative offsets": (as_safetensors(f'{{"a":{entry(data_offsets=[-16, 0])}}}'.encode()), UNREADABLE),
    "overlapping tensors": (
        as_safetensors(f'{{"a":{entry()},"b":{entry(shape=[2], data_offsets=[8, 16])}}}'.encode()),
        "puts 'b' at byte",
    ),
    "the same bytes twice": (as_safetensors(f'{{"a":{entry()},"b":{entry()}}}'.encode()), "puts 'b' at byte"),
    "a gap": (
        as_safetensors(f'{{"a":{entry(shape=[1], data_offsets=[12, 16])}}}'.encode()),
        "puts 'a' at byte",
    ),
    "an unknown dtype": (as_safetensors(f'{{"a":{entry(dtype="Q4_K")}}}'.encode()), "Q4_K"),
    "a name twice": (as_safetensors(f'{{"a":{entry()},"a":{entry()}}}'.encode()), "a duplicate name"),
    "a name of a megabyte": (as_safetensors(f'{{"{"a" * MB}":{entry()}}}'.encode()), "an invalid tensor name"),
    "a name with line ends": (as_safetensors(f'{{"a\\nerror: b":{entry()}}}'.encode()), "an invalid tensor name"),
    "not UTF-8": (as_safetensors(b'{"\xff":1}'), UNREADABLE),
    "not JSON": (as_safetensors(b"{nonsense}"), UNREADABLE),
    "deep nesting": (as_safetensors(b'{"a":' + b"[" * 200_000), UNREADABLE),
    "a number of a million digits": (as_safetensors(b'{"a":' + b"9" * MB + b"}"), UNREADABLE),
    "a zip archive": (zipped(bytes(5000)), "it looks like a zip archive"),
    "a web page": (b"<!DOCTYPE html>\n<html>Sign in" + bytes(500), "it looks like a web page"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs"),
    "nothing": (b"", "has 0 bytes"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_invalid_safetensors_header(tmp_path: Path, name: str):
    content, part = HEADERS[name]
    file = tmp_path / "consolidated.safetensors"
    file.write_bytes(content)
    message = refusal(lambda: open_weights(tmp_path), memory=100 * MB)
    assert message.startswith(str(file)) and part in message


def test_file_truncated_at_any_length(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(40), "b": torch.ones(3, 5)}, file)
    whole = file.read_bytes()
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        assert "Copy or download it again" in refusal(lambda: open_safetensors(file))


def test_shapes_are_checked_before_anything_is_allocated(tmp_path: Path):
    """The file has the size that its header declares: a tensor of 4 TB, in a sparse file."""
    model = make_tiny_checkpoint(tmp_path / "model", dim=16, n_layers=1, hidden_dim=24, n_heads=2, n_kv_heads=1)
    header = f'{{"norm.weight":{entry(shape=[1 << 40], data_offsets=[0, 1 << 42])}}}'.encode()
    file = model / "consolidated.safetensors"
    file.write_bytes(as_safetensors(header))
    os.truncate(file, 8 + len(header) + (1 << 42))
    args = TrainArgs(data=DataArgs(), model_id_or_path=str(model), run_dir="run")
    message = refusal(lambda: open_base_model(args))
    assert f"norm.weight is [{1 << 40}], expected [16]" in message


SHAPES = {"dim": 16, "n_layers": 1, "head_dim": 8, "hidden_dim": 24, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5}
PARAMS: dict[str, Any] = {
    "too many layers": {"n_layers": 10**9},
    "layers as a string": {"n_layers": "many"},
    "a huge width": {"dim": 10**30},
    "nan": {"dim": float("nan")},
    "infinity": {"hidden_dim": float("inf")},
    "not a whole number": {"n_heads": 2.5},
    "a float too large": {"rope_theta": 10**400},
    "an odd head": {"head_dim": 7},
    "too many experts": {"n_layers": 100, "moe": {"num_experts": 10**6, "num_experts_per_tok": 2}},
    "experts that are not a number": {"moe": {"num_experts": "x"}},
    "experts that are a list": {"moe": [1]},
}


@pytest.mark.parametrize("name", PARAMS)
def test_invalid_shapes_are_refused_before_a_model_is_built(tmp_path: Path, name: str):
    params = SHAPES | {"vocab_size": 32768} | PARAMS[name]
    (tmp_path / "params.json").write_text(json.dumps(params), encoding="utf-8")
    assert "params.json" in refusal(lambda: load_model_args(tmp_path))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"dim": ' + "9" * 10_000 + "}", " " * 2 * MB, "\xff"])
def test_file_that_is_not_params_json(tmp_path: Path, content: str):
    (tmp_path / "params.json").write_bytes(content.encode("latin-1"))
    assert "params.json" in refusal(lambda: load_model_args(tmp_path))


@pytest.mark.parametrize("content", [b"[" * 100_000, zipped(bytes(100)), b"\xff" * 1000, b'{"a": ' * 5000])
@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
def test_file_that_is_not_a_tokenizer(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert f"{name} cannot be read" in refusal(lambda: load_instruct_tokenizer(tmp_path, 32768))


# ---- Rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> InstructTokenizerBase:
    return load_tiny_tekken(tmp_path_factory.mktemp("tekken"), "v7").instruct_tokenizer


def training(tokenizer: InstructTokenizerBase, source: Path | str, **keys: Any) -> Callable[[], object]:
    """Return a function that reads the first sequence of a source."""
    data = DataArgs(instruct_data=str(source), **keys)
    return lambda: next(iter(build_training_stream(SampleEncoder(tokenizer), data, 32, 0, 0, 1)))


@pytest.fixture
def huge_row(tmp_path: Path) -> Path:
    """A valid row, and one of 100 MB in a sparse file."""
    file = tmp_path / "huge.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b"\n" + b'{"messages": [')
    os.truncate(file, 100_000_000)
    return file


@pytest.mark.parametrize("chunk", [True, False])
def test_row_of_100_mb_is_refused_unread(huge_row: Path, tokenizer: InstructTokenizerBase, chunk: bool):
    message = refusal(training(tokenizer, huge_row, instruct=InstructArgs(dynamic_chunk_fn_call=chunk)), memory=40 * MB)
    assert f"line 2 of dataset {huge_row}" in message and "It has 99,999," in message and "16,777,216" in message


def test_other_readers_refuse_it_too(huge_row: Path):
    assert "line 2 of dataset" in refusal(lambda: list(read_rows(huge_row, 5)))
    assert "Line 2 of" in refusal(lambda: list(read_lines(huge_row)), memory=150 * MB)
    # The NUL bytes of a sparse file are refused for what they are, so this reader gets a row of spaces.
    assert "NUL bytes" in refusal(lambda: rewrite_jsonl(huge_row, lambda row, *_: row), memory=150 * MB)
    huge_row.write_bytes(json.dumps(ROW).encode() + b"\n[" + b" " * (MAX_ROW_BYTES + 1))
    assert "Line 2 of" in refusal(lambda: rewrite_jsonl(huge_row, lambda row, *_: row), memory=150 * MB)
    assert [path.name for path in huge_row.parent.iterdir()] == ["huge.jsonl"]


def test_validator_reports_it(huge_row: Path, tokenizer: InstructTokenizerBase):
    rows = JsonlFile(huge_row, SampleType.INSTRUCT, chunk=False, rank=0, world_size=1)
    checked = RowChecker([FileToCheck(rows)], tokenizer, DataArgs(), 64).check(Task(0, 0, 2))
    [(line, error)] = checked.errors
    assert (line, error.kind, checked.training) == (2, JsonError.kind, 1)


def test_longest_allowed_row_is_read():
    frame = len(json.dumps({"text": ""}))
    assert len(parse_row(json.dumps({"text": "a" * (MAX_ROW_BYTES - frame)}).encode())["text"]) > 0.99 * MAX_ROW_BYTES
    with pytest.raises(JsonError, match="It has 16,777,217 bytes"):
        parse_row(json.dumps({"text": "a" * (MAX_ROW_BYTES - frame + 1)}).encode())


LINES: dict[str, tuple[bytes, str]] = {
    "deep lists": (b"[" * 1_000_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
    "deep objects that end": (b'{"a":' * 200 + b"1" + b"}" * 200, "nested too deeply"),
    "a number of 5,000 digits": (b'{"a":' + b"9" * 5000 + b"}", "too many digits"),
    "unpaired surrogate": (b'{"text": "\\ud83d"}', "unpaired surrogate"),
    "a raw NUL": (b'{"text": "\0"}', "control character"),
    "NULs": (bytes(1000), "Expecting value"),
    "UTF-16": (json.dumps(ROW).encode("utf-16"), "begins like text in UTF-16"),
    "Latin-1": ('{"text": "é"}'.encode("latin-1"), "Byte 11 is not valid UTF-8"),
    "two marks": (b"\xef\xbb\xbf\xef\xbb\xbf{}", "BOM"),
    "gzip": (gzip.compress(b"{}"), "begins like a gzip archive"),
    "zip": (zipped(b"{}"), "begins like a zip archive"),
    "parquet": (b"PAR1\x15\x04\x15", "begins like a parquet table"),
    "HTML": (b" <!doctype HTML><html>", "begins like a web page"),
    "a key twice": (b'{"text": "a", "text": "b"}', "'text' is repeated"),
    "many keys": (b'{"a": 1, ' * 1 + b", ".join(b'"%d": 1' % i for i in range(50_000)) + b', "a": 1}', "is repeated"),
    "a list": (b'[{"messages": []}]', "found a list"),
}


@pytest.mark.parametrize("name", LINES)
def test_invalid_row_is_named(tmp_path: Path, tokenizer: InstructTokenizerBase, name: str):
    content, part = LINES[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    message = refusal(training(tokenizer, file))
    assert f"line 1 of dataset {file}" in message and part in message


def test_unusual_but_valid_rows_are_read(tmp_path: Path, tokenizer: InstructTokenizerBase):
    rows = [
        b"\xef\xbb\xbf" + json.dumps(ROW).encode(),
        json.dumps(ROW | {"score": float("nan"), "size": 1e999, "deep": [[[[]]]]}).encode(),  # other columns, ignored
        json.dumps(ROW).replace("question", "\\u0000 \\ud83d\\ude00").encode(),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\r\n".join(rows))
    reader = JsonlFile(file, SampleType.INSTRUCT, True, 0, 1)
    with file.open("rb") as handle:
        assert all(reader.encode(handle, index, SampleEncoder(tokenizer)).tokens for index in range(3))


def test_deeply_nested_arguments_are_refused(tokenizer: InstructTokenizerBase):
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": "[" * 100_000}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}
    assert refusal(lambda: SampleEncoder(tokenizer).encode(row, SampleType.INSTRUCT))


# ---- Sources


def in_time(action: Callable[[], object]) -> object:
    """Return the result or the UserError of an action; fail if it blocks, as opening a pipe does."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(action())
        except UserError as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert result, "it blocks"
    return result[0]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


SPECIAL_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "is a pipe, a device or a socket"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a pipe, a device or a socket"),
    "a socket": (make_socket, "is a pipe, a device or a socket"),
    "a link to itself": (lambda path: path.symlink_to(path), "does not exist"),
    "a dead link": (lambda path: path.symlink_to("nowhere"), "does not exist"),
    "an empty folder": (Path.mkdir, "contains no file"),
}


@pytest.mark.parametrize("name", SPECIAL_FILES)
def test_source_that_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tokenizer):
    make, part = SPECIAL_FILES[name]
    monkeypatch.chdir(tmp_path)
    make(Path("a.jsonl"))
    answer = in_time(training(tokenizer, "a.jsonl"))
    assert isinstance(answer, UserError) and "a.jsonl" in str(answer) and part in str(answer)
    Path("config.yaml").unlink(missing_ok=True)
    Path("a.jsonl").rename("config.yaml")
    assert isinstance(in_time(lambda: load_train_args(Path("config.yaml"))), UserError)


def test_folder_with_a_loop_and_a_pipe_is_read(tmp_path: Path, tokenizer: InstructTokenizerBase):
    (tmp_path / "data/inner").mkdir(parents=True)
    (tmp_path / "data/inner/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/loop.jsonl").symlink_to(tmp_path / "data/loop.jsonl")
    os.mkfifo(tmp_path / "data/pipe.jsonl")
    (tmp_path / "data/inner/a.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    [source] = parse_sources(str(tmp_path / "data"))
    assert in_time(source.files) == [tmp_path / "data/inner/a.jsonl"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a.jsonl:1e999", "must be positive"),
        ("a.jsonl:nan", "must be positive"),
        ("a.jsonl:-1", "must be positive"),
        ("a.jsonl:0", "must be positive"),
        ("a.jsonl:1e308,b.jsonl:1e308", "at most 1e+09"),
        ("a.jsonl:", "at most one colon"),
        (":1", "at most one colon"),
        ("a:b.jsonl:1", "at most one colon"),
        ("a.jsonl,./a.jsonl", "is listed twice"),
        ("a\nb.jsonl", "does not exist"),
        ("a\0b.jsonl", "does not exist"),
        ("\ud800.jsonl", "does not exist"),
        ("x" * 10_000, "does not exist"),
        ("~/a.jsonl", "does not exist"),
        ("a.jsonl/../a.jsonl", "does not exist"),
        (",,,", "name at least one training source"),
    ],
)
def test_invalid_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: InstructTokenizerBase, text: str, part: str
):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=part.replace("+", r"\+")):
        training(tokenizer, text)()


def test_very_different_weights(tmp_path: Path, tokenizer: InstructTokenizerBase):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    assert training(tokenizer, f"{tmp_path}/a.jsonl:1e9,{tmp_path}/b.jsonl:1e-320")()


# ---- Control tokens

TOKENIZERS = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
    "mistral_instruct_tokenizer_241114.model.v7m1",
    "tekken_240718.json",
    "tekken_240911.json",
    "v7",
    "v11",
    "v13",
    "v15",
]


def tool_row(text: str) -> dict[str, Any]:
    """A row with `text` in every place that a user can fill."""
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": json.dumps({"a": text})}}
    parameters = {"type": "object", "properties": {"a": {"type": "string", "description": text}}}
    return {
        "messages": [
            {"role": "system", "content": text},
            {"role": "user", "content": text},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": json.dumps({"r": text}), "tool_call_id": "abcdefghi", "name": "f"},
            {"role": "assistant", "content": text},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}],
    }


def chat_row(text: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role in ("system", "user", "assistant")]}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_in_text_are_ordinary_text(tmp_path: Path, name: str):
    shipped = Path(mistral_common.__file__).parent / "data" / name
    file = shipped if shipped.is_file() else write_tiny_tekken(tmp_path / "tekken.json", name)
    encoder = SampleEncoder(MistralTokenizer.from_file(str(file)).instruct_tokenizer)
    written = token_bytes(encoder.instruct_tokenizer)
    inner = encoder.instruct_tokenizer.tokenizer
    names = [inner.id_to_piece(token) for token, piece in enumerate(written) if piece is None]
    assert "</s>" in names
    hostile = " ".join([*names, *(token.value for token in SpecialTokens), "<0x41>"]) + "".join(names)

    def control(row: dict[str, Any]) -> list[int]:
        return [token for token in encoder.encode(row, SampleType.INSTRUCT).tokens if written[token] is None]

    for make_row, places in [(chat_row, 3), (tool_row, 7)][: 1 if name.endswith("v1") else 2]:  # v1 has no tools
        tokens = encoder.encode(make_row(hostile), SampleType.INSTRUCT).tokens
        assert control(make_row(hostile)) == control(make_row("x"))
        said = b"".join(written[token] or b"" for token in tokens).decode()
        assert said.count(hostile) == places
    tokens = encoder.encode({"text": hostile}, SampleType.PRETRAIN).tokens
    assert [token for token in tokens if written[token] is None] == [tokens[0], tokens[-1]]


# ---- Configurations

CONFIGS: dict[str, tuple[bytes, str]] = {
    "exponential aliases": (
        b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 60)),
        "over 10,000 values",
    ),
    "exponential blocks": (
        b"a0: &a0 {x: 1}\n" + b"".join(b"a%d: &a%d {b: *a%d, c: *a%d}\n" % (i, i, i - 1, i - 1) for i in range(1, 60)),
        "over 10,000 values",
    ),
    "a block in itself": (b"data: &a {data: *a}\n", "over 10,000 values"),
    "a list in itself": (b"data: &a [*a]\n", "over 10,000 values"),
    "half of a character in a key": (b'{"\\ud800": 1}', "a key has an unpaired surrogate (line 1, column 2)"),
    "a key twice": (b"seed: 1\nseed: 2\n", "a key is given twice (line 2, column 1)"),
    "a nested key twice": (b"optim:\n  lr: 1\n  lr: 2\n", "a key is given twice (line 3, column 3)"),
    "a megabyte": (b"#" * (1 << 20), "too large for a configuration"),
    "UTF-16": ("seed: 1".encode("utf-16"), "looks like text in UTF-16"),
    "Latin-1": ("# é".encode("latin-1"), "not valid UTF-8 (byte 3)"),
    "gzip": (gzip.compress(b"seed: 1"), "looks like a gzip archive"),
    "a tab": (b"optim:\n\tlr: 1\n", "(line 2, column 1)"),
    "a list": (b"- seed\n", "found list"),
    "nothing": (b"", "found NoneType"),
    "deep lists": (b"a: " + b"[" * 50_000, "nested too deeply"),
    "deep objects": (b"{a: " * 20_000, "nested too deeply"),
    "deep names": (b"data" + b".data" * 200 + b": 1", "`data.data` is"),
    "a NUL": (b"seed: 1\nrun_dir: \0", "line 2 contains a control character"),
    "a NUL in a path": (b'run_dir: "\\0"', "`run_dir` is '\\x00'; expected a string"),
    "half a surrogate pair": (b'run_dir: "\\ud800"', "`run_dir` is '\\ud800'; expected a string"),
    "a number of 5,000 digits": (b"seed: " + b"9" * 5000, "the value is not a valid int (line 1, column 7)"),
    "the same in base 16": (b"seed: 0x" + b"f" * 5000, "`seed` is int too long to show"),
    "a tag that does not fit": (b"seed: !!int abc", "the value is not a valid int (line 1, column 7)"),
    "a list as a key": (b"? [1]\n: 2\n", "a key is not a string"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "another document (line 2, column 1)"),
    "thousands of unknown keys": (b"".join(b"k%d: 1\n" % i for i in range(4000)), "more"),
    "a value of 200 kB": (b"seed: " + b"x" * 200_000, "`seed` is 'xxx"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_invalid_configuration(tmp_path: Path, name: str):
    content, part = CONFIGS[name]
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_train_args(file)
    assert str(error.value).startswith(str(file)) and part in str(error.value)
    assert len(str(error.value)) < 30_000


def test_ordinary_anchors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("a.jsonl").write_text(json.dumps(ROW), encoding="utf-8")
    Path("config.yaml").write_text(
        "model_id_or_path: &m model\nrun_dir: *m\ndata: {instruct_data: a.jsonl}\noptim: {<<: {lr: 0.5}}\n",
        encoding="utf-8-sig",
    )
    args = load_train_args(Path("config.yaml"))
    assert (args.run_dir, args.optim.lr) == ("model", 0.5)


def test_invalid_row_is_reported_with_its_line(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(ROW).encode() + b"\n" + gzip.compress(b"x"))
    with pytest.raises(BadRowError, match=r"line 2 of dataset .* begins like a gzip archive"):
        list(read_rows(file, 2))
