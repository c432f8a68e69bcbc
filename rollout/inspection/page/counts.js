// Figures of some samples: what became of drafts by slot, by place in their step and by position in the sample.

const SPAN = 32;

// Conditional acceptance: of the drafts that verification looked at (those before them were accepted), the share that it accepted.
function acceptance(run, chosen) {
  const slots = [], drafts = [], spans = [];
  const add = (rows, k, seen, taken) => {
    while (rows.length <= k) rows.push({seen: 0, taken: 0});
    rows[k].seen += seen;
    rows[k].taken += taken;
  };
  for (const i of chosen) {
    const end = run.first.step[i + 1];
    for (let s = run.first.step[i]; s < end; s++) {
      const {start, drafted, accepted, slot} = run.steps, looked = Math.min(accepted[s] + 1, drafted[s]);
      for (let k = 0; k < looked; k++) {
        const taken = k < accepted[s];
        add(slots, slot[s] + k, 1, taken);
        add(drafts, k, 1, taken);
      }
      // The last step of a sample is cut short by its end.
      if (s < end - 1) add(spans, Math.floor(start[s] / SPAN), 1, accepted[s] + 1);
    }
  }
  return {slots, drafts, spans};
}

function sums(run, chosen) {
  let tokens = 0, forwards = 0, accepted = 0, reward = 0, rewarded = 0;
  for (const i of chosen) {
    tokens += run.samples.tokens[i];
    accepted += run.accepted[i];
    if (!Number.isNaN(run.samples.forwards[i])) forwards += run.samples.forwards[i];
    if (!Number.isNaN(run.samples.reward[i])) { reward += run.samples.reward[i]; rewarded++; }
  }
  return {trajectories: chosen.length, tokens, forwards, accepted, reward: rewarded ? reward / rewarded : NaN};
}
