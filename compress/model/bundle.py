"""The Python files of a checkpoint: what transformers runs where this package is not installed.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` finds the classes by `auto_map` of config.json.
The files are this package's own modules with what a loaded model does not need left out (the fits, the menus of sizes)
and with imports of one another as transformers follows them, `from .file import name`. Nothing is written twice.

What is needed is found by name: from the roots, every definition that a needed one names, and of a class its fields,
its special methods, the methods that override those of a library, and every method that is named as an attribute
anywhere in what is needed.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path

PACKAGE = __name__.partition(".")[0]
CONFIG, MODEL = "compress.model.config", "compress.model.decoder"
ENTRY = "modeling_procrustes"
"""The file, without its suffix, of config and model. One file: transformers gives each file of `auto_map` a package of
its own with all that it imports, and a class would be another in each."""
SELF = f"from .{ENTRY} "
ROOTS = ((CONFIG, "ProcrustesConfig"), (MODEL, "ProcrustesForCausalLM"))
STRUCTURES, SKIPS = "compress.structures", "compress.model.skips"
AUTO_MAP = {
    "AutoConfig": f"{ENTRY}.ProcrustesConfig",
    "AutoModelForCausalLM": f"{ENTRY}.ProcrustesForCausalLM",
}

REPLACED = {
    ("compress.structures.base", "registry"): (
        "def registry() -> dict[str, type[Structure]]:\n"
        '    """Name -> class of every structure; modeling_procrustes.py imports them all."""\n'
        "    return dict(sorted(_REGISTRY.items()))"
    ),
    # transformers itself copies the files of a class that is registered for an auto class, see `_registered`.
    ("compress.model.config", "ProcrustesConfig.save_pretrained"): "",
}
"""(module, definition) -> the text in its place: what looks for modules or files of this package."""
LEFT_OUT = ("fit", "dense", "menu", "curve", "ranked", "estimate", "factors", "for_ratio", "random_factors")
"""Methods of structures and skips that choose and make factors and that no loaded model calls, though others of the
same names are called in it."""

_HEADER = """\
# Written with the checkpoint by procrustes-llm, from {modules}: see there for the whole.
# A file beside a model is run by transformers with trust_remote_code=True only; where procrustes-llm is installed it is
# never run.
"""


def write_bundle(folder: Path) -> None:
    """Write the Python files into a checkpoint's folder; config.json names them with `AUTO_MAP`."""
    for name, text in bundle().items():
        (folder / name).write_text(text, encoding="utf-8")


@lru_cache(maxsize=1)
def bundle() -> dict[str, str]:
    """File name -> its text, in the order of their names."""
    needed = _Needed()
    modules = defaultdict(list)
    for module in sorted(needed.definitions):
        modules[_file(module)].append(module)
    return {f"{file}.py": needed.text(modules[file]) for file in sorted(modules)}


def _file(module: str) -> str:
    return ENTRY if module in (CONFIG, MODEL) else module.replace(f"{PACKAGE}.", "procrustes_", 1).replace(".", "_")


def _module_path(name: str) -> Path | None:
    """The file of a module of this package, None where there is none of that name."""
    parts = name.split(".")
    path = Path(__file__).resolve().parents[1].joinpath(*parts[1:])
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else None


class _Module:
    """One module as definitions by name and what its names mean."""

    def __init__(self, name: str) -> None:
        path = _module_path(name)
        assert path is not None, name
        self.name, self.source = name, path.read_text(encoding="utf-8")
        self.lines = self.source.splitlines()
        self.tree = ast.parse(self.source)
        self.defined: dict[str, ast.stmt] = {}
        self.internal: dict[str, tuple[str, str]] = {}
        self.external: dict[str, str] = {}
        for node in self.tree.body:
            for defined in _names_of(node):
                self.defined[defined] = node
            if isinstance(node, ast.ImportFrom) and _is_ours(node):
                self.internal.update({(a.asname or a.name): (str(node.module), a.name) for a in node.names})
            elif isinstance(node, ast.Import | ast.ImportFrom):
                self.external.update({(a.asname or a.name.split(".")[0]): _statement(node, a) for a in node.names})


def _is_ours(node: ast.ImportFrom) -> bool:
    return str(node.module).partition(".")[0] == PACKAGE


def _home(module: str, name: str) -> tuple[str, str]:
    """(module, name) of what `from module import name` gives, where a package has it from one of its modules."""
    if _module_path(f"{module}.{name}") is not None:
        raise ValueError(f"{module}.{name} is a module: what a checkpoint needs is imported by name")
    homes = getattr(import_module(module), "_HOME", {})
    return (f"{module}.{homes[name]}", name) if name in homes else (module, name)


def _statement(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> str:
    name = alias.name + (f" as {alias.asname}" if alias.asname else "")
    return f"from {node.module} import {name}" if isinstance(node, ast.ImportFrom) else f"import {name}"


def _names_of(node: ast.stmt) -> list[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


class _Needed:
    """The definitions that the roots need, found until nothing new is."""

    def __init__(self) -> None:
        self.modules: dict[str, _Module] = {}
        self.definitions: dict[str, set[str]] = defaultdict(set)
        self.attributes: set[str] = set()
        self.inherited: dict[tuple[str, str], bool] = {}
        self.structures = sorted(_registered_structures())
        for module, name in (*ROOTS, *self.structures):
            self._need(module, name)
        size = -1
        while size != (size := len(self.attributes) + sum(map(len, self.definitions.values()))):
            for module in list(self.definitions):
                for name in sorted(self.definitions[module]):
                    self._visit(self.module(module), name)

    def module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _Module(name)
        return self.modules[name]

    def _need(self, module: str, name: str) -> None:
        found = self.module(module)
        if name in found.defined:
            self.definitions[module].add(name)
        elif name in found.internal:
            self._need(*_home(*found.internal[name]))

    def _visit(self, module: _Module, name: str) -> None:
        for node in self.parts(module, module.defined[name]):
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute):
                    self.attributes.add(part.attr)
                elif isinstance(part, ast.Name):
                    self._need(module.name, part.id)
                elif isinstance(part, ast.ImportFrom) and _is_ours(part):
                    for alias in part.names:
                        self._need(*_home(str(part.module), alias.name))

    def parts(self, module: _Module, node: ast.stmt) -> Iterator[ast.AST]:
        """What of a definition is needed: of a class without the methods that nobody calls."""
        replaced = REPLACED.get((module.name, _names_of(node)[0]))
        if replaced is not None:
            yield ast.parse(replaced)
        elif isinstance(node, ast.ClassDef):
            yield from (*node.bases, *node.decorator_list, *(k.value for k in node.keywords))
            yield from (part for part in node.body if self.keeps(module, node, part))
        else:
            yield node

    def keeps(self, module: _Module, owner: ast.ClassDef, part: ast.stmt) -> bool:
        """Whether a part of a needed class is needed."""
        if not isinstance(part, ast.FunctionDef):
            return True
        if (module.name, f"{owner.name}.{part.name}") in REPLACED:
            return False
        if part.name in LEFT_OUT and module.name.startswith((STRUCTURES, SKIPS)):
            return False
        special = part.name.startswith("__") and part.name.endswith("__")
        return special or part.name in self.attributes or self._is_library_class(module, owner)

    def _is_library_class(self, module: _Module, owner: ast.ClassDef) -> bool:
        """Whether a class derives from one of a library, which may call any of its methods."""
        key = (module.name, owner.name)
        if key not in self.inherited:
            self.inherited[key] = any(self._is_library(module, base) for base in owner.bases)
        return self.inherited[key]

    def _is_library(self, module: _Module, base: ast.expr) -> bool:
        if not isinstance(base, ast.Name):
            return True  # nn.Module
        if base.id not in module.defined and base.id not in module.internal:
            return base.id not in ("ABC", "Protocol")
        home = (module.name, base.id) if base.id in module.defined else _home(*module.internal[base.id])
        other = self.module(home[0])
        node = other.defined[home[1]]
        return isinstance(node, ast.ClassDef) and self._is_library_class(other, node)

    # ---- the text

    def text(self, modules: Sequence[str]) -> str:
        """The file of these modules, one after the other."""
        docs, imports, bodies = [], list[str](), []
        for name in modules:
            module = self.module(name)
            body, names = self._body(module)
            docs.append(str(ast.get_docstring(module.tree, clean=False)))
            imports += self._imports(module, names)
            bodies.append(body)
        relative = [statement for statement in imports if statement.startswith("from .")]
        blocks = [_joined(set(imports) - set(relative)), _joined(s for s in relative if not s.startswith(SELF))]
        parts = [
            _HEADER.format(modules=" and ".join(modules)) + '"""' + "\n\n".join(docs) + '"""',
            "\n".join((_FUTURE, *("\n".join(("", *block)) for block in blocks if block))),
        ]
        return "\n\n".join(parts) + "\n\n\n" + "\n\n\n".join((*bodies, *map(_registered, modules))).rstrip("\n") + "\n"

    def _body(self, module: _Module) -> tuple[str, set[str]]:
        """The needed definitions of a module, and the names that they read."""
        body, after, kept, names = [], 0, False, set[str]()
        for node in module.tree.body:
            start, after = after, node.end_lineno or 0
            if isinstance(node, ast.Import | ast.ImportFrom) or node is module.tree.body[0]:
                continue  # the docstring of the module
            if not _is_docstring(node):  # that of a constant goes with it
                kept = self._keeps_statement(module, node)
            if not kept:
                continue
            replaced = [REPLACED[module.name, n] for n in _names_of(node) if (module.name, n) in REPLACED]
            body.append(replaced[0] if replaced else "\n".join(self._lines(module, node, start)))
            for part in self._shown(module, node):
                names |= {each.id for each in ast.walk(part) if isinstance(each, ast.Name)}
        return "\n".join(body).strip("\n"), names

    def _shown(self, module: _Module, node: ast.stmt) -> Iterator[ast.AST]:
        return self.parts(module, node) if _names_of(node) else iter((node,))

    def _keeps_statement(self, module: _Module, node: ast.stmt) -> bool:
        if names := _names_of(node):
            return bool(self.definitions[module.name] & set(names))
        # What changes a definition (a loop that adds to a table) goes with it.
        named = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & module.defined.keys()
        return bool(named) and named <= self.definitions[module.name]

    def _lines(self, module: _Module, node: ast.stmt, start: int) -> list[str]:
        """The source of a statement with the comments before it, without the methods that nobody calls."""
        end, gone = node.end_lineno or 0, set[int]()
        if isinstance(node, ast.ClassDef):
            last = node.lineno
            for member in node.body:
                first, last = last, member.end_lineno or 0
                if not self.keeps(module, node, member):
                    gone |= set(range(first, last))
        lines = dict(enumerate(module.lines[start:end], start))
        for part in ast.walk(node):
            if isinstance(part, ast.ImportFrom) and _is_ours(part) and part.lineno - 1 not in gone:
                gone |= set(range(part.lineno, part.end_lineno or 0))
                indent = " " * part.col_offset
                homes = [_home(str(part.module), alias.name) for alias in part.names]
                relative = [f"{indent}from .{_file(home)} import {name}" for home, name in homes]
                lines[part.lineno - 1] = "\n".join(relative)
        return [line for number, line in lines.items() if number not in gone]

    def _imports(self, module: _Module, names: set[str]) -> Iterator[str]:
        """A statement for each name that a module takes from elsewhere."""
        yield from (module.external[name] for name in names & module.external.keys())
        needed = {_home(*module.internal[name]) for name in names & module.internal.keys()}
        if module.name == CONFIG:  # which looks structures up by name
            needed |= set(self.structures)
        yield from (f"from .{_file(home)} import {name}" for home, name in needed)


def _joined(statements: Iterable[str]) -> list[str]:
    """Imports in order, those from one module in one statement."""
    found, plain = defaultdict(set), set()
    for statement in statements:
        head, is_from, name = statement.partition(" import ")
        if is_from:
            found[head].add(name)
        else:
            plain.add(statement)
    return [*sorted(plain), *(f"{head} import {', '.join(sorted(found[head]))}" for head in sorted(found))]


_FUTURE = "from __future__ import annotations"


def _registered_structures() -> Iterator[tuple[str, str]]:
    """(module, class) of every structure that checkpoints may have."""
    registry = import_module(f"{STRUCTURES}.base").registry
    return ((cls.__module__, cls.__name__) for cls in registry().values() if cls.__module__.startswith(STRUCTURES))


def _registered(module: str) -> str:
    """The last line of a file: so that `save_pretrained` of a model that was loaded from it copies the files."""
    lines = {
        CONFIG: 'ProcrustesConfig.register_for_auto_class("AutoConfig")',
        MODEL: 'ProcrustesForCausalLM.register_for_auto_class("AutoModelForCausalLM")',
    }
    return lines.get(module, "")
