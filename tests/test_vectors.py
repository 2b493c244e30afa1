"""What a compiler makes of the CPU backend: every rule computes in vectors.

ARM64's is compiled here, where a cross-compiler is installed; AVX2's is read in test_build.py. That
ARM64's bits are x86's is shown by the digests that `python tests/test_instruction_sets.py` prints
on either, be the ARM an emulated one.
"""

import re
import subprocess
from pathlib import Path

import pytest

from test_machine_code import MULTIPLY_ADDS

CPU = Path(__file__).parents[1] / "csrc" / "cpu"
# As in CMakeLists.txt.
FLAGS = "-std=c++17 -O3 -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math"

# Multiply-adds: of one number, of whichever instruction set, and of a vector.
SCALAR = re.compile(r"\b(vfn?m(add|sub)\d+s[sd]|fn?m(add|sub))\s")
NEON = {"float": r"\bfml[as]\s+v\d+\.4s", "double": r"\bfml[as]\s+v\d+\.2d"}
AVX2 = {"float": r"\bvfn?m(?:add|sub)\d+ps\s.*ymm", "double": r"\bvfn?m(?:add|sub)\d+pd\s.*ymm"}


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(objdump: str, binary: Path) -> dict[str, str]:
    """Their machine code, by their names without namespaces."""
    listing = output(objdump, "-dC", "--no-show-raw-insn", binary)
    found = re.findall(r"^\w+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE)
    namespaces = r"fastopt::(cpu::)?|\(anonymous namespace\)::"
    return {re.sub(namespaces, "", name): code for name, code in found}


def one_by_one(objdump: str, binary: Path, vectors: dict[str, str]) -> list[str]:
    """Functions with a rule's innermost loop, wherever it was inlined but for strides, of which not
    all multiply-adds are in vectors."""
    inner = re.compile(
        r"\w+ update(?:_as|_tile|_directly|_blocks)?<(\w+), (\d)(?:, (float|double))?\W"
    )
    found = []
    for name, code in functions(objdump, binary).items():
        loop = inner.match(name)
        if loop and "Strided" not in name and SCALAR.search(code):  # for the last few, at least
            fused = MULTIPLY_ADDS[loop[1], int(loop[2])]
            if len(re.findall(vectors[loop[3] or "float"], code)) < fused:
                found.append(name)
    return found


@pytest.mark.slow
@pytest.mark.aarch64
def test_every_rule_computes_in_vectors_on_arm(tmp_path):
    binary = tmp_path / "apply.o"
    options = [*FLAGS.split(), "-fno-exceptions", "-DFASTOPT_ISA=baseline"]
    output("aarch64-linux-gnu-g++", *options, "-c", CPU / "apply.cpp", "-o", binary)
    assert one_by_one("aarch64-linux-gnu-objdump", binary, NEON) == []
    # None of its multiply-adds and roots is libm's.
    undefined = output("aarch64-linux-gnu-nm", "-u", binary).split()
    assert not {"fma", "fmaf", "sqrt", "sqrtf"} & set(undefined)
