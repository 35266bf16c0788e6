// What both kinds of drawings need: SVG elements, round numbers for axes, and words for numbers.

const SVG = "http://www.w3.org/2000/svg";

// An element with attributes and children; text children become text.
export function make(name, attributes = {}, ...children) {
  const svg = !["div", "p", "span", "figure", "figcaption", "ul", "li", "tr", "th", "td", "option"].includes(name);
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Round numbers from 0 up to `most` or above, about `count` of them.
export function ticks(most, count) {
  if (!(most > 0)) return [0, 1];
  const raw = most / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((nice) => nice * power >= raw * 0.999) * power;
  const found = [];
  for (let place = 0; place * step < most * 1.0001 || found.length < 2; place += 1) found.push(place * step);
  if (found[found.length - 1] < most * 0.9999) found.push(found.length * step);
  return found;
}

// A tick's number without the noise of floating point.
export const plain = (number) => String(Number(number.toPrecision(6)));
export const percent = (share) => `${(100 * share).toFixed(1)}%`;
export const milliseconds = (seconds) => {
  const ms = 1e3 * seconds;
  return `${ms.toFixed(ms < 0.1 ? 3 : 2)} ms`;
};
export const hundredths = (number) => String(Number(number.toFixed(2)));
export const rate = (number) => number.toFixed(1);
export const clock = (at) => new Date(1e3 * at).toTimeString().slice(0, 8);

// The sign of a series in a legend.
export function sign(style, kind) {
  const svg = make("svg", { width: 18, height: 10, "aria-hidden": "true" });
  svg.append(
    kind === "lines"
      ? make("line", { x1: 0, x2: 18, y1: 5, y2: 5, class: `line ${style}` })
      : kind === "tick"
        ? make("line", { x1: 3, x2: 15, y1: 5, y2: 5, class: `tick ${style}` })
        : make("rect", { x: 3, y: 0, width: 12, height: 10, class: `fill ${style}` }),
  );
  return svg;
}
