"""The compiled code of csrc/cpu: its symbols, its instructions, and equal bits on all instruction sets."""

import os
import re
import subprocess

import pytest

from ..building import ROOT, build, need, run
from .conftest import kernels_in

# libc only; libm is listed below
ALLOWED_IMPORTS = {"_GLOBAL_OFFSET_TABLE_", "memcpy", "memset", "memmove", "__stack_chk_fail"}
LIBM = {
    "exp",
    "expm1",
    "log",
    "log1p",
    "tanh",
    "atan",
    "sin",
    "cos",
    "sincos",
    "sqrt",
    "fma",
    "fmaf",
    "rint",
    "pow",
    "erf",
}
WIDTH = {"v3": 32, "v4": 64}
ISA_NAMES = {"v3": "x86-64-v3", "v4": "x86-64-v4"}


def symbols(path):
    lines = run("nm", "-C", path).stdout.splitlines()
    return [(m[1], m[2]) for m in (re.match(r"[0-9a-f ]{16} (\w) (.*)", line) for line in lines) if m]


def test_objects_share_nothing_between_instruction_sets(kernels):
    # the linker keeps one copy of a weak symbol: an AVX-512 copy would crash older CPUs
    for (isa, name), path in kernels.objects.items():
        for kind, symbol in symbols(path):
            where = f"{isa}/{name}: {kind} {symbol}"
            assert "std::" not in symbol and "__gnu_cxx" not in symbol, where
            if kind == "U":
                assert symbol in ALLOWED_IMPORTS | LIBM or symbol.startswith(f"pyflow::{isa}::"), where
            elif kind not in "r":
                assert f"pyflow::{isa}::" in symbol, where
            assert kind not in "BbDd", f"{where}: a variable"


def instructions(path):
    return run("objdump", "-d", "--no-show-raw-insn", path).stdout


def test_instructions_stay_within_their_set(kernels):
    if ("v3", "coupling") not in kernels.objects:
        pytest.skip("not an x86-64 build")
    for (isa, name), path in kernels.objects.items():
        wide = re.search(r"%zmm|%k[1-7]|%[xy]mm(1[6-9]|2\d|3[01])", instructions(path))
        assert isa == "v4" or wide is None, f"{isa}/{name}: {wide[0]}"
    # the code that chooses the instruction set must run on any x86-64 CPU
    dispatch = instructions(kernels.folder / "CMakeFiles/kernel_bits.dir/csrc/cpu/dispatch.cpp.o")
    assert not re.search(r"\sv[a-z0-9]+\s+.*%[xyz]mm", dispatch)


def simd_loops(file):
    """Return the (first, last) lines of all loops of csrc/cpu/<file> marked `#pragma omp simd`."""
    lines = (ROOT / "csrc/cpu" / file).read_text().splitlines()
    spans = []
    for start, line in enumerate(lines, 1):
        if line.strip() != "#pragma omp simd":
            continue
        indent = re.match(" *", lines[start])[0]  # of the `for` below
        braced = lines[start].endswith("{")
        end = next(n for n in range(start + 2, len(lines)) if lines[n - 1] == indent + "}") if braced else start + 2
        spans.append((start, end))
    return spans


def loop_messages(report, file, loops):
    """Yield (loop, message, the message with the two that follow it) for what the vectoriser says of these loops."""
    messages = report.splitlines()
    for index, message in enumerate(messages):
        found = re.match(rf"\S*csrc/cpu/{re.escape(file)}:(\d+):\d+: (.*)", message)
        loop = found and next((span for span in loops if span[0] < int(found[1]) < span[1]), None)
        if loop is not None:
            yield loop, found[2], " ".join(messages[index : index + 3])


def is_full_width(message, isa):
    return message == f"optimized: loop vectorized using {WIDTH.get(isa, 16)} byte vectors"


def test_every_simd_loop_is_vectorised(kernels):
    if not any("optimized: loop vectorized" in report for report in kernels.reports.values()):
        pytest.skip("this build has no report of what was vectorised")
    checked = 0
    for (isa, name), report in kernels.reports.items():
        file = f"{name}.cpp"
        loops, full = simd_loops(file), set()
        for loop, message, reason in loop_messages(report, file, loops):
            if is_full_width(message, isa):
                full.add(loop)
            # float64 loops may call libm, which is not vectorised
            if "couldn't vectorize loop" in message and "double" not in reason:
                pytest.fail(f"{isa}: {reason}")
        missing = [span for span in loops if span not in full]
        assert not missing, f"{isa}/{file}: loops not vectorised at full width at lines {missing}"
        checked += len(loops)
    assert checked >= 10


HEADERS = sorted(str(path.relative_to(ROOT / "csrc/cpu")) for path in (ROOT / "csrc/cpu").rglob("*.h"))


@pytest.mark.parametrize("header", HEADERS)
def test_every_simd_loop_of_a_header_is_vectorised_somewhere(kernels, header):
    loops = simd_loops(header)
    for isa in {isa for isa, _ in kernels.reports}:
        seen, full = set(), set()
        for report in (text for (other, _), text in kernels.reports.items() if other == isa):
            for loop, message, _ in loop_messages(report, header, loops):
                seen.add(loop)  # not a loop for other processors
                if is_full_width(message, isa):
                    full.add(loop)
        assert seen == full, f"{isa}/{header}: loops not vectorised at full width at lines {sorted(seen - full)}"


def test_coupling_maps_use_packed_instructions(kernels):
    if ("v4", "coupling") not in kernels.objects:
        pytest.skip("not an x86-64 build")
    for isa, register in (("v3", "ymm"), ("v4", "zmm")):
        functions = re.split(
            r"\n[0-9a-f]+ <", run("objdump", "-dC", "--no-show-raw-insn", kernels.objects[isa, "coupling"]).stdout
        )
        maps = [f for f in functions if re.match(r"void pyflow::\w+::.*map_chunk<.*float>\(", f) and "vfmadd" in f]
        assert maps, isa
        for body in maps:
            assert len(re.findall(rf"vfn?m(?:add|sub)\w+ps .*%{register}", body)) >= 8, f"{isa}: {body[:120]}"


def test_noise_uses_packed_instructions(kernels):
    if ("v4", "noise") not in kernels.objects:
        pytest.skip("not an x86-64 build")
    for isa, register in (("v3", "ymm"), ("v4", "zmm")):
        for name in ("noise", "sde"):
            text = run("objdump", "-dC", "--no-show-raw-insn", kernels.objects[isa, name]).stdout
            assert len(re.findall(rf"vpmuludq .*%{register}", text)) >= 20, f"{isa}/{name}: the rounds of the generator"
            assert len(re.findall(rf"vsqrtps .*%{register}", text)) >= 2, f"{isa}/{name}: the radius of the normals"


# as kernel_bits prints them: float and double
NOT_FINITE = {"7fc00000", "7f800000", "ff800000", "7ff8000000000000", "7ff0000000000000", "fff0000000000000"}


def bits(command, **environment):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env={**os.environ, **environment})
    return done.stdout.splitlines() if done.returncode == 0 else None


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs) > 100
    for a, b in zip(ours, theirs, strict=True):
        if a != b:
            (case, *x), (_, *y) = a.split(), b.split()
            wrong = [i for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q]
            pytest.fail(
                f"{case}: {len(wrong)} of {len(x)} differ, first at {wrong[0]}: {x[wrong[0]]} and {y[wrong[0]]}"
            )


def test_same_bits_on_avx2_and_avx512(kernels):
    results = {isa: bits([kernels.program], PYFLOW_CPU_ISA=name) for isa, name in ISA_NAMES.items()}
    missing = [ISA_NAMES[isa] for isa, lines in results.items() if lines is None]
    if missing:
        pytest.skip(f"this CPU cannot run {', '.join(missing)}")
    assert_same_bits(results["v3"], results["v4"])


def test_no_nan_hides_a_sum(kernels):
    lines = bits([kernels.program])
    if lines is None:
        pytest.skip("this CPU has none of the compiled instruction sets")
    cases = [line.split() for line in lines]
    ordinary = {name.partition(":")[2]: words for name, *words in cases if name.startswith("ordinary:")}
    # what is printed with special values is printed without
    assert {"logdet_partial", "gan_qp", "flow_log_prob", "denoising_loss"} <= {
        name.partition("[")[0] for name in ordinary
    }
    for name, words in ordinary.items():
        # half the values that the logarithm is given are negative
        assert name == "log" or not NOT_FINITE & {*words}, name


def test_same_bits_on_neon(kernels, tmp_path):
    compiler = "aarch64-linux-gnu-g++"
    need(compiler, "qemu-aarch64")
    ours = bits([kernels.program])
    if ours is None:
        pytest.skip("this CPU has none of the compiled instruction sets")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    build(tmp_path, ["kernel_bits"], *target, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    arm = kernels_in(tmp_path)
    assert {isa for isa, _ in arm.objects} == {"neon"}
    assert_same_bits(ours, bits(["qemu-aarch64", arm.program]))
