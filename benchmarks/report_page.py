"""How fast a run's report opens from the disk, and how it behaves with 10,000 trajectories, in
headless Chromium. The run is made up: 50 steps, random rewards, text of 24 tokens a reply.

    PYTHONPATH=tests/support python benchmarks/report_page.py --model DIR --trajectories 1600 10000

Milliseconds are the browser's own clock: from the start of the navigation to the load event and to
the first painted frame; then the longest task of the page while every step's trajectories are
chosen, sorted, scrolled through and a transcript is opened.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from tiny import tiny_option

from lockstep.cli.report.page import build_page
from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup
from random_batches import choice
from runs import healthy_metrics, make_run

STEPS, GROUP, TOKENS = 50, 8, 24
USE = """
<script>
const longest = {}; let doing = "load", since = performance.now();
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
async function act(name, work) {
  doing = name; await wait(50);
  const start = performance.now(); await work();
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  longest[name] = performance.now() - start;
}
const change = (id, value) => { const box = document.getElementById(id); box.value = value; box.dispatchEvent(new Event("change")); };
window.addEventListener("load", async () => {
  const [page] = performance.getEntriesByType("navigation");
  await act("frame after load", async () => {});
  const painted = performance.now();
  await act("all steps", async () => change("step", "all"));
  await act("sort", async () => change("order", "best"));
  const list = document.getElementById("list");
  let slowest = 0;
  for (let k = 1; k <= 20; k++) {
    await act("scroll", async () => { list.scrollTop = list.scrollHeight * k / 20; });
    slowest = Math.max(slowest, longest.scroll);
  }
  longest.scroll = slowest;
  await act("open a transcript", async () => document.querySelector(".row").click());
  fetch("ADDRESS", { method: "POST", mode: "no-cors", body: JSON.stringify({ load: page.loadEventStart, painted, ...longest }) });
});
</script></body>"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=Path("."), help="a folder with a tokenizer; ids are shown without"
    )
    parser.add_argument("--trajectories", type=int, nargs="+", default=[1600, 10000])
    tiny_option(parser, trajectories=[400])
    parser.add_argument("--keep", type=Path, help="write the largest page here")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    for count in options.trajectories:
        with tempfile.TemporaryDirectory() as folder:
            random = np.random.default_rng(0)
            groups = {step: _groups(count // STEPS // GROUP, step, random) for step in range(1, STEPS + 1)}
            run = make_run(Path(folder), str(options.model.resolve()), healthy_metrics(STEPS, random), groups, random)
            start = time.process_time()
            page = build_page(run.path)
            built = time.process_time() - start
            shown = measured(page, Path(folder), browser)
        print(
            f"{count} trajectories, {len(page) / 1e6:.1f} MB, built in {built:.1f} CPU s; milliseconds: {shown}",
            flush=True,
        )
        if options.keep:
            options.keep.write_text(page, encoding="utf-8")


def measured(page: str, folder: Path, browser: str) -> dict[str, int]:
    """Milliseconds by what the page did."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(120)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        file = folder / "page.html"
        page = page.replace("connect-src 'self'", f"connect-src {address}")
        file.write_text(page.replace("</body>", USE.replace("ADDRESS", address)), encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        with subprocess.Popen(
            [*command, "--remote-debugging-port=0", file.as_uri()], stderr=subprocess.DEVNULL
        ) as program:
            try:
                connection, _ = listener.accept()
                request = b""
                while not request.endswith(b"}"):
                    request += connection.recv(65536)
            finally:
                program.terminate()
                program.wait()
    return {name: round(value) for name, value in json.loads(request.partition(b"\r\n\r\n")[2]).items()}


def _groups(count: int, step: int, random: np.random.Generator) -> list[TrajectoryGroup]:
    made = []
    for number in range(count):
        prompt = random.integers(40, 20000, 12).tolist()
        trajectories = []
        for _ in range(GROUP):
            sampled = random.integers(40, 20000, TOKENS).tolist()
            logprobs = (-random.exponential(size=TOKENS)).tolist()
            asked = {"role": "user", "content": f"Question {number} of step {step}"}
            reply = choice(prompt, sampled, version=f"m@{step - 1}", logprobs=logprobs)
            trajectories.append(
                Trajectory(messages_and_choices=[asked, reply], reward=float(random.random() < 0.3 + step / 100))
            )
        made.append(TrajectoryGroup(trajectories=trajectories))
    return made


if __name__ == "__main__":
    main()
