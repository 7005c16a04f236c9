"""Renders a chat template as transformers does: jinja2's immutable sandbox with its filters, functions and blocks.

A template comes with a downloaded tokenizer, so it is untrusted code. In addition to the restrictions of the sandbox,
one rendering has a budget of steps, of seconds, and of characters per value: a template that loops forever or builds
huge strings raises an error instead of hanging the process.
"""

import contextlib
import datetime
import functools
import json
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from lcx.errors import UserError

Spans = tuple[tuple[int, int], ...]

_MAX_STEPS = 5_000_000  # per rendering: 1 for each loop iteration, several for a call
_CALL_STEPS = 8
_MAX_SECONDS = 30.0
_MAX_SIZE = 1 << 26  # characters of a string, items of a list, bits of an integer
_MAX_ARGUMENT = 10_000_000  # a number (width, count) passed to a function or to one of these filters
_SIZED_FILTERS = frozenset(("batch", "center", "format", "indent", "slice", "tojson", "truncate", "wordwrap"))
_CHECK_EVERY = 1 << 12


class RenderError(Exception):
    """A template that cannot be compiled or rendered; the message is one line, without the location."""


class Program:
    """A compiled template.

    `render` returns the text and the character ranges of its `{% generation %}` blocks (none if the template has no
    such blocks). `now` is the time that `strftime_now` formats: the same for all conversations, so that two renderings
    of one conversation never differ because of it.
    """

    def __init__(self, source: str, *, now: datetime.datetime):
        self._environment = _environment(now)
        with _one_line():
            self._template = self._environment.from_string(source)
        self.marks_generation = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self.reads_clock = "strftime_now" in source

    def render(self, variables: dict[str, Any]) -> tuple[str, Spans]:
        """(text, ranges of the generation blocks). Raises RenderError for every kind of failure in the template."""
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        budget = self._environment.budget
        with _one_line():
            budget.start()
            with self._environment.tracked(blocks, spans):
                for block in self._template.generate(**variables):
                    blocks.append(block)
                    budget.size(len(block))
            text = "".join(blocks)
            text.encode()  # raises for unpaired surrogates, which have no encoding
        return text, tuple(spans)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except RenderError:
        raise
    except RecursionError:
        raise RenderError("it recurses without end") from None
    except MemoryError:
        raise RenderError("it needs more memory than is available") from None
    except Exception as error:  # a template is a program and can raise any exception
        line = getattr(error, "lineno", None)  # of a syntax error
        where = f"line {line}: " if line else ""
        text = " ".join(str(error).split()) or type(error).__name__
        raise RenderError(f"{where}{text[:300]}") from None


class _Budget:
    """The limits on steps, time and size of one rendering, and what has been used."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.steps, self.deadline = 0, time.monotonic() + _MAX_SECONDS

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > _MAX_STEPS:
            raise RenderError(f"it takes more than {_MAX_STEPS} steps for one conversation")
        if self.steps % _CHECK_EVERY < count and time.monotonic() > self.deadline:
            raise RenderError(f"it takes more than {_MAX_SECONDS:.0f} seconds for one conversation")

    def size(self, size: float) -> None:
        if size > _MAX_SIZE:
            raise RenderError(f"it makes a value of more than {_MAX_SIZE} characters or items")

    def result(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | bytes):
            self.size(len(value))
        return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | bytes) else 0


def _check_operands(budget: _Budget, operator: str, left: Any, right: Any) -> None:
    """Refuses products, powers, sums and formatted strings that would be huge, before they are computed."""
    if operator == "*":
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and _size(other):
                budget.size(one * _size(other))
        if isinstance(left, int) and isinstance(right, int):
            budget.size(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        budget.size(left.bit_length() * abs(right))
    elif operator == "+":
        budget.size(_size(left) + _size(right))
    elif operator == "%" and isinstance(left, str):
        _check_width(left)


def _check_width(text: str) -> None:
    """Refuses formats such as %999999999d, which create a string of that size."""
    if re.search(r"\d{7}", text):
        raise RenderError("it formats to a width of more than six digits")


def _check_arguments(args: Iterable[Any]) -> None:
    if any(type(value) is int and abs(value) > _MAX_ARGUMENT for value in args):
        raise RenderError(f"it calls a function with a number above {_MAX_ARGUMENT}")


def _checked_filter(budget: _Budget, name: str, function: Any) -> Any:
    @functools.wraps(function)  # keeps the mark that tells jinja which context to pass to the filter
    def checked(*args, **kwargs):
        budget.step(_CALL_STEPS)
        if name in _SIZED_FILTERS:
            _check_arguments((*args[1:], *kwargs.values()))
        return budget.result(function(*args, **kwargs))

    return checked


def _environment(now: datetime.datetime) -> Any:
    """The sandbox, with the filters and functions that transformers' `_compile_jinja_template` adds to it."""
    try:
        import jinja2.ext
    except ImportError as error:
        raise UserError("chat templates need jinja2: pip install 'jinja2>=3.1.6'") from error
    kind = _sandbox_class()
    environment = kind(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(), jinja2.ext.loopcontrols]
    )

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = tojson  # jinja's own escapes <, > and &
    for name, function in environment.filters.items():
        environment.filters[name] = _checked_filter(environment.budget, name, function)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: now.strftime(format)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _namespace_class()
    return environment


class _Dict:
    """`dict` for templates: an instance, so that templates cannot access the class."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


@functools.cache
def _namespace_class() -> Any:
    import jinja2

    class Namespace(jinja2.utils.Namespace):
        """`namespace` without names that begin with an underscore."""

        def __init__(*args, **kwargs):
            self, *rest = args
            values = dict(*rest, **kwargs)
            for name in values:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            _check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace cannot hold {name!r}: it begins with _")

    return Namespace


@functools.cache
def _sandbox_class() -> Any:
    from jinja2.runtime import Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Sandbox(ImmutableSandboxedEnvironment):
        """Counts loop iterations and calls, and raises where jinja's sandbox would silently write nothing."""

        intercepted_binops = frozenset(("*", "**", "+", "%"))

        def __init__(self, *args, **kwargs):
            self.budget = _Budget()
            super().__init__(*args, **kwargs)

        def call(__self, __context, __obj, *args, **kwargs):
            __self.budget.step(_CALL_STEPS)
            if not isinstance(__obj, Macro):
                _check_arguments((*args, *kwargs.values()))
            found = ImmutableSandboxedEnvironment.call(__self, __context, __obj, *args, **kwargs)
            return __self.budget.result(found)

        def call_binop(self, context, operator, left, right):
            _check_operands(self.budget, operator, left, right)
            return super().call_binop(context, operator, left, right)

        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(f"it accesses {attribute!r} of a {type(obj).__name__}, which is not safe")

        def wrap_str_format(self, value):
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _check_width(value.__self__)
            return wrapped

        def limited(self, items):
            """The items of a loop, counting each as one step."""
            for item in items:
                self.budget.step()
                yield item

        def joined(self, *parts):
            """The operator ~, with a result of bounded size."""
            texts = list(map(str, parts))
            self.budget.size(sum(map(len, texts)))
            return "".join(texts)

        def _parse(self, source, name, filename):
            return _counting().visit(super()._parse(source, name, filename))

    return Sandbox


@functools.cache
def _counting() -> Any:
    """The syntax tree transformer that passes loops through `limited` and replaces the operator ~ by `joined`."""
    import jinja2.nodes
    from jinja2.visitor import NodeTransformer

    def call(method: str, arguments: list[Any], lineno: int) -> Any:
        function = jinja2.nodes.EnvironmentAttribute(method, lineno=lineno)
        return jinja2.nodes.Call(function, arguments, [], None, None, lineno=lineno)

    class Counting(NodeTransformer):
        def visit_For(self, node):
            self.generic_visit(node)
            node.iter = call("limited", [node.iter], node.lineno)
            return node

        def visit_Concat(self, node):
            self.generic_visit(node)
            return call("joined", node.nodes, node.lineno)

    return Counting()


@functools.cache
def _generation_extension() -> Any:
    import jinja2
    import jinja2.ext

    class Generation(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`: the text between them is the assistant's."""

        tags = {"generation"}

        def __init__(self, environment):
            super().__init__(environment)
            environment.extend(tracked=self.tracked)
            self._blocks: list[str] | None = None
            self._spans: list[tuple[int, int]] = []

        def parse(self, parser):
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark", lineno=lineno)
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(lineno)

        def _mark(self, caller):
            text = caller()
            if self._blocks is not None:
                start = sum(map(len, self._blocks))
                self._spans.append((start, start + len(text)))
            return text

        @contextlib.contextmanager
        def tracked(self, blocks, spans):
            self._blocks, self._spans = blocks, spans
            try:
                yield
            finally:
                self._blocks = None

    return Generation
