"""What the tests of serving ask a server of tiny-llava."""

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
from urllib.parse import urlsplit
from urllib.request import urlopen

import uvicorn
from PIL import Image

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
QUESTION = "how many red circles are there ?"


def data_url(colour, size=56):
    contents = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(contents, "PNG")
    return "data:image/png;base64," + base64.b64encode(contents.getvalue()).decode()


def messages(*colours, text=QUESTION):
    images = [{"type": "image_url", "image_url": {"url": data_url(c)}} for c in colours]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def ask(client, *colours, text=QUESTION, **own):
    headers = own.pop("headers", None)
    return client.chat.completions.create(
        model=own.pop("model", "tiny-llava"), messages=messages(*colours, text=text),
        max_tokens=own.pop("most", 8), extra_body=own, extra_headers=headers,
    )  # fmt: skip


@contextlib.contextmanager
def running(app):
    """The address of a server that runs an application."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def posted(address, body):
    """A connection on which a request was made."""
    parts = urlsplit(address)
    headers = {"Authorization": "Bearer first-key", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", body, headers)
        yield connection


def value_of(address, name, **labels):
    with urlopen(f"{address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    for line in lines:
        if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            return float(line.rpartition(" ")[2])
    return 0.0


def eventually(condition, seconds=12):
    for _ in range(50 * seconds):
        if condition():
            return True
        time.sleep(0.02)
    return False


def question(**own):
    """The body of a request."""
    return json.dumps({"model": "tiny-llava", "messages": messages(COLOURS[0]), **own})
