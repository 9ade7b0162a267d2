"""Evidence of predicted codes: effects of sentences compared with separate computations, files, interruptions."""

import json
from pathlib import Path

import pytest
import torch

from finetune.inference import load_trained
from tests.support.checkpoints import make_tiny_checkpoint
from utils import explain_icd10
from utils.engines.evidence import EvidenceFinder
from utils.engines.prompts import read_prompts
from utils.engines.token_codec import TokenCodec
from utils.icd10.answers import build_answer, parse_answer
from utils.icd10.prompts import prompt_messages

pytestmark = pytest.mark.slow

CRH = "Patient de 60 ans. Toux et fièvre.\nPas de diabète, HTA traitée."
OBS = "Antécédents : asthme."
CODES = [
    {"role": "DP", "code": "J189", "label": "Pneumopathie"},
    {"role": "DAS", "code": "I10", "label": "HTA"},
    {"role": "DAS", "code": "E119", "label": "Diabète"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "model", dtype=torch.float32)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.csv"
    path.write_text(
        f'nda;cr;type_doc;date_doc\ns1;"{CRH}";CRH;12/01/2026\ns1;{OBS};OBS;03/01/2026\ns2;Fièvre.;CRH;01/01/2026\n'
    )
    return path


def chances(model: Path, note: str, answer: str) -> list[tuple[str, float]]:
    """Return the text and log-probability of each token of an answer, one note at a time."""
    transformer, tokenizer = load_trained(model)
    codec = TokenCodec(tokenizer, None)
    _, (prompt,), _ = codec.encode([read_prompt(note)])
    tokens, pieces = codec.encode_answer(answer)
    ids = torch.tensor([*prompt, *tokens])
    with torch.no_grad():
        found = transformer(ids, [len(ids)])[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return [(piece.decode(), float(row[token])) for piece, row, token in zip(pieces, found, tokens)]


def read_prompt(note: str):
    from utils.engines.prompts import Prompt

    return Prompt("a", {"messages": prompt_messages(note)})


@pytest.mark.parametrize("batch_tokens", [1, 700, 8192])
def test_effects_are_those_of_notes_without_a_sentence(model: Path, batch_tokens: int) -> None:
    diagnoses = parse_answer("diagnostic principal : Pneumopathie (J189), diagnostic associé : HTA (I10)")
    answer = build_answer(diagnoses)
    effects = EvidenceFinder(model, batch_tokens).effects(read_prompt(CRH), answer, diagnoses)
    sentences = [CRH[sentence.start : sentence.end] for sentence in effects.sentences]
    assert sentences == ["Patient de 60 ans.", "Toux et fièvre.", "Pas de diabète, HTA traitée."]
    full = chances(model, CRH, answer)
    text = "".join(piece for piece, _ in full)
    for code, item in enumerate(("Pneumopathie (J189", "HTA (I10")):
        for place, sentence in enumerate(sentences):
            without = chances(model, CRH.replace(sentence, ""), answer)
            drop, end = 0.0, 0
            for (piece, before), (_, after) in zip(full, without):
                end += len(piece)
                inside = end > text.index(item) and end - len(piece) < text.index(item) + len(item)
                drop += inside * (before - after)
            assert effects.drops[code][place] == pytest.approx(drop, abs=1e-4)


def test_documents_dates_and_marks_of_the_evidence(
    model: Path, notes: Path, jsonl, tmp_path: Path, run_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.engines.evidence._SMALLEST_DROP", -1e9)  # an untrained model: all sentences
    predictions = jsonl("p.jsonl", [{"id": "s1", "codes": CODES, "decision": "auto"}, {"id": "s2", "codes": CODES[1:]}])
    out = tmp_path / "e.jsonl"
    command = [explain_icd10, "--run", model, "--notes", notes, "--predictions", predictions, "--out", out]
    code, output = run_command(*command, "--most", 9)
    assert code == 0 and "Evidence for the codes of 1 stay" in output, output
    assert "1 stay without (s2): the codes are not one DP, at most one DR and DAS" in output
    assert out.stat().st_mode & 0o777 == 0o600
    (row,) = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert row["decision"] == "auto" and [code["code"] for code in row["codes"]] == ["J189", "I10", "E119"]
    note = read_prompts(notes)[0][0].messages[-1]["content"].partition("suivant : ")[2]
    for code in row["codes"]:
        found = {each["sentence"]: each for each in code["evidence"]}
        assert list(found) == sorted(found, key=lambda sentence: -found[sentence]["drop"])
        assert all(note[each["start"] : each["end"]] == each["sentence"] for each in found.values())
        assert {(each["document"], each["date"]) for name, each in found.items() if "asthme" in name} == {
            ("OBS", "2026-01-03")
        }
        assert len(found) == 4 and found["Toux et fièvre."]["document"] == "CRH"
        assert found["Pas de diabète, HTA traitée."]["marks"] == (["negation"] if code["code"] != "I10" else [])
    before = out.read_bytes()
    monkeypatch.setattr("utils.engines.evidence.EvidenceFinder.effects", None)
    assert "s2" in run_command(*command, "--most", 9)[1] or out.read_bytes() == before
    code, output = run_command(*command)
    assert code == 1 and "was written with a different most; delete it" in output
    code, output = run_command(*command[:-1], tmp_path / "e.csv")
    assert code == 1 and "expected a name that ends in .jsonl" in output


def test_predictions_of_other_notes_are_refused(model: Path, notes: Path, jsonl, tmp_path: Path, run_command) -> None:
    command = [explain_icd10, "--run", model, "--notes", notes, "--out", tmp_path / "e.jsonl", "--predictions"]
    code, output = run_command(*command, jsonl("p.jsonl", [{"id": "x", "codes": CODES}]))
    assert code == 1 and "has no id of" in output
    code, output = run_command(*command, jsonl("q.jsonl", [{"id": "s1", "answer": "I10"}]))
    assert code == 1 and "line 1: no `codes`; expected a line of utils.predict_icd10" in output
    for number, wrong in enumerate(({"code": 5}, {"code": "I10", "label": 3}, "I10")):
        codes = [CODES[0] | wrong] if isinstance(wrong, dict) else [wrong]
        code, output = run_command(*command, jsonl(f"r{number}.jsonl", [{"id": "s1", "codes": codes}]))
        assert code == 1 and f"r{number}.jsonl, line 1: no `codes`; expected a line" in output
    code, output = run_command(*command, tmp_path / "p.csv")
    assert code == 1 and "expected the jsonl that utils.predict_icd10 wrote" in output and "it, p.jsonl" in output
