"""The prompts and answer templates shared by ICD-10 training, generation and evaluation.

They are copied from the documentation of recode-with-mistral-finetune, including its misspellings ("strandisé",
"diagnistic relié", "distiguant"): existing adapters were trained with these exact words and would do worse with
corrected French. Two points that the documentation leaves open: associated diagnoses are joined by ", " (it has
"(code 1),..." once), and an empty list of associated diagnoses is "aucun", as for the related diagnosis.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

SYSTEM_PROMPT = (
    "Vous êtes un modèle de langage en française spécialisé dans le codage des diagnostics selon la classification "
    "internationale des maladies version 10 (CIM-10) pour les résumés standardisés de sortie du programme de "
    "médicalisation des systèmes d'information français (PMSI). A partir des comptes rendus d'hospitalisation vous "
    "donnerez les codes diagnostics CIM-10 que l'on peut retenir pour le séjours en distiguant diagnostic principal, "
    "diagnostic relié et diagnostics associés."
)
USER_PROMPT = (
    "Générez le codage CIM-10 du résumé strandisé de sortie PMSI à partir du compte rendu d'hospitalisation suivant : "
    "{note}"
)
ANSWER = (
    "Codes CIM 10 retenus pour le résumé strandisé de sortie PMSI : diagnostic principal : {DP}, "
    "diagnistic relié : {DR}, diagnostic associé : {DAS}"
)
CODE_ITEM = "{label} ({code})"
ITEM_SEPARATOR = ", "
NOTHING = "aucun"
PRETRAIN_TEXT = "{note} ICD-10 codes : {codes}"


def prompt_messages(note: str) -> list[dict[str, str]]:
    """Return the conversation up to the answer, for generation."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": USER_PROMPT.format(note=note)},
    ]


def note_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the note of a conversation that `prompt_messages` gave; of another one, its last question."""
    content = messages[-1]["content"]
    question = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return question.removeprefix(USER_PROMPT.format(note=""))


def instruct_row(note: str, answer: str, row_id: str | None = None) -> dict[str, Any]:
    """Return a row of instruct data; `id` comes first if given."""
    messages = [*prompt_messages(note), {"role": "assistant", "content": answer}]
    return {"id": row_id, "messages": messages} if row_id is not None else {"messages": messages}


def pretrain_row(note: str, codes: str) -> dict[str, str]:
    """Return a row of pretraining data: the note, which always ends with a period, then its codes.

    Args:
        note: text of the note.
        codes: `label (code), label (code), ...`, main diagnosis first (`answers.list_codes`).
    """
    note = note.rstrip()
    ended = note if note.endswith((".", "!", "?")) else f"{note}."
    return {"text": PRETRAIN_TEXT.format(note=ended, codes=codes)}
