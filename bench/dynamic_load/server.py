"""The real server in a process of its own, on the loopback alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from ..harness import machine

HOST, START_SECONDS = "127.0.0.1", 300.0
KINDS = ("fastapi", "ray")


class Server:
    """One that answers at ``url``."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.process = process

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + "/health", timeout=10) as reply:
            return json.loads(reply.read())

    def memory(self) -> int:
        """Bytes resident, of the process and of what it started."""
        found = psutil.Process(self.process.pid)
        family = [found, *found.children(recursive=True)]
        total = 0
        for one in family:
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total


@contextmanager
def running(kind: str, settings: Mapping[str, Any], log: Path) -> Iterator[Server]:
    """Started with ``SERVE_...`` from ``settings``, healthy; stopped at the end.

    Raises:
        RuntimeError: it does not become healthy; the message has the end of its log.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    given = {f"SERVE_{name.upper()}": str(value) for name, value in settings.items()}
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(kind, port, log.parent), cwd=machine.ROOT, env=machine.environment(**given),
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    server = Server(f"http://{HOST}:{port}", process)
    try:
        _wait(server, log)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _command(kind: str, port: int, folder: Path) -> list[str]:
    if kind == "fastapi":
        return [sys.executable, "-m", "examples.serve.app", "--host", HOST, "--port", str(port)]
    # One replica: what is measured is one machine.
    config = yaml.safe_load((machine.ROOT / "examples/serve/config.yaml").read_text())
    config["http_options"] = {"host": HOST, "port": port}
    for deployment in config["applications"][0]["deployments"]:
        deployment.pop("autoscaling_config", None)
        deployment["num_replicas"] = 1
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return [str(Path(sys.executable).with_name("serve")), "run", str(path)]


def _wait(server: Server, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            if server.health()["status"] == "ok":
                return
        except OSError:
            time.sleep(0.2)
    lines = log.read_text(errors="replace").splitlines()[-5:]
    raise RuntimeError("the server did not start: " + " | ".join(lines))
