// The payload as typed arrays, and samples as views into them. Columns are those of payload.py.

const bytes = (text) => Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const table = (columns, kinds) => Object.fromEntries(
  Object.entries(kinds).map(([name, Kind]) => [name, columns[name] === null ? null : new Kind(bytes(columns[name]).buffer)]));

const SAMPLE_KINDS = {name: Uint32Array, finish: Uint32Array, prompt: Uint32Array, number: Uint32Array, tokens: Uint32Array, steps: Uint32Array,
  traced: Uint8Array, changes: Uint32Array, step: Float64Array, reward: Float64Array, advantage: Float64Array, forwards: Float64Array};
const TOKEN_KINDS = {piece: Uint32Array, origin: Uint8Array, logprob: Float32Array, entropy: Float32Array, behavior: Float32Array};
const STEP_KINDS = {start: Uint32Array, drafted: Uint8Array, accepted: Uint8Array, slot: Uint8Array, level: Int8Array, length: Uint8Array,
  forwards: Uint8Array};
const ACCEPTED = 1, ENVIRONMENT = 5;

// First element of each part, and the end of the last one.
const offsets = (counts) => {
  const first = new Uint32Array(counts.length + 1);
  counts.forEach((count, i) => { first[i + 1] = first[i] + count; });
  return first;
};

class Run {
  constructor(content) {
    Object.assign(this, {title: content.title, policy: content.policy, decoded: content.decoded, live: content.live, made: content.made,
      totals: content.totals, origins: content.origins, curves: content.curves, vocabulary: content.vocabulary, names: content.names,
      finishes: content.finishes});
    this.samples = table(content.samples, SAMPLE_KINDS);
    this.tokens = table(content.tokens, TOKEN_KINDS);
    this.steps = table(content.steps, STEP_KINDS);
    this.versions = table(content.versions, {start: Uint32Array, version: Int32Array});
    this.prompts = table(content.prompts, {tokens: Uint32Array, piece: Uint32Array});
    this.count = this.samples.name.length;
    this.first = {token: offsets(this.samples.tokens), step: offsets(this.samples.steps), change: offsets(this.samples.changes),
      prompt: offsets(this.prompts.tokens)};
    this.accepted = new Uint32Array(this.count);
    this.groups = new Map();
    for (let i = 0; i < this.count; i++) {
      for (let t = this.first.token[i]; t < this.first.token[i + 1]; t++) this.accepted[i] += this.tokens.origin[t] === ACCEPTED;
      const group = this.group(i);
      if (!this.groups.has(group)) this.groups.set(group, []);
      this.groups.get(group).push(i);
    }
    this.texts = new Array(this.count);
  }

  group(i) { return `${this.samples.step[i]} ${this.samples.name[i]}`; }
  label(i) { return `${this.names[this.samples.name[i]]} #${this.samples.number[i]}`; }
  piece(t) { return this.vocabulary.texts[this.tokens.piece[t]]; }
  mixed(i) { return this.samples.changes[i] > 1; }
  has(column) { return this.samples[column].some((value) => !Number.isNaN(value)); }
  share(i) { return this.samples.tokens[i] ? this.accepted[i] / this.samples.tokens[i] : 0; }

  text(i) {
    if (this.texts[i] === undefined) {
      let text = "";
      for (let t = this.first.token[i]; t < this.first.token[i + 1]; t++) text += this.piece(t);
      this.texts[i] = text;
    }
    return this.texts[i];
  }

  prompt(i) {
    const p = this.samples.prompt[i];
    return Array.from(this.prompts.piece.subarray(this.first.prompt[p], this.first.prompt[p + 1]), (piece) => this.vocabulary.texts[piece]).join("");
  }

  // Versions of a sample: [first token, version] of each stretch.
  changes(i) {
    const found = [];
    for (let c = this.first.change[i]; c < this.first.change[i + 1]; c++) found.push([this.versions.start[c], this.versions.version[c]]);
    return found;
  }

  // The decode step that made token t of sample i, as an index into this.steps; -1 where none did.
  stepOf(i, t) {
    let low = this.first.step[i], high = this.first.step[i + 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps.start[middle] <= t) low = middle + 1; else high = middle;
    }
    const s = low - 1;
    return s >= this.first.step[i] && t <= this.steps.start[s] + this.steps.accepted[s] ? s : -1;
  }
}
