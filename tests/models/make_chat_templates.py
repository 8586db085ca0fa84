"""Make chat_templates.json: chat templates in the styles people write, and what transformers renders from them.

usage: python make_chat_templates.py        (needs requirements.txt)
"""
import json
import pathlib

from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
tok = AutoTokenizer.from_pretrained(HERE / "shakespeare")
TEMPLATES = {
    # The plain one; one that checks roles, slices and strips; one that uses what only Python's dialect has.
    'chatml':"{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    'llama2':"{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    'python':"{%- set ns = namespace(last='', n=0) %}\n{%- for m in messages[::-1] %}\n    {%- if m.role == 'user' and not ns.last %}\n        {%- set ns.last = m.content.split('\\n')[0] %}\n    {%- endif %}\n    {%- set ns.n = ns.n + 1 %}\n{%- endfor %}\n{{ bos_token }}<{{ ns.last }}>{{ ns.n }}\n{%- for m in messages %}\n{%- if m.content.startswith('Q') %} q{% else %} -{% endif %}{{ m | tojson }}\n{% endfor %}{{ messages | length }}{{ {'b': [1, 2.5, none, true], 'a': '<&\\'é'} | tojson }}|{{ {'k': 1} | tojson(indent=2) }}",
    # Parts that mark what is trained on, and methods of strings and lists.
    'trained': "{%- for m in messages %}\n{%- if m.role == 'assistant' %}\n    {%- generation -%}\n<{{ m.content.strip().removesuffix('1') }}>\n    {%- endgeneration %}\n{% else %}\n {% generation %} {{ m.content.removeprefix('Q') }}{% endgeneration %}\n{{ ['user', 'system'].index(m.role) }}{{ m.role.index('s') }}\n{% endif %}\n{%- endfor %}",
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Q1?\nwell"},
    {"role": "assistant", "content": " A1 "},
    {"role": "user", "content": "  Q2 é  "},
]


def render(messages, template, prompt):
    return tok.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=prompt)


cases = {
    name: {"template": t, "with_prompt": render(MESSAGES, t, True), "first_two": render(MESSAGES[:2], t, False)}
    for name, t in TEMPLATES.items()
}
(HERE / "chat_templates.json").write_text(
    json.dumps({"messages": MESSAGES, "templates": cases}, ensure_ascii=False, indent=1) + "\n")
