"""Chats come out in Llama 4's format, letter by letter."""

import pytest

USER = {"role": "user", "content": "What is 2 + 2?"}


def render(tokenizer, messages: list[dict], **options) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_a_plain_chat(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And  spaces \n stay? "},
    ]
    assert render(tokenizer, messages, add_generation_prompt=True) == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nWhat is 2 + 2?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n4<|eot|>"
        "<|header_start|>user<|header_end|>\n\nAnd  spaces \n stay? <|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


def test_without_a_generation_prompt_the_text_ends_with_the_last_turn(tokenizer):
    assert render(tokenizer, [USER]) == ("<|begin_of_text|><|header_start|>user<|header_end|>\n\nWhat is 2 + 2?<|eot|>")


@pytest.mark.parametrize("role", ["tool", "ipython"])
def test_a_tool_call_ends_its_message_and_the_result_comes_from_ipython(role: str, tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    messages = [
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, call]},
        {"role": role, "content": {"sum": 4}},
        {"role": "assistant", "content": "4"},
    ]
    assert render(tokenizer, messages) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nWhat is 2 + 2?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nLet me see.<|python_start|>"
        '{"name": "add", "parameters": {"a": 2, "b": 2}}\n{"name": "add", "parameters": {"a": 2, "b": 2}}'
        "<|python_end|><|eom|>"
        '<|header_start|>ipython<|header_end|>\n\n{"sum": 4}<|eot|>'
        "<|header_start|>assistant<|header_end|>\n\n4<|eot|>"
    )


def test_a_tool_call_without_words_and_with_arguments_as_text(tokenizer):
    call = {"function": {"name": "look", "arguments": '{"at": "é"}'}}
    assert render(tokenizer, [{"role": "assistant", "content": None, "tool_calls": [call]}]) == (
        "<|begin_of_text|><|header_start|>assistant<|header_end|>\n\n<|python_start|>"
        '{"name": "look", "parameters": {"at": "é"}}<|python_end|><|eom|>'
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tools_are_listed_in_the_system_turn(system: str | None, tokenizer):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    messages = [USER] if system is None else [{"role": "system", "content": system}, USER]
    before = "" if system is None else "Be brief.\n\n"
    assert render(tokenizer, messages, tools=[tool]) == (
        f"<|begin_of_text|><|header_start|>system<|header_end|>\n\n{before}You can call these functions. To call one, "
        'answer with a JSON object that holds its "name" and "parameters".\n'
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}<|eot|>'
        "<|header_start|>user<|header_end|>\n\nWhat is 2 + 2?<|eot|>"
    )


def test_images_become_their_placeholder(tokenizer):
    content = [{"type": "image", "url": "x"}, {"type": "text", "text": "What is this?"}]
    assert render(tokenizer, [{"role": "user", "content": content}]) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n<|image|>What is this?<|eot|>"
    )


def test_tokens_of_a_chat_begin_once_and_spell_its_text(tokenizer):
    ids = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == render(tokenizer, [USER], add_generation_prompt=True)
    assert ids.count(tokenizer.convert_tokens_to_ids("<|header_start|>")) == 2
