// The page of a run. All text of the run reaches the page as textContent, never as HTML.

const run = JSON.parse(document.getElementById("data").textContent);
const byId = (name) => document.getElementById(name);
const values = (name) => run.metrics[name] || run.steps.map(() => null);
const column = Object.fromEntries(run.columns.map((name, k) => [name, k]));
const ROW = 34;
const chunks = new Map();
let rows = [], open = null, colour = "advantage", tokens = [];

async function chunk(number) {
  if (!chunks.has(number)) {
    const text = atob(byId(`chunk-${number}`).textContent);
    const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    chunks.set(number, new Response(plain).json());
  }
  return chunks.get(number);
}

function lastOf(name) {
  const known = values(name).filter((v) => v !== null);
  return known.length ? known[known.length - 1] : null;
}

function head() {
  byId("name").textContent = run.name;
  const { base_model, family, dtype, lora } = run.identity;
  const weights = lora ? `LoRA rank ${lora.rank}` : "all weights";
  const when = new Date(run.made * 1000).toLocaleString();
  byId("facts").textContent = [base_model, family, dtype, weights, `${Math.max(...run.steps, 0)} steps`, `page of ${when}`].filter(Boolean).join(" · ");
  const tiles = [["reward", "reward of the last step"], ["greedy_reward", "greedy reward"], ["loss", "loss"], ["mismatch", "mismatch, nats per token"],
    ["entropy", "entropy, nats per token"], ["replies_truncated", "replies cut off"], ["verification_power", "verification power"]];
  for (const [name, says] of tiles) {
    const value = lastOf(name);
    if (value === null) continue;
    const tile = element(byId("tiles"), "div", { class: "tile" });
    element(tile, "b", {}, short(value));
    element(tile, "span", {}, says);
  }
  for (const { illness, says, remedy } of run.advice) {
    const card = element(byId("advice"), "div", { class: "advice", "data-illness": illness });
    element(card, "b", {}, says);
    element(card, "p", {}, remedy);
  }
  for (const job of run.jobs) element(byId("advice"), "div", { class: "advice" }, `Job ${job.id} failed: ${job.error}`);
  for (const text of run.damaged) element(byId("advice"), "div", { class: "advice" }, text);
  for (const [name, value] of Object.entries(run.settings)) {
    element(byId("settings"), "dt", {}, name);
    element(byId("settings"), "dd", {}, typeof value === "string" ? value : JSON.stringify(value));
  }
}

function curves() {
  const parent = byId("curves"), steps = run.steps;
  const one = (name, color, label) => ({ name: label || name, color, values: values(name) });
  const std = values("reward_std");
  const around = (sign) => values("reward").map((v, k) => (v === null || std[k] === null ? null : v + sign * std[k]));
  const reward = { ...one("reward", "blue", "sampled, ± spread"), band: [around(-1), around(1)] };
  chart(parent, { title: "Reward", unit: "", steps, series: [reward, one("greedy_reward", "orange", "greedy")] });
  chart(parent, { title: "Loss", unit: "", steps, series: [one("loss", "blue")] });
  chart(parent, { title: "Mismatch and KL", unit: "nats per token", steps, log: true, series: [one("mismatch", "blue"), one("mismatch_kl", "orange", "KL")] });
  chart(parent, { title: "Verification of each step", unit: "nats per token", steps, log: true,
    series: [one("probe", "blue", "difference"), one("probe_noise", "grey", "noise")] });
  chart(parent, { title: "Verification power", unit: "noise units", steps, log: true, series: [one("verification_power", "green")] });
  chart(parent, { title: "Reply length", unit: "tokens", steps, series: [one("reply_tokens_mean", "blue", "mean"), one("reply_tokens_max", "grey", "longest")] });
  chart(parent, { title: "Replies cut off", unit: "share", steps, series: [one("replies_truncated", "orange")] });
  chart(parent, { title: "Entropy", unit: "nats per token", steps, series: [one("entropy", "violet")] });
  chart(parent, { title: "Gradient norm", unit: "", steps, series: [one("grad_norm", "blue")] });
  const shares = values("groups_without_signal").map((v, k) => (v === null ? null : v / Math.max(values("groups")[k], 1)));
  chart(parent, { title: "Groups without signal", unit: "share", steps, series: [{ name: "share", color: "orange", values: shares }] });
  const times = [["seconds_rollout", "violet", "rollouts"], ["seconds_train", "blue", "train"], ["seconds_sync", "green", "sync"], ["seconds_verify", "orange", "verify"], ["seconds_publish", "grey", "publish"]];
  chart(parent, { title: "Time of a step", unit: "s", steps, stacked: true, series: times.map((t) => one(...t)).filter((s) => s.values.some((v) => v !== null)) });
  if (Math.max(...values("peak_memory_bytes").map((v) => v || 0)) > 0)
    chart(parent, { title: "Peak memory of the trainer", unit: "bytes", steps, series: [one("peak_memory_bytes", "blue")] });
  for (const name of Object.keys(run.metrics)) element(byId("metric"), "option", {}, name);
  byId("metric").addEventListener("change", oneMetric);
  byId("every").addEventListener("toggle", oneMetric);
}

function oneMetric() {
  const name = byId("metric").value, [unit, , says] = run.about[name] || ["", "", "A metric of the task: the mean over trajectories."];
  byId("metric-says").textContent = says;
  byId("metric-chart").replaceChildren();
  chart(byId("metric-chart"), { title: name, unit, steps: run.steps, series: [{ name, color: "blue", values: values(name) }] });
}

function filters() {
  const kinds = [...new Set(run.index.map((row) => row[column.kind]))];
  for (const kind of kinds) element(byId("kind"), "option", { value: kind }, kind === 0 ? "training" : "evaluation");
  byId("kind").addEventListener("change", () => { listSteps(); refill(); });
  byId("step").addEventListener("change", refill);
  byId("order").addEventListener("change", refill);
  byId("list").addEventListener("scroll", () => requestAnimationFrame(paint));
  byId("list").addEventListener("keydown", (event) => {
    const move = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!move || !rows.length) return;
    event.preventDefault();
    const next = Math.min(rows.length - 1, Math.max(0, rows.indexOf(open) + move));
    byId("list").scrollTop = Math.max(0, next * ROW - 200);
    show(rows[next]);
  });
  listSteps();
  refill();
}

function listSteps() {
  const kind = +byId("kind").value;
  const steps = [...new Set(run.index.filter((row) => row[column.kind] === kind).map((row) => row[column.step]))];
  byId("step").replaceChildren();
  element(byId("step"), "option", { value: "all" }, "all");
  for (const step of steps) element(byId("step"), "option", { value: step }, step);
  if (steps.length) byId("step").value = steps[0];
}

function refill() {
  const kind = +byId("kind").value, step = byId("step").value;
  rows = run.index.filter((row) => row[column.kind] === kind && (step === "all" || row[column.step] === +step));
  const by = { worst: (a, b) => a[column.reward] - b[column.reward], best: (a, b) => b[column.reward] - a[column.reward], long: (a, b) => b[column.tokens] - a[column.tokens] };
  if (by[byId("order").value]) rows.sort(by[byId("order").value]);
  byId("count").textContent = `${rows.length} trajectories`;
  byId("spacer").style.height = `${rows.length * ROW}px`;
  byId("list").scrollTop = 0;
  groupChart(step === "all" ? [] : rows);
  paint();
  failures(kind, step);
}

function paint() {
  const list = byId("list"), from = Math.max(0, Math.floor(list.scrollTop / ROW) - 5), to = Math.min(rows.length, from + Math.ceil(list.clientHeight / ROW) + 12);
  for (const old of [...list.querySelectorAll(".row")]) old.remove();
  for (let k = from; k < to; k++) {
    const row = rows[k], line = element(list, "div", { class: row === open ? "row open" : "row", role: "option", style: `top:${k * ROW}px` });
    element(line, "span", { class: "quiet" }, `step ${row[column.step]}`);
    element(line, "span", {}, `group ${row[column.group]} · ${row[column.trajectory]}`);
    element(line, "span", row[column.truncated] ? { class: "cut", title: "cut off by a limit of tokens" } : {}, `${row[column.tokens]} tok`);
    element(line, "span", {}, short(row[column.reward]) || "0");
    line.addEventListener("click", () => show(row));
  }
}

// One column of dots per group: who earned what.
function groupChart(shown) {
  const parent = byId("groups");
  parent.replaceChildren();
  const groups = [...new Set(shown.map((row) => row[column.group]))].sort((a, b) => a - b).slice(0, 400);
  if (groups.length === 0) return;
  const rewards = shown.map((row) => row[column.reward]), low = Math.min(...rewards), high = Math.max(...rewards);
  const wide = Math.max(14, Math.min(46, 1100 / groups.length)), width = LEFT + groups.length * wide + 10;
  const svg = shape(parent, "svg", { viewBox: `0 0 ${width} 120`, style: `width:${width}px;max-width:none`, role: "img", "aria-label": "Rewards by group" });
  const py = (v) => 95 - (high === low ? 0.5 : (v - low) / (high - low)) * 80;
  for (const mark of new Set([low, high])) shape(svg, "text", { x: LEFT - 6, y: py(mark) + 4, "text-anchor": "end" }, short(mark));
  groups.forEach((group, place) => {
    const x = LEFT + (place + 0.5) * wide, members = shown.filter((row) => row[column.group] === group);
    const equal = members.every((row) => row[column.reward] === members[0][column.reward]);
    if (place % Math.ceil(30 / wide) === 0) shape(svg, "text", { x, y: 114, "text-anchor": "middle" }, group);
    shape(svg, "line", { x1: x, x2: x, y1: 12, y2: 98, stroke: "var(--grid)" });
    for (const row of members) {
      const dot = shape(svg, "circle", { cx: x, cy: py(row[column.reward]), r: 5, fill: `var(--${equal ? "grey" : "blue"})`, opacity: 0.45, style: "cursor:pointer" });
      dot.addEventListener("click", () => show(row));
      shape(dot, "title", {}, `group ${group}, trajectory ${row[column.trajectory]}: ${short(row[column.reward])}${equal ? ", all equal" : ""}`);
    }
  });
}

function failures(kind, step) {
  byId("failures").replaceChildren();
  const failed = run.failures.filter((one) => one.kind === kind && (step === "all" || one.step === +step));
  if (failed.length) element(byId("failures"), "h2", {}, `${failed.length} rollouts failed`);
  for (const one of failed.slice(0, 50)) element(byId("failures"), "p", { class: "failure" }, `step ${one.step}, group ${one.group}: ${one.type}: ${one.message}${one.where ? "\n" + one.where : ""}`);
}

async function show(row) {
  open = row;
  paint();
  const trajectory = (await chunk(row[column.chunk]))[row[column.place]];
  if (open !== row) return;
  const parent = byId("transcript");
  parent.replaceChildren();
  tokens = [];
  element(parent, "h3", { style: "margin:0" }, `Step ${row[column.step]}, group ${row[column.group]}, trajectory ${row[column.trajectory]}: reward ${short(row[column.reward]) || 0}`);
  for (const [name, said] of [["metrics", trajectory.metrics], ["metadata", trajectory.metadata]]) if (said) element(parent, "p", { class: "quiet" }, `${name}: ${JSON.stringify(said)}`);
  palette(parent, trajectory);
  if (trajectory.tools) element(element(parent, "details"), "summary", {}, `${trajectory.tools.length} tools`).parentNode.append(pre(JSON.stringify(trajectory.tools, null, 2)));
  for (const item of trajectory.items) message(parent, item);
  paintTokens();
}

function pre(text) {
  const made = document.createElement("pre");
  made.textContent = text;
  return made;
}

function palette(parent, trajectory) {
  const replies = trajectory.items.filter((item) => item.ids);
  const bar = element(parent, "div", { class: "palette" });
  const label = element(bar, "label", {}, "Colour ");
  const choice = element(label, "select", { id: "colour" });
  const known = { advantage: replies.some((r) => r.advantage !== undefined), difference: replies.some((r) => r.trainer), surprise: replies.some((r) => r.server) };
  const names = { advantage: "advantage", difference: "logprob difference", surprise: "surprise (server)" };
  for (const name of Object.keys(names)) if (known[name]) element(choice, "option", { value: name }, names[name]);
  if (![...choice.options].length) { bar.remove(); element(parent, "p", { class: "quiet" }, "Nothing is recorded of these tokens."); return; }
  if (known[colour]) choice.value = colour; else colour = choice.value;
  element(bar, "span", { id: "scale", class: "quiet" });
  choice.addEventListener("change", () => { colour = choice.value; paintTokens(); });
  if (!known.difference && open[column.kind] === 0) element(parent, "p", { class: "quiet" }, "The trainer computed none of these tokens: the group gave no signal, the trajectory was left out, or the run is of an earlier version.");
}

function message(parent, item) {
  const box = element(parent, "div", { class: "message" });
  element(box, "b", {}, item.ids ? "model" : item.role);
  if (item.finish && item.finish !== "stop") element(box, "span", { class: "quiet" }, item.finish === "length" ? "cut off by a limit of tokens" : item.finish);
  if (!item.ids) { box.append(pre(typeof item.content === "string" ? item.content : JSON.stringify(item.tool_calls || item.content, null, 2))); return; }
  const text = element(box, "pre");
  if (!item.ids.length) { text.textContent = item.text.join(""); return; }
  item.ids.forEach((id, k) => {
    const span = element(text, "span", { class: "token" });
    span.textContent = item.text[k] === "" ? "" : item.text[k];
    if (/^\s*$/.test(item.text[k]) && item.text[k].includes("\n")) span.textContent = "↵" + item.text[k];
    tokens.push({ span, item, k });
    span.addEventListener("click", (event) => { event.stopPropagation(); tokenTip(event, { span, item, k }); });
  });
}

function difference({ item, k }) {
  return item.trainer && item.server && item.trainer[k] !== null ? item.trainer[k] - item.server[k] : null;
}

function paintTokens() {
  const sizes = { advantage: (t) => t.item.advantage ?? null, difference, surprise: (t) => (item => item.server ? -item.server[t.k] : null)(t.item) };
  const of = tokens.map(sizes[colour]);
  const top = of.reduce((most, v) => (v === null ? most : Math.max(most, Math.abs(v))), 0) || 1;
  tokens.forEach(({ span }, k) => {
    const share = of[k] === null ? 0 : Math.min(1, Math.abs(of[k]) / top) * 0.55;
    const name = colour === "surprise" ? "hot" : of[k] < 0 ? "neg" : "pos";
    span.style.background = share > 0.004 ? `rgba(var(--${name}), ${share.toFixed(3)})` : "";
  });
  const scale = byId("scale");
  if (!scale) return;
  scale.replaceChildren();
  const [from, to] = colour === "surprise" ? ["transparent", "rgba(var(--hot), .55)"] : ["rgba(var(--neg), .55), transparent", "rgba(var(--pos), .55)"];
  scale.append(colour === "surprise" ? "0 " : `−${short(top)} `);
  element(scale, "span", { class: "bar", style: `background:linear-gradient(90deg, ${from}, ${to})` });
  scale.append(` ${short(top)}${colour === "advantage" ? "" : " nats"}`);
}

function tokenTip(event, token) {
  const { item, k, span } = token;
  for (const old of document.querySelectorAll(".token.open")) old.classList.remove("open");
  span.classList.add("open");
  const version = (item.versions || []).find(([, start, stop]) => k >= start && k < stop);
  const number = (v) => (v === null || v === undefined ? "not recorded" : v.toFixed(5));
  const rows = [["token id", item.ids[k]], ["place in the reply", `${k + 1} of ${item.ids.length}`],
    ["server's logprob", number(item.server && item.server[k])], ["trainer's logprob", number(item.trainer && item.trainer[k])],
    ["trainer − server", difference(token) === null ? "" : difference(token).toExponential(2)],
    ["advantage", item.advantage === undefined ? "not recorded" : short(item.advantage) || "0"], ["sampled by", version ? version[0] : "not recorded"]];
  const tip = showTip(event.pageX, event.pageY, JSON.stringify(item.text[k]), rows.filter(([, v]) => v !== ""), true);
  if (item.experts) experts(tip, item.experts, k);
}

function experts(tip, { shape: [, layers, width], data }, k) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), ids = new Uint16Array(bytes.buffer);
  if (k * layers * width >= ids.length) { element(tip, "p", { class: "quiet" }, "routed experts: the server records none for the last token"); return; }
  const box = element(tip, "div", { class: "experts" });
  for (let layer = 0; layer < layers; layer++) {
    const from = (k * layers + layer) * width;
    element(box, "div", {}, `layer ${layer}: experts ${[...ids.slice(from, from + width)].join(" ")}`);
  }
}

function theme() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const set = (name) => (document.documentElement.dataset.theme = name);
  set(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => set(dark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => set(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
}

async function follow_run() {
  const seen = await (await fetch("changed" + location.search)).text();
  setInterval(async () => {
    const now = await fetch("changed" + location.search).then((reply) => reply.text()).catch(() => seen);
    if (now !== seen && open === null) location.reload();
    else if (now !== seen) byId("facts").textContent = "The run went on: reload to see it.";
  }, 3000);
}

theme();
head();
curves();
if (run.index.length) filters();
if (run.experts_left_out) element(byId("failures"), "p", { class: "quiet" }, `Routed experts of ${run.experts_left_out} replies are left out of this page for its size.`);
if (!run.text_known) element(byId("failures"), "p", { class: "quiet" }, "The base model's tokenizer is not on this machine: tokens are shown by their ids.");
if (run.live) follow_run();
document.addEventListener("click", () => hideTip(true));
