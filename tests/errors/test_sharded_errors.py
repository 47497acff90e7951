import pytest
import sharded_errors


@pytest.mark.parametrize("name", sharded_errors.MISTAKES)
def test_wrong(name):
    call, message = sharded_errors.MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", sharded_errors.NOT_POSSIBLE)
def test_not_possible(name):
    call, message = sharded_errors.NOT_POSSIBLE[name]
    with pytest.raises(NotImplementedError, match=message):
        call()
