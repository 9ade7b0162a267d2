"""Every kind of HTML page in Chromium, on a phone and a desktop, in light and dark: readable, and nothing is requested.

PAGES_SCREENSHOTS=FOLDER keeps a picture of each.
"""

import itertools
import json
import os
import random
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.acceptance.summary import write_summary
from tests.support.chromium import Browser, find_chromium
from utils.evaluate_icd10 import evaluate
from utils.icd10.answers import Diagnosis
from utils.icd10.codes import CHAPTER_NAMES, Cim10Entry, Cim10Table, chapter
from utils.icd10.drift import Period, Shift
from utils.icd10.predictions import Prediction
from utils.icd10.review_items import Evidence, Item, StayToReview
from utils.reports import pages
from utils.reports.drift_page import drift_page
from utils.reports.evaluation_page import html_page
from utils.reports.review_page import WORKLIST, review_page
from utils.reports.run_page import html_report, read_runs

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome in PATH")

CODES = [f"{letter}{number:02}" for letter in "ABCDEFGHIJKLMNOPQRSTUVXYZ" for number in range(0, 100, 7)]
CODES = [code for code in CODES if chapter(code) in CHAPTER_NAMES]
WITHOUT_CHARTS = ("review", "tables")
SMALLEST_TEXT = 11  # CSS pixels of the smallest text of a chart
CONTRAST = 4.5  # of text with its background: WCAG 2, level AA

# Each text of a chart: [chart, text, size in CSS pixels, left, top, right, bottom].
CHART_TEXTS = """[...document.querySelectorAll('svg.chart')].flatMap((chart, number) => {
    const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
    return [...chart.querySelectorAll('text')].map(text => {
        const box = text.getBoundingClientRect();
        const size = parseFloat(getComputedStyle(text).fontSize) * scale;
        return [number, text.textContent, size, box.left, box.top, box.right, box.bottom];
    });
})"""
# The colors of everything that is written, [text, color], and of each chart's lines and bars.
TEXT_COLORS = """[...document.querySelectorAll('body *')].filter(element =>
    !element.matches('title, script, noscript, option')
    && [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim())
).map(element => [
    element.textContent.slice(0, 30),
    getComputedStyle(element)[element.tagName == 'text' ? 'fill' : 'color'],
    getComputedStyle(
        element.closest('[aria-current=true], .card, .note, input, select, .bar button, #stay button') || document.body
    ).backgroundColor,
])"""
DRAWN_COLORS = """[...document.querySelectorAll('svg.chart path, svg.chart use')].filter(
    mark => !mark.closest('defs')
).flatMap(mark => [getComputedStyle(mark).fill, getComputedStyle(mark).stroke])"""


def evaluation():
    """Return a page with every table: all chapters, a second coder, depth-aware scores, rules, groups of stays."""
    chance = random.Random(0)

    def stay(facts):
        codes = chance.sample(CODES, 6)
        return Prediction([Diagnosis(role, code) for role, code in zip(("DP", "DR", *["DAS"] * 4), codes)], facts=facts)

    def recoded(coding, share):
        kept = [item for item in coding.diagnoses if chance.random() < share]
        return Prediction([*kept, Diagnosis("DAS", chance.choice(CODES))])

    specialties = ("cardiology", "gastro-enterology and digestive oncology", "surgery")
    gold = {
        f"stay {number:03}": stay({"patient": f"p{number // 2}", "specialty": specialties[number % 3], "words": "400"})
        for number in range(150)
    }
    table = [Cim10Entry(code, 0, f"{code}, with a long label that says what it excludes", "") for code in CODES[:200]]
    result = evaluate(
        gold,
        {name: recoded(coding, 0.8) for name, coding in list(gold.items())[5:]},
        Cim10Table(table),
        [coding.diagnoses for coding in list(gold.values())[:90]],
        second={name: recoded(coding, 0.9) for name, coding in gold.items()},
        with_depth=True,
    )
    checkpoint = "/data/hospital/runs/2026-11-27_icd_v1_rank64/checkpoints/checkpoint_000300"
    return html_page(result, {"Predictions": "test_instruct.checkpoint_000300.jsonl", "Checkpoint": checkpoint})


def worklist():
    """Return a page to review two stays: every kind of item, broken rules, facts, and a note with evidence."""
    items = [Item("DP", "", "I500", "Insuffisance cardiaque " * 4, 0.4, evidence=(Evidence("Dyspnée.", "CRH"),))]
    items += [Item("DAS", "I10", "", "Hypertension", None), Item("", "E119", "E110", "Diabète", 0.9)]
    about = {"decision": "to_review", "reason": "DP confidence 0.400, below 0.900", "broken": ("DR without a DP",)}
    stays = [
        StayToReview(name, "", "Dyspnée. Toux. " * 30, 0.6, items, (Diagnosis("DAS", "J90", "Pleurésie"),), facts=facts)
        for name, facts in (("s1", {"specialty": "cardiology"}), ("s2" * 20, {"specialty": "surgery"}))
    ]
    stays = [stay._replace(**about) for stay in stays]
    return review_page("Stays to review", WORKLIST, stays, {"Model": "runs/icd_v1"}, None)


def drift():
    """Return a page of five weeks, the first without reviews."""
    weeks = {f"2026-W{number}": Period(90, 3.1, 0.8, 0.7 + number / 1000, 0.2, 0.01, 0.1) for number in range(44, 48)}
    shifted = [Shift(entry.code, 0.1, 0.2, 4.2) for entry in (Cim10Entry("I10", 0, ""), Cim10Entry("J90", 0, ""))]
    weeks = {"2026-W43": Period(5, 2.0, 0.6)} | weeks
    table = Cim10Table([Cim10Entry("I10", 0, "Hypertension essentielle (primitive) " * 3)])
    return drift_page(weeks, Period(9000, 3.4, 0.85, 0.8), shifted, {"Journal": "worklist/journal.jsonl"}, table)


def runs(folder, names):
    """Return the page of runs of 120 steps that were evaluated twice, at most."""
    for number, name in enumerate(names):
        (folder / name / "answers").mkdir(parents=True)
        train = [
            {"step": step, "loss": 3 / step**0.4 + step % 5 / 20, "lr": 6e-5, "grad_norm": 1 + step % 3, "wps": 9000.0}
            | {"avg_wps": 8999.0, "percent_done": step / 1.2, "peak_allocated_mem": 31.4 + number}
            for step in range(1, 121)
        ]
        evals = [{"step": 60, "micro_f1": 0.41, "eval_loss": 1.5}, {"step": 120, "micro_f1": 0.63, "eval_loss": 0.9}]
        for kind, records in (("train", train), ("eval", evals)):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / name / f"metrics.{kind}.jsonl").write_text(lines, encoding="utf-8")
        for step in (0, 120):
            answer = {"expected": "Diagnostic principal : Insuffisance (I501)", "answer": "Le patient a été " * 12}
            (folder / name / f"answers/step_{step:06d}.jsonl").write_text(json.dumps(answer), encoding="utf-8")
        settings = {"seq_len": 8192 + number, "data": {"instruct_data": "/data/hospital/exports/train_instruct.jsonl"}}
        (folder / name / "args.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return html_report(read_runs([folder / name for name in names]))


def acceptance(folder):
    """Return the page of a run with a failed check, a part that took too long, and speeds."""
    folder.mkdir()
    speed = {"preset": "A", "set": ["num_microbatches=4", "base_dtype=fp8"], "recomputed": "false", "mfu": 0.5}
    speed |= {"attention": "varlen", "tokens_per_second": 12345.6, "peak_bytes": 40 << 30}
    failed = {"part": "gradients", "name": "varlen, bf16", "passed": False, "message": "loss_error is 0.1 " * 8}
    lines = [
        failed | {"numbers": {"loss_error": 0.1}},
        {"part": "gradients", "state": "finished", "seconds": 12.0},
        *(
            {"part": "speed", "name": f"A, {each}", "passed": None, "message": "", "numbers": speed}
            for each in ("ours", "peft")
        ),
        {"part": "speed", "state": "ended after its limit of 90 s", "seconds": 90.0},
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_summary(folder)
    return (folder / "summary.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the files of the pages, by name: a page of each template, and another one of several runs."""
    folder = tmp_path_factory.mktemp("pages")
    long_names = [f"2026-11-{day}_icd_v1_rank64_without_blanks" for day in range(20, 27)]
    sources = {
        "evaluation": evaluation(),
        "runs": runs(folder / "one", ["icd_v1"]),
        "several_runs": runs(folder / "several", long_names),
        "tables": acceptance(folder / "acceptance"),
        "review": worklist(),
        "drift": drift(),
    }
    for name, source in sources.items():
        (folder / f"{name}.html").write_text(source, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in sources}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(str(CHROMIUM), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("PAGES_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("width", [390, 500, 720, 960, 1200])
@pytest.mark.parametrize("name", ["runs", "several_runs"])
def test_summary_of_runs_is_not_cut(name, width, written, browser):
    browser.open(written[name], width, dark=False)
    script = "(box => [box.scrollWidth, box.clientWidth])(document.querySelector('table.summary').parentElement)"
    content, shown = browser.evaluate(script)
    assert content == shown
    lines = browser.evaluate("""[...document.querySelectorAll('table.summary td:first-child')].map(cell => {
        const name = document.createRange();
        name.selectNodeContents(cell);
        return name.getBoundingClientRect().height / parseFloat(getComputedStyle(cell).lineHeight);
    })""")
    assert max(lines) <= 3


def test_names_stay_in_place_while_figures_scroll(written, browser):
    browser.open(written["evaluation"], 390, dark=False)
    places = browser.evaluate("""[...document.querySelectorAll('.scroll:has(.figures)')].map(box => {
        box.scrollLeft = 1000;
        const left = box.getBoundingClientRect().left;
        return [box.scrollLeft, ...[...box.querySelectorAll('td:first-child')].map(
            cell => cell.getBoundingClientRect().left - left)];
    })""")
    assert any(scrolled for scrolled, *_ in places)
    assert {left for _, *lefts in places for left in lefts} == {0}


def luminance(color):
    """Return the relative luminance of `rgb(r, g, b)`, as WCAG 2 defines it."""
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def overlapping(texts):
    """Return pairs of texts of one chart that cover each other by more than a pixel."""
    return [
        (one[1], other[1])
        for one, other in itertools.combinations(texts, 2)
        if one[0] == other[0]
        and min(one[5], other[5]) - max(one[3], other[3]) > 1
        and min(one[6], other[6]) - max(one[4], other[4]) > 1
    ]


def test_every_template_is_opened(written):
    templates = Path(pages.__file__).parent / "templates"
    assert {path.stem for path in templates.glob("*.html")} - {"base", "parts"} <= set(written)


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["evaluation", "runs", "several_runs", "review", "drift", "tables"])
def test_page_is_readable(name, width, written, browser, screenshots):
    colors = {}
    for scheme in ("light", "dark"):
        browser.open(written[name], width, dark=scheme == "dark")
        browser.screenshot(screenshots / f"{name}_{width}_{scheme}.png")
        assert browser.requests == [written[name].as_uri()]
        assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        texts = browser.evaluate(CHART_TEXTS)
        assert bool(texts) == (name not in WITHOUT_CHARTS)
        assert not [text for text in texts if text[2] < SMALLEST_TEXT]
        assert not [text for text in texts if text[3] < 0 or text[5] > width]
        assert overlapping(texts) == []
        written_in = browser.evaluate(TEXT_COLORS)
        assert not [found for found in written_in if contrast(*found[1:]) < CONTRAST]
        colors[scheme] = {color for _, color, _ in written_in}, set(browser.evaluate(DRAWN_COLORS)) - {"none"}
        assert (luminance(written_in[0][2]) < 0.1) == (scheme == "dark")
    assert not colors["light"][0] & colors["dark"][0] and not colors["light"][1] & colors["dark"][1]
