"""Names for what is plugged in: equal only for what computes the same, so that they can stand in fingerprints.

A name holds the class, the options and the code of everything that is not ditkit's own. Leaves out: stages, which are
named by the files that hold them (``execution/records.py``)."""

import dis
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import PurePath
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any
from uuid import uuid4

from ditkit.sources import GROUND, files_of, is_installed, is_ours, named, version_of
from ditkit.state import digest

FORGETS = "forgets its memory: "

_SAY_ALL = {"builtins.range", "builtins.slice", "builtins.bytearray", "builtins.ellipsis", "re.RegexFlag",
            "torch.dtype", "torch.device", "torch.Size", "torch.layout", "torch.memory_format", "fractions.Fraction",
            "decimal.Decimal", "typing.TypeVar", "typing.ParamSpec"}  # fmt: skip
"""Types whose ``repr`` says all of a value."""
_PLAIN = (str, bytes, int, float, complex)
_unnamed: dict[int, tuple[Any, str]] = {}


class _Unknowable(Exception):
    """Something that code depends on has no name that would tell it from others."""


def identify(plug: Any) -> str:
    """Return a name for ``plug``; two plugs have equal names only if they compute the same.

    A ``fingerprint`` attribute is believed. A frozen dataclass is its class, its options and, outside of ditkit, its
    code; a function and a class are name and code. Code counts with the functions, classes, plain values and files of
    modules that it reads by global names. Plain values and tensors are their content. Whatever else could hide a
    difference (a closure, a mutable object) gets a name that no other object and no other process has."""
    given = getattr(plug, "fingerprint", None)
    if isinstance(given, str):
        return given
    try:
        return _named(plug, ())
    except _Unknowable:
        name = f"{getattr(plug, '__module__', '?')}.{getattr(plug, '__qualname__', type(plug).__qualname__)}"
        # The object is kept, so that its id is never given to another.
        return _unnamed.setdefault(id(plug), (plug, f"{name}#{uuid4().hex}"))[1]


def described(plug: Any) -> str:
    """The name of a plug, and whether it cannot save what it remembers (``saves_memory = False``)."""
    return ("" if getattr(plug, "saves_memory", True) else FORGETS) + identify(plug)


def forgets(plugs: Mapping[str, Any]) -> bool:
    """Whether one of these descriptions, by seam, is of a plug that cannot save what it remembers."""
    return any(name.startswith(FORGETS) for names in plugs.values() for name in names)


def _named(value: Any, seen: tuple[Any, ...]) -> str:
    """``seen``: the functions and classes that are being looked at; a name within its own code stands for itself."""
    given = None if isinstance(value, type) else getattr(value, "fingerprint", None)
    if isinstance(given, str):
        return given
    if value is None or type(value) in (str, bytes, int, float, complex, bool):
        return repr(value)
    if isinstance(value, re.Pattern):
        return f"re.Pattern {value.pattern!r} {value.flags}"  # its own repr is cut
    if type(value) in (tuple, list, set, frozenset):
        items = [_named(item, seen) for item in value]
        return f"{type(value).__name__}[{', '.join(items if isinstance(value, tuple | list) else sorted(items))}]"
    if isinstance(value, Mapping) and type(value) in (dict, MappingProxyType):
        items = [f"{_named(key, seen)}: {_named(entry, seen)}" for key, entry in value.items()]
        return f"{type(value).__name__}{{{', '.join(items)}}}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if kind in _SAY_ALL or isinstance(value, PurePath):
        return f"{kind} {value!r}"
    if kind in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        return digest(value)
    if kind.startswith("numpy.") and hasattr(value, "tobytes") and not value.dtype.hasobject:
        return f"{kind} {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, str | bytes | int | float | complex) and not kind.startswith("numpy."):
        return f"{_class(type(value), seen)} {next(t for t in _PLAIN if isinstance(value, t)).__repr__(value)}"
    if type(value) is partial:
        return f"partial({_global(value.func, seen)}, {_named(value.args, seen)}, {_named(value.keywords, seen)})"
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}@{digest(_function(value, seen))[:16]}"
    if isinstance(value, type):
        return _class(value, seen)
    if is_dataclass(value) and type(value).__dataclass_params__.frozen:  # type: ignore[union-attr]
        names = {f.name for f in fields(value)}
        if {*getattr(value, "__dict__", {})} - names:  # set behind the back of its fields
            raise _Unknowable
        options = ", ".join(f"{f.name}={_named(getattr(value, f.name), seen)}" for f in fields(value))
        return f"{_class(type(value), seen)}({options})"
    raise _Unknowable


def _class(cls: type, seen: tuple[Any, ...]) -> str:
    """Its name, and its code and that of its bases where they are not ditkit's own or of a package that it uses."""
    name, package = f"{cls.__module__}.{cls.__qualname__}", cls.__module__.partition(".")[0]
    bases = () if is_ours(cls.__module__) else cls.__mro__
    own = [b for b in bases if b.__module__.partition(".")[0] == package or not is_installed(b.__module__)]
    if not own or cls in seen:
        return name
    members = [(base, n, v) for base in own for n, v in sorted(vars(base).items()) if n not in _SKIPPED]
    said = {f"{base.__qualname__}.{n}": _member(v, (*seen, cls)) for base, n, v in members}
    others = [b for b in bases if b not in own and b.__module__.partition(".")[0] not in GROUND]
    said |= {b.__qualname__: what for b in others if (what := version_of(b.__module__))}
    if not is_installed(type(cls).__module__):
        said["metaclass"] = _class(type(cls), (*seen, cls))
    return f"{name}@{digest(said)[:16]}"


_SKIPPED = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__annotations__",
            "__static_attributes__", "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__annotate__",
            "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl", "__replace__",
            "__parameters__", "__orig_bases__", "__subclasshook__"}  # fmt: skip
_MADE = {f"__{name}__" for name in ("init", "repr", "eq", "hash", "setattr", "delattr", "lt", "le", "gt", "ge")}
"""Methods that the dataclass decorator makes out of the fields; they have no file."""


def _member(value: Any, seen: tuple[Any, ...]) -> Any:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        return [_member(part, seen) for part in (value.fget, value.fset) if part is not None]
    value = getattr(value, "func", value) if type(value).__name__ == "cached_property" else value
    if type(value).__name__ == "_lru_cache_wrapper":
        value = value.__wrapped__
    decorated = isinstance(value, FunctionType) and hasattr(value, "__wrapped__")
    if decorated and is_installed(value.__globals__.get("__name__", "")):
        cells = [_cell(cell.cell_contents, seen) for cell in value.__closure__ or ()]
        return [value.__code__.co_qualname, version_of(value.__globals__["__name__"]), cells]
    if isinstance(value, FunctionType):
        made = value.__name__ in _MADE and value.__code__.co_filename == "<string>"
        return "" if made else _function(value, seen)
    if type(value).__name__ in ("member_descriptor", "getset_descriptor"):  # slots
        return ""
    return _named(value, seen)


def _cell(value: Any, seen: tuple[Any, ...]) -> Any:
    """What a decorator of a package, such as ``torch.no_grad()``, holds of what it decorates and of its own options."""
    if isinstance(value, FunctionType):
        return _member(value, seen)
    if isinstance(value, MethodType):
        return [value.__func__.__qualname__, _cell(value.__self__, seen)]
    kind = type(value).__module__
    if is_installed(kind) and kind != "builtins" and hasattr(value, "__dict__"):
        return [f"{kind}.{type(value).__qualname__}", {k: _named(v, seen) for k, v in sorted(vars(value).items())}]
    return _global(value, seen)


def _function(function: FunctionType, seen: tuple[Any, ...]) -> Any:
    """Its code, its defaults and what it reads of the world. A closure may hold anything but the class of super()."""
    if function in seen:
        return "itself"
    seen = (*seen, function)
    if {*function.__code__.co_freevars} - {"__class__"}:
        raise _Unknowable
    defaults = [_named(value, seen) for value in function.__defaults__ or ()]
    more = {name: _named(value, seen) for name, value in sorted((function.__kwdefaults__ or {}).items())}
    names = sorted({name for code in _codes(function.__code__) for name in code.co_names} & {*function.__globals__})
    world = {name: _global(function.__globals__[name], seen) for name in names}
    own = {name: _named(value, seen) for name, value in sorted(vars(function).items()) if name != "__wrapped__"}
    inside = {name: what for name in sorted(_imported(function)) if (what := _import(name)) is not None}
    return [_code(function.__code__), defaults, more, world, own, inside]


def _global(value: Any, seen: tuple[Any, ...]) -> Any:
    if isinstance(value, ModuleType):
        installed = is_installed(value.__name__)
        return [value.__name__, version_of(value.__name__) if installed else files_of(value.__name__)]
    module, name = getattr(value, "__module__", None) or type(value).__module__, getattr(value, "__qualname__", None)
    if name is None and type(value).__qualname__ == "ufunc":  # of numpy
        name = value.__name__
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, ModuleType | type) and callable(value):  # a method and its object
        return [f"{module}.{name} {version_of(str(module))}", _named(owner, seen)]
    if is_installed(module) and isinstance(name, str) and "<locals>" not in name and callable(value):
        return f"{module}.{name} {version_of(module)}"
    if type(value).__module__ == "typing":
        return repr(value)
    return _named(value, seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """``code`` and that of the functions in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _imported(function: FunctionType) -> set[str]:
    """The modules that a function imports when it runs, and what of them, which may be modules as well."""
    found, package = set[str](), str(function.__globals__.get("__package__") or "")
    for code in _codes(function.__code__):
        steps = [*dis.get_instructions(code)]
        for level, members, step in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":
                base = "." * (level.argval or 0) + step.argval
                found |= {*(named(base, package, members.argval or ()) or [base])}
    return found


def _import(name: str) -> Any:
    """The version of a package, the hashes of any other module's files, None for what is no module."""
    package = name.partition(".")[0]
    if is_ours(package) or is_installed(package):
        return version_of(package) if package == name else None
    if not (files := files_of(name)) and ("." not in name or name.startswith(".")):
        raise _Unknowable
    return files or None


def _code(code: CodeType) -> list[Any]:
    """What a function does, as plain values; where it stands in its file does not count."""

    def constant(value: Any) -> Any:
        if isinstance(value, CodeType):
            return _code(value)
        return f"frozenset{sorted(map(repr, value))}" if isinstance(value, frozenset) else repr(value)

    taken = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    return [taken, code.co_code.hex(), list(code.co_names), list(code.co_varnames), [*map(constant, code.co_consts)]]
