"""Loaded by Python at its start, where this folder is on the path: torch sees a processor without AVX-512.

torch, and oneDNN's callers in it, ask the cpuinfo library, whose answers lie in a record of flags: `cpuinfo.h`, which
torch ships, names them in their order.
"""

import ctypes
import importlib.util
import platform
import re
from pathlib import Path

ABSENT = ("avx512", "avx10", "amx", "avxvnni", "avx_")
"""What the names of hidden features begin with."""


def flags(header: str) -> list[str]:
    """The flags of cpuinfo_x86_isa on x86-64, in their order."""
    body = header[header.index("struct cpuinfo_x86_isa {") :]
    body = body[: body.index("};")]
    body = re.sub(r"#if CPUINFO_ARCH_X86\n.*?#endif", "", body, flags=re.DOTALL)  # those of 32-bit x86 alone
    return re.findall(r"bool (\w+);", body)


def hide(torch_folder: Path) -> None:
    """Clear the flags, once torch's own initialisation has set them."""
    library = ctypes.CDLL(str(torch_folder / "lib" / "libc10.so"))
    library.cpuinfo_initialize()
    names = flags((torch_folder / "include" / "cpuinfo.h").read_text())
    record = (ctypes.c_bool * len(names)).in_dll(library, "cpuinfo_isa")
    for i, name in enumerate(names):
        if name.startswith(ABSENT):
            record[i] = False


_torch = importlib.util.find_spec("torch")
if _torch is not None and _torch.origin is not None and platform.machine() == "x86_64":
    hide(Path(_torch.origin).parent)
