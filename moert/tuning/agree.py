"""One decision for all ranks: rank 0 makes it, the others are told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch.distributed as dist

from moert.errors import StateError

log = logging.getLogger("moert")
T = TypeVar("T")


def agree(question: Hashable, decide: Callable[[], T]) -> T:
    """The result of `decide`, made by rank 0 where torch.distributed runs; then all ranks must call this.

    Args:
        question: what is decided. A rank whose question differs from rank 0's (another layer of a
            pipeline, another device) decides for itself.
        decide: its result is pickled.

    Raises:
        StateError: rank 0's `decide` raised; on rank 0 itself, that error.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return decide()
    if dist.get_rank() == 0:
        try:
            result = decide()
        except Exception as error:
            # the others are waiting: they must hear of it
            dist.broadcast_object_list([(question, None, repr(error))], src=0)
            raise
        dist.broadcast_object_list([(question, result, None)], src=0)
        return result
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0)
    asked, told, failure = box[0]
    if asked != question:
        log.info("rank 0 tuned for %s, this rank needs %s: it decides for itself", asked, question)
        return decide()
    if failure is not None:
        raise StateError(f"tuning: rank 0 failed with {failure}")
    answer: T = told
    return answer
