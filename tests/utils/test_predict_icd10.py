"""Predictions of a trained model for a file of notes."""

import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from finetune.args import TrainArgs
from finetune.data.args import DataArgs
from finetune.distributed import World
from finetune.inference import load_trained
from finetune.run_dir import find_checkpoint, saved_checkpoints
from model.args import LoraArgs
from model.errors import UserError
from tests.support.checkpoints import make_tiny_checkpoint
from utils import evaluate_icd10, predict_icd10
from utils.engines.answer_file import Answered, answer_file
from utils.engines.choice import EngineChoice
from utils.engines.engine import Generation
from utils.engines.local import LocalEngine
from utils.engines.prompts import read_prompts
from utils.engines.token_codec import TokenCodec
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import write_notes
from utils.icd10.answers import build_answer, parse_answer
from utils.icd10.calibration import CONDITIONS, Calibration
from utils.icd10.codes import Cim10Table
from utils.icd10.mapping import read_mapping
from utils.icd10.predictions import describe_origin
from utils.icd10.prompts import instruct_row
from utils.icd10.rules import guide_rules
from utils.icd10.rules_file import GUIDE
from utils.tables.read_table import read_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    written = write_notes(5, seed=0, catalogue=load_catalogue(), length="short")
    rows = (instruct_row(note.text, build_answer(note.diagnoses), note.id) for note in written)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["adapter", "merged"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, notes: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    args = TrainArgs(
        data=DataArgs(instruct_data=str(notes), packing="best_fit"),
        model_id_or_path=str(make_tiny_checkpoint(folder / "model")),
        run_dir=str(folder / "run"),
        lora=LoraArgs(rank=4),
        seq_len=1024,
        max_steps=1,
        save_adapters=request.param,
    )
    train.run_training(args, World(0, 1, torch.device("cpu")))
    return folder / "run"


def predict_file(
    folder: Path,
    rows: Path,
    out: Path,
    table: Cim10Table | None = None,
    step: int | str | None = None,
    batch_size: int = 16,
    max_tokens: int = 512,
) -> Answered:
    choice = EngineChoice("local", folder, step, None, table, Generation(max_tokens), batch_size)
    return answer_file(choice, rows, out)


def answers(folder: Path, rows: Path, table: Cim10Table | None = None, max_tokens: int = 1) -> list[str]:
    engine = LocalEngine(find_checkpoint(folder), Generation(max_tokens), table)
    return [reply.text for _, reply in engine.answers(read_prompts(rows)[0])]


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:  # splitlines would also split at other line separators in the answers
        return [json.loads(line) for line in file]


def test_every_note_is_answered_once(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    predict_file(run_dir, notes, tmp_path / "p.jsonl", batch_size=2, max_tokens=5)
    rows = read(tmp_path / "p.jsonl")
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in read(notes))
    for row in rows:
        known = [{key: code[key] for key in ("role", "code", "label")} for code in row["codes"]]
        assert known == [item._asdict() for item in parse_answer(row["answer"])]


def test_interrupted_command_continues(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    complete, cut = tmp_path / "complete.jsonl", tmp_path / "cut.jsonl"
    predict_file(run_dir, notes, complete, batch_size=2, max_tokens=4)
    text = complete.read_text(encoding="utf-8")
    cut.write_text(text[: len(text) // 2], encoding="utf-8")  # ends inside a row
    (tmp_path / "cut.about.json").write_text((tmp_path / "complete.about.json").read_text())
    assert "from an earlier call)" in predict_file(run_dir, notes, cut, batch_size=2, max_tokens=4).summary
    by_id = [sorted(read(path), key=lambda row: row["id"]) for path in (complete, cut)]
    assert by_id[0] == by_id[1]


def test_shards_are_collected(run_dir: Path, notes: Path, tmp_path: Path, run_command, monkeypatch) -> None:
    command = [predict_icd10, "--run", run_dir, "--notes", notes, "--max_tokens", 3, "--out"]
    assert run_command(*command, tmp_path / "whole.jsonl")[0] == 0
    out = tmp_path / "p.csv"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(os, "_exit", sys.exit)  # how one of several processes ends
    run_command(*command, out)
    monkeypatch.delenv("WORLD_SIZE")
    assert run_command(*command, out, "--shard", "2/3")[0] == 0
    assert [len(read(tmp_path / f"p.{n}of3.jsonl")) for n in (1, 2)] == [2, 2] and not out.exists()
    code, output = run_command(*command, out)
    assert code == 0 and "5 answers (4 from an earlier call)" in output and out.exists()
    whole, collected = ({row["id"]: row for row in read(tmp_path / name)} for name in ("whole.jsonl", "p.jsonl"))
    assert whole == collected
    code, output = run_command(*command[:-3], "--max_tokens", 4, "--out", out.with_name("q.jsonl"), "--shard", "1/2")
    assert code == 0
    code, output = run_command(*command, out.with_name("q.jsonl"))
    assert code == 1 and "q.1of2.jsonl was written with a different max_tokens" in output
    for wrong in ("0/2", "3/2", "2", "a/b"):
        code, output = run_command(*command, out, "--shard", wrong)
        assert code == 1 and f"--shard is '{wrong}'; expected I/N" in output


@pytest.mark.parametrize("other", ["run", "notes", "max_tokens", "cim10"])
def test_answers_of_different_origins_are_not_mixed(other: str, run_dir: Path, notes: Path, tmp_path: Path) -> None:
    run, out, settings = tmp_path / "run", tmp_path / "p.jsonl", {"max_tokens": 3}
    shutil.copytree(run_dir, run)
    notes = Path(shutil.copy(notes, tmp_path))
    predict_file(run, notes, out, **settings)
    before = out.read_bytes()
    if other == "run":
        weights = next(run.rglob("consolidated/*.safetensors"))
        weights.write_bytes(weights.read_bytes())  # a new checkpoint
    elif other == "notes":
        notes.write_text(notes.read_text(encoding="utf-8").replace("Le ", "La "), encoding="utf-8")
    else:
        settings[{"cim10": "table"}.get(other, other)] = load_table(tmp_path) if other == "cim10" else 4
    with pytest.raises(UserError, match=f"was written with a different {other}(, rules)?; delete it"):
        predict_file(run, notes, out, **settings)
    assert out.read_bytes() == before


def test_other_files_are_not_overwritten(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "other.jsonl"
    out.write_text('{"text": "mine"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="not an output of this command"):
        predict_file(run_dir, notes, out)
    assert out.read_text(encoding="utf-8") == '{"text": "mine"}\n'


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("notes.jsonl", "is an output and also another file"),
        ("notes.csv", "is an output and also another file"),
        ("../{folder}/notes.jsonl", "is an output and also another file"),
        ("p.txt", r"in \.jsonl or \.csv"),
    ],
)
def test_output_must_be_another_jsonl_or_csv_file(out: str, sentence: str, notes: Path, run_dir: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        predict_file(run_dir, notes, notes.parent / out.format(folder=notes.parent.name))


def test_links_and_files_of_others_are_not_overwritten(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    table = tmp_path / "notes.csv"
    table.write_text("id,text\n1,Fièvre.\n", encoding="utf-8")
    (tmp_path / "soft.csv").symlink_to(table)
    (tmp_path / "hard.csv").hardlink_to(table)
    (tmp_path / "folder").mkdir()
    before = table.read_bytes()
    for name in ("notes.csv", "soft.csv", "hard.csv", "folder/../notes.csv"):
        with pytest.raises(UserError, match="is an output and also another file"):
            predict_file(run_dir, table, tmp_path / name)
    with pytest.raises(UserError, match=r"notes\.csv exists and is not an output of this command"):
        predict_file(run_dir, notes, table)
    assert table.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "hard.csv", "notes.csv", "soft.csv"]


def test_csv_has_one_line_per_code(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    predict_file(run_dir, notes, out, load_table(tmp_path), batch_size=5, max_tokens=80)
    with out.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    expected = [code["code"] for row in read(tmp_path / "p.jsonl") for code in row["codes"]]
    assert [line["code"] for line in lines] == expected
    written = [out, out.with_suffix(".jsonl"), *tmp_path.glob("p.*.json")]
    assert [path.stat().st_mode & 0o777 for path in written] == [0o600] * len(written), "answers may quote notes"
    before = out.read_bytes()
    predict_file(run_dir, notes, out, load_table(tmp_path), batch_size=5, max_tokens=80)
    assert out.read_bytes() == before


def test_codes_have_confidences_and_stays_decisions(
    run_dir: Path, notes: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str]]
) -> None:
    out, table = tmp_path / "p.csv", tmp_path / "cim10.tsv"
    load_table(tmp_path)
    command = [predict_icd10, "--run", run_dir, "--notes", notes, "--out", out, "--cim10", table, "--max_tokens", 90]
    code, output = run_command(*command, "--auto", 0.9)
    assert code == 1 and "--auto needs a calibration" in output and not out.exists()
    assert run_command(*command)[0] == 0
    rows = read(tmp_path / "p.jsonl")
    codes = [code for row in rows for code in row["codes"]]
    assert all(0 < code["probability"] <= 1 and code["confidence"] == code["probability"] for code in codes)
    conditions = {key: json.loads((tmp_path / "p.about.json").read_text())[key] for key in CONDITIONS}
    halves = {"DP": {"x": [0, 1], "y": [0.5, 0.5], "codes": 9, "correct": 9}}
    calibration = run_dir / "calibration/checkpoint_000001.json"
    calibration.parent.mkdir()
    calibration.write_text(Calibration("isotonic", halves, [(1.0, True)] * 9, conditions).to_json())
    for target, decision in ((0.9, "to_review"), (0.4, "auto")):
        code, output = run_command(*command, "--auto", target)
        assert code == 0 and "5 answers (5 from an earlier call)" in output, "marking again needs no model"
        rows = read(tmp_path / "p.jsonl")
        assert [(row["codes"][0]["confidence"], row["decision"]) for row in rows] == [(0.5, decision)] * 5
        with out.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        assert {(line["decision"], line["reason"]) for line in lines} == {(decision, rows[0]["reason"])}
        assert lines[0]["confidence"] == "0.5"
    assert "auto: 5 of 5 stays, with a DP confidence from 0.500" in output and "from 9 of 9 validation stays" in output
    conditions |= {"run": "another", "notes": json.loads((tmp_path / "p.about.json").read_text())["notes"]}
    other, few = tmp_path / "other.json", tmp_path / "few.json"
    other.write_text(Calibration("isotonic", halves, [(1.0, True)] * 9, conditions).to_json())
    few.write_text(Calibration("platt", {}, [(1.0, True)] * 9, conditions).to_json())
    code, output = run_command(*command, "--calibration", other)
    assert code == 0 and "warning: the confidences were calibrated on these very stays" in output
    assert f"warning: {other} was fitted to answers of another model" in output
    code, output = run_command(*command, "--calibration", few, "--auto", 0.9)
    assert code == 1 and "few.json has too few validation stays for it (9): calibrate with at least 20" in output
    free = [part for part in command if part not in ("--cim10", table)][:-3] + [tmp_path / "q.jsonl", "--max_tokens", 1]
    code, output = run_command(*free, "--auto", 0.4)
    assert (
        code == 1 and "was fitted to answers with different codes (--cim10), coding rules (--rules). Answer" in output
    )
    assert (
        f"python -m utils.predict_icd10 --run {run_dir}" in output and "TABLE" not in output and "RULES" not in output
    )
    assert "python -m utils.calibrate_icd10 --gold VAL.jsonl --predictions VAL_PREDICTIONS.jsonl\n" in output
    shown = run_command(*free)[1]
    assert "and is not used" in shown and "python -m utils.calibrate_icd10 --gold VAL.jsonl" in shown
    own = tmp_path / "rules.toml"
    own.write_text(GUIDE.read_text(encoding="utf-8") + "# ours\n", encoding="utf-8")
    code, output = run_command(*command, "--auto", 0.4, "--rules", own, "--calibration", calibration)
    assert code == 1 and "with different coding rules (--rules)" in output
    assert "--out VAL_PREDICTIONS.jsonl --cim10 TABLE --rules RULES\n" in output and f"--out {calibration}" in output
    for wrong in (("--auto", 1.5), ("--auto", 0.4, "--shard", "1/2")):
        assert "error: --auto" in run_command(*command, *wrong)[1]
    shutil.rmtree(calibration.parent)


def test_an_id_that_is_a_formula_is_neutralized_in_the_csv_only(run_dir: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "notes.csv", tmp_path / "p.csv"
    table.write_text("id,text\n\"=cmd|' /C calc'!A0\",Patient fébrile.\n", encoding="utf-8")
    answers = tmp_path / "p.jsonl"
    predict_file(run_dir, table, answers, max_tokens=1)
    (row,) = read(answers)
    assert row["id"] == "=cmd|' /C calc'!A0"
    answers.write_text(json.dumps(row | {"codes": [{"role": "DP", "code": "I10", "label": "=1+1"}]}) + "\n", "utf-8")
    predict_file(run_dir, table, out, max_tokens=1)
    assert out.read_text(encoding="utf-8").splitlines()[1] == "'=cmd|' /C calc'!A0,DP,I10,'=1+1,"
    assert [row["id"] for _, row in read_table(out)] == ["=cmd|' /C calc'!A0"]


def test_origin_of_the_answers_is_recorded(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    checkpoint = saved_checkpoints(run_dir / "checkpoints")[-1]
    for name, table, answers in (("free", None, "not constrained"), ("limited", load_table(tmp_path), "constrained")):
        predict_file(run_dir, notes, tmp_path / f"{name}.jsonl", table, batch_size=5, max_tokens=8)
        origin = describe_origin(tmp_path / f"{name}.jsonl")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", origin.pop("Answered"))
        limits = f"{answers} to codes of the CIM-10 table"
        assert origin == {"Run": run_dir.name, "Checkpoint": str(checkpoint), "Answers": limits}


def test_origin_names_the_checkpoint_of_a_link_and_no_run_of_a_model(
    run_dir: Path, notes: Path, tmp_path: Path
) -> None:
    checkpoint = saved_checkpoints(run_dir / "checkpoints")[-1]
    (run_dir / "checkpoints/best").symlink_to(checkpoint.name)
    predict_file(run_dir, notes, tmp_path / "best.jsonl", step="best", batch_size=5, max_tokens=1)
    (run_dir / "checkpoints/best").unlink()
    assert describe_origin(tmp_path / "best.jsonl")["Checkpoint"] == str(checkpoint)
    model = run_dir.parent / "model"
    predict_file(model, notes, tmp_path / "model.jsonl", batch_size=5, max_tokens=1)
    origin = describe_origin(tmp_path / "model.jsonl")
    assert origin["Checkpoint"] == str(model) and "Run" not in origin


def load_table(folder: Path) -> Cim10Table:
    path = folder / "cim10.tsv"
    path.write_text("I10|0|0|0|HTA|Hypertension essentielle (primitive)\nZ511|4|0|0|Chimio|Séance de chimiothérapie\n")
    return Cim10Table.from_file(path)


def test_constrained_answers_contain_only_codes_of_the_table(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    codes = load_table(tmp_path)
    for answer in answers(run_dir, notes, codes, max_tokens=120):
        found = parse_answer(answer)
        assert found
        assert all(guide_rules().allows(item.role, codes.get(item.code)) for item in found)


@pytest.mark.usefixtures("short_answers")
def test_evaluating_a_run_predicts_once(
    run_dir: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = tmp_path / "scores.json"
    arguments = ["--gold", str(notes), "--run", str(run_dir), "--json", str(scores)]
    monkeypatch.setattr(sys, "argv", ["evaluate_icd10", *arguments])
    evaluate_icd10.main()
    assert "micro F1" in capsys.readouterr().out
    first = json.loads(scores.read_text(encoding="utf-8"))
    assert (first["counts"]["notes"], first["counts"]["missing_predictions"]) == (5, 0)
    (answers,) = (run_dir / "predictions").glob("*[0-9].jsonl")
    assert answers.name == "notes.checkpoint_000001.jsonl"
    assert len(read(answers)) == 5
    monkeypatch.setattr("utils.engines.local.LocalEngine", None)  # nothing is left to answer
    evaluate_icd10.main()
    assert json.loads(scores.read_text(encoding="utf-8")) == first


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n', "duplicate id 1"),
        ('{"other": "a"}\n', "no column for text; found 'other'"),
        ('{"messages": ["a"]}\n', "not a conversation: 1"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "no note or question"),
        ('{"messages": [{"role": "user"}]}\n', "not a conversation: 1"),
        ('{"messages": null}\n', "neither `text` nor `messages`: 1"),
        ("", "has no rows"),
    ],
)
def test_invalid_notes_are_reported(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("note.txt", "Motif : fièvre.\n\nFumeur de 60 ans.\n"),
        ("notes.csv", "0012;Fumeur de 60 ans hospitalisé pour une fièvre depuis hier.\n0013;Autre.\n"),
    ],
)
def test_a_note_in_place_of_a_header_is_not_quoted(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="no column for text") as error:
        read_prompts(tmp_path / name)
    assert not any(word in str(error.value) for word in ("Motif", "fièvre", "Fumeur"))


def test_the_system_prompt_and_the_tools_of_a_row_are_part_of_the_question(run_dir: Path, tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "Fièvre"}, {"role": "assistant", "content": "R50"}
    tools = {"tools": [{"type": "function", "function": {"name": "coder"}}]}
    rows = [
        {"messages": [{"role": "system", "content": "Tu codes."}, question, answer], **tools},
        {"messages": [question, answer], "system": "Tu codes.", **tools},
        {"messages": [question], "system_prompt": "Tu codes.", "id": "c", **tools},
        {"messages": [question]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    codec = TokenCodec(load_trained(run_dir)[1], None)
    _, encoded, refused = codec.encode(read_prompts(path)[0])
    assert not refused and encoded[0] == encoded[1] == encoded[2]
    assert len(encoded[0]) > len(encoded[3]) + 20


def test_id_zero_is_kept_and_missing_ids_are_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "a", "id": 0}\n{"text": "b"}\n', encoding="utf-8")
    assert [prompt.id for prompt in read_prompts(path)[0]] == ["0", "2"]


def test_folder_without_a_run_is_rejected(tmp_path: Path, notes: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        predict_file(tmp_path, notes, tmp_path / "p.jsonl")
    assert not list(tmp_path.iterdir())


def test_checkpoint_and_weights_folders_are_accepted(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "checkpoint_000001"
    predict_file(run_dir, notes, tmp_path / "p.jsonl", max_tokens=3)
    for folder in (checkpoint, checkpoint / "consolidated"):  # another model would be rejected
        assert "(5 from an earlier call)" in predict_file(folder, notes, tmp_path / "p.jsonl", max_tokens=3).summary
        predict_file(folder, notes, tmp_path / f"{folder.name}.jsonl", max_tokens=3)
        assert read(tmp_path / f"{folder.name}.jsonl") == read(tmp_path / "p.jsonl")


def test_adapter_without_its_run_is_rejected(run_dir: Path, notes: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(run_dir / "checkpoints" / "checkpoint_000001" / "consolidated", tmp_path / "moved")
    if (weights / "lora.safetensors").is_file():
        with pytest.raises(UserError, match="is not in a run folder; merge it first"):
            LocalEngine(weights)
    else:
        assert answers(weights, notes)


def test_command_logs_its_progress_without_a_terminal(
    run_dir: Path, notes: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "p.jsonl"
    code, output = run_command(predict_icd10, "--run", run_dir, "--notes", notes, "--out", out, "--max_tokens", 2)
    assert code == 0
    assert f"Answering 5 of 5 rows with {run_dir / 'checkpoints' / 'checkpoint_000001'} ..." in output.splitlines()
    assert f"5 answers: {out}" in output.splitlines() and "%|" not in output
    assert f"evaluate  python -m utils.evaluate_icd10 --gold {notes} --predictions {out} " in output


def test_tables_in_other_encodings_are_read(
    run_dir: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str]]
) -> None:
    table, out = tmp_path / "comptes rendus.csv", tmp_path / "p.jsonl"
    table.write_text("id;text\ns1;Dyspnée, séjour n°1\n", encoding="cp1252")
    arguments = ("--run", run_dir, "--notes", table, "--out", out, "--max_tokens", 1)
    code, output = run_command(predict_icd10, *arguments)
    assert code == 0 and [row["id"] for row in read(out)] == ["s1"], output
    assert "evaluate  python -m utils.evaluate_icd10 --gold GOLD.jsonl " in output
    assert read_prompts(table)[0][0].messages[-1]["content"].endswith(": Dyspnée, séjour n°1")


def test_documents_of_a_stay_are_coded_together_as_they_are_prepared(tmp_path: Path) -> None:
    table = tmp_path / "notes.csv"
    table.write_text(
        "nda;cr;type_doc;date_doc\n0012;Sortie.;CRH;12/01/2026\n0013;Autre.;CRH;01/01/2026\n0012;Arrivée.;OBS;03/01/2026\n"
    )
    prompts, left_out = read_prompts(table)
    notes = {prompt.id: prompt.messages[-1]["content"].partition("suivant : ")[2] for prompt in prompts}
    assert notes == {"0012": "## OBS\n\nArrivée.\n\n## CRH\n\nSortie.", "0013": "## CRH\n\nAutre."} and not left_out
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(table.read_text().replace("nda;cr", "x;y"))
    with pytest.raises(UserError, match=r"no column for text.*--columns text=COLUMN"):
        read_prompts(renamed)
    assert read_prompts(renamed, mapping=read_mapping("stay=x,text=y"))[0] == prompts


def test_sex_and_age_come_from_columns_or_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "notes.csv"
    table.write_text("nda;sexe;ddn;cr\ns1;H;01/02/1950;Toux.\n;H;;Rien.\ns2;F;;Toux.\n", encoding="utf-8")
    prompts, left_out = read_prompts(table)
    assert [(prompt.id, prompt.person) for prompt in prompts] == [("s1", {"sex": "M"}), ("s2", {"sex": "F"})]
    assert [row.reason for row in left_out] == ["without an identifier of the stay"]
    shown = capsys.readouterr()
    assert "(notes) stay: nda; text: cr; sex: sexe; birth: ddn" in shown.out
    assert "1 stay has a date of birth but no date of discharge" in shown.err and "--columns discharge=" in shown.err
    table.write_text("sexe;age;cr\nH;67 ans;Toux.\n", encoding="utf-8")
    assert [(prompt.id, prompt.person) for prompt in read_prompts(table)[0]] == [("2", {"sex": "M", "age": 67})]
    assert "no column of the stay" in capsys.readouterr().err
    row = {"id": "s1", "sex": "F", "age": 3, "messages": [{"role": "user", "content": "Toux."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (prompt,) = read_prompts(tmp_path / "rows.jsonl")[0]
    assert prompt.person == {"sex": "F", "age": 3}


def test_notes_that_cannot_be_used_do_not_stop_the_others(
    run_dir: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str]]
) -> None:
    table, out = tmp_path / "notes.csv", tmp_path / "p.jsonl"
    table.write_text("stay_id,text\ns1,Dyspnée.\ns2,  \ns3,a,b\ns4,NULL\ns5,<p>Toux</p>\ns6,Fièvre.\ns6,nan\n")
    arguments = ("--run", run_dir, "--notes", table, "--out", out, "--max_tokens", 1)
    code, output = run_command(predict_icd10, *arguments)
    assert code == 1 and "3 answers" in output and "blank, NULL or nan: 3; number of fields" in output, output
    assert sorted(row["id"] for row in read(out)) == ["s1", "s5", "s6"]
    with (tmp_path / "p.left_out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["stay"] for row in csv.DictReader(file)] == ["s2", "", "s4", "s6"]
    # A stay with one usable document is answered: nothing is missing.
    table.write_text("stay_id,text\ns6,Fièvre.\ns6,nan\n")
    code, output = run_command(predict_icd10, *arguments[:-3], tmp_path / "q.jsonl", "--max_tokens", 1)
    assert code == 0 and "warning: 1 row was not used (s6)" in output, output
