"""A plan inside somebody else's loop: bind the loop's buffers once, then write, launch and read without a copy.

Run it with `python examples/embed_in_a_loop.py`.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

import taskgraph as tg

ROWS, WIDTH = 32, 64


def block() -> tg.Graph:
    """Two products of one input, added: what an engine would do between two of its own steps."""
    b = tg.GraphBuilder("block")
    x = b.input("x", (ROWS, WIDTH), "f32")
    left = tg.ops.gemm(x, b.weight("left", (WIDTH, WIDTH), "f32"), name="go_left")
    right = tg.ops.gemm(x, b.weight("right", (WIDTH, WIDTH), "f32"), name="go_right")
    b.output(tg.ops.add(left, right, name="sum"))
    return b.build()


def main() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(WIDTH, WIDTH) * 0.1, torch.randn(WIDTH, WIDTH) * 0.1
    hidden = torch.empty(ROWS, WIDTH)  # the loop's own buffer
    graph = block()
    with tg.compile(graph, tg.plan(graph, "cpu")) as step:
        step.bind(x=hidden, left=left, right=right)  # zero copy: these addresses are fixed from now on
        (name,) = graph.outputs
        made = step.outputs[name]
        for turn in range(4):
            hidden.copy_(torch.randn(ROWS, WIDTH))  # the loop writes where it always writes
            step.launch()
            wanted = F.linear(hidden, left.T) + F.linear(hidden, right.T)
            assert torch.allclose(made, wanted, atol=1e-4)
            print(f"turn {turn}: {made.abs().mean():.3f} on average, as eager torch says")


if __name__ == "__main__":
    main()
