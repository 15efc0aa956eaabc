"""Where the package keeps what is worth keeping between processes: compiled functions, probes, builds, winners.

All of it is in the user's cache and data folders. Where these cannot be written (a container without a home, a full
disk, a file of another user), work goes on with a private folder under the temporary one, and one warning a process
says so. What is kept can always be made again, so nothing here raises for a place that cannot be written.
"""

import os
import stat
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

_SETTING = {False: "XDG_CACHE_HOME", True: "XDG_DATA_HOME"}


class CacheWarning(UserWarning):
    """Something cannot be kept where it belongs; given once a process. Work goes on."""


_lock = threading.Lock()
_warned = False
_usable: dict[Path, str] = {}
"""Folders that were tried: "" for one that can be written, else why not."""


def user_folder(data: bool = False) -> Path:
    """The user's cache folder, or with `data` the one for what cannot be made again in a moment. It may not exist."""
    found = platformdirs.user_data_path if data else platformdirs.user_cache_path
    try:
        return found("taskgraph", appauthor=False)
    except (RuntimeError, OSError):  # no HOME, and no user of that number
        return Path("~", _SETTING[data])


def place(*parts: str, data: bool = False, change: bool = False, root: Path | None = None) -> Path:
    """The path that keeps the file `parts`: in the user's folder (or `root`) where it is readable there or can be
    written; else under the temporary folder, with one warning. A file that is to `change` where it lies must be
    writable. The path's folder exists unless nothing can be written."""
    base = user_folder(data) if root is None else root
    own = base.joinpath(*parts)
    there = _readable(own)
    reason = "" if there and not change else _reason_against(own.parent)
    if change and not reason and own.exists() and not (there and os.access(own, os.W_OK)):
        reason = f"{own.name} belongs to another user"
    if not reason:
        return own
    private = temporary_folder()
    if private is None:
        warn(f"{base} cannot be written ({reason}), and no temporary folder can: nothing is kept. Set {_way(data)}.")
        return own
    warn(
        f"{base} cannot be written ({reason}): compiled functions, probes and other results are kept in {private} "
        f"until that is emptied. Set {_way(data)}."
    )
    instead = private.joinpath("data" if data else "cache", *parts)
    return instead if not _reason_against(instead.parent) else own


def _way(data: bool) -> str:
    return f"{_SETTING[data]} to a folder that can be written"


@contextmanager
def keeping(what: str, path: Path) -> Iterator[None]:
    """Within the block `path` is written; where that fails it is not kept, with one warning a process and no error."""
    try:
        yield
    except OSError as error:
        with _lock:
            _usable.pop(path.parent, None)
        warn(f"{what} cannot be kept in {path.parent} ({error.strerror or error}). Free space, or set {_way(False)}.")


def _readable(path: Path) -> bool:
    try:
        return path.is_file() and os.access(path, os.R_OK)
    except OSError:
        return False


def _reason_against(folder: Path) -> str:
    """Why no file can be made in `folder`, "" if one can; the folder is made, and tried once a process."""
    with _lock:
        if folder in _usable and (_usable[folder] or folder.is_dir()):
            return _usable[folder]
        _usable[folder] = reason = _tried(folder)
        return reason


def _tried(folder: Path) -> str:
    if not folder.is_absolute():  # "~" of a user without a home is no place: it would be made where the process stands
        return "there is no home folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def temporary_folder() -> Path | None:
    """A folder of this user alone under the temporary one; None where nothing can be written."""
    try:
        folder = Path(tempfile.gettempdir()) / f"taskgraph-{os.geteuid()}"
        if not _private(folder):  # another user made a folder of that name: what it holds must not be believed
            folder = Path(tempfile.gettempdir()) / f"taskgraph-{os.geteuid()}-{os.getpid()}"
        return folder if _private(folder) else None
    except OSError:
        return None


def _private(folder: Path) -> bool:
    """Whether `folder`, made if need be, is a real folder of this user that nobody else can write or read."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def warn(text: str) -> None:
    """Give the one warning of this process, unless it was given."""
    global _warned
    with _lock:
        if _warned:
            return
        _warned = True
    warnings.warn(text, CacheWarning, stacklevel=3)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: readers see the old file or the new one, never a part. OSError if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".taskgraph-{uuid.uuid4().hex}")
    try:
        with part.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
