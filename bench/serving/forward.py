"""The language model's forward inside vLLM, dense and reduced, and its blocks of the KV cache, on Big Buck Bunny.

OMP_NUM_THREADS=1 python -m bench.serving.forward
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.provenance import ROOT, provenance
from bench.serving.versions import installed_vllm
from bench.tables import write_csv
from fftriton.runtime.shipped import BUNNY, MODEL
from fftriton.runtime.video import Video, read_video
from fftriton.vllm.__main__ import make_overrides

FRAMES, BLOCK, LONGEST = 16, 32, 4096
PROMPT = "<bos><sys><sys><|vision_start|><|video_pad|><|vision_end|><q>what red box ?"
ARCHITECTURE = "Qwen2VLForConditionalGeneration"


@dataclass(frozen=True)
class Row:
    """One line of the CSV file. Times are the least of the repetitions."""

    method: str
    budget: float
    prompt_tokens: int
    blocks: int  # of the KV cache, of BLOCK tokens each
    forward_ms: float  # of the language model; without the vision tower and the reduction
    request_ms: float
    device: str
    vllm: str
    torch: str
    triton: str
    transformers: str
    commit: str
    date: str


def time_calls(module: torch.nn.Module, seconds: list[float]) -> None:
    """Note how long each forward of a module takes. vLLM's decoders call no hooks."""
    forward = module.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = forward(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return out

    module.forward = timed


def measure(overrides: dict[str, Any], video: Video, repeats: int) -> dict[str, Any]:
    """The measured columns: one request for one token, again and again, without a prefix cache."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(MODEL), dtype="float32", enforce_eager=True, max_model_len=LONGEST, max_num_batched_tokens=LONGEST,
        max_num_seqs=1, block_size=BLOCK, enable_prefix_caching=False, limit_mm_per_prompt={"image": 0, "video": 1},
        mm_processor_kwargs={"max_pixels": BUNNY.max_pixels}, hf_overrides=overrides,
    )  # fmt: skip
    seconds: list[float] = []
    llm.apply_model(lambda model: time_calls(model.language_model.model, seconds))
    metadata = {
        "total_num_frames": video.total_frames, "fps": video.fps, "frames_indices": list(video.indices),
        "duration": video.total_frames / video.fps, "do_sample_frames": False,
    }  # fmt: skip
    request = {"prompt": PROMPT, "multi_modal_data": {"video": (video.frames, metadata)}}
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        [out] = llm.generate([request], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
        times.append(time.perf_counter() - start)
    llm.llm_engine.engine_core.shutdown()
    tokens = len(out.prompt_token_ids)
    return {
        "prompt_tokens": tokens,
        "blocks": math.ceil((tokens + 1) / BLOCK),
        "forward_ms": 1e3 * min(seconds[-repeats:]),
        "request_ms": 1e3 * min(times[1:]),
    }


def main(
    method: Annotated[str, typer.Option(help="How to reduce.")] = "temporalmerge",
    budget: Annotated[float, typer.Option(help="Vision tokens to keep.")] = 0.3,
    repeats: Annotated[int, typer.Option(help="Requests that are timed.")] = 5,
    out: Annotated[Path, typer.Option(help="CSV file.")] = ROOT / "bench" / "results" / "serving-forward.csv",
) -> None:
    """Measure one request without and with a method, in this process."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",  # more tokens than positions: M-RoPE needs few
    )  # fmt: skip
    torch.set_num_threads(1)
    source = provenance("cpu", also=("transformers",)) | {"vllm": installed_vllm()}
    video, rows = read_video(BUNNY.path, FRAMES), []
    for name, share in (("keep-all", 1.0), (method, budget)):
        rows.append(Row(name, share, **measure(make_overrides(ARCHITECTURE, name, share), video, repeats), **source))
    write_csv(rows, out)
    for row in rows:
        print(f"{row.method}: {row.prompt_tokens} tokens, {row.blocks} blocks, forward {row.forward_ms:.0f} ms")
    print(f"forward {rows[0].forward_ms / rows[1].forward_ms:.2f} times faster")


if __name__ == "__main__":
    typer.run(main)
