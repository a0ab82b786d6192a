"""The study's tables (Markdown) and figures (SVG), from the lines of its results file. compare.py calls both.

    python experiments/report.py             # draw the figures again: experiments/figures/*.svg
"""
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
T95 = [0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14,
       2.13]  # by degrees of freedom
# One colour, line and marker for each system; they differ in brightness too, so that grey printing keeps them apart.
LOOKS = {"treerpo": ("#1b3a6b", "-", "o"), "grpo": ("#d9730d", "--", "s"), "gspo": ("#e3b23c", ":", "^"),
         "treeadv": ("#5fa39a", "-.", "D")}

# ------------------------------------------------------------------------------------------------------- statistics

def interval(values):
    """-> (mean, half the 95 % confidence interval of the mean), by Student's t."""
    n = len(values)
    return statistics.mean(values), T95[min(n - 1, 15)] * statistics.stdev(values) / n ** 0.5 if n > 1 else math.nan


def difference(a, b):
    """-> (mean of a minus mean of b, half its 95 % confidence interval), by Welch's t."""
    mean = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return mean, math.nan
    u, v = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    freedom = (u + v) ** 2 / (u ** 2 / (len(a) - 1) + v ** 2 / (len(b) - 1)) if u + v else 1
    return mean, T95[min(int(freedom), 15)] * (u + v) ** 0.5


def read_at(line, axis, x, what="accuracy"):
    """The curve's value at x, between its evaluations by straight lines; behind the last one, the last value."""
    xs, ys = line[axis], line[what]
    for i in range(1, len(xs)):
        if xs[i] >= x:
            return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[-1]


def mean_to(line, axis, x):
    """Mean height of the curve from 0 to x: how fast it rises, with less noise than its end."""
    return statistics.mean(read_at(line, axis, x * (i + 0.5) / 50) for i in range(50))

# ----------------------------------------------------------------------------------------------------------- tables

def cell(pair, digits=3, sign=""):
    return f"{pair[0]:{sign}.{digits}f} ± {pair[1]:.{digits}f}"


def run_table(groups, reference):
    """Rows for {label: lines of the arm}: accuracy at equal tokens, the whole curve, at equal CPU seconds, length."""
    groups = {label: lines for label, lines in groups.items() if lines}
    if not groups:
        return []
    tokens = min(line["tokens"][-1] for lines in groups.values() for line in lines)
    cpu = min(statistics.mean(line["cpu"][-1] for line in lines) for lines in groups.values())
    rows = [f"| | seeds | updates | lr | accuracy at {tokens / 1000:.0f}k tokens | minus {reference} | "
            f"mean of the curve | minus {reference} | accuracy at {cpu:.0f} CPU s | CPU s | answer tokens |",
            "|---|" + "---|" * 10]
    end = {label: [read_at(line, "tokens", tokens) for line in lines] for label, lines in groups.items()}
    area = {label: [mean_to(line, "tokens", tokens) for line in lines] for label, lines in groups.items()}
    for label, lines in groups.items():
        minus = lambda scores: "" if label == reference or reference not in scores else cell(
            difference(scores[label], scores[reference]), 3, "+")
        rows.append("| " + " | ".join([
            label, str(len(lines)), f"{lines[0]['step'][-1]}", f"{lines[0]['lr']:g}",
            cell(interval(end[label])), minus(end), cell(interval(area[label])), minus(area),
            cell(interval([read_at(line, "cpu", cpu) for line in lines])),
            f"{statistics.mean(line['cpu'][-1] for line in lines):.0f}",
            cell(interval([line["length"][-1] for line in lines]), 1)]) + " |")
    base = statistics.mean(line["accuracy"][0] for lines in groups.values() for line in lines)
    length = statistics.mean(line["length"][0] for lines in groups.values() for line in lines)
    return rows + [f"| base | | 0 | | {base:.3f} | | | | | | {length:.1f} |"]


def credit_name(shape):
    if "/" in shape:
        return "TreeAdv, {} leaves from {} trees".format(*shape.split("/"))
    return f"tree {shape}" if " " in shape else f"GRPO, {shape} rollouts"


def credit_arms(study, base):
    """-> [(name, rule, lines of the results file)]"""
    for shape in study.credit_shapes:
        lines = study.of("credit", base=base, shape=shape)
        for rule in ("siblings", "leaves"):
            if any(rule in line["rules"] for line in lines):
                yield credit_name(shape), rule, [line for line in lines if rule in line["rules"]]


def credit_table(study, base):
    rows = []
    for name, rule, lines in credit_arms(study, base):
        pick = lambda what: [line["rules"][rule][what] for line in lines]
        rows.append(f"| {name} | {rule} | {len(lines)} | {lines[0]['n_questions']} | {cell(interval(pick('auc')))} | "
                    f"{cell(interval(pick('auc_all')))} | {statistics.mean(pick('silent')):.0%} | "
                    f"{statistics.mean(pick('noise')):.0%} | {statistics.mean(pick('decisive')):.0f} |")
    head = ["| | advantage | seeds | questions | AUC, decisive lines | AUC, all lines | "
            "decisive lines without a signal | lines after an error with a signal | decisive lines |",
            "|---|" + "---|" * 8]
    return head + rows if rows else []


def tables(study):
    """All tables as Markdown; every ± is half a 95 % confidence interval over seeds."""
    arms = lambda part, names, **where: {name: study.of(part, arm=name, **where) for name in names}
    factors = {"default (treerpo 4 2 2 2)" if name == "default" else name: lines
               for name, lines in arms("factors", study.factors).items()}
    parts = [("Credit per line, bundled task, equal sampled tokens", credit_table(study, "demo")),
             ("Credit per line, 8 operations", credit_table(study, "long")),
             ("Curves, bundled task", run_table(arms("curves", study.systems), "grpo"))]
    for base, title in study.regimes.items():
        parts.append((title, run_table(arms("regimes", study.regime_arms, base=base), "grpo")))
    parts.append(("One factor at a time, larger batches", run_table(factors, "default (treerpo 4 2 2 2)")))
    parts.append(("Two updates on each batch", run_table(arms("twice", study.twice), "grpo, two updates")))
    tune = [f"| {arm} | {lr:g} | " + ", ".join(f"{line['accuracy'][-1]:.3f}"
                                               for line in study.of("tune", arm=arm, lr=lr)) + " |"
            for arm in study.systems for lr in study.lrs if study.of("tune", arm=arm, lr=lr)]
    parts.append(("Learning rates, final accuracy of each tuning seed", tune
                  and ["| | lr | accuracy |", "|---|---|---|", *tune]))
    spent = sum(line["cpu_total"] for line in study.lines.values()) / 3600
    failed = [line["key"] for line in study.lines.values() if line.get("status")]
    return "\n\n".join(f"**{title}**\n\n" + "\n".join(rows) for title, rows in parts if rows) + (
        f"\n\n{len(study.lines)} jobs, {spent:.2f} CPU hours; "
        f"stopped early by losses that were not finite: {failed or 'none'}")

# ---------------------------------------------------------------------------------------------------------- figures

def new_figure(*args, **kwargs):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "svg.hashsalt": "treerpo",
                         "svg.fonttype": "none", "font.family": "sans-serif"})
    return plt.subplots(*args, **kwargs)


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def draw_curves(study, path):
    """Held-out accuracy of the four systems against tokens, updates and CPU seconds; the bands are 95 % intervals."""
    figure, axes = new_figure(1, 3, figsize=(10, 3), sharey=True)
    for axis, key, label, scale in zip(axes, ("tokens", "step", "cpu"), ("sampled tokens, thousands", "updates",
                                                                        "CPU seconds, without evaluation"),
                                                                        (1e-3, 1, 1)):
        for name, (colour, style, marker) in LOOKS.items():
            lines = study.of("curves", arm=name)
            if not lines:
                continue
            end = min(line[key][-1] for line in lines)
            xs = [end * i / 40 for i in range(41)]
            stats = [interval([read_at(line, key, x) for line in lines]) for x in xs]
            scaled = [x * scale for x in xs]
            axis.plot(scaled, [m for m, _ in stats], style, color=colour, marker=marker, markevery=8, markersize=4,
                      label=name)
            axis.fill_between(scaled, [m - h for m, h in stats], [m + h for m, h in stats], color=colour, alpha=0.15,
                              lw=0)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out accuracy (avg@2)")
    axes[0].legend(frameon=False)
    save(figure, path)


def draw_credit(study, path):
    """AUC of the advantage on decisive lines, one row for each way to sample and compare."""
    arms = list(credit_arms(study, "demo"))[::-1]
    figure, axis = new_figure(figsize=(7, 0.28 * len(arms) + 0.9))
    for y, (name, rule, lines) in enumerate(arms):
        mean, half = interval([line["rules"][rule]["auc"] for line in lines])
        colour, _, marker = LOOKS["treerpo" if "tree " in name and rule == "siblings" else "treeadv"
                                  if rule == "leaves" else "grpo"]
        axis.errorbar(mean, y, xerr=half, color=colour, marker=marker, capsize=3, markersize=5)
        axis.text(mean + half + 0.008, y, f"{mean:.2f}", va="center")
    axis.set_yticks(range(len(arms)), [f"{name}: {rule}" if "tree " in name else name for name, rule, _ in arms])
    axis.axvline(0.5, color="grey", lw=0.8, ls=":")
    axis.set_xlabel("AUC of the advantage: right lines against first wrong lines (0.5: blind, 1: perfect)")
    axis.set_xlim(0.48, 1.02)
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def dump_tree(demo, shape=("3", "2", "2")):
    """Sample trees of the bundled task with treerpo.py itself; -> nodes of one where every level has its say."""
    sys.path[:0] = [str(HERE.parent)]
    import treerpo
    with tempfile.TemporaryDirectory() as out:
        treerpo.main(["--model", f"{demo}/model", "--data", f"{demo}/train.jsonl", "--eval-data", f"{demo}/test.jsonl",
                      "--steps", "1", "--branching", *shape, "--step-len", "17", "--questions-per-step", "64", "--out",
                      out,
                      "--eval-questions", "1", "--eval-samples", "1", "--template", "none", "--dump-trees",
                      f"{out}/trees.jsonl"])
        nodes = [json.loads(text) for text in open(f"{out}/trees.jsonl", encoding="utf-8")]
    trees = {}
    for node in nodes:
        trees.setdefault(node["tree"], []).append(node)
    full = [tree for tree in trees.values() if len(tree) == 22]
    return max(full, key=lambda tree: (len({(n["depth"], n["reward"]) for n in tree if n["trained"]}),
                                       -abs(tree[0]["reward"] - 0.5)))


def draw_tree(demo, path):
    """One sampled tree: text, reward and advantage of every step; the darker, the higher the reward."""
    nodes = {node["id"]: node for node in dump_tree(demo)}
    children = {i: [k for k, node in nodes.items() if node["parent"] == i] for i in nodes}
    place, row = {}, 0
    for i in sorted(nodes, reverse=True):  # depth-first ids: children before their parent
        if children[i]:
            place[i] = sum(place[k] for k in children[i]) / len(children[i])
        else:
            place[i], row = row, row + 1
    figure, axis = new_figure(figsize=(11, 0.62 * row + 0.4))
    for i, node in nodes.items():
        x, y = node["depth"] * 2.6, place[i]
        if node["parent"] is not None:
            axis.plot([x - 2.6 + 0.55, x - 0.15], [place[node["parent"]], y], color="grey", lw=0.8, zorder=0)
        sign = "grey" if abs(node["advantage"]) < 1e-9 else "#1b3a6b" if node["advantage"] > 0 else "#d9730d"
        text = node["text"].strip("\n").replace("\n", "  ⏎  ")
        label = f"reward {node['reward']:.2f}" + (f"   advantage {node['advantage']:+.2f}"
                                                  if node["parent"] is not None else "")
        axis.text(x - 0.1, y, f"{text or 'question'}\n{label}", fontsize=6.5, va="center", parse_math=False,
                  color="black",
                  bbox=dict(boxstyle="round,pad=0.35", fc=str(1 - 0.35 * node["reward"]), ec=sign,
                            lw=0.8 if sign == "grey" else 1.8, ls="-" if node["advantage"] >= 0 else "--"))
    axis.set_xlim(-0.3, 10.2)
    axis.set_ylim(-0.7, row - 0.3)
    axis.axis("off")
    save(figure, path)


def figures(study, folder=HERE / "figures"):
    """Draw all figures for which there are results."""
    draw_tree(study.demo, folder / "tree.svg")
    if study.of("credit"):
        draw_credit(study, folder / "credit.svg")
    if study.of("curves"):
        draw_curves(study, folder / "curves.svg")


if __name__ == "__main__":
    import compare
    figures(compare.Study(compare.parse_args([])))
