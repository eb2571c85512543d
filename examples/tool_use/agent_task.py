"""The task of task.py for agents in processes of their own: a plain loop, and a client of Anthropic's that streams.

AGENTS="openai_agents_agent.py langgraph_agent.py" names others, AGENT_PYTHON the Python that has their packages.
"""

import asyncio
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from task import STOCK, Scenario, call_tool
from task import demonstrations as demonstrations  # what a tiny model learns first
from task import scenarios as questions

import lockstep as ls

HERE = Path(__file__).parent
AGENTS = os.environ.get("AGENTS", "loop_agent.py streamed_agent.py").split()
PYTHON = os.environ.get("AGENT_PYTHON", sys.executable)


@dataclass(frozen=True)
class Attempt:
    agent: str
    scenario: Scenario


def scenarios() -> list[Attempt]:
    return [Attempt(agent, scenario) for scenario in questions() for agent in AGENTS]


async def rollout(model: ls.TrainableModel, scenario: Attempt, temperature: float) -> ls.Trajectory:
    with model.episode(sampling={"temperature": temperature}) as episode:
        stock = [f"{item}={count}" for item, count in STOCK.items()]
        process = await asyncio.create_subprocess_exec(
            *(PYTHON, str(HERE / scenario.agent), scenario.scenario.question, *stock),
            env={**os.environ, **episode.environment()},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"{scenario.agent} ended with {process.returncode}: {errors.decode()[-500:]}")
        trajectory = episode.trajectory(reward=0.0)
    trajectory.reward = reward(trajectory, scenario.scenario)
    return trajectory


def reward(trajectory: ls.Trajectory, scenario: Scenario) -> float:
    """As in task.py, from what the model said itself."""
    messages = [choice.message for choice in trajectory.choices]
    calls = [call.function.arguments for message in messages for call in message.tool_calls or []]
    looked_up = any(call_tool(scenario, arguments) is not None for arguments in calls)
    right = re.findall(r"\d+", messages[-1].content or "") == [str(scenario.count)]
    return 0.5 + 0.5 * right if looked_up else 0.0
