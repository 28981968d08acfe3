"""Serve captions over HTTP, in the protocol of OpenAI's chat completions.

  avocado serve                                            # the small captioner of AVWorld that comes with the package
  avocado serve --checkpoint AVoCaDO-Captioner/AVoCaDO --media-root /data/clips --port 8000

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
  clip = {"type": "video_url", "video_url": {"url": "file:///data/clips/a.mp4"}}
  chat = client.chat.completions.create(model=client.models.list().data[0].id,
                                        messages=[{"role": "user", "content": [clip]}])
  print(chat.choices[0].message.content)

A request has one clip, or none. It is one `video_url` part: a data URL (data:video/mp4;base64,...), a file:// URL of a
file below --media-root, or with --allow-remote an http(s) URL of a public address. Or it is given in parts:
`image_url` parts (JPEG or PNG), which are the frames of a clip at the frame rate of the checkpoint, and one
`input_audio` part, its sound. The question is the text of the message; without text, it is the checkpoint's own. A
system message replaces the checkpoint's, an empty one removes it.

max_tokens, temperature, top_p, top_k (an extra field), seed, stream and stream_options are supported. A field that
changes answers and is not supported (n, stop, tools, logprobs, response_format ...) is refused with status 400.
Other fields are ignored. "warnings" in an answer state what of a clip was not used.

  GET /v1/models    GET /health    GET /metrics (Prometheus)    POST /v1/chat/completions

Errors have OpenAI's form: 400 bad request or clip, 401 key, 403 URL that is not allowed, 404 model, 408 slow upload,
413 too large, 429 too many requests, 503 stopping, 504 no answer in time. The first requests of a clip size wait for
compilation.

On SIGTERM and Ctrl-C the server accepts no further requests, gives running ones --grace seconds, and exits with 0.
"""

import argparse
import asyncio
import ipaddress
import os
import resource
import sys
from pathlib import Path

from avocado_jax.checkpoint.load import named_checkpoint
from avocado_jax.data.reader import READERS, ClipReader
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import computing_dtype, load_captioner
from avocado_jax.parallel.backend import use_gpu_memory
from avocado_jax.parallel.mesh import parse_mesh
from avocado_jax.sampling.engine import free_cache_bytes
from avocado_jax.sampling.logits import Sampling
from avocado_jax.serving.app import Limits, Server
from avocado_jax.serving.engine import EngineBackend
from avocado_jax.serving.run import serve
from avocado_jax.serving.sources import Sources

CLOSING_SECONDS = 10.0  # time to wait for the engine's thread; a compilation cannot be interrupted
DOWNLOAD_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("--checkpoint", metavar="REF", help="as for `avocado caption` (default: the one that is shipped)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s: this machine only)")
    add("--port", type=int, default=8000, help="0: a free one (default: %(default)s)")
    add("--api-key-env", metavar="NAME", help="environment variable with the key that requests to /v1 must send")
    add("--media-root", type=Path, metavar="DIR", help="file:// URLs of files below DIR are read (default: none are)")
    add("--allow-remote", action="store_true", help="download http(s) URLs, from public addresses only")
    add(
        "--max-requests",
        type=int,
        default=64,
        metavar="N",
        help="concurrent requests; others get status 429 (default: %(default)s)",
    )
    add(
        "--max-megabytes",
        type=int,
        default=64,
        metavar="N",
        help="size of a request or download (default: %(default)s)",
    )
    add("--max-clip-seconds", type=float, default=600, metavar="S", help="length of a clip (default: %(default)g)")
    add(
        "--max-prompt-tokens",
        type=int,
        default=65536,
        metavar="N",
        help="tokens of a prompt with its media (default: %(default)s)",
    )
    add("--max-new-tokens", type=int, default=2048, metavar="N", help="tokens of an answer (default: %(default)s)")
    add("--timeout", type=float, default=600, metavar="S", help="time limit of a request (default: %(default)g)")
    add(
        "--clip-seconds",
        type=float,
        default=60,
        metavar="S",
        help="time limit for reading a clip (default: %(default)g)",
    )
    add(
        "--grace",
        type=float,
        default=30,
        metavar="S",
        help="time limit for finishing requests on SIGTERM (default: %(default)g)",
    )
    add("--prompt", metavar="TEXT", help="the question of requests without text (default: the checkpoint's own)")
    add("--temperature", type=float, default=0.0, metavar="T", help="default of requests (default: 0, greedy)")
    add("--top-p", type=float, default=1.0, metavar="P", help="default of requests (default: %(default)s, all)")
    add("--top-k", type=int, default=0, metavar="K", help="default of requests (default: %(default)s, all)")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on accelerators, float32 on a CPU")
    add("--batch", type=int, metavar="N", help="answers decoded together (default: as many as fit in memory)")
    add("--mesh", metavar="DATA,TENSOR", help="as for `avocado caption`")


def run(args: argparse.Namespace) -> int:
    """Load the model and serve it. Returns the exit status."""
    sampling, key = _check(args), _key(args.api_key_env)
    hosts = frozenset(("localhost", "127.0.0.1", "::1", args.host)) if not key and _is_loopback(args.host) else None
    if not key and not _is_loopback(args.host):
        print(f"avocado serve: warning: --host {args.host} without --api-key-env: no key is needed", file=sys.stderr)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each frame of a clip in parts is an open file
    use_gpu_memory()
    checkpoint, dtype = named_checkpoint(args.checkpoint), computing_dtype(args.dtype)
    sources = Sources(args.media_root, args.allow_remote, args.max_megabytes * 2**20, DOWNLOAD_SECONDS)
    captioner = load_captioner(checkpoint, args.prompt, dtype, parse_mesh(args.mesh))
    memory = free_cache_bytes(captioner.params)
    backend = EngineBackend(
        captioner, args.max_new_tokens, args.max_prompt_tokens, sampling, slots=args.batch, cache_bytes=memory
    )
    limits = Limits(args.max_requests, args.max_megabytes * 2**20, args.timeout, args.max_clip_seconds)
    habits = captioner.habits._replace(prompt=captioner.question)
    name = _name(args.checkpoint)
    with ClipReader(READERS, args.clip_seconds) as reader:
        server = Server(backend, name, reader, captioner.reading, habits, sources, limits, key, hosts)

        def listening(port: int) -> None:
            host = f"[{args.host}]" if ":" in args.host else args.host
            print(f"avocado serve: {name} at http://{host}:{port}/v1", file=sys.stderr, flush=True)

        async def serve_backend() -> None:
            backend.start()
            await serve(server, args.host, args.port, args.grace, listening)

        asyncio.run(serve_backend())
    ended = backend.close(CLOSING_SECONDS)
    if backend.error is not None:
        raise backend.error
    if not ended:  # the interpreter cannot shut down during a compilation
        os._exit(0)
    return 0


def _check(args: argparse.Namespace) -> Sampling:
    """Validate the options and return the default sampling settings. Raises InputError."""
    for name in ("max_requests", "max_megabytes", "max_clip_seconds", "max_new_tokens", "max_prompt_tokens", "timeout"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive")
    if not (0 < args.clip_seconds < float("inf") and args.grace >= 0 and (args.batch is None or args.batch > 0)):
        raise InputError("--clip-seconds and --batch must be positive, --grace at least 0")
    if args.media_root and not args.media_root.is_dir():
        raise InputError(f"--media-root {args.media_root} is not a folder")
    try:
        return Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise InputError(str(error)) from error


def _key(variable: str | None) -> str | None:
    """Read the API key from an environment variable."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"--api-key-env {variable}: the variable is not set, or empty")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(reference: str | None) -> str:
    """The name of the model: the last component of a folder, or a hub name unchanged."""
    if reference is None:
        return "avocado"
    is_folder = reference.startswith("gs://") or os.path.isdir(reference)
    return os.path.basename(reference.rstrip("/")) or "avocado" if is_folder else reference
