"""Chat templates that treat a history as real families do, written for the tiny tokenizer's tokens.

thinking_dropped: as Qwen3, thinking stays in the replies after the last question only, and tool results share a turn.
thinking_opened: as Qwen3.5, in addition the generation prompt opens the thinking, and later replies always have a block.
headers: as Llama 3, texts are trimmed, results of tools have a role of their own, and tools stand in the first question.
"""

from __future__ import annotations

_SYSTEM = """\
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- if tools %}{{- '<|im_start|>system\\nTools: ' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
"""
_REPLY = """\
{%- set text = (message.content or '').split('</think>')[-1].lstrip('\\n') %}
{%- set thought = (message.content or '').split('</think>')[0].split('<think>')[-1].strip('\\n')
    if '</think>' in (message.content or '') else '' %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (KEEP) %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
{{- text }}
{%- for call in message.tool_calls or [] %}
{%- set args = call.function.arguments %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- args if args is string else args | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
"""
_TURNS = (
    """\
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- elif message.role == 'assistant' %}
"""
    + _REPLY
    + """\
{%- elif message.role == 'user' or not loop.first %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
"""
)
_HEADERS = """\
{%- set offered = namespace(tools=tools) %}
{%- for message in messages %}
{%- set role = 'ipython' if message.role == 'tool' else message.role %}
{{- '<|im_start|>' + role + '\\n\\n' }}
{%- if message.role == 'user' and offered.tools %}{{- (offered.tools | tojson) + '\\n' }}{%- set offered.tools = none %}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set args = call.function.arguments %}
{{- '{"name": "' + call.function.name + '", "parameters": ' + (args if args is string else args | tojson) + '}' }}
{%- endfor %}
{{- (message.content or '') | trim + '<|im_end|>' }}
{%- endfor %}
"""

TEMPLATES = {
    "thinking_dropped": _SYSTEM
    + _TURNS.replace("KEEP", "loop.last or thought")
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    "thinking_opened": _SYSTEM
    + _TURNS.replace("KEEP", "true")
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}",
    "headers": _HEADERS + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}",
}
