// Brings the parts together.

function start(content) {
  firstTheme();
  const view = new View(new Run(content)), list = new List(view), tokens = new Tokens(view);
  const options = (select, values, every) => select.replaceChildren(
    element("option", {value: "", textContent: every}), ...values.map(([value, text]) => element("option", {value, textContent: text})));

  // What the run has: its counts, and the choices of the filters.
  function header() {
    const {run} = view, {trajectories, tokens: count, forwards, accepted} = run.totals;
    $("policy").textContent = run.decoded ? `text by the tokenizer of ${run.policy}` : "token ids; --policy NAME gives their text";
    facts($("totals"), [
      ["Trajectories", whole(trajectories) + (run.count < trajectories ? `, newest ${whole(run.count)} shown` : ""), true],
      ["Tokens", whole(count), true], ["Tokens per forward", known(count / forwards), forwards > 0],
      ["Accepted drafts", percent(accepted / Math.max(count, 1)), run.samples.traced.some(Boolean)],
      ["Mean reward, shown", known(sums(run, view.shown).reward), run.has("reward")],
    ]);
    const steps = [...new Set(run.samples.step)].filter((step) => !Number.isNaN(step)).sort((a, b) => a - b);
    options($("step"), steps.map((step) => [step, step]), "all");
    $("step").parentElement.hidden = steps.length === 0;
    options($("finish"), run.finishes.filter(Boolean).map((name) => [name, name]), "any");
    $("mixed").parentElement.hidden = !Array.from(run.samples.changes).some((count) => count > 1);
    document.documentElement.style.setProperty("--top", `${document.querySelector("header").offsetHeight}px`);
  }

  // The controls show the state.
  function controls() {
    const {state, run} = view;
    $("search").value = state.search;
    $("step").value = state.step;
    $("finish").value = state.finish;
    $("mixed").checked = state.mixed !== "";
    $("blocks").checked = state.blocks !== "";
    for (const button of $("sorts").children) button.setAttribute("aria-pressed", button.dataset.name === state.sort);
    for (const button of $("colours").children) {
      button.setAttribute("aria-pressed", button.dataset.name === state.colour);
      button.disabled = button.dataset.name === "entropy" && run.tokens.entropy === null;
      if (button.disabled) button.title = "not recorded; blockroll inspect --policy NAME --entropy computes it";
    }
    const {trajectories, tokens: count, reward} = sums(run, view.shown);
    $("found").textContent = `${whole(trajectories)} of ${whole(run.count)} · ${whole(count)} tokens` +
      (Number.isNaN(reward) ? "" : ` · mean reward ${known(reward, 3)}`);
  }

  const scope = () => view.filtered ? `of the ${whole(view.shown.length)} trajectories that the filters leave` : `of ${whole(view.run.count)} trajectories`;
  function update({filtered, moved}) {
    controls();
    list.update(filtered);
    tokens.update(moved);
    if (filtered) later(() => drawAcceptance(view.run, view.shown, scope()));
  }
  let planned = 0;
  const later = (draw) => { cancelAnimationFrame(planned); planned = requestAnimationFrame(draw); };

  const actions = {
    sibling() {
      if (view.sample < 0) return;
      const group = view.run.groups.get(view.run.group(view.sample));
      view.find(group[(group.indexOf(view.sample) + 1) % group.length]);
    },
    colour() {
      const names = Object.keys(COLOURS).filter((name) => name !== "entropy" || view.run.tokens.entropy !== null);
      view.set({colour: names[(names.indexOf(view.state.colour) + 1) % names.length]});
    },
    theme() {
      setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
      list.restyle();
    },
    live() { live.toggle(); },
    help() { $("keys").showModal(); },
  };

  const segmented = (box, names, pick) => box.replaceChildren(...Object.entries(names).map(([name, text]) => {
    const button = element("button", {type: "button", textContent: text});
    button.dataset.name = name;
    button.addEventListener("click", () => pick(name));
    return button;
  }));
  segmented($("sorts"), Object.fromEntries(Object.entries(SORTS).map(([name, [text]]) => [name, text])), (sort) => view.set({sort}));
  segmented($("colours"), COLOURS, (colour) => view.set({colour}));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", () => view.set({search: $("search").value}));
  $("step").addEventListener("change", () => view.set({step: $("step").value}));
  $("finish").addEventListener("change", () => view.set({finish: $("finish").value}));
  $("mixed").addEventListener("change", () => view.set({mixed: $("mixed").checked ? "1" : ""}));
  $("blocks").addEventListener("change", () => view.set({blocks: $("blocks").checked ? "1" : ""}));
  $("theme").addEventListener("click", actions.theme);
  $("help").addEventListener("click", actions.help);
  view.addEventListener("change", (event) => update(event.detail));
  listenToKeys(keyTable(view, tokens, actions));

  function draw() {
    header();
    const {run} = view;
    for (const button of $("sorts").children) button.disabled = !SORTS[button.dataset.name][2](run);
    list.longest = undefined;
    drawCurves(run, (step) => { if (run.samples.step.includes(step)) view.set({step: String(step)}); });
    update({filtered: true, moved: false});
  }
  const live = new Live(view.run, (run) => {
    view.take(run);
    draw();
  });
  draw();
  performance.mark("drawn");
}

{
  const content = JSON.parse($("payload").textContent);
  if (location.hash === HAND_OVER && parent !== window) handOver(content); else start(content);
}
