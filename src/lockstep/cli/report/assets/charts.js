"use strict";
// Line charts over training steps, as SVG: what a report draws, and nothing more.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 400, HEIGHT = 170, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 20;

function element(parent, name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== "") made.textContent = text;
  parent.append(made);
  return made;
}

function shape(parent, name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== "") made.textContent = text;
  parent.append(made);
  return made;
}

function short(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e12) return (value / 1e12).toPrecision(3) + "T";
  if (size >= 1e9) return (value / 1e9).toPrecision(3) + "G";
  if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3) + "k";
  if (size < 1e-3) return value.toExponential(1);
  return String(+value.toPrecision(3));
}

function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 2));
  const width = [1, 2, 5, 10].map((m) => m * step).find((w) => (high - low) / w <= 4);
  const made = [];
  for (let k = Math.ceil(low / width - 1e-9); k * width <= high + 1e-9 * width; k++) made.push(k * width);
  return made;
}

function scaleY(values, log) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) {
    const from = Math.floor(Math.log10(low)), to = Math.max(Math.ceil(Math.log10(high)), from + 1);
    const every = Math.ceil((to - from) / 4);
    const marks = [];
    for (let p = from; p <= to; p += every) marks.push(10 ** p);
    return { place: (v) => (Math.log10(v) - from) / (to - from), marks };
  }
  if (low === 0 && high === 0) high = 1;
  if (low === high) { const pad = Math.abs(low) * 0.1 || 1; low -= low > 0 && low - pad < 0 ? low : pad; high += pad; }
  const pad = (high - low) * 0.06;
  low = low >= 0 && low - pad < 0 ? 0 : low - pad;
  high += pad;
  return { place: (v) => (v - low) / (high - low), marks: ticks(low, high) };
}

// series: [{name, color, values, band: [low, high] or undefined}], values and bands as long as `steps`.
function chart(parent, { title, unit, steps, series, log = false, stacked = false }) {
  series = series.filter((one) => one.values.some((v) => v !== null && v !== undefined && (!log || v > 0)));
  if (!series.length) return;
  const usable = (v) => v !== null && v !== undefined && (!log || v > 0);
  const shown = steps.map((_, k) => k).filter((k) => series.some((one) => usable(one.values[k])));
  if (stacked) {
    let below = steps.map(() => 0);
    series = series.map((one) => {
      const top = below.map((b, k) => b + (one.values[k] || 0));
      const made = { ...one, low: below, high: top };
      below = top;
      return made;
    });
  }
  const figure = element(parent, "figure");
  const caption = element(figure, "figcaption");
  element(caption, "span", {}, title);
  if (unit) element(caption, "span", { class: "unit" }, unit);
  for (const one of series.length > 1 || stacked ? series : []) {
    const key = element(caption, "span", { class: "key" });
    element(key, "i", { style: `background:var(--${one.color})` });
    key.append(one.name);
  }
  const svg = shape(figure, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title });
  const all = shown.flatMap((k) => series.flatMap((one) =>
    stacked ? [0, one.high[k]] : [one.values[k], ...(one.band ? [one.band[0][k], one.band[1][k]] : [])].filter(usable)));
  const y = scaleY(all, log);
  const first = steps[shown[0]], last = steps[shown[shown.length - 1]];
  const px = (step) => LEFT + (last === first ? 0.5 : (step - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const py = (v) => HEIGHT - BOTTOM - y.place(v) * (HEIGHT - TOP - BOTTOM);
  for (const mark of y.marks) {
    shape(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: py(mark), y2: py(mark), stroke: "var(--grid)" });
    shape(svg, "text", { x: LEFT - 5, y: py(mark) + 3.5, "text-anchor": "end" }, short(mark));
  }
  const marks = last - first < 2 ? [first, last] : ticks(first, last).filter(Number.isInteger);
  for (const step of new Set(marks)) shape(svg, "text", { x: px(step), y: HEIGHT - 5, "text-anchor": "middle" }, step);
  for (const one of series) drawSeries(svg, one, shown, steps, px, py, usable, stacked);
  follow(svg, { title, steps, shown, series, px, usable });
}

function drawSeries(svg, one, shown, steps, px, py, usable, stacked) {
  const color = `var(--${one.color})`;
  if (stacked || one.band) {
    const [low, high] = stacked ? [one.low, one.high] : one.band;
    const known = shown.filter((k) => stacked || (usable(low[k]) && usable(high[k])));
    const up = known.map((k) => `${px(steps[k])},${py(high[k])}`);
    const down = known.map((k) => `${px(steps[k])},${py(low[k])}`).reverse();
    shape(svg, "polygon", { points: [...up, ...down].join(" "), fill: color, opacity: stacked ? 0.75 : 0.16 });
  }
  if (stacked) return;
  const known = shown.filter((k) => usable(one.values[k]));
  const points = known.map((k) => `${px(steps[k])},${py(one.values[k])}`).join(" ");
  shape(svg, "polyline", { points, fill: "none", stroke: color, "stroke-width": 2, "stroke-linejoin": "round" });
  if (known.length < 25) for (const k of known) shape(svg, "circle", { cx: px(steps[k]), cy: py(one.values[k]), r: 2.6, fill: color });
}

function follow(svg, { title, steps, shown, series, px, usable }) {
  const line = shape(svg, "line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--quiet)", "stroke-dasharray": "3 3", visibility: "hidden" });
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const near = shown.reduce((best, k) => (Math.abs(px(steps[k]) - x) < Math.abs(px(steps[best]) - x) ? k : best), shown[0]);
    line.setAttribute("x1", px(steps[near]));
    line.setAttribute("x2", px(steps[near]));
    line.setAttribute("visibility", "visible");
    const rows = series.filter((one) => usable(one.values[near])).map((one) => [one.name, short(one.values[near])]);
    showTip(event.pageX, event.pageY, `${title}, step ${steps[near]}`, rows, false);
  });
  svg.addEventListener("pointerleave", () => { line.setAttribute("visibility", "hidden"); hideTip(false); });
}

function showTip(x, y, title, rows, stays) {
  const tip = document.getElementById("tip");
  if (tip.classList.contains("stays") && !stays) return;
  tip.replaceChildren();
  tip.classList.toggle("stays", stays);
  element(tip, "b", {}, title);
  const table = element(tip, "table");
  for (const [name, value] of rows) {
    const row = element(table, "tr");
    element(row, "td", {}, name);
    element(row, "td", {}, value);
  }
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(x + 12, room + window.scrollX))}px`;
  tip.style.top = `${y + 16}px`;
  return tip;
}

function hideTip(also) {
  const tip = document.getElementById("tip");
  if (also || !tip.classList.contains("stays")) { tip.hidden = true; tip.classList.remove("stays"); }
}
