"""A verifiers v1 taskset: how many are left? The answer is in the question's own table."""

# pyright: reportMissingImports=false

import verifiers.v1 as vf

__all__ = ["StockTaskset"]
STOCK = {"apples": 3, "pears": 7, "plums": 2, "figs": 5}


class StockData(vf.TaskData):
    answer: str


class StockTask(vf.Task[StockData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        """1 for the number alone, 0.5 where it stands among other words."""
        said = trace.last_reply.strip().strip(".")
        return 1.0 if said == self.data.answer else 0.5 * (self.data.answer in said)


class StockTaskset(vf.Taskset[StockTask]):
    def load(self):
        table = ", ".join(f"{count} {item}" for item, count in STOCK.items())
        for item, count in STOCK.items():
            prompt = f"In stock: {table}. How many {item}? Answer with the number alone."
            yield StockTask(StockData(prompt=prompt, answer=str(count)), self.config.task)
