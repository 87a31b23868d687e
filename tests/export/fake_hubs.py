"""Two hubs on loopback that speak what the clients call, and keep what they receive."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "tok-3f9a-SECRET-77c1"
OWNER = "alice"


@dataclass
class Reply:
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeHub:
    """State and faults of a hub.

    Attributes:
        repos: repository -> file -> content.
        private: repository -> whether it was asked to be.
        blobs: sha256 -> content, shared by all repositories.
        hidden: repositories that exist and that the token cannot see.
        readonly: the token may not write.
        seen: "METHOD path" of every request.
        put: sha256 of every blob that was sent, again if it was sent again.
        fail: called with "METHOD path"; a reply of it goes out in place of the hub's, "drop" cuts the line.
    """

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    readonly: bool = False
    seen: list[str] = field(default_factory=list)
    put: list[str] = field(default_factory=list)
    fail: Callable[[str], Reply | str | None] = lambda line: None

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply:
        if match := re.fullmatch(r"/blob/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match.group(1)
            self.blobs[match.group(1)] = body
            self.put.append(match.group(1))
            return Reply()
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.unauthorized()
        return self.api(method, path, json.loads(body) if body[:1] == b"{" and b"\n{" not in body else body)

    def unauthorized(self) -> Reply:
        raise NotImplementedError

    def api(self, method: str, path: str, body: Any) -> Reply:
        raise NotImplementedError

    def wanted(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """git-lfs batch answer: an upload address for each blob that is not there."""
        return [
            {**o, "actions": {"upload": {"href": f"{self.endpoint}/blob/{o['oid']}"}}}
            for o in objects
            if o["oid"] not in self.blobs
        ]


class FakeModelScope(FakeHub):
    def unauthorized(self) -> Reply:
        return Reply(401, {"Code": 10990101001, "Message": "invalid access token", "Success": False})

    def api(self, method: str, path: str, body: Any) -> Reply:
        if (method, path) == ("GET", "/openapi/v1/users/me"):
            return Reply(body={"success": True, "data": {"username": OWNER, "email": "a@b.c"}})
        if (method, path) == ("POST", "/api/v1/models"):
            return self.create(f"{body['Path']}/{body['Name']}", body)
        if match := re.fullmatch(r"/(?:openapi/v1|api/v1)/models/([^/]+/[^/]+)", path):
            if match.group(1) not in self.repos:
                return Reply(404, {"Code": 10010205001, "Message": "model not found", "Success": False})
            return Reply(body={"Code": 200, "Data": {"Name": match.group(1)}, "Success": True})
        if match := re.fullmatch(r"/api/v1/repos/models/([^/]+/[^/]+)/(.*)", path):
            if self.readonly:
                return Reply(
                    403, {"Code": 10010101403, "Message": "no permission to write", "Success": False}
                )
            repo = self.repos[match.group(1)]
            if match.group(2) == "info/lfs/objects/batch":
                return Reply(body={"Code": 200, "Data": {"objects": self.wanted(body["objects"])}})
            assert match.group(2) == "commit/master"
            for action in body["actions"]:
                assert action["action"] == "create"
                content = base64.b64decode(action["content"])
                repo[action["path"]] = self.blobs[action["sha256"]] if action["type"] == "lfs" else content
            return Reply(body={"Code": 200, "Data": {"oid": "c0ffee"}, "Success": True})
        match = re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path)
        assert match, f"{method} {path}"
        files = [
            {
                "Path": name,
                "Size": len(content),
                "Type": "blob",
                "Sha256": hashlib.sha256(content).hexdigest(),
            }
            for name, content in self.repos[match.group(1)].items()
        ]
        return Reply(body={"Code": 200, "Data": {"Files": files}})

    def create(self, repo_id: str, body: Any) -> Reply:
        if repo_id in self.repos or repo_id in self.hidden:
            return Reply(400, {"Code": 10010101001, "Message": "already exists", "Success": False})
        self.repos[repo_id] = {}
        self.private[repo_id] = body["Visibility"] == 1
        return Reply(body={"Code": 200, "Data": {"Name": body["Name"]}, "Success": True})


class FakeHuggingFace(FakeHub):
    def unauthorized(self) -> Reply:
        message = "Invalid credentials in Authorization header"
        return Reply(401, {"error": message}, {"X-Error-Message": message})

    def api(self, method: str, path: str, body: Any) -> Reply:
        if (method, path) == ("GET", "/api/whoami-v2"):
            return Reply(body={"name": OWNER, "type": "user"})
        if (method, path) == ("POST", "/api/validate-yaml"):
            return Reply(body={"errors": [], "warnings": []})
        if (method, path) == ("POST", "/api/repos/create"):
            repo_id = f"{body['organization']}/{body['name']}"
            self.repos[repo_id] = {}
            self.private[repo_id] = body.get("visibility") == "private" or bool(body.get("private"))
            return Reply(body={"url": f"{self.endpoint}/{repo_id}", "name": repo_id})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            known = [o for o in body["objects"] if o["oid"] in self.blobs]
            return Reply(body={"transfer": "basic", "objects": [*self.wanted(body["objects"]), *known]})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path)
        assert match, f"{method} {path}"
        repo_id, what = match.groups()
        if repo_id not in self.repos:
            return Reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if method == "POST" and self.readonly:
            return Reply(403, {"error": "Forbidden: you may not write here"})
        repo = self.repos[repo_id]
        if what is None or what == "revision/main":
            return Reply(body={"id": repo_id, "sha": "0" * 40, "siblings": [], "tags": [], "private": True})
        if what == "preupload/main":
            return Reply(body={"files": [self.mode(repo, file["path"]) for file in body["files"]]})
        if what == "commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo[value["path"]] = self.blobs[value["oid"]]
            return Reply(body={"commitUrl": f"{self.endpoint}/{repo_id}/commit/1", "commitOid": "1" * 40})
        assert what == "tree/main", path
        return Reply(body=[self.entry(path, content) for path, content in repo.items()])

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if path.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            entry |= {"oid": "0" * 40, "lfs": {"oid": digest, "size": len(content), "pointerSize": 134}}
        return entry

    def mode(self, repo: dict[str, bytes], path: str) -> dict[str, Any]:
        lfs = path.endswith(".safetensors")
        oid = None
        if path in repo:
            oid = hashlib.sha256(repo[path]).hexdigest() if lfs else git_sha1(repo[path])
        mode = "lfs" if lfs else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub at work, on a free port of 127.0.0.1."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_any(self) -> None:
            path = unquote(urlsplit(self.path).path)
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else self.chunked()
            line = f"{self.command} {path}"
            hub.seen.append(line)
            reply = hub.fail(line) or hub.answer(self.command, path, self.headers, body)
            if reply == "drop":
                self.close_connection = True
                self.connection.close()
                return
            assert isinstance(reply, Reply)
            content = b"" if reply.body is None else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_any  # noqa: N815

        def chunked(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
