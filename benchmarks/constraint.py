"""Cost of constrained decoding: our automaton and llguidance with the exported grammar, on the same answers.

`python -m benchmarks.constraint [--codes 15750] [--answers 50] [--rounds 3]` writes random answers with codes of a
fictional table, and measures at each of their tokens the CPU time for the ids of the tokens that may come next, as
generation uses them, and for taking the token. `--before CHECKOUT` measures the automaton of another checkout, too, and
`--cim10 TABLE` uses this table. `--same NOTES` counts instead the notes that an untrained model answers
alike under either constraint. `--show` prints the table of the last results. Needs llguidance.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerBase
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from benchmarks.generate import prompts_of, untrained_model
from benchmarks.measure import ROOT, last_record, measure, peak_rss, print_table, run_json, spread
from finetune.inference import token_bytes
from model.generate import collect_tokens, stream
from utils.fictional_notes.catalogue import load_catalogue
from utils.generate_notes import table_of
from utils.icd10.answer_grammar import answer_grammar, as_lark
from utils.icd10.answers import Diagnosis, build_answer
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint, AnswerGrammar, Vocabulary

VOCABULARY = 32_768  # of the v3 tokenizer, the demo's
COLUMNS = {
    "constraint": lambda result: result["library"],
    "build, s": lambda result: spread(result["build_seconds"]),
    "ms per answer": lambda result: spread(result["ms_per_answer"]),
    "µs per token, mean": lambda result: spread(result["mean_us"], digits=1),
    "median": lambda result: spread(result["median_us"], digits=1),
    "99 %": lambda result: spread(result["p99_us"], digits=0),
    "worst, ms": lambda result: spread(result["worst_us"], 1000, 1),
    "memory, MB": lambda result: spread(result["bytes"], 1e6, 0),
}


class LlguidanceFactory:
    """Creates constraints from a table, with llguidance and the grammar of `utils.export_grammar`."""

    def __init__(self, tokenizer: InstructTokenizerBase, table: Cim10Table, prefix: str) -> None:
        pieces = token_bytes(tokenizer)
        self._inner = tokenizer.tokenizer
        # What llguidance.TokenizerWrapper reads.
        self.eos_token_id, self.bos_token_id = self._inner.eos_id, None
        self.special_token_ids = [token for token, piece in enumerate(pieces) if piece is None]
        self.tokens = [f"<control {token}>".encode() if piece is None else piece for token, piece in enumerate(pieces)]
        wrapped = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self))
        self._matcher = llguidance.LLMatcher(wrapped, as_lark(answer_grammar(table, [prefix])))
        if self._matcher.is_error():
            sys.exit(self._matcher.get_error())

    def __call__(self, text: bytes | str) -> list[int]:
        """Encode; llguidance asks for this only to propose several tokens at once, which is not used here."""
        return self._inner.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"), False, False)

    def new(self) -> "LlguidanceConstraint":
        return LlguidanceConstraint(self._matcher.deep_copy(), len(self.tokens))


class LlguidanceConstraint:
    """The state of one answer; implements `model.generate.Constraint`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary_size: int) -> None:
        self._matcher = matcher
        self._mask = allocate_token_bitmask(1, vocabulary_size)
        self._size = vocabulary_size

    def allowed(self) -> np.ndarray:
        """Return the token ids that may come next."""
        fill_next_token_bitmask(self._matcher, self._mask)
        return np.flatnonzero(np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._size])

    def take(self, token: int) -> None:
        """Advance by the chosen token."""
        self._matcher.consume_token(token)


class OurFactory:
    """Creates constraints from a table, with this project's automaton."""

    def __init__(self, tokenizer: InstructTokenizerBase, table: Cim10Table, prefix: str) -> None:
        self._vocabulary = Vocabulary(token_bytes(tokenizer), tokenizer.tokenizer.eos_id)
        self._grammar = AnswerGrammar(table, prefix)

    def new(self) -> AnswerConstraint:
        return AnswerConstraint(self._grammar, self._vocabulary)


FACTORIES = {"ours": OurFactory, "llguidance": LlguidanceFactory}


def fictional_table(codes: int) -> Cim10Table:
    """Return a table whose labels continue those of the catalogue, as the CIM-10's do; 4 % are not allowed as DP."""
    labels = [entry.label for entry in table_of(load_catalogue()) if entry.type == 0]
    rng = random.Random(0)
    names = itertools.product("ABCDEFGHIJKLMNOPQRSTUVWXYZ", range(100), range(10))
    entries = []
    for letter, category, last in itertools.islice(names, codes):
        label = f"{labels[(ord(letter) * 100 + category) % len(labels)]}, {rng.choice(labels).lower()}"
        kind = rng.choices((0, 4, 2), (96, 1, 3))[0]
        entries.append(Cim10Entry(f"{letter}{category:02}{last}", kind, label))
    return Cim10Table(entries)


def random_answers(table: Cim10Table, count: int) -> list[str]:
    """Return answers with one DP, perhaps a DR, and up to six DAS, that break no forbidding rule."""
    from utils.icd10.rules import guide_rules  # another checkout may not have it

    rng, rules = random.Random(1), guide_rules()
    by_role = {role: [entry for entry in table if rules.allows(role, entry)] for role in ("DP", "DR", "DAS")}

    def answer() -> str:
        roles = ["DP", *["DR"] * rng.randrange(2), *["DAS"] * rng.randrange(7)]
        chosen = [(role, rng.choice(by_role[role])) for role in roles]
        coding = [Diagnosis(role, entry.code, entry.label) for role, entry in chosen]
        return build_answer(rules.repaired(coding, table)[0])

    return [answer() for _ in range(count)]


def cost(library: str, table: Cim10Table, answers: Sequence[str]) -> dict[str, float]:
    """Measure one library in this process; memory is what its peak grows by."""
    tokenizer = MistralTokenizer.v3().instruct_tokenizer
    inner = tokenizer.tokenizer
    rows = [inner.encode(text, bos=False, eos=True) for text in answers]
    before, start = peak_rss(), time.process_time()
    factory = FACTORIES[library](tokenizer, table, " ")  # SentencePiece starts a string with a space
    build = time.process_time() - start
    seconds = []
    for row in rows:
        constraint = factory.new()
        for token in row:
            start = time.process_time()
            allowed = constraint.allowed()
            seconds.append(time.process_time() - start)
            if token not in allowed:
                sys.exit(f"{library} does not allow a token of an answer.")
            start = time.process_time()
            constraint.take(token)
            seconds[-1] += time.process_time() - start
    micro = np.array(seconds) * 1e6
    quantiles = {"median_us": np.median(micro), "p99_us": np.quantile(micro, 0.99), "worst_us": micro.max()}
    per_answer = {"ms_per_answer": micro.sum() / 1000 / len(rows)}
    found = {"build_seconds": build, "tokens": len(micro), **per_answer, "mean_us": micro.mean(), **quantiles}
    return {name: float(value) for name, value in found.items()} | {"bytes": peak_rss() - before}


def same_answers(notes: int) -> dict[str, float]:
    """Answer fictional notes with an untrained model, greedily, under either constraint; count the equal answers."""
    tokenizer = MistralTokenizer.v3().instruct_tokenizer
    model, prompts, table = untrained_model(), prompts_of(notes), table_of(load_catalogue())
    eos_id, answers = tokenizer.tokenizer.eos_id, {}
    for library, factory in FACTORIES.items():
        new = factory(tokenizer, table, " ").new
        answers[library] = collect_tokens(stream(model, prompts, 200, eos_id, constraints=[new() for _ in prompts]))
    tokens = sum(map(len, answers["ours"]))
    return {"notes": notes, "tokens": tokens, "equal": sum(map(list.__eq__, *answers.values()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=15_750)
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="in place of a fictional table")
    parser.add_argument("--answers", type=int, default=50, help="number of random answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="measure the automaton of this checkout, too")
    parser.add_argument("--case", nargs=2, metavar=("LIBRARY", "ANSWERS"), help="measure this in the process itself")
    parser.add_argument("--same", type=int, metavar="NOTES", help="compare the answers to this many notes instead")
    parser.add_argument("--show", action="store_true", help="print the table of the last results")
    options = parser.parse_args()
    if options.same:
        print(same_answers(options.same))
        return
    if options.show:
        print_table(last_record("constraint"), COLUMNS)
        return
    table = Cim10Table.from_file(options.cim10) if options.cim10 else fictional_table(options.codes)
    if options.case:
        library, path = options.case
        print(json.dumps(cost(library, table, json.loads(Path(path).read_text(encoding="utf-8")))))
        return
    libraries = [*FACTORIES, *(["before"] if options.before else [])]
    cases = [{"library": library, "vocabulary": VOCABULARY, "codes": len(table)} for library in libraries]
    of_table = ["--cim10", str(options.cim10.resolve())] if options.cim10 else ["--codes", str(options.codes)]
    # Run by its path, so that another checkout measures the same.
    start = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"

    with tempfile.NamedTemporaryFile("w", suffix=".json") as answers:
        json.dump(random_answers(table, options.answers), answers)
        answers.flush()

        def run(case: dict[str, Any]) -> dict[str, Any]:
            library = "ours" if case["library"] == "before" else case["library"]
            command = [sys.executable, "-c", start, *of_table, "--case", library, answers.name]
            return run_json(*command, root=options.before.resolve() if case["library"] == "before" else ROOT)

        print_table(measure("constraint", cases, options.rounds, run), COLUMNS)


if __name__ == "__main__":
    main()
