"""The README.md of an export: what the model is, from what a run recorded, without its texts and paths."""

import json
from pathlib import Path
from typing import Any

import jinja2
import yaml

from finetune.data.args import parse_sources
from finetune.data.exceptions import RowError
from finetune.data.rows import line_offsets, read_rows
from finetune.monitoring.metrics_logger import read_metrics
from finetune.run_dir import ARGS_NAME, run_of, step_of
from model.args import read_params
from model.errors import UserError
from model.peft_format import peft_folder
from utils.icd10.headline import HEADLINE
from utils.icd10.prompts import SYSTEM_PROMPT, USER_PROMPT
from utils.models.known_models import RELEASES

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_FORMATS = {
    "peft": "PEFT's format",
    "hf": "Hugging Face's format for transformers and vLLM",
    "mistral": "Mistral's format for mistral-inference and vLLM",
    "gguf": "GGUF for llama.cpp and Ollama",
}
_LOADING = {
    "peft": "`PeftModel.from_pretrained(base, DIR)` of PEFT loads this folder, DIR, onto the base model",
    "hf": 'In Python, `transformers.pipeline("text-generation", model=DIR)` loads this folder, DIR. '
    "`vllm serve DIR` and `transformers serve DIR` serve it",
    "mistral": "`vllm serve DIR --config-format mistral --load-format mistral --tokenizer-mode mistral` serves this "
    "folder, DIR",
    "gguf": "`llama-server -m FILE` serves the `.gguf` file; a Modelfile of one line, `FROM FILE`, gives it to Ollama",
}
_QA_SCORES = {"word_recall": "word recall", "contains": "contains the reference"}
# Settings that determine the result, in the YAML's spelling.
_SETTINGS = (
    *("lora.enable", "lora.rank", "lora.scaling", "lora.targets", "base_dtype", "param_dtype", "seq_len"),
    *("batch_size", "num_microbatches", "max_steps", "optim.name", "optim.lr", "optim.weight_decay", "optim.schedule"),
    *("optim.pct_start", "data.packing", "seed"),
)
_SOURCES = {"data": "pretraining", "instruct_data": "training", "eval_instruct_data": "evaluation"}


def model_card(name: str, to: str, checkpoint: Path, base: Path | None, scores: Path | None) -> str:
    """Return the README.md of an export.

    Args:
        name: of the export.
        to: its format: "peft", "hf", "mistral" or "gguf".
        checkpoint: folder of the weights that are exported; its run is described if it is in one.
        base: the base model, by its folder or its name on the hub; None: the one that the checkpoint records.
        scores: what `utils.evaluate_icd10` or `utils.evaluate_qa` wrote with --json; None: none.

    Raises:
        UserError: `scores` cannot be read.
    """
    run = run_of(checkpoint.parent) if peft_folder(checkpoint) is None else None
    settings = _settings(run)
    recorded = None if peft_folder(checkpoint) else (read_params(checkpoint).get("lora") or {}).get("base_model")
    origin = Path(base or recorded or settings.get("model_id_or_path") or checkpoint)
    release = RELEASES.get(origin.name.lower()) or next(
        (
            release
            for release in RELEASES.values()
            if (release.repository or "").lower().endswith(f"/{origin.name.lower()}")
        ),
        None,
    )
    sources = _sources(settings)
    step = step_of(checkpoint.parent) if run else 0
    evaluated, values = _scores(scores) if scores else ("", [])
    text = jinja2.Template(_TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        name=name,
        to=to,
        formats=_FORMATS,
        loading=_LOADING,
        base=origin.name,
        license=release.license if release else None,
        repository=release.repository if release else None,
        step=step,
        settings={key: _shown(value) for key in _SETTINGS if (value := _at(settings, key)) is not None},
        data=[{"name": path.name, "rows": _rows(path), "use": use} for path, use in sources],
        icd10=any(_is_icd10(path) for path, use in sources if use == "training"),
        system_prompt=SYSTEM_PROMPT,
        user_prompt=USER_PROMPT,
        evaluated=evaluated,
        scores=values,
        measured=_measured(run, step) if run else None,
    )
    return text.rstrip() + "\n"


def _settings(run: Path | None) -> dict[str, Any]:
    """Return the settings of a run as they were written; a card needs no valid ones."""
    try:
        found = yaml.safe_load((run / ARGS_NAME).read_text(encoding="utf-8")) if run else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _at(settings: dict[str, Any], key: str) -> Any:
    block, _, name = key.rpartition(".")
    inner = settings.get(block) if block else settings
    return inner.get(name) if isinstance(inner, dict) else None


def _shown(value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return shown.lower() if isinstance(value, bool) else shown


def _sources(settings: dict[str, Any]) -> list[tuple[Path, str]]:
    found = []
    for key, use in _SOURCES.items():
        try:
            found += [(source.path, use) for source in parse_sources(str(_at(settings, f"data.{key}") or ""))]
        except UserError:
            continue
    return found


def _rows(path: Path) -> int | None:
    files = sorted(path.rglob("*jsonl")) if path.is_dir() else [path]
    try:
        return sum(len(line_offsets(file)) - 1 for file in files)
    except (OSError, UserError):
        return None


def _is_icd10(path: Path) -> bool:
    """Return whether the first row of a file has the system prompt of CIM-10 coding."""
    try:
        _, row = next(read_rows(path, 1))
        return bool(row["messages"][0]["content"] == SYSTEM_PROMPT)
    except (OSError, StopIteration, RowError, UserError, KeyError, IndexError, TypeError):
        return False


def _measured(run: Path, step: int) -> dict[str, float] | None:
    """Return what the last evaluation up to a step measured."""
    records = [record for record in read_metrics(run, "eval") if record["step"] <= step]
    if not records:
        return None
    return {key: value for key, value in records[-1].items() if key != "at" and value is not None}


def _scores(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Return on what an evaluation was made, and its main scores with their intervals."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if "headline" in result:
            found = [
                {"name": HEADLINE[key], "value": score["score"], "interval": score["interval"]}
                for key, score in result["headline"].items()
                if score["score"] is not None
            ]
            return _count(result["counts"]["notes"], "note"), found
        found = [
            {"name": name, "value": result[key], "interval": result["intervals"][key]}
            for key, name in _QA_SCORES.items()
        ]
        return _count(result["counts"]["rows"], "question"), found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not an evaluation: expected what utils.evaluate_icd10 or utils.evaluate_qa wrote with --json."
        ) from error


def _count(number: int, what: str) -> str:
    return f"On {number:,} {what}{'' if number == 1 else 's'}"
