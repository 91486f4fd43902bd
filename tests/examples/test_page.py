"""The web page in a real browser: every control is used, and what it shows is what the pool says."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from serving import Served

from helpers.paths import EXAMPLES
from helpers.served_pool import TASKS, prompt_of, save_pool

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    return save_pool(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def address(pool: Path):
    """The page, served by a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(EXAMPLES / "serve_gradio.py")
    server = subprocess.Popen(
        [sys.executable, script, "--pool", str(pool), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=2).read()
            break
        except OSError:
            assert server.poll() is None, server.stdout.read()
            time.sleep(0.5)
    yield url
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture(scope="module")
def page(address: str):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        opened = browser.new_page(viewport={"width": 1280, "height": 800})
        opened.route("**/*", lambda route: route.continue_() if address in route.request.url else route.abort())
        opened.goto(address)
        opened.wait_for_selector("#ask")
        yield opened
        browser.close()


def ask(page) -> None:
    """Press the button and wait for the answer that belongs to it."""
    with page.expect_response(lambda response: "/queue/join" in response.url):
        page.click("#ask")
    page.wait_for_function("() => !document.querySelector('.progress-text, .eta-bar, .generating')")
    page.wait_for_timeout(500)


def bars(page) -> dict[str, int]:
    """Task -> percent, as the page shows them."""
    names = page.locator("#bars .confidence-set .label .text").all_inner_texts()
    shares = page.locator("#bars .confidence-set .label .confidence").all_inner_texts()
    return {name: int(share.rstrip("%")) for name, share in zip(names, shares, strict=True)}


def test_every_control(page, pool: Path, tmp_path) -> None:
    served = Served(pool)
    page.fill("#prompt textarea", prompt_of("b"))
    ask(page)
    weights = served.weights(prompt_of("b"))
    expected = served.answer(prompt_of("b"), weights, 16).text
    assert page.input_value("#answer textarea") == expected
    assert bars(page) == {name: pytest.approx(100 * weights[name], abs=1) for name in TASKS}
    assert "b leads with" in page.inner_text("#note") and not page.locator("#base textarea").is_visible()

    page.get_by_role("checkbox", name="b", exact=True).uncheck()  # mask the task that leads
    page.get_by_label("Compare with the base model").check()
    page.fill("#length input[type=number]", "5")
    page.press("#length input[type=number]", "Tab")
    ask(page)
    masked = served.weights(prompt_of("b"), ["a", "c"])
    assert page.input_value("#answer textarea") == served.answer(prompt_of("b"), masked, 5).text
    assert bars(page).get("b", 0) == 0 and sum(bars(page).values()) in (99, 100, 101)
    assert page.input_value("#base textarea") == served.answer(prompt_of("b"), None, 5).text

    for name in ("a", "c"):
        page.get_by_role("checkbox", name=name, exact=True).uncheck()
    ask(page)
    assert "tick at least one" in page.locator(".toast-body").first.inner_text()
    page.locator(".toast-close").first.click()
    for name in TASKS:
        page.get_by_role("checkbox", name=name, exact=True).check()

    page.click("#clear")
    assert page.input_value("#prompt textarea") == ""
    ask(page)
    assert "prompt is empty" in page.locator(".toast-body").first.inner_text()
    page.locator(".toast-close").first.click()

    page.get_by_text(prompt_of("c"), exact=True).click()  # an example
    page.wait_for_function("text => document.querySelector('#prompt textarea').value === text", arg=prompt_of("c"))
    ask(page)
    assert "c leads with" in page.inner_text("#note")

    picture = Path(os.environ.get("PAGE_PICTURE", tmp_path / "page.png"))
    page.screenshot(path=picture)
    assert picture.stat().st_size > 20_000
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280, "nothing is cut off at 1280 pixels"
    for control in ("#ask", "#prompt", "#allowed", "#answer", "#bars"):
        box = page.locator(control).bounding_box()
        assert box["y"] + box["height"] <= 800 and box["x"] + box["width"] <= 1280, f"{control} is below the fold"


def test_a_wrong_folder_is_one_line(tmp_path) -> None:
    script = str(EXAMPLES / "serve_gradio.py")
    done = subprocess.run(
        [sys.executable, script, "--pool", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "holds no pool" in done.stderr and "Traceback" not in done.stderr
