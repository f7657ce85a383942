"""Formats the record as Markdown."""

import math


def render(values):
    """Formats the page; `values` are those of `running.Record`."""
    device, jobs = values["device"], values["jobs"]
    lines = [f"# {device.get('name', 'An unknown device')}", ""]
    if device:
        versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
        memory = f"{device['memory'] / 1e9:.1f} GB for arrays, " if device["memory"] else ""
        lines += [
            f"{memory}{device['matmul_peak'] / 1e12:.4g} TFLOP/s in a product of large bfloat16 "
            f"matrices, {device['processors']} processor cores; {versions}.",
            "",
        ]
    for title, part in (
        ("Attention", _attention),
        ("Steps", _steps),
        ("At step 0", _at_start),
        ("Sampling", _sampling),
    ):
        table = list(part(jobs))
        if len(table) > 2:  # More than the header.
            lines += [f"## {title}", "", *table, ""]
    errors = [
        f"- {name}: {job['status']} after {job['seconds']:.0f} s: {job['error']}"
        for name, job in jobs.items()
        if job.get("error")
    ]
    return "\n".join(lines + (["## Unfinished jobs", "", *errors, ""] if errors else []))


def _row(*cells):
    return "| " + " | ".join(cells) + " |"


def _head(*cells):
    return [_row(*cells), _row(*["---"] * len(cells))]


def _rows(jobs, part):
    """Yields (job name, settings, row) for all rows of the jobs of some parts."""
    for name, job in jobs.items():
        if job["part"] in part:
            yield from ((name, job["settings"], row) for row in job["rows"])


def _figure(value, form=".3g"):
    return "" if value is None else format(value, form)


def _attention(jobs):
    yield from _head(
        "network",
        "queries x keys, heads x channels",
        "use",
        "kernel",
        "ours, ms",
        "XLA, ms",
        "XLA / ours",
        "cuDNN, ms",
        "our error",
        "XLA's error",
        "our gradients' error",
        "XLA's gradients' error",
    )
    for _, _, row in _rows(jobs, ("attention",)):
        times, forward, gradient = (
            row[name] for name in ("milliseconds", "forward_error", "gradient_error")
        )
        kind = ", causal" * row["causal"] + ", masked" * row["masked"]
        cudnn = _figure(times.get("cudnn")) or ("failed" if "cudnn" in row["refused"] else "")
        yield _row(
            row["network"],
            f"{row['queries']} x {row['keys']}, {row['heads']} x {row['head_dim']}{kind}",
            row["use"],
            row["kernel"],
            _figure(times.get("ours")) or f"failed: {row['refused'].get('ours')}",
            _figure(times.get("plain")),
            _figure(row.get("ratio"), ".2f"),
            cudnn,
            *(
                _figure(errors.get(name), ".1e")
                for errors in (forward, gradient)
                for name in ("ours", "plain")
            ),
        )


def _case(name, settings):
    return (
        f"{name}: {settings['trainable']}, {settings['objective']}, {settings['dtype']}, "
        f"{settings['resolution']} px, {settings['batch']} pair{'s' * (settings['batch'] > 1)}, "
        f"remat {'on' if settings['remat'] else 'off'}, "
        f"blocks {'looped' if settings['scan_layers'] else 'unrolled'}"
    )


def _steps(jobs):
    yield from _head(
        "case",
        "side",
        "median step, s (quartiles)",
        "pairs/s",
        "fraction of peak",
        "times ours (quartiles)",
        "largest loss difference",
        "memory, GB",
        "planned, GB",
        "compilation, s",
    )
    for name, settings, row in _rows(jobs, ("step", "variants")):
        if row.get("error") or row.get("fits") is False:
            message = row.get("error") or (
                f"does not fit: {row['planned']['peak'] / 1e9:.1f} GB of {row['room'] / 1e9:.1f}"
            )
            yield _row(_case(name, settings), row["side"], message, *[""] * 7)
            continue
        low, high = row["quartiles"]
        ratio = (
            ""
            if "ratio" not in row
            else "{:.2f} ({:.2f} to {:.2f})".format(row["ratio"], *row["ratio_quartiles"])
        )
        yield _row(
            _case(name, settings),
            row["side"],
            f"{row['seconds']:.4g} ({low:.4g} to {high:.4g})",
            _figure(settings["batch"] / row["seconds"]),
            _figure(row.get("share_of_peak"), ".1%"),
            ratio,
            _losses(row),
            f"{row['memory'] / 1e9:.2f}",
            f"{row['planned']['peak'] / 1e9:.2f}" if "planned" in row else "",
            _figure(row.get("compile_seconds"), ".0f"),
        )


def _losses(row):
    if not all(map(math.isfinite, row["losses"])):
        return "NOT finite"
    return _figure(row.get("losses_apart"), ".1e")


def _at_start(jobs):
    """Differences between policy and reference with equal parameters, which should be zero."""
    yield from _head(
        "case",
        "largest difference of the error maps",
        "reference error",
        "margin",
        "beta / 2 * margin, beta 5000",
    )
    for name, settings, row in _rows(jobs, ("step", "variants")):
        values_at_start = row.get("at_start", {})
        if "error_map_difference" in values_at_start:
            yield _row(
                _case(name, settings),
                *(
                    _figure(values_at_start[kind], form)
                    for kind, form in (
                        ("error_map_difference", ".2e"),
                        ("reference_error", ".3g"),
                        ("margin", ".2e"),
                        ("half_beta_margin", ".2e"),
                    )
                ),
            )


def _sampling(jobs):
    yield from _head(
        "case",
        "program",
        "seconds",
        "held, GB",
        "temporaries, GB",
        "peak of the process, GB",
        "compilation, s",
    )
    for name, settings, row in _rows(jobs, ("sampling",)):
        case = (
            f"{name}: {settings['resolution']} px, {settings['steps']} DDIM steps, guidance "
            f"{settings['guidance']}"
        )
        finite = "" if row["finite"] else ", NOT finite"
        yield _row(
            case,
            row["what"] + finite,
            _figure(row["seconds"]),
            *(
                _figure(row[kind] and row[kind] / 1e9, ".2f")
                for kind in ("held", "temporaries", "memory")
            ),
            _figure(row["compile_seconds"], ".0f"),
        )
