"""Fictional notes written by a model behind Mistral's API, from the stays that the template writer tells too.

What is sent are fictional stays: labels of diagnoses, an age, a sex, a length of stay. Never send a patient's note.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from model.errors import UserError
from utils.fictional_notes.catalogue import Catalogue
from utils.fictional_notes.notes import FictionalNote, seeded_stay
from utils.fictional_notes.scenarios import Stay
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
# Waits of 1 s, 2 s, 4 s... up to a minute, or what the server asks for; it gives up after three minutes of them.
_FIRST_WAIT_MS, _LONGEST_WAIT_MS, _PATIENCE_MS = 1_000, 60_000, 180_000


class NoteRequest(NamedTuple):
    """A note to be written; `id` tells it from every other, of other seeds and models too."""

    id: str
    messages: Messages
    diagnoses: tuple[Diagnosis, ...]


def note_requests(count: int, seed: int, catalogue: Catalogue, length: str, model: str) -> Iterator[NoteRequest]:
    """What to ask for each stay; arguments as for `notes.write_notes`, whose stays these are."""
    for index in range(count):
        rng, stay = seeded_stay(index, seed, catalogue, length)
        prompt = _PROMPT.format(scenario=_scenario(stay), length=_LENGTHS[length], style=rng.choice(_STYLES))
        name = hashlib.sha1(f"{model} {seed} {index} {prompt}".encode(), usedforsecurity=False).hexdigest()
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}]
        yield NoteRequest(name, messages, tuple(stay.diagnoses()))


def _scenario(stay: Stay) -> str:
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
    """Has the notes written, each kept in `journal` as soon as it is there; those it holds are not asked for again.

    Raises:
        UserError: the API refuses or fails; what was written until then is in the journal.
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
    """What asks `model`, with the key in the environment variable MISTRAL_API_KEY.

    Args:
        model: name of a model of the API.
        server: address of another server with the same API; None: Mistral's.

    Raises:
        UserError: the client is not installed, or there is no key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    # Anything else would end up in a header, and from there in an error message.
    if not re.fullmatch(r"[!-~]+", key):
        raise UserError(f"{KEY_VARIABLE} {'is no key' if key else 'is not set'}: export the key of your account first.")
    try:
        from httpx2 import TransportError
        from mistralai.client import Mistral, errors
        from mistralai.client.utils import BackoffStrategy, RetryConfig
    except ImportError as error:
        raise UserError('Mistral\'s API needs its client: pip install "recode-mistral-finetune[mistral]".') from error
    backoff = BackoffStrategy(_FIRST_WAIT_MS, _LONGEST_WAIT_MS, exponent=2, max_elapsed_time=_PATIENCE_MS)
    retries = RetryConfig("backoff", backoff, retry_connection_errors=True)
    client = Mistral(api_key=key, server_url=server, retry_config=retries, timeout_ms=_TIMEOUT_MS)

    def ask(messages: Messages) -> str:
        try:
            choice = client.chat.complete(model=model, messages=messages, temperature=0.7).choices[0]
        except errors.MistralError as error:
            raise _failure(f"answered {error.status_code}: {error.body.strip()[:300]}") from error
        except (errors.NoResponseError, TransportError) as error:
            raise _failure(f"cannot be reached: {str(error).rstrip('.')}") from error
        text = choice.message.content if choice.message else None
        if choice.finish_reason != "stop" or not isinstance(text, str) or not text.strip():
            raise _failure(f"sent no whole note (it stopped for {choice.finish_reason!r})")
        return text.strip()

    return ask


def _failure(what: str) -> UserError:
    return UserError(f"Mistral's API {what}. The notes written so far are kept; give the same command again to go on.")


def save_prompts(requests: Iterable[NoteRequest], journal: Path, out: Path) -> str:
    """Writes what would be asked, a line of `{"id", "messages"}` per note, and says how much it is; asks nothing."""
    requests = list(requests)
    written = read_journal(journal).keys()
    with out.open("w", encoding="utf-8") as file:
        for request in requests:
            file.write(json.dumps({"id": request.id, "messages": request.messages}, ensure_ascii=False) + "\n")
    to_ask = [request for request in requests if request.id not in written]
    characters = sum(len(message["content"]) for request in to_ask for message in request.messages)
    return "\n".join(
        [
            f"The first of {len(requests):,} prompts in {out}:\n",
            *(message["content"] for message in requests[0].messages),
            f"\nTo write: {len(to_ask):,} notes ({len(requests) - len(to_ask):,} are in {journal}), from prompts of "
            # French is some 4 characters a token in Mistral's vocabularies.
            f"{characters:,} characters, about {characters // 4:,} tokens. Nothing was sent.",
        ]
    )
