"""Speed of batched and constrained generation: `python -m benchmarks.generate [--threads 1] [--answers 10000]`.

An untrained model of the demo's size codes fictional notes, one and 16 at a time, without constraints and constrained
to the generator's CIM-10 table (or --cim10). With --answers N, a smaller model samples N constrained answers instead,
with and without the forbidding rules of the guide, and the codes that the table does not allow and the answers that
break a rule are counted. With --compare MODEL, this model and its export in transformers' generate answer notes of
mixed length, with each of --batches at once.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tqdm import tqdm

from benchmarks.measure import measure, print_table, spread
from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.inference import token_bytes
from model.generate import collect_tokens, stream
from model.sampling import Sampling
from model.transformer import Transformer
from utils.fictional_notes.catalogue import load_catalogue
from utils.fictional_notes.notes import write_notes
from utils.generate_notes import table_of
from utils.icd10.codes import Cim10Table
from utils.icd10.constrained_decoding import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.predictions import Prediction
from utils.icd10.prompts import prompt_messages
from utils.icd10.rule_kinds import Types
from utils.icd10.rules import RuleSet, guide_rules
from utils.icd10.rules_file import FORBIDDEN
from utils.models.demo_model import demo_model_args

NEW_TOKENS = 70  # a typical answer
LONGEST_ANSWER = 200  # sampled answers spell their words in twice as many tokens
BATCH_SIZE = 250  # of sampled answers


def untrained_model(dim: int = 128) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(demo_model_args(dim=dim, n_layers=2)).eval()
    return model.requires_grad_(False)


def prompts_of(count: int) -> list[list[int]]:
    encoder = SampleEncoder(MistralTokenizer.v3().instruct_tokenizer)
    notes = write_notes(count, seed=0, catalogue=load_catalogue(), length="short")
    rows = ({"messages": prompt_messages(note.text)} for note in notes)
    return sorted((encoder.encode_prompt(parse_conversation(row).messages) for row in rows), key=len)


class ConstraintFactory:
    """Creates constraints from a table."""

    def __init__(self, table: Cim10Table, rules: RuleSet | None = None) -> None:
        tokenizer = MistralTokenizer.v3().instruct_tokenizer
        self.eos_id = tokenizer.tokenizer.eos_id
        self._grammar = AnswerGrammar(table, prefix=" ", rules=rules)
        self._vocabulary = Vocabulary(token_bytes(tokenizer), self.eos_id)

    def __call__(self) -> AnswerConstraint:
        return AnswerConstraint(self._grammar, self._vocabulary)


def speed(
    model: Transformer, prompts: list[list[int]], batch: int, new_constraint: ConstraintFactory | None
) -> dict[str, float]:
    eos_id = new_constraint.eos_id if new_constraint else -1  # without constraints, every answer uses all tokens
    start = time.perf_counter()
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        constraints = [new_constraint() for _ in chunk] if new_constraint else None
        collect_tokens(stream(model, chunk, NEW_TOKENS, eos_id, constraints=constraints))
    return {"notes_per_second": len(prompts) / (time.perf_counter() - start)}


def sampled_answers(model: Transformer, answers: int, table: Cim10Table, rules: RuleSet) -> dict[str, float]:
    """Sample constrained answers; count codes that are not allowed in their role, and answers that break the guide.

    Args:
        model: untrained.
        answers: their number.
        table: allowed codes.
        rules: that constrain the answers.
    """
    new_constraint, sampling = ConstraintFactory(table, rules), Sampling(temperature=1.0)
    guide = guide_rules().in_year(None)
    forbidding = guide.of_severity(FORBIDDEN)
    counts: Counter[str] = Counter(codes=0, not_allowed=0, without_code=0, cut_short=0, breaking=0)
    start = time.perf_counter()
    for first in tqdm(range(0, answers, BATCH_SIZE), desc="Answering", disable=None):
        constraints = [new_constraint() for _ in range(min(BATCH_SIZE, answers - first))]
        prompts = [[1]] * len(constraints)  # notes would have no effect on an untrained model
        seeds = range(first, first + len(constraints))
        outputs = collect_tokens(
            stream(model, prompts, LONGEST_ANSWER, new_constraint.eos_id, sampling, seeds, constraints)
        )
        counts["cut_short"] += sum(tokens[-1] != new_constraint.eos_id for tokens in outputs)
        for constraint in constraints:
            found = Prediction.of_answer(constraint.text)
            counts["codes"] += len(found.diagnoses)
            counts["without_code"] += not found.diagnoses
            allowed = (item.role and guide.allows(item.role, table.get(item.code)) for item in found.diagnoses)
            counts["not_allowed"] += sum(not is_allowed for is_allowed in allowed)
            broken = [name for name in guide.broken(found.diagnoses, table) if name in forbidding]
            counts.update(f"breaking {name}" for name in broken)
            counts["breaking repeated"] += found.repeated > 0
            counts["breaking"] += bool(broken or found.repeated)
    return {**counts, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--answers", type=int, help="sample this many answers, count what is forbidden")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="table to constrain answers to")
    parser.add_argument("--compare", type=Path, metavar="MODEL", help="a run, a checkpoint or a model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 50], help="of --compare (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.compare:
        from benchmarks.generate_compared import compare  # imports transformers

        return compare(options.compare, options.notes, options.rounds, options.threads, options.batches)
    model, prompts = untrained_model(), prompts_of(options.notes)
    table = Cim10Table.from_file(options.cim10) if options.cim10 else table_of(load_catalogue())
    if options.answers:
        model = untrained_model(dim=64)
        guide = guide_rules()
        types = RuleSet("types", [rule for rule in guide.rules.values() if isinstance(rule.condition, Types)])
        settings = {"codes_in_table": len(table), "dim": 64}
        some = max(1, options.answers // 20)  # enough to see what the rules prevent
        cases = [
            settings | {"rules": rules.version, "answers": count}
            for rules, count in ((guide, options.answers), (types, some))
        ]
        of_case = {rules.version: rules for rules in (guide, types)}
        record = measure(
            "sampled_answers",
            cases,
            1,
            lambda case: sampled_answers(model, case["answers"], table, of_case[case["rules"]]),
        )
        print(*record["results"], sep="\n")
        return
    cases = [
        {"threads": options.threads, "constrained": constrained, "batch": batch}
        for constrained in (False, True)
        for batch in (1, 16)
    ]
    kinds = {False: None, True: ConstraintFactory(table)}
    record = measure(
        "generate", cases, options.rounds, lambda case: speed(model, prompts, case["batch"], kinds[case["constrained"]])
    )
    columns = {name: lambda case, name=name: str(case[name]) for name in cases[0]}
    print_table(record, {**columns, "notes/s": lambda case: spread(case["notes_per_second"], digits=1)})


if __name__ == "__main__":
    main()
