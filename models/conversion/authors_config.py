"""The authors' config, and the stock one that says the same.

The three layouts have LLaVA's config: a LLaMA's, with ``mm_`` keys for the vision side. AdaLLaVA
adds ``scheduler_type`` and its like, Dynamic-LLaVA ``sparse_config``. They are told apart by those,
as the model types that released files name are not reliable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from planner.documents import read_json
from planner.ir.errors import InputError, first_line
from planner.planning.catalog import CONFIGS, find_model

# The vision towers that need no files of their own where the checkpoint holds their weights.
_KNOWN_TOWERS = ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14")
_CLIP = ("clip", "clip_vision_model")
_LLAMA = (
    "attention_bias", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
)  # fmt: skip
# What stock LLaVA computes otherwise: key -> the values that it has.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_use_im_start_end": (None, False),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
    "image_aspect_ratio": (None, "pad", "square"),
    "s2": (None, False),
}


@dataclass(frozen=True)
class AuthorsConfig:
    """A ``config.json`` in one of the authors' layouts."""

    folder: Path
    values: Mapping[str, Any]

    @staticmethod
    def read(folder: Path) -> AuthorsConfig:
        """Read a folder's config.

        Raises InputError: there is none, or it is of no such model, or stock LLaVA cannot say it.
        """
        values = find_model(str(folder)).config
        if not isinstance(values.get("mm_vision_tower"), str):
            raise InputError(
                f"the config.json in '{folder}' has no mm_vision_tower: it is not in the layout "
                "of LLaVA-1.5, AdaLLaVA or Dynamic-LLaVA"
            )
        if not str(values["model_type"]).endswith(("llava", "llama")):
            raise InputError(
                f"the decoder of '{folder}' is no LLaMA (model type '{values['model_type']}')"
            )
        for key, allowed in _ONLY.items():
            if values.get(key) not in allowed:
                raise InputError(
                    f"the config.json in '{folder}' says {key} = {values.get(key)}, "
                    "which is not LLaVA-1.5's"
                )
        return AuthorsConfig(folder, values)

    @property
    def layout(self) -> str:
        """``llava``, ``adallava-l``, ``adallava-h`` or ``dynamic-llava``."""
        if isinstance(self.values.get("sparse_config"), dict):
            return "dynamic-llava"
        if not {"scheduler_type", "num_prefix_layers"} & set(self.values):
            return "llava"
        kind = self.values.get("scheduler_type", "L")
        if kind not in ("L", "H"):
            raise InputError(f"the scheduler of '{self.folder}' is of type '{kind}', not L or H")
        return f"adallava-{kind.lower()}"

    def vision(self, tower: Path | None) -> CLIPVisionConfig:
        """The vision tower's config: of its folder, or of a tower known by its name."""
        name = self.tower_name(tower)
        if Path(name).is_dir():
            found = read_json(Path(name) / "config.json", "vision tower's config")
            if not isinstance(found, dict) or found.get("model_type") not in _CLIP:
                raise InputError(f"the vision tower in '{name}' is no CLIP")
            found = found.get("vision_config", found)
        elif name in _KNOWN_TOWERS:
            llava = json.loads(CONFIGS.joinpath("llava-7b.json").read_text(encoding="utf-8"))
            found = dict(llava["vision_config"])
            found["image_size"] = 336 if name.endswith("336") else 224
        else:
            raise InputError(
                f"the vision tower '{name}' is not here: give --vision-tower, a folder with it"
            )
        return _valid(CLIPVisionConfig, found, f"the vision tower '{name}'")

    def tower_name(self, tower: Path | None) -> str:
        """The vision tower's folder, or its name: the user's, else the config's."""
        return str(tower or self.values["mm_vision_tower"])

    def stock(self, vision: CLIPVisionConfig) -> LlavaConfig:
        """The stock config, with the authors' vocabulary."""
        values = {k: self.values[k] for k in _LLAMA if self.values.get(k) is not None}
        text = _valid(LlamaConfig, values, f"the config.json in '{self.folder}'")
        if self.values.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
            raise InputError(
                f"the config.json in '{self.folder}' says mm_hidden_size = "
                f"{self.values['mm_hidden_size']}, and the vision tower has {vision.hidden_size}"
            )
        whole = self.values.get("mm_vision_select_feature") == "cls_patch"
        patches = (vision.image_size // vision.patch_size) ** 2
        document = {
            "text_config": text.to_dict(),
            "vision_config": vision.to_dict(),
            "vision_feature_layer": self.values.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": "full" if whole else "default",
            "image_seq_length": patches + whole,
            "tie_word_embeddings": text.tie_word_embeddings,
        }
        return _valid(LlavaConfig, document, f"the config.json in '{self.folder}'")


def _valid(kind: Any, values: Mapping[str, Any], what: str) -> Any:
    try:
        return kind.from_dict(dict(values))
    except Exception as error:
        raise InputError(f"{what} is not valid: {first_line(error)}") from None
