"""A plan's memory as a picture."""

import dataclasses
from pathlib import Path

from vikhr_t5.dry_run import optimizer_text
from vikhr_t5.errors import UserError
from vikhr_t5.files import atomic_path
from vikhr_t5.plan_report import GIB, Report
from vikhr_t5.progress import human


def chart(shown: Report, path: Path) -> None:
    """Memory of one device by part: as given, the best, and the alternatives; a line at what can be used.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--chart needs matplotlib: pip install 'vikhr-t5[chart]'") from error
    plan = shown.plan
    bars = [("as given", plan.given)] if plan.given else []
    bars += [("best", plan.best)] if plan.best and plan.best is not plan.given else []
    bars += [(f"{optimizer_text(c.optimizer)}\n{c.param_dtype} parameters", c.fit) for c in plan.choices]
    places = range(len(bars))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vikhr-t5", "font.size": 9}):
        figure = Figure(figsize=(9, 0.5 * len(bars) + 1.4), dpi=110, layout="constrained")
        axes = figure.subplots()
        left = [0.0] * len(bars)
        for part in dataclasses.fields(bars[0][1].memory):
            sizes = [getattr(fit.memory, part.name) / GIB for _, fit in bars]
            axes.barh(places, sizes, left=left, label=part.name, height=0.7)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        compiled = [(fit.compiled.peak / GIB, place) for place, (_, fit) in enumerate(bars) if fit.compiled]
        if compiled:
            axes.plot(*zip(*compiled, strict=True), "k|", markersize=20, markeredgewidth=2, label="by the compiler")
        axes.axvline(shown.usable.bytes / GIB, color="black", linestyle="--", linewidth=1, label="can be used")
        axes.set_yticks(places, [name for name, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("GiB on one device")
        parameters = human(shown.arguments["model"].config.param_count())
        axes.set_title(f"{parameters} parameters on {shown.devices}", loc="left")
        figure.legend(loc="outside lower center", ncols=7, frameon=False, fontsize=8)
        try:
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=path.suffix[1:])
        except OSError as error:
            raise UserError(f"--chart {path}: {error.strerror}") from error
