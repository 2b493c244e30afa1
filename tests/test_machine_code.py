"""What the compiler made of the CUDA kernels: the machine code for sm_90 and the PTX of the build.

Needs a build with CUDA kernels and cuobjdump, no GPU. Run as a script it prints the table.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

from fastopt import _C

pytestmark = pytest.mark.nvcc

ROOT = Path(__file__).parents[1]

THREADS, SLOTS = 256, 288  # as in csrc/cuda: of update, and of advance but for few

# Formats by their number in csrc/formats/formats.h, with their bytes.
FORMATS = ["float32", "float64", "bfloat16", "float16", "stochastic", "split"]
BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "stochastic": 2, "split": 4}

# Instances of update: what it knows of parameters, gradients and states.
UNIFORM = [(name, name, name) for name in FORMATS[:4]]
MIXES = [
    ("float32", "float32", "stochastic"),
    ("split", "bfloat16", "float32"),
    ("split", "bfloat16", "stochastic"),
    ("bfloat16", "bfloat16", "float32"),
]
ANY, BLOCKS = ("any",), ("blocks",)

# Calls of multiply_add for an element, by rule and number of states; a lerp is written with two.
MULTIPLY_ADDS = {
    ("Adadelta", 2): 4,
    ("Adagrad", 1): 2,
    ("Adam", 2): 4,
    ("Adam", 3): 4,
    ("Adamax", 2): 4,
    ("ASGD", 1): 3,
    ("Average", 0): 2,
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


# Of MULTIPLY_ADDS, rules of which a state cannot be narrow; and those with states that MIXES are
# compiled for.
EXACT = {("ASGD", 1), ("RMSprop", 3)}
MIXED = {("Adam", 2), ("Lion", 1), ("SGD", 1)}


@dataclass(frozen=True)
class Name:
    phase: str
    rule: str
    storage: tuple[str, ...]  # of advance: the precision of the arithmetic, and for few slots
    states: int = 0

    def __str__(self) -> str:
        storage = self.storage[0] if len(set(self.storage)) == 1 else ", ".join(self.storage)
        states = f" {self.states} states" if self.phase == "update" else ""
        return f"{self.phase} {self.rule} {storage}{states}"

    @property
    def tensors(self) -> int:
        return 2 + self.states

    @property
    def moved(self) -> list[int]:
        """Bytes of an element of each tensor that is moved: where the kernel knows no formats,
        those of 16-bit parameters and gradients with float32 states (without states the two differ)
        and of split parameters with states in blocks."""
        if self.storage == BLOCKS:
            return [2, 2, 2] + self.states * [1]
        if self.storage == ANY:
            return [2, 2] + self.states * [4] if self.states else [4, 2]
        param, grad, state = (BYTES[name] for name in self.storage)
        split = [2, 2] if self.storage[0] == "split" else [param]
        return [*split, grad, *self.states * [state]]

    @property
    def averages(self) -> int:
        """Loads of a thread for the averages that go along, each of 16 bytes."""
        without = self.rule == "Average" or self.states > 2
        return 0 if without else self.pieces * max(1, self.piece // 4)

    @property
    def pieces(self) -> int:
        """Of each tensor, that a thread moves at a time."""
        if self.storage == BLOCKS:
            return 4 if self.states < 3 else 2
        if self.storage == ANY:
            return [4, 4, 2, 1][self.states]
        count = 1
        while count * self.piece * sum(self.moved) < (96 if "float64" in self.storage else 64):
            count *= 2
        return count

    @property
    def piece(self) -> int:
        """Its elements."""
        return 4 if self.storage in (ANY, BLOCKS) else 16 // max(self.moved)


def occurs(rule: str, storage: tuple[str, ...], states: int) -> bool:
    """A rule without states needs one of the instances that differ in nothing else."""
    if states == 0:
        return storage not in (BLOCKS, MIXES[0], MIXES[2], MIXES[3])
    if storage in MIXES and (rule, states) not in MIXED:
        return False
    return (rule, states) not in EXACT or storage != BLOCKS


EXPECTED = {
    Name("add_chunks", "", ("float64",)),
    *(Name("sum_chunks", "", (dtype,)) for dtype in FORMATS[:4]),
    *(
        Name("advance", rule, storage)
        for rule in RULES
        for storage in [("float32",), ("float32", "few"), ("float64",)]
    ),
    *(
        Name("update", rule, storage, n)
        for rule, n in MULTIPLY_ADDS
        for storage in [*UNIFORM, *MIXES, ANY, BLOCKS]
        if occurs(rule, storage, n)
    ),
}

OF_NORMS = re.compile(r"(?:(add_chunks)|(sum_chunks)I(?:([fd])|\w*?\d(BFloat16|Float16)E))")
MANGLED = re.compile(
    r"(advance|update)INS_\d+(\w+?)E"
    r"(?:([fd])NS1_7BatchOfILi(\d+)E"
    r"|Li(\d)ENS\w*?_(?:3AnyILb(\d)E|5KnownILNS\w*?_6FormatE(\d)ELS\w*?_(\d)ELS\w*?_(\d)E))"
)


def name_of(mangled: str) -> Name:
    precisions = {"f": "float32", "d": "float64"}
    if of_norm := OF_NORMS.search(mangled):
        last, phase, precision, narrow = of_norm.groups()
        return Name(
            last or phase, "", (narrow.lower() if narrow else precisions[precision or "d"],)
        )
    phase, rule, precision, slots, states, blocks, *formats = MANGLED.search(mangled).groups()
    if phase == "advance":
        few = ("few",) if int(slots) < SLOTS else ()
        return Name(phase, rule, (precisions[precision], *few))
    known = (
        tuple(FORMATS[int(i)] for i in formats) if blocks is None else (ANY, BLOCKS)[int(blocks)]
    )
    return Name(phase, rule, known, int(states))


# PTX, which every architecture's machine code is made from. What says how it rounds (.rn) must not
# be contracted; what does not, may be.


def entries(ptx: str) -> dict[Name, str]:
    found = re.finditer(r"\.entry (\S+)\(.*?^\}$", ptx, re.DOTALL | re.MULTILINE)
    return {name_of(entry[1]): entry[0] for entry in found}


def contractible(entry: str) -> list[str]:
    return re.findall(r"\b(?:add|sub|mul|fma)(?:\.ftz|\.sat)?\.f(?:32|64)\b", entry)


def multiply_adds(entry: str) -> int:
    return len(re.findall(r"\bfma\.\S*f(?:32|64)\b", entry))


# Machine code.


class Instruction(NamedTuple):
    opcode: str  # with its modifiers
    registers: list[int]  # the one it writes first, if any

    @property
    def streamed(self) -> int:
        """Bytes of a vector that is loaded, 0 of anything else."""
        load = re.match(r"LDG.*\.EF(?:\.(64|128))?", self.opcode)
        return int(load[1] or 32) // 8 if load else 0

    @property
    def stored(self) -> int:
        store = re.match(r"STG.*\.EF(?:\.(64|128))?", self.opcode)
        return int(store[1] or 32) // 8 if store else 0


@dataclass(frozen=True)
class Kernel:
    instructions: list[Instruction]
    registers: int
    ptx: str

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, each.opcode)) for each in self.instructions)

    @property
    def loads(self) -> Counter[int]:
        """Of vectors, by their bytes."""
        return Counter(each.streamed for each in self.instructions if each.streamed)

    @property
    def stores(self) -> Counter[int]:
        return Counter(each.stored for each in self.instructions if each.stored)

    @property
    def spills(self) -> int:
        return self.count(r"LDL|STL")

    @property
    def float64s(self) -> int:
        return self.count(r"D(ADD|MUL|FMA|SETP|MNMX)|.*\.F64|MUFU\..*64H")

    @property
    def loads_in_flight(self) -> Counter[int]:
        """Those of vectors, by their bytes, before the first instruction that waits for one."""
        loads: Counter[int] = Counter()
        waited_for: set[int] = set()
        for each in self.instructions:
            if waited_for & set(each.registers[1:] if each.streamed else each.registers):
                break
            if each.streamed:
                loads[each.streamed] += 1
                first = each.registers[0]
                waited_for |= set(range(first, first + -(-each.streamed // 4)))
        return loads

    def are_together(self, loads: int) -> bool:
        """Whether the first ones of vectors have no arithmetic in between: for kernels that choose
        between loads, of which alternatives may use the same registers."""
        places = [i for i, each in enumerate(self.instructions) if each.streamed]
        between = self.instructions[places[0] : places[loads - 1]]
        return not any(re.match(r"[FD](FMA|MUL|ADD|SETP)|MUFU", each.opcode) for each in between)

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
        instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)([^;]*)"
        found = re.findall(instruction, function, re.MULTILINE)
        instructions = [
            Instruction(opcode, [int(i) for i in re.findall(r"\bR(\d+)", operands)])
            for opcode, operands in found
        ]
        kernels[name] = Kernel(instructions, registers[name], ptx[name])
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


def generation(capability: str) -> int:
    """Of those that share their PTX."""
    return sum(int(capability) >= first for first in (90, 100))


def test_build_says_what_it_holds(cuobjdump, kernels):
    """Machine code for every architecture, and PTX for those to come."""
    listed = subprocess.run(
        [cuobjdump, "-lelf", "-lptx", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    said = re.findall(r"\b\d+\b", _C.build["cuda"].partition(" for ")[2])
    sources = 2  # of kernels
    assert re.findall(r"sm_(\d+)\.cubin", listed) == sources * said
    of_the_newest = [each for each in said if generation(each) == generation(said[-1])]
    assert re.findall(r"sm_(\d+)\.ptx", listed) == sources * of_the_newest[:1]


def test_every_kernel_is_looked_at(kernels):
    assert kernels.keys() == EXPECTED


def test_tensors_are_loaded_and_stored_in_vectors(updates):
    """Once each, in one loop, and the widest 16 bytes at a time; the gradient's store is for
    unscaling. A kernel that knows no formats has a choice of them."""
    wrong = {}
    for name, kernel in updates.items():
        if name.storage in (ANY, BLOCKS):
            numbers = 2 if name.storage == BLOCKS else name.tensors
            vectors = Counter({16: numbers, 8: numbers + 1})  # and a remainder
            if name.storage == BLOCKS:
                vectors[4] = name.states
        else:
            vectors = Counter(name.piece * size for size in name.moved)
        expected = Counter({size: name.pieces * count for size, count in vectors.items()})
        expected[16] += name.averages
        if (kernel.loads, kernel.stores) != (expected, expected):
            wrong[str(name)] = (kernel.loads, kernel.stores, expected)
    assert not wrong


def bytes_in_flight(name: Name, kernel: Kernel) -> int:
    """To a multiprocessor, where no average goes along: those are the last to be loaded."""
    threads = kernel.blocks_assumed * THREADS
    if name.storage not in (ANY, BLOCKS):
        loads, tensors = kernel.loads_in_flight, kernel.loads - Counter({16: name.averages})
        return threads * sum(size * min(count, loads[size]) for size, count in tensors.items())
    assert kernel.are_together(sum(kernel.loads.values()) - name.averages)
    return threads * name.pieces * name.piece * sum(name.moved)


def test_update_waits_before_it_touches_memory(kernels):
    """Where it was started while advance still runs, which lets it start at once."""
    touched = re.compile(r"\b(?:ld|st|prefetch)\.global|\batom\.")
    for name, kernel in kernels.items():
        waits, lets_start = (f"griddepcontrol.{what};" for what in ("wait", "launch_dependents"))
        if name.phase == "update":
            assert touched.search(kernel.ptx).start() > kernel.ptx.index(waits), name
            opcodes = [each.opcode for each in kernel.instructions]
            first = next(i for i, each in enumerate(opcodes) if re.match(r"(LD|ST)(G|\b)", each))
            assert first > opcodes.index("ACQBULK"), name
        assert (lets_start in kernel.ptx) == (name.phase == "advance"), name


def test_enough_bytes_are_in_flight_to_hide_the_latency_of_memory(updates):
    wrong = {}
    for name, kernel in updates.items():
        crowded = name.storage in (ANY, BLOCKS) and name.states == 3  # of registers
        in_flight = bytes_in_flight(name, kernel)
        if in_flight < (32 if crowded else 48) * 1024:
            wrong[str(name)] = in_flight
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
        str(name) for name in updates if "float64" in name.storage
    }
    assert not wrong


def test_multiply_adds_are_fused_where_a_rule_says_so_and_nowhere_else(kernels):
    for name, kernel in kernels.items():
        assert contractible(kernel.ptx) == [], name
        if name.phase != "update":
            twice = multiply_adds(kernel.ptx) - IN_POWERS.get(name.rule, 0)
            assert 0 <= twice <= (name.rule in IN_POWERS), name  # on two ways, say
            continue
        # The rule is there for all pieces and for a single element. The compiler may have made a
        # few elements twice; one more multiply-add in each would be too many.
        elements = name.pieces * name.piece + 1
        each = MULTIPLY_ADDS[name.rule, name.states]
        if name.averages:  # which go along
            each += MULTIPLY_ADDS["Average", 0]
        twice = multiply_adds(kernel.ptx) - each * elements
        assert 0 <= twice < elements, name


def compiled(path: Path, *options: str) -> dict[Name, str]:
    """The PTX of apply.cu with these options."""
    nvcc = tool("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    ptx = path / "apply.ptx"
    usual = ["-std=c++17", "-O3", "-arch=compute_90", "-ptx", "-o", ptx]
    subprocess.run([nvcc, *usual, *options, ROOT / "csrc/cuda/apply.cu"], check=True)
    return entries(ptx.read_text())


@pytest.mark.slow
def test_tuning_makes_other_kernels(tmp_path):
    """csrc/cuda/tuning.h; CMake makes these macros of FASTOPT_CUDA_TUNE."""
    choices = ("THREADS=128", "BLOCKS=5", "BYTES=128", "RULES=lion+average")
    kernels = compiled(tmp_path, "-fmad=false", *(f"-DFASTOPT_CUDA_{each}" for each in choices))
    assert {name.rule for name in kernels} == {"Lion", "Average"}
    ptx = kernels[Name("update", "Lion", UNIFORM[0], 1)]
    assert ".maxntid 128," in ptx
    assert ".minnctapersm 5" in ptx
    loads = re.findall(r"ld\.global\.cs\.v4", ptx)
    assert len(loads) == 4 * 3 + 4  # 4 pieces of 12 bytes for each of 4 elements, and of averages


@pytest.mark.slow
def test_contraction_would_be_seen(tmp_path):
    """By the test above, were -fmad=false left out."""
    contracted = compiled(tmp_path)
    assert contracted.keys() == {name for name in EXPECTED if not name.phase.endswith("_chunks")}
    assert all(contractible(entry) for entry in contracted.values())


def table(kernels: dict[Name, Kernel]) -> str:
    """Of update, with what a parameter costs: each tensor read, all but the gradient written."""
    lines = [
        "| kernel | registers | blocks | threads | loads of 16, 8, 4 bytes | bytes in flight "
        "| FFMA | FP64 | spills | instructions | bytes a parameter |",
        "| --- " * 11 + "|",
    ]
    for name, kernel in sorted(kernels.items(), key=lambda item: str(item[0])):
        if name.phase != "update":
            continue
        cells = [
            name,
            kernel.registers,
            kernel.blocks_assumed,
            kernel.blocks_assumed * THREADS,
            ", ".join(str(kernel.loads[size]) for size in (16, 8, 4)),
            bytes_in_flight(name, kernel),
            kernel.count("FFMA"),
            kernel.float64s,
            kernel.spills,
            len(kernel.instructions),
            2 * sum(name.moved) - BYTES.get(name.storage[1 % len(name.storage)], 2),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if (cuobjdump := tool("cuobjdump")) is None:
        sys.exit("no cuobjdump: neither a CUDA toolkit nor Triton is installed")
    print(table(disassemble(cuobjdump, _C.__file__)))
