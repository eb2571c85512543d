"""Run by the server's own Python: vLLM's CPU products of adapters, before and after ours take their place. Prints JSON."""

import json
import sys

import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

from lockstep_vllm.patches import cpu_lora

T, I, O, R, L = (int(n) for n in sys.argv[1:6])  # noqa: E741
rng = torch.Generator().manual_seed(int(sys.argv[6]))


def drawn(*shape):
    return torch.randn(shape, generator=rng)


x_TI, a_L1RI, b_L1OR, before_TO = drawn(T, I), drawn(L, 1, R, I), drawn(L, 1, O, R), drawn(T, O + 3)
slots_T = torch.randint(-1, L, (T,), generator=rng)
slots_T[0] = -1
slots_T[1] = L - 1


def adapted(punica):
    """What a linear layer gives whose output's second part has this adapter."""
    hidden_TR, y_TO = torch.zeros(T, R), before_TO.clone()
    punica.bgmv_shrink(x_TI, a_L1RI, hidden_TR, slots_T, 0.5)
    punica.bgmv_expand_slice(hidden_TR, b_L1OR, y_TO, slots_T, 3, O, add_inputs=True)
    return y_TO


def prefilled():
    """The same for whole sequences: vLLM then names the slot of each, and how long it is."""
    used_T, lengths = torch.unique_consecutive(slots_T, return_counts=True)
    hidden_TR, y_TO = torch.zeros(T, R), before_TO.clone()
    where = (torch.zeros(0), lengths, used_T, len(used_T), int(lengths.max()), T)
    punica_cpu.sgmv_shrink(x_TI, a_L1RI, hidden_TR, *where, 0.5)
    punica_cpu.sgmv_expand_slice(hidden_TR, b_L1OR, y_TO, *where, 3, O, True)
    return y_TO


expected_TO = before_TO.clone()
for token, slot in enumerate(slots_T.tolist()):
    if slot >= 0:
        expected_TO[token, 3:] += b_L1OR[slot, 0] @ (0.5 * (a_L1RI[slot, 0] @ x_TI[token]))
base_T = slots_T < 0
errors = {"without_on_base": (adapted(punica_cpu) - expected_TO)[base_T].abs().max().item()}
cpu_lora.apply()
errors["with"] = (adapted(punica_cpu) - expected_TO).abs().max().item()
errors["prefill"] = (prefilled() - expected_TO).abs().max().item()
errors["module"] = (adapted(lora_ops) - expected_TO).abs().max().item()
slots_T = torch.full((T,), L - 1)
expected_TO = before_TO.clone()
expected_TO[:, 3:] += 0.5 * x_TI @ a_L1RI[-1, 0].T @ b_L1OR[-1, 0].T
errors["one_adapter"] = (adapted(punica_cpu) - expected_TO).abs().max().item()
errors["h1_alone"] = 0.0
for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    for width, rank in ((64, 8), (576, 16)):
        x_TI, b_OR, a_RI = drawn(300, width), drawn(width, rank), drawn(rank, width)
        for first in (0, 1, 57):
            for count in (1, 2, 3, 5, 9, 11, 12, 15, 16, 17, 33, 90):
                some_TI = x_TI[first : first + count].contiguous()
                for weight in (a_RI, b_OR):
                    all_TO = cpu_lora._product(x_TI[:, : weight.shape[1]], weight)[first : first + count]
                    alone_TO = cpu_lora._product(some_TI[:, : weight.shape[1]], weight)
                    errors["h1_alone"] = max(errors["h1_alone"], float((all_TO != alone_TO).any()))
sys.stdout.write("RESULT " + json.dumps(errors) + "\n")
