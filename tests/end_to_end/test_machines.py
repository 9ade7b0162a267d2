"""Multi-node runs, hybrid sharding and CPU offload."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.args import load_train_args
from finetune.distributed import World
from finetune.hardware import Hardware
from finetune.memory_estimate import MemoryConfig
from finetune.preemption import MARKER_NAME
from finetune.preflight import check_preflight
from finetune.wrapped_model import open_base_model
from model.errors import UserError
from tests.end_to_end.kill_runs import COMPARED, ForkedRun, curve, kill_test_config, train_forked
from tests.end_to_end.two_nodes import two_nodes
from tests.support.run_trajectories import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"max_steps": 4, "ckpt_freq": 2, "eval_freq": 2, "num_ckpt_keep": None}
NEARLY = {"rel": 1e-6, "abs": 1e-9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("machines")


def train_in(folder: Path, name: str, ranks: int, **settings) -> tuple[Path, str]:
    """Train. Return the run folder and the output."""
    config = kill_test_config(folder, name, **SHORT | settings)
    run = ForkedRun(config, ranks)
    assert run.wait() == [0] * ranks, run.log
    return config.with_suffix(""), run.log


@pytest.fixture(scope="module")
def full(folder) -> dict[int, Path]:
    """Runs with full sharding by number of processes; a single process does not shard."""
    return {ranks: train_in(folder, f"full_{ranks}", ranks)[0] for ranks in (1, 2, 4)}


@pytest.fixture(scope="module")
def hybrid(folder) -> Path:
    """A run of four processes on two machines, each with a copy of the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        return train_in(folder, "hybrid", 4, sharding="hybrid")[0]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Compare losses, learning rates, gradient norms and exported weights."""
    curves = curve(run_dir), curve(expected)
    for tag in COMPARED:
        assert len(curves[0][tag]) == len(curves[1][tag]) > 0
        for row, expected_row in zip(curves[0][tag], curves[1][tag]):
            assert row == pytest.approx(expected_row, **NEARLY)
    adapters = [load_file(run / "checkpoints/last/consolidated/lora.safetensors") for run in (run_dir, expected)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-5, atol=1e-6)


def half_of(run_dir: Path, folder: Path, name: str) -> None:
    """Copy a run of 4 steps and remove its last checkpoint, so that step 2 is the latest."""
    shutil.copytree(run_dir, folder / name, symlinks=True)
    shutil.rmtree(folder / name / "checkpoints" / "checkpoint_000004")


# --- Hybrid sharding


def test_hybrid_sharding_trains_as_full_sharding(full, hybrid):
    assert_same_run(hybrid, full[4])
    assert elements_in_state(hybrid) == elements_in_state(full[4])  # both machines have a copy, one saves it


@pytest.mark.parametrize("per_machine", [1, 2])
def test_hybrid_sharding_with_one_copy_or_without_shards(per_machine, full, folder, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_machine))
    assert_same_run(train_in(folder, f"hybrid_by_{per_machine}", 2, sharding="hybrid")[0], full[2])


def elements_in_state(run_dir: Path) -> int:
    files = (run_dir / "checkpoints/last/state").glob("*.safetensors")
    return sum(tensor.numel() for file in files for tensor in load_file(file).values())


@pytest.mark.parametrize("before, after", [("full", "hybrid"), ("hybrid", "full")])
def test_a_run_resumes_with_another_sharding(before, after, full, hybrid, folder, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    half_of({"full": full[4], "hybrid": hybrid}[before], folder, f"{before}_to_{after}")
    run_dir, log = train_in(folder, f"{before}_to_{after}", 4, sharding=after)
    assert "(step 2)" in log
    assert_same_run(run_dir, full[4])


class UnevenRun(ForkedRun):
    """Three processes on two machines."""

    def _fork(self, config: Path, rank: int, ranks: int, port: str) -> int:
        os.environ["LOCAL_WORLD_SIZE"] = "2" if rank < 2 else "1"
        return super()._fork(config, rank, ranks, port)


def test_hybrid_sharding_needs_equally_many_processes_per_machine(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    run = UnevenRun(kill_test_config(folder, "uneven", sharding="hybrid"), 3)
    assert run.wait() == [1, 1, 1]
    assert run.log.count("error: ") == 1 and "Traceback" not in run.log
    assert "needs the same number of processes on all machines; there are 1 on one and 2 on another" in run.log


# --- CPU offload


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_in_host_memory_trains_identically(ranks, full, folder):
    run_dir, log = train_in(folder, f"offload_{ranks}", ranks, cpu_offload=True)
    assert log.count("`cpu_offload: true` has no effect here") == 1
    assert_same_run(run_dir, full[ranks])


def test_a_run_resumes_with_its_model_in_host_memory(full, folder):
    half_of(full[1], folder, "offload_later")
    run_dir, log = train_in(folder, "offload_later", 1, cpu_offload=True)
    assert "(step 2)" in log
    assert_same_run(run_dir, full[1])


def test_a_model_in_host_memory_is_exported_completely(folder):
    settings = {"save_adapters": False, "max_steps": 2, "no_eval": True}
    runs = [train_in(folder, f"merged_{offload}", 1, cpu_offload=offload, **settings)[0] for offload in (True, False)]
    offloaded, expected = (load_file(run / "checkpoints/last/consolidated/consolidated.safetensors") for run in runs)
    assert offloaded.keys() == expected.keys()
    for name, tensor in offloaded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_with_cpu_offload_the_gpu_needs_memory_for_two_blocks_only(folder, monkeypatch, tmp_path):
    """The simulated GPU has just enough memory for two blocks and the embeddings."""
    args = load_train_args(kill_test_config(folder, "memory", no_ckpt=True))
    base = open_base_model(args)
    offloaded = dataclasses.replace(args, cpu_offload=True)
    room = MemoryConfig.of(offloaded, base.args, torch.float32, "cuda", "sdpa", shards=1).memory().unsharded
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, room))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    gpu, world = Hardware(torch.device("cuda", 0), torch.float32, "sdpa"), World(0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match=r"`cpu_offload: true`"):
        check_preflight(base, args, gpu, tmp_path, world)
    args.cpu_offload = True
    check_preflight(base, args, gpu, tmp_path, world)
    room -= 1
    with pytest.raises(UserError, match="GiB free"):
        check_preflight(base, args, gpu, tmp_path, world)


def test_cpu_offload_with_the_8_bit_optimizer_is_refused(folder):
    config = kill_test_config(folder, "eight_bits", cpu_offload=True, optim={"name": "adamw8bit"})
    with pytest.raises(UserError, match=r"`cpu_offload: true` needs `optim.name: adamw`"):
        load_train_args(config)


# --- Nodes


def test_a_restarted_node_finishes_the_run(folder):
    """Two nodes with two processes each are bit-identical to one node with four."""
    reference = train_forked(kill_test_config(folder, "reference"), 4)
    config = kill_test_config(folder, "restarted")
    nodes = two_nodes(config)
    assert any("Resuming from" in node.log for node in nodes)
    assert curve(config.with_suffix("")) == curve(reference)


def test_static_rendezvous_by_rank_and_address(full, folder):
    config = kill_test_config(folder, "static", **SHORT, sharding="hybrid")
    two_nodes(config, static=True, kill=False)
    assert_same_run(config.with_suffix(""), full[4])
    state = json.loads((config.with_suffix("") / "checkpoints/last/state/run.json").read_text())
    assert state["world_size"] == 4


# --- Slurm

STUBS = {
    "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" >> scontrol.txt',
    # Two tasks, each on its own node, with output to the file that --output names.
    "srun": """
        while [ "$1" != bash ]; do
            case $1 in --output=*) log=${1#--output=} ;; esac
            shift
        done
        "$@" > "$log" 2>&1 && "$@" >> "$log" 2>&1""",
    # Ignores Slurm's signal, as torchrun does; its workers may be interrupted, or save a checkpoint and fail.
    "torchrun": """
        echo "$@" >> torchrun.txt; kill -USR1 $$
        [ -z "$MARKER" ] || touch "$MARKER"
        [ -z "$SAVED" ] || mkdir -p "the run/checkpoints/$SAVED"
        exit "$CODE\"""",
}


@pytest.fixture
def start_job(tmp_path):
    """Return a function that runs the Slurm script once, as the first or a later attempt of a job."""
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "the run").mkdir()
    (tmp_path / "my run.yaml").write_text("max_steps: 7\nrun_dir: 'the run' # quoted\n")

    def start(code: int = 1, interrupted: bool = False, saved: str = "") -> tuple[str, bool]:
        """Return what the script prints, and whether it requeues the job."""
        slurm = {"JOB_ID": "40123", "JOB_NODELIST": "node[7-8]", "NNODES": "2"}
        slurm |= {"CPUS_PER_TASK": "32", "GPUS_ON_NODE": "8"}
        environment = {f"SLURM_{key}": value for key, value in slurm.items()} | {"CODE": str(code), "SAVED": saved}
        environment["MARKER"] = f"the run/{MARKER_NAME}" if interrupted else ""
        environment["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        script = [str(ROOT / "example" / "slurm.sbatch"), "my run.yaml"]
        done = subprocess.run(["bash", *script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, "")
        requests = tmp_path / "scontrol.txt"
        requeued = requests.exists()
        assert not requeued or requests.read_text() == "requeue 40123\n"
        requests.unlink(missing_ok=True)
        return done.stdout, requeued

    return start


@pytest.mark.parametrize("code", [0, 1])
def test_the_slurm_script_starts_every_node(code, start_job, tmp_path):
    assert start_job(code)[1] is False
    assert (tmp_path / "torchrun.txt").read_text().splitlines() == [
        "--nnodes 2 --nproc-per-node 8 --max-restarts 0 --rdzv-backend c10d --rdzv-id 40123 "
        "--rdzv-endpoint node7:10123 -m train my run.yaml"
    ] * (1 if code else 2)


def test_the_slurm_script_requeues_an_interrupted_run(start_job, tmp_path):
    printed, requeued = start_job(interrupted=True)
    assert requeued and "Interrupted; the job is requeued and continues from the beginning." in printed
    printed, requeued = start_job()  # the file of the earlier attempt does not count
    assert not requeued and "Failed without a new checkpoint (latest: none)" in printed
    assert not (tmp_path / "the run" / MARKER_NAME).exists()


def test_the_slurm_script_requeues_a_failure_that_followed_progress_until_there_is_none(start_job):
    for checkpoint in ("checkpoint_999998", "checkpoint_1000000"):
        printed, requeued = start_job(saved=checkpoint)
        assert requeued and f"Failed after it saved {checkpoint}; the job is requeued" in printed
    printed, requeued = start_job()
    assert not requeued and "Failed without a new checkpoint (latest: checkpoint_1000000)" in printed


@pytest.mark.parametrize("text", ["{broken", "max_steps: 7\n", "run_dir: 7\n"])
def test_the_slurm_script_never_retries_a_mistake_in_the_yaml(text, start_job, tmp_path):
    (tmp_path / "my run.yaml").write_text(text)
    printed, requeued = start_job()
    assert not requeued and "the job is not requeued. Log: slurm-40123-0.log" in printed
