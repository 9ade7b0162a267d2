"""Convert Glaive function-calling rows to our format in place: `python -m utils.reformat_data_glaive FILE.jsonl`.

The same as `utils.reformat_data`, which recognizes Glaive's rows: with `function_description` and `conversations`, or,
as in glaive-function-calling-v2, with `system` and `chat`. mistral-finetune has two commands.
"""

from finetune.cli import run_cli
from utils.tables.chat_rows import reformat_row
from utils.tables.rewrite import rewrite_command


def main() -> None:
    rewrite_command(__doc__, reformat_row)


if __name__ == "__main__":
    run_cli(main)
