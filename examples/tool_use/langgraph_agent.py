"""The same agent as a graph of LangGraph. It knows Lockstep by its environment variables alone."""

import os
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

TURNS = 3


def main(question: str, in_stock: dict[str, str]) -> None:
    @tool
    def stock(item: str) -> str:
        """how many are left"""
        return in_stock.get(item, "unknown")

    model = ChatOpenAI(model=os.environ["OPENAI_MODEL"], max_completion_tokens=96).bind_tools([stock])

    def answer(state: MessagesState) -> dict:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("answer", answer)
    graph.add_node("tools", ToolNode([stock]))
    graph.add_edge(START, "answer")
    graph.add_conditional_edges("answer", tools_condition)
    graph.add_edge("tools", "answer")
    try:
        ended = graph.compile().invoke({"messages": [("user", question)]}, {"recursion_limit": 2 * TURNS})
        print(ended["messages"][-1].content)
    except GraphRecursionError as error:  # the turns are over: what was said is judged
        print(error)


if __name__ == "__main__":
    main(sys.argv[1], dict(pair.split("=") for pair in sys.argv[2:]))
