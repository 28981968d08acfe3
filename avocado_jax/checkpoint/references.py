"""Model references: a local folder, `gs://BUCKET/PATH`, or `ORG/NAME[@REVISION]` on the Hugging Face hub.

Hub files are downloaded to the cache of `huggingface_hub`, so HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE apply,
and other programs can use them. Only needed files are downloaded.

Shards are downloaded by `_download` instead of `snapshot_download`, which deletes unfinished files: a shard of 5 GB
resumes after the process was killed, and its SHA-256 checksum is verified. Processes that share a cache, such as the
hosts of a pod, download each shard once, protected by the library's lock.
"""

import atexit
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PurePath

from etils import epath

from avocado_jax.data import storage
from avocado_jax.data.hub import Busy, hub_errors, silence_client
from avocado_jax.data.ordered import map_ordered
from avocado_jax.data.timeouts import retried
from avocado_jax.errors import InputError

HUB = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@]+))?")
INDEX = "model.safetensors.index.json"
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "reading.json"]
PACKAGE = Path(__file__).parents[1]
# Side files of a checkpoint, without Python modules and pickles.
MODEL = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "question.txt"]
COPIES = ["spk_dict.pt", "LICENSE*", "NOTICE*"]  # side files that conversion and training only copy
POOLING = "1_Pooling/config.json"  # config of a sentence encoder, the only side file in a subfolder
DOWNLOADS = 4  # concurrent downloads of shards


def is_hub(reference: str | os.PathLike) -> bool:
    """Whether a reference has the form `ORG/NAME[@REVISION]` and is not an existing local path."""
    text = str(reference)
    return HUB.fullmatch(text) is not None and not os.path.exists(text)


def located(reference: str | os.PathLike, needed: str = "model") -> str:
    """The folder of a model's files, local or gs://. Hub files are downloaded if they are not cached.

    A process resolves a reference once, so that it never mixes two commits of a branch.

    Args:
        needed: files of a hub model: "tokenizer", "model", or "copies" (including `COPIES`).

    Raises:
        InputError: the model or revision does not exist on the hub, access is denied, or offline mode is set and the
            model is not cached.
        StorageError: the hub cannot be reached or is busy.
    """
    text = str(reference)
    if text.startswith(f"{PACKAGE.name}/assets/") and not os.path.exists(text):
        return str(PACKAGE.parent / text)  # the shipped captioner, from any working directory
    return _snapshot(text, needed) if is_hub(text) else text


def pinned(reference: str, run: str) -> str:
    """Pin a hub reference to the commit stored in the folder `run`.

    The branch may have moved since the first start, and the reference model of GRPO is loaded at every start.
    """
    source = storage.join(run, "source.json")
    if not is_hub(reference) or not storage.exists(source):
        return reference
    begun = json.loads(storage.read(source)).get("hub", "")
    return begun if begun.partition("@")[0] == reference.partition("@")[0] else reference


def run_path(folder: str | os.PathLike) -> epath.Path:
    """Convert a folder to a path, absolute if local. Supports `STORAGE_EMULATOR_HOST` for buckets."""
    path = epath.Path(folder)
    if not is_remote(path):
        return path.absolute()
    # gcsfs would wait minutes for a probe; tensorstore uses another variable for the emulator.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", host)
    return path


def is_run(folder: str | os.PathLike) -> bool:
    """Whether `folder` looks like a run folder."""
    steps = run_path(folder) / "checkpoints"
    return bool(storage.folders(str(steps))) if is_remote(steps) else steps.is_dir()


def is_remote(path: PurePath) -> bool:
    """Whether `path` is in a bucket."""
    return storage.is_remote(str(path))


def fetched(folder: PurePath, weights: bool = True, copies: bool = False) -> Path:
    """A local folder with the files of `folder`: itself, or a copy that is deleted at exit.

    Args:
        weights: include tensor files.
        copies: include `COPIES`.

    Raises:
        InputError: the folder is missing or empty, or access is denied.
        StorageError: storage failed.
    """
    if not is_remote(folder):
        return Path(folder)
    if not (names := storage.names(str(folder))):
        raise InputError(f"{folder}: no such folder, or no files in it")
    local = Path(tempfile.mkdtemp(prefix="avocado-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    skipped = ([] if weights else ["*.safetensors"]) + ([] if copies else COPIES)
    names = [name for name in names if not any(fnmatch(name, pattern) for pattern in skipped)]
    for _ in map_ordered(lambda name: storage.download(storage.join(str(folder), name), local / name), names):
        pass
    return local


def tokenizer_folder(reference: str | os.PathLike) -> Path:
    """A local folder with the tokenizer and `reading.json` of a model reference, without weights.

    Raises:
        InputError, StorageError: see `load.open_checkpoint`.
    """
    folder = run_path(located(reference, "tokenizer"))
    return fetched(folder / "hf" if is_run(folder) else folder, weights=False)


def commit_of(folder: str | os.PathLike) -> str:
    """`ORG/NAME@COMMIT` of a folder in the hub's cache; empty for other folders."""
    parts = Path(folder).parts[-3:]
    if len(parts) < 3 or parts[1] != "snapshots" or not parts[0].startswith("models--"):
        return ""
    return f"{'/'.join(parts[0].split('--', 2)[1:])}@{parts[2]}"


@lru_cache
def _snapshot(reference: str, needed: str) -> str:
    """The cached snapshot of `ORG/NAME[@REVISION]`, with the needed files."""
    import huggingface_hub  # slow to import

    silence_client()
    found = HUB.fullmatch(reference)
    assert found is not None
    name = found["name"]

    def download(patterns: list[str], revision: str | None, ignore: str = "*/*") -> Path:
        def attempt() -> str:
            with hub_errors(reference):
                return huggingface_hub.snapshot_download(
                    name, revision=revision, allow_patterns=patterns, ignore_patterns=ignore
                )

        return Path(retried(attempt, reference, (Busy,), storage.PATIENCE))

    if needed == "copies":
        return str(download(COPIES, Path(_snapshot(reference, "model")).name))
    folder = download(TOKENIZER if needed == "tokenizer" else MODEL, _commits.get(reference, found["revision"]))
    _commits[reference] = folder.name
    if needed == "tokenizer":
        return str(folder)
    if (folder / "modules.json").is_file():
        download([POOLING], folder.name, "")
    shards = _indexed(folder / INDEX) if (folder / INDEX).is_file() else ["*.safetensors"]
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        _download_all(reference, name, folder, shards)
    return str(download(shards, folder.name))


_commits: dict[str, str] = {}  # resolved references of this process


def _indexed(index: Path) -> list[str]:
    """The shards in an index, which `hf.read_tensors` validates later."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: no 'weight_map' from tensors to files") from None


def _download_all(reference: str, name: str, folder: Path, shards: list[str]) -> None:
    """Download the shards of a snapshot that are not cached."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = {file.path: file.size for file in get_cached_repo_tree(name, revision=folder.name)}
    except CachedRepoTreeNotFoundError:  # the hub is not reachable: use the shards cached by an earlier program
        return
    if shards == ["*.safetensors"]:
        shards = sorted(path for path in tree if path.endswith(".safetensors") and "/" not in path)
    for shard in shards:
        if shard not in tree:
            raise InputError(f"{reference}: has no '{shard}', which {INDEX} names")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        size = sum(tree[shard] for shard in missing) / 1e9
        print(f"{name}@{folder.name}: downloading {len(missing)} shards, {size:.2f} GB", file=sys.stderr, flush=True)

    def download(shard: str) -> None:
        def attempt() -> None:
            with hub_errors(reference):
                _download(name, folder, shard)

        retried(attempt, f"{reference}: {shard}", (Busy,), storage.PATIENCE)

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        list(pool.map(download, missing))


def _download(name: str, folder: Path, shard: str) -> None:
    """Download a file of the snapshot `folder` to the cache's blobs, resuming an earlier attempt.

    `snapshot_download` links the blob afterwards.
    """
    import httpx2
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url = hf_hub_url(name, shard, revision=folder.name)
    about = get_hf_file_metadata(url)
    cache = folder.parents[1]
    blob = cache / "blobs" / str(about.etag)
    part = blob.with_name(f"{blob.name}.part")
    lock = cache.parent / ".locks" / cache.name / f"{about.etag}.lock"  # the library's lock file
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    # URLs of the content delivery network are signed. Send the token only to the hub.
    same = httpx2.URL(about.location).netloc == httpx2.URL(url).netloc
    headers = build_hf_headers() if same else build_hf_headers(token=False)
    with WeakFileLock(lock):
        if blob.is_file():
            return
        while True:
            with part.open("ab") as file:
                before = file.tell()
                try:
                    http_get(about.location, file, resume_size=before, headers=headers, expected_size=about.size)
                    break
                except httpx2.TransportError:
                    if file.tell() == before:  # nothing arrived
                        raise
        if re.fullmatch("[0-9a-f]{64}", blob.name):
            with part.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != blob.name:
                part.unlink()
                raise storage.StorageError(f"{name}: {shard} arrived damaged (SHA-256 {digest})")
        os.replace(part, blob)
