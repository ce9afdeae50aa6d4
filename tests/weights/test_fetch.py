"""Names and addresses of models: fetched once, checked, resumed, offline afterwards."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import pmixseg
from pmixseg.errors import InputError
from pmixseg.inference.publish import publish
from pmixseg.weights import CATALOGUE, local_copy
from pmixseg.weights import fetch as fetching
from pmixseg.weights.published import DESCRIPTION, FILES, WEIGHTS
from tests.inference.tiny_models import save, tiny_student


class Files:
    """What is served, and what was asked for.

    Args:
        content: path -> bytes.
    """

    def __init__(self, content):
        self.content = content
        self.requests = []
        self.break_after = None
        self.ranges = True


@contextmanager
def serving(files):
    """Serve ``files`` on the loopback interface; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # the name that the base class calls
            asked = self.headers.get("Range")
            files.requests.append((self.path, asked))
            data = files.content.get(self.path)
            if data is None:
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and files.ranges else 0
            if start >= len(data) > 0 and start:
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = len(data) if files.break_after is None else start + files.break_after
            self.wfile.write(data[start:end])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PMIXSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("published")
    return publish(save(tiny_student(), place / "x.ckpt"), place / "model")


@pytest.fixture
def files(folder):
    return Files({f"/models/a/{name}": (folder / name).read_bytes() for name in FILES})


def test_a_published_folder_is_fetched_once_and_is_the_same_model(files, folder):
    with serving(files) as address:
        module = pmixseg.load(f"{address}/models/a")
    again = pmixseg.load(f"{address}/models/a")  # the server is gone
    assert [path for path, _ in files.requests] == [
        f"/models/a/{DESCRIPTION}",
        f"/models/a/{WEIGHTS}",
    ]
    for name, tensor in pmixseg.load(folder).state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)
        assert torch.equal(again.state_dict()[name], tensor)


def test_a_broken_download_goes_on_where_it_stopped(files, folder):
    weights = (folder / WEIGHTS).read_bytes()
    with serving(files) as address:
        local_copy(f"{address}/models/a/{DESCRIPTION}")
        (next(fetching.cache_folder().iterdir()) / WEIGHTS).unlink()
        files.break_after = 1000
        with pytest.raises(InputError, match="goes on where it stopped"):
            local_copy(f"{address}/models/a")
        files.break_after = None
        place = local_copy(f"{address}/models/a")
    assert files.requests[-1] == (f"/models/a/{WEIGHTS}", "bytes=1000-")
    assert (place / WEIGHTS).read_bytes() == weights


def test_a_server_without_ranges_sends_everything_again(files, folder):
    with serving(files) as address:
        files.break_after = 1000
        with pytest.raises(InputError):
            local_copy(f"{address}/models/a")
        files.break_after, files.ranges = None, False
        place = local_copy(f"{address}/models/a")
    assert (place / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_changed_weights_are_refused_and_not_kept(files, cache):
    changed = bytearray(files.content[f"/models/a/{WEIGHTS}"])
    changed[-1] ^= 1
    files.content[f"/models/a/{WEIGHTS}"] = bytes(changed)
    with serving(files) as address, pytest.raises(InputError, match="changed or damaged"):
        local_copy(f"{address}/models/a")
    assert not list(cache.rglob(f"{WEIGHTS}*"))


def test_a_checkpoint_by_address_with_its_hash(files, folder, tmp_path):
    data = (folder.parent / "x.ckpt").read_bytes()
    files.content["/best.ckpt"] = data
    digest = hashlib.sha256(data).hexdigest()
    with serving(files) as address:
        with pytest.raises(InputError, match="SHA-256"):
            local_copy(f"{address}/best.ckpt#sha256={'0' * 64}")
        path = local_copy(f"{address}/best.ckpt#sha256={digest}")
        assert path.read_bytes() == data
        with pytest.raises(InputError, match="must be sha256"):
            local_copy(f"{address}/best.ckpt#md5=1")
        with pytest.raises(InputError, match="404"):
            local_copy(f"{address}/none.ckpt")
    assert pmixseg.load(path).task.name == "brats"


def test_no_network_is_one_sentence():
    with serving(Files({})) as address:
        pass
    with pytest.raises(InputError, match="check the network"):
        local_copy(f"{address}/a.ckpt")


def test_plain_http_to_elsewhere_is_refused():
    with pytest.raises(InputError, match="use https"):
        local_copy("http://example.org/a.ckpt")


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_a_name_whose_authors_keep_the_weights_says_where(name):
    with pytest.raises(InputError, match=r"pmixseg import") as error:
        pmixseg.load(name)
    assert CATALOGUE[name].page in str(error.value)


def test_a_name_of_the_list_leads_to_its_address(files, monkeypatch, folder):
    with serving(files) as address:
        entry = CATALOGUE["rfnet-brats2020"]
        named = {"ours": type(entry)(**{**vars(entry), "address": f"{address}/models/a"})}
        monkeypatch.setattr(fetching, "CATALOGUE", named)
        assert (local_copy("ours") / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_the_hub_by_its_own_library(monkeypatch, folder, tmp_path):
    pytest.importorskip("huggingface_hub")
    calls = []

    def snapshot_download(name, **arguments):
        calls.append((name, arguments["revision"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert local_copy("hf://owner/model@v1") == folder
    assert local_copy("hf://owner/model") == folder
    assert calls == [("owner/model", "v1"), ("owner/model", None)]
    with pytest.raises(InputError, match="hf://owner/repository"):
        local_copy("hf://model")


def test_the_hub_without_a_network_is_one_sentence(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be fetched"):
        local_copy("hf://owner/model")


def test_a_path_stays_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rfnet-brats2020").mkdir()
    assert str(local_copy("rfnet-brats2020")) == "rfnet-brats2020"  # one's own folder comes first
