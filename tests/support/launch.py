"""Starts a test file again in several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def launch(launcher, file, *arguments, seconds=180):
    """Run `file` under a launcher module, such as torch.distributed.run, and fail with its output where it fails.

    Args:
        launcher: the launcher's module and options.
        file: what to run, with `arguments`; it finds what the tests find.
        seconds: how long it may take.
    """
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", *launcher, str(file), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(command)}\nstill ran after {seconds} s:\n{output[-4000:]}", pytrace=False)
    if process.returncode:
        pytest.fail(f"{' '.join(command)}\nreturned {process.returncode}:\n{output[-4000:]}", pytrace=False)
