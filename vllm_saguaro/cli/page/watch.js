// Asks the command for readings and rounds, and shows them. Every number comes from there; here it is only drawn.

import { clock, hundredths, make, milliseconds, percent, plain, rate } from "./drawing.js";
import { Plot } from "./plot.js";
import { Rounds } from "./rounds.js";

const PATIENCE = 5000;
const ROUNDS_EVERY = 1000;
const MOST_POINTS = 1800;
const TILES = ["hit_rate", "acceptance", "speed", "waits", "chosen", "requests", "drafts"];
const share = (key) => (reading) => reading[key];
const ofOutcomes = (cause) => (reading) => (reading.outcomes ? reading.misses[cause] / reading.outcomes : null);

const PLOTS = [
  {
    id: "outcomes", title: "Hits, misses by cause", unit: "% of outcomes", kind: "columns", most: 100, scale: 100, format: percent,
    series: [
      { name: "hits", style: "blue", value: share("hit_rate") },
      { name: "not predicted", style: "orange", value: ofOutcomes("not_predicted") },
      { name: "late", style: "violet", value: ofOutcomes("late") },
      { name: "absent", style: "grey", value: ofOutcomes("absent") },
    ],
  },
  {
    id: "shares", title: "Acceptance, late tables, quiet steps", unit: "%", kind: "lines", most: 100, scale: 100, format: percent,
    series: [
      { name: "accepted of the drafts", style: "blue", value: share("acceptance") },
      { name: "late of the hits", style: "violet second", value: share("late_share") },
      { name: "quiet of the steps", style: "grey third", value: share("quiet_share") },
    ],
  },
  {
    id: "positions", title: "Acceptance by position", unit: "% of the rounds", kind: "positions", most: 100, scale: 100, format: percent,
    series: [{ name: "last", style: "blue" }, { name: "since the start", style: "orange" }],
  },
  {
    id: "speed", title: "Speed", unit: "per second", kind: "lines", scale: 1, format: rate,
    series: [
      { name: "tokens", style: "blue", value: share("tokens_per_second") },
      { name: "steps", style: "teal second", value: share("steps_per_second") },
    ],
  },
  {
    id: "times", title: "Draft round and target pass", unit: "ms, means", kind: "lines", scale: 1e3, format: milliseconds,
    series: [
      { name: "verify", style: "grey", value: share("verify") },
      { name: "draft round", style: "blue second", value: share("draft_round") },
    ],
  },
  {
    id: "waits", title: "The target waits", unit: "ms", kind: "lines", scale: 1e3, format: milliseconds,
    series: [
      { name: "for drafts, mean", style: "orange", value: share("target_wait") },
      { name: "99 % below", style: "grey third", value: share("target_wait_p99") },
      { name: "for backups, mean", style: "violet second", value: share("backup_wait") },
    ],
  },
  {
    id: "backups", title: "Backups", unit: "number in a reading", kind: "columns", scale: 1, format: plain,
    series: [
      { name: "ngram", style: "teal", value: (reading) => reading.backups.ngram },
      { name: "jit", style: "violet", value: (reading) => reading.backups.jit },
    ],
  },
  {
    id: "chosen", title: "Chosen K and N", unit: "drafts, branches", kind: "lines", scale: 1, format: plain,
    series: [
      { name: "K", style: "orange", value: share("chosen_k") },
      { name: "N", style: "blue second", value: share("chosen_n") },
    ],
  },
  {
    id: "chosen-c", title: "Chosen C of Saguaro sampling", unit: "0 to 1", kind: "lines", most: 1, scale: 1, format: hundredths, sometimes: true,
    series: [{ name: "C", style: "violet", value: share("chosen_c") }],
  },
  {
    id: "requests", title: "Requests", unit: "number", kind: "lines", scale: 1, format: plain,
    series: [
      { name: "running", style: "blue", value: share("running") },
      { name: "waiting", style: "orange second", value: share("waiting") },
    ],
  },
];

const found = (id) => document.getElementById(id);
const plots = PLOTS.map((plot) => new Plot(found("plots"), plot));
const timeline = new Rounds(found("rounds"), found("rounds-legend"));
const state = { run: null, moments: [], answer: null, newest: 0, lost: null, window: null };

function take(answer) {
  if (answer.run !== state.run) Object.assign(state, { run: answer.run, moments: [], newest: 0 });
  state.moments.push(...answer.moments.filter((moment) => moment.number > state.newest));
  state.moments.splice(0, state.moments.length - MOST_POINTS);
  state.newest = state.moments.length ? state.moments[state.moments.length - 1].number : 0;
  state.answer = answer;
  if (state.window === null) chooseWindow(answer.interval);
}

// The shortest stretch with sixty readings in it, until somebody chooses.
function chooseWindow(interval) {
  const lengths = [...found("window").options].map((option) => Number(option.value));
  state.window = lengths.find((length) => length >= 60 * interval) ?? lengths[lengths.length - 1];
  found("window").value = String(state.window);
}

function show() {
  const { answer } = state;
  if (!answer) return;
  found("server").textContent = answer.url;
  showEngines(answer.engines);
  const engine = found("engine").value || "all";
  const now = answer.now;
  const points = state.moments
    .filter((moment) => moment.readings[engine] && moment.at >= now - state.window - answer.interval)
    .map((moment) => ({ at: moment.at, anew: moment.anew, seconds: moment.readings[engine].seconds, reading: moment.readings[engine] }));
  const view = { now, span: stretch(points.length ? now - points[0].at : 0), gap: 3 * answer.interval + 1 };
  for (const plot of plots) plot.show(points, answer.from_start[engine], view);
  showWords(answer.table[engine] ?? { now: [], from_start: [], span: null });
}

// The shortest round stretch of time that holds all readings, and no more than was chosen.
function stretch(seconds) {
  return [20, 60, 120, 300, 600, 1800, 3600].find((round) => round >= Math.min(seconds, state.window));
}

function showEngines(names) {
  const select = found("engine");
  found("engines").hidden = names.length < 2;
  if ([...select.options].map((option) => option.value).join() === names.join()) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  select.value = names.includes(chosen) ? chosen : names[0] ?? "";
}

function showWords(table) {
  const rows = table.now.length ? table.now : table.from_start;
  const tiles = TILES.map((key) => rows.find((row) => row.key === key)).filter(Boolean);
  found("tiles").replaceChildren(
    ...tiles.map((row) =>
      make("div", { class: "tile", "data-key": row.key }, make("p", { class: "name" }, row.name), make("p", { class: "value" }, row.value), make("p", { class: "more" }, row.more)),
    ),
  );
  found("span").textContent = table.now.length ? table.span : "the last reading";
  const cell = (row) => make("td", {}, row ? row.value : "-", " ", make("span", { class: "more" }, row ? row.more : ""));
  const keys = [...new Set([...table.now, ...table.from_start].map((row) => row.key))];
  const of = (side, key) => table[side].find((row) => row.key === key);
  found("numbers").tBodies[0].replaceChildren(
    ...keys.map((key) =>
      make("tr", { "data-key": key }, make("th", { scope: "row" }, (of("now", key) ?? of("from_start", key)).name), cell(of("now", key)), cell(of("from_start", key))),
    ),
  );
}

function showState() {
  const { answer, lost, moments } = state;
  let words = "not read yet";
  let bad = false;
  if (lost !== null) {
    words = `no answer from the watch command since ${clock(lost)}; asking again`;
    bad = true;
  } else if (answer && answer.problem) {
    words = `${answer.problem.kind} since ${clock(answer.problem.since)}: ${answer.problem.words}; asking again`;
    bad = true;
  } else if (answer) {
    const last = moments.length ? `, last at ${clock(moments[moments.length - 1].at)}` : "";
    words = `a reading every ${plain(answer.interval)} s${last}`;
  }
  const line = found("state");
  if (line.textContent !== words) line.textContent = words;
  line.classList.toggle("bad", bad);
}

// What the command says, or null if it does not answer.
async function ask(path) {
  try {
    const answer = await fetch(path, { signal: AbortSignal.timeout(PATIENCE), cache: "no-store" });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

async function followReadings() {
  try {
    const answer = await ask(`readings.json?since=${state.newest}&run=${state.run ?? ""}`);
    state.lost = answer ? null : (state.lost ?? Date.now() / 1e3);
    if (answer) take(answer);
    show();
    showState();
  } finally {
    setTimeout(followReadings, state.answer ? Math.max(250, 500 * state.answer.interval) : 1000);
  }
}

async function followRounds() {
  try {
    const answer = await ask(`rounds.json?last=${found("last").value}`);
    if (answer && !found("hold").checked) {
      found("rounds-words").textContent = answer.words;
      timeline.show(answer.timeline);
    }
  } finally {
    setTimeout(followRounds, ROUNDS_EVERY);
  }
}

found("engine").addEventListener("change", show);
found("window").addEventListener("change", () => {
  state.window = Number(found("window").value);
  show();
});
if (window.innerWidth < 700) found("last").value = "6";
followReadings();
followRounds();
