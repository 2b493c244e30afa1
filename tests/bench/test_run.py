"""bench/run.py: one part's failure or delay costs the others nothing, and nothing is lost."""

import io
import json
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


def part(name: str, code: str, limit: float = 60, **kwargs) -> run.Part:
    return run.Part(name, [sys.executable, "-c", code], limit, **kwargs)


def run_all(*parts: run.Part, seconds: float = 60):
    """Outcomes by name, what was saved after each part, and the log."""
    saved, log = [], io.BytesIO()
    outcomes = run.run_all(parts, seconds, log, lambda done: saved.append(list(done)))
    assert [len(done) for done in saved] == list(range(1, len(parts) + 1))
    return {o["name"]: o["outcome"] for o in outcomes}, log.getvalue().decode()


def test_a_part_that_fails_loses_none_of_the_others():
    outcomes, log = run_all(
        part("bad", "import sys; print('why'); sys.exit(3)"), part("good", "print('fine')")
    )
    assert outcomes == {"bad": "failed with exit code 3", "good": "passed"}
    assert log == "why\nfine\n"


def test_a_part_that_crashes_is_a_failure():
    outcomes, _ = run_all(part("crash", "import os; os.abort()"))
    assert outcomes == {"crash": "failed with exit code -6"}


def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(4); open({str(alive)!r}, 'w')"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.perf_counter()
    outcomes, _ = run_all(part("hang", hang, limit=1), part("good", ""))
    assert outcomes == {"hang": "ended after 1 s", "good": "passed"}
    time.sleep(max(0, start + 5 - time.perf_counter()))
    assert not alive.exists()


def test_output_shows_while_a_part_still_runs():
    times = []

    class Log(io.BytesIO):
        def write(self, data):
            times.append(time.perf_counter())
            return super().write(data)

    outcome = run.run(part("slow", "import time; print('a'); time.sleep(1); print('b')"), 60, Log())
    assert outcome == "passed"
    assert times[-1] - times[0] > 0.8


def test_no_part_begins_when_the_time_is_up():
    outcomes, _ = run_all(part("long", "import time; time.sleep(60)"), part("late", ""), seconds=1)
    assert outcomes == {"long": "ended after 1 s", "late": "not run: no time left"}


def test_what_a_part_leaves_is_kept_even_if_it_fails(tmp_path):
    left, kept = tmp_path / "report.json", tmp_path / "finetune.json"
    code = f"open({str(left)!r}, 'w').write('figures'); exit(1)"
    run_all(part("leaves", code, keeps={left: kept, tmp_path / "missing": tmp_path / "none"}))
    assert kept.read_text() == "figures"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("plan", ["bench", "gpu"])
def test_every_part_asks_for_what_the_programs_know(plan):
    args = run.parse_options([plan])
    parts = {"bench": run.bench_parts, "gpu": run.gpu_parts}[plan](args)
    programs = {"step.py": list, "offload.py": offload.step_options}
    commands = [
        programs[name](part.command[2:])
        for part in parts
        if (name := Path(part.command[1]).name) in programs
    ]
    chosen = [step.parse_options(command) for command in commands]
    csvs = {"step", "around", "sharded", "offload"} | (
        {"bytes", "optimizers"} if plan == "bench" else set()
    )
    names = {run.machine.RESULTS / f"{csv}-{args.device}.csv" for csv in csvs}
    assert {options.csv for options in chosen} == names
    assert {name for options in chosen for name in options.workload} == set(WORKLOADS)
    situations = {name for options in chosen for name in options.situation}
    assert situations == set(SITUATIONS) - ({"graph"} if plan == "bench" else set())


def test_every_optimizer_but_adam_is_measured():
    commands = [part.command[2:] for part in run.bench_parts(run.parse_options(["bench"]))]
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
def test_what_several_parts_append_to_is_begun_anew(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_all", lambda *_: [])
    args = [plan, "--device", "cpu", "--out", str(tmp_path)]
    plans = {"bench": run.bench_parts, "gpu": run.gpu_parts}
    parts = list(plans[plan](run.parse_options(args)))
    appending = [part for part in parts if "--append" in part.command]
    old = {tmp_path / part.command[part.command.index("--csv") + 1] for part in appending}
    for file in old:
        file.write_text("old")
    run.main(args)
    assert len(old) > 2
    assert not any(file.exists() for file in old)


def test_a_copy_without_git_takes_its_commit_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(run.machine, "ROOT", tmp_path)
    monkeypatch.setenv("FASTOPT_COMMIT", "abc1234")
    run.machine.commit.cache_clear()
    assert run.machine.commit() == "abc1234"
    run.machine.commit.cache_clear()
