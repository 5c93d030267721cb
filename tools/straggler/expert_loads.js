// Load of every expert in every layer, before and after capacity and the split over copies, over the
// layer's mean before: a band per rank, in it the experts whose home it is and then its copies.
function drawExpertLoads() {
  const place = byId("expert-loads");
  place.replaceChildren();
  const { layers, before, rows, imbalance, copies } = DATA.loads;
  if (!layers.length) {
    html(place, "p", "The run has no layer of experts.");
    return;
  }
  const changes = copies.length ? "capacity and the split over copies" : "capacity";
  loadMap(place, `Before ${changes}`, imbalance.map((row) => row[0]), (rank, layer) =>
    heldBy(rank, layer).filter((each) => !each.copy)
      .map((each) => ({ ...each, value: before[layer][each.expert] })));
  loadMap(place, `After ${changes}`, imbalance.map((row) => row[1]), (rank, layer) =>
    heldBy(rank, layer).map((each, index) =>
      ({ ...each, value: rank < rows.length ? rows[rank][layer][index] : -1 })));
  html(place, "p", "White is none, blue the mean, red twice the mean and more; right: rows of the " +
    "most loaded rank over the mean rank, both summed over steps." +
    (copies.length ? " A copy has a mark at its foot." : ""), { class: "hint" });
  if (copies.length) copyTables(place);
}

// The experts of a rank in a layer; the band behind the last rank has those of ranks without files.
function heldBy(rank, layer) {
  const { experts, num_homes, missing } = DATA.loads;
  if (rank === experts.length)
    return missing[layer].map((expert) => ({ expert, copy: false }));
  return experts[rank][layer].map((expert, index) =>
    ({ expert, copy: index >= num_homes[rank][layer] }));
}

function loadMap(place, title, imbalance, cellsOf) {
  html(place, "p", title);
  const { layers, before, experts, missing } = DATA.loads;
  const id = `loads-${title.split(" ")[0].toLowerCase()}`;
  place.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg")).id = id;
  const tall = layers.length > 40 ? 10 : 18, left = 150, right = 60, top = 16;
  const [drawing, width] = canvas(id, top + layers.length * tall + 8);
  const bands = experts.length + (missing.some((each) => each.length) ? 1 : 0);
  const band = (width - left - right) / bands;
  layers.forEach((layer, index) => {
    const y = top + index * tall;
    const mean = before[index].reduce((sum, each) => sum + each, 0) / before[index].length;
    svg(drawing, "text", { x: 0, y: y + tall - 4 }, layerName(layer));
    for (let rank = 0; rank < bands; rank += 1)
      loadCells(drawing, cellsOf(rank, index), bandName(rank), layerName(layer),
        { x: left + rank * band, y, band, tall, mean });
    const worst = imbalance[index];
    svg(drawing, "text", { x: width - right + 8, y: y + tall - 4, class: "soft" },
      worst === null ? "" : `${number(worst)}x`);
  });
  for (let rank = 0; rank < bands; rank += 1) {
    const x = left + rank * band;
    svg(drawing, "line",
      { x1: x, x2: x, y1: top - 4, y2: top + layers.length * tall, stroke: "#1c2430" });
    svg(drawing, "text", { x: x + 3, y: 10, class: "soft" }, bandName(rank));
  }
}

function loadCells(drawing, cells, rank, layer, { x, y, band, tall, mean }) {
  const wide = band / cells.length;
  cells.forEach(({ expert, copy, value }, index) => {
    const share = mean ? value / mean : 0, at = x + index * wide;
    const cell = svg(drawing, "rect", {
      x: at, y, width: wide, height: tall - 1, class: "cell",
      fill: value < 0 ? "#e8e8e8" : loadColour(share),
    });
    if (copy) svg(drawing, "rect",
      { x: at, y: y + tall - 4, width: wide, height: 3, fill: "#1c2430", class: "copy" });
    hint(cell, `${layer}, ${copy ? "copy of " : ""}expert ${expert} on ${rank}: ` + (value < 0
      ? "its rank is missing" : `${number(value)} rows, ${number(share)} of the mean`));
  });
}

function bandName(rank) {
  return rank < DATA.ranks.length ? rankName(rank) : "no files";
}

// Rows of homes and of copies on each rank, and the copies with most rows.
function copyTables(place) {
  const { by_rank, copies } = DATA.loads;
  const ranks = tableOf(place, ["", "rows of homes", "rows of copies", "of its rows"]);
  by_rank.forEach((each, index) => {
    const all = each.homes + each.copies;
    tableRow(ranks, [rankName(index), number(each.homes), number(each.copies),
      `${number(all ? 100 * each.copies / all : 0, 1)}%`]);
  });
  const heads = ["copy", "on", "home on", "rows", "of the expert's rows"];
  const table = tableOf(place, heads);
  for (const { layer, expert, rank, home, rows, of } of copies)
    tableRow(table, [`${layerName(layer)}, expert ${expert}`, `rank ${rank}`,
      home === null ? "no files" : `rank ${home}`, number(rows),
      of ? `${number(100 * rows / of, 1)}%` : ""]);
}

function tableOf(place, names) {
  const table = html(place, "table"), head = html(table, "tr");
  names.forEach((name) => html(head, "th", name));
  return table;
}

function tableRow(table, texts) {
  const row = html(table, "tr");
  texts.forEach((text) => html(row, "td", text));
}

// White over blue at 1 to red at 2.
function loadColour(share) {
  const mix = (from, to, part) => from.map((each, at) => Math.round(each + (to[at] - each) * part));
  const white = [255, 255, 255], blue = [92, 143, 196], red = [200, 48, 48];
  const [r, g, b] = share <= 1 ? mix(white, blue, share) : mix(blue, red, Math.min(1, share - 1));
  return `rgb(${r},${g},${b})`;
}
