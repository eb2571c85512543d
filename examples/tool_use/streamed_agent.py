"""The same agent with Anthropic's client, streamed. It knows Lockstep by its environment variables alone."""

import os
import sys

from anthropic import Anthropic

TURNS = 3


def main(question: str, stock: dict[str, str]) -> None:
    from task import TOOLS

    function = TOOLS[0]["function"]
    tool = {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
    client, messages = Anthropic(), [{"role": "user", "content": question}]
    for _ in range(TURNS):
        with client.messages.stream(
            model=os.environ["ANTHROPIC_MODEL"], messages=messages, tools=[tool], max_tokens=96
        ) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
            reply = stream.get_final_message()
        messages.append({"role": "assistant", "content": [block.model_dump() for block in reply.content]})
        calls = [block for block in reply.content if block.type == "tool_use"]
        if not calls:
            break
        results = [(call.id, stock.get(str(call.input.get("item")), "unknown")) for call in calls]
        blocks = [{"type": "tool_result", "tool_use_id": name, "content": answer} for name, answer in results]
        messages.append({"role": "user", "content": blocks})


if __name__ == "__main__":
    main(sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:]))
