"""Pulling from a hub: a small server that speaks the hub's protocol stands in for the real one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
COMMIT = "c0ffee" * 6 + "beef"


@pytest.fixture
def hub(tiny_checkpoint: Path) -> Iterator[str]:
    """The address of a hub that holds one repository, me/tiny."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            file = tiny_checkpoint / path.rpartition("/")[2]
            data, headers = b"", {}
            if path.startswith("/api/models/me/tiny/tree/"):
                found = sorted(tiny_checkpoint.iterdir())
                entry = {"type": "file", "oid": "0" * 40}
                tree = [{**entry, "path": f.name, "size": f.stat().st_size} for f in found]
                data = json.dumps(tree).encode()
            elif path.startswith("/api/models/me/tiny"):
                files = [{"rfilename": f.name} for f in sorted(tiny_checkpoint.iterdir())]
                data = json.dumps({"id": "me/tiny", "sha": COMMIT, "siblings": files}).encode()
            elif path.startswith("/me/tiny/resolve/") and file.is_file():
                data = file.read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"'
                headers["X-Repo-Commit"] = COMMIT
            else:
                headers["X-Error-Code"] = "RepoNotFound"
            self.send_response(200 if data else 404)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_a_hub_model_is_pulled_once_with_its_commit(
    fresh: Run, hub: str, tiny_checkpoint: Path
) -> None:
    online = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    first = fresh("pull", "me/tiny", "--json", **online)
    assert first.returncode == 0, first.stderr
    path = Path(json.loads(first.stdout)["path"])
    assert (path / "model.safetensors").read_bytes() == (
        tiny_checkpoint / "model.safetensors"
    ).read_bytes()
    assert not (path / ".cache").exists()
    steps = json.loads((path / "bmkit.json").read_text())["steps"]
    assert steps[0]["recipe"] == {"name": "me/tiny", "source": "hub:me/tiny", "commit": COMMIT}
    offline = fresh("pull", "me/tiny", "--json")
    assert json.loads(offline.stdout)["reused"] is True, offline.stderr


def test_a_name_that_the_hub_does_not_know(fresh: Run, hub: str, home: Path) -> None:
    done = fresh("pull", "me/tinny", HF_ENDPOINT=hub, HF_HUB_OFFLINE="0")
    assert done.returncode == 3, done.stderr
    assert "me/tinny" in done.stderr and "Traceback" not in done.stderr
    assert not list(home.glob("models/*"))
    assert not list(home.glob("models/.*"))
