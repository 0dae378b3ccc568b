"""The geometry that convolution and pooling share: windows that slide over an image in a border."""

from dataclasses import dataclass
from typing import Literal

Product = Literal[
    "forward", "backward_data", "stored_gradient", "weighted_gradient", "batch_gradient"
]
"""What is computed of a convolution: the names of its templates."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """n images of h × w, windows of kh × kw."""

    n: int
    h: int
    w: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right

    def __post_init__(self) -> None:
        """Raises `ValueError` for sizes that leave no window."""
        if min(self.n, self.h, self.w, self.kh, self.kw, *self.stride) < 1 or min(self.padding) < 0:
            raise ValueError(f"sizes and strides must be at least 1, padding at least 0: {self}")
        if self.hp < self.kh or self.wp < self.kw:
            raise ValueError(f"the window is larger than the padded image: {self}")

    @property
    def hp(self) -> int:
        """Height with padding."""
        return self.h + self.padding[0] + self.padding[2]

    @property
    def wp(self) -> int:
        """Width with padding."""
        return self.w + self.padding[1] + self.padding[3]

    @property
    def oh(self) -> int:
        """Height of the output; windows that would not fit are left out."""
        return (self.hp - self.kh) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        """Width of the output."""
        return (self.wp - self.kw) // self.stride[1] + 1

    @property
    def pixels(self) -> int:
        """Pixels of one output image."""
        return self.oh * self.ow


@dataclass(frozen=True, kw_only=True)
class Conv(Window):
    """A convolution of n images: h × w × ci → oh × ow × co, kernel kh × kw."""

    ci: int
    co: int

    def __post_init__(self) -> None:
        """Raises `ValueError` for sizes that leave no output."""
        super().__post_init__()
        if min(self.ci, self.co) < 1:
            raise ValueError(f"a convolution needs at least one channel: {self}")

    @property
    def taps(self) -> int:
        """Products summed for one output number: kh · kw · ci."""
        return self.kh * self.kw * self.ci

    @property
    def weights(self) -> int:
        """Numbers in the weight."""
        return self.taps * self.co
