"""examples/invert.py."""
import invert
import numpy as np
from common import close

import tinyddpm as td

FLOW = td.Diffusion(td.cosine_betas(1000), "x0")
X0 = 0.5 * np.random.default_rng(0).standard_normal((3, 4, 5, 2))


def gaussian(x, t):
    """E[x0 | x_t] of pixels of deviation .5."""
    abar = FLOW.abar[t[0]]
    return 0.25 * abar ** 0.5 * x / (0.25 * abar + 1 - abar)


def there_and_back(model, steps):
    """x_T, and by how much the step that the way up begins at is missed on the way back."""
    x = invert.invert(model, FLOW, X0, steps, 3, clip=None)
    first = 1000 // steps
    start = FLOW.q_sample(X0, first, td.normal(3, X0.shape, X0.dtype))
    return x, abs(dict(td.ddim(model, FLOW, x, steps=steps, clip=None))[first] - start).max()


def test_inversion_ends_in_noise_and_comes_back_the_closer_the_shorter_the_steps():
    """Euler's method: half the step, half the error. x_T is x0 scaled to noise's deviation."""
    (_, error), (_, half), (x, quarter) = (there_and_back(gaussian, n) for n in (50, 100, 200))
    assert 1.6 < error / half < 2.4 and 1.6 < half / quarter < 2.4
    assert abs(np.std(x) / np.std(X0) - 2) < 0.1
    assert np.corrcoef(x.ravel(), X0.ravel())[0, 1] > 0.98


def test_inversion_is_exact_where_the_guess_does_not_depend_on_x():
    """The path is straight then, in x0 and eps."""
    assert there_and_back(lambda x, t: X0, 8)[1] < 1e-12


def test_slerp_keeps_to_the_sphere_and_goes_evenly():
    a, b = np.random.default_rng(1).standard_normal((2, 3, 4, 5, 2))
    a, b = (x / np.sqrt((x * x).sum((1, 2, 3), keepdims=True)) for x in (a, b))
    path = [invert.slerp(a, b, u) for u in np.linspace(0, 1, 6)]
    close(path[0], a)
    close(path[-1], b)
    close([(x * x).sum((1, 2, 3)) for x in path], 1)
    cosines = [(x * y).sum((1, 2, 3)) for x, y in zip(path, path[1:])]
    close(cosines, [cosines[0]] * 5)
    close(invert.lerp(a, b, 0.25), 0.75 * a + 0.25 * b)
