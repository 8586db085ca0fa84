"""Make chat_templates.json: chat templates in the styles people write, and what transformers renders from them.

usage: python make_chat_templates.py        (needs requirements.txt)

`templates` are whole ones, in the styles of models that people use, over `chats`. `pieces` are small ones, of what Jinja2 and
Python's types can do, over `variables`; `null` stands for an error. `continued` are chats whose last message is continued.
"""
import json
import pathlib

from chat_template_pieces import PIECES, VARIABLES
from chat_template_styles import CHATS, CONTINUED, TEMPLATES
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

HERE = pathlib.Path(__file__).parent
tok = AutoTokenizer.from_pretrained(HERE / "shakespeare")


def render(template, messages, **arguments):
    try:
        return tok.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
    except Exception as error:
        print("refused:", type(error).__name__, str(error)[:100])
        return None


def piece(template):
    try:
        return _compile_jinja_template(template).render(**VARIABLES)
    except Exception:
        return None


templates = {
    name: {"template": text, "texts": {chat: render(text, **arguments) for chat, arguments in CHATS.items()}}
    for name, text in TEMPLATES.items()
}
continued = [
    {"template": text, "messages": messages, "field": field,
     "text": render(text, messages, continue_final_message=True if field == "content" else field)}
    for text, messages, field in CONTINUED
]
(HERE / "chat_templates.json").write_text(json.dumps({
    "chats": CHATS,
    "templates": templates,
    "continued": continued,
    "variables": VARIABLES,
    "pieces": [[text, piece(text)] for text in PIECES],
}, ensure_ascii=False, indent=1) + "\n")
