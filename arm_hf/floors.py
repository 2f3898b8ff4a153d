"""The least time in which a machine can do what was counted: no measurement of a method can fall below it.

Three things are counted and timed bare, right after the method, each into memory that is there already, the fastest of
a few calls:

- multiply-adds of linear layers and convolutions, at the speed of one large matrix product;
- multiply-adds of attention, at the speed of its two products on a block of a map that stays in the cache: one side is
  no longer than the channels of a head, which makes them slower than large ones;
- exponentials of attention maps, at the speed of exp on values in the cache.

What a method does beside that is left out: sums, norms, divisions, activations, and every byte that has to be moved.
So the floor is below what any program for the same operations can reach. It says nothing about another algorithm that
needs fewer of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

SIDE = 1024  # of the large product; the linear layers of a ViT-B run at the same speed to a few hundredths
BLOCK = (256, 512, 64)  # rows and columns of a block of a map, and channels of a head
EXPONENTIALS = 2**16  # 256 KiB of float32
CALLS = 3


@dataclass(frozen=True)
class Work:
    """What a run does at least.

    Attributes:
        linear: Multiply-adds of linear layers and convolutions, times two.
        attention: Multiply-adds of attention and of other batched products, times two.
        exponentials: Values of attention maps and of other softmaxes and exponential functions.
    """

    linear: int
    attention: int
    exponentials: int

    def __sub__(self, other: Work) -> Work:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Work(*(own - its for own, its in pairs))

    @property
    def flops(self) -> int:
        """All operations of products."""
        return self.linear + self.attention


class _Exponentials(TorchDispatchMode):
    """Counts values that exp is taken of."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if "scaled_dot_product" in name:
            query, key = arguments[:2]
            self.count += query.shape[:-1].numel() * key.shape[-2]
        elif name in ("exp", "exp_", "softmax", "_softmax", "_safe_softmax"):
            self.count += result.numel()
        return result


def count_work(run: Callable[[], Any]) -> Work:
    """What a run does, counted while it runs twice.

    Args:
        run: Whatever calls torch.
    """
    with _Exponentials() as exponentials:
        run()
    with FlopCounterMode(display=False) as counter:
        run()
    work = {True: 0, False: 0}
    for function, flops in counter.get_flop_counts().get("Global", {}).items():
        name = str(function)
        work["bmm" in name or "scaled_dot_product" in name] += flops
    return Work(work[False], work[True], exponentials.count)


class Bare:
    """Bare kernels on a device, to be timed beside what they bound.

    On the CPU every thread has a block of its own; other devices get as many as keep them busy.

    Args:
        device: Where.
        dtype: Of the products; exponentials of maps are float32.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        def made(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator).to(device, dtype)

        generator = torch.Generator().manual_seed(0)
        blocks = torch.get_num_threads() if device == "cpu" else 256
        rows, columns, channels = BLOCK
        self.left, self.right, self.product = made(3, SIDE, SIDE)
        self.query, self.key = made(blocks, rows, channels), made(blocks, columns, channels)
        self.weights, self.attended = made(blocks, rows, columns), made(blocks, rows, channels)
        self.values, self.powers = made(2, blocks * EXPONENTIALS).float()

    def multiply(self) -> None:
        """One large matrix product."""
        torch.mm(self.left, self.right, out=self.product)

    def attend(self) -> None:
        """The two products of attention."""
        torch.bmm(self.query, self.key.transpose(1, 2), out=self.weights)
        torch.bmm(self.weights, self.key, out=self.attended)

    def exponentiate(self) -> None:
        """Exp of values in the cache."""
        torch.exp(self.values, out=self.powers)

    def speed(self, clock: Callable[[Callable[[], Any]], float]) -> Callable[[Work], float]:
        """Measure now; the result says how many seconds a piece of work takes at least.

        Args:
            clock: Seconds that a call takes.
        """
        seconds = [min(clock(run) for _ in range(CALLS)) for run in (self.multiply, self.attend, self.exponentiate)]
        amounts = (2 * SIDE**3, 4 * len(self.query) * math.prod(BLOCK), self.values.numel())
        rates = [spent / amount for spent, amount in zip(seconds, amounts, strict=True)]
        return lambda work: sum(amount * rate for amount, rate in zip(astuple(work), rates, strict=True))
