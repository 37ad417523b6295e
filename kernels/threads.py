"""Independent pieces of work side by side on the cores of a CPU.

    spread(work, pieces, device)        for piece in pieces: work(piece), several at a time

An operation on tensors that fit into a core's cache is too short to be split among cores: giving each core pieces
of its own keeps all of them busy. Each piece then runs on one thread, so its bits do not depend on how many there
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


def spread(work: Callable[[Piece], None], pieces: Iterable[Piece], device: torch.device) -> None:
    """Calls ``work`` on every piece, on CPU with one piece per thread of PyTorch at a time; without gradients.

    Args:
        work: Must write only what no other piece reads or writes.
        pieces: What to call it on.
        device: Where the tensors are; anything but a CPU works on the pieces in order.
    """
    todo, threads = list(pieces), torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(todo) < threads:
        for piece in todo:
            work(piece)
        return

    def without_gradients(piece: Piece) -> None:
        with torch.no_grad():
            work(piece)

    # New threads take the process's number of threads for their own operations: one, while they run.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(without_gradients, todo):
                pass
    finally:
        torch.set_num_threads(threads)
