// Load of every expert in every layer, before and after capacity, over the layer's mean before.
function drawExpertLoads() {
  const place = byId("expert-loads");
  place.replaceChildren();
  const { layers, before, after, imbalance } = DATA.loads;
  if (!layers.length) {
    html(place, "p", "The run has no layer of experts.");
    return;
  }
  loadMap(place, "Before capacity", before, before, imbalance.map((row) => row[0]));
  loadMap(place, "After capacity", after, before, imbalance.map((row) => row[1]));
  html(place, "p", "White is none, blue the mean, red twice the mean and more; right: rows of the " +
    "most loaded rank over the mean rank, both summed over steps.", { class: "hint" });
}

function loadMap(place, title, rows, reference, imbalance) {
  html(place, "p", title);
  const { layers, first_experts } = DATA.loads;
  const id = `loads-${title.split(" ")[0].toLowerCase()}`;
  place.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg")).id = id;
  const tall = layers.length > 40 ? 10 : 18, left = 150, right = 60, top = 16;
  const [drawing, width] = canvas(id, top + layers.length * tall + 8);
  const wide = (width - left - right) / rows[0].length;
  layers.forEach((layer, index) => {
    const y = top + index * tall;
    const mean = reference[index].reduce((sum, each) => sum + each, 0) / reference[index].length;
    svg(drawing, "text", { x: 0, y: y + tall - 4 }, layerName(layer));
    rows[index].forEach((value, expert) => {
      const share = mean ? value / mean : 0;
      const cell = svg(drawing, "rect", {
        x: left + expert * wide, y, width: wide, height: tall - 1, class: "cell",
        fill: value < 0 ? "#e8e8e8" : loadColour(share),
      });
      hint(cell, `${layerName(layer)}, expert ${expert}: ` +
        (value < 0 ? "its rank is missing" : `${number(value)} rows, ${number(share)} of the mean`));
    });
    const worst = imbalance[index];
    svg(drawing, "text", { x: width - right + 8, y: y + tall - 4, class: "soft" },
      worst === null ? "" : `${number(worst)}x`);
  });
  for (const [expert, rank] of first_experts) {
    const x = left + expert * wide;
    svg(drawing, "line",
      { x1: x, x2: x, y1: top - 4, y2: top + layers.length * tall, stroke: "#1c2430" });
    svg(drawing, "text", { x: x + 3, y: 10, class: "soft" }, `rank ${rank}`);
  }
}

// White over blue at 1 to red at 2.
function loadColour(share) {
  const mix = (from, to, part) => from.map((each, at) => Math.round(each + (to[at] - each) * part));
  const white = [255, 255, 255], blue = [92, 143, 196], red = [200, 48, 48];
  const [r, g, b] = share <= 1 ? mix(white, blue, share) : mix(blue, red, Math.min(1, share - 1));
  return `rgb(${r},${g},${b})`;
}
