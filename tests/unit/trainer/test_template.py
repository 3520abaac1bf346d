import pytest

from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.template import MAX_OUTPUT_CHARACTERS, Template

FIELD = "spec.data.tasks[0].templates[0]"


def make_template(prompt: str = "{{ text }}", completion: str = "{{ label }}") -> Template:
    return Template(prompt, completion, FIELD)


def rendered(prompt: str, **row: object) -> str:
    return make_template(prompt, "x").render(row, 0)[0]


def test_columns_are_those_of_prompt_and_completion():
    template = make_template(
        "{% for tag in tags %}{{ tag }}{% endfor %}{% set n = 1 %}{{ n }}{{ range(2) }}", " {{ label }}"
    )
    assert template.prompt_columns == {"tags"}
    assert template.completion_columns == {"label"}
    assert template.columns == {"tags", "label"}


RENDERINGS = {
    "white space is kept to the last character": ("  {{ a }}\n", {"a": "x"}, "  x\n"),
    "text is not escaped": ("{{ a }}", {"a": "<b> & 'c'"}, "<b> & 'c'"),
    "template marks in a value are text": ("{{ a }}", {"a": "{{ 7 * 7 }}"}, "{{ 7 * 7 }}"),
    "filters work": ("{{ a | trim | upper }}", {"a": " x "}, "X"),
    "a default stands in for a missing value": ("{{ a | default('none') }}", {}, "none"),
    "a default stands in for null when asked to": ("{{ a | default('none', true) }}", {"a": None}, "none"),
    "a condition may look at null": ("{% if a %}{{ a }}{% else %}no{% endif %}", {"a": None}, "no"),
    "a condition may look at what is missing": ("{{ a if a is defined else 'no' }}", {}, "no"),
    "numbers are printed": ("{{ n }} {{ n * 2 + 1 }}", {"n": 3}, "3 7"),
    "nested values are reached": ("{{ a.b[0] }}", {"a": {"b": ["x"]}}, "x"),
    "a loop may count": ("{% for i in range(3) %}{{ i }}{% endfor %}", {}, "012"),
    "macros work": ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(a) }}", {"a": 1}, "[1]"),
    "string methods work": ("{{ a.split(',') | join(' ') }}", {"a": "x,y"}, "x y"),
    "a namespace carries a value out of a loop": (
        "{% set n = namespace(s='') %}{% for c in a %}{% set n.s = c ~ n.s %}{% endfor %}{{ n.s }}",
        {"a": "abc"}, "cba"),
    "a block is kept": ("{% set b %}[{{ a }}]{% endset %}{{ b }}", {"a": 1}, "[1]"),
    "lists are flattened": ("{{ a | sum(start=[]) | join }}", {"a": [[1], [2, 3]]}, "123"),
    "numbers are added": ("{{ a | sum }} {{ a | sum(attribute='real') }}", {"a": [1, 2.5]}, "3.5 3.5"),
    "numbers are rounded": ("{{ a | round(2) }} {{ a | round(0, 'ceil') | int }}", {"a": 1.234}, "1.23 2"),
    "tags are stripped": ("{{ a | striptags }}", {"a": "<p>1 &lt;<!-- <b> --> 2</p> <"}, "1 < 2 <"),
    "a thing comes once": ("{{ a | unique | join }}", {"a": ["x", "X", "y", "x"]}, "xy"),
    "a choice is truthy": ("{{ 'y' if a | select('eq', 1) else 'n' }}", {"a": []}, "y"),
    "words are cut off": ("{{ a.split()[:2] | join(' ') }}", {"a": "x y " * 9999}, "x y"),
    "long numbers are divided": ("{{ a // 1000 }}", {"a": 1767225600123}, "1767225600"),
    "a column may be called like a method": ("{{ items }}{{ values }}", {"items": "x", "values": "y"}, "xy"),
}  # fmt: skip


@pytest.mark.parametrize("prompt, row, expected", RENDERINGS.values(), ids=RENDERINGS.keys())
def test_a_template_renders(prompt, row, expected):
    assert rendered(prompt, **row) == expected


FAILURES = {
    "a value that is missing": ("{{ text }}", {"other": 1}, "'text' is undefined"),
    "a value that is null": ("{{ text }}", {"text": None}, "missing"),
    "a value that is not a number": ("{{ text }}", {"text": float("nan")}, "missing"),
    "an attribute that is missing": ("{{ text.title_of }}", {"text": "x"}, "no attribute 'title_of'"),
    "a function instead of its result": ("{{ text.upper }}", {"text": "x"}, "no text"),
    "bytes": ("{{ text }}", {"text": b"x"}, "no text but bytes"),
    "a type that the expression does not take": ("{{ text + 1 }}", {"text": "x"}, "."),
    "a division by zero": ("{{ 1 / text }}", {"text": 0}, "division by zero"),
    "a filter on the wrong type": ("{{ text | round }}", {"text": "x"}, "."),
    "an index beyond the end": ("{{ text[5] }}", {"text": [1]}, "no element 5"),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}{{ text }}", {"text": 1}, "recursion"),
    "Python's internals": ("{{ text.__class__.__mro__ }}", {"text": "x"}, "unsafe|undefined"),
    "Python's internals through a filter": (
        "{{ [text] | map(attribute='__class__') | first }}", {"text": "x"}, "unsafe|undefined"),
    "changing a value": ("{{ text.append(1) }}", {"text": []}, "not safely callable|unsafe"),
    "a range without end": ("{% for i in range(10**9) %}{{ text }}{% endfor %}", {"text": "x"}, "range"),
    "ranges within ranges": (
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{{ text }}", {"text": 1}, "range"),
    "a multiplied text": ("{{ text * 10**9 }}", {"text": "x"}, "not on text"),
    "a multiplied list": ("{{ [text] * 10**9 }}", {"text": "x"}, "not on text"),
    "a number beyond all measure": ("{{ 9 ** 10 ** 9 }}{{ text }}", {"text": "x"}, "powers to 64"),
    "a text padded to a gigabyte": ("{{ text.center(10**9) }}", {"text": "x"}, "unsafe"),
    "a text formatted to a gigabyte": ("{{ '{:>1000000000}'.format(text) }}", {"text": "x"}, "unsafe"),
    "a text formatted the old way": ("{{ '%1000000000d' % text }}", {"text": 1}, "not on text"),
}  # fmt: skip


@pytest.mark.parametrize("prompt, row, message", FAILURES.values(), ids=FAILURES.keys())
def test_what_does_not_render_names_field_row_and_values(prompt, row, message):
    with pytest.raises(DataError, match=message) as caught:
        make_template(prompt, "x").render(row, 41)
    assert f"{FIELD}.prompt" in str(caught.value)
    assert "row 41" in str(caught.value)
    assert "text" in str(caught.value)


def test_values_in_messages_are_cut_short():
    with pytest.raises(DataError) as caught:
        make_template("{{ text + 1 }}").render({"text": "x" * 100_000, "label": "y"}, 0)
    assert "xxx" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_output_without_end_is_cut_off():
    loop = "{% for i in range(20000) %}{{ text }}{% endfor %}"
    with pytest.raises(DataError, match=f"more than {MAX_OUTPUT_CHARACTERS:,} characters"):
        rendered(loop, text="x" * 100)


def test_each_row_has_its_own_range_budget():
    template = make_template("{% for i in range(15000) %}{% endfor %}x", "y")
    assert [template.render({}, number)[0] for number in range(3)] == ["x"] * 3


@pytest.mark.parametrize("label", ["", "  ", "\n"])
def test_a_blank_completion_is_a_data_error(label):
    with pytest.raises(DataError, match=r"completion is blank for row 3 .*label=.*drop the row"):
        make_template().render({"text": "x", "label": label}, 3)


SYNTAX = {
    "an open mark": ("one\n{{ text", "line 2"),
    "an unknown filter": ("{{ text | shout }}", "No filter named 'shout'"),
    "a filter that pads": ("{{ text | center(1000000000) }}", "No filter named 'center'"),
    "a filter that draws lots": ("{{ text | random }}", "No filter named 'random'"),
    "an unknown tag": ("a\nb\n{% frobnicate %}", "line 3.*frobnicate"),
    "an include": ("{% include '/etc/passwd' %}", "include is not available"),
    "an import": ("x\n{% import 'm' as m %}", "line 2: import is not available"),
    "an import of names": ("{% from 'm' import x %}", "fromimport is not available"),
    "inheritance": ("{% extends 'base' %}", "extends is not available"),
    "5,000 nested brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    "a recursive loop": ("{% for a in b recursive %}{{ loop(a) }}{% endfor %}", "recursive loops are not available"),
    "50 nested loops": ("{% for a in b %}" * 50 + "x" + "{% endfor %}" * 50, "nested too deeply"),
}


@pytest.mark.parametrize("prompt, message", SYNTAX.values(), ids=SYNTAX.keys())
def test_what_is_no_template_is_a_spec_error(prompt, message):
    with pytest.raises(SpecError, match=message) as caught:
        make_template(prompt)
    assert str(caught.value).startswith(f"{FIELD}.prompt")


def test_a_completion_that_is_no_template_names_its_own_field():
    with pytest.raises(SpecError, match=r"templates\[0\]\.completion, line 1"):
        make_template(completion="{{ ")
