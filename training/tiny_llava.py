"""tiny-llava: a small real LLaVA (CLIP tower, projector, Llama decoder), trained from scratch.

    planner train training/configs/tiny-llava.yaml [--set key=value ...]

The result is a folder that stock transformers loads with
`LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`; a run that was
stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from planner.ir.errors import InputError
from planner.training.config import (
    Count,
    CountOrNone,
    Memory,
    Rate,
    RunConfig,
    Seed,
    Share,
    Weight,
    parse_config,
)
from planner.training.data import Conversation, Packer, Scene, SceneConversations
from planner.training.data.render import IMAGE_SIZE
from planner.training.data.scenes import COLORS, COLUMNS, ROWS, SHAPES, SIZES
from planner.training.run_folders import begun, exporting
from planner.training.trainer import RunTrainer, training_arguments

SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
# LLaVA-1.5's prompt: turns of "USER: ... ASSISTANT: ...</s>", the image before the first question.
CHAT_TEMPLATE = """{% for message in messages %}\
{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}\
{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\
{% endif %}{{ ' ' if message['role'] == 'user' else eos_token }}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


class TinyLlavaConfig(RunConfig):
    """Everything that makes one tiny-llava; times are in steps, a batch counts images."""

    recipe: str = "tiny-llava"
    data_seed: Seed = 0

    hidden_size: Count = 128
    intermediate_size: Count = 384
    layers: Count = 8
    heads: Count = 8
    vision_hidden_size: Count = 128
    vision_intermediate_size: Count = 256
    vision_layers: Count = 4
    vision_heads: Count = 4
    patch_size: int = Field(default=8, ge=1, le=IMAGE_SIZE)

    tower_steps: Count = 2000
    max_steps: Count = 3000
    questions: Count = 8
    questions_beside_description: CountOrNone = 3
    description_share: Share = 0.4
    dialogue_share: Share = 0.2
    learning_rate: Rate = 1.5e-3
    weight_decay: Weight = 0.05
    adam_beta2: Memory = 0.98
    warmup_steps: CountOrNone = 200
    decay_steps: CountOrNone = 1000
    concept_loss_weight: Weight = 1.0
    muon: bool = False

    # What follows the joint stage, in order; every stage changes the configuration as it then is.
    later_stages: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        # Rotary embeddings turn pairs of a head's features.
        for width, heads, pairs in (
            ("hidden_size", "heads", 2),
            ("vision_hidden_size", "vision_heads", 1),
        ):
            if getattr(self, width) % (pairs * getattr(self, heads)):
                raise InputError(
                    f"{width}={getattr(self, width)} does not divide into "
                    f"{heads}={getattr(self, heads)}" + " of even width" * (pairs == 2)
                )
        stages(self)
        return self


def stages(config: TinyLlavaConfig) -> dict[str, TinyLlavaConfig]:
    """The stages of a run by name, each with its configuration: the tower, joint, later ones.

    Every stage draws scenes of its own. A later stage may have more layers than the one before it.
    """
    found = {
        "tower": config.model_copy(update={"data_seed": config.data_seed + 1}),
        "joint": config,
    }
    for number, (name, changes) in enumerate(config.later_stages.items(), start=2):
        layers, values = config.layers, config.model_dump() | {"later_stages": {}} | changes
        config = parse_config(TinyLlavaConfig, values, f'stage "{name}"')
        _growth(layers, config.layers)
        found[name] = config.model_copy(update={"data_seed": config.data_seed + number})
    return found


def _growth(layers: int, wanted: int) -> int:
    """How many layers each of some becomes; InputError where they cannot grow to so many."""
    times, rest = divmod(wanted, layers)
    if rest or not times:
        raise InputError(f"{layers} layers grow to a multiple of them, not to {wanted}.")
    return times


def build_processor(patch_size: int = 8) -> LlavaProcessor:
    """Tokenizer and image processor as one `LlavaProcessor`.

    WordPiece with whole words for the language of the scenes and single characters for all else, so
    that numbers, spelled words and unknown words have tokens too.
    """
    inner = [f"##{character}" for character in CHARACTERS]
    pieces = [*SPECIAL_TOKENS, *CHARACTERS, *inner, *"?.,!'-:", *_words()]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        padding_side="left",
        model_max_length=256,
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size=side,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


@cache
def _words() -> list[str]:
    """The words of questions and answers, but for those read off the image: they are spelled."""
    texts = ["What word is written in the image?", "What number is written?", "the text says"]
    for conversation in (SceneConversations("train", 1000)[i] for i in range(1000)):
        for turn in conversation.turns:
            if turn.family != "text":
                texts += [turn.question, turn.answer.split("the text says")[0]]
    found = re.findall(r"[a-z]{2,}", " ".join(texts).lower())
    return sorted(set(found))


def build_model(config: TinyLlavaConfig, processor: LlavaProcessor) -> TinyLlavaForTraining:
    """A randomly initialised model (seeded by `config.seed`)."""
    set_seed(config.seed)
    tokenizer = processor.tokenizer
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=config.vision_hidden_size,
        intermediate_size=config.vision_intermediate_size,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=IMAGE_SIZE,
        patch_size=config.patch_size,
        projection_dim=config.vision_hidden_size,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=512,
        initializer_range=0.05,
        **ids,
    )
    model = TinyLlavaForTraining(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=processor.image_token_id,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=(IMAGE_SIZE // config.patch_size) ** 2,
            **ids,
        )
    )
    model.concept_loss_weight = config.concept_loss_weight
    return model


def deepened(
    model: TinyLlavaForTraining, config: TinyLlavaConfig, processor: LlavaProcessor
) -> TinyLlavaForTraining:
    """A model of `config.layers` layers that computes what `model` does, with fewer of them.

    Every layer is followed by equally many copies of it that add nothing as yet: their last
    projections are zero, as LLaMA Pro (arXiv 2401.02415) expands blocks.
    """
    old = model.model.language_model.layers
    times = _growth(len(old), config.layers)
    grown = build_model(config, processor)
    new = grown.model.language_model.layers
    state = {k: v for k, v in model.state_dict().items() if ".language_model.layers." not in k}
    grown.load_state_dict(state, strict=False)
    for number, layer in enumerate(new):
        layer.load_state_dict(old[number // times].state_dict())
        if number % times:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return grown


class TinyLlavaForTraining(LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA with two linear layers on the vision tower that name what the picture shows.

    They stand in for CLIP's contrastive pre-training, on each patch (what its cell shows) and on
    the CLS token (what the picture shows). LLaVA takes the patches one layer below the top, so
    without them the last layer and its CLS attention, which selectors read, would stay random.
    """

    concept_loss_weight: float = 1.0

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.patch_head = nn.Linear(config.vision_config.hidden_size, len(CONCEPTS))
        self.image_head = nn.Linear(config.vision_config.hidden_size, len(CONCEPTS))
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        patch_concepts: Tensor | None = None,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock model; `patch_concepts` (images, patches, concepts) adds the tower's loss.

        Without `input_ids` the tower runs alone and the output holds its loss only.
        """
        if patch_concepts is None or pixel_values is None:
            return super().forward(input_ids, pixel_values, **kwargs)
        images = self.get_image_features(pixel_values, return_dict=True, output_hidden_states=True)
        layer = self.config.vision_feature_layer
        patches = self.patch_head(images.hidden_states[layer][:, 1:])
        summary = self.model.vision_tower.post_layernorm(images.last_hidden_state[:, 0])
        cross_entropy = nn.functional.binary_cross_entropy_with_logits
        tower_loss = cross_entropy(patches, patch_concepts) + cross_entropy(
            self.image_head(summary), patch_concepts.amax(dim=1)
        )
        if input_ids is None:
            return LlavaCausalLMOutputWithPast(loss=tower_loss)
        output = super().forward(input_ids, mm_encoder_outputs={"image": images}, **kwargs)
        output.loss = output.loss + self.concept_loss_weight * tower_loss
        return output


CONCEPTS = (*SIZES, *COLORS, *SHAPES, *CHARACTERS)


def patch_concepts(scene: Scene, patch_size: int) -> Tensor:
    """What each patch's cell shows, (patches, concepts) of 0 and 1.

    An object's words in its cell; the text's characters all along the text's row.
    """
    cells = torch.zeros(len(ROWS), len(COLUMNS), len(CONCEPTS))
    for o in scene.objects:
        for word in (o.size, o.color, o.shape):
            cells[o.row, o.column, CONCEPTS.index(word)] = 1
    for character in scene.text or "":
        cells[scene.text_row, :, CONCEPTS.index(character)] = 1
    side = IMAGE_SIZE // patch_size
    cell = [int((i + 0.5) * len(ROWS) / side) for i in range(side)]  # of each patch's middle
    return cells[cell][:, cell].flatten(0, 1)


@dataclass(frozen=True)
class SceneCollator:
    """Batches of scenes: packed text (unless `tower_only`), what the patches show, and ids."""

    packer: Packer
    patch_size: int
    tower_only: bool

    def __call__(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """One training batch."""
        batch = self.packer(conversations)
        if self.tower_only:
            batch = {"pixel_values": batch["pixel_values"]}
        scenes = [c.scene for c in conversations if c.scene is not None]
        shown = torch.stack([patch_concepts(scene, self.patch_size) for scene in scenes])
        return {**batch, "patch_concepts": shown, "ids": [c.id for c in conversations]}


def build_trainer(
    config: TinyLlavaConfig, model: TinyLlavaForTraining, processor: LlavaProcessor, stage: str
) -> RunTrainer:
    """The data and schedule of one of the `stages` as a trainer, ready to start or to resume."""
    config = stages(config)[stage]
    tower = stage == "tower"
    dataset = SceneConversations(
        "train",
        config.scenes,
        config.data_seed,
        1 if tower else config.questions,
        0 if tower else config.questions_beside_description,
        config.description_share,
        config.family_weights,
    )
    steps = config.tower_steps if tower else config.max_steps
    arguments = training_arguments(
        config,
        output_dir=str(Path(config.output_dir) / stage),
        max_steps=steps,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=config.warmup_steps,
        lr_scheduler_kwargs={
            "num_decay_steps": steps // 3 if tower else config.decay_steps,
            "min_lr_ratio": 0.02,
            "decay_type": "1-sqrt",
        },
    )
    packer = Packer(processor, config.max_text_tokens, config.dialogue_share)
    return RunTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=SceneCollator(packer, config.patch_size, tower_only=tower),
        processing_class=processor,
        muon=config.muon,
    )


def train(config: TinyLlavaConfig) -> LlavaForConditionalGeneration:
    """Train (or resume) tiny-llava: the vision tower alone, everything jointly, later stages.

    Exports the model folder when `export_dir` is set.
    """
    processor = build_processor(config.patch_size)
    with begun(config):
        model = build_model(config, processor)
        for stage, changed in stages(config).items():
            if changed.layers != len(model.model.language_model.layers):
                model = deepened(model, changed, processor)
            build_trainer(config, model, processor, stage).run()
    plain = plain_model(model)
    if config.export_dir is not None:
        with exporting(Path(config.export_dir), config) as folder:
            export(plain, processor, folder)
    return plain


def plain_model(trained: TinyLlavaForTraining) -> LlavaForConditionalGeneration:
    """The stock model with the trained weights, without the layer that only training needed."""
    model = LlavaForConditionalGeneration(trained.config)
    state = {
        k: v for k, v in trained.state_dict().items() if k.partition(".")[0] in ("model", "lm_head")
    }
    model.load_state_dict(state)
    return model.eval()


def export(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: str | Path
) -> None:
    """Write the model folder: fp16 weights, configs, processor.

    The config says float32, so that stock `from_pretrained` computes in float32 unless told
    otherwise.
    """
    half = type(model)(model.config).half()
    half.load_state_dict(model.state_dict())
    # A resumed Trainer has switched it off.
    half.config.use_cache = half.generation_config.use_cache = True
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
    config_file = Path(folder) / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n")
