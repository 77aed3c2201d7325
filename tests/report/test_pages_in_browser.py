"""The page in a browser: no errors, what toggles do, numbers against the store, a narrow screen."""

import re
import shutil

import pytest
from planted import arms, sizes
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from scantling.inference.views import views_of
from scantling.runs.table import load_runs

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="there is no Chromium with its chromedriver"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    assert BROWSER is not None
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(120)
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", OFFLINE)
    yield driver
    driver.quit()


OFFLINE = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}


@pytest.fixture
def opened(browser, tmp_path):
    """`opened("parts", 390)` is the browser with that study's page, so many pixels wide; at the end it had no
    errors."""

    def opened(name, width=1200, theme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        browser.get(f"file://{next((tmp_path / 'runs/reports').rglob(f'{name}/report.html'))}")
        return browser

    yield opened
    assert [entry["message"] for entry in browser.get_log("browser")] == []


SHOWN = """return [...document.querySelectorAll('.chart')].map(card => ({
    title: card.querySelector('h3').textContent,
    axis: card.querySelector('.plot').layout.yaxis.type,
    traces: card.querySelector('.plot').data.map(
        t => ({name: t.name, visible: t.visible, fill: t.fill, y: t.y}))}))"""


XAXES = """return [...document.querySelectorAll('.chart .plot')].map(
    plot => plot.layout ? plot.layout.xaxis.type : null)"""


def charts(browser):
    return {chart["title"]: chart for chart in browser.execute_script(SHOWN)}


def press(browser, text, chart="Validation and training"):
    """Click the button of that chart."""
    pressed = browser.execute_script(
        "const card = [...document.querySelectorAll('.chart')].find("
        "    c => c.querySelector('h3').textContent === arguments[1]);"
        "const button = [...card.querySelectorAll('button')].find(b => b.textContent === arguments[0]);"
        "button.click(); return button.getAttribute('aria-pressed')",
        text,
        chart,
    )
    return pressed


@pytest.mark.slow
def test_arms_are_toggled_and_axes_switched(record, report, opened, tmp_path):
    arms(record)
    report("study=parts", "baseline=llama")
    browser = opened("parts")
    runs = load_runs(tmp_path / "runs/parts")
    means = {arm: of_arm[["loss", "bpb"]].mean() for arm, of_arm in runs.groupby("arm")}

    def visible(name):
        traces = charts(browser)["Validation and training"]["traces"]
        return {trace["visible"] for trace in traces if trace["name"] == name}

    def ends():
        traces = charts(browser)["Validation and training"]["traces"]
        lines = [t for t in traces if not t["fill"]]
        return {name: next(t["y"][-1] for t in lines if t["name"] == name) for name in means}

    assert ends() == pytest.approx({arm: mean["loss"] for arm, mean in means.items()}, rel=1e-5)
    assert press(browser, "alibi") == "false"
    assert (visible("alibi"), visible("llama")) == ({False}, {True})
    assert press(browser, "alibi") == "true"
    assert visible("alibi") == {True}
    press(browser, "bits per byte")
    assert ends() == pytest.approx({arm: mean["bpb"] for arm, mean in means.items()}, rel=1e-5)
    assert charts(browser)["Validation and training"]["axis"] == "linear"
    press(browser, "y log")
    press(browser, "x log")
    assert charts(browser)["Validation and training"]["axis"] == "log"
    browser.refresh()  # what was chosen stays, as a watched page needs it
    assert charts(browser)["Validation and training"]["axis"] == "log"
    file = tmp_path / "runs/reports/parts/report.html"
    written = file.read_text()
    pattern = r'<div class="card chart"><h3>Validation and training.*?</script></div>'
    card = re.findall(pattern, written, re.S)[0]
    file.write_text(written.replace(card, ""))
    browser.refresh()  # what was chosen for one chart is not another's that stands in its place now
    assert {name: chart["axis"] for name, chart in charts(browser).items()} == {
        "Difference from llama": "category"
    }
    assert browser.execute_script(XAXES) == ["linear"]
    file.write_text(
        written.replace(
            card, card.replace('"x":[', '"x":[{"key":"step","title":"s","log":null,"label":"s"},')
        )
    )
    browser.refresh()  # nor the same chart's with other axes
    assert charts(browser)["Validation and training"]["axis"] == "linear"
    file.write_text(
        written.replace(card, card.replace('"series":[', '"series":[{"group":"x","values":null},'))
    )
    browser.refresh()
    (error,) = browser.get_log("browser")
    assert "TypeError" in error["message"]
    assert browser.execute_script(XAXES) == [None, "linear"]
    shown = browser.find_elements("css selector", ".chart")
    assert "This chart could not be drawn." in shown[0].text
    browser.execute_script("document.getElementById('theme').click(); localStorage.clear()")
    assert "dark" in browser.execute_script("return document.documentElement.dataset.theme")


def test_numbers_are_those_of_the_store(record, report, opened, tmp_path):
    arms(record)
    report("study=parts", "baseline=llama")
    browser = opened("parts")
    cells = browser.execute_script(
        "return [...document.querySelectorAll('table')].map("
        "    t => [...t.rows].map(r => [...r.cells].map(c => c.textContent)))"
    )
    head, *rows = next(table for table in cells if table[0][0] == "run")
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    for run in load_runs(tmp_path / "runs/parts").to_dict("records"):
        assert shown[run["run"]]["nats per token"] == f"{run['loss']:.4f}"
        assert shown[run["run"]]["bits per byte"] == f"{run['bpb']:.4f}"
        assert shown[run["run"]]["tokens"] == f"{run['tokens']:,.0f}"
    verdicts = {row[0]: row for row in next(table for table in cells if table[0][0] == "arm")[1:]}
    assert "worse" in verdicts["alibi"]
    assert "undecided" in verdicts["gelu"]


@pytest.mark.parametrize(("form", "begins"), [("png", b"\x89PNG"), ("svg", b"<svg")])
def test_a_chart_is_saved_as_a_picture(record, report, opened, tmp_path, form, begins):
    arms(record, seeds=2)
    report("study=parts", "baseline=llama")
    page = opened("parts")
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    page.execute_script(f"document.querySelector('[data-title=\"Save as {form.upper()}\"]').click()")
    saved = tmp_path / f"Validation and training.{form}"
    WebDriverWait(page, 30).until(lambda _: saved.exists() and saved.stat().st_size)
    assert saved.read_bytes()[: len(begins)] == begins


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parts", "sizes", "llama-0-1e+07"])
def test_a_narrow_screen_needs_no_scrolling_sideways(record, report, opened, name):
    evil = "<img src=x onerror=window.broken=1>"
    if name == "sizes":
        sizes(record)
        overrides = ["budget.tokens=1e9", "seed=0", "arm=d9", "model.d_model=9"]
        record("sizes", "late", overrides, loss=3.0, arm="d9", finished=False)  # its size is not known
    else:
        arms(record, seeds=2)
        path = record.runs / "parts" / "llama-0-1e+07" / "metrics.jsonl"
        path.write_text(path.read_text().replace('{"step"', f'{{"{evil}": 1.0, "other": 2.0, "step"'))
    of = f"run={name}" if name.startswith("llama") else f"study={name}"
    assert report(of, *(["baseline=llama"] if name == "parts" else []))[0] == 0
    browser = opened(name, width=390)
    widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
    assert browser.execute_script(widths) == [390, 390]
    shown = charts(browser)
    assert all(chart["traces"] for chart in shown.values())
    assert ("Also recorded" in shown) == name.startswith("llama")
    if name.startswith("llama"):  # a metric's name is text wherever it stands
        card = browser.find_elements("css selector", ".chart")[-1].text
        assert card.count(evil) == 2, card
        assert browser.execute_script("return window.broken") is None


def test_a_run_is_looked_into(record, report, checkpointed, opened):
    """Embeddings step by step, and the attention of one head after another."""
    record("study", "seen", ["seed=0", "arm=a"], loss=3.0, arm="a")
    run, _ = checkpointed(record.runs / "study" / "seen", steps=(40, 100))
    assert report("run=seen", "tokens=[d,e]", "prompt=def f(x):")[0] == 0
    found = views_of(run, tokens=["d", "e"], prompt="def f(x):")
    browser = opened("seen", width=390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390

    def places():
        drawn = browser.execute_script(
            "const plot = [...document.querySelectorAll('.chart')].find("
            "    c => c.querySelector('.slider')).querySelector('.plot');"
            "return [plot.data.flatMap(t => t.text.map((w, i) => [w, [t.x[i], t.y[i]]])),"
            "        plot.layout.xaxis.range, plot.parentElement.querySelector('output').textContent]"
        )
        return dict(drawn[0]), *drawn[1:]

    def slide(to):
        browser.execute_script(
            "const range = document.querySelector('.slider input'); range.value = arguments[0];"
            "range.dispatchEvent(new Event('input'))",
            to,
        )

    last, axis, said = places()
    assert said.startswith("step 100: ")
    slide(0)
    first, same_axis, said = places()
    assert said.startswith("step 40: ")
    assert same_axis == axis
    assert found.map is not None
    for shown, expected in ((first, found.map.places[0]), (last, found.map.places[1])):
        for i, word in enumerate(("d", "e")):
            assert shown[word] == pytest.approx(expected[i], rel=1e-5)
    slide(1)
    assert places()[:2] == (last, axis)

    def large():
        return browser.execute_script(
            "const plot = document.querySelector('.maps .plot');"
            "return [document.querySelector('.shown').textContent, plot.data[0].z]"
        )

    browser.execute_script("document.querySelectorAll('.maps button')[6].click()")
    said, weights = large()
    assert said.startswith("layer 2, head 3")
    assert found.attention is not None
    for query, row in enumerate(weights):
        assert row[query + 1 :] == [None] * (len(weights) - query - 1)
        expected = found.attention.weights[1, 2, query, : query + 1]
        assert row[: query + 1] == pytest.approx(expected.tolist(), abs=1e-4)


def test_light_and_dark(record, report, opened):
    arms(record, seeds=2)
    report("study=parts", "baseline=llama")

    def paper():
        shade = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", shade)[:3]))

    browser = opened("parts", theme="dark")
    assert paper() < 150
    browser.execute_script("document.getElementById('theme').click()")
    assert paper() > 600
    browser.refresh()
    assert paper() > 600
    browser.execute_script("localStorage.clear()")
