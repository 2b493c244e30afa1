"""Markdown tables of the rows of one CSV, and how their cells are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .measure import OPTIMIZERS, TOO_LARGE, Row
from .rivals import CONTENDERS, FUSED, OURS
from .rows import measured, read
from .workloads import WORKLOADS

SHORT = {
    "cpu": ["1000x16", "lora-bert", "minilm", "bert-base"],
    "cuda": ["1000x16", "lora-bert", "bert-base", "llama-1b"],
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
NOT_YET = "not measured yet"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def rows_of(results: Path, name: str) -> list[Row]:
    file = results / f"{name}.csv"
    return read(file) if file.exists() else []


def pick(rows: Iterable[Row], **wanted: str) -> list[Row]:
    return [r for r in rows if all(r[column] == value for column, value in wanted.items())]


def one(rows: Iterable[Row], **wanted: str) -> Row | None:
    found = pick(measured(rows), **wanted)
    return found[0] if found else None


def time(row: Row | None, column: str = "median_ms") -> str:
    """In milliseconds, three figures."""
    if row is None or not row[column]:
        return ""
    value = float(row[column])
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def ratio(row: Row | None) -> str:
    if row is None or not row["ratio"]:
        return ""
    spread = " ({ratio_p20} to {ratio_p80})".format_map(row) if row["ratio_p20"] else ""
    return "{ratio}x".format_map(row) + spread


def percent(row: Row | None, column: str = "ceiling_share") -> str:
    return f"{float(row[column]):.0%}" if row and row[column] else ""


def size(row: Row) -> str:
    """`144 tensors, 1.33 M`; nothing where the title says it."""
    tensors, elements = int(row["tensors"]), int(row["elements"])
    named = "tensors" if tensors > 1 else "tensor"
    return f"{tensors} {named}, {elements / 1e6:.3g} M" if elements > 1e5 else ""


def measured_on(rows: Sequence[Row]) -> str:
    """What the figures come from; several in the order of their first rows."""
    known = [f"{r['machine']}, torch {r['torch']}, fastopt at {r['commit']}" for r in rows]
    return "; ".join(dict.fromkeys(known))


def workloads_in(rows: Iterable[Row]) -> list[str]:
    seen = {row["workload"] for row in rows}
    return [name for name in WORKLOADS if name in seen]


def contenders_in(rows: Iterable[Row]) -> list[str]:
    seen = {row["contender"] for row in rows}
    return [name for name in CONTENDERS if name in seen]


# Of README.md and docs/.


def not_yet(device: str) -> str:
    return f"{DEVICES[device]}: {NOT_YET}."


def short_table(results: Path, device: str) -> str:
    """Ours and torch fused on a few workloads, AdamW."""
    plain = pick(rows_of(results, f"step-{device}"), situation="plain", dtype="float32")
    rows = measured(pick(plain, optimizer="adamw"))
    if not rows:
        return not_yet(device)
    lines, shown = [], []
    for workload in [name for name in workloads_in(rows) if name in SHORT[device]]:
        theirs = one(rows, workload=workload, contender=FUSED)
        ours = one(rows, workload=workload, contender=OURS)
        lines.append([WORKLOADS[workload].title, time(theirs), time(ours), ratio(ours)])
        shown += [row for row in (theirs, ours) if row]
    head = ["float32 parameters", "torch", "fastopt", "times as fast (p20 to p80)"]
    return f"{markdown(head, lines)}\n\n{measured_on(shown)}."


def step_table(results: Path, device: str) -> str:
    """Ours and torch fused, AdamW and SGD."""
    plain = pick(rows_of(results, f"step-{device}"), situation="plain", dtype="float32")
    rows = measured(plain)
    if not rows:
        return not_yet(device)
    parts = []
    for optimizer, name in (("adamw", "AdamW"), ("sgd-momentum", "SGD, momentum")):
        lines = []
        for workload in workloads_in(rows):
            here = pick(rows, workload=workload)
            theirs = one(here, optimizer=optimizer, contender=FUSED)
            ours = one(here, optimizer=optimizer, contender=OURS)
            line = [WORKLOADS[workload].title, size(here[0]), time(theirs), time(ours)]
            lines.append([*line, ratio(ours), percent(ours)])
        head = [name, "", "torch", "fastopt", "times as fast (p20 to p80)", "of the ceiling"]
        parts.append(markdown(head, lines))
    return "\n\n".join([*parts, f"{measured_on(rows)}."])


def tuning_table(results: Path) -> str:
    """What is trained, and what the optimizer then takes."""
    rows = rows_of(results, "share-cpu")
    lines = []
    for tuning in dict.fromkeys(row["tuning"] for row in rows):
        theirs, ours = (pick(rows, tuning=tuning, contender=name)[0] for name in (FUSED, OURS))
        trained = f"{int(ours['elements']):,} in {ours['tensors']}"
        states = f"{int(ours['state_bytes']) / 1e6:,.3f} MB"
        optimizers = (time(row, "optimizer_ms") for row in (theirs, ours))
        lines.append([tuning, trained, states, time(ours, "whole_ms"), *optimizers])
    head = ["", "parameters, tensors", "states", "whole step, ms", "optimizer: torch", "fastopt"]
    return f"{markdown(head, lines)}\n\n{measured_on(rows)}."


def sharded_table(results: Path, device: str) -> str:
    """DTensors, and gradients in bfloat16."""
    rows = measured(rows_of(results, f"sharded-{device}"))
    if not rows:
        return not_yet(device)
    return f"{situations_table(rows)}\n\n{measured_on(rows)}."


def offload_table(results: Path, device: str) -> str:
    """Who takes how long, with how many bytes of states; and who could not run."""
    rows = rows_of(results, f"offload-{device}")
    ran = measured(rows)
    if not ran:
        return not_yet(device)
    lines = []
    for name in contenders_in(ran):
        own = pick(ran, contender=name)
        times = [_time_and_ratio(one(own, workload=workload)) for workload in workloads_in(ran)]
        lines.append([name, own[0]["state_bytes_per_param"], *times])
    head = ["", "states, bytes per parameter"]
    for workload in workloads_in(ran):
        elements = int(pick(ran, workload=workload)[0]["elements"])
        head.append(f"{WORKLOADS[workload].title}, {elements / 1e6:.3g} M")
    parts = [markdown(head, lines), f"{measured_on(ran)}."]
    if len(ran) < len(rows):
        parts.append(f"Not run:\n\n{skipped_list(rows)}")
    return "\n\n".join(parts)


def bytes_table(results: Path, device: str) -> str:
    """AdamW with states and weights in fewer bytes."""
    rows = measured(rows_of(results, f"bytes-{device}"))
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        parts += [f"AdamW, {dtype} parameters:", contenders_table(pick(rows, dtype=dtype))]
    return "\n\n".join([*parts, f"{measured_on(rows)}."]) if rows else not_yet(device)


def training_table(results: Path, device: str) -> str:
    """Whole steps of fine-tuning."""
    rows = rows_of(results, f"share-{device}")
    return f"{share_table(rows)}\n\n{measured_on(rows)}." if rows else not_yet(device)


# Of bench/results/README.md.


def contenders_table(rows: Sequence[Row]) -> str:
    """Milliseconds of every contender, ours and the reference first."""
    names = contenders_in(rows)
    head = ["", *names]
    lines = []
    for workload in workloads_in(rows):
        here = [one(rows, workload=workload, contender=name) for name in names]
        lines.append([WORKLOADS[workload].title, *(_time_and_ratio(row) for row in here)])
    return markdown(head, lines)


def _time_and_ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{time(row)} ({row['ratio']}x)"


def situations_table(rows: Sequence[Row]) -> str:
    names = contenders_in(rows)
    lines = [
        [
            situation,
            WORKLOADS[workload].title,
            *(
                _time_and_ratio(one(rows, situation=situation, workload=workload, contender=name))
                for name in names
            ),
        ]
        for situation in dict.fromkeys(row["situation"] for row in rows)
        for workload in workloads_in(pick(rows, situation=situation))
    ]
    return markdown(["situation", "", *names], lines)


def optimizers_table(rows: Sequence[Row]) -> str:
    """Ours beside the reference and beside the fastest of torch's own, which may be its loop."""
    rivals = contenders_in(row for row in rows if row["contender"] not in (OURS, row["reference"]))
    head = ["", "", "reference", "its ms", OURS, "times as fast", "as torch's fastest", *rivals]
    lines = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        for workload in workloads_in(pick(rows, optimizer=optimizer)):
            here = pick(rows, optimizer=optimizer, workload=workload)
            reference = here[0]["reference"]
            ours = one(here, contender=OURS)
            line = [optimizer, WORKLOADS[workload].title, reference]
            line += [time(one(here, contender=reference)), time(ours), ratio(ours)]
            others = [one(here, contender=name) for name in rivals]
            lines.append([*line, _to_fastest(here, ours), *(_plain_ratio(row) for row in others)])
    return markdown(head, lines)


def _to_fastest(rows: Iterable[Row], ours: Row | None) -> str:
    torchs = [r for r in rows if CONTENDERS[r["contender"]].package == "torch" and r["ratio"]]
    if ours is None or not torchs:
        return ""
    fastest = max(torchs, key=lambda row: float(row["ratio"]))
    return f"{float(ours['ratio']) / float(fastest['ratio']):.2f}x ({fastest['contender']})"


def _plain_ratio(row: Row | None) -> str:
    return f"{row['ratio']}x" if row else ""


def lacking_list(rows: Iterable[Row]) -> str:
    """The reasons, in which an ellipsis stands for the optimizers after them."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["skipped"]:
            name, _ = OPTIMIZERS[row["optimizer"]]
            reason = f"- {row['contender']}: {row['skipped'].replace(name, '...')}"
            found.setdefault(reason, {})[name] = None
    return "\n".join(f"{reason} ({', '.join(names)})" for reason, names in sorted(found.items()))


def limits_table(rows: Sequence[Row]) -> str:
    """Where memory is the limit: GB/s, the share of what streaming reaches, and of a GPU's peak."""
    shares = {"ceiling_share": "share"}
    if any(row.get("peak_share") for row in rows):
        shares["peak_share"] = "of the peak"
    lines = [
        [
            WORKLOADS[workload].title,
            row["contender"],
            row["gb_per_s"],
            row["ceiling_gb_per_s"],
            *(percent(row, column) for column in shares),
        ]
        for workload in workloads_in(rows)
        for row in pick(rows, workload=workload)
        if row["ceiling_share"]
    ]
    return markdown(["", "", "GB/s", "ceiling, GB/s", *shares.values()], lines)


def host_table(rows: Sequence[Row]) -> str:
    """On a GPU: the host's time and the device's own."""
    lines = [
        [
            WORKLOADS[row["workload"]].title,
            row["contender"],
            row["situation"],
            *(time(row, column) for column in ("median_ms", "host_ms", "device_ms")),
        ]
        for row in rows
        if row["device_ms"] and row["contender"] in (OURS, FUSED, "fastopt triton")
    ]
    return markdown(["", "", "situation", "whole, ms", "host, ms", "device, ms"], lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Of the workload that most contenders stepped on."""
    counts = {name: len(pick(rows, workload=name)) for name in workloads_in(rows)}
    largest = max(counts, key=lambda name: (counts[name], list(WORKLOADS).index(name)))
    lines = [
        [row["contender"], row["version"], row["state_bytes_per_param"], row["step_peak_mb"]]
        for name in contenders_in(rows)
        if (row := one(rows, workload=largest, contender=name))
    ]
    head = ["", "", "state, bytes per parameter", f"peak of a step on {largest}, MB"]
    return markdown(head, lines)


def skipped_list(rows: Iterable[Row]) -> str:
    reasons = {
        f"- {row['contender']}: {row['skipped']}"
        for row in rows
        if row["skipped"] and not row["skipped"].startswith(TOO_LARGE)
    }
    return "\n".join(sorted(reasons)) or "All of them ran."


def share_table(rows: Sequence[Row]) -> str:
    """Whole training steps. (The first figures say less of them than later ones.)"""
    ran = [row for row in rows if not row.get("skipped")]
    timed = {"whole_ms": "whole step", "clip_ms": "clipping", "optimizer_ms": "optimizer"}
    if "skipped" in rows[0]:
        timed["host_ms"] = "both on the host"
    further = {
        "tokens_per_s": "tokens a second",
        "peak_mb": "peak, MB",
        "loss": "last loss",
        "loss_diff": "at most from the first's",
    }
    known = {name: title for name, title in further.items() if name in rows[0]}
    lines = [
        [
            _trained(row),
            row["contender"],
            *(time(row, column) for column in timed),
            f"{float(row['optimizer_share']):.1%}",
            *(row[column] for column in known),
        ]
        for row in ran
    ]
    titles = [f"{title}, ms" for title in timed.values()]
    head = ["", "", *titles, "its share", *known.values()]
    lacking = [
        f"- {row['contender']}, {_trained(row)}: {row['skipped']}"
        for row in rows
        if row.get("skipped")
    ]
    return "\n\n".join([markdown(head, lines), *(["\n".join(lacking)] if lacking else [])])


def _trained(row: Row) -> str:
    """`full, 103 tensors, 22.7 M`; of later figures which model, and its dtype."""
    model = f"{row['model']}, {row['dtype']}, " if row.get("model") else ""
    size = (
        f", {row['tensors']} tensors, {int(row['elements']) / 1e6:.3g} M" if row["tensors"] else ""
    )
    return f"{model}{row['tuning']}{size}"


def profile_table(rows: Sequence[Row]) -> str:
    """What ncu said of each kernel."""
    columns = {
        "microseconds": "µs",
        "gb_per_s": "GB/s",
        "of_peak": "of the peak, %",
        "registers": "registers",
        "resident_warps": "resident warps, %",
        "waits": "what warps wait for, in cycles",
    }
    lines = [[row["case"], row["kernel"], *(row[column] for column in columns)] for row in rows]
    return markdown(["", "kernel", *columns.values()], lines)
