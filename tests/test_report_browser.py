"""The report in headless Chromium: on a phone and on a desk, light and dark, without errors.

Needs Qt's build of Chromium (`pip install -e '.[browser]'`).
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_report import by_position, facts, passkeys, perplexities, write_log, write_run

from lcx import report

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("PySide6") is None
    or importlib.util.find_spec("PySide6.QtWebEngineWidgets") is None,
    reason="no browser: install the extra browser",
)
LONG = "a model with a name that is much longer than a screen of 390 pixels is wide, without and with_underscores_in_it"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Two pages: many models with long names by everything, and one training run."""
    folder = tmp_path_factory.mktemp("browser")
    ropes = {"unscaled": "default", LONG: "yarn x4", "PI": "linear x4", "yarn-tuned": "yarn x4"}
    results = []
    for place, (name, rope) in enumerate(ropes.items()):
        made = {
            "loss_by_position": by_position(rope, [1.4, 1.3, 2.0 - place / 4, 3.0 - place / 2]),
            "perplexity": perplexities(rope, {256: 3.0, 1024: 40.0 / (place + 1)}),
            "passkey": passkeys(rope, [1, 0.5, 0.1 * place]),
        }
        where = f"/a/very/long/path/to/the/checkpoint/of/{name.replace(' ', '_')}"
        results.append(write_run(folder / f"{place}", name, made, checkpoint=where, model=facts(rope)))
    work = write_log(
        folder / "work", [(step, 1 + 30 / step) for step in range(10, 200)], [(100, 1.4), (199, 1.3)]
    )
    return [
        report.build(results=results, workdir=[work], output=str(folder / "many"), title="Many_models " * 4),
        report.build(workdir=[work], output=str(folder / "one")),
    ]


def opened(path: pathlib.Path, *, dark: bool) -> list[dict]:
    script = pathlib.Path(__file__).with_name("browser.py")
    done = subprocess.run(
        [sys.executable, str(script), str(path)],
        env=os.environ | {"DARK": str(int(dark))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def brightness(rgb: str) -> float:
    return sum(int(part) for part in rgb.removeprefix("rgb(").removesuffix(")").split(",")) / 3


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(pages, dark):
    shown = {}
    for path in pages:
        for view in opened(path, dark=dark):
            assert view["dark"] is dark and view["logged"] == []
            assert view["content"] <= view["width"] and view["out"] == [], "the page is wider than the screen"
            assert view["size"] >= 16 and len(view["first"]) > 80
            assert (brightness(view["page"]) < 60) is dark and (brightness(view["ink"]) > 200) is dark
            for picture in view["pictures"]:
                assert picture["loaded"] and 0.85 < picture["shown"] / picture["natural"] <= 1.001
            shown[path, view["width"]] = [picture["natural"] for picture in view["pictures"]]
    for path in pages:
        narrow, wide = shown[path, 390], shown[path, 1280]
        assert len(narrow) == len(wide) >= 1
        assert set(narrow) == {357} or max(narrow) < 390 < 800 < min(wide)
