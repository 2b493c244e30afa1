"""The Triton backend without a GPU: why it is not usable, that its rules are those of csrc/rules,
its kernels' bits in Triton's interpreter, and what NVIDIA's compiler makes of them."""

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastopt.triton
from fastopt.triton import Table, apply, formats, kernels, norm

ROOT = Path(__file__).parents[1]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = "float32", "float64", "bfloat16", "float16"
STOCHASTIC, SPLIT, REMAINDER = "bfloat16 stochastic", "split", "remainder"
SIGNED, UNSIGNED = "block signed", "block unsigned"


# Usable or not.


@pytest.fixture
def _no_memory():
    """What was found out about triton is asked anew, before and after."""
    fastopt.triton.why_not_import.cache_clear()
    yield
    fastopt.triton.why_not_import.cache_clear()


def test_cuda_and_xpu_are_usable():
    assert fastopt.triton.why_not(CUDA) is None
    assert fastopt.triton.why_not(torch.device("xpu", 1)) is None


@pytest.mark.parametrize("yes", ["1", "true", "ON"])
def test_cpu_is_the_interpreters(monkeypatch, yes):
    assert "set TRITON_INTERPRET=1" in fastopt.triton.why_not(CPU)
    monkeypatch.setenv("TRITON_INTERPRET", yes)
    assert fastopt.triton.why_not(CPU) is None
    assert "CPU" in fastopt.triton.why_not(CUDA)


def test_other_devices_have_no_triton():
    assert "meta" in fastopt.triton.why_not(torch.device("meta"))


@pytest.mark.usefixtures("_no_memory")
def test_old_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
    assert "triton 3.5.1 is too old" in fastopt.triton.why_not(CUDA)


@pytest.mark.usefixtures("_no_memory")
@pytest.mark.parametrize("version", ["3.6.0", "3.10.1+git0a1b2c", "4.0.0"])
def test_newer_triton_is_welcome(monkeypatch, version):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    assert fastopt.triton.why_not(CUDA) is None


def test_fastopt_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # what importing it then raises is what its absence raises
import torch, fastopt
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
fastopt.AdamW([param]).step()
print(fastopt.triton.why_not(torch.device("cuda")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install triton" in done.stdout


# The same rules.


def header(name):
    return (ROOT / "csrc" / "rules" / name).read_text()


def names(declarations):
    """double lr, beta1; bool first;"""
    return re.findall(r"(\w+)(?=[,;])", declarations)


def headers():
    """Every registered rule's header by the rule's name."""
    registered = re.findall(r"DO\((\w+)\)", header("rules.h"))
    found = {}
    for file in (ROOT / "csrc" / "rules").glob("*.h"):
        text = file.read_text()
        for struct in re.findall(r"^struct (\w+) {", text, re.M):
            if struct in registered:
                found[re.search(r'kName = "(\w+)"', text)[1]] = text
    assert len(found) == len(registered)
    return found


def struct(text, name):
    return names(re.search(rf"struct {name} {{(.*?)}};", text, re.S)[1])


def kept_by(text):
    """The names of a rule's counts and of its states."""
    states = re.search(r"kStates(?:\[\] = )?{(.*?)};", text, re.S)[1]
    keys = re.findall(r'(?:{|nonnegative\()"(\w+)"', states)
    counts = int(re.search(r"kCounts = (\d)", text)[1])
    return keys[:counts], keys[counts:]


def parameters_of(function):
    return list(inspect.signature(function.fn).parameters)


def test_every_rule_has_its_mirror():
    assert apply.RULES.keys() == headers().keys()


@pytest.mark.parametrize("rule", apply.RULES)
def test_mirror_has_the_rules_options_states_and_scalars(rule):
    text, mirror = headers()[rule], apply.RULES[rule]
    options, scalars = struct(text, "Options"), struct(text, "Scalars")
    counts, states = kept_by(text)
    more = parameters_of(mirror.advance)[kernels.OPTIONS.value + 1 : -2]
    assert [name for name in more if name in counts] == counts[1:]
    given = parameters_of(mirror.advance)[: kernels.OPTIONS.value]
    assert [name for name in given if "unused" not in name] == options
    given = parameters_of(mirror.update)[3 : 3 + kernels.MOST_STATES.value]
    assert sum("unused" not in name for name in given) == len(states)
    assert [getattr(mirror, name.upper()).value for name in scalars] == list(range(len(scalars)))
    assert len(scalars) <= kernels.K_SEED.value


@pytest.mark.parametrize(
    ("ours", "theirs", "file"),
    [
        (kernels.CHUNK, "kChunk", "slot.h"),
        (kernels.OPTIONS, "kMaxOptions", "slot.h"),
        (kernels.MOST_STATES, "kMaxStates", "slot.h"),
        (formats.BLOCK, "kBlock", "formats/block.h"),
        (norm.LANES, "kLanes", "norm.h"),
    ],
)
def test_constants_are_the_cores(ours, theirs, file):
    text = (ROOT / "csrc" / file).read_text()
    assert ours.value == int(re.search(rf"{theirs} = (\d+);", text)[1])


def test_reasons_to_skip_are_the_cores():
    text = (ROOT / "csrc" / "table.h").read_text()
    named = re.search(r"enum class Skip : int { (.*?) };", text)[1].split(", ")
    assert named.index("kNonfinite") == kernels.NONFINITE.value
    assert named.index("kUnclipped") == kernels.UNCLIPPED.value


def test_every_format_has_its_mirror():
    text = (ROOT / "csrc" / "table.cpp").read_text()
    named = re.findall(r'case Format::\w+: return "(.+)";', text)
    assert named == list(formats.STORAGE)


# The same bits.


@pytest.mark.timeout(600)
def test_interpreted_kernels(pytestconfig):
    """In a process of its own, where triton interprets."""
    once = ["--once"] if pytestconfig.getoption("--once") else []
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *once,
            "tests/test_triton_interpreter.py",
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# What is on the device.


@pytest.fixture
def stream(monkeypatch):
    """A device that needs no GPU: its current stream's number, and whether it is being captured."""
    stream = SimpleNamespace(stream_id=0, captures=False)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.captures)
    monkeypatch.setattr(apply, "pinned", lambda data, device: torch.empty(len(data) // 8).long())
    monkeypatch.setattr(apply, "send", lambda staging, device: staging.clone())
    return stream


DATA = (b"slots   ", b"grads   ", b"numbers ", b"layouts.layouts.")


def a_table(place=("update", 0), device=CUDA):
    dtypes = (FLOAT32,) * 4
    return Table(place, device, dtypes, (FLOAT32,), *DATA, 1)


def are_new(copies, known):
    return hold_data(copies) and not {id(copy) for copy in copies} & {id(copy) for copy in known}


def hold_data(tensors):
    return [tensor.numpy().tobytes() for tensor in tensors] == list(DATA)


def test_every_table_device_and_stream_has_its_own_copies(stream):
    cache, known = {}, []
    for stream.stream_id in (0, 7):
        for table in (
            a_table(),
            a_table(place=("update", 1)),
            a_table(device=torch.device("cuda", 1)),
        ):
            copies = apply.on_device(cache, table)
            assert are_new(copies, known)
            known += copies
            assert list(map(id, apply.on_device(cache, table))) == list(map(id, copies))


def test_a_graph_has_its_own_copies_and_keeps_what_they_are_from(stream):
    cache = {}
    known = apply.on_device(cache, a_table())
    before = list(map(id, known))
    stream.captures = True
    for graph in range(1, 3):
        copies = apply.on_device(cache, a_table())
        assert are_new(copies, known)
        known += copies
        assert len(cache["captured"]) == graph
        assert hold_data(cache["captured"][-1])
    stream.captures = False
    assert list(map(id, apply.on_device(cache, a_table()))) == before


def test_a_graph_pins_no_memory_of_its_own(stream, monkeypatch):
    cache = {}
    apply.on_device(cache, a_table())
    spare = list(cache["spare", ("update", 0), CUDA])
    stream.captures = True
    with monkeypatch.context() as patched:
        patched.setattr(apply, "pinned", None)
        apply.on_device(cache, a_table())
    assert list(map(id, cache["captured"][0])) == list(map(id, spare))
    stream.captures = False
    apply.on_device(cache, a_table())
    assert not {id(one) for one in cache["spare", ("update", 0), CUDA]} & {id(one) for one in spare}


# Compiled for sm_90, which needs no GPU.


@cache
def compiled(kernel, rule, kept):
    """With the arguments and options of a launch, on tensors that are kept in these formats."""
    function = getattr(kernels, kernel)
    counted = max(len(kept_by(headers()[rule])[0]), formats.any_random(kept))
    constants = getattr(apply.constants(rule, kept, (FLOAT32,) * counted, "cuda"), kernel)
    scalars = "*fp64" if kept[0] == FLOAT64 else "*fp32"
    types = {"scalars": scalars, "slot_count": "i32"}
    return compiled_with(function, types, constants, apply.OPTIONS)


def compiled_with(function, types, constants, options):
    """Arguments are pointers to words but for those whose types are given, and the constants."""
    arguments = function.arg_names[: -len(constants)]
    types = dict.fromkeys(arguments, "*i64") | types
    constexprs = dict(zip(function.arg_names[-len(constants) :], constants, strict=True))
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if types[name][0] == "*"
    }
    source = ASTSource(
        function, types | dict.fromkeys(constexprs, "constexpr"), constexprs, aligned
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def instructions(ptx):
    return Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)", ptx, re.M))


UPDATES = {
    (rule, kept): counts
    for rule, states, counts in [
        ("adadelta", 2, {"fma": 4, "div": 2, "sqrt": 2}),  # one div unscales the gradient
        ("adagrad", 1, {"fma": 2, "div": 2, "sqrt": 1}),
        ("adam", 2, {"fma": 3, "div": 3, "sqrt": 1}),
        ("adam", 3, {"fma": 3, "div": 3, "sqrt": 1}),
        ("adamax", 2, {"fma": 3, "div": 2, "sqrt": 0}),
        ("asgd", 1, {"fma": 3, "div": 1, "sqrt": 0}),
        ("average", 0, {"fma": 1, "div": 1, "sqrt": 0}),
        ("lion", 1, {"fma": 3, "div": 1, "sqrt": 0}),
        ("nadam", 2, {"fma": 4, "div": 3, "sqrt": 1}),
        ("radam", 2, {"fma": 4, "div": 2, "sqrt": 1}),
        ("rmsprop", 1, {"fma": 3, "div": 2, "sqrt": 1}),
        ("rmsprop", 2, {"fma": 6, "div": 2, "sqrt": 1}),
        ("rmsprop", 3, {"fma": 6, "div": 2, "sqrt": 1}),
        ("rprop", 2, {"fma": 1, "div": 1, "sqrt": 0}),
        ("sgd", 0, {"fma": 2, "div": 1, "sqrt": 0}),
        ("sgd", 1, {"fma": 4, "div": 1, "sqrt": 0}),
    ]
    for kept in [
        *((dtype,) * (2 + states) for dtype in (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)),
        (BFLOAT16, *(FLOAT32,) * (1 + states)),
        (FLOAT32, BFLOAT16, *(FLOAT32,) * states),
        (BFLOAT16, BFLOAT16, *(FLOAT32,) * states),
        (FLOAT32, FLOAT32, *(STOCHASTIC,) * states),
        (SPLIT, BFLOAT16, *(FLOAT32,) * states, REMAINDER),
        (SPLIT, BFLOAT16, *(STOCHASTIC,) * states, REMAINDER),
        *(
            (*of_param, SIGNED, *(UNSIGNED,) * (states - 1), *rest)
            for of_param, rest in [
                ((FLOAT32, FLOAT32), ()),
                ((SPLIT, BFLOAT16), (REMAINDER,)),
                ((STOCHASTIC, BFLOAT16), ()),
            ]
            if states > 0
        ),
    ]
    # Each takes a compilation: how other formats are accessed does not depend on the rule.
    if rule in ("adam", "sgd")
    or kept in ((FLOAT32,) * (2 + states), (FLOAT64,) * (2 + states))
    or (rule, kept) == ("average", (FLOAT32, BFLOAT16))
}

of_updates = pytest.mark.parametrize(("rule", "kept"), UPDATES, ids=str)


def elements_of(kept):
    """How many elements of a tensor a thread has in the compiled loops over tiles and over lanes.
    Of blocks there are both for short rows, too."""
    loops = 2 if formats.in_blocks(kept) else 1
    threads = 32 * apply.OPTIONS["num_warps"]
    return loops * apply.TILE // threads, loops * apply.LANES // threads


@of_updates
def test_update_rounds_where_its_rule_does(rule, kept):
    """Every multiplication, addition, division and root by itself, but for the rule's own fma."""
    ptx = compiled("update", rule, kept).asm["ptx"]
    assert not re.search(r"approx|full|ftz|\b(mul|add|sub)\.f", ptx)
    kind = "f64" if kept[0] == FLOAT64 else "f32"
    found = instructions(ptx)
    elements = sum(elements_of(kept))
    for name, count in UPDATES[rule, kept].items():
        total = found.pop(f"{name}.rn.{kind}", 0)
        # Short tails of loops are compiled twice; one operation more an element would be too many.
        assert total == 0 if count == 0 else 0 <= total - count * elements < elements
        assert not [key for key in found if re.match(rf"{name}\..*f\d", key)]
    assert (".f64" in ptx) == (kind == "f64")


@of_updates
def test_update_moves_aligned_tensors_128_bits_at_a_time(rule, kept):
    """The widest, and the others as many elements at a time; none of it through shared memory."""
    kernel = compiled("update", rule, kept)
    bits = {format: formats.STORAGE[format].primitive_bitwidth for format in kept}
    vector = 128 // max(bits.values())
    in_tiles, in_lanes = elements_of(kept)
    expected = Counter()
    for format in kept:
        expected[bits[format] * vector] += in_tiles // vector
    expected.pop(32, None)  # of 8-bit codes, by a word
    found = instructions(kernel.asm["ptx"])
    for direction in ("ld", "st"):  # the gradient is stored, too, where it is unscaled
        moved = Counter()
        for name, count in found.items():
            if match := re.fullmatch(rf"{direction}\.global\.v(\d)\.b(\d+)", name):
                moved[int(match[1]) * int(match[2])] += count
        assert moved == expected
    # Bytes by themselves are codes of lanes and scales. These do go through shared memory, and so
    # does the largest number of a block that several warps share.
    blocks = sum(map(formats.is_block, kept))
    assert found["st.global.b8"] == blocks * (in_lanes + 4)
    assert found["ld.global.b8"] <= blocks * (in_lanes + 6)  # in tiles a thread has up to two
    assert kernel.metadata.shared <= apply.TILE // kernels.NARROW.value
    assert ("shared" in kernel.asm["ptx"]) == formats.in_blocks(kept)


@pytest.mark.parametrize("rule", apply.RULES)
@pytest.mark.parametrize("state", [FLOAT32, STOCHASTIC])
def test_advance_fuses_in_powers_only(rule, state):
    ptx = compiled("advance", rule, (FLOAT32, FLOAT32, state)).asm["ptx"]
    assert not re.search(r"approx|full|ftz|\b(mul|add|sub)\.f|fma\.(?!rn\.f64)", ptx)
    source = inspect.getsource(apply.RULES[rule].advance.fn)
    # One in the logarithm, which the compiler takes of a constant base, and one after it.
    powers, of_constant = source.count("power("), source.count("power(base")
    assert instructions(ptx)["fma.rn.f64"] == 2 * powers - of_constant


def run_tool(name, *arguments):
    tools = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin"
    return subprocess.run(
        [tools / name, *arguments], check=True, capture_output=True, text=True
    ).stdout


def usage(kernel, folder):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    text = run_tool("cuobjdump", "--dump-resource-usage", cubin)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}


@of_updates
def test_update_leaves_room_for_the_programs_its_tile_is_chosen_for(rule, kept, tmp_path):
    """apply.py counts on so many of them sharing a multiprocessor's 65,536 registers; none spills
    any."""
    used = usage(compiled("update", rule, kept), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    programs = 65_536 // (used["REG"] * 32 * apply.OPTIONS["num_warps"])
    assert programs >= (5 if set(kept) == {FLOAT32} else 3 if FLOAT64 in kept else 4)


# The sum of a chunk, and of all chunks.


@cache
def compiled_norm(format):
    """Of gradients kept in this format; of "sums" the last kernel."""
    if format == "sums":
        types = dict.fromkeys(("sums", "norm"), "*fp64") | {"count": "i32", "value": "i64"}
        types |= {"tensor": "i32", "dtype": "i32"}
        constants = (apply.rows(FLOAT64, "cuda", apply.LAST_LANE_BYTES),)
        return compiled_with(kernels.total, types, constants, apply.NORM_OPTIONS)
    types = {"sums": "*fp64", "slot_count": "i32"}
    constants = (format, format), apply.rows(format, "cuda", apply.LANE_BYTES)
    return compiled_with(kernels.sum_squares, types, constants, apply.NORM_OPTIONS)


of_norms = pytest.mark.parametrize("format", [FLOAT32, FLOAT64, BFLOAT16, FLOAT16, "sums"])


@of_norms
def test_norm_rounds_every_square_and_sum(format):
    ptx = compiled_norm(format).asm["ptx"]
    assert not re.search(r"approx|full|ftz|\b(mul|add|sub)\.f|fma", ptx)
    found = instructions(ptx)
    if format == "sums":
        assert found["sqrt.rn.f64"] == found["div.rn.f64"] == 1
        return
    rows = apply.rows(format, "cuda", apply.LANE_BYTES) + 1  # of dense gradients, and of others
    assert found["mul.rn.f64"] == rows
    assert found["add.rn.f64"] == rows + 5


@of_norms
def test_norm_leaves_room_for_32_programs_and_uses_no_shared_memory(format, tmp_path):
    kernel = compiled_norm(format)
    used = usage(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == used["SHARED"] == kernel.metadata.shared == 0
    assert used["REG"] * 32 * 32 <= 65_536


@pytest.mark.parametrize("format", [FLOAT32, FLOAT64, BFLOAT16, FLOAT16])
def test_rows_are_on_their_way_together(format, tmp_path):
    """No sum before the last of them is loaded: the compiler has moved the loads up."""
    used = usage(compiled_norm(format), tmp_path)  # which leaves the file
    assert used
    listing = run_tool("nvdisasm", "-c", tmp_path / "kernel.cubin")
    loads_and_sums = re.findall(r"\b(LDG|DADD)\b", listing)
    runs = [len(list(run)) for name, run in groupby(loads_and_sums) if name == "LDG"]
    assert max(runs) >= apply.rows(format, "cuda", apply.LANE_BYTES)
