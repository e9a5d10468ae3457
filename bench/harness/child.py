"""A cell measured in a process of its own."""

import json
import subprocess
import sys

from . import machine
from .results import Row


def measured(benchmark: str, cell: Row, **env: str) -> Row:
    """What ``python -m bench.<benchmark> --cell <JSON>`` prints; a failed row where it does not.

    ``env``: more of its environment.
    """
    command = [sys.executable, "-m", f"bench.{benchmark}", "--cell", json.dumps(cell)]
    done = subprocess.run(command, env=machine.environment(**env), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"status": "failed", "reason": lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])
