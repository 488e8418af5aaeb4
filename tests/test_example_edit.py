"""examples/edit.py."""
import edit
import numpy as np
import pytest
from common import close

import tinyddpm as td

EDITED = td.Diffusion(td.cosine_betas(100), "x0")


@pytest.mark.parametrize("strength, first", [(0.455, 46), (0.4, 40), (1.0, 100), (0.001, 1)])
def test_editing_starts_at_t_itself(strength, first):
    """At the noise that t means, then at the sampler's own steps below t, each once."""
    seen = []

    def model(x, t):
        seen.append((int(t[0]), x))
        return 0 * x
    picture = np.full((1, 60, 60, 1), 0.5)
    edit.sdedit(model, EDITED, picture, strength, 0, steps=20)
    t, (_, x) = [t for t, _ in seen], seen[0]
    assert t[0] == first and t[1:] == [i for i in range(95, 0, -5) if i < first]
    assert abs(x.mean() - 0.5 * EDITED.abar[first] ** 0.5) < 0.05
    assert abs(x.var() - 1 + EDITED.abar[first]) < 0.05


def test_editing_gaussian_pictures_gives_their_like():
    """Pixels of deviation .5 about 1: what comes of a picture of 0 is drawn to them, the more
    the stronger; at full strength it is one of them."""
    def expected(x, t):
        abar = EDITED.abar[t[0]]
        return 1 + 0.25 * abar ** 0.5 * (x - abar ** 0.5) / (0.25 * abar + 1 - abar)
    means, stds = np.array([
        (x.mean(), x.std()) for strength in (0.1, 0.4, 0.7, 1)
        for x in [edit.sdedit(expected, EDITED, np.zeros((1, 60, 60, 1)), strength, 0, 100,
                              clip=None)]]).T
    assert np.all(np.diff(means) > 0.1)
    close([means[-1], stds[-1]], [1, 0.5], 0.04)


def test_a_scribble_is_a_line_of_white_on_black():
    picture = edit.scribble([(5, 10), (20, 10)])
    assert picture.shape == (28, 28, 1) and set(picture.ravel()) == {-1.0, 1.0}
    assert np.all(picture[9:12, 6:20] == 1) and np.all(picture[13:] == -1)
