"""`tg.cpu`: how kinds of ops run on this machine's cores, open to other packages, and what a thread needs that launches
plans beside work of its own."""

from taskgraph.runtime.cpu.kernels import release_threads
from taskgraph.runtime.cpu.kinds import CpuSite, bits, register
from taskgraph.runtime.cpu.native import barrier, flat, native
from taskgraph.runtime.cpu.sampling import draw
from taskgraph.runtime.cpu.standard import CPU_KINDS
