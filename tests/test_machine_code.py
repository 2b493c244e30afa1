"""What the compiler made of the CUDA kernels: the machine code for sm_90 and the PTX of the build.

Needs a build with CUDA kernels and cuobjdump, no GPU. Run as a script it prints the table.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from fastopt import _C

pytestmark = pytest.mark.nvcc

ROOT = Path(__file__).parents[1]

# As in csrc/cuda/apply.cu.
THREADS = 256
STORAGES = ["float32", "float64", "bfloat16", "float16", "mixed"]
VECTOR = {"float32": 4, "float64": 2, "bfloat16": 8, "float16": 8, "mixed": 4}
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# Calls of multiply_add for an element, by rule and number of states; a lerp is written with two.
MULTIPLY_ADDS = {
    ("Adadelta", 2): 4,
    ("Adagrad", 1): 2,
    ("Adam", 2): 4,
    ("Adam", 3): 4,
    ("Adamax", 2): 4,
    ("ASGD", 1): 3,
    ("Lion", 1): 5,
    ("NAdam", 2): 5,
    ("RAdam", 2): 5,
    ("RMSprop", 1): 3,
    ("RMSprop", 2): 7,
    ("RMSprop", 3): 7,
    ("Rprop", 2): 1,
    ("SGD", 0): 2,
    ("SGD", 1): 4,
}
# Those in a slot's powers, two each; of a constant base the compiler takes the logarithm.
IN_POWERS = {"Adam": 4, "Adamax": 2, "ASGD": 2, "NAdam": 4, "RAdam": 4}
RULES = sorted({rule for rule, _ in MULTIPLY_ADDS})

# A multiprocessor of sm_90.
REGISTERS, REGISTERS_AT_A_TIME = 65536, 8


@dataclass(frozen=True)
class Name:
    phase: str
    rule: str
    storage: str  # of advance: the precision of the arithmetic
    states: int = 0

    def __str__(self) -> str:
        states = f" {self.states} states" if self.phase == "update" else ""
        return f"{self.phase} {self.rule} {self.storage}{states}"

    @property
    def tensors(self) -> int:
        return 2 + self.states


EXPECTED = {
    *(Name("advance", rule, precision) for rule in RULES for precision in STORAGES[:2]),
    *(Name("update", rule, storage, n) for rule, n in MULTIPLY_ADDS for storage in STORAGES),
}

MANGLED = re.compile(r"(advance|update)INS_\d+(\w+?)E([fd])(?:Li(\d)ELNS\d_7StorageE(\d))?")


def name_of(mangled: str) -> Name:
    phase, rule, precision, states, storage = MANGLED.search(mangled).groups()
    if phase == "advance":
        return Name(phase, rule, {"f": "float32", "d": "float64"}[precision])
    return Name(phase, rule, STORAGES[int(storage)], int(states))


# PTX, which every architecture's machine code is made from. What says how it rounds (.rn) must not
# be contracted; what does not, may be.


def entries(ptx: str) -> dict[Name, str]:
    found = re.finditer(r"\.entry (\S+)\(.*?\n\}", ptx, re.DOTALL)
    return {name_of(entry[1]): entry[0] for entry in found}


def contractible(entry: str) -> list[str]:
    return re.findall(r"\b(?:add|sub|mul|fma)(?:\.ftz|\.sat)?\.f(?:32|64)\b", entry)


def multiply_adds(entry: str) -> int:
    return len(re.findall(r"\bfma\.\S*f(?:32|64)\b", entry))


# Machine code.


@dataclass(frozen=True)
class Kernel:
    opcodes: list[str]  # with their modifiers
    registers: int
    ptx: str

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)

    @property
    def loads(self) -> int:
        return self.count(r"LDG.*\.128")

    @property
    def stores(self) -> int:
        return self.count(r"STG.*\.128")

    @property
    def spills(self) -> int:
        return self.count(r"LDL|STL")

    @property
    def float64s(self) -> int:
        return self.count(r"D(ADD|MUL|FMA|SETP|MNMX)|.*\.F64|MUFU\..*64H")

    @property
    def loads_in_flight(self) -> int:
        """Of 16 bytes, before the first arithmetic waits for one."""
        arithmetic = re.compile(r"[FD](FMA|MUL|ADD|SETP)|H[A-Z]+2|MUFU")
        first = next(i for i, opcode in enumerate(self.opcodes) if re.match(r"LDG.*\.128", opcode))
        loads = 0
        for opcode in self.opcodes[first:]:
            if arithmetic.match(opcode):
                break
            loads += bool(re.match(r"LDG.*\.128", opcode))
        return loads

    @cached_property
    def blocks_assumed(self) -> int:
        """A multiprocessor's, in __launch_bounds__."""
        return int(re.search(r"\.minnctapersm (\d+)", self.ptx)[1])

    @property
    def blocks(self) -> int:
        """That a multiprocessor has registers for."""
        granted = -(-self.registers // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
        return REGISTERS // (THREADS * granted)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the copy that is in Triton's wheel."""
    folders = [os.environ["PATH"]]
    if "CUDA_HOME" in os.environ:
        folders.append(os.environ["CUDA_HOME"] + "/bin")
    if triton := importlib.util.find_spec("triton"):
        folders.append(f"{Path(triton.origin).parent}/backends/nvidia/bin")
    return shutil.which(name, path=os.pathsep.join(folders))


def disassemble(cuobjdump: str, binary: str) -> dict[Name, Kernel]:
    """Empty where the binary has no code for sm_90."""

    def dump(*options: str) -> str:
        return subprocess.run([cuobjdump, *options, binary], capture_output=True, text=True).stdout

    code, usage = (dump(what, "-arch", "sm_90") for what in ("-sass", "-res-usage"))
    registers = {
        name_of(function): int(count)
        for function, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)
    }
    ptx = entries(dump("-ptx"))
    kernels = {}
    for function in code.split("Function : ")[1:]:
        name = name_of(function)
        instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)"
        opcodes = re.findall(instruction, function, re.MULTILINE)
        kernels[name] = Kernel(opcodes, registers[name], ptx[name])
    return kernels


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    path = tool("cuobjdump")
    if path is None:
        pytest.skip("no cuobjdump: neither a CUDA toolkit nor Triton is installed")
    return path


@pytest.fixture(scope="module")
def kernels(cuobjdump) -> dict[Name, Kernel]:
    found = disassemble(cuobjdump, _C.__file__)
    if not found:
        pytest.skip("this build has no CUDA kernels for sm_90")
    return found


@pytest.fixture
def updates(kernels):
    return {name: kernel for name, kernel in kernels.items() if name.phase == "update"}


def test_build_says_what_it_holds(cuobjdump, kernels):
    """Machine code for every architecture, and PTX of the newest for those to come."""
    listed = subprocess.run(
        [cuobjdump, "-lelf", "-lptx", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    said = re.findall(r"\b\d+\b", _C.build["cuda"].partition(" for ")[2])
    assert re.findall(r"sm_(\d+)\.cubin", listed) == said
    assert re.findall(r"sm_(\d+)\.ptx", listed) == said[-1:]


def test_every_kernel_is_looked_at(kernels):
    assert kernels.keys() == EXPECTED


def test_aligned_tensors_are_loaded_and_stored_16_bytes_at_a_time(updates):
    """Once each, in one loop; the gradient's store is for unscaling."""
    wrong = {
        str(name): (kernel.loads, kernel.stores)
        for name, kernel in updates.items()
        if (kernel.loads, kernel.stores) != (name.tensors, name.tensors)
    }
    assert not wrong


def test_four_loads_are_on_their_way_before_the_first_is_waited_for(updates):
    wrong = {
        str(name): kernel.loads_in_flight
        for name, kernel in updates.items()
        if kernel.loads_in_flight < min(name.tensors, 4)
    }
    assert not wrong


def test_nothing_is_spilled(kernels):
    assert not {str(name): kernel.spills for name, kernel in kernels.items() if kernel.spills}


def test_registers_suffice_for_the_blocks_assumed(updates):
    wrong = {
        str(name): (kernel.registers, kernel.blocks, kernel.blocks_assumed)
        for name, kernel in updates.items()
        if kernel.blocks < kernel.blocks_assumed
    }
    assert not wrong


def test_float32_arithmetic_has_no_float64_instruction(updates):
    wrong = {str(name) for name, kernel in updates.items() if kernel.float64s} - {
        str(name) for name in updates if name.storage == "float64"
    }
    assert not wrong


def test_multiply_adds_are_fused_where_a_rule_says_so_and_nowhere_else(kernels):
    for name, kernel in kernels.items():
        assert contractible(kernel.ptx) == [], name
        expected = IN_POWERS.get(name.rule, 0)
        if name.phase == "update":  # the rule is there for a vector and for a single element
            expected = MULTIPLY_ADDS[name.rule, name.states] * (VECTOR[name.storage] + 1)
        assert multiply_adds(kernel.ptx) == expected, name


def test_contraction_would_be_seen(tmp_path):
    """By the test above, were -fmad=false left out."""
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    ptx = tmp_path / "apply.ptx"
    options = ["-std=c++17", "-O3", "-arch=compute_90", "-ptx", "-o", ptx]
    subprocess.run([nvcc, *options, ROOT / "csrc/cuda/apply.cu"], check=True)
    contracted = entries(ptx.read_text())
    assert contracted.keys() == EXPECTED
    assert all(contractible(entry) for entry in contracted.values())
    assert multiply_adds(contracted[Name("update", "Adam", "float16", 2)]) > 4 * 9


def table(kernels: dict[Name, Kernel]) -> str:
    """Of update, with what a parameter costs: each tensor read, all but the gradient written."""
    lines = [
        "| kernel | registers | blocks | threads | 16-byte loads, stores | bytes in flight | FFMA "
        "| FP64 | spills | bytes a parameter |",
        "| --- " * 10 + "|",
    ]
    for name, kernel in sorted(kernels.items(), key=lambda item: str(item[0])):
        if name.phase == "advance":
            continue
        threads = kernel.blocks_assumed * THREADS
        size = BYTES.get(name.storage)
        cells = [
            name,
            kernel.registers,
            kernel.blocks_assumed,
            threads,
            f"{kernel.loads}, {kernel.stores}",
            threads * kernel.loads_in_flight * 16,
            kernel.count("FFMA"),
            kernel.float64s,
            kernel.spills,
            size * (2 * name.tensors - 1) if size else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if (cuobjdump := tool("cuobjdump")) is None:
        sys.exit("no cuobjdump: neither a CUDA toolkit nor Triton is installed")
    print(table(disassemble(cuobjdump, _C.__file__)))
