"""Chat requests that bring the ids of the turns that they continue (`lockstep_wire/history.py`).

vLLM renders the request's messages as always, which checks them and prepares its parsers. Then its prompt is replaced.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

from lockstep_wire import history


def apply() -> None:
    """Replaces the prompt of requests with a history. Called once, in the API process."""
    from vllm.renderers.online_renderer import OnlineRenderer

    original = OnlineRenderer.preprocess_chat

    async def preprocess_chat(self, request: Any, messages: list[Any], *args: Any, **options: Any):
        conversation, inputs = await original(self, request, messages, *args, **options)
        field = (getattr(request, "model_extra", None) or {}).get(history.FIELD)
        if field is None:
            return conversation, inputs
        options = {**options, "parser": None}  # it has seen the request above

        async def render(some: list[Any], *, prompt: bool) -> list[int]:
            asked = request.model_copy(update={"add_generation_prompt": prompt})
            _, rendered = await original(self, asked, some, *args, **options)
            return list(rendered[0]["prompt_token_ids"])

        ids = await _continued(self, history.decode(field), messages, list(inputs[0]["prompt_token_ids"]), render)
        replaced = {name: value for name, value in inputs[0].items() if name != "prompt"}
        return conversation, [{**replaced, "prompt_token_ids": ids}]

    OnlineRenderer.preprocess_chat = preprocess_chat


async def _continued(
    renderer: Any, known: history.History, messages: list[Any], full: list[int], render: Any
) -> list[int]:
    short = await render(history.short_conversation(messages[known.messages :]), prompt=True)
    marker = renderer.renderer.get_tokenizer().encode(history.MARKER, add_special_tokens=False)
    asking = [history.STANDS_FOR_ASKING]
    prompt = history.generation_prompt(await render(asking, prompt=True), await render(asking, prompt=False))
    ids = history.continued(known, full, history.after_marker(short, marker), prompt)
    limit = renderer.model_config.max_model_len
    if len(ids) >= limit:
        raise ValueError(
            f"the prompt has {len(ids)} tokens with the thinking that was sampled, and the model takes {limit} "
            "with the reply: raise max_model_len or let the agent compact its history earlier"
        )
    return ids
