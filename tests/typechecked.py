"""The run-time type checker of the tests. An int is accepted for a float, as in Python's typing rules."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
