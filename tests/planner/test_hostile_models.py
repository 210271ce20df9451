"""Models from anywhere: weights of another model, templates without an end, pictures too large."""

import copy
import io
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from planner.contained import Container, contained
from planner.ir.errors import InputError, PlannerError
from planner.loading import load_image, load_model, prompt_inputs, refuse_nan
from planner.planning.catalog import tiny_llava_folder

# -- weights --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of tiny-llava, with weights to be spoiled."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_llava_folder(), copy, ignore=shutil.ignore_patterns("adallava*"))
    return copy


def _spoil(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _first(weights, part):
    return next(name for name in sorted(weights) if part in name)


def _without(part):
    return lambda weights: weights.pop(_first(weights, part))


def _filled(part, value):
    def change(weights):
        weights[_first(weights, part)].view(-1)[0] = value

    return change


def _wider(part):
    def change(weights):
        name = _first(weights, part)
        weights[name] = torch.cat([weights[name], weights[name]])

    return change


SPOILED = {
    "a tensor is missing": (_without("up_proj"), "lack .*up_proj"),
    "all of a layer is missing": (
        lambda w: [w.pop(n) for n in list(w) if ".layers.3." in n], r"lack .*layers\.3\..* more"),
    "the projector is missing": (_without("projector"), "lack .*projector"),
    "a tensor more": (lambda w: w.update(extra=torch.zeros(3)), "no place for extra"),
    "another shape": (_wider("down_proj"), "another shape for .*down_proj"),
    "NaN": (_filled("q_proj", float("nan")), "not finite in .*q_proj"),
    "infinity": (_filled("embed_tokens", float("inf")), "not finite in .*embed_tokens"),
    "minus infinity": (_filled("norm", -float("inf")), "not finite in .*norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_weights_that_are_not_the_models_are_named(folder, name):
    change, message = SPOILED[name]
    _spoil(folder, change)
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "contents", [b"", b"x" * 100, b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{}"]
)
def test_a_broken_file_of_weights_is_one_sentence(folder, contents):
    (folder / "model.safetensors").write_bytes(contents)
    with pytest.raises(InputError, match="the weights of"):
        load_model(str(folder))


def test_whole_weights_are_loaded(folder):
    model, _, _ = load_model(str(folder))
    assert not model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_are_an_error(value):
    scores = torch.zeros(2, 5)
    assert refuse_nan(None, scores) is scores
    scores[1] = value
    with pytest.raises(PlannerError, match="NaN or infinity"):
        refuse_nan(None, scores)


def test_a_forbidden_token_is_none():
    scores = torch.zeros(1, 5)
    scores[0, 2] = -float("inf")
    assert refuse_nan(None, scores) is scores


def test_a_model_that_overflows_gives_no_empty_answer(cli, folder):
    """Finite weights whose products are not."""

    def change(weights):
        name = _first(weights, "down_proj")
        weights[name] = torch.full_like(weights[name], 3e38, dtype=torch.float32)

    _spoil(folder, change)
    code, out, err = cli("run", "-m", folder, "-p", "what is this?", "-b", "1")
    assert (code, out) == (1, "")
    assert "NaN or infinity" in err


# -- chat templates -------------------------------------------------------------------------------

TEMPLATES = {
    "a loop that does not end in time": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "does not end"),
    "a power": ("{{ 9 ** (9 ** 9) }}", "does not end|fails"),
    "a long text": ("{{ 'a' * 10 ** 12 }}", "fails"),
    "text that doubles": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}{{ ns.x }}", "fails|letters"),
    "two million letters": ("{{ 'a' * 2000000 }}", "letters of the prompt"),
    "a wide field": ("{{ 'a'.center(10 ** 11) }}", "fails|does not end"),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails"),
    "an undefined call": ("{{ nothing() }}", "fails"),
    "its own complaint": ("{{ raise_exception('no system prompt') }}", "no system prompt"),
    "broken": ("{% for %}", "fails"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails"),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-llava")[:2]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_ends_in_seconds(loaded, monkeypatch, name):
    model, processor = loaded
    template, message = TEMPLATES[name]
    monkeypatch.setattr(processor, "chat_template", template)
    started = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        prompt_inputs(model, processor, "what is this?", None)
    assert time.perf_counter() - started < 10
    assert "\n" not in str(caught.value)


def test_a_template_is_rendered_as_transformers_does(loaded):
    model, processor = loaded
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = prompt_inputs(model, processor, "what is this?", None)["input_ids"]
    assert ids.tolist() == processor(text=text, return_tensors="pt")["input_ids"].tolist()


def test_templates_of_text_models_take_plain_strings(loaded):
    """As SmolLM2-Instruct's, which adds the content to a string."""
    model, processor = loaded
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' assistant' }}{% endif %}"
    )
    ids = prompt_inputs(model, tokenizer, "what is this ?")["input_ids"]
    assert ids.tolist() == [tokenizer("user : what is this ? assistant")["input_ids"]]


def test_a_question_that_is_asked_again_starts_no_process(loaded, monkeypatch):
    model, processor = loaded
    started = []

    def counting(make, what):
        started.append(what)
        return contained(make, what)

    monkeypatch.setattr("planner.loading.contained", counting)
    first, again, other = (
        prompt_inputs(model, processor, question)["input_ids"].tolist()
        for question in ("how many ?", "how many ?", "how large ?")
    )
    assert first == again != other
    assert len(started) == 2
    monkeypatch.setattr(processor, "chat_template", "no {{ messages[0]['role'] }}")
    assert prompt_inputs(model, processor, "how many ?")["input_ids"].tolist() != first
    assert len(started) == 3


def children():
    """Processes that this one has started, ended or not."""
    lists = Path("/proc/self/task").glob("*/children")
    return sorted(child for each in lists for child in each.read_text().split())


def test_a_process_with_many_files_open_contains_too():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1200 if hard == resource.RLIM_INFINITY else min(hard, 1200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    files = []
    try:
        # The system call select knows the first 1024 alone.
        while not files or files[-1] < min(1030, most - 10):
            files.append(os.open(os.devnull, os.O_RDONLY))
        assert contained(lambda: "text", "it") == "text"
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_is_contained_leaves_nothing_behind():
    before = children()
    open_files = len(os.listdir("/proc/self/fd"))
    assert contained(lambda: "text", "it") == "text"
    for function in (lambda: 1 / 0, lambda: os._exit(3), lambda: time.sleep(60)):
        with pytest.raises(InputError, match=r"^it "):
            contained(function, "it", 0.2)
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert children() == before


def test_threads_contain_at_once():
    answers = {}

    def ask(number):
        answers[number] = contained(lambda: str(number) * 1000, "it", 30)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) * 1000 for number in range(8)}


def _hostile(text):
    """Echoes a text, but for some."""
    if text == "loops":
        while True:
            pass
    if text == "sleeps":
        time.sleep(60)
    if text == "exits":
        os._exit(3)
    if text == "hoards":
        return "x" * (3 << 30)
    if text == "says too much":
        return "x" * 2000
    return str(os.getpid()) if text == "who" else text + str(1 / (text != "fails"))


@pytest.fixture
def container():
    made = Container(_hostile, "it", 0.5, 1000)
    yield made
    made.stop()


def test_a_container_answers_many_calls_from_one_process(container):
    assert container("who") == container("who") != str(os.getpid())
    for text in ("", "ü", "x" * 900):
        assert container(text) == text + "1.0"
    begun = time.perf_counter()
    for _ in range(100):
        container("again")
    assert time.perf_counter() - begun < 0.5


@pytest.mark.parametrize(
    ("text", "said", "goes_on"),
    [("loops", "end within 0.5", False), ("sleeps", "end within 0.5", False),
     ("exits", "ended its process", False), ("hoards", "too much memory", True),
     ("says too much", "more than 1000 letters", True), ("fails", "division by zero", True)],
)  # fmt: skip
def test_a_container_survives_what_it_holds(container, text, said, goes_on):
    before = container("who")
    with pytest.raises(InputError, match=f"^it .*{said}"):
        container(text)
    assert (container("who") == before) == goes_on


def test_a_container_s_process_is_replaced_and_leaves_nothing_behind():
    before, open_files = children(), len(os.listdir("/proc/self/fd"))
    container = Container(_hostile, "it")
    os.kill(int(container("who")), signal.SIGKILL)
    time.sleep(0.1)
    assert container("x") == "x1.0"
    container.stop()
    assert container("y") == "y1.0"
    del container
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_container_holds_no_connection_of_its_parent(container):
    ours, theirs = socket.socketpair()
    with ours:
        container("x")
        theirs.close()
        ours.settimeout(5)
        assert ours.recv(1) == b""


def test_threads_share_a_container(container):
    with ThreadPoolExecutor(8) as pool:
        texts = [str(number) * 100 for number in range(64)]
        assert list(pool.map(container, texts)) == [text + "1.0" for text in texts]


# -- pictures -------------------------------------------------------------------------------------


def _png(width, height, rows=b""):
    """A PNG that states a size, whatever its contents."""

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def _saved(image, form):
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


PICTURES = {
    "nothing behind the header": (_png(100, 100), "broken"),
    "a billion pixels": (_png(40_000, 30_000), "pixels"),
    "a size of nothing": (_png(0, 0), "broken"),
    "a line": (_saved(Image.new("L", (30_000, 1)), "PNG"), "200 times the other"),
    "text": (b"not a picture", "broken"),
    "nothing": (b"", "broken"),
    "PostScript, which would run a program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unknown format"),
    "NaN": (_saved(Image.new("F", (4, 4), float("nan")), "TIFF"), "no finite numbers"),
    "infinity": (_saved(Image.new("F", (4, 4), float("inf")), "TIFF"), "no finite numbers"),
    "floats of no scale": (_saved(Image.new("F", (4, 4), 3000.0), "TIFF"), "no levels"),
    "negative floats": (_saved(Image.new("F", (4, 4), -0.5), "TIFF"), "no levels"),
    "integers of no scale": (_saved(Image.new("I", (4, 4), 10**6), "TIFF"), "no levels"),
    "negative integers": (_saved(Image.new("I", (4, 4), -5), "TIFF"), "no levels"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_hostile_picture_is_one_sentence_soon(tmp_path, name):
    contents, message = PICTURES[name]
    (tmp_path / "picture").write_bytes(contents)
    started = time.perf_counter()
    with pytest.raises(InputError, match=message):
        load_image(tmp_path / "picture")
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", ".", "a\0b", "pipe"])
def test_a_path_that_leads_to_no_picture(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="image"):
        load_image(Path(path))


@pytest.mark.parametrize(
    ("mode", "value", "level"),
    [("I", 200, 200), ("I", 51_400, 200), ("F", 200.0, 200), ("F", 0.5, 127), ("F", 1.0, 255),
     ("I;16", 51_400, 200), ("L", 200, 200), ("1", 1, 255)],
)  # fmt: skip
@pytest.mark.parametrize("side", [4, 4100])
def test_levels_are_read_as_they_are_meant(tmp_path, mode, value, level, side):
    path = tmp_path / "picture.tiff"
    Image.new(mode, (side, side), value).save(path)
    found = np.asarray(load_image(path))
    assert found.shape[0] == min(side, 4000)
    assert (found == level).all()


@pytest.mark.parametrize(
    ("mode", "color"), [("RGBA", (200, 100, 50, 0)), ("LA", (200, 0)), ("P", 1)]
)
def test_what_is_see_through_counts_alike_in_pictures_of_all_sizes(tmp_path, mode, color):
    path, found = tmp_path / "picture.png", []
    for side in (4, 4100):
        picture = Image.new(mode, (side, side), color)
        if mode == "P":
            picture.putpalette([0, 0, 0, 200, 100, 50])
            picture.save(path, transparency=1)
        else:
            picture.save(path)
        found.append(np.asarray(load_image(path)))
    assert (found[0] == found[0][0, 0]).all()
    assert (found[1] == found[0][0, 0]).all()


def test_a_prompt_of_more_tokens_than_the_model_has_places_is_refused(cli):
    code, out, err = cli("run", "-m", "tiny-llava", "--prompt", "red " * 900)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "knows 512 places" in err


def test_nothing_runs_on_meta(cli):
    code, _, err = cli("run", "-m", "tiny-llava", "--prompt", "how", "--on", "meta")
    assert (code, err.count("\n")) == (2, 1)
    assert "choose cpu or cuda" in err


def test_a_picture_of_99_megapixels_takes_less_than_a_gigabyte(tmp_path):
    """In a process of its own: memory is counted from its start."""
    for name, mode in (("large.png", "RGB"), ("large.jpg", "RGB"), ("large.tiff", "F")):
        packed = {"compression": "tiff_deflate"} if mode == "F" else {"compress_level": 1}
        Image.new(mode, (11_000, 9_000)).save(tmp_path / name, **packed)
        # What `getrusage` says includes the process that started this one.
        program = (
            "from planner.loading import load_image\n"
            f"print(*load_image({str(tmp_path / name)!r}).size)\n"
            "lines = open('/proc/self/status').read().splitlines()\n"
            "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
        )
        size, kilobytes = done.stdout.splitlines()
        assert math.prod(map(int, size.split())) <= 16_000_000
        assert int(kilobytes) < 1_000_000, name


def test_the_command_line_says_so(cli, tmp_path):
    (tmp_path / "picture.png").write_bytes(_png(40_000, 30_000))
    code, out, err = cli("run", "-m", "tiny-llava", "-p", "x", "-i", "picture.png")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


# -- configs --------------------------------------------------------------------------------------


def _with(part, **values):
    def change(config):
        config[part].update(values)

    return change


CONFIGS = {
    "5,000 layers": (_with("text_config", num_hidden_layers=5000), "1000 layers"),
    "a billion layers": (_with("text_config", num_hidden_layers=10**9), "1000 layers"),
    "a billion layers of the vision tower": (
        _with("vision_config", num_hidden_layers=10**9), "1000 layers"),
    "no layers": (_with("text_config", num_hidden_layers=0), "more than 0"),
    "fewer than no layers": (_with("text_config", num_hidden_layers=-8), "more than 0"),
    "no width": (_with("text_config", hidden_size=0), "more than 0"),
    "a negative width": (_with("text_config", hidden_size=-128), "more than 0"),
    "a huge width": (_with("text_config", hidden_size=10**12), "at most"),
    "a huge vocabulary": (_with("text_config", vocab_size=10**12), "at most"),
    "no heads": (_with("text_config", num_attention_heads=0), "more than 0"),
    "patches of no size": (_with("vision_config", patch_size=0), "more than 0"),
    "a picture of a billion pixels a side": (_with("vision_config", image_size=10**9), "at most"),
    "NaN": (_with("text_config", rms_norm_eps=float("nan")), "NaN"),
    "infinity": (_with("text_config", rms_norm_eps=float("inf")), "less than 1"),
    "a negative epsilon": (_with("vision_config", layer_norm_eps=-1.0), "at least 0"),
    "heads that do not divide the width": (
        _with("text_config", num_attention_heads=7, num_key_value_heads=7, head_dim=None), ""),
    "a width in words": (_with("text_config", hidden_size="wide"), ""),
    "an activation that does not exist": (_with("text_config", hidden_act="magic"), ""),
    "a text model that does not exist": (_with("text_config", model_type="magic"), ""),
    "text_config in words": (lambda config: config.update(text_config="x"), ""),
    "no model type": (lambda config: config.pop("model_type"), "model_type"),
    "a model type that is a list": (lambda config: config.update(model_type=[]), "model_type"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_no_model_has_is_one_sentence(cli, folder, name):
    change, message = CONFIGS[name]
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    started = time.process_time()
    code, out, err = cli("compile", "-m", folder, "-o", "out")
    assert (code, out) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    if message:
        assert time.process_time() - started < 2
    assert not list(Path("out").glob("*"))
