"""How much batching gains, and that constraints hold: `python -m benchmarks.generate [--notes 64] [--answers 0]`.

An untrained model of the demo's shape codes fictional notes one at a time and 16 at a time, each with the same number
of new tokens. With --answers N it then answers N times under the constraint of the generator's CIM-10 table, and the
codes that the table does not allow are counted.
"""

import argparse
import time
from typing import Any

import torch
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tqdm import tqdm

from benchmarks.measure import measure, print_table, spread
from finetune.data.tokenize import SampleEncoder, parse_conversation
from finetune.inference import token_bytes
from model.generate import generate
from model.transformer import Transformer
from utils.generate_notes import table_of
from utils.icd10.answers import parse_answer
from utils.icd10.catalogue import load_catalogue
from utils.icd10.constrain import AnswerConstraint, AnswerGrammar, Vocabulary
from utils.icd10.notes import write_notes
from utils.icd10.prompts import prompt_messages
from utils.make_demo_model import demo_model_args

NEW_TOKENS = 60


def untrained_model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(demo_model_args(dim=128, n_layers=2)).eval()
    return model.requires_grad_(False)


def prompts_of(count: int) -> list[list[int]]:
    encoder = SampleEncoder(MistralTokenizer.v3().instruct_tokenizer)
    notes = write_notes(count, seed=0, catalogue=load_catalogue(), length="short")
    rows = ({"messages": prompt_messages(note.text)} for note in notes)
    return [encoder.encode_prompt(parse_conversation(row).messages) for row in rows]


def seconds(model: Transformer, prompts: list[list[int]], batch: int) -> dict[str, float]:
    start = time.perf_counter()
    for first in range(0, len(prompts), batch):
        generate(model, prompts[first : first + batch], NEW_TOKENS, eos_id=-1)
    return {"notes_per_second": len(prompts) / (time.perf_counter() - start)}


def forbidden_codes(model: Transformer, prompts: list[list[int]], answers: int) -> tuple[int, int]:
    """(codes named, codes the table does not allow in their role) in so many constrained answers, sampled."""
    tokenizer = MistralTokenizer.v3().instruct_tokenizer
    table = table_of(load_catalogue())
    vocabulary, grammar = Vocabulary(token_bytes(tokenizer), tokenizer.tokenizer.eos_id), AnswerGrammar(table, " ")
    cache: dict[Any, list[int]] = {}
    random = torch.Generator().manual_seed(0)
    named = forbidden = 0
    for first in tqdm(range(0, answers, 64), desc="Answering", disable=None):
        batch = [prompts[index % len(prompts)] for index in range(first, min(first + 64, answers))]
        constraints = [AnswerConstraint(grammar, vocabulary, cache) for _ in batch]
        generate(model, batch, 150, tokenizer.tokenizer.eos_id, 1.0, random, constraints)
        for constraint in constraints:
            found = parse_answer(constraint.text)
            named += len(found)
            forbidden += sum(not (item.role and table.allows(item.role, item.code)) for item in found)
    return named, forbidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notes", type=int, default=64)
    parser.add_argument("--answers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, prompts = untrained_model(), prompts_of(options.notes)
    record = measure(
        "generate", [{"batch": 1}, {"batch": 16}], options.rounds, lambda case: seconds(model, prompts, case["batch"])
    )
    columns = {
        "batch": lambda case: str(case["batch"]),
        "notes/s": lambda case: spread(case["notes_per_second"], digits=1),
    }
    print_table(record, columns)
    if options.answers:
        named, forbidden = forbidden_codes(model, prompts, options.answers)
        print(f"{options.answers:,} constrained answers named {named:,} codes, {forbidden:,} of them not allowed.")


if __name__ == "__main__":
    main()
