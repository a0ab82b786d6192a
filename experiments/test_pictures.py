"""Tests of plot_run.py and tree_viewer.py.

    python -m pytest -q experiments/test_pictures.py

The page is tested in a headless Chromium. On Debian or Ubuntu:
    apt-get install chromium chromium-driver && pip install selenium
Without a browser those tests are skipped; all others need only matplotlib.

Index
  plot    values drawn, empty panels, legend, formats, bad input, runs that are being written
  dump    reading, bad input, data that cannot leave its <script> element
  page    opens without network or error, path, folding, keyboard, ARIA, colours, pruned groups,
          step and question, hostile text, 5,000 nodes, dark and light
"""
import html.parser
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import plot_run
import tree_viewer

HERE = Path(__file__).resolve().parent


# =================================================================================== plot
def write_run(folder: Path, rows: list) -> Path:
    """A run's folder with these rows in its metrics.jsonl; text is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            line = row if isinstance(row, str) else json.dumps(row)
            file.write(line + "\n")
    return folder


START = {"step": 0, "eval/accuracy": 0.2, "eval/greedy_accuracy": 0.1}
STEP_1 = {"step": 1, "reward": 0.25, "entropy": 0.5, "kl": 0.0, "groups_kept": 0.75,
          "completions/mean_length": 40, "time_sample": 2, "time_score": 0.5, "time_update": 1}
STEP_2 = {"step": 2, "reward": 0.5, "entropy": 0.25, "kl": 0.125, "groups_kept": 0.5,
          "completions/mean_length": 44, "time_sample": 4, "time_score": 0.5, "time_update": 2,
          "eval/accuracy": 0.75, "eval/greedy_accuracy": 1.0}


def panel(figure, title: str):
    """The axes with this title."""
    found = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    assert len(found) == 1, title
    return found[0]


def points(line) -> list[tuple]:
    return list(zip(line.get_xdata(), line.get_ydata()))


def texts(axes) -> str:
    return " ".join(text.get_text() for text in axes.texts)


def test_each_panel_draws_what_was_logged():
    figure = plot_run.draw_figure([[START, STEP_1, STEP_2]], ["A"])
    expected = {
        "Reward": [[(1, 0.25), (2, 0.5)]],
        "Held-out accuracy": [[(0, 0.2), (2, 0.75)], [(0, 0.1), (2, 1.0)]],
        "Groups kept": [[(1, 0.75), (2, 0.5)]],
        "Entropy": [[(1, 0.5), (2, 0.25)]],
        "KL to the reference": [[(1, 0.0), (2, 0.125)]],
        "Response length": [[(1, 40), (2, 44)]],
    }
    for title, curves in expected.items():
        drawn = [points(line) for line in panel(figure, title).get_lines()]
        assert drawn == curves, title
    average, greedy = panel(figure, "Held-out accuracy").get_lines()
    assert [average.get_linestyle(), greedy.get_linestyle()] == ["-", ":"]


def test_time_split_is_the_mean_of_the_steps():
    figure = plot_run.draw_figure([[START, STEP_1, STEP_2]], ["A"])
    bars = [bar for bar in panel(figure, "Time of a step").patches if bar.get_width() > 0.0]
    spans = [(bar.get_x(), bar.get_width()) for bar in bars if bar.get_height() == 0.6]
    assert spans == [(0, 3), (3, 0.5), (3.5, 1.5)]  # sample, score, update, one after the other


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    odd = ['{"step": 1, "reward": null}', '{"step": 2, "reward": NaN}', '{"step": 3}',
           '{"step": 4, "reward": 1e999}', '{"step": 5, "reward": true}',
           '{"step": 6, "reward": "0.5"}', '{"step": 7, "reward": 0.5}',
           '{"step": 8, "reward": 1' + "0" * 400 + "}"]
    rows = plot_run.read_metrics(write_run(tmp_path, odd))
    assert plot_run.series(rows, "reward") == ([7], [0.5])


def test_a_panel_without_values_says_why(tmp_path):
    figure = plot_run.draw_figure([[START]], ["A"])
    assert "no kl\nin metrics.jsonl" in texts(panel(figure, "KL to the reference"))
    assert "time_score" in texts(panel(figure, "Time of a step"))
    assert "metrics.jsonl" not in texts(panel(figure, "Held-out accuracy"))
    plot_run.save_figure(figure, tmp_path / "start.png")


def test_a_run_that_lacks_what_another_has_is_named():
    figure = plot_run.draw_figure([[START, STEP_1], [START]], ["A", "B"])
    assert panel(figure, "Entropy").get_title(loc="right") == "not logged by run 2"
    assert panel(figure, "Held-out accuracy").get_title(loc="right") == ""


def test_runs_are_overlaid_in_colours_of_their_own():
    figure = plot_run.draw_figure([[STEP_1, STEP_2]] * 7, list("ABCDEFG"))
    lines = panel(figure, "Reward").get_lines()
    assert len({line.get_color() for line in lines}) == 7
    assert len({line.get_marker() for line in lines}) == 7
    legend = figure.axes[3].get_legend()
    named = ["".join(text.get_text().split()[:2]) for text in legend.get_texts()]
    assert named == ["1A", "2B", "3C", "4D", "5E", "6F", "7G"]
    shown = [handle.get_color() for handle in legend.legend_handles]
    assert shown == [line.get_color() for line in lines]


def test_names_of_runs_stay_as_they_are(tmp_path):
    folders = [write_run(tmp_path / name, [STEP_1]) for name in ["_first", "$x^2$", "a" * 60]]
    names = plot_run.run_names(folders)
    assert names[0] == "_first"
    assert names[1] == r"\$x^2\$"
    assert names[2] == "…" + "a" * 33
    figure = plot_run.draw_figure([[STEP_1]] * 3, names)
    assert "_first" in figure.axes[3].get_legend().get_texts()[0].get_text()
    plot_run.save_figure(figure, tmp_path / "names.svg")


def test_equal_names_are_told_apart_by_their_folders():
    assert plot_run.run_names([Path("x/run"), Path("y/run")]) == ["x/run", "y/run"]


def test_running_mean_by_hand():
    assert plot_run.running_mean([1, 2, 6, 3], 3) == [1.5, 3, 11 / 3, 4.5]
    assert plot_run.running_mean([4, 8], 1) == [4, 8]


def test_a_long_curve_has_its_points_and_their_mean():
    rows = [{"step": step, "reward": step % 2} for step in range(1, 201)]
    faint, bold = panel(plot_run.draw_figure([rows], ["A"]), "Reward").get_lines()
    assert points(faint) == [(step, step % 2) for step in range(1, 201)]
    middle = bold.get_ydata()[20:180]
    assert middle == pytest.approx([0.5] * 160, abs=0.05)  # 11 points hold 5 or 6 ones


@pytest.mark.parametrize("name, start", [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"),
                                         ("a.PNG", b"\x89PNG")])
def test_format_by_the_ending_of_the_name(tmp_path, name, start):
    run = write_run(tmp_path / "run", [START, STEP_1, STEP_2])
    assert plot_run.main([str(run), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(start)


def test_plot_as_a_command(tmp_path):
    run = write_run(tmp_path / "run", [START, STEP_1])
    command = [sys.executable, str(HERE / "plot_run.py"), str(run), str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (run / "plot.png").stat().st_size > 10_000


def test_a_half_written_last_line_is_left_out(tmp_path, capsys):
    run = write_run(tmp_path, [STEP_1])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "rew')
    assert plot_run.read_metrics(run) == [STEP_1]
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize("lines, message", [
    (['{"step": 1}', "{broken", '{"step": 2}'], "line 2: not JSON"),
    (['["step", 1]'], 'line 1: no metrics of a step (no number under "step")'),
    (['{"step": null}'], 'no number under "step"'),
    (["[" * 100_000 + "]" * 100_000], "line 1: not JSON"),
    ([], "no line yet"),
    (["", "  "], "no line yet"),
])
def test_bad_metrics_exit_with_2(tmp_path, capsys, lines, message):
    run = write_run(tmp_path, lines)
    assert plot_run.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "metrics.jsonl" in error


def test_a_folder_that_is_no_run_exits_with_2(tmp_path, capsys):
    assert plot_run.main([str(tmp_path / "nowhere")]) == 2
    assert "give the output folder of a run" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_exits_with_2(tmp_path, capsys):
    run = write_run(tmp_path / "run", [STEP_1])
    assert plot_run.main([str(run), "--out", str(tmp_path / "nowhere" / "a.png")]) == 2
    assert "--out" in capsys.readouterr().err


def test_another_format_exits_with_2(tmp_path, capsys):
    run = write_run(tmp_path / "run", [STEP_1])
    with pytest.raises(SystemExit) as stopped:
        plot_run.main([str(run), "--out", "a.gif"])
    assert stopped.value.code == 2
    assert ".png or .svg" in capsys.readouterr().err


# =================================================================================== dump
def node(number: int, parent: int | None, text: str, reward: float = 0.0, **others) -> dict:
    """A line of a dump: a leaf that is not trained on, unless others say more."""
    row = {"step": 1, "question_id": 7, "answer": "12", "tree": 0, "id": number,
           "parent": parent, "depth": 0, "tokens": [5, 6], "text": text, "done": True,
           "reward": reward, "advantage": 0.0, "trained": False}
    return {**row, **others}


# question -+- a .5 -+- b 1   trained
#           |        +- c 0   trained
#           +- d  1 -+- e 1   pruned
#                    +- f 1   pruned
SMALL = [
    node(0, None, "", 0.75, question="How many?\nSay it."),
    node(1, 0, "\nfirst a, ", 0.5, advantage=-1.0, trained=True),
    node(2, 1, "then b", 1.0, advantage=2.0, trained=True),
    node(3, 1, "then c", 0.0, advantage=-2.0, trained=True, done=False),
    node(4, 0, "first d, ", 1.0, advantage=1.0, trained=True),
    node(5, 4, "then e", 1.0),
    node(6, 4, "then f", 1.0),
]
OTHER_QUESTION = [
    node(7, None, "", 0.0, question="Which?", question_id=9, answer=3, tree=1),
    node(8, 7, "none", 0.0, question_id=9, answer=3, tree=1),
]
OTHER_STEP = [
    node(0, None, "", 1.0, step=2),  # an older dump: the question is not in it
    node(1, 0, "later", 1.0, step=2),
]

HOSTILE = {  # what a model might write -> what the page must show
    "</script><script>window.broken = 1</script>": None,
    "<img src=x onerror='window.broken = 1'>": None,
    "<!--<script>": None,
    "&lt;b&gt; &amp;": None,
    "{{FORESTS}}": None,
    "\\u003c \" ' ` ${1} \\": None,
    "lone \ud800 and \udc00": "lone ‹U+D800› and ‹U+DC00›",
    "pair \U0001f600": None,
    "bell \x07 null \x00 escape \x1b[31m":
        "bell ‹U+0007› null ‹U+0000› escape ‹U+001B›[31m",
    "lines \u2028 and \u2029": "lines ‹U+2028› and ‹U+2029›",
    "back \u202ewards": "back ‹U+202E›wards",
    "zero\u200bwidth": "zero‹U+200B›width",
    "tab\tand\nline": None,
    "\u0645\u0631\u062d\u0628\u0627 \u4f60\u597d e\u0301": None,
    "javascript:window.broken=1": None,
    "__proto__ constructor": None,
}


def write_dump(path: Path, rows: list) -> Path:
    """A dump with these rows, written as append_jsonl of treerpo.py does; text as it is."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            line = row if isinstance(row, str) else json.dumps(row)
            file.write(line + "\n")
    return path


class ScriptReader(html.parser.HTMLParser):
    """Collects the <script> elements and their content, as a browser would cut them."""

    def __init__(self) -> None:
        super().__init__()
        self.contents = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "script":
            self.contents.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.contents[-1] += data


def test_a_dump_becomes_forests(tmp_path):
    dump = write_dump(tmp_path / "a.jsonl", SMALL + OTHER_QUESTION + OTHER_STEP)
    first, second, third = tree_viewer.collect_forests(dump)
    assert [len(forest["nodes"]) for forest in (first, second, third)] == [7, 2, 2]
    assert (first["step"], first["question_id"], first["gold"]) == (1, "7", "12")
    assert (second["question"], second["gold"]) == ("Which?", "3")
    assert "does not hold" in third["question"]
    assert [each["parent"] for each in first["nodes"]] == [None, 0, 1, 1, 0, 4, 4]
    assert [each["parent"] for each in second["nodes"]] == [None, 0]
    assert first["nodes"][3] == {"id": 3, "parent": 1, "text": "then c", "tokens": 2,
                                 "done": False, "reward": 0.0, "advantage": -2.0, "trained": True}


def test_steps_keeps_only_those(tmp_path):
    dump = write_dump(tmp_path / "a.jsonl", SMALL + OTHER_STEP)
    assert [forest["step"] for forest in tree_viewer.collect_forests(dump, [2])] == [2]


def test_hostile_text_cannot_leave_its_script_element():
    nodes = [node(i, None, text) for i, text in enumerate(HOSTILE)]
    page = tree_viewer.render_page([{"nodes": nodes}])
    reader = ScriptReader()
    reader.feed(page)
    assert len(reader.contents) == 2  # the data and the program
    assert json.loads(reader.contents[0]) == [{"nodes": nodes}]
    assert reader.contents[0].isascii()
    page.encode("utf-8")


def test_numbers_that_are_none_become_null(tmp_path):
    line = json.dumps(node(0, None, "")).replace('"advantage": 0.0', '"advantage": NaN')
    line = line.replace('"reward": 0.0', '"reward": 1e999')
    forest, = tree_viewer.collect_forests(write_dump(tmp_path / "a.jsonl", [line]))
    assert forest["nodes"][0]["advantage"] is None
    assert forest["nodes"][0]["reward"] is None
    tree_viewer.render_page([forest])


def test_a_half_written_dump_is_shown_as_far_as_it_goes(tmp_path, capsys):
    dump = write_dump(tmp_path / "a.jsonl", SMALL)
    with open(dump, "a") as file:
        file.write('{"step": 2, "quest')
    forest, = tree_viewer.collect_forests(dump)
    assert len(forest["nodes"]) == 7
    assert "line 8 is not complete" in capsys.readouterr().err


@pytest.mark.parametrize("rows, message", [
    ([SMALL[0], "{broken", SMALL[1]], "line 2: not JSON"),
    (["[1]"], "line 1: no step, question_id"),
    (['{"step": 1, "reward": 0.5}'], "written by treerpo.py --dump-trees"),
    ([SMALL[0], SMALL[0]], "line 2: node 0 of step 1 is there twice"),
    ([SMALL[0], SMALL[2]], "line 2: its parent 1 is on no earlier line"),
    ([node(0, 0, "its own parent")], "line 1: its parent 0 is on no earlier line"),
    ([node(0, None, "", step="1")], "step must be a whole number"),
    ([node(0, None, "", question_id=[])], "question_id must be"),
    ([node(0, None, None)], "text must be text"),
    ([], "no tree is in it"),
])
def test_a_bad_dump_exits_with_2(tmp_path, capsys, rows, message):
    dump = write_dump(tmp_path / "a.jsonl", rows)
    assert tree_viewer.main([str(dump)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "a.jsonl" in error
    assert not (tmp_path / "a.html").exists()


def test_files_that_cannot_be_used_exit_with_2(tmp_path, capsys):
    dump = write_dump(tmp_path / "a.jsonl", SMALL)
    assert tree_viewer.main([str(tmp_path / "nowhere.jsonl")]) == 2
    assert "--dump-trees" in capsys.readouterr().err
    assert tree_viewer.main([str(dump), "--out", str(tmp_path / "nowhere" / "a.html")]) == 2
    assert "--out" in capsys.readouterr().err
    assert tree_viewer.main([str(dump), "--steps", "5"]) == 2
    assert "no tree of the steps [5]" in capsys.readouterr().err


def test_out_must_be_a_page_of_its_own(tmp_path, capsys):
    dump = write_dump(tmp_path / "a.html", SMALL)
    before = dump.read_bytes()
    for arguments in ([str(dump)], [str(dump), "--out", "a.jsonl"]):
        with pytest.raises(SystemExit) as stopped:
            tree_viewer.main(arguments)
        assert stopped.value.code == 2
        assert "--out" in capsys.readouterr().err
    assert dump.read_bytes() == before


def test_viewer_as_a_command(tmp_path):
    dump = write_dump(tmp_path / "a.jsonl", SMALL)
    command = [sys.executable, str(HERE / "tree_viewer.py"), str(dump)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "7 nodes" in done.stdout
    assert (tmp_path / "a.html").stat().st_size > 10_000


# =================================================================================== page
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium with a window of 1200 x 800, driven by selenium."""
    names = ["chromium", "chromium-browser", "google-chrome"]
    found = [shutil.which(name) for name in names if shutil.which(name)]
    if not found:
        pytest.skip("no browser is installed: apt-get install chromium chromium-driver")
    from selenium import webdriver  # pip install selenium

    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    profile = tmp_path_factory.mktemp("profile")
    for flag in [
        "headless",
        "no-sandbox",  # Chromium refuses to start as root without it
        "disable-gpu",
        "disable-quic",
        "disable-background-networking",  # Chromium's own requests are not part of the test
        "disable-component-update",
        "disable-sync",
        "no-first-run",
        f"user-data-dir={profile}",
    ]:
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    size = {"width": 1200, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield driver
    driver.quit()


class Page:
    """What the tests ask of an open page, by its elements as a reader finds them."""

    def __init__(self, driver, path: Path) -> None:
        self.driver = driver
        driver.get_log("performance")  # empties it
        driver.get(path.as_uri())

    def run(self, script: str, *arguments):
        return self.driver.execute_script("return " + script, *arguments)

    def rows(self) -> list[str]:
        """Text of the steps drawn, from top to bottom; of a fold, the arrow stands before it."""
        script = "[...document.querySelectorAll('.row .step')].map(cell => cell.textContent)"
        return self.run(script)

    def text(self, name: str) -> str:
        return self.run("document.getElementById(arguments[0]).textContent", name)

    def active(self, attribute: str) -> str | None:
        """An attribute of the row that the tree names as the active one."""
        script = ("document.getElementById(document.getElementById('tree')"
                  ".getAttribute('aria-activedescendant')).getAttribute(arguments[0])")
        return self.run(script, attribute)

    def active_text(self) -> str:
        script = ("document.getElementById(document.getElementById('tree')"
                  ".getAttribute('aria-activedescendant')).querySelector('.text').textContent")
        return self.run(script)

    def row(self, text: str):
        """The row of the first step with this text."""
        script = ("[...document.querySelectorAll('.row')]"
                  ".find(row => row.querySelector('.text').textContent === arguments[0])")
        found = self.run(script, text)
        assert found is not None, text
        return found

    def chip(self, text: str):
        return self.row(text).find_element("css selector", ".advantage")

    def press(self, *keys: str) -> None:
        """Keys go to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains
        ActionChains(self.driver).send_keys(*keys).perform()

    def choose_option(self, select: str, option: str) -> None:
        from selenium.webdriver.support.select import Select
        Select(self.driver.find_element("id", select)).select_by_visible_text(option)

    def wait_for_frame(self) -> None:
        """Until a scroll event, which the browser sends with its next frame, was handled."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses the page asked for, itself included."""
        addresses = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.append(message["params"]["request"]["url"])
        return addresses


@pytest.fixture
def open_page(browser, tmp_path):
    """Function: rows of a dump -> their page, opened. No page of a test may log an error."""
    opened = []

    def open_rows(rows: list[dict]) -> Page:
        dump = write_dump(tmp_path / f"{len(opened)}.jsonl", rows)
        assert tree_viewer.main([str(dump)]) == 0
        page = Page(browser, dump.with_suffix(".html"))
        opened.append(page)
        return page

    yield open_rows
    assert opened[-1].errors() == []


def test_opens_without_network_or_error(open_page, tmp_path):
    page = open_page(SMALL + OTHER_QUESTION + OTHER_STEP)
    assert page.rows() == ["▾How many? ↵ Say it.", "▾↵ first a,", "then b", "then c",
                           "▾first d,", "then e", "then f"]
    assert page.text("summary") == "6 steps, 4 answers, 3 of them right"
    assert page.text("question") == "How many?\nSay it."
    assert page.text("gold") == "12"
    assert page.requests() == [(tmp_path / "0.html").as_uri()]
    assert page.errors() == []


def test_a_console_error_would_be_noticed(open_page):
    page = open_page(SMALL)
    page.run("setTimeout(() => { throw new Error('on purpose'); }, 0)")
    page.run("fetch('https://example.org/').catch(() => 1)")
    errors = page.errors()
    assert any("on purpose" in error for error in errors)
    assert any("Content Security Policy" in error for error in errors)


def test_clicking_a_leaf_shows_its_path_as_one_answer(open_page):
    page = open_page(SMALL + [node(9, 1, "\n\nthen g", 0.5)])
    page.row("↵  ↵ then g").click()
    assert page.text("answer") == "first a, \n\nthen g"  # only the answer's start is trimmed
    page.row("then c").click()
    assert page.text("answer") == "first a, then c"
    assert page.text("outcome") == "✗ wrong, cut off"
    page.row("then f").click()
    assert page.text("answer") == "first d, then f"
    assert page.text("outcome") == "✓ right"
    assert page.text("path-title") == "One whole answer"
    cells = page.run("[...document.querySelectorAll('tbody td')].map(cell => cell.textContent)")
    assert cells == ["1", "1.00", "+1.00", "2", "4", "2", "1.00", "pruned", "2", "6"]


def test_clicking_a_step_of_the_answer_goes_there(open_page):
    page = open_page(SMALL)
    page.row("then f").click()
    page.driver.find_element("css selector", "#answer .segment").click()
    assert page.active_text() == "first d,"
    assert page.text("answer") == "first d, "
    assert page.text("path-title") == "An answer up to its step 1"


def test_folding_by_mouse(open_page):
    page = open_page(SMALL)
    page.row("first d,").find_element("class name", "fold").click()
    assert page.rows()[4:] == ["▸first d,"]
    page.row("first d,").find_element("class name", "fold").click()
    assert page.rows()[4:] == ["▾first d,", "then e", "then f"]
    page.driver.find_element("id", "fold").click()
    assert page.rows() == ["▾How many? ↵ Say it.", "▸↵ first a,", "▸first d,"]
    page.driver.find_element("id", "unfold").click()
    assert len(page.rows()) == 7


def test_everything_by_keyboard(open_page):
    from selenium.webdriver.common.keys import Keys
    page = open_page(SMALL)
    for _ in range(5):  # step, question, unfold, fold, tree
        page.press(Keys.TAB)
    assert page.run("document.activeElement.id") == "tree"
    page.run("(window.handled = [], addEventListener('keydown',"
             " event => window.handled.push(event.defaultPrevented)))")
    page.press(Keys.HOME)
    walk = [
        (Keys.ARROW_DOWN, "↵ first a,", "true"),
        (Keys.ARROW_LEFT, "↵ first a,", "false"),  # folds
        (Keys.ARROW_DOWN, "first d,", "true"),  # steps over what is folded
        (Keys.ARROW_UP, "↵ first a,", "false"),
        (Keys.ARROW_RIGHT, "↵ first a,", "true"),  # unfolds
        (Keys.ARROW_RIGHT, "then b", None),  # goes to the first child
        (Keys.ARROW_RIGHT, "then b", None),
        (Keys.ARROW_LEFT, "↵ first a,", "true"),  # goes to the parent
        (Keys.ENTER, "↵ first a,", "false"),
        (Keys.ENTER, "↵ first a,", "true"),
        (Keys.END, "then f", None),
        (Keys.ARROW_DOWN, "then f", None),
        (Keys.HOME, "How many? ↵ Say it.", "true"),
        (Keys.ARROW_UP, "How many? ↵ Say it.", "true"),
        (Keys.END, "then f", None),
    ]
    for place, (key, text, expanded) in enumerate(walk):
        page.press(key)
        assert (page.active_text(), page.active("aria-expanded")) == (text, expanded), place
    assert page.run("window.handled") == [True] * 16  # else the browser would scroll, too
    assert page.text("answer") == "first d, then f"
    page.press(Keys.ENTER)
    assert page.run("document.activeElement.id") == "path"
    page.press(Keys.ESCAPE)
    assert page.run("document.activeElement.id") == "tree"


def test_screen_readers_find_a_tree(open_page):
    page = open_page(SMALL)
    assert page.run("document.getElementById('tree').getAttribute('role')") == "tree"
    page.row("then c").click()
    names = ["role", "aria-level", "aria-setsize", "aria-posinset", "aria-selected"]
    assert [page.active(name) for name in names] == ["treeitem", "3", "2", "2", "true"]
    assert page.run("document.querySelectorAll('[aria-selected=true]').length") == 1


def colour(element, style: str = "backgroundColor") -> tuple[float, float, float]:
    """Red, green, blue of an element's background or of another style, from 0 to 1."""
    script = """
        const context = new OffscreenCanvas(1, 1).getContext("2d");
        context.fillStyle = getComputedStyle(arguments[0])[arguments[1]];
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    """
    red, green, blue, _ = element.parent.execute_script(script, element, style)
    return red / 255, green / 255, blue / 255


def set_scheme(driver, scheme: str) -> None:
    """As if the reader's system were set to light or dark."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_advantages_are_blue_and_orange_by_size(open_page, browser, scheme):
    set_scheme(browser, scheme)
    page = open_page(SMALL)

    def blueness(text: str) -> float:
        red, _, blue = colour(page.chip(text))
        return blue - red

    assert blueness("then b") > blueness("first d,") + 0.05  # +2 and +1
    assert blueness("first d,") > 0.15
    assert blueness("then c") < blueness("↵ first a,") - 0.05  # -2 and -1
    assert blueness("↵ first a,") < -0.15


def relative_luminance(rgb: tuple) -> float:
    """As WCAG 2 defines it."""
    linear = []
    for value in rgb:
        if value <= 0.03928:
            linear.append(value / 12.92)
        else:
            linear.append(((value + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple, other: tuple) -> float:
    """As WCAG 2 defines it, from 1 to 21."""
    darker, lighter = sorted([relative_luminance(one), relative_luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_are_both_legible(open_page, browser, scheme):
    """Text against its background has the contrast of 4.5 that WCAG asks for."""
    set_scheme(browser, scheme)
    page = open_page(SMALL)
    surface = colour(browser.find_element("class name", "panel"))
    assert (relative_luminance(surface) > 0.5) == (scheme == "light")
    for text in ["then b", "then c", "first d,"]:
        chip = page.chip(text)
        assert contrast(colour(chip, "color"), colour(chip)) >= 4.5, text
    for text in ["then e", "How many? ↵ Say it."]:
        row = page.row(text)
        assert contrast(colour(row, "color"), surface) >= 4.5, text


def test_pruned_groups_are_grey_and_only_they(open_page):
    # g has advantage 0, but its sibling was trained on: not pruned
    page = open_page(SMALL + [node(9, 1, "then g", 0.5)])
    chips = page.run("[...document.querySelectorAll('.row')].map(row => "
                     "row.querySelector('.advantage').textContent)")
    assert chips == ["–", "−1.00", "+2.00", "−2.00", "+0.00", "+1.00", "pruned", "pruned"]
    kept_texts = ["then b", "then c", "then g", "first d,"]
    kept = {colour(page.row(text), "color") for text in kept_texts}
    pruned = {colour(page.row(text), "color") for text in ["then e", "then f"]}
    assert len(kept) == 1
    assert len(pruned) == 1
    assert kept != pruned


def test_pick_step_and_question(open_page):
    page = open_page(SMALL + OTHER_QUESTION + OTHER_STEP)
    page.choose_option("questions", "9 · reward 0.00")
    assert page.rows() == ["▾Which?", "none"]
    assert page.text("gold") == "3"
    page.choose_option("steps", "2")
    assert page.rows() == ["▾(this dump does not hold the question's text)", "later"]
    page.choose_option("steps", "1")
    assert page.text("question") == "How many?\nSay it."


def test_several_trees_of_a_question_stand_together(open_page):
    page = open_page(SMALL + [node(7, None, "", 0.0, tree=1, question="How many?\nSay it."),
                              node(8, 7, "lone answer", 0.0, tree=1)])
    label = page.driver.find_element("id", "questions").text
    assert label == "7 · reward 0.38"  # the mean of .75 and 0
    assert page.rows()[7:] == ["▾How many? ↵ Say it.", "lone answer"]
    page.row("lone answer").click()
    assert page.text("answer") == "lone answer"


def test_hostile_text_stays_text(open_page):
    for text, expected in HOSTILE.items():
        shown = text if expected is None else expected
        rows = [node(0, None, "", 1.0, question=text, answer=text, question_id=text),
                node(1, 0, "x" + text, 1.0, question_id=text)]
        page = open_page(rows)
        assert page.text("question") == shown
        assert page.text("gold") == shown
        assert page.text("answer") == "x" + shown
        assert page.rows()[1] == "x" + shown.replace("\n", " ↵ ")
        assert page.run("typeof window.broken") == "undefined"
        assert page.run("document.querySelectorAll('img, b').length") == 0
        assert page.run("document.querySelectorAll('script').length") == 2
        assert page.errors() == []


def large_tree() -> list[dict]:
    """A tree of 9 x 8 x 8 x 8 leaves: 5,266 nodes, depth-first as treerpo.py writes them."""
    rows = [node(0, None, "", 0.5, question="Large?")]

    def grow(parent: int, widths: list[int]) -> None:
        for _ in range(widths[0]):
            number = len(rows)
            rows.append(node(number, parent, f"node {number}", 0.5))
            if len(widths) > 1:
                grow(number, widths[1:])

    grow(0, [9, 8, 8, 8])
    return rows


def test_five_thousand_nodes_are_usable(open_page):
    from selenium.webdriver.common.keys import Keys
    rows = large_tree()
    assert len(rows) == 5266
    page = open_page(rows)
    assert page.rows()[:5] == ["▾Large?", "▾node 1", "▾node 2", "▾node 3", "node 4"]
    assert "▸node 12" in page.rows()  # only the first path starts unfolded
    page.driver.find_element("id", "unfold").click()
    page.driver.find_element("id", "tree").click()
    page.press(Keys.END)
    assert page.active_text() == "node 5265"
    assert page.text("answer") == "node 4681node 5193node 5257node 5265"  # last child each time
    assert len(page.rows()) < 60
    page.press(Keys.HOME)
    assert page.active_text() == "Large?"

    # halfway down, a row is where the scroll bar says
    page.run("document.getElementById('tree').scrollTop = 32 * 2600")
    page.wait_for_frame()
    top = page.run("document.getElementById('tree').getBoundingClientRect().top")
    seen = page.run("document.elementFromPoint(300, arguments[0]).closest('.row').textContent",
                    top + 16)
    assert "node 2600" in seen
    assert len(page.rows()) < 60
    assert page.active_text() == "Large?"  # far above, and still there for a screen reader
    page.press(Keys.ARROW_DOWN)
    assert page.active_text() == "node 1"
    assert page.run("document.getElementById('tree').scrollTop") == 32
