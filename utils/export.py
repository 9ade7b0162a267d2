"""Export a checkpoint for other tools: a PEFT adapter, or a whole model.

python -m utils.export RUN --to peft --out DIR                     adapter for PEFT
python -m utils.export RUN --to hf --merged --out DIR              model for transformers, vLLM
python -m utils.export RUN --to mistral --merged --out DIR         model for mistral-inference, vLLM
python -m utils.export RUN --to gguf --merged --out DIR            model for llama.cpp, Ollama

--push OWNER/NAME uploads the new folder to the Hugging Face Hub, to a private repository, and needs the extra `hub`.
Without it, no connection is opened.

RUN is a run (its latest checkpoint), a checkpoint, a PEFT adapter or a model folder. A merged model has the dtype of
its base, unless --dtype says otherwise.
"""

import argparse
from pathlib import Path

from finetune.cli import add_step_option, run_cli
from utils.models.hub import check_push, push

_BASE = (
    "base model (default: as the checkpoint records); for --to peft in Hugging Face's layout, or its name on the hub"
)

_DTYPE = "dtype to write (default: the base's; of gguf: fp16); q8_0 is for gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run, a checkpoint or a model")
    parser.add_argument("--to", choices=("peft", "hf", "mistral", "gguf"), required=True, help="format to write")
    parser.add_argument("--merged", action="store_true", help="merge the adapter into its base model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--base", type=Path, metavar="MODEL", help=_BASE)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "q8_0"), help=_DTYPE)
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the export to this repository of the hub")
    parser.add_argument("--public", action="store_true", help="with --push: let everybody download it")
    parser.add_argument(
        "--scores", type=Path, metavar="JSON", help="evaluation (--json of evaluate_icd10), for README.md"
    )
    add_step_option(parser)
    args = parser.parse_args()
    if args.public and not args.push:
        parser.error("--public is for --push OWNER/NAME")

    from utils.models.exports import export  # loads torch, which --help does not need

    if args.push:
        check_push(args.push, args.public)
    export(args.source, args.to, args.out, args.merged, args.base, args.step, args.dtype, args.scores)
    if args.push:
        push(args.out, args.push, args.public)


if __name__ == "__main__":
    run_cli(main)
