"""The arithmetic in a recipe, ``eval(num_epochs - 2)``, evaluated without running any code.

The language is that of SparseML 1.8's recipes: numbers, variables, operators and a few functions. Nothing
else of Python is read, and numbers stay so small that no expression takes long.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

Number = int | float
_LONGEST = 1000  # characters
_BITS = 1024  # of whole numbers; floats end there, too
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "float": float,
    "floor": math.floor,
    "int": int,
    "max": max,
    "min": min,
    "round": round,
}


class ExpressionError(ValueError):
    """An expression cannot be evaluated; says why in a clause without a full stop."""


class UnknownName(ExpressionError):
    """An expression names a variable that there is not.

    Attributes:
        name: of the variable.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no variable {name!r}")
        self.name = name


def inside(value: Any) -> str | None:
    """The expression in ``eval(EXPRESSION)``; None for whatever is not of this form."""
    if isinstance(value, str) and value.startswith("eval(") and value.endswith(")"):
        return value[5:-1].strip()
    return None


def names_in(expression: str) -> set[str]:
    """Names of the variables that an expression uses.

    Raises:
        ExpressionError: it is no expression.
    """
    nodes = list(ast.walk(_parsed(expression)))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}


def evaluate(expression: str, variables: Mapping[str, Number]) -> Number:
    """Compute an expression.

    Args:
        expression: arithmetic of numbers, variables, ``+ - * / // % **``, parentheses, and the functions
            ``abs ceil float floor int max min round``.
        variables: values by name.

    Returns:
        A finite number.

    Raises:
        ExpressionError: it holds anything else, divides by zero, or a number in it grows beyond 2^1024.
    """
    try:
        return _value(_parsed(expression), variables)
    except ZeroDivisionError as error:
        raise ExpressionError("it divides by zero") from error
    except OverflowError as error:
        raise ExpressionError("a number in it is too large") from error
    except RecursionError as error:
        raise ExpressionError("it is nested too deeply") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError(f"a function in it is called wrongly ({error})") from error


def _parsed(expression: str) -> ast.expr:
    if len(expression) > _LONGEST:
        raise ExpressionError(f"it has more than {_LONGEST} characters")
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError("it is no arithmetic expression") from error


def _value(node: ast.expr, variables: Mapping[str, Number]) -> Number:
    """The value of a part of an expression."""
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return _bounded(node.value)
        case ast.Name(id=name):
            if name not in variables:
                raise UnknownName(name)
            return variables[name]
        case ast.UnaryOp(op=op) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(node.operand, variables)))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, variables), _value(right, variables))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(left, variables), _value(right, variables)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            values = [_value(arg, variables) for arg in args]
            if name == "round" and len(values) == 2 and abs(values[1]) > 300:
                raise ExpressionError("it rounds to more than 300 places")
            return _bounded(_FUNCTIONS[name](*values))
    part = ast.unparse(node)
    raise ExpressionError(
        f"{part[:40]!r} is not allowed in it: only numbers, variables, + - * / // % **, and "
        f"{', '.join(_FUNCTIONS)}"
    )


def _power(base: Number, exponent: Number) -> Number:
    """Raise to a power whose size is known before it is computed."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent * base.bit_length() > _BITS:
        raise ExpressionError("a number in it is too large")
    return _bounded(base**exponent)


def _bounded(value: Any) -> Number:
    if isinstance(value, int) and value.bit_length() <= _BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ExpressionError("a number in it is too large, or not real")
