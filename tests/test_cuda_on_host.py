"""The device that the host plays in test_cuda_source.py: warps whose lanes wait for each other, and
what it refuses as a device would."""

import ctypes
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ON_HOST = Path(__file__).parent / "cuda_on_host"

LANES, WARPS, BLOCKS = 32, 3, 2
THREADS = LANES * WARPS
COUNT = THREADS * BLOCKS

KERNELS = """
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

constexpr unsigned kWhole = 0xffffffff;

extern "C" bool hold_back(bool from_now_on);

static unsigned own() { return blockIdx.x * 96 + threadIdx.x; }
static uint32_t* bytes_on(uint32_t* data, int bytes) {
  return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(data) + bytes);
}
struct Guest {
  uint32_t* const guests;
  explicit Guest(uint32_t* guests) : guests(guests) { ++*guests; }
  ~Guest() { --*guests; }
};

extern "C" {

void maximum(uint32_t* data) {
  uint32_t most = data[own()];
  for (int i = 16; i > 0; i /= 2) most = std::max(most, __shfl_xor_sync(kWhole, most, i));
  data[own()] = most;
}
void mirror_in_memory(uint32_t* data) {
  const uint32_t mirrored = data[own() ^ 31];
  __syncwarp();
  data[own()] = mirrored;
}
void count_words(uint32_t* data) { __stcs(data + own(), __ldcs(data + own()) + 1); }

void lane_5_returns(uint32_t*) {
  if (threadIdx.x == 5) return;
  __shfl_xor_sync(kWhole, 0, 1);
}
void lane_5_returns_after_a_turn(uint32_t*) {
  for (int i = threadIdx.x == 5 ? 1 : 0; i < 2; ++i) __syncwarp();
}
void lane_5_is_elsewhere(uint32_t*) {
  if (threadIdx.x == 5) {
    __shfl_xor_sync(kWhole, 0, 1);
  } else {
    __shfl_xor_sync(kWhole, 0, 1);
  }
}
void lane_5_is_in_another_turn(uint32_t*) {
  for (int i = threadIdx.x == 5 ? 2 : 1; i < 4; i *= 2) __shfl_xor_sync(kWhole, 0, i);
}
void half_a_warp(uint32_t*) {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffff, 0, 1);
}
void beyond_the_warp(uint32_t*) { __shfl_xor_sync(kWhole, 0, 32); }
void misaligned_read(uint32_t* data) {
  const Guest guest(data);
  __syncwarp();
  if (threadIdx.x == 5) __ldcs(bytes_on(data, 1));
  __syncwarp();
  data[own()] = 1;
}
void misaligned_write(uint32_t* data) {
  const Guest guest(data);
  __syncwarp();
  if (threadIdx.x == 5) __stcs(bytes_on(data, 2), 7);
  __syncwarp();
  data[own()] = 1;
}

void write_7(uint32_t* data) { data[own()] = 7; }
void add_1_after_waiting(uint32_t* data) {
  cudaGridDependencySynchronize();
  __syncwarp();
  ++data[own()];
}
void read_before_waiting(uint32_t* data) {
  const uint32_t early = data[own()];
  cudaGridDependencySynchronize();
  data[own()] = early + 1;
}
void write_before_waiting(uint32_t* data) {
  data[own()] = 8;
  cudaGridDependencySynchronize();
}
void lane_5_does_not_wait(uint32_t*) {
  if (threadIdx.x != 5) cudaGridDependencySynchronize();
}

static const char* start(void (*kernel)(uint32_t*), int blocks, int threads, uint32_t* data,
                         bool overlaps) {
  static std::string error;
  try {
    cudaLaunchAttribute overlap{cudaLaunchAttributeProgrammaticStreamSerialization, {1}};
    const cudaLaunchConfig_t config{dim3(blocks), dim3(threads), nullptr, &overlap, overlaps};
    return cudaGetErrorString(cudaLaunchKernelEx(&config, kernel, data));
  } catch (const std::runtime_error& e) {
    return (error = e.what()).c_str();
  }
}
const char* launch(void (*kernel)(uint32_t*), int blocks, int threads, uint32_t* data) {
  return start(kernel, blocks, threads, data, false);
}
const char* launch_after(void (*first)(uint32_t*), void (*kernel)(uint32_t*), uint32_t* data) {
  hold_back(true);
  start(first, 2, 96, data, false);
  const char* const said = start(kernel, 2, 96, data, true);
  return hold_back(false) ? "a kernel has not run" : said;
}

}  // extern "C"
"""

Launch = Callable[..., str]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("kernels")
    source, so = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(KERNELS)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ON_HOST}"]
    if hasattr(ctypes.CDLL(None), "__asan_init"):  # as under `make sanitize`
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    sources = [source, ON_HOST / "device_on_host.cpp"]
    subprocess.run(["c++", *flags, *sources, "-o", so], check=True)
    library = ctypes.CDLL(str(so))
    library.launch.restype = library.launch_after.restype = ctypes.c_char_p
    return library


# Lanes run forwards in two launches, backwards in the next two.
@pytest.fixture(params=range(4))
def launch(library: ctypes.CDLL) -> Launch:
    """Runs a kernel on the numbers of a list, in place; returns what the launch says."""

    def launch(kernel: str, data: list[int], blocks: int = BLOCKS, threads: int = THREADS) -> str:
        memory = (ctypes.c_uint32 * len(data))(*data)
        said: bytes = library.launch(getattr(library, kernel), blocks, threads, memory)
        data[:] = memory
        return said.decode()

    return launch


def warps(numbers: list[int]) -> list[list[int]]:
    return [numbers[i : i + LANES] for i in range(0, len(numbers), LANES)]


def test_shuffles_give_every_lane_the_maximum(launch: Launch) -> None:
    data = random.Random(0).choices(range(2**32), k=COUNT)
    expected = [max(warp) for warp in warps(data) for _ in warp]
    assert launch("maximum", data) == "no error"
    assert data == expected


def test_no_lane_passes_syncwarp_before_all_are_there(launch: Launch) -> None:
    data = list(range(COUNT))
    expected = [number for warp in warps(data) for number in reversed(warp)]
    assert launch("mirror_in_memory", data) == "no error"
    assert data == expected


def test_lanes_that_do_not_wait_may_be_fewer_than_a_warp(launch: Launch) -> None:
    data = [7] * COUNT
    assert launch("count_words", data, blocks=1, threads=40) == "no error"
    assert data == [8] * 40 + [7] * (COUNT - 40)


PLACE = r"lane {} waits at \S+kernels.cpp:\d+ \(lane mask {}\)"
GONE = "lane 5 has returned or never was"


@pytest.mark.parametrize(
    ("kernel", "lane_0", "lane_5"),
    [
        ("lane_5_returns", PLACE.format(0, 1), GONE),
        ("lane_5_returns_after_a_turn", PLACE.format(0, 0), GONE),
        ("lane_5_is_elsewhere", PLACE.format(0, 1), PLACE.format(5, 1)),
        ("lane_5_is_in_another_turn", PLACE.format(0, 1), PLACE.format(5, 2)),
    ],
)
def test_lanes_must_meet(launch: Launch, kernel: str, lane_0: str, lane_5: str) -> None:
    said = launch(kernel, [0] * COUNT)
    assert re.fullmatch(f"block [01], warp 0: {lane_0}, {lane_5}", said), said


def test_lanes_that_wait_must_be_a_whole_warp(launch: Launch) -> None:
    said = launch("maximum", [0] * COUNT, blocks=1, threads=LANES + 5)
    assert re.search(f"warp 1: {PLACE.format(0, 16)}, {GONE}", said), said


@pytest.mark.parametrize("kernel", ["half_a_warp", "beyond_the_warp"])
def test_shuffles_of_other_than_whole_warps(launch: Launch, kernel: str) -> None:
    assert "only shuffles of whole warps are known here" in launch(kernel, [0] * COUNT)


@pytest.mark.parametrize("kernel", ["misaligned_read", "misaligned_write"])
def test_an_error_in_a_lane_ends_the_launch(launch: Launch, kernel: str) -> None:
    data = [0] * COUNT
    assert launch(kernel, data, blocks=1, threads=LANES) == "an access to 4 bytes is misaligned"
    assert data == [0] * COUNT  # no lane has gone on, and the stacks of all have been unwound
    assert launch("maximum", data) == "no error"


def after_write_7(library: ctypes.CDLL, kernel: str, data: list[int]) -> str:
    """As launched by `launch`, to overlap a kernel that writes 7 everywhere."""
    memory = (ctypes.c_uint32 * len(data))(*data)
    said: bytes = library.launch_after(library.write_7, getattr(library, kernel), memory)
    data[:] = memory
    return said.decode()


def test_a_kernel_waits_for_the_one_before(library: ctypes.CDLL) -> None:
    data = [0] * COUNT
    assert after_write_7(library, "add_1_after_waiting", data) == "no error"
    assert data == [8] * COUNT


@pytest.mark.parametrize(
    ("kernel", "wrong"), [("read_before_waiting", 1), ("write_before_waiting", 7)]
)
def test_what_comes_before_waiting_shows(library: ctypes.CDLL, kernel: str, wrong: int) -> None:
    data = [0] * COUNT
    assert after_write_7(library, kernel, data) == "no error"
    assert sorted(data) == sorted([wrong] + [8] * (COUNT - 1))  # the first thread that ran


def test_every_thread_must_wait(library: ctypes.CDLL) -> None:
    said = after_write_7(library, "lane_5_does_not_wait", [0] * COUNT)
    assert re.fullmatch("block [01], thread 5 has not waited for the kernel before", said), said
