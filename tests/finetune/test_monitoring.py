"""Metrics, log lines, trackers, the loss plot and the summary of a run."""

import base64
import contextlib
import errno
import importlib.util
import json
import logging
import math
import os
import pty
import re
import socket
import subprocess
import sys
import termios
import textwrap
import threading
import time
import types
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.monitoring import metrics_logger, trackers
from finetune.monitoring.args import MLFlowArgs, WandbArgs
from finetune.monitoring.metrics_logger import (
    MetricsLogger,
    answers_log_message,
    eval_log_message,
    eval_metrics,
    metrics_path,
    read_metrics,
    train_log_message,
    train_metrics,
)
from finetune.monitoring.plot import draw_loss_curve, smoothed
from finetune.monitoring.summary import summary
from finetune.monitoring.utils import set_up_logging
from model.errors import UserError
from tests.support.forked import finished
from tests.support.patience import PATIENCE_S
from tests.support.wandb_reader import read_offline_run

ROOT = Path(__file__).parents[2]
SAMPLE_RUN = ROOT.parent / "shared/golden/expected/train/sample_run"
KEY = "0123456789abcdef" * 2 + "SECRETKEY"  # as long as wandb's own

# Three steps of a run of mistral-finetune (20 steps of 256 tokens): the jsonl rows and the log lines.
TRAIN_ROWS = [
    '{"lr": 3.9999999999999996e-05, "step": 1, "loss": 10.969670295715332, "percent_done": 5.0, '
    '"peak_allocated_mem": 0.0, "allocated_mem": 0.0, "wps": 1221.7758514946458, "avg_wps": 1221.7758514946458, '
    '"eta_in_seconds": 3.9810903072357178, "at": "2026-11-20T21:02:00.121237"}',
    '{"lr": 0.00018058874503045722, "step": 2, "loss": 10.80312728881836, "percent_done": 10.0, '
    '"peak_allocated_mem": 0.0, "allocated_mem": 0.0, "wps": 1859.8986752397318, "avg_wps": 1474.7691671662722, '
    '"eta_in_seconds": 3.12455677986145, "at": "2026-11-20T21:02:00.260112"}',
    '{"lr": 4e-09, "step": 20, "loss": 10.874019622802734, "percent_done": 100.0, "peak_allocated_mem": 0.0, '
    '"allocated_mem": 0.0, "wps": 448.3197012487495, "avg_wps": 1437.3502595917842, "eta_in_seconds": 0.0, '
    '"at": "2026-11-20T21:02:03.501715"}',
]
TRAIN_LINES = [
    "step: 000001 - done (%): 5.0 - loss: 10.970 - lr: 4.0e-05 - peak_alloc_mem (GiB): 0.0 - alloc_mem (GiB): 0.0"
    " - tokens_per_second: 1221.8 - avg_tokens_per_second: 1221.8 - ETA: 2026-11-20 21:02:04",
    "step: 000002 - done (%): 10.0 - loss: 10.803 - lr: 1.8e-04 - peak_alloc_mem (GiB): 0.0 - alloc_mem (GiB): 0.0"
    " - tokens_per_second: 1859.9 - avg_tokens_per_second: 1474.8 - ETA: 2026-11-20 21:02:03",
    "step: 000020 - done (%): 100.0 - loss: 10.874 - lr: 4.0e-09 - peak_alloc_mem (GiB): 0.0 - alloc_mem (GiB): 0.0"
    " - tokens_per_second: 448.3 - avg_tokens_per_second: 1437.4 - ETA: 2026-11-20 21:02:03",
]
EVAL_ROW = (
    '{"step": 10, "train_loss": 10.801438331604004, "perplexity": 1810.1466064453125, '
    '"eval_loss": 10.821890830993652, "at": "2026-11-20T21:02:01.686168"}'
)
EVAL_LINE = "step: 000010 - eval_perplexity: 1810.147 - eval_loss: 10.822 - train_loss: 10.801"


def make_logger(run_dir, tag="train", wandb=None, mlflow=None, config=None, is_master=True):
    return MetricsLogger(run_dir, tag, wandb or WandbArgs(), mlflow or MLFlowArgs(), config or {}, is_master)


def write_metrics(run_dir, tag, records, tail=""):
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / f"metrics.{tag}.jsonl").write_text(text + tail, encoding="utf-8")


# ---- metrics and log lines


@pytest.mark.parametrize("row", [json.loads(row) for row in TRAIN_ROWS])
def test_train_metrics_match_mistral_finetune(row):
    tokens = 256 * row["step"]
    metrics = train_metrics(
        step=row["step"],
        max_steps=20,
        lr=row["lr"],
        loss=row["loss"],
        step_tokens=256,
        step_seconds=256 / row["wps"],
        tokens=tokens,
        seconds=tokens / row["avg_wps"],
        peak_bytes=0,
        allocated_bytes=0,
    )
    del row["at"]
    assert list(metrics) == list(row)
    assert metrics == pytest.approx(row, rel=1e-9)


def test_memory_is_in_gib_and_speed_is_zero_without_time():
    metrics = train_metrics(
        step=1,
        max_steps=1,
        lr=1.0,
        loss=1.0,
        step_tokens=8,
        step_seconds=0.0,
        tokens=8,
        seconds=0.0,
        peak_bytes=3 * 2**30,
        allocated_bytes=2**29,
    )
    assert (metrics["peak_allocated_mem"], metrics["allocated_mem"]) == (3.0, 0.5)
    assert (metrics["wps"], metrics["avg_wps"], metrics["eta_in_seconds"]) == (0.0, 0.0, 0.0)


def test_perplexity_is_exp_of_the_eval_loss():
    metrics = eval_metrics(step=10, train_loss=1.5, eval_loss=2.0)
    assert list(metrics) == ["step", "train_loss", "perplexity", "eval_loss"]
    assert metrics["perplexity"] == pytest.approx(math.e**2)
    assert eval_metrics(step=1, train_loss=1.0, eval_loss=1e4)["perplexity"] == math.inf
    assert math.isnan(eval_metrics(step=1, train_loss=1.0, eval_loss=math.nan)["perplexity"])


@pytest.mark.parametrize(("row", "line"), list(zip(TRAIN_ROWS, TRAIN_LINES)))
def test_train_log_message(row, line):
    row = json.loads(row)
    assert train_log_message(row, now=datetime.fromisoformat(row["at"])) == line


def test_log_messages_match_mistral_finetune():
    """All lines of the reference run if available, otherwise those quoted above; it calls tokens words and GiB GB."""
    rows, lines = {"train": TRAIN_ROWS, "eval": [EVAL_ROW]}, [*TRAIN_LINES, EVAL_LINE]
    if SAMPLE_RUN.exists():
        rows = {tag: (SAMPLE_RUN / f"metrics.{tag}.jsonl").read_text().splitlines() for tag in rows}
        lines = [line.split(" - ", 4)[-1] for line in (SAMPLE_RUN / "stdout.log").read_text().splitlines()]
    eta = re.compile(r" - ETA:.*")  # seconds round differently between the two writes
    renamed = [line.replace("words_per_second", "tokens_per_second").replace("(GB)", "(GiB)") for line in lines]
    expected = {eta.sub("", line) for line in renamed if line.startswith("step: ")}
    messages = {eval_log_message(json.loads(row)) for row in rows["eval"]}
    messages |= {eta.sub("", train_log_message(json.loads(row))) for row in rows["train"]}
    assert messages == expected


def test_log_message_of_generated_answers():
    assert answers_log_message(100, {"micro_f1": 0.25, "exact_match": 0.125, "ended": 0.5}) == (
        "step: 000100 - micro_f1: 0.250 - exact_match: 0.125 - answers ended within max_tokens (%): 50.0"
    )


def test_log_messages_of_non_finite_losses():
    row = json.loads(TRAIN_ROWS[0]) | {"loss": math.nan}
    assert " - loss: nan - " in train_log_message(row)
    assert "eval_perplexity: inf" in eval_log_message(eval_metrics(step=3, train_loss=1.0, eval_loss=math.inf))


# ---- jsonl and TensorBoard


def test_jsonl_has_the_keys_of_mistral_finetune_in_order(tmp_path):
    for tag, row in [("train", TRAIN_ROWS[0]), ("eval", EVAL_ROW)]:
        expected = json.loads(row)
        metrics = {name: value for name, value in expected.items() if name != "at"}
        with make_logger(tmp_path, tag) as logger:
            logger.log(metrics, step=expected["step"])
            logger.log(metrics | {"grad_norm": 0.5}, step=expected["step"])
        first, second = (tmp_path / f"metrics.{tag}.jsonl").read_text().splitlines()
        written = json.loads(first)
        assert list(written) == list(expected)
        assert {name: written[name] for name in metrics} == metrics
        assert abs((datetime.now() - datetime.fromisoformat(written["at"])).total_seconds()) < 60
        assert list(json.loads(second)) == [*metrics, "grad_norm", "at"]


def test_line_is_flushed_when_log_returns(tmp_path):
    logger = make_logger(tmp_path)
    logger.log({"loss": 1.0}, step=1)
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path, "train")] == [(1, 1.0)]
    logger.close()


def test_non_finite_numbers_become_null(tmp_path):
    with make_logger(tmp_path) as logger:
        logger.log({"step": 1, "loss": math.nan, "lr": -math.inf, "wps": np.float32(2.5)}, step=1)
    line = (tmp_path / "metrics.train.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not valid JSON"))
    assert (record["loss"], record["lr"], record["wps"]) == (None, None, 2.5)


def test_values_that_are_not_numbers_are_skipped_and_the_plot_is_drawn(tmp_path):
    huge = 10**400
    lines = [
        '{"step": 1, "loss": 1.0, "at": "2026"}',
        '{"step": 2, "loss": "1.0", "lr": [1], "wps": {"a": 1}}',
        '{"step": 3, "loss": true, "lr": null}',
        f'{{"step": 4, "loss": {huge}}}',
        f'{{"step": {huge}, "loss": 2}}',
        '{"step": true, "loss": 2}',
        '{"step": "5", "loss": 2}',
        '{"step": 5, "loss": NaN}',
        "[" * 100_000,
        '{"step": 6, "loss": ' + "[" * 100_000,
        "3",
        '"text"',
        '{"step": 7, "loss": 3.0}',
        '{"step": 8, "lr": 1e308}',
        f'{{"step": {10**308}, "lr": -1e308}}',
    ]
    (tmp_path / "metrics.train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = read_metrics(tmp_path, "train")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 7, 8, 10**308]
    assert [record["loss"] for record in records if "loss" in record and record["step"] != 5] == [1.0, 3.0]
    assert records[0]["at"] == "2026" and records[2] == {"step": 3, "lr": None}
    assert draw_loss_curve(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_appending_after_a_crash_keeps_every_complete_line(tmp_path):
    write_metrics(tmp_path, "train", [{"step": step, "loss": 1.0} for step in (1, 2, 3)], tail='{"step": 4, "lo')
    with make_logger(tmp_path) as logger:  # resumed from the checkpoint of step 2
        logger.log({"step": 3, "loss": 9.0}, step=3)
    lines = (tmp_path / "metrics.train.jsonl").read_text().splitlines()
    assert len(lines) == 5, "nothing is deleted, and the new line is separate"
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path, "train")] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_loggers_of_other_ranks_write_nothing(tmp_path):
    with make_logger(tmp_path, wandb=WandbArgs(project="p"), is_master=False) as logger:
        logger.log({"loss": 1.0}, step=1)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_can_be_read(tmp_path):
    with make_logger(tmp_path) as train, make_logger(tmp_path, "eval") as evaluation:
        for step, loss in [(1, 3.0), (2, math.nan), (3, 2.0)]:
            train.log({"lr": 0.5, "step": step, "loss": loss}, step)
        evaluation.log({"step": 3, "eval_loss": 2.5}, 3)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert set(events.Tags()["scalars"]) == {"train.lr", "train.loss", "eval.eval_loss"}
    points = [(event.step, event.value) for event in events.Scalars("train.loss")]
    assert [points[0], points[2]] == [(1, 3.0), (3, 2.0)]
    assert math.isnan(points[1][1])
    assert [(event.step, event.value) for event in events.Scalars("eval.eval_loss")] == [(3, 2.5)]


# ---- failing trackers


class BrokenTracker:
    def __init__(self, *_):
        self.calls = 0

    def log(self, metrics, step):
        self.calls += 1
        raise ConnectionError("no route to host")

    def close(self, failed):
        raise ConnectionError("still no route")


def test_failing_tracker_is_reported_once_and_training_continues(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(metrics_logger, "TensorBoardTracker", BrokenTracker)
    with make_logger(tmp_path) as logger:
        for step in range(1, 6):
            logger.log({"step": step, "loss": 1.0}, step)
    assert len(read_metrics(tmp_path, "train")) == 5
    assert len(caplog.records) == 1
    assert "TensorBoard could not log metrics (ConnectionError: no route to host); training continues." in caplog.text


def test_tracker_that_cannot_start_is_omitted(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError("disk failure")

    monkeypatch.setattr(metrics_logger, "TensorBoardTracker", refuse)
    with make_logger(tmp_path) as logger:
        logger.log({"step": 1}, 1)
    assert len(read_metrics(tmp_path, "train")) == 1
    assert "TensorBoard could not start (OSError: disk failure); training continues" in caplog.text


def test_failing_tracker_is_retried_at_growing_intervals(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now)
    broken = BrokenTracker()
    guarded = trackers.FaultTolerant(broken, "any")
    tried_at = []
    while now < 1000 + 60 * 16:
        before = broken.calls
        guarded.log({}, 1)
        if broken.calls > before:
            tried_at.append(now - 1000)
        now += 1
    assert tried_at == [0, 60, 180, 420, 900]


# ---- a full disk


@pytest.mark.parametrize("tag", ["train", "eval"])
def test_a_full_disk_ends_in_one_message(tmp_path, tag):
    metrics_path(tmp_path, tag).symlink_to("/dev/full")
    expected = re.escape(f"Metrics cannot be written to {tmp_path}/metrics.{tag}.jsonl: No space left on device.")
    with pytest.raises(UserError, match=f"^{expected}$"), make_logger(tmp_path, tag) as logger:
        logger.log({"loss": 1.0}, 1)


def test_a_metrics_file_that_cannot_be_opened_is_a_user_error(tmp_path):
    metrics_path(tmp_path, "train").mkdir()
    with pytest.raises(UserError, match=r"Metrics cannot be written to .*metrics\.train\.jsonl: Is a directory"):
        make_logger(tmp_path)


def test_a_full_disk_under_tensorboard_is_one_warning(tmp_path, monkeypatch, caplog, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # instead of pytest's
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    monkeypatch.setattr(trackers, "RETRY_AFTER_S", 0.0)
    with make_logger(tmp_path) as logger:
        for step in range(1, 40):
            logger.log({"step": step, "loss": 1.0}, step)
            time.sleep(0.005)
    assert len(read_metrics(tmp_path, "train")) == 39
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert "TensorBoard could not" in warning and "No space left on device" in warning
    assert "Traceback" not in capfd.readouterr().err


def test_failures_of_other_threads_are_still_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    with make_logger(tmp_path):
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_log_lines_that_do_not_fit_on_the_disk_are_dropped(root_logger, monkeypatch, capfd):
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        set_up_logging(0)
        logging.getLogger("train").info("step 1")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert "Traceback" not in capfd.readouterr().err


# ---- Weights & Biases


@pytest.fixture
def server():
    """A local server that refuses every request and records it."""
    requests = []

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append((self.path, self.headers.get("Authorization", "")))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.end_headers()

        do_GET = do_CONNECT = do_HEAD = do_POST

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(url=f"http://127.0.0.1:{http.server_port}", requests=requests)
        http.shutdown()


def run_alone(script, tmp_path, **environment):
    """Run `script` in a forked process with an empty home directory; return its output."""
    home = tmp_path / "home"
    home.mkdir()

    def run():
        for name in [*os.environ]:
            if name.upper().startswith("WANDB") or name.upper().endswith("_PROXY"):
                del os.environ[name]
        os.environ.update({"HOME": str(home)} | environment)
        os.chdir(tmp_path)
        sys.argv = ["-c", str(tmp_path / "run")]
        exec(compile(textwrap.dedent(script), "<script>", "exec"), {"__name__": "__main__"})

    done = finished(run)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def files_with(folder, *texts):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(text.encode() in path.read_bytes() for text in texts)]


def files_with_key(folder):
    return files_with(folder, KEY, base64.b64encode(f"api:{KEY}".encode()).decode())


def recorded_runs(run_dir):
    return [read_offline_run(path) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))]


# Only local addresses may be reached: wandb uses a local socket to talk to its helper process.
TRAIN_A_LITTLE = """
    import socket, sys
    from pathlib import Path
    connected = []
    def local_only(event, args):
        if event == "socket.connect":
            connected.append(args[1])
            assert args[0].family == socket.AF_UNIX or args[1][0] == "127.0.0.1", f"connects to {args[1]}"
    sys.addaudithook(local_only)

    from finetune.monitoring.args import MLFlowArgs, WandbArgs
    from finetune.monitoring.metrics_logger import MetricsLogger
    from finetune.monitoring.utils import set_up_logging
    set_up_logging(0)
    run_dir = Path(sys.argv[1])
    run_dir.mkdir()
    config = {"optim": {"lr": 0.5}, "wandb": {"project": "icd", "key": WANDB.key}, "note": f"key={WANDB.key}"}
    def logger(tag):
        return MetricsLogger(run_dir, tag, WANDB, MLFlowArgs(), config, True)
    with logger("train") as train, logger("eval") as evaluation:
        print("said " + "aloud")
        train.log({"lr": 0.5, "step": 1, "loss": 3.0}, 1)
        evaluation.log({"step": 2, "eval_loss": 2.5}, 2)
        train.log({"lr": 0.25, "step": 2, "loss": float("nan")}, 2)
"""


def training_script(wandb):
    head, body = textwrap.dedent(TRAIN_A_LITTLE).split("run_dir = ", 1)
    return f"{head}WANDB = {wandb}\nrun_dir = {body}"


def assert_recorded(run):
    assert (run.project, run.exit_code) == ("icd", 0)
    assert run.config["optim"] == {"lr": 0.5}
    first, second = run.history
    assert (first["_step"], first["train.loss"], first["train.lr"]) == (1, 3.0, 0.5)
    assert (second["_step"], second["eval.eval_loss"], second["train.lr"]) == (2, 2.5, 0.25)
    assert math.isnan(float(second["train.loss"]))


@pytest.mark.slow
def test_offline_wandb_records_everything_without_a_connection(tmp_path, server):
    script = training_script(f"WandbArgs(project='icd', offline=True, run_name='first', key='{KEY}')")
    printed = run_alone(script, tmp_path, HTTP_PROXY=server.url, HTTPS_PROXY=server.url)
    (run,) = recorded_runs(tmp_path / "run")  # one run for both loggers
    assert_recorded(run)
    assert run.name == "first"
    assert server.requests == []
    assert "said aloud" in printed
    assert files_with(tmp_path, "said aloud") == [], "console output is not recorded"
    assert files_with_key(tmp_path) == []
    assert KEY not in printed


@pytest.mark.slow
@pytest.mark.parametrize("place", ["yaml", "environment"])
def test_wandb_with_an_unreachable_server_records_offline_and_never_writes_the_key(tmp_path, server, place):
    script = training_script(f"WandbArgs(project='icd'{f', key={KEY!r}' if place == 'yaml' else ''})")
    environment = {"WANDB_API_KEY": KEY} if place == "environment" else {}
    printed = run_alone(script, tmp_path, WANDB_BASE_URL=server.url, **environment)
    basic = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    assert basic in {authorization for _, authorization in server.requests}, "the key must reach the server"
    assert "wandb could not start online (" in printed
    (run,) = recorded_runs(tmp_path / "run")
    assert_recorded(run)
    assert run.name == "run", "the run is named after the run folder"
    assert files_with_key(tmp_path) == []
    assert KEY not in printed
    assert not (tmp_path / "home/.netrc").exists()


@pytest.mark.slow
def test_wandb_records_a_crash(tmp_path):
    script = (
        training_script("WandbArgs(project='icd', offline=True)")
        + """
try:
    with logger("train"):
        raise RuntimeError("out of memory")
except RuntimeError:
    pass
"""
    )
    run_alone(script, tmp_path)
    assert sorted(run.exit_code for run in recorded_runs(tmp_path / "run")) == [0, 1]


@pytest.mark.slow
def test_wandb_is_not_imported_without_a_project(tmp_path):
    script = training_script("WandbArgs(project='', key='unused', run_name='')")
    script += "assert 'wandb' not in sys.modules and 'mlflow' not in sys.modules and not connected\n"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT, check=True, timeout=PATIENCE_S)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.train.jsonl", "metrics.eval.jsonl", "tb"}


def test_key_in_an_error_message_is_redacted(tmp_path, monkeypatch, caplog):
    stand_in = types.ModuleType("wandb")
    stand_in.run, stand_in.Settings = None, dict

    def init(mode=None, **_):
        if mode == "offline":
            raise OSError("disk full")
        raise ValueError(f"input_value={KEY} is invalid")

    stand_in.init = init
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with make_logger(tmp_path, wandb=WandbArgs(project="p", key=KEY)) as logger:
        logger.log({"step": 1}, 1)
    assert "could not start online (ValueError: input_value=*** is invalid)" in caplog.text
    assert "wandb could not start (OSError: disk full); training continues without it." in caplog.text
    assert KEY not in caplog.text
    assert len(read_metrics(tmp_path, "train")) == 1


def test_wandb_waits_no_longer_than_configured_and_says_so_before(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    stand_in = types.ModuleType("wandb")
    stand_in.run, stand_in.Settings, calls = None, dict, []

    def init(mode=None, settings=None, **_):
        calls.append((mode, settings.get("init_timeout"), settings.get("finish_timeout"), caplog.messages[-1]))
        if mode != "offline":
            raise TimeoutError("no answer")
        return types.SimpleNamespace(offline=True, log=lambda *_, **__: None, finish=lambda **_: None)

    stand_in.init = init
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with make_logger(tmp_path, wandb=WandbArgs(project="p", timeout=7)):
        pass
    assert calls[0][:3] == (None, 7, 7)
    assert "Connecting to wandb; if it does not answer within 7 s (`wandb.timeout`)" in calls[0][3]
    assert calls[1][0] == "offline"
    assert f"recorded offline. Upload it with `wandb sync {tmp_path}/wandb/offline-run-*`" in calls[1][3]


@pytest.mark.slow
def test_wandb_gives_up_on_a_server_that_does_not_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and never answers
        script = training_script(f"WandbArgs(project='icd', key='{KEY}', timeout=2)")
        printed = run_alone(script, tmp_path, WANDB_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
    begun, ended = (re.search(rf" - (\d+:\d\d:\d\d) - .*{text}", printed) for text in ("Connecting", "could not start"))
    seconds = [datetime.strptime(line[1], "%H:%M:%S") for line in (begun, ended)]
    assert (seconds[1] - seconds[0]).total_seconds() < 80, printed  # a few; wandb's own default is 90
    (run,) = recorded_runs(tmp_path / "run")
    assert_recorded(run)


def test_redacted_is_recursive_and_copies():
    config = {"a": [{"b": f"x{KEY}y"}, ("z", 1)], "c": None}
    assert trackers.redacted(config, [KEY]) == {"a": [{"b": "x***y"}, ["z", 1]], "c": None}
    assert config["a"][0]["b"] == f"x{KEY}y"


# ---- settings


def test_empty_strings_are_unset():
    wandb = WandbArgs.from_dict({"project": "", "run_name": "", "key": ""})
    assert (wandb.project, wandb.run_name, wandb.key) == (None, None, None)
    mlflow = MLFlowArgs.from_dict({"tracking_uri": "", "experiment_name": ""})
    assert (mlflow.tracking_uri, mlflow.experiment_name) == (None, None)
    assert wandb.problems() == mlflow.problems() == []


def test_key_is_read_but_never_written():
    wandb = WandbArgs.from_dict({"project": "p", "key": KEY})
    assert wandb.key == KEY
    assert "key" not in wandb.to_dict()
    assert KEY not in wandb.dumps_yaml() + repr(wandb)


@pytest.mark.parametrize("leftover_folder", [False, True])
def test_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, leftover_folder):
    if leftover_folder:
        (tmp_path / "wandb").mkdir()  # an earlier wandb run creates it in the working directory
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    importlib.invalidate_caches()
    (wandb_problem,) = WandbArgs(project="p").problems()
    assert wandb_problem.key == "wandb.project" and 'pip install -e ".[wandb]"' in wandb_problem.message
    (mlflow_problem,) = MLFlowArgs(tracking_uri="x").problems()
    assert mlflow_problem.key == "mlflow.tracking_uri" and "[mlflow]" in mlflow_problem.message


# ---- MLflow: a fake that records its calls, since the package may not be installed


@pytest.fixture
def fake_mlflow(monkeypatch):
    module = types.ModuleType("mlflow")
    module.calls, module.run = [], None

    def recorder(name):
        return lambda *args, **kwargs: module.calls.append((name, args, kwargs))

    for name in ("set_tracking_uri", "set_experiment", "log_params", "log_metrics"):
        setattr(module, name, recorder(name))

    def start_run(run_name):
        module.run = run_name

    def end_run(status):
        module.calls.append(("end_run", (module.run, status), {}))
        module.run = None

    module.start_run, module.end_run, module.active_run = start_run, end_run, lambda: module.run
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def log_two(run_dir, mlflow):
    run_dir.mkdir()
    config = {"optim": {"lr": 0.5}, "seed": 0}
    with make_logger(run_dir, "train", mlflow=mlflow, config=config) as train:
        with make_logger(run_dir, "eval", mlflow=mlflow, config=config) as evaluation:
            evaluation.log({"step": 7, "eval_loss": 2.0}, 7)
        train.log({"step": 7, "loss": 1.0}, 7)


def test_loggers_share_one_mlflow_run(tmp_path, fake_mlflow):
    log_two(tmp_path / "run", MLFlowArgs("http://tracker", "icd"))
    assert fake_mlflow.calls == [
        ("set_tracking_uri", ("http://tracker",), {}),
        ("set_experiment", ("icd",), {}),
        ("log_params", ({"optim.lr": 0.5, "seed": 0},), {}),
        ("log_metrics", ({"eval.eval_loss": 2.0},), {"step": 7}),
        ("log_metrics", ({"train.loss": 1.0},), {"step": 7}),
        ("end_run", ("run", "FINISHED"), {}),
    ]


@pytest.mark.parametrize("timeout, each", [(30, "10"), (1, "1")])
def test_mlflow_waits_no_longer_than_configured_and_says_so_before(
    timeout, each, tmp_path, fake_mlflow, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR", "BACKOFF_JITTER"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)

    def unreachable(name):
        waits = [os.environ[f"MLFLOW_HTTP_REQUEST_{name}"] for name in ("TIMEOUT", "MAX_RETRIES", "BACKOFF_FACTOR")]
        assert waits == [each, "2", "0"]  # three attempts
        raise ConnectionError("no answer")

    fake_mlflow.set_experiment = unreachable
    with make_logger(tmp_path, mlflow=MLFlowArgs("http://tracker", "icd", timeout)):
        pass
    connecting, failed = caplog.messages
    assert connecting.startswith(f"Connecting to MLflow; if it does not answer within {timeout} s (`mlflow.timeout`)")
    assert failed == "MLflow could not start (ConnectionError: no answer); training continues without it."


def test_mlflow_records_a_crash(tmp_path, fake_mlflow):
    with pytest.raises(RuntimeError), make_logger(tmp_path, mlflow=MLFlowArgs("http://tracker")):
        raise RuntimeError("out of memory")
    assert fake_mlflow.calls[-1][1] == (tmp_path.name, "FAILED")


if importlib.util.find_spec("sqlalchemy") and importlib.util.find_spec("mlflow"):

    def test_runs_of_the_real_mlflow_can_be_read(tmp_path):
        import mlflow

        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        log_two(tmp_path / "run", MLFlowArgs(uri, "icd"))
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name("icd")
        (run,) = client.search_runs([experiment.experiment_id])
        assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
        assert run.data.params == {"optim.lr": "0.5", "seed": "0"}
        assert run.data.metrics == {"train.loss": 1.0, "eval.eval_loss": 2.0}
        assert [m.step for m in client.get_metric_history(run.info.run_id, "train.loss")] == [7]


# ---- logging


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:], root.level = handlers, level


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(\w+\) - (\d+ days?, )?\d+:\d\d:\d\d - (.*)")


def test_rank_zero_logs_in_the_format_of_mistral_finetune(root_logger, capsys):
    set_up_logging(0)
    set_up_logging(0)  # replaces the first
    logging.getLogger("train").info("step: %06d", 1)
    logging.getLogger("train").debug("hidden")
    (line,) = capsys.readouterr().out.splitlines()
    assert LINE.fullmatch(line).group(2) == "train - INFO - step: 000001"


def test_other_ranks_log_warnings_with_their_rank(root_logger, capsys):
    set_up_logging(3)
    logging.getLogger("train").info("hidden")
    logging.getLogger("eval").warning("short of rows")
    (line,) = capsys.readouterr().out.splitlines()
    assert LINE.fullmatch(line).group(2) == "eval - WARNING - [rank 3] short of rows"


def test_log_lines_are_printed_above_the_progress_bar():
    script = """
        import logging, sys
        from tqdm import tqdm
        from finetune.monitoring.utils import set_up_logging
        set_up_logging(0)
        for step in tqdm(range(3), disable=None, mininterval=0):
            logging.getLogger("train").info("step %d", step)
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=theirs, stderr=theirs, cwd=ROOT, close_fds=True
    )
    process.wait(timeout=PATIENCE_S)
    os.close(theirs)
    screen = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "3/3" in screen, "the bar is drawn on a terminal"
    for step in range(3):
        before, after = screen.split(f"train - INFO - step {step}")
        assert after.startswith("\r\n")
        assert LINE.match(re.split(r"[\r\n]|\x1b\[A", before)[-1] + "x"), "the bar is cleared before a log line"


# ---- loss.png


def read_png(path):
    from matplotlib.image import imread

    return imread(path)


STEPS = [{"step": step, "lr": 1e-3 / step, "loss": 2 + 1 / step} for step in range(1, 61)]
EVALS = [{"step": step, "eval_loss": 2.5} for step in (20, 40, 60)]


@pytest.mark.parametrize(
    ("train", "evals", "tail"),
    [
        (STEPS, EVALS, ""),
        (STEPS, [], '{"step": 61, "lo'),
        (STEPS[:1], EVALS[:1], ""),
        ([record | {"loss": None} for record in STEPS], EVALS, ""),
        (STEPS[:5] + [{"step": 6, "lr": None, "loss": math.nan}] + STEPS[6:9], [], ""),
        (STEPS[:9] + [{"step": 10, "lr": 1e-4, "loss": 5e4}], [], ""),
        ([], EVALS, ""),
        ([], [], ""),
    ],
    ids=["usual", "half-written line", "one point", "all null", "nan", "exploded", "eval only", "nothing"],
)
@pytest.mark.filterwarnings("error")
def test_loss_curve_of_any_metrics_is_drawn(tmp_path, train, evals, tail):
    write_metrics(tmp_path, "train", train, tail)
    if evals:
        write_metrics(tmp_path, "eval", evals)
    path = draw_loss_curve(tmp_path)
    assert path == tmp_path / "loss.png"
    image = read_png(path)
    assert image.shape[0] > 500 and image.shape[1] > 800
    assert not list(tmp_path.glob(".*")), "no temporary file remains"


def has_color(image, hexadecimal):
    color = np.array([int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(image[..., :3] - color).max(-1) < 0.01).any())


def test_loss_curve_shows_only_the_series_that_exist(tmp_path):
    from finetune.monitoring import plot

    write_metrics(tmp_path, "train", STEPS[:20])
    image = read_png(draw_loss_curve(tmp_path))
    assert has_color(image, plot.TRAIN) and has_color(image, plot.LR)
    assert not any(has_color(image, color) for color in (plot.RAW, plot.EVAL, plot.BAD))
    write_metrics(tmp_path, "train", [*STEPS[:55], {"step": 56, "lr": 1.0, "loss": None}])
    write_metrics(tmp_path, "eval", EVALS)
    image = read_png(draw_loss_curve(tmp_path))
    assert all(has_color(image, color) for color in (plot.TRAIN, plot.LR, plot.RAW, plot.EVAL, plot.BAD))


def test_failed_drawing_keeps_the_old_plot(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    write_metrics(tmp_path, "train", STEPS)
    old = draw_loss_curve(tmp_path).read_bytes()

    def interrupted(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(UserError, match=r"loss\.png cannot be written: disk full\."):
        draw_loss_curve(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() == old


def test_plot_of_a_missing_run_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a run folder; expected a folder with metrics\.train\.jsonl"):
        draw_loss_curve(tmp_path / "nowhere")


def test_smoothing_keeps_constants_and_lines_and_ignores_nan():
    line = np.arange(200.0)
    assert smoothed(line)[20:-20] == pytest.approx(line[20:-20])
    constant = np.full(100, 3.0)
    constant[[0, 50, 99]] = math.nan
    result = smoothed(constant)
    assert np.isnan(result).nonzero()[0].tolist() == [0, 50, 99]
    assert result[~np.isnan(result)] == pytest.approx(3.0)
    noise = np.random.default_rng(0).normal(size=1000)
    assert smoothed(noise).std() < 0.2


# ---- summary


def test_summary_of_a_run():
    text = summary(
        steps=300,
        max_steps=300,
        skipped_steps=2,
        tokens=1_228_800,
        trained_tokens=98_304,
        wall_seconds=751.4,
        train_seconds=662.0,
        first_loss=10.9701,
        last_loss=1.724,
        eval_losses={100: 1.9, 200: 1.79, 300: 1.801},
        peak_bytes=int(26.1 * 2**30),
        checkpoint=Path("runs/a/checkpoints/checkpoint_000300/consolidated"),
    )
    assert text == textwrap.dedent("""\
        Training finished
          steps        300 of 300, 2 skipped
          tokens       1,228,800 (8.0% with loss)
          time         0:12:31 (training steps 0:11:02)
          speed        1,856 tokens/s
          train loss   10.970 -> 1.724
          eval loss    1.801 (best 1.790 at step 200)
          peak memory  26.1 GiB
          checkpoint   runs/a/checkpoints/checkpoint_000300/consolidated""")


def test_summary_omits_facts_that_do_not_apply():
    text = summary(
        steps=0,
        max_steps=5,
        skipped_steps=0,
        tokens=0,
        trained_tokens=0,
        wall_seconds=0.2,
        train_seconds=0.0,
        first_loss=None,
        last_loss=None,
        eval_losses={},
        peak_bytes=0,
        checkpoint=None,
    )
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["steps", "tokens", "time", "checkpoint"]
    assert text.endswith("none saved")


def test_summary_of_non_finite_evaluations():
    common = {
        "steps": 1,
        "max_steps": 1,
        "skipped_steps": 0,
        "tokens": 1,
        "trained_tokens": 1,
        "wall_seconds": 1.0,
        "train_seconds": 1.0,
        "first_loss": 1.0,
        "last_loss": math.nan,
        "peak_bytes": 0,
        "checkpoint": None,
    }
    assert "eval loss   nan (best 2.000 at step 1)" in summary(**common, eval_losses={1: 2.0, 2: math.nan})
    assert "eval loss   nan\n" in summary(**common, eval_losses={1: math.nan})
