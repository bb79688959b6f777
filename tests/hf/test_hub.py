"""The Hub's own client against a server in this process: nothing is patched but the address and the cache's folder."""

import functools
import hashlib
import http.server
import json
import re
import threading

import huggingface_hub
import ml_dtypes
import published
import pytest
from huggingface_hub import constants

from dsv2_jax.config import ConfigError
from dsv2_jax.hf import pretrained
from dsv2_jax.hf.convert import import_folder
from dsv2_jax.hf.pretrained import from_pretrained
from dsv2_jax.hf.safetensors import Folder, FolderError

COMMIT, NAME = "c" * 40, "someone/small-model"
SHARD = "model-00001-of-00002.safetensors"


class Hub(http.server.BaseHTTPRequestHandler):
    """Revision, tree and files of one model, as the Hub answers. Large files' etag is the SHA-256 of the original."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        files, path = self.server.files, self.path.partition("?")[0]
        if match := re.fullmatch(rf"/{NAME}/resolve/{COMMIT}/(.+)", path):
            return self._file(match[1])
        if path == f"/api/models/{NAME}/revision/main":
            return self._send(json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        if path == f"/api/models/{NAME}/tree/{COMMIT}":
            tree = [{"type": "file", "path": p, "size": len(v), "oid": "0" * 40} for p, v in files.items()]
            return self._send(json.dumps(tree).encode())
        return self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})

    do_HEAD = do_GET

    def _file(self, name: str):
        self.server.asked.append((self.command, name, self.headers["Range"]))
        content, kind = self.server.files[name], "safetensors" if name.endswith(".safetensors") else "json"
        etag = self.server.etags[name] if kind == "safetensors" else hashlib.sha1(content).hexdigest()
        headers, first = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            first = int(match[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        breaks = self.command == "GET" and self.server.breaks.get(name, 0) > 0
        self.server.breaks[name] = self.server.breaks.get(name, 0) - breaks
        self._send(content[first:], 206 if first else 200, headers, breaks)

    def _send(self, body: bytes, status=200, headers=(), breaks=False):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if breaks else body)
        self.close_connection = breaks

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server. `files` may be changed, `breaks` says how often a file's answer ends in its middle."""
    config = published.LITE | {"num_hidden_layers": 2}
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in published.weights(config).items()}
    folder = published.write_folder(tmp_path / "origin", config, tensors)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {file.name: file.read_bytes() for file in folder.iterdir()} | {"README.md": b"not needed"}
    server.etags = {name: hashlib.sha256(content).hexdigest() for name, content in server.files.items()}
    server.asked, server.breaks, server.origin = [], {}, folder
    where = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": tmp_path / "cache"}
    download = functools.partial(huggingface_hub.snapshot_download, **where)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_once_and_opened(hub):
    for _ in range(2):
        model, tokenizer = from_pretrained(NAME, verify=True)
        assert (model.config.layers, tokenizer) == (2, None)
    fetched = sorted(name for command, name, _ in hub.asked if command == "GET")
    assert fetched == sorted(hub.files.keys() - {"README.md"})
    folder = Folder(pretrained.local_folder(NAME))
    assert all(file.read_bytes() == hub.files[file.name] for file in folder.files())


def test_a_connection_that_breaks_is_resumed_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what the client writes at once
    hub.breaks[SHARD] = 1
    folder = pretrained.local_folder(NAME)
    assert (folder / SHARD).read_bytes() == hub.files[SHARD]
    ranges = [held for command, name, held in hub.asked if (command, name) == ("GET", SHARD)]
    assert ranges == [None, f"bytes={len(hub.files[SHARD]) // 2 // 1000 * 1000}-"]


def test_bytes_that_are_not_those_of_the_recorded_sum_are_found(hub, tmp_path):
    """The client compares lengths alone; the import, and verify=True, the SHA-256."""
    damaged = bytearray(hub.files[SHARD])
    damaged[-1] ^= 1
    hub.files[SHARD] = bytes(damaged)
    folder = pretrained.local_folder(NAME)
    for use in (lambda: from_pretrained(NAME, verify=True), lambda: import_folder(folder, tmp_path / "ours")):
        with pytest.raises(FolderError, match=rf"{SHARD}: its SHA-256 is .* damaged since .* download it again"):
            use()
    assert not (tmp_path / "ours" / "checkpoints" / "0").exists()


def test_what_the_hub_does_not_have_is_one_line(hub):
    with pytest.raises(ConfigError, match=r"^nobody/nothing: there is no such folder, nor can it be had from .*404"):
        from_pretrained("nobody/nothing")
