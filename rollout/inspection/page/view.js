// What is shown: order, filters, the chosen sample and token. Kept in the address, so a page that is loaded again looks as before.

const SORTS = {
  run: ["Run order", (run) => (a, b) => a - b, () => true],
  worst: ["Worst reward", (run) => (a, b) => order(run.samples.reward[a], run.samples.reward[b]) || a - b, (run) => run.has("reward")],
  longest: ["Longest", (run) => (a, b) => run.samples.tokens[b] - run.samples.tokens[a] || a - b, () => true],
  least: ["Least accepted", (run) => (a, b) => run.share(a) - run.share(b) || a - b, (run) => run.samples.traced.some(Boolean)],
};
const order = (a, b) => (Number.isNaN(a) - Number.isNaN(b)) || a - b || 0;
const COLOURS = {origin: "Origin", logprob: "Log-probability", entropy: "Entropy"};
const EMPTY = {sort: "run", search: "", step: "", finish: "", mixed: ""};

const $ = (id) => document.getElementById(id);
const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const whole = (n) => n.toLocaleString("en-US");
const percent = (share) => `${(100 * share).toFixed(share < 1 && (share > 0.995 || share < 0.1) ? 1 : 0)} %`;
const known = (value, digits = 2) => Number.isNaN(value) ? "–" : value.toFixed(digits);

class View extends EventTarget {
  constructor(run) {
    super();
    this.state = {...EMPTY, at: "", colour: "origin", blocks: "1"};
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (name in this.state) this.state[name] = value;
    this.take(run);
  }

  take(run) {
    this.run = run;
    if (!(this.state.sort in SORTS) || !SORTS[this.state.sort][2](run)) this.state.sort = "run";
    if (!(this.state.colour in COLOURS)) this.state.colour = "origin";
    this.filter();
  }

  filter() {
    const {run, state} = this, text = state.search.toLowerCase(), step = state.step === "" ? null : Number(state.step);
    this.shown = [];
    for (let i = 0; i < run.count; i++) {
      if (step !== null && run.samples.step[i] !== step) continue;
      if (state.finish !== "" && run.finishes[run.samples.finish[i]] !== state.finish) continue;
      if (state.mixed && !run.mixed(i)) continue;
      if (text && !run.text(i).toLowerCase().includes(text) && !run.label(i).toLowerCase().includes(text)) continue;
      this.shown.push(i);
    }
    this.shown.sort(SORTS[state.sort][1](run));
    // The chosen sample stays chosen while it is shown.
    const at = this.shown.findIndex((i) => this.key(i) === state.at);
    this.place = at < 0 ? 0 : at;
  }

  // What finds a sample again in newer data.
  key(i) { return `${this.run.group(i).split(" ")[0]}|${this.run.label(i)}`; }
  get sample() { return this.shown.length ? this.shown[this.place] : -1; }
  get filtered() { return ["search", "step", "finish", "mixed"].some((name) => this.state[name] !== ""); }

  set(changes) {
    const before = this.sample;
    Object.assign(this.state, changes);
    this.filter();
    if ("sort" in changes) this.place = 0;
    this.settle(before);
  }

  clear() { this.set({...EMPTY, sort: this.state.sort}); }

  choose(place) {
    const before = this.sample;
    this.place = Math.max(0, Math.min(place, this.shown.length - 1));
    this.settle(before, false);
  }

  find(sample) {
    let place = this.shown.indexOf(sample);
    if (place < 0) { this.set(EMPTY); place = this.shown.indexOf(sample); }
    this.choose(place);
  }

  settle(before, filtered = true) {
    this.state.at = this.sample < 0 ? "" : this.key(this.sample);
    const kept = Object.entries(this.state).filter(([name, value]) => value !== "" && !(name in EMPTY && EMPTY[name] === value));
    try { history.replaceState(null, "", `#${new URLSearchParams(kept)}`); } catch { /* some browsers forbid it for files */ }
    this.dispatchEvent(new CustomEvent("change", {detail: {filtered, moved: before !== this.sample}}));
  }
}
