"""Llama 4's chat format, as a Jinja text of our own for `tokenizer.apply_chat_template`.

A turn is `<|header_start|>role<|header_end|>`, two line ends, the content, and a stop token: `<|eot|>`, or `<|eom|>`
where the model calls a tool and the turn goes on after the result. Results come in under the role `ipython`.
"""

CHAT_TEMPLATE = """\
{%- macro header(role) -%}
{{- '<|header_start|>' + role + '<|header_end|>\\n\\n' -}}
{%- endmacro -%}
{%- macro words(content) -%}
{%- if content is string -%}
{{- content -}}
{%- elif content is not none -%}
{%- for piece in content -%}
{{- piece.text if piece.type == 'text' else '<|image|>' -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro toolbox() -%}
{{- 'You can call these functions. To call one, answer with a JSON object that holds its "name" and "parameters".' -}}
{%- for tool in tools -%}
{{- '\\n' + (tool | tojson) -}}
{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- if tools and messages[0].role != 'system' -%}
{{- header('system') + toolbox() + '<|eot|>' -}}
{%- endif -%}
{%- for message in messages -%}
{{- header('ipython' if message.role == 'tool' else message.role) -}}
{%- if message.role in ['tool', 'ipython'] and message.content is mapping -%}
{{- message.content | tojson -}}
{%- else -%}
{{- words(message.content) -}}
{%- endif -%}
{%- if message.tool_calls -%}
{{- '<|python_start|>' -}}
{%- for call in message.tool_calls -%}
{%- set function = call.function if call.function else call -%}
{{- '\\n' if not loop.first else '' -}}
{{- '{"name": ' + (function.name | tojson) + ', "parameters": ' -}}
{{- (function.arguments if function.arguments is string else function.arguments | tojson) + '}' -}}
{%- endfor -%}
{{- '<|python_end|><|eom|>' -}}
{%- else -%}
{%- if loop.first and message.role == 'system' and tools -%}
{{- '\\n\\n' + toolbox() -}}
{%- endif -%}
{{- '<|eot|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- header('assistant') -}}
{%- endif -%}
"""
