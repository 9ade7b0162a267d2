"""Evidence: how often the sentence that states a diagnosis is found, compared with shared words, on fictional notes.

`python -m benchmarks.evidence [--seeds 1] [--steps 300] [--stays 100] [--length short]` trains the demo's model, ranks
the sentences of other notes by their effect on the probability of each gold code, and appends to
results/evidence.jsonl; `--show` prints the table again. The generator knows which sentences state a diagnosis. The
baseline ranks sentences by the words that they share with the code's label.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import spread
from benchmarks.small_runs import Case, catalogue, experiment_parser, run_experiment, trained_demo
from finetune.cli import run_cli
from finetune.run_dir import find_checkpoint
from utils.fictional_notes.notes import FictionalNote, write_notes
from utils.icd10.answers import build_answer
from utils.icd10.prompts import prompt_messages
from utils.icd10.sentences import by_shared_words

NOTES = 3000
METHODS = {"model": "masked sentences", "words": "shared words"}
RANKS = (1, 3)
COLUMNS = {
    "names of diseases": lambda result: result["wordings"],
    **{
        f"{name}, {measure} at {rank}": lambda result, key=f"{method}_{measure}_at_{rank}": spread(result[key], 1.0, 3)
        for measure in ("precision", "recall")
        for rank in RANKS
        for method, name in METHODS.items()
    },
    "sentences per stay": lambda result: spread(result["sentences_per_stay"], 1.0, 1),
    "s per stay": lambda result: spread(result["seconds_per_stay"], 1.0, 2),
    "CPU s per stay": lambda result: spread(result["cpu_seconds_per_stay"], 1.0, 2),
}


def find_evidence(case: Case, _: Path) -> dict[str, float]:
    """Train, and score the evidence for the gold codes of notes that training has not seen."""
    from utils.engines.evidence import EvidenceFinder
    from utils.engines.prompts import Prompt

    run = trained_demo(NOTES, case["steps"], case["seed"])
    finder = EvidenceFinder(find_checkpoint(run))
    found: dict[str, list[tuple[list[bool], int]]] = {method: [] for method in METHODS}
    spent, sentences = [0.0, 0.0], 0
    notes = list(write_notes(case["stays"], 30 + case["seed"], catalogue(), case["length"], case["wordings"]))
    for note in notes:
        prompt = Prompt(note.id, {"messages": prompt_messages(note.text)})
        before = time.perf_counter(), time.process_time()
        effects = finder.effects(prompt, build_answer(note.diagnoses), note.diagnoses)
        spent = [
            total + now - then for total, now, then in zip(spent, (time.perf_counter(), time.process_time()), before)
        ]
        sentences += len(effects.sentences)
        texts = [note.text[sentence.start : sentence.end] for sentence in effects.sentences]
        for index, diagnosis in enumerate(note.diagnoses):
            stating = _stating(note, diagnosis.code, effects.sentences)
            for method, scores in (("model", effects.drops[index]), ("words", by_shared_words(texts, diagnosis.label))):
                ranked = sorted(range(len(texts)), key=lambda place: -scores[place])
                found[method].append(([place in stating for place in ranked], len(stating)))
    names = ("seconds_per_stay", "cpu_seconds_per_stay", "sentences_per_stay")
    measured = {name: total / len(notes) for name, total in zip(names, (*spent, sentences))}
    measured["codes"] = len(found["model"])
    for method, rankings in found.items():
        for rank in RANKS:
            hits = sum(sum(right[:rank]) for right, _ in rankings)
            measured[f"{method}_precision_at_{rank}"] = hits / sum(len(right[:rank]) for right, _ in rankings)
            measured[f"{method}_recall_at_{rank}"] = hits / sum(stating for _, stating in rankings)
    return measured


def _stating(note: FictionalNote, code: str, sentences: Sequence[tuple[int, int]]) -> set[int]:
    """Return the sentences that state a code."""
    return {
        place
        for place, (start, end) in enumerate(sentences)
        if any(each.code == code and each.start < end and each.end > start for each in note.statements)
    }


def main() -> None:
    parser = experiment_parser(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of the training (default: %(default)s)")
    parser.add_argument("--stays", type=int, default=100, help="explained (default: %(default)s)")
    parser.add_argument(
        "--length", default="short", choices=("short", "long"), help="of the notes (default: %(default)s)"
    )
    options = parser.parse_args()
    size = {"steps": options.steps, "stays": options.stays, "length": options.length}
    cases = [size | {"wordings": wordings} for wordings in ("train", "unseen")]
    run_experiment("evidence", options, cases, find_evidence, COLUMNS)


if __name__ == "__main__":
    run_cli(main)
