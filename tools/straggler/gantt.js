// One step: every rank's spans on one clock. What a collective waited is red, its transfer not.
const TICK = 1e-7, FIELDS = 7;
const gantt = { index: 0, low: 0, high: 1 };

function stepLength(index) {
  let last = 0;
  for (const spans of DATA.steps.spans[index])
    for (let at = 0; at < spans.length; at += FIELDS)
      last = Math.max(last, spans[at + 2] + spans[at + 3]);
  return Math.max(last, 1);
}

function showStep(index) {
  gantt.index = index;
  gantt.low = 0;
  gantt.high = stepLength(index);
  drawGantt();
}

function drawGantt() {
  const { index, low, high } = gantt, rowHeight = 30, top = 4, left = 150;
  const rows = DATA.ranks.length, bottom = 24;
  const [drawing, width] = canvas("gantt", top + rows * rowHeight + bottom);
  const scale = (width - left) / (high - low);
  byId("step-title").textContent = `Step ${DATA.steps.number[index]}: ` +
    `${duration(DATA.steps.length[index])}, of which a mean rank waited ` +
    duration(DATA.steps.lost[index]);
  DATA.steps.spans[index].forEach((spans, rank) => {
    const y = top + rank * rowHeight;
    const [prefill, decode] = DATA.steps.tokens[index][rank];
    const name = svg(drawing, "text", { x: 0, y: y + 18 }, rankName(rank));
    hint(name, `${DATA.ranks[rank][1]}: ${prefill} prefill and ${decode} decode tokens`);
    svg(drawing, "text", { x: 62, y: y + 18, class: "soft" }, `${prefill + decode} tokens`);
    drawSpans(drawing, spans, rank, { y, left, width, scale, tall: rowHeight - 6 });
  });
  const floor = top + rows * rowHeight;
  for (const at of ticks(low * TICK, high * TICK, 8)) {
    const x = left + (at / TICK - low) * scale;
    svg(drawing, "line", { x1: x, x2: x, y1: top, y2: floor, stroke: "#00000018" });
    svg(drawing, "text", { x, y: floor + 16, class: "soft", "text-anchor": "middle" },
      at ? duration(at) : "0");
  }
  zooming(drawing, left, width);
}

function drawSpans(drawing, spans, rank, place) {
  const { y, left, width, scale, tall } = place;
  for (let at = 0; at < spans.length; at += FIELDS) {
    const span = spans.slice(at, at + FIELDS);
    const [phase, , begin, length, , , waited] = span;
    const from = Math.max(left, left + (begin - gantt.low) * scale);
    const to = Math.min(width, left + (begin + length - gantt.low) * scale);
    if (to <= from) continue;
    const red = Math.min(to, left + (begin + Math.max(waited, 0) - gantt.low) * scale);
    const shape = svg(drawing, "rect",
      { x: from, y, width: to - from, height: tall, fill: COLOURS[phase], class: "phase" });
    shape.onmouseenter = () => describe(rank, span);
    if (waited > 0 && red > from) {
      const part = svg(drawing, "rect",
        { x: from, y, width: red - from, height: tall, fill: WAITING, class: "waiting" });
      part.onmouseenter = shape.onmouseenter;
    }
  }
}

function describe(rank, [phase, layer, begin, length, tokens, sent, waited]) {
  let text = `${rankName(rank)} on ${DATA.ranks[rank][1]}: ${DATA.phases[phase]}, ` +
    `${layerName(layer)}, at ${duration(begin * TICK)} for ${duration(length * TICK)}`;
  if (tokens > 0) text += `, ${number(tokens)} tokens`;
  if (sent > 0) text += `, ${bytes(sent)} sent`;
  if (waited >= 0) text += `, waited ${duration(waited * TICK)}`;
  byId("span").textContent = text;
}

function zooming(drawing, left, width) {
  const tickAt = (event) => {
    const box = drawing.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width;
    const share = Math.min(1, Math.max(0, (x - left) / (width - left)));
    return gantt.low + share * (gantt.high - gantt.low);
  };
  let from = null;
  drawing.onmousedown = (event) => { from = tickAt(event); };
  drawing.onmouseup = (event) => {
    if (from === null) return;
    const [low, high] = [from, tickAt(event)].sort((one, other) => one - other);
    from = null;
    if (high - low < (gantt.high - gantt.low) / 200) return;
    gantt.low = low;
    gantt.high = high;
    drawGantt();
  };
  drawing.ondblclick = () => showStep(gantt.index);
}
