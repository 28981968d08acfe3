"""A stub server in a separate process, and parts of requests to it."""

import base64
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen

import openai
import stub_server

KEY = "a key"


class Running:
    """A server in a separate process."""

    def __init__(self, *options: object) -> None:
        command = [sys.executable, stub_server.__file__, *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        given = KEY if "--key" in options else "none"
        self.options = dict(base_url=f"{self.url}/v1", api_key=given, max_retries=0, timeout=30.0)
        self.client = openai.OpenAI(**self.options)

    def chat(self, *parts, **options):
        """The text of an answer."""
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model="stub", messages=messages, **options)

    def described(self, *parts, **options):
        """What the stub received."""
        return json.loads(self.chat(*parts, **options).choices[0].message.content)

    def metric(self, name: str) -> int:
        """The value of a metric, 0 if it is absent."""
        found = re.search(rf"^avocado_{re.escape(name)} (\d+)$", urlopen(f"{self.url}/metrics").read().decode(), re.M)
        return int(found[1]) if found else 0

    def wait_for(self, name: str, value: int) -> None:
        """Wait until a metric has a value."""
        deadline = time.monotonic() + 10
        while self.metric(name) != value:
            assert time.monotonic() < deadline, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.02)


@contextmanager
def running(*options: object):
    server = Running(*options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def clip_part(url):
    return {"type": "video_url", "video_url": {"url": url}}


def data_url(content: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
