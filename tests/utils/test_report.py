"""A page about runs: it says what the files say, needs nothing else, and no file of a run can break it."""

import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml

from finetune.cli import run_cli
from utils import report
from utils.report import html_report, read_runs, read_settings
from utils.reports.line_chart import Line, line_chart

SVG = "{http://www.w3.org/2000/svg}"
VOID = {"meta"}


class Page(HTMLParser):
    """Checks that every element is closed; keeps tags, text, and the cells of each table."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.rows = [], [], [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def write_jsonl(path, rows, tail=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + tail, encoding="utf-8")


def train_record(step, loss, **more):
    record = {"lr": 1e-4 / step, "step": step, "loss": loss, "percent_done": 10.0 * step, "peak_allocated_mem": 0.0}
    return record | {"wps": 1000.0 + step, "avg_wps": 2345.6, "grad_norm": 0.5 * step, "skipped_steps": 0} | more


@pytest.fixture
def make_run(tmp_path):
    """A run folder with losses 3, 2, 1 and two evaluations; keyword arguments are settings of its args.yaml."""

    def make(name="run_a", losses=(3.0, 2.0, 1.0), **settings):
        folder = tmp_path / name
        write_jsonl(folder / "metrics.train.jsonl", [train_record(n, loss) for n, loss in enumerate(losses, start=1)])
        evals = [{"step": 0, "micro_f1": 0.125}, {"step": 2, "micro_f1": 0.75, "eval_loss": 1.5}]
        write_jsonl(folder / "metrics.eval.jsonl", [*evals, {"step": 3, "micro_f1": 0.5, "eval_loss": 1.75}])
        (folder / "args.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return folder

    return make


def page_of(*folders):
    html = html_report(read_runs(folders))
    return html, Page(html)


def test_summary_says_what_came_of_a_run(make_run):
    folder = make_run()
    for step in (2, 10):
        (folder / f"checkpoints/checkpoint_{step:06d}").mkdir(parents=True)
    row = page_of(folder)[1].rows[1]
    facts = ["3 of 10", "1.000", "1.500 (step 2)", "0.750 (step 2)", "2,346", "–", "checkpoint_000010"]
    assert row == ["run_a", *facts]


def curves(svg):
    """Points in px of each line that has a name."""
    found = {}
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if (title := path.find(f"{SVG}title")) is not None and "not finite" not in title.text:
            places = re.findall(r"([ML])([\d.-]+) ([\d.-]+)", path.get("d"))
            found[title.text] = [(pen, float(x), float(y)) for pen, x, y in places]
    return found


def ticks(svg):
    """Values and their heights in px, from the labels of the value axis."""
    labels = [text for text in ElementTree.fromstring(svg).iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    return sorted((float(text.text.replace(",", "")), float(text.get("y")) - 4) for text in labels)


def test_points_stand_where_the_axes_say():
    points = [(1, 3.0), (2, 2.25), (10, 1.0)]
    svg = line_chart("x", [Line("a", points, 0), Line("b", [(5, 2.0)], 1)])
    (low, low_y), *_, (high, high_y) = ticks(svg)
    assert low <= 1 and high >= 3
    places = curves(svg)["a"]
    for (step, value), (_, x, y) in zip(points, places, strict=True):
        assert y == pytest.approx(low_y + (value - low) / (high - low) * (high_y - low_y), abs=0.2)
        assert (x - places[0][1]) / (places[-1][1] - places[0][1]) == pytest.approx((step - 1) / 9, abs=1e-3)


def test_values_that_span_much_stand_on_a_logarithmic_axis():
    svg = line_chart("x", [Line("a", [(1, 0.01), (2, 1.0), (3, 100.0)], 0)])
    _, first, second, third = (0, *(y for _, _, y in curves(svg)["a"]))
    assert first - second == pytest.approx(second - third, abs=0.2)
    svg = line_chart("x", [Line("a", [(1, 0.01), (2, 1.0), (3, 100.0)], 0)], from_zero=True)
    assert ticks(svg)[0][0] == 0


def test_a_line_has_a_gap_where_a_value_is_not_finite():
    svg = line_chart("x", [Line("a", [(1, 3.0), (2, None), (3, 1.0), (4, 1.5)], 0)])
    assert [pen for pen, _, _ in curves(svg)["a"]] == ["M", "M", "L"]
    assert "a, step 2: not finite" in svg


def test_a_long_line_is_thinned_and_keeps_its_spike():
    points = [(step, 1.0 + step % 7 / 100) for step in range(1, 20_001)]
    points[12_344] = (12_345, 9.0)
    svg = line_chart("x", [Line("a", points, 0)])
    places = curves(svg)["a"]
    (low, low_y), *_, (high, high_y) = ticks(svg)
    assert len(places) < 2000
    assert min(y for _, _, y in places) == pytest.approx(low_y + (9 - low) / (high - low) * (high_y - low_y), abs=0.2)


@pytest.mark.parametrize("values", [[0.0], [2.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 1e-30], [1e9, 1e10], [5e-324, 1e300]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_any_values_can_be_drawn(values, from_zero):
    svg = line_chart("<x>", [Line("a&b", list(enumerate(values)), 20)], from_zero=from_zero, smooth=True)
    places = [(x, y) for _, x, y in curves(svg)["a&b"]]
    assert len(places) == len(values) and all(0 <= x <= 520 and 0 <= y <= 270 for x, y in places)


def test_page_has_a_line_per_run_and_measure(make_run):
    html, page = page_of(make_run("run_a"), make_run("run_b"))
    charts = dict(re.findall(r"<figcaption>(.*?)</figcaption>\n(<svg.*?</svg>)", html))
    assert [title.split(",")[0] for title in charts] == [
        "Loss",
        "Micro F1 of the answers",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
    ]  # no memory was measured
    names = [set(curves(svg)) for svg in charts.values()]
    assert names[0] == {"run_a, loss", "run_a, eval_loss", "run_b, loss", "run_b, eval_loss"}
    assert names[1] == {"run_a, micro_f1", "run_b, micro_f1"}
    assert "run_a, micro_f1, step 2: 0.75" in page.text
    assert html.count('class="swatch"') == 2


def test_only_differing_settings_are_set_against_each_other(make_run):
    one = make_run("run_a", lora={"rank": 8, "targets": ["wq"]}, seed=1, seq_len=512)
    two = make_run("run_b", lora={"rank": 16, "targets": ["wq"]}, seed=1, seq_len=512, extra="<new>")
    _, page = page_of(one, two)
    assert [row for row in page.rows if len(row) == 3] == [
        ["", "run_a", "run_b"],
        ["lora.rank", "8", "16"],
        ["extra", "–", "<new>"],
    ]
    assert "seq_len 512" in page.text and 'lora.targets ["wq"]' in page.text


def test_runs_of_one_name_are_told_apart(make_run):
    one, two = make_run("x/run"), make_run("y/run")
    assert [run.name for run in read_runs([one, two, one])] == [str(one), str(two)]


def test_answers_before_and_after_stand_beside_the_expected(make_run):
    folder = make_run()
    for step, answer in ((0, "before"), (2, "between"), (1_000_000, "after <script>alert(1)</script>&amp;")):
        rows = [{"expected": f"right {n}", "answer": f"{answer} {n}\u2028"} for n in range(10)]
        write_jsonl(folder / f"answers/step_{step:06d}.jsonl", rows, tail='{"expected": "rig')
    _, page = page_of(folder)
    rows = [row for row in page.rows if len(row) == 3]
    assert rows[0] == ["expected", "step 0", "step 1,000,000"]
    assert rows[1] == ["right 0", "before 0\u2028", "after <script>alert(1)</script>&amp; 0\u2028"]
    assert len(rows) == 1 + report.MOST_SAMPLES and f"{report.MOST_SAMPLES} of 10 samples" in page.text
    assert "between" not in page.text and "script" not in page.tags


def test_one_set_of_answers_has_one_column(make_run):
    folder = make_run()
    write_jsonl(folder / "answers/step_000000.jsonl", [{"expected": "right", "answer": "before"}])
    assert ["expected", "step 0"] in page_of(folder)[1].rows


def test_page_needs_no_network(make_run):
    html, page = page_of(make_run("<img src=http://x.org>", model_id_or_path="https://example.org/<b>"), make_run("b"))
    assert not {"script", "link", "img", "iframe", "image", "use", "object", "a"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "xlink:href", "srcset", "action"}
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style


def test_page_comes_from_the_metrics_alone(make_run):
    folder = make_run(losses=(3.0, None, 1.0))
    (folder / "args.yaml").unlink()
    (folder / "metrics.eval.jsonl").unlink()
    with (folder / "metrics.train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"lr": 0.1, "step": 4, "lo')
    _, page = page_of(folder)
    assert page.rows[1] == ["run_a", "3 of 10", "1.000", "–", "–", "2,346", "–", "–"]
    assert "No args.yaml that can be read: run_a" in page.text and "loss, step 2: not finite" in page.text


def test_a_run_that_has_logged_nothing_yet_has_a_page(make_run):
    folder = make_run(losses=())
    (folder / "metrics.eval.jsonl").unlink()
    assert "None yet." in page_of(folder)[1].text


@pytest.mark.parametrize("text", ["- a list", "key: [cut", "\x00", "", "é: 1"])
def test_broken_settings_are_passed_over(text, tmp_path):
    (tmp_path / "args.yaml").write_bytes(text.encode("latin-1"))
    assert read_settings(tmp_path / "args.yaml") == {}


def test_keys_are_hidden(make_run):
    html, _ = page_of(make_run(wandb={"key": "0123456789abcdef", "project": "p"}))
    assert "0123456789abcdef" not in html and "<b>wandb.key</b> ***" in html


def test_command_writes_the_page_or_says_why_not(make_run, monkeypatch, capsys, tmp_path):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        run_cli(report.main)

    out = tmp_path / "pages/report.html"
    command(make_run(), "--out", out)
    assert out.read_text(encoding="utf-8") == page_of(tmp_path / "run_a")[0]
    before = out.read_bytes()
    for arguments, said in (
        ((tmp_path / "nowhere", "--out", out), "nowhere is no run folder: expected one that holds metrics.train.jsonl"),
        ((tmp_path / "run_a", "--out", tmp_path / "run_a/args.yaml"), "expected a name that ends in .html"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(*arguments)
        assert stop.value.code == 1 and said in capsys.readouterr().err
    assert out.read_bytes() == before
