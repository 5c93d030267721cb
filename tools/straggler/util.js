// What every view needs: the data, elements, colours and numbers as text.
const DATA = JSON.parse(document.getElementById("data").textContent);
const WAITING = "#d64545";
const PHASE_COLOURS = {
  embed: "#a0a7b1", attention: "#4c7fb8", dense: "#7a9ec7", gate: "#e3b23c", consensus: "#b07cc6",
  plan: "#8d8062", dispatch: "#3fa7a0", experts: "#5b9a4b", combine: "#79c2bd", shared: "#9ccc8c",
  head: "#c98a5e", sample: "#d9a98a", control: "#6e6bb0", tensor: "#5d7fa3", host: "#c9ced6",
};
const SPARE_COLOURS = ["#94632d", "#39708c", "#8c3960", "#60702c", "#404a5c", "#b86f8f"];
const COLOURS = DATA.phases.map((name, index) =>
  PHASE_COLOURS[name] || SPARE_COLOURS[index % SPARE_COLOURS.length]);

function byId(id) {
  return document.getElementById(id);
}

// An HTML element with text, never markup.
function html(parent, tag, text, attributes) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  parent.appendChild(made);
  return made;
}

function svg(parent, tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

// Empties a drawing and gives it one unit a pixel at full width.
function canvas(id, height) {
  const drawing = byId(id);
  drawing.replaceChildren();
  const width = Math.max(600, drawing.parentNode.clientWidth || 1100);
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  drawing.setAttribute("height", height);
  return [drawing, width];
}

function hint(shape, text) {
  svg(shape, "title", {}, text);
}

function number(value, digits) {
  return value.toLocaleString("en", { maximumFractionDigits: digits === undefined ? 2 : digits });
}

function duration(seconds) {
  if (seconds >= 1) return `${number(seconds)} s`;
  if (seconds >= 1e-3) return `${number(seconds * 1e3)} ms`;
  return `${number(seconds * 1e6, 1)} \u00b5s`;
}

function bytes(count) {
  if (count >= 1e9) return `${number(count / 1e9)} GB`;
  if (count >= 1e6) return `${number(count / 1e6)} MB`;
  return count >= 1e3 ? `${number(count / 1e3)} kB` : `${number(count)} B`;
}

function layerName(layer) {
  return layer < 0 ? "outside" : `layer ${layer}`;
}

function rankName(index) {
  return `rank ${DATA.ranks[index][0]}`;
}

// About `wanted` round values from low to high.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high * (1 + 1e-9); at += step) found.push(at);
  return found;
}

function legend(parent, names, colours) {
  names.forEach((name, index) =>
    html(parent, "span", name, { style: `--colour:${colours[index]}` }));
}
