"""Compare greedy answers of a run's exports, in transformers and PEFT, with ours, note by note.

python -m tests.end_to_end.same_answers --run demo/run --notes demo/held_out/notes_instruct.jsonl --n 50
"""

import argparse
import tempfile
from pathlib import Path

from tqdm import tqdm

from finetune.args import read_train_args
from finetune.cli import run_cli
from finetune.data.conversation import parse_conversation
from finetune.data.tokenize import SampleEncoder
from finetune.inference import load_trained
from finetune.run_dir import ARGS_NAME
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
        merged, base, adapter = (Path(folder) / name for name in ("merged", "base", "adapter"))
        export(options.run, "hf", merged, merged=True)
        export(Path(read_train_args(options.run / ARGS_NAME).model_id_or_path), "hf", base)
        export(options.run, "peft", adapter)
        theirs = {
            "merged": transformers_answers(merged, prompts, _MAX_TOKENS, eos),
            "base with PEFT adapter": transformers_answers(base, prompts, _MAX_TOKENS, eos, adapter),
        }
    ours = [generate(model, [prompt], _MAX_TOKENS, eos)[0] for prompt in tqdm(prompts, disable=None)]
    same = {name: sum(map(list.__eq__, ours, answers)) for name, answers in theirs.items()}
    for name, count in same.items():
        print(f"{name}: {count} of {len(prompts)} answers are the same, {sum(map(len, ours)):,} tokens")
    if min(same.values()) < len(prompts):
        raise UserError("An export answers otherwise.")


if __name__ == "__main__":
    run_cli(main)
