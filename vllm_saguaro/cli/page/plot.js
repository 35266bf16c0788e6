// One plot: readings over time as lines or as columns on each other, or the positions of the newest reading.

import { clock, make, plain, sign, ticks } from "./drawing.js";

const HEIGHT = 150;
const LEFT = 40;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 22;

export class Plot {
  // `plot`: {id, title, unit, kind: "lines" | "columns" | "positions", most, scale, format, series, sometimes}; a series
  // is {name, style, value}, where value takes a reading and gives a number or null. `sometimes`: not shown as long as
  // there is no number at all.
  constructor(parent, plot) {
    this.plot = plot;
    this.picture = make("svg", { role: "img", height: HEIGHT });
    this.legend = make("ul", { class: "legend" });
    this.moment = make("span", { class: "moment" });
    const title = make("figcaption", {}, plot.title, make("span", { class: "unit" }, plot.unit), this.moment);
    this.figure = make("figure", { id: plot.id }, title, this.legend, this.picture);
    this.figure.hidden = Boolean(plot.sometimes);
    parent.append(this.figure);
    this.pointed = null;
    this.picture.addEventListener("pointermove", (event) => this.#point(event.offsetX));
    this.picture.addEventListener("pointerleave", () => this.#point(null));
    new ResizeObserver(() => this.#draw()).observe(this.figure);
  }

  // `points`: [{at, seconds, anew, reading}], oldest first. `view`: {now, span, gap} in seconds.
  show(points, fromStart, view) {
    Object.assign(this, { points, fromStart, view });
    const { series, sometimes } = this.plot;
    if (sometimes) this.figure.hidden = points.every(({ reading }) => series.every(({ value }) => value(reading) === null));
    this.#draw();
  }

  #point(x) {
    this.pointed = x;
    this.#draw();
  }

  #draw() {
    const wide = this.figure.clientWidth;
    if (!this.points || wide < LEFT + RIGHT + 20) return;
    this.picture.setAttribute("width", wide);
    this.picture.replaceChildren();
    this.wide = wide - LEFT - RIGHT;
    if (this.plot.kind === "positions") this.#drawPositions();
    else this.#drawTimes();
  }

  #drawTimes() {
    const { plot, points, view } = this;
    const stacked = plot.kind === "columns";
    const rows = points.map((point) => plot.series.map((series) => series.value(point.reading)));
    const heights = rows.map((row) => (stacked ? row.reduce((sum, value) => sum + (value ?? 0), 0) : Math.max(0, ...row)));
    const y = this.#axes(plot.most ?? Math.max(0, ...heights) * plot.scale);
    const x = (at) => LEFT + this.wide * (1 - (view.now - at) / view.span);
    this.#times(x);
    for (const point of points.filter((each) => each.anew)) {
      const line = make("line", { x1: x(point.at), x2: x(point.at), y1: TOP, y2: HEIGHT - BOTTOM, class: "anew" });
      line.append(make("title", {}, "the server began anew"));
      this.picture.append(line);
    }
    if (stacked) this.#columns(rows, x, y);
    else plot.series.forEach((series, place) => this.#line(rows.map((row) => row[place]), series.style, x, y));
    this.#values(rows, x);
  }

  #columns(rows, x, y) {
    this.points.forEach((point, index) => {
      const right = Math.min(x(point.at), LEFT + this.wide);
      const left = Math.max(LEFT, x(point.at - (point.seconds ?? this.view.gap / 3)));
      let below = 0;
      rows[index].forEach((value, place) => {
        if (!value || right <= left) return;
        const [low, high] = [y(below * this.plot.scale), y((below + value) * this.plot.scale)];
        below += value;
        const width = Math.max(0.5, right - left - (right - left > 4 ? 1 : 0));
        this.picture.append(
          make("rect", { x: left, y: high, width, height: low - high, class: `fill ${this.plot.series[place].style}` }),
        );
      });
    });
  }

  #line(values, style, x, y) {
    let piece = [];
    let before = null;
    const end = () => {
      if (piece.length > 1) this.picture.append(make("path", { d: `M${piece.join("L")}`, class: `line ${style}` }));
      else if (piece.length) {
        const [cx, cy] = piece[0].split(",");
        this.picture.append(make("circle", { cx, cy, r: 1.8, class: `fill ${style}` }));
      }
      piece = [];
    };
    this.points.forEach((point, index) => {
      const value = values[index];
      if (value === null || point.anew || (before !== null && point.at - before > this.view.gap)) end();
      if (value !== null) piece.push(`${x(point.at).toFixed(1)},${y(value * this.plot.scale).toFixed(1)}`);
      before = point.at;
    });
    end();
  }

  #drawPositions() {
    const { plot } = this;
    const newest = this.points.findLast((point) => point.reading.accepted_by_position.length);
    const now = newest ? newest.reading.accepted_by_position : [];
    const all = this.fromStart ? this.fromStart.accepted_by_position : [];
    const count = Math.max(now.length, all.length, 1);
    const y = this.#axes(plot.most);
    const step = this.wide / count;
    for (let place = 0; place < count; place += 1) {
      const middle = LEFT + step * (place + 0.5);
      const half = Math.min(28, step * 0.35);
      const column = make("rect", {
        x: middle - half, width: 2 * half, y: y((now[place] ?? 0) * plot.scale),
        height: y(0) - y((now[place] ?? 0) * plot.scale), class: `fill ${plot.series[0].style}`,
      });
      column.append(make("title", {}, `draft ${place + 1}: ${plot.format(now[place] ?? 0)}`));
      this.picture.append(column);
      if (place < all.length) {
        const at = y(all[place] * plot.scale);
        this.picture.append(make("line", { x1: middle - half - 4, x2: middle + half + 4, y1: at, y2: at, class: `tick ${plot.series[1].style}` }));
      }
      this.picture.append(make("text", { x: middle, y: HEIGHT - 7, "text-anchor": "middle" }, `draft ${place + 1}`.slice(step < 44 ? 6 : 0)));
    }
    const words = (shares) => shares.map((share) => plot.format(share)).join(" ") || "-";
    const [first, second] = plot.series;
    this.#legend([[first, words(now), "fill"], [second, words(all), "tick"]], newest ? clock(newest.at) : "");
  }

  // Lines and numbers of the upright axis; where a value lies.
  #axes(most) {
    const marks = ticks(most, 4);
    const top = marks[marks.length - 1];
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);
    for (const mark of marks) {
      const at = y(mark);
      this.picture.append(
        make("line", { x1: LEFT, x2: LEFT + this.wide, y1: at, y2: at, class: mark ? "rule" : "axis" }),
        make("text", { x: LEFT - 5, y: at + 4, "text-anchor": "end" }, plain(mark)),
      );
    }
    return y;
  }

  #times(x) {
    const { now, span } = this.view;
    const [step, unit, name] = span > 300 ? [span / 5, 60, "min"] : [span / 4, 1, "s"];
    for (let back = 0; back <= span; back += step) {
      const words = back ? `-${plain(back / unit)} ${name}` : "now";
      const anchor = back ? (back < span ? "middle" : "start") : "end";
      this.picture.append(make("text", { x: x(now - back), y: HEIGHT - 7, "text-anchor": anchor }, words));
    }
  }

  // The legend has the values at the pointer, or the newest.
  #values(rows, x) {
    const far = (point) => Math.abs(x(point.at) - this.pointed);
    let chosen = this.points.length - 1;
    if (this.pointed !== null) this.points.forEach((point, index) => { if (far(point) < far(this.points[chosen])) chosen = index; });
    const point = this.points[chosen];
    const word = (value) => (value === null || value === undefined ? "-" : this.plot.format(value));
    const kind = this.plot.kind === "lines" ? "lines" : "fill";
    this.#legend(
      this.plot.series.map((series, place) => [series, word(point && rows[chosen][place]), kind]),
      point ? clock(point.at) : "",
    );
    if (this.pointed !== null && point) {
      const at = x(point.at);
      this.picture.append(make("line", { x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM, class: "pointer" }));
    }
  }

  #legend(entries, moment) {
    const items = entries.map(([series, word, kind]) => make("li", {}, sign(series.style, kind), `${series.name} ${word}`));
    this.legend.replaceChildren(...items);
    this.moment.textContent = moment;
    const words = entries.map(([series, word]) => `${series.name} ${word}`).join(", ");
    this.picture.setAttribute("aria-label", `${this.plot.title}, ${this.plot.unit}: ${words}`);
  }
}
