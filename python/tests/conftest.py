"""A real node for the tests: the binary named by KVAR_BIN, on a file of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kvar

if TYPE_CHECKING:
    from rig import Rig

START_S_MAX = 30
STOP_S_MAX = 60
# What all tests put into the node they share stays there; one test needs less.
SHARED_STORE_SIZE = "1GiB"
OWN_STORE_SIZE = "256MiB"


class Node:
    """A node process that a test may stop, kill and start again."""

    def __init__(self, binary: str, folder: Path, size: str, *flags: str) -> None:
        self._binary = binary
        self._flags = flags
        self._folder = folder
        self._size = size
        self._process: subprocess.Popen[bytes] | None = None
        self.data = folder / "store.kvar"
        self.key_file = folder / "store.kvar.key"
        self.endpoint = "127.0.0.1:0"
        self.admin = ""

    def start(self) -> None:
        ready = self._folder / "ready.json"
        ready.unlink(missing_ok=True)
        command = [self._binary, "serve", "--data", str(self.data), "--size", self._size]
        command += ["--dram", "64MiB", "--shards", "1", "--listen", self.endpoint]
        command += ["--admin", "127.0.0.1:0", "--ready-file", str(ready), *self._flags]
        with (self._folder / "node.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S_MAX
        while not ready.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                pytest.fail("the node did not start:\n" + (self._folder / "node.log").read_text())
            time.sleep(0.01)
        said = json.loads(ready.read_text())
        self.endpoint, self.admin = said["listen"], said["admin"]

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def end(self) -> None:
        """Kills it and gives its file back, so that a whole run needs room for few."""
        self.kill()
        self.data.unlink(missing_ok=True)

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(timeout=STOP_S_MAX) == 0
        self._process = None

    def switch(self, *words: str) -> None:
        """``kvar mode`` with these words."""
        command = [self._binary, "mode", *words, "--admin", self.admin]
        subprocess.run([*command, "--key-file", str(self.key_file)], check=True, timeout=60)

    def pause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # The signal is sent, not yet obeyed: a thread on another core may still answer.
        threads = list(Path(f"/proc/{self._process.pid}/task").iterdir())
        until(lambda: all(state_of(thread) == "T" for thread in threads))

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def client(self, **settings: object) -> kvar.Client:
        arguments = {"key_file": self.key_file, "deadline_ms": 10_000} | settings
        return kvar.Client(self.endpoint, **arguments)  # type: ignore[arg-type]

    @property
    def key(self) -> kvar.NamespaceKey:
        return kvar.NamespaceKey.from_file(self.key_file)


def node_in(folder: Path, size: str, *flags: str) -> Node:
    binary = os.environ.get("KVAR_BIN")
    if not binary:
        pytest.skip("KVAR_BIN names no kvar binary; python/check.sh sets it")
    return Node(binary, folder, size, *flags)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that all tests share; it is neither stopped nor killed by them."""
    node = node_in(tmp_path_factory.mktemp("node"), SHARED_STORE_SIZE)
    try:
        node.start()
        yield node
    finally:
        node.end()


@pytest.fixture
def own_node(tmp_path: Path) -> Iterator[Node]:
    """A node for one test, which may treat it badly."""
    node = node_in(tmp_path, OWN_STORE_SIZE)
    try:
        node.start()
        yield node
    finally:
        node.end()


@pytest.fixture
def client(node: Node) -> Iterator[kvar.Client]:
    with node.client() as client:
        yield client


@pytest.fixture
def name(node: Node, request: pytest.FixtureRequest) -> Callable[[object], bytes]:
    """Makes block ids that no other test uses."""
    return lambda part: kvar.id_from_name(node.key, f"{request.node.nodeid} {part}")


def state_of(thread: Path) -> str:
    """The state letter of a thread under /proc."""
    return (thread / "stat").read_text().rsplit(")", 1)[1].split()[0]


def until(what: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for something that happens in the background."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    """Builds rigs, and closes them. Needs vLLM."""
    from rig import Rig

    built: list[Rig] = []

    def build(*arguments: Any, **more: Any) -> Rig:
        built.append(Rig(*arguments, **more))
        return built[-1]

    yield build
    for one in built:
        one.close()
