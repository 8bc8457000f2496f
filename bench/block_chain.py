"""A chain of whole blocks, through `forward_block`: router, routing, experts and shared experts."""

from __future__ import annotations

import torch
from device_timing import DEVICE
from layer_chain import Chain, flops, hit_bytes

from moert import MoERuntime
from moert.steps.block.reference import block_reference, block_routing_reference


class BlockChain(Chain):
    """Runtimes of one share group with an x of its own for each.

    A block routes by its x, so nothing could be scaled between two blocks (`Chain.level`) to stand for the
    norm that a model has there. The stream's order keeps the blocks one after the other all the same.

    Args:
        layers: one runtime each. rows: x and out of the first, of the second, ...: [2 * layers] of [T, H].
    """

    def __init__(self, layers: list[MoERuntime], rows: list[torch.Tensor]) -> None:
        super().__init__(layers, [], rows)

    def run(self) -> None:
        for index in range(len(self.layers)):
            self.call(index)

    def ends(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rows[2 * index], self.rows[2 * index + 1]

    def call(self, index: int) -> None:
        self.layers[index].forward_block(*self.ends(index))

    def expected(self, rows: slice) -> torch.Tensor:
        layer = self.layers[0]
        return block_reference(self.ends(0)[0][rows], layer.weights, layer.cfg)

    def work(self) -> list[tuple[int, int]]:
        """As in `Chain`; shared experts are hit, the router is read, ids and weights are nobody's input."""
        found = []
        for index, layer in enumerate(self.layers):
            cfg, weights = layer.cfg, layer.weights
            ids = block_routing_reference(self.ends(index)[0], weights, cfg).ids
            router = [weights.router_weight, weights.router_bias, weights.correction_bias]
            router += [weights.shared_gate]
            nbytes = sum(t.numel() * t.element_size() for t in router if t is not None)
            logits = ids.shape[0] * (cfg.num_experts + cfg.shared_gate)
            found.append(
                (
                    hit_bytes(cfg.as_launched, ids) - ids.numel() * 8 + nbytes,
                    flops(cfg.as_launched, ids) + 2 * logits * cfg.hidden_size,
                )
            )
        return found


def make_block_chain(layers: list[MoERuntime], tokens: int, seed: int) -> BlockChain:
    """Random rows for T tokens."""
    torch.manual_seed(seed)
    cfg = layers[0].cfg
    rows = [
        torch.randn(tokens, cfg.hidden_size, device=DEVICE).to(cfg.torch_dtype)
        for _ in range(2 * len(layers))
    ]
    return BlockChain(layers, rows)
