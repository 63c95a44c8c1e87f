"""Makes a folder that Hugging Face's `kernels` loads as a Hub kernel: what kernel-builder makes of build.toml.

    python kernels/hub_folder.py FOLDER
    python -c "from pathlib import Path; import kernels; ops = kernels.get_local_kernel(Path('FOLDER'))"

A kernel without compiled code is a copy of the package for each backend, with a metadata.json.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE / "fftriton_kernels"


def make(folder: Path) -> None:
    """Write the variants for a CPU, CUDA and ROCm below `folder`. What stood there from an earlier time is replaced."""
    build = (HERE / "build.toml").read_text()
    name, license_ = (re.search(rf'^{key} = "(.+)"', build, re.MULTILINE)[1] for key in ("name", "license"))
    version = int(re.search(r"^version = (\d+)", build, re.MULTILINE)[1])
    for backend in re.findall(r'"(\w+)"', re.search(r"^backends = (.+)", build, re.MULTILINE)[1]):
        variant = folder / "build" / f"torch-{backend}"
        shutil.rmtree(variant, ignore_errors=True)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, variant, ignore=ignored)
        metadata = {"name": name, "id": f"_{PACKAGE.name}_{backend}", "version": version, "license": license_}
        metadata |= {"python-depends": [], "backend": {"type": backend}}
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2))
        shutil.copytree(PACKAGE, variant / PACKAGE.name, ignore=ignored)  # where older releases of the loader look


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to, made if it is not there")
    make(parser.parse_args().folder)
