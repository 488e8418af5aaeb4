"""A stand-in for CuPy where there is no GPU: it computes with NumPy, and refuses what CuPy 14
refuses, so that a host array in the wrong place is found without a GPU.

    arrays of the host (other than scalars) do not mix with those of the device
    a device array becomes a host array by .get() alone, and a number by float(), int(), bool()
    ufuncs take no `where`; NAMES are all that the module has
"""
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

# What tinyddpm uses; tests/test_backend.py looks all of them up in the installed CuPy.
NAMES = set("""abs arange array array_split asarray broadcast_to clip concatenate cos empty
    empty_like exp full matmul maximum multiply ones pad quantile sign sin split sqrt stack tanh
    tile where zeros zeros_like ndarray""".split())
METHODS = set("""T astype copy dtype max mean min ndim ravel repeat reshape shape size std
    strides sum swapaxes take transpose""".split())


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


class Array(NDArrayOperatorsMixin):
    """An array of the device."""

    def __init__(self, host):
        self.host = np.asarray(host)

    def get(self):
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
        if name not in METHODS:
            raise AttributeError(f"CuPy's arrays are not asked for {name}")
        found = getattr(self.host, name)
        if not callable(found) or name == "dtype":
            return wrap(found) if isinstance(found, np.ndarray) else found
        return lambda *args, **kwargs: wrap(found(*unwrap(args), **kwargs))

    def __getitem__(self, index):
        return wrap(self.host[unwrap(index)])

    def __setitem__(self, index, value):
        self.host[unwrap(index)] = unwrap(value)

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (wrap(a) for a in self.host)

    def __float__(self):
        return float(self.host)

    def __bool__(self):
        return bool(self.host)

    def __format__(self, spec):
        return format(self.host, spec)


class Module:
    """The device's module: NumPy's functions, on device arrays."""

    class lib:
        class stride_tricks:
            @staticmethod
            def as_strided(a, shape, strides):
                return Array(np.lib.stride_tricks.as_strided(unwrap(a), shape, strides))

    def __getattr__(self, name):
        if name not in NAMES:
            raise AttributeError(f"NAMES has no {name}: see whether CuPy has it, and add it")
        function = getattr(np, name)

        def on_device(*args, **kwargs):
            if name in ("asarray", "array") and isinstance(args[0], (np.ndarray, np.generic)):
                return Array(function(*args, **kwargs).copy())      # from the host, copied
            kwargs = {key: unwrap(value) for key, value in kwargs.items()}
            result = function(*unwrap(args), **kwargs)
            return args and kwargs.get("out") is not None or wrap(result)
        return on_device


xp = Module()
