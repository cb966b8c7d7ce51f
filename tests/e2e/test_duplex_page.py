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
        page.wait_for_selector(".it:has-text('CDCD')")
        page.wait_for_selector("#figures:has-text('p(silence)')")
        assert "<idle>" in page.inner_text("#lanes")
        assert page.locator(".it", has_text="CDCD").first.inner_text().startswith("CD")


def test_an_answer_is_stopped_by_the_button(
    server: Server, page: Any, listener: Path, tmp_path: Path
) -> None:
    with server(listener, tmp_path, "-s", "slice.agent_tokens=450") as (where, _):
        page.goto(where["url"])
        page.wait_for_selector("#state:has-text('listening')")
        page.type("#words", "talk ")
        page.wait_for_selector(".it:has-text('CD')")
        page.click("#stop")
        page.wait_for_selector(".it.interrupted")


def test_a_page_comes_back_to_its_session(
    server: Server, page: Any, listener: Path, tmp_path: Path
) -> None:
    with server(listener, tmp_path) as (where, _):
        page.goto(where["url"])
        page.wait_for_selector("#figures:has-text('tokens')")
        first = page.evaluate("mine.id")
        page.evaluate("socket.close()")
        page.wait_for_selector("#state:has-text('trying again')")
        page.wait_for_selector("#state:has-text('listening')")
        page.wait_for_function("!resuming")
        assert page.evaluate("mine.id") == first
        before = page.evaluate("seq")
        page.wait_for_function(f"seq > {before}")
