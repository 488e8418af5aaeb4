"""How many small faults in tinyddpm.py do the default tests find?

    python benchmarks/mutate.py [--section NAME ...] [--sample N] [--seed S] [--quick]

Each mutant is tinyddpm.py with one small change: another operator, a number or an index one
larger, a condition negated, an argument dropped, and so on (see `variants`). It is killed if a
default test fails or does not end. Printed are the survivors, then for each section how many
mutants there are, how many were tried, killed and not. --sample tries so many of a section at
random, 100 unless given, 0 all. --quick asks only a section's own test files.

All 2,300 with --quick take 14 minutes on two cores with others at work beside it, and by all
default tests (samples say) half an hour; --section NAME --sample 60 --quick takes one minute.

A mutant runs in a fork of a process that has what the tests import loaded, by the tests that
enter the function it is in, a section's own files first. Left alone: docstrings and messages;
the choice of the backend and what `python tinyddpm.py` prints, tested in another Python, which
reads the file and not the mutant; ARBITRARY numbers; the tests of the demo. A test file that
fails without a mutation is left out, with a line that says so.
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

import pytest                                   # noqa: E402
from hypothesis import Phase, settings          # noqa: E402

ROOT = Path(__file__).parent.parent
TESTS, SOURCE = ROOT / "tests", ROOT / "tinyddpm.py"
SECTIONS = {    # as its comment lines have them: a short name, and the tests to begin with
    "": ("head", ["backend", "unet", "samplers"]),
    "noise schedules": ("schedules", ["schedules"]),
    "the forward process": ("diffusion", ["diffusion"]),
    "samplers and guidance": ("samplers", ["samplers", "schedules"]),
    "parameters and layers": ("layers", ["layers", "unet"]),
    "U-Net": ("unet", ["unet", "layers"]),
    "training": ("training", ["training"]),
    "checkpoints": ("checkpoints", ["checkpoint"]),
    "likelihood": ("likelihood", ["diffusion"]),
    "the gradient check": ("gradients", ["gradients"])}
OWN = {short: [TESTS / f"test_{name}.py" for name in own] for short, own in SECTIONS.values()}

EQUIVALENT = {      # why no test can kill them; what their statement has, the original's not
    "NumPy takes any negative length for the one that is left": [
        "reshape(-2", "-1], -2)", "len(x0), -2)", "groups, -2)", "(-2, shape[-1])"],
    "a constant factor or the scale cancels": [
        "f * f[0]", "f / f[1]", "np.log(diffusion.snr) * 2", "np.log(diffusion.snr) / 3"],
    "nothing lies on that edge, or so far": [
        "<= 1.001", "<= most + 0.001", "x >= 0.999", "x <= -0.999", ">= 1e-300", "max_beta=2.0",
        "3 ** 62", "2 ** 63"],
    "the same, or the same but for its rounding": [
        "abs(d) <= 1", "if sigma else 1", "- 1e-20", "sum()) - 1e-12", "mean_loss - norm",
        "np.load(file) as", "# file.flush()", "step @ steps"],
    "it divides without a rest, and NumPy takes a whole float": [
        "(H * W * C / groups)", "repeat(C / groups, 1)", "(C / heads) **", "half = width / 2"],
    "only the speed": [
        "chunk=17", "budget=3 ** 18", "budget=2 ** 19", "budget=2 * 18",
        "x.astype(p.flat.dtype))", "dtype, copy=True)", "xp.ones(len(dy)) @",
        "xp.ones(B * H * W) @", "xp.ones((2, H * W), x.dtype)"],
}
ARBITRARY = (       # how statements begin, of gradient_table, whose numbers could be others
    "net = UNet((11, 13", "net.params.flat = 0.3", "t, y, x =", "return gradient_errors(")

# ----------------------------------------------------------------------------------- mutants

SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
         ast.Pow: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Div, ast.BitAnd: ast.BitOr,
         ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE,
         ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
         ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
         ast.NotIn: ast.In}
NAMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all",
         "all": "any"}


def changed(node, **fields):
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def replaced(node, name, i, *new):
    """A copy whose field `name`, a list, has these in the place of its element i."""
    items = getattr(node, name)
    return changed(node, **{name: [*items[:i], *new, *items[i + 1:]]})


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
                yield replaced(node, "ops", i, SWAPS[type(op)]())
        case ast.AugAssign(target, op, value):
            yield ast.Assign([target], value)
            yield changed(node, op=SWAPS[type(op)]())
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.UnaryOp(operand=operand):                      # -x, not x, ~x
            yield operand
        case (ast.If(test) | ast.IfExp(test) | ast.While(test)) if type(test) != ast.UnaryOp:
            yield changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.comprehension(ifs=[test]):
            yield changed(node, ifs=[ast.UnaryOp(ast.Not(), test)])
        case ast.Name(id) if id in NAMES:
            yield changed(node, id=NAMES[id])
        case ast.Attribute(attr=attr) if attr in NAMES:
            yield changed(node, attr=NAMES[attr])
        case ast.Call(args=args, keywords=keywords):
            for i in range(len(args) if len(args) > 1 else 0):
                yield replaced(node, "args", i)
            for i in range(len(keywords)):
                yield replaced(node, "keywords", i)
        case ast.Subscript(ast.Name(id), _) if id.isupper():    # a dict: no index to shift
            pass
        case ast.Subscript(slice=ast.Tuple(elts) as index):
            for i, elt in enumerate(elts):
                for more in one_more(elt):
                    yield changed(node, slice=replaced(index, "elts", i, more))
        case ast.Subscript(value, index) if not isinstance(value, ast.Dict):
            for more in one_more(index):
                yield changed(node, slice=more)
        case ast.Slice():
            for name in ("lower", "upper"):
                for more in one_more(getattr(node, name)):
                    yield changed(node, **{name: more})
        case ast.Return(value) if value is not None:
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Constant()):                          # a docstring
            pass
        case ast.Expr() | ast.Raise():
            yield ast.Pass()
        case ast.arguments():
            for name in ("defaults", "kw_defaults"):
                for i, one in enumerate(getattr(node, name)):
                    if isinstance(one, ast.Constant) and isinstance(one.value, str):
                        yield replaced(node, name, i, ast.Constant(f"another {one.value}"))


class Mutant:
    """holder[key], a node in stmt, replaced by another. function: the line of the innermost def
    around it, 0 for none. before, after: stmt's text, of a compound one its first line."""

    def __init__(self, holder, key, new, stmt, function):
        node, self.function = holder[key], function
        self.is_constant = isinstance(node, ast.Constant)
        self.line = getattr(node, "lineno", stmt.lineno)
        self.apply = lambda: holder.__setitem__(key, ast.fix_missing_locations(new))
        self.before = self.after = ast.unparse(stmt).partition("\n")[0]
        if isinstance(new, ast.Pass):
            self.after = f"pass  # {self.before}"
        else:
            self.apply()
            self.after = ast.unparse(holder[key] if node is stmt else stmt).partition("\n")[0]
            holder[key] = node


def mutants(owner, stmt=None, function=0):
    """All mutants of what the node `owner` has in it."""
    for field, value in ast.iter_fields(owner):
        holder = value if isinstance(value, list) else vars(owner)
        for key in range(len(value)) if isinstance(value, list) else [field]:
            node = holder[key]
            if not isinstance(node, ast.AST) or field in ("annotation", "decorator_list"):
                continue
            inner = node if isinstance(node, ast.stmt) else stmt
            scope = node.lineno if isinstance(node, ast.FunctionDef) else function
            for new in variants(node):
                yield Mutant(holder, key, new, inner, scope)
            if not isinstance(node, (ast.Raise, ast.JoinedStr)):
                yield from mutants(node, inner, scope)


# --------------------------------------------------------------------------------- the tests

SEEN = set()        # the lines of the defs entered, where the module was loaded traced


def load(tree, traced=False):
    """Make this tree the module tinyddpm; traced, every function notes that it was entered."""
    module = sys.modules["tinyddpm"] = types.ModuleType("tinyddpm")
    module.__file__, module.SEEN = str(SOURCE), SEEN
    for node in ast.walk(tree) if traced else ():
        if isinstance(node, ast.FunctionDef):
            node.body.insert(0, ast.parse(f"SEEN.add({node.lineno})").body[0])
    exec(compile(ast.fix_missing_locations(tree), SOURCE, "exec"), module.__dict__)


class Plugin:
    """Runs the tests named in `only` with their seconds, the slow ones last, or all; notes how
    long each took, what it entered, and which files fail. One that takes ten times as long as
    it should ends the process. No shrinking: that a test fails is all that is asked of it."""

    def __init__(self, only=None):
        self.only, self.found, self.at_import, self.bad = only, {}, defaultdict(set), set()

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self):
        settings.register_profile(
            "mutants", parent=settings.get_profile("default"), database=None,
            phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)
        settings.load_profile("mutants")

    def pytest_collectreport(self, report):
        self.at_import[report.nodeid] |= SEEN
        SEEN.clear()

    def pytest_exception_interact(self, node):
        self.bad.add(node.nodeid.split("::")[0])

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        if self.only is not None:
            kept = [item for item in items if item.nodeid in self.only]
            items[:] = sorted(kept, key=lambda item: self.only[item.nodeid] > 0.3)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        SEEN.clear()
        signal.alarm(round(20 + 10 * (self.only or {}).get(item.nodeid, 60)))
        start = time.perf_counter()
        result = yield
        seen = SEEN | self.at_import[item.nodeid.split("::")[0]]
        self.found[item.nodeid] = time.perf_counter() - start, seen
        return result


def pytest_passes(files, plugin, *options):
    return pytest.main([*map(str, files), "-p", "no:terminal", "-p", "no:cacheprovider",
                        f"--rootdir={ROOT}", *options], [plugin]) in (0, 5)     # 5: no tests


def in_a_fork(work):
    """What work() returns, in a process of its own; None where that fails or does not end."""
    with tempfile.TemporaryFile() as file:
        pid = os.fork()
        if not pid:
            os.setsid()
            signal.alarm(120)               # till the first test
            with contextlib.suppress(BaseException):        # the module itself may not load
                pickle.dump(work(), file)
                file.flush()
            os._exit(0)
        os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):       # what its tests may have started
            os.killpg(pid, signal.SIGKILL)
        file.seek(0)
        with contextlib.suppress(EOFError):
            return pickle.load(file)


def is_killed(tree, mutant, stages, found):
    """Whether a test fails of those that enter the mutant's function, in one of the stages."""
    tests = {name: seconds for name, (seconds, seen) in found.items()
             if not mutant.function or mutant.function in seen}

    def work():
        mutant.apply()                      # in the fork, so that nothing has to be undone
        load(tree)
        needed = {name.split("::")[0] for name in tests}
        return all(pytest_passes(some, Plugin(tests), "-x") for files in stages
                   if (some := [path for path in files if f"tests/{path.name}" in needed]))
    return in_a_fork(work) is not True


def record(tree, files):
    """Of the tests that pass on the unchanged module: their seconds and what they entered."""
    load(tree)
    pytest_passes(files, Plugin({}))        # so that a fork finds what they import loaded
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/")
        if name != "__main__" and path.parent in (ROOT, TESTS):
            del sys.modules[name]           # but not themselves
    gc.freeze()                             # nor does it copy what it only looks at

    def work():
        load(tree, traced=True)
        plugin = Plugin()
        pytest_passes(files, plugin, "--continue-on-collection-errors")
        return plugin.found, plugin.bad
    found, bad = in_a_fork(work) or ({}, ())
    for path in sorted(bad):
        print(f"left out: {path} fails without a mutation")
    return {name: one for name, one in found.items() if name.split("::")[0] not in bad}


def by_section(source, tree):
    """The mutants of each section by its short name, and those that are EQUIVALENT."""
    titles = [(i, line.lstrip("# -")) for i, line in enumerate(source.splitlines(), 1)
              if line.startswith("# -----")]
    assert {title for _, title in titles} == SECTIONS.keys() - {""}, titles
    signs = {one for some in EQUIVALENT.values() for one in some}
    kept, equivalent, known = defaultdict(dict), defaultdict(dict), set()
    for mutant in mutants(tree):
        title = [title for i, title in [(0, ""), *titles] if i < mutant.line][-1]
        same = {one for one in signs if one in mutant.after and one not in mutant.before}
        known |= same
        left_alone = (mutant.function == 0 and title in ("", "the gradient check")
                      or mutant.is_constant and mutant.before.startswith(ARBITRARY))
        if mutant.before != mutant.after and not left_alone:
            place = (equivalent if same else kept)[SECTIONS[title][0]]
            place.setdefault((mutant.function, mutant.line, mutant.after), mutant)
    for stale in signs - known:
        print("no longer a mutant:", stale)
    return {short: [*some.values()] for short, some in kept.items()}, equivalent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append", choices=OWN)
    parser.add_argument("--sample", type=int, default=100, help="mutants of a section; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="only the section's own files")
    options = parser.parse_args()

    start, began, source = time.monotonic(), time.time(), SOURCE.read_text()
    tree = ast.parse(source)
    sections, equivalent = by_section(source, tree)
    chosen = options.section or list(sections)
    own = {path for short in chosen for path in OWN[short]}
    files = [path for path in sorted(TESTS.glob("test_*.py")) if path in own or not (
        options.quick or path.name in ("test_demo.py", "test_pictures.py"))]
    found = record(tree, files)
    print(f"{len(found)} tests recorded in {time.monotonic() - start:.0f} s", flush=True)
    nothing = types.SimpleNamespace(function=0, apply=lambda: None)
    if not found or is_killed(tree, nothing, [files], found):
        raise SystemExit("without a mutation no test is left, or some fail in a fork")
    table = []
    for short in chosen:
        start, some, killed = time.monotonic(), sections[short], 0
        if 0 < options.sample < len(some):
            some = random.Random(options.seed).sample(some, options.sample)
        others = [] if options.quick else [path for path in files if path not in OWN[short]]
        for mutant in sorted(some, key=lambda mutant: mutant.line):
            if is_killed(tree, mutant, [OWN[short], others], found):
                killed += 1
            else:
                print(f"{mutant.line}: {mutant.before}\n   -> {mutant.after}", flush=True)
        table.append((len(some), len(sections[short]), killed, len(equivalent[short]),
                      time.monotonic() - start))
    print("\nsection       mutants        killed survived   score equivalent seconds")
    for short, row in zip([*chosen, "total"], [*table, map(sum, zip(*table))]):
        tried, of, killed, same, seconds = row
        print(f"{short:12}{tried:5} of {of:4}{killed:10}{tried - killed:9}"
              f"{100 * killed / tried:6.1f} %{same:11}{seconds:8.0f}")
    if edited := [path.name for path in files if path.stat().st_mtime > began]:
        print("not to be trusted, as these were edited meanwhile:", *edited)


if __name__ == "__main__":
    main()
