"""Two simulated nodes of two processes, one of which fails: `python -m tests.end_to_end.two_nodes` tests every way.

Each node has its own torchrun in its own network namespace, connected by a veth pair, or on loopback if the kernel does
not permit namespaces.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from finetune.manifest import MANIFEST_NAME
from tests.end_to_end.kill_runs import curve, kill_test_config, train_forked
from tests.support import forking_torchrun, namespaces
from tests.support.forked import fork
from tests.support.held_run import release
from tests.support.patience import wait_until

# torchrun detects a lost node within seconds instead of 15, and waits 3 seconds for it instead of 30.
RENDEZVOUS_TIMES = "keep_alive_interval=1,last_call_timeout=3"


class Network:
    """The network of two nodes: their addresses, and how to start a program on them."""

    def __init__(self, addresses: Sequence[str], interface: str, namespace_pids: Sequence[int]) -> None:
        self.addresses = addresses
        self.interface = interface
        self._namespace_pids = namespace_pids
        with socket.create_server(("", 0)) as free:
            self.port = str(free.getsockname()[1])

    def enter(self, node: int) -> None:
        """Continue this process, a forked one, on a node."""
        if self._namespace_pids:
            namespaces.enter(self._namespace_pids[node])
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface

    def command(self, node: int, *command: str) -> list[str]:
        """Return a command line that runs `command` in the namespace of a node."""
        return [*_enter(self._namespace_pids[node]), *command]

    def set_link(self, state: str) -> None:
        """Disconnect the nodes ("down") or reconnect them ("up"), without closing connections, as a power failure."""
        assert self._namespace_pids, "loopback cannot be disconnected"
        subprocess.run(self.command(0, "ip", "link", "set", self.interface, state), check=True)


def _enter(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--user", "--net", "--preserve-credentials"]


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Yield two namespaces connected by a veth pair, or loopback if namespaces are not permitted."""
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
        comm = Path(f"/proc/{process.pid}/comm")
        wait_until(lambda: process.poll() is not None or comm.read_text() == "sleep\n", "a namespace is not created")
        if process.poll() is not None:
            raise OSError("cannot create a namespace")
        return process.pid

    first = hold("unshare", "--user", "--map-root-user", "--net")
    made = Network(["10.77.0.1", "10.77.0.2"], "eth0", [first, hold(*_enter(first), "unshare", "--net")])
    pair = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(made._namespace_pids[1])]
    subprocess.run(made.command(0, *pair), check=True, capture_output=True)
    for node, address in enumerate(made.addresses):
        for words in (f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            subprocess.run(made.command(node, "ip", *words.split()), check=True, capture_output=True)
    return made


class Node:
    """A torchrun with its two processes."""

    def __init__(
        self, where: Network, number: int, config: Path, *options: str, nodes: str = "2", module: str = "train"
    ) -> None:
        self._log = config.with_suffix(f".{number}.log")
        arguments = ["--nnodes", nodes, "--nproc-per-node", "2", "--max-restarts", "3"]
        arguments += ["--local-addr", where.addresses[number], *options, "-m", module, str(config)]

        def launch() -> None:
            where.enter(number)
            # A restarted node finds the others only if torchrun creates a new store for each attempt.
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
            forking_torchrun.main(arguments)

        self._pid, self._code = fork(launch, self._log, self._log), None

    def kill(self) -> None:
        """Kill all its processes at once."""
        if self.is_up:
            launcher = psutil.Process(self._pid)
            for process in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            wait_until(lambda: not self.is_up, "a killed node does not end")

    def wait(self) -> int | None:
        """Return the exit code of its torchrun."""
        wait_until(lambda: not self.is_up, "a node does not end")
        return self._code

    @property
    def is_up(self) -> bool:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code is None

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")


def rendezvous_options(where: Network, number: int, static: bool = False) -> list[str]:
    """Return torchrun's options to find the first node, by c10d or static rendezvous."""
    address = where.addresses[0]
    if static:
        return ["--node-rank", str(number), "--master-addr", address, "--master-port", where.port]
    settings = f"{RENDEZVOUS_TIMES},is_host={number == 0}"  # the host name does not resolve to these addresses
    endpoint = f"{address}:{where.port}"
    return ["--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", endpoint, "--rdzv-conf", settings]


def wait_for_checkpoint(config: Path, nodes: Sequence[Node]) -> None:
    manifest = config.with_suffix("") / "checkpoints" / "last" / MANIFEST_NAME
    wait_until(lambda: manifest.exists() or not all(node.is_up for node in nodes), "no checkpoint")
    assert manifest.exists(), nodes[0].log + nodes[1].log


def two_nodes(config: Path, *, static: bool = False, kill: bool = True, disconnect: bool = False) -> list[Node]:
    """Train on two nodes, the second of which may be killed after the first checkpoint and restarted.

    Args:
        config: path of the YAML.
        static: rendezvous by rank and address instead of c10d.
        kill: kill the second node and restart it.
        disconnect: disconnect the network before, so that the first node is not notified.

    Returns:
        The nodes, which finished successfully.
    """
    with network() as where:

        def start(number: int) -> Node:
            module = "tests.support.held_run" if kill else "train"
            return Node(where, number, config, *rendezvous_options(where, number, static), module=module)

        nodes = [start(0), start(1)]
        try:
            if kill:
                wait_for_checkpoint(config, nodes)
                if disconnect:
                    where.set_link("down")
                nodes[1].kill()
                release(config)
                if disconnect:
                    where.set_link("up")
                nodes[1] = start(1)
            for node in nodes:
                assert node.wait() == 0, node.log
        finally:
            for node in nodes:
                node.kill()
    return nodes


def one_node_left(config: Path) -> Node:
    """Train on two nodes (`--nnodes 1:2`). The second is killed, and the first continues alone."""
    with network() as where:
        held = {"nodes": "1:2", "module": "tests.support.held_run"}
        nodes = [Node(where, n, config, *rendezvous_options(where, n), **held) for n in range(2)]
        try:
            wait_for_checkpoint(config, nodes)
            nodes[1].kill()
            release(config)
            assert nodes[0].wait() == 0 and "Resuming a 4-process run with 2 processes" in nodes[0].log, nodes[0].log
        finally:
            nodes[0].kill()
    return nodes[0]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = curve(train_forked(kill_test_config(folder, "reference", max_steps=16), 4))
        ways: dict[str, Callable[[Path], object]] = {
            "static_uninterrupted": lambda config: two_nodes(config, static=True, kill=False),
            "c10d_killed": two_nodes,
            "c10d_disconnected_and_killed": lambda config: two_nodes(config, disconnect=True),
            "static_killed": lambda config: two_nodes(config, static=True),
            "elastic_one_left": one_node_left,
        }
        for way, run in ways.items():
            began = time.monotonic()
            config = kill_test_config(folder, way, max_steps=16)
            run(config)
            found = curve(config.with_suffix(""))
            facts = {"way": way, "steps": len(found["train"]), "curve_equal": found == expected}
            print(json.dumps(facts | {"seconds": round(time.monotonic() - began)}), flush=True)


if __name__ == "__main__":
    main()
