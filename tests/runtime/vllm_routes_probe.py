"""Run by the server's own Python: whether vLLM's own connector sends rows with each token of a request. Prints JSON."""

import json
import sys

import numpy as np
from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector, AuxRequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

connector, request = AuxOutputSchedulerConnector(), Request("a", [1, 2, 3], SamplingParams(), None)
came = []
for start, rows in [(0, 3), (3, 1), (4, 1)]:
    request.append_output_token_ids([7])
    output = AuxRequestOutput(start, np.zeros((rows, 2, 2), np.uint8))
    came.append(connector.take_output(request, {"a": output}) is not None)
sys.stdout.write("RESULT " + json.dumps(came) + "\n")
