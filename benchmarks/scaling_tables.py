r"""The tables of docs/scaling.md: plans for machines that are not here, one command, resumable.

    python benchmarks/scaling_tables.py --rows gpus tpus chips --output=FOLDER
    python benchmarks/scaling_tables.py --rows gpus --machines h100 --trained adapter --output=FOLDER
    python benchmarks/scaling_tables.py --rows debug --output=FOLDER    # small sizes, to try the tool
    python benchmarks/scaling_tables.py --output=FOLDER                 # the tables of what is there

Every row is a plan by `python -m focusdpo_jax.plan --json`, kept in FOLDER under its arguments and the commit,
and is not made again there. Then the tables between the markers of docs/scaling.md are written from the rows
of that commit (`--commit` takes those of another one). SDXL's programs take minutes of a core each to compile:
gpus about 2 h, tpus 3 h, chips 4 h of a core; nothing is lost when it is stopped. `--prefix="nice -n 5"` is
put before each command.
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "scaling.md"
PROJECTION = "h94/IP-Adapter/sdxl_models/ip-adapter_sdxl_vit-h.safetensors"
# What is trained: the argument of configs/sdxl_dpo.py, and fields.
TRAINED = {
    "adapter": ("", {}),
    "projection": ("", {"model.adapter": PROJECTION}),
    "lora": ("lora", {}),
    "full": ("full", {}),
}
WORDS = {
    "adapter": "resampler adapter",
    "projection": "projection adapter",
    "lora": "LoRA",
    "full": "full",
}
# Of a step on TPUs the update alone is compiled; the reference pass is estimated in proportion to it.
STEP = "update"
# TPU programs with transformer blocks in a loop compile in about 10 minutes, unrolled in over an hour.
LOOPED = {"model.scan_layers": True}
VERSIONS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")


def _split(data, fsdp):
    return {"mesh.data": data, "mesh.fsdp": fsdp}


def rows(group):
    """[(machine, trained, arguments of `plan` besides --config and --topology as {name: value})]."""
    if group == "debug":
        return [
            ("h100", "debug", {"config.batch_size": 1, "programs": "update,encoding"}),
            ("v5e:2x2", "debug", {"programs": STEP}),
        ]
    if group == "gpus":
        # All programs of the adapter's run; for the others, the two of a step.
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
        found = []
        for machine, count, remat in (
            ("v5e:4x4", 16, True),
            ("v5p:2x2x1", 4, False),
            ("v6e:2x4", 8, True),
        ):
            for trained in ("adapter", "lora", "full"):
                narrow = machine == "v5e:4x4" and trained == "adapter"
                fsdp = count if trained == "full" else 4 if narrow else 1
                found.append(
                    (
                        machine,
                        trained,
                        _fields(
                            batch_size=count,
                            **LOOPED,
                            **{"model.remat": remat},
                            **_split(count // fsdp, fsdp),
                        )
                        | {"programs": STEP},
                    )
                )
        # One of them as a whole.
        return [
            *found,
            (
                "v5e:4x4",
                "lora",
                _fields(batch_size=16, **LOOPED, **{"model.remat": True}, **_split(16, 1)),
            ),
        ]
    shapes = {4: "2x2x1", 16: "2x2x4", 64: "4x4x4", 256: "4x8x8"}
    return [
        (
            f"v5p:{shape}",
            trained,
            _fields(
                batch_size=count, **LOOPED, **{"model.remat": False}, **_split(count // fsdp, fsdp)
            )
            | {"programs": STEP},
        )
        for count, shape in shapes.items()
        for trained in ("adapter", "lora", "full")
        for fsdp in sorted(
            {"full": {1, 4, min(count, 16)}, "adapter": {1, 4}, "lora": {1}}[trained]
        )
    ]


def _fields(**values):
    return {f"config.{name}": value for name, value in values.items()}


def command(machine, trained, arguments):
    """The command that plans a row."""
    argument, fields = TRAINED.get(trained, (trained, {}))
    config = "configs/sdxl_dpo.py" + (f":{argument}" if argument else "")
    return [
        sys.executable,
        "-m",
        "focusdpo_jax.plan",
        f"--config={config}",
        f"--topology={machine}",
        "--json",
        *(
            f"--{name}={value}"
            for name, value in ({f"config.{k}": v for k, v in fields.items()} | arguments).items()
        ),
    ]


def printed(line):
    """A command as people type it."""
    return shlex.join(["python", *line[1:]])


def commit() -> str:
    """The commit of the checkout, marked where what is planned has changes that are in none."""

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "focusdpo_jax", "configs")
    return git("rev-parse", "--short=10", "HEAD") + ("-changed" if changed else "")


def versions():
    """{package: version} of what compiles."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def path_of(folder: pathlib.Path, group, row, commit_hash):
    """Where a row is kept."""
    key = hashlib.sha256(json.dumps(command(*row)[2:]).encode()).hexdigest()[:8]
    return folder / f"{commit_hash}-{group}-{row[0].replace(':', '_')}-{row[1]}-{key}.json"


def make(path: pathlib.Path, row, prefix) -> None:
    """Plans a row and keeps it; says what went wrong otherwise."""
    line, start = command(*row), time.monotonic()
    print(printed(line), flush=True)
    run = subprocess.run([*prefix, *line], cwd=ROOT, capture_output=True, text=True)
    try:
        found = json.loads(run.stdout)
    except json.JSONDecodeError:
        print(f"  failed ({run.returncode}): {run.stderr.strip()[-600:]}", flush=True)
        return
    found |= {
        "command": printed(line),
        "versions": versions(),
        "row_seconds": time.monotonic() - start,
        "date": datetime.date.today().isoformat(),
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"  {gigabytes(found['bytes_per_chip']['peak'])} GB, fits: {found['fits']}, "
        f"{found['row_seconds']:.0f} s",
        flush=True,
    )


def gigabytes(size: float) -> str:
    """A number of bytes in a cell."""
    return f"{size / 1e9:.1f}"


def peak(program):
    """A program's peak in a cell, or what it needs at least where it was refused."""
    return (
        gigabytes(program["peak"])
        if program["peak"]
        else "> " + gigabytes(program["needs_at_least"] or program["held"])
    )


def cure_of(program):
    """What makes a program fit, in a cell."""
    if not program.get("cure"):
        return "nothing that was tried"
    return ", ".join(f"`{field} = {value}`" for field, value in program["cure"]["changes"].items())


def peaks_table(found):
    """Peaks of every program: rows of gpus."""
    names = list(dict.fromkeys(name for made in found for name in made["programs"]))
    lines = [
        "| machine | trained | encoders | "
        + " | ".join(f"{name}, GB" for name in names)
        + " | usable, GB | fits | what makes it fit |",
        "| --- " * (len(names) + 6) + "|",
    ]
    for made in found:
        cells = [peak(made["programs"][name]) if name in made["programs"] else "" for name in names]
        cured = "; ".join(
            f"{name}: {cure_of(program)}"
            for name, program in made["programs"].items()
            if program["fits"] is False
        )
        limit = made["bytes_per_chip"]["limit"]
        lines.append(
            f"| {made['chips']} x {made['chip'].removeprefix('NVIDIA ')} | {made['row'][1]} | "
            f"{'cached' if made['cache'] else 'held'} | "
            + " | ".join(cells)
            + f" | {gigabytes(limit)} | {'yes' if made['fits'] else 'no'} | {cured} |"
        )
    return lines


def step_table(found):
    """Memory, exchange and estimated time of a batch: rows of tpus and chips."""
    lines = [
        "| machine | chips | trained | split | remat | held, GB | peak, GB | of | exchanged a chip, GB | "
        "compute, s | links, s | pairs/s a chip | of the speed on paper | chip-hours for a million pairs |",
        "| --- " * 14 + "|",
    ]
    for made in found:
        update = made["programs"]["update"]
        told = sum(
            program.get("estimate", {}).get("bytes", 0)
            for program in made["programs"].values()
            if program["when"] == "of every batch"
        )
        links = made["seconds_links"] or 0
        compute = (
            made["seconds_per_batch"] - links if update.get("estimate", {}).get("seconds") else None
        )
        hours = campaign.cost(made, made["chips_per_host"])["chip_hours"] if compute else None
        mesh = (
            ", ".join(f"`{axis}` = {size}" for axis, size in made["mesh"].items() if size > 1)
            or "whole"
        )
        lines.append(
            "| "
            + " | ".join(
                [
                    made["topology"],
                    str(made["chips"]),
                    made["row"][1],
                    f"{mesh}; {made['batch_size']} pairs",
                    "on" if made["remat"] else "off",
                    gigabytes(update["held"]),
                    peak(update),
                    gigabytes(made["bytes_per_chip"]["limit"]),
                    f"{told / 1e9:.2f}",
                    *(
                        ["", "", "", "", ""]
                        if compute is None
                        else [
                            f"{compute:.3g}",
                            f"{links:.3g}",
                            f"{made['pairs_per_second'] / made['chips']:.3g}",
                            f"{made['model_flops_utilisation']:.0%}",
                            f"{hours:.0f}",
                        ]
                    ),
                ]
            )
            + " |"
        )
    return lines


TABLES = {"gpus": peaks_table, "tpus": step_table, "chips": step_table}


def write(found, document, commit_hash) -> None:
    """Puts the tables of rows ({group: list of plans}) between the markers of a document."""
    text = document.read_text()
    for group, made in found.items():
        if not made or group not in TABLES:
            continue
        stamp = ", ".join(f"{name} {version}" for name, version in made[0]["versions"].items())
        dates = sorted({each["date"] for each in made})
        lines = [
            *TABLES[group](made),
            "",
            f"Commit {commit_hash.replace('-changed', ' and uncommitted changes')}, {stamp}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}. Made by "
            f"`python benchmarks/scaling_tables.py --rows {group} --output=FOLDER`.",
        ]
        begin, end = f"<!-- {group}: begin -->", f"<!-- {group}: end -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{document} lacks the markers {begin} and {end}")
        before, rest = text.split(begin)
        text = before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    document.write_text(text)


def main() -> None:
    """Plans what is missing, then writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the rows")
    parser.add_argument("--rows", nargs="*", default=[], choices=["gpus", "tpus", "chips", "debug"])
    parser.add_argument("--machines", nargs="*", help="of these alone, such as h100 v5p:2x2x4")
    parser.add_argument("--trained", nargs="*", choices=[*TRAINED, "debug"])
    parser.add_argument(
        "--commit", help="take and make rows under this commit; default: the checkout's"
    )
    parser.add_argument("--prefix", default="", help="before each command")
    parser.add_argument("--document", type=pathlib.Path, default=DOCUMENT)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    commit_hash, found = arguments.commit or commit(), {}
    for group in (*TABLES, "debug"):
        found[group] = []
        for row in rows(group):
            path = path_of(arguments.output, group, row, commit_hash)
            wanted = (
                group in arguments.rows
                and (not arguments.machines or row[0] in arguments.machines)
                and (not arguments.trained or row[1] in arguments.trained)
            )
            if wanted and not path.exists():
                make(path, row, shlex.split(arguments.prefix))
            if path.exists():
                trained = WORDS.get(row[1], row[1])
                found[group].append(json.loads(path.read_text()) | {"row": (row[0], trained)})
    write(found, arguments.document, commit_hash)
    for group, made in found.items():
        print(f"{group}: {len(made)} of {len(rows(group))} rows")


if __name__ == "__main__":
    main()
