// Charts as SVG, each with what it shows under the pointer.

const WIDTH = 340, HEIGHT = 168, LEFT = 40, RIGHT = 12, TOP = 10, BOTTOM = 34;
const svg = (tag, attributes = {}, text = null) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
};

// Round numbers that cover a range, about `count` of them.
function ticks(low, high, count = 4) {
  const rough = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough), found = [];
  for (let n = Math.ceil(low / unit - 1e-9); n * unit <= high + unit * 1e-9; n++) found.push(n * unit);
  return found;
}
const short = (value) => Math.abs(value) >= 10000 ? `${+(value / 1000).toPrecision(3)}k` : `${+value.toPrecision(3)}`;

// points: [{x, y, error}], in the order of x. options: title, x, y (names of the axes), low, high, shares, onPick(x), say(point).
function chart(points, options) {
  const share = options.shares, values = points.flatMap(({y, error = 0}) => [y - error, y + error]);
  const low = options.low ?? Math.min(...values), high = options.high ?? Math.max(...values), range = high - low || Math.abs(high) || 1;
  const bottom = options.low ?? (low >= 0 && low < range ? 0 : low - 0.06 * range), top = options.high ?? high + 0.08 * range;
  const first = points[0].x, last = points.at(-1).x;
  const x = (value) => LEFT + (last === first ? 0.5 : (value - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (Math.min(Math.max(value, bottom), top) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM);
  const picture = svg("svg", {viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${options.title}. ${points.length} points.`});
  for (const value of ticks(bottom, top)) {
    picture.append(svg("line", {class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value)}),
      svg("text", {x: LEFT - 6, y: y(value) + 4, "text-anchor": "end"}, share ? `${Math.round(100 * value)}` : short(value)));
  }
  for (const value of ticks(first, last, 6).filter((tick) => Number.isInteger(tick))) {
    picture.append(svg("text", {x: x(value), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle"}, short(value)));
  }
  picture.append(svg("line", {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM}),
    svg("text", {x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle"}, options.x));
  for (const point of points) {
    if (point.error) picture.append(svg("line", {class: "a error", x1: x(point.x), x2: x(point.x), y1: y(point.y - point.error), y2: y(point.y + point.error)}));
  }
  picture.append(svg("polyline", {class: "a line", points: points.map((point) => `${x(point.x).toFixed(1)},${y(point.y).toFixed(1)}`).join(" ")}));
  if (points.length <= 40) for (const point of points) picture.append(svg("circle", {class: "a", cx: x(point.x), cy: y(point.y), r: 2.6}));
  const cross = svg("line", {class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
  const spot = svg("circle", {class: "b", r: 4, visibility: "hidden"}), hit = svg("rect", {class: "hit", x: 0, y: 0, width: WIDTH, height: HEIGHT});
  picture.append(cross, spot, hit);
  const mark = (point) => {
    for (const part of [cross, spot]) part.setAttribute("visibility", point ? "visible" : "hidden");
    if (!point) return;
    cross.setAttribute("x1", x(point.x)), cross.setAttribute("x2", x(point.x));
    spot.setAttribute("cx", x(point.x)), spot.setAttribute("cy", y(point.y));
  };
  const nearest = (event) => {
    const box = picture.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * WIDTH;
    return points.reduce((best, point) => Math.abs(x(point.x) - at) < Math.abs(x(best.x) - at) ? point : best);
  };
  picture.mark = (value) => mark(points.find((point) => point.x === value));
  hit.addEventListener("pointermove", (event) => {
    const point = nearest(event);
    options.onHover ? options.onHover(point.x) : mark(point);
    showTip(event.clientX, event.clientY, options.say(point));
  });
  hit.addEventListener("pointerleave", () => { options.onHover ? options.onHover(null) : mark(null); hideTip(); });
  if (options.onPick) hit.addEventListener("click", (event) => options.onPick(nearest(event).x));
  return element("figure", {className: "chart"}, element("figcaption", {textContent: options.title}),
    element("small", {textContent: options.y}), picture);
}

const LEAST = 5; // places with fewer drafts are left out
const shares = (rows, base = 0) => rows.map(({seen, taken}, k) => ({x: k + 1 + base, y: taken / seen, error: 1.96 * Math.sqrt(taken / seen * (1 - taken / seen) / seen),
  seen})).filter(({seen}) => seen >= LEAST);
const between = (points) => points.length > 1 ? `from ${percent(points[0].y)} to ${percent(points.at(-1).y)}` : `${percent(points[0].y)}`;

function drawAcceptance(run, chosen, scope) {
  const found = acceptance(run, chosen), made = [], slots = shares(found.slots), drafts = shares(found.drafts);
  const y = "% accepted of the drafts that were looked at; bars: 95 %";
  const say = (what) => (point) => `${what} ${point.x}: ${percent(point.y)} ± ${(100 * point.error).toFixed(1)} of ${whole(point.seen)}`;
  if (slots.length) made.push(chart(slots, {title: `By slot: ${between(slots)}`, x: "slot of the mask block", y, low: 0, high: 1, shares: true, say: say("slot")}));
  if (drafts.length) made.push(chart(drafts, {title: `By place in the step: ${between(drafts)}`, x: "k-th draft of a step", y, low: 0, high: 1, shares: true,
    say: say("draft")}));
  const spans = found.spans.map(({seen, taken}, k) => ({x: k * SPAN, y: taken / seen, seen})).filter(({seen}) => seen >= LEAST);
  if (spans.length) made.push(chart(spans, {title: `By position: ${known(spans[0].y)} to ${known(spans.at(-1).y)} tokens per step`,
    x: `position, in spans of ${SPAN} tokens`, y: "tokens, last steps left out", low: 0,
    say: (point) => `tokens ${point.x} to ${point.x + SPAN - 1}: ${known(point.y)} per step, ${whole(point.seen)} steps`}));
  $("scope").textContent = scope;
  $("acceptance").replaceChildren(...(made.length ? made : [element("p", {className: "none",
    textContent: run.samples.traced.some(Boolean) ? "No drafts were verified in these trajectories." : "The lines of this run have no trace, so it is not known how tokens were made."})]));
}

function drawCurves(run, onPick) {
  const all = [], hover = (step) => all.forEach((picture) => picture.mark(step));
  const draw = (curve) => {
    const points = curve.steps.map((step, k) => ({x: step, y: curve.values[k]})), last = points.at(-1);
    const title = points.length > 1 ? `${curve.title}: ${short(points[0].y)} to ${short(last.y)}` : `${curve.title}: ${short(last.y)}`;
    const figure = chart(points, {title, x: "step", y: curve.unit || " ", say: (point) => `step ${point.x}: ${short(point.y)} ${curve.unit}`, onHover: hover, onPick});
    all.push(figure.querySelector("svg"));
    return figure;
  };
  $("run").hidden = run.curves.length === 0;
  $("curves").replaceChildren(...run.curves.filter((curve) => curve.known).map(draw));
  const others = run.curves.filter((curve) => !curve.known);
  $("more").hidden = others.length === 0;
  $("others").replaceChildren(...others.map(draw));
}
