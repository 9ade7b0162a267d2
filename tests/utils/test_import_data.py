"""import_data: tables in many formats become training rows; splits are exact and seeded and never divide a group."""

import collections
import csv
import io
import itertools
import json
import subprocess
import sys
import tracemalloc
from array import array
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from finetune.data.tokenize import SampleEncoder, SampleType
from model.errors import UserError
from utils import import_data
from utils.import_data import import_table
from utils.tables.read_table import read_table
from utils.tables.splits import assign_splits, parse_fractions, split_rows
from utils.tables.templates import MissingKeyError, Recipe, Template, as_text, look_up

ROOT = Path(__file__).parents[2]

DOLLY = [
    {"instruction": "When did it start?", "context": "It started in 2000.", "response": "In 2000.", "category": "qa"},
    {"instruction": "Name a fish.", "context": "", "response": "Tope", "category": "classification"},
    {"instruction": "Why?", "context": "", "response": " ", "category": "open_qa"},
]
HOTPOT = {
    "question": "Which river?",
    "answer": "The Loire",
    "context": {"title": ["Nantes", "Tours"], "sentences": [["Nantes is old.", " It is large."], ["Tours is older."]]},
}


def template(text):
    return Template.parse(text, "--user")


def chat(user="{q}", assistant="{a}", **more):
    return Recipe(user=template(user), assistant=template(assistant), **more)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def contents(row):
    return [(message["role"], message["content"]) for message in row["messages"]]


# The data sets of the tutorials


def test_dolly(tmp_path, run_command):
    source = jsonl(tmp_path / "dolly.jsonl", DOLLY)
    user = r"{instruction}{context:\n\nHere is some context: }"
    arguments = ["--user", user, "--assistant", "{response}", "--system", r"Be brief.\nBe kind.", "--split", "1"]
    code, said = run_command(import_data, source, "--out", tmp_path / "dolly", *arguments)
    assert code == 0
    rows = lines_of(tmp_path / "dolly_train.jsonl")
    assert [contents(row) for row in rows] == [
        [
            ("system", "Be brief.\nBe kind."),
            ("user", "When did it start?\n\nHere is some context: It started in 2000."),
            ("assistant", "In 2000."),
        ],
        [("system", "Be brief.\nBe kind."), ("user", "Name a fish."), ("assistant", "Tope")],
    ]
    assert "Rows read: 3. Kept: 2. Dropped: 1." in said and "--assistant is empty: line 3" in said
    encoder = SampleEncoder(MistralTokenizer.v3().instruct_tokenizer)
    assert all(any(encoder.encode(row, SampleType.INSTRUCT).masks) for row in rows)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_notes_in_csv(delimiter, tmp_path):
    notes = ['Motif : chute, à domicile ; "sans" gravité\n\nConclusion\tRAS', "x" * 200_000, "Fièvre"]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([["", "note"], *enumerate(notes)])
    source = tmp_path / "notes.csv"
    source.write_text(text.getvalue(), encoding="utf-8-sig", newline="")
    import_table(source, f"{tmp_path}/out/", Recipe(text=template("{note}")), [1])
    assert lines_of(tmp_path / "out" / "train.jsonl") == [{"text": note} for note in notes]


def test_hotpot_rows_in_every_published_format(tmp_path):
    """Parquet, the json list of the official site, jsonl, and a list under the name of a jsonl."""
    pq.write_table(pa.Table.from_pylist([HOTPOT] * 3), tmp_path / "hotpot.parquet")
    (tmp_path / "hotpot.json").write_text(json.dumps([HOTPOT] * 3, indent=1), encoding="utf-8")
    jsonl(tmp_path / "lines.json", [HOTPOT] * 3)
    lines = ",\n".join([json.dumps(HOTPOT)] * 3)
    (tmp_path / "list.jsonl").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    recipe = chat("{context.title.0}: {context.sentences.0}\n{context.sentences}\n{question}", "{answer}")
    for name in ("hotpot.parquet", "hotpot.json", "lines.json", "list.jsonl"):
        import_table(tmp_path / name, str(tmp_path / "out"), recipe, [1], overwrite=True)
        (row, *others) = lines_of(tmp_path / "out_train.jsonl")
        assert others == [row, row]
        assert contents(row) == [
            (
                "user",
                "Nantes: Nantes is old.\n It is large.\nNantes is old. It is large.\nTours is older.\nWhich river?",
            ),
            ("assistant", "The Loire"),
        ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_rows_of_a_list_are_counted_as_rows_not_lines(encoding, tmp_path):
    rows = [{"q": "a"}, 5, {"q": ""}, {"q": "b"}]
    (tmp_path / "list.jsonl").write_text(json.dumps(rows, indent=2), encoding=encoding)
    result = import_table(
        tmp_path / "list.jsonl", f"{tmp_path}/out/", Recipe(text=template("{q}")), [1], encoding=encoding
    )
    assert (result.read, result.dropped.count) == (4, 2)
    assert "not a JSON object: row 2" in str(result) and "--text is empty: row 3" in str(result)


def test_a_truncated_list_is_refused(tmp_path):
    (tmp_path / "list.jsonl").write_text('[\n{"q": "a"},\n{"q": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"list\.jsonl is not valid JSON"):
        import_table(tmp_path / "list.jsonl", f"{tmp_path}/out/", Recipe(text=template("{q}")))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# Templates


def test_a_key_is_applied_to_every_item_of_a_list():
    row = {"steps": [{"q": "a", "n": 1}, {"q": "b", "n": None}]}
    assert as_text(look_up(row, "steps.q")) == "a\nb"
    assert as_text(look_up(row, "steps.1.q")) == "b"
    assert look_up(row, "steps.9.q") is None
    assert look_up({"steps": None}, "steps.q") is None
    with pytest.raises(MissingKeyError) as missing:
        look_up(row, "steps.z")
    assert missing.value.available == ["q", "n"]


def test_a_column_may_have_a_dot():
    assert look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        (3, "3"),
        (0.5, "0.5"),
        (True, "true"),
        ({"é": [1]}, '{"é": [1]}'),
        ([], ""),
        (["a", "b"], "a\nb"),
        ([["a", [" b", "c"]], ["d"]], "a b c\nd"),
    ],
)
def test_values_as_text(value, text):
    assert as_text(value) == text


@pytest.mark.parametrize(
    ("written", "rendered"),
    [
        ("{a} and {b}", "1 and 2"),
        (r"\n{a}\n{b}\t", "1\n2"),
        ('{{"codes": {a}}}', '{"codes": 1}'),
        ("{a: first: }{empty: never}", "first: 1"),
        ("{empty}", ""),
    ],
)
def test_templates(written, rendered):
    assert template(written).render({"a": "1", "b": "2", "empty": ""}) == rendered


@pytest.mark.parametrize("written", ["{a", "a}", "{}", "{:x}", "{a!r}", "{a:{b}}"])
def test_invalid_templates_are_reported(written):
    with pytest.raises(UserError, match="--user: "):
        template(written)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--user", "{q}"], "Give --user and --assistant"),
        (["--text", "{q}", "--user", "{q}"], "--text writes pretraining rows"),
        (["--user", "{q}", "--assistant", "a"], "--assistant 'a' names no column; put columns in braces: '{a}'"),
        (["--text", "{q}", "--split", "0.9"], "--split '0.9': expected the shares"),
        (["--text", "{q}", "--encoding", "latin-0"], "Unknown encoding 'latin-0'"),
    ],
)
def test_invalid_arguments(arguments, said, tmp_path, run_command):
    source = jsonl(tmp_path / "source.jsonl", [{"q": "a"}] * 9)
    code, output = run_command(import_data, source, "--out", tmp_path / "out", *arguments)
    assert code == 1 and output.startswith("error: ") and said in output
    assert list(tmp_path.iterdir()) == [source]


# Rows that cannot be used


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_an_unknown_column_is_reported_with_a_suggestion(suffix, tmp_path):
    source = tmp_path / f"source{suffix}"
    if suffix == ".csv":
        source.write_text("instruction,response\na,b\nc,d\n", encoding="utf-8")
    elif suffix == ".jsonl":
        jsonl(source, [{"instruction": "a", "response": "b"}] * 2)
    else:
        pq.write_table(pa.Table.from_pylist([{"instruction": "a", "response": "b"}] * 2), source)
    with pytest.raises(UserError) as error:
        import_table(source, str(tmp_path / "out"), chat("{instrution}", "{response}"))
    assert "{instrution}: did you mean 'instruction'? Available: 'instruction', 'response'." in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


def test_an_unknown_key_and_group_are_reported(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", [HOTPOT] * 3)
    with pytest.raises(UserError) as error:
        import_table(source, str(tmp_path / "out"), chat("{context.sentense}{question}", "{answer}", group="patient"))
    assert "{context.sentense}: did you mean 'sentences'?" in str(error.value)
    assert "{patient}: Available: 'question', 'answer', 'context'." in str(error.value)


def test_a_column_may_be_missing_in_some_rows(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", [{"q": "a", "a": "b"}, {"q": "c", "a": "d", "context": "e"}])
    import_table(source, str(tmp_path / "out"), chat("{q}{context:|}"), [1])
    assert [contents(row)[0][1] for row in lines_of(tmp_path / "out_train.jsonl")] == ["a", "c|e"]


def test_dropped_rows_are_counted_by_line_and_reason(tmp_path):
    source = tmp_path / "source.csv"
    source.write_text('id,q,a\n1,"two\nlines",b\n\n2,,b\n3,q,\n4,q\n,q,a\n', encoding="utf-8")
    result = import_table(source, str(tmp_path / "out"), chat(group="id"), [1])
    assert (result.read, result.dropped.count) == (5, 4)
    said = str(result)
    assert "--user is empty: line 5" in said and "--assistant is empty: line 6" in said
    assert "number of fields differs from the header: line 7 (line 7: 2 instead of 3)" in said
    assert "the group 'id' is empty, so its split cannot be chosen: line 8" in said


def test_invalid_json_affects_only_its_row(tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_text('{"q": "a"}\nhello\n[1]\n{"q": "b"}\n{"q": "\\ud800"}\n', encoding="utf-8")
    result = import_table(source, str(tmp_path / "out"), Recipe(text=template("{q}")), [1])
    assert lines_of(tmp_path / "out_train.jsonl") == [{"text": "a"}, {"text": "b"}]
    assert "not a valid JSON object: lines 2, 3, 5" in str(result)
    listed = tmp_path / "source.json"
    listed.write_text('[{"q": "a"}, 1, {"q": "\\ud800"}]', encoding="utf-8")
    result = import_table(listed, str(tmp_path / "out"), Recipe(text=template("{q}")), [1], overwrite=True)
    assert "not a JSON object: row 2" in str(result) and "unpaired surrogate, which is not a character: row 3" in str(
        result
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.ods", b"", "ends in '.ods'; expected .csv"),
        ("a.xlsx", b"", "is not an Excel workbook that can be read"),
        ("a.csv", b"PK\x03\x04", "is a zip archive. Excel's files are zip archives: name it .xlsx"),
        ("a.csv", b"", "No row of"),
        ("a.csv", b"q,q\n1,2\n", "columns with the same name: 'q'"),
        ("a.csv", b'q,a\n1,2\n"3,4\n5,6\n', "row beginning in line 3: unexpected end of data"),
        ("a.csv", b"q,a\nb,c\nfi\xe8vre,d\n", "is not utf-8: byte 0xe8 in line 3, column 3; give --encoding (cp1252"),
        ("a.jsonl", b'{"q": "\xe9"}\n', "is not utf-8: byte 0xe9 in line 1, column 8"),
        ("a.json", b'[{"q": "a"},\n{"q": "\xe9"}]', "is not utf-8: byte 0xe9 in line 2, column 8"),
        ("a.csv", "q,a\né,b\n".encode("utf-16"), "it begins as utf-16 does; give --encoding utf-16."),
        ("a.json", b"[1,", "is not valid JSON"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_unreadable_files_are_reported_with_the_reason(name, content, said, tmp_path):
    source = tmp_path / name
    source.write_bytes(content)
    with pytest.raises(UserError) as error:
        import_table(source, str(tmp_path / "out"), Recipe(text=template("{q}")))
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8"])
def test_other_encodings(encoding, tmp_path):
    source = tmp_path / "source.tsv"
    source.write_bytes("q\ta\nFièvre, 39\tœdème\n".encode(encoding))
    assert [row for _, row in read_table(source, encoding)] == [{"q": "Fièvre, 39", "a": "œdème"}]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    source = tmp_path / "source.parquet"
    source.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[parquet\]"'):
        list(read_table(source))


# The split


def test_the_split_is_exact_seeded_and_keeps_every_row_once(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", [{"q": str(number)} for number in range(200)])
    recipe = Recipe(text=template("{q}"))
    seen = {}
    for attempt, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(attempt)
        import_table(source, f"{folder}/", recipe, [0.8, 0.15, 0.05], seed=seed)
        parts = [[int(row["text"]) for row in lines_of(folder / f"{name}.jsonl")] for name in ("train", "eval", "test")]
        assert [len(part) for part in parts] == [160, 30, 10]
        assert sorted(itertools.chain(*parts)) == list(range(200))
        assert all(part == sorted(part) for part in parts)  # the source's order
        assert seed not in seen or seen[seed] == parts
        seen[seed] = parts
    assert seen[0] != seen[1]


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.integers(0, 12), min_size=3, max_size=80),
    fractions=st.sampled_from([[0.9, 0.1], [0.8, 0.1, 0.1], [0.5, 0.5], [1.0]]),
    seed=st.integers(0, 99),
)
@example(groups=[0] * 100 + [1] * 5 + [2] * 5, fractions=[0.9, 0.1], seed=0)
def test_no_group_is_in_two_splits(groups, fractions, seed):
    numbers: dict[int, int] = {}
    units = array("L", [numbers.setdefault(group, len(numbers)) for group in groups])
    try:
        splits = split_rows(units, fractions, seed)
    except UserError as error:
        assert "too few" in str(error)
        return
    where = collections.defaultdict(set)
    for group, split in zip(groups, splits):
        where[group].add(split)
    assert all(len(found) == 1 for found in where.values())
    largest = max(collections.Counter(groups).values())
    for split, fraction in enumerate(fractions):
        assert abs(splits.count(split) - fraction * len(groups)) <= largest * len(fractions)


@pytest.mark.parametrize("seed", range(5))
def test_a_large_group_leaves_room_for_the_small_ones(seed):
    assert list(assign_splits([5, 100, 5], [0.9, 0.1], seed)) == [1, 0, 1]


@given(count=st.integers(1, 300), seed=st.integers(0, 9))
def test_rows_without_groups_are_divided_by_the_fractions(count, seed):
    splits = assign_splits([1] * (10 * count), [0.7, 0.2, 0.1], seed)
    assert [splits.count(split) for split in range(3)] == [7 * count, 2 * count, count]


def test_every_row_is_as_likely_to_be_evaluated():
    hits = collections.Counter()
    for seed in range(400):
        hits.update(row for row, split in enumerate(assign_splits([1] * 20, [0.9, 0.1], seed)) if split)
    assert len(hits) == 20 and max(hits.values()) < 3 * min(hits.values())


def test_a_patient_is_in_one_split_only(tmp_path, run_command):
    rows = [{"note": f"note {number}", "patient": {"id": number % 23}} for number in range(230)]
    rows += [{"note": "late", "patient": {"id": " 3 "}}]
    source = jsonl(tmp_path / "source.jsonl", rows)
    arguments = ["--text", "{patient.id}: {note}", "--group", "patient.id", "--split", "0.8,0.1,0.1"]
    code, said = run_command(import_data, source, "--out", tmp_path, *arguments)
    assert code == 0
    patients = [
        {row["text"].split(":")[0].strip() for row in lines_of(tmp_path / f"{name}.jsonl")}
        for name in ("train", "eval", "test")
    ]
    assert all(patients) and len(set.union(*patients)) == sum(map(len, patients)) == 23
    assert f"{tmp_path / 'eval.jsonl'}: " in said


def test_too_few_rows_for_a_split_are_reported(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", [{"q": str(number), "id": 1} for number in range(100)])
    with pytest.raises(UserError, match=r"eval split would have no row: 100 rows \(1 that can be split"):
        import_table(source, str(tmp_path / "out"), Recipe(text=template("{q}"), group="id"))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("text", ["", "a", "0.9", "0.5,0.6", "1,0", "-1,2", "nan", "0.7,0.1,0.1,0.1", "0.9;0.1"])
def test_shares_that_do_not_sum_to_1_are_rejected(text):
    with pytest.raises(UserError, match="expected the shares"):
        parse_fractions(text)


# The files


def test_overwrite_replaces_files_and_removes_stale_splits(tmp_path):
    source = jsonl(tmp_path / "source.jsonl", [{"q": str(number)} for number in range(20)])
    recipe = Recipe(text=template("{q}"))
    import_table(source, f"{tmp_path}/out/", recipe, [0.8, 0.1, 0.1])
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="already exist"):
        import_table(source, f"{tmp_path}/out/", recipe, [0.5, 0.5])
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    result = import_table(source, f"{tmp_path}/out", recipe, [0.5, 0.5], overwrite=True)
    assert list(result.files.values()) == [10, 10]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.jsonl", "train.jsonl"]


def test_the_source_is_never_an_output(tmp_path):
    source = jsonl(tmp_path / "train.jsonl", [{"q": str(number)} for number in range(20)])
    with pytest.raises(UserError, match="is an output and also another file"):
        import_table(source, f"{tmp_path}/", Recipe(text=template("{q}")), overwrite=True)
    assert len(lines_of(source)) == 20


def test_memory_grows_much_more_slowly_than_the_file(tmp_path):
    peaks = []
    for count in (300, 6000):
        source = jsonl(tmp_path / f"{count}.jsonl", ({"q": "x" * 500} for _ in range(count)))
        tracemalloc.start()
        import_table(source, str(tmp_path / f"out{count}"), Recipe(text=template("{q}")))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 6000 * 200  # a row of the file has 508 bytes


def test_a_user_error_is_one_line_and_exit_code_1(tmp_path):
    command = [sys.executable, "-m", "utils.import_data", "missing.csv", "--out", str(tmp_path), "--text", "{note}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: missing.csv does not exist.\n")
