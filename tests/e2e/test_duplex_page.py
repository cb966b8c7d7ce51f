"""The server's page in a real browser: type, see both lanes, stop it, come back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
Server = Callable[..., AbstractContextManager[tuple[dict[str, str], Any]]]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of a headless browser, which fails the test on any error of its script."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        found = browser.new_page()
        found.set_default_timeout(60_000)
        problems: list[str] = []
        found.on("pageerror", lambda error: problems.append(str(error)))
        yield found
        browser.close()
        assert not problems


def until(page: Any, what: str) -> None:
    """Wait until an expression is true; the page's own policy forbids to wait within it."""
    for _ in range(300):
        if page.evaluate(what):
            return
        page.wait_for_timeout(100)
    raise AssertionError(what)


def test_both_lanes_fill_while_one_types(
    server: Server, page: Any, listener: Path, tmp_path: Path
) -> None:
    with server(listener, tmp_path) as (where, _):
        page.goto(where["url"])
        page.wait_for_selector("#state[data-is=open]:has-text('listening')")
        page.type("#words", "what is <idle> tea ")
        page.wait_for_selector(".you:has-text('what')")
        assert page.input_value("#words") == ""
        page.type("#words", "then")
        page.click("#send")
        page.wait_for_selector(".you:has-text('then')")
        page.wait_for_selector(".it:has-text('dede')")
        page.wait_for_selector("#figures:has-text('p(silence)')")
        assert "<idle>" in page.inner_text("#lanes")
        assert page.locator(".it", has_text="dede").first.inner_text().startswith("de")


def test_an_answer_is_stopped_by_the_button(
    server: Server, page: Any, listener: Path, tmp_path: Path
) -> None:
    with server(listener, tmp_path, "-s", "slice.period_ms=2000") as (where, _):
        page.goto(where["url"])
        page.wait_for_selector("#state:has-text('listening')")
        page.type("#words", "talk ")
        page.wait_for_selector(".it:has-text('de')")
        page.click("#stop")
        page.wait_for_selector(".it.interrupted")


def test_a_page_comes_back_to_its_session(
    server: Server, page: Any, listener: Path, tmp_path: Path
) -> None:
    with server(listener, tmp_path) as (where, _):
        page.goto(where["url"])
        page.wait_for_selector("#state:has-text('listening')")
        page.type("#words", "hello ")  # a session in which nothing was said isn't kept
        page.wait_for_selector(".it:has-text('de')")
        first = page.evaluate("mine.id")
        page.evaluate("socket.close()")
        page.wait_for_selector("#state:has-text('trying again')")
        page.wait_for_selector("#state:has-text('listening')")
        until(page, "!resuming")
        assert page.evaluate("mine.id") == first
        before = page.evaluate("seq")
        until(page, f"seq > {before}")
