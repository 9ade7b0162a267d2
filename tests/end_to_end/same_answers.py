"""Compare greedy answers of a run's merged export, in transformers, with ours, note by note.

python -m tests.end_to_end.same_answers --run demo/run --notes demo/held_out/notes_instruct.jsonl --n 50
"""

import argparse
import tempfile
from pathlib import Path

from tqdm import tqdm

from finetune.cli import run_cli
from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.inference import load_trained
from model.errors import UserError
from model.generate import generate
from tests.support.other_engines import transformers_answers
from utils.engines.prompts import read_prompts
from utils.models.exports import export

_MAX_TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--n", type=int, default=50)
    options = parser.parse_args()
    model, tokenizer = load_trained(options.run)
    encoder, eos = SampleEncoder(tokenizer), tokenizer.tokenizer.eos_id
    notes = read_prompts(options.notes)[0][: options.n]
    prompts = [encoder.encode_prompt(parse_conversation({"messages": note.messages}).messages) for note in notes]
    with tempfile.TemporaryDirectory() as folder:
        merged = Path(folder) / "merged"
        export(options.run, "hf", merged, merged=True)
        theirs = transformers_answers(merged, prompts, _MAX_TOKENS, eos)
    ours = [generate(model, [prompt], _MAX_TOKENS, eos)[0] for prompt in tqdm(prompts, disable=None)]
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{same} of {len(prompts)} answers are the same, {sum(map(len, ours)):,} tokens")
    if same < len(prompts):
        raise UserError("The exported model answers otherwise.")


if __name__ == "__main__":
    run_cli(main)
