"""The playground in a real browser, on the real endpoint: what is drafted is marked, figures add up, nothing is logged.

Screenshots go to the folder that FARM_SCREENSHOTS names.
"""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.family import build_family, publish, tiny_expert

pytestmark = [pytest.mark.ray, pytest.mark.browser]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="module")
def url(ray_cluster, tmp_path_factory) -> Iterator[str]:
    from ray import serve

    from serve.app import BuildArgs, build

    store = build_family(tmp_path_factory.mktemp("family"), ("adapted", "bare"))
    publish(store, "adapted", tiny_expert(1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.run(build(BuildArgs(store=store, port=port, k=3, control="fixed-3")), name="farm", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(params=["light", "dark"])
def page(request, url) -> Iterator[Any]:
    """A page whose errors fail the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 760}, color_scheme=request.param)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if is_mistake(line) else None)
        page.goto(url)
        page.locator("#target option").nth(1).wait_for(state="attached")
        page.click("summary")
        yield page
        keep = os.environ.get("FARM_SCREENSHOTS")
        if keep:
            page.screenshot(path=str(Path(keep) / f"{request.node.originalname}-{request.param}.png"))
        browser.close()
        assert errors == []


def is_mistake(line: Any) -> bool:
    """A refusal of the endpoint is no mistake of the page, though the browser logs it as one."""
    return line.type == "error" and "413" not in line.text


def say(page: Any, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant.open", state="detached")


def test_a_chat_streams_and_shows_what_was_drafted_and_how_well(page, url):
    page.select_option("#target", "adapted")
    assert page.inner_text("#version") == "v1"
    page.fill("#max-tokens", "24")
    say(page, "the quick brown fox")
    fields = {"model": "adapted", "temperature": 0, "max_tokens": 24}
    messages = [{"role": "user", "content": "the quick brown fox"}]
    answer = httpx.post(
        f"{url}/v1/chat/completions", json={**fields, "messages": messages}, timeout=60
    ).json()
    assert page.text_content(".assistant .said") == answer["choices"][0]["message"]["content"]
    rounds = int(re.search(r"in (\d+) rounds", page.inner_text(".about")).group(1))
    assert page.inner_text("#tokens") == "24"
    assert page.inner_text("#tau") == f"{23 / rounds:.2f}"
    say(page, "un été")
    assert page.locator(".message").count() == 4
    page.click("#compare")
    page.wait_for_selector("#speedup b")
    assert "times" in page.inner_text("#speedup")


@pytest.mark.parametrize("leave", ["clear", "target"])
def test_an_answer_that_is_left_is_ended_and_in_no_later_conversation(page, leave):
    page.select_option("#target", "adapted")
    page.fill("#max-tokens", "900")
    page.fill("#prompt", "the quick brown fox")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.assistant.open .said')?.textContent")
    if leave == "clear":
        page.click("#clear")
    else:
        page.select_option("#target", "bare")
    page.wait_for_function("document.querySelector('#send').textContent === 'Send'", timeout=1000)
    page.fill("#max-tokens", "5")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "un été")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "un été"}]


def test_a_refusal_is_shown_and_the_conversation_goes_on(page):
    page.fill("#max-tokens", "5")
    say(page, "x" * (2**20 + 1))
    assert "characters" in page.inner_text(".failed")
    say(page, "un été")
    assert page.locator(".failed").count() == 1
