"""Write the grammar that restricts answers to codes of a CIM-10 table, for engines that decode with grammars.

python -m utils.export_grammar --cim10 TABLE --out answers.lark     llguidance, and vLLM and SGLang with it
python -m utils.export_grammar --cim10 TABLE --out answers.gbnf     llama.cpp, and xgrammar

It accepts every answer that `utils.predict_icd10 --cim10 TABLE` can give, with a space in front or without: the first
token of a SentencePiece model has one. It enforces the forbidding rules on one code and on the DR, not those on two
codes of a stay (repetitions, a code and its parent, pairs that exclude each other). The engines vllm and server use it
without this command.
"""

import argparse
from pathlib import Path

from finetune.cli import run_cli
from model.errors import UserError
from model.wording import counted
from utils.icd10.answer_grammar import OPTIONAL_SPACE, answer_grammar, as_gbnf, as_lark, item_texts
from utils.icd10.codes import Cim10Table
from utils.icd10.rules import add_rules_option, parse_rules
from utils.tables.jsonl import require_own_names, save

WRITERS = {".lark": as_lark, ".gbnf": as_gbnf}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cim10", type=Path, required=True, metavar="TABLE", help="CIM-10 table of the allowed codes")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file that ends in .lark or .gbnf")
    add_rules_option(parser)
    options = parser.parse_args()
    if options.out.suffix not in WRITERS:
        raise UserError(f"{options.out}: expected a name that ends in {' or '.join(WRITERS)}.")
    require_own_names([options.out], [options.cim10, options.rules])
    grammar = answer_grammar(Cim10Table.from_file(options.cim10), OPTIONAL_SPACE, parse_rules(options.rules))
    text = WRITERS[options.out.suffix](grammar)
    save({options.out: text})
    codes = ", ".join(f"{counted(len(texts), 'text')} of {role}" for role, texts in item_texts(grammar).items())
    size = len(text.encode())
    print(f"{options.out}: {codes}, {f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'}")


if __name__ == "__main__":
    run_cli(main)
