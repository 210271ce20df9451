"""What the tests of serving ask a server of tiny-llava."""

import base64
import contextlib
import io
import socket
import threading

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
