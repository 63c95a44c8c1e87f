"""Every kernel compiles for the GPUs that the library is made for: what the interpreter cannot see.

`aot.py` does the compiling, in a process of its own, because TRITON_INTERPRET is set in this one.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import triton
from filelock import FileLock

AOT = Path(__file__).parents[1] / "support" / "aot.py"
TARGETS = {  # KiB of shared memory that a block can have
    "cuda:80": 163, "hip:gfx942": 64, "cuda:86": 99, "cuda:89": 99, "cuda:90": 227, "cuda:100": 227, "cuda:120": 99,
}  # fmt: skip
AT_NIGHT = ("cuda:86", "cuda:89", "cuda:120")  # whose instructions are nearly those of 80
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
if VERSION < (3, 3):  # knows no Blackwell, and brings no linker for AMD
    TARGETS = {name: TARGETS[name] for name in ("cuda:80", "cuda:86", "cuda:89", "cuda:90")}
ROW_KERNELS = {  # they move whole rows of hidden states or heads
    "_strided_cosine_kernel", "_linked_cosine_kernel", "_mean_kernel", "_gather_kernel",
    "_row_norm_kernel", "_column_sum_kernel", "_score_kernel",
}  # fmt: skip
DOT_KERNELS = {"_row_norm_kernel", "_column_sum_kernel", "_score_kernel"}
HALF = {"*bf16", "*fp16", "*i16"}  # i16: any two bytes, as the gather sees them


@pytest.fixture(autouse=True)
def interpreter():
    """Nothing runs in this process."""


@pytest.fixture(scope="module")
def output(tmp_path_factory, request):
    """What aot.py prints: the names of all kernels, then a row for each compiled launch and target."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # that of all workers
    with FileLock(folder / "aot.lock"):  # the first worker compiles, the others wait
        file = folder / "aot.json"
        if not file.exists():
            ours = [item for item in request.session.items if item.module is request.module]
            wanted = {item.callspec.params["rows"] for item in ours if "rows" in item.fixturenames}
            targets = [name for name in TARGETS if name in wanted | {"cuda:90"}]  # which the fixture hopper asks for
            file.write_text(json.dumps(compile_for(targets, tmp_path_factory.mktemp("triton"))))
        return json.loads(file.read_text())


def compile_for(targets, cache):
    """The lines of aot.py, from a process for each core."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["CUDA_VISIBLE_DEVICES"] = environment["HIP_VISIBLE_DEVICES"] = ""
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(AOT)]
    jobs = min(os.cpu_count() or 1, len(targets))  # a process each, for some of the targets
    parts = [targets[job::jobs] for job in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        run = partial(subprocess.run, env=environment, capture_output=True, text=True)
        done = list(pool.map(run, [command + part for part in parts]))
    for job in done:
        assert job.returncode == 0, job.stderr[-3000:]
    lines = [[json.loads(line) for line in job.stdout.splitlines()] for job in done]
    return [lines[0][0], *(row for part in lines for row in part[1:])]


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.night] * (name in AT_NIGHT)) for name in TARGETS])
def rows(request, output):
    """The launches compiled for one target."""
    return [row for row in output[1:] if row["target"] == request.param]


def described(rows):
    return "\n".join(map(str, rows))


def test_no_kernel_is_left_out(output, rows):
    assert {row["kernel"] for row in rows} == set(output[0])
    assert set(output[0]) >= ROW_KERNELS


def test_shared_memory_fits(rows):
    too_large = [row for row in rows if row["shared"] > TARGETS[row["target"]] * 1024]
    assert not too_large, described(too_large)


def test_no_spills(rows):
    if "spilled" not in rows[0]:
        pytest.skip("no cuobjdump")
    allowed = 0 if VERSION >= (3, 9) else 160  # older ones hold more of an fp32 tile in registers
    spilling = [row for row in rows if row["spilled"] > allowed]
    assert not spilling, described(spilling)


def test_half_precision_runs_on_matrix_units(rows):
    dots = [row for row in rows if row["kernel"] in DOT_KERNELS and row["pointers"][0] in HALF]
    assert {row["kernel"] for row in dots} == DOT_KERNELS
    assert all(row["matrix"] for row in dots), described(row for row in dots if not row["matrix"])
    if rows[0]["target"] == "cuda:90":
        assert all("wgmma" in row["matrix"] for row in dots if row["kernel"] == "_row_norm_kernel"), described(dots)


def test_rows_are_loaded_16_bytes_at_a_time(rows):
    if not rows[0]["target"].startswith("cuda"):
        pytest.skip("reads PTX")
    moving = [row for row in rows if row["kernel"] in ROW_KERNELS and HALF & set(row["pointers"])]
    assert {row["kernel"] for row in moving} == ROW_KERNELS
    eight = {"_gather_kernel"}  # takes rows of any kind at once, eight bytes at a time
    narrow = [row for row in moving if row["narrow_loads"] or not (row["wide_loads"] or row["kernel"] in eight)]
    assert not narrow, described(narrow)


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("red.global.gpu.relaxed.add.f32 [%rd1], %f1;", True),
        ("atom.global.gpu.acq_rel.add.noftz.bf16x2 %r1, [%rd1], %r2;", True),
        ("atom.global.acq_rel.gpu.cas.b16 %rs1, [%rd1], %rs2, %rs3;", True),
        ("global_atomic_add_f32 v0, v1, s[2:3]", True),
        ("global_atomic_pk_add_bf16 v0, v1, s[2:3]", True),
        ("ds_add_rtn_f32 v0, v1, v2", True),
        ("global_atomic_cmpswap v2, v0, v[2:3], s[2:3] sc0", True),
        ("atom.global.gpu.relaxed.add.u32 %r1, [%rd1], %r2;", False),
        ("atom.global.gpu.relaxed.min.s64 %rd1, [%rd2], %rd3;", False),
        ("global_atomic_add v1, v0, v2, s[2:3] sc0", False),
        ("global_atomic_smin_x2 v[0:1], v0, v[2:3], s[2:3] sc0", False),
        ("ds_read_b128 v[0:3], v4", False),
        ("v_add_f32 v0, v1, v2", False),
    ],
)
def test_what_counts_as_a_float_atomic(instruction, found):
    pattern = runpy.run_path(str(AOT))["FLOAT_ATOMIC"]
    assert bool(re.search(pattern, instruction)) == found


@pytest.fixture
def hopper(output):
    """The launches compiled for an H100, disassembled."""
    rows = [row for row in output[1:] if row["target"] == "cuda:90"]
    if "loops" not in rows[0]:
        pytest.skip("no cuobjdump")
    return rows


@pytest.mark.parametrize(("kernel", "most"), [("_row_norm_kernel", 417), ("_column_sum_kernel", 729)])
def test_column_sum_is_not_bound_by_instruction_issue(hopper, kernel, most):
    """Instructions of a thread for 128 x 64 scores, which cost the matrix units 512 cycles; four warps issue one each
    in a cycle. Three programs an SM hide what the others wait for."""
    if VERSION < (3, 6):
        pytest.skip("older compilers need more instructions")
    found = [row for row in hopper if row["kernel"] == kernel and row["constants"].get("D") == "128"]
    found = [row for row in found if {row["constants"]["BLOCK_M"], row["constants"]["BLOCK_N"]} == {"128", "64"}]
    assert found
    for row in found:
        unmasked = min(row["loops"])
        assert unmasked * row["warps"] / 4 <= most, described([row])
        threads = 32 * row["warps"]
        assert 65536 // (-(-row["registers"] // 8) * 8 * threads) >= 3, described([row])
        assert 227 * 1024 // (row["shared"] + 1024) >= 3, described([row])


@pytest.mark.parametrize("kernel", ["_strided_cosine_kernel", "_linked_cosine_kernel"])
def test_cosine_waits_for_its_threads_at_most_six_times(hopper, kernel):
    found = [row for row in hopper if row["kernel"] == kernel]
    assert found
    assert max(row["barriers"] for row in found) <= 6, described(found)


def test_no_float_atomics(rows):
    atomic = [row for row in rows if row["float_atomics"]]
    assert not atomic, described(atomic)  # sums would depend on the order of programs
