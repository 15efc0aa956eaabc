"""The steps whose whole plans `taskgraph gpu-check` measures: four layers of Llama 3 8B and the vocabulary product."""

from collections.abc import Mapping
from dataclasses import replace

from taskgraph.graph.graph import Graph
from taskgraph.models.config import load_config
from taskgraph.models.paged import Bucket, PageShape, step_graph

_LAYERS, _CONTEXT, _PAGE = 4, 1024, 16
_BUCKETS = {"512d+1024p": Bucket(512, 1024, 2), "1024d+1024p": Bucket(1024, 1024, 2)}
_TINY = {"8d+16p": Bucket(8, 16, 2)}


def steps(virtual: bool) -> Mapping[str, Graph]:
    """Name -> graph; small ones for a virtual device, which runs them on the host."""
    config = replace(load_config("llama-3-8b"), layers=_LAYERS)
    if virtual:
        config = replace(config, layers=1, vocab_size=160, hidden_size=64, heads=4, kv_heads=2, head_dim=16)
        config = replace(config, intermediate_size=96)
        return {name: step_graph(config, bucket, PageShape(64, 4, 32)) for name, bucket in _TINY.items()}
    found = {}
    for name, bucket in _BUCKETS.items():
        pages = (bucket.decode + bucket.chunks) * _CONTEXT // _PAGE
        found[name] = step_graph(config, bucket, PageShape(pages, _PAGE, _CONTEXT))
    return found
