"""One distribution, two packages: fftriton (methods and wrapper) and fftriton_kernels (the kernel library)."""

import os
import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REPOSITORY = os.environ.get("FFTRITON_REPOSITORY", "").rstrip("/")  # a publisher's: https://..., where links lead
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "fftriton" / "__init__.py").read_text())[1]

_CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]+`|(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.DOTALL)


def for_an_index(text):
    """A page of the repository for a package index, where relative links lead nowhere.

    They become addresses in REPOSITORY, at the tag of this version. Without one, their text stays and images go.
    """

    def moved(match):
        target = match["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        if not REPOSITORY:
            return "" if match["image"] else match["text"]
        kind = "raw" if match["image"] else "blob"
        return f"{match['image']}[{match['text']}]({REPOSITORY}/{kind}/v{VERSION}/{target})"

    return _CODE_OR_LINK.sub(moved, text)


EVAL = ["accelerate>=1.0", "scikit-learn>=1.2"]  # several processes; the handwritten digits of the needle task
LABELS = ["pyarrow>=14"]  # reads .parquet files
HF = ["accelerate>=1.0", "torchvision>=0.21"]  # device_map; Hugging Face's own processors
TEST = [
    *EVAL,
    *LABELS,
    "filelock",
    "hypothesis",
    "kernels>=0.12,<0.18",
    "peft>=0.14",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.5",
    "setuptools>=70.1",
]
LINT = ["mypy>=1.10", "pre-commit", "ruff>=0.6"]

setup(
    name="fftriton",
    version=VERSION,
    description="Removes redundant vision tokens inside video language models, with Triton kernels",
    long_description="\n".join(for_an_index((HERE / name).read_text()) for name in ("README.md", "CHANGELOG.md")),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="video language models, vision tokens, token reduction, token merging, token pruning, FrameFusion, FastV, "
    "KVTP, StreamingLLM, Triton, transformers",
    project_urls={"Source": REPOSITORY, "Changes": f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md"} if REPOSITORY else {},
    python_requires=">=3.10",
    packages=[
        "fftriton",
        "fftriton.app",
        "fftriton.app.report",
        "fftriton.evaluate",
        "fftriton.former",
        "fftriton.hf",
        "fftriton.labels",
        "fftriton.layouts",
        "fftriton.lmms",
        "fftriton.methods",
        "fftriton.needle",
        "fftriton.relevance",
        "fftriton.runtime",
        "fftriton.vllm",
        "fftriton_kernels",
    ],
    package_dir={"fftriton_kernels": "kernels/fftriton_kernels"},
    package_data={"fftriton": ["assets/**", "app/report/templates/*", "py.typed"], "fftriton_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "transformers>=4.57,<6",
        "numpy>=1.24",
        "av>=16",
        "jinja2>=3.1",
        "matplotlib>=3.7",
        "packaging>=22",
        "pillow>=10",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "typer>=0.12",
    ],
    extras_require={
        "flash-attn": ["flash-attn>=2.6"],
        "hf": HF,
        "eval": EVAL,
        "labels": LABELS,
        "siglip": ["protobuf", "sentencepiece"],  # the tokenizer of SigLIP checkpoints; SigLIP 2 needs neither
        "bench": ["flash-colreduce>=0.2.2", "scipy"],  # what the kernel bench compares with where it is installed
        "test": TEST,
        "dev": TEST + LINT,
    },
    entry_points={
        "console_scripts": ["fftriton = fftriton.app.cli:app"],
        "lmms_eval.models": ["fftriton = fftriton.lmms:manifest"],
        "vllm.general_plugins": ["fftriton = fftriton.vllm:register"],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
