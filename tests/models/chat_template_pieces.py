"""Small templates for make_chat_templates.py: each one thing that Jinja2, or a type of Python's, can do."""

VARIABLES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q1?\nwell"},
        {"role": "assistant", "content": " A1 "},
        {"role": "user", "content": "  Q2 é  "},
    ],
    "tools": None,
    "n": 7,
    "x": 2.5,
    "text": "The quick brown fox",
    "odd": "it's \"so\"\\ \t\n\u00e9\u200b\u00a0😀<&>",
    "words": ["pear", "Apple", "fig", "apple"],
    "nested": {"b": [1, 2.5, None, True], "a": {"z": "y"}, "items": 5, "é": "<&'>"},
    "people": [
        {"name": "Bob", "age": 30, "tags": ["x", "y"]},
        {"name": "alice", "age": 25, "tags": []},
        {"name": "Carol", "age": 30},
    ],
    "floats": [1e-5, 1e20, 1e16, 1e15, 123456789012345.6, 0.1, -0.0, 1e-4, 3.0, 1e100, 5e-324, 1.7976931348623157e308],
    "empty": [],
    "blank": "",
}


def prints(*expressions):
    return ["{{ " + expression + " }}" for expression in expressions]


PIECES = [
    # Printing.
    *prints(
        "floats", "floats | join(' ')", "floats[0] ~ '|' ~ floats[1]", "floats | map('string') | join", "true", "none", "[true, none]",
        "(1,)", "()", "(1, 'a')", "nested", "messages[0]", "odd", "[odd]", "{'k': odd}", "nested.items()", "nested.keys()",
        "nested.values()", "range(3)", "range(1, 9, 2)", "1 ~ 2.0 ~ none ~ true ~ missing ~ [1, 'a']", "'%s' | format(none)",
        "\"it's\"", "[\"it's\"]", "['a\"b']", "['a\"b\\'c']", "1e3", "1_000", "0x1f", "0b101", "0o17", "1e-7 | tojson", "100000000000000000000",
        "'a' 'b'", "'\\x41\\u00e9\\101\\n\\q'", "-x", "+n", "- 3 | abs", "missing", "messages[9]", "nested.nothing", "text.nothing",
    ),
    # Arithmetic.
    *prints(
        "7 / 2", "6 / 2", "7 // 2", "-7 // 2", "7 // -2", "7 % 3", "-7 % 3", "7 % -3", "7.5 // 2", "-7.5 % 2", "2 ** 10", "2 ** -1", "2 ** 3 ** 2",
        "2.0 ** 0.5", "1 + true", "'a' + 'b'", "[1] + [2]", "(1,) + (2,)", "'ab' * 3", "3 * 'ab'", "[0] * 3", "'a' * -1", "1 + '1'", "'1' + 1",
        "1 / 0", "1 % 0", "1.0 / 0", "-2 ** 2", "1 - -1", "2 + 3 * 4 ~ 5", "10 - 2 - 3", "1.5 + 1", "0.1 + 0.2", "1e308 * 10", "3 * 1.0", "5 // 2.0",
        "5.5 % 2", "none + 1", "[1] - [1]", "missing + 1", "-missing", "'%d' % 3 + 'x'", "9007199254740993 / 1",
    ),
    # Comparisons and logic.
    *prints(
        "1 == 1.0", "1 == true", "'1' == 1", "1 < 2 < 3", "3 > 2 > 2", "1 < 2 == true", "'a' < 'b'", "[1, 2] < [1, 3]", "1 < 'a'", "none < 1",
        "[1, 2] == (1, 2)", "{'a': 1} == {'a': 1.0}", "missing == missing", "missing == none", "missing == ''", "not missing", "missing and 1",
        "missing or 'd'", "0 or none or 'z'", "1 and 2", "'' or 0", "not 0", "not not 1", "1 in [1.0]", "'a' in 'cat'", "'a' not in 'dog'",
        "1 in 'a'", "'b' in nested", "none in [none]", "1 in missing", "missing in [1]", "missing in nested", "missing in 'abc'", "1 in range(3)",
        "2.0 in range(3)", "'x' in none", "true is true", "1 if 0", "(1 if 0) is defined", "1 if x > 2 else 3", "1 if 0 else 2 if 0 else 3",
        "'a' if missing is defined else 'b'", "x > 2 and n < 9", "not x == 2.5", "not 'a' in 'b'", "range(3) == range(3)",
        "nested.keys() == nested.keys()", "1 == none", "none == none",
    ),
    # Access.
    *prints(
        "nested.b", "nested['b']", "nested.a.z", "nested.items is callable", "nested['items']", "nested.get('b')", "nested.get('q')", "nested.get('q', 'd')",
        "messages[-1].content", "messages[0].role[0]", "text[0]", "text[-1]", "text[99]", "text[1:4]", "text[::-1]", "text[:-4]", "text[-3:]",
        "words[1:]", "words[::-1]", "words[::2]", "words[2:0:-1]", "words[:0:-1]", "words[-1:0:-1]", "words[4:0:-2]", "'abc'[0:0:-1]",
        "[1, 2, 3][1:1:-1]", "[1, 2, 3][0:2:-1]", "words[5:]", "words[-9:2]", "(1, 2, 3)[1:]", "words[::0]", "none[0]", "n[0]", "n['a']", "n.nothing is defined",
        "missing.a", "missing[0]", "missing[:2]", "nested.a.b.c", "words.0", "words['0']", "words[true]", "words[1.0]", "nested[[1]]", "words['append']",
        "words.append(1)", "nested.update({'a': 1})", "nested.pop('a')", "words.nothing()", "missing()", "text()", "text.upper is callable", "nested.b.index(2.5)",
        "[1, 2].count(1)", "[3].index(4)", "words.copy()", "nested.copy()", "text.__class__", "nested.__class__", "nested[none]", "{1: 'a'}[true]", "{1: 'a'}[1.0]",
        "{(1, 2): 3}[(1, 2)]", "{'a': 1, 'a': 2}", "{[1]: 2}", "range(9)[2:5]", "range(5)[-1]", "range(100001)", "range(0)", "dict(a=1, b='c')", "dict([['a', 1]])",
        "dict({'a': 1}, b=2)", "dict.fromkeys(['a', 'b'])", "dict(nested).keys() | list", "messages[0:1][0]['role']",
    ),
    # Methods of texts.
    *prints(
        "'a.b.c'.rsplit('.', 1)", "'a.b.c'.split('.', 1)", "'a b  c'.split()", "' a b  c '.split(none, 1)", "' a b  c '.rsplit(none, 1)", "'a,b,c'.split(sep=',')",
        "'a b c'.split(maxsplit=1)", "'a,b,c'.split(',', maxsplit=1)", "''.split()", "''.split(',')", "'abc'.split('')", "'  x'.split(none, 0)", "'a=b=c'.partition('=')",
        "'a=b=c'.rpartition('=')", "'abc'.partition('x')", "'abc'.rpartition('x')", "'7'.zfill(3)", "'-7'.zfill(4)", "'a'.ljust(3) ~ '|'", "'a'.rjust(3, '.')", "'a'.center(4, '*')",
        "'ab'.center(5, '*')", "'a'.center(3, 'xy')", "'aBc'.swapcase()", "'Straße'.casefold()", "'Straße'.upper()", "'abcabc'.rindex('b')", "'abcabc'.rfind('z')", "'abcabc'.find('b', 2)",
        "'abcabc'.find('b', -2)", "'abcabc'.find('c', 0, 2)", "'abc'.index('z')", "'abc'.startswith('b', 1)", "'abc'.startswith(('x', 'a'))", "'abc'.endswith('b', 0, 2)", "'abc'.startswith(1)",
        "'12'.isdecimal()", "'²'.isdecimal()", "'²'.isdigit()", "'½'.isnumeric()", "'Ab Cd'.istitle()", "'AB'.istitle()", "''.isalpha()", "'aé'.isalpha()", "'a1'.isalnum()", "' \\t'.isspace()",
        "'abc'.isidentifier()", "'1a'.isidentifier()", "'a\\n'.isprintable()", "'é'.isascii()", "'ab1'.islower()", "'A1'.isupper()", "'1'.isupper()", "'a\\tb'.expandtabs()", "'a\\tb'.expandtabs(4)",
        "'é'.encode('utf-8')", "'é'.encode().decode()", "'{a}-{b}'.format_map({'a': 1, 'b': 2})", "'abc'.replace('b', 'x')", "'aaa'.replace('a', 'b', 2)", "'abc'.replace('', '-')", "'aXbX'.count('X')",
        "'aaa'.count('')", "'abc'.count('c', 0, 2)", "'-'.join(words)", "'-'.join([1])", "'-'.join('abc')", "'abc'.join({'x': 1, 'y': 2})", "' x '.strip()", "'xxaxx'.strip('x')", "'abcba'.lstrip('ab')",
        "'abcba'.rstrip('ab')", "' a '.lstrip() ~ '|'", "'a\\nb\\r\\nc\\n'.splitlines()", "'a\\nb'.splitlines(true)", "'hello world'.title()", "\"they're\".title()", "'hELLO'.capitalize()", "'abc'.removeprefix('a')",
        "'abc'.removesuffix('c')", "'abc'.removesuffix('')", "'ABC'.lower()", "'abc'.nothing()", "'a'.upper(1)", "'ǆ'.title()", "'ΑΣ'.lower()", "'\\x1c a \\x1f'.strip()", "'%s' % 'a'", "'a' 'b'.upper()",
        "'x'.ljust(99999999999)", "'x' * 99999999999", "'a'.zfill(10 ** 12)",
    ),
    # Formats.
    *prints(
        "'%s|%d|%5.2f|%x' % ('a', 3, 2.5, 255)", "'%s' % x", "'%s' % [1]", "'%s' % {'a': 1}", "'%(a)s-%(b)03d' % {'a': 1, 'b': 2}", "'%r' % 'a'", "'%5s|%-5s|' % ('a', 'b')", "'%05d' % 42", "'%+d' % 5",
        "'% d' % 5", "'%.3s' % 'abcdef'", "'%e' % 12345.678", "'%g' % 1e-5", "'%g' % 100000", "'%g' % 1000000", "'%G' % 1e-10", "'%i' % 3.7", "'%o' % 8", "'%#x' % 255", "'%c' % 'a'", "'%c' % 65", "'%%'  % ()",
        "'%s %s' % 'a'", "'%s' % (1, 2)", "'%d' % 'a'", "'%*d' % (5, 42)", "'%.2f' % 1", "'%s' % none", "'%a' % 'é'", "'%.0f' % 2.5", "'%5.1f|' % 3.14159", "'%s' % missing", "'%08.3f' % 3.14159", "'%-8d|' % 5",
        "'{} {}'.format(1, 'a')", "'{1} {0}'.format(1, 2)", "'{a} {b}'.format(a=1, b=[2])", "'{!r}'.format('a')", "'{!s:>5}'.format('a')", "'{:.1%}'.format(0.256)", "'{:,}'.format(1234567)", "'{:_}'.format(1234567)",
        "'{:>8}|{:<8}|{:^8}|'.format('a', 'b', 'c')", "'{:*^9}'.format('mid')", "'{:08.3f}'.format(3.14159)", "'{:+d}'.format(3)", "'{:x} {:X} {:o} {:b} {:#x}'.format(255, 255, 8, 5, 255)", "'{:e}'.format(12345.678)",
        "'{:g}'.format(1e-5)", "'{:.3}'.format(3.14159)", "'{:.3}'.format('abcdef')", "'{:5}|'.format(3)", "'{:5}|'.format('a')", "'{0[a]} {0[b]}'.format({'a': 1, 'b': 2})", "'{.role}'.format(messages[0])", "'{0[0]}'.format([7])",
        "'{{}}'.format()", "'{}'.format()", "'{'.format()", "'}'.format()", "'{:{}}'.format('a', 5) ~ '|'", "'{:d}'.format('a')", "'{:s}'.format(1)", "'{:%}'.format(1)", "'{:c}'.format(65)", "'{:,.2f}'.format(1234567.891)",
        "'{:010,}'.format(1234567)", "'{}'.format(1e20)", "'{}'.format(none)", "'{:5}'.format(none)", "'{:.0f}'.format(0.5)", "'{:.2e}'.format(0)", "'{:n}'.format(5)", "'{:^+7.1f}'.format(2.25)", "'{}'.format(missing) ~ '|'",
        "'{0} {}'.format(1, 2)", "'{:5}'.format(true)", "'{}'.format(true)", "'{a!r:>6}'.format(a='b')", "'%s: %s' | format('a', 1)", "'%(a)s' | format(a=1)", "'{:.3g}'.format(1234.5)", "'{:.10}'.format(1.5)", "'{:.1}'.format(10.0)",
        "'{:=+8}'.format(-5)", "'{:<5}|'.format(2.5)",
    ),
    # tojson.
    *prints(
        "nested | tojson", "nested | tojson(indent=2)", "nested | tojson(ensure_ascii=True)", "nested | tojson(ensure_ascii=False)", "nested | tojson(separators=(',', ':'))", "nested | tojson(sort_keys=true)", "nested | tojson(false, 2)",
        "nested | tojson(indent='\\t')", "nested | tojson(indent=0)", "nested | tojson(indent=1, separators=(', ', ' = '))", "[] | tojson(indent=2)", "{} | tojson(indent=2)", "[[], {}] | tojson(indent=2)", "odd | tojson", "odd | tojson(true)",
        "'\\x7f\\x00\\x1f' | tojson", "'\\x7f😀' | tojson(ensure_ascii=true)", "floats | tojson", "(1, 2) | tojson", "{1: 2, none: 3, true: 4, 2.5: 5} | tojson", "missing | tojson", "none | tojson", "nested.items() | tojson", "words | map('upper') | tojson",
        "words | map('upper') | list | tojson", "range(3) | tojson", "{(1, 2): 3} | tojson", "1e400 | tojson", "messages | tojson", "text | tojson | safe", "'</script>' | tojson", "nested | tojson(unknown=1)", "nested | tojson(true, 2, none, true)",
    ),
    # Filters of texts.
    *prints(
        "'aaa' | replace('a', 'b', 2)", "5 | replace('5', '6')", "'a.b' | replace('.', '')", "text | truncate(10)", "text | truncate(10, true)", "text | truncate(10, true, '')", "text | truncate(10, false, '…')", "text | truncate(3, leeway=0)",
        "text | truncate(18)", "text | truncate(2)", "text | wordcount", "\"it's a-b\" | wordcount", "text | wordwrap(9)", "'aaaa-bbbb cccc' | wordwrap(6)", "'aaaaaaaaaa' | wordwrap(4)", "'aaaaaaaaaa b' | wordwrap(4, false)", "'a b\\n\\nc d' | wordwrap(2)",
        "'ab' | center(6) ~ '|'", "'a b/c?é' | urlencode", "{'a b': 'c&d', 'e': 1} | urlencode", "'<p>Hi  <b>there</b></p><!-- x --> &amp; ok' | striptags", "'hello wORLD (foo) x-y' | title", "'hELLO' | capitalize", "' x ' | trim", "'xax' | trim('x')", "5 | trim",
        "'a\\nb\\n\\nc' | indent", "'a\\nb\\n\\nc' | indent(2, true)", "'a\\nb\\n\\nc' | indent(2, true, true)", "'a\\nb' | indent('> ')", "'a\\nb\\n' | indent(2)", "'<&\\'\"' | escape", "'<' | e | e", "('<' | safe) + '<'", "'<' + ('<' | safe)", "('<' | safe) ~ '<'",
        "'<' | forceescape", "('<' | e) | forceescape", "'abc' | upper", "n | string", "n | upper", "none | lower", "missing | upper ~ '|'", "'abc' | reverse", "'abc' | first", "'abc' | last", "'abc' | list", "'abc' | length", "text | batch(3) | list", "'abc' | random in 'abc'",
        "nested.a | pprint", "{'b': 1, 'a': [1]} | pprint", "'%s-%s' | format(1, 2)", "blank | default('d')", "blank | default('d', true)", "missing | default('d')", "missing | d", "none | default('d')", "nested.q | default(1)", "false | default('x', boolean=true)",
    ),
    # Filters of numbers.
    *prints(
        "2.5 | round", "3.5 | round", "2.567 | round(2)", "2.567 | round(1, 'floor')", "2.511 | round(1, 'ceil')", "5 | round", "1234 | round(-2)", "2.5 | round | int", "'abc' | round", "2 | round(1, 'nothing')", "'3' | int", "'3.7' | int", "'x' | int", "'x' | int(5)",
        "'0x1f' | int(0, 16)", "'ff' | int(base=16)", "3.99 | int", "-3.99 | int", "none | int", "[] | int", "true | int", "' 4 ' | int", "'1_000' | int", "'3.5' | float", "'x' | float", "'x' | float(1.5)", "3 | float", "none | float", "'1e3' | float", "'inf' | float", "'nan' | float",
        "-3 | abs", "-2.5 | abs", "'a' | abs", "1 | filesizeformat", "999 | filesizeformat", "13000 | filesizeformat", "1300000 | filesizeformat", "1024 | filesizeformat(true)", "missing | int", "[1, 2, 3.5] | sum", "[] | sum", "['a', 'b'] | sum", "[[1], [2]] | sum(start=[])",
        "people | sum('age')", "people | sum(attribute='age', start=1.0)", "[3, 1, 2] | min", "[3, 1, 2] | max", "['b', 'A'] | min", "['b', 'A'] | min(case_sensitive=true)", "[] | max", "people | max(attribute='age')", "[1, 'a'] | max",
    ),
    # Filters of lists.
    *prints(
        "words | sort", "words | sort(case_sensitive=true)", "words | sort(reverse=true)", "people | sort(attribute='age') | map(attribute='name') | list", "people | sort(attribute='age,name') | map(attribute='name') | list", "[3, 'a'] | sort", "words | unique | list",
        "words | unique(true) | list", "[1, true, 1.0, 2] | unique | list", "people | unique(attribute='age') | map(attribute='name') | list", "words | first", "words | last", "empty | first", "(empty | first) is defined", "words | join(', ')", "words | join", "[1, none, 'a'] | join('-')",
        "people | join('+', attribute='name')", "words | reverse | list", "words | length", "words | count", "missing | length", "n | length", "nested | length", "words | map('upper') | length", "words | list", "missing | list", "nested | list", "nested | dictsort", "{'b': 1, 'A': 2} | dictsort",
        "{'b': 1, 'A': 2} | dictsort(true)", "{'b': 1, 'A': 2} | dictsort(by='value', reverse=true)", "{'b': 1, 'A': 2} | dictsort(false, 'value')", "words | dictsort", "nested | items | list", "missing | items | list", "people | map(attribute='name') | list",
        "people | map(attribute='tags.0', default='none') | list", "people | map(attribute='tags') | list", "people | map('length') | list", "words | map('replace', 'p', 'q') | list", "words | map('truncate', 3, leeway=0) | list", "words | map | list", "words | map('nothing') | list",
        "[0, 1, '', 'a'] | select | list", "[0, 1, '', 'a'] | reject | list", "[1, 2, 3, 4] | select('odd') | list", "[1, 2, 3] | select('greaterthan', 1) | list", "[1, 2, 3] | reject('equalto', 2) | list", "people | selectattr('tags') | map(attribute='name') | list",
        "people | selectattr('age', 'equalto', 30) | map(attribute='name') | list", "people | selectattr('age', 'lt', 30) | list | length", "people | rejectattr('name', 'in', ['Bob']) | map(attribute='name') | list", "people | selectattr('tags', 'defined') | list | length", 
        "people | groupby('age')", "people | groupby('tags', default='q') | length", "[1, 2, 3, 4, 5] | batch(2) | list", "[1, 2, 3] | batch(2, 'x') | list", "[1, 2, 3, 4, 5] | slice(3) | list", "[1, 2, 3, 4] | slice(3, 'x') | list", "messages[0] | attr('role')", "(nested | attr('items')) is callable", "(nested | attr('nothing')) is defined",
        "text | attr('upper')()", "words | select('in', 'fig apple') | list", "(words | select('none')) is true", "'yes' if words | selectattr('q') else 'no'", "words | map('first') | join", "words | nothing", "words | random in words", "empty | random", "[[1, 2], [3, 4]] | map(attribute=1) | list",
        "[[1, 2], [3]] | map('sum') | list", "words | select('string') | map('length') | sum", "words | reverse | first", "nested.b | map('default', 'x') | list", "('a', 'b') | reverse | join", "nested | map('upper') | list", "{'a': 1}.items() | list", "{'a': 1}.items() | map('first') | list",
    ),
    # Tests.
    *prints(
        "[n is number, x is number, true is number, text is number]", "[n is integer, true is integer, x is integer]", "[x is float, n is float]", "[true is boolean, 1 is boolean]", "[text is string, n is string]", "[text is sequence, words is sequence, nested is sequence, n is sequence, missing is sequence]",
        "[nested.items() is sequence, range(3) is sequence, (1, 2) is sequence]", "[text is iterable, n is iterable, missing is iterable, nested.items() is iterable, (words | map('upper')) is iterable]", "[nested is mapping, words is mapping]", "[missing is defined, n is defined, none is defined]",
        "[missing is undefined, none is undefined]", "[none is none, missing is none, 0 is none]", "[tools is none, tools is defined]", "[3 is odd, 4 is even, 9 is divisibleby(3), 9 is divisibleby 2]", "[true is true, 1 is true, false is false, 0 is false]", "['ab' is lower, 'AB' is upper, 'Ab' is lower]",
        "[1 is eq 1, 1 is ne 2, 1 is lt 2, 2 is ge 2, 2 is gt(3)]", "[1 is equalto 1.0, 'a' is lessthan 'b']", "[1 is sameas 1, true is sameas true, words is sameas words, [] is sameas []]", "[1 is in [1, 2], 'a' is in 'abc']", "[range is callable, text is callable, text.upper is callable, missing is callable]", "['<' | e is escaped, 'a' is escaped]",
        "['upper' is filter, 'nothing' is filter, 'odd' is test, 'q' is test]", "n is not none", "not n is none", "n is nothing", "1 is defined is defined", "x is not string and n is number", "n is divisibleby 7 and true", "'a' is in('abc')", "loop is defined", "messages is defined and messages is iterable and messages is not string and messages is not mapping",
        "cycler is callable", "raise_exception is defined", "missing is sameas none", "none is sameas none", "('a' | safe) is string",
    ),
    # Statements.
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }};{% endfor %}",
    "{% for m in messages %}{{ loop.previtem.role }}<{{ m.role }}>{{ loop.nextitem.role if loop.nextitem is defined }};{% endfor %}",
    "{% for m in messages %}{{ loop.previtem is defined }}{% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{{ loop.last }}{% endfor %}",
    "{% for m in empty %}x{% else %}none{% endfor %}|{% for m in missing %}x{% else %}none{% endfor %}",
    "{% for m in n %}x{% endfor %}", "{% for m in none %}x{% endfor %}", "{% for c in 'abc' %}{{ c }}-{% endfor %}", "{% for k in nested %}{{ k }},{% endfor %}",
    "{% for k, v in nested.items() %}{{ k }}={{ v }};{% endfor %}", "{% for k, v in nested | dictsort %}{{ k }};{% endfor %}", "{% for a, b in [(1, 2), [3, 4]] %}{{ a }}{{ b }}{% endfor %}", "{% for a, b in [1] %}{% endfor %}", "{% for (a, b), c in [((1, 2), 3)] %}{{ a }}{{ b }}{{ c }}{% endfor %}",
    "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{% if i is odd %}{% continue %}{% endif %}{{ i }}{% endfor %}", "{% for i in range(3) %}{% for j in range(3) %}{% if j == 1 %}{% break %}{% endif %}{{ i }}{{ j }} {% endfor %}{% endfor %}",
    "{% break %}", "{% for i in range(2) %}{% macro m() %}{% break %}{% endmacro %}{% endfor %}", "{% set x = 1 %}{% for i in range(3) %}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}", "{% for i in range(2) %}{% set q = i %}{% endfor %}[{{ q }}]",
    "{% for i in range(3) %}{{ q }}{% set q = i %}{% endfor %}", "{% set ns = namespace(a=1, b='x') %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns['a'] }}{{ ns.c is defined }}", "{% set ns = namespace({'a': 1}) %}{{ ns.a }}{{ ns }}",
    "{% set ns = namespace(_a=1) %}", "{% set ns = namespace() %}{% set ns._a = 1 %}", "{% set ns = namespace() %}{% set ns.n = ns %}{{ ns.n.n is defined }}", "{% set d = {} %}{% set d.a = 1 %}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set a = 1, 2 %}{{ a }}", "{% set (a, b) = [1, 2] %}{{ b }}",
    "{% set t %}a{{ n }}b{% endset %}{{ t | length }}{{ t }}", "{% set t | upper | replace('A', 'x') %}abc{% endset %}{{ t }}", "{% set t %}{% set inner = 1 %}{% endset %}[{{ inner }}]", "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}[{{ a }}]", "{% set a = 1 %}{% with a = 2, b = a %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "{% filter upper | replace('B', 'x') %}abc{{ n }}{% endfilter %}", "{% if n > 5 %}a{% elif n > 3 %}b{% else %}c{% endif %}", "{% if missing %}a{% elif none %}b{% elif [] %}c{% else %}d{% endif %}", "{% if true %}{% set q = 1 %}{% endif %}{{ q }}", "{% if 'a', %}t{% endif %}",
    "{% macro f(a, b=2, c=b) %}{{ a }}{{ b }}{{ c }};{% endmacro %}{{ f(1) }}{{ f(1, 3) }}{{ f(1, c=4) }}{{ f(b=1, a=0) }}", "{% macro f(a, b=a ~ 'x') %}{{ b }}{% endmacro %}{{ f('q') }}", "{% macro f(a) %}{{ a }}|{{ a is defined }}{% endmacro %}{{ f() }}", "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}",
    "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(b=2) }}", "{% macro f() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, a=3) }}", "{% macro f(a) %}{{ a }}{{ varargs | length }}{% for k, v in kwargs.items() %}{{ k }}{{ v }}{% endfor %}{% endmacro %}{{ f(1, 2, 3, z=4) }}", "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}x{{ n }}{% endcall %}",
    "{% macro f(l) %}{% for i in l %}{{ caller(i) }},{% endfor %}{% endmacro %}{% call(i) f([1, 2]) %}<{{ i }}>{% endcall %}", "{% macro f() %}x{% endmacro %}{% call f() %}{% endcall %}", "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}", "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}late{% endmacro %}{{ f() }}",
    "{% set q = 1 %}{% macro f() %}{{ q }}{% set q = 2 %}{{ q }}{% endmacro %}{{ f() }}{{ q }}", "{% macro f() %}{{ q }}{% endmacro %}{% set q = 5 %}{{ f() }}", "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(*[1]) }}{{ f(**{'x': 2}) }}", "{% macro f(x) %}  {{ x }}  {% endmacro %}{{ f(1) | trim }}{{ f(1) | length }}{{ f.name }}",
    "{% macro f(x) %}{{ caller is defined }}{% endmacro %}{{ f(1) }}", "{% for t in [{'c': [{'c': []}, {}]}] recursive %}<{{ loop.depth }}{{ loop(t.c) if t.c }}>{% endfor %}", "{% for t in [1] %}{{ loop([1]) }}{% endfor %}", "{{ joiner }}{% set j = joiner('; ') %}{% for i in range(3) %}{{ j() }}{{ i }}{% endfor %}"[len("{{ joiner }}"):],
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.current }}{{ c.next() }}{{ c.next() }}{{ c.reset() }}{{ c.current }}", "{% set j = joiner() %}{{ j() }}{{ j() }}", "{% generation %}a{% set v = 7 %}{% endgeneration %}[{{ v }}]", "{{ '{% generation %}' }}", "{% raw %}{% generation %}{{ x }}{% endraw %}", "{%- generation -%} a {%- endgeneration -%} b",
    "{% generation %}{{ n }}{% for i in range(2) %}{{ i }}{% endfor %}{% endgeneration %}", "{% block b %}x{{ n }}{% endblock %}", "{% set q = 3 %}{% block b %}{{ q }}{% endblock b %}", "{% print 1, 'a' %}", "{% autoescape false %}{{ '<' }}{% endautoescape %}", "{% do words.append(1) %}", "{% include 'x' %}", "{% nothing %}", "{% if %}{% endif %}",
    "{% for %}", "{%", "{{", "{{ 'a }}", "{{ a b }}", "{% endif %}", "{% if 1 %}", "{{ }}", "{% set %}", "{{ 1 + }}", "{{ (1 }}", "{{ [1, }}", "{{ 1 | }}", "{% macro f(a=1, b) %}{% endmacro %}", "{{ f(a=1, 2) }}", "{# never ends", "{% raw %} never ends", "{% if nothing_here %}{{ 1 | nofilter }}{% endif %}ok", "{{ 1 | nofilter }}", "{{ raise_exception('no') }}",
    "{{ 'a' if true else 1 | nofilter }}", "{{ caller }}|{{ varargs }}|{{ loop }}", "{% set messages = messages[1:] %}{{ messages | length }}", "{% set loop_messages = messages if messages[0].role != 'system' else messages[1:] %}{{ loop_messages[0].role }}", "{% for i in range(2) %}{% for j in range(2) %}{{ loop.index }}{{ loop.depth }}{% endfor %}{{ loop.index }}{% endfor %}",
    "{% set it = words | map('upper') %}{{ it | list }}{{ it | list }}", "{% set it = words | select('string') %}{% for w in it %}{{ w }}{% endfor %}|{% for w in it %}{{ w }}{% endfor %}", "{% for w in words | select %}{{ loop.index }}{{ loop.last }}{% endfor %}", "{{ (words | select('undefined')) and 'true' }}", "{% for x in range(2), %}{{ x }}{% endfor %}",
    # White space.
    "a\n{% if true %}\nb\n{% endif %}\nc\n", "a\n   {% if true %}   \nb\n   {%- endif %}\nc", "  {% if true %}x{% endif %}  \n  y", "{{ 1 }}\n{{ 2 }}\n\n", "a  {{- 1 -}}  b", "a  {%- if true -%}  b  {%- endif -%}  c", "a\n  {%+ if true %}b{% endif +%}\nc", "a\n  {# c #}\nb\n{# d -#}\n  e\n  {#- f #} g", "x {# a #} y", "\n\n{% set a = 1 %}\n\n{{ a }}",
    "a\r\nb\rc{% if true %}\r\nd{% endif %}", "{% raw %}\n  {{ a }}\n{% endraw %}\nb", "  {% raw -%}\n  x  {%- endraw %}\ny", "{%- for m in messages %}\n{{- m.role }}\n{%- endfor %}", "{% for m in messages -%}\n  {{ m.role }}\n{% endfor %}", "\t{% set a = 1 %}\tb", "a {% set b = 1 %} c", "{{ 'a\nb' }}", "{{ {'a': {'b': 1}} }}", "{{ {'a': {'b': 1}}['a'].b }}", "{{ '}}' }}",
    "{{ '%}' }}{% set a = '%}' %}{{ a }}", "{{-1}}", "{{+1}}", "{{ n }}{{ x }}", "line\n{%- if true %} a{% endif %}", "{# {{ 1 }} {% if %} #}a", "{% if true -%}\n\n  a\n\n{%- endif %}", "x\n\n  \n{% if true %}\ny{% endif %}", "a{% set b = 1 -%}\n\n c", "{#- a -#}  b", "a\n", "a\n\n", "", "\n", "{{ 1 }}{# x #}\n{{ 2 }}", "\u00a0{% if true %}x{% endif %}",
]
