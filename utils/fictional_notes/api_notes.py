"""Fictional notes written by a model of Mistral's API, for the same stays as those of the templates.

Only fictional stays are sent: labels of diagnoses, age, sex, length of stay. Never send a patient's note.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from model.errors import UserError
from utils.fictional_notes.catalogue import Catalogue
from utils.fictional_notes.notes import FictionalNote, seeded_stay
from utils.fictional_notes.scenarios import FictionalStay
from utils.icd10.answers import Diagnosis
from utils.tables.jsonl import read_journal

KEY_VARIABLE = "MISTRAL_API_KEY"
DEFAULT_MODEL = "mistral-large-latest"

Messages = list[dict[str, str]]
Ask = Callable[[Messages], str]

_SYSTEM = (
    "Vous êtes médecin dans un hôpital français. Vous écrivez des comptes rendus d'hospitalisation fictifs, aussi "
    "vraisemblables que des vrais, qui servent d'exercices de codage PMSI."
)
_PROMPT = """Écrivez le compte rendu d'hospitalisation du séjour fictif suivant.

{scenario}

Consignes :
- Nommez chacune de ces maladies au moins une fois, avec les mots et les abréviations d'un clinicien (HTA, BPCO...), \
sans recopier l'intitulé ci-dessus.
- N'écrivez aucun code, ni « diagnostic principal », « diagnostic relié » ou « diagnostic associé ».
- N'ajoutez aucune autre maladie active. Citez en revanche, comme dans un vrai dossier, un ou deux diagnostics \
écartés, un antécédent guéri ou la maladie d'un parent.
- Examens, résultats, traitements et évolution s'accordent avec le séjour. Noms, lieux et dates sont inventés ; évitez \
les plus courants.
- Longueur : {length}. Style : {style}.
- Répondez par le compte rendu seul, en texte brut, sans mise en forme."""
_LENGTHS = {
    "short": "un seul paragraphe d'une dizaine de lignes",
    "long": "une à deux pages, en rubriques (motif, antécédents, histoire de la maladie, examen, examens "
    "complémentaires, évolution, conclusion, traitement de sortie)",
}
_STYLES = ("phrases complètes", "télégraphique, en abrégé", "courrier au médecin traitant", "dicté, un peu décousu")

_TIMEOUT_MS = 300_000
# Waits of 1 s, 2 s, 4 s... up to 60 s, or the server's Retry-After; gives up after a total of 180 s.
_FIRST_WAIT_MS, _MAX_WAIT_MS, _MAX_TOTAL_WAIT_MS = 1_000, 60_000, 180_000


class NoteRequest(NamedTuple):
    """A note to write; `id` is unique across stays, seeds and models."""

    id: str
    messages: Messages
    diagnoses: tuple[Diagnosis, ...]


def note_requests(count: int, seed: int, catalogue: Catalogue, length: str, model: str) -> Iterator[NoteRequest]:
    """Yield the request for each stay; the stays and the arguments are those of `notes.write_notes`."""
    for index in range(count):
        rng, stay = seeded_stay(index, seed, catalogue, length)
        prompt = _PROMPT.format(scenario=_scenario(stay), length=_LENGTHS[length], style=rng.choice(_STYLES))
        name = hashlib.sha1(f"{model} {seed} {index} {prompt}".encode(), usedforsecurity=False).hexdigest()
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]
        yield NoteRequest(name, messages, tuple(stay.diagnoses()))


def _scenario(stay: FictionalStay) -> str:
    patient = f"{'femme' if stay.sex == 'F' else 'homme'} de {stay.age} ans"
    days = f"{stay.days} jour{'s' * (stay.days > 1)}" if stay.days else "ambulatoire, sortie le jour même"
    lines = [f"Patient : {patient}", f"Durée du séjour : {days}", f"Service : {stay.dp.service}"]
    lines.append(f"Motif du séjour : {stay.dp.label}")
    if stay.dr:
        lines.append(f"Maladie pour laquelle cette prise en charge a lieu : {stay.dr.label}")
    if stay.das:
        lines.append("Autres maladies, toutes prises en charge pendant le séjour :")
        lines += [f"- {das.label}" for das in stay.das]
    return "\n".join(lines)


def write_api_notes(requests: Iterable[NoteRequest], ask: Ask, journal: Path) -> Iterator[FictionalNote]:
    """Request the notes and append each to `journal` on arrival; notes in the journal are not requested again.

    Raises:
        UserError: the API refuses or fails; the notes received before are in the journal.
    """
    written = read_journal(journal)
    with journal.open("a", encoding="utf-8") as file:
        for request in requests:
            if request.id not in written:
                row = {"id": request.id, "text": ask(request.messages)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                written[request.id] = row
            yield FictionalNote(request.id, written[request.id]["text"], request.diagnoses)


def connect(model: str, server: str | None = None) -> Ask:
    """Return a function that sends messages to `model`, with the key in the environment variable MISTRAL_API_KEY.

    Args:
        model: name of a model of the API.
        server: URL of another server with the same API; None for Mistral's.

    Raises:
        UserError: the client is not installed, or the key is missing or malformed.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    # The client rejects other characters in a header with an error message that quotes the key.
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(
            f"{KEY_VARIABLE} {'is not a valid key' if key else 'is not set'}: export the API key of your account."
        )
    try:
        from httpx2 import TransportError
        from mistralai.client import Mistral, errors
        from mistralai.client.utils import BackoffStrategy, RetryConfig
    except ImportError as error:
        raise UserError('Mistral\'s API needs its client: pip install -e ".[mistral]".') from error
    backoff = BackoffStrategy(_FIRST_WAIT_MS, _MAX_WAIT_MS, exponent=2, max_elapsed_time=_MAX_TOTAL_WAIT_MS)
    retries = RetryConfig("backoff", backoff, retry_connection_errors=True)
    client = Mistral(api_key=key, server_url=server, retry_config=retries, timeout_ms=_TIMEOUT_MS)

    def ask(messages: Messages) -> str:
        try:
            # The client's types have a class per role; it accepts plain dicts.
            response = client.chat.complete(model=model, messages=cast(Any, messages), temperature=0.7)
        except errors.MistralError as error:
            raise _failure(f"answered {error.status_code}: {error.body.strip()[:300]}") from error
        except (errors.NoResponseError, TransportError) as error:
            raise _failure(f"cannot be reached: {str(error).rstrip('.')}") from error
        choice = response.choices[0]
        text = choice.message.content if choice.message else None
        if choice.finish_reason != "stop" or not isinstance(text, str) or not text.strip():
            raise _failure(f"sent an incomplete note (finish reason {choice.finish_reason!r})")
        return text.strip()

    return ask


def _failure(what: str) -> UserError:
    return UserError(f"Mistral's API {what}. The notes received so far are saved; run the same command to continue.")


def save_prompts(requests: Iterable[NoteRequest], journal: Path, out: Path) -> str:
    """Write the prompts to `out`, one `{"id", "messages"}` per line, send nothing, and return a summary."""
    requests = list(requests)
    written = read_journal(journal).keys()
    with out.open("w", encoding="utf-8") as file:
        for request in requests:
            file.write(json.dumps({"id": request.id, "messages": request.messages}, ensure_ascii=False) + "\n")
    to_send = [request for request in requests if request.id not in written]
    characters = sum(len(message["content"]) for request in to_send for message in request.messages)
    return "\n".join(
        [
            f"The first of {len(requests):,} prompts in {out}:\n",
            *(message["content"] for message in requests[0].messages),
            f"\nTo request: {len(to_send):,} notes ({len(requests) - len(to_send):,} are already in {journal}), with "
            # French text has about 4 characters per token in Mistral's vocabularies.
            f"prompts of {characters:,} characters, about {characters // 4:,} tokens. Nothing was sent.",
        ]
    )
