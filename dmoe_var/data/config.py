"""Configure which images an experiment uses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from dmoe_var.config_fields import Distinct, Listed, PathOrName
from dmoe_var.data import cifar10, digits

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(gt=0)]
IN_MEMORY = {
    "digits": ("kind", "image_size", "num_classes"),
    "cifar10": (
        "kind", "image_size", "num_classes", "root", "augmentations", "flip", "limit", "held_out",
    ),
}  # fmt: skip
"""The keys that each kind in memory reads; image_folder reads all."""
SPEED = ("in_memory", "workers", "encode_batch")
"""Keys that change no image. Experiments with CIFAR-10 set them, also if torchvision's is read."""
NUM_CLASSES = {"digits": digits.NUM_CLASSES, "cifar10": len(cifar10.CLASS_NAMES)}


@dataclass(frozen=True)
class DataConfig:
    """Which images are used, how they are cut, and how they are read.

    A label is a class folder's place, with whole numbers sorted as numbers. Fewer folders than the
    model's classes keep its labels if they are named by those or by ImageNet's wnids.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["digits", "cifar10", "image_folder"] = "digits"
    """digits (scikit-learn's; reads no other image key than num_classes), cifar10 (torchvision's;
    reads root, augmentations, flip, limit and held_out) or image_folder, which reads all."""
    image_size: Annotated[int, Field(ge=8, multiple_of=8)] = 16
    """Side in pixels of the images that the models see."""
    num_classes: Count | None = None
    """Class folders that must be there, or classes of the model; null takes what is there."""
    class_names: Annotated[tuple[Name, ...], Listed, Distinct] = ()
    """Names of the model's classes by label, for titles and sample.classes. If none are given,
    ImageNet's stand for 1,000 classes, and others have numbers alone."""
    root: PathOrName | None = None
    """Folder that holds train and val. cifar10: that of cifar-10-batches-py, downloaded if it is
    not there; null takes the cache folder."""
    train: Name = "train"
    """Folder of the training pictures, with one folder per class."""
    val: Name = "val"
    """Folder of the held-out pictures, with the same classes."""
    resize_ratio: Annotated[float, Field(ge=1, le=8)] = 1.125
    """Shorter side of a picture before it is cut, as a multiple of image_size."""
    augmentations: Count = 1
    """Random crops per training picture; held-out crops are central."""
    flip: bool = False
    """Whether every second augmentation of a training picture is mirrored."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the crops."""
    limit: Count | None = None
    """Number of training pictures to use, spread over the classes; null takes all."""
    held_out: Count | None = None
    """Number of held-out pictures to use, spread over the classes; null takes all."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """A picture that cannot be decoded ends the run once all were tried (refuse), or is left
    out (skip)."""
    in_memory: bool = False
    """Whether a picture is decoded once and its pixels are kept: for small sets that are read in
    many epochs."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Decoding threads per process; 0 decodes in the encoder's thread."""
    encode_batch: Count = 64
    """Images per batch of the encoder."""

    def __post_init__(self) -> None:
        if self.kind != "image_folder":
            self._check_in_memory()
        if self.flip and self.augmentations == 1:
            raise ValueError(
                "flip=true needs augmentations of 2 or more, of which every second is mirrored"
            )

    def _check_in_memory(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            as_they_are = field.name == "resize_ratio" and value == 1
            if self.kind == "cifar10" and (field.name in SPEED or as_they_are):
                continue
            if field.name not in IN_MEMORY[self.kind] and value != field.default:
                others = [kind for kind, keys in IN_MEMORY.items() if field.name in keys]
                kinds = " and ".join([*others, "image_folder"])
                raise ValueError(f"{field.name}={value} is read by kind={kinds} alone")
        if self.num_classes not in (None, NUM_CLASSES[self.kind]):
            raise ValueError(
                f"num_classes={self.num_classes} must be {NUM_CLASSES[self.kind]} or null for "
                f"kind={self.kind}"
            )
        if self.kind == "cifar10" and self.image_size != cifar10.IMAGE_SIZE:
            raise ValueError(
                f"image_size={self.image_size} must be {cifar10.IMAGE_SIZE} for kind=cifar10"
            )

    def known_classes(self) -> int | None:
        """Return the number of classes; None if only the folder can tell."""
        return NUM_CLASSES.get(self.kind, self.num_classes)

    def suits(self, num_classes: int) -> bool:
        """Tell whether a model of num_classes classes may train on this: folders may be fewer."""
        known = self.known_classes()
        if self.kind == "image_folder":
            return known is None or known <= num_classes
        return known == num_classes
