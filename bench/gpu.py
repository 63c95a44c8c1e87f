"""First contact with a GPU: is every kernel right, how fast is it, and what does a prefill gain? In a few minutes.

    python -m bench.gpu                      # results go to bench/results/<device>
    python -m bench.gpu --out DIR --minutes 3 --parts kernels,prefill
    python -m bench.gpu --toy                # all of it on a CPU at tiny sizes, in Triton's interpreter

Needs a checkout, torch, triton and transformers; pytest, compute-sanitizer, flash-colreduce and a compiler if they are
there. Installs nothing and uses no network. Each part is a process with a time limit of its own, so that a part that
hangs or crashes loses its own results only. The exit status is 0 if every kernel was found right.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.first_contact import parts
from bench.first_contact.runner import Runner
from bench.first_contact.summary import correctness_holds, summarise

NAME = (
    "from bench.kernels.results import slug; from fftriton.runtime.provenance import device_name; "
    "print(slug(device_name('cuda')))"
)


def main() -> int:
    """Run what the command line asks for, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results (default: bench/results/<device>)")
    parser.add_argument("--minutes", type=float, default=7.0, help="time for everything; the limits scale with it")
    parser.add_argument("--parts", default="", help="run only these, separated by commas: " + ", ".join(parts.NAMES))
    parser.add_argument("--toy", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    parser.add_argument("--commit", default="", help="what to call this commit if there is no git")
    options = parser.parse_args()
    wanted = [name for name in options.parts.split(",") if name] or parts.NAMES
    if unknown := sorted(set(wanted) - set(parts.NAMES)):
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(parts.NAMES)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the parts, too
    out = (options.out or default_out(options.toy)).resolve()
    runner = Runner(out, options.minutes)
    phases = parts.toy_phases(out) if options.toy else parts.gpu_phases(out, options.minutes, options.commit)
    try:
        for phase in phases:
            runner.run([part for part in phase if part.group in wanted])
            summarise(out)  # so that there is one if this process is killed
    finally:
        print(summarise(out), flush=True)
    return 0 if correctness_holds(out) else 1


def default_out(toy: bool) -> Path:
    """A folder named after the device; a temporary one for what is no measurement."""
    if toy:
        return Path(tempfile.mkdtemp(prefix="fftriton-toy-"))
    environment = parts.environment()
    done = subprocess.run([sys.executable, "-c", NAME], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"no GPU can be used; --toy runs on a CPU\n{done.stderr.strip().splitlines()[-1]}")
    return parts.BENCH / "results" / done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
