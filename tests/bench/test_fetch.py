"""Packages and archives: fetched once, checked, unpacked into their folder and nowhere else."""

import io
import re
import subprocess
import tarfile
import zipfile
from hashlib import sha256

import pytest

pytest.importorskip("transformers")

from finetuning.tasks.fetch import FetchError, Package, untar


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package in a folder that pip is told to take for the whole index."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "some_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_texts/data/a/1.txt", "rain")
        archive.writestr("some_texts/code.py", "")
        archive.writestr("some_texts-1.0.dist-info/RECORD", "")
        archive.writestr("some_texts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr(
            "some_texts-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: some-texts\nVersion: 1.0\n",
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    content = wheel.read_bytes()
    return {
        "requirement": "some-texts==1.0",
        "sha256": sha256(content).hexdigest(),
        "size": len(content),
        "inside": "some_texts/data",
        "folder": "some-texts",
    }


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_package_is_fetched_once_and_only_what_is_wanted_kept(
    package, tmp_path, monkeypatch, capsys
):
    cache = tmp_path / "deep" / "cache"
    folder = Package(**package).fetch(cache)
    assert files_below(cache) == ["some-texts/a/1.txt"]
    assert f"{package['size']}/{package['size']}" in capsys.readouterr().err

    monkeypatch.setattr(subprocess, "Popen", None)
    assert Package(**package).fetch(cache) == folder


def test_package_that_two_processes_fetch_at_once(package, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    obtain = Package._obtain

    def second_to_finish(self, scratch):
        monkeypatch.setattr(Package, "_obtain", obtain)
        self.fetch(cache)
        return obtain(self, scratch)

    monkeypatch.setattr(Package, "_obtain", second_to_finish)
    folder = Package(**package).fetch(cache)
    assert files_below(folder) == ["a/1.txt"]
    assert [path.name for path in cache.iterdir()] == ["some-texts"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sha256": "0" * 64}, "expected 0000"),
        ({"requirement": "some-texts==2.0"}, "pip could not download some-texts==2.0"),
    ],
)
def test_package_that_cannot_be_had_leaves_nothing_behind(change, sentence, package, tmp_path):
    with pytest.raises(FetchError, match=sentence):
        Package(**package | change).fetch(tmp_path / "cache")
    assert files_below(tmp_path / "cache") == []


@pytest.fixture
def archive_of(tmp_path):
    """Makes an archive of members by name, each of a type of tarfile's."""

    def make(members):
        path = tmp_path / "texts.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, kind in members.items():
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, "a.txt"
                member.size = len(b"rain") if kind == tarfile.REGTYPE else 0
                tar.addfile(member, io.BytesIO(b"rain"))
        return path

    return make


def test_archive_is_unpacked_whole(archive_of, tmp_path):
    members = {"./a.txt": tarfile.REGTYPE, "b": tarfile.DIRTYPE, "c/d/e.txt": tarfile.REGTYPE}
    untar(archive_of(members), tmp_path / "out")
    assert files_below(tmp_path / "out") == ["a.txt", "c/d/e.txt"]
    assert (tmp_path / "out/c/d/e.txt").read_text() == "rain"
    assert (tmp_path / "out/b").is_dir()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../b.txt", tarfile.REGTYPE),
        ("b/../../c.txt", tarfile.REGTYPE),
        ("/tmp/b.txt", tarfile.REGTYPE),
        ("../b", tarfile.DIRTYPE),
        ("b.txt", tarfile.SYMTYPE),
        ("b.txt", tarfile.LNKTYPE),
        ("b.txt", tarfile.FIFOTYPE),
        ("b.txt", tarfile.CHRTYPE),
    ],
)
def test_archive_of_anything_but_files_and_folders_below_is_refused(
    name, kind, archive_of, tmp_path
):
    archive = archive_of({"a.txt": tarfile.REGTYPE, name: kind})
    with pytest.raises(FetchError, match=re.escape(f"unsafe to unpack: it has {name!r}")):
        untar(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert files_below(tmp_path) == [archive.name]
