"""Tokens of a data set, made once and memory-mapped: no epoch pays the encoder again.

The cache folder is keyed by the images and the tokenizer's weights. Tokens are uint16, written in
shards that each appear whole, so that an interrupted run goes on where it stopped.
Legend: N images, L tokens of all scales.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmoe_var.checkpoints.safetensors_io import write_text
from dmoe_var.data.digits import ImageSet
from dmoe_var.errors import DataError
from dmoe_var.models.vqvae import VQVAE

SHARD = 1024


def weights_hash(module: torch.nn.Module) -> str:
    """Hash of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TokenSet:
    """Memory-mapped tokens with their labels."""

    tokens_NL: np.ndarray
    labels_N: Tensor
    patch_nums: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels_N)

    def batch(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and labels (B,) as LongTensors."""
        rows = np.asarray(self.tokens_NL[indices_B.numpy()], dtype=np.int64)
        return torch.from_numpy(rows), self.labels_N[indices_B]

    def by_scale(self, tokens_BL: Tensor) -> list[Tensor]:
        """The tokens of each scale, (B, p*p)."""
        return list(tokens_BL.split([p * p for p in self.patch_nums], dim=1))


@torch.no_grad()
def tokenize(
    images: ImageSet, vqvae: VQVAE, cache: Path, batch_size: int = 64, progress: bool = True
) -> TokenSet:
    """Tokens of all images, from the cache where they are there.

    DataError for a cache file that is not what its key says.
    """
    if vqvae.config.vocab_size > 2**16:
        raise DataError(f"vocab_size={vqvae.config.vocab_size}: the token cache holds uint16")
    shape = json.dumps(asdict(vqvae.config))
    tokenizer = hashlib.sha256((shape + weights_hash(vqvae)).encode()).hexdigest()[:16]
    folder = cache / f"{images.key}-{tokenizer}"
    folder.mkdir(parents=True, exist_ok=True)
    num_tokens = sum(p * p for p in vqvae.config.patch_nums)
    final = folder / "tokens.npy"
    if not final.exists():
        device = vqvae.quantize.embedding.weight.device
        shards = []
        for start in tqdm(range(0, len(images), SHARD), desc="tokenize", disable=not progress):
            shard = folder / f"shard_{start:08d}.npy"
            if not shard.exists():
                end = min(start + SHARD, len(images))
                rows = []
                for first in range(start, end, batch_size):
                    indices = torch.arange(first, min(first + batch_size, end))
                    tokens = vqvae.encode(images.tensors(indices).to(device))
                    rows.append(torch.cat(tokens, dim=1).cpu().numpy().astype(np.uint16))
                _save(shard, np.concatenate(rows))
            shards.append(shard)
        _save(final, np.concatenate([_load(shard) for shard in shards]))
        about = {"images": images.key, "num_images": len(images), "num_tokens": num_tokens}
        write_text(folder / "about.json", json.dumps(about, indent=2) + "\n")
        for shard in shards:
            shard.unlink()
    tokens_NL = _open(final, (len(images), num_tokens))
    return TokenSet(tokens_NL, torch.from_numpy(images.labels), vqvae.config.patch_nums)


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


def _load(path: Path) -> np.ndarray:
    try:
        tokens_NL: np.ndarray = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: cut short or no token file ({error}); remove it") from error
    if not isinstance(tokens_NL, np.ndarray):
        raise DataError(f"{path}: no token file; remove it")
    return tokens_NL


def _open(path: Path, shape: Sequence[int]) -> np.ndarray:
    tokens_NL = _load(path)
    if tokens_NL.shape != tuple(shape) or tokens_NL.dtype != np.uint16:
        found = f"{tokens_NL.dtype} {tokens_NL.shape}"
        raise DataError(f"{path}: holds {found}, expected uint16 {tuple(shape)}; remove it")
    return tokens_NL
