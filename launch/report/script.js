"use strict";
// The pointer over one chart reads all of them at the same step.
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const charts = [...document.querySelectorAll("figure[data-chart]")].map((figure) => {
  const svg = figure.querySelector("svg");
  const [left, right, top, bottom] = numbers[figure.dataset.chart].box;
  const hair = document.createElementNS(svg.namespaceURI, "line");
  for (const [name, value] of Object.entries({ class: "hair", y1: top, y2: bottom, x1: left, x2: left })) hair.setAttribute(name, value);
  hair.style.display = "none";
  svg.append(hair);
  const output = figure.querySelector("output");
  return { figure, svg, hair, output, latest: output.textContent, ...numbers[figure.dataset.chart], left, right };
});

const at = document.getElementById("step");
const text = (value, percent) => percent ? `${(100 * value).toPrecision(3)} %`
  : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
}

function read(step) {
  for (const chart of charts) {
    const [, , , , start, end] = chart.box;
    const place = nearest(chart.x, step);
    const x = chart.left + (Math.min(Math.max(step, start), end) - start) / (end - start || 1) * (chart.right - chart.left);
    chart.hair.setAttribute("x1", x);
    chart.hair.setAttribute("x2", x);
    chart.hair.style.display = "";
    const wide = chart.figure.classList.contains("wide") && chart.high[place] > chart.low[place];
    const spread = wide ? ` (${text(chart.low[place], chart.percent)} to ${text(chart.high[place], chart.percent)})` : "";
    chart.output.textContent = text(chart.y[place], chart.percent) + spread;
    chart.figure.classList.add("reading");
  }
  at.textContent = `step ${Math.round(step).toLocaleString("en")}`;
  at.hidden = false;
}

function leave() {
  for (const chart of charts) {
    chart.hair.style.display = "none";
    chart.output.textContent = chart.latest;
    chart.figure.classList.remove("reading");
  }
  at.hidden = true;
}

for (const chart of charts) {
  chart.svg.addEventListener("pointermove", (event) => {
    const box = chart.svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.svg.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (x - chart.left) / (chart.right - chart.left)));
    read(chart.box[4] + share * (chart.box[5] - chart.box[4]));
  });
  chart.svg.addEventListener("pointerleave", leave);
}
// One sound at a time.
document.addEventListener("play", (event) => {
  for (const player of document.querySelectorAll("audio")) if (player !== event.target) player.pause();
}, true);
