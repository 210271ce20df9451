"""Small checkpoints in their authors' layouts: converted, they compute what they computed."""

import json
import re

import pytest
import torch
from families import randomise
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from planner.ir.lowering import lower_model
from planner.loading import load_image, load_weights, noise_image
from planner.models.conversion.stock_processor import stock_processor
from planner.models.scheduling import load_scheduler
from planner.models.scheduling.budget_features import sinusoid

WORDS = 96
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": WORDS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 5000.0,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
SCHEDULER = {
    "scheduler_up_proj.net.0.weight": (256,),
    "scheduler_up_proj.net.0.bias": (256,),
    "scheduler_up_proj.net.1.weight": (64, 256),
    "scheduler_up_proj.net.1.bias": (64,),
    "scheduler_up_proj.net.3.weight": (64, 64),
    "scheduler_up_proj.net.3.bias": (64,),
}
SPARSE = {"sparse_layer": 2, "vision_keep_rate": 0.2, "output_text_keep_rate": 0.5}
# What a layout adds to the config: quirks of released files included.
CONFIGS = {
    "llava": {"model_type": "llava"},
    "adallava-l": {
        "model_type": "ada_llava_llama",
        "scheduler_type": "L",
        "num_prefix_layers": 2,
        "token_selecting": "prumerge+",
    },
    "adallava-h": {
        "model_type": "ada_llava_llama",
        "scheduler_type": "H",
        "num_prefix_layers": 2,
        "scheduler_rank": [2],
    },
    "dynamic-llava": {"model_type": "llava_llama", "sparse_config": SPARSE},
}


@pytest.fixture(scope="module")
def stock():
    config = LlavaConfig(
        text_config={"model_type": "llama", **LLAMA},
        vision_config=CLIP,
        image_token_index=WORDS - 1,
        image_seq_length=16,
    )
    return randomise(LlavaForConditionalGeneration(config), 0)


def authors_tensors(stock, layout):
    """The model's weights as the authors name them, with those of the layout beside."""
    tensors = {}
    for name, value in stock.state_dict().items():
        name = re.sub(r"^model\.vision_tower", "model.vision_tower.vision_tower.vision_model", name)
        name = re.sub(r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0", name)
        name = re.sub(r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2", name)
        tensors[re.sub(r"^model\.language_model", "model", name)] = value.clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    generator = torch.Generator().manual_seed(1)
    shapes = {}
    if layout.startswith("adallava"):
        rows = 2 if layout == "adallava-l" else 2 * 2 * 4
        shapes = {**SCHEDULER, "mlp_head.weight": (rows, 64), "mlp_head.bias": (rows,)}
        shapes = {f"scheduler.{name}": shape for name, shape in shapes.items()}
    elif layout == "dynamic-llava":
        shapes = {f"model.{name}": shape for name, shape in predictors(64).items()}
    for name, shape in shapes.items():
        tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def predictors(width):
    """Dynamic-LLaVA's two predictors, and one that its code holds and never calls."""
    from torch import nn

    def block():
        attn = nn.ModuleDict({"qkv": nn.Linear(512, 1536, bias=False), "proj": nn.Linear(512, 512)})
        mlp = nn.ModuleDict({"fc1": nn.Linear(512, 2048), "fc2": nn.Linear(2048, 512)})
        norms = {"norm1": nn.LayerNorm(512), "norm2": nn.LayerNorm(512)}
        return nn.ModuleDict({**norms, "attn": attn, "mlp": mlp})

    def head(*before):
        pairs = [(nn.Linear(into, out), nn.GELU()) for into, out in ((512, 256), (256, 128))]
        layers = [layer for pair in pairs for layer in pair]
        return nn.Sequential(*before, *layers, nn.Linear(128, 2))

    def start():
        return [nn.LayerNorm(width), nn.Linear(width, 512), nn.GELU()]

    with torch.device("meta"):
        image = nn.ModuleDict(
            {
                "down_mlp": nn.Sequential(*start()),
                "transformer": nn.ModuleList([block(), block()]),
                "output_mlp": head(),
            }
        )
        answer = nn.ModuleDict({"output_mlp": head(*start())})
    modules = nn.ModuleDict(
        {
            "image_score_predictor": image,
            "output_text_score_predictor": answer,
            "instruct_score_predictor": nn.ModuleDict({"output_mlp": nn.Linear(1, 1)}),
        }
    )
    return {name: tuple(value.shape) for name, value in modules.state_dict().items()}


@pytest.fixture
def write(stock, tmp_path):
    """Write a checkpoint of a layout: its folder."""

    def write(layout, tensors=None, shards=1, pickled=False, tower_inside=True, **changed):
        source = tmp_path / "source"
        source.mkdir()
        words = {f"w{n}": n for n in range(3, WORDS)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(source / "tokenizer.json"))
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        named = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (source / "tokenizer_config.json").write_text(json.dumps(named))
        tower = tmp_path / "clip"
        tower.mkdir()
        (tower / "config.json").write_text(json.dumps(CLIP))
        config = {
            **LLAMA,
            "rope_scaling": None,
            "mm_vision_tower": str(tower),
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_hidden_size": 32,
            "mm_use_im_start_end": False,
            "image_aspect_ratio": "pad",
            **CONFIGS[layout],
            **changed,
        }
        (source / "config.json").write_text(json.dumps(config))
        tensors = authors_tensors(stock, layout) if tensors is None else tensors
        if not tower_inside:
            own = "model.vision_tower.vision_tower."
            save_file(
                {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
                | {"text_model.final_layer_norm.bias": torch.ones(2)},
                tower / "model.safetensors",
            )
            tensors = {n: t for n, t in tensors.items() if not n.startswith(own)}
        base, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
        save = torch.save if pickled else save_file
        if shards == 1:
            save(tensors, source / f"{base}.{suffix}")
            return source
        places = {name: f"{base}-{n % shards}.{suffix}" for n, name in enumerate(sorted(tensors))}
        for shard in set(places.values()):
            save({n: t for n, t in tensors.items() if places[n] == shard}, source / shard)
        index = {"weight_map": places}
        (source / f"{base}.{suffix}.index.json").write_text(json.dumps(index))
        return source

    return write


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        ("llava", {"shards": 3}),
        ("llava", {"pickled": True, "shards": 2}),
        ("llava", {"tower_inside": False}),
        ("adallava-l", {"pickled": True}),
        ("adallava-h", {}),
        ("dynamic-llava", {"shards": 2}),
    ],
    ids=["shards", "pickles", "tower-apart", "adallava-l", "adallava-h", "dynamic"],
)
def test_what_is_converted_computes_what_it_did(stock, write, cli_json, tmp_path, layout, stored):
    source = write(layout, **stored)
    options = ["--allow-pickle"] if stored.get("pickled") else []
    document = cli_json("convert", source, "-o", "out", *options)
    assert document["layout"] == layout
    assert document["selector"] == CONFIGS[layout].get("token_selecting", "")
    model = load_weights(tmp_path / "out")
    assert document["parameters"] == sum(p.numel() for p in model.parameters())
    # Round trip: every weight is back, bit for bit; embeddings have rows for two more words.
    ours = model.state_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(ours[name][: len(value)], value), name
    image = model.config.image_token_id
    assert image >= WORDS
    ids = torch.tensor([[1, 5, *[WORDS - 1] * 16, 9, 40]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = stock(input_ids=ids, pixel_values=pixels).logits
        ids = torch.where(ids == WORDS - 1, image, ids)
        logits = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits[..., :WORDS], expected, rtol=1e-5, atol=1e-5)
    assert logits[..., WORDS:].amax() < logits[..., :WORDS].amax(-1).amin()


@pytest.mark.parametrize("layout", ["adallava-l", "adallava-h"])
def test_the_scheduler_computes_what_the_authors_does_and_runs(stock, write, cli, tmp_path, layout):
    source = write(layout)
    assert cli("convert", source, "-o", "out")[0] == 0
    graph = lower_model(load_weights(tmp_path / "out"), "out")
    scheduler = load_scheduler(tmp_path / "out", graph)
    # The authors' modules, of their tensors.
    theirs = load_file(source / "model.safetensors")
    net = torch.nn.Sequential(
        torch.nn.LayerNorm(256), torch.nn.Linear(256, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)
    )
    prefix = "scheduler.scheduler_up_proj.net."
    net.load_state_dict({n.removeprefix(prefix): t for n, t in theirs.items() if prefix in n})
    head, bias = theirs["scheduler.mlp_head.weight"], theirs["scheduler.mlp_head.bias"]
    steps = scheduler.layout.steps
    limits = torch.arange(steps + 1)
    torch.testing.assert_close(scheduler.token(limits), net(sinusoid(limits, steps)))
    hidden = torch.randn(3, 64)
    torch.testing.assert_close(scheduler(hidden), hidden @ head.T + bias)
    noise_image().save(tmp_path / "noise.png")
    asked = ["--image", "noise.png", "--prompt", "w4 w7", "--new-tokens", "2"]
    code, out, err = cli(
        "run", "--model", "out", "--scheduler", "out", "--budget", "0.75", *asked, "--json"
    )
    assert code == 0, err
    assert json.loads(out)


def test_predictors_keep_their_names_and_values(write, cli_json, tmp_path):
    source = write("dynamic-llava")
    document = cli_json("convert", source, "-o", "out")
    theirs = load_file(source / "model.safetensors")
    ours = load_file(tmp_path / "out/predictors.safetensors")
    known = {"image": "model.image_score_predictor", "output": "model.output_text_score_predictor"}
    count = sum(any(n.startswith(prefix) for prefix in known.values()) for n in theirs)
    assert len(ours) == count
    for name, value in ours.items():
        which, _, rest = name.partition(".")
        assert torch.equal(value, theirs[f"{known[which]}.{rest}"])
    assert document["added"] == sum(value.numel() for value in ours.values())
    settings = json.loads((tmp_path / "out/predictors.json").read_text())
    assert settings == {"format": 1, **SPARSE}
    noise_image().save(tmp_path / "noise.png")
    chosen = "dynamic-llava:out"
    # Predictors of the published size cost more FLOPs than so small a model.
    ran = cli_json(
        "run", "--model", "out", "--dtype", "float32", "--tokens", chosen, "--kv", chosen,
        "--image", "noise.png", "--prompt", "w5 w6", "--switches", "tokens", "--new-tokens", "6",
        "--budget", "kv=1.0",
    )  # fmt: skip
    assert ran["image_tokens"] == [{"layer": 2, "of": 16, "kept": 3}]
    assert ran["kv_bytes"] == ran["cost_of_this_prompt"]["kv"]["plan"]


def test_the_processor_asks_as_the_authors_do(write, cli, tmp_path):
    assert cli("convert", write("llava"), "-o", "out")[0] == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert isinstance(processor.image_processor, LlavaImageProcessorPil)
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Why?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: <image>\n"
        "What? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
    )
    noise_image().crop((0, 0, 300, 100)).save(tmp_path / "wide.png")
    inputs = processor(
        text="<image>", images=load_image(tmp_path / "wide.png"), return_tensors="pt"
    )
    # Above and below the picture there is its mean colour, which is about 0 when normalised.
    assert inputs["pixel_values"][0, :, :8].abs().max() < 0.02
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_questions_have_the_authors_token_ids(tmp_path, scheme):
    """Theirs: texts before and behind a picture are tokenised apart, the picture's id between."""
    (tmp_path / "source").mkdir()
    letters = ["<unk>", "<s>", "</s>", "▁", "\n", *"ABCEINORSTUacdefghilmnoprstuvwyW?:.,'"]
    pieces = {letter: n for n, letter in enumerate(dict.fromkeys(letters))}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    tokenizer.save(str(tmp_path / "source/tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (tmp_path / "source/tokenizer_config.json").write_text(json.dumps(named))
    config = LlavaConfig(text_config={"model_type": "llama", **LLAMA}, vision_config=CLIP)
    processor = stock_processor(tmp_path / "source", config, "", pads=True)
    ours = processor.tokenizer
    start = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
    )
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    one, many = (
        "\nWhat is it? ASSISTANT:",
        "\nWhat is it? ASSISTANT: A cat.</s>USER: Where? ASSISTANT:",
    )
    for messages, behind in ((turns[:1], one), (turns, many)):
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        image = ours.convert_tokens_to_ids("<image>")
        before, after = (ours.encode(part, add_special_tokens=False) for part in (start, behind))
        assert ours.encode(text, add_special_tokens=False) == [*before, image, *after]


def without(name):
    return lambda tensors: tensors.pop(name)


def grown(name):
    return lambda tensors: tensors.update({name: torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (without("model.mm_projector.2.bias"), {}, "lack model.mm_projector.2.bias"),
        (grown("model.image_newline"), {}, "have no place for model.image_newline"),
        (grown("model.norm.weight"), {}, r"another shape for model.norm.weight: \[3, 3\]"),
        (grown("scheduler.mlp_head.weight"), {}, "no place for scheduler.mlp_head.weight"),
        (
            lambda tensors: tensors["lm_head.weight"].fill_(torch.nan),
            {},
            "not finite in lm_head.weight",
        ),
        (None, {"mm_projector_type": "linear"}, "mm_projector_type = linear"),
        (None, {"image_aspect_ratio": "anyres"}, "image_aspect_ratio = anyres"),
        (None, {"mm_vision_tower": "google/siglip"}, "give --vision-tower"),
        (None, {"mm_vision_tower": None}, "no mm_vision_tower"),
        (None, {"model_type": "llava_mistral"}, "is no LLaMA"),
        (None, {"mm_hidden_size": 48}, "mm_hidden_size = 48"),
        (None, {"num_prefix_layers": 4}, "cannot begin at layer 4"),
        (None, {"scheduler_type": "H", "scheduler_rank": 3}, "units of 3 heads"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(
    stock, write, cli, tmp_path, change, config, words
):
    tensors = authors_tensors(stock, "llava")
    if change is not None:
        change(tensors)
    code, _, err = cli("convert", write("llava", tensors, **config), "-o", "out")
    assert code == 2
    assert re.search(words, err), err
    assert not (tmp_path / "out").exists()


def test_pickles_are_read_only_where_they_are_allowed(write, cli, tmp_path):
    source = write("llava", pickled=True)
    code, _, err = cli("convert", source, "-o", "out")
    assert code == 2
    assert "--allow-pickle" in err

    class Program:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"lm_head.weight": Program()}, source / "pytorch_model.bin")
    code, _, err = cli("convert", source, "-o", "out", "--allow-pickle")
    assert code == 2
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
