"""Files that are whole or not there, whenever a process is killed or a disk is full: the one way in which graphprune writes.

One file is written beside its place, brought to the disk, and renamed (:func:`write`). Several are one as well (:func:`replacing`): they are
written into a folder of their own inside the one they are meant for, and renaming that to ``.graphprune.ready`` is the step that counts. From
then on a file is read from there, and from its own place once it has been moved (:func:`current`), so no mixture is ever seen. Whoever
writes next moves what a process that was killed has not; any number may do so at the same time. Renaming replaces a symbolic link, it does not follow it.

>>> import tempfile
>>> folder = Path(tempfile.mkdtemp())
>>> with replacing(folder) as part:
...     _ = (part / "a").write_text("1"), (part / "b").write_text("2")
>>> sorted(path.name for path in folder.iterdir())
['a', 'b']
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BadFile

READY, PART = ".graphprune.ready", ".graphprune.part"


def write(path: Path, text: str) -> None:
    """Replace one file by ``text``."""
    with replacement(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A place to write what replaces ``path`` in the end, with the same suffix; where the writing fails, ``path`` is as it was."""
    part = path.with_name(f"{_name()}{path.suffix}")
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder for new files of ``folder``, which is made if needed; at the end all of them replace those of the same name, or none.

    Other files stay. Raises :class:`~graphprune.errors.BadFile` where the folder, or a file, cannot be made.
    """
    part = folder / _name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        part.mkdir()
        yield part
        for name in os.listdir(part):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                raise IsADirectoryError(errno.EISDIR, f"{name} is a folder")
            sync(part / name)
        sync(part)
        _exchange(folder, part)
    except OSError as error:
        raise BadFile.of(error, f"{folder} cannot be written: {_reason(error)}; it holds its old files or all of the new ones") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def current(folder: Path, name: str) -> Path:
    """Where the file ``name`` of a folder that :func:`replacing` writes is to be read."""
    ready = folder / READY / name
    return ready if os.path.lexists(ready) else folder / name


def read(path: Path, most: int) -> bytes:
    """A file's bytes, if it is an ordinary one of at most ``most``; raises :class:`~graphprune.errors.BadFile` where it is not."""
    size = ordinary(path)
    if size > most:
        raise BadFile(f"{path} has {size} bytes, what is expected there has at most {most}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile.of(error, f"{path} cannot be read: {_reason(error)}") from error


def ordinary(path: Path) -> int:
    """The bytes of an ordinary file; what has no end (a pipe, a device) would be read for ever."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise BadFile.of(error, f"{path} cannot be read: {_reason(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(f"{path} is no ordinary file")
    return status.st_size


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(folder: Path, part: Path) -> None:
    """The files of ``part`` become those of ``folder``."""
    while True:
        _settle(folder)
        try:
            os.rename(part, folder / READY)
            break
        except OSError as error:  # another process has put its own there since
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    sync(folder)
    _settle(folder)
    sync(folder)


def _settle(folder: Path) -> None:
    """Move what is ready to its place; each step may be done by another process before."""
    ready = folder / READY
    try:
        names = os.listdir(ready)
    except FileNotFoundError:
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(ready / name, folder / name)
    sync(folder)
    try:
        os.rmdir(ready)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
            raise


def _name() -> str:
    return f"{PART}.{platform.node()}.{os.getpid()}.{secrets.token_hex(4)}"


def _sweep(folder: Path) -> None:
    """Remove what processes of this machine that are gone have left half-written."""
    for path in folder.glob(f"{PART}.{platform.node()}.*.*"):
        if not _runs(path.name.split(".")[-2]):
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _runs(process: str) -> bool:
    """Whether a process of this number may be running."""
    if not process.isdigit() or os.name == "nt":  # where signal 0 would end it
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
