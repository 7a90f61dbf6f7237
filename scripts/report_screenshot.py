"""Take the pictures of a report that the README and the docs show, with an installed Chromium.

    python scripts/report_screenshot.py RUN [--step 8] [--prompt ID] [--out docs]

Writes report.png, the top of the overview, and report_group.png, the page of one group: by default the last step's
group in which the share of passing responses is closest to a half.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from lpo_jax.inspection.load import groups_of, read_run, read_samples
from lpo_jax.inspection.page import save_report

SIZE = {"width": 1300, "height": 860}


def mixed_prompt(rows: list[dict]) -> str:
    """The id of the group in which the share of passing responses is closest to a half."""
    passed = {
        str(group[0]["id"]): sum(row["outcome"] == "pass" for row in group) / len(group)
        for group in groups_of(rows)
    }
    return min(passed, key=lambda prompt: abs(passed[prompt] - 0.5))


def main() -> None:
    """Take the pictures that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--step", type=int)
    parser.add_argument("--prompt")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    run = read_run(arguments.run)
    step = arguments.step or max(run.rollouts)
    prompt = arguments.prompt or mixed_prompt(read_samples(run.rollouts[step])[0])
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        report = save_report([run.path], Path(folder) / "report.html")
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        for name, route, shown in (
            ("report", "", ".plot .main-svg"),
            ("report_group", f"#group/0/{step}/{prompt}", ".simplex"),
        ):
            page.goto(report.as_uri() + route)
            page.reload()
            page.wait_for_selector(shown)
            page.wait_for_timeout(2000)  # until the other charts are drawn
            page.screenshot(path=arguments.out / f"{name}.png")
            print(f"wrote {arguments.out / name}.png")
        browser.close()


if __name__ == "__main__":
    main()
