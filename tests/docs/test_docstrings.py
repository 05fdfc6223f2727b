"""Every public name says what it is, and the public classes what each of their arguments is."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import diffusers_dino

PACKAGE = "diffusers_dino"
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(diffusers_dino.__path__, f"{PACKAGE}.")
    if not module.name.startswith((f"{PACKAGE}.cli", f"{PACKAGE}.__main__"))
)
CLASSES = (
    diffusers_dino.DinoImageConditioner,
    diffusers_dino.DinoDiffusionPipeline,
    diffusers_dino.DinoInterpolationPipeline,
    diffusers_dino.DiffSegPipeline,
    diffusers_dino.DinoPrior,
    diffusers_dino.DinoPriorPipeline,
)


def undocumented(module) -> list[str]:
    """Public names of a module, and public methods of its classes, that say nothing of themselves.

    A method may leave it to the one that it overrides, which has to be one of this package.
    """
    silent = [] if (module.__doc__ or "").strip() else [module.__name__]
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.isfunction(value) and not value.__doc__:
            silent.append(name)
        elif inspect.isclass(value) and value.__module__ == module.__name__:
            if not _own_docstring(value):
                silent.append(name)
            silent += [f"{name}.{method}" for method in public_methods(value) if not _documented(value, method)]
    return silent


def _own_docstring(kind: type) -> str:
    """What stands in the source: dataclasses are given a docstring that repeats their signature."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    return ast.get_docstring(tree.body[0]) or ""


def public_methods(kind: type) -> list[str]:
    kinds = (staticmethod, classmethod, property)
    return [
        name
        for name, value in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))
    ]


def _documented(kind: type, name: str) -> bool:
    own = [vars(base)[name] for base in kind.__mro__ if name in vars(base) and _package(base) == _package(kind)]
    return any((inspect.getdoc(value) or "").strip() for value in own)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    assert undocumented(importlib.import_module(name)) == []


def arguments_left_out(kind: type, name: str) -> list[str]:
    """Parameters of a method that its docstring does not name.

    One that refers to `__call__` need not say again what that says, nor one that overrides a method of diffusers,
    transformers or torch what that one takes.
    """
    method = inspect.unwrap(getattr(kind, name))
    docstring = inspect.getdoc(getattr(kind, name)) or ""
    if re.search("`(__call__|attention_maps)`", docstring):
        docstring += inspect.getdoc(kind.__call__) or ""
    foreign = [base for base in kind.__mro__ if _package(base) != _package(kind) and name in vars(base)]
    inherited = set(inspect.signature(getattr(foreign[0], name)).parameters) if foreign else set()
    named = set(re.findall(r"^\s*\*{0,2}(\w+)(?: \([^)]*\))?:", docstring, re.MULTILINE)) | set(
        re.findall(r"`(\w+)`", docstring)
    )
    parameters = set(inspect.signature(method).parameters) - {"self", "cls", "args", "kwargs"}
    return sorted(parameters - named - inherited)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, id=f"{kind.__name__}.{name}")
        for kind in CLASSES
        for name in sorted(dir(kind))
        if (name == "__call__" or not name.startswith("_"))
        and inspect.isroutine(getattr(kind, name))
        and inspect.unwrap(getattr(kind, name)).__module__.startswith(PACKAGE)
    ],
)
def test_arguments_of_the_public_classes_are_documented(kind, name):
    assert arguments_left_out(kind, name) == []
