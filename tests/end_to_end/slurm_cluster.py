"""example/slurm.sbatch on a real Slurm of two nodes: `python -m tests.end_to_end.slurm_cluster`, as root.

    apt-get install slurm-wlm munge

A controller and two slurmd run on this machine, in namespaces of their own, with which they and all their jobs end. The
nodes have GPUs in number only: the jobs train on the CPU. Jobs wait at a step until what they are to meet has happened.
Each must end as it should, with the metrics of the uninterrupted job; the end of its log is printed for a person to
read. Takes ten minutes, most of them waiting.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import psutil
import torch

from finetune.manifest import MANIFEST_NAME
from tests.end_to_end.kill_runs import curve, kill_test_config
from tests.support.held_run import release
from tests.support.patience import wait_until
from tests.support.run_trajectories import ROOT

CONTROLLER = "10.77.0.3"
NODES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
SHOWN_LINES = 20
Curve = dict[str, list[list[float]]]  # metrics by step, see kill_runs.curve
# Several slurmd on one machine; short times, so that a lost node is noticed and a job starts again within seconds.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=n0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
MinJobAge=100000
NodeName=n1 NodeAddr={n1} NodeHostname=n1 Port=7001 CPUs=4 Gres=gpu:2
NodeName=n2 NodeAddr={n2} NodeHostname=n2 Port=7002 CPUs=4 Gres=gpu:2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=2 PreemptMode=OFF
"""
# Instead of torchrun: the same, with workers that are forked and wait at a step.
TORCHRUN = """#!/bin/sh
for word; do shift; [ "$word" = train ] && word=tests.support.held_run; set -- "$@" "$word"; done
exec {python} -c 'import sys
from tests.support import forked, forking_torchrun
forked.import_before_forking()
forking_torchrun.main(sys.argv[1:])' "$@"
"""


def in_namespaces() -> None:
    """Continue in new namespaces for processes, network, mounts and host name."""
    missing = [name for name in ("unshare", "munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        sys.exit(f"error: needs root and {', '.join(missing) or 'nothing else'}: apt-get install slurm-wlm munge")
    unshare = ["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--mount-proc", "--kill-child"]
    os.execvp("unshare", [*unshare, sys.executable, "-m", "tests.end_to_end.slurm_cluster", "inside"])


class Cluster:
    """A controller and two nodes, whose processes end with this one's namespaces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._slurmd: dict[str, int] = {}
        self._set_up_network()
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, **NODES))
        (folder / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{device}\n" for device in ("null", "zero")))
        (folder / "state").mkdir()
        bin = folder / "bin"
        bin.mkdir()
        (bin / "torchrun").write_text(TORCHRUN.format(python=sys.executable))
        (bin / "torchrun").chmod(0o755)
        os.environ["PATH"] = f"{bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.environ |= {"SLURM_CONF": f"{folder}/slurm.conf", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._start_munge()
        self._start("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self._ask("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split(), "no node is idle")

    def _set_up_network(self) -> None:
        addresses, hosts = {"localhost": "127.0.0.1", "n0": CONTROLLER, **NODES}, self.folder / "hosts"
        hosts.write_text("".join(f"{address} {name}\n" for name, address in addresses.items()))
        commands = [f"mount --bind {hosts} /etc/hosts", "hostname n0", "ip link set lo up"]
        commands.append("ip link add eth0 type veth peer name eth1")  # Slurm does not resolve names with loopback alone
        commands += [f"ip address add {address}/24 dev eth0" for name, address in addresses.items() if name[0] == "n"]
        for command in (*commands, "ip link set eth0 up"):
            subprocess.run(command.split(), check=True)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--force", "--foreground", f"--socket={self.folder}/munge.socket", *files)
        wait_until((self.folder / "munge.socket").exists, "munged does not start")

    def _start(self, *command: str) -> int:
        with (self.folder / "daemons.log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True).pid

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, under the node's host name."""
        self._slurmd[node] = self._start("unshare", "--uts", "sh", "-c", f"hostname {node}; exec slurmd -D -N {node}")

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True).stdout

    def submit(self, config: Path, *options: str) -> str:
        """Submit the script for two nodes of two processes. Return the job's number."""
        common = ["--parsable", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2", f"--chdir={config.parent}"]
        script = [str(ROOT / "example" / "slurm.sbatch"), str(config)]
        return subprocess.run(
            ["sbatch", *common, *options, *script], check=True, capture_output=True, text=True
        ).stdout.strip()

    def version(self) -> str:
        """Return Slurm's name and version."""
        return self._ask("sinfo", "--version").strip()

    def preempt(self) -> None:
        """Submit a job of higher priority that needs all of both nodes for some seconds."""
        options = ["--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--output=/dev/null"]
        subprocess.run(["sbatch", *options, "--wrap=sleep 3"], check=True, stdout=subprocess.DEVNULL)

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job: JobState, Restarts, ..."""
        text = self._ask("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: str) -> dict[str, str]:
        """Wait until a job has ended for good. Return what Slurm says of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.job(number).get("JobState") in ended, f"job {number} does not end")
        return self.job(number)

    def kill(self, node: str, only: str = "") -> None:
        """Kill a node's processes, which have its host name: all, or those with `only` in their command line."""
        space = os.readlink(f"/proc/{self._slurmd[node]}/ns/uts")
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/uts") == space and only in " ".join(process.cmdline()):
                    process.kill()


def wait_until_held(cluster: Cluster, config: Path, number: str) -> None:
    """Wait until a job has a checkpoint, and so is held at the step after it."""
    manifest = config.with_suffix("") / "checkpoints" / "last" / MANIFEST_NAME
    wait_until(lambda: manifest.exists() or cluster.job(number)["JobState"] == "FAILED", "no checkpoint")


def finish(cluster: Cluster, config: Path) -> str:
    release(config)
    return cluster.submit(config)


def time_limit(cluster: Cluster, config: Path) -> str:
    """Slurm sends the signal up to a minute early: one to two minutes after the start."""
    return cluster.submit(config, "--time=3", "--signal=USR1@60")


def preemption(cluster: Cluster, config: Path) -> str:
    number = cluster.submit(config)
    wait_until_held(cluster, config, number)
    cluster.preempt()
    return number


def lost_processes(cluster: Cluster, config: Path) -> str:
    """As when the system ends processes for lack of memory."""
    number = cluster.submit(config)
    wait_until_held(cluster, config, number)
    cluster.kill("n2", only="torchrun")
    release(config)
    return number


def lost_node(cluster: Cluster, config: Path) -> str:
    """As when a node's power fails and returns."""
    number = cluster.submit(config)
    wait_until_held(cluster, config, number)
    cluster.kill("n2")
    release(config)
    wait_until(lambda: cluster.job(number).get("JobState") == "PENDING", "the job is not requeued")
    cluster.start_node("n2")
    return number


def scancel(cluster: Cluster, config: Path) -> str:
    number = cluster.submit(config)
    wait_until_held(cluster, config, number)
    subprocess.run(["scancel", number], check=True)
    return number


# What happens to a job -> how Slurm calls its end, how often it was requeued, and what its logs must say.
WAYS: dict[str, tuple[Callable[[Cluster, Path], str], str, int, Sequence[str]]] = {
    "finish": (finish, "COMPLETED", 0, ["Training finished"]),
    "time limit": (
        time_limit,
        "COMPLETED",
        1,
        ["Stopped by SIGUSR1 after step 3.", "Interrupted; the job is requeued and continues from checkpoint_000003."],
    ),
    "preemption": (preemption, "COMPLETED", 1, ["Stopped by SIGTERM after step 3."]),
    "lost processes": (
        lost_processes,
        "COMPLETED",
        1,
        ["or its machine failed.", "Failed after it saved checkpoint_000002; the job is requeued and continues from"],
    ),
    "lost node": (lost_node, "COMPLETED", 1, ["or its machine failed."]),
    "scancel": (scancel, "CANCELLED", 0, ["Stopped by SIGTERM after step 3."]),
}


def logs(folder: Path, number: str) -> str:
    """Return a job's logs: of each attempt, then of the script."""
    files = [*sorted(folder.glob(f"slurm-{number}-*.log")), folder / f"slurm-{number}.out"]
    return "".join(f"[{file.name}]\n{file.read_text(encoding='utf-8')}" for file in files if file.exists())


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """Yield a folder that slurmd and munged accept, which must belong to root alone."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # the daemons still write
        Path(name).chmod(0o755)
        yield Path(name)


def judge(way: str, job: dict[str, str], text: str, found: Curve, expected: Curve) -> tuple[bool, str]:
    """Return whether a job ended as it should, and a line for a person; see WAYS."""
    _, state, requeued, sentences = WAYS[way]
    missing = [sentence for sentence in sentences if sentence not in text]
    equal = all(found[tag] == expected[tag][: len(found[tag])] for tag in expected)
    complete = len(found["train"]) == len(expected["train"]) or state == "CANCELLED"
    right = (job["JobState"], int(job["Restarts"]), missing, equal, complete) == (state, requeued, [], True, True)
    line = f"{way}: {job['JobState']}, requeued {job['Restarts']} times, {len(found['train'])} steps, their metrics "
    line += "equal" if equal else "unequal to"
    line += " those of the uninterrupted job"
    return right, f"{'right' if right else 'WRONG'}: {line}{''.join(f'; not said: {one!r}' for one in missing)}"


def shown(text: str, folder: Path) -> str:
    """Return the end of a log, without the folders of this machine."""
    for path, name in ((folder, "FOLDER"), (Path(torch.__file__).parents[1], "site-packages"), (ROOT, "ROOT")):
        text = text.replace(str(path), name)
    return "\n".join(f"    {line}" for line in text.splitlines()[-SHOWN_LINES:])


def main() -> int:
    """Run a job in every way. Return how many ended as they should not."""
    lines, wrong, expected = [], 0, None
    with working_folder() as folder:
        cluster = Cluster(folder)
        for way, (run, *_) in WAYS.items():
            began = time.monotonic()
            config = kill_test_config(folder, way.replace(" ", "_"), max_steps=16)
            job = cluster.wait(run(cluster, config))
            text, found = logs(folder, job["JobId"]), curve(config.with_suffix(""))
            expected = expected or found
            right, line = judge(way, job, text, found, expected)
            lines.append(f"{line}; {time.monotonic() - began:.0f} s")
            wrong += not right
            print(f"--- {way}", shown(text, folder), sep="\n", flush=True)
        print(f"--- {cluster.version()}, torch {torch.__version__}, {date.today()}", *lines, sep="\n")
    return wrong


if __name__ == "__main__":
    if sys.argv[1:] == ["inside"]:
        sys.exit(main())
    in_namespaces()
