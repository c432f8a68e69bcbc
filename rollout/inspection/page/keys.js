// The keyboard, the page's theme and the list of keys.

const THEMES = ["light", "dark"];

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("blockroll-theme", name); } catch { /* a page from a file may have no storage */ }
}

function firstTheme() {
  let kept = null;
  try { kept = localStorage.getItem("blockroll-theme"); } catch { /* as above */ }
  document.documentElement.dataset.theme = THEMES.includes(kept) ? kept : matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

// [keys, what they do, action]; a key in sight of the list of keys works everywhere but in a field that takes text.
function keyTable(view, tokens, actions) {
  const sort = (name) => () => { if (SORTS[name][2](view.run)) view.set({sort: name}); };
  return [
    [["j", "ArrowDown"], "next trajectory", () => view.choose(view.place + 1)],
    [["k", "ArrowUp"], "trajectory before", () => view.choose(view.place - 1)],
    [["PageDown"], "ten trajectories on", () => view.choose(view.place + 10)],
    [["PageUp"], "ten trajectories back", () => view.choose(view.place - 10)],
    [["Home"], "first trajectory", () => view.choose(0)],
    [["End"], "last trajectory", () => view.choose(view.shown.length - 1)],
    [["g"], "next sample of the group", () => actions.sibling()],
    [["l", "ArrowRight"], "next token", () => tokens.go(tokens.at + 1)],
    [["h", "ArrowLeft"], "token before", () => tokens.go(Math.max(0, tokens.at - 1))],
    [["]"], "first token of the next step", () => tokens.step(1)],
    [["["], "first token of the step before", () => tokens.step(-1)],
    [["1"], "run order", sort("run")],
    [["2"], "worst reward first", sort("worst")],
    [["3"], "longest first", sort("longest")],
    [["4"], "least accepted first", sort("least")],
    [["/"], "search text", () => $("search").focus()],
    [["m"], "only mixed versions", () => view.set({mixed: view.state.mixed ? "" : "1"})],
    [["x"], "clear search and filters", () => view.clear()],
    [["c"], "colour by origin, log-probability, entropy", () => actions.colour()],
    [["b"], "blocks and levels", () => view.set({blocks: view.state.blocks ? "" : "1"})],
    [["t"], "light or dark", () => actions.theme()],
    [["p"], "follow the run, or pause", () => actions.live()],
    [["?"], "this list", () => actions.help()],
  ];
}

const NAMES = {ArrowDown: "↓", ArrowUp: "↑", ArrowLeft: "←", ArrowRight: "→", PageDown: "Page ↓", PageUp: "Page ↑"};

function listenToKeys(rows) {
  const actions = new Map(rows.flatMap(([keys, , action]) => keys.map((key) => [key, action])));
  $("key-list").replaceChildren(...rows.flatMap(([keys, what]) => [
    element("dt", {}, ...keys.flatMap((key, k) => [k ? " " : "", element("kbd", {textContent: NAMES[key] ?? key})])), element("dd", {textContent: what})]));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
    const field = event.target.closest("input[type=search], select");
    if (field) { if (event.key === "Escape") { field.blur(); $("list").focus(); } return; }
    // Beside the list and the tokens, keys that scroll scroll.
    const scrolls = /^(Arrow(Up|Down)|Page|Home|End)/.test(event.key);
    if (scrolls && event.target !== document.body && !event.target.closest("#list, #text")) return;
    const action = actions.get(event.key);
    if (action) { event.preventDefault(); action(); }
  });
}
