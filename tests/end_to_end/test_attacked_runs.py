"""Runs under attack: changed inputs, crafted state, two starts in one folder."""

import errno
import fcntl
import itertools
import json
import math
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from finetune import run_lock
from finetune.distributed import World
from finetune.manifest import MANIFEST_NAME, find_corruption, write_manifest
from finetune.run_dir import LOCK_NAME, saved_checkpoints
from finetune.run_lock import locked_run_dir
from model.errors import UserError
from tests.end_to_end.kill_runs import kill_test_config
from tests.support.run_trajectories import INPUTS, read_jsonl

ALONE = World(0, 1, torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a run whose latest checkpoint is that of step 2 of 4."""
    folder = tmp_path_factory.mktemp("attacked")
    same_length = [
        json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}) + "\n"
        for text in ("first", "other")
    ]
    lines = (INPUTS / "train_icd.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "data.jsonl").write_text("".join([*same_length, *lines[:20]]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(lines[20:22]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        resume()
    shutil.rmtree(folder / "run" / "checkpoints" / "checkpoint_000004")
    return folder


@pytest.fixture
def checkpoint(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint in a copy of that folder, which is the working directory."""
    shutil.copytree(stopped, tmp_path / "copy", symlinks=True, copy_function=shutil.copyfile)
    monkeypatch.chdir(tmp_path / "copy")
    return Path("run/checkpoints/checkpoint_000002")


def edit_state(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a state file and seal the checkpoint again, as somebody who crafts one would."""
    checkpoint = Path("run/checkpoints/checkpoint_000002")
    path = checkpoint / "state" / name
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(state) or state), encoding="utf-8")
    seal(checkpoint)


def at(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that sets a value deep inside a state."""

    def change(state: Any) -> None:
        *blocks, last = path
        for key in blocks:
            state = state[key]
        state[last] = value

    return change


def seal(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint)


def resume(**settings: Any) -> None:
    """Train in the working directory."""
    paths = {
        "run_dir": "run",
        "model_id_or_path": "model",
        "data": {"instruct_data": "data.jsonl", "eval_instruct_data": "eval.jsonl"},
    }
    train.train(str(kill_test_config(Path(), "config", **paths | {"no_eval": True, "max_steps": 4} | settings)))


def refusal(**settings: Any) -> str:
    """Return why the run is not resumed; its checkpoints and metrics must not have changed."""
    before = contents(Path("run"))
    with pytest.raises(UserError) as error:
        resume(**settings)
    assert contents(Path("run")) == before
    return str(error.value)


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file() and "tb" not in path.parts]
    kept = [path for path in files if path.name not in ("args.yaml", LOCK_NAME)]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in kept}


def steps() -> list[int]:
    return [int(path.name[-6:]) for path in saved_checkpoints(Path("run/checkpoints"))]


# ---- Two starts in one folder


def hold_in_another_process(run_dir: Path) -> int:
    """Start a process that locks a run folder and keeps it; return its id once it has."""
    read, write = os.pipe()
    if pid := os.fork():
        assert os.read(read, 1) == b"!"
        return pid
    with locked_run_dir(run_dir, ALONE):
        os.write(write, b"!")
        signal.pause()
    os._exit(0)


def test_second_start_is_refused_until_the_first_is_killed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_lock, "_WAIT_S", 0.1)
    first = hold_in_another_process(Path("run"))
    expected = f"The run folder run is in use: process {first} on {socket.gethostname()}, since 20"
    for how in ("auto", "never", str(checkpoint)):
        assert refusal(resume=how).startswith(expected)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert Path("run", LOCK_NAME).exists()
    assert "Set `resume: auto`" in refusal(resume="never")
    resume()
    assert steps()[-1] == 4 and not Path("run", LOCK_NAME).exists()


def test_start_waits_for_a_process_that_is_about_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = hold_in_another_process(tmp_path / "run")
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.kill(first, signal.SIGKILL))
    with locked_run_dir(tmp_path / "run", ALONE):
        assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK_NAME).read_text(encoding="utf-8")
    os.waitpid(first, 0)


def test_new_folders_without_a_run_are_removed_and_others_are_not(tmp_path: Path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError), locked_run_dir(tmp_path / "kept" / "a" / "run", ALONE):
        raise UserError("a mistake in the data")
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"] and not list((tmp_path / "kept").iterdir())
    with locked_run_dir(tmp_path / "kept", ALONE):
        pass
    with locked_run_dir(tmp_path / "a" / "run", ALONE):
        (tmp_path / "a" / "run" / "args.yaml").touch()
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["args.yaml"] and (tmp_path / "kept").is_dir()


def test_lock_of_a_killed_first_start_is_not_a_run(checkpoint: Path):
    shutil.rmtree("run")
    Path("run").mkdir()
    Path("run", LOCK_NAME).write_text("process 1 on elsewhere", encoding="utf-8")
    resume(resume="never", max_steps=1)
    assert steps() == [1]


def test_file_that_its_last_owner_removes_is_not_taken_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first start ends, and removes its file, between the second one's opening and locking of it."""
    path, lock, calls = tmp_path / LOCK_NAME, fcntl.flock, itertools.count()

    def flock(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        if next(calls) == 0:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_run_dir(tmp_path, ALONE), path.open("rb") as file, pytest.raises(BlockingIOError):
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert next(calls) == 2 and not path.exists()


def test_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_run_dir(tmp_path / "run", ALONE):
        assert "cannot be locked (No locks available): do not start this run twice" in caplog.text


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_read_only_run_folder_is_one_message(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: int):
    def refuse(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(run_lock, "_acquire", refuse)
    assert refusal() == f"The run folder run cannot be written: {os.strerror(error)}."


# ---- Data


def reversed_answers(text: str) -> str:
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = row["messages"][-1]["content"][::-1]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def swapped_rows(text: str) -> str:
    first, second, *others = text.splitlines(keepends=True)
    assert len(first) == len(second)
    return "".join([second, first, *others])


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("change", [reversed_answers, swapped_rows, lambda text: text + text.splitlines()[0] + "\n"])
def test_changed_data_is_refused_whatever_its_lengths(change: Callable[[str], str]):
    data = Path("data.jsonl")
    text = data.read_text(encoding="utf-8")
    data.write_text(change(text), encoding="utf-8")
    assert data.read_text(encoding="utf-8") != text
    assert "data.jsonl has changed since the checkpoint was saved" in refusal()


@pytest.mark.usefixtures("checkpoint")
def test_changed_data_is_refused_with_another_number_of_processes():
    data = Path("data.jsonl")
    data.write_text(reversed_answers(data.read_text(encoding="utf-8")), encoding="utf-8")
    edit_state("run.json", lambda run: run | {"world_size": 2})
    assert "data.jsonl has changed since the checkpoint was saved" in refusal()


@pytest.mark.usefixtures("checkpoint")
def test_copied_inputs_with_other_modification_times_are_the_same():
    for path in (Path("data.jsonl"), *Path("model").iterdir()):
        path.write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
    resume()
    assert steps()[-1] == 4
    assert [row["step"] for row in read_jsonl(Path("run/metrics.train.jsonl"))] == [1, 2, 3, 4, 3, 4]


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("changed", [False, True])
def test_losses_on_changed_evaluation_data_are_not_compared(changed: bool):
    edit_state("run.json", at("best_so_far", "best", value=0.1))  # on the earlier data, which nothing can beat
    if changed:
        data = Path("eval.jsonl")
        data.write_text(reversed_answers(data.read_text(encoding="utf-8")), encoding="utf-8")
    resume(no_eval=False, eval_freq=1, keep_best=True)
    assert steps()[-1] == 4 and Path("run/checkpoints/best").exists() == changed


def test_checkpoint_without_fingerprints_is_resumed_with_a_warning(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
):
    edit_state("run.json", lambda run: run.pop("fingerprints") and None)
    resume()
    assert (
        steps()[-1] == 4 and f"{checkpoint} is of an earlier version, which did not record" in capsys.readouterr().out
    )


# ---- Model


def other_weights(model: Path) -> None:
    tensors = load_file(model / "consolidated.safetensors")
    tensors["norm.weight"][-1] += 0.5
    save_file(tensors, model / "consolidated.safetensors")


def other_shapes(model: Path) -> None:
    params = json.loads((model / "params.json").read_text(encoding="utf-8"))
    (model / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-4}), encoding="utf-8")


def other_tokenizer(model: Path) -> None:
    """mistral-common's v1 tokenizer in place of its v3, which is used without a file."""
    file = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copyfile(file, model / file.name)


CHANGED_MODELS = {"weights": other_weights, "shapes": other_shapes, "tokenizer": other_tokenizer}


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("what", CHANGED_MODELS)
def test_another_base_or_tokenizer_is_refused(what: str):
    CHANGED_MODELS[what](Path("model"))
    assert f"The model in model has changed since the checkpoint was saved ({what})" in refusal()


# ---- Crafted state

DEEP = "[" * 100_000


CRAFTED = {
    "a step that is a string": ("run.json", at("progress", "step", value="2")),
    "a negative step": ("run.json", at("progress", "step", value=-2)),
    "a step after the last": ("run.json", at("progress", "step", value=10**9)),
    "a step of 400 digits": ("run.json", at("progress", "step", value=10**400)),
    "no progress": ("run.json", at("progress", value=None)),
    "losses that are numbers": ("run.json", at("progress", "eval_losses", value=[1, 2])),
    "a scale of zero": ("run.json", at("scaler", "scale", value=0)),
    "guards that are a list": ("run.json", at("guards", value=[])),
    "a learning rate that is NaN": ("run.json", at("groups", 0, "lr", value=math.nan)),
    "a largest learning rate that is a string": ("run.json", at("groups", 0, "max_lr", value="1")),
    "betas that are one number": ("run.json", at("groups", 0, "betas", value=0.9)),
    "no groups": ("run.json", at("groups", value=[])),
    "a group that has parameters": ("run.json", at("groups", 0, "params", value=[{"a": 1}])),
    "a schedule after its end": ("run.json", at("schedule", "last_epoch", value=10**6)),
    "a plan that starts later": ("run.json", at("schedule", "plan", "start", value=10**6)),
    "a plan of no steps": ("run.json", at("schedule", "plan", "end", value=0)),
    "no learning rate": ("run.json", at("schedule", "last_lr", value=[])),
    "a learning rate that is infinite": ("run.json", at("schedule", "last_lr", value=[math.inf])),
    "no processes": ("run.json", at("world_size", value=0)),
    "settings that are a list": ("run.json", at("args", value=[])),
    "settings of the wrong type": ("run.json", at("args", "max_steps", value="many")),
    "a block that is a number": ("run.json", at("args", "data", value=3)),
    "settings out of range": ("run.json", at("args", "seq_len", value=-1)),
    "fingerprints that are a string": ("run.json", at("fingerprints", value="same")),
    "an epoch beyond all steps": ("rank_00000.json", at("data", "sources", 0, "epoch", value=10**7)),
    "a negative place": ("rank_00000.json", at("data", "sources", 0, "place", value=-5)),
    "a place beyond the file": ("rank_00000.json", at("data", "sources", 0, "place", value=10**6)),
    "another place": ("rank_00000.json", at("data", "sources", 0, "place", value=0)),
    "a file that does not exist": ("rank_00000.json", at("data", "sources", 0, "file", value=9)),
    "an offset beyond the sample": ("rank_00000.json", at("data", "sources", 0, "offset", value=10**9)),
    "samples that wait with concat": ("rank_00000.json", at("data", "sources", 0, "waiting", value=[[0, 0, 1]])),
    "counts that lack one": ("rank_00000.json", at("data", "sources", 0, "counts", value={"samples": 1})),
    "no sources": ("rank_00000.json", at("data", "sources", value=[])),
    "two sources": ("rank_00000.json", lambda state: state["data"]["sources"].append(state["data"]["sources"][0])),
    "a generator of another kind": ("rank_00000.json", at("data", "random", 0, value="PCG64")),
    "a generator without numbers": ("rank_00000.json", at("data", "random", 1, value=[])),
    "a generator after its end": ("rank_00000.json", at("random", "numpy", 2, value=10**6)),
    "a Python generator of letters": ("rank_00000.json", at("random", "python", 1, value=["a"] * 625)),
    "a generator that is not base64": ("rank_00000.json", at("random", "torch", value="é")),
    "a generator that is too short": ("rank_00000.json", at("random", "torch", value="AAAA")),
    "a list": ("run.json", lambda run: [run]),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_state_is_refused(checkpoint: Path, name: str):
    file, change = CRAFTED[name]
    edit_state(file, change)
    message = refusal()
    assert len(message) < 1000 and ("checkpoint" in message or "data.jsonl" in message), message


@pytest.mark.parametrize("content", [DEEP, "{", "", "\xff", "9" * 5000])
@pytest.mark.parametrize("name", ["run.json", "rank_00000.json"])
def test_state_that_is_not_json(checkpoint: Path, name: str, content: str):
    (checkpoint / "state" / name).write_text(content, encoding="latin-1")
    seal(checkpoint)
    assert f"{checkpoint}/state/{name} does not contain the state of a run" in refusal()


@pytest.mark.usefixtures("checkpoint")
@pytest.mark.parametrize("manifest", [DEEP, "[]", '{"files": {"../../args.yaml": {}}}', '{"files": {"/dev/zero": 1}}'])
def test_crafted_manifest_is_corrupt(checkpoint: Path, manifest: str):
    (checkpoint / MANIFEST_NAME).write_text(manifest, encoding="utf-8")
    assert MANIFEST_NAME in str(find_corruption(checkpoint))
    assert "No checkpoint in run can be resumed" in refusal()


CRAFTED_TENSORS: dict[str, Callable[[Path, dict[str, torch.Tensor]], object]] = {
    "of other shapes": lambda file, found: save_file({name: torch.zeros(3, 5) for name in found}, file),
    "without dimensions": lambda file, found: save_file({name: torch.zeros(()) for name in found}, file),
    "of other names": lambda file, found: save_file({f"{name}x": tensor for name, tensor in found.items()}, file),
    "none": lambda file, found: save_file({}, file),
    "an empty file": lambda file, found: file.write_bytes(b""),
    "not safetensors": lambda file, found: file.write_bytes(b"[" * 100_000),
    "a huge header": lambda file, found: file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "no file": lambda file, found: file.unlink(),
}


@pytest.mark.parametrize("name", CRAFTED_TENSORS)
def test_crafted_tensors_are_refused(checkpoint: Path, name: str):
    for file in (checkpoint / "state").glob("*.safetensors"):
        CRAFTED_TENSORS[name](file, load_file(file))
    seal(checkpoint)
    with pytest.raises(UserError, match="cannot be loaded"):
        resume()
