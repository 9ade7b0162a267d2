"""The review page in Chromium, with 500 stays: filters, decisions and their download, which the commands read back."""

import time

import pytest
from PIL import Image

from docs import draw_pages
from tests.support.chromium import Browser, find_chromium
from tests.support.patience import wait_until
from utils.icd10.codes import Cim10Entry, Cim10Table
from utils.icd10.decisions import ACCEPTED, ADDED, REFUSED, REPLACED, Decision, read_reviews
from utils.icd10.journal import Key, note_hash
from utils.icd10.review_items import Evidence, Item, StayToReview
from utils.reports.review_page import WORKLIST, review_page

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome in PATH")

STAYS = 500
LOADED_WITHIN_S = 2.0
HOSTILE = "</script><img src=http://example.invalid/x onerror=alert(1)>{{ 7 * 7 }}"
EVIDENCE = "Dyspnée stade IV, œdèmes des membres inférieurs."
TABLE = Cim10Table(
    [Cim10Entry(f"I{number:03}", 0, f"Maladie {number} du cœur & des vaisseaux") for number in range(100, 1000)]
)


def stays():
    """Return stays with notes of about 3,000 characters, every tenth of cardiology; the first has hostile texts."""
    found = []
    for number in range(STAYS):
        items = [
            Item(
                "DP",
                "",
                "I500",
                "Insuffisance cardiaque",
                number / STAYS,
                evidence=(Evidence(EVIDENCE, "CRH, negation"),),
            ),
            Item("DAS", "", "I100", HOSTILE if not number else "Hypertension", 0.9),
        ]
        text = f"Séjour {number}. {EVIDENCE} " + "Le patient est suivi depuis dix ans. " * 80
        name = HOSTILE if not number else f"=s{number}"
        specialty = {"specialty": "cardiology" if number % 10 == 0 else "surgery"}
        decision = "auto" if number > 400 else "to_review"
        text = HOSTILE + text if not number else text
        found.append(StayToReview(name, note_hash(text), text, 1 - number / STAYS, items, (), decision, "", specialty))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("worklist") / "review.html"
    path.write_text(review_page("Stays", WORKLIST, stays(), {"Model": HOSTILE}, TABLE), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(str(CHROMIUM), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(page, browser, tmp_path):
    browser.download_into(tmp_path)
    browser.open(page, 1200, dark=False)
    return browser


def choose(browser, name, value):
    browser.evaluate(
        f"(box => {{ box.value = {value!r}; box.dispatchEvent(new Event('input', {{ bubbles: true }})); }})"
        f"(document.querySelector({name!r}))"
    )


def press(browser, text, number=0):
    """Press the button of the stay with this text, and this number among those of the same text."""
    browser.evaluate(
        f"[...document.querySelectorAll('#stay button')].filter(b => b.textContent == {text!r})[{number}].click()"
    )


def listed(browser):
    return browser.evaluate("[...document.querySelectorAll('#stays button span:first-child')].map(s => s.textContent)")


def test_it_loads_quickly_and_requests_nothing(page, opened):
    assert opened.requests == [page.as_uri()]
    assert len(listed(opened)) == STAYS
    loaded = []
    for _ in range(3):  # the fastest: on a busy machine, others take longer
        opened.open(page, 1200, dark=False)
        loaded.append(opened.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"))
    assert 0 < min(loaded) < LOADED_WITHIN_S


def test_texts_are_never_markup(opened):
    assert listed(opened)[0] == HOSTILE
    assert opened.evaluate("document.querySelector('.note').textContent").startswith(HOSTILE)
    assert HOSTILE in opened.evaluate("document.querySelector('dl.facts dd').textContent")
    assert opened.evaluate("document.images.length") == 0
    # Even a request of the page itself is refused by its policy.
    opened.evaluate(
        "addEventListener('securitypolicyviolation', event => { window.refused = event.blockedURI; }); "
        "document.createElement('img').src = 'http://example.invalid/y'"
    )
    wait_until(lambda: opened.evaluate("window.refused"), "the request was not refused")


def test_evidence_is_marked_in_the_note(opened):
    assert opened.evaluate("[...document.querySelectorAll('.note mark')].map(m => m.textContent)") == [EVIDENCE]
    assert opened.evaluate("document.querySelector('.items q').textContent") == f"{EVIDENCE} (CRH, negation)"


def test_a_number_and_its_percent_sign_stay_on_one_line(opened):
    shown = "[...document.querySelectorAll('.items small')].map(s => s.textContent)"
    assert opened.evaluate(shown) == ["confidence 0\u00a0%", "confidence 90\u00a0%"]


def test_filters_and_orders(opened):
    choose(opened, "#search", "séjour 77.")
    assert listed(opened) == ["=s77"]
    choose(opened, "#search", "")
    choose(opened, "#decision", "auto")
    assert len(listed(opened)) == 99
    choose(opened, "[data-fact=specialty]", "cardiology")
    choose(opened, "#order", "reverse")
    assert listed(opened) == [f"=s{number}" for number in range(490, 400, -10)]
    choose(opened, "#role", "DR")
    assert listed(opened) == []


def test_decisions_are_downloaded_and_read_back(opened, tmp_path):
    opened.evaluate("document.querySelector('#reviewer').value = '@AB'")
    press(opened, "Accept the rest")  # the first stay
    press(opened, "Next stay")
    press(opened, "Refuse", 0)
    assert "1 begun" in opened.evaluate("document.querySelector('#progress').textContent")
    press(opened, "Replace", 1)
    choose(opened, ".choose input", "maladie 777")
    opened.evaluate("document.querySelector('.options button').click()")
    press(opened, "Next stay")
    press(opened, "Accept", 0)
    press(opened, "Replace", 1)
    choose(opened, ".choose input", "Z999")
    press(opened, "Take")
    assert "Not a code" in opened.evaluate("document.querySelector('.problem').textContent")
    choose(opened, ".choose input", "i50.1")
    press(opened, "Take")
    press(opened, "Add a code")
    choose(opened, ".choose input", "I999")
    press(opened, "Take")
    press(opened, "Next stay")
    press(opened, "Accept", 0)  # begun, so not in the file
    opened.evaluate("document.querySelector('#download').click()")
    file = tmp_path / "decisions.csv"
    wait_until(file.exists, "nothing was downloaded")
    assert ",'=s1," not in file.read_text(encoding="utf-8") and "\n'=s1," in file.read_text(encoding="utf-8")
    reviews = read_reviews([file], "utf-8", TABLE)
    by_stay = {key.stay: review for key, review in reviews.items()}
    assert list(by_stay) == [HOSTILE, "=s1", "=s2"]
    assert Key("=s1", stays()[1].note) in reviews
    assert [found.decisions for found in by_stay.values()] == [
        [Decision("DP", "", "I500", ACCEPTED, "I500"), Decision("DAS", "", "I100", ACCEPTED, "I100")],
        [Decision("DP", "", "I500", REFUSED, ""), Decision("DAS", "", "I100", REPLACED, "I777")],
        [
            Decision("DP", "", "I500", ACCEPTED, "I500"),
            Decision("DAS", "", "I100", REPLACED, "I501"),
            Decision("DAS", "", "", ADDED, "I999"),
        ],
    ]
    assert by_stay["=s1"].reviewer == "@AB"
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert by_stay["=s1"].time[:7] == today[:7]
    choose(opened, "#state", "done")
    assert listed(opened) == [HOSTILE, "=s1", "=s2"]


def test_pictures_of_pages(page, tmp_path, run_command):
    code, output = run_command(draw_pages, page, tmp_path / "review.png")
    assert code == 0, output
    assert (tmp_path / "review.png").read_bytes().startswith(b"\x89PNG")
    colors = Image.open(tmp_path / "review.png").convert("RGB").getcolors(1 << 24)
    assert any(blue > red + 80 for _, (red, _, blue) in colors), "thin lines keep their color"
