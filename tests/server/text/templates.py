"""Small chat templates in the manner of model families.

They are not copies: each has only what matters for what its family reads, refuses and drops.
"""

# ruff: noqa: E501 (a template is easier to read with its own lines)
from __future__ import annotations

_TEXT_PARTS = "{%- for part in m.content %}{%- if part.type == 'text' %}{{ part.text }}{%- endif %}{%- endfor %}"

FAMILIES: dict[str, str] = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # One [INST] block a turn; the system message is a part of the first one; strict alternation.
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}<s>[INST] "
        "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content | trim }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
    ),
    "llama3": (
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
        "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # One call a turn, without text beside it; tools stand before the first user message.
    "llama3.1": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: now\n\n"
        "{{ system }}<|eot_id|>"
        "{% if tools %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}"
        "<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n"
        "{% for t in tools %}{{ t | tojson(indent=4) }}\n\n{% endfor %}{{ first }}<|eot_id|>{% endif %}"
        "{% for m in messages %}"
        "{% if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% elif 'tool_calls' in m %}"
        "{% if m.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"
        "{% set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
        "{% else %}<|start_header_id|>ipython<|end_header_id|>\n\n"
        "{% if m.content is mapping or m.content is iterable %}{{ m.content | tojson }}"
        "{% else %}{{ m.content }}{% endif %}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "llama4": (
        "<|begin_of_text|>{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'image' %}<|image|>{% elif part.type == 'text' %}{{ part.text | trim }}"
        "{% endif %}{% endfor %}{% endif %}"
        "{% for call in m.tool_calls or [] %}[{{ call.function.name }}("
        "{% for k in call.function.arguments %}{{ k }}={{ call.function.arguments[k] }}{% endfor %}"
        ")]{% endfor %}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
    ),
    # No system role at all.
    "mistral-v1": (
        "<s>{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    ),
    # Ids of nine characters; calls or text, not both; text arguments would be encoded twice.
    "mistral-v3": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
        "{% set users = turns | selectattr('role', 'equalto', 'user') | list %}"
        "{% set ns = namespace(i=0) %}{% for m in turns %}"
        "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
        "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
        "{% set ns.i = ns.i + 1 %}{% endif %}{% endfor %}"
        "<s>{% for m in turns %}{% if m.role == 'user' %}"
        "{% if tools and m == users[-1] %}[AVAILABLE_TOOLS] [{% for t in tools %}"
        '{"type": "function", "function": {{ t.function | tojson }}}{% endfor %}][/AVAILABLE_TOOLS]'
        "{% endif %}[INST] {% if loop.first and system %}{{ system }}\n\n{% endif %}"
        "{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
        "{% if call.id | length != 9 %}{{ raise_exception('ids of length 9') }}{% endif %}"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, '
        '"id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]</s>'
        "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
        "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
        "{{ raise_exception('ids of length 9') }}{% endif %}"
        '[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}'
        "[/TOOL_RESULTS]{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
    ),
    # The system message goes into the last message, if that is the user's.
    "mistral-last": (
        "<s>{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
        "{{ call.function | tojson }}{% endfor %}]</s>"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
        "{% elif m.role == 'assistant' %}{{ m.content }}</s>"
        "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
    ),
    # Arguments are concatenated, so they must be text; a system message may stand anywhere.
    "mistral-tekken": (
        "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}"
        "[/SYSTEM_PROMPT]{% elif m.role == 'user' %}"
        "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "[INST]{% if m.content is string %}{{ m.content }}{% else %}"
        + _TEXT_PARTS
        + "{% endif %}[/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments }}{% endfor %}</s>"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"
    ),
    "qwen2.5": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% else %}{% set system = 'You are helpful.' %}{% endif %}<|im_start|>system\n{{ system }}"
        "{% if tools %}\n\n<tools>{% for t in tools %}\n{{ t | tojson }}{% endfor %}\n</tools>{% endif %}"
        "<|im_end|>\n{% for m in messages %}"
        "{% if m.role == 'user' or (m.role == 'system' and not loop.first) or "
        "(m.role == 'assistant' and not m.tool_calls) %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant{% if m.content %}\n{{ m.content }}{% endif %}"
        "{% for call in m.tool_calls %}{% if call.function %}{% set call = call.function %}{% endif %}"
        '\n<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}<|im_end|>\n"
        "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
        "<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Reasoning only after the last user message.
    "qwen3": (
        "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}"
        "{{ messages[0].content + '\n\n' }}{% endif %}<tools>{% for t in tools %}\n{{ t | tojson }}"
        "{% endfor %}\n</tools><|im_end|>\n{% elif messages[0].role == 'system' %}"
        "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% if m.reasoning_content is string and loop.index0 > ns.last %}"
        "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
        '{% for call in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ call.function.name }}", '
        '"arguments": {% if call.function.arguments is string %}{{ call.function.arguments }}'
        "{% else %}{{ call.function.arguments | tojson }}{% endif %}}\n</tool_call>{% endfor %}<|im_end|>\n"
        "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
        "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}"
    ),
    "gemma2": (
        "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # The system message goes before the first user's text; its parts are read by their first one.
    "gemma3": (
        "<bos>{% if messages[0].role == 'system' %}{% if messages[0].content is string %}"
        "{% set prefix = messages[0].content + '\n\n' %}{% else %}"
        "{% set prefix = messages[0].content[0].text + '\n\n' %}{% endif %}"
        "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ prefix if loop.first else '' }}{% if m.content is string %}{{ m.content | trim }}"
        "{% elif m.content is iterable %}{% for part in m.content %}{% if part.type == 'image' %}"
        "<start_of_image>{% elif part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}"
        "{% endif %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # System messages are dropped without a word.
    "phi3": (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n"
        "{% elif m.role == 'assistant' %}<|assistant|>\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
    ),
    "phi4": (
        "{% for m in messages %}{% if m.role == 'system' %}<|system|>{{ m.content }}"
        "{% if m.tools %}<|tool|>{{ m.tools }}<|/tool|>{% endif %}<|end|>"
        "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # Calls are written only beside a content that is null; reasoning in earlier answers is cut.
    "deepseek-r1": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.system = m.content %}{% endif %}{% endfor %}<｜begin▁of▁sentence｜>{{ ns.system }}"
        "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' and m.content is none %}{% for call in m.tool_calls %}"
        "<｜tool▁calls▁begin｜>{{ call.type }}<｜tool▁sep｜>{{ call.function.name }}\n"
        "{{ '```json\n' + call.function.arguments + '\n```' }}<｜tool▁call▁end｜>{% endfor %}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}"
        "<｜end▁of▁sentence｜>{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}"
        "<｜tool▁output▁end｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    ),
    "command": (
        "<BOS_TOKEN>{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ messages[0].content }}<|END_OF_TURN_TOKEN|>"
        "{% else %}{% set turns = messages %}{% endif %}"
        "{% for d in documents or [] %}Document: {{ loop.index0 }}\n"
        "{% for key, value in d.items() %}{{ key }}: {{ value }}\n{% endfor %}{% endfor %}"
        "{% for m in turns %}{% if m.role == 'user' %}<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ m.content }}"
        "<|END_OF_TURN_TOKEN|>{% elif m.role == 'assistant' %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "{{ m.content }}<|END_OF_TURN_TOKEN|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
    ),
    "granite3": (
        "{% for d in documents or [] %}<|start_of_role|>document<|end_of_role|>Title: {{ d.title }}\n"
        "{{ d.text }}<|end_of_text|>\n{% endfor %}"
        "{% if tools %}<|start_of_role|>tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>"
        "{% if m.tool_calls %}<|tool_call|>[{% for call in m.tool_calls %}{{ call.function | tojson }}"
        "{% endfor %}]{% endif %}{{ m.content }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
    ),
    "smollm3": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}<|im_start|>system\nReasoning: "
        "{{ '/think' if enable_thinking | default(true) else '/no_think' }}\n{{ system }}\n"
        "{% for t in xml_tools or [] %}{{ t }}{% endfor %}<|im_end|>\n"
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content.lstrip('\n') }}<|im_end|>\n"
        "{% elif m.role == 'tool' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking | default(true) %}<think>\n\n</think>\n{% endif %}{% endif %}"
    ),
    # Only the first instructions and the first call are read; thinking excludes text beside calls.
    "harmony": (
        "<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>"
        "{% if messages[0].role in ('developer', 'system') %}{% set rest = messages[1:] %}"
        "<|start|>developer<|message|>{{ messages[0].content }}"
        "{% else %}{% set rest = messages %}<|start|>developer<|message|>{% endif %}"
        "{% for t in tools or [] %}{{ '// ' + t.function.description }}\ntype {{ t.function.name }} = "
        "{% for k in t.function.parameters.properties %}{{ k }}{% endfor %}{% endfor %}<|end|>"
        "{% set ns = namespace(call=none) %}{% for m in rest %}{% if m.role == 'assistant' %}"
        "{% if 'tool_calls' in m %}{% if m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
        "{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>"
        "{{ m.content or m.thinking }}<|end|>{% endif %}{% set call = m.tool_calls[0].function %}"
        "<|start|>assistant<|channel|>commentary to=functions.{{ call.name }} <|constrain|>json<|message|>"
        "{{ call.arguments | tojson }}<|call|>{% set ns.call = call.name %}"
        "{% else %}{% if loop.last and m.thinking and not add_generation_prompt %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% set ns.call = none %}{% endif %}"
        "{% elif m.role == 'tool' %}{% if ns.call is none %}{{ raise_exception('no call') }}{% endif %}"
        "<|start|>functions.{{ ns.call }} to=assistant<|channel|>commentary<|message|>"
        "{{ m.content | tojson }}<|end|>"
        "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    # Content is read as parts only.
    "llava": (
        "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content %}"
        "{% if part.type == 'image' %}<image>{% endif %}{% endfor %}"
        "{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ '' if loop.first else ' / ' }}{{ part['text'] }}"
        "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "qwen-vl": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nHelpful."
        "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
        "<|im_end|>\n{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|image_pad|>"
        "{% elif 'text' in part %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + eos_token }}"
        "{% elif m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + eos_token }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
    ),
    # Tools stand in the system message; calls are read by key and value.
    "glm4": (
        "[gMASK]<sop>{% if tools %}<|system|>\n# Tools{% for t in tools %}\n{{ t.function | tojson }}"
        "{% endfor %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|assistant|>\n{% if m.reasoning_content %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
        "{% for k, v in call.function.arguments.items() %}\n<arg_key>{{ k }}</arg_key>\n"
        "<arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
        "{% elif m.role == 'tool' %}<|observation|>\n{{ m.content }}"
        "{% elif m.role == 'system' %}<|system|>\n{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # Calls and results are known by their ids; `name` stands in the place of the role.
    "kimi": (
        "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
        "{% for m in messages %}<|im_{{ m.role if m.role != 'tool' else 'system' }}|>"
        "{{ m.name or m.role }}<|im_middle|>"
        "{% if m.tool_calls %}{{ m.content }}<|tool_calls_section_begin|>{% for call in m.tool_calls %}"
        "<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ call.function.name }}"
        "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
        "{{ call.function.arguments | tojson }}{% endif %}<|tool_call_end|>{% endfor %}"
        "{% elif m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{{ m.content }}"
        "{% elif m.content is string %}{{ m.content }}{% else %}"
        + _TEXT_PARTS
        + "{% endif %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
    ),
    # Tools with their fields at the top, calls too: the form before OpenAI's.
    "flat": (
        "{% for t in tools or [] %}{{ t.name }}: {{ t.description }} {{ t.parameters | tojson }}\n{% endfor %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
        "<call>{{ call.name }} {{ call.arguments | tojson }}</call>{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
}
