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

    A label is a class folder's place, whole numbers sorted as numbers; fewer folders than the
    model's classes keep its labels, where they are named by them or by ImageNet's wnids.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["digits", "image_folder"] = "digits"
    """digits (scikit-learn's, in memory) or image_folder, for which alone the keys after
    num_classes are."""
    image_size: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    """Pixels a side that the models see."""
    num_classes: Count | None = None
    """Class folders that there must be, or classes of the model; null takes what is there."""
    root: PathOrName | None = None
    """Folder that holds train and val."""
    train: Name = "train"
    """Folder of the training pictures, in one folder for each class."""
    val: Name = "val"
    """Folder of the held-out pictures, of the same classes."""
    resize_ratio: Annotated[float, Field(ge=1, le=8)] = 1.125
    """Shorter side of a picture before it is cut, in image_size."""
    augmentations: Count = 1
    """Random crops of each training picture; held-out crops are central."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the crops."""
    limit: Count | None = None
    """Training pictures that are used, spread over the classes; null takes all."""
    held_out: Count | None = None
    """Held-out pictures that are used, spread over the classes; null takes all."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """A picture that cannot be decoded ends the run once all were tried (refuse), or is left
    out (skip)."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Decoding threads of each process; 0 decodes in the encoder's own."""
    encode_batch: Count = 64
    """Images that are encoded at once."""

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
