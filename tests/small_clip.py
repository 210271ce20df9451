"""A small CLIP model with a tokenizer, in a folder, for selectors that compare with questions."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, set_seed

WORDS = ["<s>", "</s>", "what", "is", "red", "blue", "left", "of", "the", "circle"]
LENGTH = 8


def write_clip(folder, width=32):
    """As wide as the vision tower that it is to stand beside."""
    set_seed(0)
    side = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    text = {
        "vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "num_attention_heads": 2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **side,
    }  # fmt: skip
    vision = {**side, "hidden_size": width, "num_attention_heads": 2, "image_size": 32}
    vision["patch_size"] = 8
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="the"
    ).save_pretrained(folder)
    return folder
