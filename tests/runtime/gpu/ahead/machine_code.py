"""What a cubin does, instruction by instruction: what was compiled once is read, not compiled again for its PTX."""

import re
import subprocess
import tempfile

from taskgraph.runtime.gpu.ahead.cubins import Cubin


def instructions(cubin: Cubin) -> list[str]:
    """Names in the order of the code, with variants: "HMMA.16816.F32.BF16" (cuobjdump, which Triton brings)."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin.code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text)


def has(found: list[str], name: str) -> bool:
    """Whether an instruction begins so."""
    return any(each.startswith(name) for each in found)
