"""Recording a computation as a CUDA graph, which the GPU then runs without Python."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Takes a computation on tensors that stay in place. Runs it, records it, and returns what runs it
#: again, on what those tensors then hold; the result stays in place as well.
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
_SAME = 0.01  # relative error: sums of several programs have no fixed order


def recorder(device: torch.device) -> Recorder:
    """Records on a GPU; all graphs share one pool of memory, so one must run at a time.

    Recording raises RuntimeError for a computation that waits for the GPU, which none can record,
    and where a replay does not give what the computation gave.
    """
    pool: Any = torch.cuda.graph_pool_handle()

    def record(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # The second: a capture that fails leaves its own stream as the current one.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                compute()  # compiles, loads and allocates what the first run must
                with _no_waiting():
                    expected = compute().clone()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Of this thread alone: what others do is not recorded and need not be refused.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = compute()
            graph.replay()
            error = (result - expected).float().norm() / expected.float().norm()
            if not error < _SAME:
                raise RuntimeError(
                    f"a replay gives other numbers than what it records: {error:.2g}"
                )

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Torch raises where the host would wait for the GPU: an error of ours leaves no broken graph
    behind, one while recording may.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode may miss some, which capturing finds
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
