"""Eight 4-bit codes in one int32 word, the first in the lowest bits."""

from __future__ import annotations

import torch


def nibbles_to_words(nibbles: torch.Tensor) -> torch.Tensor:
    """Codes [..., 8] uint8, 0..15, as words [...] int32: code n in bits 4n..4n+3."""
    low, high = nibbles[..., 0::2], nibbles[..., 1::2]
    # bytes of a word lie in memory lowest first on every machine that torch runs on
    octets = torch.bitwise_or(low, high << 4).contiguous()  # [..., 4]
    return octets.view(torch.int32).squeeze(-1)


def words_to_nibbles(words: torch.Tensor) -> torch.Tensor:
    """Words [...] int32 as codes [..., 8] uint8; inverse of `nibbles_to_words`."""
    octets = words.contiguous().unsqueeze(-1).view(torch.uint8)  # [..., 4]
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
