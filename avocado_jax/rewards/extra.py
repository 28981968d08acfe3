"""User-defined reward terms: functions named on the command line or in `rewards.extra` of a config.

  jax:MODULE:FUNCTION=WEIGHT    one `Caption` and one `References` -> float32 scalar; vmapped and compiled
  host:MODULE:FUNCTION=WEIGHT   caption texts and record fields -> one number or None per caption

NaN or None means no verdict: the value is excluded, never counted as 0. The term is named after the function.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from avocado_jax.errors import InputError
from avocado_jax.fields import parse_term
from avocado_jax.typing import Array, Float

SUFFIXES = ("", "_std", "_flat", "_missing")  # suffixes of a term's metrics
RESERVED = ("std", "truncated")  # `reward_std` is a metric; `truncated` is a column beside the terms


class Term(NamedTuple):
    """A user-defined term."""

    kind: str  # of TERM_KINDS
    name: str
    function: Callable
    weight: float

    def value(self, caption: Any, reference: Any) -> Float[Array, ""]:
        """Compute a "jax" term for one caption.

        Raises:
            RuntimeError: the function raised an exception, or its result is not a scalar.
        """
        try:
            return jnp.asarray(self.function(caption, reference), jnp.float32).reshape(())
        except Exception as error:  # the exit status must not depend on the type of the user's exception
            raise self._failed(error) from error

    def values(self, captions: Sequence[str], references: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "N"]:
        """Compute a "host" term; NaN without a verdict.

        Raises:
            RuntimeError: the function raised an exception, or did not return N numbers or None values.
        """
        try:
            values = self.function(list(captions), list(references))
            found = np.array([math.nan if value is None else float(value) for value in values])
            if found.shape != (len(captions),) or np.isinf(found).any():
                raise ValueError(f"got {len(found)} values for {len(captions)} captions, or an infinite value")
            return found
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> RuntimeError:
        return RuntimeError(f"the term {self.kind}:{self.function.__module__}:{self.name} failed: {error}")


def load_terms(texts: Sequence[str], taken: Sequence[str]) -> list[Term]:
    """Import the functions of terms. The weight defaults to 1 without "=WEIGHT".

    Args:
        taken: names of other terms.

    Raises:
        InputError: a text has another form, its function does not exist, or the name of the term or of one of its
            metrics is taken.
    """
    terms = [_load(text) for text in texts]
    names = [*taken, *(term.name for term in terms)]
    columns = [*RESERVED, *(name + suffix for name in names for suffix in SUFFIXES)]
    for text, term in zip(texts, terms):
        if columns.count(term.name) > 1:
            raise InputError(f"{text}: the name {term.name} is taken: rename the function")
    return terms


def weight_of(text: str) -> tuple[str, float]:
    """Split a term into KIND:MODULE:FUNCTION and its weight.

    Raises:
        InputError: it is not a term, or the weight is not a finite number.
    """
    return text.partition("=")[0], parse_term(text).weight


def _load(text: str) -> Term:
    kind, module, name, weight = parse_term(text)
    try:
        return Term(kind, name, getattr(importlib.import_module(module), name), weight)
    except (ImportError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        raise InputError(f"{text}: {error}" + "; PYTHONPATH must name its folder" * absent) from error
