"""The run-time type checker of the tests: an int passes where a float is asked for, as in Python's own rules."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
