"""An agent as anybody writes one: a plain loop with OpenAI's client. It knows Lockstep by its environment variables alone."""

import os
import sys

from openai import OpenAI

TURNS = 3


def main(question: str, stock: dict[str, str]) -> None:
    from task import TOOLS, asked_item

    client, messages = OpenAI(), [{"role": "user", "content": question}]
    for _ in range(TURNS):
        reply = client.chat.completions.create(
            model=os.environ["OPENAI_MODEL"], messages=messages, tools=TOOLS, max_tokens=96
        )
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            answer = stock.get(asked_item(call.function.arguments), "unknown")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": answer})


if __name__ == "__main__":
    main(sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:]))
