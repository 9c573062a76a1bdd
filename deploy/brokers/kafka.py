"""A real Apache Kafka: one KRaft node, run from jars, as a child process.

`KafkaNode` starts, stops, kills and restarts it; ports and data outlive a restart. The state file in the data folder
lets another process find and stop a node (`kvatlas broker status`, `kvatlas broker stop`).

A start takes about three seconds: one JVM formats the storage (only the first time), a second one is the broker.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from kvatlas.deploy.brokers.errors import BrokerSetupError, BrokerStartError, BrokerStateError
from kvatlas.deploy.brokers.jars import KafkaHome, find_kafka
from kvatlas.deploy.brokers.process import Reaper, free_ports, process_token, read_from, tail, trouble
from kvatlas.deploy.brokers.properties import new_cluster_id, node_properties, render
from kvatlas.deploy.brokers.security import KeyStore, Security, ensure_keystore, security_properties

_READY_LINE = "Kafka Server started"
_PORT_TAKEN = "Address already in use"
_START_ATTEMPTS = 3
_POLL_SECONDS = 0.05
_STATE_FILE = "node.json"


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a running node leaves in its data folder.

    Attributes:
        pid: the JVM's process id.
        token: tells this process from a later one with the same id.
        bootstrap: address for clients.
        version: Kafka's version.
        ephemeral: the folder is to be deleted when the node stops.
        certificate: PEM file that clients of a secured node trust; None for a plain node.
    """

    pid: int
    token: str
    bootstrap: str
    version: str
    ephemeral: bool
    certificate: str | None

    def alive(self) -> bool:
        """Whether the process is still there."""
        return process_token(self.pid) == self.token


def read_state(data_dir: Path) -> NodeState | None:
    """The state of the node whose data lies in `data_dir`; None where none runs."""
    try:
        state = NodeState(**json.loads((data_dir / _STATE_FILE).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise BrokerStateError(f"{data_dir / _STATE_FILE} is not a node's state ({error}); delete it") from error
    return state if state.alive() else None


def stop_node(data_dir: Path, timeout_seconds: float = 30.0) -> NodeState:
    """Stop the node of a data folder, started by whichever process.

    Returns:
        What the state was.

    Raises:
        BrokerStateError: no node runs there.
    """
    state = read_state(data_dir)
    if state is None:
        raise BrokerStateError(f"no broker is running with data in {data_dir}; see `kvatlas broker status --data-dir`")
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_seconds
    while state.alive():
        if time.monotonic() > deadline:
            os.kill(state.pid, signal.SIGKILL)
            break
        time.sleep(_POLL_SECONDS)
    (data_dir / _STATE_FILE).unlink(missing_ok=True)
    if state.ephemeral:
        shutil.rmtree(data_dir, ignore_errors=True)
    return state


class KafkaNode:
    """One Kafka node on this machine.

    Not thread-safe; calls block (a start for about three seconds), so call them off an event loop that has other work.

    Args:
        data_dir: folder for data, configuration and logs; None for a fresh temporary one, deleted by `stop`.
        port: port for clients; 0 takes a free one, kept across restarts of this object.
        host: address to listen on and to tell clients.
        heap_mb: the JVM's heap in MiB.
        properties: Kafka properties that win over ours.
        security: TLS, SCRAM users and ACLs; None for a plain listener.
        start_timeout_seconds: how long a start may take.
        detached: the node outlives this process.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        heap_mb: int = 512,
        properties: Mapping[str, str] | None = None,
        security: Security | None = None,
        start_timeout_seconds: float = 180.0,
        detached: bool = False,
    ) -> None:
        self.ephemeral = data_dir is None
        self.data_dir = (data_dir or Path(tempfile.mkdtemp(prefix="kvatlas-kafka-"))).expanduser().resolve()
        self.host = host
        self._fixed_port = port
        self._ports: tuple[int, int, int] | None = None
        self._heap_mb = heap_mb
        self._properties = dict(properties or {})
        self._security = security
        self._timeout_seconds = start_timeout_seconds
        self._detached = detached
        self._home: KafkaHome | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: Reaper | None = None
        self._certificate: Path | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bootstrap(self) -> str:
        """Address for clients, `host:port`.

        Raises:
            BrokerStateError: the node was never started, so its port is not known.
        """
        if self._ports is None:
            raise BrokerStateError("the node has no address before its first start; call start()")
        return f"{self.host}:{self._ports[0]}"

    @property
    def certificate(self) -> Path | None:
        """PEM file that clients of a secured node trust; None for a plain node or before the first start."""
        return self._certificate

    @property
    def running(self) -> bool:
        """Whether the process is there (a paused one counts)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the running node.

        Raises:
            BrokerStateError: it does not run.
        """
        return self._live_process().pid

    @property
    def log_path(self) -> Path:
        """The broker's log file."""
        return self.data_dir / "logs" / "kafka.log"

    def start(self) -> None:
        """Start the node and wait until it takes clients.

        Raises:
            BrokerSetupError: Java, Maven or the jars are missing.
            BrokerStartError: it ended or was not ready in time; the message holds the end of its log.
            BrokerStateError: a node runs in this data folder already.
        """
        if self.running or read_state(self.data_dir) is not None:
            raise BrokerStateError(f"a broker runs already with data in {self.data_dir}; stop it first")
        home = self._home = self._home or find_kafka()
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BrokerSetupError(f"--data-dir {self.data_dir} cannot be used: {error.strerror}") from error
        for attempt in range(1, _START_ATTEMPTS + 1):
            self._ports = self._ports or self._choose_ports()
            config = self._write_config(home)
            self._format_storage(home, config)
            try:
                self._launch(home, config)
            except BrokerStartError as error:
                # A free port is free until somebody else takes it; a port that was asked for is no choice of ours.
                if _PORT_TAKEN not in str(error) or attempt == _START_ATTEMPTS or self._fixed_port:
                    raise
                self._ports = None
            else:
                return

    def stop(self, timeout_seconds: float = 30.0) -> None:
        """Stop the node cleanly; without a running node only an ephemeral folder is removed.

        After `timeout_seconds` it is killed; its data survives that too.
        """
        if self._process is not None and self.running:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._ended()
        if self.ephemeral:
            shutil.rmtree(self.data_dir, ignore_errors=True)

    def kill(self) -> None:
        """End the node with SIGKILL, as a crash would; data and ports stay for the next `start`.

        Raises:
            BrokerStateError: it does not run.
        """
        self._live_process().kill()
        self._ended()

    def restart(self) -> None:
        """Stop cleanly and start again, with the same ports and data."""
        ephemeral, self.ephemeral = self.ephemeral, False
        try:
            self.stop()
        finally:
            self.ephemeral = ephemeral
        self.start()

    def pause(self) -> None:
        """Stop the process from running (SIGSTOP): a broker that is there and answers nothing once this returns."""
        process = self._live_process()
        process.send_signal(signal.SIGSTOP)
        # Each thread stops when it next comes to run; the system tells when the last of them has.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Undo `pause`."""
        self._live_process().send_signal(signal.SIGCONT)

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """Wait for the process to end; its exit code, or None when the time is up."""
        try:
            return self._live_process().wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None

    def log_tail(self, lines: int = 30) -> str:
        """The end of the broker's log and of what the JVM printed."""
        parts = [tail(self.log_path, lines), tail(self.log_path.with_name("kafka.out"), lines)]
        return "\n".join(part for part in parts if part)

    def _live_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            raise BrokerStateError(f"the broker with data in {self.data_dir} is not running; start() it first")
        return self._process

    def _choose_ports(self) -> tuple[int, int, int]:
        client, controller, internal = free_ports(3, self.host)
        return self._fixed_port or client, controller, internal

    def _write_config(self, home: KafkaHome) -> Path:
        assert self._ports is not None
        client, controller, internal = self._ports
        store: KeyStore | None = None
        if self._security is not None:
            hosts = tuple(dict.fromkeys((self.host, "127.0.0.1", "localhost")))
            store = ensure_keystore(home.java, self.data_dir / "tls", hosts)
            self._certificate = store.certificate
        properties = node_properties(
            data_dir=self.data_dir,
            host=self.host,
            client_port=client,
            controller_port=controller,
            internal_port=internal if self._security else None,
            security=security_properties(self._security, store) if self._security and store else None,
            extra=self._properties,
        )
        path = self.data_dir / "server.properties"
        path.touch(mode=0o600)
        path.write_text(render(properties))
        return path

    def _format_storage(self, home: KafkaHome, config: Path) -> None:
        if (self.data_dir / "data" / "meta.properties").exists():
            return
        command = [
            *home.command("kafka.tools.StorageTool", *self._jvm_options(128, "format.log"), "-XX:TieredStopAtLevel=1"),
            "format",
            "--cluster-id",
            new_cluster_id(),
            "--config",
            str(config),
            *(self._security.format_arguments() if self._security else []),
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if run.returncode != 0:
            end = "\n".join((run.stdout + run.stderr).strip().splitlines()[-15:])
            raise BrokerStartError(f"Kafka could not format its storage in {self.data_dir}:\n{end}")

    def _jvm_options(self, heap_mb: int, log_name: str) -> list[str]:
        log = self.log_path.with_name(log_name)
        # One small node: the serial collector starts faster and takes less beside the heap than G1.
        return [f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", f"-Dkvatlas.log={log}", "-Djava.awt.headless=true"]

    def _launch(self, home: KafkaHome, config: Path) -> None:
        output = self.log_path.with_name("kafka.out")
        start_of_log = self.log_path.stat().st_size if self.log_path.exists() else 0
        command = [*home.command("kafka.Kafka", *self._jvm_options(self._heap_mb, "kafka.log")), str(config)]
        with output.open("wb") as stream:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal goes to the whole group; the order of stopping is ours to choose.
                start_new_session=True,
                cwd=self.data_dir,
            )
        if not self._detached:
            self._reaper = Reaper(self._process.pid)
        ready = self._wait_until(lambda: _READY_LINE in read_from(self.log_path, start_of_log))
        if not ready:
            code = self._process.poll()
            why = f"ended with code {code}" if code is not None else f"was not ready in {self._timeout_seconds:g} s"
            if code is None:
                self._process.kill()
            self._ended()
            said = read_from(self.log_path, start_of_log) + read_from(output, 0)
            raise BrokerStartError(f"Kafka {home.version} {why}; its log ({self.log_path}) says:\n{trouble(said, 40)}")
        self._write_state(home)

    def _wait_until(self, ready: Callable[[], bool]) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + self._timeout_seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if ready():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _write_state(self, home: KafkaHome) -> None:
        token = process_token(self.pid)
        if token is None:
            raise BrokerStartError(f"Kafka ended right after its start; its log ends:\n{self.log_tail()}")
        state = NodeState(
            pid=self.pid,
            token=token,
            bootstrap=self.bootstrap,
            version=home.version,
            ephemeral=self.ephemeral,
            certificate=str(self._certificate) if self._certificate else None,
        )
        path = self.data_dir / _STATE_FILE
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(asdict(state)))
        part.replace(path)

    def _ended(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None
            (self.data_dir / _STATE_FILE).unlink(missing_ok=True)
        if self._reaper is not None:
            self._reaper.stand_down()
            self._reaper = None
