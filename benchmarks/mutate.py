"""How many small faults in tinyddpm.py do the default tests find?

    python benchmarks/mutate.py [--section NAME ...] [--sample N] [--seed S] [--quick]

Each mutant is tinyddpm.py with one small change: another operator, a number or an index one
larger, a condition negated, an argument dropped, and so on (see `variants`). It is killed if a
default test fails or does not end. Printed are, for each section of tinyddpm.py, the mutants,
those killed, the survivors and the share killed; before that every survivor. --sample takes so
many of a section at random; 0 takes all. --quick asks only a section's own test files.

A mutant is run in a fork of a process that has NumPy, pytest and hypothesis loaded, by the
tests that enter the function it is in, a section's own files first. Left alone: docstrings,
messages (all of a `raise` but its being there) and string keys; "the gradient check", which is
a test itself; test_demo.py, which asks little of the mathematics and takes long. Tests that
start another Python read the file, not the mutant. What only a GPU's path reads is reached by
test_strict.py, where CuPy is installed; without it these mutants survive.

mutmut copes with this layout, but its trampolines (one file of 121,000 lines) break the tests
that read or start tinyddpm.py, and half its 4104 mutants are messages. cosmic-ray starts a
pytest for each mutant.

EQUIVALENT, below, lists mutants that no test can kill, or that none should, with the reason.
They are left out.
"""
import argparse
import ast
import contextlib
import copy
import gc
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import types
from collections import defaultdict
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ["TINYDDPM_BACKEND"] = "numpy"
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
sys.dont_write_bytecode = False     # else every fork would rewrite the tests' asserts again

import hypothesis                               # noqa: E402
import numpy as np                              # noqa: E402, F401
import pytest                                   # noqa: E402
from hypothesis import Phase, settings          # noqa: E402, F401

try:
    import cupy                                 # noqa: F401  test_strict.py asks it for names
except Exception:
    pass

HERE = Path(__file__).parent.parent / "tests"
SOURCE = HERE.parent / "tinyddpm.py"
sys.path.insert(0, str(HERE))
SECTIONS = {    # as its comment lines have them: a short name, and the tests to begin with
    "noise schedules": ("schedules", ["schedules"]),
    "the forward process": ("diffusion", ["diffusion"]),
    "samplers and guidance": ("samplers", ["samplers", "schedules"]),
    "parameters and layers": ("layers", ["layers", "unet"]),
    "U-Net": ("unet", ["unet", "layers"]),
    "training": ("training", ["training"]),
    "checkpoints": ("checkpoints", ["checkpoint"]),
    "likelihood": ("likelihood", ["diffusion"]),
    "the gradient check": (None, [])}
OWN = {short: [HERE / f"test_{name}.py" for name in own] for short, own in SECTIONS.values()}
LEFT_OUT = ("test_demo.py", "test_pictures.py")         # they ask little of the mathematics
FILES = [path for path in sorted(HERE.glob("test_*.py")) if path.name not in LEFT_OUT]

EQUIVALENT = {      # what a mutant has in its changed statement, and the original has not
    "f * f[0]": "betas_from_abar takes ratios, where any constant factor cancels",
    "f / f[1]": "the same",
    "3 ** 62": "a bound beyond all labels and steps",
    "2 ** 63": "the same",
    "2 * 62": "the same, nearly",
    "<= 1.001": "a tolerance; nothing lies on its edge",
    "x >= 0.999": "no byte lies there",
    "x <= -0.999": "no byte lies there",
    "np.log(diffusion.snr) * 2": "r is a ratio of differences of lambda: the scale cancels",
    "np.log(diffusion.snr) / 3": "the same",
    "rng.random(x.shape) >= rate": "the same law drawn from float64: half as fast",
    "xp.ones((2, H * W), x.dtype)": "the second row is computed and not read",
    "(H * W * C / groups)": "groups divides C",
    "repeat(C / groups, 1)": "groups divides C, and NumPy takes a whole float",
    "(C / heads) **": "heads divides C",
    "half = width / 2": "width is even, and arange takes a whole float",
    "chunk=17": "chunks change only the speed",
    "threads=2": "threads change only the speed",
    "abs(d) <= 1": "at 1 both forms are 1/2",
    "pass  # file.flush()": "zipfile flushes what it has written, though it need not",
    "np.load(file) as archive": "NumPy's default too",
    "mean_loss - norm": "finite exactly where both are, as the sum is",
}

# ----------------------------------------------------------------------------------- mutants

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
         ast.Pow: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Div, ast.BitAnd: ast.BitOr,
         ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE,
         ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
         ast.NotIn: ast.In}
NAMES = {"min": "max", "minimum": "maximum", "any": "all"}
NAMES |= {b: a for a, b in NAMES.items()}


def changed(node, **fields):
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def without(items, i):
    return items[:i] + items[i + 1:]


def one_more(node):
    """An index or a bound one larger; constants are the Constant's affair, strings nobody's."""
    if not isinstance(node, (ast.Constant, ast.Slice, ast.Tuple, ast.UnaryOp, type(None))):
        yield ast.BinOp(node, ast.Add(), ast.Constant(1))


def variants(node):
    """What may stand in a node's place in a mutant."""
    match node:
        case ast.BinOp(left, ast.MatMult(), right):
            yield changed(node, left=right, right=left)
        case ast.BinOp(op=op) | ast.BoolOp(op=op):
            yield changed(node, op=SWAPS[type(op)]())
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield changed(node, ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1:]])
        case ast.AugAssign(target, op, value):
            yield ast.Assign([target], value)
            if type(op) in (ast.Add, ast.Sub, ast.Mult, ast.Div):
                yield changed(node, op=SWAPS[type(op)]())
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.UnaryOp(operand=operand):                      # -x, not x, ~x
            yield operand
        case ast.If(test) | ast.IfExp(test) | ast.While(test):
            if not isinstance(test, ast.UnaryOp):
                yield changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[test]):
            yield changed(node, ifs=[ast.UnaryOp(ast.Not(), test)])
        case ast.Name(id) if id in NAMES:
            yield changed(node, id=NAMES[id])
        case ast.Attribute(attr=attr) if attr in NAMES:
            yield changed(node, attr=NAMES[attr])
        case ast.Call(args=args, keywords=keywords):
            for i in range(len(args) if len(args) > 1 else 0):
                yield changed(node, args=without(args, i))
            for i in range(len(keywords)):
                yield changed(node, keywords=without(keywords, i))
        case ast.Subscript(ast.Name(id), _) if id.isupper():    # a dict: no index to shift
            pass
        case ast.Subscript(slice=ast.Tuple(elts)):
            for i, elt in enumerate(elts):
                for more in one_more(elt):
                    yield changed(node, slice=ast.Tuple([*elts[:i], more, *elts[i + 1:]]))
        case ast.Subscript(value, index) if not isinstance(value, ast.Dict):
            for more in one_more(index):
                yield changed(node, slice=more)
        case ast.Slice(lower, upper):
            for more in one_more(lower):
                yield changed(node, lower=more)
            for more in one_more(upper):
                yield changed(node, upper=more)
        case ast.Return(value) if value is not None:
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Constant()):                          # a docstring
            pass
        case ast.Expr() | ast.Raise():
            yield ast.Pass()
        case ast.arguments(defaults=defaults, kw_defaults=kw):
            for name, values in {"defaults": defaults, "kw_defaults": kw}.items():
                for i, one in enumerate(values):
                    if isinstance(one, ast.Constant) and isinstance(one.value, str):
                        other = ast.Constant(f"another {one.value}")
                        yield changed(node, **{name: [*values[:i], other, *values[i + 1:]]})


def text(stmt):
    """A statement, of a compound one its first line."""
    empty = {name: [] for name in ("body", "orelse", "handlers", "finalbody", "decorator_list")
             if isinstance(getattr(stmt, name, None), list)}
    return ast.unparse(ast.fix_missing_locations(changed(stmt, **empty)))


class Mutant:
    """One node (owner.field, or its element i) replaced by another; stmt is what it is in, and
    function the line of the innermost def around it, 0 for none."""

    def __init__(self, owner, field, i, node, new, stmt, function):
        self.place, self.node, self.new, self.function = (owner, field, i), node, new, function
        self.line = getattr(node, "lineno", stmt.lineno)
        self.before = text(stmt)
        self.put(new)
        self.after = text(new if node is stmt else stmt)
        if isinstance(new, ast.Pass):
            self.after += f"  # {self.before}"
        self.put(node)

    def is_same_length(self):
        """reshape(-2, ...) for reshape(-1, ...): NumPy takes any negative length alike."""
        return "reshape(" in self.after and "-2" in self.after and "-2" not in self.before

    def put(self, node):
        owner, field, i = self.place
        if i is None:
            setattr(owner, field, node)
        else:
            getattr(owner, field)[i] = node


def mutants(owner, stmt=None, function=0):
    for field, value in ast.iter_fields(owner):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for i, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST):
                continue
            inner = node if isinstance(node, ast.stmt) else stmt
            scope = node.lineno if isinstance(node, ast.FunctionDef) else function
            for new in variants(node):
                yield Mutant(owner, field, i, node, new, inner, scope)
            if not isinstance(node, (ast.Raise, ast.JoinedStr)):
                yield from mutants(node, inner, scope)


# --------------------------------------------------------------------------------- the tests

SEEN = set()        # the lines of the defs entered, where the module was made by `traced`


def load(tree):
    """Make this tree the module tinyddpm."""
    module = sys.modules["tinyddpm"] = types.ModuleType("tinyddpm")
    module.__file__, module.SEEN = str(SOURCE), SEEN
    exec(compile(ast.fix_missing_locations(tree), SOURCE, "exec"), module.__dict__)


def traced(tree):
    """A copy of the tree in which every function notes that it was entered."""
    tree = copy.deepcopy(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body.insert(0, ast.parse(f"SEEN.add({node.lineno})").body[0])
    return tree


class Plugin:
    """Runs only the tests named, the slow ones last; notes what each entered and how long it
    took. No shrinking: that a test fails is all that is asked of it."""

    def __init__(self, only=None):
        self.only, self.found, self.at_import = only, {}, defaultdict(set)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self):
        hypothesis.settings.register_profile(
            "mutants", parent=settings.get_profile("default"), database=None,
            phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
        hypothesis.settings.load_profile("mutants")

    def pytest_collectreport(self, report):
        self.at_import[report.nodeid.split("::")[0]] |= SEEN
        SEEN.clear()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        if self.only is not None:
            kept = [item for item in items if item.nodeid in self.only]
            items[:] = sorted(kept, key=lambda item: self.only[item.nodeid] > 0.3)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        SEEN.clear()
        start = time.perf_counter()
        result = yield
        seen = SEEN | self.at_import[item.nodeid.split("::")[0]]
        self.found[item.nodeid] = time.perf_counter() - start, seen
        return result


def pytest_fails(files, plugin):
    if not files:
        return False
    code = pytest.main([*map(str, files), "-x", "-q", "--tb=no", "-p", "no:cacheprovider",
                        f"--rootdir={HERE.parent}"], [plugin])
    return code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def in_a_fork(work, seconds):
    """What work() returns, in a process of its own; "timeout" where it takes longer."""
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if not pid:
            os.setsid()
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            try:
                pickle.dump(work(), file)
            except BaseException as error:      # the module itself did not load
                pickle.dump(f"{type(error).__name__}", file)
            file.flush()
            os._exit(0)
        end, done = time.monotonic() + seconds, 0
        while not done and time.monotonic() < end:
            time.sleep(0.01)
            done, _ = os.waitpid(pid, os.WNOHANG)
        if not done:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "timeout"
        file.seek(0)
        return pickle.load(file)


def trial(tree, mutant, own, tests, quick):
    """Whether a test fails: of the section's own files or, unless quick, of the others."""
    def work():
        if mutant:
            mutant.put(mutant.new)              # in the fork, so that nothing has to be undone
        load(tree)
        files = [path for path in FILES if any(f"tests/{path.name}::" in t for t in tests)]
        first = [path for path in own if path in files]
        rest = [path for path in files if path not in own]
        return (pytest_fails(first, Plugin(tests))
                or not quick and pytest_fails(rest, Plugin(tests)))
    return in_a_fork(work, 30 + 5 * sum(tests.values()))


def record(tree):
    """Every default test's seconds and what it entered, on the unchanged module."""
    def work():
        load(traced(tree))
        plugin = Plugin()
        assert not pytest_fails(FILES, plugin)
        return plugin.found
    found = in_a_fork(work, 1800)
    if not isinstance(found, dict):
        raise SystemExit(f"the tests fail without a mutation ({found})")
    return found


def warm_up(tree):
    """Collect all tests once and forget them, so that a fork finds what they import loaded."""
    load(copy.deepcopy(tree))
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        pytest_fails(FILES, Plugin({}))
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if name != "__main__" and path.startswith(str(HERE)):
            del sys.modules[name]
    gc.collect()
    gc.freeze()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append", choices=[s for s in OWN if s])
    parser.add_argument("--sample", type=int, default=100, help="mutants of a section; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="only the section's own files")
    options = parser.parse_args()

    source = SOURCE.read_text()
    tree = ast.parse(source)
    starts = {line: line.lstrip("# -") for line in source.splitlines()
              if line.startswith("# -----")}
    assert set(starts.values()) == set(SECTIONS), starts
    lines, section_of, short = source.splitlines(), [None], None
    for line in lines:
        short = SECTIONS[starts[line]][0] if line in starts else short
        section_of.append(short)
    sections, equivalent, known = defaultdict(dict), defaultdict(dict), set()
    for mutant in mutants(tree):
        short = section_of[mutant.line]
        if short and mutant.before != mutant.after and not mutant.is_same_length():
            same = [key for key in EQUIVALENT
                    if key in mutant.after and key not in mutant.before]
            known.update(same)
            kept = equivalent if same else sections
            kept[short].setdefault((mutant.function, mutant.line, mutant.after), mutant)
    for stale in EQUIVALENT.keys() - known:
        print("no longer a mutant:", stale)

    chosen = options.section or list(sections)
    start = time.monotonic()
    found = record(tree)
    print(f"{len(found)} tests recorded in {time.monotonic() - start:.0f} s", flush=True)
    warm_up(tree)
    everything = {name: seconds for name, (seconds, _) in found.items()}
    if trial(tree, None, [], everything, quick=False):
        raise SystemExit("the tests fail in a fork without a mutation")
    table = []
    for short in chosen:
        start = time.monotonic()
        those = list(sections[short].values())
        if 0 < options.sample < len(those):
            those = random.Random(options.seed).sample(those, options.sample)
        survivors = []
        for mutant in sorted(those, key=lambda mutant: mutant.line):
            tests = {name: seconds for name, (seconds, seen) in found.items()
                     if not mutant.function or mutant.function in seen}
            if not trial(tree, mutant, OWN[short], tests, options.quick):
                survivors.append(mutant)
                print(f"{mutant.line}: {mutant.before}\n   -> {mutant.after}", flush=True)
        killed = len(those) - len(survivors)
        table.append(f"{short:10} {len(those):4} of {len(sections[short]):4} {killed:7} "
                     f"{len(survivors):8} {100 * killed / len(those):7.1f} % "
                     f"{len(equivalent[short]):10} {time.monotonic() - start:6.0f}")
        print(table[-1], flush=True)
    print("\nsection         mutants  killed survived     score equivalent seconds")
    print(*table, sep="\n")


if __name__ == "__main__":
    main()
