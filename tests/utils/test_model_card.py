"""The README.md of an export says what a run recorded, and nothing of notes and folders."""

import json
from pathlib import Path

import pytest
import yaml

from model.errors import UserError
from tests.utils.test_export import checkpoint_of, make_base, make_run
from utils.icd10.prompts import SYSTEM_PROMPT, USER_PROMPT, instruct_row
from utils.models.exports import export
from utils.models.model_card import model_card

NOTE = "Madame Confidentielle, fièvre."


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder of an adapter for CIM-10 coding, on a base with the name of a published model."""
    base = make_base(tmp_path / "secret_place" / "Mistral-7B-v0.3")
    run = make_run(tmp_path / "secret_place" / "run", base, steps=(100, 200))
    for name, rows in (("train.jsonl", 1201), ("eval.jsonl", 3)):
        line = json.dumps(instruct_row(NOTE, "I10"), ensure_ascii=False) + "\n"
        (tmp_path / "secret_place" / name).write_text(line * rows, encoding="utf-8")
    data = {"instruct_data": f"{run.parent}/train.jsonl:2", "eval_instruct_data": f"{run.parent}/eval.jsonl"}
    settings = {
        "data": data,
        "lora": {"enable": True, "rank": 4, "scaling": 3.0},
        "optim": {"lr": 0.003},
        "max_steps": 300,
    }
    (run / "args.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    metrics = [{"step": step, "eval_loss": 1 / step, "perplexity": 1.5} for step in (100, 200, 300)]
    (run / "metrics.eval.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in metrics), encoding="utf-8")
    return run


def card_of(run: Path, out: Path, to: str, **options) -> str:
    export(run, to, out, **options)
    return (out / "README.md").read_text(encoding="utf-8")


def test_what_a_run_recorded(run, tmp_path):
    card = card_of(run, tmp_path / "icd_model", "hf", merged=True)
    for line in (
        "# icd_model",
        "license: apache-2.0",
        "base_model: mistralai/Mistral-7B-v0.3",
        "library_name: transformers",
        "- License of the base model: Apache-2.0",
        "- Checkpoint: step 200 of 300",
        f"> {SYSTEM_PROMPT}",
        f"> {USER_PROMPT}",
        "| train.jsonl | 1,201 | training |",
        "| eval.jsonl | 3 | evaluation |",
        "| lora.enable | true |",
        "| lora.rank | 4 |",
        "| optim.lr | 0.003 |",
        "eval_loss 0.005, perplexity 1.5.",
    ):
        assert line in card.splitlines(), line
    assert NOTE not in card and "secret_place" not in card and str(tmp_path) not in card
    assert "95 %" not in card and "Of answers: (fill in" in card
    assert "`vllm serve DIR`" in card
    assert yaml.safe_load(card.split("---")[1])["language"] == "fr"


@pytest.mark.parametrize("to", ["peft", "mistral"])
def test_other_formats_and_the_best_checkpoint(run, tmp_path, to):
    card = card_of(run, tmp_path / "out", to, merged=to != "peft", step=100)
    assert "- Checkpoint: step 100 of 300" in card and "eval_loss 0.01," in card
    assert ("A LoRA adapter (PEFT)" in card) == (to == "peft")
    assert ("PeftModel.from_pretrained" in card) == (to == "peft") and ("--load-format mistral" in card) == (
        to == "mistral"
    )
    assert "library_name: peft" in card if to == "peft" else "library_name: mistral-common" in card


def test_scores(run, tmp_path):
    score = {"score": 0.9123, "interval": [0.8, 0.95]}
    result = {"counts": {"notes": 1250}, "headline": {"dp_accuracy": score, "dr_f1": {"score": None, "interval": None}}}
    (tmp_path / "scores.json").write_text(json.dumps(result), encoding="utf-8")
    card = model_card("m", "hf", checkpoint_of(run, 200), None, tmp_path / "scores.json")
    assert "On 1,250 notes (95 % intervals in brackets)." in card
    assert "| DP accuracy | 0.912 [0.800, 0.950] |" in card and "DR" not in card.partition("## Scores")[2]
    result = {"word_recall": 0.5, "contains": 0.25, "counts": {"rows": 1}}
    result["intervals"] = {name: [0.0, 1.0] for name in ("word_recall", "contains")}
    (tmp_path / "scores.json").write_text(json.dumps(result), encoding="utf-8")
    card = model_card("m", "hf", checkpoint_of(run, 200), None, tmp_path / "scores.json")
    assert "On 1 question (95 %" in card and "| word recall | 0.500 [0.000, 1.000] |" in card
    for content in ("[]", '{"headline": 1}', "no json"):
        (tmp_path / "scores.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"scores.json is not an evaluation: expected"):
            export(run, "peft", tmp_path / "refused", scores=tmp_path / "scores.json")
    assert not (tmp_path / "refused").exists()


def test_what_is_not_known_is_to_be_filled_in(tmp_path):
    base = make_base(tmp_path / "our_base")
    card = card_of(base, tmp_path / "hf", "hf")
    assert "- Base model: our_base, a folder on the machine of the export (fill in where" in card
    assert (
        card.partition("\n# hf\n")[2].startswith("\nA model in Hugging Face's format")
        and "- License of the base model: (fill in" in card
    )
    assert "license:" not in card.split("---")[1] and "fine-tuned" not in card and "## Training" not in card
    run = make_run(tmp_path / "run", base)  # its args.yaml is empty
    assert "Intended use: (fill in)" in card_of(run, tmp_path / "peft", "peft")


def test_data_that_is_gone_is_said_to_be(run, tmp_path):
    (run.parent / "train.jsonl").unlink()
    card = card_of(run, tmp_path / "peft", "peft")
    assert "| train.jsonl | (not found any more) | training |" in card
