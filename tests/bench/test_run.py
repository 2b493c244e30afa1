"""bench/run.py: one program's failure or delay costs the others nothing, and nothing is lost."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cases
import offload
import run
import step
from throughput.measure import OPTIMIZERS
from throughput.situations import SITUATIONS
from throughput.workloads import WORKLOADS


def program(name: str, code: str, limit: float = 60, **kwargs) -> run.Program:
    return run.Program(name, [sys.executable, "-c", code], limit, **kwargs)


def run_all(*programs: run.Program, seconds: float = 60):
    """Outcomes by name, what was saved after each program, and the log."""
    saved, log = [], io.BytesIO()
    outcomes = run.run_all(programs, seconds, log, lambda done: saved.append(list(done)))
    assert [len(done) for done in saved] == list(range(1, len(programs) + 1))
    return {o["name"]: o["outcome"] for o in outcomes}, log.getvalue().decode()


def test_a_program_that_fails_loses_none_of_the_others():
    outcomes, log = run_all(
        program("bad", "import sys; print('why'); sys.exit(3)"), program("good", "print('fine')")
    )
    assert outcomes == {"bad": "failed with exit code 3", "good": "passed"}
    assert log == "why\nfine\n"


def test_a_program_that_crashes_is_a_failure():
    outcomes, _ = run_all(program("crash", "import os; os.abort()"))
    assert outcomes == {"crash": "failed with exit code -6"}


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(alive)!r}, 'w')"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.perf_counter()
    outcomes, _ = run_all(program("hang", hang, limit=1), program("good", ""))
    assert outcomes == {"hang": "ended after 1 s", "good": "passed"}
    time.sleep(max(0, start + 5 - time.perf_counter()))
    assert not alive.exists()


def test_output_shows_while_a_program_still_runs():
    times = []

    class Log(io.BytesIO):
        def write(self, data):
            times.append(time.perf_counter())
            return super().write(data)

    outcome = run.run(
        program("slow", "import time; print('a'); time.sleep(1); print('b')"), 60, Log()
    )
    assert outcome == "passed"
    assert times[-1] - times[0] > 0.8


def test_no_program_begins_when_the_time_is_up():
    outcomes, _ = run_all(
        program("long", "import time; time.sleep(60)"), program("late", ""), seconds=1
    )
    assert outcomes == {"long": "ended after 1 s", "late": "not run: no time left"}


def test_what_a_program_leaves_is_kept_even_if_it_fails(tmp_path):
    left, kept = tmp_path / "report.json", tmp_path / "finetune.json"
    code = f"open({str(left)!r}, 'w').write('figures'); exit(1)"
    run_all(program("leaves", code, keeps={left: kept, tmp_path / "missing": tmp_path / "none"}))
    assert kept.read_text() == "figures"
    assert not (tmp_path / "none").exists()


def programs_of(*argv: str) -> list[run.Program]:
    args = run.parse_options(list(argv))
    if args.plan == "bench":
        return list(run.bench_parts(args))
    return [program for part in run.gpu_parts(args) for program in part]


@pytest.mark.parametrize("plan", ["bench", "gpu"])
def test_every_program_is_asked_for_what_it_knows(plan):
    args = run.parse_options([plan])
    known = {"step.py": list, "offload.py": offload.step_options}
    commands = [
        known[name](program.command[2:])
        for program in programs_of(plan)
        if (name := Path(program.command[1]).name) in known
    ]
    chosen = [step.parse_options(command) for command in commands]
    csvs = {"step", "around", "sharded", "offload", "bytes", "optimizers"}
    names = {run.machine.RESULTS / f"{csv}-{args.device}.csv" for csv in csvs}
    assert {options.csv for options in chosen} == names
    assert {name for options in chosen for name in options.workload} == set(WORKLOADS)
    situations = {name for options in chosen for name in options.situation}
    assert situations == set(SITUATIONS) - ({"graph"} if plan == "bench" else set())


def test_a_gpus_parts_come_in_the_order_asked_for_and_one_build_before_them():
    def names(*argv: str) -> list[str]:
        return [program.name for program in programs_of("gpu", *argv)]

    assert names()[:3] == ["build", "report", "tests of CUDA"]
    assert names().count("build") == 1
    assert names("--part", "tune") == ["build", "variants"]
    assert names("--part", "profile", "tune") == ["build", "ncu", "variants"]
    assert names("--part", "check", "--device", "cpu")[0] == "report"
    assert "finetune-topics-lora-cuda" in names("--part", "finetune", "--cache", "there")
    assert names("--part", "finetune") == ["build", "training steps"]


@pytest.mark.parametrize(("asked", "built"), [(None, "90"), ("80;90", "80;90")])
def test_a_gpus_kernels_are_built_for_it_alone_unless_told_otherwise(
    asked, built, monkeypatch, tmp_path
):
    monkeypatch.setattr(run, "run_all", lambda *_: [])
    monkeypatch.setattr(run, "facts", lambda device: KNOWN)
    monkeypatch.setenv("FASTOPT_CUDA_ARCHITECTURES", asked or "")
    if asked is None:
        monkeypatch.delenv("FASTOPT_CUDA_ARCHITECTURES")
    run.main(["gpu", "--part", "tune", "--out", str(tmp_path)])
    assert os.environ["FASTOPT_CUDA_ARCHITECTURES"] == built


KNOWN = {"machine": "a GPU", "date": "2026-01-01", "capability": "9.0"}


def test_each_part_has_less_than_8_minutes_and_none_of_its_programs_more():
    args = run.parse_options(["gpu", "--cache", "there"])
    assert args.minutes < 8
    limits = [program.limit for program in programs_of("gpu", "--cache", "there")]
    assert max(limits) <= 60 * args.minutes


def test_every_optimizer_but_adam_is_measured():
    commands = [program.command[2:] for program in programs_of("bench")]
    named = [step.parse_options(c).optimizer for c in commands if "--optimizer" in c]
    measured = {OPTIMIZERS[name][0] for names in named for name in names}
    assert measured == set(cases.OPTIONS) - {"Adam"}  # AdamW is the same work


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The whole of `make bench` on one tiny workload, without the parts that train."""
    out = tmp_path_factory.mktemp("out")
    code = (
        "import run, sys; parts = run.bench_parts;"
        "run.bench_parts = lambda args: list(parts(args))[:1];"
        f"sys.exit(run.main(['bench', '--out', {str(out)!r}, '--seconds', '0.05',"
        "'--workload', 'one-tiny']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=run.BENCH, capture_output=True, text=True, timeout=240
    )
    return out, done


@pytest.mark.slow
def test_all_results_lie_flat_in_the_folder_asked_for(dry_run):
    out, done = dry_run
    assert done.returncode == 0, done.stdout + done.stderr
    names = {file.name for file in out.iterdir()}
    (report,) = out.glob("*.json")
    assert names == {report.name, "step-cpu.csv", "run.log", "README.md"}
    assert "one of 16" in (out / "README.md").read_text()
    assert "fastopt" in (out / "run.log").read_text()


@pytest.mark.slow
def test_the_report_says_what_was_measured_and_how_each_part_ended(dry_run):
    out, _ = dry_run
    (file,) = out.glob("*.json")
    report = json.loads(file.read_text())
    assert {"machine", "date", "commit", "python", "triton", "fastopt"} <= set(report)
    assert report["torch"] == torch.__version__
    assert [(p["name"], p["outcome"]) for p in report["parts"]] == [
        ("every workload", "passed"),
        ("tables", "passed"),
    ]
    assert all(p["seconds"] > 0 for p in report["parts"])


@pytest.mark.parametrize("plan", ["bench", "gpu"])
def test_what_several_programs_append_to_is_begun_anew(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_all", lambda *_: [])
    args = [plan, "--device", "cpu", "--out", str(tmp_path)]
    appending = [program for program in programs_of(*args) if "--append" in program.command]
    old = {Path(p.command[p.command.index("--csv") + 1]) for p in appending}
    for file in old:
        file.write_text("old")
    run.main(args)
    assert len(old) > 2
    assert not any(file.exists() for file in old)


# `make gpu` on the CPU: every program of every part, on next to nothing.

LEFT = {
    "check": set(),
    "bench": {
        f"{name}-cpu.csv"
        for name in ("step", "bytes", "around", "sharded", "offload", "optimizers", "scaling")
    },
    "tune": {"tune-cpu.csv", "tune-cpu.md"},
    "finetune": {"share-cpu.csv"},
    "profile": set(),
}


def test_every_part_has_its_dry_run():
    assert LEFT.keys() == run.GPU_PARTS.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", LEFT)
def test_dry_run_of_each_part(part, tmp_path):
    command = [sys.executable, "run.py", "gpu", "--dry-run", "--device", "cpu", "--part", part]
    done = subprocess.run(
        [*command, "--out", tmp_path], cwd=run.BENCH, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (report,) = tmp_path.glob("*.json")
    assert report.name.endswith(f"-{part}.json")
    outcomes = {p["name"]: p["outcome"] for p in json.loads(report.read_text())["parts"]}
    assert set(outcomes.values()) == {"passed"}
    log = tmp_path / f"run-{part}.log"
    assert log.read_bytes()
    names = {file.name for file in tmp_path.iterdir()}
    assert names == LEFT[part] | {report.name, log.name, "README.md"}


def test_a_copy_without_git_takes_its_commit_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(run.machine, "ROOT", tmp_path)
    monkeypatch.setenv("FASTOPT_COMMIT", "abc1234")
    run.machine.commit.cache_clear()
    assert run.machine.commit() == "abc1234"
    run.machine.commit.cache_clear()
