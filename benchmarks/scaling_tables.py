r"""Writes the tables of docs/scaling.md from plans for GPUs and TPUs; resumable.

    python benchmarks/scaling_tables.py --rows gpus tpus before chips --output=FOLDER
    python benchmarks/scaling_tables.py --rows gpus --machines h100 --trained adapter \
        --output=FOLDER
    python benchmarks/scaling_tables.py --rows debug --output=FOLDER  # small sizes, for a test
    python benchmarks/scaling_tables.py                               # only writes the tables

Each row is a plan by `python -m focusdpo_jax.plan --json`. It is stored in FOLDER (by default
`benchmarks/plans`) under its arguments and its commit, the last one that changed the package or the
configurations, and is reused if it exists. The tables between the markers of docs/scaling.md are
then written from the rows of that commit. `--commit` selects another, or several: a row is then
read from the first commit that has it. (Use this if the later commit does not change the row's
program.) The rows of `before` are the updates of `tpus` at an earlier commit
(`benchmarks/plan_at_commit.py`); their table compares the two.

A row of SDXL takes 15 to 60 minutes of a core. After an interruption, finished rows are kept.
`--prefix="nice -n 5"` is prepended to each command.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import shlex
import subprocess
import sys
import time

from focusdpo_jax.planning import campaign
from focusdpo_jax.profiling import chips

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"
PLANS = ROOT / "benchmarks" / "plans"
PROJECTION = "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl_vit-h.safetensors"
# Trained parameters: (argument of configs/sdxl_dpo.py, fields).
TRAINED = {
    "adapter": ("", {}),
    "projection": ("", {"model.adapter": PROJECTION}),
    "lora": ("lora", {}),
    "full": ("full", {}),
}
LABELS = {
    "adapter": "resampler adapter",
    "projection": "projection adapter",
    "lora": "LoRA",
    "full": "full",
}
# On TPUs only the update is compiled; the reference pass is estimated in proportion to it.
STEP = "update"
# With remat, blocks in a loop; without, unrolled, which then compile in the same time.
LOOPED = {"model.scan_layers": True}
UNROLLED = {"model.scan_layers": False}
# The adapter's update without remat fits in the memory of v5e only with these.
CACHED = {"data.cache": True, "accumulate": 1}
# The last commit before convolutions by taps, and all else that docs/performance.md lists for TPUs.
EARLIER = "f545188"
COMPARED = ("v5e:4x4", "v6e:2x4")
WHOLE_RUN = ("v5e:4x4", "lora")
VERSIONS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")


def _split(data, fsdp):
    return {"mesh.data": data, "mesh.fsdp": fsdp}


def rows(group):
    """Rows of a group: [(machine, trained, arguments of `plan`, {name: value})].

    The arguments exclude --config and --topology. Rows of an earlier commit have it as a fourth
    element.
    """
    if group == "debug":
        return [
            ("h100", "debug", {"config.batch_size": 1, "programs": "update,encoding"}),
            ("v5e:2x2", "debug", {"programs": STEP}),
        ]
    if group == "gpus":
        # All programs for the adapter, the two programs of a step for the others.
        return [
            (
                machine,
                trained,
                {"config.batch_size": 1}
                | ({} if trained == "adapter" else {"programs": "update,reference pass"}),
            )
            for machine in ("h100", "rtx4090")
            for trained in TRAINED
        ]
    if group == "tpus":
        # The update, and for one run all of its programs.
        return [
            (
                machine,
                trained,
                arguments | ({} if (machine, trained) == WHOLE_RUN else {"programs": STEP}),
            )
            for machine, trained, arguments in _updates()
        ]
    if group == "before":
        # The earlier code always runs blocks in a loop.
        return [(*update, EARLIER) for update in _updates(loops=False) if update[0] in COMPARED]
    # One split for each kind of training: data parallelism as far as the optimiser's state allows.
    shapes = {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}
    return [
        (
            f"v5p:{shape}",
            trained,
            _fields(
                batch_size=count,
                **UNROLLED,
                **{"model.remat": False},
                **_split(count // fsdp, fsdp),
                # The configuration has 256 pairs, and accumulates over 4 batches.
                **({"data.train_size": 4 * count} if 4 * count > 256 else {}),
            )
            | {"programs": STEP},
        )
        for count, shape in shapes.items()
        for trained, fsdp in (("adapter", 1), ("lora", 1), ("full", min(count, 16)))
    ]


def _updates(loops=True):
    """Updates on TPU slices with one pair per chip: [(machine, trained, arguments)].

    Args:
      loops: whether to set `model.scan_layers`.
    """
    return [
        (
            machine,
            trained,
            _fields(
                batch_size=count,
                **((LOOPED if remat else UNROLLED) if loops else {}),
                **{"model.remat": remat},
                **_split(count // fsdp, fsdp),
                **(CACHED if machine == "v5e:2x2" else {}),
            ),
        )
        for machine, count, trained, fsdp, remat in (
            ("v5e:2x2", 4, "adapter", 4, False),
            ("v5e:4x4", 16, "adapter", 4, True),
            ("v5e:4x4", 16, "lora", 1, True),
            ("v5e:4x4", 16, "full", 16, True),
            ("v6e:2x4", 8, "adapter", 4, False),
            ("v6e:2x4", 8, "lora", 1, False),
            ("v6e:2x4", 8, "full", 8, True),
        )
    ]


def _fields(**values):
    return {f"config.{name}": value for name, value in values.items()}


def command(machine, trained, arguments, earlier=None):
    """The command that plans a row, at an earlier commit if one is given."""
    argument, fields = TRAINED.get(trained, (trained, {}))
    config = "configs/sdxl_dpo.py" + (f":{argument}" if argument else "")
    return [
        sys.executable,
        *(
            ["benchmarks/plan_at_commit.py", f"--commit={earlier}", "--"]
            if earlier
            else ["-m", "focusdpo_jax.plan"]
        ),
        f"--config={config}",
        f"--topology={machine}",
        *([] if earlier else ["--json"]),
        *(
            f"--{name}={value}"
            for name, value in ({f"config.{k}": v for k, v in fields.items()} | arguments).items()
        ),
    ]


def printed(line):
    """A command as shell text."""
    return shlex.join(["python", *line[1:]])


def commit() -> str:
    """The last commit that changed planned code, with "-changed" if it has uncommitted changes."""
    planned = ("--", "focusdpo_jax", "configs")

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", *planned)
    last = git("log", "-1", "--abbrev=10", "--format=%h", *planned)
    return last + ("-changed" if changed else "")


def versions():
    """Versions of the compilers and of jax, {package: version}."""
    installed = {}
    for name in VERSIONS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def path_of(folder: pathlib.Path, group, row, commit_hash):
    """File of a row."""
    key = hashlib.sha256(json.dumps(command(*row)[2:]).encode()).hexdigest()[:8]
    commit_hash = row[3] if len(row) > 3 else commit_hash
    return folder / f"{commit_hash}-{group}-{row[0].replace(':', '_')}-{row[1]}-{key}.json"


def make(path: pathlib.Path, row, prefix) -> None:
    """Plans a row and writes its file; prints the error if planning fails."""
    line, start = command(*row), time.monotonic()
    print(printed(line), flush=True)
    run = subprocess.run([*prefix, *line], cwd=ROOT, capture_output=True, text=True)
    try:
        plan = json.loads(run.stdout)
    except json.JSONDecodeError:
        print(f"  failed ({run.returncode}): {run.stderr.strip()[-600:]}", flush=True)
        return
    plan |= {
        "command": printed(line),
        "versions": versions(),
        "row_seconds": time.monotonic() - start,
        "date": datetime.date.today().isoformat(),
    }
    path.write_text(json.dumps(plan, indent=1) + "\n")
    print(
        f"  {gigabytes(plan['bytes_per_chip']['peak'])} GB, fits: {plan['fits']}, "
        f"{plan['row_seconds']:.0f} s",
        flush=True,
    )


def gigabytes(size: float) -> str:
    """Formats bytes as GB."""
    return f"{size / 1e9:.1f}"


def peak(program):
    """Formats a program's peak memory, or a lower bound if the compiler rejected it."""
    return (
        gigabytes(program["peak"])
        if program["peak"]
        else "> " + gigabytes(program["needs_at_least"] or program["held"])
    )


def fix_of(program):
    """Formats the fields that make a program fit."""
    if not program.get("cure"):
        return "nothing that was tried"
    return ", ".join(f"`{field} = {value}`" for field, value in program["cure"]["changes"].items())


def peaks_table(plans):
    """Table of the peak memory of every program, for gpus."""
    names = list(dict.fromkeys(name for plan in plans for name in plan["programs"]))
    lines = [
        "| machine | trained | encoders | "
        + " | ".join(f"{name}, GB" for name in names)
        + " | usable, GB | fits | what makes it fit |",
        "| --- " * (len(names) + 6) + "|",
    ]
    for plan in plans:
        cells = [peak(plan["programs"][name]) if name in plan["programs"] else "" for name in names]
        fixes = "; ".join(
            f"{name}: {fix_of(program)}"
            for name, program in plan["programs"].items()
            if program["fits"] is False
        )
        limit = plan["bytes_per_chip"]["limit"]
        lines.append(
            f"| {plan['chips']} x {plan['chip'].removeprefix('NVIDIA ')} | {plan['row'][1]} | "
            f"{'cached' if plan['cache'] else 'held'} | "
            + " | ".join(cells)
            + f" | {gigabytes(limit)} | {'yes' if plan['fits'] else 'no'} | {fixes} |"
        )
    return lines


def step_table(plans):
    """Table of memory, exchanged bytes and estimated time of a batch, for tpus and chips."""
    lines = [
        "| machine | chips | trained | split | remat | blocks | held, GB | peak, GB | usable, GB "
        "| exchanged per chip, GB | compute, s | links, s | pairs/s per chip | utilisation "
        "| chip-hours for a million pairs |",
        "| --- " * 15 + "|",
    ]
    for plan in plans:
        update = plan["programs"]["update"]
        exchanged = sum(
            program.get("estimate", {}).get("bytes", 0)
            for program in plan["programs"].values()
            if program["when"] == "of every batch"
        )
        links = plan["seconds_links"] or 0
        compute = (
            plan["seconds_per_batch"] - links if update.get("estimate", {}).get("seconds") else None
        )
        hours = campaign.cost(plan, plan["chips_per_host"])["chip_hours"] if compute else None
        lines.append(
            "| "
            + " | ".join(
                [
                    plan["topology"],
                    str(plan["chips"]),
                    plan["row"][1],
                    split_of(plan),
                    "on" if plan["remat"] else "off",
                    blocks_of(plan),
                    gigabytes(update["held"]),
                    peak(update),
                    gigabytes(plan["bytes_per_chip"]["limit"]),
                    f"{exchanged / 1e9:.2f}",
                    *(
                        ["", "", "", "", ""]
                        if compute is None
                        else [
                            f"{compute:.3g}",
                            f"{links:.3g}",
                            f"{plan['pairs_per_second'] / plan['chips']:.3g}",
                            f"{plan['model_flops_utilisation']:.0%}",
                            f"{hours:.0f}",
                        ]
                    ),
                ]
            )
            + " |"
        )
    return lines


def slices_table(plans):
    """Table of the steps on TPU slices, and one of the peaks of the rows that plan a whole run."""
    whole = [plan for plan in plans if len(plan["programs"]) > 1]
    return step_table(plans) + (["", *peaks_table(whole)] if whole else [])


def comparison_table(plans):
    """Table of the estimated time of the update at the earlier commit and, in "now", at this one."""
    lines = [
        f"| machine | trained | split | remat | blocks now | before ({EARLIER}), s | now, s "
        "| now / before | of peak before | of peak now |",
        "| --- " * 10 + "|",
    ]
    for plan in plans:
        machine, trained = plan["row"]
        estimates = plan["estimate"], plan["now"]["programs"]["update"]["estimate"]
        peak_flops = chips.TPUS[machine.partition(":")[0]].flops
        before, now = (each["seconds"] for each in estimates)
        shares = [each["matmul_flops"] / each["seconds"] / peak_flops for each in estimates]
        lines.append(
            f"| {machine} | {trained} | {split_of(plan)} | {'on' if plan['remat'] else 'off'} | "
            f"{blocks_of(plan['now'])} | {before:.3g} | {now:.3g} | {now / before:.2f} | "
            f"{shares[0]:.0%} | {shares[1]:.0%} |"
        )
    return lines


def blocks_of(plan):
    """How the transformer blocks of a plan are compiled."""
    return "loop" if plan["looped"] else "unrolled"


def split_of(plan):
    """Formats the mesh and the batch size of a plan."""
    mesh = (
        ", ".join(f"`{axis}` = {size}" for axis, size in plan["mesh"].items() if size > 1)
        or "whole"
    )
    return f"{mesh}; {plan['batch_size']} pairs"


TABLES = {
    "gpus": peaks_table,
    "tpus": slices_table,
    "before": comparison_table,
    "chips": step_table,
}


def commits_of(plans) -> str:
    """Formats the commits of rows; if there are several, with the rows of each."""
    rows_by_commit: dict[str, list[str]] = {}
    for plan in plans:
        rows_by_commit.setdefault(plan["commit"], []).append(" ".join(plan["row"]))
    if len(rows_by_commit) == 1:
        text = f"Commit {next(iter(rows_by_commit))}"
    else:
        text = "Commits " + "; ".join(
            f"{commit} ({', '.join(names)})" for commit, names in rows_by_commit.items()
        )
    return text.replace("-changed", " and uncommitted changes")


def write(plans_by_group, document) -> None:
    """Writes the tables of {group: list of plans} between the markers of a document."""
    text = document.read_text()
    for group, plans in plans_by_group.items():
        if not plans or group not in TABLES:
            continue
        stamp = ", ".join(f"{name} {version}" for name, version in plans[0]["versions"].items())
        dates = sorted({plan["date"] for plan in plans})
        period = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        lines = [
            *TABLES[group](plans),
            "",
            f"{commits_of(plans)}, {stamp}; {period}. Made by "
            f"`python benchmarks/scaling_tables.py --rows {group} --output=FOLDER`.",
        ]
        begin, end = f"<!-- {group}: begin -->", f"<!-- {group}: end -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{document} lacks the markers {begin} and {end}")
        before, rest = text.split(begin)
        text = before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    document.write_text(text)


def main() -> None:
    """Plans the missing rows and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=PLANS, help="folder of the rows")
    parser.add_argument("--rows", nargs="*", default=[], choices=[*TABLES, "debug"])
    parser.add_argument(
        "--machines", nargs="*", help="machines to plan, such as h100 v5p:2x2x4; default: all"
    )
    parser.add_argument("--trained", nargs="*", choices=[*TRAINED, "debug"], help="default: all")
    parser.add_argument(
        "--commit",
        nargs="+",
        help="commits of the rows, the newest first; default: that of the checkout",
    )
    parser.add_argument("--prefix", default="", help="text before each command")
    parser.add_argument("--document", type=pathlib.Path, default=DOCUMENT)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    commits, plans = arguments.commit or [commit()], {}
    for group in (*TABLES, "debug"):
        plans[group] = []
        for row in rows(group):
            paths = {each: path_of(arguments.output, group, row, each) for each in commits}
            made_at = next((each for each in commits if paths[each].exists()), commits[0])
            path = paths[made_at]
            wanted = (
                group in arguments.rows
                and (not arguments.machines or row[0] in arguments.machines)
                and (not arguments.trained or row[1] in arguments.trained)
            )
            if wanted and not path.exists():
                make(path, row, shlex.split(arguments.prefix))
            if path.exists():
                trained = LABELS.get(row[1], row[1])
                plans[group].append(
                    json.loads(path.read_text())
                    | {
                        "row": (row[0], trained),
                        "commit": made_at,
                        "looped": row[2].get("config.model.scan_layers", False),
                    }
                )
    now = {plan["row"]: plan for plan in plans["tpus"]}
    plans["before"] = [
        plan | {"now": now[plan["row"]], "commit": now[plan["row"]]["commit"]}
        for plan in plans["before"]
        if plan["row"] in now
    ]
    write(plans, arguments.document)
    for group, made in plans.items():
        print(f"{group}: {len(made)} of {len(rows(group))} rows")


if __name__ == "__main__":
    main()
