"""From the calls of a step to a graph: fewer launches, on several streams.

What a call needs is written in ``reads`` and ``writes``, so all that is done here is safe whatever the step looks like:
calls are joined only where nothing between them touches what they work on, and a stream waits for a block of another
one as soon as it touches what the block does, and not before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from nicecp.kernels.backend import Array
from nicecp.kernels.cuda_calls import MAIN, BiasBackward, BiasForward, Call, Coefficients, Couple, Product, Update
from nicecp.kernels.cuda_driver import Bias, BiasGradient, Driver, Epilogue, Lanes, MaskedBiasGradient, ReluBias

Span = tuple[int, int]  # first byte and end


@dataclass
class Block:
    """Calls that follow one another on a lane other than MAIN, what they touch, and the blocks they come after."""

    lane: int
    writes: list[Span] = field(default_factory=list)
    reads: list[Span] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def meets(self, writes: list[Span], reads: list[Span]) -> bool:
        """Whether a call that touches this must come after the block."""
        return _overlap(writes, self.writes) or _overlap(writes, self.reads) or _overlap(reads, self.writes)


class Plan:
    """The calls of a step in the order of their launches.

    calls : what is launched; place : for each of them -1 on the main stream, or the number of its block; waits : for
    each of them the blocks that the main stream waits for first; blocks : those beside the main stream.
    """

    def __init__(self, driver: Driver, calls: list[Call]) -> None:
        self._driver = driver
        self.calls = self._with_shared_coefficients(calls)
        self.calls = _with_joined_updates(self.calls)
        self.calls = self._with_forward_epilogues(self.calls)
        self.calls = self._with_backward_epilogues(self.calls)
        for call in self.calls:
            call.prepare(driver)
        self.place: list[int] = []
        self.waits: list[list[int]] = []
        self.blocks: list[Block] = []
        self._schedule()

    def play(self) -> None:
        """Launch all of it: what a driver captures."""
        tokens: list[Any] = []
        position = 0
        while position < len(self.calls):
            number = self.place[position]
            if number < 0:
                for block in self.waits[position]:
                    self._driver.wait(tokens[block])
                self.calls[position].run(self._driver)
                position += 1
                continue
            with self._side(self.blocks[number], tokens) as token:
                tokens.append(token)
                while position < len(self.calls) and self.place[position] == number:
                    self.calls[position].run(self._driver)
                    position += 1

    def _side(self, block: Block, tokens: list[Any]) -> AbstractContextManager[Any]:
        if isinstance(self._driver, Lanes):
            return self._driver.side(block.lane - 1, [tokens[number] for number in block.after])
        return self._driver.side()

    # --- fewer launches -----------------------------------------------------------------------------------------------

    def _with_shared_coefficients(self, calls: list[Call]) -> list[Call]:
        """Coefficients are computed again only after something else wrote the state."""
        out: list[Call] = []
        fresh: Coefficients | None = None
        for call in calls:
            if isinstance(call, Coefficients):
                if fresh is not None and call.optimizer == fresh.optimizer and self._same(call.state, fresh.state):
                    continue
                fresh = call
            elif fresh is not None and not isinstance(call, Update) and self._meet(call.writes(), [fresh.state]):
                fresh = None
            out.append(call)
        return out

    def _with_forward_epilogues(self, calls: list[Call]) -> list[Call]:
        """Bias and ReLU by the product, with a mask if a backward pass asks for it later; or bias by the coupling."""
        out: list[Call] = []
        for position, call in enumerate(calls):
            later = calls[position + 1 :]
            if isinstance(call, BiasForward):
                before = out[-1] if out else None
                if isinstance(before, Product) and self._takes_bias(before, call, later):
                    continue
                after = later[0] if later else None
                if not call.relu and isinstance(after, Couple) and self._adds_bias(after, call.y):
                    after.bias = call.b
                    continue
            out.append(call)
        return out

    def _takes_bias(self, product: Product, call: BiasForward, later: list[Call]) -> bool:
        own = self._same(product.out, call.y)
        return own and any(product.take(self._driver, epilogue) for epilogue in self._biases(call, later))

    def _biases(self, call: BiasForward, later: list[Call]) -> Iterator[Epilogue]:
        """Epilogues that do it, the best one first: without a mask the backward pass looks at y."""
        if not call.relu:
            yield Bias(call.b)
            return
        if any(isinstance(other, BiasBackward) and other.relu and self._same(other.y, call.y) for other in later):
            yield ReluBias(call.b, self._driver.relu_mask(*call.y.shape))
        yield ReluBias(call.b)

    def _adds_bias(self, couple: Couple, m: Array) -> bool:
        apart = not self._meet([couple.x, couple.y], [m])
        return self._same(couple.m, m) and apart and couple.y.shape == m.shape

    def _with_backward_epilogues(self, calls: list[Call]) -> list[Call]:
        """Mask and bias gradient by the product that gives dy, or the bias gradient by the one that takes it."""
        out: list[Call] = []
        for position, call in enumerate(calls):
            if isinstance(call, BiasBackward) and call.db is not None:
                if call.relu and self._masked_before(out, call, call.db):
                    continue
                after = calls[position + 1] if position + 1 < len(calls) else None
                takes_dy = isinstance(after, Product) and after.transpose_a and self._same(after.b, call.dy)
                if not call.relu and takes_dy and after.take(self._driver, BiasGradient(call.db)):  # type: ignore[union-attr]
                    continue
            out.append(call)
        return out

    def _masked_before(self, before: list[Call], call: BiasBackward, db: Array) -> bool:
        mask = None
        for earlier in before:  # the last call that wrote y: its mask still tells where y > 0
            if self._meet(earlier.writes(), [call.y]):
                mask = None
                if isinstance(earlier, Product) and isinstance(earlier.epilogue, ReluBias):
                    mask = earlier.epilogue.mask if self._same(earlier.out, call.y) else None
        if mask is None:
            return False
        for earlier in reversed(before):
            if isinstance(earlier, Product) and self._same(earlier.out, call.dy):
                return earlier.take(self._driver, MaskedBiasGradient(mask, db))
            if self._meet([*earlier.writes(), *earlier.reads()], [call.dy, db]):
                return False
        return False

    # --- several streams ----------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
        lanes = self._driver.lanes if isinstance(self._driver, Lanes) else 1
        pending: dict[int, list[int]] = {lane: [] for lane in range(1, lanes + 1)}  # blocks MAIN has not waited for
        for call in self.calls:
            lane, writes, reads = min(call.lane, lanes), self._spans(call.writes()), self._spans(call.reads())
            # A lane's blocks run in order, so that the last one that matters is enough.
            last = [max((number for number in numbers if self.blocks[number].meets(writes, reads)), default=-1)
                    for other, numbers in pending.items() if other != lane]  # fmt: skip
            before = [number for number in last if number >= 0]
            if lane == MAIN:
                self.place.append(-1)
                self.waits.append(before)
                for number in before:
                    own = self.blocks[number].lane
                    pending[own] = [later for later in pending[own] if later > number]
                continue
            follows_on = bool(self.place) and self.place[-1] >= 0 and self.blocks[self.place[-1]].lane == lane
            if not follows_on:
                pending[lane].append(len(self.blocks))
                self.blocks.append(Block(lane))
            block = self.blocks[-1]
            block.writes += writes
            block.reads += reads
            block.after += [number for number in before if number not in block.after]
            self.place.append(len(self.blocks) - 1)
            self.waits.append([])

    # --- which memory -------------------------------------------------------------------------------------------------

    def _spans(self, arrays: list[Array]) -> list[Span]:
        starts = [self._driver.address(array) for array in arrays]
        return [(start, start + array.nbytes) for start, array in zip(starts, arrays, strict=True)]

    def _same(self, one: Array, other: Array) -> bool:
        return self._spans([one]) == self._spans([other]) and one.dtype == other.dtype

    def _meet(self, some: list[Array], others: list[Array]) -> bool:
        return _overlap(self._spans(some), self._spans(others))


def _overlap(some: list[Span], others: list[Span]) -> bool:
    return any(a < end and start < b for a, b in some for start, end in others)


def _with_joined_updates(calls: list[Call]) -> list[Call]:
    """Updates that follow one another and whose ranges adjoin, as of a layer's weight and its bias, become one."""
    out: list[Call] = []
    for call in calls:
        last = out[-1] if out else None
        if isinstance(call, Update) and isinstance(last, Update) and _adjoin(last, call):
            last.offset, last.size = min(last.offset, call.offset), last.size + call.size
        else:
            out.append(call)
    return out


def _adjoin(last: Update, call: Update) -> bool:
    alike = all(getattr(last, name) is getattr(call, name) for name in ("p", "g", "m", "v", "state"))
    touch = last.offset + last.size == call.offset or call.offset + call.size == last.offset
    return alike and last.optimizer == call.optimizer and touch
