"""Tests inside vLLM, which `make vllm` installs in an environment of its own; without it they are skipped."""

import importlib.util
import os

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
    VLLM_LOGGING_LEVEL="ERROR",
)  # fmt: skip
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
