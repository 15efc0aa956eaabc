"""API keys of the server: a file of names, roles and salted hashes. The keys themselves are kept nowhere.

A line is `NAME ROLE sha256:SALT:DIGEST`, with salt and digest in hexadecimal; empty lines and those that begin with #
are skipped. A key has 256 random bits, so one round of SHA-256 is as hard to reverse as many.
"""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from taskgraph.errors import KeyFileError

ROLES = ("all", "metrics")
"""What a key may do: everything, or read /metrics only."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-f]{32}):([0-9a-f]{64})")
_PREFIX = "tg-"
_MOST_BYTES = 512
"""No key is longer; more is not hashed."""
_MOST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the file."""

    name: str
    role: str
    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, secret: str, name: str, role: str) -> Self:
        """The line for a key; KeyFileError for a name or a role that cannot be."""
        if not _NAME.fullmatch(name):
            raise KeyFileError(
                f"a key's name is 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first; got {name[:80]!r}."
            )
        if role not in ROLES:
            raise KeyFileError(f"a key's role is one of {', '.join(ROLES)}; got {role[:80]!r}.")
        salt = secrets.token_bytes(16)
        return cls(name, role, salt, _digest(salt, secret))

    def line(self) -> str:
        """As it stands in the file."""
        return f"{self.name} {self.role} sha256:{self.salt.hex()}:{self.digest.hex()}"


@dataclass(slots=True)
class KeyRing:
    """The keys that a server takes, and the file that they are from."""

    keys: tuple[ApiKey, ...]
    path: Path | None = None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The keys of a file; KeyFileError, which says the line and never what stands there, when it holds no keys."""
        keys = _read(Path(path))
        if not keys:
            raise KeyFileError(f"{path}: no API key is in it; `taskgraph api-key NAME --file FILE` adds one.")
        return cls(tuple(keys.values()), Path(path))

    def reload(self) -> None:
        """Read the file again, for the requests from now on. KeyFileError, and the keys stay, when it is damaged."""
        if self.path is not None:
            self.keys = self.load(self.path).keys

    def find(self, secret: str) -> ApiKey | None:
        """The entry of a key that a client sent. It takes as long for a right key as for a wrong one."""
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, _digest(key.salt, secret)) and len(secret) <= _MOST_BYTES:
                found = key
        return found


def _digest(salt: bytes, secret: str) -> bytes:
    return hashlib.sha256(salt + secret[:_MOST_BYTES].encode("utf-8", "surrogatepass")).digest()


def _read(path: Path) -> dict[str, ApiKey]:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_FILE_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or "no text file"
        raise KeyFileError(f"{path}: cannot be read as a file of API keys: {why}.") from error
    if len(data) > _MOST_FILE_BYTES:
        raise KeyFileError(f"{path}: more than {_MOST_FILE_BYTES} bytes, so no file of API keys.")
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        key = _parsed(line)
        if key is None:
            raise KeyFileError(
                f"{path}: line {number} is not `NAME ROLE sha256:SALT:DIGEST` with a role of {', '.join(ROLES)}. "
                "Keys are kept hashed; `taskgraph api-key NAME --file FILE` adds one."
            )
        if key.name in keys:
            raise KeyFileError(f"{path}: line {number}: the name {key.name!r} is there twice; give each its own.")
        keys[key.name] = key
    return keys


def _parsed(line: str) -> ApiKey | None:
    parts = line.split()
    if len(parts) != 3 or not _NAME.fullmatch(parts[0]) or parts[1] not in ROLES:
        return None
    found = _HASH.fullmatch(parts[2])
    return found and ApiKey(parts[0], parts[1], bytes.fromhex(found[1]), bytes.fromhex(found[2]))


def add_key(path: Path, name: str, role: str = "all") -> str:
    """Make a key, add its line to the file (made for its owner only), and return the key, which is not kept.

    KeyFileError when the file holds something else, has that name, or cannot be written."""
    there = _read(path) if path.exists() else {}
    if name in there:
        raise KeyFileError(f"{path} has a key named {name!r}; remove its line or choose another name.")
    secret = _PREFIX + secrets.token_urlsafe(32)
    line = ApiKey.of(secret, name, role).line()
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+") as file:
            whole = file.read()
            file.write(("\n" if whole and not whole.endswith("\n") else "") + line + "\n")
    except OSError as error:
        raise KeyFileError(f"cannot write {str(path)!r}: {error.strerror}.") from error
    return secret


def readable_by_others(path: Path) -> bool:
    """Whether the file's permissions let others than its owner read it."""
    return bool(path.stat().st_mode & 0o077)
