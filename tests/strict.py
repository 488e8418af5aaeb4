"""A stand-in for CuPy where there is no GPU: it computes with NumPy, and refuses what CuPy 14
refuses, so that a host array in the wrong place is found without a GPU.

    arrays of the host (other than scalars) do not mix with those of the device
    a device array becomes a host array by .get() alone, a number by float(), bool() or in a
    message; each time the host has to wait for the device, and WAITS counts that
    functions, methods and their keywords are those of the tables; ufuncs take no `where`
    memory that is not filled is full of NaN
"""
from collections import Counter

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

# All that tinyddpm asks for, with the keywords; tests/test_backend.py looks it up in the
# installed CuPy.
FUNCTIONS = dict.fromkeys("""abs arange array asarray broadcast_to clip concatenate cos
    empty empty_like exp full maximum ones pad sign sin sqrt stack tanh tile where zeros
    zeros_like""".split(), ()) | {
        "eye": ["dtype"], "matmul": ["out"], "quantile": ["axis"], "split": ["axis"]}
METHODS = dict.fromkeys("copy mean min ravel repeat reshape swapaxes transpose".split(), ()) | {
    "astype": ["copy"], "max": ["keepdims"], "std": ["keepdims"], "sum": ["keepdims"]}
ATTRIBUTES = "T dtype ndim shape size strides".split()
WAITS = Counter()


def unwrap(a):
    """The host array in a device array; a host array is refused."""
    if isinstance(a, Array):
        return a.host
    if isinstance(a, (list, tuple)):
        return type(a)(unwrap(one) for one in a)
    if isinstance(a, np.ndarray):
        raise TypeError(f"Unsupported type {type(a)}: an array of the host")
    return a


def wrap(a):
    if isinstance(a, (list, tuple)):
        return type(a)(wrap(one) for one in a)
    return Array(a) if isinstance(a, (np.ndarray, np.generic)) else a


def allowed(table, name, keywords):
    """Refuses what is not in the table."""
    if name not in table:
        raise AttributeError(f"{name} is not in the table: see whether CuPy has it, and add it")
    if unknown := set(keywords) - {*table[name]}:
        raise TypeError(f"{name} has the keywords {unknown}: see whether CuPy has them")


class Array(NDArrayOperatorsMixin):
    """An array of the device."""

    def __init__(self, host):
        self.host = np.asarray(host)

    def get(self):
        WAITS["get"] += 1
        return self.host.copy()

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if method != "__call__" or kwargs:
            raise TypeError(f"{ufunc.__name__}.{method} with {list(kwargs)}")
        if out:
            ufunc(*unwrap(inputs), out=unwrap(out))
            return out[0]
        return wrap(ufunc(*unwrap(inputs)))

    def __array_function__(self, function, types, args, kwargs):
        return getattr(xp, function.__name__)(*args, **kwargs)

    def __getattr__(self, name):
        if name in ATTRIBUTES:
            found = getattr(self.host, name)
            return wrap(found) if isinstance(found, np.ndarray) else found
        allowed(METHODS, name, ())

        def method(*args, **kwargs):
            allowed(METHODS, name, kwargs)
            return wrap(getattr(self.host, name)(*unwrap(args), **kwargs))
        return method

    def __getitem__(self, index):
        return wrap(self.host[unwrap(index)])

    def __setitem__(self, index, value):
        self.host[unwrap(index)] = unwrap(value)

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (wrap(a) for a in self.host)

    def __float__(self):
        WAITS["float"] += 1
        return float(self.host)

    def __bool__(self):
        WAITS["bool"] += 1
        return bool(self.host)

    def __format__(self, spec):
        WAITS["format"] += 1
        return format(self.host, spec)


class Module:
    """The device's module: NumPy's functions, on device arrays."""

    class lib:
        class stride_tricks:
            @staticmethod
            def as_strided(a, shape, strides):
                return Array(np.lib.stride_tricks.as_strided(unwrap(a), shape, strides))

    def __getattr__(self, name):
        allowed(FUNCTIONS, name, ())

        def function(*args, **kwargs):
            allowed(FUNCTIONS, name, kwargs)
            if name in ("asarray", "array") and isinstance(args[0], (np.ndarray, np.generic)):
                return Array(getattr(np, name)(*args).copy())       # from the host, copied
            kwargs = {key: unwrap(value) for key, value in kwargs.items()}
            result = getattr(np, name)(*unwrap(args), **kwargs)
            if name in ("empty", "empty_like"):
                result[...] = np.nan
            return wrap(result)
        return function


xp = Module()
