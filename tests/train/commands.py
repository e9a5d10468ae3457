"""The command line of training in processes of its own, and in this one."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["--bottleneck", "4", "--per_device_train_batch_size", "8", "--use_cpu"]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PRETRAIN = ["--max-length", "24", *SMALL, "--ratios", "2", "4"]


def command(folder, output, step="pretrain", data="text.txt", *more):
    extra = PRETRAIN if step == "pretrain" else [*SMALL, "--labels", "bad,good"]
    given = ["--model", "model", "--data", data, "--output", str(output)]
    given = [str(folder / word) if (folder / word).exists() else word for word in given]
    return [step, *given, *extra, *more]


def start(arguments, *launcher, module="variator_kernels.train"):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", module, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(run):
    """Its output; it must end well, and nothing of it may stay behind if it does not."""
    try:
        text = run.communicate(timeout=240)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, text
    return text
