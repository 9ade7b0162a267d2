"""Interrupted, failing and resumed runs: real processes, real signals, real files."""

import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from finetune import eval, preflight
from finetune.args import EarlyStoppingArgs, load_train_args
from finetune.distributed import init_world
from finetune.eval import EarlyStopping
from finetune.failure_watch import TIMEOUT_VARIABLE
from finetune.manifest import MANIFEST_NAME, find_corruption, write_manifest
from finetune.preemption import MARKER_NAME
from finetune.run_dir import saved_checkpoints
from model.errors import UserError
from tests.end_to_end.kill_runs import COMPARED, STEPS, ForkedRun, curve, kill_test_config, run_trials, uninterrupted
from tests.support import forking_torchrun
from tests.support.forked import fork
from tests.support.held_run import hold, release
from tests.support.namespaces import make_mounts_private
from tests.support.patience import PATIENCE_S, wait_for_line, wait_until
from tests.support.run_trajectories import INPUTS, read_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the model that all runs share."""
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """An uninterrupted run of one process."""
    return uninterrupted(folder, 1, STEPS)[0]


def start(config: Path, ranks: int = 1) -> tuple[list[int], str]:
    """Train. Return exit codes and output."""
    run = ForkedRun(config, ranks)
    return run.wait(), run.log


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[-6:]) for path in saved_checkpoints(run_dir / "checkpoints")]


def copy_run(run_dir: Path, folder: Path, name: str, **settings) -> Path:
    """Copy a finished run and remove its last checkpoint, so that step 6 is the latest. Return a YAML to resume it."""
    copy = folder / name
    shutil.copytree(run_dir, copy, symlinks=True)
    shutil.rmtree(copy / "checkpoints" / "checkpoint_000008")
    return kill_test_config(folder, name, **settings)


# --- Resuming


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_any_time_resumes_with_identical_metrics(ranks, folder):
    stages = run_trials(folder, ranks, kills=4, seed=ranks)  # `make kill-test` does 200
    assert sum(stages.values()) == 4


def test_restarting_a_finished_run_trains_no_step(finished, folder, tmp_path):
    shutil.copytree(finished, folder / "again", symlinks=True)
    codes, log = start(kill_test_config(folder, "again"))
    assert codes == [0] and "8 of 8" in log
    assert curve(folder / "again") == curve(finished)


def test_changed_settings_that_affect_data_or_model_are_refused(finished, folder):
    settings = {"seq_len": 256, "lora": {"rank": 8, "dropout": 0.1}, "optim": {"lr": 0.02}, "log_freq": 2}
    codes, log = start(copy_run(finished, folder, "altered", **settings))
    assert codes == [1] and "Traceback" not in log
    named = set(re.findall(r"^  - `(.*?)` is", log, re.MULTILINE))
    assert named == {"seq_len", "lora.rank", "optim.lr"} and "`seq_len` is 256, it was 512" in log
    assert steps(folder / "altered") == [6]


def test_a_run_that_started_from_a_checkpoint_resumes_its_own_checkpoints(finished, folder):
    checkpoint = finished / "checkpoints" / "checkpoint_000006"
    config = kill_test_config(folder, "branch_again", resume=str(checkpoint), ckpt_freq=1)
    assert start(config)[0] == [0]
    codes, log = start(config)
    assert codes == [0] and f"Resuming from {folder / 'branch_again'}" in log, log


def test_what_a_killed_process_left_unfinished_is_completed(finished, folder):
    """Killed after the rename, before symlinks and pruning; or while an older checkpoint was being removed."""
    config = kill_test_config(folder, "half_done")
    checkpoints = folder / "half_done" / "checkpoints"
    shutil.copytree(finished, folder / "half_done", symlinks=True)
    (checkpoints / "last").unlink()
    (checkpoints / "tmp.last").symlink_to("checkpoint_000006")
    shutil.copytree(checkpoints / "checkpoint_000006", checkpoints / "checkpoint_000004")
    (checkpoints / "tmp.old_checkpoint_000002").mkdir()
    assert start(config)[0] == [0]
    assert {path.name for path in checkpoints.iterdir()} == {"checkpoint_000006", "checkpoint_000008", "last"}
    assert (checkpoints / "last").resolve().name == "checkpoint_000008"


def test_a_run_folder_without_args_yaml_of_a_killed_process_is_used(finished, folder):
    config = kill_test_config(folder, "args_unfinished")
    (folder / "args_unfinished").mkdir()
    (folder / "args_unfinished" / "tmp.args.yaml").write_text("run_d")
    assert start(config)[0] == [0]
    assert curve(folder / "args_unfinished") == curve(finished)


def test_changed_data_is_refused(finished, folder, tmp_path):
    data = tmp_path / "data.jsonl"
    shutil.copyfile(INPUTS / "train_icd.jsonl", data)
    settings = {"data": {"instruct_data": str(data)}, "no_eval": True}
    assert start(kill_test_config(folder, "data", **settings))[0] == [0]
    with data.open("a") as file:
        file.write(data.read_text().splitlines()[0] + "\n")
    codes, log = start(kill_test_config(folder, "data", **settings))
    assert codes == [1] and f"{data} has changed since the checkpoint" in log and "Traceback" not in log


def test_settings_that_only_affect_monitoring_may_change(finished, folder):
    monitoring = {"log_freq": 2, "ckpt_freq": 1, "no_eval": True, "num_ckpt_keep": 5, "guards": {"spike_factor": 2}}
    codes, log = start(copy_run(finished, folder, "monitored", **monitoring))
    assert codes == [0], log
    assert steps(folder / "monitored") == [6, 7, 8]


def test_a_corrupt_checkpoint_is_skipped(finished, folder):
    config = copy_run(finished, folder, "corrupt", num_ckpt_keep=1)
    run_dir = config.with_suffix("")
    shutil.copytree(finished / "checkpoints" / "checkpoint_000008", run_dir / "checkpoints" / "checkpoint_000008")
    shard = next((run_dir / "checkpoints" / "checkpoint_000008" / "state").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    codes, log = start(config)
    assert codes == [0], log
    assert "checkpoint_000008 is corrupt" in log and "(step 6)" in log
    assert curve(run_dir) == curve(finished)
    left = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert left == {"checkpoint_000008", "superseded_checkpoint_000008", "last"}
    assert find_corruption(run_dir / "checkpoints" / "last") is None


def test_a_run_without_a_valid_checkpoint_is_an_error(finished, folder):
    config = copy_run(finished, folder, "no_valid_checkpoint")
    (folder / "no_valid_checkpoint" / "checkpoints" / "checkpoint_000006" / "state" / "run.json").write_text("{}")
    codes, log = start(config)
    assert codes == [1] and "can be resumed" in log and "Traceback" not in log


@pytest.mark.parametrize("inside", ["checkpoint_000006", "checkpoint_000006/consolidated"])
def test_a_named_checkpoint_starts_another_run_folder(inside, finished, folder):
    name = f"branch_{Path(inside).name}"
    codes, log = start(kill_test_config(folder, name, resume=str(finished / "checkpoints" / inside)))
    assert codes == [0], log
    run, branch = curve(finished), curve(folder / name)
    assert all(branch[tag] == [row for row in run[tag] if row[0] > 6] for tag in COMPARED)


def test_resume_accepts_a_run_folder_and_takes_its_latest_checkpoint(finished, folder):
    codes, log = start(kill_test_config(folder, "from_run", resume=str(finished)))
    assert codes == [0] and f"Resuming from {finished / 'checkpoints' / 'checkpoint_000008'} (step 8)" in log, log


def test_a_trained_adapter_can_start_a_longer_run(finished, folder):
    lora = {"rank": 4, "dropout": 0.1, "from_adapter": str(finished)}
    codes, log = start(kill_test_config(folder, "longer", lora=lora, max_steps=12))
    assert codes == [0] and len(curve(folder / "longer")["train"]) == 12, log
    first, longer = (curve(run_dir)["eval"][0] for run_dir in (finished, folder / "longer"))
    assert first[0] == longer[0] and longer[1] < first[1]


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_different_number_of_processes_restores_weights_and_optimizer(before, after, folder):
    name = f"from_{before}_to_{after}"
    checkpoint = uninterrupted(folder, before, STEPS)[0] / "checkpoints" / "checkpoint_000006"
    config = kill_test_config(folder, name, resume=str(checkpoint), ckpt_freq=1, num_ckpt_keep=None)
    state = json.loads((checkpoint / "state" / "run.json").read_text())
    codes, log = start(config, after)
    assert codes == [0] * after, log
    assert f"Resuming a {before}-process run with {after} processes" in log and "data is resharded" in log
    rates = {row["step"]: row["lr"] for row in read_jsonl(folder / name / "metrics.train.jsonl")}
    assert list(rates) == [7, 8] and rates[7] == state["schedule"]["last_lr"][0]
    # One step at such a small learning rate changes little, so weights and moments are those that were saved.
    adapters = [checkpoint, folder / name / "checkpoints" / "checkpoint_000007"]
    saved, next_one = (load_file(path / "consolidated" / "lora.safetensors") for path in adapters)
    for tensor_name, tensor in saved.items():
        assert (tensor - next_one[tensor_name]).abs().max() <= 3 * rates[7]
        assert ".lora_A" in tensor_name or tensor.abs().max() > 30 * rates[7]


@pytest.mark.parametrize(
    "content, resume, expected",
    [
        ("args.yaml", "never", "Set `resume: auto`"),
        ("thesis.docx", "auto", "does not contain a run (no args.yaml)"),
        ("thesis.docx", "never", "already exists"),
    ],
)
def test_an_occupied_run_folder_is_not_touched(content, resume, expected, folder, tmp_path):
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    (run_dir / content).write_text("keep me")
    config = kill_test_config(folder, "occupied", resume=resume, run_dir=str(run_dir))
    with pytest.raises(UserError, match=re.escape(expected)):
        train.train(str(config))
    assert [path.name for path in run_dir.iterdir()] == [content] and (run_dir / content).read_text() == "keep me"


def test_a_checkpoint_of_mistral_finetune_cannot_be_resumed(finished, folder):
    config = copy_run(finished, folder, "stateless")
    shutil.rmtree(folder / "stateless" / "checkpoints" / "checkpoint_000006" / "state")
    codes, log = start(config)
    assert codes == [1] and "can be resumed" in log


# --- Signals


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGINT), (1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_ends_a_run_after_a_saved_step(ranks, number, folder, monkeypatch):
    config = kill_test_config(folder, f"stopped_{ranks}_{number}", ckpt_freq=0)
    run_dir = config.with_suffix("")
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish_step", hold(config))
        run = ForkedRun(config, ranks)
    wait_for_line(run_dir / "metrics.train.jsonl")
    os.kill(run.pids[-1], number)  # on one rank only
    release(config)
    assert run.wait() == [75] * ranks, run.log
    assert (run_dir / MARKER_NAME).exists()
    assert steps(run_dir) == [len(curve(run_dir)["train"])] and steps(run_dir)[0] < STEPS
    assert start(config, ranks)[0] == [0] * ranks
    assert not (run_dir / MARKER_NAME).exists()
    assert curve(run_dir) == curve(uninterrupted(folder, ranks, STEPS)[0])


def test_a_signal_to_one_rank_interrupts_the_evaluation_of_both(folder, monkeypatch, tmp_path):
    original, begun = eval.batch_loss, tmp_path / "begun"

    def slow_loss(*args):
        with begun.open("a") as file:
            file.write("batch\n")
        time.sleep(1)  # the second rank has fewer batches, and computes placeholders with the first
        return original(*args)

    data = {"instruct_data": f"{INPUTS}/train_icd.jsonl", "eval_instruct_data": f"{INPUTS}/eval_instruct.jsonl"}
    data |= {"shuffle": True, "packing": "best_fit"}
    config = kill_test_config(folder, "stopped_evaluation", ckpt_freq=0, data=data)
    with monkeypatch.context() as patch:
        patch.setattr(eval, "batch_loss", slow_loss)
        run = ForkedRun(config, 2)
        wait_for_line(begun)
        os.kill(run.pids[1], signal.SIGTERM)
        assert run.wait() == [75, 75], run.log
    assert begun.read_text().count("\n") < 10  # of 10 on both ranks; about 4 if the signal arrives at once
    assert steps(config.with_suffix("")) == [4] and curve(config.with_suffix(""))["eval"] == []
    assert start(config, 2)[0] == [0, 0]
    assert [row[0] for row in curve(config.with_suffix(""))["eval"]] == [4, 8]


@pytest.mark.parametrize("what", ["stopped", "stuck"])
def test_a_rank_that_does_not_respond_is_named(what, folder, monkeypatch):
    """Stopped by a signal; or running, but stuck outside of a collective."""
    original = train.log_step

    def stuck(run, result):
        original(run, result)
        if run.state.step == 3:  # from then on steps take milliseconds: before, a busy machine may need some seconds
            run.world.failures._neighbor._timeout = 3
        if what == "stuck" and run.world.rank == 1 and run.state.step == 3:
            time.sleep(PATIENCE_S)

    monkeypatch.setattr(train, "log_step", stuck)
    config = kill_test_config(folder, what, max_steps=100_000, no_eval=True, no_ckpt=True)
    run = ForkedRun(config, 2)
    wait_until(lambda: "step: 000003" in run.log, "three steps")
    if what == "stopped":
        os.kill(run.pids[1], signal.SIGSTOP)
    assert os.waitstatus_to_exitcode(os.waitpid(run.pids.pop(0), 0)[1]) == 1
    run.kill()  # the second rank is still there
    run.wait()
    name, host = f"error: Rank 1 (process {run.pids[0]} on ", socket.gethostname()
    (message,) = (line for line in run.log.splitlines() if line.startswith(name + host))
    assert "Traceback" not in run.log
    since = r"for \d+ s, since \d\d:\d\d:\d\d,"
    if what == "stopped":
        assert re.search(f"has not responded {since} .* step.*: it is stopped", message)
    else:
        assert re.search(f"has kept other processes waiting {since} after step 3: it is running", message)


def test_a_timeout_that_is_not_a_number_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(TIMEOUT_VARIABLE, "ten minutes")
    expected = pytest.raises(UserError, match=f"{TIMEOUT_VARIABLE} is 'ten minutes'; expected a number of seconds")
    with expected, init_world():
        pass


def test_torchrun_restarts_a_run_that_lost_a_process(folder):
    config = kill_test_config(folder, "torchrun")
    command = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "tests.support.held_run"]
    log = folder / "torchrun.log"
    launcher = fork(lambda: forking_torchrun.main([*command, str(config)]), log, log)
    wait_for_line(config.with_suffix("") / "checkpoints" / "last" / MANIFEST_NAME)
    psutil.Process(launcher).children()[-1].kill()
    release(config)
    assert os.waitpid(launcher, 0)[1] == 0, log.read_text()
    assert "Resuming from" in log.read_text()
    assert curve(config.with_suffix("")) == curve(uninterrupted(folder, 2, STEPS)[0])


# --- Failing ranks


def test_an_exception_on_one_rank_ends_all_within_seconds(folder):
    data = folder / "bad_late.jsonl"
    row = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 200}]})
    data.write_text("\n".join([row] * 41 + ["{broken"]) + "\n")  # of two ranks only the second reads line 42
    settings = {"data": {"instruct_data": str(data)}, "no_eval": True, "max_steps": 1000, "no_ckpt": True}
    config = kill_test_config(folder, "one_fails", **settings)
    run = ForkedRun(config, 2)
    assert run.wait() == [1, 1]
    assert "step: 000001" in run.log and "step: 001000" not in run.log
    assert re.search(r"^error: \[rank 1 on \S+\] The data in line 42", run.log, re.MULTILINE), run.log
    assert run.log.count("error: ") == 1 and "Traceback" not in run.log, run.log


# --- Anomalies


def test_a_run_that_overflows_in_fp16_stops_with_finite_weights(folder):
    """As in a 15-hour run on a V100: too high a learning rate in fp16, and a loss that becomes NaN."""
    settings = {"param_dtype": "fp16", "optim": {"lr": 300.0, "pct_start": 0.3}, "max_steps": 300, "ckpt_freq": 1}
    settings |= {"no_eval": True, "num_ckpt_keep": None, "guards": {"max_skipped_steps": 10}, "max_norm": 1e9}
    config = kill_test_config(folder, "overflow", **settings)
    run_dir = config.with_suffix("")
    codes, log = start(config)
    assert codes == [1] and "the gradient was not finite in 10 steps in a row" in log and "Traceback" not in log, log
    checkpoints = saved_checkpoints(run_dir / "checkpoints")
    assert checkpoints and str(checkpoints[-1]) in log.split("the last checkpoint is")[1]
    for checkpoint in checkpoints:
        for tensor in load_file(checkpoint / "consolidated" / "lora.safetensors").values():
            assert tensor.isfinite().all()
    again, log = start(config)  # resumes even if the optimizer has not taken a single step
    assert again == [1] and "Resuming from" in log and "Traceback" not in log, log
    kept = sorted((run_dir / "anomalies").iterdir())
    assert len(kept) == 10
    record = json.loads(kept[-1].read_text())
    assert record["rows"] and all(re.fullmatch(r".*train_icd\.jsonl:\d+", row) for row in record["rows"])
    assert set(record) == {"step", "rows"}


def test_a_non_finite_metric_is_never_the_best():
    early_stopping = EarlyStopping(EarlyStoppingArgs(metric="eval_loss", patience=3))
    updates = [early_stopping.update({"eval_loss": loss}) for loss in (math.nan, 2.0, math.inf, 1.0)]
    assert updates == [False, True, False, True]


@pytest.mark.parametrize("stop", [False, True])
def test_a_loss_spike_is_logged_or_stops_the_run(stop, folder):
    guards = {"spike_factor": 1.0001, "spike_window": 10, "stop_on_spike": stop}
    config = kill_test_config(folder, f"spike_{stop}", guards=guards, optim={"lr": 1e-9}, max_steps=16)
    codes, log = start(config)
    assert "times the recent median" in log and codes == [int(stop)], log
    kept = next((config.with_suffix("") / "anomalies").iterdir())
    assert json.loads(kept.read_text())["rows"]


# --- The disk


class RunOnSmallDisk(ForkedRun):
    """A run in a mount namespace, where an unprivileged user may mount a small disk; it vanishes with the namespace."""

    def _command(self, config: Path) -> None:
        disk, kept = config.parent / "disk", config.parent / "kept"
        try:
            make_mounts_private()
            mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(disk)]
            subprocess.run(mount, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"{NO_DISK}: {error}") from error
        try:
            super()._command(config)
        finally:
            shutil.copytree(disk / "run", kept, symlinks=True)


NO_DISK = "cannot mount a small disk here"


def test_a_full_disk_ends_the_run_and_keeps_earlier_checkpoints(tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    settings = {"run_dir": str(disk / "run"), "num_ckpt_keep": None, "no_eval": True, "lora": {"rank": 16}}
    config = kill_test_config(tmp_path, "full", max_steps=16, **settings)
    run = RunOnSmallDisk(config, 1)
    codes = run.wait()
    if NO_DISK in run.log:
        pytest.skip(run.log)
    assert codes == [1] and "Traceback" not in run.log
    assert "could not be saved: " in run.log and "No space left on device" in run.log
    left = saved_checkpoints(kept / "checkpoints")
    assert left and all(find_corruption(checkpoint) is None for checkpoint in left)
    assert load_file(left[-1] / "consolidated" / "lora.safetensors")


def test_a_disk_too_small_for_all_checkpoints_is_reported_at_the_start(folder, monkeypatch):
    config = kill_test_config(folder, "planned", num_ckpt_keep=None)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
    with pytest.raises(UserError, match=r"4 more checkpoints of 0\.0 GiB need"):
        train.train(str(config))
    assert not config.with_suffix("").exists()


def test_out_of_memory_suggests_what_to_reduce(folder):
    args = load_train_args(kill_test_config(folder, "memory", batch_size=4, checkpoint=False))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    assert preflight.out_of_memory_advice(error, args, rank=1) == (
        "The GPU of process 1 is out of memory: CUDA out of memory. Tried to allocate 2 GiB. Use `checkpoint: true`, a "
        "smaller `batch_size` (now 4), a smaller `seq_len` (now 512), a smaller `lora.rank` (now 4), "
        "`base_dtype: nf4`, more GPUs."
    )


CPU_IS_FULL = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CPU_IS_FULL),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 4096 bytes from file <lora.safetensors>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,)"),
        MemoryError(),
    ],
    ids=str,
)
def test_out_of_host_memory_suggests_what_to_reduce(error, folder):
    args = load_train_args(kill_test_config(folder, "memory"))
    message = preflight.out_of_memory_advice(error, args, rank=0)
    assert message.startswith(
        f"Process 0 is out of memory: {str(error) or 'MemoryError'}. Use `checkpoint: true`, a smaller `seq_len` ("
    )
    assert message.endswith("a machine with more memory.")


def test_a_run_out_of_memory_ends_in_advice(folder, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(train, "train_step", fail)
    config = kill_test_config(folder, "out_of_memory", no_eval=True)
    advice = r"^Process 0 is out of memory: MemoryError\. Use `checkpoint: true`, a smaller `seq_len` \(now 512\)"
    with pytest.raises(UserError, match=advice):
        train.train(str(config))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), UserError("bad_alloc")]
)
def test_other_errors_are_not_taken_for_a_lack_of_memory(error, folder):
    args = load_train_args(kill_test_config(folder, "memory"))
    assert preflight.out_of_memory_advice(error, args, rank=0) is None


def test_a_manifest_detects_corruption(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"")
    write_manifest(tmp_path)
    assert find_corruption(tmp_path) is None
    (tmp_path / "a" / "b.bin").write_bytes(b"12346")
    assert "SHA-256" in find_corruption(tmp_path) and find_corruption(tmp_path, hashes=False) is None
    (tmp_path / "a" / "b.bin").write_bytes(b"123")
    assert "has 3 bytes instead of 5" in find_corruption(tmp_path)
    (tmp_path / "a" / "b.bin").unlink()
    assert "No such file" in find_corruption(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text("[]")
    assert "cannot be read" in find_corruption(tmp_path)


def test_trackers_continue_the_same_run(finished, folder):
    """TensorBoard shows each step once, and wandb continues one run."""
    settings = {"wandb": {"project": "icd", "offline": True}}
    config = copy_run(finished, folder, "tracked", **settings)
    run_dir = config.with_suffix("")
    codes, log = start(config)
    assert codes == [0], log
    events = EventAccumulator(str(run_dir / "tb")).Reload()
    assert [event.step for event in events.Scalars("train.loss")] == list(range(1, 9))
    shutil.rmtree(run_dir / "checkpoints" / "checkpoint_000008")
    assert start(config)[0] == [0]
    runs = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(runs) == 2 and len({path.stem for path in runs}) == 1
