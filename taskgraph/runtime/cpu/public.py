"""`tg.cpu`: what a thread needs that launches plans on this machine's cores beside work of its own."""

from taskgraph.runtime.cpu.kernels import release_threads

__all__ = ["release_threads"]
