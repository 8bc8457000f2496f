"""The kernels that split inputs into fixed-point numbers, beside the reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from moert import MoEConfig, Quant
from moert.arena import Arena, absent_views, layout
from moert.backends.fixed_launches import fixed_fields
from moert.backends.fixed_tiles import every_tile
from moert.backends.triton import TritonBackend
from moert.call import Call, call_key
from moert.cli.absent import absent_weights
from moert.device import KNOWN_DEVICES
from moert.launch import Launch, run_interpreted
from moert.plan import Choice
from moert.steps.fixed_point.layout import STEP
from moert.steps.fixed_point.reference import join, split
from moert.topk import TopK

CFG = MoEConfig(4, 3, 1168, 144, dtype="float16", quant=Quant("int4", 128))
H200 = KNOWN_DEVICES["sm_90"]
CPU = torch.device("cpu")


def rows(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal, of all magnitudes; a group of zeros, one of a single large entry."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(count, columns, generator=generator)
    x *= torch.exp2(torch.randint(-12, 12, (count, 1), generator=generator))
    x[0, : min(STEP, columns)] = 0.0
    x[1, 3] = 300.0
    return x.to(dtype)


def splits(cfg: MoEConfig, tokens: int, views: dict[str, torch.Tensor]) -> tuple[Launch, Launch]:
    """The launches that split x and h."""
    backend = TritonBackend(cfg, absent_weights(cfg), H200)
    tile = every_tile(cfg, H200)[0]
    choice = Choice("one_shot", tile, tile)
    rest = absent_views(f for f in backend.fields(tokens, choice) if f.name not in views)
    launches = backend.launches(tokens, choice, {**rest, **views})
    x, h = (launch for launch in launches if launch.name.startswith("split"))
    return x, h


def checked_splits(symmetric: bool, live: int | None) -> list[str]:
    """The kernels that split x and h, interpreted: they write what the reference has for rows that are alive,
    and nothing else."""
    assert CFG.quant is not None
    cfg = replace(CFG, quant=replace(CFG.quant, symmetric=symmetric))
    tokens, alive = 3, 3 if live is None else live
    fields = fixed_fields(cfg, tokens)
    assert len(fields) == (2 if symmetric else 3)
    storage = rows(tokens, cfg.hidden_size + 8, torch.float16)
    x = storage[:, : cfg.hidden_size]
    x[1, 200] = float("nan")
    h = rows(tokens * cfg.top_k, cfg.intermediate_size, torch.float16)
    topk = TopK(torch.zeros(tokens, 3), torch.zeros(tokens, 3, dtype=torch.int32))
    call = Call(torch.tensor(2**31 - 1, dtype=torch.int32), 1)
    count = None if live is None else torch.tensor(live, dtype=torch.int32)
    call.set(call_key(x, topk, torch.empty_like(x), count, "keep"), x, topk, x, count)
    call.tokens = tokens
    ran = []
    for step, given, written in ((0, x, alive), (1, h, alive * cfg.top_k)):
        arena = Arena(CPU, layout(fields)[1])
        arena.poison()
        views = arena.views(fields)
        launch = splits(cfg, tokens, {"h": h, **views})[step]
        ran.append(launch.name)
        run_interpreted([launch], call.interpreter_values(), tokens)
        planes, worth, sums = split(given)
        for name, expected in (("planes", planes), ("worth", worth), ("sums", sums)):
            if name in views:
                flat = views[name].view(torch.uint8)
                assert (flat[expected[:written].nbytes :] == 0xFF).all()
        found = views["planes"][: planes.numel()].view(planes.shape)[:written]
        units = views["worth"][: worth.numel()].view(worth.shape)[:written]
        assert torch.equal(units.isnan(), worth[:written].isnan())
        # the unit of a group of zeros may be any
        torch.testing.assert_close(
            join(found, units), join(planes, worth)[:written], rtol=0, atol=0, equal_nan=True
        )
        if not symmetric:
            known = views["sums"][: sums.numel()].view(sums.shape)[:written][~units.isnan()]
            torch.testing.assert_close(known, sums[:written][~units.isnan()])
    return ran
