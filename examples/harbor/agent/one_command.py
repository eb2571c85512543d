"""An agent for the sandbox, with nothing but Python: it asks for one command, and runs what the model says."""

import json
import os
import subprocess
import urllib.request

asked = f"{os.environ['INSTRUCTION']}\nAnswer with one shell command and nothing else."
request = urllib.request.Request(
    f"{os.environ['OPENAI_BASE_URL']}/chat/completions",
    json.dumps({"model": "any", "messages": [{"role": "user", "content": asked}], "max_tokens": 32}).encode(),
    {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as reply:
    said = json.load(reply)["choices"][0]["message"]["content"] or ""
command = said.replace("\0", "").strip().strip("`")
subprocess.run(["timeout", "10", "bash", "-c", command], check=False)
