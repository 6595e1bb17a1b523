// What all parts of the page share: elements, numbers, colours, stored arrays.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children; strings become text, never markup. */
function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key, value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

/** A number to so many significant digits, plain. */
function digits(value, count = 4) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const places = count - 1 - Math.floor(Math.log10(Math.abs(value)));
  return value.toFixed(Math.min(12, Math.max(0, places)));
}

function percent(share, places = 1) {
  return share === null || share === undefined ? "–" : `${(100 * share).toFixed(places)}\u00a0%`;
}

/** A change as people write it: −22.8 %, +0.4 %. */
function change(share, places = 1) {
  const text = percent(Math.abs(share), places);
  if (Number.parseFloat(text) === 0) return text;
  return (share < 0 ? "−" : "+") + text;
}

function table(heads, rows, foot = null) {
  const row = (cells, tag) =>
    make("tr", {}, ...cells.map((cell, i) => make(i === 0 ? "th" : tag, { scope: i === 0 ? "row" : null }, cell)));
  return make(
    "table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows.map((cells) => row(cells, "td"))),
    foot ? make("tfoot", {}, row(foot, "td")) : null,
  );
}

/** A share as number and bar. */
function bar(share) {
  const inner = make("i");
  inner.style.width = `${100 * Math.min(1, share)}%`;
  return make("span", {}, percent(share), make("span", { class: "bar", "aria-hidden": "true" }, inner));
}

// cividis, which reads the same with and without colour vision, from dark to bright.
const RAMP = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#fee838"]
  .map((hex) => [1, 3, 5].map((at) => Number.parseInt(hex.slice(at, at + 2), 16)));

function rampColour(share) {
  const at = Math.min(1, Math.max(0, share)) * (RAMP.length - 1);
  const low = Math.min(RAMP.length - 2, Math.floor(at));
  return RAMP[low].map((value, i) => Math.round(value + (at - low) * (RAMP[low + 1][i] - value)));
}

function css(colour, alpha = 1) {
  return `rgba(${colour.join(",")},${alpha})`;
}

/** Black or white, whichever stands out from a colour. */
function inkOn(colour) {
  return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 128 ? "#000000" : "#ffffff";
}

function rampBar(low, high) {
  const strip = make("i");
  strip.style.background = `linear-gradient(90deg, ${RAMP.map((c) => css(c)).join(",")})`;
  return make("p", { class: "ramp", "aria-hidden": "true" }, low, strip, high);
}

/** Little-endian 16-bit numbers out of base64. */
function numbers16(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}
