"""The study's tables (Markdown) and figures (SVG), from the lines of results/compare.jsonl.

    python experiments/report.py    # draw experiments/figures/*.svg again; compare.py --table prints

Every ± is half a 95 % confidence interval over seeds. Two arms are compared seed by seed: a seed has
the same questions, in the same order, for arms of the same batch size.
"""
import json
import math
import statistics
import tempfile
from pathlib import Path

import common

# Student's t for a 95 % interval, by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
# A colour, line and marker for each system; they differ in brightness too, for grey printing.
LOOKS = {
    "treerpo": ("#1b3a6b", "-", "o"),
    "grpo": ("#d9730d", "--", "s"),
    "gspo": ("#e3b23c", ":", "^"),
    "treeadv": ("#5fa39a", "-.", "D"),
}


# --------------------------------------------------------------------------------------- Statistics
def interval(values: list[float]) -> tuple[float, float]:
    """-> the mean, half the 95 % confidence interval of the mean (Student's t)."""
    mean = statistics.fmean(values)
    n = len(values)
    if n < 2:
        return mean, math.nan
    return mean, T95[n - 1] * statistics.stdev(values) / n**0.5


def difference(scores: dict[int, float], others: dict[int, float]) -> tuple[float, float]:
    """{seed: score} of two arms -> the interval of their difference, over the seeds of both."""
    seeds = sorted(scores.keys() & others.keys())
    return interval([scores[seed] - others[seed] for seed in seeds])


def read_at(line: dict, axis: str, x: float, what: str = "accuracy") -> float:
    """The height of a curve at x, by straight lines between its points; behind the last one, it."""
    xs = line[axis]
    ys = line[what]
    for i in range(1, len(xs)):
        if xs[i] >= x:
            share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
            return ys[i - 1] + share * (ys[i] - ys[i - 1])
    return ys[-1]


def mean_height(line: dict, tokens: float) -> float:
    """Of the curve up to so many tokens: how fast it rises, with less noise than its end."""
    places = [tokens * (i + 0.5) / 50 for i in range(50)]
    return statistics.fmean(read_at(line, "tokens", place) for place in places)


# ------------------------------------------------------------------------------------------ Tables
def cell(values: tuple[float, float], digits: int = 3, sign: str = "") -> str:
    mean, half = values
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run_table(groups: dict[str, list[dict]], reference: str) -> str:
    """A row an arm: its accuracy at equal tokens and its whole curve, against the reference."""
    every_line = [line for lines in groups.values() for line in lines]
    tokens = min(line["tokens"][-1] for line in every_line)
    ends = {}
    heights = {}
    for arm, lines in groups.items():
        ends[arm] = {line["seed"]: read_at(line, "tokens", tokens) for line in lines}
        heights[arm] = {line["seed"]: mean_height(line, tokens) for line in lines}
    rows = []
    for arm, lines in groups.items():
        end_gap = ""
        height_gap = ""
        if arm != reference:
            end_gap = cell(difference(ends[arm], ends[reference]), 3, "+")
            height_gap = cell(difference(heights[arm], heights[reference]), 3, "+")
        rows.append(
            [
                arm,
                f"{len(lines)}",
                f"{lines[0]['step'][-1]} × {lines[0]['questions_per_step']}",
                f"{lines[0]['lr']:g}",
                cell(interval(list(ends[arm].values()))),
                end_gap,
                cell(interval(list(heights[arm].values()))),
                height_gap,
                f"{statistics.fmean(line['accuracy_at_0.6'] for line in lines):.3f}",
                f"{statistics.fmean(line['length'][-1] for line in lines):.1f}",
                f"{statistics.fmean(line['cpu'][-1] for line in lines):.1f}",
            ]
        )
    head = [
        "", "seeds", "steps × questions", "lr", f"accuracy at {tokens / 1000:.0f}k tokens",
        f"minus {reference}", "mean of the curve", f"minus {reference}", "end, at T = 0.6",
        "answer tokens", "CPU s",
    ]
    base = statistics.fmean(line["accuracy"][0] for line in every_line)
    length = statistics.fmean(line["length"][0] for line in every_line)
    rows.append(["base", "", "0", "", f"{base:.3f}", "", "", "", "", f"{length:.1f}", ""])
    return table(head, rows)


def health_table(groups: dict[str, list[dict]]) -> str:
    """What the updates looked like: first and last fifth of the runs, means over seeds."""
    rows = []
    for arm, lines in groups.items():
        row = [arm]
        for name in ("groups_kept", "grad_norm", "entropy", "kl"):
            first = []
            last = []
            for line in lines:
                values = [value for value in line[name] if value is not None]
                fifth = max(1, len(values) // 5)
                first += values[:fifth]
                last += values[-fifth:]
            row.append(f"{statistics.fmean(first):.3g} to {statistics.fmean(last):.3g}")
        clipped = statistics.fmean(statistics.fmean(line["clip_ratio"]) for line in lines)
        row.append(f"{100 * clipped:.1f} %")
        row.append(f"{sum(line['skipped'] for line in lines)}")
        rows.append(row)
    head = [
        "", "groups kept", "gradient norm", "entropy", "KL", "clipped in the last mini-batch",
        "steps skipped",
    ]
    return table(head, rows)


def credit_arms(study: object) -> list[tuple[str, str, list[dict]]]:
    """-> (arm, rule of the advantage, lines of the results file)"""
    arms = {}
    for line in study.lines.values():
        if line["part"] == "credit":
            for rule in line["rules"]:
                arms.setdefault((line["arm"], rule), []).append(line)
    return [(arm, rule, lines) for (arm, rule), lines in arms.items()]


def credit_table(study: object) -> str:
    rows = []
    for arm, rule, lines in credit_arms(study):
        figures = [line["rules"][rule] for line in lines]
        tokens = statistics.fmean(line["tokens"] for line in lines)
        rows.append(
            [
                arm,
                rule,
                f"{len(lines)}",
                f"{lines[0]['questions']}",
                f"{tokens / 1000:.0f}k",
                cell(interval([figure["auc"] for figure in figures])),
                cell(interval([figure["auc_all"] for figure in figures])),
                f"{statistics.fmean(figure['silent'] for figure in figures):.0%}",
                f"{statistics.fmean(figure['noise'] for figure in figures):.0%}",
                f"{statistics.fmean(figure['decisive'] for figure in figures):.0f}",
            ]
        )
    head = [
        "", "advantage", "seeds", "questions", "tokens", "AUC, decisive lines", "AUC, all lines",
        "decisive lines without a signal", "lines behind an error with a signal", "decisive lines",
    ]
    return table(head, rows)


def tune_table(study: object) -> str:
    lines = [line for line in study.lines.values() if line["part"] == "tune"]
    rates = sorted({line["lr"] for line in lines})
    rows = []
    for arm in dict.fromkeys(line["arm"] for line in lines):
        row = [arm]
        for lr in rates:
            curves = [line["accuracy"] for line in study.of("tune", arm, lr)]
            halves = [statistics.fmean(curve[len(curve) // 2:]) for curve in curves]
            row.append(", ".join(f"{half:.3f}" for half in halves))
        rows.append(row)
    return table(["", *[f"lr {lr:g}" for lr in rates]], rows)


def groups_of(study: object, part: str) -> dict[str, list[dict]]:
    arms = dict.fromkeys(line["arm"] for line in study.lines.values() if line["part"] == part)
    return {arm: study.of(part, arm) for arm in arms}


def tables(study: object) -> str:
    """All tables of the parts that have lines."""
    texts = []
    parts = {line["part"] for line in study.lines.values()}
    if "credit" in parts:
        texts.append("**Credit of a line**\n\n" + credit_table(study))
    if "tune" in parts:
        texts.append(
            "**Learning rates**: mean of the curve's second half, two seeds\n\n" + tune_table(study)
        )
    if "curves" in parts:
        groups = groups_of(study, "curves")
        texts.append("**Four systems**\n\n" + run_table(groups, "grpo"))
        texts.append(health_table(groups))
    if "factors" in parts:
        groups = groups_of(study, "factors")
        wide = {arm: lines for arm, lines in groups.items() if arm.startswith("4 4 4")}
        others = {"default": study.of("curves", "treerpo")}
        others.update({arm: lines for arm, lines in groups.items() if arm not in wide})
        texts.append("**One factor at a time**\n\n" + run_table(others, "default"))
        texts.append(health_table(others))
        if wide:
            texts.append("**Tau in a 4 4 4 tree**\n\n" + run_table(wide, "4 4 4, tau 0.1"))
            texts.append(health_table(wide))
    hours = sum(line["cpu_total"] for line in study.lines.values()) / 3600
    texts.append(f"{len(study.lines)} jobs, {hours:.2f} CPU hours")
    return "\n\n".join(texts)


# ----------------------------------------------------------------------------------------- Figures
def new_figure(columns: int, width: float, height: float) -> tuple:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update(
        {
            "font.size": 9,
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "treerpo",  # the same drawing makes the same file
        }
    )
    return pyplot.subplots(1, columns, figsize=(width, height), sharey=True)


def save(figure: object, name: str) -> None:
    common.FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(common.FIGURES / name, bbox_inches="tight", metadata={"Date": None})


def draw_curves(study: object) -> None:
    """Held-out accuracy of the four systems against tokens and CPU seconds, with 95 % intervals."""
    figure, axes = new_figure(2, 8, 3)
    labels = {"tokens": "sampled tokens", "cpu": "CPU seconds of training"}
    for axis, key in zip(axes, labels):
        for system, (colour, style, marker) in LOOKS.items():
            lines = study.of("curves", system)
            if not lines:
                continue
            end = min(line[key][-1] for line in lines)
            xs = [end * i / 40 for i in range(41)]
            points = [interval([read_at(line, key, x) for line in lines]) for x in xs]
            middle = [mean for mean, _ in points]
            low = [mean - half for mean, half in points]
            high = [mean + half for mean, half in points]
            axis.plot(
                xs, middle, style, color=colour, marker=marker, markevery=8, markersize=4,
                label=system,
            )
            axis.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)
        axis.set_xlabel(labels[key])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy (avg@2)")
    axes[0].legend(frameon=False)
    save(figure, "curves.svg")


def draw_credit(study: object) -> None:
    """AUC of the advantage on decisive lines, a row for each way to sample and to compare."""
    arms = credit_arms(study)[::-1]
    figure, axis = new_figure(1, 7, 0.35 * len(arms) + 0.9)
    names = []
    for y, (arm, rule, lines) in enumerate(arms):
        mean, half = interval([line["rules"][rule]["auc"] for line in lines])
        system = "treeadv" if rule == "leaves" else "treerpo"
        if arm.startswith("GRPO"):
            system = "grpo"
        colour, _, marker = LOOKS[system]
        axis.errorbar(mean, y, xerr=half, color=colour, marker=marker, capsize=3, markersize=5)
        axis.text(mean + half + 0.008, y, f"{mean:.2f}", va="center")
        names.append(f"{arm}, leaf advantages" if arm.startswith("TreeRPO") and rule == "leaves" else arm)
    axis.set_yticks(range(len(arms)), names)
    axis.axvline(0.5, color="grey", lw=0.8, ls=":")
    axis.set_xlabel("AUC of the advantage, right against first wrong lines (0.5: blind, 1: perfect)")
    axis.set_xlim(0.48, 1.02)
    axis.grid(axis="x", alpha=0.3)
    save(figure, "credit.svg")


def sample_tree() -> list[dict]:
    """One step of the demo with narrower trees -> the nodes of a tree in which every level differs,
    as --dump-trees writes them."""
    import treerpo
    with tempfile.TemporaryDirectory() as folder:
        dump = f"{folder}/trees.jsonl"
        shape = ["--branching", "3", "2", "2", "--step-len", "17", "--questions-per-step", "64"]
        short = ["--steps", "1", "--eval-questions", "1", "--eval-samples", "1"]
        treerpo.main(["--out", f"{folder}/run", "--dump-trees", dump, *shape, *short])
        nodes = [json.loads(line) for line in Path(dump).read_text("utf-8").splitlines()]
    trees = {}
    for node in nodes:
        trees.setdefault(node["tree"], []).append(node)
    full = [tree for tree in trees.values() if len(tree) == 1 + 3 + 6 + 12]
    return max(full, key=interest)


def interest(tree: list[dict]) -> tuple[int, float]:
    """How many different rewards its trained steps have, then how near its root is to 1/2."""
    different = {(node["depth"], node["reward"]) for node in tree if node["trained"]}
    return len(different), -abs(tree[0]["reward"] - 0.5)


def place_nodes(tree: list[dict]) -> dict[int, float]:
    """-> the height of every node: leaves one below the other, parents amid their children."""
    places = {}
    row = 0
    for node in reversed(tree):  # written depth-first: children come before their parent now
        below = [places[child["id"]] for child in tree if child["parent"] == node["id"]]
        if below:
            places[node["id"]] = statistics.fmean(below)
        else:
            places[node["id"]] = row
            row += 1
    return places


def draw_tree() -> None:
    """One sampled tree: text, reward and advantage of each step; the darker, the higher the reward.
    A dashed frame is a negative advantage, a grey one a pruned group."""
    tree = sample_tree()
    places = place_nodes(tree)
    n_leaves = int(max(places.values())) + 1
    figure, axis = new_figure(1, 11, 0.62 * n_leaves + 0.4)
    for node in tree:
        x = node["depth"] * 2.6
        y = places[node["id"]]
        label = f"reward {node['reward']:.2f}"
        edge = {"ec": "grey", "lw": 0.8}
        if node["parent"] is not None:
            heights = [places[node["parent"]], y]
            axis.plot([x - 2.05, x - 0.15], heights, color="grey", lw=0.8, zorder=0)
            label += f"   advantage {node['advantage']:+.2f}" if node["trained"] else "   pruned"
        if node["trained"] and node["advantage"] > 0:
            edge = {"ec": "#1b3a6b", "lw": 1.8}
        if node["trained"] and node["advantage"] < 0:
            edge = {"ec": "#d9730d", "lw": 1.8, "ls": "--"}
        text = node["text"].strip("\n").replace("\n", "  ⏎  ") or "question"
        shade = str(1 - 0.35 * node["reward"])
        box = {"boxstyle": "round,pad=0.35", "fc": shade, **edge}
        axis.text(x - 0.1, y, f"{text}\n{label}", fontsize=6.5, va="center", parse_math=False, bbox=box)
    axis.set_xlim(-0.3, 10.2)
    axis.set_ylim(-0.7, n_leaves - 0.3)
    axis.axis("off")
    save(figure, "tree.svg")


def main() -> None:
    import compare
    study = compare.Study(compare.FILE)
    draw_tree()
    draw_credit(study)
    draw_curves(study)


if __name__ == "__main__":
    main()
