"""One serving step that mixes three kinds of op: a GEMM, decode attention, and a page-in of KV pages over PCIe.

The step is planned for an H100 that need not be there. Then a small version of it runs on this machine's cores and
is checked against eager torch. Run it with `python examples/mixed_step.py`.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

import taskgraph as tg

PAGE_BYTES = 1 << 20


def fetch_pages(host: torch.Tensor, pages: torch.Tensor) -> None:
    """Bring pages of the KV cache to the device. On the cpu backend that is a copy in memory."""
    pages.copy_(host)


def mixed_step(
    tokens: int, hidden: int, wide: int, batch: int, context: int, pages: int, dtype: str, page_in: tg.Demand
) -> tg.Graph:
    """The step. The work of the standard ops follows from the shapes; that of the custom op is declared."""
    b = tg.GraphBuilder("mixed-step")
    x = b.input("x", (tokens, hidden), dtype)
    w = b.weight("w_up", (hidden, wide), dtype)
    q = b.input("q", (batch, 32, 128), dtype)
    kv = b.state("kv", (2, batch, context, 8, 128), dtype)
    host = b.input("host_pages", (pages, PAGE_BYTES), "u8")
    up = tg.ops.gemm(x, w, name="up")
    att = tg.ops.decode_attention(q, kv, name="decode")
    page = b.call(
        fetch_pages,
        inputs=[host],
        outputs=[tg.spec("pages", (pages, PAGE_BYTES), "u8")],
        name="page_in",
        work=tg.Work(h2d_bytes=pages * PAGE_BYTES),
        demand=page_in,
    )
    b.output(up, att, page)
    return b.build()


def eager(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same step in plain torch, op after op."""
    keys, values = given["kv"].transpose(2, 3)  # (batch, kv heads, context, dim) each
    att = F.scaled_dot_product_attention(given["q"].unsqueeze(2), keys, values, enable_gqa=True)
    return {
        "up.out": given["x"] @ given["w_up"],
        "decode.out": att.squeeze(2),
        "pages": given["host_pages"].clone(),
    }


def main() -> None:
    copy = tg.demand(sm=(2, 8), pcie="20GB/s")
    large = mixed_step(2048, 4096, 14336, batch=512, context=1024, pages=64, dtype="bf16", page_in=copy)
    plan = tg.plan(large, "h100_sxm")
    tg.verify(plan, large)
    print("Planned for h100_sxm (simulated: roofline of the datasheet)\n")
    print(tg.explain(plan))

    one_core = tg.demand(sm=1)  # cores are the SMs of the "cpu" device; this machine may have few
    small = mixed_step(64, 256, 512, batch=4, context=64, pages=1, dtype="f32", page_in=one_core)
    torch.manual_seed(0)
    given = {
        "x": torch.randn(64, 256),
        "w_up": torch.randn(256, 512) / 16,
        "q": torch.randn(4, 32, 128),
        "kv": torch.randn(2, 4, 64, 8, 128),
        "host_pages": torch.randint(0, 256, (1, PAGE_BYTES), dtype=torch.uint8),
    }
    host_plan = tg.plan(small, "cpu", scheduler="list")
    with tg.compile(small, host_plan, backend="cpu") as exe:
        got = exe(given)
        timeline = exe.timeline()
    for name, wanted in eager(given).items():
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-4)
    print(f"Ran on this machine: {len(timeline.spans)} ops, outputs equal to eager torch.")
    print(f"One replay took {1e6 * timeline.makespan_s:.0f} us ({timeline.kind}, {timeline.origin}).")


if __name__ == "__main__":
    main()
