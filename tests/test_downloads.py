"""The authors' files: found, downloaded and verified; a local server stands for the network."""

import contextlib
import functools
import http.server
import sys
import threading

import pytest
from test_datasets_archives import files_of, publish, write

from score_lib.data import archives, downloads, prepare
from score_lib.data.sources import DataError

NAME = "FASHION_MNIST"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and writes no log."""

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder, monkeypatch):
    """Let the published address be that of a server of this folder."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        monkeypatch.setitem(archives.ADDRESSES, NAME, address)
        yield
        server.shutdown()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with the published, packed files; there is no package of the system."""
    contents, _ = files_of(f"{NAME} gz")
    publish(monkeypatch, NAME, contents)
    write(tmp_path / "server", contents)
    monkeypatch.setattr(downloads, "PACKAGES", {})
    return contents


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    prepare.main()


def test_files_are_downloaded_once_and_read(published, tmp_path, monkeypatch, capsys):
    target = tmp_path / "mine"
    with served(tmp_path / "server", monkeypatch):
        run(monkeypatch, "fashion_mnist", target)
    assert f"--config.data.path={target}" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in target.iterdir()} == published
    train, test = archives.open_archive(NAME, str(target))
    assert (len(train), len(test)) == (10, 3)
    downloads.fetch(NAME, target)  # without the server: they are there


def test_files_of_a_package_are_copied_and_what_is_there_stays(published, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PACKAGES", {NAME: (tmp_path / "server", "")})
    file, target = "t10k-labels-idx1-ubyte.gz", tmp_path / "mine"
    write(target, {file: b"mine"})
    with pytest.raises(DataError, match=rf"{file} cannot be read"):
        downloads.fetch(NAME, target)
    assert {f.name: f.read_bytes() for f in target.iterdir()} == published | {file: b"mine"}
    assert {f.name: f.read_bytes() for f in (tmp_path / "server").iterdir()} == published


@pytest.mark.parametrize("fault", ["other", "cut", "plain"])
def test_other_contents_are_refused_and_not_stored(published, fault, tmp_path, monkeypatch):
    file = tmp_path / "server" / "t10k-labels-idx1-ubyte.gz"
    whole = published["t10k-images-idx3-ubyte.gz"]
    file.write_bytes({"other": whole, "cut": whole[:-20], "plain": b"<html>"}[fault])
    match = "another file: its MD5" if fault == "other" else "is no whole gzip file"
    with served(tmp_path / "server", monkeypatch), pytest.raises(DataError, match=match):
        downloads.fetch(NAME, tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 3  # the whole ones, and nothing unfinished


def test_without_a_network_the_ways_to_go_on_are_named(published, tmp_path, monkeypatch):
    monkeypatch.setitem(archives.ADDRESSES, NAME, "http://127.0.0.1:9/")
    with pytest.raises(SystemExit, match=r"copy it and the other files .* to .*mine, and repeat"):
        run(monkeypatch, "fashion_mnist", tmp_path / "mine")
    with pytest.raises(DataError, match=r"prepare fashion_mnist` puts the files into data/"):
        archives.open_archive(NAME, str(tmp_path / "none"))
