"""help() says something of everything public: what it is, and what it raises."""

import ast
import importlib
import inspect
import pkgutil
import textwrap

import pytest

import segkit

MODULES = [name for _, name, _ in pkgutil.walk_packages(segkit.__path__, "segkit.")]


def public(module):
    """(name, object) of the functions and classes that a module defines, and of the methods of these classes."""
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            yield name, thing
            for member, kind in vars(thing).items():
                function = kind.fget if isinstance(kind, property) else inspect.unwrap(getattr(kind, "__func__", kind))
                if inspect.isfunction(function) and not member.startswith("_") and function.__name__ != "<lambda>":
                    yield f"{name}.{member}", function


def documented(owner, name):
    """The docstring of a method in its class or in those of segkit that it comes from."""
    for base in owner.__mro__:
        if base.__module__.startswith("segkit") and name in vars(base):
            member = vars(base)[name]
            text = getattr(member.fget if isinstance(member, property) else member, "__doc__", None)
            if text:
                return text
    return None


def text_of(module, name, thing):
    if "." not in name:
        own = thing.__doc__ or ""
        made = inspect.isclass(thing) and own.startswith(f"{name}(")  # what dataclass writes where there is none
        return "" if made else own
    owner, member = name.split(".")
    return documented(getattr(module, owner), member)


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__doc__
    silent = [name for name, thing in public(module) if not text_of(module, name, thing)]
    assert silent == []


def test_what_is_raised_is_said():
    """Of each public function that raises by itself, for other callers than the shell."""
    unsaid, seen = [], 0
    for name in MODULES:
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        for each, thing in public(module):
            if not inspect.isfunction(thing):
                continue
            tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
            raised = {
                ast.unparse(node.exc).split("(")[0]
                for node in ast.walk(tree)
                if isinstance(node, ast.Raise) and node.exc
            }
            errors = {error for error in raised if error.endswith(("Error", "Interrupt"))}
            seen += len(errors)
            text = text_of(module, each, thing) or ""
            unsaid += [f"{name}.{each}: {error}" for error in errors if error not in text and "Raises" not in text]
    assert unsaid == [] and seen > 50


def test_the_tour_is_what_help_shows():
    assert "not for diagnosis" in segkit.__doc__ and inspect.getdoc(segkit).startswith("segkit: ")
