"""The last tier of a KV cache: blocks in files, written and read by one thread beside the engine."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("taskgraph.serve")

Read = Callable[[int], bytes]
"""Host page -> its bytes in every layer."""

Write = Callable[[int, bytes], None]
"""(host page, bytes): the page has these bytes from now on."""


@dataclass(slots=True)
class Done:
    """Host pages whose writing or reading has ended: (page, key, whether the block is on disk or has come from it)."""

    written: list[tuple[int, bytes, bool]] = field(default_factory=list)
    read: list[tuple[int, bytes, bool]] = field(default_factory=list)


class DiskTier:
    """At most `pages` blocks in `folder`, which is created and holds nothing else; the longest unused are deleted, but
    not those that are pinned until they are forgotten.

    A block that cannot be written or read is forgotten with a warning, so that it is computed again.
    """

    def __init__(self, folder: Path, pages: int, read: Read, write: Write) -> None:
        self.folder, self.pages = folder, pages
        self._read, self._write = read, write
        self._kept: OrderedDict[bytes, None] = OrderedDict()
        self._pinned: set[bytes] = set()
        self._thread = ThreadPoolExecutor(1, "taskgraph-disk")
        self._writing: dict[bytes, tuple[int, Future[bool]]] = {}
        self._reading: dict[bytes, tuple[int, Future[bool]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def writing(self) -> int:
        """Blocks on their way to disk."""
        return len(self._writing)

    @property
    def busy(self) -> bool:
        """Whether a block is on its way, here or back."""
        return bool(self._writing or self._reading)

    @property
    def room(self) -> int:
        """Blocks that can be pinned."""
        return self.pages - len(self._pinned)

    def loading(self, key: bytes) -> bool:
        """Whether a block is on its way from disk."""
        return key in self._reading

    def store(self, page: int, key: bytes, *, pinned: bool = False) -> None:
        """Begin to write host page `page`, which must stay as it is until `finished` tells of it."""
        if pinned:
            self._pinned.add(key)
        self._writing[key] = (page, self._thread.submit(self._save, page, key))

    def load(self, page: int, key: bytes) -> None:
        """Begin to read a kept block into host page `page`, which belongs to this tier until `finished` tells of it."""
        self._kept.move_to_end(key)
        self._reading[key] = (page, self._thread.submit(self._restore, page, key))

    def finished(self, wait: bool = False) -> Done:
        """What has ended since the last call; with `wait`, after at least one that is under way."""
        if wait:
            for _, future in [*self._writing.values(), *self._reading.values()][:1]:
                future.exception()
        done = Done()
        for key in [k for k, (_, future) in self._writing.items() if future.done()]:
            page, future = self._writing.pop(key)
            done.written.append((page, key, future.result()))
            if future.result():
                self._keep(key)
            else:
                self._pinned.discard(key)
        for key in [k for k, (_, future) in self._reading.items() if future.done()]:
            page, future = self._reading.pop(key)
            done.read.append((page, key, future.result()))
            if not future.result():
                self.forget(key)
        return done

    def _keep(self, key: bytes) -> None:
        self._kept[key] = None
        while len(self._kept) > self.pages:
            oldest = next((k for k in self._kept if k not in self._reading and k not in self._pinned), None)
            if oldest is None:
                break
            self.forget(oldest)

    def forget(self, key: bytes) -> None:
        """Delete a block that is not on its way."""
        self._kept.pop(key, None)
        self._pinned.discard(key)
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: bytes) -> Path:
        return self.folder / f"{key.hex()}.kv"

    def _save(self, page: int, key: bytes) -> bool:
        try:
            self._path(key).write_bytes(self._read(page))
        except OSError as error:
            log.warning("a KV page cannot be written to %s (%s); it will be computed again.", self.folder, error)
            return False
        return True

    def _restore(self, page: int, key: bytes) -> bool:
        try:
            self._write(page, self._path(key).read_bytes())
        except (OSError, ValueError) as error:
            log.warning("a KV page cannot be read from %s (%s); it is computed again.", self.folder, error)
            return False
        return True

    def close(self) -> None:
        """End the thread and delete the files."""
        self._thread.shutdown(cancel_futures=True)
        for key in [*self._kept, *self._writing]:
            self._path(key).unlink(missing_ok=True)
        self._kept.clear()
