"""The sentences that ICD-10 training, generation and evaluation share.

They are those of the documents of recode-with-mistral-finetune, misspellings ("strandisé", "diagnistic relié",
"distiguant") included: adapters were trained with these exact words, and would do worse with better French.
Where those documents leave a choice: associated diagnoses are joined by ", " (they write "(code 1),..." once) and
nothing to list is "aucun" for associated diagnoses as it is for the related one.
"""

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
    """The conversation up to the answer, for generation."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": USER_PROMPT.format(note=note)},
    ]


def instruct_row(note: str, answer: str, row_id: str | None = None) -> dict[str, Any]:
    """One line of instruct data; `id` comes first when given."""
    messages = [*prompt_messages(note), {"role": "assistant", "content": answer}]
    return {"id": row_id, "messages": messages} if row_id is not None else {"messages": messages}


def pretrain_row(note: str, codes: str) -> dict[str, str]:
    """One line of pretrain data: the note, ended by a full stop as in the documents, then its codes.

    Args:
        note: text of the note.
        codes: `label (code), label (code), ...`, main diagnosis first (`answers.list_codes`).
    """
    note = note.rstrip()
    ended = note if note.endswith((".", "!", "?")) else f"{note}."
    return {"text": PRETRAIN_TEXT.format(note=ended, codes=codes)}
