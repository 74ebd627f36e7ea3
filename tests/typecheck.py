"""How annotations are checked while the tests run: shapes by jaxtyping, types by beartype (an int is a float)."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
