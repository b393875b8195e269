"""CUDA graphs of whole training steps: what a step launches is recorded once and replayed, so that the CPU, which
else launches a thousand small kernels for it, no longer decides how fast small networks train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

WARM_UP = 3
"""Steps that run as they are before one like them is recorded: libraries choose their kernels in them."""
MOST_REMEMBERED = 64
"""Kinds of steps that are counted before the count begins anew."""

Inputs = TypeVar("Inputs")
Key = TypeVar("Key", bound=Hashable)
Outputs = tuple[Tensor, ...]
Act = Callable[[Inputs, Key], Outputs]


@dataclass(frozen=True)
class Recorded:
    """A step as a graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Outputs


class Graphs:
    """The graphs of a phase. Everything that lives from step to step (weights, Adam, EMA, feedback) is changed in
    place and lies outside of them."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle() if on else None
        # The first steps run on the stream that is recorded later, so that libraries have their workspaces there. Not
        # torch's own, whose workspaces end with any graph.
        self._stream: Any = torch.cuda.Stream() if on else None  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Steps recorded."""
        return len(self._recorded)

    def run(self, act: Act[Inputs, Key], inputs: Inputs, key: Key) -> Outputs:
        """act(inputs, key), replayed where it is recorded. What act does on the device must be decided by the key and
        the tensors in `inputs` (lists, mappings and dataclasses of them), without a look at their values."""
        if not self.on:
            return act(inputs, key)
        if key not in self._recorded:
            if len(self._seen) > MOST_REMEMBERED:  # In a fade or a ramp, where no key comes again.
                self._seen.clear()
            self._seen[key] += 1
            if self._seen[key] <= WARM_UP:
                return self._launch(act, inputs, key)
            self._recorded[key] = self._record(act, inputs, key)
        recorded = self._recorded[key]
        torch._foreach_copy_(recorded.inputs, list(self.tensors(inputs)))
        recorded.graph.replay()
        return tuple(output.clone() for output in recorded.outputs)

    def _launch(self, act: Act[Inputs, Key], inputs: Inputs, key: Key) -> Outputs:
        here, aside = torch.cuda.current_stream(), self._stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            outputs = act(inputs, key)
        here.wait_stream(aside)
        return outputs

    def _record(self, act: Act[Inputs, Key], inputs: Inputs, key: Key) -> Recorded:
        held, graph = deepcopy(inputs), torch.cuda.CUDAGraph()
        # The loader's threads may go on to call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = act(held, key)
        return Recorded(graph, list(self.tensors(held)), outputs)

    @staticmethod
    def tensors(tree: Any) -> Iterator[Tensor]:
        """All tensors of nested lists, mappings and dataclasses, in a fixed order."""
        if isinstance(tree, Tensor):
            yield tree
            return
        parts: Sequence[Any] = ()
        if isinstance(tree, Mapping):
            parts = list(tree.values())
        elif isinstance(tree, (list, tuple)):
            parts = tree
        elif is_dataclass(tree):
            parts = [getattr(tree, each.name) for each in fields(tree)]
        for part in parts:
            yield from Graphs.tensors(part)
