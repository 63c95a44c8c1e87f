"""Fail unless the tag of a release, such as v1.2.3, and all files agree on its version; print its changes."""

import re
import sys
from pathlib import Path

VERSIONS = {
    "fftriton/__init__.py": r'^__version__ = "(.+)"$',
    "kernels/fftriton_kernels/__init__.py": r'^__version__ = "(.+)"$',
    "CITATION.cff": r"^version: (.+)$",
}


def main(tag: str, root: Path) -> None:
    version = tag.removeprefix("v")
    for name, pattern in VERSIONS.items():
        found = re.findall(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        if found != [version]:
            sys.exit(f"{name} must have the version of the tag {tag}, got {', '.join(found) or 'none'}")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(rf"^## \[?{re.escape(version)}\b.*?\n(.*?)(?=^## |\Z)", changes, re.MULTILINE | re.DOTALL)
    if section is None:
        sys.exit(f"CHANGELOG.md must have a section for the tag {tag}, such as '## {version} - 2030-01-31'")
    print(section[1].strip())


if __name__ == "__main__":
    main(sys.argv[1], Path(__file__).parents[1])
