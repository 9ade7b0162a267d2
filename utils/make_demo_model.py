"""Create a tiny Mistral model for demos and tests on a laptop.

`python -m utils.make_demo_model --out DIR [--steps 1500] [--cim10 TABLE] [--dim 128] [--n_layers 2] [--seed 0]`

The model is pretrained for a minute or two to read fictional French notes and name their diagnoses
(`utils.fictional_notes.pretraining_examples`). It has never seen a CIM-10 code or the answers of the fine-tuning task.
`--steps 0` keeps the random weights.
"""

import argparse
from pathlib import Path

from finetune.cli import run_cli
from model.errors import UserError
from utils.fictional_notes.catalogue import load_catalogue
from utils.icd10.codes import Cim10Table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--steps", type=int, default=1500, help="training steps; 0: random (default: %(default)s)")
    parser.add_argument("--cim10", type=Path, metavar="TABLE", help="teach only common diagnoses of this CIM-10 table")
    parser.add_argument("--dim", type=int, default=128, help="model width, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--n_layers", type=int, default=2, help="number of layers (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and examples (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    if options.steps < 0 or options.seed < 0:
        raise UserError(f"--steps {options.steps} --seed {options.seed}: expected 0 or more.")
    catalogue = load_catalogue(Cim10Table.from_file(options.cim10) if options.cim10 else None)
    from utils.models.demo_model import demo_model_args, make_demo_model  # imports torch

    args = demo_model_args(options.dim, options.n_layers)
    make_demo_model(options.out, args, options.seed, options.steps, catalogue)
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    run_cli(main)
