"""The same agent with the OpenAI Agents SDK, which calls Responses. It knows Lockstep by its environment variables alone."""

import os
import sys

from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
from agents.exceptions import AgentsException

TURNS = 3


def main(question: str, in_stock: dict[str, str]) -> None:
    set_tracing_disabled(True)  # which would call OpenAI

    @function_tool
    def stock(item: str) -> str:
        """how many are left"""
        return in_stock.get(item, "unknown")

    settings = ModelSettings(max_tokens=96)
    agent = Agent(name="stock", model=os.environ["OPENAI_MODEL"], tools=[stock], model_settings=settings)
    try:
        print(Runner.run_sync(agent, question, max_turns=TURNS).final_output)
    except AgentsException as error:  # the turns are over, or a call makes no sense: what was said is judged
        print(error)


if __name__ == "__main__":
    main(sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:]))
