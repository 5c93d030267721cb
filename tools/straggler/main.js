// Text, tables, and what ties the views together.
function drawText() {
  byId("run").textContent = `Stragglers of ${DATA.run}`;
  byId("subtitle").textContent = DATA.subtitle;
  DATA.findings.forEach((sentence) => html(byId("findings"), "li", sentence));
  byId("source").textContent = `Finding ${DATA.source}.`.replace("Finding the", "From the");
  DATA.facts.forEach(([name, text]) => {
    html(byId("facts"), "dt", name);
    html(byId("facts"), "dd", text);
  });
  DATA.notes.forEach((note) => html(byId("notes"), "li", note));
  legend(byId("legend"), ["waiting", ...DATA.phases], [WAITING, ...COLOURS]);
}

function drawDrops() {
  const { source, layers } = DATA.drops, table = byId("drops");
  byId("drops-source").textContent = source;
  const full = layers.length > 0 && layers[0].assignments !== undefined;
  const head = html(table, "tr");
  const names = ["layer", "drop rate", ...(full ? ["dropped", "of", "orphans", "gate mass kept"] : [])];
  names.forEach((name) => html(head, "th", name));
  const most = Math.max(...layers.map((each) => each.drop_rate), 1e-9);
  for (const each of layers) {
    const row = html(table, "tr");
    html(row, "td", String(each.layer));
    const rate = html(row, "td", `${number(100 * each.drop_rate, 1)}% `);
    const wide = Math.max(0, 6 * each.drop_rate / most);
    html(rate, "span", "", { class: "bar", style: `width:${wide}rem` });
    if (!full) continue;
    [each.dropped, each.assignments, each.orphans].forEach((value) =>
      html(row, "td", number(value)));
    html(row, "td", `${number(100 * each.gate_mass_kept, 1)}%`);
  }
}

function drawCompare() {
  if (DATA.compare === null) {
    byId("compare-section").remove();
    return;
  }
  const { names, rows, notes } = DATA.compare, table = byId("compare");
  notes.forEach((note) => html(byId("compare-notes"), "li", note));
  const head = html(table, "tr");
  ["", ...names, "", "ratio", ""].forEach((name) => html(head, "th", name));
  const drawn = rows.filter((each) => each.bars).flatMap((each) => each.values);
  const most = Math.max(...drawn.filter((each) => each !== null), 1e-9);
  for (const { name, unit, values, bars } of rows) {
    const row = html(table, "tr");
    html(row, "td", name);
    values.forEach((value) =>
      html(row, "td", value === null ? "" : typeof value === "number" ? number(value) : value));
    html(row, "td", unit);
    const [one, other] = values;
    const ratio = typeof one === "number" && typeof other === "number" && one > 0;
    html(row, "td", ratio ? `${number(other / one)}x` : "");
    const cell = html(row, "td");
    if (!bars) continue;
    values.forEach((value, index) => html(cell, "div", "", {
      style: `height:5px;width:${(value || 0) / most * 12}rem;background:` +
        (index ? "#c98a5e" : "#4c7fb8"),
    }));
  }
}

function choose(index) {
  const last = DATA.steps.number.length - 1;
  const shown = Math.min(last, Math.max(0, index));
  showStep(shown);
  drawStrip(DATA.steps.number[shown], choose);
  byId("step").value = String(shown);
  byId("previous").disabled = shown === 0;
  byId("next").disabled = shown === last;
}

function draw() {
  choose(gantt.index);
  drawRanks();
  drawLayers();
  drawExpertLoads();
}

drawText();
drawDrops();
drawCompare();
DATA.steps.number.forEach((each, index) => html(byId("step"), "option", String(each),
  { value: index }));
byId("step").onchange = (event) => choose(Number(event.target.value));
byId("previous").onclick = () => choose(gantt.index - 1);
byId("next").onclick = () => choose(gantt.index + 1);
gantt.index = DATA.steps.shown;
draw();
window.addEventListener("resize", draw);
document.body.dataset.ready = "yes";
