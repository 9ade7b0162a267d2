"""Two nodes of two processes on one machine, one of which dies: `python -m tests.end_to_end.two_nodes` tries every way.

Each node is a torchrun of its own, in a network namespace of its own where the kernel lets us make some (a veth pair
joins them), else on loopback.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from finetune.manifest import MANIFEST_NAME
from tests.end_to_end.kill_runs import ForkedRun, curve, kill_test_config
from tests.support.run_trajectories import ROOT

# Torchrun notices within seconds that a node is gone; by default, after 15 and then 30 more.
PATIENCE = "keep_alive_interval=1,last_call_timeout=3"


class Network:
    """Where two nodes live: the addresses they have, and how to start a program there."""

    def __init__(self, addresses: Sequence[str], interface: str, holders: Sequence[int]) -> None:
        self.addresses = addresses
        self.interface = interface
        self._holders = holders
        with socket.create_server(("", 0)) as free:
            self.port = str(free.getsockname()[1])

    def enter(self, node: int, *command: str) -> list[str]:
        """A command line that runs `command` on a node."""
        return [*_enter(self._holders[node]), *command] if self._holders else list(command)

    def set_link(self, state: str) -> None:
        """Cuts the nodes' connection ("down") or mends it ("up"): nobody is told, as when the power fails."""
        assert self._holders, "Loopback cannot be cut."
        subprocess.run(self.enter(0, "ip", "link", "set", self.interface, state), check=True)


def _enter(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--user", "--net", "--preserve-credentials"]


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Two namespaces joined by a veth pair, or loopback where there is no right to them."""
    with contextlib.ExitStack() as stack:
        try:
            found = _namespaces(stack)
        except (OSError, subprocess.CalledProcessError):
            found = Network(["127.0.0.1", "127.0.0.1"], "lo", [])
        yield found


def _namespaces(stack: contextlib.ExitStack) -> Network:
    def hold(*command: str) -> int:
        process = subprocess.Popen([*command, "sleep", "infinity"], stderr=subprocess.DEVNULL)
        stack.callback(process.wait)
        stack.callback(process.kill)
        end = time.monotonic() + 10
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            if process.poll() is not None or time.monotonic() > end:
                raise OSError("no namespace")
            time.sleep(0.01)
        return process.pid

    first = hold("unshare", "--user", "--map-root-user", "--net")
    made = Network(["10.77.0.1", "10.77.0.2"], "eth0", [first, hold(*_enter(first), "unshare", "--net")])
    pair = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(made._holders[1])]
    subprocess.run(made.enter(0, *pair), check=True, capture_output=True)
    for node, address in enumerate(made.addresses):
        for words in (f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            subprocess.run(made.enter(node, "ip", *words.split()), check=True, capture_output=True)
    return made


class Node:
    """One of two nodes: a torchrun and its two processes."""

    def __init__(self, where: Network, number: int, config: Path, *options: str, nodes: str = "2") -> None:
        self._log = config.with_suffix(f".{number}.log")
        common = ["--nnodes", nodes, "--nproc-per-node", "2", "--max-restarts", "3"]
        common += ["--local-addr", where.addresses[number]]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *common, *options, "-m", "train", str(config)]
        # A node that comes back finds the others only where torchrun makes a new store for each attempt.
        environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment["GLOO_SOCKET_IFNAME"] = where.interface
        with self._log.open("a") as log:
            self._launcher = subprocess.Popen(
                where.enter(number, *torchrun), cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """Kills all its processes at once."""
        if self.is_up:
            launcher = psutil.Process(self._launcher.pid)
            for process in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
        self._launcher.wait()

    def wait(self, seconds: float = 240) -> int:
        """The exit code of its torchrun."""
        try:
            return self._launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def is_up(self) -> bool:
        return self._launcher.poll() is None

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")


def rendezvous_options(where: Network, number: int, static: bool = False) -> list[str]:
    """How a node finds the first one: by c10d rendezvous, or statically."""
    address = where.addresses[0]
    if static:
        return ["--node-rank", str(number), "--master-addr", address, "--master-port", where.port]
    settings = f"{PATIENCE},is_host={number == 0}"  # the host's name does not stand for these addresses
    endpoint = f"{address}:{where.port}"
    return ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", endpoint, "--rdzv-conf", settings]


def wait_for_checkpoint(config: Path, nodes: Sequence[Node], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (config.with_suffix("") / "checkpoints" / "last" / MANIFEST_NAME).exists():
        assert time.monotonic() < end and all(node.is_up for node in nodes), nodes[0].log + nodes[1].log
        time.sleep(0.05)


def two_nodes(config: Path, *, static: bool = False, die: bool = True, cut: bool = False) -> list[Node]:
    """Trains on two nodes, the second of which may die behind the first checkpoint and come back.

    Args:
        config: what to train.
        static: rendezvous by rank and address in place of c10d.
        die: kill the second node, and start it again.
        cut: take the network away before, so that the first node is told nothing.

    Returns:
        The nodes, which ended well.
    """
    with network() as where:

        def start(number: int) -> Node:
            return Node(where, number, config, *rendezvous_options(where, number, static))

        nodes = [start(0), start(1)]
        try:
            if die:
                wait_for_checkpoint(config, nodes)
                if cut:
                    where.set_link("down")
                nodes[1].kill()
                if cut:
                    where.set_link("up")
                nodes[1] = start(1)
            for node in nodes:
                assert node.wait() == 0, node.log
        finally:
            for node in nodes:
                node.kill()
    return nodes


def one_node_left(config: Path) -> Node:
    """Trains on two nodes, the second of which dies for good; the first goes on alone (`--nnodes 1:2`)."""
    with network() as where:
        nodes = [Node(where, n, config, *rendezvous_options(where, n), nodes="1:2") for n in range(2)]
        try:
            wait_for_checkpoint(config, nodes)
            nodes[1].kill()
            assert nodes[0].wait() == 0 and "Resuming a 4-process run with 2 processes" in nodes[0].log, nodes[0].log
        finally:
            nodes[0].kill()
    return nodes[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = kill_test_config(folder, "reference")
        assert ForkedRun(reference, 4).wait() == [0] * 4
        expected = curve(reference.with_suffix(""))
        ways: dict[str, Callable[[Path], object]] = {
            "static_undisturbed": lambda config: two_nodes(config, static=True, die=False),
            "c10d_killed": two_nodes,
            "c10d_cut_and_killed": lambda config: two_nodes(config, cut=True),
            "static_killed": lambda config: two_nodes(config, static=True),
            "elastic_one_left": one_node_left,
        }
        for way, run in ways.items():
            began = time.monotonic()
            config = kill_test_config(folder, way)
            run(config)
            found = curve(config.with_suffix(""))
            facts = {"way": way, "steps": len(found["train"]), "curve_equal": found == expected}
            print(json.dumps(facts | {"seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main()
