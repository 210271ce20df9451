"""The catalogue: from what a user calls a model to its config.

An alias is a config inside the package. Anything else is a local folder with a ``config.json`` or
the id of a model on the Hugging Face hub. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from planner.documents import read_json
from planner.ir.errors import InputError, first_line


@dataclass(frozen=True)
class Alias:
    """A short name for a model, whose config is ``planner/aliases/<alias>.json``."""

    about: str
    hub_id: str = ""  # where its weights are


ALIASES = {
    "llava-7b": Alias("LLaVA-1.5 with Vicuna-7B", "llava-hf/llava-1.5-7b-hf"),
    "llava-13b": Alias("LLaVA-1.5 with Vicuna-13B", "llava-hf/llava-1.5-13b-hf"),
    "mipha-3b": Alias("Phi-2 with SigLIP, the model of Mipha-3B (arXiv 2403.06199)"),
    # Config and weights lie beside one another in planner/models.
    "tiny-llava": Alias("the small LLaVA that ships with planner, for trying things out"),
    "deep-llava": Alias("its deeper sister of 16 decoder layers, for schedulers to choose from"),
}
# Model types that are planner's own -> the module that registers them with transformers. It is
# imported by name, when such a config is read: nothing that is planned depends on it.
OWN_TYPES = {"projected_llava": "planner.models.projectors"}
# Alias -> folder in planner/models.
_SHIPPED = {"tiny-llava": "tiny_llava", "deep-llava": "deep_llava"}
# Models that ship as changes to weights that are fetched: `planner convert` puts them together.
CHANGES = {"smol-llava": "smol_llava"}
CONFIGS = files("planner") / "aliases"
# What marks a folder that planner exported under a plan, `planner.models.export.planned_export`.
PLANNED_EXPORT = "planner.json"


@dataclass(frozen=True)
class Source:
    """A model's config and where it comes from."""

    name: str  # what the user called it
    config: dict[str, Any]  # contents of its ``config.json``
    folder: Path | None = None  # with the model's files
    hub_id: str | None = None  # of a model with weights
    trust_remote_code: bool = False  # whether code beside the config may run

    @property
    def dtype(self) -> str:
        """The precision that the config names; float32 where it names none."""
        for part in (self.config, self.config.get("text_config") or {}):
            for name in ("dtype", "torch_dtype"):
                if isinstance(part.get(name), str):
                    return str(part[name])
        return "float32"

    def load_config(self) -> Any:
        """The transformers config object; imports transformers."""
        from transformers import CONFIG_MAPPING, AutoConfig

        model_type = self.config.get("model_type")
        make_known(self.config)
        if self.trust_remote_code and (self.folder or self.hub_id):
            return AutoConfig.from_pretrained(
                str(self.folder or self.hub_id), trust_remote_code=True
            )
        if model_type not in CONFIG_MAPPING:
            raise InputError(
                f"'{self.name}' has model type '{model_type}', which this version of transformers "
                "does not know (models with code of their own need --trust-remote-code)"
            )
        try:
            return CONFIG_MAPPING[model_type].from_dict(self.config)
        except Exception as error:
            reason = first_line(error)
            raise InputError(f"the config of '{self.name}' is not valid: {reason}") from None


def make_known(config: dict[str, Any]) -> None:
    """Make transformers know a config's model type, where that is one of `OWN_TYPES`."""
    module = OWN_TYPES.get(str(config.get("model_type")))
    if module is not None:
        import_module(module)


def _read_config(path: Path, name: str) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"the folder '{name}' has no config.json")
    config = read_json(path, "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"the config.json of '{name}' does not name a model_type")
    for key, value in _numbers(config):
        wrong = _wrong_size(key, value)
        if wrong:
            raise InputError(f"the config.json of '{name}' says {key} = {value}: {wrong}")
    return config


# Counts that a model cannot be without, by the names that configs have for them.
_SIZES = frozenset(
    (
        "d_model", "depth", "embed_dim", "hidden_size", "image_size",
        "intermediate_size", "n_embd", "n_head", "n_layer", "num_attention_heads", "num_heads",
        "num_hidden_layers", "num_key_value_heads", "num_layers", "patch_size", "vocab_size",
    )
)  # fmt: skip
_LARGEST_SIZE = 1 << 24
# Building a model takes time in proportion; the deepest have a few hundred.
_MOST_LAYERS = 1000


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Numbers of a config with their names; those in lists have the list's."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from _numbers(inside, name)
    elif isinstance(value, list):
        for inside in value:
            yield from _numbers(inside, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _wrong_size(key: str, value: int | float) -> str:
    """Why a number of a config can be no model's; "" where it can."""
    is_layers = key.endswith(("layers", "n_layer", "depth"))
    if is_layers and value > _MOST_LAYERS:
        return f"no more than {_MOST_LAYERS} layers are read"
    if key in _SIZES and not 0 < value <= _LARGEST_SIZE:
        return f"it must be more than 0 and at most {_LARGEST_SIZE}"
    if "norm" in key and "eps" in key and not 0 <= value < 1:
        return "it must be at least 0 and less than 1"
    return ""


def find_model(name: str, trust_remote_code: bool = False) -> Source:
    """Find a model's config by alias, folder or hub id; InputError says what was looked for."""
    if name in CHANGES and not (Path(name) / "config.json").is_file():
        raise InputError(
            f"'{name}' has to be put together once: planner convert {name} -o {name}, and that "
            f"folder is what {name} means from here on"
        )
    if name in _SHIPPED:
        folder = shipped_folder(name)
        return Source(name, _read_config(folder / "config.json", name), folder=folder)
    if name in ALIASES:
        text = CONFIGS.joinpath(f"{name}.json").read_text(encoding="utf-8")
        return Source(name, json.loads(text), hub_id=ALIASES[name].hub_id or None)
    folder = Path(name).expanduser()
    if folder.is_dir():
        config = _read_config(folder / "config.json", name)
        # Its config is the base model's, its weights are not.
        if (folder / PLANNED_EXPORT).is_file():
            raise InputError(
                f"'{name}' is an export that only planner.models.export.load can load: it is "
                f"narrowed already, so give the model that it was made from"
            )
        return Source(name, config, folder=folder, trust_remote_code=trust_remote_code)
    if folder.exists():
        raise InputError(
            f"'{name}' is a file: give a folder with a config.json, an alias or a hub id"
        )
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"there is no folder '{name}'")
    return _from_hub(name, trust_remote_code)


def shipped_folder(alias: str) -> Path:
    """Folder of a model that ships with planner; found without importing `planner.models`."""
    return Path(str(files("planner"))) / "models" / (_SHIPPED | CHANGES)[alias]


def tiny_llava_folder() -> Path:
    """Folder of the smallest of them."""
    return shipped_folder("tiny-llava")


def utilities_beside(folder: Path | None) -> Path | None:
    """The file of measured utilities in a model's folder."""
    path = None if folder is None else folder / "utilities.npz"
    return path if path is not None and path.is_file() else None


def _from_hub(name: str, trust_remote_code: bool) -> Source:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unknown = (
        f"unknown model '{name}': it is no alias ({', '.join(ALIASES)}), no local folder, "
        "and no model on the hub that can be reached from here"
    )
    if "/" not in name:
        raise InputError(unknown)
    try:
        path = hf_hub_download(name, "config.json")
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        raise InputError(unknown) from None
    config = _read_config(Path(path), name)
    return Source(name, config, hub_id=name, trust_remote_code=trust_remote_code)
