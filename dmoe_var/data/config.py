"""Which images an experiment is about."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from dmoe_var.config_fields import PathOrName
from dmoe_var.data import digits

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0)]
IN_MEMORY = ("kind", "image_size", "num_classes")
"""The keys that kind=digits reads."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, how they are cut, and how they are read.

    digits: scikit-learn's, enlarged to image_size pixels a side; the keys after num_classes are
    read by image_folder alone. image_folder: pictures in `root`/`train`/CLASS and
    `root`/`val`/CLASS, both of the same classes; `num_classes`, where given, is how many folders
    there must be, or how many classes the model has. A label is a folder's place, whole numbers
    sorted as numbers; fewer folders than the model's classes keep its labels, where they are named
    by them or by ImageNet's wnids. As published for VAR, the shorter side is resized to
    `resize_ratio` * image_size; training crops are random, a fixed number (`augmentations`) of each
    picture that follows from `seed`; held-out crops are central. `limit` and `held_out` are how
    many training and held-out pictures are used, spread over the classes (None: all). A picture
    that cannot be decoded is left out (skip), or ends the run once all have been tried (refuse).
    `workers` threads decode (0: the encoder's own); `encode_batch` images are encoded at a time.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["digits", "image_folder"] = "digits"
    image_size: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    num_classes: Count | None = None
    root: PathOrName | None = None
    train: Name = "train"
    val: Name = "val"
    resize_ratio: Annotated[float, Field(ge=1, le=8)] = 1.125
    augmentations: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    limit: Count | None = None
    held_out: Count | None = None
    unreadable: Literal["refuse", "skip"] = "refuse"
    workers: Annotated[int, Field(ge=0)] = 0
    encode_batch: Count = 64

    def __post_init__(self) -> None:
        if self.kind == "image_folder":
            return
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in IN_MEMORY and value != field.default:
                raise ValueError(f"{field.name}={value} is read by kind=image_folder alone")
        if self.num_classes not in (None, digits.NUM_CLASSES):
            raise ValueError(
                f"num_classes={self.num_classes} must be {digits.NUM_CLASSES} or null for "
                f"kind={self.kind}"
            )

    def known_classes(self) -> int | None:
        """How many classes there are; None where only the folder can tell."""
        return digits.NUM_CLASSES if self.kind == "digits" else self.num_classes

    def suits(self, num_classes: int) -> bool:
        """Whether a model of num_classes classes may be trained on this: folders may be fewer."""
        known = self.known_classes()
        if self.kind == "image_folder":
            return known is None or known <= num_classes
        return known == num_classes
