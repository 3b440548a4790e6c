"""A folder that is complete or not there: :class:`Partial` is what has been done of it so far, beside its place, and goes on where it was left.

``out.partial/files`` holds what ``out`` will hold; it is renamed when all is there. ``out.partial/journal.json`` says what was asked for, so that only the
same request goes on, and ``plan.json`` what was decided. Files are written beside their names and renamed, so a file that is there is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadFile
from ..formats.atomic import PART, sync
from ..formats.atomic import write as write_text

ENDING, JOURNAL, FILES = ".partial", "journal.json", "files"
SPARE = 2**24  # bytes that are left free


@dataclass(frozen=True)
class Partial:
    out: Path
    request: str

    @property
    def folder(self) -> Path:
        return self.out.with_name(self.out.name + ENDING)

    @property
    def files(self) -> Path:
        return self.folder / FILES

    @property
    def done(self) -> bool:
        """Whether the same request has been completed before (and what was beside it may be there still)."""
        return self.out.is_dir() and self._asked() == self.request

    @contextmanager
    def begun(self) -> Iterator[None]:
        """:meth:`begin`, and while active no other process does the same; raises :class:`~graphprune.errors.BadFile` where one does."""
        with _writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder.with_name(self.folder.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle, self.folder)
            self.begin()
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder.with_name(self.folder.name + ".lock"))
            os.close(handle)

    def begin(self) -> None:
        """Make the folder, or go on with one of the same request; one of another request is begun anew.

        Raises :class:`~graphprune.errors.BadFile` where ``out`` is there already, or what is at the place of the other folder is none of this kind.
        """
        if os.path.lexists(self.out) and not (self.out.is_dir() and not self.out.is_symlink() and not any(self.out.iterdir())):
            raise BadFile(f"{self.out} is there already: remove it, or write to another folder")
        if os.path.lexists(self.folder) and self._asked() != self.request:
            if self._asked() is None and (not self.folder.is_dir() or any(not _begun(path) for path in self.folder.iterdir())):
                raise BadFile(f"{self.folder} is in the way, and was not written by graphprune: move it away")
            shutil.rmtree(self.folder)
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._asked() is None:
                write_text(self.folder / JOURNAL, json.dumps({"request": self.request}))
            self.files.mkdir(exist_ok=True)
            sync(self.folder)

    def note(self, name: str, text: str) -> None:
        """Keep a text beside the files."""
        with _writing(self.folder / name):
            write_text(self.folder / name, text)

    def noted(self, name: str) -> str | None:
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def text(self, name: str, text: str) -> None:
        with _writing(self.files / name):
            write_text(self.files / name, text)

    def copy(self, source: Path, name: str) -> None:
        """A file as it is; one that is there is whole."""
        place, part = self.files / name, self.files / f"{name}.part"
        if place.exists():
            return
        with _writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, part)
            sync(part)
            os.replace(part, place)

    def room(self, bytes: int) -> None:
        """Raises :class:`~graphprune.errors.BadFile` where so much does not fit on the disk, before it is tried."""
        free = shutil.disk_usage(self.folder).free
        if bytes + SPARE > free:
            raise BadFile(f"{self.folder} needs {bytes / 1e9:.2f} GB more, and the disk has {free / 1e9:.2f} GB free")

    def finish(self) -> None:
        """Let the folder appear in its place, and remove what was beside it."""
        with _writing(self.out):
            for path in list(self.files.rglob("*")):
                if path.is_dir():
                    sync(path)
                elif _begun(path):  # by a process that was killed
                    path.unlink()
            sync(self.files)
            with contextlib.suppress(FileNotFoundError):
                self.out.rmdir()  # an empty one
            os.rename(self.files, self.out)
            sync(self.out.parent)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.files, ignore_errors=True)
        for name in (*(path.name for path in self.folder.glob("*") if path.name != JOURNAL), JOURNAL):  # which tells whose the rest is
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()
            self.folder.with_name(self.folder.name + ".lock").unlink(missing_ok=True)

    def _asked(self) -> str | None:
        try:
            found: Any = json.loads((self.folder / JOURNAL).read_text(encoding="utf-8"))
            return str(found["request"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _begun(path: Path) -> bool:
    """Whether a file was being written when its process was killed."""
    return path.name.startswith(PART) or path.name.endswith(".part")


def _lock(handle: int, folder: Path) -> None:
    """Hold a file that another process may hold; the system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # another system: whoever starts two at once is not told
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise BadFile(f"another process is writing {folder}") from error


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile.of(error, f"{path} cannot be written: {error.strerror or error}; what was written before stays, and is gone on with") from error
