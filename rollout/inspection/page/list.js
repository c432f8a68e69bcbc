// The list of trajectories. Only the rows in sight exist.

const ROW = 50, BEYOND = 6;

class List {
  constructor(view) {
    this.view = view;
    this.box = $("list");
    this.rows = $("rows");
    this.made = new Map();
    this.box.addEventListener("scroll", () => this.draw(), {passive: true});
    this.box.addEventListener("click", (event) => {
      const row = event.target.closest(".item");
      if (row) view.choose(Number(row.dataset.place));
    });
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  update(filtered) {
    if (filtered) this.made.forEach((row) => row.remove()), this.made.clear();
    this.rows.style.height = `${this.view.shown.length * ROW}px`;
    const top = this.view.place * ROW, height = this.box.clientHeight;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + ROW > this.box.scrollTop + height) this.box.scrollTop = top + ROW - height;
    this.draw();
  }

  draw() {
    const {view} = this, from = Math.max(0, Math.floor(this.box.scrollTop / ROW) - BEYOND);
    const to = Math.min(view.shown.length, Math.ceil((this.box.scrollTop + this.box.clientHeight) / ROW) + BEYOND);
    for (const [place, row] of this.made) if (place < from || place >= to) { row.remove(); this.made.delete(place); }
    for (let place = from; place < to; place++) {
      if (!this.made.has(place)) { this.made.set(place, this.row(place)); this.rows.append(this.made.get(place)); }
      this.made.get(place).setAttribute("aria-selected", place === view.place);
    }
    if (this.made.has(view.place)) this.box.setAttribute("aria-activedescendant", `item-${view.place}`);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(place) {
    const {run} = this.view, i = this.view.shown[place], reward = run.samples.reward[i], step = run.samples.step[i];
    const line = element("div", {className: "line"}, element("span", {textContent: run.label(i), title: run.label(i)}));
    if (run.mixed(i)) line.append(element("span", {className: "mixed", textContent: "mixed", title: "made by several weight versions"}));
    line.append(element("span", {className: "soft", textContent: `${whole(run.samples.tokens[i])} tokens`}));
    if (run.samples.traced[i]) line.append(element("span", {className: "soft", textContent: percent(run.share(i)), title: "accepted drafts"}));
    if (!Number.isNaN(reward)) line.append(element("span", {className: reward > 0 ? "good" : "bad", textContent: known(reward), title: "reward"}));
    const strip = element("canvas", {width: 356, height: 9});
    const row = element("div", {className: "item", id: `item-${place}`, role: "option"}, line, strip);
    row.style.top = `${place * ROW}px`;
    row.dataset.place = place;
    row.setAttribute("aria-setsize", this.view.shown.length);
    row.setAttribute("aria-posinset", place + 1);
    if (!Number.isNaN(step)) row.title = `step ${step}`;
    this.strip(strip, i);
    return row;
  }

  // How the sample was made, from its first token to its last; lengths compare with the longest sample's.
  strip(canvas, i) {
    const {run} = this.view, pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    this.longest ??= run.samples.tokens.reduce((most, count) => Math.max(most, count), 1);
    const colours = run.origins.map((name) => style.getPropertyValue(`--${name}-mark`)), from = run.first.token[i], count = run.samples.tokens[i];
    const unit = canvas.width * Math.max(0.08, count / this.longest) / count;
    // At most a mark per pixel.
    const every = Math.max(1, Math.floor(1 / unit));
    for (let t = 0; t < count; t += every) {
      pen.fillStyle = colours[run.tokens.origin[from + t]];
      pen.fillRect(Math.floor(t * unit), 0, Math.ceil(unit * every), 9);
    }
  }

  restyle() { this.longest = undefined; this.update(true); }
}
