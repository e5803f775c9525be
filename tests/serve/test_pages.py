"""The playground's HTTP contract: it is served, it loads nothing from elsewhere, and its parts are there."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from serve.pages import FOLDER, TYPES, router

app = FastAPI()
app.include_router(router)
client = TestClient(app)


def test_the_page_is_at_the_root_and_every_file_it_names_is_served():
    page = client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = set(re.findall(r'(?:src|href)="([^"]+)"', page.text))
    assert {f"playground/{name}" for name in TYPES if name != "index.html"} == named
    for path in named:
        answer = client.get(f"/{path}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == TYPES[path.removeprefix("playground/")]
        assert answer.content


def test_the_page_may_load_and_run_only_what_this_server_gives():
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]
    for name in TYPES:
        text = re.sub(r"http://www\.w3\.org/\S+", "", (FOLDER / name).read_text())
        assert not re.search(r"https?:|//cdn|@import|\bon\w+=\"|style=\"", text)


@pytest.mark.parametrize("name", ["../ingress.py", "..%2Fingress.py", "app.py", "app.js.map"])
def test_nothing_else_of_the_disk_is_served(name):
    assert client.get(f"/playground/{name}").status_code == 404


def test_what_the_script_looks_up_is_in_the_page():
    script, page = (FOLDER / "app.js").read_text(), (FOLDER / "index.html").read_text()
    ids = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert ids
    assert ids <= set(re.findall(r'id="([\w-]+)"', page))
    assert Path("serve/playground").resolve() == FOLDER.resolve()
