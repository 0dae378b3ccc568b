"""What becomes of a product's results before they are written, instead of a kernel of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import DataType

from myelin.kernels.tir import load, store


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """y = function(product, others…), element by element.

    Others are `others` further arguments of the kernel, arrays of y's shape that stand before its
    scratch. `function` takes and gives scalars or vectors of float32, as in `elementwise.map`.
    """

    function: Callable[..., Any] = lambda value: value
    others: int = 0

    def parameters(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The further arguments of a kernel whose result has this shape."""
        return {f"other_{i}": shape for i in range(self.others)}

    def into(self, y: Any, others: Sequence[Any]) -> Callable[..., None]:
        """write(value, *index): what a template calls instead of storing in y."""

        def write(value: Any, *index: Any) -> None:
            lanes = int(DataType(str(value.ty.dtype)).lanes)
            loaded = [load(other, *index, lanes=lanes) for other in others]
            store(y, self.function(value, *loaded), *index)

        return write


PLAIN = Epilogue()
"""Results are written as they are."""
