"""A stand-in for CuPy that needs no GPU, for tests: CuPy's rules, NumPy's arithmetic.

`xp` has the names and keywords of the installed CuPy, which is asked for them, and its arrays
are host memory that behaves like a GPU's:
- nothing goes to or from the host unasked. A host array in an operator, a ufunc, most functions
  or out= is an error, and so is np.asarray(device array); NumPy's own functions and ufuncs
  dispatch here, as they do to CuPy;
- a reduction or a[0] is a 0-d array on the device. What has to wait for the device is written
  down: float(a), bool(a), print, .get() and all whose shape depends on the numbers;
- empty() is full of NaN, as memory is of anything.
Where CuPy lets more pass than NumPy (an index out of bounds wraps), NumPy's error stays. Where
CuPy has something that NumPy has not, or that is not written here, it is a NotImplementedError.

The rules were read in the source of CuPy 14.2: core.pyx, _kernel.pyx (ufunc.__call__),
_routines_indexing.pyx and _scalar.pyx under cupy/_core. test_strict.py asks the installed CuPy
about them as far as it answers without a GPU.
"""
import contextlib
import functools
import inspect
import sys
import types
from pathlib import Path

import cupy
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

# ------------------------------------------------------------------------ synchronisations

LISTENERS = []


@contextlib.contextmanager
def syncs():
    """A list of all that waits for the device inside the `with`, and where it was asked for."""
    seen = []
    LISTENERS.append(seen)
    try:
        yield seen
    finally:
        LISTENERS[:] = [one for one in LISTENERS if one is not seen]


def sync(what):
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].split(".")[0] in (__name__, "numpy"):
        frame = frame.f_back
    for seen in LISTENERS:
        seen.append(f"{what} in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")


# A function or method of CuPy's says in its docstring that it synchronizes; these say so of
# some of their options, or of not doing it, ...
SOMETIMES = {"array": "blocking", "asarray": "blocking", "asanyarray": "blocking",
             "average": "weights", "repeat": "repeats"}
NEVER = {"count_nonzero", "digitize", "where"}
# ... and these do not say it. (Linear algebra looks whether it has failed.)
SILENT = {"argwhere", "union1d", "intersect1d", "setdiff1d", "setxor1d", "tobytes", "tolist",
          "tofile", "dump", "dumps", "item", "asnumpy", "save", "savez", "savez_compressed",
          "savetxt", "array_repr", "array_str", "array2string"}


def waits(path, real, given):
    name = path.split(".")[-1]
    if name in SOMETIMES:
        option = given.get(SOMETIMES[name])
        return isinstance(option, Array) or name != "repeat" and bool(option)
    if name == "where":
        return "x" not in given and "y" not in given
    return (name in SILENT or "synchroniz" in (real.__doc__ or "") and name not in NEVER
            or path.startswith("linalg.") and name != "norm")


# ------------------------------------------------------------------- arguments and results

def device(a):
    """Host memory as an array on the device, without a copy."""
    if a.dtype.char not in "?bBhHiIlLqQefdFD":
        raise ValueError(f"Unsupported dtype {a.dtype}")
    array = object.__new__(Array)
    array._host = a
    return array


def wrapped(value, known=()):
    """A result with its arrays and scalars on the device. Where one is an argument itself, as
    that of asarray or out= is, it stays the same object."""
    if isinstance(value, (np.ndarray, np.generic)):
        same = [a for a in known if a._host is value]
        return same[0] if same else device(np.asarray(value))
    if isinstance(value, (list, tuple)):
        parts = [wrapped(part, known) for part in value]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def leaves(value):
    """A value, or the values in nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def arrays_in(values):
    """The device arrays among these, lists and tuples included."""
    found = []
    for value in values:
        if isinstance(value, Array):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += arrays_in(value)
    return found


def unwrapped(value):
    """The same value with the memory of its device arrays, for NumPy; host arrays are sent
    over, which copies."""
    if isinstance(value, (list, tuple)):
        return type(value)(unwrapped(part) for part in value)
    if isinstance(value, np.ndarray):
        return np.array(value)
    return value._host if isinstance(value, Array) else value


def is_scalar(x):
    """What CuPy takes for a number: Python's own types, no subclasses, and NumPy's."""
    return type(x) in (bool, int, float, complex) or isinstance(x, (np.bool_, np.number))


def refuse(where, value, *, host=True, device=False):
    """A TypeError for host arrays (device arrays) in an argument."""
    for leaf in leaves(value) if isinstance(value, (list, tuple)) else (value,):
        if host and isinstance(leaf, np.ndarray):
            raise TypeError(f"Unsupported type {type(leaf)}: a host array given to {where}")
        if device and isinstance(leaf, Array):
            raise TypeError(f"{where} takes numbers from the host, not a device array")


def check_out(where, out):
    for one in out if isinstance(out, tuple) else (out,):
        if not (one is None or isinstance(one, Array)):
            raise TypeError(f"{where}: out is a {type(one).__name__}, not a device array")


@functools.cache
def check_keywords(function, count, names):
    """A TypeError unless CuPy's function takes `count` arguments and these keywords.

    A ufunc or a compiled method does not show its keywords. So it is called with one more,
    which none has, and never runs: what it complains of tells.
    """
    extra = "no_such_keyword"
    try:
        function(*[None] * count, **dict.fromkeys([*names, extra]))
    except TypeError as error:
        if extra in str(error) and not any(f"'{name}'" in str(error) for name in names):
            return
        raise TypeError(f"{count} arguments and the keywords {names}: CuPy says that {error}"
                        ) from None
    raise AssertionError(f"{function} took the keyword {extra}")


def poisoned(a):
    """Uninitialized memory: whoever reads it shall notice."""
    a[...] = np.nan if a.dtype.kind in "fc" else np.iinfo(a.dtype).min if a.dtype != bool else 1
    return a


# ------------------------------------------------------------------------------ the array

# CuPy's methods run on an array without elements, so that their keywords can be asked for.
NOTHING = cupy.ndarray((0,), memptr=cupy.cuda.MemoryPointer(
    cupy.cuda.UnownedMemory(0, 0, None, device_id=0), 0))
COMPARISONS = {"greater", "greater_equal", "less", "less_equal", "equal", "not_equal"}


class Array(NDArrayOperatorsMixin):
    """cupy.ndarray. Its methods are added below: those that CuPy has."""

    __slots__ = ("_host",)
    __array_priority__ = 100

    def __init__(self, shape, dtype=float, order="C"):
        self._host = poisoned(np.empty(shape, dtype, order))

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use "
                        "`.get()` to construct a NumPy array explicitly.")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        everything = inputs
        if "out" in kwargs:
            if len(kwargs["out"]) != 1:
                raise ValueError("The 'out' parameter must have exactly one array value")
            everything += kwargs["out"]
            kwargs["out"] = kwargs["out"][0]
        function = getattr(xp, ufunc.__name__, None)
        if method != "__call__":
            function = getattr(function, method, None)
        if function is None or not all(is_scalar(x) or isinstance(x, (Array, np.ndarray))
                                       for x in everything):
            return NotImplemented
        if ufunc.__name__ in COMPARISONS:       # CuPy's exception, for 0-d host arrays
            inputs = [x.item() if isinstance(x, np.ndarray) and not x.ndim else x
                      for x in inputs]
        return function(*inputs, **kwargs)

    def __array_function__(self, func, types, args, kwargs):
        try:
            path = [*func.__module__.split(".")[1:], func.__name__]
            function = functools.reduce(getattr, path, xp)
        except AttributeError:
            return NotImplemented
        if function is func or not all(issubclass(t, (Array, np.ndarray)) for t in types):
            return NotImplemented
        return function(*args, **kwargs)

    def __pow__(self, y):
        # CuPy's short cuts, and those of NumPy's operator: the last bits are the same.
        short = {(int, 2): "square", (float, 2): "square", (float, 0.5): "sqrt",
                 (float, -1): "reciprocal"}
        if is_scalar(y) and (type(y), y) in short and self.dtype.kind in "fc":
            return getattr(xp, short[type(y), y])(self)
        return np.power(self, y)

    def __imatmul__(self, other):               # a @= b makes a new a in CuPy
        return NotImplemented

    # Memory: what an index or an assignment does.

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        key, advanced = self._index(key)
        if advanced:
            return wrapped(np.array(self._host[key]))
        # With an ellipsis a number is a 0-d view, too.
        return wrapped(self._host[key if any(k is ... for k in key) else (*key, ...)])

    def __setitem__(self, key, value):
        key, advanced = self._index(key)
        if not (advanced or isinstance(value, Array)) and np.shape(value) != ():
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self._host[key] = unwrapped(value)

    @staticmethod
    def _index(key):
        """The key for NumPy, and whether it copies: CuPy takes lists and host arrays, too, and
        sends them over. A mask's number of elements has to be known."""
        key = key if isinstance(key, tuple) else (key,)
        plain, advanced = [], False
        for k in key:
            if isinstance(k, (Array, np.ndarray, list, tuple, bool, np.bool_)):
                advanced, k = True, np.asarray(unwrapped(k))
                k = k if k.size else k.astype(int)
                if k.dtype == bool:
                    sync("a mask")
            plain.append(k)
        return tuple(plain), advanced

    # To the host: each of these waits. (There is no __index__ in CuPy, and no __round__.)

    def get(self, stream=None, order="C", out=None, blocking=True):
        sync("get")
        if out is None:
            return np.array(self._host, order=order)
        if not isinstance(out, np.ndarray):
            raise TypeError("Only numpy.ndarray can be obtained from cupy.ndarray")
        if out.dtype != self.dtype:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        if out.shape != self.shape:
            raise ValueError("Shape mismatch")
        out[...] = self._host
        return out

    def __bool__(self):
        if self.size != 1:
            raise ValueError("The truth value of an array with other than one element is "
                             "ambiguous. Use a.any() or a.all()")
        return bool(self.get())

    def __float__(self):
        return float(self.get())

    def __int__(self):
        return int(self.get())

    def __complex__(self):
        return complex(self.get())

    def __bytes__(self):
        return bytes(self.get())

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get(), spec)

    def __reduce__(self):
        return from_host, (self.get(),)

    def __copy__(self):
        return self.copy()

    def __deepcopy__(self, memo):
        return self.copy()

    # From the host, and from a number.

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if arr.dtype != self.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if arr.shape != self.shape:
            raise ValueError("Shape mismatch")
        self._host[...] = arr

    def fill(self, value):
        if np.shape(value) != ():
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        self._host[...] = unwrapped(value)

    @property
    def flags(self):
        flags = self._host.flags                # CuPy has these three
        return types.SimpleNamespace(c_contiguous=flags.c_contiguous, owndata=flags.owndata,
                                     f_contiguous=flags.f_contiguous)


def from_host(a):
    return xp.asarray(a)


PROPERTIES = {"shape", "dtype", "ndim", "size", "strides", "nbytes", "itemsize", "T", "mT",
              "real", "imag", "base"}
# Of the other methods' arguments, only out= may be an array.
OF_ARRAYS = {"dot", "take", "put", "choose", "clip", "compress", "repeat", "searchsorted"}
INDEXED = {"take", "put", "compress"}           # and these send host indices over


def method(name):
    real = getattr(NOTHING, name)

    def call(self, *args, **kwargs):
        check_keywords(real, len(args), tuple(kwargs))
        where = f"ndarray.{name}"
        for i, value in enumerate(args):
            refuse(where, value, host=name not in INDEXED,
                   device=i == 0 and name not in OF_ARRAYS)
        check_out(where, kwargs.get("out"))
        for key, value in kwargs.items():
            refuse(where, value, host=name not in INDEXED,
                   device=key != "out" and name not in OF_ARRAYS)
        if name == "astype" and not (kwargs.get("casting") is kwargs.get("subok") is None):
            raise TypeError("casting and subok are not supported yet")
        if waits(name, real, {"repeats": args[0] if args else None} | kwargs):
            sync(name)
        if not hasattr(np.ndarray, name):
            raise NotImplementedError(f"NumPy has no {where}")
        known = arrays_in([self, *args, *kwargs.values()])
        value = getattr(self._host, name)(*unwrapped(args),
                                          **{k: unwrapped(v) for k, v in kwargs.items()})
        to_host = name in ("item", "tolist", "tobytes")
        return value if to_host else wrapped(value, known)
    return call


def attribute(name):
    def value(self):
        if name not in PROPERTIES:
            raise NotImplementedError(f"ndarray.{name} is not in {__name__}")
        return wrapped(getattr(self._host, name), [self])
    return property(value)


for name in dir(cupy.ndarray):
    if not name.startswith("_") and name not in vars(Array):
        is_method = callable(getattr(cupy.ndarray, name))
        setattr(Array, name, method(name) if is_method else attribute(name))


# ------------------------------------------------------------------------------ functions

# The host arrays that CuPy's functions take, by the parameter's name: to send them over, to
# look at shape and type only, or because they describe something.
FROM_HOST = {"array": "obj", "asarray": "a", "asanyarray": "a", "zeros_like": "a",
             "ones_like": "a", "full_like": "a", "empty_like": "prototype", "take": "indices",
             "quantile": "q", "percentile": "q", "pad": "pad_width", "broadcast_to": "shape",
             "split": "indices_or_sections", "array_split": "indices_or_sections"}
# Of these parameters the host has to know the value.
FOR_HOST = {"shape", "axis", "axes", "axis1", "axis2", "newshape", "indices_or_sections",
            "pad_width", "num", "N", "M", "k", "n", "ddof", "decimals", "source", "destination",
            "reps", "keepdims", "start", "stop", "step"}
ARRAY_FIRST = {"a", "x", "arr", "ary", "array", "m", "x1", "condition"}
OF_TYPES = {"result_type", "can_cast", "promote_types", "min_scalar_type", "shape", "ndim",
            "size", "isscalar", "iscomplexobj", "isrealobj", "issubdtype", "broadcast_shapes"}
TRUTHS = {"allclose", "array_equal", "array_equiv"}     # a bool in NumPy, 0-d in CuPy


def function(path, real, host):
    try:
        signature = inspect.signature(real)
    except (TypeError, ValueError):
        signature = None
    first = next(iter(signature.parameters)) if signature else None
    rest = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD
            ] if signature else []
    of_arrays_alone = path == "matmul"

    def call(*args, **kwargs):
        if signature:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"cupy.{path}() {error}") from None
            for name in rest:
                given |= given.pop(name, {})
        else:
            check_keywords(real, len(args), tuple(kwargs))
            given = kwargs
        if path not in OF_TYPES:
            check_arguments(given)
        if waits(path, real, given):
            sync(path)
        options = {k: unwrapped(v) for k, v in kwargs.items() if k != "blocking"}
        value = host(*unwrapped(args), **options)
        if path in ("empty", "empty_like"):
            poisoned(value)
        known = arrays_in([*args, *kwargs.values()])
        if path in TRUTHS:
            value = np.asarray(value)
        return value if path == "asnumpy" else wrapped(value, known)

    def check_arguments(given):
        for name, value in given.items():
            where = f"{path}: {name}"
            if name == "out":
                check_out(where, value)
            refuse(where, value, host=FROM_HOST.get(path) != name, device=name in FOR_HOST)
            if not isinstance(value, (list, tuple)):
                continue
            arrays = [isinstance(leaf, Array) for leaf in leaves(value)]
            if (name in ("tup", "arrays") or of_arrays_alone and name == "args"
                    or name in ("a", "obj") and any(arrays)) and not all(arrays):
                raise TypeError(f"{where} holds something else than device arrays")
        if (first in ARRAY_FIRST and path not in FROM_HOST
                and not isinstance(given.get(first), Array)):
            raise TypeError(f"cupy.{path}: {first} has to be a device array")
    return call


class Ufunc:
    # CuPy has these methods of few.
    SOME = {"reduce": {"add", "multiply"}, "accumulate": {"add", "multiply"},
            "reduceat": {"add"}, "at": {"add", "subtract", "maximum", "minimum", "bitwise_and",
                                        "bitwise_or", "bitwise_xor"}}

    def __init__(self, name, real, host):
        self.__name__, self.real, self.host = name, real, host

    def __call__(self, *args, **kwargs):
        check_keywords(self.real, len(args), tuple(kwargs))
        inputs, outs = args[:self.real.nin], args[self.real.nin:]
        for x in inputs:
            if not (is_scalar(x) or isinstance(x, Array)):
                raise TypeError(f"Unsupported type {type(x)} given to {self.__name__}")
        out = kwargs.get("out")
        for one in (*outs, *(out if isinstance(out, tuple) else (out,))):
            check_out(self.__name__, one)
        if "out" in kwargs:
            kwargs["out"] = unwrapped(out)
        known = arrays_in([*args, out])
        return wrapped(self.host(*unwrapped(args), **kwargs), known)

    def __getattr__(self, name):
        real = getattr(self.real, name)
        if name not in ("outer", *self.SOME):
            return real                         # nin, nout, ...

        def call(*args, **kwargs):
            # (outer hands its keywords on.)
            check_keywords(self.real if name == "outer" else real, len(args), tuple(kwargs))
            if self.__name__ not in self.SOME.get(name, {self.__name__}):
                raise NotImplementedError(f"`{self.__name__}.{name}` is not supported yet")
            where = f"{self.__name__}.{name}"
            refuse(where, [*args, *kwargs.values()])
            check_out(where, kwargs.get("out"))
            known = arrays_in([*args, *kwargs.values()])
            options = {k: unwrapped(v) for k, v in kwargs.items()}
            return wrapped(getattr(self.host, name)(*unwrapped(args), **options), known)
        return call


class Generator:
    """cupy.random.Generator, with NumPy's numbers."""

    def __init__(self, seed=None):
        self._host = np.random.default_rng(seed)

    def __getattr__(self, name):
        real = getattr(cupy.random.Generator.__new__(cupy.random.Generator), name)

        def draw(*args, **kwargs):
            check_keywords(real, len(args), tuple(kwargs))
            refuse(name, [*args, *kwargs.values()])
            return wrapped(getattr(self._host, name)(*args, **kwargs))
        return draw


# ----------------------------------------------------------------------------- the module

class Module:
    """CuPy, or a module of it."""

    def __init__(self, real, host, path=""):
        self.__name__ = "strict"
        self._real, self._host, self._path = real, host, path

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        real = getattr(self._real, name)        # the error is CuPy's where it has no such name
        value = self._stand_in(name, real, getattr(self._host, name, None))
        if value is NotImplemented:
            raise NotImplementedError(f"cupy.{self._path}{name} is not in {__name__}")
        setattr(self, name, value)
        return value

    def _stand_in(self, name, real, host):
        path = self._path + name
        if real is cupy.ndarray:
            return Array
        if path == "asnumpy":
            return function(path, real, lambda a, **_: np.array(a))
        if path == "random.default_rng":
            return Generator
        if path.startswith("random."):
            return NotImplemented
        if real is host or isinstance(real, (int, float, str)):
            return real                         # types, constants, functions of types
        if host is None or not (callable(real) or isinstance(real, types.ModuleType)):
            return NotImplemented
        if isinstance(real, types.ModuleType):
            return Module(real, host, path + ".")
        if isinstance(real, cupy.ufunc):
            return Ufunc(name, real, host)
        return NotImplemented if isinstance(real, type) else function(path, real, host)


xp = Module(cupy, np)
