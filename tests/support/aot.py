"""Compiles every kernel of the library ahead of time, without a GPU, exactly as its launcher would.

    PYTHONPATH=kernels python tests/support/aot.py cuda:80 cuda:90 hip:gfx942

Runs each op on CPU tensors with the launches intercepted: the arguments, constants and options of a launch make up its
signature, and `triton.compile` takes that for each target. Prints the names of all kernels, then one line for each
compiled launch, as JSON. TRITON_INTERPRET must not be set.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fftriton_kernels as ops
from fftriton_kernels import _dispatch, _tiles

POINTERS = {
    torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
    torch.int64: "*i64", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    tl.uint8: "*u8", tl.int16: "*i16", tl.int32: "*i32", tl.int64: "*i64",
}  # fmt: skip
EVERY_VARIANT = ("cuda:80", "hip:gfx942")  # the others get what their tiles decide about: a compilation takes a while
WRITTEN = 64  # what every kernel is taken to have written, so that sizes read back from the device are plausible
DISASSEMBLED = 90  # the compute capability whose instructions are counted
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MATRIX = r"\b(wgmma|tcgen05\.mma|mma\.sync|v_mfma|v_wmma)"
WIDE_LOAD = r"ld\.global[\w.:]*\.v(?:4\.\w32|2\.\w64)|cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], (?:0x10|16)\b"
NARROW_LOAD = r"ld\.global(?:\.(?!v\d)[\w:]+)*\.\w16\b"
FLOAT_ATOMIC = (  # on NVIDIA and AMD; compare-and-swap, too, by which those are emulated that a GPU lacks
    r"\b(?:atom|red)\.[\w.:]*\.(?:b?f(?:16|32|64)(?:x2)?|cas)\b"
    r"|\b\w+_atomic_(?:pk_)?\w+_b?f(?:16|32|64)\b|\bds_(?:pk_)?\w+_b?f(?:16|32|64)\b|\b\w+_(?:atomic_cmpswap|cmpst)\w*"
)


def call_every_op():
    """Each op in the ways that lead to different tiles, at the sizes of Qwen2 0.5B and 7B."""
    N = 1001
    similarity = torch.zeros(1, N)
    links = torch.zeros(1, N, dtype=torch.int64)
    cos = torch.zeros(3, 1, N, 128, dtype=torch.bfloat16).permute(1, 2, 0, 3)
    for width in (896, 3584):
        x = torch.zeros(1, N, width, dtype=torch.bfloat16)
        ops.strided_cosine_similarity(x, 210)
        ops.linked_cosine_similarity(x, links)
        ops.merge_mean(x, links, (cos[:, :, 0], links), links)
        ops.gather_rows(links, x, cos, links)
    ops.merge_roots(similarity, links, 0.6)
    ops.merge_roots(similarity, links, 0.6, 300)
    ops.connected_components(torch.zeros(1001, 2, dtype=torch.int64), 1001)
    ops.topk_keep(similarity, 300)
    ops.segmented_topk_keep(similarity, torch.zeros_like(links), torch.ones(16, dtype=torch.int64))
    small, large, wide = heads_of(14, 2, 64), heads_of(28, 4, 128), heads_of(4, 2, 256)
    for q, k in (small, large):
        ops.attention_column_sum(q, k, lse=torch.zeros(q.shape[:3]), num_queries=1)
    for q, k in (small, large, wide, [part.float() for part in large]):
        ops.attention_column_sum(q, k)
        ops.attention_column_sum(q, k, num_queries=4)


def call_every_variant():
    """Each op in the ways that lead to other launches with the same tiles."""
    N = 1001
    similarity, x = torch.zeros(1, N), torch.zeros(1, N, 3584, dtype=torch.bfloat16)
    links, bounds = torch.zeros(1, N, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    ops.merge_mean(x, links, (), 210)
    ops.gather_rows(links, *(torch.zeros(1, N, width, dtype=torch.int64) for width in (1, 2, 4, 8, 16)))
    ops.merge_roots(similarity, 210, 0.6)
    ops.merge_roots(similarity, 210, 0.6, 300)
    ops.merge_roots(similarity, 210, 0.6, bounds)
    ops.topk_keep(similarity.bfloat16(), bounds, links > 0)
    spans = torch.tensor([0, 400, N])
    ops.merge_mean(x, links, (), links, capacity=N)
    ops.merge_roots(similarity[0], 210, 0.6, 300, cu_seqlens=spans, max_seqlen=601)
    ops.merge_roots(similarity[0], links[0], 0.6, spans[1:], cu_seqlens=spans.int(), max_seqlen=601)
    ops.topk_keep(similarity[0], 300, cu_seqlens=spans, max_seqlen=601)
    ops.topk_keep(similarity[0], spans[1:], links[0] > 0, cu_seqlens=spans.int(), max_seqlen=601, capacity=N)
    q, k = heads_of(28, 4, 128)
    ops.attention_column_sum(q, k, causal=False)
    packed = {"cu_seqlens_q": spans.int(), "cu_seqlens_k": spans.int(), "max_seqlen_q": 601, "max_seqlen_k": 601}
    q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
    ops.attention_column_sum(q, k, **packed)
    ops.attention_column_sum(q, k, num_queries=1, **packed)


def heads_of(heads, kv_heads, width):
    """q and k of a layer, as projections leave them."""
    q = torch.zeros(1, 1001, heads, width, dtype=torch.bfloat16).transpose(1, 2)
    k = torch.zeros(1, 1001, kv_heads, width, dtype=torch.bfloat16).transpose(1, 2)
    return q, k


def every_kernel():
    """The names of the package's launched kernels."""
    names = set()
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        names |= {n for n, value in vars(module).items() if isinstance(value, JITFunction) and n.endswith("_kernel")}
    return sorted(names)


def record(launches):
    """Instead of launching: note the kernel, its arguments and options; overwrite the arguments."""

    def run(kernel, *positional, grid, warmup=False, **keywords):
        named = dict(zip(kernel.arg_names, positional, strict=False)) | keywords
        arguments = {name: named[name] for name in kernel.arg_names}
        options = {name: value for name, value in keywords.items() if name not in arguments}
        types = {name: specialised(kernel, name, value) for name, value in arguments.items()}
        launches.setdefault(f"{kernel.__name__} {types} {options}", (kernel, types, options))
        for value in arguments.values():
            if isinstance(value, torch.Tensor) and 0 not in value.stride():
                value.fill_(WRITTEN)

    JITFunction.run = run


def specialised(kernel, name, value):
    """Triton's type of an argument, its value where that is compiled in, and whether it is a multiple of 16."""
    parameter = kernel.params[kernel.arg_names.index(name)]
    if parameter.is_constexpr or value is None:
        return "constexpr", value, False
    if hasattr(value, "data_ptr"):
        aligned = value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment
        return POINTERS[value.dtype], None, aligned
    if isinstance(value, float):
        return "fp32", None, False
    if parameter.do_not_specialize:
        return "i32" if abs(value) < 2**31 else "i64", None, False
    return ("constexpr", 1, False) if value == 1 else ("i32" if abs(value) < 2**31 else "i64", None, value % 16 == 0)


def source(kernel, types):
    """What Triton compiles for one launch."""
    constants = {name: value for name, (kind, value, _) in types.items() if kind == "constexpr"}
    divisible = [index for index, (_, _, multiple) in enumerate(types.values()) if multiple]
    if hasattr(triton.backends.compiler, "AttrsDescriptor"):  # Triton 3.2
        ones = [i for i, (name, t) in enumerate(types.items()) if t[1] == 1 and not kernel.params[i].is_constexpr]
        hints = {"tt.divisibility": divisible, "tt.equal_to": ones}
        hints = triton.backends.compiler.AttrsDescriptor.from_dict({"cls": "AttrsDescriptor", "arg_properties": hints})
        given = [name for i, name in enumerate(types) if not kernel.params[i].is_constexpr]
        signature = {n: {1: "i32", None: "*i8"}[types[n][1]] if n in constants else types[n][0] for n in given}
        return ASTSource(kernel, signature, constants, hints)
    signature = {name: kind for name, (kind, _, _) in types.items()}
    return ASTSource(kernel, signature, constants, {(index,): [["tt.divisibility", 16]] for index in divisible})


def compiled(kernel, types, options, target):
    """Compile one launch; what there is to assert about it."""
    code = triton.compile(source(kernel, types), target=target, options=options)
    text = code.asm.get("ptx") or code.asm["amdgcn"]
    row = {
        "kernel": kernel.__name__,
        "target": f"{target.backend}:{target.arch}",
        "pointers": [kind for kind, _, _ in types.values() if kind[0] == "*"],
        "constants": {name: str(value) for name, (kind, value, _) in types.items() if kind == "constexpr"},
        "shared": code.metadata.shared,
        "matrix": sorted(set(re.findall(MATRIX, text))),
        "wide_loads": len(re.findall(WIDE_LOAD, text)),
        "narrow_loads": len(re.findall(NARROW_LOAD, text)),
        "float_atomics": re.findall(FLOAT_ATOMIC, text),
    }
    if "amdgcn" in code.asm:
        spilled = re.findall(r"vgpr_spill_count:\s*(\d+)", text)
        return row | {"spilled": sum(map(int, spilled))}
    if not CUOBJDUMP.exists():
        return row
    cubin = code.asm["cubin"]
    warps = {"warps": code.metadata.num_warps}
    return row | warps | resources(cubin) | (instructions(cubin) if target.arch == DISASSEMBLED else {})


def resources(cubin):
    """Registers and spilled bytes of a thread, as the assembler reports them."""
    text = dump(cubin, "--dump-resource-usage")
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups())
    return {"registers": registers, "spilled": stack + local}


def instructions(cubin):
    """How many instructions each loop of a kernel has, by their place in it, and how many barriers the whole."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z]\S*)([^;]*);", dump(cubin, "-sass"))
    places = [int(place, 16) for place, *_ in lines]
    loops = []
    for place, (_, name, operands) in zip(places, lines, strict=True):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        begin = place if target is None else int(target[1], 16)
        if begin < place:
            loops.append(sum(begin <= other <= place for other in places))
    return {"loops": loops, "barriers": sum(name.startswith("BAR.SYNC") for _, name, _ in lines)}


def dump(cubin, what):
    """What cuobjdump says about a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def gpu_target(name):
    """A target from its name, `cuda:80` or `hip:gfx942`."""
    backend, arch = name.split(":")
    return GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)


def launches_for(name):
    """What every op launches with the tiles of a target, recorded anew: kernel, types and options of each."""
    backend, arch = name.split(":")
    family = f"sm{arch}" if backend == "cuda" else arch
    _tiles._device = lambda device: ("", family)
    _tiles._settled.cache_clear()
    launches = {}
    record(launches)
    call_every_op()
    if name in EVERY_VARIANT:
        call_every_variant()
    return launches.values()


def main(targets):
    """Record, then compile."""
    print(json.dumps(every_kernel()))
    _dispatch.INTERPRET = True  # CPU tensors take the launchers' path, to the recorder instead of the interpreter
    for target in targets:
        for kernel, types, options in launches_for(target):
            print(json.dumps(compiled(kernel, types, options, gpu_target(target))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
