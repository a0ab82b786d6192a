"""Draw what runs of treerpo.py logged: learning curves and the time split, several runs overlaid.

    python experiments/plot_run.py runs/A                        # writes runs/A/plot.png
    python experiments/plot_run.py runs/A runs/B --out both.svg

Needs matplotlib. Exit status: 0 drawn, 2 bad input.
"""
import argparse
import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# The palette of Okabe and Ito, which colour-blind people can tell apart, without its yellow (too
# faint on white). A marker for each colour keeps the runs apart in a grey print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
GREY = "#5d6673"
PALE_GREY = "#e3e6ea"
STYLE = {
    "axes.edgecolor": "#9aa3ae",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.color": PALE_GREY,
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
}

# One panel each: title, keys of metrics.jsonl, unit, limits of the y axis (None: as the data need).
SHARE = (-0.03, 1.03)
FROM_ZERO = (0, None)
FREE = (None, None)
CURVES = [
    ("Reward", ["reward"], "mean over the sampled trees", SHARE),
    ("Held-out accuracy", ["eval/accuracy", "eval/greedy_accuracy"], "", SHARE),
    ("Groups kept", ["groups_kept"], "share of all groups", SHARE),
    ("Entropy", ["entropy"], "nats per token", FROM_ZERO),
    ("KL to the reference", ["kl"], "nats per token", FROM_ZERO),
    ("Response length", ["completions/mean_length"], "tokens", FREE),
]
PHASES = ["time_sample", "time_score", "time_update"]
PHASE_COLOURS = {"time_sample": "#3f4a59", "time_score": "#d5dae0", "time_update": "#8d99a8"}
MANY_STEPS = 50  # from here on a running mean is drawn over the points of the single steps
LONGEST_NAME = 34


class BadInput(ValueError):
    """Something the user gave cannot work; the message names it and the fix. Exit status 2."""


# ------------------------------------------------------------------------------ reading
def read_metrics(folder: Path) -> list[dict]:
    """Rows of a run's metrics.jsonl, one a step. A half-written last line is left out.

    Raises BadInput if the folder is no run's or a line is no step.
    """
    path = folder / "metrics.jsonl"
    try:
        content = path.read_bytes()
    except OSError as error:
        hint = "give the output folder of a run, which holds metrics.jsonl"
        raise BadInput(f"{folder}: cannot read {path} ({error.strerror}); {hint}") from error
    rows = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n"):  # the run is writing it at this moment, or was killed
                print(f"{path}: line {number} is not complete and is left out", file=sys.stderr)
                break
            raise BadInput(f"{path} line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or to_number(row.get("step")) is None:
            raise BadInput(f'{path} line {number}: no metrics of a step (no number under "step")')
        rows.append(row)
    if not rows:
        raise BadInput(f"{path}: it has no line yet; wait for the first step of the run")
    return rows


def to_number(value: object) -> float | None:
    """The value if it is a finite number, else None: null, NaN, infinite, text, true."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and abs(value) < 1e300:
        return value
    return None


def series(rows: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, without the rows that do not have it."""
    steps = []
    values = []
    for row in rows:
        value = to_number(row.get(key))
        if value is not None:
            steps.append(row["step"])
            values.append(value)
    return steps, values


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of the values up to window // 2 places away; fewer at the ends."""
    reach = window // 2
    means = []
    for i in range(len(values)):
        first = max(0, i - reach)
        near = values[first:i + reach + 1]
        means.append(sum(near) / len(near))
    return means


def run_names(folders: list[Path]) -> list[str]:
    """What the legend calls each run: the folder's name, or its whole path if names repeat."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    shown = []
    for name in names:
        if len(name) > LONGEST_NAME:
            name = "…" + name[1 - LONGEST_NAME:]
        name = name.encode("utf-8", "replace").decode()  # a file name need not be valid Unicode
        shown.append(name.replace("$", r"\$"))  # a dollar would start a formula
    return shown


# ------------------------------------------------------------------------------ drawing
def look_of(number: int) -> dict:
    """Colour and marker of a run's curves, by its place on the command line."""
    place = number % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKERS[place]}


def explain_empty(axes: Axes, keys: list[str]) -> None:
    """An empty panel that says why it is empty."""
    reason = "not logged:\nno " + "\nor ".join(keys) + "\nin metrics.jsonl"
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, color=GREY, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(PALE_GREY)


def draw_series(axes: Axes, steps: list[float], values: list[float], look: dict) -> None:
    """One curve; a long one as faint points below its running mean."""
    if len(values) < MANY_STEPS:
        markevery = max(1, len(values) // 12)
        axes.plot(steps, values, linewidth=1.6, markersize=4.5, markevery=markevery, **look)
        return
    window = len(values) // 20
    colour = look["color"]
    axes.plot(steps, values, ".", color=colour, markersize=2.5, alpha=0.3)
    means = running_mean(values, window)
    markevery = len(values) // 8
    axes.plot(steps, means, linewidth=1.8, markersize=4.5, markevery=markevery, **look)


def draw_curves(axes: Axes, runs: list[list[dict]], panel: tuple) -> None:
    """One panel of curves over steps. The second key is drawn dotted, with hollow markers."""
    title, keys, unit, limits = panel
    axes.set_title(title)
    missing = []
    for number, rows in enumerate(runs):
        if not any(series(rows, key)[1] for key in keys):
            missing.append(str(number + 1))
        for key in keys:
            steps, values = series(rows, key)
            look = look_of(number)
            if key != keys[0]:
                look["linestyle"] = ":"
                look["markerfacecolor"] = "white"
            draw_series(axes, steps, values, look)
    if len(missing) == len(runs):
        explain_empty(axes, keys)
        return
    if missing:
        note = "not logged by run " + ", ".join(missing)
        axes.set_title(note, loc="right", fontsize=8, fontweight="normal", color=GREY)
    axes.set_xlabel("step", color=GREY)
    axes.set_ylabel(unit, color=GREY)
    axes.margins(x=0.03, y=0.12)
    axes.set_ylim(*limits)
    if len(keys) > 1:
        average = Line2D([], [], color=GREY, marker="o", label="average of samples")
        greedy = Line2D([], [], color=GREY, marker="o", markerfacecolor="white", linestyle=":",
                        label="greedy")
        axes.legend(handles=[average, greedy], loc="lower right", fontsize=8)


def draw_time_split(axes: Axes, runs: list[list[dict]]) -> None:
    """One bar a run: mean seconds of a step spent on sampling, verifying and updating."""
    axes.set_title("Time of a step")
    widest = 0
    for number, rows in enumerate(runs):
        left = 0
        for phase in PHASES:
            _, seconds = series(rows, phase)
            if not seconds:
                continue
            mean = sum(seconds) / len(seconds)
            axes.barh(number, mean, left=left, height=0.6, color=PHASE_COLOURS[phase])
            left += mean
        widest = max(widest, left)
        if left > 0:
            axes.text(left, number, f" {left:.3g} s", va="center", color=GREY)
    if widest == 0:
        explain_empty(axes, PHASES)
        return
    for phase in PHASES:
        axes.bar(0, 0, color=PHASE_COLOURS[phase], label=phase.removeprefix("time_"))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=8)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, widest * 1.3)
    places = max(3, len(runs))  # a single bar would fill the whole panel
    axes.set_ylim(places - 0.4, -0.6)  # the first run on top
    axes.set_xlabel("mean seconds", color=GREY)
    numbers = [str(place + 1) for place in range(len(runs))]
    axes.set_yticks(range(len(runs)), numbers)
    for number, label in enumerate(axes.get_yticklabels()):
        label.set_color(look_of(number)["color"])
        label.set_fontweight("bold")


def draw_legend(axes: Axes, runs: list[list[dict]], names: list[str]) -> None:
    """The last cell: which colour is which run, and how to read the curves."""
    axes.axis("off")
    handles = []
    for number, rows in enumerate(runs):
        label = f"{number + 1}  {names[number]}\n    {rows[-1]['step']:g} steps"
        handles.append(Line2D([], [], linewidth=2, label=label, **look_of(number)))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.05, 1.05), fontsize=9)
    if max(len(rows) for rows in runs) >= MANY_STEPS:
        note = "points: single steps\nlines: running means"
        axes.text(0, 0, note, transform=axes.transAxes, color=GREY, fontsize=8)


def draw_figure(runs: list[list[dict]], names: list[str]) -> Figure:
    """The whole picture: six panels of curves, the time split and the legend.

    runs: one list of metrics rows for each run; names: what the legend calls them.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(14, 6.6), layout="constrained")
        grid = figure.subplots(2, 4)
        cells = list(grid.flat)
        curve_cells = cells[0:3] + cells[4:7]
        for axes, panel in zip(curve_cells, CURVES):
            draw_curves(axes, runs, panel)
        draw_legend(cells[3], runs, names)
        draw_time_split(cells[7], runs)
    return figure


def save_figure(figure: Figure, out: Path) -> None:
    """Write the picture in the format its name ends in. Raises BadInput if that cannot be done."""
    try:
        with rc_context(STYLE):
            figure.savefig(out, dpi=150, facecolor="white")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot write there ({error.strerror})") from error


# ------------------------------------------------------------------------------ command line
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; its errors, too, end with exit status 2."""
    parser = argparse.ArgumentParser("plot_run.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder of a run")
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="picture to write, .png or .svg (default: plot.png in the first RUN)")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = args.runs[0] / "plot.png"
    if args.out.suffix.lower() not in (".png", ".svg"):
        parser.error(f"--out {args.out}: the name must end in .png or .svg")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        runs = [read_metrics(folder) for folder in args.runs]
        figure = draw_figure(runs, run_names(args.runs))
        save_figure(figure, args.out)
    except BadInput as error:
        print(f"plot_run.py: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
