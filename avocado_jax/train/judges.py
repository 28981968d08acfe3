"""Judges of keypoints and probes, bound to their models and tokenizers.

A judge is a function `judge(captions, keypoints)` of N captions and the keypoints of each. It starts the work and
returns a function that waits for the scores: fp32 [N, K] in [0, 1], NaN without a verdict and for padding.
`rewards.judge.RemoteJudge` is another judge. `LmJudge` and `RemoteJudge` also have `probes(captions, probes)` with the
same result. Judges with a local model run on a mesh of this process's devices, so each process may judge different
texts. Inputs and outputs are numpy arrays.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from avocado_jax.checkpoint.hf_encoder import read_encoder
from avocado_jax.checkpoint.load import load_sharded, open_language_model
from avocado_jax.checkpoint.references import fetched, located, run_path
from avocado_jax.data.prompt import chat_prompt
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig, computed
from avocado_jax.models.encoder import Encoder
from avocado_jax.models.thinker import Thinker, init
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.rules import shardings
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.embedding import embedding_scores
from avocado_jax.rewards.judge import RemoteJudge
from avocado_jax.rewards.lm import lm_choices, lm_scores
from avocado_jax.rewards.probes import CHOICE_LABELS, as_text
from avocado_jax.typing import Array, Float, Int, Probe

Judge = Callable[[Sequence[str], Sequence[Sequence[str]]], Callable[[], Float[np.ndarray, "N K"]]]

BATCH = 8  # captions per batch, rounded up to a multiple of the local devices
# Windows have about the length of a keypoint: a sentence states several, and its vector is their mean
# (rewards/README.md).
WINDOW, STRIDE = 16, 8  # tokens of a window, and between the starts of windows
LOW, HIGH = 0.45, 0.75  # cosines with score 0 and 1

SYSTEM = "You check statements against a description of a video. Go by the description alone."
OPENING = "The description:\n\n"
QUESTION = '\n\nThe statement: "{}"\n\nDoes the description state this, or plainly imply it? Answer yes or no.'
YES, NO = ("Yes", "yes"), ("No", "no")
PROBE_SYSTEM = "You answer multiple-choice questions about a video by a description of it. Go by the description alone."
PROBE_QUESTION = "\n\nThe question: {}\n\nAnswer with the letter of one choice, and nothing else."


@contextmanager
def open_judge(name: str, model: str, dtype: str, endpoint: Endpoint | None = None) -> Iterator[Judge]:
    """Open the judge "embedding", "lm" or "remote" for the duration of the block.

    Args:
        model: the folder of an embedding or language model, local or gs://.
        dtype: compute dtype of the language model.
        endpoint: endpoint of the remote judge.

    Raises:
        InputError: see `embedding_judge`, `LmJudge` and `RemoteJudge`.
    """
    if name == "remote":
        with RemoteJudge(endpoint) as judge:
            yield judge
    else:
        yield embedding_judge(fetched(run_path(located(model)))) if name == "embedding" else LmJudge(model, dtype)


def embedding_judge(folder: Path, low: float = LOW, high: float = HIGH) -> Judge:
    """Load a sentence encoder from a sentence-transformers folder. Cosines up to `low` score 0, from `high` 1.

    The encoder is replicated over the local devices; captions are sharded.

    Raises:
        InputError: the folder has no encoder (`read_encoder`), or its tokenizer has another vocabulary or does not
            enclose a text in two special tokens.
    """
    mesh = _local_mesh()
    with jax.set_mesh(mesh):
        config, params = read_encoder(folder)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    pieces = _word_pieces(folder, config.vocab)
    first, last = pieces("", True)

    def enclose(ids: list[int]) -> list[int]:
        return [first, *ids[: config.positions - 2], last] if ids else []

    def score(params: Any, windows: Array, window_lengths: Array, points: Array, point_lengths: Array) -> Array:
        def embed(tokens: Array, valid: Array) -> Array:
            return Encoder(config).apply({"params": params}, tokens, valid)

        valid = [
            jnp.arange(tokens.shape[2])[None, None] < lengths[..., None]
            for tokens, lengths in ((windows, window_lengths), (points, point_lengths))
        ]
        score_one = partial(embedding_scores, embed, low=low, high=high)
        return jax.vmap(score_one)(windows, valid[0], points, valid[1])

    def inputs(captions: Sequence[str], keypoints: Sequence[Sequence[str]]) -> tuple[np.ndarray, ...]:
        ids = [pieces(_replace_surrogates(caption)) for caption in captions]
        windows = [
            [enclose(tokens[start : start + WINDOW]) for start in range(0, max(1, len(tokens) - STRIDE), STRIDE)]
            for tokens in ids
        ]
        points = [[enclose(pieces(_replace_surrogates(text))) for text in texts] for texts in keypoints]
        rows = _batch_size(mesh)
        return *_padded(windows, rows), *_padded(points, rows)

    return partial(_judge, mesh, jax.jit(score), params, inputs)


class LmJudge:
    """A language model judge: a thinker or a text model from a folder, prompted in Qwen's chat format.

    Its parameters are sharded over the local devices.

    Raises:
        InputError: the folder has no language model, its tokenizer has another vocabulary, or two answers have the
            same first token.
    """

    def __init__(self, folder: str | Path, dtype: str):
        checkpoint = open_language_model(folder)
        self._tokenizer = load_words(checkpoint.config_folder)
        config = computed(checkpoint.config, dtype, scan=True)
        yes, no = ({self._tokenizer.encode(text)[0] for text in texts} for texts in (YES, NO))
        label_ids = [self._tokenizer.encode(letter)[0] for letter in CHOICE_LABELS]
        if (largest := max(self._tokenizer.known_ids())) >= config.text.vocab:
            raise InputError(f"{folder}: the tokenizer makes id {largest}, the vocabulary ends at {config.text.vocab}")
        if yes & no or len(set(label_ids)) < len(label_ids):
            raise InputError(f"{folder}: two of yes, no and the letters of choices begin with the same token")
        self._mesh = _local_mesh()
        with jax.set_mesh(self._mesh):
            self._params = load_sharded(checkpoint, _language_model(config, self._mesh))
        apply = Thinker(config).apply
        answers = [np.array(sorted(ids)) for ids in (yes, no)]
        self._yes_no = jax.jit(lambda params, *inputs: lm_scores(apply, params, *inputs, *answers))
        self._choices = jax.jit(lambda params, *inputs: lm_choices(apply, params, *inputs, np.array(label_ids)))

    def __call__(
        self, captions: Sequence[str], keypoints: Sequence[Sequence[str]]
    ) -> Callable[[], Float[np.ndarray, "N K"]]:
        """Score each keypoint by P(yes) / (P(yes) + P(no))."""

        def inputs(captions: Sequence[str], keypoints: Sequence[Sequence[str]]) -> tuple[np.ndarray, ...]:
            questions = [[QUESTION.format(text) for text in texts] for texts in keypoints]
            return self._inputs(captions, questions, SYSTEM)

        return _judge(self._mesh, self._yes_no, self._params, inputs, captions, keypoints)

    def probes(
        self, captions: Sequence[str], probes: Sequence[Sequence[Probe]]
    ) -> Callable[[], Float[np.ndarray, "N K"]]:
        """Score 1 for each probe whose right letter is the most probable, else 0; 0 for empty captions."""

        def inputs(captions: Sequence[str], probes: Sequence[Sequence[Probe]]) -> tuple[np.ndarray, ...]:
            questions = [[PROBE_QUESTION.format(as_text(probe)) for probe in items] for items in probes]
            tokens = self._inputs(captions, questions, PROBE_SYSTEM)
            choices, right = (np.zeros(tokens[-1].shape, np.int32) for _ in range(2))
            for row, items in enumerate(probes):
                choices[row, : len(items)] = [len(probe.choices) for probe in items]
                right[row, : len(items)] = [probe.right for probe in items]
            return *tokens, choices, right

        wait = _judge(self._mesh, self._choices, self._params, inputs, captions, probes)
        empty = np.array([not caption.strip() for caption in captions], bool)

        def collect() -> Float[np.ndarray, "N K"]:
            scores = wait()
            return np.where(empty[:, None] & np.isfinite(scores), np.float32(0), scores)

        return collect

    def _inputs(
        self, captions: Sequence[str], questions: Sequence[Sequence[str]], system: str
    ) -> tuple[np.ndarray, ...]:
        """Ids and lengths of the prompts up to the captions, and of the questions after each caption."""
        before = [*chat_prompt(self._tokenizer, "", system).before, *self._tokenizer.encode(OPENING)]
        prefixes = [[[*before, *self._tokenizer.encode(_replace_surrogates(caption))]] for caption in captions]
        after = [
            [chat_prompt(self._tokenizer, _replace_surrogates(text), system).after for text in texts]
            for texts in questions
        ]
        rows = _batch_size(self._mesh)
        tokens, lengths = (part[:, 0] for part in _padded(prefixes, rows, slots=1, each=128))
        return tokens, np.maximum(1, lengths), *_padded(after, rows)


def _language_model(config: ThinkerConfig, mesh: Mesh) -> Any:
    """Shapes with shardings of a thinker's parameters without its encoders."""
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    shapes = {name: tree for name, tree in shapes.items() if name not in ("audio", "vision")}
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )


def _local_mesh() -> Mesh:
    """A mesh of this process's devices. Computations on it involve no other process."""
    return make_mesh(1, -1, 1, devices=jax.local_devices())


def _batch_size(mesh: Mesh) -> int:
    """`BATCH` rounded up to a multiple of the devices."""
    return -(-BATCH // mesh.size) * mesh.size


def _judge(
    mesh: Mesh,
    score: Callable[..., Array],
    params: Any,
    inputs: Callable[[Sequence[str], Sequence[Sequence[Any]]], tuple[np.ndarray, ...]],
    captions: Sequence[str],
    items: Sequence[Sequence[Any]],
) -> Callable[[], Float[np.ndarray, "N K"]]:
    """Dispatch all batches to the local devices. The returned function waits for the scores."""
    size, rows = _batch_size(mesh), rows_sharding(mesh)
    starts = range(0, len(captions), size)
    # The judge's mesh replaces the run's mesh, which spans all processes. Padding scores are NaN.
    with jax.set_mesh(mesh), jax.debug_nans(False):
        parts = [
            score(params, *jax.device_put(inputs(captions[start : start + size], items[start : start + size]), rows))
            for start in starts
        ]

    def collect() -> Float[np.ndarray, "N K"]:
        scores = np.full((len(captions), max(map(len, items), default=0)), np.nan, np.float32)
        for start, part in zip(starts, parts):
            block = scores[start : start + size]
            found = np.asarray(part)[: len(block), : block.shape[1]]
            block[:, : found.shape[1]] = found
        return scores

    return collect


def _replace_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which are valid in JSON but not in tokenizers."""
    return text.encode(errors="replace").decode()


def _padded(
    texts: Sequence[Sequence[Sequence[int]]], rows: int, slots: int = 8, each: int = 16
) -> tuple[Int[np.ndarray, "B N S"], Int[np.ndarray, "B N"]]:
    """Pad lists of ids to an array of `rows` rows, multiples of `slots` lists and `each` ids; also return lengths."""
    count = max(map(len, texts), default=0)
    size = max((len(ids) for row in texts for ids in row), default=0)
    tokens = np.zeros((rows, max(1, -(-count // slots)) * slots, max(1, -(-size // each)) * each), np.int32)
    lengths = np.zeros(tokens.shape[:2], np.int32)
    for i, row in enumerate(texts):
        for j, ids in enumerate(row):
            tokens[i, j, : len(ids)] = ids
            lengths[i, j] = len(ids)
    return tokens, lengths


def _word_pieces(folder: Path, vocab: int) -> Callable[..., list[int]]:
    """Return a function that tokenizes a text without truncation, with special tokens if `special`."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no narrower type
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # encode special tokens in a text as plain text

    def pieces(text: str, special: bool = False) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=special).ids

    if tokenizer.get_vocab_size() > vocab:
        raise InputError(f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the vocabulary {vocab}")
    if len(pieces("", True)) != 2:
        raise InputError(f"{folder}: the tokenizer does not enclose a text in two special tokens")
    return pieces
