"""Convert common chat formats of a jsonl file in place: `python -m utils.reformat_data FILE.jsonl`.

Layouts, recognized row by row: OpenAI's `messages` with `functions` or `tools` in any spelling; ShareGPT's
`conversations`, with LLaMA-Factory's or Hermes' function calls; Glaive's; Alpaca's `instruction`, `input`, `output`;
qa-expert's `question`, `sub_questions`, `final_answer`. A JSON list of rows is accepted, too. Call ids are
generated and matched; messages after the last answer are removed.

Every row that cannot be converted without loss is left out and reported with its line, and the exit code is 1 unless
--allow_skipped is given. The original stays in FILE.jsonl.bak. A file without a row that is recognized is not changed.
"""

from finetune.cli import run_cli
from utils.tables.chat_rows import reformat_row
from utils.tables.rewrite import rewrite_command


def main() -> None:
    rewrite_command(__doc__, reformat_row)


if __name__ == "__main__":
    run_cli(main)
