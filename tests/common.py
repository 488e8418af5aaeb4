"""What several test files need."""
import numpy as np
import pytest

import tinyddpm as td

PREDICTS = tuple(td.PREDICTS)
SPACINGS = ("trailing", "leading", "linspace")


def abar_of(betas):
    """abar_0..abar_T by a plain loop: abar_0 = 1, then one factor 1 - beta for each step."""
    abar = [1.0]
    for beta in betas:
        abar.append(abar[-1] * (1 - beta))
    return np.array(abar)


def close(a, b, tolerance=1e-11):
    """Equal to the tolerance, relative or absolute."""
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def refused(given, function, *args, **kwargs):
    """The call is a ValueError, and its message repeats what was given."""
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    assert str(given) in str(caught.value)
