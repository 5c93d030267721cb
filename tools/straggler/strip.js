// All steps of the run: what a mean rank waited in each, the shown one marked.
function drawStrip(shownNumber, choose) {
  const height = 90, bottom = 18, left = 60;
  const [drawing, width] = canvas("strip", height);
  const { step, lost, length, num_steps } = DATA.overview;
  const most = Math.max(...lost, 1e-9), room = height - bottom - 14;
  const wide = (width - left) / step.length;
  svg(drawing, "text", { x: 0, y: 14, class: "soft" }, duration(most));
  const chosen = nearest(DATA.steps.number, shownNumber);
  step.forEach((each, index) => {
    const tall = Math.max(1, room * lost[index] / most);
    const bar = svg(drawing, "rect", {
      x: left + index * wide, y: height - bottom - tall, width: Math.max(1, wide - 0.3),
      height: tall, fill: WAITING,
    });
    hint(bar, `step ${each}: waited ${duration(lost[index])} of ${duration(length[index])}`);
  });
  const at = nearest(step, DATA.steps.number[chosen]);
  svg(drawing, "path", {
    d: `M${left + (at + 0.5) * wide} ${height - bottom + 2}l5 9h-10z`, fill: "#1c2430",
  });
  svg(drawing, "text", { x: left, y: height, class: "soft" }, `step ${step[0]}`);
  svg(drawing, "text", { x: width, y: height, class: "soft", "text-anchor": "end" },
    `step ${step[step.length - 1]}` + (step.length < num_steps ? ", the worst of each few" : ""));
  drawing.onclick = (event) => {
    const box = drawing.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width * width - left;
    const index = Math.min(step.length - 1, Math.max(0, Math.floor(across / wide)));
    choose(nearest(DATA.steps.number, step[index]));
  };
}

// Index of the value nearest to `wanted`.
function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, index) => {
    if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = index;
  });
  return best;
}
