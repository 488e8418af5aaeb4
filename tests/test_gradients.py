"""The gradient check, `python tinyddpm.py`: it finds what is wrong, and says what it is.

A check that nothing fails is worth nothing: here it is given layers that are wrong.
"""
import math
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import tinyddpm as td

pytestmark = pytest.mark.skipif(td.xp is not np, reason="these run with TINYDDPM_BACKEND=numpy")
LAYOUT = {"scale": ((3,), 1), "lists": [td.product_layout(3, 2), [td.product_layout(2, 4)]]}


def layer(p, x, z, of_z=1.0, of_w=1.0):
    """Two inputs, parameters in lists of lists. The gradients of z and of the last w are off by
    factors."""
    s, silu_back = td.silu(p.scale * x * z)
    h, back1 = td.linear(p.lists[0], s)
    y, back2 = td.linear(p.lists[1][0], h)

    def back(dy):
        ds = silu_back(back1(back2(dy)))
        p.grad.lists[1][0].w *= of_w
        p.grad.scale += (ds * x * z).sum(0)
        return ds * p.scale * z, of_z * ds * p.scale * x
    return y, back


def errors(of, dtype=np.float64):
    """What the check finds; it has no need to write into what it is given."""
    p, inputs = td.initial(LAYOUT, 0, dtype), list(td.normal(0, (2, 5, 3), dtype))
    for a in (p.flat, p.grad.flat, *inputs):
        a.flags.writeable = False
    return dict(td.gradient_errors(of, p, inputs))


# ------------------------------------------------------------------------- what is found wrong

@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_right_layer_is_right_in_either_type(dtype):
    """Every input and every parameter has its row, in the order of the buffer. In float32,
    differences would be off in the third digit: all is computed in float64."""
    found = errors(layer, dtype)
    assert [*found] == ["input 1", "input 2", "scale", "lists.0.w", "lists.0.b", "lists.1.0.w",
                        "lists.1.0.b"]
    assert max(found.values()) < 1e-8


@pytest.mark.parametrize("factor", [-1, 0, 0.5, 1.00001, math.nan])
@pytest.mark.parametrize("what, name", [("of_z", "input 2"), ("of_w", "lists.1.0.w")])
def test_a_wrong_sign_or_factor_is_found_where_it_is(what, name, factor):
    """And nowhere else. 1e-6 is what the script allows."""
    found = errors(partial(layer, **{what: factor}))
    assert [key for key, error in found.items() if not error <= 1e-6] == [name]


def test_an_error_is_relative_to_the_gradient():
    """A direction u meets a gradient g with u . g / |g|, a normal number of its own, z. With f
    g for g the error is |1 - f| |z| / |f|."""
    z = [errors(partial(layer, of_w=f))["lists.1.0.w"] * abs(f / (1 - f))
         for f in (-1, 0.5, 1.01)]
    np.testing.assert_allclose(z, z[0], rtol=1e-5)
    assert 0.01 < z[0] < 4


def test_a_layer_may_be_without_parameters():
    """Integers are taken for numbers. A gradient whose numbers are all there, but in each
    other's places, is found: weights and directions are random."""
    for one, right in (td.silu, True), (lambda x: (x, lambda dy: dy[::-1]), False):
        found = dict(td.gradient_errors(one, None, [np.arange(-3, 4)]))
        assert [*found] == ["input 1"] and (found["input 1"] < 1e-8) == right


# -------------------------------------------------------------------- the table and the script

def test_the_table_has_every_parameter_and_all_are_right():
    found = dict(td.gradient_table())
    assert {"input 1", "label", "stem.w", "top.down.1.scale_shift.w", "top.up.0.norm1.scale",
            "top.inner.down.0.skip.w", "top.inner.up.1.attention.qkv.w", "top.match.b",
            "norm.shift", "out.b"} <= {*found}
    assert max(found.values()) < 1e-6


@pytest.mark.parametrize("name", [
    "embed", "sequential", "silu", "linear", "conv3x3", "norm", "group_norm", "dropout",
    "attention", "res_block", "level", "space_to_depth", "depth_to_space", "average_pool",
    "upsample"])
def test_the_table_has_every_kind_of_layer(name, monkeypatch):
    """Whichever has its sign wrong, it shows. The last four are each other's back."""
    right = getattr(td, name)

    def wrong(*args, **kwargs):
        y = right(*args, **kwargs)
        if not isinstance(y, tuple):
            return -y
        return y[0], y[1] if y[0] is args[0] else lambda dy: y[1](-dy)  # dropout may be off
    monkeypatch.setattr(td, name, wrong)
    if name == "res_block":         # which a network has by its own name
        monkeypatch.setattr(td.UNet, name, staticmethod(wrong))
    assert any(error > 1e-3 for _, error in td.gradient_table())


@pytest.mark.parametrize("table, wrong", [
    ("{'one': 1e-7, 'two': 0.0}", []), ("{'one': 2e-6, 'two': 0.0}", ["one"]),
    ("{'one': 0.0, 'two': math.nan}", ["two"])])
def test_the_script_says_which_is_wrong_and_fails(table, wrong, tmp_path, capsys):
    """In a copy that has this table."""
    head, start, end = Path(td.__file__).read_text().partition("\nif __name__ ==")
    path = tmp_path / "copy.py"
    path.write_text(f"{head}\ngradient_table = lambda: {table}\n{start}{end}")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["one", "two"]
    assert [line.split()[0] for line in lines if "WRONG" in line] == wrong
    assert bool(ended.value.code) == bool(wrong)
