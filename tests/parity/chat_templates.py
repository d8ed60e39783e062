"""Chat templates with the features of released ones, each written for this comparison."""

# ruff: noqa: E501, a template's line ends are part of it

from __future__ import annotations

from typing import Any

TEMPLATES = {
    "plain": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
    "chatml": """
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "bos and eos": """{{ bos_token }}{% for m in messages %}
{% if m.role == 'assistant' %}
{{ m.content ~ eos_token }}
{% else %}
[{{ m.role }}] {{ m.content }}
{% endif %}
{% endfor %}""",
    "namespace": """
{%- set ns = namespace(system='', count=0, tools_seen=false) %}
{%- for m in messages %}{%- if m.role == 'system' %}
{%- set ns.system = ns.system ~ (m.content or '') %}{% else %}{% set ns.count = ns.count + 1 %}
{%- endif %}{%- endfor %}{{ ns.system }}|{{ ns.count }}|{{ ns.tools_seen }}""",
    "alternation": """
{%- for m in messages if m.role != 'system' %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate: ' ~ m.role ~ ' at ' ~ loop.index0) }}
    {%- endif %}
    {{- m.role }};
{%- endfor %}""",
    "macros": """
{%- macro block(role, text='', end=true) -%}
<{{ role }}>{{ text | trim }}{% if end %}</{{ role }}>{% endif %}
{%- endmacro %}
{%- for m in messages %}{{ block(m.role, m.content or '', end=not loop.last) }}{% endfor %}
{{- caller is defined }}""",
    "call blocks": """
{%- macro wrap(name) %}[{{ name }}|{{ caller() }}]{% endmacro %}
{%- for m in messages %}{% call wrap(m.role) %}{{ m.content }}{% endcall %}{% endfor %}""",
    "tools": """
{%- if tools %}# Tools\n{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% elif tools is none %}no tools{% else %}empty{% endif %}
{%- if not tools is defined %}undefined{% endif %}
{%- for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}
{%- set call = call.function if call.function is defined else call %}
<tool_call>{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson if call.arguments is mapping else call.arguments }}}</tool_call>
{%- endfor %}{% endif %}{% endfor %}""",
    "tools with indent": """
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{{- messages | tojson(indent=2) }}""",
    "json arguments": """
{%- for m in messages %}{{ m | tojson(sort_keys=true) }}{{ m | tojson(ensure_ascii=true) }}
{{- m.content | tojson(separators=(',', ':')) }}{{ {'<': '>&', "'": 1} | tojson }}{% endfor %}""",
    "documents": """
{%- if documents is defined and documents is not none and documents | length > 0 %}
{%- for d in documents %}{{ loop.index }}. {{ d.title | default('untitled') }}: {{ d['text'] }}
{% endfor %}{% else %}none: {{ documents }}{% endif %}""",
    "reasoning": """
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == 'assistant' %}
{%- if m.reasoning_content is string and loop.index0 > last.user %}<think>\n{{ m.reasoning_content.strip('\n') }}\n</think>\n\n{% endif %}
{%- set content = m.content %}
{%- if content is string and '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- content }}{% else %}{{ m.role }}{% endif %}{% endfor %}""",
    "thinking names": """
{%- for m in messages %}{{ m.thinking }}/{{ m.reasoning }}/{{ m.get('reasoning_content', 'no') }};
{%- endfor %}""",
    "backwards": """
{%- set ns = namespace(index=-1) %}
{%- for m in messages[::-1] %}{% set i = (messages | length - 1) - loop.index0 %}
{%- if ns.index == -1 and m.role == 'user' %}{% set ns.index = i %}{% endif %}{% endfor %}{{ ns.index }}
{{- messages[-1].role }}{{ messages[1:] | length }}{{ messages[0:1][0].content[:3] }}""",
    "loop variables": """
{%- for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}
{{- loop.revindex }}{{ (loop.previtem.role if loop.previtem is defined else '-') }}
{{- (loop.nextitem or {}).role }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{% else %}empty{% endfor %}""",
    "break and continue": """
{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{%- if loop.index > 3 %}{% break %}{% endif %}{{ m.role }},{% endfor %}""",
    "filters": """
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}
{{- messages | rejectattr('role', 'eq', 'system') | map(attribute='role') | join('>') }}
{{- messages | map(attribute='role') | unique | sort | join(',') }}{{ messages | first }}
{{- (messages | last).role | upper | capitalize | title }}{{ ' x ' | trim }}{{ none | default('d', true) }}
{{- nothing | default('u') }}{{ [3, 1, 2] | sort(reverse=true) }}{{ [1, 2] | sum }}{{ 'a,b' | replace(',', ';') }}
{{- {'b': 1, 'a': 2} | items | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ 3.7 | int }}{{ '4' | float }}{{ -2 | abs }}
{{- 'abc' | reverse }}{{ [1, 2, 3, 4, 5] | batch(2) | list }}{{ 'x' | string | safe | escape }}{{ '<' | e }}
{{- messages | groupby('role') | map('first') | list }}{{ 'a b' | wordcount }}{{ 'text' | indent(2, true) }}{{ '%s=%d' | format('a', 3) }}""",
    "tests": """
{%- for m in messages %}{{ m.content is string }}{{ m.content is none }}{{ m.content is iterable }}{{ m is mapping }}
{{- m.content is sequence }}{{ m.nothing is defined }}{{ m.nothing is undefined }}{{ loop.index is even }}
{{- loop.index is divisibleby 3 }}{{ m.role is in ['user', 'tool'] }}{{ m.role is eq 'user' }}{{ true is boolean }}{{ 1 is number }}
{{- m.content is callable }}{{ 'a' is lower }}{{ m.role is sameas m.role }};{% endfor %}""",
    "content parts": """
{%- for m in messages %}{% if m.content is string %}{{ m.content }}{% elif m.content is iterable %}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% elif part['type'] == 'image' %}<image>{% else %}
{{- raise_exception('Unknown part ' ~ part.type) }}{% endif %}{% endfor %}{% endif %}|{% endfor %}""",
    "set blocks": """
{%- set head %}{{ messages[0].role }} / {{ messages | length }}{% endset %}{{ head | length }}{{ head }}
{%- set loud | upper %}loud{% endset %}{{ loud }}{% with a = 1, b = head %}{{ a }}{{ b }}{% endwith %}""",
    "white space": """
  {%- if true %}

    a {# a comment #}
  {%+ if true %} b{% endif +%}
    {% endif -%}

  c
{% raw %}{{ raw }}{% endraw %}
   d   {{- ' e ' -}}   f
""",
    "string methods": """
{%- for m in messages %}{% set c = (m.content or '') | string %}{{ c.strip() }}{{ c.split(' ') }}{{ c.startswith('a') }}
{{- c.endswith('.') }}{{ c.replace('a', 'b', 1) }}{{ c.upper().lower().title() }}{{ c.find('e') }}{{ c.rsplit(' ', 1)[0] }}
{{- c.lstrip('H').rstrip() }}{{ c.partition(' ')[2] }}{{ c | length }}{{ c.splitlines() }}{{ c.isdigit() }}{{ '-'.join(c[:3]) }}
{{- '{} {}'.format(m.role, 1) }}{{ '%s' % m.role }}{{ c.removeprefix('Hi') }}{% endfor %}""",
    "dictionaries": """
{%- set d = {'a': 1, 'b': {'c': [1, 2, {'x': 'deep'}]}} %}{{ d.b.c[2].x }}{{ d['b']['c'][-1]['x'] }}{{ d.get('z', 'no') }}
{%- for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{{ d.keys() | list }}{{ 'a' in d }}{{ dict(x=1, **{'y': 2}) }}
{{- dict.fromkeys(['p'], 0) }}{{ d.a + 1 }}{{ d.missing }}{{ d == {'a': 1} }}{{ [1] + [2] }}{{ (1, 2) }}""",
    "arithmetic": """
{{- 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 8 }}{{ 1 / 4 }}{{ 'ab' * 3 }}{{ [0] * 3 }}{{ 1 < 2 <= 2 }}{{ not true or false and 1 }}
{{- (1 if messages else 2) }}{{ ('x' if false) }}{{ 10 - 3 * 2 }}{{ -5 // 2 }}{{ 'a' ~ 1 ~ none ~ true }}{{ 1.0 + 2 }}{{ '=' * 40 }}""",
    "generation": """
{%- for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }}{% if not loop.last %}{{ eos_token }}
{%- endif %}{% endgeneration %}
</a>{% else %}{{ m.role }}: {{ m.content }}{% endif %}{% endfor %}""",
    "generation scope": """
{%- set outer = 'o' %}{% for m in messages %}{%- generation -%}  {% set inner = outer ~ m.role %}{{ inner }}  {%- endgeneration -%}
{{ inner is defined }}{{ outer }}{% endfor %}""",
    "generation in macro": """
{%- macro say(m) %}{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endmacro %}
{%- for m in messages %}{{ say(m) }}{% endfor %}""",
    "date": "{{ strftime_now('%Y-%m-%d') }}{{ strftime_now(format='%d %b %Y') | length }}"
    "{% if strftime_now is defined %}{{ date_string | default(strftime_now('%Y')) }}{% endif %}",
    "joiner and cycler": """
{%- set comma = joiner(', ') %}{% set row = cycler('odd', 'even') %}
{%- for m in messages %}{{ comma() }}{{ m.role }} {{ row.next() }}{% endfor %}{{ range(5) | list }}{{ range(2, 9, 3) | list }}""",
    "undefined": "{{ messages[9].content }}{{ messages[0].nothing }}{{ nothing }}{{ nothing is defined }}",
    "undefined at": "{{ nothing.at.all }}",
    "concatenating none": "{% for m in messages %}{{ 'a' + m.content }}{% endfor %}",
    "missing filter": "{{ messages | nothing }}",
    "sandbox": "{{ messages.append(1) }}",
    "attributes": "{{ ''.__class__ }}{{ messages.__len__ }}{{ dict.mro }}{{ (1).real }}",
    "attribute of a namespace": "{{ namespace(_a=1) }}",
    "long range": "{{ range(10 ** 6) | length }}",
    "recursive loop": """
{%- for m in [{'n': 1, 'c': [{'n': 2, 'c': []}, {'n': 3, 'c': [{'n': 4, 'c': []}]}]}] recursive %}{{ m.n }}({{ loop(m.c) }}){% endfor %}""",
    "line ends": "a\r\n{% if true %}\r\nb\r\n{% endif %}\r\n{{ messages[0].content }}\n\n",
    "schema": """
{%- macro kind(s) -%}{% if s.type is string %}{{ s.type }}{% elif s.type is iterable %}{{ s.type | join(' | ') }}{% else %}any{% endif %}
{%- if s.enum %} in {{ s.enum | map('tojson') | join(', ') }}{% endif %}{%- endmacro %}
{%- for t in tools or [] %}{% set f = t.function %}type {{ f.name }} = (_: {
{%- for name, s in f.parameters.properties.items() %}
// {{ s.description | default('') }}
{{ name }}{{ '' if name in (f.parameters.required or []) else '?' }}: {{ kind(s) }},
{%- endfor %}
}) => any;
{% endfor %}""",
    "tool results": """
{%- for m in messages %}{% if m.role == 'tool' %}{% if loop.first or loop.previtem.role != 'tool' %}<results>{% endif %}
{{ m.name | default('?') }} {{ m.tool_call_id }} {{ m.content }}
{%- if loop.last or loop.nextitem.role != 'tool' %}</results>{% endif %}{% endif %}{% endfor %}""",
    "do and debug": "{% do messages.append(1) %}",
    "inheritance": "{% extends 'other' %}",
    "filter blocks": "{% filter upper %}a{{ messages[0].role }}{% endfilter %}{% block x %}b{% endblock %}",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & then, in °C",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "unit": {"type": ["string", "null"], "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "weather", "arguments": {"city": "Köln"}},
}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "a question": {"messages": [{"role": "user", "content": "Hi <there> & 'you'\n"}]},
    "three turns": {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": " a question. "},
            {"role": "assistant", "content": "<think>so</think>\n\nan answer"},
            {"role": "user", "content": 'naïve 中文 👩‍👩‍👧 e\u0301 \\ " \u2028 {{ x }} {% if %}'},
        ],
        "add_generation_prompt": True,
    },
    "a tool": {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "look"},
            {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": '{"t": 21.5}'},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "21.5 °C", "reasoning_content": "\nit said so\n"},
        ],
        "tools": [WEATHER],
    },
    "documents": {
        "messages": [{"role": "user", "content": ""}, {"role": "user", "content": "x"}],
        "documents": [{"title": "t", "text": "a\nb"}, {"text": "c"}],
        "tools": [],
        "add_generation_prompt": True,
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "audio"}], "thinking": "hm"},
        ]
    },
    "a long one": {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": f"{i} " * 500} for i in range(60)
        ]
    },
}
