"""bench/throughput/profile.py: what is read of ncu's table; what is said where there is none."""

import csv
import stat

import pytest

import machine
from throughput import profile

KERNEL = (
    "void fastopt::cuda::<unnamed>::update<fastopt::Adam, 2, fastopt::cuda::<unnamed>::Known<"
    "(fastopt::Format)0, (fastopt::Format)0, (fastopt::Format)0>>(fastopt::cuda::<unnamed>::Work)"
)
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
TABLE = {
    "ID": ("", "0"),
    "Kernel Name": ("", KERNEL),
    "Block Size": ("", "(256, 1, 1)"),
    "Grid Size": ("", "(396, 1, 1)"),
    "gpu__time_duration.sum": ("us", "812.5"),
    "dram__bytes_read.sum": ("Gbyte", "1.76"),
    "dram__bytes_write.sum": ("Mbyte", "1,320.0"),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "88.2"),
    "launch__registers_per_thread": ("register/thread", "72"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "37.1"),
    STALLED.format("long_scoreboard"): ("inst", "41.31"),
    STALLED.format("wait"): ("inst", "1.52"),
    STALLED.format("barrier"): ("inst", "0"),
    STALLED.format("lg_throttle"): ("inst", "7.25"),
}


def said() -> str:
    lines = zip(*((name, *cells) for name, cells in TABLE.items()), strict=True)
    table = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    return f"==PROF== Connected to process 7\n{table}\n"


def test_a_kernels_figures_are_those_of_the_table():
    (row,) = profile.rows_of(said())
    assert row == {
        "kernel": "update<Adam, 2, Known<0, 0, 0>>",
        "grid": "(396, 1, 1)",
        "block": "(256, 1, 1)",
        "microseconds": "812.50",
        "read_mb": "1760.00",
        "written_mb": "1320.00",
        "of_peak": "88.2",
        "registers": "72",
        "resident_warps": "37.1",
        "gb_per_s": "3791",
        "waits": "long_scoreboard 41.3, lg_throttle 7.2, wait 1.5",
    }


def test_what_ncu_does_not_know_stays_blank(monkeypatch):
    monkeypatch.delitem(TABLE, "dram__bytes_read.sum")
    (row,) = profile.rows_of(said())
    assert row["microseconds"] == "812.50"
    assert not {"read_mb", "gb_per_s"} & row.keys()
    assert profile.rows_of("==ERROR== no counters") == []


def program(folder, text: str) -> str:
    """In ncu's place: it writes what it is told to into its log file."""
    file = folder / "ncu"
    file.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --log-file ]; do shift; done\n'
        f"cat > \"$2\" <<'END'\n{text}\nEND\n"
        f"exit {0 if text else 3}\n"
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


@pytest.fixture
def _on_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "device_name", lambda device: "a GPU")


@pytest.mark.usefixtures("_on_a_gpu")
def test_each_cases_kernels_are_written_and_all_that_was_said(monkeypatch, tmp_path):
    ncu = program(tmp_path, said())
    monkeypatch.setattr(machine, "cuda_tool", lambda name: ncu)
    sink = tmp_path / "profile-cuda.csv"
    assert profile.main(["--case", "AdamW", "SGD", "--csv", str(sink)]) == 0
    with sink.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["of_peak"]) for row in rows] == [("AdamW", "88.2"), ("SGD", "88.2")]
    raw = (tmp_path / "profile-raw-cuda.csv").read_text()
    assert raw.count("long_scoreboard") == 2


@pytest.mark.usefixtures("_on_a_gpu")
def test_a_case_that_fails_is_said_to(monkeypatch, tmp_path, capsys):
    ncu = program(tmp_path, "")
    monkeypatch.setattr(machine, "cuda_tool", lambda name: ncu)
    assert profile.main(["--case", "AdamW", "--csv", str(tmp_path / "profile-cuda.csv")]) == 1
    assert "AdamW: ncu failed with exit code 3" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--device", "cpu"]])
def test_where_ncu_is_not_it_says_so(monkeypatch, capsys, options):
    monkeypatch.setattr(machine, "cuda_tool", lambda name: None)
    assert profile.main(options) == 0
    assert "no profile: " in capsys.readouterr().out


def test_every_case_steps(monkeypatch):
    """All but the parts that only a GPU has, on the CPU."""
    for optimizer, contender, situation, dtype, _ in profile.CASES.values():
        if contender != "fastopt triton":
            setting = profile.Setting([(64, 128)], optimizer, situation, dtype, "cpu")
            setting.clock(contender).turn()
