"""The page of training runs: it shows what the files contain, needs nothing else, and no file of a run can break it."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from finetune.cli import run_cli
from utils import report
from utils.reports.charts import CSS_COLORS, WIDTH, Line, line_chart
from utils.reports.run_page import MOST_SAMPLES, html_report, read_runs, read_settings

VOID = {"meta"}


class Page(HTMLParser):
    """Check that every element is closed; keep tags, text, and the cells of each table."""

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
    """Make a run folder with losses 3, 2, 1 and three evaluations; keyword arguments are settings of its args.yaml."""

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


def test_summary_of_a_run(make_run):
    folder = make_run()
    for step in (2, 10):
        (folder / f"checkpoints/checkpoint_{step:06d}").mkdir(parents=True)
    row = page_of(folder)[1].rows[1]
    facts = ["3 of 10", "1.000", "1.500 (step 2)", "0.750 (step 2)", "2,346", "–", "checkpoint_000010"]
    assert row == ["run_a", *facts]


def chart(lines, **options):
    return str(line_chart("chart", "A chart", lines, **options))


def curves(svg):
    """Return the points of each line that has a tooltip, as (pen, x, y)."""
    found = {}
    for path in ElementTree.fromstring(svg).iter("path"):
        if (title := path.find("title")) is not None:
            places = re.findall(r"([ML]) ([\d.-]+) ([\d.-]+)", path.get("d"))
            found[title.text] = [(pen, float(x), float(y)) for pen, x, y in places]
    return found


def dots(svg):
    """Return the positions of the dots and crosses by their tooltips."""
    uses = ElementTree.fromstring(svg).iter("use")
    return {use.find("title").text: (float(use.get("x")), float(use.get("y"))) for use in uses}


def ticks(svg):
    """Return the values and heights of the value axis's labels, from the bottom to the top."""
    labels = [text for text in ElementTree.fromstring(svg).iter("text") if "text-anchor: end" in text.get("style")]
    return sorted((float(text.text.replace(",", "").replace("−", "-")), float(text.get("y")) - 4.5) for text in labels)


def test_points_are_where_the_axes_say():
    points = [(1, 3.0), (2, 2.25), (10, 1.0)]
    svg = chart([Line("a", points, 0), Line("b", [(5, 2.0)], 1)])
    (low, low_y), *_, (high, high_y) = ticks(svg)
    places = curves(svg)["a"]
    for (step, value), (_, x, y) in zip(points, places, strict=True):
        assert y == pytest.approx(low_y + (value - low) / (high - low) * (high_y - low_y), abs=0.5)
        assert (x - places[0][1]) / (places[-1][1] - places[0][1]) == pytest.approx((step - 1) / 9, abs=1e-3)
    assert dots(svg)["b, step 5: 2"][0] == pytest.approx(places[0][1] + 4 / 9 * (places[-1][1] - places[0][1]))


@pytest.mark.parametrize(("steps", "is_curve"), [(1, False), (2, False), (3, True)])
def test_two_evaluations_are_not_joined_by_a_line(steps, is_curve):
    svg = chart([Line("a", [(step, 0.5 + step / 10) for step in range(steps)], 0, marked=True)])
    assert ("a" in curves(svg)) is is_curve and len(dots(svg)) == steps
    assert svg.count("stroke-width: 1.3") == is_curve


def test_a_wide_range_of_values_has_a_logarithmic_axis():
    svg = chart([Line("a", [(1, 0.01), (2, 1.0), (3, 100.0)], 0)])
    first, second, third = (y for _, _, y in curves(svg)["a"])
    assert first - second == pytest.approx(second - third, abs=0.2)
    svg = chart([Line("a", [(1, 0.01), (2, 1.0), (3, 100.0)], 0)], from_zero=True)
    assert ticks(svg)[0][0] == 0


def test_a_line_has_a_gap_where_a_value_is_not_finite():
    svg = chart([Line("a", [(1, 3.0), (2, None), (3, 1.0), (4, 1.5)], 0)])
    assert [pen for pen, _, _ in curves(svg)["a"]] == ["M", "M", "L"]
    assert "a, step 2: not finite" in dots(svg)


def test_a_long_line_is_simplified_and_keeps_its_spike():
    points = [(step, 1.0 + step % 7 / 100) for step in range(1, 20_001)]
    points[12_344] = (12_345, 9.0)
    svg = chart([Line("a", points, 0)])
    (low, low_y), *_, (high, high_y) = ticks(svg)
    assert len(svg) < 300_000
    spike = min(y for _, _, y in curves(svg)["a"])
    assert spike == pytest.approx(low_y + (9 - low) / (high - low) * (high_y - low_y), abs=0.5)


def test_a_long_noisy_line_is_drawn_faintly_under_its_average():
    svg = chart([Line("a", [(step, 1.0 + step % 2) for step in range(200)], 0)], smooth=True)
    assert svg.count("stroke-opacity: 0.35") == 1
    heights = [y for _, _, y in curves(svg)["a"]]
    assert max(heights) - min(heights) < 30  # of the 180 between 1 and 2


@pytest.mark.parametrize("values", [[0.0], [2.0], [2.0, 2.0], [0.0, 0.0], [-1.0, 1e-30], [1e9, 1e10], [5e-324, 1e300]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_any_values_can_be_drawn(values, from_zero):
    svg = chart([Line("a&b", list(enumerate(values)), 20, marked=True)], from_zero=from_zero, smooth=True)
    assert len(dots(svg)) == len(values)
    assert all(0 <= x <= WIDTH and 0 <= y <= 250 for x, y in dots(svg).values())


def test_colors_of_a_chart_are_variables_of_the_page():
    lines = [Line(f"run {number}", [(1, 2.0), (2, 1.0), (3, None)], number) for number in range(7)]
    svg = chart(lines)
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert used <= set(CSS_COLORS) and {f"series-{number}" for number in range(6)} <= used
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert "stroke-dasharray" in svg  # of the seventh


def test_ids_of_charts_do_not_collide():
    charts = [str(line_chart(name, "x", [Line("a", [(1, 1.0), (2, 2.0)], 0, marked=True)])) for name in ("one", "two")]
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in charts]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip(charts, ids):
        assert set(re.findall(r'#([^")]+)["\)]', svg)) == own


def charts_of(html):
    """Return the page's charts by the titles in their captions."""
    return dict(re.findall(r"<figcaption>([^<]*).*?</figcaption>\n(<svg.*?</svg>)", html))


def test_page_has_a_line_per_run_and_measure(make_run):
    html, page = page_of(make_run("run_a"), make_run("run_b"))
    charts = charts_of(html)
    expected = ["Loss", "Micro-F1 of the answers", "Learning rate", "Gradient norm", "Speed"]
    assert list(charts) == expected  # no memory was measured
    assert set(curves(charts["Loss"])) == {"run_a, loss", "run_b, loss"}
    assert {f"{run}, eval_loss, step {step}" for run in ("run_a", "run_b") for step in (2, 3)} == {
        tip.partition(":")[0] for tip in dots(charts["Loss"])
    }
    assert set(curves(charts["Micro-F1 of the answers"])) == {"run_a, micro_f1", "run_b, micro_f1"}
    assert "run_a, micro_f1, step 2: 0.75" in page.text
    assert html.count('<i class="swatch') == 2


def test_a_single_run_has_a_color_for_training_and_one_for_evaluation(make_run):
    html, page = page_of(make_run())
    assert html.count('<i class="swatch') == 2 and "training" in page.text and "evaluation" in page.text
    assert "var(--series-1)" in charts_of(html)["Micro-F1 of the answers"]


def test_peak_memory_is_drawn_if_it_was_measured(make_run):
    folder = make_run()
    write_jsonl(folder / "metrics.train.jsonl", [train_record(1, 1.0, peak_allocated_mem=12.5)])
    html, page = page_of(folder)
    assert "memory" in html and "Peak memory" in charts_of(html) and page.rows[1][6] == "12.5 GiB"


def test_only_settings_that_differ_are_compared(make_run):
    one = make_run("run_a", lora={"rank": 8, "targets": ["wq"]}, seed=1, seq_len=512)
    two = make_run("run_b", lora={"rank": 16, "targets": ["wq"]}, seed=1, seq_len=512, extra="<new>")
    _, page = page_of(one, two)
    assert [row for row in page.rows if len(row) == 3] == [
        ["", "run_a", "run_b"],
        ["lora.rank", "8", "16"],
        ["extra", "–", "<new>"],
    ]
    assert "seq_len 512" in page.text and 'lora.targets ["wq"]' in page.text


def test_runs_with_equal_names_are_named_by_their_paths(make_run):
    one, two = make_run("x/run"), make_run("y/run")
    assert [run.name for run in read_runs([one, two, one])] == [str(one), str(two)]


def test_answers_before_and_after_are_next_to_the_expected(make_run):
    folder = make_run()
    for step, answer in ((0, "before"), (2, "between"), (1_000_000, "after <script>alert(1)</script>&amp;")):
        rows = [{"expected": f"right {n}", "answer": f"{answer} {n}\u2028"} for n in range(10)]
        write_jsonl(folder / f"answers/step_{step:06d}.jsonl", rows, tail='{"expected": "rig')
    _, page = page_of(folder)
    rows = [row for row in page.rows if len(row) == 3]
    assert rows[0] == ["expected", "step 0", "step 1,000,000"]
    assert rows[1] == ["right 0", "before 0\u2028", "after <script>alert(1)</script>&amp; 0\u2028"]
    assert len(rows) == 1 + MOST_SAMPLES and f"{MOST_SAMPLES} of 10 samples" in page.text
    assert "between" not in page.text and "script" not in page.tags


def test_one_set_of_answers_has_one_column(make_run):
    folder = make_run()
    write_jsonl(folder / "answers/step_000000.jsonl", [{"expected": "right", "answer": "before"}])
    assert ["expected", "step 0"] in page_of(folder)[1].rows


def test_page_needs_nothing_else(make_run):
    html, page = page_of(make_run("<img src=http://x.org>", model_id_or_path="https://example.org/<b>"), make_run("b"))
    assert not {"script", "link", "img", "iframe", "image", "object", "a"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "xlink:href", "srcset", "action"}
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert set(re.findall(r"https?://[^\"'< ]+", html)) == {"https://example.org/&lt;b&gt;"}  # as text


def test_page_suits_phones_dark_screens_and_paper(make_run):
    html, page = page_of(make_run())
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "@media screen and (prefers-color-scheme: dark)" in style and "@media print" in style
    for name, (light, dark) in CSS_COLORS.items():
        assert f"--{name}: {light};" in style and f"--{name}: {dark};" in style
    assert set(re.findall(r"var\(--([\w-]+)\)", html)) <= set(CSS_COLORS)
    assert page.tags.count("table") == html.count('<div class="scroll"')


def test_metrics_alone_make_a_page(make_run):
    folder = make_run(losses=(3.0, None, 1.0))
    (folder / "args.yaml").unlink()
    (folder / "metrics.eval.jsonl").unlink()
    with (folder / "metrics.train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"lr": 0.1, "step": 4, "lo')
    _, page = page_of(folder)
    assert page.rows[1] == ["run_a", "3 of 10", "1.000", "–", "–", "2,346", "–", "–"]
    assert "No readable args.yaml: run_a" in page.text and "loss, step 2: not finite" in page.text


def test_a_run_without_any_metrics_yet_has_a_page(make_run):
    folder = make_run(losses=())
    (folder / "metrics.eval.jsonl").unlink()
    assert "None yet." in page_of(folder)[1].text


@pytest.mark.parametrize("text", ["- a list", "key: [cut", "\x00", "", "é: 1"])
def test_invalid_settings_are_ignored(text, tmp_path):
    (tmp_path / "args.yaml").write_bytes(text.encode("latin-1"))
    assert read_settings(tmp_path / "args.yaml") == {}


def test_secrets_are_hidden(make_run):
    html, _ = page_of(make_run(wandb={"key": "0123456789abcdef", "project": "p"}))
    assert "0123456789abcdef" not in html and "<b>wandb.key</b> ***" in html


def test_command_writes_the_page_or_explains_why_not(make_run, monkeypatch, capsys, tmp_path):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        run_cli(report.main)

    out = tmp_path / "pages/report.html"
    command(make_run(), "--out", out)
    assert out.read_text(encoding="utf-8") == page_of(tmp_path / "run_a")[0]
    before = out.read_bytes()
    for arguments, said in (
        ((tmp_path / "nowhere", "--out", out), "nowhere is not a run folder: expected one with metrics.train.jsonl"),
        ((tmp_path / "run_a", "--out", tmp_path / "run_a/args.yaml"), "expected a name that ends in .html"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(*arguments)
        assert stop.value.code == 1 and said in capsys.readouterr().err
    assert out.read_bytes() == before


def test_help_loads_neither_torch_nor_matplotlib():
    program = "import sys, utils.report; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).resolve().parents[2], check=True)
