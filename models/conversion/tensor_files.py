"""The tensors in a folder's files: safetensors, or pickles where the user allows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from planner.documents import read_json
from planner.ir.errors import InputError, first_line

SAFE, PICKLE = "model.safetensors", "pytorch_model.bin"


def read_tensors(folder: Path, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, in one file or in several with an index.

    `folder`: with the files, under the names that transformers gives them. `allow_pickle`: read
    ``.bin`` files where there are no others; only tensors are read of them. Raises InputError: no
    such files, a broken one, or one that lacks what the index promises.
    """
    for name, pickled in ((SAFE, False), (PICKLE, True)):
        index = folder / f"{name}.index.json"
        if not (index.exists() or (folder / name).exists()):
            continue
        if pickled and not allow_pickle:
            raise InputError(
                f"the weights in '{folder}' are pickles, which can run programs when they are "
                "read: give --allow-pickle to read the tensors in them, and nothing else"
            )
        read = _read_pickle if pickled else _read_safe
        return _read_shards(index, read) if index.exists() else read(folder / name)
    raise InputError(f"the folder '{folder}' has no {SAFE} and no {PICKLE}, whole or in shards")


def _read_shards(index: Path, read: Any) -> dict[str, Tensor]:
    document = read_json(index, "index of the weights")
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not places:
        raise InputError(f"the index of the weights '{index}' has no weight_map")
    tensors: dict[str, Tensor] = {}
    for shard in sorted({str(shard) for shard in places.values()}):
        if Path(shard).name != shard:
            raise InputError(f"the index of the weights '{index}' leads out of its folder: {shard}")
        tensors |= read(index.parent / shard)
    for name in sorted(set(places) - set(tensors)):
        raise InputError(f"'{index.parent / str(places[name])}' lacks {name}, which its index has")
    return tensors


def _read_safe(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise InputError(
            f"there is no file '{path}', which the index of the weights names"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the weights '{path}' are broken: {first_line(error)}") from None
    return tensors


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise InputError(
            f"there is no file '{path}', which the index of the weights names"
        ) from None
    # What a pickle that is none raises is anything.
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"the weights '{path}' are broken or no mere tensors: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError(f"the weights '{path}' are no tensors by name")
    return found
