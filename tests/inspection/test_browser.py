"""The report in a real browser: no network, no errors, the click path, filters, dark and narrow screens, hostile texts.

All tests skip where no Chromium is installed.
"""

import shutil
import threading

import pytest
from browser import Page, chromium
from synthetic_run import HOSTILE, write_run

from lpo_jax.inspection.load import read_run, read_samples
from lpo_jax.inspection.page import save_report
from lpo_jax.inspection.server import Watcher, make_server


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(synthetic_run, tmp_path_factory):
    """The report of one run, opened from the disk."""
    return save_report([synthetic_run], tmp_path_factory.mktemp("reports") / "one.html")


@pytest.fixture(scope="module")
def other_run(synthetic_run, tmp_path_factory):
    """A run that draws other responses from step 3 on."""
    path = shutil.copytree(synthetic_run, tmp_path_factory.mktemp("runs") / "other")
    second = write_run(tmp_path_factory.mktemp("runs") / "second", steps=6, tokens=True, seed=1)
    for step in (3, 4, 5, 6):
        shutil.copy(second / "rollouts" / f"{step}.jsonl", path / "rollouts")
    shutil.copy(second / "metrics.jsonl", path)
    return path


@pytest.fixture(scope="module")
def opened(browser, report):
    """The report of one run, opened once: a page takes seconds to load."""
    page = Page(browser)
    page.open(report)
    yield page
    page.tab.close()


@pytest.fixture
def page(opened):
    """The opened report at its overview."""
    opened.go("", ".verdict")
    yield opened
    assert not opened.problems


def draw_all(page):
    page.tab.evaluate("document.querySelectorAll('.plot').forEach(draw)")


def test_every_panel_has_content(page):
    draw_all(page)
    empty = page.tab.evaluate(
        "[...document.querySelectorAll('.chart')].filter(c => !c.querySelector('.scatterlayer path, .barlayer path'))"
        ".map(c => c.querySelector('h3').textContent)"
    )
    assert not empty
    sections = page.tab.evaluate(
        "[...document.querySelectorAll('[data-section]')].map(s => [s.id, s.querySelectorAll('.chart').length])"
    )
    assert dict(sections).keys() == {"learning", "groups", "update", "health", "sampler", "time"}
    assert all(count for _, count in sections)
    assert "held-out countdown pass@1" in page.texts(".verdict")[0]
    assert page.texts(".diagnosis h3") == ["truncated-responses"]
    assert page.texts(".diagnosis a") == ["step 3", "step 4", "step 5", "step 6"]
    assert len(page.texts(".step-table tbody tr")) == 6
    for section in ("#prompts", "#audit", "#settings", "#sampler"):
        assert page.tab.locator(f"{section} tbody tr").count() > 3


def test_from_the_learning_curve_to_a_response(page, synthetic_run):
    page.tab.wait_for_selector("#learning .plot .main-svg")
    plot = page.tab.locator("#learning .plot").nth(1)
    plot.scroll_into_view_if_needed()
    plot.locator(".point").nth(2).hover(force=True)
    box = plot.locator(".point").nth(2).bounding_box()
    page.tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.tab.wait_for_selector(".group-table")
    assert page.tab.url.endswith("#step/0/3")
    page.tab.locator(".group-table tbody tr").first.click()
    page.tab.wait_for_selector(".response")
    rows = read_samples(synthetic_run / "rollouts" / "3.jsonl")[0][:4]
    assert page.texts(".response .text") == [row["output"] for row in rows]
    shown = page.texts(".response dl")
    for row, facts in zip(rows, shown):
        for key, name in {"score": "reward", "target": "w*", "policy": "P", "coefficient": "c"}.items():
            assert f"{name}\n{float(f'{row[key]:.4g}'):.4g}" in facts
    assert page.tab.locator("svg.simplex circle").count() == 4 + 3
    page.tab.locator(".bars a").nth(2).click()
    assert page.tab.locator(".response.chosen").get_attribute("id") == "response-2"
    page.tab.select_option("#tint", "tl")
    assert page.tab.locator(".token").count() == sum(len(row["token_text"]) for row in rows)
    page.tab.go_back()
    page.tab.wait_for_selector(".group-table")


def test_filters(page, synthetic_run):
    run = read_run(synthetic_run)
    rows = [row for path in run.rollouts.values() for row in read_samples(path)[0]]
    page.go("find", "#filters")

    def found(**values) -> int:
        page.tab.evaluate("document.getElementById('filters').reset()")
        for name, value in values.items():
            if name in ("outcome", "order"):
                page.tab.select_option(f"[name={name}]", value)
            else:
                page.tab.fill(f"[name={name}]", value)
        page.tab.click("#filters button")
        page.tab.wait_for_selector("#found:has-text('responses found')")
        return int(page.texts("#found")[0].split()[0])

    count = lambda holds: sum(map(bool, map(holds, rows)))  # noqa: E731
    assert found() == len(rows)
    assert found(outcome="wrong") == count(lambda row: row["outcome"] == "wrong")
    assert found(**{"from": "2", "to": "3"}) == count(lambda row: 2 <= row["step"] <= 3)
    assert found(low="0.5") == count(lambda row: row["score"] >= 0.5)
    assert found(short="40", long="45") == count(lambda row: 40 <= row["tokens"] <= 45)
    assert found(text="MULTIPLY by") == count(lambda row: "multiply by" in row["output"])
    assert found(text="no such text") == 0
    assert found(order="push") == len(rows)
    first = page.tab.locator("#results tbody tr").first
    largest = max(abs(row["coefficient"]) for row in rows)
    assert abs(float(first.locator("td").nth(5).inner_text())) == pytest.approx(largest, rel=5e-3)
    first.click()
    page.tab.wait_for_selector(".response.chosen")


@pytest.mark.parametrize("width", [pytest.param(1300, marks=pytest.mark.slow), 390])
def test_dark_and_narrow_screens(browser, report, width):
    page = Page(browser, width, "dark")
    page.open(report)
    for route, selector in (("", ".verdict"), ("step/0/2", ".group-table"), ("group/0/2/8", ".response")):
        page.go(route, selector)
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in ("dark", "light"):
        page.tab.emulate_media(color_scheme=scheme)
        ground = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.tab.evaluate("getComputedStyle(document.body).color")
        brightness = [
            sum(map(int, of.removeprefix("rgb(").removesuffix(")").split(","))) for of in (ground, ink)
        ]
        assert (brightness[0] < 100 and brightness[1] > 600) == (scheme == "dark")
    page.tab.close()
    assert not page.problems


def test_one_prompt_across_steps(page):
    page.go("prompt/0/5", ".response")
    assert page.texts(".response header a") == ["step 1", "step 5"]
    assert "olved at" in page.texts("#detail > p")[0]


def test_two_runs(browser, synthetic_run, other_run, tmp_path):
    page = Page(browser)
    page.open(save_report([synthetic_run, other_run], tmp_path / "two.html"))
    page.tab.wait_for_selector("#pairs .differs")
    assert "Step 3, prompt" in page.texts("#two-runs .card p")[0]
    common, rest = page.texts("#first-difference .common"), page.texts("#first-difference .differs")
    assert common[0] == common[1] and rest[0][:1] != rest[1][:1]
    draw_all(page)
    names = page.tab.evaluate("document.querySelector('#learning .plot').data.map(trace => trace.name)")
    assert "sound: pass@1" in names and "other: pass@1" in names
    page.tab.close()
    assert not page.problems


def test_hostile_texts_are_shown_and_not_executed(browser, tmp_path):
    run = write_run(tmp_path / "hostile", steps=2, responses=8, hostile=True, tokens=True)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("lpo-forward", "<img src=x onerror=window.hacked=1>"))
    about = run / "run.json"
    about.write_text(about.read_text().replace("cpu cpu", "</script><script>window.hacked=1</script>"))
    metrics = run / "metrics.jsonl"
    metrics.write_text(
        metrics.read_text().replace("countdown/acc", "<img src=x onerror=window.hacked=1>/acc")
    )
    page = Page(browser)
    path = save_report([run], tmp_path / "<script>window.hacked=1<script>.html")
    page.open(path)
    draw_all(page)
    page.tab.fill("[name=text]", "<script>")
    page.tab.click("#filters button")
    page.tab.wait_for_selector("#results tbody tr")
    page.go("prompt/0/4", ".response")
    page.go("group/0/1/4", ".response")
    shown = page.texts(".response .text")
    for text, visible in zip(shown, HOSTILE):
        assert text.startswith(
            visible.encode("unicode_escape", "surrogatepass").decode().replace("\\\\", "\\")[:20]
        )
    assert "\\x1b[31mred\\x07 \\x00 \\u202e reversed \\ud800" in shown[4]
    page.tab.select_option("#tint", "te")
    page.tab.wait_for_timeout(300)
    assert page.tab.evaluate("typeof window.hacked") == "undefined"
    assert (
        page.tab.evaluate(
            "document.querySelectorAll('iframe, #detail img, #detail script, #detail a[href^=data]').length"
        )
        == 0
    )
    page.tab.close()
    assert not page.problems


def test_the_policy_of_the_page_stops_a_script_that_is_injected(browser, report):
    """The second wall: also markup that reached the page would not run."""
    page = Page(browser)
    page.open(report)
    page.tab.evaluate(
        "document.getElementById('detail').innerHTML = '<img src=\"data:,\" onerror=\"window.hacked = 1\">';"
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 2'; document.body.append(s)"
    )
    page.tab.wait_for_timeout(300)
    assert page.tab.evaluate("typeof window.hacked") == "undefined"
    assert page.problems and all("Content Security Policy" in problem for problem in page.problems)
    page.tab.close()


def test_a_live_run_is_followed(browser, tmp_path):
    run = write_run(tmp_path / "live", steps=3)
    late = {name: (run / name).read_bytes() for name in ("rollouts/3.jsonl", "metrics.jsonl")}
    (run / "rollouts" / "3.jsonl").unlink()
    lines = late["metrics.jsonl"].splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:9])
    with make_server(Watcher([run]), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab = browser.new_page()
        tab.goto(f"http://127.0.0.1:{server.server_port}/")
        tab.wait_for_selector("#live:has-text('stopped, step 2')")
        assert tab.locator(".step-table tbody tr").count() == 2
        for name, content in late.items():
            (run / name).write_bytes(content)
        tab.wait_for_selector(".step-table tbody tr:nth-child(3)")
        tab.wait_for_selector("#live:has-text('finished, step 3')")
        tab.close()
        server.shutdown()
