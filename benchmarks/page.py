"""Tables -> docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.tables import Row, Table

HEAD = """# Side by side with what people use instead

{quick}Made by `{command}` on {date}; one table by `python -m benchmarks{flag} --only NAME`. The sides of a table did
their work in turns, each in a process of its own, with {threads} threads; seconds are medians of the rounds after one
that warmed up, of one or two rounds where they take long; whole commands and trainings are not warmed up. *Times
segkit*: above 1 segkit is faster, below 1 the other one. *Peak MB*: the most resident memory of the process, or of a
command with those that it started. *Floor*: what physics asks for; of scores what resampling
alone leaves of the reference, which a network may beat. A training of
a given time takes a number of steps that the time of its first ones suggests; *seconds* says how long it took.

Each side computes in the precision that it takes by itself, and learns with its own loss. On a CPU that is fast in
bfloat16 segkit takes that, the others float32 (nnU-Net's loss: Dice and cross-entropy at several resolutions). Data are
made of the real torso, a CT of TotalSegmentator's examples with 61 of its structures, where `SEGKIT_REAL_DATA` names
the folder that holds it, else of phantoms: each table says so.

![how many times as long as segkit each takes](images/benchmarks.png)
"""
QUICK = (
    "**The quick form: small sizes and one round, which show that rows run; `make bench` measures. Left out are the "
    "comparison of quality (`python -m benchmarks --quick --only quality_torso` trains for seconds) and the demo.**\n\n"
)


def render(tables: Sequence[Table], failed: Mapping[str, str], machine: Mapping, run: Mapping) -> str:
    """The page. failed: works that stopped, with why. run: quick, date, command, left_out: names of works."""
    head = HEAD.format(
        quick=QUICK if run["quick"] else "", flag=" --quick" if run["quick"] else "", command=run["command"],
        date=run["date"], threads=machine["threads"],
    )  # fmt: skip
    left_out = ", ".join(f"`{name}`" for name in run["left_out"])
    said = [f"Left out of this run: {left_out}.\n"] if left_out else []
    parts = [head, *said, summary(tables), *(section(table) for table in tables)]
    parts += [f"## {name}\n\nNot measured: {why}\n" for name, why in failed.items()]
    return "\n".join([*parts, machine_section(machine)])


def summary(tables: Sequence[Table]) -> str:
    """In which works another one is better than segkit, in time, memory or quality: said before anything else."""
    lines = [f"- {table.title}: {text}." for table in tables for text in where_others_win(table)]
    if not lines:
        return "In no table another one was faster, smaller or better.\n"
    return "Where another one was faster, smaller or better:\n\n" + "\n".join(lines) + "\n"


def where_others_win(table: Table) -> list[str]:
    """A sentence for each peer that beats segkit: the table's first row of segkit in time and memory; in score, and in
    memory where models are scored, the last one above the peer, which had the same budget."""
    ours, said = next((row for row in table.rows if row.kind == "segkit"), None), []
    for row in table.rows:
        if row.kind == "segkit" and row.score is not None:
            ours = row
        if ours is None or row.kind != "peer":
            continue
        if row.times is not None and row.times < 1:
            said.append(f"{row.side} takes {row.times:.2f} times as long as segkit")
        if row.peak_mb and ours.peak_mb and row.peak_mb < ours.peak_mb:
            said.append(f"{row.side} needs {row.peak_mb:,} MB, {ours.side} {ours.peak_mb:,}")
        if row.score is not None and ours.score is not None and row.score > ours.score:
            said.append(f"{row.side} reaches {row.score:.3f}, {ours.side} {ours.score:.3f}")
    return said


def section(table: Table) -> str:
    """A work: what was done, its rows, what else was seen."""
    scored, on_device = (any(getattr(row, name) is not None for row in table.rows) for name in ("score", "device_mb"))
    timed = any(row.times is not None for row in table.rows)
    columns = ["", "ms" if table.unit == "ms" else "seconds"]
    columns += ["times segkit"] * timed + ["macro Dice"] * scored + ["peak MB"] + ["GPU MB"] * on_device + [""]
    lines = [f"## {table.title}", "", f"`{table.name}`. {table.what}", ""]
    lines += markdown([columns]) if table.rows else []
    for row in table.rows:
        cells = [_name(row), number(row.seconds, 1000 if table.unit == "ms" else 1)]
        cells += [number(row.times)] * timed + ["" if row.score is None else f"{row.score:.3f}"] * scored
        cells += ["" if row.peak_mb is None else f"{row.peak_mb:,}"]
        cells += ["" if row.device_mb is None else f"{row.device_mb:,}"] * on_device
        lines += markdown([[*cells, row.notes]])[:1]
    if table.grid:
        lines += [*[""] * bool(table.rows), *markdown(table.grid)]
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes), *[""] * bool(table.notes)])


def _name(row: Row) -> str:
    return {"segkit": f"**{row.side}**", "floor": f"*floor: {row.side}*"}.get(row.kind, row.side)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head; of one row alone that row, and the line under a head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def number(value: float | None, factor: float = 1) -> str:
    """Three digits that count; empty where there is none."""
    if value is None:
        return ""
    value *= factor
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 0.01 else f"{value:.3f}" if value < 1 else f"{value:.3g}"


def machine_section(machine: Mapping) -> str:
    rates, git = machine["rates"], machine["git"]
    commit = f"{git['commit'][:12]}{', with changes' if git['changed'] else ''}" if git else "not a clone"

    def listed(versions: Mapping) -> str:
        return ", ".join(f"{name} {version}" for name, version in versions.items() if version)

    rows = [
        ["machine", ""],
        ["processor", f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"],
        ["device", machine["device"]],
        ["system", machine["system"]],
        ["at most", f"(best of five tries) {rates['matrix_gflops']:,} GFLOP/s of matrices, "
                    f"{rates['memory_gb_s']} GB/s copied in memory, "
                    f"{rates['gunzip_mb_s']:,} MB/s unpacked by isal"],
        ["segkit", f"commit {commit}; {listed(machine['versions'])}"],
        ["peers", listed(machine["peers"]) or "no environment of their own; what is installed with segkit"],
    ]  # fmt: skip
    return "## Machine and versions\n\n" + "\n".join(markdown(rows)) + "\n"
