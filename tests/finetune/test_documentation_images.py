"""The plots of docs/, and their experiments on a model that was not pretrained."""

import json

import pytest
import torch

from benchmarks import fp16, learning_curve, measure, small_runs
from docs import draw_images
from docs.draw_images import FORMATS, learning_rates
from finetune.args import OptimArgs
from utils.models.demo_model import demo_model_args, make_demo_model

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_formats_are_those_of_pytorch(form):
    if form.name in DTYPES:
        limits = torch.finfo(DTYPES[form.name])
        assert (form.largest, form.smallest, form.epsilon) == (limits.max, limits.tiny, limits.eps)
        assert 1 + form.exponent + form.mantissa == limits.bits
    else:  # the range of fp32 and the digits of fp16
        fp32, fp16 = FORMATS[0], FORMATS[-1]
        assert (form.name, form.exponent, form.mantissa) == ("tf32", fp32.exponent, fp16.mantissa)


def test_learning_rates_start_peak_and_end_as_the_page_says():
    rates = learning_rates(OptimArgs(lr=1e-3, pct_start=0.1, div_factor=5, final_div_factor=10), 100)
    assert len(rates) == 100 and max(rates) == pytest.approx(rates[9]) == pytest.approx(1e-3)
    assert rates[0] == pytest.approx(1e-3 / 5) and rates[-1] == pytest.approx(1e-3 / 50)
    assert len(set(learning_rates(OptimArgs(lr=1e-3, schedule="constant", pct_start=0.1), 100)[9:])) == 1


def test_all_images_are_drawn(tmp_path, monkeypatch):
    names = ("dp_accuracy", "role_micro_f1", "eval_loss", "train_loss")
    size = {"steps": 9, "answered": 60}
    results = [{"notes": notes, **size, **{name: [0.1, 0.2, 0.3] for name in names}} for notes in (100, 300)]
    monkeypatch.setattr(draw_images, "latest_results", lambda name: {"results": results})
    monkeypatch.setattr(draw_images, "RESULTS", tmp_path)
    (tmp_path / "learning_curve.jsonl").touch()
    monkeypatch.setattr(draw_images, "IMAGES", tmp_path)
    draw_images.main()
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "precision.png",
        "learning_rate.png",
        "learning_curve.png",
    }


def test_the_latest_result_of_each_case_is_shown(tmp_path, monkeypatch):
    for module in (small_runs, measure):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    records = [
        [{"notes": 300, "loss": [1.0] * 3}, {"notes": 100, "loss": [2.0] * 3}],
        [{"notes": 300, "loss": [3.0] * 3}],
    ]
    lines = (json.dumps({"date": place, "results": results}) + "\n" for place, results in enumerate(records))
    (tmp_path / "curve.jsonl").write_text("".join(lines), encoding="utf-8")
    shown = small_runs.latest_results("curve")
    assert shown == {"date": 1, "results": [records[0][1], records[1][0]]}


@pytest.fixture
def untrained(tmp_path, monkeypatch):
    """Experiments in a folder of their own, with random weights for the base model."""
    monkeypatch.setattr(small_runs, "WORK_DIR", tmp_path)
    model = tmp_path / "model"
    make_demo_model(model, demo_model_args(64, 1), seed=0)
    for module in (fp16, learning_curve):
        monkeypatch.setattr(module, "base_model", lambda: model)
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_notes_are_disjoint_and_a_larger_file_starts_with_a_smaller_one(untrained):
    lines = {count: small_runs.notes_file(count).read_text(encoding="utf-8").splitlines() for count in (3, 5)}
    assert lines[5][:3] == lines[3] and len(lines[5]) == 5
    others = small_runs.notes_file(5, seed=1).read_text(encoding="utf-8").splitlines()
    assert not {json.loads(line)["id"] for line in lines[5]} & {json.loads(line)["id"] for line in others}


def test_a_point_of_the_learning_curve(untrained, monkeypatch):
    monkeypatch.setattr(learning_curve, "EVALUATIONS", 2)
    case = {"notes": 4, "steps": 4, "batch_size": 3, "answered": 2, "seed": 0}
    found = learning_curve.learn(case, untrained)
    # 4 steps of 3 sequences of 1,024 positions; the 4 notes fill two sequences at most.
    assert 6 <= found["epochs"] <= 12 and found["best_epochs"] in (found["epochs"] / 2, found["epochs"])
    assert 0 <= found["role_micro_f1"] <= 1 and found["best_eval_loss"] <= found["eval_loss"]


def test_unchecked_fp16_loses_its_weights_and_a_checked_run_stops(untrained, monkeypatch):
    for checked in (True, False):
        case = {"checked": checked, "steps": 6, "lr": 1e4, "seed": 0}
        (untrained / str(checked)).mkdir()
        found = fp16.learn(case, untrained / str(checked))
        assert found["first_nan"] and (found["weights_nan"] == 0) == checked, found
        assert (found["skipped"] > 0) == checked
