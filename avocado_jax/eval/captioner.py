"""A checkpoint folder to a captioner: its parameters, tokenizer, stop ids and way of sampling clips."""

import jax

from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.checkpoint.load import Checkpoint, load_params
from avocado_jax.data.media import load_reading
from avocado_jax.data.prompt import PROMPTS, load_habits
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import computed
from avocado_jax.parallel.backend import use_exact_fp32
from avocado_jax.parallel.programs import bound_compiled_programs
from avocado_jax.sampling.captioner import Captioner, captioner_of

QUESTION = "question.txt"  # in a checkpoint's folder: what a model knows to be asked that knows one question only


def load_captioner(checkpoint: Checkpoint, text: str | None, dtype: str) -> Captioner:
    """Load an opened checkpoint onto the default device, computing in `dtype`, with `text` as the question.

    Without a text it is the checkpoint's own (`question.txt` in its folder), else AVoCaDO's first.

    Raises:
        InputError: it has no tokenizer, no stop ids, or a tokenizer of another vocabulary.
    """
    bound_compiled_programs()
    folder = checkpoint.side_files
    tokenizer = load_words(folder)
    config = computed(checkpoint.config, dtype, scan=False)
    stops = stop_ids(folder, tokenizer, config.text.vocab)
    reading, habits = load_reading(folder), load_habits(folder)
    if text is None:
        own = folder / QUESTION
        text = habits.prompt or (own.read_text(encoding="utf-8").strip() if own.is_file() else PROMPTS[0])
    try:
        made = captioner_of(config, {}, tokenizer, stops, text, reading, habits)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return made._replace(params=load_params(checkpoint, dtype))


def computing_dtype(asked: str | None) -> str:
    """What is computed in: as asked, else bfloat16 on accelerators and float32 on a CPU; float32 is then exact."""
    dtype = asked or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    use_exact_fp32(dtype)
    return dtype
