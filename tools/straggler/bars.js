// Sums over all steps: each rank's time by phase, and what was waited for in each layer.
function drawRanks() {
  const rowHeight = 26, left = 150, right = 80;
  const [drawing, width] = canvas("ranks", DATA.ranks.length * rowHeight + 4);
  const { seconds, waiting, tokens, bytes: sent, calls } = DATA.totals;
  const sums = seconds.map((row) => row.reduce((sum, each) => sum + each, 0));
  const scale = (width - left - right) / Math.max(...sums, 1e-9);
  DATA.ranks.forEach(([, host], rank) => {
    const y = rank * rowHeight;
    svg(drawing, "text", { x: 0, y: y + 16 }, rankName(rank));
    svg(drawing, "text", { x: 62, y: y + 16, class: "soft" }, host.slice(0, 13));
    let x = left;
    const bar = (value, colour, text) => {
      if (value <= 0) return;
      const shape = svg(drawing, "rect",
        { x, y, width: value * scale, height: rowHeight - 6, fill: colour });
      hint(shape, `${rankName(rank)}, ${text}: ${duration(value)}, ` +
        `${number(100 * value / sums[rank], 1)}% of its time`);
      x += value * scale;
    };
    seconds[rank].forEach((value, phase) => {
      let text = `${DATA.phases[phase]}, ${number(calls[rank][phase])} calls`;
      if (tokens[rank][phase]) text += `, ${number(tokens[rank][phase])} tokens`;
      if (sent[rank][phase]) text += `, ${bytes(sent[rank][phase])} sent`;
      bar(value - waiting[rank][phase], COLOURS[phase], text);
    });
    bar(waiting[rank].reduce((sum, each) => sum + each, 0), WAITING, "waiting for late ranks");
    svg(drawing, "text", { x: x + 6, y: y + 16, class: "soft" }, duration(sums[rank]));
  });
}

function drawLayers() {
  const { layer, lost } = DATA.layers;
  if (!layer.length) {
    const [drawing] = canvas("layers", 20);
    svg(drawing, "text", { x: 0, y: 14, class: "soft" }, "No rank waited for another.");
    return;
  }
  const rowHeight = layer.length > 40 ? 14 : 20, left = 150, right = 80;
  const [drawing, width] = canvas("layers", layer.length * rowHeight + 4);
  const sums = lost.map((row) => row.reduce((sum, each) => sum + each, 0));
  const scale = (width - left - right) / Math.max(...sums, 1e-9);
  layer.forEach((number_, index) => {
    const y = index * rowHeight;
    svg(drawing, "text", { x: 0, y: y + 12 }, layerName(number_));
    let x = left;
    lost[index].forEach((value, phase) => {
      if (value <= 0) return;
      const shape = svg(drawing, "rect",
        { x, y, width: value * scale, height: rowHeight - 4, fill: COLOURS[phase] });
      hint(shape, `${layerName(number_)}, ${DATA.phases[phase]}: a mean rank waited ` +
        duration(value));
      x += value * scale;
    });
    svg(drawing, "text", { x: x + 6, y: y + 12, class: "soft" }, duration(sums[index]));
  });
}
