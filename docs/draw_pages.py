"""Take the pictures of pages in the documentation: `python -m docs.draw_pages PAGE.html PICTURE.png`; needs Chromium.

Those of docs/icd10.md are of the demo's run, and compare it with the generator's codes. After `make demo`:

    export CIM10=example/demo_cim10.tsv NOTES=demo/held_out/text.csv
    python -m utils.predict_icd10 --run demo/run --notes demo/data/eval_instruct.jsonl --out val.jsonl --cim10 $CIM10
    python -m utils.calibrate_icd10 --gold demo/data/eval_instruct.jsonl --predictions val.jsonl
    head -61 $NOTES > export.csv
    python -m utils.code_stays --run demo/run --stays export.csv --out worklist --cim10 $CIM10 --auto 0.99 --evidence
    python -m utils.predict_icd10 --run demo/run --notes $NOTES --out p.jsonl --cim10 $CIM10
    python -m utils.review_icd10 --coded demo/held_out/codes.csv --predictions p.jsonl --out second_reading \\
        --notes $NOTES --cim10 $CIM10
    python -m docs.draw_pages worklist/review.html docs/images/review.png
    python -m docs.draw_pages second_reading/review.html docs/images/second_reading.png
    for week in 1 2 3 4 5; do # the journal's times are moved, so that five weeks pass in a minute
        (head -1 $NOTES; tail -n +2 $NOTES | head -$((week * 30)) | tail -30) > export.csv
        python -m utils.code_stays --run demo/run --stays export.csv --out drift --cim10 $CIM10 --auto 0.9 \\
            --train demo/data/train_instruct.jsonl
        sed -i "s/\\"time\\": \\"$(date +%F)/\\"time\\": \\"$(date +%F -d "-$((5 - week)) weeks")/" drift/journal.jsonl
    done
    python -m docs.draw_pages drift/drift.html docs/images/drift.png
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from finetune.cli import run_cli
from model.errors import UserError
from tests.support.chromium import Browser, find_chromium

WIDTH = 1200  # CSS pixels
_COLORS = 64  # keep a page readable, in a quarter of the bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        raise UserError("No chromium or google-chrome in PATH.")
    with tempfile.TemporaryDirectory() as profile, Browser(program, Path(profile)) as browser:
        browser.open(options.page, WIDTH, dark=False)
        browser.screenshot(options.picture)
    # MAXCOVERAGE keeps the colors of thin lines; the default replaces them by those of the texts.
    picture = Image.open(options.picture).convert("RGB")
    picture.quantize(_COLORS, Image.Quantize.MAXCOVERAGE).save(options.picture, optimize=True)
    print(f"Wrote {options.picture}")


if __name__ == "__main__":
    run_cli(main)
