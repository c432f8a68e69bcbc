// One trajectory, token by token.

const PART = 1024, LONG = 4096;
const LEGEND = {accepted: "draft accepted", resampled: "resampled", bonus: "bonus", sampled: "sampled without drafts", environment: "tool or environment",
  unknown: "not recorded"};
const HEAT = [0.02, 0.1, 0.5, 1, 2, 4]; // nats from which a token has the next darker tint

class Tokens {
  constructor(view) {
    this.view = view;
    this.box = $("text");
    this.at = -1;
    // Of a long trajectory the parts that come into sight are filled, one by one.
    this.seen = new IntersectionObserver((entries) => { for (const {isIntersecting, target} of entries) if (isIntersecting) this.fill(target); },
      {root: this.box, rootMargin: "800px"});
    this.box.addEventListener("pointermove", (event) => this.point(event));
    this.box.addEventListener("pointerleave", () => hideTip());
    this.box.addEventListener("click", (event) => { const token = event.target.closest("b"); if (token) this.go(Number(token.dataset.t)); });
    $("group").addEventListener("click", (event) => { if (event.target.dataset.i) view.find(Number(event.target.dataset.i)); });
  }

  update(moved) {
    if (moved) this.at = -1;
    const {run, sample: i} = this.view;
    $("trajectory").hidden = i < 0;
    if (i < 0) return;
    this.head(run, i);
    this.legend(run, i);
    this.box.classList.toggle("blocks", this.view.state.blocks !== "");
    const prompt = run.prompt(i);
    $("prompt-text").textContent = prompt;
    $("prompt-start").textContent = `Prompt: ${prompt.slice(0, 200).replaceAll("\n", " ↵ ")}`;
    $("prompt").hidden = !prompt;
    this.seen.disconnect();
    this.box.replaceChildren(...this.parts(run, i));
    if (moved) this.box.scrollTop = 0;
    this.go(Math.min(this.at, run.samples.tokens[i] - 1), false);
  }

  head(run, i) {
    const {step, reward, advantage, forwards, tokens} = run.samples, changes = run.changes(i);
    $("which").textContent = (Number.isNaN(step[i]) || run.label(i).startsWith("step-") ? "" : `Step ${step[i]} · `) + run.label(i);
    const versions = changes.map(([, version]) => version);
    facts($("facts"), [
      ["Reward", known(reward[i]), !Number.isNaN(reward[i])], ["Advantage", known(advantage[i]), !Number.isNaN(advantage[i])],
      ["Tokens", whole(tokens[i]), true], ["Tokens per forward", known(tokens[i] / forwards[i]), forwards[i] > 0],
      ["Accepted drafts", percent(run.share(i)), run.samples.traced[i]],
      [versions.length > 1 ? "Versions" : "Version", versions.join(" → "), versions.length > 0],
      ["Ended by", run.finishes[run.samples.finish[i]], run.finishes[run.samples.finish[i]] !== ""],
    ]);
    const group = run.groups.get(run.group(i));
    $("group").hidden = group.length < 2;
    $("group").replaceChildren(`Group of ${group.length}`, ...group.map((other) => {
      const value = reward[other], made = element("button", {type: "button", textContent: `#${run.samples.number[other]}` +
        (Number.isNaN(value) ? "" : ` ${known(value)}`)});
      made.dataset.i = other;
      made.setAttribute("aria-pressed", other === i);
      return made;
    }));
  }

  legend(run, i) {
    const {colour} = this.view.state, from = run.first.token[i], to = run.first.token[i + 1];
    if (colour === "origin") {
      const there = new Set(run.tokens.origin.subarray(from, to));
      $("legend").replaceChildren(...run.origins.map((name, o) => [name, o]).filter(([, o]) => there.has(o)).sort(([, a], [, b]) => (a || 9) - (b || 9))
        .map(([name, o]) => element("span", {}, element("i", {className: `o${o}`}), LEGEND[name])),
        element("span", {textContent: "│⁴ block border, level"}));
    } else {
      const what = colour === "entropy" ? "entropy of p" : "-log p";
      $("legend").replaceChildren(element("span", {textContent: `${what}, nats:`}), ...[0, ...HEAT].map((least, h) =>
        element("span", {}, element("i", {className: `h${h}`}), h ? `${least}+` : `below ${HEAT[0]}`)));
    }
  }

  parts(run, i) {
    const count = run.samples.tokens[i], parts = [];
    this.changes = new Map(run.changes(i));
    this.starts = new Map();
    for (let s = run.first.step[i]; s < run.first.step[i + 1]; s++) this.starts.set(run.steps.start[s], run.steps.level[s]);
    for (let t = 0; t < count; t += PART) {
      const part = element("span", {className: count > LONG ? "part long empty" : "part"});
      part.dataset.from = t;
      parts.push(part);
      if (count > LONG) this.seen.observe(part); else this.fill(part);
    }
    return parts.length ? parts : [element("span", {className: "none", textContent: "No tokens."})];
  }

  // The tokens of a part.
  fill(part) {
    if (part.firstChild) return;
    const {changes, starts} = this, {run, sample: i} = this.view, from = run.first.token[i], first = Number(part.dataset.from);
    part.classList.remove("empty");
    for (let t = first; t < Math.min(first + PART, run.samples.tokens[i]); t++) {
      const piece = run.piece(from + t), token = element("b", {className: this.tint(run, from + t)});
      token.dataset.t = t;
      if (changes.has(t) && changes.size > 1) part.append(element("span", {className: "version", textContent: `v${changes.get(t)}`}));
      if (starts.has(t)) {
        token.classList.add("s");
        if (starts.get(t) >= 0) token.dataset.l = starts.get(t);
      }
      if (piece.includes("\n")) token.append(element("span", {className: "end", textContent: "↵"}));
      token.append(piece);
      part.append(token);
    }
  }

  tint(run, t) {
    const {colour} = this.view.state;
    if (colour === "origin") return `o${run.tokens.origin[t]}`;
    const column = colour === "entropy" ? run.tokens.entropy : run.tokens.logprob;
    const value = column === null ? NaN : Math.abs(column[t]);
    return Number.isNaN(value) ? "o0" : `h${HEAT.filter((least) => value >= least).length}`;
  }

  // What is known of token t of the chosen sample: [[name, value], ..].
  known(t) {
    const {run, sample: i} = this.view, all = run.first.token[i] + t, s = run.stepOf(i, t), origin = run.origins[run.tokens.origin[all]];
    const rows = [["token", `${t + 1} of ${whole(run.samples.tokens[i])}, id ${run.vocabulary.ids[run.tokens.piece[all]]}`], ["origin", LEGEND[origin]]];
    const number = (name, column) => {
      if (column !== null && !Number.isNaN(column[all])) rows.push([name, (Math.abs(column[all]) < 5e-5 ? 0 : column[all]).toFixed(4)]);
      return column !== null && !Number.isNaN(column[all]);
    };
    if (number("log p", run.tokens.logprob)) rows.at(-1)[1] += ` (p = ${percent(Math.exp(run.tokens.logprob[all]))})`;
    number("log p, as sampled", run.tokens.behavior);
    if (!number("entropy of p", run.tokens.entropy)) rows.push(["entropy of p", "not recorded"]);
    if (s >= 0) {
      const {start, drafted, accepted, slot, level, length} = run.steps;
      rows.push(["step", `${s - run.first.step[i] + 1} of ${run.samples.steps[i]}, ${accepted[s]} of ${drafted[s]} drafts accepted`]);
      if (drafted[s]) {
        const looked = t - start[s] < drafted[s];
        rows.push(["block", `${looked ? `slot ${slot[s] + t - start[s] + 1} of ${length[s]}` : `${length[s]} slots`}` +
          (level[s] < 0 ? ", drafted in its own step" : `, level ${level[s]}`)]);
      }
    }
    const versions = run.changes(i).filter(([first]) => first <= t);
    if (versions.length) rows.push(["version", versions.at(-1)[1]]);
    return rows;
  }

  point(event) {
    const token = event.target.closest("b");
    if (!token) return hideTip();
    const t = Number(token.dataset.t), text = this.view.run.piece(this.view.run.first.token[this.view.sample] + t);
    showTip(event.clientX, event.clientY, element("code", {textContent: JSON.stringify(text)}),
      ...this.known(t).map(([name, value]) => `\n${name}: ${value}`));
  }

  // Puts the cursor on token t; -1 takes it away.
  go(t, seen = true) {
    this.box.querySelector(".at")?.classList.remove("at");
    const count = this.view.sample < 0 ? 0 : this.view.run.samples.tokens[this.view.sample];
    this.at = Math.max(-1, Math.min(t, count - 1));
    const part = this.at < 0 ? null : this.box.querySelector(`[data-from="${this.at - this.at % PART}"]`);
    if (part) this.fill(part);
    const token = this.at < 0 ? null : this.box.querySelector(`b[data-t="${this.at}"]`);
    token?.classList.add("at");
    if (seen) token?.scrollIntoView({block: "nearest"});
    const text = token && JSON.stringify(this.view.run.piece(this.view.run.first.token[this.view.sample] + this.at));
    $("facts-of-token").textContent = token ? `${text}  ·  ${this.known(this.at).map(([name, value]) => `${name}: ${value}`).join("  ·  ")}`
      : "Point at a token, or move with the left and right arrow keys.";
  }

  // To the first token of the next step (1) or of the one before (-1).
  step(direction) {
    const {run, sample: i} = this.view;
    if (i < 0) return;
    const starts = Array.from(run.steps.start.subarray(run.first.step[i], run.first.step[i + 1]));
    const next = direction > 0 ? starts.find((start) => start > this.at) : starts.findLast((start) => start < this.at);
    if (next !== undefined) this.go(next);
  }
}

function facts(list, rows) {
  list.replaceChildren(...rows.filter(([, , there]) => there).map(([name, value]) =>
    element("div", {}, element("dt", {textContent: name}), element("dd", {textContent: value}))));
}

function showTip(x, y, ...content) {
  const tip = $("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const {width, height} = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? y - height - 12 : y + 18}px`;
}
function hideTip() { $("tip").hidden = true; }
