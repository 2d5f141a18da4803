"""Conversations to prompts, by the model's chat template (vLLM: `vllm/entrypoints/chat_utils.py`)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from folovllm.checks import check_bool, invalid

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
# A template that is written for others than these may leave them out without a word.
RARE_ROLES = ("developer", "tool")
# What a template may raise beside its own errors: it is a program that works on the user's messages.
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class ChatOptions:
    """How conversations become text. The names are vLLM's. Raises ValueError for options that contradict each other."""

    chat_template: str | None = None  #: a template instead of the model's
    #: Begin the assistant's turn; None: unless the final message is continued
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False  #: leave the last message open, so that the output goes on with it
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  #: variables of the template

    def __post_init__(self) -> None:
        if self.chat_template is not None and not (isinstance(self.chat_template, str) and self.chat_template):
            raise invalid("chat_template", self.chat_template, "None or a Jinja template")
        check_bool("continue_final_message", self.continue_final_message)
        if self.add_generation_prompt is not None:
            check_bool("add_generation_prompt", self.add_generation_prompt, "True, False or None")
        if self.add_generation_prompt and self.continue_final_message:
            raise invalid("add_generation_prompt", True, "False or None with continue_final_message=True")
        kwargs = self.chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise invalid("chat_template_kwargs", kwargs, "None or a dict of the template's variables")
        reserved = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
        for name in kwargs.keys() & (reserved - {"tools", "documents"}):
            allowed = "variables of the template; chat() has arguments for some others"
            raise invalid(f"chat_template_kwargs[{name!r}]", kwargs[name], allowed)


def conversations_of(messages: Any) -> list[Sequence[Message]]:
    """One conversation or several as a list. Raises ValueError for another type."""
    if not isinstance(messages, (list, tuple)):
        raise invalid("messages", messages, "a list of messages, or a list of such lists")
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def render(tokenizer: PreTrainedTokenizerBase, conversation: Any, options: ChatOptions) -> str:
    """A conversation as text.

    Raises ValueError for a malformed message, for one that the template refuses, and for one with a role that the
    template leaves out.
    """
    messages = checked(conversation)
    if any(isinstance(message.get("content"), list) for message in messages):
        messages = in_template_format(tokenizer, messages, options)
    try:
        text = apply(tokenizer, messages, options)
    except RENDER_ERRORS as error:
        raise ValueError(f"messages={conversation!r} is refused by the chat template: {error}") from error
    for i, message in enumerate(messages):
        if message["role"] in RARE_ROLES and not_rendered(tokenizer, messages, i, options, text):
            taken = "roles that the model's chat template renders, which leaves this one out"
            raise invalid(f"messages[{i}]['role']", message["role"], taken)
    return text


def checked(conversation: Any) -> list[dict[str, Any]]:
    """The messages of a conversation, with parts that are text only."""
    roles = " | ".join(f'"{role}"' for role in ROLES)
    allowed = f'a non-empty list of {{"role": {roles}, "content": text or text parts}}'
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise invalid("messages", conversation, allowed)
    messages = []
    for i, message in enumerate(conversation):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise invalid(f"messages[{i}]", message, allowed)
        for key in message.keys() - set(KEYS):
            raise invalid(f"messages[{i}][{key!r}]", message[key], f"no other keys than {', '.join(KEYS)}")
        for key in ("name", "tool_call_id"):
            if not isinstance(message.get(key, ""), str):
                raise invalid(f"messages[{i}][{key!r}]", message[key], "a string")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [text_part(f"messages[{i}]['content'][{j}]", part) for j, part in enumerate(content)]
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise invalid(f"messages[{i}]", message, allowed)
        messages.append(dict(message) | ({} if content is None else {"content": content}))
    return messages


def text_part(name: str, part: Any) -> dict[str, str]:
    """A part of a message's content. Raises ValueError for any that is not text."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise invalid(name, part, '{"type": "text", "text": text}, because the model reads text only')
    return {"type": "text", "text": part["text"]}


def in_template_format(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], options: ChatOptions
) -> list[dict[str, Any]]:
    """Messages with parts as they are, for a template that reads parts; else joined by newlines, as in vLLM."""
    texts = [
        message | {"content": "\n".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    parts = [
        message | {"content": [{"type": "text", "text": message["content"]}]} if "content" in message else message
        for message in texts
    ]
    try:
        reads_parts = apply(tokenizer, parts, options) == apply(tokenizer, texts, options)
    except RENDER_ERRORS:
        return texts
    return messages if reads_parts else texts


def not_rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], index: int, options: ChatOptions, text: str
) -> bool:
    """Whether the text would be the same with another content of one message."""
    other = messages[index] | {"content": "x" if messages[index].get("content") != "x" else "y"}
    try:
        return apply(tokenizer, [*messages[:index], other, *messages[index + 1 :]], options) == text
    except RENDER_ERRORS:
        return False


def apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], options: ChatOptions) -> str:
    """The template's text."""
    begin = options.add_generation_prompt
    return str(
        tokenizer.apply_chat_template(
            messages,
            chat_template=options.chat_template,
            add_generation_prompt=not options.continue_final_message if begin is None else begin,
            continue_final_message=options.continue_final_message,
            tokenize=False,
            **options.chat_template_kwargs,
        )
    )
