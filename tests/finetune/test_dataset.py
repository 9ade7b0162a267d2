"""jsonl files -> batches: equal to mistral-finetune's, in its order, resumable anywhere; bad data is an error."""

import errno
import functools
import io
import itertools
import json
import os
import queue
import re
import shutil
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase

from finetune.data.args import DataArgs, InstructArgs, Source
from finetune.data.data_loader import Batch, EvalLoader, TrainLoader, build_data_loader
from finetune.data.dataset import JsonlFile, MixedStream, build_training_stream
from finetune.data.exceptions import BadRowError, JsonError
from finetune.data.packing import Sequence
from finetune.data.rows import line_offsets
from finetune.data.tokenize import SampleEncoder, SampleType, TokenSample
from model.errors import UserError
from tests.support.golden import GOLDEN, fixture, instruct_tokenizer, load_json_gz
from tests.support.make_golden_fixtures import condense_batches, digest
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.tiny_tekken import load_tiny_tekken

DIGESTS = load_json_gz(fixture("expected/batches/digests.json.gz"))
SETTINGS = [setting for setting in DIGESTS["settings"] if "digests" in setting]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> InstructTokenizerBase:
    return load_tiny_tekken(tmp_path_factory.mktemp("tekken"), "v3").instruct_tokenizer


def data_args(shuffle: bool = False, chunk: bool = False, **keys: str) -> DataArgs:
    return DataArgs(shuffle=shuffle, instruct=InstructArgs(shuffle, chunk), **keys)


def train_loader(
    tokenizer: InstructTokenizerBase,
    args: DataArgs,
    seq_len: int = 32,
    batch_size: int = 1,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    return build_data_loader(tokenizer, args, batch_size, seq_len, seed, rank, world_size, is_eval=False)


def eval_loader(
    tokenizer: InstructTokenizerBase,
    path: Path,
    seq_len: int = 32,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> EvalLoader:
    args = DataArgs(eval_instruct_data=str(path))
    return build_data_loader(tokenizer, args, batch_size, seq_len, None, rank, world_size, is_eval=True)


def take(loader: TrainLoader, n: int) -> list[Batch]:
    return list(itertools.islice(loader, n))


def first_batches(n: int, *args: Any, **kwargs: Any) -> list[Batch]:
    with closing(train_loader(*args, **kwargs)) as loader:
        return take(loader, n)


def as_digests(batches: Iterable[Batch]) -> dict[str, list[str | None]]:
    batches = list(batches)
    return {
        "x": [digest(batch.x) for batch in batches],
        "y": [digest(batch.y) for batch in batches],
        "y_mask": [None if batch.y_mask is None else digest(batch.y_mask) for batch in batches],
        "sizes": [digest(np.array(batch.sizes)) for batch in batches],
    }


def documents(batches: Iterable[Batch]) -> Iterator[tuple[list[int], list[bool]]]:
    """The tokens and masks of every document with a trained token."""
    for batch in batches:
        mask = np.ones(len(batch.x), dtype=bool) if batch.y_mask is None else batch.y_mask
        ends = np.cumsum(batch.sizes)
        assert ends[-1] == len(batch.x) == len(batch.y) == len(mask)
        for start, end in zip([0, *ends], ends):
            if mask[start:end].any():
                yield batch.x[start:end].tolist(), mask[start:end].tolist()


def write_rows(path: Path, rows: Iterable[dict[str, Any]], newline: str = "\n") -> Path:
    lines = [json.dumps(row, ensure_ascii=False) + newline for row in rows]
    path.write_bytes("".join(lines).encode("utf-8"))
    return path


def conversations(n: int, name: str = "", turns: int = 1, **keys: Any) -> list[dict[str, Any]]:
    """Distinct rows of different lengths."""
    return [
        {
            "messages": [
                message
                for turn in range(turns)
                for message in (
                    {"role": "user", "content": f"{name}{i}.{turn}" + "?" * (i % 7)},
                    {"role": "assistant", "content": f"{name}{i}.{turn}" + "!" * (3 * i % 11)},
                )
            ]
        }
        | keys
        for i in range(n)
    ]


def texts(n: int, name: str = "t") -> list[dict[str, str]]:
    return [{"text": f"{name}{i}" + "." * (5 * i % 13)} for i in range(n)]


TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]


# ---- mistral-finetune's batches ----


@pytest.mark.parametrize("setting", SETTINGS, ids=[setting["name"] for setting in SETTINGS])
def test_batches_equal_those_of_mistral_finetune(monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any]):
    monkeypatch.chdir(fixture("inputs"))
    # mistral-finetune reads a folder in file system order, we read it in sorted order.
    sorted_files = Source.files
    folder = [Path(file) for file in DIGESTS["folder_order_used"]]
    monkeypatch.setattr(
        Source, "files", lambda source: folder if source.path == Path("folder") else sorted_files(source)
    )
    args = DataArgs(
        data=setting["data"],
        shuffle=setting["data_shuffle"],
        instruct_data=setting["instruct_data"],
        eval_instruct_data=setting["eval_instruct_data"],
        instruct=InstructArgs(setting["instruct_shuffle"], setting["dynamic_chunk_fn_call"]),
    )
    names = ("batch_size", "seq_len", "seed", "rank", "world_size", "is_eval")
    loader = build_data_loader(
        instruct_tokenizer(setting["tokenizer"]), args, **{name: setting[name] for name in names}
    )
    expected = setting["digests"]
    n = len(expected["x"])
    if setting["is_eval"]:
        batches = list(loader)
        # mistral-finetune drops an incomplete last batch.
        assert all(len(batch.x) < setting["batch_size"] * setting["seq_len"] for batch in batches[n:])
        assert len(batches[n:]) <= 1
        assert as_digests(batches[:n]) == expected
    else:
        with closing(loader):
            assert as_digests(take(loader, n)) == expected


if GOLDEN is not None:

    def test_committed_digests_equal_those_of_golden():
        assert condense_batches(GOLDEN) == DIGESTS


def test_a_folder_is_read_in_sorted_order(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(fixture("inputs"))
    names = ["folder/a.jsonl", "folder/b.jsonl", "folder/odd_name_jsonl", "folder/sub/c.jsonl"]
    assert [str(file) for file in Source(Path("folder")).files()] == names


# ---- lines ----


@given(
    data=st.lists(st.sampled_from([b"\r", b"\n", b"a", b" ", "\u2028".encode(), "\u0085".encode()])).map(b"".join),
    block=st.integers(1, 9),
)
@settings(deadline=None, max_examples=400)
def test_lines_end_as_in_python(tmp_path_factory: pytest.TempPathFactory, data: bytes, block: int):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    path.write_bytes(data)
    lines = list(io.TextIOWrapper(io.BytesIO(data), encoding="latin-1", newline=""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.data.rows._BLOCK", block)
        offsets = line_offsets(path)
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [0, *np.cumsum([len(line) for line in lines], dtype=int)]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("final_newline", [True, False])
def test_all_line_ends_give_the_same_batches(
    tmp_path: Path, tiny: InstructTokenizerBase, newline: str, bom: bytes, final_newline: bool
):
    rows = conversations(5) + conversations(1, name="\u2028\u0085é")
    plain = write_rows(tmp_path / "plain.jsonl", rows)
    other = write_rows(tmp_path / "other.jsonl", rows, newline)
    content = bom + other.read_bytes()
    other.write_bytes(content if final_newline else content.rstrip(b"\r\n"))
    expected = as_digests(eval_loader(tiny, plain))
    assert len(expected["x"]) == 3
    assert as_digests(eval_loader(tiny, other)) == expected


def test_a_folder_instead_of_a_file_is_a_user_error(tmp_path: Path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} cannot be read")):
        line_offsets(tmp_path)


def test_a_large_file_is_not_loaded_into_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: InstructTokenizerBase
):
    path = tmp_path / "large.jsonl"
    line = json.dumps(conversations(1)[0] | {"padding": "x" * 2000}).encode() + b"\n"
    path.write_bytes(line * 10_000)
    assert path.stat().st_size > 20e6
    monkeypatch.setattr("finetune.data.rows._BLOCK", 1 << 16)
    tracemalloc.start()
    try:
        first_batches(5, tiny, data_args(shuffle=True, chunk=True, instruct_data=str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3e6


# ---- ranks ----


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_ranks_share_the_rows(tmp_path: Path, tiny: InstructTokenizerBase, world_size: int):
    path = write_rows(tmp_path / "rows.jsonl", conversations(8))
    encoder = SampleEncoder(tiny)
    rows = [encoder.encode(row, SampleType.INSTRUCT) for row in conversations(8)]
    for rank in range(world_size):
        file = JsonlFile(path, SampleType.INSTRUCT, False, rank, world_size)
        with path.open("rb") as handle:
            assert [file.encode(handle, i, encoder) for i in range(len(file))] == rows[rank::world_size]


def test_ranks_evaluate_every_row_once(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", conversations(11))

    def rows_of(rank: int, world_size: int) -> Counter:
        found = documents(eval_loader(tiny, path, seq_len=2000, rank=rank, world_size=world_size))
        return Counter(map(str, found))

    everything = rows_of(0, 1)
    assert len(everything) == 11
    for world_size in (2, 3, 11, 12):
        assert sum((rows_of(rank, world_size) for rank in range(world_size)), Counter()) == everything


def test_a_rank_trains_only_on_its_rows_and_their_chunks(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", conversations(6, turns=3, tools=TOOLS))
    args = data_args(shuffle=True, chunk=True, instruct_data=str(path))
    for rank in range(2):
        *whole, _ = documents(first_batches(1, tiny, args, seq_len=10_000, rank=rank, world_size=2))
        trained = set()
        for tokens, mask in whole:
            answer = tiny.tokenizer.decode([token for token, is_target in zip(tokens[1:], mask) if is_target])
            trained.add(answer.rstrip("!"))
        assert trained == {f"{i}.{turn}" for i in range(rank, 6, 2) for turn in range(3)}


@pytest.mark.parametrize("block", [1, 5, 8, 1000])
def test_rows_with_tools_are_found_across_blocks_and_others_are_not_parsed(
    tmp_path: Path, tiny: InstructTokenizerBase, monkeypatch: pytest.MonkeyPatch, block: int
):
    plain, tools = conversations(1), conversations(2, turns=3, tools=TOOLS)
    path = write_rows(tmp_path / "rows.jsonl", [*plain, tools[0], {"not": "a conversation"}, *plain, tools[1]])
    monkeypatch.setattr("finetune.data.rows._BLOCK", block)
    files = [JsonlFile(path, SampleType.INSTRUCT, chunk=True, rank=rank, world_size=2) for rank in range(2)]
    assert [[file.line(entry) for entry in range(len(file))] for file in files] == [[1, 3, 5, 5, 5], [2, 4, 2, 2]]


# ---- order and weights ----


def test_unshuffled_rows_repeat_in_line_order(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", texts(5))
    encoder = SampleEncoder(tiny)
    tokens = [token for row in texts(5) for token in encoder.encode(row, SampleType.PRETRAIN).tokens[:-1]]
    batches = first_batches(20, tiny, data_args(data=str(path)), seq_len=7, batch_size=2)
    read = np.concatenate([batch.x for batch in batches]).tolist()
    assert len(read) > 3 * len(tokens)
    assert read == list(itertools.islice(itertools.cycle(tokens), len(read)))
    assert all(batch.y_mask is None for batch in batches)


def test_every_epoch_has_all_rows_in_a_new_order(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{i:04}"} for i in range(12)])
    args = data_args(shuffle=True, data=str(path))
    batches = first_batches(36, tiny, args, seq_len=5)  # a row a sequence
    orders = [[tiny.tokenizer.decode(batch.x.tolist()) for batch in batches[i : i + 12]] for i in (0, 12, 24)]
    assert all(sorted(order) == [f"{i:04}" for i in range(12)] for order in orders)
    assert orders[0] != orders[1] != orders[2]
    other = first_batches(12, tiny, args, seq_len=5, seed=1)
    assert orders[0] != [tiny.tokenizer.decode(batch.x.tolist()) for batch in other]


def test_sources_are_drawn_by_weight(tmp_path: Path, tiny: InstructTokenizerBase):
    for name in "abc":
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    sources = ",".join(f"{tmp_path}/{name}.jsonl:{weight}" for name, weight in (("a", 5), ("b", 3), ("c", 2)))
    batches = first_batches(1000, tiny, data_args(data=sources), seq_len=2)
    drawn = Counter(tiny.tokenizer.decode(batch.x.tolist()) for batch in batches)
    for name, share in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
        assert abs(drawn[name] / 1000 - share) < 0.05


def test_a_single_trained_row_is_found_in_any_order(tmp_path: Path, tiny: InstructTokenizerBase):
    rows = conversations(12)
    for row in rows[1:]:
        row["messages"][1]["weight"] = 0
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for seed in range(10):
        first_batches(30, tiny, data_args(shuffle=True, instruct_data=str(path)), seq_len=8, seed=seed)


# ---- invalid data ----


def invalid_training_args(folder: Path) -> dict[str, tuple[dict[str, str], str]]:
    good, other = write_rows(folder / "good.jsonl", conversations(3)), write_rows(folder / "other.jsonl", texts(3))
    (folder / "empty.jsonl").touch()
    (folder / "nothing").mkdir()
    (folder / "nothing/readme.txt").touch()
    return {
        "weight 0": ({"instruct_data": f"{good}:0,{other}"}, "the weight is 0: it must be positive"),
        "weight negative": ({"instruct_data": f"{good}:-1,{other}"}, "the weight is -1: it must be positive"),
        "weight infinite": ({"instruct_data": f"{good}:inf"}, "the weight is inf: it must be positive"),
        "weight text": ({"instruct_data": f"{good}:abc"}, "'abc' is not a number"),
        "no weight": ({"instruct_data": f"{good}:"}, "expected <path> or <path>:<weight>"),
        "colons": ({"instruct_data": f"a:b:{good}"}, "at most one colon"),
        "twice": ({"instruct_data": f"{good},{good}:2"}, "is listed twice in"),
        "both": ({"instruct_data": f"{good}", "data": f"{good}"}, "is listed under both"),
        "missing": ({"instruct_data": f"{folder}/nope.jsonl"}, "nope.jsonl does not exist"),
        "none": ({}, "both empty: name at least one training source"),
        "commas": ({"instruct_data": " , ,"}, "both empty: name at least one training source"),
        "empty folder": ({"instruct_data": f"{folder}/nothing"}, "contains no file whose name ends in 'jsonl'"),
        "empty file": ({"instruct_data": f"{folder}/empty.jsonl"}, "empty.jsonl contains no rows"),
        "empty among others": ({"instruct_data": f"{good},{folder}/empty.jsonl"}, "empty.jsonl contains no rows"),
    }


def test_invalid_sources_give_a_one_line_error(tmp_path: Path, tiny: InstructTokenizerBase):
    for name, (sources, reason) in invalid_training_args(tmp_path).items():
        with pytest.raises(UserError, match=re.escape(reason)) as caught:
            train_loader(tiny, data_args(**sources))
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_gives_a_clear_error(tmp_path: Path, tiny: InstructTokenizerBase, seed: int):
    path = write_rows(tmp_path / "rows.jsonl", conversations(3))
    with pytest.raises(UserError, match=f"`seed` is {seed}; it must lie between 0 and"):
        train_loader(tiny, data_args(instruct_data=str(path)), seed=seed)


@pytest.mark.parametrize("shuffle", [True, False])
def test_more_ranks_than_rows_gives_a_clear_error(tmp_path: Path, tiny: InstructTokenizerBase, shuffle: bool):
    path = write_rows(tmp_path / "rows.jsonl", conversations(2))
    args = data_args(shuffle=shuffle, instruct_data=str(path))
    first_batches(1, tiny, args, rank=1, world_size=2)
    with pytest.raises(UserError, match=re.escape("too few rows (2) for 3 processes: process 2 has none to read")):
        train_loader(tiny, args, rank=2, world_size=3)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rows_without_trained_tokens_give_a_clear_error(
    tmp_path: Path, tiny: InstructTokenizerBase, shuffle: bool, rows: int
):
    masked = conversations(rows)
    for row in masked:
        row["messages"][1]["weight"] = 0
    path = write_rows(tmp_path / "masked.jsonl", masked)
    loader = train_loader(tiny, data_args(shuffle=shuffle, instruct_data=str(path)))
    outcome: queue.Queue[UserError | None] = queue.Queue()

    def attempt() -> None:
        try:
            outcome.put(loader.wait_for_first() and None)
        except UserError as error:
            outcome.put(error)

    threading.Thread(target=attempt, daemon=True).start()
    reason = str(outcome.get(timeout=PATIENCE_S))  # mistral-finetune loops forever
    assert re.match(r"No row of .*masked\.jsonl assigned to this process has a trainable token", reason)


def test_no_evaluation_source_gives_a_clear_error(tiny: InstructTokenizerBase):
    with pytest.raises(UserError, match=r"`data\.eval_instruct_data` is empty"):
        build_data_loader(tiny, DataArgs(), 1, 8, None, 0, 1, is_eval=True)


def test_a_bad_row_is_reported_after_the_batches_before_it(tmp_path: Path, tiny: InstructTokenizerBase):
    rows = texts(12)
    good = write_rows(tmp_path / "good.jsonl", rows)
    lines = good.read_bytes().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"".join([*lines[:7], b'{"text": "cut sh\n', *lines[8:]]))
    encoder = SampleEncoder(tiny)
    tokens_before = sum(len(encoder.encode(row, SampleType.PRETRAIN).tokens) - 1 for row in rows[:7])
    n = tokens_before // 8
    with closing(train_loader(tiny, data_args(data=str(bad)), seq_len=8).wait_for_first()) as loader:
        expected = as_digests(first_batches(n, tiny, data_args(data=str(good)), seq_len=8))
        assert as_digests(take(loader, n)) == expected
        state = loader.state_dict()
        for _ in range(2):  # every time
            with pytest.raises(BadRowError) as caught:
                next(loader)
            assert (caught.value.path, caught.value.line) == (bad, 8)
            assert isinstance(caught.value.error, JsonError)
            assert str(caught.value).startswith(f"The data in line 8 of dataset {bad} is incorrectly formatted. ")
        assert loader.state_dict() == state


def test_the_line_of_a_bad_row_does_not_depend_on_rank_and_order(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", [*conversations(5), {"messages": []}, *conversations(4)], "\r\n")
    for shuffle in (True, False):
        args = data_args(shuffle=shuffle, instruct_data=str(path))
        with closing(train_loader(tiny, args, rank=1, world_size=2)) as loader, pytest.raises(BadRowError) as caught:
            take(loader, 100)
        assert caught.value.line == 6
    with pytest.raises(BadRowError, match="line 6 of"):
        list(eval_loader(tiny, path))


def test_a_bad_row_with_tools_is_reported_before_training(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", [*conversations(3), {"messages": [{}], "tools": TOOLS}])
    with pytest.raises(BadRowError, match="line 4 of"):
        train_loader(tiny, data_args(shuffle=True, chunk=True, instruct_data=str(path)))


if GOLDEN is not None:

    @pytest.mark.parametrize("path", sorted((GOLDEN / "inputs/bad").glob("*.jsonl")), ids=lambda path: path.stem)
    def test_a_bad_file_is_read_or_gives_a_one_line_error(tiny: InstructTokenizerBase, path: Path):
        try:
            list(eval_loader(tiny, path))
        except BadRowError as error:
            assert error.path == path
            assert "\n" not in str(error)


# ---- resuming ----


def mixed_sources(folder: Path) -> dict[str, str]:
    (folder / "several").mkdir()
    for name in "ab":
        write_rows(folder / f"several/{name}.jsonl", conversations(4, name))
    write_rows(folder / "tools.jsonl", conversations(3, "c", turns=3, tools=TOOLS))
    write_rows(folder / "texts.jsonl", [{"text": "long " * 30}, *texts(3)])
    return {"data": f"{folder}/texts.jsonl:1.5", "instruct_data": f"{folder}/several:2,{folder}/tools.jsonl"}


@pytest.fixture
def rows_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tokens of each row: a position depends on their number, and a few rows are read thousands of times."""
    encode, samples = JsonlFile.encode, {}

    def encode_once(file: JsonlFile, handle: Any, entry: int, encoder: Any) -> TokenSample:
        if (file.path, entry) not in samples:
            samples[file.path, entry] = encode(file, handle, entry, encoder)
        return samples[file.path, entry]

    monkeypatch.setattr(JsonlFile, "encode", encode_once)


@pytest.mark.usefixtures("rows_encoded_once")
@pytest.mark.parametrize(("packing", "seq_len"), [("concat", 23), ("best_fit", 150)])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    ("shuffle", "chunk", "names"),
    [
        (False, False, ("data",)),
        (False, False, ("instruct_data",)),
        (True, True, ("instruct_data",)),
        (True, False, ("data", "instruct_data")),
        (True, True, ("data", "instruct_data")),
    ],
)
def test_a_new_loader_resumes_where_another_stopped(
    tmp_path: Path,
    tiny: InstructTokenizerBase,
    packing: str,
    seq_len: int,
    batch_size: int,
    shuffle: bool,
    chunk: bool,
    names: tuple[str, ...],
):
    sources = mixed_sources(tmp_path)
    args = data_args(shuffle, chunk, packing=packing, **{name: sources[name] for name in names})
    fresh = functools.partial(train_loader, tiny, args, seq_len, batch_size, seed=3, world_size=2)
    with closing(fresh()) as loader:
        states, batches = [loader.state_dict()], []
        for _ in range(40):
            batches.append(next(loader))
            states.append(loader.state_dict())
    expected = as_digests(batches)
    places = [source for state in states for source in state["sources"]]
    assert any(place["offset"] > 0 for place in places) and max(place["epoch"] for place in places) > 2
    for k in (0, 2, 13, 34):
        with closing(fresh()) as loader:
            loader.load_state_dict(json.loads(json.dumps(states[k])))
            assert loader.state_dict() == states[k]
            assert as_digests(take(loader, 6)) == {key: values[k : k + 6] for key, values in expected.items()}
            assert loader.state_dict() == states[k + 6]


def place_of(state: dict[str, Any]) -> tuple[int, ...]:
    [source] = state["sources"]
    return tuple(source[key] for key in ("epoch", "file", "place", "offset"))


def test_resuming_inside_a_row_longer_than_a_sequence(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "0123456789" * 10}, {"text": "end"}])
    args = data_args(data=str(path))
    expected = as_digests(first_batches(20, tiny, args, seq_len=16))
    with closing(train_loader(tiny, args, seq_len=16)) as loader:
        take(loader, 3)
        state = loader.state_dict()
    assert place_of(state) == (0, 0, 0, 48)
    with closing(train_loader(tiny, args, seq_len=16)) as loader:
        loader.load_state_dict(state)
        assert as_digests(take(loader, 17)) == {key: values[3:] for key, values in expected.items()}


def strings(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {text for item in value.values() for text in strings(item)}
    if isinstance(value, list):
        return {text for item in value for text in strings(item)}
    return {value} if isinstance(value, str) else set()


def test_a_state_is_plain_json_without_any_text_of_the_data(tmp_path: Path, tiny: InstructTokenizerBase):
    args = data_args(shuffle=True, chunk=True, **mixed_sources(tmp_path))
    with closing(train_loader(tiny, args, seq_len=23)) as loader:
        take(loader, 7)
        state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert {text for text in strings(state) if not re.fullmatch("[a-z_]+", text)} == {"MT19937"}  # no text of a row
    state["sources"].clear()
    assert loader.state_dict() != state  # it is a copy


def test_the_state_is_that_of_the_last_batch_returned(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{i:04}"} for i in range(12)])
    with closing(train_loader(tiny, data_args(data=str(path)), seq_len=5)) as loader:
        take(loader, 2)
        wait_until(loader._ready.full, "no further batches are ready")
        assert place_of(loader.state_dict()) == (0, 0, 1, 5)


class PanicException(BaseException):
    """What a panic in Rust becomes in Python."""


class FailingStream:
    """Yields one sequence, then raises `error`, or just ends."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    def __iter__(self) -> Iterator[Sequence]:
        yield Sequence(np.zeros(1), np.zeros(1), np.ones(1, dtype=bool), [1], 0)
        if self._error is not None:
            raise self._error

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PanicException("invalid pattern"), RuntimeError, "has ended with PanicException: invalid pattern"),
        (SystemExit(0), RuntimeError, "has ended with SystemExit: 0"),
        (KeyboardInterrupt(), RuntimeError, "has ended with KeyboardInterrupt"),
        (MemoryError("full"), MemoryError, "full"),
        (UserError("bad row"), UserError, "bad row"),
        (None, RuntimeError, "has ended without a batch or an error"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_any_type_in_the_thread_reaches_the_training(error, kind, message):
    loader = TrainLoader(FailingStream(error), 1)
    next(loader)
    for _ in range(2):
        with pytest.raises(kind, match=message) as raised:
            next(loader)
    assert type(raised.value) is kind
    loader.close()


def test_close_stops_the_thread(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", texts(3))
    before = threading.active_count()
    loaders = [train_loader(tiny, data_args(data=str(path))) for _ in range(3)]
    assert threading.active_count() == before  # no thread before the first batch
    loaders[0].wait_for_first()
    take(loaders[1], 9)
    assert threading.active_count() == before + 2
    for loader in loaders:
        loader.close()
        loader.close()
    assert threading.active_count() == before


# ---- evaluation ----


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_evaluation_includes_an_incomplete_last_batch(tmp_path: Path, tiny: InstructTokenizerBase, batch_size: int):
    path = write_rows(tmp_path / "rows.jsonl", conversations(9))
    sequences = list(eval_loader(tiny, path, seq_len=40))
    batches = list(eval_loader(tiny, path, seq_len=40, batch_size=batch_size))
    full, rest = divmod(len(sequences), batch_size)
    assert [len(batch.x) // 40 for batch in batches] == [batch_size] * full + [rest] * bool(rest)
    assert list(documents(batches)) == list(documents(sequences))


def test_evaluation_pads_the_last_sequence_with_a_masked_document(tmp_path: Path, tiny: InstructTokenizerBase):
    rows = conversations(2)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    lengths = [len(SampleEncoder(tiny).encode(row, SampleType.INSTRUCT).tokens) - 1 for row in rows]
    [batch] = eval_loader(tiny, path, seq_len=200)
    assert batch.sizes == [*lengths, 200 - sum(lengths)]
    padding = slice(sum(lengths), None)
    assert not batch.x[padding].any() and not batch.y[padding].any() and not batch.y_mask[padding].any()
    assert batch.y_mask.any()


def test_evaluation_can_be_repeated(tmp_path: Path, tiny: InstructTokenizerBase):
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", conversations(4, name))
    loader = eval_loader(tiny, tmp_path)
    once = as_digests(loader)
    next(iter(loader))  # an unfinished iteration
    assert as_digests(loader) == once
    assert len(once["x"]) > 2


def test_evaluation_without_rows_for_a_rank_has_no_batches(tmp_path: Path, tiny: InstructTokenizerBase):
    path = write_rows(tmp_path / "rows.jsonl", conversations(1))
    assert len(list(eval_loader(tiny, path, rank=0, world_size=2))) == 1
    assert list(eval_loader(tiny, path, rank=1, world_size=2)) == []
    path.write_bytes(b"")
    assert list(eval_loader(tiny, path)) == []
    masked = conversations(1)
    masked[0]["messages"][1]["weight"] = 0
    assert list(eval_loader(tiny, write_rows(path, masked))) == []


# ---- Files that change while they are read


ROWS = [{"text": letter * 40} for letter in "abcdefgh"]
OTHER_ROWS = [{"text": letter * 40} for letter in "stuvwxyz"]  # of the same lengths


def small_stream(folder: Path, tiny: InstructTokenizerBase) -> tuple[Path, MixedStream]:
    """Return a file of 8 rows and the stream of its sequences, two for each row."""
    folder.mkdir(exist_ok=True)
    path = write_rows(folder / "rows.jsonl", ROWS)
    os.utime(path, (1, 1))
    return path, build_training_stream(SampleEncoder(tiny), data_args(data=str(path)), 16, 0, 0, 1)


def tokens_of(stream: MixedStream, count: int) -> list[list[int]]:
    return [sequence.x.tolist() for sequence in itertools.islice(stream, count)]


@pytest.mark.parametrize("settled", [True, False], ids=["modified long ago", "modified just now"])
@pytest.mark.parametrize("after", [1, 5, 30])
def test_file_rewritten_while_training_ends_the_stream(
    tmp_path: Path, tiny: InstructTokenizerBase, after: int, settled: bool
):
    path, stream = small_stream(tmp_path, tiny)
    if not settled:
        path.touch()
        stream = build_training_stream(SampleEncoder(tiny), data_args(data=str(path)), 16, 0, 0, 1)
    sequences = iter(stream)
    for _ in range(after):
        next(sequences)
    with path.open("r+b") as file:  # the same file, the same lengths
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in OTHER_ROWS))
    with pytest.raises(UserError, match=f"{path} has changed since this command started to read it"):
        for _ in range(40):
            next(sequences)


def test_file_replaced_by_another_is_noticed_in_the_next_epoch(tmp_path: Path, tiny: InstructTokenizerBase):
    path, stream = small_stream(tmp_path, tiny)
    expected = tokens_of(small_stream(tmp_path / "unchanged", tiny)[1], 12)
    sequences = iter(stream)
    first = next(sequences).x.tolist()
    os.replace(write_rows(tmp_path / "other.jsonl", OTHER_ROWS), path)
    rest = []
    with pytest.raises(UserError, match="has changed since"):
        for sequence in sequences:
            rest.append(sequence.x.tolist())
    assert [first, *rest][:12] == expected and len(rest) < 40


def test_file_that_is_touched_or_copied_is_the_same(tmp_path: Path, tiny: InstructTokenizerBase):
    path, stream = small_stream(tmp_path, tiny)
    expected = tokens_of(small_stream(tmp_path / "unchanged", tiny)[1], 90)
    sequences, found = iter(stream), []
    for number in range(90):
        if number in (3, 50):
            path.touch()
        if number == 20:
            os.replace(shutil.copyfile(path, tmp_path / "copy.jsonl"), path)
        found.append(next(sequences).x.tolist())
    assert found == expected


def test_read_error_is_one_message(tmp_path: Path, tiny: InstructTokenizerBase, monkeypatch: pytest.MonkeyPatch):
    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")  # of a file removed on another machine

    path, stream = small_stream(tmp_path, tiny)
    sequences = iter(stream)
    next(sequences)
    monkeypatch.setattr("finetune.data.dataset.read_line", stale)
    with pytest.raises(
        UserError, match=rf"{path} cannot be read any more: Stale file handle\. Restore it and start again"
    ):
        list(itertools.islice(sequences, 50))


def test_file_that_is_removed_is_one_message(tmp_path: Path, tiny: InstructTokenizerBase):
    path, stream = small_stream(tmp_path, tiny)
    sequences = iter(stream)
    next(sequences)
    path.unlink()
    with pytest.raises(UserError, match=f"{path} cannot be read any more: No such file"):
        for _ in range(40):
            next(sequences)


def test_fingerprint_depends_on_content_alone(tmp_path: Path):
    def fingerprint(rows: list[dict[str, str]], name: str, mtime: int = 1) -> str:
        path = write_rows(tmp_path / name, rows)
        os.utime(path, (mtime, mtime))
        return JsonlFile(path, SampleType.PRETRAIN, False, 0, 1).fingerprint

    assert fingerprint(ROWS, "a") == fingerprint(ROWS, "b", mtime=2)
    changed = [ROWS[::-1], OTHER_ROWS, ROWS[:-1], [*ROWS[:-1], ROWS[0]]]
    assert len({fingerprint(rows, "c") for rows in [ROWS, *changed]}) == 5
    files = [JsonlFile(tmp_path / "a", SampleType.PRETRAIN, False, rank, 2) for rank in range(2)]
    assert files[0].fingerprint == files[1].fingerprint == fingerprint(ROWS, "a")
