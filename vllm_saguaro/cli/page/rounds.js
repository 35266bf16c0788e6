// The last rounds: what the target and the drafts did when, one lane each, and what became of the outcomes.

import { make, plain, ticks } from "./drawing.js";

const LEFT = 74;
const RIGHT = 12;
const LANE = 30;
const GAP = 10;
const OUTCOMES = 46;
const SHAPED = 3;

const CAUSES = [
  ["hits", "hit", "blue"],
  ["not_predicted", "not predicted", "orange"],
  ["late", "late", "violet"],
  ["absent", "absent", "grey"],
];

// One outcome as a shape of its own: a disc, a cross, a triangle, a ring.
function shape(kind, style, x, y) {
  if (kind === "hits") return make("circle", { cx: x, cy: y, r: 4.5, class: `fill ${style}` });
  if (kind === "not_predicted")
    return make("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8`, class: `cross ${style}` });
  if (kind === "late") return make("path", { d: `M${x - 5},${y + 4}h10l-5,-9z`, class: `fill ${style}` });
  return make("circle", { cx: x, cy: y, r: 4, class: `ring ${style}` });
}

const ms = (microseconds) => `${(microseconds / 1e3).toFixed(2)} ms`;

export class Rounds {
  constructor(parent, legend) {
    this.parent = parent;
    this.legend = legend;
    this.found = null;
    new ResizeObserver(() => this.#draw()).observe(parent);
    this.#explain();
  }

  // `found`: the `timeline` of /rounds.json, or null for none.
  show(found) {
    this.found = found && found.lanes.length ? found : null;
    this.legend.hidden = !this.found;
    if (!this.found) this.parent.replaceChildren();
    this.#draw();
  }

  #draw() {
    if (!this.found) return;
    const { lanes, bars, outcomes, marks, span, words } = this.found;
    const wide = this.parent.clientWidth;
    const bottom = OUTCOMES + lanes.length * (LANE + GAP);
    const picture = make("svg", { role: "img", "aria-label": words, width: wide, height: bottom + 22 });
    const x = (at) => LEFT + (wide - LEFT - RIGHT) * (at / span);
    const top = new Map(lanes.map((lane, place) => [lane.process, OUTCOMES + place * (LANE + GAP)]));
    for (const mark of ticks(span / 1e3, Math.max(3, Math.min(10, wide / 110)))) {
      if (mark * 1e3 > span) continue;
      const at = x(mark * 1e3);
      picture.append(
        make("line", { x1: at, x2: at, y1: OUTCOMES - 4, y2: bottom, class: "rule" }),
        make("text", { x: at, y: bottom + 15, "text-anchor": "middle" }, `${plain(mark)}${mark ? "" : " ms"}`),
      );
    }
    picture.append(make("text", { x: 0, y: OUTCOMES - 22, class: "lane" }, "outcomes"));
    for (const lane of lanes) picture.append(make("text", { x: 0, y: top.get(lane.process) + 19, class: "lane" }, lane.name));
    const passes = bars.filter((bar) => bar.process === 1 && bar.name !== "wait");
    const usual = passes.reduce((sum, bar) => sum + x(bar.length) - LEFT, 0) / Math.max(1, passes.length);
    for (const bar of bars) picture.append(this.#bar(bar, x, top.get(bar.process), usual));
    outcomes.forEach((outcome, place) => {
      const before = place ? x(outcomes[place - 1].at) : -Infinity;
      picture.append(this.#outcome(outcome, x(outcome.at), x(outcome.at) - before, bottom));
    });
    for (const mark of marks) {
      const y = top.get(mark.process);
      const line = make("line", { x1: x(mark.at), x2: x(mark.at), y1: y - 4, y2: y + LANE + 4, class: "tick bad" });
      line.append(make("title", {}, mark.name));
      picture.append(line);
    }
    this.parent.replaceChildren(picture);
  }

  // Steps are written into bars where the usual one has room for it.
  #bar(bar, x, y, usual) {
    const [left, right] = [Math.max(LEFT, x(bar.start)), x(bar.start + bar.length)]; // one may have begun before the first pass
    const width = Math.max(0.8, right - left);
    const words = [`${bar.name} ${bar.step ?? ""}: ${ms(bar.length)}`];
    if (bar.rows !== undefined) words.push(`${bar.rows} ${bar.rows === 1 ? "request" : "requests"}`);
    if (bar.tokens !== undefined) words.push(`${bar.tokens} tokens`);
    if (bar.why !== undefined) words.push(bar.why);
    if (bar.branches !== undefined) words.push(`${bar.branches} branches`);
    const group = make("g", { class: "bar", "data-name": bar.name, "data-step": bar.step ?? "" });
    if (bar.name === "wait") {
      group.append(make("rect", { x: left, y: y + 8, width, height: LANE - 16, class: "wait" }));
    } else if (bar.process === 1) {
      group.append(make("rect", { x: left, y, width: Math.max(0.8, width - 1), height: LANE, class: bar.name === "verify" ? "pass" : "forward" }));
    } else {
      const hidden = bar.hidden.reduce((sum, [start, end]) => sum + end - start, 0);
      words.push(`${ms(hidden)} of it behind target passes`);
      group.append(make("rect", { x: left, y, width: Math.max(0.8, width - 1), height: LANE, class: "open-part" }));
      for (const [start, end] of bar.hidden) {
        const from = Math.max(left, x(start));
        const to = Math.min(x(end), right - 1);
        if (x(end) > left) group.append(make("rect", { x: from, y, width: Math.max(0.5, to - from), height: LANE, class: "hidden-part" }));
      }
    }
    const label = `${bar.step ?? ""}`;
    if (bar.name !== "wait" && Math.min(width, usual) > 6 + 7 * label.length)
      group.append(make("text", { x: (left + right) / 2, y: y + 19, class: bar.process === 1 ? "in-pass" : "in-round" }, label));
    group.append(make("title", {}, words.join(", ")));
    return group;
  }

  // Up to three outcomes have a shape each; of more the shares are a column.
  #outcome(outcome, x, room, bottom) {
    const counts = CAUSES.map(([key]) => outcome[key]);
    const total = counts.reduce((sum, count) => sum + count, 0);
    const group = make("g", { class: "outcome", "data-step": outcome.step, "data-hits": outcome.hits, "data-misses": total - outcome.hits });
    group.append(make("line", { x1: x, x2: x, y1: OUTCOMES - 6, y2: bottom, class: "moment-line" }));
    let y = OUTCOMES - 12;
    CAUSES.forEach(([key, , style], place) => {
      if (total > SHAPED && counts[place]) {
        const height = (36 * counts[place]) / total;
        group.append(make("rect", { x: x - 4, y: y + 4 - height, width: 8, height, class: `fill ${style}` }));
        y -= height;
      }
      for (let one = 0; total <= SHAPED && one < counts[place]; one += 1, y -= 11) group.append(shape(key, style, x, y));
    });
    if (total === 1 && room > 30) group.append(make("text", { x, y: OUTCOMES - 24, "text-anchor": "middle" }, `+${outcome.accepted}`));
    const words = CAUSES.filter((_, place) => counts[place]).map(([key, name]) => `${outcome[key]} ${name}`);
    words.push(`${outcome.accepted} drafts accepted`, `${outcome.backups} backups`);
    group.append(make("title", {}, `outcomes of step ${outcome.step}: ${words.join(", ")}`));
    return group;
  }

  #explain() {
    const box = (style) => make("svg", { width: 16, height: 12, "aria-hidden": "true" }, make("rect", { x: 1, y: 1, width: 14, height: 10, class: style }));
    const drawn = (key, style) => make("svg", { width: 14, height: 14, "aria-hidden": "true" }, shape(key, style, 7, 7));
    const entries = [
      [box("pass"), "target pass (pale: without drafts)"],
      [box("wait"), "target waits"],
      [box("hidden-part"), "drafting behind a target pass"],
      [box("open-part"), "drafting beside none"],
      ...CAUSES.map(([key, name, style]) => [drawn(key, style), key === "hits" ? name : `miss: ${name}`]),
    ];
    this.legend.replaceChildren(...entries.map(([picture, name]) => make("li", {}, picture, name)), make("li", {}, "+k: k drafts accepted"));
  }
}
