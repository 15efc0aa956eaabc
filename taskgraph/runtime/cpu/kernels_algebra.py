"""The CPU kernel of layer norms."""

from typing import Any

import numpy as np

from taskgraph.runtime.cpu.tile import fork, kernel, narrow, widen


@kernel
def _layer_norm(x: Any, weight: Any, bias: Any, out: Any, eps: Any, part: Any, parts: Any) -> None:
    m, n = x.shape
    line = np.empty(n, np.float32)
    for i in range(m * part // parts, m * (part + 1) // parts):
        row, made = x[i], out[i]
        total = np.float32(0.0)
        for j in range(n):
            line[j] = widen(row[j])
            total += line[j]
        mean = total / np.float32(n)
        squares = np.float32(0.0)
        for j in range(n):
            line[j] -= mean
            squares += line[j] * line[j]
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(n) + np.float32(eps))
        for j in range(n):
            line[j] *= scale
        if weight.size > 0:
            for j in range(n):
                line[j] *= widen(weight[j])
        if bias.size > 0:
            for j in range(n):
                line[j] += widen(bias[j])
        for j in range(n):
            made[j] = narrow(line[j], out)


@kernel
def layer_norm(x: Any, weight: Any, bias: Any, out: Any, eps: Any, threads: Any = 1) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016); x and out (m, n), weight and bias (n,)
    or (0,) for none, one dtype."""
    fork(_layer_norm, (x, weight, bias, out, eps), threads)
