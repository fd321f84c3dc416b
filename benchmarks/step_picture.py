"""The picture of docs/performance.md: seconds and memory of a step, beside the peers.

    python benchmarks/step_time.py --json > small.json
    python benchmarks/step_time.py --size base --batch_size 4 --json > base.json
    python benchmarks/t5x_step_time.py PATH_TO_T5X --json > t5x.json
    python benchmarks/step_picture.py small.json base.json t5x.json --picture docs/images/step-time.png

A file of `t5x_step_time.py` is known by its checkout's path; its own bars of ours are left out, as they stand there.
"""

import argparse
import json
from pathlib import Path
from typing import Any

NAMES = {"ours": "vikhr-t5", "theirs": "transformers", "compiled": "transformers, compiled"}
COLOURS = {"vikhr-t5": "#3f51b5", "transformers": "#9e9e9e", "transformers, compiled": "#bdbdbd", "t5x": "#c9a36a"}


def groups(files: list[Path]) -> dict[str, list[tuple[str, str, dict[str, Any]]]]:
    """Title of a panel -> (side, dtype, figures) of its bars."""
    panels: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for file in files:
        result = json.loads(file.read_text())
        for run in result["runs"]:
            shape = f"{result['size']}, batch {result['batch_size']}, {result['inputs']}/{result['targets']}"
            bars = panels.setdefault(f"{shape}, dropout {run['dropout_rate']:g}", [])
            for name, figures in run["sides"].items():
                side, dtype = name.split()
                if "t5x" not in result:
                    bars.append((NAMES[side], dtype, figures))
                elif side == "theirs":
                    bars.append(("t5x", dtype, figures))
    return panels


def draw(panels: dict[str, list[tuple[str, str, dict[str, Any]]]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    heights = [len(bars) + 1 for bars in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 2, figsize=(10, 0.34 * sum(heights) + 0.6), squeeze=False, height_ratios=heights, sharey="row"
    )
    for row, (title, bars) in zip(axes, panels.items(), strict=True):
        labels = [f"{side}, {dtype}" for side, dtype, _ in bars]
        colours = [COLOURS[side] for side, _, _ in bars]
        for axis, key, unit in zip(row, ("wall", "peak_gib"), ("s a step", "GiB"), strict=True):
            values = [figures[key] for _, _, figures in bars]
            drawn = axis.barh(labels, values, color=colours)
            axis.bar_label(drawn, [f"{value:.2f} {unit}" for value in values], padding=3, fontsize=8)
            axis.set_xlim(0, 1.25 * max(values))
            axis.set_xticks([])
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            axis.tick_params(labelsize=8)
        row[0].invert_yaxis()  # shared: once for both
        row[0].set_title(f"{title}: time", loc="left", fontsize=9)
        row[1].set_title("peak memory", loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/step-time.png"))
    options = parser.parse_args()
    draw(groups(options.results), options.picture)


if __name__ == "__main__":
    main()
