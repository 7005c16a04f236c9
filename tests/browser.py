"""Opens pages in headless Chromium (Qt WebEngine) and prints, as JSON, how they are laid out; a process of its own.

    python tests/browser.py PAGE.html [FOLDER]      FOLDER receives a screenshot of each version

For each of two widths, on a light or a dark screen (the environment variable DARK=1): the width of the content, what
sticks out of the screen, the size of the pictures that are shown, the colours, and what the page logged.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
DARK = os.environ.get("DARK") == "1"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = " ".join(
    ["--no-sandbox", "--disable-gpu", "--log-level=3", *["--blink-settings=preferredColorScheme=0"] * DARK]
)

from PySide6.QtCore import QTimer, QUrl  # noqa: E402
from PySide6.QtWebEngineCore import QWebEnginePage  # noqa: E402
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402

WIDTHS = (390, 1280)
LOOK = """(() => {
  const wide = e => e.closest('.wide') !== null;
  const out = [...document.querySelectorAll('body *')].filter(e => !wide(e) && e.getBoundingClientRect().right
    > innerWidth + 0.5).map(e => e.tagName);
  const css = getComputedStyle(document.body);
  return JSON.stringify({width: innerWidth, dark: matchMedia('(prefers-color-scheme: dark)').matches,
    content: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight, out: out,
    page: css.backgroundColor, ink: css.color, size: parseFloat(css.fontSize),
    first: document.querySelector('h1').nextElementSibling.textContent,
    pictures: [...document.images].map(i => ({loaded: i.complete && i.naturalWidth > 0, natural: i.naturalWidth,
      shown: i.getBoundingClientRect().width, version: i.currentSrc.length}))});
})()"""


class Page(QWebEnginePage):
    """A page that keeps what it logs."""

    def __init__(self, parent):
        super().__init__(parent)
        self.logged = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.logged.append(message)


def main(path: str, folder: str | None) -> None:
    app = QApplication(sys.argv[:1])
    view = QWebEngineView()
    page = Page(view)
    view.setPage(page)
    found, left = [], list(WIDTHS)

    def begin(ok=True):
        if not left:
            print(json.dumps(found))
            app.quit()
            return
        view.resize(left[0], 900)
        view.show()
        QTimer.singleShot(600, measure)

    def measure():
        page.runJavaScript(LOOK, record)

    def record(text):
        found.append(json.loads(text) | {"logged": page.logged})
        if folder is None:
            left.pop(0)
            begin()
            return
        view.resize(left[0], min(found[-1]["height"], 6000))
        QTimer.singleShot(900, keep)

    def keep():
        view.grab().save(str(pathlib.Path(folder) / f"{left.pop(0)}_{'dark' if DARK else 'light'}.png"))
        begin()

    page.loadFinished.connect(begin)
    page.load(QUrl.fromLocalFile(os.path.abspath(path)))
    app.exec()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
