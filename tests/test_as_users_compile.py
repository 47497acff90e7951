"""The suite compiles without XLA's optimisations (`conftest`). These rows of the tables run with them, too."""

import own_process
import pytest
from ways import WAYS

ROWS = 1  # of a table, with the most options, beside the one with none


def judge(name: str) -> None:
    way = WAYS[name]
    rows = sorted(way.table, key=lambda row: sum(choice != way.table[0][option] for option, choice in row.items()))
    for row in [way.table[0], *rows[-ROWS:]]:
        way.judge(way.results(row), way.expected(row))


@pytest.mark.parametrize("name", ["xla", "xla, few queries"])
def test_rows_with_many_options(name):
    own_process.run(f"import test_as_users_compile; test_as_users_compile.judge({name!r})")
