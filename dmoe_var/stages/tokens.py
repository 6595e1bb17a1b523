"""Tokens of the experiment's images, from the cache, and what it took to make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmoe_var.data import load_data
from dmoe_var.data.images import Images
from dmoe_var.data.token_cache import TokenSet, tokenize
from dmoe_var.data.token_shards import Seconds
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.stages.work import Work


def image_sets(work: Work) -> tuple[Images, Images]:
    """Training and held-out images, labelled for the configured VAR. DataError where they cannot
    be."""
    return load_data(
        work.config.data,
        work.config.var.num_classes,
        hashes=work.cache / "hashes",
        progress=work.progress,
    )


def token_sets(work: Work, vqvae: VQVAE) -> tuple[TokenSet, TokenSet]:
    """Training and held-out tokens. DataError where the images have other classes than the VAR."""
    config = work.config
    tokens = [
        tokenize(
            images,
            vqvae,
            work.cache / "tokens",
            batch_size=config.data.encode_batch,
            workers=config.data.workers,
            unreadable=config.data.unreadable,
            progress=config.progress,
        )
        for images in image_sets(work)
    ]
    return tokens[0], tokens[1]


def token_metrics(sets: Sequence[TokenSet]) -> dict[str, float]:
    """Images with tokens, pictures left out as unreadable, and the images a second that decoders
    and encoder of one process did alone when the sets were made (see `Seconds`)."""
    images = sum(tokens.about.images for tokens in sets)
    seconds = sum((tokens.about.seconds for tokens in sets), Seconds())
    return {
        "tokens_images": images,
        "tokens_unreadable": sum(tokens.about.unreadable for tokens in sets),
        "tokens_decode_images_per_s": images / seconds.decode,
        "tokens_encode_images_per_s": images / seconds.encode,
    }


def token_about(sets: Sequence[TokenSet]) -> dict[str, Any]:
    """For a record: which images the training and held-out tokens were made of."""
    training, held_out = (dict(tokens.about.data) for tokens in sets)
    held_out.pop("classes", None)  # the same
    return {"data": {"training": training, "held_out": held_out}}
