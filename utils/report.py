"""Show training runs as one HTML page: `python -m utils.report RUN [RUN...] --out report.html`.

The page has a summary, curves, settings and where they differ, and answers before and after training if the runs kept
them. It is made from `metrics.train.jsonl` and whatever else a run folder has, also while a run is still training. It
needs no network. Kept answers may quote notes, and then so does the page.
"""

import argparse
from pathlib import Path

from finetune.cli import run_cli
from model.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="page to write or replace")
    options = parser.parse_args()
    if options.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{options.out}: expected a name that ends in .html.")

    from utils.reports.run_page import html_report, read_runs  # loads matplotlib, which --help does not need
    from utils.tables.jsonl import save

    save({options.out: html_report(read_runs(options.runs))})
    print(f"Saved {options.out}.")


if __name__ == "__main__":
    run_cli(main)
